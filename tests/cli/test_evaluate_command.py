"""`mixmask evaluate` as a user meets it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluated import refused, results, write_run
from PIL import Image
from sklearn.linear_model import LogisticRegression

from mixmask import cli
from mixmask.checkpoints.load import load_backbone
from mixmask.data.sets import ImageData
from mixmask.evaluation import (
    KNN,
    FineTuning,
    Linear,
    LinearSGD,
    Protocol,
    evaluate,
    load_task,
)
from mixmask.runs.images import load_images


def test_knn_leaves_results_beside_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "knn", str(run), "--k", "100", "--temperature", "0.2"]) == 0
    found = results(run, "knn_k-100_temperature-0.2")
    assert (found["k"], found["temperature"]) == (42, 0.2)
    assert (found["n_train"], found["n_test"], found["image_size"]) == (42, 16, 16)
    assert np.sum(found["confusion"], axis=1).tolist() == [6, 6, 4]
    assert found["top1"] == pytest.approx(np.trace(found["confusion"]) / 16)
    assert "top5" not in found
    assert found["mean_class"] == pytest.approx(np.mean(list(found["per_class"].values())))
    assert set(found["versions"]) == {"python", "torch", "timm", "mixmask"}
    printed = capsys.readouterr().out
    low, high = found["intervals"]["top1"]
    assert low < found["top1"] < high
    row = f"top-1 {found['top1']:.1%} {low:.1%} ... {high:.1%}".split()
    assert printed.splitlines()[2].split() == row
    assert "interval (95 %, Wilson)" in printed
    assert len(printed.splitlines()) <= 6


def test_the_worst_class_is_named_only_where_there_is_one(
    run: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = tmp_path / "same"  # Tested on what it was trained on: each image's neighbour is itself.
    shutil.copytree(photographs / "train", same / "train")
    shutil.copytree(photographs / "train", same / "val")
    assert cli.main(["evaluate", "knn", str(run), "--data", str(same), "--k", "1"]) == 0
    printed = capsys.readouterr().out
    assert "mean over classes      100.0%" in printed
    assert "worst:" not in printed
    Image.new("RGB", (20, 20), "white").save(same / "val" / "owl" / "white.png")
    Image.new("RGB", (20, 20), "white").save(same / "train" / "cat" / "white.png")
    options = ["--data", str(same), "--k", "1", "--force"]
    assert cli.main(["evaluate", "knn", str(run), *options]) == 0
    assert "; worst: owl, 92.3%\n" in capsys.readouterr().out


def test_linear_of_a_checkpoint_file_into_another_folder(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "here"
    assert cli.main(["evaluate", "linear", str(run / "last.pt"), "--out", str(out)]) == 0
    assert results(out, "linear", "photographs_16px_last")["penalty"] > 0
    assert not list(run.glob("evaluate*"))


def test_linear_by_sgd(run: Path) -> None:
    options = ["--protocol", "sgd", "--epochs", "2", "--batch-size", "8", "--lr", "1"]
    assert cli.main(["evaluate", "linear", str(run), *options]) == 0
    found = results(run, "linear-sgd_epochs-2_batch-size-8_lr-1")
    assert (found["epochs"], found["batch_size"], found["lr"]) == (2, 8, 1.0)


def test_finetune_on_a_balanced_part(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--percent", "50", "--epochs", "2", "--seed", "5"]
    assert cli.main(["evaluate", "finetune", str(run), *options]) == 0
    found = results(run, "finetune_percent-50_epochs-2_seed-5")
    assert (found["n_train"], found["seed"], found["subset"]) == (21, 5, "50 %")
    assert found["batch_size"] == 16
    printed = capsys.readouterr().out
    assert "21 images (50 %, seed 5)" in printed
    assert f"{found['frozen_top1']:.1%}" in printed
    assert found["frozen_interval"][0] < found["frozen_top1"] <= found["frozen_interval"][1]


def test_finetune_on_a_list(run: Path, tmp_path: Path) -> None:
    names = tmp_path / "part.txt"
    names.write_text("cat3.png\ndog/dog1.png\n\nowl0.png\nowl2.png\n")
    options = ["--subset-list", str(names), "--epochs", "1"]
    assert cli.main(["evaluate", "finetune", str(run), *options]) == 0
    assert results(run, "finetune_subset-list-part_epochs-1")["n_train"] == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["knn", "--k", "0"], "--k must be at least 1, got 0"),
        (["knn", "--temperature", "0"], "--temperature must be positive"),
        (["knn", "--threads", "0"], "--threads must be at least 1"),
        (["knn", "--image-size", "0"], "--image-size must be at least 1"),
        (["knn", "--device", "cuda:99"], "--device cuda:99 is not available"),
        (["knn", "--device", "gpu"], "--device gpu is not available"),
        (["knn", "--image-size", "-1"], "--image-size must be at least 1, got -1"),
        (["knn", "--image-size", str(2**63)], "--image-size must be at most 2147483647, got"),
        (["knn", "--data", "nowhere"], "--data must be a folder or one of"),
        (["linear", "--epochs", "3"], "--epochs belongs to --protocol sgd"),
        (["linear", "--seed", "-1"], "--seed must be within 0"),
        (["linear", "--protocol", "sgd", "--epochs", "0"], "--epochs must be at least 1"),
        (["finetune", "--percent", "0"], "--percent must be above 0"),
        (["finetune", "--percent", "95"], "are 13 of each class, but class owl has 12"),
        (["finetune", "--lr", "0"], "--lr must be positive"),
        (["finetune", "--batch-size", "1"], "--batch-size must be at least 2"),
        (["finetune", "--percent", "9", "--subset-list", "x"], "cannot be combined"),
        (["finetune", "--subset-list", "no.txt"], "no.txt"),
        (["finetune", "--data", "clothing64", "--subset-list", "x"], "needs a folder of images"),
    ],
)
def test_bad_options_leave_nothing(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused([arguments[0], str(run), *arguments[1:]], capsys)
    assert not list(run.glob("evaluate*"))


def test_data_that_cannot_measure(
    run: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["knn", str(run), "--data", str(photographs / "train")], capsys)
    assert "has no test split; pass a folder with train and test" in line
    flat = tmp_path / "flat"
    for split in ("train", "test"):
        (flat / split).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (20, 20), (i, i, i)).save(flat / split / f"{i}.png")
    line = refused(["knn", str(run), "--data", str(flat)], capsys)
    assert "has no labels; pass a folder" in line


def test_places_that_cannot_be_used(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not found" in refused(["knn", str(run / "other.pt")], capsys)
    taken = str(run / "config.json")
    message = f"--out must be a folder, got {taken} (File exists); name another"
    assert message in refused(["knn", str(run), "--out", taken], capsys)


def test_a_checkpoint_that_does_not_record_its_data_needs_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = (run / "last.pt").rename(tmp_path / "alone.pt")
    assert "do not record their data; name the data" in refused(["knn", str(alone)], capsys)


def test_list_with_an_unknown_name(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "part.txt").write_text("cow1.png\n")
    names = str(tmp_path / "part.txt")
    line = refused(["finetune", str(run), "--subset-list", names], capsys)
    assert "1 of 1 names of the subset list are not in the training split, first cow1.png" in line


CHANGES_WITH_THE_CLOCK = {"seconds", "date"}


@pytest.mark.parametrize(
    "protocol, words",
    [
        (KNN(k=5), ["knn", "--k", "5"]),
        (Linear(seed=2), ["linear", "--seed", "2"]),
        (
            LinearSGD(epochs=1, batch_size=8, lr=1.0),
            ["linear", "--protocol", "sgd", "--epochs", "1", "--batch-size", "8", "--lr", "1"],
        ),
        (FineTuning(percent=50, epochs=1), ["finetune", "--percent", "50", "--epochs", "1"]),
    ],
)
def test_python_measures_what_the_command_measures(
    protocol: Protocol, words: list[str], run: Path
) -> None:
    result = evaluate(load_task(run), protocol)
    assert cli.main(["evaluate", words[0], str(run), "--device", "cpu", *words[1:]]) == 0
    written = results(run, protocol.label)
    ours = json.loads(json.dumps(result.to_json()))
    assert ours.keys() == written.keys()
    for name in ours.keys() - CHANGES_WITH_THE_CLOCK:
        assert ours[name] == written[name], name


def test_every_option_of_a_protocol_is_in_its_results(run: Path) -> None:
    written = evaluate(load_task(run), FineTuning(percent=50, epochs=1, head_lr=0.1)).to_json()
    assert {name: written[name] for name in ("percent", "epochs", "batch_size", "head_lr")} == {
        "percent": 50, "epochs": 1, "batch_size": 16, "head_lr": 0.1,
    }  # fmt: skip


def test_results_do_not_replace_others(
    run: Path, tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "knn", str(run), "--device", "cpu"]
    assert cli.main(words) == 0
    first = results(run, "knn")
    assert (first["file"], first["step"], first["epoch"], first["planned_epochs"]) == (
        "last.pt", 6, 3, 3,
    )  # fmt: skip
    digest = hashlib.sha256((run / "last.pt").read_bytes()).hexdigest()
    assert (first["sha256"], first["unfinished"]) == (digest, False)
    other = photographs.rename(tmp_path / "others")
    for more, name, rest in (
        (["--k", "3"], "knn_k-3", "others_16px"),
        (["--image-size", "18"], "knn", "others_18px"),
    ):
        assert cli.main([*words, *more, "--data", str(other)]) == 0
        results(run, name, rest)
    other.rename(photographs)
    assert results(run, "knn") == first
    assert cli.main(words) == 0  # Once more of the same weights: nothing is lost.

    write_run(run, photographs, "narrow", 16)
    assert "holds another evaluation, of other weights" in refused(words[1:], capsys)
    assert results(run, "knn")["sha256"] == digest
    assert cli.main([*words, "--force"]) == 0
    assert results(run, "knn")["sha256"] != digest
    (run / "evaluate-knn_photographs_16px.json").write_text("[1")
    assert "--force" in refused(words[1:], capsys)


@pytest.mark.parametrize("text", ["[1]", "[" * 200_000, "\xff"])
def test_what_is_no_result_is_not_replaced(
    text: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "evaluate-knn_photographs_16px.json"
    path.write_text(text, encoding="latin-1")
    assert "holds another evaluation" in refused(["knn", str(run), "--device", "cpu"], capsys)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_in_the_place_of_results_is_not_waited_for(run: Path) -> None:
    path = run / "evaluate-knn_photographs_16px.json"
    os.mkfifo(path)
    words = [sys.executable, "-m", "mixmask", "evaluate", "knn", str(run), "--device", "cpu"]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, f"{path} is a pipe" in done.stderr) == (2, True)


def test_results_name_the_checkpoint_that_was_measured(
    run: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256((run / "last.pt").read_bytes()).hexdigest()

    def train_on(*given: Any, **more: Any) -> ImageData:
        write_run(run, photographs, "narrow", 16, epoch=1)
        return load_images(*given, **more)

    monkeypatch.setattr("mixmask.evaluation.tasks.load_images", train_on)
    source = load_task(run, device="cpu").sources[0]
    assert (source.sha256, source.step, source.epoch) == (digest, 6, 3)


@pytest.mark.parametrize("rows", [[1], [{}], [{"epoch": None}]])
def test_a_checkpoint_with_rows_of_no_epoch_is_refused(
    rows: list[Any], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(run / "last.pt") | {"rows": rows}
    torch.save(content, run / "last.pt")
    for path in (run, run / "last.pt"):
        assert "rows are no measurements of epochs" in refused(["knn", str(path)], capsys)


@pytest.mark.parametrize("size", [16.0, "16", True])
def test_an_image_size_of_another_type_is_refused(size: Any, run: Path) -> None:
    with pytest.raises(TypeError, match="--image-size must be an integer, got"):
        load_task(run, image_size=size, device="cpu")


def test_an_unfinished_run_is_called_so(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", photographs, "narrow", 16, epoch=2)
    assert cli.main(["evaluate", "knn", str(run)]) == 0
    assert results(run, "knn", "photographs_16px_epoch-2-of-3")["unfinished"] is True
    assert "run (unfinished, epoch 2 of 3) on " in capsys.readouterr().out
    words = ["neighbours", str(run), "--out", str(tmp_path / "x.png")]
    assert cli.main(words) == 0
    assert "run (unfinished, epoch 2 of 3): " in capsys.readouterr().out


def test_linear_equals_logistic_regression_of_scikit_learn(run: Path) -> None:
    task = load_task(run)
    result = evaluate(task, Linear())
    x, x_test = (features.double().numpy() for features in task.features())
    mean, std = x.mean(axis=0), x.std(axis=0).clip(1e-6)
    strength = 1 / (result.details["penalty"] * len(x))
    reference = LogisticRegression(C=strength, max_iter=20_000, tol=1e-8)
    reference.fit((x - mean) / std, task.labels[0])
    scores, _ = Linear().measure(task, progress=False)
    np.testing.assert_allclose(
        scores.softmax(dim=1), reference.predict_proba((x_test - mean) / std), atol=2e-3
    )
    assert result.accuracy.top1 == reference.score((x_test - mean) / std, task.labels[1])


def test_records_are_shown_in_a_line(run: Path) -> None:
    task = load_task(run)
    result = evaluate(task, KNN())
    for record, start in (
        (task, "Task(narrow of "),
        (result, "Result("),
        (result.accuracy, "Accuracy(top1="),
        (load_backbone(run), "Loaded(mixmask: took "),
    ):
        shown = repr(record)
        assert shown.startswith(start)
        assert "\n" not in shown
        assert len(shown) < 300
