"""What the package does today although a device is waited for; the list is there to be emptied."""

from __future__ import annotations

from pretended import Known

_BOXES = "CutMix draws boxes at pixel size on the host: N x H x W bytes where N x (H + W) do"
_ROWS = "processes compare their numbers of rows at each gather; once per run would do"
_STAGED = "goes from pageable memory, which is staged up to 64 KiB only; pin what is larger"
_LOOKED = (
    "a criterion of torch is looked at once, but one that is built in each step is looked at anew"
)
_TRAINED = "a LambdaWeightedLoss looks at what is trained in its first call; build it once"

PIXEL_MASKS = (Known("_to_copy", "masks.py:fit_masks", _BOXES),)
MANY_MASKS = (
    Known("_to_copy", "masks.py:block_masks", _STAGED),
    Known("_to_copy", "masks.py:discrete_masks", _STAGED),
)
MANY_BLURS = (Known("_to_copy", "data/views.py:_on", _STAGED),)
NEW_CRITERIA = {
    "CrossEntropyLoss": (
        Known("_local_scalar_dense", "losses/_criteria.py:_check_distributions", _LOOKED),
    ),
    "KLDivLoss": (
        Known("_local_scalar_dense", "losses/_criteria.py:_check_distributions", _LOOKED),
        Known("_local_scalar_dense", "losses/_criteria.py:_check_divergence", _LOOKED),
    ),
    "a bank": (Known("equal", "losses/_state.py:check_trained", _TRAINED),),
}
ROW_COUNTS = (
    Known("_to_copy", "_distributed.py:check_even", _ROWS),
    Known("tolist", "_distributed.py:check_even", _ROWS),
)
# Asked whether they have arrived before they are read.
METER = (
    Known(
        "_to_copy",
        "trainers/meter.py:<genexpr>",
        "sums on their way, which nobody waits for",
        to_be_mended=False,
    ),
)
