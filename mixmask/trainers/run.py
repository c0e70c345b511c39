"""A run: what it is made of, where it stands, and its checkpoint."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from mixmask._distributed import launched
from mixmask._seeds import fold_seed
from mixmask.backbones import check_sizes
from mixmask.data.resources import choose_workers
from mixmask.data.sets import Images, Split
from mixmask.data.stream import part_bytes
from mixmask.data.views import RandomView
from mixmask.runs.folder import (
    BEST,
    Row,
    adopt_checkpoint,
    copy_checkpoint,
    is_unstarted,
    keep_checkpoint,
    save_checkpoint,
    write_config,
    write_rows,
)
from mixmask.runs.misfits import restore
from mixmask.runs.options import Options
from mixmask.runs.records import plural
from mixmask.trainers.config import TIMM, RunConfig
from mixmask.trainers.meter import Meter
from mixmask.trainers.methods import build_method
from mixmask.trainers.mixtures import Method
from mixmask.trainers.processes import agree, call_together


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


def complete_config(config: RunConfig, train: Split) -> RunConfig:
    """Complete a run's options by its images; `config.json` and the run's parts follow from them.

    Before, a configuration holds what was given, and defaults: paths as the caller wrote them,
    "auto" for where images are kept, and the usual number of channels. After, it says of itself
    what was trained on what, in any working directory: paths are absolute, `stream` is "always" or
    "never", and `channels` are those of the images. A complete one stays as it is.

    Args:
        config: Options that have been checked.
        train: The training images (N, C, H, W). Those without names of files leave `data` alone.
    """
    return replace(
        config,
        data=str(Path(config.data).resolve()) if train.files else config.data,
        init=config.init if config.init in ("", TIMM) else str(Path(config.init).resolve()),
        channels=train.images.shape[1],
        # A resumed run must find its images where they were, whatever memory is free by then.
        stream="never" if isinstance(train.images, Tensor) else "always",
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
    saved: float = field(default_factory=time.monotonic)  # When the checkpoint was written.

    @classmethod
    def open(
        cls,
        config: RunConfig,
        train: Split,
        out: Path,
        *,
        resume: Path | None = None,
        facts: Options | None = None,
    ) -> Run:
        """Build a run, and make its folder or go on from the newest whole checkpoint of one.

        Args:
            config: Options that have been checked; here they are completed.
            train: The training images, (N, C, H, W) uint8 or stored ones.
            out: The run folder.
            resume: The folder of the run to go on from, which may be another than `out`. A run
                that was killed before its first checkpoint starts at its first step.
            facts: What `config.json` says beside the options. A resumed run with facts writes it
                again.
        """
        config = complete_config(config, train)
        begun = resume is not None and not is_unstarted(resume)
        # A checkpoint has the weights that the run was started from, which may be gone by now.
        run = cls.build(replace(config, init="") if begun else config, train.images, out)
        run.config = config
        main = run.accelerator.is_main_process
        if resume is not None and begun:
            file = call_together(lambda: run.load(resume))
            agree({"checkpoint": file.name, "step of the checkpoint": run.step})
            if main and resume == out:  # Once nobody reads it any more.
                run.settle(file)
        if main:
            out.mkdir(parents=True, exist_ok=True)
        content = {"processes": run.accelerator.num_processes} | (facts or {}) | asdict(config)
        if begun and resume != out:
            run.save(config=content)
        elif main and (resume is None or facts is not None):
            write_config(out, content)
        if config.tracker != "none":
            _start_tracker(run)
        return run

    @classmethod
    def build(cls, config: RunConfig, images: Images, out: Path) -> Run:
        """Build a run of a complete configuration at its first step.

        The seed alone decides its weights.
        """
        accelerator = _start_accelerator(config, out)
        steps = _count_steps(config, images, accelerator.num_processes)
        workers = 0
        if isinstance(images, Tensor):
            images = images.to(accelerator.device)  # (N, C, H, W) uint8, once for all steps
        else:
            crops = part_bytes(images, config.image_size, 2 + config.extra_crops)
            workers = choose_workers(config.workers, crops)
        model = _build_model(config, accelerator)
        optimizer = accelerator.prepare(build_optimizer(model, config))
        view = random_view(config, images).to(accelerator.device)
        return cls(config, accelerator, model, optimizer, view, images, workers, steps, out)

    def save(self, *, epoch_ends: bool = False, config: Options | None = None) -> None:
        """Write the checkpoint and the metrics, in one of the processes; the others wait.

        Args:
            epoch_ends: Whether an epoch is over, of which `--keep` keeps the checkpoint.
            config: See `save_checkpoint`.
        """
        if self.accelerator.is_main_process:
            content = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "rows": self.rows,
                "meter": self.meter.state(),
                "options": {**asdict(self.config), "processes": self.accelerator.num_processes},
            }
            if self.accelerator.scaler is not None:
                content["scaler"] = self.accelerator.scaler.state_dict()
            save_checkpoint(self.out, content, config)
            self._write_beside(epoch_ends=epoch_ends)
        # When one process exits, the launcher soon kills the rest, which may still write.
        self.accelerator.wait_for_everyone()
        self.saved = time.monotonic()

    def _write_beside(self, *, epoch_ends: bool) -> None:
        """Write what belongs to `last.pt`: the metrics, and what `--keep` keeps of epochs."""
        write_rows(self.out, self.rows)
        if epoch_ends and self.config.keep:
            keep_checkpoint(self.out, self.step // self.steps, self.config.keep)
            # An epoch that was not measured is never the best; of equals, the last is.
            *before, newest = (row.get("knn", -1.0) for row in self.rows if row["epoch"])
            if newest >= 0 and newest >= max(before, default=0.0):
                copy_checkpoint(self.out, BEST)

    def settle(self, file: Path) -> None:
        """Write what a kill while saving left out, where there may be no step to save after.

        Args:
            file: The checkpoint that the run has loaded from its own folder.
        """
        if adopt_checkpoint(file):  # Of an older one, what lies beside it is not to be replaced.
            epoch = self.rows[-1]["epoch"] if self.rows else 0
            self._write_beside(epoch_ends=epoch > 0 and epoch * self.steps == self.step)

    def load(self, folder: Path) -> Path:
        """Restore the newest whole checkpoint, and return it; a warning names a damaged one."""

        def find_misfit(content: Options) -> str:
            if not Meter.takes(content["meter"]):
                return "its means are no numbers"
            total = self.steps * self.config.epochs
            step: int = content["step"]
            return f"step {step} lies beyond its {total}" * (step > total)

        parts = {"model": self.model, "optimizer": self.optimizer}
        if self.accelerator.scaler is not None:
            parts["scaler"] = self.accelerator.scaler
        progress = {"step": int, "rows": list, "meter": Mapping}
        file, content = restore(folder, parts, progress, find_misfit)
        self.step, self.rows = content["step"], content["rows"]
        self.meter = Meter(**content["meter"])
        return file


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
    started = launched() if "LOCAL_RANK" in os.environ else 1
    if started > accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but accelerate has joined "
            f"{accelerator.num_processes}; without GPUs, set ACCELERATE_USE_CPU=true"
        )
    return accelerator


def _start_tracker(run: Run) -> None:
    """Tell the tracker of `--tracker` the run's options."""
    options = {k: v for k, v in asdict(run.config).items() if not isinstance(v, tuple)}
    # Otherwise Weights & Biases writes where the command was started.
    where = {"wandb": {"dir": str(run.out)}}
    try:
        run.accelerator.init_trackers("mixmask", config=options, init_kwargs=where)
    except Exception as error:  # Of any tracker's own kind: no key, no network.
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"--tracker {run.config.tracker} could not be started ({reason}); set it up, or leave "
            "the option out"
        ) from error


def _count_steps(config: RunConfig, images: Images, processes: int) -> int:
    """Return the number of steps in an epoch; the rest of the images waits for the next one."""
    steps = len(images) // (config.batch_size * processes)
    if steps == 0:
        raise ValueError(
            f"--batch-size {config.batch_size} is more than the {plural(len(images), 'image')} "
            f"there are for {plural(processes, 'process')}; use a smaller one"
        )
    return steps


def _build_model(config: RunConfig, accelerator: Accelerator) -> Method:
    """Build the method on its device, with what the options say about batch norm and memory."""
    # In all processes alike: nothing copies the weights from one to the others.
    torch.manual_seed(fold_seed(config.seed, "weights"))
    model = build_method(config)
    if config.sync_bn and accelerator.num_processes > 1:
        if accelerator.device.type == "cpu":
            raise ValueError(
                "--sync-bn needs GPUs: torch does not synchronise statistics on CPUs; leave it out"
            )
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # In place, but for norms at the top.
    model.to(memory_format=torch.channels_last).to(accelerator.device)
    if config.checkpointing:
        try:
            model.backbone.set_grad_checkpointing()  # type: ignore[operator]
        except (AttributeError, AssertionError, TypeError):
            raise ValueError(
                f"--checkpointing is not supported by {config.arch}; leave it out, or use "
                "--accumulate"
            ) from None
    sizes = (config.image_size, config.mixed_size or config.image_size)
    check_sizes(model.backbone, config.arch, sizes, config.channels)
    if config.compile:
        compile_backbones(model, config.compile_mode)
    return model


def compile_backbones(model: nn.Module, mode: str = "default") -> None:
    """Compile a method's backbones in place, that of the momentum branch too."""
    for name, child in model.named_children():
        if name.endswith("backbone"):
            child.compile(mode=mode)


def parameter_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Sort the trained parameters into groups for the optimiser.

    LARS and AdamW leave biases and norms without decay, and LARS without adaptation (SimCLR,
    BYOL). What a method lists as `constant_lr` keeps its learning rate (SimSiam's predictor).
    """
    constant = {id(p) for part in getattr(model, "constant_lr", ()) for p in part.parameters()}
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 and config.optimizer != "sgd"
            groups.setdefault((plain, id(parameter) in constant), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if plain else config.weight_decay,
            "constant_lr": is_constant,
        }
        for (plain, is_constant), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """Build SGD, LARS (You et al.; timm's) or AdamW over the model's groups."""
    groups = parameter_groups(model, config)
    # Fused: one pass over the weights, a third of the default's time on a CPU.
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.sgd_momentum, fused=fused)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=fused)
    from timm.optim.lars import Lars

    lars: torch.optim.Optimizer = Lars(groups, lr=config.lr, momentum=config.sgd_momentum)
    return lars
