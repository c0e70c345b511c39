"""What `--compile` and `--precision bf16` do to the trainer's MixMask step on this machine.

For each network: the time of a step in each setting beside the plain one, all interleaved, what
the first step costs more when it compiles, and after how many steps that is earned back.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch
from common import Case, Figure, Side, arguments, compare, interleave, report
from peers import Setting, TrainerStep
from torch._inductor import config as inductor

from mixmask.trainers.methods import make_config

_PLAIN = "plain"
_SETTINGS: dict[str, dict[str, Any]] = {
    _PLAIN: {},
    "compiled": {"compile": True},
    "bf16": {"precision": "bf16"},
    "bf16, compiled": {"precision": "bf16", "compile": True},
}
# Preset, pixels and batch size of each.
_NETWORKS = {
    "narrow": ("clothing64", 32, 64),
    "resnet18": ("imagenet", 224, 8),
    "resnet50": ("imagenet", 224, 8),
}


def bf16_units() -> str:
    """Return what multiplies bfloat16 on this CPU; without it, torch takes a slow way."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512" if torch.cpu._is_avx512_bf16_supported() else "none"


def measure(
    arch: str, data: str, size: int, n: int, options: Any
) -> tuple[list[Case], list[Figure]]:
    """Measure one network."""
    config = make_config(data=data, arch=arch, image_size=size, batch_size=n, queue_size=512)
    x = torch.randn(2, n, 3, size, size, device=options.device)
    sides: dict[str, Side] = {}
    first: dict[str, float] = {}
    for name, given in _SETTINGS.items():
        if options.small and "compile" in given:
            continue  # Compilation takes as long for tiny sizes.
        setting = Setting(options.device, channels_last=True, **given)
        step = TrainerStep(config, setting)
        sides[name] = partial(step, *(setting.view(part) for part in x))
        start = time.perf_counter()
        sides[name]()
        first[name] = time.perf_counter() - start
    samples, calls = interleave(sides, repeats=options.repeats, device=options.device, warmup=1)
    sizes = {"arch": arch, "images": [n, 3, size, size], "bf16 by": bf16_units()}
    plain = samples.pop(_PLAIN)
    cases, figures = [], []
    for name, taken in samples.items():
        label = f"{arch}'s step, {name}"
        cases.append(
            compare(label, "fp32, not compiled", taken, plain, sizes=sizes, calls=calls, images=n)
        )
        if "compiled" in name:
            without = plain if name == "compiled" else samples["bf16"]
            saved = statistics.median(without) - statistics.median(taken)
            figures.append(Figure(f"{label}: its first step", first[name], "s"))
            if saved > 0:
                figures.append(Figure(f"{label}: earned back", first[name] / saved, "steps"))
    return cases, figures


def main() -> None:
    """Measure the networks of the included recipes."""
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--archs", nargs="+", choices=_NETWORKS, default=list(_NETWORKS))
    options = parser.parse_args()
    chosen = [(arch, *_NETWORKS[arch]) for arch in options.archs]
    if options.small:
        chosen = [("narrow", "clothing64", 16, 4)]
    # A first step that finds the compiler's work of another day would seem cheap.
    inductor.force_disable_caches = True
    cases: list[Case] = []
    figures: list[Figure] = []
    for network in chosen:
        more, beside = measure(*network, options)
        cases, figures = cases + more, figures + beside
        torch.compiler.reset()
    report("settings", cases, options, figures)


if __name__ == "__main__":
    main()
