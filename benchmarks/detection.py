"""Average precision of one detector on a pretrained and on an untrained backbone.

Both are trained with the same recipe and the same seeds, which also decide the weights of the new
layers and the order of the images. One seed shows that it runs, not that one backbone is better.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import ROOT, arguments, circumstances, slug
from PIL import Image

from mixmask import cli

# MoCo's detector on Pascal VOC, with sizes that a core can train in minutes.
_RECIPE = {
    "model": "faster-rcnn", "neck": "c4", "batch_norm": "train", "batch_size": 4, "lr": 0.02,
    "size": 160, "min_scale": 0.8, "rois": 32, "proposals": 100, "measure_every": 2,
}  # fmt: skip
_SMALL = {"size": 64, "rois": 8, "proposals": 20, "measure_every": 0, "min_scale": 1.0}


def main() -> None:
    """Train both, print a line for each and write the record."""
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--data", type=Path, help="folder or zip file in VOC's or COCO's layout")
    parser.add_argument("--run", type=Path, help="the pretrained run: a folder or a checkpoint")
    parser.add_argument("--arch", default="narrow", help="the untrained backbone, as the run's")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the training split")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--keep", type=Path, help="where the runs stay; default: nowhere")
    options = parser.parse_args()
    if not options.small and (options.data is None or options.run is None):
        parser.error("--data and --run are needed, but for a trial with --small")
    recipe = {**_RECIPE, **(_SMALL if options.small else {})}
    recipe["epochs"] = 1 if options.small else options.epochs
    torch.set_num_threads(options.threads)
    # The commit that is measured, not one made meanwhile.
    measured_on = circumstances(options.device)
    with tempfile.TemporaryDirectory() as folder:
        scratch = options.keep or Path(folder)
        if options.small:
            options.data, options.run = _trial(scratch)
        sides: dict[str, list[dict[str, Any]]] = {"untrained": [], "pretrained": []}
        for seed in range(options.repeats):
            for name, backbone in (("untrained", "random"), ("pretrained", str(options.run))):
                more = ["--arch", options.arch] if backbone == "random" else []
                arguments_ = [backbone, "--data", str(options.data), *more, *_flags(recipe)]
                out = scratch / f"{name}-{seed}"
                sides[name].append(_detect([*arguments_, "--seed", str(seed), "--out", str(out)]))
    record = {
        "script": "detection",
        "small": options.small,
        **measured_on,
        "data": {"name": options.data.name, **sides["untrained"][0]["data"]},
        "classes": sides["untrained"][0]["classes"],
        "recipe": recipe,
        "n": options.repeats,
        "libraries": sides["untrained"][0]["versions"],
        "sides": {name: _side(runs) for name, runs in sides.items()},
    }
    for name, side in record["sides"].items():
        medians = ", ".join(f"{key} {side[key]['median']:.1%}" for key in ("ap", "ap50", "ap75"))
        print(f"{name}: {medians} (n {options.repeats})")
    if options.out is None and options.small:
        return
    name = f"detection-{options.data.stem.removesuffix('_voc')}-{slug(options.device)}.json"
    out = options.out or ROOT / "results" / name
    out.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flags(recipe: dict[str, Any]) -> list[str]:
    return [
        word
        for name, value in recipe.items()
        for word in ("--" + name.replace("_", "-"), str(value))
    ]


def _detect(words: list[str]) -> dict[str, Any]:
    code = cli.main(["detect", *words])
    if code:
        raise SystemExit(code)
    results = json.loads((Path(words[-1]) / "results.json").read_text(encoding="utf-8"))
    assert results["finished"]
    return dict(results)


def _side(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the runs of one backbone, and keep what each measured epoch by epoch."""
    figures: dict[str, Any] = {}
    for name in ("ap", "ap50", "ap75"):
        values = [run[name] for run in runs]
        figures[name] = {"median": statistics.median(values), "values": values}
    pretraining = runs[0]["backbone"].get("pretraining", {})
    return {
        **figures,
        "per_class": [run["per_class"] for run in runs],
        "pretraining": pretraining,
        "epochs": [run["epochs"] for run in runs],
    }


def _trial(scratch: Path) -> tuple[Path, Path]:
    """Make a few images with a box each, and a run trained on them for one step."""
    data = scratch / "trial"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (data / folder).mkdir(parents=True)
    for split, names in (("train", "abcdefgh"), ("test", "ijkl")):
        (data / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
        for i, name in enumerate(names):
            image = Image.new("RGB", (80, 64), (120, 130, 140))
            image.paste((220, 20, 20), (8 + 4 * i, 10, 38 + 4 * i, 40))
            image.save(data / "JPEGImages" / f"{name}.jpg")
            sides = {"xmin": 9 + 4 * i, "ymin": 11, "xmax": 38 + 4 * i, "ymax": 40}
            box = "".join(f"<{side}>{value}</{side}>" for side, value in sides.items())
            (data / "Annotations" / f"{name}.xml").write_text(
                f"<annotation><object><name>red</name><bndbox>{box}</bndbox></object></annotation>"
            )
    run = scratch / "run"
    words = ["--arch", "narrow", "--image-size", "32", "--batch-size", "8", "--epochs", "1"]
    code = cli.main(
        ["pretrain", "--data", str(data / "JPEGImages"), *words, "--queue-size", "16",
         "--out", str(run)]
    )  # fmt: skip
    if code:
        raise SystemExit(code)
    return data, run


if __name__ == "__main__":
    main()
