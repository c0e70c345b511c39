"""A folder without a recipe gets one by its images, with a batch and a queue that they fill."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mixmask.backbones import build_backbone
from mixmask.trainers.methods import make_config
from mixmask.trainers.recipes import suit_images


def write(folder: Path, count: int, size: tuple[int, int]) -> Path:
    (folder / "a").mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", size, (i, 0, 0)).save(folder / "a" / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    "size, recipe", [((32, 48), "cifar10"), ((64, 80), "tiny-imagenet"), ((300, 200), "imagenette")]
)
def test_a_folder_follows_the_size_of_its_images(
    size: tuple[int, int], recipe: str, tmp_path: Path
) -> None:
    chosen = suit_images({"data": str(write(tmp_path / "x", 40, size))})
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
    assert suit_images({"data": str(tmp_path / "x.zip")})["recipe"] == "cifar10"


def test_many_large_images_follow_imagenets_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(write(tmp_path / "x", 1, (300, 300)))
    for count, recipe in ((70_000, "imagenet100"), (499_999, "imagenet100"), (500_000, "imagenet")):
        monkeypatch.setattr("mixmask.trainers.recipes.survey", lambda *_, n=count: (n, 300.0))
        chosen = suit_images({"data": data})
        assert chosen["recipe"] == recipe
        assert make_config(**chosen) == make_config(data=data, recipe=recipe)
    monkeypatch.setattr("mixmask.trainers.recipes.survey", lambda *_: (50_000, 300.0))
    assert suit_images({"data": data})["queue_size"] == 16_384  # Imagenet's 65,536 is too much.


def test_what_is_given_stays(tmp_path: Path) -> None:
    data = str(write(tmp_path / "x", 9, (32, 32)))
    given = {"data": data, "batch_size": 6, "lr": 1.0, "queue_size": 600, "bn_splits": 3}
    assert suit_images(given) == given | {"recipe": "cifar10"}
    assert suit_images({"data": data, "batch_size": 6})["bn_splits"] == 3
    assert (
        make_config(**suit_images({"data": data, "arch": "vit_tiny_patch16_224"})).small_stem
        is False
    )
    assert make_config(**suit_images({"data": data, "arch": "resnet50"})).small_stem is True
    for other in ({"data": data, "recipe": "imagenet"}, {"data": "clothing64"}, {"data": "a.b:c"}):
        assert suit_images(other) == other
    assert suit_images({"data": str(tmp_path / "missing")}) == {"data": str(tmp_path / "missing")}


def test_only_training_images_of_each_process_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x" / "train", 16, (32, 32))
    write(tmp_path / "x" / "test", 90, (300, 300))
    data = str(tmp_path / "x")
    assert suit_images({"data": data})["recipe"] == "cifar10"
    assert suit_images({"data": data})["batch_size"] == 4
    assert suit_images({"data": data, "holdout": 0.5})["batch_size"] == 2
    monkeypatch.setattr("mixmask.trainers.recipes.world_size", lambda: 2)
    assert suit_images({"data": data})["batch_size"] == 2


def test_a_smaller_batch_lowers_the_learning_rate(tmp_path: Path) -> None:
    data = str(write(tmp_path / "x", 40, (32, 32)))
    assert suit_images({"data": data, "batch_size": 32})["lr"] == pytest.approx(0.06 * 32 / 512)
    assert "lr" not in suit_images({"data": data, "batch_size": 1000})
    assert suit_images({"data": data, "batch_size": 32, "lr": 0.1})["lr"] == 0.1


@pytest.mark.parametrize(
    "arch, small", [("resnet10t", False), ("resnet18d", False), ("resnetv2_50", False),
                    ("torchvision/resnet18", True), ("wide_resnet50_2", True)],
)  # fmt: skip
def test_networks_with_a_stem_of_their_own_keep_it(arch: str, small: bool, tmp_path: Path) -> None:
    config = make_config(
        **suit_images({"data": str(write(tmp_path / "x", 9, (32, 32))), "arch": arch})
    )
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
    chosen = suit_images({"data": str(write(tmp_path / "x", 9, (32, 32)))} | bad)
    assert bad.items() <= chosen.items()
    with pytest.raises((TypeError, ValueError), match="--"):
        make_config(**chosen)


def test_a_data_set_is_looked_at_as_a_folder() -> None:
    data = [(Image.new("RGB", (70, 90)), i % 2) for i in range(40)]
    for given in (data, (data, data[:2]), {"train": data}):
        chosen = suit_images({"data": "<list>"}, given)
        assert (chosen["recipe"], chosen["batch_size"]) == ("tiny-imagenet", 8)
    assert suit_images({"data": "<list>"}, 3) == {"data": "<list>"}
