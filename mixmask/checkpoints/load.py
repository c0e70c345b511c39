"""Load backbones from checkpoints: those of our runs, and those of other libraries."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mixmask.backbones import SLIM, build_backbone
from mixmask.checkpoints.layouts import (
    Match,
    exported_metadata,
    find_backbone,
    weights_in,
)
from mixmask.checkpoints.resnets import infer_arch, is_small_stem
from mixmask.runs.folder import CONFIG, is_run, load_checkpoint, read_config
from mixmask.runs.reading import read_checkpoint

# Layers of a classifier inside of a backbone.
_HEADS = ("classifier.", "fc.", "head.", "linear.")
_COUNTER = "num_batches_tracked"  # Which old files do not have.


@dataclass(frozen=True)
class Loaded:
    """A backbone and where it came from.

    Attributes:
        backbone: (N, 3, H, W) -> (N, `num_features`), pooled, on the CPU, in evaluation mode.
        arch: timm's name of it, or one of our own, "narrow" or "medium".
        small_stem: Whether its stem is the one for small images.
        layout: Whose checkpoint it was: "mixmask", "moco", "lightning" (as lightly's users
            write), "solo-learn", "torchvision" (timm's ResNets have the same keys), "timm", or
            "state dict" for one inside of another model.
        taken: Keys of the checkpoint that went into the backbone.
        left: Keys of the checkpoint that did not: heads, queues, momentum encoders.
        config: The run's `config.json`; empty for checkpoints of others.
        file: The file that was read.
    """

    backbone: nn.Module
    arch: str
    small_stem: bool
    layout: str
    taken: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None

    def describe(self) -> str:
        """Name in one line what was taken and what was left."""
        stem = " with the stem for small images" if self.small_stem else ""
        text = f"{self.layout}: took {len(self.taken)} tensors of {self.arch}{stem}"
        if self.left:
            counts = Counter(_top(key) for key in self.left)
            parts = ", ".join(f"{name} ({count})" for name, count in counts.items())
            text += f"; left {parts}"
        return text


def load_backbone(path: Path, *, arch: str | None = None, small_stem: bool | None = None) -> Loaded:
    """Load the backbone of a run folder, or of a checkpoint file of this or another library.

    Supported are runs of this package; checkpoints of MoCo and of the MixMask authors;
    Lightning's, as users of lightly and solo-learn write them; plain state dicts with
    torchvision's or timm's names; all of these under the prefixes of data parallel and
    torch.compile, and as safetensors. No code in a file is executed.

    Args:
        path: A run folder, or a checkpoint file.
        arch: timm's name of the backbone. Default: the run's own, or what the keys say.
        small_stem: Whether its stem is the one for small images. Default: the run's own, or
            whether the first convolution is a 3x3 one.

    Raises:
        ValueError: If there is no checkpoint, or it is damaged, unknown, of another architecture
            (the message lists what does not fit), or could run code when it is read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; pass a run folder or a checkpoint file")
    metadata: dict[str, str] = {}
    if path.is_dir():
        file, content = load_checkpoint(path, lambda held: is_run(held) or "classes" in held)
    else:
        file, (content, metadata) = path, read_checkpoint(path)
    config = _read_options(file.parent) if is_run(content) else {}
    tensors = weights_in(file, content)
    metadata = metadata or exported_metadata(tensors)
    arch = arch or config.get("arch") or metadata.get("arch")
    expected = [] if arch is None or config else list(build_backbone(arch).state_dict())
    match = find_backbone(file, content, tensors, metadata, expected)
    arch = arch or match.arch
    if arch is None:
        shown = ", ".join(list(match.keys.values())[:3])
        raise ValueError(
            f"{file} does not say which backbone it holds (its keys: {shown}, ...); name it, as "
            "timm does, with --arch"
        )
    if small_stem is None:
        small_stem = bool(config.get("small_stem", arch not in SLIM and is_small_stem(match.state)))
    backbone = build_backbone(arch, small_stem=small_stem)
    taken = _fill(file, backbone, match, arch)
    if match.stem_padding != 1 and small_stem:
        backbone.conv1.padding = (match.stem_padding,) * 2  # type: ignore[union-attr]
    if not match.stem_relu:
        backbone.act1 = nn.Identity()
    used = set(taken)
    left = tuple(key for key in tensors if key not in used)
    return Loaded(backbone.eval(), arch, small_stem, match.layout, taken, left, config, file)


def _read_options(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).exists():  # A checkpoint that was copied out of its folder.
        return {}
    try:
        return read_config(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / CONFIG} cannot be read ({error}); move it away, and the backbone is "
            "inferred from the checkpoint's keys"
        ) from error


def _fill(file: Path, backbone: nn.Module, match: Match, arch: str) -> tuple[str, ...]:
    """Load the tensors and return their keys, or refuse them with what does not fit."""
    wanted = backbone.state_dict()
    state: dict[str, Tensor] = {}
    keys = {}
    for name, tensor in match.state.items():
        # A norm that splits the batch lies, with its activation, in a sequence of its own.
        merged = re.sub(r"\.0(\.\w+)$", r"\1", name)
        inner = merged if name not in wanted and merged in wanted else name
        if inner in wanted or not inner.startswith(_HEADS):
            state[inner] = _merge_parts(inner, tensor, wanted.get(inner, tensor))
            keys[inner] = match.keys[name]
    misfits = {
        "missing": [name for name in wanted if name not in state and not name.endswith(_COUNTER)],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    if any(misfits.values()):
        inferred = infer_arch(match.state)
        raise ValueError(
            f"{file} does not fit {arch}: "
            + ", ".join(
                f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                for what, names in misfits.items()
                if names
            )
            + (
                "; name its backbone with --arch and its stem with --small-stem or --no-small-stem"
                if inferred in (None, arch)
                else f"; its keys are those of {inferred}, as which it is read without --arch"
            )
        )
    backbone.load_state_dict(state, strict=False)
    return tuple(keys.values())


def _merge_parts(name: str, tensor: Tensor, wanted: Tensor) -> Tensor:
    """Average statistics over the parts of a batch, as lightly's split norm does to evaluate."""
    parts = len(tensor) // max(len(wanted), 1) if tensor.ndim == wanted.ndim == 1 else 1
    if parts > 1 and "running_" in name and len(tensor) == parts * len(wanted):
        return tensor.view(parts, len(wanted)).mean(dim=0)
    return tensor


def _top(key: str) -> str:
    """Return a key's first two words where the first is a wrapper or holds several parts."""
    first, *rest = key.split(".")
    return f"{first}.{rest[0]}" if first in ("module", "model") and rest else first
