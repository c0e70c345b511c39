"""Load backbones from checkpoints: those of our runs, and those of other libraries."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mixmask._checks import few
from mixmask.backbones import SLIM, TORCHVISION, build_backbone, torchvision_name
from mixmask.checkpoints.layouts import Match, exported_metadata, find_backbone
from mixmask.checkpoints.resnets import infer_arch, is_small_stem
from mixmask.data.views import IMAGENET, MEAN, STD, Normalization, fit_channels
from mixmask.runs.folder import CONFIG, describe_difference, is_run, load_checkpoint, read_options
from mixmask.runs.misfits import describe_progress
from mixmask.runs.options import Options
from mixmask.runs.reading import read_checkpoint
from mixmask.runs.records import plural

# What lies among a backbone's own layers and is none: classifiers, projections, decoders.
_HEADS = (
    "classifier.", "decoder", "fc.", "head.", "heads.", "linear.", "mask_token", "pooler.",
    "projection_head.", "prototypes.",
)  # fmt: skip
_COUNTER = "num_batches_tracked"  # Which old files do not have.


@dataclass(frozen=True, repr=False)
class Loaded:
    """A backbone and where it came from.

    Attributes:
        backbone: (N, C, H, W) -> (N, `num_features`), pooled, on the CPU, in evaluation mode.
        arch: timm's name of it, torchvision's after "torchvision/", or one of our own, "narrow"
            or "medium".
        small_stem: Whether its stem is the one for small images.
        layout: Whose checkpoint it was, by `layouts.LAYOUTS`: "mixmask", "moco", "lightning" (as
            lightly's users write), "torchvision" (timm's ResNets have the same keys), ..., or
            "state dict" for one inside of another model.
        taken: Keys of the checkpoint that went into the backbone.
        left: Keys of the checkpoint that did not: heads, queues, momentum encoders.
        config: The run's `config.json`; empty for checkpoints of others.
        file: The file that was read.
        sha256: Of that file, as `sha256sum` prints it.
        step: Done by one of our runs; unknown of others, as are its epochs.
        epoch: The last whole one of such a run; 0 before its first one ends.
        mean: Of each channel, by which its images were normalised, for pixels from 0 to 1.
        std: Deviation of each channel, in the same form.
        image_size: Height and width in pixels for which it was built; None where any will do.
    """

    backbone: nn.Module
    arch: str
    small_stem: bool
    layout: str
    taken: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    config: Options = field(default_factory=dict)
    file: Path | None = None
    sha256: str = ""
    step: int | None = None
    epoch: int | None = None
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    image_size: int | None = None

    def __repr__(self) -> str:
        return f"Loaded({self.describe()})"

    def describe(self) -> str:
        """Name in one line what was taken and what was left."""
        stem = " with the stem for small images" if self.small_stem else ""
        text = f"{self.layout}: took {len(self.taken)} tensors of {self.arch}{stem}"
        if self.left:
            counts = Counter(_top(key) for key in self.left)
            parts = ", ".join(f"{name} ({count})" for name, count in counts.items())
            text += f"; left {parts}"
        return text


def load_backbone(
    path: Path | str,
    *,
    arch: str | None = None,
    small_stem: bool | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Loaded:
    """Load the backbone of a run folder, or of a checkpoint file of this or another library.

    Supported are runs of this package and the rows of `layouts.LAYOUTS`: MoCo's and the MixMask
    authors' files, Lightning's as users of lightly and solo-learn write them, lightly-train's,
    DINO's, SwAV's, VISSL's, MAE's and transformers', and state dicts with torchvision's or timm's
    names, alone or inside of a checkpoint; all of these under the prefixes of data parallel and
    torch.compile, and as safetensors. No code in a file is executed.

    Args:
        path: A run folder, or a checkpoint file.
        arch: Name of the backbone, see `build_backbone`. Default: the run's own, or what the keys
            say.
        small_stem: Whether its stem is the one for small images. Default: the run's own, or
            whether the first convolution is a 3x3 one.
        mean: Of each channel, by which images are normalised, for pixels from 0 to 1; one number
            for all, or as many as there are. Default: the checkpoint's own, else ImageNet's.
        std: Deviation of each channel, in the same form.

    Raises:
        ValueError: If there is no checkpoint, or it is damaged, unknown, of another architecture
            (the message lists what does not fit), or could run code when it is read.
    """
    file, content, noted = _read(Path(path))
    # At once: a run that trains replaces its checkpoint, and later ones are of other weights.
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    # The caller has the last word, then what the file notes, then what its keys tell.
    given, arch = arch, arch or noted.get("arch")
    arch, match = _find(file, content, noted, arch)
    if arch is None:
        shown = ", ".join(key for keys in list(match.keys.values())[:3] for key in keys)
        raise ValueError(
            f"{file} does not say which backbone it holds (its keys: {shown}, ...); name it, as "
            "timm or torchvision does, with --arch"
        )
    tells_stem = arch not in SLIM and is_small_stem(match.state)
    if small_stem is None:
        small_stem = str(noted.get("small_stem", tells_stem)).lower() == "true"
    size = int(noted.get("image_size") or 0) or None
    backbone = build_backbone(arch, small_stem=small_stem, image_size=size)
    size, channels = size or _image_size(backbone, match.state), _channels(backbone, match.state)
    # Built again, where the weights tell another size or number of channels than the name does.
    if channels != 3 or (size and not noted.get("image_size")):
        backbone = build_backbone(arch, small_stem=small_stem, image_size=size, in_chans=channels)
    taken = _fill(file, backbone, match, arch, given)
    if small_stem and arch not in SLIM:
        padding = noted.get("stem_padding", match.layout.small_stem_padding if tells_stem else 1)
        backbone.conv1.padding = (int(padding),) * 2  # type: ignore[union-attr]
    if not match.stem_relu or noted.get("stem_relu") == "false":
        backbone.act1 = nn.Identity()
    eps: Any = noted.get("norm_eps", match.layout.norm_eps)
    for module in backbone.modules() if eps is not None else ():
        if isinstance(module, nn.LayerNorm):
            module.eps = float(eps)
    used = set(taken)
    left = tuple(key for key in match.all_keys if key not in used)
    normalization = _normalization(content, noted, match, arch, small=tells_stem)
    mean, std = choose_normalization(mean, std, fit_channels(normalization, channels))
    config = {} if match.name != "mixmask" or not is_run(content) else noted
    # Its keys alone, but for a ResNet's, could as well be timm's.
    layout = "torchvision" if match.name == "timm" and torchvision_name(arch) else match.name
    step = epoch = None
    if is_run(content):
        # Row 0 is the untrained network; an epoch that was interrupted has no row yet.
        step = content["step"]
        epoch = max((int(row["epoch"]) for row in content["rows"]), default=0)
    return Loaded(
        backbone.eval(), arch, small_stem, layout, taken, left, config=config, file=file,
        sha256=digest, step=step, epoch=epoch, mean=mean, std=std, image_size=size,
    )  # fmt: skip


def _read(path: Path) -> tuple[Path, Any, Options]:
    """Read a checkpoint, and what a run's configuration or an export notes of its backbone."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; pass a run folder or a checkpoint file")
    if path.is_dir():
        file, content = load_checkpoint(path, _find_misfit)
        return file, content, _read_options(path) if is_run(content) else {}
    if not path.is_file():  # To open a pipe would wait forever.
        raise ValueError(f"{path} is a pipe or a device; pass a run folder or a checkpoint file")
    content, metadata = read_checkpoint(path)
    if is_run(content):
        if difference := describe_difference(path, content) or _find_misfit(content):
            raise ValueError(
                f"{path} cannot be used ({difference}); restore what was changed, or move {CONFIG} "
                "away"
            )
        return path, content, _read_options(path.parent)
    return path, content, metadata or exported_metadata(content)


def _find_misfit(content: Mapping[str, object]) -> str:
    if is_run(content):
        return describe_progress(content, {"step": int, "rows": list})
    return "" if "classes" in content else "it is not a checkpoint of a run"


def _find(
    file: Path, content: object, noted: Options, arch: str | None
) -> tuple[str | None, Match]:
    """Find the backbone, as timm's or else torchvision's of the architecture's name."""
    ours = is_run(content)
    if arch is None or ours:
        match = find_backbone(file, content, [])
        return arch or match.arch, match
    # Names decide between places in a file, so that sizes do not matter yet.
    expected = list(build_backbone(arch).state_dict())
    exported = "arch" in noted
    try:
        return arch, find_backbone(file, content, expected, exported=exported)
    except ValueError:
        other = TORCHVISION + arch  # Which has other layers under timm's name.
        if torchvision_name(arch) or not torchvision_name(other):
            raise
        try:
            return other, find_backbone(file, content, list(build_backbone(other).state_dict()))
        except ValueError:
            pass
        raise


def _channels(backbone: nn.Module, state: dict[str, Tensor]) -> int:
    """Return the channels of the images: those of the first convolution's input."""
    for name, wanted in backbone.state_dict().items():
        if name.endswith(".weight") and wanted.ndim == 4:  # (out, in, height, width)
            found = state.get(name, wanted)
            return found.shape[1] if found.ndim == 4 and wanted.shape[1] == 3 else 3
    return 3


def _image_size(backbone: nn.Module, state: dict[str, Tensor]) -> int | None:
    """Tell a ViT's image size by its positions (1, tokens, D), where they are not as built."""
    built = backbone.state_dict()
    for patch, name in (("patch_embed.proj", "pos_embed"), ("conv_proj", "encoder.pos_embedding")):
        patches, positions = state.get(f"{patch}.weight"), state.get(name)
        if patches is None or positions is None or positions.ndim != 3 or name not in built:
            continue
        if positions.shape != built[name].shape:  # A few of the tokens stand for no patch.
            return math.isqrt(positions.shape[1]) * patches.shape[-1]
    return None


def choose_normalization(
    mean: Sequence[float] | None, std: Sequence[float] | None, default: Normalization
) -> Normalization:
    """Return the mean and deviation that were given for each channel, or the default.

    Args:
        mean: Of each channel, for pixels from 0 to 1, or one number for all; None for the default.
        std: Likewise.
        default: Those of a checkpoint, which tell the number of channels.

    Raises:
        ValueError: If one is given without the other, or has a wrong count or value.
    """
    if not mean and not std:
        return default
    if not mean or not std:
        raise ValueError("--mean and --std belong together, got one of them; name the other, too")
    channels = len(default[0])
    for name, values, lowest in (("--mean", mean, -math.inf), ("--std", std, 0)):
        if len(values) not in (1, channels) or not all(lowest < v < math.inf for v in values):
            raise ValueError(
                f"{name} takes a {'positive ' if name == '--std' else ''}number for each of "
                f"{plural(channels, 'channel')}, or one for all, got {' '.join(map(str, values))}"
            )
    return fit_channels((tuple(mean), tuple(std)), channels)


def _normalization(
    content: object, noted: Options, match: Match, arch: str, *, small: bool
) -> Normalization:
    """Return the mean and deviation that are noted, else the format's or the architecture's."""
    trained = content.get("lightly_train") if isinstance(content, Mapping) else None
    if isinstance(trained, Mapping):
        noted = trained.get("normalize_args") or {}
    if noted.get("mean") and noted.get("std"):
        return _numbers(noted["mean"]), _numbers(noted["std"])
    if small and match.layout.small_stem_normalization is not None:
        return match.layout.small_stem_normalization
    if match.layout.normalization is not None or torchvision_name(arch) or arch in SLIM:
        return match.layout.normalization or IMAGENET
    import timm

    notes: Any = timm.get_pretrained_cfg(arch)
    return tuple(notes.mean), tuple(notes.std)


def _numbers(noted: str | Sequence[float]) -> tuple[float, ...]:
    return tuple(map(float, noted.split(",") if isinstance(noted, str) else noted))


def _read_options(folder: Path) -> Options:
    if not (folder / CONFIG).exists():  # A checkpoint that was copied out of its folder.
        return {}
    try:
        return read_options(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / CONFIG} cannot be read ({error}); move it away, and the backbone is "
            "inferred from the checkpoint's keys"
        ) from error


def _fill(
    file: Path, backbone: nn.Module, match: Match, arch: str, given: str | None
) -> tuple[str, ...]:
    """Load the tensors and return their keys, or refuse them with what does not fit."""
    wanted = backbone.state_dict()
    state: dict[str, Tensor] = {}
    keys: list[str] = []
    for name, tensor in match.state.items():
        # A norm that splits the batch lies, with its activation, in a sequence of its own.
        merged = re.sub(r"\.0(\.\w+)$", r"\1", name)
        inner = merged if name not in wanted and merged in wanted else name
        if inner in wanted or not inner.startswith(_HEADS):
            state[inner] = _merge_parts(inner, tensor, wanted.get(inner, tensor))
            keys += match.keys[name]
    misfits = {
        "missing": [name for name in wanted if name not in state and not name.endswith(_COUNTER)],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in state and state[name].shape != tensor.shape
        ],
        # Some networks keep bounds that are infinite from the start.
        "not finite": [
            name
            for name, tensor in state.items()
            if not tensor.isfinite().all()
            and wanted.get(name, tensor.new_zeros(1)).isfinite().all()
        ],
    }
    if any(misfits.values()):
        raise ValueError(
            f"{file} does not fit {arch}: "
            + ", ".join(
                f"{len(names)} {what} ({few(names)})" for what, names in misfits.items() if names
            )
            + f"; {_advice(misfits, infer_arch(match.state), arch, given)}"
        )
    backbone.load_state_dict(state, strict=False)
    return tuple(keys)


def _advice(
    misfits: Mapping[str, list[str]], inferred: str | None, arch: str, given: str | None
) -> str:
    """Say what to do about tensors that do not fit."""
    if not any(names for what, names in misfits.items() if what != "not finite"):
        return "the file is damaged, or the run had diverged; use an earlier checkpoint"
    if inferred not in (None, arch):
        return f"its keys are those of {inferred}, as which it is read with --arch {inferred}"
    if any(name.startswith("conv1.weight") for name in misfits["of another shape"]):
        return "name its stem with --small-stem or --no-small-stem"
    if given:
        return f"it is another network than {given}; name the one that was trained with --arch"
    return "name its backbone with --arch"


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
