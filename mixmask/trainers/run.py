"""A run: what it is made of, where it stands, and its checkpoint."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from mixmask._seeds import fold_seed
from mixmask.data.resources import choose_workers
from mixmask.data.sets import Images
from mixmask.data.stream import part_bytes
from mixmask.data.views import RandomView
from mixmask.runs.folder import Row, is_run, load_checkpoint, save_checkpoint, write_rows
from mixmask.trainers.config import RunConfig
from mixmask.trainers.meter import Meter
from mixmask.trainers.methods import Method, build_method
from mixmask.trainers.parts import build_optimizer, compile_backbones


def random_view(config: RunConfig, images: Images) -> RandomView:
    """Build the random view of a configuration; images on disk arrive as crops."""
    return RandomView(
        config.image_size,
        min_scale=config.min_scale,
        jitter=config.jitter,
        hue=config.hue,
        grey=config.grey,
        blur=config.blur,
        crop=isinstance(images, Tensor),
    )


@dataclass
class Run:
    """What a run is made of and where it stands."""

    config: RunConfig
    accelerator: Accelerator
    model: Method
    optimizer: AcceleratedOptimizer
    view: RandomView
    images: Images
    workers: int
    steps: int
    out: Path
    rows: list[Row] = field(default_factory=list)
    step: int = 0
    meter: Meter = field(default_factory=Meter)

    @classmethod
    def build(cls, config: RunConfig, images: Images, out: Path) -> Run:
        """Build a run at its first step; the seed alone decides its weights."""
        accelerator = _start_accelerator(config, out)
        steps = _count_steps(config, images, accelerator.num_processes)
        workers = 0
        if isinstance(images, Tensor):
            images = images.to(accelerator.device)
        else:
            crops = part_bytes(config.image_size, 2 + config.extra_crops)
            workers = choose_workers(config.workers, crops)
        model = _build_model(config, accelerator)
        assert isinstance(model, nn.Module)
        optimizer = accelerator.prepare(build_optimizer(model, config))
        view = random_view(config, images).to(accelerator.device)
        return cls(config, accelerator, model, optimizer, view, images, workers, steps, out)

    def save(self) -> None:
        """Write the checkpoint and the metrics, in one of the processes."""
        if not self.accelerator.is_main_process:
            return
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rows": self.rows,
            "meter": self.meter.state(),
        }
        if self.accelerator.scaler is not None:
            content["scaler"] = self.accelerator.scaler.state_dict()
        save_checkpoint(self.out, content)
        write_rows(self.out, self.rows)

    def load(self) -> None:
        """Restore the newest whole checkpoint; a warning names a damaged one."""
        _, content = load_checkpoint(self.out, is_run)
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.step, self.rows = content["step"], content["rows"]
        self.meter = Meter(**content["meter"])


def _start_accelerator(config: RunConfig, out: Path) -> Accelerator:
    """Start accelerate, and check that it has joined all processes and knows the tracker."""
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        raise ValueError(
            f"--tracker {config.tracker} needs a package that is not installed; "
            f"pip install {config.tracker}, or leave the option out"
        )
    AcceleratorState._reset_state()  # An earlier run in this process may have had another.
    accelerator = Accelerator(
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=out,
    )
    # Processes that do not know of each other would write the same files.
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started > accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but accelerate has joined "
            f"{accelerator.num_processes}; without GPUs, set ACCELERATE_USE_CPU=true"
        )
    return accelerator


def _count_steps(config: RunConfig, images: Images, processes: int) -> int:
    """Return the number of steps in an epoch; the rest of the images waits for the next one."""
    steps = len(images) // (config.batch_size * processes)
    if steps == 0:
        raise ValueError(
            f"--batch-size {config.batch_size} is more than the {len(images)} images there "
            f"are for {processes} process(es); use a smaller one"
        )
    return steps


def _build_model(config: RunConfig, accelerator: Accelerator) -> Method:
    """Build the method on its device, with what the options say about batch norm and memory."""
    torch.manual_seed(fold_seed(config.seed, "weights"))
    model = build_method(config)
    assert isinstance(model, nn.Module)
    if config.sync_bn and accelerator.num_processes > 1:
        if accelerator.device.type == "cpu":
            raise ValueError(
                "--sync-bn needs GPUs: torch does not synchronise statistics on CPUs; leave it out"
            )
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # In place, but for norms at the top.
    model.to(memory_format=torch.channels_last).to(accelerator.device)
    if config.checkpointing:
        _checkpoint_activations(model.backbone, config.arch)
    if config.compile:
        compile_backbones(model, config.compile_mode)
    return model


def _checkpoint_activations(backbone: nn.Module, arch: str) -> None:
    try:
        backbone.set_grad_checkpointing()  # type: ignore[operator]
    except (AttributeError, AssertionError, TypeError):
        raise ValueError(
            f"--checkpointing is not supported by {arch}; leave it out, or use --accumulate"
        ) from None
