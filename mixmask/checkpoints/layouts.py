"""Whose checkpoint it is, and which of its tensors are the backbone, by its keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mixmask.backbones import SLIM

# What follows the trained encoder slowly, by a word of its name.
_FOLLOWERS = {"ema", "k", "key", "m", "momentum", "slow", "target", "teacher"}
_WRAPPERS = {"_orig_mod", "module"}  # torch.compile; data parallel.
# Where blocks lie in nn.Sequential(*resnet.children()): torchvision's and timm's ResNets have
# the activation and the pooling before them, lightly's own has neither.
_SEQUENCES: dict[tuple[int, ...], dict[int, str]] = {
    (4, 5, 6, 7): {0: "conv1", 1: "bn1", 4: "layer1", 5: "layer2", 6: "layer3", 7: "layer4"},
    (2, 3, 4, 5): {0: "conv1", 1: "bn1", 2: "layer1", 3: "layer2", 4: "layer3", 5: "layer4"},
}
# Blocks a stage, whether they are bottlenecks, the (out, in) of the first block's second
# convolution: timm's name.
_RESNETS: dict[tuple[tuple[int, ...], bool, tuple[int, int]], str] = {
    ((1, 1, 1, 1), False, (16, 16)): "narrow",
    ((1, 1, 1, 1), False, (32, 32)): "medium",
    ((2, 2, 2, 2), False, (64, 64)): "resnet18",
    ((3, 4, 6, 3), False, (64, 64)): "resnet34",
    ((3, 4, 6, 3), True, (64, 64)): "resnet50",
    ((3, 4, 23, 3), True, (64, 64)): "resnet101",
    ((3, 8, 36, 3), True, (64, 64)): "resnet152",
    ((3, 4, 6, 3), True, (128, 128)): "wide_resnet50_2",
    ((3, 4, 23, 3), True, (128, 128)): "wide_resnet101_2",
    ((3, 4, 6, 3), True, (128, 4)): "resnext50_32x4d",
    ((3, 4, 23, 3), True, (256, 8)): "resnext101_32x8d",
}


@dataclass
class Found:
    """The part of a checkpoint that is the backbone, with a classifier's layers where it had one.

    Attributes:
        layout: Whose checkpoint it is.
        state: Tensors under torchvision's and timm's names.
        keys: The checkpoint's own key of each.
        all_keys: All keys of the checkpoint, those of other parts too.
        arch: What the keys say, or the file does; None where neither does.
        stem_padding: Of a 3x3 stem.
        stem_relu: Whether an activation follows the stem's batch norm.
    """

    layout: str
    state: dict[str, Tensor]
    keys: dict[str, str]
    all_keys: tuple[str, ...] = ()
    arch: str | None = None
    stem_padding: int = 1
    stem_relu: bool = True


def weights_in(path: Path, content: Any) -> Mapping[str, Any]:
    """Return the mapping from keys to tensors inside of a checkpoint.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(content, Mapping):
        for key in ("state_dict", "model", "model_state_dict"):
            inner = content.get(key)
            if isinstance(inner, Mapping) and _holds_tensors(inner):
                return inner
        if _holds_tensors(content):
            return content
    held = (
        f"the keys {', '.join(map(repr, list(content)[:5]))}"
        if isinstance(content, Mapping)
        else f"a {type(content).__name__}"
    )
    raise ValueError(
        f"{path} holds {held} and no weights that are known; pass a state dict, or a checkpoint "
        "that holds one as 'state_dict' or 'model'"
    )


def find_backbone(
    path: Path,
    content: Any,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str],
    expected: Iterable[str],
) -> Found:
    """Find the backbone in what a checkpoint file held.

    Args:
        path: The file, for messages.
        content: What `read_checkpoint` returned.
        tensors: What `weights_in` found in it.
        metadata: The file's own, as exports write it.
        expected: Names of the tensors of the backbone that was asked for; empty if none was.

    Raises:
        ValueError: If no layout is recognised, or several encoders are in question.
    """
    # Names without wrappers, each with the checkpoint's own key.
    own = {_unwrapped(key): key for key, value in tensors.items() if isinstance(value, Tensor)}
    ours = is_run(content)
    prefix = "backbone." if ours else _prefix(path, own, list(expected))
    names = {name: name.removeprefix(prefix) for name in own if name.startswith(prefix)}
    if not names:
        raise ValueError(f"{path} holds no backbone: no key begins with {prefix}")
    sequence = _sequence(names.values())
    if sequence is not None:
        names = {name: _from_sequence(inner, sequence) for name, inner in names.items()}
    names = {name: inner.replace(".shortcut.", ".downsample.") for name, inner in names.items()}
    state = {inner: tensors[own[name]] for name, inner in names.items()}
    found = Found(
        "mixmask" if ours or "arch" in metadata else _layout(content, prefix, own),
        state,
        {inner: own[name] for name, inner in names.items()},
        tuple(tensors),
        metadata.get("arch") or infer_arch(state) or _named_arch(content),
        int(metadata.get("stem_padding", "1")),
        metadata.get("stem_relu", "true") == "true",
    )
    if found.layout == "solo-learn" and is_small_stem(state):
        found.stem_padding = 2  # solo-learn's for CIFAR, unlike everybody else's.
    if sequence == (2, 3, 4, 5):
        found.stem_relu = False
    return found


def is_run(content: Any) -> bool:
    """Tell a checkpoint of our runs by its parts."""
    return isinstance(content, Mapping) and {"model", "step", "rows", "meter"} <= set(content)


def infer_arch(state: Mapping[str, Tensor]) -> str | None:
    """Tell a ResNet by its blocks; None where the keys leave it open.

    Example:
        >>> infer_arch({"blocks.0.attn.qkv.weight": Tensor()}) is None
        True
    """
    blocks = tuple(
        len({name.split(".")[1] for name in state if name.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    second = state.get("layer1.0.conv2.weight")
    if second is None:
        return None
    shape = (second.shape[0], second.shape[1])
    name = _RESNETS.get((blocks, "layer1.0.conv3.weight" in state, shape))
    # Others' variants with a stem of several convolutions share these numbers.
    plain = "conv1.weight" in state
    return name if plain != (name in SLIM) else None


def is_small_stem(state: Mapping[str, Tensor]) -> bool:
    """Tell the stem for small images, which has no max-pooling, by its 3x3 convolution."""
    first = state.get("conv1.weight")
    return first is not None and first.ndim == 4 and first.shape[-1] == 3


def exported_metadata(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Return what our exports note in a state dict, where torch keeps versions of modules."""
    versions = getattr(tensors, "_metadata", None)
    noted = versions.get("", {}) if isinstance(versions, dict) else {}
    return {key: value for key, value in noted.items() if isinstance(value, str)}


def _holds_tensors(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in content.values()) and all(
        isinstance(key, str) for key in content
    )


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _prefix(path: Path, names: Iterable[str], expected: list[str]) -> str:
    """Find where the trained backbone begins."""
    found = (re.fullmatch(r"((?:.*\.)?)(?:layer1|[24])\.0\.conv1\.weight", name) for name in names)
    places = {match[1] for match in found if match}
    first = next((name for name in expected if name.endswith(".weight")), None)
    if not places and first is not None:
        places = {name.removesuffix(first) for name in names if f".{name}".endswith(f".{first}")}
    if not places:
        shown = ", ".join(list(names)[:3])
        raise ValueError(
            f"{path} holds no ResNet, and "
            + ("no backbone of the --arch given" if expected else "its backbone is not named")
            + f" (its keys: {shown}, ...); name its backbone, as timm does, with --arch"
        )
    trained = {place for place in places if not _FOLLOWERS & set(re.split(r"[._]", place))}
    candidates = sorted(trained or places)
    if len(candidates) > 1:
        raise ValueError(
            f"{path} holds several encoders, {', '.join(candidates)}; save the one you mean alone: "
            'torch.save(model.NAME.state_dict(), "backbone.pth")'
        )
    return candidates[0]


def _sequence(names: Iterable[str]) -> tuple[int, ...] | None:
    """Return the places of the four stages among a ResNet's children, if it is a sequence."""
    found = {int(match[1]) for name in names if (match := re.match(r"(\d+)\.0\.conv1\.", name))}
    places = tuple(sorted(found))
    return places if places in _SEQUENCES else None


def _from_sequence(name: str, sequence: tuple[int, ...]) -> str:
    place, _, rest = name.partition(".")
    known = _SEQUENCES[sequence]
    return f"{known[int(place)]}.{rest}" if place.isdigit() and int(place) in known else name


def _layout(content: Any, prefix: str, names: Mapping[str, str]) -> str:
    """Say whose checkpoint it is, which decides nothing but solo-learn's padding."""
    encoder = prefix.rstrip(".").rpartition(".")[2]
    if encoder in ("encoder_q", "base_encoder"):
        return "moco"
    if prefix in ("backbone.", "encoder.") and "classifier.weight" in names:
        # Its optimiser's groups bear names, which tells it from others with a classifier.
        states = content.get("optimizer_states") or [] if isinstance(content, Mapping) else []
        groups = [group for state in states[:1] for group in state.get("param_groups", [])]
        if not groups or any(group.get("name") == "classifier" for group in groups):
            return "solo-learn"
    if isinstance(content, Mapping) and "pytorch-lightning_version" in content:
        return "lightning"
    if prefix:
        return "state dict"
    return "torchvision" if any("layer1.0." in name for name in names) else "timm"


def _named_arch(content: Any) -> str | None:
    """Return the architecture that MoCo's checkpoints name."""
    named = content.get("arch") if isinstance(content, Mapping) else None
    return named if isinstance(named, str) else None
