"""solo-learn's classes, plain and patched, as fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from solo_models import Tiny

from mixmask.integrations import solo as integration


@pytest.fixture(scope="module")
def theirs() -> Iterator[dict[str, Any]]:
    """solo-learn's classes as they are; those in METHODS are patched meanwhile."""
    from solo.methods import METHODS as REGISTERED
    from solo.methods.base import BaseMethod
    from solo.utils.auto_resumer import AutoResumer

    classes, matched = dict(REGISTERED), list(AutoResumer.SHOULD_MATCH)
    BaseMethod._BACKBONES["tiny"] = Tiny
    integration.patch()
    yield classes
    REGISTERED.update(classes)
    AutoResumer.SHOULD_MATCH[:] = matched
    del BaseMethod._BACKBONES["tiny"]


@pytest.fixture
def ours(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return solo-learn's METHODS, patched."""
    from solo.methods import METHODS as REGISTERED

    assert REGISTERED["simclr"] is not theirs["simclr"]
    found: dict[str, Any] = REGISTERED
    return found
