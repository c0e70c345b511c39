"""Where commands compute and write: what cannot be is refused in one line, before any work."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import refused

from mixmask import cli, evaluation
from mixmask._devices import choose_device
from mixmask._seeds import check_seed
from mixmask.checkpoints.load import load_backbone
from mixmask.cli._console import open_streams, refuse
from mixmask.data.sets import load_data
from mixmask.evaluation import KNN, evaluate, load_task, results_file
from mixmask.evaluation.gallery import draw_map, draw_neighbours
from mixmask.figures.style import check_figure
from mixmask.trainers import loop, pretrain, start

WRONG_DEVICES = ("meta", "cuda:99", "abacus", "cpu:x", "-1")


def test_results_go_beside_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for source in (run, run / "last.pt"):
        before = {path.name for path in run.iterdir()}
        for command in ("map", "neighbours", "embed"):
            assert cli.main([command, str(source), "--device", "cpu"]) == 0
            assert f" {run}/" in capsys.readouterr().out.splitlines()[-1]
            assert "exists; name another --out" in refused([command, source], capsys)
        made = ("map.png", "neighbours.png", "features.npy", "features.csv")
        assert {path.name for path in run.iterdir()} == before | set(made)
        assert not list(elsewhere.iterdir())
        for name in made:
            (run / name).unlink()
    assert cli.main(["embed", str(run), "--out", "x.npy"]) == 0
    assert cli.main(["map", str(run), str(run / "last.pt")]) == 0  # Of no single run.
    assert {path.name for path in elsewhere.iterdir()} == {"x.npy", "x.csv", "map.png"}
    for command in ("map", "neighbours", "embed"):
        assert "RUN must be a run folder or a checkpoint file, got no" in refused(
            [command, "no/run"], capsys
        )


def test_a_device_that_cannot_compute_is_refused() -> None:
    assert choose_device("cpu") == choose_device(torch.device("cpu")) == torch.device("cpu")
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in (*WRONG_DEVICES, 99, -1, 2**70, torch.device("meta")):
        with pytest.raises(ValueError, match=f"--device {name} is not available; use cpu"):
            choose_device(name)
    for wrong in (True, 1.5, ["cpu"]):
        with pytest.raises(TypeError, match="--device must be a device or its name, got"):
            choose_device(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", WRONG_DEVICES)
def test_every_door_looks_at_the_device(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for words in (
        ["evaluate", "knn", run],
        ["map", run],
        ["neighbours", run],
        ["embed", run],
        ["pretrain", "--out", out],
        ["detect", run, "--data", tmp_path],
        ["ablate", "--out", out],
    ):
        assert f"--device {name} is not available" in refused([*words, f"--device={name}"], capsys)
    with pytest.raises(ValueError, match=f"--device {name} is not available"):
        load_task(run, device=name)
    with pytest.raises(ValueError, match=f"--device {name} is not available"):
        pretrain(out=out, device=name)
    assert not out.exists()


def test_threads_are_those_of_the_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"data": "clothing64", "epochs": 1, "image_size": 16, "device": "cpu"}
    options |= {"batch_size": 1024, "queue_size": 1024, "progress": False}
    used: list[int] = []
    before, train = torch.get_num_threads(), loop.train

    def noting(*given: Any, **named: Any) -> None:
        used.append(torch.get_num_threads())
        train(*given, **named)

    monkeypatch.setattr(start, "train", noting)
    for threads, expected in ((before + 1, before + 1), (None, before)):
        pretrain(**options, threads=threads)
        assert (used.pop(), torch.get_num_threads()) == (expected, before)
    with pytest.raises(ValueError, match="--threads must be at least 1, got 0; leave it out"):
        pretrain(**options, threads=0)
    with pytest.raises(TypeError, match="--threads must be an integer, got 'two'"):
        pretrain(**options, threads="two")  # type: ignore[arg-type]
    assert torch.get_num_threads() == before


# In /proc not even the administrator can make a file.
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that takes no file")
def test_a_folder_that_takes_no_file_is_noticed_before(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "evaluate", None)  # No work is begun.
    for command, out in (
        (["map", run], "/proc/x.png"),
        (["neighbours", run], "/proc/x.png"),
        (["show"], "/proc/x.png"),
        (["compare", run, run], "/proc/x.png"),
        (["embed", run], "/proc/x.npy"),
        (["export", run, "--to", "safetensors"], "/proc/x.safetensors"),
    ):
        line = refused([*command, "--out", out], capsys)
        assert line.startswith(f"mixmask: --out {out} cannot be written ("), line
    for folder, why in (("/proc/x", "No such file"), (str(run / "last.pt"), "File exists")):
        line = refused(["evaluate", "knn", run, "--out", folder], capsys)
        assert f"--out must be a folder, got {folder} ({why}" in line
    assert "--out must be a folder, got" in refused(
        ["evaluate", "knn", run, "--out", run / "last.pt" / "x"], capsys
    )


def test_a_figure_in_no_known_format_is_noticed_before(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["map", run], ["neighbours", run], ["show"], ["compare", run, run]):
        for suffix in ("abc", "pgf"):
            line = refused([*command, "--out", tmp_path / f"x.{suffix}"], capsys)
            assert f"x.{suffix} must end in one of" in line
    for name in ("x", "x.PNG", "x.svg"):
        check_figure(tmp_path / name, force=False)
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("seed", [-1, 2**31, 2**63, 10**30])
def test_seeds_that_some_library_refuses(
    seed: int, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["map", run], ["neighbours", run], ["show"]):
        line = refused([*command, "--seed", seed, "--out", tmp_path / "x.png"], capsys)
        assert f"--seed must be {'at least 0' if seed < 0 else 'below 2**31'}, got {seed}" in line
    task = load_task(run)
    for draw in (draw_map, draw_neighbours):
        with pytest.raises(ValueError, match="--seed must be"):
            draw(task, seed=seed)


def test_a_seed_is_a_whole_number() -> None:
    check_seed(2**31 - 1)
    with pytest.raises(TypeError, match=r"--seed must be an integer, got 1\.5"):
        check_seed(1.5)  # type: ignore[arg-type]


def test_paths_may_be_text(run: Path, photographs: Path, tmp_path: Path) -> None:
    task = load_task(str(run), data=photographs)
    assert load_backbone(str(run)).arch == "narrow"
    result = evaluate(task, KNN())
    assert result.write(str(tmp_path / "results")).parent == tmp_path / "results"
    path = results_file(KNN(), task.sources[0], str(tmp_path))
    assert path.parent == tmp_path
    assert len(load_data(photographs, 16).train.images) == 42


def test_evaluate_says_what_it_takes(run: Path) -> None:
    with pytest.raises(
        TypeError, match=r"task must be a Task, got 'runs/a'; .*load_task\('runs/a'"
    ):
        evaluate("runs/a", "knn")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"protocol must be one such as KNN\(\), got 'knn'"):
        evaluate(load_task(run), "knn")  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_stream_that_has_not_every_letter(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # It has no encoding to change.
    assert cli.main(["pretrain", "--help"]) == 0
    cli._console.say("λ ± \udcff")
    expected = "λ ± ?" if encoding == "utf-8" else "? ±" if encoding == "cp1252" else "? ? ?"
    assert expected.encode(encoding) in raw.getvalue()


def test_a_choice_of_the_user_s_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdout", stream)
    open_streams()
    assert stream.errors == "surrogateescape"


def test_pipes_and_devices_are_not_waited_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, image = tmp_path / "pipe.png", next((run.parent / "photographs").rglob("*.png"))
    os.mkfifo(pipe)
    for path in (pipe, "/dev/zero", tmp_path):
        line = refused(["show", image, path, "--out", tmp_path / "x.png"], capsys)
        assert f"{path} is not a readable image (it is a folder, a pipe or a device)" in line
    for command in (["evaluate", "knn"], ["export", "--to", "timm", "--out", tmp_path / "x"]):
        assert f"{pipe} is a pipe or a device; pass a run" in refused([*command, pipe], capsys)
    with pytest.raises(
        ValueError, match="a task needs a run folder or a checkpoint file, got none"
    ):
        load_task(data="clothing64")


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "knn", "RUN"], ["export", "RUN", "--to", "safetensors", "--out", "OUT"],
        ["detect", "RUN", "--data", "x"], ["show", "--out", "OUT"], ["ablate", "--out", "OUT"],
        ["compare", "RUN", "RUN", "--out", "OUT"], ["map", "RUN", "--out", "OUT"],
        ["neighbours", "RUN", "--out", "OUT"], ["embed", "RUN", "--to", "npy", "--out", "OUT"],
    ],
)  # fmt: skip
def test_several_processes_of_one_command_are_refused(
    words: list[str],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, before = tmp_path / "x.safetensors", set(run.iterdir())
    places = {"RUN": str(run), "OUT": str(out)}
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused([places.get(word, word) for word in words], capsys)
    assert line == f"mixmask: {words[0]} runs in one process; start it without a launcher"
    assert not out.exists()
    assert set(run.iterdir()) == before


@pytest.mark.parametrize("text", ["abc", "-1"])
def test_a_number_of_processes_that_is_none_is_named(
    text: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    for words in (["evaluate", "knn", run], ["pretrain", "--resume", run]):
        assert f"WORLD_SIZE, which launchers set, must be a number of processes, got {text!r}" in (
            refused(words, capsys)
        )
    monkeypatch.setenv("WORLD_SIZE", "")  # As a script leaves it that found no number.
    assert cli.main(["evaluate", "knn", str(run), "--device", "cpu"]) == 0


def test_links_that_lead_to_themselves_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for words in (["evaluate", "knn", run, "--out", loop], ["pretrain", "--out", loop]):
        assert "links" in refused(words, capsys).lower().replace("symlink loop", "links")


def test_a_full_disk_is_named_by_embed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    out = tmp_path / "features.npy"
    told = refused(["embed", str(run), "--to", "npy", "--out", str(out)], capsys)
    assert f"No space left for {out}" in told
    assert not list(tmp_path.glob("features*"))


def test_sizes_beyond_any_memory_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["evaluate", "linear"], ["map"]):
        assert cli.main([*command, str(run), "--image-size", "99999999"]) == 2
        told = capsys.readouterr().err.splitlines()  # The first says that views enlarge the images.
        assert len(told) == 2
        assert "out of memory: use a smaller" in told[1]


def test_refusals_keep_the_blanks_of_paths(capsys: pytest.CaptureFixture[str]) -> None:
    assert refuse("no  such\n   file a  b\tc") == 2
    assert capsys.readouterr().err == "mixmask: no  such file a  b\tc\n"
    line = refused(["evaluate", "knn", "two  blanks"], capsys)
    assert "got two  blanks: not found" in line


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf8_reach_every_output(
    photographs: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        (photographs / split / "dog").rename(photographs / split / os.fsdecode(b"d\xffg"))
    cat = photographs / "train" / "cat" / "cat0.png"
    cat.rename(cat.with_name(os.fsdecode(b"\xe9.png")))
    data = photographs.rename(photographs.with_name(os.fsdecode(b"ph\xfftos")))
    run = run.rename(run.with_name(os.fsdecode(b"r\xffn")))
    source: list[Any] = [run, "--data", data, "--device", "cpu"]
    for command in (
        ["evaluate", "knn", *source],
        ["map", *source, "--out", run / "map.svg"],
        ["neighbours", *source, "--out", run / "neighbours.png"],
        ["embed", *source, "--out", run / "features.npy"],
        ["show", *data.glob("train/cat/*1.png"), "--out", run / "show.png"],
        ["export", run, "--to", "safetensors", "--out", run / os.fsdecode(b"\xff.safetensors")],
    ):
        words = [str(word) for word in command]
        assert cli.main(words) == 0, capsys.readouterr().err
    (path,) = run.glob("evaluate-*.json")
    content = json.loads(path.read_bytes().decode())
    assert content["data"] == str(data)  # As it is, for JSON can escape it.
    assert "d\\udcffg" in content["per_class"]
    assert "\\udcffg" in (run / "map.svg").read_text()
    table = (run / "features.csv").read_bytes().decode().splitlines()
    assert r"train,cat,cat/\udce9.png" in table
    assert len(np.load(run / "features.npy")) == len(table) - 1


def test_names_that_are_not_utf8_on_a_real_terminal(photographs: Path, run: Path) -> None:
    data = photographs.rename(photographs.with_name(os.fsdecode(b"ph\xfftos")))
    for encoding in ("ascii", "utf-8"):
        done = subprocess.run(
            [sys.executable, "-m", "mixmask", "evaluate", "knn", run, "--data", data, "--force"],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert b"ph?tos" in done.stdout
