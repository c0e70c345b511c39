"""Figures of several runs draw the numbers they were given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mixmask.figures.runs import (
    band,
    figure_budgets,
    figure_comparison,
    figure_curves,
    figure_factors,
)
from mixmask.figures.style import save_figure

VALUES = np.random.default_rng(0).random((4, 5))


def expected_band(values: np.ndarray[Any, Any], kind: str) -> list[np.ndarray[Any, Any]]:
    mean, sd = values.mean(axis=0), values.std(axis=0, ddof=1)
    half = {"sd": sd, "se": sd / np.sqrt(len(values))}
    if kind == "range":
        return [mean, values.min(axis=0), values.max(axis=0)]
    return [mean, mean - half[kind], mean + half[kind]]


@pytest.mark.parametrize("kind", ["se", "sd", "range"])
def test_bands_equal_numpys(kind: str) -> None:
    for ours, theirs in zip(
        band(torch.from_numpy(VALUES), kind), expected_band(VALUES, kind), strict=True
    ):
        np.testing.assert_allclose(ours.numpy(), theirs)


def test_one_seed_has_no_width_and_other_words_are_refused() -> None:
    one = torch.rand(1, 5)
    assert all(torch.equal(bound, one[0]) for bound in band(one))
    with pytest.raises(ValueError, match="band must be one of 'se', 'sd', 'range', got 'ci'"):
        band(one, "ci")


def heights(line: Any) -> np.ndarray[Any, Any]:
    """Return what a line was drawn at."""
    return np.asarray(line.get_ydata(), dtype=float)


def points(values: np.ndarray[Any, Any]) -> dict[int, list[float]]:
    return {epoch: column.tolist() for epoch, column in enumerate(values.T)}


@pytest.mark.parametrize("kind", ["se", "sd", "range"])
def test_comparison_draws_means_bands_and_seeds(kind: str) -> None:
    curves = {
        "mixmask": {name: points(VALUES) for name in ("loss_clean", "loss_mixed", "knn")},
        "no mixing": {"loss_clean": points(VALUES[:1]), "loss_mixed": {0: [0.0], 1: [0.0]}},
    }
    figure = figure_comparison(curves, title="on photographs", kind=kind)
    clean, mixed, knn, linear = figure.axes
    mean, low, high = expected_band(VALUES, kind)
    np.testing.assert_allclose(heights(clean.lines[0]), mean)
    np.testing.assert_allclose(heights(clean.lines[1]), VALUES[0])
    assert len(clean.collections) == 1  # One seed has no band.
    np.testing.assert_allclose(heights(knn.lines[0]), 100 * mean)
    corners = knn.collections[0].get_paths()[0].vertices
    for bound in (low, high):
        for epoch, value in enumerate(100 * bound):
            assert np.isclose(corners, [epoch, value]).all(axis=1).any()
    assert len(mixed.lines) == 1  # A run without mixing has no curve of zeros.
    assert linear.texts[0].get_text() == "not measured"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "mixmask (4 seeds)", "no mixing (1 seed)",
    ]  # fmt: skip
    words = {"se": "standard error", "sd": "standard deviation", "range": "smallest to largest"}
    assert figure.get_suptitle().startswith("on photographs\nline: mean, band: ")
    assert words[kind] in figure.get_suptitle()


def test_nine_lines_differ_in_colour_or_style() -> None:
    figure = figure_comparison({str(i): {"knn": points(VALUES[:1] + i)} for i in range(9)})
    looks = {(str(line.get_color()), line.get_linestyle()) for line in figure.axes[2].lines}
    assert len(looks) == 9
    assert figure.get_suptitle() == "one seed each: no band"


def test_factors_mark_mean_deviation_and_every_seed() -> None:
    accuracies = {"knn": [0.2, 0.4, 0.6], "linear": [0.5]}
    panels: dict[str, Any] = {
        "grid size": {"2": accuracies, "4": {"knn": [], "linear": []}},
        "switch": {"on": {}},
    }
    figure = figure_factors(panels, untrained={"knn": 0.1}, title="t")
    grid, switch = figure.axes
    assert (grid.get_title(), switch.get_title()) == ("grid size", "switch")
    assert [label.get_text() for label in grid.get_xticklabels()] == ["2", "4"]
    dots = [line for line in grid.lines if line.get_alpha() == 0.4]
    assert [heights(line).round(9).tolist() for line in dots] == [[20, 40, 60], [50]]
    drawn: list[Any] = list(grid.containers)
    bars = [
        segment[:, 1].tolist()
        for container in drawn
        for segment in container.lines[2][0].get_segments()
    ]
    np.testing.assert_allclose(bars, [[20, 60], [50, 50]])
    dotted = [line for line in grid.lines if line.get_linestyle() == ":"]
    assert [heights(line)[0] for line in dotted] == [10.0]


def test_losses_of_different_scale_have_axes_of_their_own() -> None:
    runs = {"moco": 7.0, "slower moco": 8.5, "simsiam": -0.9, "barlow": 40.0, "byol": -0.1}
    curves = {
        name: {"loss_clean": {1: [loss + 0.8], 2: [loss]}, "knn": {2: [0.5]}}
        for name, loss in runs.items()
    }
    *losses, mixed, knn, linear = [axis for axis in figure_comparison(curves).axes if axis.axison]
    assert [[heights(line)[1] for line in axis.lines] for axis in losses] == [
        [7, 8.5], [-0.9, -0.1], [40],
    ]  # fmt: skip
    assert [axis.get_title() for axis in losses] == ["clean term of the loss"] * 3
    assert len(knn.lines) == 5
    assert mixed.texts[0].get_text() == linear.texts[0].get_text() == "not measured"


def test_budgets_have_a_column_a_method_and_a_line_a_mixture(tmp_path: Path) -> None:
    curves = {"no mixing": {2: [0.3, 0.5], 4: [0.6]}, "mixmask": {2: [0.2], 4: []}}
    panels: dict[str, Any] = {
        "moco-v2": {"knn": curves},
        "byol": {"knn": {"mixmask": {2: [], 4: []}}},
    }
    figure = figure_budgets(panels, title="t")
    moco, byol, moco_linear, _ = figure.axes
    assert (moco.get_title(), byol.get_title()) == ("moco-v2", "byol")
    assert figure.get_suptitle() == "t\nline: mean, band: ± standard deviation over seeds"
    baseline, mixmask = moco.lines
    assert np.asarray(baseline.get_xydata()).round(9).tolist() == [[2, 40], [4, 60]]
    assert np.asarray(mixmask.get_xydata()).round(9).tolist() == [[2, 20]]
    assert moco_linear.texts[0].get_text() == byol.texts[0].get_text() == "not measured"
    figure_with_start = figure_budgets(panels, untrained={"knn": 0.1})
    *_, dotted = figure_with_start.axes[0].lines
    assert (dotted.get_label(), dotted.get_linestyle()) == ("untrained", ":")
    assert heights(dotted)[0] == 10
    assert not figure_with_start.axes[1].lines  # Nothing was measured there.
    (tmp_path / "budgets.png").write_bytes(b"the one before")
    save_figure(figure, tmp_path / "budgets.png")
    assert [path.name for path in tmp_path.iterdir()] == ["budgets.png"]
    with Image.open(tmp_path / "budgets.png") as image:
        assert image.width > 500


def test_curves_with_and_without_accuracies() -> None:
    rows = [
        {"epoch": 0.0, "step": 0.0, "knn": 0.2, "linear": 0.3},
        {"epoch": 1.0, "step": 5.0, "loss": 3.0, "loss_clean": 2.0, "loss_mixed": 1.0},
        {"epoch": 2.0, "step": 9.0, "loss": 2.0, "loss_clean": 1.0, "loss_mixed": 1.0, "knn": 0.4},
    ]
    figure = figure_curves(rows, title="runs/first")
    assert figure.get_suptitle() == "runs/first"
    clean, mixed, accuracy = figure.axes
    assert heights(clean.lines[0]).tolist() == [2.0, 1.0]
    assert heights(mixed.lines[0]).tolist() == [1.0, 1.0]
    lines = {str(line.get_label()): line for line in accuracy.lines}
    assert heights(lines["nearest neighbours"]).tolist() == [20, 40]
    for name, start in (("nearest neighbours", 20), ("linear probe", 30)):
        untrained = lines[f"{name}, untrained"]
        assert heights(untrained)[0] == start
        assert untrained.get_color() == lines[name].get_color()
    assert len({line.get_color() for line in lines.values()}) == 2


@pytest.mark.parametrize("steps, end", [(0, None), (3, 0.6), (20, 2.0)])
def test_curves_shade_the_steps_in_which_a_queue_fills(steps: int, end: float | None) -> None:
    rows = [{"epoch": e, "step": 5 * e, "loss_clean": 5.0, "knn": 0.5} for e in (1.0, 2.0)]
    figure = figure_curves(rows, queue_steps=steps)
    loss, accuracy = figure.axes
    assert not accuracy.patches
    spans = [patch.get_extents().transformed(loss.transData.inverted()) for patch in loss.patches]
    assert [(span.x0, span.x1) for span in spans] == ([(0, pytest.approx(end))] if end else [])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert any(text.startswith(f"steps 1 to {steps}: random keys") for text in texts) == bool(end)


def test_a_loss_that_hardly_moves_is_drawn_flat() -> None:
    for last, share in ((5.01, 0.1), (9.0, 0.95)):
        rows = [{"epoch": e, "step": e, "loss_clean": v} for e, v in ((1.0, 5.0), (2.0, last))]
        low, high = figure_curves(rows).axes[0].get_ylim()
        assert low < 5 < last < high
        assert ((last - 5) / (high - low) > 0.5) == (share > 0.5)


@pytest.mark.parametrize("count", [2, 12])
def test_a_legend_of_long_names_lies_whole_below_the_panels(count: int) -> None:
    names = [f"moco-v2, mixmask, grid size 8, pattern discrete, lr 0.0{i}" for i in range(count)]
    names[0] *= 4
    figure = figure_comparison({name: {"knn": points(VALUES)} for name in names}, title="t " * 99)
    figure.draw_without_rendering()
    [legend] = figure.legends
    assert len(legend.get_texts()) == count
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    assert page.y0 <= box.y0
    for axis in figure.axes:
        panel = axis.get_tightbbox()
        assert panel is not None
        assert box.y1 <= panel.y0
        assert panel.height > page.height / 5
    heading = figure.texts[0].get_window_extent()
    assert page.x0 <= heading.x0 < heading.x1 <= page.x1


def test_curves_of_one_epoch_without_labels_or_mixing() -> None:
    row = {"epoch": 1.0, "step": 5.0, "loss": 2.0, "loss_clean": 2.0, "loss_mixed": 0.0}
    figure = figure_curves([row])
    [axis] = figure.axes
    [line] = axis.lines
    assert (heights(line).tolist(), line.get_marker()) == ([2.0], "o")
    figure.draw_without_rendering()
    assert {label.get_text() for label in axis.get_xticklabels()} <= {"0", "1", "2"}
    assert not figure.legends
