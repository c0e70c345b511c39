"""Defaults, presets, errors, and the way to JSON and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixmask.trainers.config import PRESETS, save_config
from mixmask.trainers.loop import learning_rate
from mixmask.trainers.methods import load_config, make_config
from mixmask.trainers.moco import MoCoConfig


def test_defaults_are_moco_v2_on_imagenet() -> None:
    config = MoCoConfig()
    assert (config.arch, config.image_size, config.batch_size, config.lr) == (
        "resnet50",
        224,
        256,
        0.03,
    )
    assert (config.queue_size, config.encoder_momentum, config.temperature) == (65_536, 0.999, 0.2)
    assert (config.grid_size, config.ratio, config.pattern) == (8, 0.5, "block")


@pytest.mark.parametrize("data", PRESETS)
@pytest.mark.parametrize("method", ["moco-v1", "moco-v2"])
def test_presets_are_valid_and_yield_to_what_is_given(data: str, method: str) -> None:
    assert make_config(data=data, method=method).method == method
    assert make_config(data=data, method=method, lr=0.5, temperature=0.3).temperature == 0.3


def test_json_round_trip(tmp_path: Path) -> None:
    config = make_config(ratio=(0.25, 0.75), per_sample=True)
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"ratio": 0.5, "colour": "red"}'])
def test_what_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no run that can be resumed"):
        load_config(path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mix": "blend"}, "--mix must be one of 'none', 'mixmask'"),
        ({"ratio": 1.5}, "ratio must lie strictly between 0 and 1, got 1.5"),
        ({"grid_size": 33}, "--grid-size must be within 2 ... 32, got 33"),
        ({"batch_size": 1}, "--batch-size must be at least 2, got 1"),
        ({"batch_size": 10, "bn_splits": 4}, "--bn-splits must divide --batch-size"),
        ({"temperature": 0.0}, "--temperature must be positive, got 0.0"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"lr": -1.0}, "--lr must be at least 0, got -1.0"),
        ({"hue": 0.9}, "--hue must be within 0 ... 0.5, got 0.9"),
        ({"queue_size": 0}, "--queue-size must be at least 1, got 0"),
    ],
)
def test_errors_say_what_was_expected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_cosine_warms_up_and_ends_at_zero() -> None:
    config = MoCoConfig(lr=1.0, warmup=0.1)
    assert learning_rate(config, 0.05) == pytest.approx(0.5)
    assert learning_rate(config, 0.1) == pytest.approx(1.0)
    assert learning_rate(config, 0.55) == pytest.approx(0.5)
    assert learning_rate(config, 1.0) == pytest.approx(0.0)


def test_steps_fall_at_60_and_80_percent() -> None:
    config = MoCoConfig(lr=1.0, schedule="step")
    rates = [learning_rate(config, done) for done in (0.0, 0.59, 0.6, 0.79, 0.8, 1.0)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
