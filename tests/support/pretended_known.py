"""Where the package waits for a device all the same, and why."""

from __future__ import annotations

from pretended import Known

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
_MASK = "lightly's own criterion chooses by a mask, with mixed views and without"


def _choosing(*places: str) -> tuple[Known, ...]:
    own = [Known("index", place, _MASK, to_be_mended=False) for place in places]
    return (*own, Known("index_put", _BACKWARD, _MASK, to_be_mended=False))


LIGHTLY = {
    "NTXentLoss, bank": (Known("_local_scalar_dense", _CLEAN, _POINTER, to_be_mended=False),),
    "VICRegLoss": _choosing(_CLEAN),
    "DCLLoss": _choosing(_CLEAN, _MIXED),
}
