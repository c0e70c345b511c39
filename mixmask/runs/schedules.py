"""Schedules: factors of a start value, by the share `done`, 0 ... 1, of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence


def cosine_decay(done: float) -> float:
    """Fall from 1 to 0 along half a cosine (Loshchilov and Hutter, "SGDR", eq. 5).

    Example:
        >>> cosine_decay(0.0), round(cosine_decay(0.5), 3), cosine_decay(1.0)
        (1.0, 0.5, 0.0)
    """
    return 0.5 * (1 + math.cos(math.pi * done))


def step_decay(done: float, milestones: Sequence[float] = (0.6, 0.8)) -> float:
    """Fall to a tenth at each milestone; the default is MoCo's, of 100 epochs the 60th and 80th.

    Example:
        >>> [round(step_decay(done), 2) for done in (0.5, 0.6, 0.9)]
        [1.0, 0.1, 0.01]
    """
    return 0.1 ** sum(done >= milestone for milestone in milestones)
