"""What all figures share: colours, a figure outside of pyplot, pictures of images, saving."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mixmask.data.folders import printable
from mixmask.runs.files import atomic_write, check_files

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart, without their pale yellow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
# Ten colours that differ in lightness too (Petroff, "Accessible Color Sequences for Data
# Visualization"), for classes.
CLASS_COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70",
    "#717581", "#92dadd",
)  # fmt: skip
# A second code for more lines than colours.
LINES = ("-", "--", ":", "-.")
MEASURES = {"knn": "nearest neighbours", "linear": "linear probe"}


def new_figure(width: float, height: float) -> Figure:
    """Make a figure of a size in inches; pyplot and its backend are left as they are."""
    return _figure_class()(figsize=(width, height), layout="constrained")


@cache
def _figure_class() -> type[Figure]:
    import_matplotlib()
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        """A figure that a notebook shows without pyplot."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            _prepare(self)
            self.savefig(buffer, format="png")
            return buffer.getvalue()

    return NotebookFigure


def import_matplotlib() -> None:
    """Import matplotlib with the backend of MPLBACKEND, or with its own where that is missing.

    A notebook hands the variable on to the commands that it starts. Where its backend is not
    installed, matplotlib refuses to be imported, although no figure here needs a backend. Call
    this before importing a library that imports matplotlib itself.
    """
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib as mpl

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            mpl.rcParams["backend"] = backend


def check_figure(path: Path, *, force: bool) -> None:
    """Check that a figure can be written, before any work is done for it; see `check_files`.

    Raises:
        ValueError: Also if matplotlib does not support the format of the name's suffix.
    """
    check_files(path, force=force)
    import_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    # PGF needs LaTeX, which most machines lack.
    known = set(FigureCanvasBase.get_supported_filetypes()) - {"pgf"}
    if _format(path).lower() not in known:
        raise ValueError(f"--out {path} must end in one of {', '.join(sorted(known))}; use .png")


def _format(path: Path) -> str:
    return path.suffix[1:] or "png"


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically, as PNG unless the name ends otherwise."""
    with atomic_write(path) as (temporary,):
        write_figure(figure, temporary, _format(path))


def write_figure(figure: Figure, path: Path, form: str = "png") -> None:
    """Write a figure in a format, whatever the file's name."""
    _prepare(figure)
    # Without a format, matplotlib would go by the suffix, which of a temporary file is .tmp.
    figure.savefig(path, dpi=150, format=form)


def _prepare(figure: Figure) -> None:
    """Draw $ literally, not as math, replace bytes that are not UTF-8, and settle the layout."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        text.set_text(printable(text.get_text()))
    figure.draw_without_rendering()  # The first pass may still cut labels off.


def show_image(
    axis: Axes, image: Tensor, title: str = "", *, size: int = 8, frame: str | None = None
) -> None:
    """Draw an image (C, H, W) or a mask (H, W), white where it is True.

    Of more than three channels the first three are drawn, of one or two the first, as grey.

    Args:
        axis: Where to draw it.
        image: uint8, or floating within [0, 1]; or bool.
        title: Above it.
        size: Of the title, in points.
        frame: Colour of a frame and of the title. Default: no frame, a black title.
    """
    if image.ndim == 2:
        axis.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
    else:
        shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
        axis.imshow(shown.permute(1, 2, 0).numpy())  # (3, H, W) -> (H, W, 3)
    axis.set_title(title, fontsize=size, color=frame or "black", pad=3)
    axis.set(xticks=[], yticks=[])
    if frame is not None:
        for spine in axis.spines.values():
            spine.set(color=frame, linewidth=3)


def finish_curves(axis: Axes) -> None:
    """Count epochs in whole numbers, or say that nothing was measured."""
    if axis.lines:
        axis.locator_params(axis="x", integer=True, min_n_ticks=1)
    else:
        axis.text(
            0.5, 0.5, "not measured", ha="center", va="center", color="grey",
            transform=axis.transAxes,
        )  # fmt: skip
        axis.set(xticks=[], yticks=[])
    axis.spines[["top", "right"]].set_visible(False)


def add_caption(figure: Figure, title: str, caption: str = "") -> None:
    """Write a title and a caption under it above all panels, where there are any."""
    if title or caption:
        figure.suptitle("\n".join(filter(None, (title, caption))), fontsize=10, wrap=True)


def add_legend(figure: Figure, axes: Iterable[Axes], title: str, caption: str = "") -> None:
    """Add a caption, and a legend for all panels in room of its own below, so that none is cut."""
    add_caption(figure, title, caption)
    handles: dict[str, Artist] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        # Inches: a letter is about 0.07 wide, what stands before a label 0.5, and a line 0.19 high.
        width = figure.get_figwidth()
        labels = [shorten(label, int((width - 0.5) / 0.07)) for label in handles]
        columns = max(1, min(len(labels), int(width / (0.5 + 0.07 * max(map(len, labels))))))
        figure.set_figheight(figure.get_figheight() + 0.19 * math.ceil(len(labels) / columns))
        figure.legend(
            list(handles.values()), labels, loc="outside lower center", frameon=False,
            ncols=columns, fontsize=9,
        )  # fmt: skip


def short_path(path: str | Path) -> str:
    """Name a folder or a data set in a title by the last two parts of its path.

    Example:
        >>> short_path("/home/me/runs/first"), short_path("clothing64")
        ('runs/first', 'clothing64')
    """
    path = Path(printable(str(path)))
    return "/".join([part for part in path.parts if part != path.anchor][-2:])


def shorten(name: str, most: int) -> str:
    """Cut the middle out of a name that would run into its neighbour's.

    Example:
        >>> shorten("golden retriever", 10)
        'gold…iever'
    """
    half = most // 2
    return name if len(name) <= most else f"{name[: half - 1]}…{name[-half:]}"
