"""Data sets that a caller gives, listed as folders are: which splits, which labels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from mixmask.data.datasets import DatasetImages, MapDataset, take_splits
from mixmask.data.folders import Listed, ListedData

# Larger labels than this, and than there are images, are identifiers, not classes.
_MOST_CLASSES = 100_000


def list_datasets(title: str, made: object) -> ListedData:
    """Take the labels of data sets of one's own, and see that both splits fit together."""
    train, tests = take_splits(made)
    if len(train) < 2 or not all(map(len, tests.values())):
        raise ValueError(
            f"training needs at least two images, and a test split one, got {len(train)}"
        )
    source = DatasetImages.of(train)
    listed = [Listed(source, source.labels()), *_choose_test(title, tests)]
    forms = [f"{each.files.channels} channels of {each.files.dtype}" for each in listed]
    if len(set(forms)) > 1:
        raise ValueError(
            f"training images have {forms[0]}, test images {forms[1]}; return both in one format"
        )
    # Labels that are all 0, or -1 for none, tell nothing apart.
    highest = [-1 if each.labels is None else int(each.labels.max()) for each in listed]
    if max(highest) >= max(len(train), _MOST_CLASSES):
        raise ValueError(
            f"the largest label is {max(highest)}, for {len(train):,} images; number the classes "
            "from 0"
        )
    classes = source.classes(highest[0] + 1) if highest[0] > 0 else ()
    if not classes:  # A single one leaves nothing to tell apart.
        listed = [Listed(each.files, None) for each in listed]
    elif max(highest) >= len(classes):
        raise ValueError(
            f"a label is {max(highest)}, and the training split has {len(classes)} classes; number "
            "them from 0, the same way in both splits"
        )
    return ListedData(listed[0], listed[1] if len(listed) == 2 else None, classes)


def _choose_test(title: str, tests: Mapping[str, MapDataset]) -> list[Listed]:
    """Choose the first test split with labels, or else the first; published ones hide theirs."""
    listed: dict[str, Listed] = {}
    for name, dataset in tests.items():
        source = DatasetImages.of(dataset)
        listed[name] = Listed(source, source.labels())
        labels = listed[name].labels
        if labels is not None and labels.max() >= 0:  # What comes after need not be read.
            break
    hidden = [n for n, each in listed.items() if each.labels is not None and each.labels.max() < 0]
    usable = [name for name in listed if name not in hidden]
    usable.sort(key=lambda name: listed[name].labels is None)  # The first of those with labels.
    if hidden:
        instead = f"{usable[0]} is used instead" if usable else "it is left out"
        warnings.warn(f"{title} hides the labels of {hidden[0]} (all -1); {instead}", stacklevel=4)
    return [listed[name] for name in usable[:1]]
