"""Checkpoint formats, one row each, and which tensors of a file are the backbone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mixmask.checkpoints.resnets import infer_arch, is_small_stem

# Keys under which a checkpoint may hold its weights.
_NESTS = ("state_dict", "model", "model_state_dict")
# Words in the name of an encoder that follows the trained one slowly.
_FOLLOWERS = {"ema", "k", "key", "m", "momentum", "slow", "target", "teacher"}
_WRAPPERS = {"_orig_mod", "module"}  # torch.compile; data parallel.


class Source(NamedTuple):
    """What a format is recognised by.

    Attributes:
        content: The file's entries; empty if it holds no mapping.
        ours: Whether a run or an export of this package wrote it.
        prefix: Where the backbone begins, without wrappers.
        names: All names of tensors, without wrappers.
    """

    content: Mapping[str, object]
    ours: bool
    prefix: str
    names: frozenset[str]


class Layout(NamedTuple):
    """A row of the table of formats.

    Attributes:
        name: Whose format it is.
        matches: Tells it from those below it.
        small_stem_padding: Padding of the stem for small images, which no key tells.
    """

    name: str
    matches: Callable[[Source], bool]
    small_stem_padding: int = 1


def _is_solo_learn(source: Source) -> bool:
    if source.prefix not in ("backbone.", "encoder.") or "classifier.weight" not in source.names:
        return False
    # Its optimiser's groups have names, unlike those of others with a classifier.
    states = source.content.get("optimizer_states")
    first = states[0] if isinstance(states, Sequence) and states else {}
    groups = first.get("param_groups", []) if isinstance(first, Mapping) else []
    return not groups or any(group.get("name") == "classifier" for group in groups)


# The first row that matches names the format.
LAYOUTS = (
    Layout("mixmask", lambda source: source.ours),
    Layout("moco", lambda source: source.prefix.endswith(("encoder_q.", "base_encoder."))),
    Layout("solo-learn", _is_solo_learn, small_stem_padding=2),
    Layout("lightning", lambda source: "pytorch-lightning_version" in source.content),
    Layout("state dict", lambda source: source.prefix != ""),
    Layout("torchvision", lambda source: any("layer1.0." in name for name in source.names)),
    Layout("timm", lambda _: True),
)


# The places of the four stages in nn.Sequential(*resnet.children()): torchvision's and timm's
# ResNets have the activation and the pooling before them, lightly's own has neither.
_WITH_RELU, _WITHOUT_RELU = (4, 5, 6, 7), (2, 3, 4, 5)


@dataclass(frozen=True)
class Match:
    """The part of a checkpoint that is the backbone, with a classifier's layers where it had one.

    Attributes:
        layout: Whose checkpoint it is.
        state: Tensors under torchvision's and timm's names.
        keys: The checkpoint's own key of each.
        arch: What the keys say, or the file does; None where neither does.
        stem_padding: Of a 3x3 stem.
        stem_relu: Whether an activation follows the stem's batch norm.
    """

    layout: str
    state: dict[str, Tensor]
    keys: dict[str, str]
    arch: str | None
    stem_padding: int
    stem_relu: bool


def weights_in(path: Path, content: object) -> Mapping[str, object]:
    """Return the mapping from keys to tensors inside of a checkpoint.

    Raises:
        ValueError: If there is none.
    """
    entries = content if isinstance(content, Mapping) else {}
    for candidate in (*(entries.get(key) for key in _NESTS), content):
        if isinstance(candidate, Mapping) and _holds_tensors(candidate):
            return candidate
    if isinstance(content, Mapping):
        held = f"the keys {', '.join(map(repr, list(content)[:5]))}"
    else:
        held = f"a {type(content).__name__}"
    raise ValueError(
        f"{path} holds {held} and no weights that are known; pass a state dict, or a checkpoint "
        "that holds one as 'state_dict' or 'model'"
    )


def find_backbone(
    path: Path,
    content: object,
    tensors: Mapping[str, object],
    metadata: Mapping[str, str],
    expected: Sequence[str],
) -> Match:
    """Find the backbone in what a checkpoint file held.

    Tensors of our runs, and those that have all expected names already, keep their names: what
    other formats call a wrapper or a shortcut is part of some architectures' own names.

    Args:
        path: The file, for messages.
        content: What `read_checkpoint` returned.
        tensors: What `weights_in` found in it.
        metadata: The file's own, as exports write it.
        expected: Names of the tensors of the backbone that was asked for; empty if none was.

    Raises:
        ValueError: If no layout is recognised, or several encoders are in question.
    """
    entries = content if isinstance(content, Mapping) else {}
    weights = {key: value for key, value in tensors.items() if isinstance(value, Tensor)}
    run, stages = is_run(content), None
    places = {"backbone."} if run else _exact_places(weights, expected)
    if places:
        keys, prefix = _names_under(path, {key: key for key in weights}, places)
    else:
        names = {key: _unwrap(key) for key in weights}
        places = _similar_places(path, list(names.values()), expected)
        keys, prefix = _names_under(path, names, places)
        stages = _stages(keys)
        keys = {_rename(name, stages or ()): key for name, key in keys.items()}
    state = {name: weights[key] for name, key in keys.items()}
    ours = run or "arch" in metadata
    source = Source(entries, ours, _unwrap(prefix), frozenset(map(_unwrap, weights)))
    layout = next(row for row in LAYOUTS if row.matches(source))
    padding = layout.small_stem_padding if is_small_stem(state) else 1
    named = entries.get("arch")  # As MoCo's checkpoints have it.
    return Match(
        layout.name,
        state,
        keys,
        metadata.get("arch") or infer_arch(state) or (named if isinstance(named, str) else None),
        int(metadata.get("stem_padding", padding)),
        metadata.get("stem_relu", "true") == "true" and stages != _WITHOUT_RELU,
    )


def _names_under(
    path: Path, names: Mapping[str, str], places: set[str]
) -> tuple[dict[str, str], str]:
    """Return the keys of the trained encoder by its own names, and where it begins."""
    prefix = _trained(path, places)
    keys = {
        name.removeprefix(prefix): key for key, name in names.items() if name.startswith(prefix)
    }
    if not keys:
        raise ValueError(f"{path} holds no backbone: no key begins with {prefix}")
    return keys, prefix


def is_run(content: object) -> bool:
    """Tell a checkpoint of our runs by its parts."""
    return isinstance(content, Mapping) and {"model", "step", "rows", "meter"} <= set(content)


def exported_metadata(tensors: Mapping[str, object]) -> dict[str, str]:
    """Return what our exports note in a state dict, where torch keeps versions of modules."""
    versions = getattr(tensors, "_metadata", None)
    noted = versions.get("", {}) if isinstance(versions, dict) else {}
    return {key: value for key, value in noted.items() if isinstance(value, str)}


def _holds_tensors(content: Mapping[str, object]) -> bool:
    return any(isinstance(value, Tensor) for value in content.values()) and all(
        isinstance(key, str) for key in content
    )


def _unwrap(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _exact_places(keys: Iterable[str], expected: Sequence[str]) -> set[str]:
    """Find prefixes under which all expected names stand; old files have no batch counters."""
    needed = [name for name in expected if not name.endswith("num_batches_tracked")]
    present = set(keys)
    return {
        place
        for place in _places_of(present, needed[:1])
        if all(place + name in present for name in needed)
    }


def _similar_places(path: Path, names: Sequence[str], expected: Sequence[str]) -> set[str]:
    """Find prefixes under which a ResNet stands, or else the first of the expected weights."""
    block = re.compile(r"((?:.*\.)?)(?:layer1|[24])\.0\.conv1\.weight")
    places = {match[1] for name in names if (match := block.fullmatch(name))}
    weights = [name for name in expected if name.endswith(".weight")]
    places = places or _places_of(names, weights[:1])
    if not places:
        raise ValueError(
            f"{path} holds no ResNet, and "
            + ("no backbone of the --arch given" if expected else "its backbone is not named")
            + f" (its keys: {', '.join(names[:3])}, ...); name its backbone, as timm does, with "
            "--arch"
        )
    return places


def _places_of(keys: Iterable[str], names: Sequence[str]) -> set[str]:
    return {
        key.removesuffix(name) for key in keys for name in names if f".{key}".endswith(f".{name}")
    }


def _trained(path: Path, places: set[str]) -> str:
    """Choose the place of the trained encoder among those of encoders."""
    trained = {place for place in places if not _FOLLOWERS & set(re.split(r"[._]", place))}
    candidates = sorted(trained or places)
    if len(candidates) > 1:
        raise ValueError(
            f"{path} holds several encoders, {', '.join(candidates)}; save the one you mean alone: "
            'torch.save(model.NAME.state_dict(), "backbone.pth")'
        )
    return candidates[0]


def _stages(names: Iterable[str]) -> tuple[int, ...] | None:
    """Return the places of the stages, if the ResNet is a sequence of its children."""
    found = {int(match[1]) for name in names if (match := re.match(r"(\d+)\.0\.conv1\.", name))}
    places = tuple(sorted(found))
    return places if places in (_WITH_RELU, _WITHOUT_RELU) else None


def _rename(name: str, stages: tuple[int, ...]) -> str:
    """Return torchvision's name of a ResNet's tensor."""
    layers = {"0": "conv1", "1": "bn1"} if stages else {}
    layers |= {str(place): f"layer{number}" for number, place in enumerate(stages, start=1)}
    place, dot, rest = name.partition(".")
    # lightly's own ResNets call their downsampling a shortcut.
    return (layers.get(place, place) + dot + rest).replace(".shortcut.", ".downsample.")
