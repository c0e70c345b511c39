"""Checkpoint files, read without running what is in them."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mixmask._checks import few
from mixmask.runs.files import check_readable

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
# Beginnings of the names of networks' parts, which lightly-train keeps whole beside the weights.
_PARTS = ("lightly_train.", "timm.", "torch.nn.modules.", "torchvision.")

_SEAL = b"mixmask sha256 "
_SEAL_SIZE = len(_SEAL) + 64  # In bytes; the sum is in hexadecimal digits.
UNSEALED = 64 * "0"
_END = b"PK\5\6"  # Begins the last record of a zip archive, 22 bytes and a comment.


class DamagedError(ValueError):
    """A checkpoint that was cut short or changed on disk."""


def seal(path: Path) -> None:
    """Append a checksum of all bytes to a file of torch.save, as its zip archive's comment.

    Readers that do not know of it pass over a comment. In the file itself it is never lost, and
    never of another version.
    """
    with path.open("rb+") as file:
        file.seek(-2, os.SEEK_END)
        file.write(_SEAL_SIZE.to_bytes(2, "little"))  # The comment's length.
        size = file.tell()
        file.seek(0)
        file.write(_sum_of(file, size))


def is_sealed(path: Path) -> bool:
    """Tell whether a file is sealed and every byte is as it was then."""
    if not path.is_file() or path.stat().st_size < _SEAL_SIZE:
        return False
    with path.open("rb") as file:
        expected = _sum_of(file, path.stat().st_size - _SEAL_SIZE)
        return file.read() == expected


def _sum_of(file: BinaryIO, size: int) -> bytes:
    """Read a file's first bytes, and return the seal that belongs to them."""
    digest = hashlib.sha256()
    while size and (chunk := file.read(min(size, 1 << 20))):
        digest.update(chunk)
        size -= len(chunk)
    return _SEAL + digest.hexdigest().encode()


def read_checkpoint(path: Path) -> tuple[Any, dict[str, str]]:
    """Read a file that torch.save or safetensors wrote, on the CPU, running nothing in it.

    Args:
        path: The file; `.safetensors` by its suffix, anything else is what torch.save wrote.

    Returns:
        The content, and the metadata of a safetensors file (elsewhere empty). A warning names a
        file of torch before 1.6, whose format has no checksums.

    Raises:
        DamagedError: If the file is cut short or changed.
        ValueError: If it is not a checkpoint, or restoring its objects would run code.
    """
    check_readable(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    with path.open("rb") as file:
        start = file.read(64)
        file.seek(-min(path.stat().st_size, _SEAL_SIZE + 22), os.SEEK_END)
        end = file.read()
    if end[22:].startswith(_SEAL) and not is_sealed(path):
        raise DamagedError(f"{path} is damaged: its content does not match its checksum")
    if not start.startswith((b"PK", b"\x80")):
        if not start.strip(b"\0"):
            raise DamagedError(f"{path} is damaged: it is empty, or begins with zeros")
        raise ValueError(
            f"{path} is not a checkpoint: it begins with {start[:12]!r}; pass a run folder, or a "
            "file that torch.save or safetensors wrote"
        )
    if start.startswith(b"PK"):
        _check_archive(path, end)
    # What is foreign is refused by its name before anything is read.
    names = _list_globals(path)
    _refuse_foreign(path, names)
    try:
        with _stand_ins(names):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        raise _explain(path, error) from error
    if not start.startswith(b"PK"):
        _warn_of_no_sums(path.absolute())
    return content, {}


@cache
def _warn_of_no_sums(path: Path) -> None:
    """Warn once of each file in torch's older format, in which a changed weight is not noticed."""
    warnings.warn(
        f"{path} is in torch's format of before 1.6, which has no checksums: damage to its weights "
        "cannot be noticed",
        stacklevel=3,
    )


def _check_archive(path: Path, end: bytes) -> None:
    """Hold a zip archive's members to their checksums, which torch.load does not look at."""
    sealed = end[22:].startswith(_SEAL)
    # Behind the last record: the comment's length in two bytes, then its text.
    comment = end[end.rfind(_END) :][20:]
    if not sealed and int.from_bytes(comment[:2], "little") != len(comment) - 2:
        raise DamagedError(f"{path} is damaged or cut short: its end is missing")
    if not sealed and len(comment) == _SEAL_SIZE + 2:
        raise DamagedError(f"{path} is damaged: its checksum is unreadable")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            # Without a seal, and unless torch was told to leave the sums out.
            spoilt = not sealed and any(each.CRC for each in members) and archive.testzip()
    except Exception as error:  # The module raises what its parts do, on damage of each kind.
        raise DamagedError(f"{path} is damaged or cut short ({error})") from error
    if spoilt:
        raise DamagedError(f"{path} is damaged: its part {spoilt} does not match its checksum")
    parts = {each.filename.rpartition("/")[2] for each in members}
    if "constants.pkl" in parts:
        raise ValueError(
            f"{path} is a TorchScript archive, whose code would run; save its weights alone: "
            'torch.save(torch.jit.load(PATH).state_dict(), "weights.pth")'
        )
    if "data.pkl" not in parts:
        raise ValueError(f"{path} is a zip file but not a checkpoint; pass the file inside")


def seal_safetensors(content: bytes) -> bytes:
    """Fill in the checksum of a safetensors file whose metadata has `UNSEALED` as "sha256".

    The sum is that of all bytes, with zeros in its own place.
    """
    return content.replace(UNSEALED.encode(), hashlib.sha256(content).hexdigest().encode(), 1)


def _read_safetensors(path: Path) -> tuple[Any, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} is damaged, or not a safetensors file ({error})") from error
    # Files of others may note a sum of their own kind: ours name their architecture, too.
    if noted := metadata.get("sha256"):
        content = path.read_bytes()
        blank = content.replace(noted.encode(), UNSEALED.encode(), 1)
        if "arch" in metadata and seal_safetensors(blank) != content:
            raise DamagedError(f"{path} is damaged: its content does not match its checksum")
    return tensors, metadata


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


def _stand_ins(named: list[str]) -> AbstractContextManager[object]:
    """Return a context in which torch reads the objects above, and a file's own, as stand-ins."""
    allow = getattr(torch.serialization, "safe_globals", None)
    if allow is None:  # Before torch 2.5: such files are then refused.
        return nullcontext()
    objects = (*_OBJECTS, *(name for name in named if name.startswith(_PARTS)))
    bases = dict.fromkeys(objects, _StandIn) | dict.fromkeys(_MAPPINGS, _MappingStandIn)
    # torch looks a class up by where it says that it comes from.
    names = {full: full.rpartition(".") for full in bases}
    allowed: AbstractContextManager[object] = allow(
        [type(names[full][2], (bases[full],), {"__module__": names[full][0]}) for full in bases]
    )
    return allowed


def _list_globals(path: Path) -> list[str]:
    """List what a file names that torch does not read by itself, without reading it."""
    find: Callable[[Path], list[str]] | None
    find = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    try:
        return sorted(find(path)) if find else []
    except Exception:  # Damaged, or older than the zip format: reading it will tell.
        return []


def _refuse_foreign(path: Path, names: list[str]) -> None:
    known = (*_OBJECTS, *_MAPPINGS)
    foreign = [name for name in names if name not in known and not name.startswith(_PARTS)]
    foreign.sort(key=lambda name: name.startswith("torch."))  # Others' say more.
    if foreign:
        is_model = any(name.startswith("torch.nn.modules.") for name in names)
        weights = ".state_dict()" if is_model else '["state_dict"]'
        raise ValueError(
            f"{path} holds more than weights, which could run code when it is read: "
            f"{few(foreign)}; if you trust it, keep its weights alone: "
            f'torch.save(torch.load(PATH, weights_only=False){weights}, "weights.pth")'
        )


def _explain(path: Path, error: Exception) -> ValueError:
    """Say why a file could not be read."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if _is_detectron2(path):
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
