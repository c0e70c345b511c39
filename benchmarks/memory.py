"""Peak memory of the trainers' steps with MixMask, against the same steps without mixing."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from common import Case, arguments, compare, peak_bytes, report
from peers import Setting, TrainerStep

from mixmask.trainers.methods import METHODS, make_config

_BOUND = 1.10
_MEASURED = ("moco-v2", "byol", "simsiam")


def measure(method: str, given: dict[str, Any], setting: Setting) -> Case:
    """Measure a method: one model, whose step has mixed views or has not."""
    config = make_config(method=method, data="imagenet", optimizer="sgd", **given)
    step = TrainerStep(config, setting)
    n, size = config.batch_size, config.image_size
    x1, x2 = (setting.view(x) for x in torch.randn(2, n, 3, size, size, device=setting.device))
    with_mixing, without = (
        peak_bytes(partial(step, x1, x2, mix=mix), setting.device) for mix in (True, False)
    )
    return compare(
        f"{method} step with MixMask",
        "the same step without mixing",
        [with_mixing],
        [without],
        sizes={"arch": config.arch, "images": [n, 3, size, size], "dtype": setting.label},
        quantity="peak memory",
        bound=_BOUND,
    )


def main() -> None:
    """Measure each method once: what is allocated does not vary from step to step."""
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--batch-size", type=int, help="default: 16 on a CPU, 256 elsewhere")
    parser.add_argument("--methods", nargs="+", default=_MEASURED, choices=tuple(METHODS))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    options = parser.parse_args()
    given: dict[str, Any] = {
        "arch": "resnet50",
        "image_size": 224,
        "batch_size": options.batch_size or (16 if options.device == "cpu" else 256),
    }
    if options.small:
        given = {"arch": "narrow", "image_size": 32, "batch_size": 8}
    setting = Setting(options.device, options.precision, channels_last=True)
    cases = [measure(method, given, setting) for method in options.methods]
    report("memory", cases, options, variant="" if options.precision == "fp32" else "bf16")


if __name__ == "__main__":
    main()
