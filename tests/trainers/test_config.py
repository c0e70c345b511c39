"""Defaults, presets, errors, and the way to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser

from mixmask import cli
from mixmask.runs.folder import FORMAT, write_config
from mixmask.runs.options import flag
from mixmask.trainers.config import PRESETS, RunConfig
from mixmask.trainers.files import load_config
from mixmask.trainers.loop import learning_rate
from mixmask.trainers.methods import METHODS, make_config
from mixmask.trainers.methods.moco import MoCoConfig

every_method = pytest.mark.parametrize("method", METHODS)


def test_defaults_are_moco_v2_on_imagenet() -> None:
    config = MoCoConfig()
    assert (config.arch, config.image_size, config.batch_size, config.lr) == (
        "resnet50",
        224,
        256,
        0.03,
    )
    assert (config.queue_size, config.encoder_momentum, config.temperature) == (65_536, 0.999, 0.2)
    assert (config.grid_size, config.ratio, config.pattern) == (8, 0.5, "block")


@pytest.mark.parametrize("data", [*PRESETS, "photographs"])
@every_method
def test_presets_are_valid_and_yield_to_what_is_given(data: str, method: str) -> None:
    config = make_config(data=data, method=method)
    assert (config.method, config.data) == (method, data)
    assert type(config) is METHODS[method].config
    assert make_config(data=data, method=method, lr=0.5, epochs=3).lr == 0.5


def test_presets_name_data_and_options_that_there_are() -> None:
    shared = {field.name for field in dataclasses.fields(RunConfig)}
    assert all(shared >= set(preset) for preset in PRESETS.values())
    for entry in METHODS.values():
        known = {field.name for field in dataclasses.fields(entry.config)}
        assert set(PRESETS) >= set(entry.presets)
        assert all(known >= set(preset) for preset in (entry.defaults, *entry.presets.values()))


def test_what_a_method_is_outweighs_presets_for_the_data() -> None:
    first, second = (make_config(method=f"moco-v{version}", data="cifar10") for version in (1, 2))
    assert (first.temperature, second.temperature) == (0.07, 0.1)
    assert (first.schedule, second.schedule) == ("step", "cosine")
    assert first.queue_size == second.queue_size == 4096


@every_method
def test_json_round_trip(method: str, tmp_path: Path) -> None:
    per_sample = method != "barlow-twins"
    config = make_config(
        method=method, ratio=(0.25, 0.75), per_sample=per_sample, lr=0.123, dim=7, switch=False
    )
    write_config(tmp_path, dataclasses.asdict(config))
    loaded = load_config(tmp_path)
    assert type(loaded) is type(config)
    assert loaded == config


@every_method
def test_every_option_says_what_it_is(method: str) -> None:
    for field in dataclasses.fields(METHODS[method].config):
        text = field.metadata["help"]
        assert len(text) > 3, field.name
        assert "\n" not in text
        assert not text.endswith("."), field.name
        assert isinstance(field.metadata["choices"], tuple)


@pytest.mark.parametrize(
    "method, name, owners",
    [
        ("simclr", "queue_size", "moco-v1, moco-v2"),
        ("byol", "symmetric", "moco-v1, moco-v2"),
        ("moco-v2", "one_directional", "simclr"),
        ("moco-v1", "hidden", "byol, simsiam, swav"),
        ("swav", "encoder_momentum", "moco-v1, moco-v2, byol"),
        ("simsiam", "temperature", "moco-v1, moco-v2, simclr, swav"),
        ("barlow-twins", "prototypes", "swav"),
        ("swav", "redundancy_weight", "barlow-twins"),
    ],
)
def test_an_option_of_other_methods_is_refused_by_their_names(
    method: str, name: str, owners: str, tmp_path: Path
) -> None:
    message = rf"^{flag(name)} is not supported by {method} \(only by {owners}\);"
    with pytest.raises(ValueError, match=message):
        make_config(method=method, **{name: 1})
    fields = {"format": FORMAT} | dataclasses.asdict(make_config(method=method)) | {name: 1}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"is not a run that can be resumed.*'{name}'"):
        load_config(tmp_path)


def test_an_option_of_no_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^--colour is not supported by byol; leave it out$"):
        make_config(method="byol", colour="red")
    with pytest.raises(ValueError, match=r"^--epoch is not supported by byol, did you mean --epo"):
        make_config(method="byol", epoch=3)


def test_an_unknown_method_is_refused(tmp_path: Path) -> None:
    names = ", ".join(repr(name) for name in METHODS)
    with pytest.raises(ValueError, match=f"--method must be one of {names}, got 'dino'"):
        make_config(method="dino")
    fields = {"format": FORMAT} | dataclasses.asdict(make_config()) | {"method": "dino"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"is not a run that can be resumed.*'dino'"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"ratio": 0.5, "colour": "red"}'])
def test_what_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is not a run that can be resumed"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mix": "blend"}, "--mix must be one of 'none', 'mixmask'"),
        ({"ratio": 1.5}, "ratio must lie strictly between 0 and 1, got 1.5"),
        ({"grid_size": 33}, "--grid-size must be within 2 ... 32, got 33"),
        ({"grid_size": 63, "image_size": 224}, "--grid-size must be within 2 ... 62, got 63"),
        ({"roll": True, "pattern": "discrete"}, "--roll needs --pattern block"),
        ({"batch_size": 1}, "--batch-size must be at least 2, got 1"),
        ({"batch_size": 10, "bn_splits": 4}, "--bn-splits must divide --batch-size"),
        ({"temperature": 0.0}, "--temperature must be positive, got 0.0"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"lr": 0.0}, "--lr must be positive, got 0.0"),
        ({"lr": -1.0}, "--lr must be positive, got -1.0"),
        ({"hue": 0.9}, "--hue must be within 0 ... 0.5, got 0.9"),
        ({"seed": 2**31}, "--seed must be within 0 ... 2147483647, got 2147483648"),
        ({"queue_size": 2**63}, "--queue-size must be at most 2147483647, got 9223372036854775808"),
        ({"epochs": 10**400}, "--epochs must be at most 2147483647, got 1000"),
        ({"queue_size": 0}, "--queue-size must be at least 1, got 0"),
        ({"alpha": 0.0}, "--alpha must be positive, got 0.0"),
        ({"optimizer": "adam"}, "--optimizer must be one of 'sgd', 'lars', 'adamw'"),
        ({"method": "simclr", "temperature": -1.0}, "--temperature must be positive, got -1.0"),
        ({"method": "byol", "encoder_momentum": 1.1}, "--encoder-momentum must be within 0 ... 1"),
        ({"method": "byol", "hidden": 0}, "--hidden must be at least 1, got 0"),
        ({"method": "simsiam", "dim": 0}, "--dim must be at least 1, got 0"),
        ({"method": "barlow-twins", "scale": -1.0}, "--scale must be at least 0, got -1.0"),
        ({"method": "swav", "prototypes": 1}, "--prototypes must be at least 2, got 1"),
        ({"method": "swav", "frozen": 1.5}, "--frozen must be within 0 ... 1, got 1.5"),
        ({"method": "swav", "epsilon": 0.0}, "--epsilon must be positive, got 0.0"),
    ],
)
def test_errors_say_what_was_expected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_cosine_warms_up_and_ends_at_zero() -> None:
    config = MoCoConfig(lr=1.0, warmup=0.1)
    assert learning_rate(config, 0.05) == pytest.approx(0.5)
    assert learning_rate(config, 0.1) == pytest.approx(1.0)
    assert learning_rate(config, 0.55) == pytest.approx(0.5)
    assert learning_rate(config, 1.0) == pytest.approx(0.0)


def test_steps_fall_at_60_and_80_percent() -> None:
    config = MoCoConfig(lr=1.0, schedule="step")
    rates = [learning_rate(config, done) for done in (0.0, 0.59, 0.6, 0.79, 0.8, 1.0)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_launchers_hand_every_option_on() -> None:
    """A launcher reads a word that begins like its own option as that, or as ambiguous."""
    names = {field.name for e in METHODS.values() for field in dataclasses.fields(e.config)}
    words = ["pretrain", *(word for name in sorted(names) for word in (flag(name), "5"))]
    for parser in (torchrun_parser(), launch_command_parser()):
        assert parser.parse_args(["-m", "mixmask", *words]).training_script_args == words


def test_help_shows_the_defaults_of_a_plain_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert cli.main(["pretrain", "--help"]) == 0
    text = capsys.readouterr().out
    config = make_config()
    for name in ("arch", "image_size", "epochs", "lr", "queue_size", "temperature"):
        (line,) = re.findall(rf"^ +{flag(name)} [A-Z].*", text, re.MULTILINE)
        assert f"[{getattr(config, name)}]" in line
    assert "instead of one per batch [off]" in text


def test_help_names_each_option_once_and_the_methods_that_own_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert cli.main(["pretrain", "--help"]) == 0
    text = capsys.readouterr().out.partition("options:")[2]
    text = re.sub(r"^\w+:$", "", text, flags=re.MULTILINE)  # The headings of groups.
    described = [" ".join(part.split()) for part in re.split(r"\n +(?=-)", text)]
    shared = {field.name for field in dataclasses.fields(RunConfig)}
    names = {field.name for e in METHODS.values() for field in dataclasses.fields(e.config)}
    for name in names - {"channels"}:  # Those of the data.
        (line,) = [line for line in described if re.match(rf"{flag(name)}[ ,]", line)]
        owners = [method for method, e in METHODS.items() if name in e.config.__dataclass_fields__]
        assert line.endswith(f"({', '.join(owners)})") == (name not in shared), line


def test_a_configuration_is_complete_and_of_the_right_types(tmp_path: Path) -> None:
    whole = dataclasses.asdict(make_config())
    numbered = {"format": FORMAT} | whole
    cases: list[tuple[dict[str, Any], str]] = [
        ({n: v for n, v in numbered.items() if n != "epochs"}, "missing: 'epochs'"),
        ({n: v for n, v in numbered.items() if n != "keep"}, "missing: 'keep'"),
        ({n: v for n, v in numbered.items() if n != "save_minutes"}, "missing: 'save_minutes'"),
        (whole, "names no 'format', so it is not that of a run"),
        (numbered | {"format": FORMAT - 1}, f"in format {FORMAT - 1}, but this version, "),
        (numbered | {"batch_size": "many"}, "--batch-size must be a whole number, got 'many'"),
        (numbered | {"batch_size": True}, "--batch-size must be a whole number, got True"),
        (numbered | {"batch_size": 2.5}, "--batch-size must be a whole number, got 2.5"),
        (numbered | {"lr": None}, "--lr must be a number, got None"),
        (numbered | {"switch": 1}, "--switch must be true or false, got 1"),
        (numbered | {"tracker": []}, "--tracker must be text, got "),
        (numbered | {"weight_decay": 10**400}, "--weight-decay"),
        (numbered | {"grid_size": 1000}, "--grid-size must be within"),
        (numbered | {"ratio": "half"}, "ratio"),
    ]
    for content, message in cases:
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"is not a run that can be resumed: .*{message}"):
            load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(numbered))
    assert load_config(tmp_path) == make_config()
