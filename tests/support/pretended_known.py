"""What the package does today although a device is waited for; the list is there to be emptied."""

from __future__ import annotations

from pretended import Known

_TRAINED = "a LambdaWeightedLoss looks at what is trained in its first call; build it once"

NEW_CRITERIA = {
    "a bank": (Known("equal", "losses/_state.py:check_trained", _TRAINED),),
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

_CLEAN, _MIXED = "integrations/lightly.py:_clean", "losses/lambda_weighted.py:_weigh"
_POINTER = "lightly reads its bank's pointer on the host, with mixed views and without"
_MASK = "lightly's own criterion chooses by a mask, with mixed views and without"
LIGHTLY = {
    "NTXentLoss, bank": (Known("_local_scalar_dense", _CLEAN, _POINTER, to_be_mended=False),),
    "VICRegLoss": (Known("index", _CLEAN, _MASK, to_be_mended=False),),
    "DCLLoss": tuple(
        Known("index", place, _MASK, to_be_mended=False) for place in (_CLEAN, _MIXED)
    ),
}
