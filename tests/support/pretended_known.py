"""Where the package, or a library that calls it, waits for a device all the same, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """A breach that is listed: it passes, but one that no longer occurs fails the test.

    Attributes:
        operator: Its name, as in "_to_copy".
        place: File and function of the package, as in "masks.py:fit_masks"; where waits are
            counted, the innermost ones, whoever's they are.
        reason: Why it is there.
        to_be_mended: Whether the entry is to go, or is right as it is.
    """

    operator: str
    place: str
    reason: str
    to_be_mended: bool = True


_TRAINED = (
    "the first call of a LambdaWeightedLoss compares what is trained, to undo what a criterion "
    "wrote to it before the error; later calls only count versions: build it once"
)

NEW_CRITERIA = {
    "a bank": (Known("equal", "losses/_state.py:check_trained", _TRAINED, to_be_mended=False),),
}
# Asked whether they have arrived before they are read.
METER = (
    Known(
        "_to_copy",
        "trainers/meter.py:<genexpr>",
        "sums on their way, which nobody waits for",
        to_be_mended=False,
    ),
)
# Every tenth step, and not at all in one process.
_ASKED = "trainers/loop.py:_reduce", "processes agree on whether to stop or to save"
ASKING = (
    Known("_to_copy", *_ASKED, to_be_mended=False),
    Known("tolist", *_ASKED, to_be_mended=False),
)

_CLEAN, _MIXED = "integrations/lightly.py:_clean", "losses/lambda_weighted.py:_weigh"
_BACKWARD = "test_pretended_device_lightly.py:step"
_POINTER = "lightly reads its bank's pointer on the host, with mixed views and without"
_CONVERGED = "lightly's own criterion decomposes, which is checked on the host, for every term"
_MASK = "lightly's own criterion chooses by a mask, with mixed views and without"


def _choosing(*places: str) -> tuple[Known, ...]:
    own = [Known("index", place, _MASK, to_be_mended=False) for place in places]
    return (*own, Known("index_put", _BACKWARD, _MASK, to_be_mended=False))


LIGHTLY = {
    "NTXentLoss, bank": (Known("_local_scalar_dense", _CLEAN, _POINTER, to_be_mended=False),),
    "VICRegLoss": _choosing(_CLEAN),
    "DCLLoss": _choosing(_CLEAN, _MIXED),
    "MMCRLoss": tuple(
        Known("_linalg_svd", place, _CONVERGED, to_be_mended=False) for place in (_CLEAN, _MIXED)
    ),
}


def _own(reason: str, *waits: tuple[str, str]) -> tuple[Known, ...]:
    return tuple(Known(*wait, reason, to_be_mended=False) for wait in waits)


# Waits of the libraries' own steps, which mixed views do not add to.
_COUNTED = "their queue keeps its pointer, and whether it is full, on the device"
_STABLE_QUEUE = _own(_COUNTED, ("_local_scalar_dense", "queues.py:append"))
_IN_BACKWARD = "pretended_steps.py:_backward"
STABLE_PRETRAINING = dict.fromkeys(("MoCov2", "MoCov2, no teacher"), _STABLE_QUEUE)
LIGHTLY_TRAIN = {
    "simclr": _own(
        "lightly's NT-Xent chooses the others' similarities by a mask",
        ("index", "ntx_ent_loss.py:forward"),
        ("index_put", _IN_BACKWARD),
    )
}
_LABELLED = _own(
    "their online kNN chooses labelled images by a mask", ("index", "base.py:training_step")
)
_MASKED = "their covariance is chosen off the diagonal by a mask"
_POINTED = "their queue's pointer is read on the host"
SOLO = {
    **dict.fromkeys(("byol", "dino", "mocov3", "simclr", "simsiam", "swav"), _LABELLED),
    **{
        name: _LABELLED + _own(_POINTED, ("_local_scalar_dense", place))
        for name, place in (
            ("mocov2plus", "mocov2plus.py:_dequeue_and_enqueue"),
            ("nnclr", "nnclr.py:dequeue_and_enqueue"),
            ("ressl", "ressl.py:dequeue_and_enqueue"),
        )
    },
    "barlow_twins": _LABELLED
    + _own("their batch norm is built in each step", ("_to_copy", "barlow.py:barlow_loss_func"))
    + _own(
        "they choose the diagonal by a mask",
        ("index", "barlow.py:barlow_loss_func"),
        ("index_put_", "barlow.py:barlow_loss_func"),
        ("index", _IN_BACKWARD),
        ("index_put", _IN_BACKWARD),
    ),
    "vicreg": _LABELLED
    + _own(_MASKED, ("index", "vicreg.py:covariance_loss"), ("index_put", _IN_BACKWARD)),
}
