"""Write backbones in the formats of torchvision, timm, safetensors and Detectron2."""

from __future__ import annotations

import io
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixmask._checks import check_choice
from mixmask.backbones import SLIM
from mixmask.checkpoints.detectron2 import configs
from mixmask.checkpoints.load import Loaded
from mixmask.checkpoints.resnets import RESNETS
from mixmask.runs.folder import atomic_write, check_files

FORMATS = ("torchvision", "timm", "safetensors", "detectron2")


class Exported(NamedTuple):
    """What an export wrote.

    Attributes:
        files: The files, the weights first.
        notes: What their reader has to know, a line each.
    """

    files: tuple[Path, ...]
    notes: tuple[str, ...]


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

    Returns:
        The files, and notes for their reader.

    Raises:
        ValueError: If the format has no such backbone, the file's name does not suit the format,
            or there is such a file already.
    """
    check_choice("--to", to, FORMATS)
    _check_backbone(loaded, to)
    suffix = {"safetensors": ".safetensors", "detectron2": ".pkl"}.get(to)
    if suffix is not None and out.suffix != suffix:
        raise ValueError(
            f"--to {to} needs a file named *{suffix}, by which its readers know it, got {out}; "
            f"use --out {out.with_suffix(suffix)}"
        )
    if to == "detectron2":
        contents = {out: _pickle(detectron2_state(loaded.backbone))}
        contents |= {
            out.with_name(f"{out.stem}-{name}.yaml"): text.encode()
            for name, text in configs(RESNETS[loaded.arch], out.name).items()
        }
    elif out.suffix == ".safetensors":
        from safetensors.torch import save

        state, metadata = backbone_state(loaded.backbone), _metadata(loaded)
        contents = {out: save(state, {"format": "pt", **metadata})}
    else:
        contents = {out: _torch_save(backbone_state(loaded.backbone), _metadata(loaded))}
    write_files(contents, force=force)
    return Exported(tuple(contents), tuple(_notes(loaded, to)))


def backbone_state(backbone: nn.Module) -> OrderedDict[str, Tensor]:
    """Return a backbone's state dict on the CPU, each tensor contiguous and by itself."""
    state = backbone.state_dict()
    return OrderedDict(
        (key, value.detach().cpu().clone(memory_format=torch.contiguous_format))
        for key, value in state.items()
    )


def detectron2_name(name: str) -> str:
    """Return Detectron2's name of a ResNet's tensor.

    Detectron2 calls the first convolution the stem, counts the stages from 2, and keeps a norm
    inside of the convolution before it.

    Example:
        >>> detectron2_name("bn1.weight"), detectron2_name("layer2.0.downsample.0.weight")
        ('stem.conv1.norm.weight', 'res3.0.shortcut.weight')
    """
    match = re.fullmatch(
        r"(?:layer(?P<stage>\d)\.(?P<block>\d+)\.)?"
        r"(?P<kind>conv|bn|downsample\.)(?P<number>\d)\.(?P<value>\w+)",
        name,
    )
    if match is None:
        raise ValueError(f"Detectron2 has no name for {name}; only plain ResNets can be converted")
    place = "stem" if match["stage"] is None else f"res{int(match['stage']) + 1}.{match['block']}"
    norm = match["kind"] == "bn" or (match["kind"], match["number"]) == ("downsample.", "1")
    layer = "shortcut" if match["kind"] == "downsample." else f"conv{match['number']}"
    return f"{place}.{layer}.{'norm.' if norm else ''}{match['value']}"


def detectron2_state(backbone: nn.Module) -> dict[str, Any]:
    """Return a ResNet's tensors as arrays under Detectron2's names."""
    state = backbone_state(backbone)
    return {detectron2_name(name): tensor.numpy() for name, tensor in state.items()}


def write_files(contents: dict[Path, bytes], *, force: bool) -> None:
    """Write files atomically, after a check that nothing is in the way of any of them."""
    check_files(*contents, force=force)
    with atomic_write(*contents) as temporary:
        for path, content in zip(temporary, contents.values(), strict=True):
            path.write_bytes(content)


def _check_backbone(loaded: Loaded, to: str) -> None:
    """Check that the other library has the backbone; the error names a format that fits."""
    if to == "timm" and loaded.arch in SLIM:
        raise ValueError(
            f"timm has no backbone {loaded.arch}, which is our own; use --to safetensors, which "
            "load_backbone reads, or pretrain with --arch resnet18"
        )
    if to in ("torchvision", "detectron2"):
        if loaded.arch not in RESNETS:
            other = "safetensors" if loaded.arch in SLIM else "timm"
            raise ValueError(
                f"--to {to} takes {', '.join(RESNETS)}, got {loaded.arch}; use --to {other}"
            )
        if to == "detectron2" and loaded.small_stem:
            raise ValueError(
                "Detectron2's ResNets begin with a 7x7 convolution, got a stem for small images; "
                "use --to torchvision, or pretrain without --small-stem"
            )


def _stem(backbone: Any) -> tuple[int, bool]:
    """Return the padding of a ResNet's stem, and whether an activation follows its norm."""
    return int(backbone.conv1.padding[0]), not isinstance(backbone.act1, nn.Identity)


def _metadata(loaded: Loaded) -> dict[str, str]:
    """Return what `load_backbone` needs beside the tensors, and where they are from."""
    metadata = {
        "arch": loaded.arch,
        "small_stem": str(loaded.small_stem).lower(),
        "source": f"{loaded.layout}: {loaded.file.name if loaded.file else 'unknown file'}",
    }
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


class _PublicPickler(pickle.Pickler):
    """Pickles arrays by NumPy's public names, which all its versions can read.

    NumPy's own way names the module of its inner workings, which moved in NumPy 2; Detectron2
    often runs on an older one.
    """

    def reducer_override(self, value: Any) -> Any:
        import numpy as np

        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented


def _pickle(model: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    content = {"model": model, "__author__": "mixmask", "matching_heuristics": True}
    _PublicPickler(buffer, protocol=4).dump(content)
    return buffer.getvalue()


def _notes(loaded: Loaded, to: str) -> list[str]:
    """Return what the reader of an export has to know."""
    if to == "detectron2":
        if RESNETS[loaded.arch].bottleneck:
            return []
        return [
            f"no configurations: Detectron2's C4 heads have bottlenecks, {loaded.arch} has none"
        ]
    if not loaded.small_stem or to == "safetensors" or loaded.arch in SLIM:
        return []
    padding, relu = _stem(loaded.backbone)
    first: Any = loaded.backbone.conv1
    lines = [
        f"model.conv1 = torch.nn.Conv2d(3, {first.out_channels}, 3, padding={padding}, bias=False)",
        "model.maxpool = torch.nn.Identity()",
    ]
    if not relu:
        lines.append(f"model.{'relu' if to == 'torchvision' else 'act1'} = torch.nn.Identity()")
    return [f"its stem is for small images; before loading it: {'; '.join(lines)}"]
