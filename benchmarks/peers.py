"""Training steps of MoCo v2 as users run them: our trainer's, lightly's, solo-learn's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import mixmask
from mixmask.trainers.config import RunConfig
from mixmask.trainers.methods import build_method
from mixmask.trainers.mixtures import Term
from mixmask.trainers.run import build_optimizer, compile_backbones

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """What a step may use: number format, memory layout, compilation."""

    device: str = "cpu"
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The format in which products are taken."""
        return _DTYPES[self.precision]

    @property
    def label(self) -> str:
        """The setting in words, as "bf16, channels-last, compiled"."""
        words = [self.precision, "channels-last" * self.channels_last, "compiled" * self.compile]
        return ", ".join(filter(None, words))

    def placed(self, model: nn.Module) -> nn.Module:
        """Bring a model to the device, in the memory layout."""
        form = torch.channels_last if self.channels_last else torch.contiguous_format
        return model.to(self.device).to(memory_format=form)

    def view(self, images: Tensor) -> Tensor:
        """Bring images to the memory layout."""
        form = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=form)

    def autocast(self) -> torch.autocast:
        """Return the context of the forward pass."""
        return torch.autocast(
            torch.device(self.device).type, self.dtype, enabled=self.precision != "fp32"
        )


class TrainerStep:
    """A step of the trainer's loop: each term's backward before the next one's forward.

    Args:
        config: The run's options, the method among them.
        setting: What the step may use.
    """

    def __init__(self, config: RunConfig, setting: Setting) -> None:
        """Build method and optimiser."""
        self.setting = setting
        self.model = build_method(config)
        setting.placed(self.model).train()
        if setting.compile:
            compile_backbones(self.model)
        self.optimizer = build_optimizer(self.model, config)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, x1: Tensor, x2: Tensor, *, mix: bool = True) -> None:
        """Take a step on two views (N, 3, S, S)."""
        for term in self._terms(x1, x2, mix):
            term.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.after_step(0.5)

    def _terms(self, x1: Tensor, x2: Tensor, mix: bool) -> Iterator[Term]:
        terms = self.model.terms(x1, x2, self.generator, mix=mix)
        while True:
            with self.setting.autocast():
                term = next(terms, None)
            if term is None:
                return
            yield term


class LightlyStep:
    """A step as in lightly's example of MoCo, with MoCo v2's sizes on a torchvision ResNet.

    Args:
        arch: torchvision's name of the ResNet.
        k_queue: Keys in the memory bank.
        lr: Learning rate.
        setting: What the step may use.
        grid: Cells along a side of MixMask's mask, for steps with `mix=True`.
    """

    def __init__(self, arch: str, k_queue: int, lr: float, setting: Setting, grid: int) -> None:
        """Build both branches, the criterion with its bank, and MixMask's wrapper around it."""
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        from mixmask.integrations.lightly import wrap

        self.setting = setting
        resnet = torchvision.models.get_model(arch)
        width = resnet.fc.in_features
        self.backbone: nn.Module = setting.placed(nn.Sequential(*list(resnet.children())[:-1]))
        self.head = MoCoProjectionHead(width, width, 128).to(setting.device)
        self.key_backbone, self.key_head = copy.deepcopy((self.backbone, self.head))
        deactivate_requires_grad(self.key_backbone)
        deactivate_requires_grad(self.key_head)
        bank = NTXentLoss(temperature=0.2, memory_bank_size=(k_queue, 128))
        self.criterion = bank.to(setting.device)
        self.wrapped = wrap(self.criterion)
        self.masks = mixmask.BlockMaskGenerator(grid)
        if setting.compile:
            self.backbone.compile()
        learned = [*self.backbone.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.SGD(learned, lr=lr, momentum=0.9, weight_decay=1e-4)

    def __call__(self, x1: Tensor, x2: Tensor, *, mix: bool = False) -> None:
        """Take a step on two views; with `mix`, the README's four lines are added to it."""
        from lightly.models.utils import update_momentum

        update_momentum(self.backbone, self.key_backbone, m=0.999)
        update_momentum(self.head, self.key_head, m=0.999)
        with self.setting.autocast():
            query = self.head(self.backbone(x1).flatten(start_dim=1))
            key = self.key_head(self.key_backbone(x2).flatten(start_dim=1)).detach()
            if mix:
                mixed = mixmask.mix_batch(x1, self.masks)
                z_mixed = self.head(self.backbone(mixed.images).flatten(start_dim=1))
                loss = self.wrapped(query, key, z_mixed, mixed)
            else:
                loss = self.criterion(query, key)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def solo_missing() -> str:
    """Return why solo-learn's step cannot be measured here; empty where it can."""
    if find_spec("solo") is None:
        return "solo-learn is not installed: it comes from its repository on GitHub"
    try:
        from solo.methods import METHODS  # noqa: F401
    except Exception as error:  # Whatever its pinned libraries do when newer.
        return f"solo-learn cannot be imported: {type(error).__name__}: {error}"
    return ""


def solo_step(
    arch: str, k_queue: int, lr: float, setting: Setting, n: int
) -> Callable[[Tensor, Tensor], None]:
    """Return solo-learn's step of MoCo v2+, symmetric and with its online classifier.

    Its optimiser, training step and momentum update are its own; Lightning's trainer, which
    calls them, is left out.
    """
    from omegaconf import OmegaConf
    from solo.methods import METHODS

    cfg = OmegaConf.create(
        {
            "name": "run",
            "method": "mocov2plus",
            "backbone": {"name": arch},
            "method_kwargs": {
                "proj_hidden_dim": 2048,
                "proj_output_dim": 128,
                "temperature": 0.2,
                "queue_size": k_queue,
            },
            "momentum": {"base_tau": 0.99, "final_tau": 1.0, "classifier": None},
            "data": {
                "dataset": "custom",
                "num_classes": 10,
                "num_large_crops": 2,
                "num_small_crops": 0,
            },
            "optimizer": {
                "name": "sgd",
                "batch_size": n,
                "lr": lr,
                "classifier_lr": lr,
                "weight_decay": 1e-4,
                "kwargs": {"momentum": 0.9},
            },
            "scheduler": {"name": "none"},
            "knn_eval": {"enabled": False, "k": 2},
            "max_epochs": 2,
        }
    )
    OmegaConf.set_struct(cfg, False)
    model: Any = METHODS["mocov2plus"](cfg)
    model.log = model.log_dict = lambda *_, **__: None  # There is no trainer to log to.
    setting.placed(model).train()
    optimizer: torch.optim.Optimizer = model.configure_optimizers()
    labels = torch.arange(n, device=setting.device) % 10
    numbers = torch.arange(n, device=setting.device)

    def step(x1: Tensor, x2: Tensor) -> None:
        with setting.autocast():
            loss = model.training_step([numbers, [x1, x2], labels], 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for pair in model.momentum_pairs:
            model.momentum_updater.update(*pair)

    return step
