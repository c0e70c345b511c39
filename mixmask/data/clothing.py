"""The embedded data set: clothing64, 3,781 photographs of clothes, 64 x 64 pixels, CC0."""

from importlib.resources import as_file, files
from zipfile import ZipFile

__all__ = ["clothing64"]

Split = tuple[list[bytes], list[int]]


def clothing64() -> tuple[Split, Split, list[str]]:
    """Read the embedded photographs, still as JPEG bytes.

    Returns:
        The training split (3,409 files and labels), the test split (372), and the ten class
        names, which the labels index.

    Example:
        >>> (train, _), (test, _), classes = clothing64()
        >>> len(train), len(test), classes[:3]
        (3409, 372, ['dress', 'hat', 'longsleeve'])
    """
    with as_file(files("mixmask.data") / "clothing64.zip") as path, ZipFile(path) as archive:
        names = sorted(archive.namelist())
        classes = sorted({name.split("/")[2] for name in names})
        splits: dict[str, Split] = {"train": ([], []), "test": ([], [])}
        for name in names:
            _, split, label, _ = name.split("/")
            splits[split][0].append(archive.read(name))
            splits[split][1].append(classes.index(label))
    return splits["train"], splits["test"], classes
