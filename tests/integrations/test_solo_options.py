"""What the configuration may say, and where solo-learn is missing."""

from __future__ import annotations

import subprocess
import sys
import types
from typing import Any

import pytest
from solo_models import (
    make_cfg,
    needs_solo,
)
from solo_oracles import (
    METHODS,
)

from mixmask import MixMask
from mixmask.integrations import solo as integration

pytest_plugins = ("solo_fixtures",)

UNSUPPORTED = {
    "all4one": "a transformer over the clean batch",
    "base": "it has no loss of its own",
    "deepclusterv2": "looked up by the number of an image",
    "mae": "it masks images itself",
    "nnbyol": "neighbours as the targets of a predictor",
    "nnsiam": "neighbours as the targets of a predictor",
    "supcon": "labels choose its positives",
    "vibcreg": "its head whitens each batch",
    "wmse": "it whitens all views of a batch together",
}


@pytest.fixture
def building_fails(monkeypatch: pytest.MonkeyPatch, theirs: dict[str, Any]) -> None:
    """Fail where a model is built."""

    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(theirs["base"], "__init__", refuse)


@needs_solo
@pytest.mark.usefixtures("building_fails")
@pytest.mark.parametrize(
    "block, error, text",
    [
        ({"grid": 4}, ValueError, "no option 'grid'; it takes .*grid_size.*switch, symmetric"),
        ({"grid_size": 1}, ValueError, "grid_size must be at least 2, got 1"),
        ({"ratio": 1.5}, ValueError, "ratio must lie strictly between 0 and 1"),
        ({"pattern": "blocks"}, ValueError, "pattern must be one of 'block', 'discrete'"),
        ({"switch": "no"}, TypeError, "mixmask.switch must be a bool, got 'no'; write true or"),
        ({"enabled": "off"}, TypeError, "mixmask.enabled must be a bool, got 'off'"),
        ({"per_sample": 1}, TypeError, "mixmask.per_sample must be a bool, got 1"),
        ({"grid_size": 1, "enabled": False, "grid": 2}, ValueError, "no option 'grid'"),
        (True, TypeError, r"a block of options, got True; write .* mixmask: \{grid_size: 4\}"),
        (4, TypeError, "must be a block of options, got 4"),
        ("block", TypeError, "must be a block of options, got 'block'"),
        ([4], TypeError, r"must be a block of options, got \[4\]"),
    ],
    ids=str,
)
def test_a_bad_block_is_refused_before_anything_is_built(
    ours: dict[str, Any], block: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        ours["simclr"](make_cfg("simclr", mixmask=block))


@needs_solo
@pytest.mark.usefixtures("building_fails")
def test_barlow_twins_refuses_one_lam_a_sample(ours: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"per_sample needs a loss of each image, .*; leave"):
        ours["barlow_twins"](make_cfg("barlow_twins", mixmask={"per_sample": True}))


@needs_solo
@pytest.mark.usefixtures("building_fails")
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_methods_it_does_not_go_into_say_why(ours: dict[str, Any], name: str) -> None:
    text = f"does not support the method '{name}': .*{UNSUPPORTED[name]}.* use one of barlow"
    with pytest.raises(ValueError, match=text):
        ours[name](make_cfg(name, mixmask={"grid_size": 4}))


@needs_solo
def test_every_method_is_either_mixed_or_refuses(
    ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    assert {*METHODS, *UNSUPPORTED, "linear"} == set(ours)
    assert ours["linear"] is theirs["linear"]
    assert all(issubclass(ours[name], theirs[name]) for name in theirs)
    block = {"enabled": False}
    model = ours["supcon"](make_cfg("supcon", mixmask=block))
    assert model.state_dict().keys() == theirs["supcon"](make_cfg("supcon")).state_dict().keys()


@needs_solo
def test_a_method_of_ones_own_refuses(
    ours: dict[str, Any], theirs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ours, "mine", type("Mine", (theirs["simclr"],), {}))
    integration.patch()
    with pytest.raises(ValueError, match="method 'mine': it was not tested; use one of"):
        ours["mine"](make_cfg("mine", mixmask={"grid_size": 4}))


@needs_solo
def test_a_range_may_be_a_list_as_yaml_has_it(ours: dict[str, Any]) -> None:
    model = ours["simclr"](make_cfg("simclr", mixmask={"ratio": [0.2, 0.4]}))
    assert model.mixmask.masks.ratio == (0.2, 0.4)


@needs_solo
def test_an_empty_block_means_the_defaults(ours: dict[str, Any]) -> None:
    assert repr(ours["simclr"](make_cfg("simclr", mixmask={})).mixmask) == repr(MixMask())


@needs_solo
def test_patching_twice_is_harmless(ours: dict[str, Any]) -> None:
    from solo.utils.auto_resumer import AutoResumer

    before = dict(ours)
    integration.patch()
    assert ours == before
    assert AutoResumer.SHOULD_MATCH.count("mixmask") == 1


def test_without_solo_learn_the_error_says_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("solo", "solo.methods"):
        monkeypatch.setitem(sys.modules, module, None)
    text = r"integrations\.solo needs solo-learn, .*; install it from its repository, vturrisi/"
    with pytest.raises(ImportError, match=text):
        integration.patch()


def test_the_old_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        def __init__(self, backbone: str, num_classes: int, max_epochs: int) -> None:
            raise AssertionError(backbone, num_classes, max_epochs)

    found = {"base": Old, "simclr": Old}
    modules: dict[str, dict[str, Any]] = {
        "solo": {},
        "solo.methods": {"METHODS": found},
        "solo.utils": {},
        "solo.utils.auto_resumer": {"AutoResumer": type("AutoResumer", (), {"SHOULD_MATCH": []})},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    text = r"1\.0\.6 or newer, .* built from \['backbone', 'num_classes', 'max_epochs'\]"
    with pytest.raises(ImportError, match=text):
        integration.patch()
    assert found == {"base": Old, "simclr": Old}


@pytest.mark.parametrize(
    "arguments, named",
    [([], "got none"), (["nowhere.py", "x=1"], "got 'nowhere.py'"), (["."], "'.'")],
)
def test_without_a_script_it_says_so_in_one_line(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        integration.main(arguments)
    assert exited.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert "expected the path of solo-learn's main_pretrain.py" in line


def test_the_module_runs_and_imports_nothing_of_solo_learn() -> None:
    code = (
        "import sys, mixmask.integrations.solo\n"
        "found = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not found & {'solo', 'lightning', 'omegaconf'}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    command = [sys.executable, "-m", "mixmask.integrations.solo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
