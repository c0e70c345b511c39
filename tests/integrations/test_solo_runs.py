"""Whole runs of solo-learn's scripts and Trainers."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from solo_models import (
    CLASSES,
    CROP,
    make_cfg,
    needs_solo,
    tau_of,
)
from solo_oracles import (
    N,
)
from torch import Tensor

from mixmask.data.named import clothing64

pytest_plugins = ("solo_fixtures",)


@dataclass(frozen=True)
class Run:
    """A run that their AutoResumer may find."""

    folder: Path

    def write(self, cfg: Any) -> Path:
        """Leave a checkpoint and args.json behind, as their Checkpointer does."""
        from solo.utils.checkpointer import Checkpointer

        callback = Checkpointer(cfg, logdir=self.folder)
        trainer = types.SimpleNamespace(logger=None, is_global_zero=True)
        callback.initial_setup(trainer)
        callback.save_args(trainer)
        checkpoint: Path = callback.path / callback.ckpt_placeholder.format(0)
        checkpoint.touch()
        return checkpoint

    def found(self, cfg: Any) -> Path | None:
        """Return what a run with this configuration would resume."""
        from solo.utils.auto_resumer import AutoResumer

        checkpoint: Path | None = AutoResumer(self.folder).find_checkpoint(cfg)[0]
        return checkpoint


RESUMED = {"grid_size": 4, "ratio": [0.2, 0.8]}


@needs_solo
@pytest.mark.usefixtures("theirs")
def test_a_run_is_resumed_with_the_block_it_was_started_with(tmp_path: Path) -> None:
    run = Run(tmp_path)
    checkpoint = run.write(make_cfg("byol", mixmask=RESUMED))
    assert run.found(make_cfg("byol", mixmask=dict(RESUMED))) == checkpoint
    for block in (None, {"grid_size": 4}, {**RESUMED, "grid_size": 8}, {**RESUMED, "ratio": 0.5}):
        assert run.found(make_cfg("byol", mixmask=block)) is None


@needs_solo
@pytest.mark.usefixtures("theirs")
def test_a_run_without_mixing_is_not_resumed_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from solo.utils.auto_resumer import AutoResumer

    run = Run(tmp_path)
    checkpoint = run.write(make_cfg("byol"))
    assert run.found(make_cfg("byol", mixmask=RESUMED)) is None
    assert run.found(make_cfg("byol")) == checkpoint
    rest = [key for key in AutoResumer.SHOULD_MATCH if key != "mixmask"]
    monkeypatch.setattr(AutoResumer, "SHOULD_MATCH", rest)
    assert run.found(make_cfg("byol", mixmask=RESUMED)) == checkpoint


class Views(torch.utils.data.Dataset[Any]):
    """Two random crops of each of some photographs, as their loaders give them."""

    def __init__(self, count: int) -> None:
        (files, labels), _, _ = clothing64()
        by_class = [
            [index for index, label in enumerate(labels) if label == wanted]
            for wanted in range(CLASSES)
        ]
        chosen = [by_class[i % CLASSES][i // CLASSES] for i in range(count)]
        self.images = [_decode(files[index]) for index in chosen]
        self.labels = [labels[index] for index in chosen]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, list[Tensor], int]:
        crops = []
        for _ in range(2):
            top, left = torch.randint(64 - CROP, (2,)).tolist()
            crops.append(self.images[index][:, top : top + CROP, left : left + CROP])
        return index, crops, self.labels[index]


def _decode(file: bytes) -> Tensor:
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


@needs_solo
@pytest.mark.parametrize(
    "name, precision", [("mocov2plus", "bf16-mixed"), ("swav", "32-true"), ("byol", "32-true")]
)
def test_lightning_trains_it(
    ours: dict[str, Any], theirs: dict[str, Any], name: str, precision: str, tmp_path: Path
) -> None:
    import lightning.pytorch as pl

    views = Views(4 * N)
    single: Any = [(views[i][1][0], views[i][2]) for i in range(len(views))]
    trainer = pl.Trainer(
        max_steps=3,
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        val_check_interval=3,
        default_root_dir=tmp_path,
    )
    cfg = make_cfg(name, mixmask={"grid_size": 4, "ratio": 0.25})
    model = ours[name](cfg)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    loader = torch.utils.data.DataLoader(views, N, drop_last=True)
    # Their kNN counts the classes of the validation images, so all of them must be there.
    trainer.fit(model, loader, torch.utils.data.DataLoader(single, len(single)))
    metrics = trainer.callback_metrics
    assert trainer.global_step == 3
    assert float(metrics["train_lambda"]) == 0.25
    assert np.isfinite(float(metrics["train_mixmask_loss"]))
    assert float(metrics["val_knn_acc1"]) >= 0
    moved = {key for key, value in model.state_dict().items() if not _same(value, start.get(key))}
    assert {"backbone.conv.weight", "classifier.weight", "projector.0.weight"} <= moved
    if name == "mocov2plus":
        assert int(model.queue_ptr) == 3 * N
    if name != "swav":
        assert "momentum_backbone.conv.weight" in moved
        assert tau_of(model) == 1.0 or 0.9 < float(tau_of(model) or 0) < 1

    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    for classes, rebuilt in ((ours, cfg), (ours, make_cfg(name)), (theirs, make_cfg(name))):
        again = classes[name].load_from_checkpoint(path, strict=False, cfg=rebuilt)
        state = again.state_dict()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


def _same(value: Tensor, before: Tensor | None) -> bool:
    return before is not None and torch.equal(value, before)


CONFIG = """
defaults:
  - _self_
  - override hydra/hydra_logging: disabled
  - override hydra/job_logging: disabled
hydra:
  output_subdir: null
  run:
    dir: .
name: run
method: mocov2plus
backbone:
  name: resnet18
method_kwargs: {proj_hidden_dim: 16, proj_output_dim: 8, temperature: 0.2, queue_size: 32}
momentum: {base_tau: 0.9, final_tau: 1.0}
data: {dataset: custom, train_path: images, val_path: images, format: image_folder, num_workers: 0}
optimizer: {name: sgd, batch_size: 8, lr: 0.1, classifier_lr: 0.1, weight_decay: 0.0}
scheduler: {name: none}
checkpoint: {enabled: true, dir: runs, frequency: 1}
auto_resume: {enabled: true}
augmentations:
  - rrc: {enabled: true, crop_min_scale: 0.2, crop_max_scale: 1.0}
    color_jitter: {prob: 0.0}
    grayscale: {prob: 0.0}
    gaussian_blur: {prob: 0.0}
    solarization: {prob: 0.0}
    equalization: {prob: 0.0}
    horizontal_flip: {prob: 0.5}
    crop_size: 32
    num_crops: 2
max_epochs: 1
accelerator: cpu
devices: "1"
strategy: auto
enable_progress_bar: false
enable_model_summary: false
num_sanity_val_steps: 0
"""
# A script of the user's own, around theirs: it writes down what each process trained.
SCRIPT = """
import json, os, sys
sys.path.insert(0, os.environ["CHECKOUT"])
from lightning.pytorch import Trainer
import main_pretrain

fit = Trainer.fit

def fit_and_tell(trainer, model, *args, **kwargs):
    mixing = repr(getattr(model, "mixmask", None))
    fit(trainer, model, *args, **kwargs)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    told = {"mixing": mixing, "metrics": metrics, "processes": trainer.world_size}
    told["weights"] = float(sum(p.double().abs().sum() for p in model.parameters()))
    with open(f"rank{trainer.global_rank}.json", "w") as file:
        json.dump(told, file)

Trainer.fit = fit_and_tell
if __name__ == "__main__":
    main_pretrain.main()
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """Lay out photographs in folders of classes, a configuration and a script."""
    (files, labels), _, classes = clothing64()
    for index in range(40):
        folder = tmp_path / "images" / classes[labels[index * 80]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.jpg").write_bytes(files[index * 80])
    (tmp_path / "x.yaml").write_text(CONFIG)
    (tmp_path / "with_block.yaml").write_text(CONFIG + "mixmask: {grid_size: 4}\n")
    (tmp_path / "own.py").write_text(SCRIPT)
    return tmp_path


def _checkout() -> Path:
    spec = find_spec("solo")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parents[1]
    if not (folder / "main_pretrain.py").is_file():
        pytest.skip("solo-learn's scripts are not installed: they come from its repository")
    return folder


def _run(
    folder: Path, script: Path, *arguments: str, launcher: Sequence[str] = (), config: str = "x"
) -> None:
    environment = {
        **os.environ,
        "CHECKOUT": str(_checkout()),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "HYDRA_FULL_ERROR": "1",
    }
    command = [sys.executable, *launcher, "-m", "mixmask.integrations.solo", str(script)]
    command += ["--config-path", str(folder), "--config-name", f"{config}.yaml", *arguments]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            # Processes that wait for each other, all of them.
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, output


def _saved(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    (arguments,) = folder.glob("runs/mocov2plus/*/args.json")
    (checkpoint,) = folder.glob("runs/mocov2plus/*/*.ckpt")
    return json.loads(arguments.read_text()), torch.load(checkpoint, weights_only=False)


@needs_solo
@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["+", "++"])
def test_their_script_runs_with_an_option_on_the_command_line(workplace: Path, prefix: str) -> None:
    script = _checkout() / "main_pretrain.py"
    _run(workplace, script, f"{prefix}mixmask.grid_size=2", f"{prefix}mixmask.ratio=0.25")
    arguments, checkpoint = _saved(workplace)
    assert arguments["mixmask"] == {"grid_size": 2, "ratio": 0.25}
    assert checkpoint["global_step"] == 5
    assert not [key for key in checkpoint["state_dict"] if "mix" in key]
    # Two clean and two mixed passes a step, and those of validation change nothing.
    assert int(checkpoint["state_dict"]["backbone.bn1.num_batches_tracked"]) == 5 * 4
    assert int(checkpoint["state_dict"]["momentum_backbone.bn1.num_batches_tracked"]) == 5 * 2
    assert int(checkpoint["state_dict"]["queue_ptr"]) == 5 * 8 % 32


@needs_solo
@pytest.mark.slow
def test_without_the_block_their_script_does_not_mix(workplace: Path) -> None:
    _run(workplace, _checkout() / "main_pretrain.py")
    arguments, checkpoint = _saved(workplace)
    assert "mixmask" not in arguments
    assert int(checkpoint["state_dict"]["backbone.bn1.num_batches_tracked"]) == 5 * 2


@needs_solo
@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "++"])
def test_an_option_overrides_the_block_of_the_file(workplace: Path, prefix: str) -> None:
    script = workplace / "own.py"
    _run(workplace, script, f"{prefix}mixmask.grid_size=2", config="with_block")
    told = json.loads((workplace / "rank0.json").read_text())
    assert "grid_size=2" in told["mixing"]
    assert told["metrics"]["train_lambda"] == 0.5
    assert np.isfinite(told["metrics"]["train_mixmask_loss"])
    assert {"train_nce_loss", "train_acc1", "val_acc1"} <= told["metrics"].keys()


@needs_solo
@pytest.mark.slow
@pytest.mark.parametrize("started_by", ["lightning", "torchrun"])
def test_every_process_of_a_run_mixes(workplace: Path, started_by: str) -> None:
    launcher = []
    if started_by == "torchrun":
        port = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", *port]
    block = ["+mixmask.grid_size=2", "+mixmask.ratio=0.25"]
    two = ["devices='2'", "strategy=ddp", "data.val_path=null"]
    _run(workplace, workplace / "own.py", *block, *two, launcher=launcher)
    told = [json.loads((workplace / f"rank{rank}.json").read_text()) for rank in range(2)]
    for process in told:
        assert process["processes"] == 2
        assert "grid_size=2" in process["mixing"]
        assert process["metrics"]["train_lambda"] == 0.25
    assert told[0]["metrics"]["train_mixmask_loss"] == told[1]["metrics"]["train_mixmask_loss"]
    assert told[0]["weights"] == told[1]["weights"]
    arguments, checkpoint = _saved(workplace)
    assert arguments["mixmask"] == {"grid_size": 2, "ratio": 0.25}
    assert int(checkpoint["state_dict"]["queue_ptr"]) == checkpoint["global_step"] * 16 % 32
