"""Checkpoint formats, one row each, and which tensors of a file are the backbone."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mixmask.checkpoints.resnets import infer_arch, is_small_stem
from mixmask.runs.folder import is_run

# Keys under which a checkpoint may hold its weights.
_NESTS = ("state_dict", "model", "model_state_dict")
# Words in the name of an encoder that follows the trained one slowly.
_FOLLOWERS = {"ema", "k", "key", "m", "momentum", "slow", "target", "teacher"}
_WRAPPERS = {"_orig_mod", "module"}  # torch.compile; data parallel.
_STAGES = ("layer1", "layer2", "layer3", "layer4")
# nn.Sequential(*resnet.children()): torchvision's and timm's, and lightly's own ResNets.
_CHILDREN = (("conv1", "bn1", "act1", "maxpool", *_STAGES), ("conv1", "bn1", *_STAGES))


class Content(NamedTuple):
    """What a format is told by; prefix and names are without wrappers."""

    entries: Mapping[str, object]  # Of the file; empty if it holds no mapping.
    ours: bool  # Whether a run or an export of this package wrote it.
    prefix: str  # Where the backbone begins.
    names: Collection[str]  # Of all tensors.


class Layout(NamedTuple):
    """A row of the table of formats."""

    name: str  # Whose format it is.
    matches: Callable[[Content], bool]  # Tells it from those below it.
    small_stem_padding: int = 1  # Of the stem for small images, which no key tells.


def _is_solo_learn(file: Content) -> bool:
    if file.prefix not in ("backbone.", "encoder.") or "classifier.weight" not in file.names:
        return False
    # Its optimiser's groups have names, unlike those of others with a classifier.
    states = file.entries.get("optimizer_states")
    first = states[0] if isinstance(states, Sequence) and states else {}
    groups = first.get("param_groups", []) if isinstance(first, Mapping) else []
    return not groups or any(group.get("name") == "classifier" for group in groups)


# The first row that matches names the format.
LAYOUTS = (
    Layout("mixmask", lambda file: file.ours),
    Layout("moco", lambda file: file.prefix.endswith(("encoder_q.", "base_encoder."))),
    Layout("solo-learn", _is_solo_learn, small_stem_padding=2),
    Layout("lightning", lambda file: "pytorch-lightning_version" in file.entries),
    Layout("state dict", lambda file: file.prefix != ""),
    Layout("torchvision", lambda file: any("layer1.0." in name for name in file.names)),
    Layout("timm", lambda _: True),
)


class Match(NamedTuple):
    """The part of a checkpoint that is the backbone, with its classifier where it has one."""

    layout: str  # Whose checkpoint it is.
    state: dict[str, Tensor]  # Under torchvision's and timm's names.
    keys: dict[str, str]  # The checkpoint's own key of each.
    arch: str | None  # What the keys say, or the file does.
    stem_padding: int  # Of a 3x3 stem.
    stem_relu: bool  # Whether an activation follows the stem's batch norm.


def weights_in(path: Path, content: object) -> Mapping[str, object]:
    """Return the mapping from keys to tensors inside of a checkpoint; a ValueError without one."""
    entries = content if isinstance(content, Mapping) else {}
    for candidate in (*(entries.get(key) for key in _NESTS), content):
        if (
            isinstance(candidate, Mapping)
            and all(isinstance(key, str) for key in candidate)
            and any(isinstance(value, Tensor) for value in candidate.values())
        ):
            return candidate
    held = f"a {type(content).__name__}"
    if isinstance(content, Mapping):
        held = f"the keys {', '.join(map(repr, list(content)[:5]))}"
    raise ValueError(
        f"{path} holds {held} and no weights that are known; pass a state dict, or a checkpoint "
        "that holds one as 'state_dict' or 'model'"
    )


def exported_metadata(tensors: Mapping[str, object]) -> dict[str, str]:
    """Return what our exports note in a state dict, where torch keeps versions of modules."""
    versions = getattr(tensors, "_metadata", None)
    noted = versions.get("", {}) if isinstance(versions, dict) else {}
    return {key: value for key, value in noted.items() if isinstance(value, str)}


def find_backbone(
    path: Path,
    content: object,
    tensors: Mapping[str, object],
    metadata: Mapping[str, str],
    expected: Sequence[str],
) -> Match:
    """Find the backbone in what a checkpoint held: `tensors` are what `weights_in` found there.

    Tensors of our runs, and those that have all expected names already, keep their names: what
    other formats call a wrapper or a shortcut is part of some architectures' own names. `expected`
    is empty where no backbone was asked for.

    Raises:
        ValueError: If no layout is recognised, or several encoders are in question.
    """
    entries = content if isinstance(content, Mapping) else {}
    weights = {key: value for key, value in tensors.items() if isinstance(value, Tensor)}
    run, unwrapped = is_run(content), {_unwrap(key): key for key in weights}
    keys = {key: key for key in weights}
    children: tuple[str, ...] = ()
    places = {"backbone."} if run else _exact_places(keys, expected)
    if places:  # By their own names: nothing is renamed.
        prefix = _trained(path, places)
        keys = _keys_under(prefix, keys)
    else:
        prefix = _trained(path, _similar_places(path, unwrapped, expected))
        keys, children = _torchvision_names(_keys_under(prefix, unwrapped))
    if not keys:
        raise ValueError(f"{path} holds no backbone: no key begins with {prefix}")
    state = {name: weights[key] for name, key in keys.items()}
    file = Content(entries, run or "arch" in metadata, _unwrap(prefix), unwrapped)
    layout = next(row for row in LAYOUTS if row.matches(file))
    padding = layout.small_stem_padding if is_small_stem(state) else 1
    named = entries.get("arch")  # As MoCo's checkpoints have it.
    return Match(
        layout.name,
        state,
        keys,
        metadata.get("arch") or infer_arch(state) or (named if isinstance(named, str) else None),
        int(metadata.get("stem_padding", padding)),
        metadata.get("stem_relu", "true") == "true" and (not children or "act1" in children),
    )


def _unwrap(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _keys_under(prefix: str, keys: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(prefix): key for name, key in keys.items() if name.startswith(prefix)}


def _places_of(names: Iterable[str], last: str) -> set[str]:
    return {name.removesuffix(last) for name in names if f".{name}".endswith(f".{last}")}


def _exact_places(names: Collection[str], expected: Sequence[str]) -> set[str]:
    """Find prefixes under which all expected names stand; old files have no batch counters."""
    needed = [name for name in expected if not name.endswith("num_batches_tracked")]
    return {
        place
        for place in (_places_of(names, needed[0]) if needed else ())
        if all(place + name in names for name in needed)
    }


def _similar_places(path: Path, names: Collection[str], expected: Sequence[str]) -> set[str]:
    """Find prefixes under which a ResNet stands, or else the first of the expected weights."""
    block = re.compile(r"((?:.*\.)?)(?:layer1|[24])\.0\.conv1\.weight")
    places = {match[1] for name in names if (match := block.fullmatch(name))}
    first = next((name for name in expected if name.endswith(".weight")), None)
    if not places and first is not None:
        places = _places_of(names, first)
    if not places:
        raise ValueError(
            f"{path} holds no ResNet, and "
            + ("no backbone of the --arch given" if expected else "its backbone is not named")
            + f" (its keys: {', '.join(list(names)[:3])}, ...); name its backbone, as timm does, "
            "with --arch"
        )
    return places


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


def _torchvision_names(keys: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Rename a ResNet's tensors; and return its children if it was a sequence of them."""
    stages = {match[1] for name in keys if (match := re.match(r"(\d+)\.0\.conv1\.", name))}
    rows = (row for row in _CHILDREN if stages == {str(row.index(stage)) for stage in _STAGES})
    children: tuple[str, ...] = next(rows, ())
    layers = {str(place): layer for place, layer in enumerate(children)}
    renamed = {}
    for name, key in keys.items():
        place, dot, rest = name.partition(".")
        # lightly's own ResNets call their downsampling a shortcut.
        name = (layers.get(place, place) + dot + rest).replace(".shortcut.", ".downsample.")
        renamed[name] = key
    return renamed, children
