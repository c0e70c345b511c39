"""Checkpoint formats, one row each, and which tensors of a file are the backbone."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mixmask._checks import few
from mixmask.checkpoints.resnets import infer_arch
from mixmask.data.views import IMAGENET, Normalization
from mixmask.runs.folder import is_run

_HALF: Normalization = ((0.5,) * 3, (0.5,) * 3)
_CIFAR: Normalization = ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))  # As solo-learn has it.

# Where a file may hold its weights, those meant first; what it holds elsewhere comes after.
_NESTS = (
    "state_dict", "model", "model_state_dict", "model_state", "net", "network", "encoder",
    "backbone", "teacher", "student",
)  # fmt: skip
# Words in the name of an encoder that follows the trained one slowly.
_FOLLOWERS = {"ema", "k", "key", "m", "momentum", "slow", "target", "teacher"}
_WRAPPERS = {"_orig_mod", "module"}  # torch.compile; data parallel.
_STAGES = ("layer1", "layer2", "layer3", "layer4")
# nn.Sequential(*resnet.children()): torchvision's and timm's, and lightly's own ResNets.
_CHILDREN = (("conv1", "bn1", "act1", "maxpool", *_STAGES), ("conv1", "bn1", *_STAGES))


class Content(NamedTuple):
    """How a format is detected; names are without wrappers."""

    entries: Mapping[str, object]  # Of the file; empty if it holds no mapping.
    ours: bool  # Whether a run or an export of this package wrote it.
    names: Collection[str]  # Of all tensors.

    def has(self, *words: str) -> bool:
        """Tell whether a tensor's name has one of these words, which end in a dot."""
        return any(f".{word}" in f".{name}" for name in self.names for word in words)


class Layout(NamedTuple):
    """A row of the table of formats."""

    name: str  # Whose format it is.
    matches: Callable[[Content], bool]  # Tells it from those below it.
    # Patterns of its names, and timm's: text, or a function as `re.sub` takes it. Parts of one
    # tensor of timm's are numbered behind a bar, as in "qkv|0.weight".
    renames: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]] = ()
    normalization: Normalization | None = IMAGENET  # None: what timm notes of the architecture.
    small_stem_normalization: Normalization | None = None  # Where it has another for small images.
    small_stem_padding: int = 1  # Of the stem for small images, which no key tells.
    norm_eps: float | None = None  # Of its layer norms, where it is not timm's.
    followers: frozenset[str] = frozenset(_FOLLOWERS)  # The encoders that are not taken.
    generic: bool = False  # Whether these are the names of a backbone alone, not of a format.


def _is_solo_learn(file: Content) -> bool:
    if "classifier.weight" not in file.names or not any(
        name.startswith(("backbone.", "encoder.")) for name in file.names
    ):
        return False
    # Its optimiser's groups have names, unlike those of others with a classifier.
    states = file.entries.get("optimizer_states")
    first = states[0] if isinstance(states, Sequence) and states else {}
    groups = first.get("param_groups", []) if isinstance(first, Mapping) else []
    return not groups or any(group.get("name") == "classifier" for group in groups)


def _one_more(form: str) -> Callable[[re.Match[str]], str]:
    """Fill a form with a match's groups, the first of them, a number, raised by one."""
    return lambda match: form.format(int(match[1]) + 1, *match.groups()[1:])


# Of transformers' ViTs, before its version 5 and since.
_TRANSFORMER: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (
        r"\.attention\.(?:attention\.)?(query|key|value|[qkv]_proj)\.",
        lambda match: f".attn.qkv|{'qkv'.index(match[1][0])}.",  # timm keeps the three in one.
    ),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"layer_scale(\d)\.lambda1$", r"ls\1.gamma"),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"layernorm\.(\w+)$", r"norm.\1"),
)

# The first row that matches names the format.
LAYOUTS = (
    Layout("mixmask", lambda file: file.ours),
    Layout(
        "transformers' resnet",
        lambda file: file.has("embedder.embedder."),
        (
            (r"embedder\.embedder\.convolution\.", "conv1."),
            (r"embedder\.embedder\.normalization\.", "bn1."),
            (r"encoder\.stages\.(\d)\.layers\.(\d+)\.", _one_more("layer{}.{}.")),
            (r"\.shortcut\.convolution\.", ".downsample.0."),
            (r"\.shortcut\.normalization\.", ".downsample.1."),
            (r"\.layer\.(\d)\.convolution\.", _one_more(".conv{}.")),
            (r"\.layer\.(\d)\.normalization\.", _one_more(".bn{}.")),
        ),
    ),
    Layout(
        "transformers' convnext",
        lambda file: file.has("downsampling_layer.") and file.has("embeddings."),
        (
            (r"embeddings\.patch_embeddings\.", "stem.0."),
            (r"embeddings\.layernorm\.", "stem.1."),
            (r"encoder\.stages\.(\d)\.layers\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"encoder\.stages\.(\d)\.downsampling_layer\.", r"stages.\1.downsample."),
            (r"\.layer_scale_parameter$", ".gamma"),
            (r"\.dwconv\.", ".conv_dw."),
            (r"(blocks\.\d+)\.layernorm\.", r"\1.norm."),
            (r"\.pwconv(\d)\.", r".mlp.fc\1."),
            (r"layernorm\.(\w+)$", r"head.norm.\1"),
        ),
    ),
    Layout("transformers' dinov2", lambda file: file.has("layer_scale1."), _TRANSFORMER),
    Layout(
        "transformers' vit",
        lambda file: file.has("layernorm_before."),
        _TRANSFORMER,
        normalization=_HALF,
        norm_eps=1e-12,
    ),
    Layout("moco", lambda file: file.has("encoder_q.", "base_encoder.")),
    Layout("solo-learn", _is_solo_learn, small_stem_normalization=_CIFAR, small_stem_padding=2),
    Layout(  # It exports the teacher of DINO, and of the methods built on it.
        "lightly-train",
        lambda file: "lightly_train" in file.entries,
        followers=frozenset(_FOLLOWERS - {"teacher"} | {"student"}),
    ),
    Layout("lightning", lambda file: "pytorch-lightning_version" in file.entries),
    Layout("dino", lambda file: {"student", "teacher"} <= set(file.entries)),
    Layout("vissl", lambda file: file.has("_feature_blocks.")),
    Layout("swav", lambda file: file.has("projection_head.") and file.has("prototypes.")),
    Layout("mae", lambda file: file.has("decoder_embed.", "decoder_pred.")),
    Layout(
        "torchvision", lambda file: any("layer1.0." in name for name in file.names), generic=True
    ),
    Layout("timm", lambda _: True, normalization=None, generic=True),
)


class Match(NamedTuple):
    """The part of a checkpoint that is the backbone, with its classifier where it has one."""

    layout: Layout
    name: str  # Of the layout; "state dict" where the backbone is part of another model.
    state: dict[str, Tensor]  # Under torchvision's and timm's names.
    keys: dict[str, tuple[str, ...]]  # The checkpoint's own keys of each.
    all_keys: tuple[str, ...]  # Of the mapping in which it was.
    arch: str | None  # What the keys say, or the file does.
    stem_relu: bool  # Whether an activation follows the stem's batch norm.


def find_nests(path: Path, content: object) -> list[Mapping[str, Tensor]]:
    """Return all mappings from keys to tensors inside of a checkpoint, those meant first.

    Raises:
        ValueError: If there are none.
    """
    if is_run(content):
        nests = [("model", content["model"])]  # type: ignore[index]
    else:
        nests = sorted(_nests_in(content), key=lambda nest: _rank(nest[0]))
    if nests:
        return [nest for _, nest in nests]
    kind = type(content).__name__
    held, fix = f"a {kind}", "pass a state dict, or a checkpoint that holds one"
    if isinstance(content, Mapping):
        held = f"the keys {few(map(repr, content), 5)}"
    elif not isinstance(content, (Tensor, Sequence)):  # A stand-in for what was pickled.
        held += " as a whole"
        fix = 'torch.save(torch.load(PATH, weights_only=False).state_dict(), "weights.pth")'
        fix = f"if you trust it, save its weights alone: {fix}"
    raise ValueError(f"{path} holds {held}, but no weights in a known format; {fix}")


def _nests_in(
    content: object, place: str = "", depth: int = 5
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        return
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    for key, value in content.items() if depth else ():  # A pickle can hold itself.
        yield from _nests_in(value, f"{place}.{key}".strip("."), depth - 1)


def _rank(place: str) -> int:
    return _NESTS.index(place) if place in _NESTS else len(_NESTS)


def exported_metadata(content: object) -> dict[str, str]:
    """Return what our exports note in a state dict, where torch keeps versions of modules."""
    versions = getattr(content, "_metadata", None)
    noted = versions.get("", {}) if isinstance(versions, dict) else {}
    return {key: value for key, value in noted.items() if isinstance(value, str)}


def find_backbone(
    path: Path, content: object, expected: Sequence[str], *, exported: bool = False
) -> Match:
    """Find the backbone in what a checkpoint held, a run's, an export's or another library's.

    Tensors of our runs, and those that have all expected names already, keep their names: what
    other formats call a wrapper or a shortcut is part of some architectures' own names. `expected`
    is empty where no backbone was asked for.

    Raises:
        ValueError: If no layout is recognised, or several encoders are in question.
    """
    nests = find_nests(path, content)
    entries = content if isinstance(content, Mapping) else {}
    run = is_run(content)
    # The first mapping that holds a backbone counts, since those that are meant come first.
    for weights in nests:
        names = {_unwrap(key): key for key in weights}
        file = Content(entries, run or exported, names)
        layout = next(row for row in LAYOUTS if row.matches(file))
        match = _match(path, layout, weights, ["backbone."] if run else [], expected)
        if match is not None:
            named = entries.get("arch")  # As MoCo's checkpoints have it.
            return match._replace(arch=match.arch or (named if isinstance(named, str) else None))
    shown = ", ".join(list(nests[0])[:3])
    held, fix = "its backbone is not named", "name it, as timm or torchvision does, with --arch"
    if expected:
        held = "no backbone of the --arch given"
        fix = "pass the --arch that it was trained as, or save its backbone's state dict alone"
    raise ValueError(f"{path} holds no ResNet, and {held} (its keys: {shown}, ...); {fix}")


def _match(
    path: Path,
    layout: Layout,
    weights: Mapping[str, Tensor],
    places: Collection[str],
    expected: Sequence[str],
) -> Match | None:
    """Find the backbone in a mapping; None if there is none."""
    keys: dict[str, tuple[str, ...]] = {key: (key,) for key in weights}
    children: tuple[str, ...] = ()
    exact = places or _exact_places(keys, expected)
    if not exact:  # Not under their own names, so perhaps under those that the layout gives.
        keys = _rename(layout, weights)
        exact = _exact_places(keys, expected)
    places = exact or _similar_places(keys, expected)
    if not places:
        return None
    prefix = _choose_encoder(path, places, layout)
    keys = {name.removeprefix(prefix): k for name, k in keys.items() if name.startswith(prefix)}
    if not exact:
        keys, children = _torchvision_names(keys)
    if not keys:
        raise ValueError(f"{path} holds no backbone: no key begins with {prefix}")
    state = {
        name: weights[parts[0]] if len(parts) == 1 else torch.cat([weights[key] for key in parts])
        for name, parts in keys.items()
    }
    return Match(
        layout,
        "state dict" if layout.generic and _unwrap(prefix) else layout.name,
        state,
        keys,
        tuple(weights),
        infer_arch(state),
        not children or "act1" in children,
    )


def _rename(layout: Layout, weights: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Give a layout's tensors timm's names, with the keys of its parts in their order."""
    parts: dict[str, dict[str, str]] = {}
    for key in weights:
        name = _unwrap(key)
        for pattern, new in layout.renames:
            name = re.sub(pattern, new, name)
        start, bar, rest = name.partition("|")
        parts.setdefault(start + rest[1:] if bar else name, {})[rest[:1]] = key
    return {name: tuple(found[number] for number in sorted(found)) for name, found in parts.items()}


def _unwrap(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


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


def _similar_places(names: Collection[str], expected: Sequence[str]) -> set[str]:
    """Find prefixes under which a ResNet stands, or else the first of the expected weights."""
    block = re.compile(r"((?:.*\.)?)(?:layer1|[24])\.0\.conv1\.weight")
    places = {match[1] for name in names if (match := block.fullmatch(name))}
    first = next((name for name in expected if name.endswith(".weight")), None)
    return places or (_places_of(names, first) if first else set())


def _choose_encoder(path: Path, places: Collection[str], layout: Layout) -> str:
    """Choose the place of the trained encoder among those of encoders."""
    trained = {place for place in places if not layout.followers & set(re.split(r"[._]", place))}
    candidates = sorted(trained or places)
    if len(candidates) > 1:
        raise ValueError(
            f"{path} holds several encoders, {', '.join(candidates)}; save only the one you need: "
            'torch.save(model.NAME.state_dict(), "backbone.pth")'
        )
    return candidates[0]


def _torchvision_names(
    keys: Mapping[str, tuple[str, ...]],
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
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
