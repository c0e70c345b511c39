from __future__ import annotations

import importlib.resources
import subprocess
import sys

# What the package may ask for elsewhere, but not on `import mixmask`.
HEAVY = (
    "accelerate",
    "cv2",
    "kornia",
    "lightly",
    "matplotlib",
    "pandas",
    "PIL",
    "pycocotools",
    "scipy",
    "sklearn",
    "timm",
    "torchmetrics",
    "torchvision",
    "tqdm",
    "transformers",
)
# Printed by a fresh interpreter: the top-level modules beyond those of torch and einops.
PROBE = """
import sys
import torch, einops
before = set(sys.modules)
import {module}
print(" ".join(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})))
"""


def _brought_in(module: str) -> set[str]:
    probe = subprocess.run(
        [sys.executable, "-c", PROBE.format(module=module)],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(probe.stdout.split())


def test_importing_brings_in_nothing_but_torch_and_einops() -> None:
    foreign = _brought_in("mixmask") - {"mixmask"} - set(sys.stdlib_module_names)
    # torch and einops load parts of themselves lazily.
    assert foreign <= {"torch", "einops"}


def test_the_core_works_without_any_other_library() -> None:
    # With None in sys.modules, importing the name fails.
    code = (
        "import sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        f"sys.modules.update(dict.fromkeys({(*HEAVY, 'numpy')!r}))\n"
        "import torch, mixmask\n"
        "mixed = mixmask.mix_batch(torch.rand(2, 3, 8, 8), mixmask.BlockMaskGenerator(2))\n"
        "z = torch.rand(2, 4)\n"
        "mixmask.lambda_weighted_loss(mixmask.losses.InfoNCE(), z, z, mixed)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_types_are_published() -> None:
    assert importlib.resources.files("mixmask").joinpath("py.typed").is_file()
