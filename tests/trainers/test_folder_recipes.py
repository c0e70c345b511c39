"""A folder without a recipe gets one by its images, with a batch and a queue that they fill."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mixmask.backbones import build_backbone
from mixmask.data import sets
from mixmask.data.folders import ListedData, list_folder
from mixmask.trainers.config import PRESETS
from mixmask.trainers.methods import make_config
from mixmask.trainers.recipes import describe, suit_images
from mixmask.trainers.start import pretrain


def write(folder: Path, count: int, size: tuple[int, int]) -> Path:
    (folder / "a").mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", size, (i, 0, 0)).save(folder / "a" / f"{i}.png")
    return folder


def suit(options: dict[str, Any]) -> dict[str, Any]:
    return suit_images(options, sets.list_data(options["data"]))


@pytest.mark.parametrize(
    "size, recipe", [((32, 48), "cifar10"), ((64, 80), "tiny-imagenet"), ((300, 200), "imagenette")]
)
def test_a_folder_follows_the_size_of_its_images(
    size: tuple[int, int], recipe: str, tmp_path: Path
) -> None:
    chosen = suit({"data": str(write(tmp_path / "x", 40, size))})
    assert chosen["recipe"] == recipe
    config: Any = make_config(**chosen)
    default: Any = make_config(data="elsewhere", recipe=recipe)
    assert (config.arch, config.image_size) == (default.arch, default.image_size)
    # 40 images: ten of them four times per epoch, rounded to powers of two.
    assert (config.batch_size, config.queue_size) == (8, 16)
    assert config.lr == pytest.approx(default.lr * 8 / default.batch_size)
    assert config.bn_splits == min(default.bn_splits, 4)


def test_an_archive_is_looked_at_as_its_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", 3, (20, 20))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, str(path.relative_to(tmp_path)))
    assert suit({"data": str(tmp_path / "x.zip")})["recipe"] == "cifar10"


def test_many_large_images_follow_imagenets_recipes() -> None:
    def choose(count: int) -> dict[str, Any]:
        # A data set of so many images, of which a few are looked at.
        images = np.broadcast_to(np.uint8(0), (count, 300, 300, 3))
        return suit_images({"data": "photographs"}, sets.list_data(images))

    for count, recipe in ((70_000, "imagenet100"), (499_999, "imagenet100"), (500_000, "imagenet")):
        assert choose(count)["recipe"] == recipe
        assert make_config(**choose(count)) == make_config(data="photographs", recipe=recipe)
    assert choose(50_000)["queue_size"] == 16_384  # Imagenet's 65,536 is too much.


def test_what_is_given_stays(tmp_path: Path) -> None:
    data = str(write(tmp_path / "x", 9, (32, 32)))
    given = {"data": data, "batch_size": 6, "lr": 1.0, "queue_size": 600, "bn_splits": 3}
    assert suit(given) == given | {"recipe": "cifar10"}
    assert suit({"data": data, "batch_size": 6})["bn_splits"] == 3
    assert make_config(**suit({"data": data, "arch": "vit_tiny_patch16_224"})).small_stem is False
    assert make_config(**suit({"data": data, "arch": "resnet50"})).small_stem is True


def test_only_training_images_of_each_process_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x" / "train", 16, (32, 32))
    write(tmp_path / "x" / "test", 90, (300, 300))
    data = str(tmp_path / "x")
    assert suit({"data": data})["recipe"] == "cifar10"
    assert suit({"data": data})["batch_size"] == 4
    assert suit({"data": data, "holdout": 0.5})["batch_size"] == 2
    monkeypatch.setattr("mixmask.trainers.recipes.world_size", lambda: 2)
    assert suit({"data": data})["batch_size"] == 2


def test_a_smaller_batch_lowers_the_learning_rate(tmp_path: Path) -> None:
    data = str(write(tmp_path / "x", 40, (32, 32)))
    assert suit({"data": data, "batch_size": 32})["lr"] == pytest.approx(0.06 * 32 / 512)
    assert "lr" not in suit({"data": data, "batch_size": 1000})
    assert suit({"data": data, "batch_size": 32, "lr": 0.1})["lr"] == 0.1


@pytest.mark.parametrize(
    "arch, small", [("resnet10t", False), ("resnet18d", False), ("resnetv2_50", False),
                    ("torchvision/resnet18", True), ("wide_resnet50_2", True)],
)  # fmt: skip
def test_networks_with_a_stem_of_their_own_keep_it(arch: str, small: bool, tmp_path: Path) -> None:
    config = make_config(**suit({"data": str(write(tmp_path / "x", 9, (32, 32))), "arch": arch}))
    assert config.small_stem is small
    assert make_config(data="cifar10", arch=arch).small_stem is small
    assert make_config(data="cifar10", arch=arch, small_stem=True).small_stem is True
    if not small:
        with pytest.raises(ValueError, match="--small-stem suits ResNets only"):
            build_backbone(arch, small_stem=True)


@pytest.mark.parametrize(
    "bad",
    [
        {"method": ["x"]},
        {"holdout": "x"},
        {"accumulate": 0},
        {"batch_size": "x"},
        {"method": "dino"},
    ],
)
def test_bad_options_are_left_to_the_configuration(bad: dict[str, Any], tmp_path: Path) -> None:
    chosen = suit({"data": str(write(tmp_path / "x", 9, (32, 32)))} | bad)
    assert bad.items() <= chosen.items()
    with pytest.raises((TypeError, ValueError), match="--"):
        make_config(**chosen)


def test_a_data_set_is_looked_at_as_a_folder() -> None:
    data = [(Image.new("RGB", (70, 90)), i % 2) for i in range(40)]
    for given in (data, (data, data[:2]), {"train": data}):
        chosen = suit_images({"data": "<list>"}, sets.list_data(given))
        assert (chosen["recipe"], chosen["batch_size"]) == ("tiny-imagenet", 8)


@pytest.mark.parametrize(
    "recipe", [{}, {"recipe": "cifar10", "batch_size": 4, "bn_splits": 1, "queue_size": 4}]
)
def test_images_are_listed_once(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("noise.npy", np.random.default_rng(0).integers(0, 255, (9, 40, 40, 3), np.uint8))
    Path("ownlist.py").write_text(
        "import numpy\n\ndef load():\n"
        "    with open('calls', 'a') as calls:\n        calls.write('x')\n"
        "    return numpy.load('noise.npy')\n"
    )
    Path("folder").mkdir()
    for i, image in enumerate(np.load("noise.npy")):
        Image.fromarray(image).save(f"folder/{i}.png")
    seen: list[Path] = []

    def list_and_count(path: Path) -> ListedData:
        seen.append(path)
        return list_folder(path)

    monkeypatch.setattr(sets, "list_folder", list_and_count)
    small: dict[str, Any] = {"arch": "narrow", "epochs": 1, "image_size": 16, "progress": False}
    runs = [
        pretrain(data=data, device="cpu", **small, **recipe) for data in ("folder", "ownlist:load")
    ]
    assert seen == [Path("folder")]
    assert Path("calls").read_text() == "x"
    assert {(run.config.recipe, run.config.batch_size) for run in runs} == {
        ("cifar10", recipe.get("batch_size", 2))
    }


@pytest.mark.parametrize("data", ["missing", ""])
def test_data_that_are_missing_are_refused_without_a_recipe(data: str) -> None:
    with pytest.raises(ValueError, match="--data"):
        pretrain(data=data)


def test_a_data_set_by_name_and_a_recipe_are_one_row_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(PRESETS, "stl10")
    pair = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8), torch.arange(8) % 2
    monkeypatch.setattr(sets, "load_named", lambda *_: (pair, pair, ("cat", "dog")))
    small: dict[str, Any] = {"arch": "narrow", "epochs": 1, "image_size": 16, "batch_size": 4}
    run = pretrain(
        data="stl10", queue_size=8, device="cpu", out=tmp_path / "run", progress=False, **small
    )
    assert (run.config.data, run.config.recipe) == ("stl10", "imagenet")
    monkeypatch.setitem(PRESETS, "mine", {"epochs": 3})
    assert "mine\n  settings: epochs 3\n  source: none stated" in describe()
