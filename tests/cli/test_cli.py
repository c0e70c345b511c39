"""The command line as a user meets it: files, exit codes, and one line for what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixmask import cli

TINY = ["--epochs", "1", "--batch-size", "8", "--image-size", "16", "--queue-size", "16"]
RUN_FILES = {"config.json", "curves.png", "last.pt", "metrics.csv", "views.png"}


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 4)):
        for label in ("cat", "dog"):
            folder = tmp_path / "photographs" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(256, size=(24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photographs"


def options(photographs: Path, *more: str) -> list[str]:
    return ["pretrain", "--data", str(photographs), "--arch", "narrow", *TINY, *more]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_pretrain_leaves_a_run_folder(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert (
        cli.main(options(photographs, "--out", str(out), "--grid-size", "4", "--per-sample")) == 0
    )
    assert {file.name for file in out.iterdir()} == RUN_FILES
    config = json.loads((out / "config.json").read_text())
    assert (config["grid_size"], config["per_sample"], config["switch"]) == (4, True, True)
    printed = capsys.readouterr().out
    assert "nearest neighbours" in printed
    assert "untrained" in printed
    assert "20 images, recipe cifar10, narrow at 16 px, batch size 8, 1 epoch, " in printed
    assert f"next: mixmask evaluate knn {out}\n" in printed
    exported = tmp_path / "backbone.safetensors"
    (advice,) = (line for line in printed.splitlines() if "mixmask export" in line)
    words = advice.replace("backbone.safetensors", str(exported)).split()[1:]
    assert cli.main(words) == 0
    assert exported.exists()


def test_streamed_folder_is_measured_and_resumed_from_disk(
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mixmask.evaluation.monitor.MEASURED", 15)
    monkeypatch.setattr("mixmask.cli.pretrain._MUCH_WAITING", 0.0)
    out = tmp_path / "run"
    assert cli.main(options(photographs, "--stream", "always", "--out", str(out))) == 0
    printed = capsys.readouterr().out
    assert "the images stay on disk and are decoded by workers in each epoch" in printed
    assert "use 15 of the training images" in printed
    assert "nearest neighbours" in printed
    assert "the training waited for images" in printed
    assert json.loads((out / "config.json").read_text())["stream"] == "always"
    assert cli.main(["pretrain", "--resume", str(out)]) == 0
    assert {file.name for file in out.iterdir()} >= RUN_FILES


def test_config_keeps_where_the_images_were(photographs: Path, tmp_path: Path) -> None:
    assert cli.main(options(photographs, "--out", str(tmp_path / "run"))) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["stream"] == "never"


def test_out_has_a_default_that_overwrites_nothing(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert cli.main(options(photographs, "--mix", "none")) == 0
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert runs == ["photographs-moco-v2-none", "photographs-moco-v2-none-2"]


def test_folder_without_labels_says_so(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = photographs / "train" / "cat"
    assert cli.main(options(flat, "--out", str(tmp_path / "run"))) == 0
    printed = capsys.readouterr().out
    assert "no labelled test split: accuracies are off\n" in printed
    assert "--data LABELLED" in printed


def test_existing_run_folder_is_refused(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    line = refused(options(photographs, "--out", str(tmp_path / "run")), capsys)
    assert "exists and is not empty; continue it with --resume" in line
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_a_finished_run_has_nothing_left_to_do(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cli.main(options(photographs, "--out", str(out))) == 0
    first = capsys.readouterr().out
    assert "done in " in first
    assert cli.main(["pretrain", "--resume", str(out)]) == 0
    again = capsys.readouterr().out
    advice = f"mixmask pretrain --resume {out} --epochs N, with N above 1; see"
    assert f"nothing was left to do; to train longer: {advice}" in again
    assert cli.main(["pretrain", "--resume", str(out), "--epochs", "2"]) == 0
    longer = capsys.readouterr().out
    for text, done in ((first, True), (again, False), (longer, True)):
        assert ("done in " in text, "left to do" in text) == (done, not done)


def test_resume_of_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["pretrain", "--resume", str(tmp_path)], capsys)
    assert "is not a run that can be resumed" in line


def test_resume_takes_no_other_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["pretrain", "--resume", str(tmp_path), "--lr", "1"], capsys)
    assert "--resume uses the run's own options; remove --lr" in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lr", "0"], "--lr must be positive, got 0.0"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--mix", "blend"], "argument --mix: invalid choice: 'blend'"),
        (["--ratio", "1.5"], "ratio must lie strictly between 0 and 1"),
        (["--ratio", "0.1", "0.2", "0.3"], "--ratio takes one or two numbers, got 3"),
        (["--grid-size", "64"], "--grid-size must be within 2 ... 16"),
        (["--arch", "resnet81"], "--arch resnet81 is not a timm backbone"),
        (["--data", "nowhere"], "--data must be a folder or one of clothing64"),
        (["--batch-size", "21"], "--batch-size 21 is more than the 20 images"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--threads", "99999999"], "--threads must be at most "),
    ],
)
def test_bad_options_are_refused_in_one_line(
    arguments: list[str],
    message: str,
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    line = refused(options(photographs, "--out", str(out), *arguments), capsys)
    assert message in line
    assert not out.exists()


def test_folder_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    line = refused(["pretrain", "--data", str(images), "--out", str(out)], capsys)
    assert "holds no images" in line


def test_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_EXTRA", ("torch", "no_such_library"))
    assert refused(["show"], capsys).endswith(
        "needs no_such_library; run pip install '.[train]' in the checkout of mixmask"
    )


def test_show_draws_own_and_embedded_images(photographs: Path, tmp_path: Path) -> None:
    own = [str(photographs / "train" / "cat" / f"{i}.png") for i in range(3)]
    for i, images in enumerate(([], own)):
        out = tmp_path / f"{i}.png"
        assert cli.main(["show", *images, "--out", str(out), "--grid-sizes", "2", "4"]) == 0
        with Image.open(out) as image:
            assert image.format == "PNG"


def test_show_refuses_what_it_cannot_draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    assert "bad.jpg is not a readable image" in refused(["show", str(bad), str(bad)], capsys)
    assert "one image has no partner" in refused(["show", str(bad)], capsys)
    for images in ([str(tmp_path)], [str(tmp_path), str(bad)]):
        assert f"; name files, as {tmp_path}/*.jpg does" in refused(["show", *images], capsys)
    nowhere = str(tmp_path / "no" / "x.png")
    assert "which is not a folder" in refused(["show", "--out", nowhere], capsys)
    assert "bad.jpg exists; name another --out" in refused(["show", "--out", str(bad)], capsys)
    assert bad.read_bytes() == b"no image"
    assert cli.main(["show", "--out", str(bad.with_suffix(".png")), "--force"]) == 0


def test_help_explains_every_option_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "--help"]) == 0
    text = capsys.readouterr().out
    groups = {
        "data:": "--recipe", "views:": "--min-scale", "mixing:": "--no-switch",
        "method:": "--queue-size", "optimiser:": "--lr", "run:": "--resume",
    }  # fmt: skip
    places = [text.index(word) for pair in groups.items() for word in ("\n" + pair[0], pair[1])]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "words, hint",
    [
        (["pretrain", "--grid-sise", "4"], ", did you mean --grid-size?; see mixmask pretrain -"),
        (
            ["evaluate", "knn", "x", "--kk=3"],
            ", did you mean --k?; see mixmask evaluate knn -",
        ),
        (["show", "--zzz"], "unrecognized arguments: --zzz; see mixmask show --help"),
        (["pretrian"], "invalid choice: 'pretrian'"),
    ],
)
def test_a_mistyped_word_gets_a_hint(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hint in refused(words, capsys)


def test_options_may_be_spelt_with_underscores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = str(tmp_path / "no_folder")
    assert "--grid-size must be" in refused(["pretrain", "--grid_size", "1"], capsys)
    assert named in refused(["pretrain", f"--data={named}", "--batch_size=8"], capsys)


def test_ctrl_c_exits_with_130_and_the_run_goes_on(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "mixmask", *options(photographs), "--out", str(out)]
    command[command.index("--epochs") + 1] = "400"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (out / "last.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    advice = f"mixmask: interrupted; continue with mixmask pretrain --resume {out}"
    assert errors.decode().strip().endswith(advice)
    assert b"Traceback" not in errors
    # The rest would take long; that it starts where the other stopped is what matters here.
    config = out / "config.json"
    epochs = len((out / "metrics.csv").read_text().splitlines()) - 1
    text = config.read_text().replace('"epochs": 400', f'"epochs": {epochs + 1}')
    config.write_text(text)
    resumed = subprocess.run(
        [sys.executable, "-m", "mixmask", "pretrain", "--resume", str(out)],
        check=False, capture_output=True, env=os.environ, timeout=120,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert {file.name for file in out.iterdir()} >= RUN_FILES


def test_recipes_name_their_source_and_what_was_published(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mixmask.trainers.config import PRESETS

    assert cli.main(["recipes"]) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if not line.startswith(" ")] == list(PRESETS)
    assert text.count("  source: ") == len(PRESETS)
    for published in (
        "69.2 % with --method moco-v2 --mix mixmask (linear; the authors' code)",
        "68.1 % with --method moco-v2 --mix mixmask --pattern discrete (kNN; MixMask, table 1)",
        "68.83 % with --method moco-v2 --mix unmix --symmetric (kNN; Un-Mix's code)",
    ):
        assert published in text


def test_published_accuracies_name_options_that_there_are() -> None:
    from mixmask.trainers.methods import make_config
    from mixmask.trainers.recipes import PUBLISHED

    for recipe, published in PUBLISHED.items():
        for method_and_options in (text for group in published.values() for text in group):
            words = ["pretrain", "--method", *method_and_options.split()]
            given = vars(cli._parser(words).parse_args(words))
            options = {name: given[name] for name in given.keys() - {"command", "out", "resume"}}
            config = make_config(data="photographs", recipe=recipe, **options)
            assert f"--mix {config.mix}" in method_and_options


def test_out_of_memory_names_the_options_that_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("mixmask.trainers.start.train", full)
    assert cli.main(["pretrain", "--out", str(tmp_path / "run")]) == 2
    assert "--accumulate 2" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["full", "closed", "pipe"])
def test_standard_output_may_be_gone(where: str, tmp_path: Path) -> None:
    command = f"{sys.executable} -m mixmask recipes"
    ends = {"full": "> /dev/full", "closed": ">&-", "pipe": "| true"}
    script = f"set -o pipefail; {command} {ends[where]}"
    done = subprocess.run(
        ["bash", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = "mixmask: standard output is gone (No space left on device); going on without it\n"
    assert (
        done.stderr
        in {
            "full": [told],
            "closed": [""],
            "pipe": ["", told.replace("No space left on device", "Broken pipe")],
        }[where]
    )


def test_the_hosts_memory_may_run_out_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(*_: object, **__: object) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr("mixmask.trainers.start.train", full)
    out = tmp_path / "run"
    line = refused(["pretrain", "--out", str(out)], capsys)
    assert line.startswith("mixmask: out of memory: --accumulate 2 halves what a step holds")
    assert not out.exists()


def test_a_device_that_is_not_there_is_refused(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(
        options(photographs, "--device", "cuda:99", "--out", str(tmp_path / "x")), capsys
    )
    assert "--device cuda:99 is not available; use cpu" in line


def test_a_run_is_started_again_from_its_configuration(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main(options(photographs, "--out", str(one), "--lr", "0.01")) == 0
    again = ["pretrain", "--config", str(one / "config.json"), "--seed", "3", "--out", str(two)]
    assert cli.main([*again, "--device", "cpu"]) == 0
    first, second = (json.loads((out / "config.json").read_text()) for out in (one, two))
    assert {name for name in first if first[name] != second[name]} == {"seed"}
    printed = capsys.readouterr().out
    assert cli.main(["pretrain", "--resume", str(one), "--epochs", "2"]) == 0
    assert "2 epochs instead of 1: weights, images, views and masks go on exactly" not in printed
    assert "2 epochs instead of 1: weights, images" in capsys.readouterr().out
