"""Write backbones in the formats of torchvision, timm, safetensors and Detectron2."""

from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixmask._checks import check_choice
from mixmask.backbones import SLIM, torchvision_name
from mixmask.checkpoints.detectron2 import configs, pickle_state
from mixmask.checkpoints.load import Loaded
from mixmask.checkpoints.resnets import RESNETS
from mixmask.data.folders import printable
from mixmask.runs.files import atomic_write, check_files
from mixmask.runs.reading import UNSEALED, seal_safetensors
from mixmask.runs.records import plural

FORMATS = ("torchvision", "timm", "safetensors", "detectron2")


class Exported(NamedTuple):
    """What an export wrote."""

    files: tuple[Path, ...]  # The weights first.
    notes: tuple[str, ...]  # What their reader has to know, one line each.


def export_backbone(loaded: Loaded, to: str, out: Path, *, force: bool = False) -> Exported:
    """Write a backbone's weights for another library; a crash leaves the old files.

    "torchvision" and "timm" write the state dict of `torchvision.models.NAME` without its `fc`
    and of `timm.create_model(NAME, num_classes=0)`, by `torch.save`, or as safetensors where the
    file is named so. "safetensors" takes any backbone. "detectron2" writes the pickle that MoCo's
    converter writes and, for bottleneck ResNets, MoCo's two configurations beside it. All but
    Detectron2's are read by `load_backbone`, without further options.

    Args:
        loaded: What `load_backbone` returned.
        to: One of `FORMATS`.
        out: The file to write.
        force: Whether to overwrite files.

    Raises:
        ValueError: If the format has no such backbone, the file's name does not suit the format,
            or there is such a file already.
    """
    check_choice("--to", to, FORMATS)
    _check_backbone(loaded, to)
    suffix = {"safetensors": ".safetensors", "detectron2": ".pkl"}.get(to)
    if suffix is not None and out.suffix != suffix:
        raise ValueError(
            f"--to {to} needs a file named *{suffix}, which its readers expect, got {out}; "
            f"use --out {out.with_suffix(suffix)}"
        )
    # Each tensor contiguous and by itself, as safetensors wants it.
    state = OrderedDict(
        (key, value.detach().cpu().clone(memory_format=torch.contiguous_format))
        for key, value in loaded.backbone.state_dict().items()
    )
    if to == "detectron2":
        contents = {out: pickle_state(state)}
        normalization = loaded.mean, loaded.std
        for name, text in configs(RESNETS[loaded.arch], out.name, normalization).items():
            contents[out.with_name(name)] = text.encode()
    elif out.suffix == ".safetensors":
        from safetensors.torch import save

        metadata = {"format": "pt", "sha256": UNSEALED, **_metadata(loaded)}
        contents = {out: seal_safetensors(save(state, metadata))}
    else:
        contents = {out: _torch_save(state, _metadata(loaded))}
    # Weights and configurations are replaced together.
    check_files(*contents, force=force)
    with atomic_write(*contents) as temporary:
        for path, content in zip(temporary, contents.values(), strict=True):
            path.write_bytes(content)
    return Exported(tuple(contents), _notes(loaded, to))


def _check_backbone(loaded: Loaded, to: str) -> None:
    """Check that the other library has the backbone; the error names a format that fits."""
    if to == "timm" and loaded.arch in SLIM:
        raise ValueError(
            f"timm has no backbone {loaded.arch}, which is our own; use --to safetensors, which "
            "load_backbone reads, or pretrain with --arch resnet18"
        )
    if to == "timm" and torchvision_name(loaded.arch):
        raise ValueError(
            f"--to timm takes timm's backbones, got {loaded.arch} of torchvision; use --to "
            "safetensors, which load_backbone reads"
        )
    if to in ("torchvision", "detectron2"):
        if loaded.arch not in RESNETS:
            ours = loaded.arch in SLIM or torchvision_name(loaded.arch)
            other = "safetensors" if ours else "timm"
            raise ValueError(
                f"--to {to} takes {', '.join(RESNETS)}, got {loaded.arch}; use --to {other}"
            )
        if to == "detectron2" and loaded.small_stem:
            raise ValueError(
                "Detectron2's ResNets begin with a 7x7 convolution, got a stem for small images; "
                "use --to torchvision, or pretrain without --small-stem"
            )
        if to == "detectron2" and len(loaded.mean) != 3:
            raise ValueError(
                f"Detectron2's protocols read images of 3 channels, got a backbone of "
                f"{len(loaded.mean)}; use --to torchvision or --to timm"
            )


def _stem(backbone: Any) -> tuple[int, bool]:
    """Return the padding of a ResNet's stem, and whether an activation follows its norm."""
    return int(backbone.conv1.padding[0]), not isinstance(backbone.act1, nn.Identity)


def _metadata(loaded: Loaded) -> dict[str, str]:
    """Return what `load_backbone` needs beside the tensors, and where they are from."""
    metadata = {
        "arch": loaded.arch,
        "small_stem": str(loaded.small_stem).lower(),
        "source": f"{loaded.layout}: {printable(loaded.file.name) if loaded.file else 'unknown'}",
    }
    for name in ("mean", "std"):
        metadata[name] = ",".join(map(str, getattr(loaded, name)))
    norm = getattr(loaded.backbone, "norm", None)
    if isinstance(norm, nn.LayerNorm):  # transformers' ViTs have another than timm's.
        metadata["norm_eps"] = str(norm.eps)
    if loaded.image_size is not None:
        metadata["image_size"] = str(loaded.image_size)
    if loaded.small_stem and loaded.arch not in SLIM:
        padding, relu = _stem(loaded.backbone)
        metadata |= {"stem_padding": str(padding), "stem_relu": str(relu).lower()}
    return metadata


def _torch_save(state: OrderedDict[str, Tensor], metadata: dict[str, str]) -> bytes:
    # Beside the versions of modules, where load_state_dict passes over what it does not know.
    state._metadata = {"": {"version": 1, **metadata}}  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _notes(loaded: Loaded, to: str) -> tuple[str, ...]:
    """Return what the reader of an export has to know."""
    if to == "detectron2":
        none = f"no configurations: Detectron2's C4 heads have bottlenecks, {loaded.arch} has none"
        return () if RESNETS[loaded.arch].bottleneck else (none,)
    channels = len(loaded.mean)
    if to == "safetensors" or loaded.arch in SLIM or not (loaded.small_stem or channels != 3):
        return ()
    if to == "timm" and not loaded.small_stem:
        return (f"its images have {plural(channels, 'channel')}: add in_chans={channels}",)
    first: Any = loaded.backbone.conv1
    padding, relu = _stem(loaded.backbone)
    size, stride = first.kernel_size[0], f"stride={first.stride[0]}, " * (first.stride[0] > 1)
    conv = f"{channels}, {first.out_channels}, {size}, {stride}padding={padding}, bias=False"
    lines = [f"model.conv1 = torch.nn.Conv2d({conv})"]
    if loaded.small_stem:
        lines.append("model.maxpool = torch.nn.Identity()")
    if not relu:
        lines.append(f"model.{'relu' if to == 'torchvision' else 'act1'} = torch.nn.Identity()")
    reason = (
        "its stem is for small images" if loaded.small_stem else f"it takes {channels} channels"
    )
    return (f"{reason}; before loading it: {'; '.join(lines)}",)
