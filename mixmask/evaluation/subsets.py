"""Parts of the training images to fine-tune on: drawn at random, or listed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from mixmask._seeds import check_seed


def balanced_subset(
    labels: Tensor, percent: float, *, seed: int = 0, classes: Sequence[str] = ()
) -> Tensor:
    """Draw a share of the labels with equally many of each class.

    Of N labels of C classes, round(N * percent / 100 / C) of each class are drawn, at least one;
    100 % takes all labels, however many a class has.

    Args:
        labels: (N,) int64.
        percent: Above 0, at most 100.
        seed: Of the draw.
        classes: Their names, for messages.

    Returns:
        (n,) int64 indices in ascending order.

    Raises:
        ValueError: If the percentage is out of its range or a class has fewer images than asked.

    Example:
        >>> balanced_subset(torch.arange(200) % 2, 10).shape
        torch.Size([20])
    """
    if not 0 < percent <= 100:
        raise ValueError(
            f"--percent must be above 0 and at most 100, got {percent:g}; use for instance 10"
        )
    check_seed(seed)
    if percent == 100:
        return torch.arange(len(labels))
    present, counts = labels.unique(return_counts=True)
    wanted = max(1, round(len(labels) * percent / 100 / len(present)))
    if int(counts.min()) < wanted:
        number = int(present[counts.argmin()])
        raise ValueError(
            f"{percent:g} % of {len(labels)} images are {wanted} of each class, but class "
            f"{classes[number] if classes else number} has {int(counts.min())}; use a smaller "
            "--percent, or 100 for all images"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = [order[labels[order] == number][:wanted] for number in present]
    return torch.cat(chosen).sort().values


def listed_subset(files: Sequence[str], names: Sequence[str]) -> Tensor:
    """Find the files of a published list among those of a data set.

    Args:
        files: Names of the images, with or without folders.
        names: Names as listed; one without a folder stands for the only file of that name.

    Returns:
        (n,) int64 indices into `files`, in ascending order.

    Raises:
        ValueError: If the list is empty, or a name is unknown, ambiguous or there twice.

    Example:
        >>> listed_subset(["cat/1.jpg", "cat/2.jpg", "dog/3.jpg"], ["3.jpg", "cat/1.jpg"])
        tensor([0, 2])
    """
    if not names:
        raise ValueError("the subset list names no file; expected one file name per line")
    exact = {name: [i] for i, name in enumerate(files)}
    by_last = defaultdict(list)
    for i, name in enumerate(files):
        by_last[name.rpartition("/")[2]].append(i)
    matches = [exact.get(name) or by_last.get(name, []) for name in names]
    for name, places in zip(names, matches, strict=True):
        if not places:
            unknown = sum(not each for each in matches)
            raise ValueError(
                f"{unknown} of {len(names)} names of the subset list are not in the training "
                f"split, first {name}; check that --data is the data set of the list"
            )
        if len(places) > 1:
            raise ValueError(
                f"{name} of the subset list is the name of {len(places)} files; write their "
                "folders too, as in class/name.jpg"
            )
    index = torch.tensor([places[0] for places in matches]).sort().values
    if not index.diff().all():
        raise ValueError("the subset list names a file twice; remove the repeated lines")
    return index
