"""Checkpoint files, read without running what is in them."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

# Objects that Lightning and others keep beside the weights. Reading one builds an empty stand-in
# of that name, so that neither their code nor their library is needed. Whatever is not listed
# here is refused: a pickle can name any function for the reader to call.
_OBJECTS = (
    "argparse.Namespace",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(
        f"omegaconf.nodes.{kind}Node"
        for kind in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")
    ),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")),
    *(f"pathlib._local.{name}" for name in ("PosixPath", "WindowsPath")),
    "typing.Any",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
    *(
        f"builtins.{name}"
        for name in ("bool", "bytes", "dict", "float", "int", "list", "str", "tuple")
    ),
)
_MAPPINGS = ("collections.defaultdict",)


class DamagedError(ValueError):
    """A checkpoint that was cut short or changed on disk."""


def read_checkpoint(path: Path) -> tuple[Any, dict[str, str]]:
    """Read a file that torch.save or safetensors wrote, on the CPU, running nothing in it.

    Args:
        path: The file; `.safetensors` by its suffix, anything else is what torch.save wrote.

    Returns:
        The content, and the metadata of a safetensors file (elsewhere empty).

    Raises:
        DamagedError: If the file is cut short or changed.
        ValueError: If it is no checkpoint, or holds objects that only running code could restore.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    with path.open("rb") as file:
        start = file.read(64)
    if not start.startswith((b"PK", b"\x80")):
        if not start.strip(b"\0"):
            raise DamagedError(f"{path} is damaged: it is empty, or begins with zeros")
        raise ValueError(
            f"{path} is no checkpoint: it begins with {start[:12]!r}; pass a run folder, or a file "
            "that torch.save or safetensors wrote"
        )
    _refuse_foreign(path, _globals_of(path))
    try:
        with _stand_ins():
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except MemoryError:
        raise
    except Exception as error:
        raise _explain(path, error) from error


def _read_safetensors(path: Path) -> tuple[Any, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedError(f"{path} is damaged, or no safetensors file ({error})") from error


class _StandIn:
    """Takes whatever it is built from, and keeps nothing."""

    def __new__(cls, *_: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _MappingStandIn:
    def __new__(cls, *_: object) -> OrderedDict[str, object]:  # type: ignore[misc]
        return OrderedDict()  # torch fills no other mapping than a plain one.


def _stand_ins() -> AbstractContextManager[object]:
    """Return a context in which torch reads the objects above as stand-ins."""
    allow = getattr(torch.serialization, "safe_globals", None)
    if allow is None:  # Before torch 2.5: such files are then refused.
        return nullcontext()
    bases = dict.fromkeys(_OBJECTS, _StandIn) | dict.fromkeys(_MAPPINGS, _MappingStandIn)
    # torch looks a class up by where it says that it comes from.
    names = {full: full.rpartition(".") for full in bases}
    allowed: AbstractContextManager[object] = allow(
        [type(names[full][2], (bases[full],), {"__module__": names[full][0]}) for full in bases]
    )
    return allowed


def _globals_of(path: Path) -> list[str]:
    """List what a file names that torch does not read by itself, without reading it."""
    find: Callable[[Path], list[str]] | None
    find = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    try:
        return sorted(find(path)) if find else []
    except Exception:  # Damaged, or older than the zip format: reading it will tell.
        return []


def _refuse_foreign(path: Path, names: list[str]) -> None:
    foreign = [name for name in names if name not in (*_OBJECTS, *_MAPPINGS)]
    foreign.sort(key=lambda name: name.startswith("torch."))  # Others' say more.
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ValueError(
            f"{path} holds more than weights, which could run code when it is read: "
            f"{', '.join(foreign[:3])}{more}; if you trust it, keep its weights alone: "
            'torch.save(torch.load(PATH, weights_only=False)["state_dict"], "weights.pth")'
        )


def _explain(path: Path, error: Exception) -> ValueError:
    """Say why a file could not be read."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = {name.rpartition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in parts:
            return ValueError(
                f"{path} is a TorchScript archive, whose code would run; save its weights alone: "
                'torch.save(torch.jit.load(PATH).state_dict(), "weights.pth")'
            )
        if "data.pkl" not in parts:
            return ValueError(f"{path} is a zip file but no checkpoint; pass the file inside")
    elif _is_detectron2(path):
        return ValueError(
            f"{path} is in Detectron2's format, a pickle that could run code when it is read; "
            "pass the run or checkpoint that it was converted from"
        )
    named = re.findall(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.PickleError) else []
    try:
        _refuse_foreign(path, named)
    except ValueError as refusal:
        return refusal
    return DamagedError(f"{path} is damaged or cut short ({reason})")


def _is_detectron2(path: Path) -> bool:
    with path.open("rb") as file:
        return b"stem.conv1" in file.read(1 << 16)
