"""The curves of runs as SVG to be set into a page: text stays text, and colours are those of the page.

Each run has a colour of its own in every plot. Matplotlib draws with stand-ins for the colours, and these are exchanged
for the page's CSS variables, so that one drawing serves a light page, a dark one and paper. The same runs give the same
bytes.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from job.monitoring.history import History

# Stand-ins that nothing else is drawn with, and the page's names for them.
_INK, _QUIET, _LINE = "#0f0001", "#0f0002", "#0f0003"
_CSS = {_INK: "var(--ink)", _QUIET: "var(--quiet)", _LINE: "var(--line)"}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _QUIET,
    "axes.grid": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _QUIET,
    "ytick.labelcolor": _QUIET,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}
_SIZE = (4.8, 3.0)  # inches; small, so that letters stay readable on a phone
_MANY = 60  # records beyond which a curve of single records hides its own course


class Plot(NamedTuple):
    """What is drawn over the steps, of which records."""

    title: str
    key: str
    splits: Sequence[str] = ("train",)
    logarithmic: bool = False
    smooth: bool = True
    from_zero: bool = False


PLOTS = (
    Plot("Loss", "loss", ("train", "validation", "test"), logarithmic=True),
    Plot("Accuracy", "accuracy", ("train", "validation", "test")),
    Plot("Learning rate", "learning_rate", smooth=False, from_zero=True),
    Plot("Images per second", "images_per_second", from_zero=True),
)


def draw(plot: Plot, runs: Sequence[History]) -> Optional[str]:
    """The curves of all runs in one SVG element; None where there is nothing to draw."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for place, run in enumerate(runs):
            wider = 0.9 * min(len(runs) - 1 - place, 3)  # what is drawn first, so that equal curves are all seen
            for split in plot.splits:
                steps, values = run.series(split, plot.key)
                _curve(axes, np.array(steps), np.array(values), f"#0e{place:04x}", wider, split != "train", plot.smooth)
        drawn = np.concatenate([line.get_ydata() for line in axes.lines])
        drawn = drawn[np.isfinite(drawn)]
        if not drawn.size:
            return None
        axes.set_title(plot.title, fontweight="bold")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        if plot.from_zero:
            axes.set_ylim(bottom=0)
        if plot.logarithmic and (drawn > 0).all():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        return _svg(figure, f"{plot.title} of {', '.join(run.name for run in runs)} over the steps")


def _curve(axes: Axes, steps: Any, values: Any, colour: str, wider: float, test: bool, smooth: bool) -> None:
    """Evaluations as dots on a line. Training as a line; where it has many records their mean, and they faintly."""
    if test:
        axes.plot(steps, values, color=colour, lw=1.6 + wider, marker="o", ms=4 + wider, zorder=4)
    elif smooth and len(values) > _MANY:
        axes.plot(steps, values, color=colour, lw=0.7, alpha=0.25, zorder=2)
        axes.plot(steps, _mean_of_neighbours(values, len(values) // _MANY), color=colour, lw=1.1 + wider, zorder=3)
    else:
        axes.plot(steps, values, color=colour, lw=1.1 + wider, zorder=3, marker="." if len(values) == 1 else None)


def _mean_of_neighbours(values: Any, reach: int) -> Any:
    """Of each value and the ``reach`` values on either side, where they are finite numbers; fewer at the ends."""
    window = np.ones(2 * reach + 1)
    finite = np.isfinite(values)
    counts = np.convolve(finite, window, mode="same")
    sums = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    return np.where(finite, sums / np.maximum(counts, 1), np.nan)


def _svg(figure: Figure, description: str) -> str:
    """The drawing as an element of a page, which several drawings share: no prologue, no names that could meet."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": description}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    drawing = stream.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)
    drawing = re.sub(r"font-family: [^;\"]*;?", "", drawing)
    drawing = re.sub(r": #0e([0-9a-f]{4})\b", lambda found: f": var(--run-{int(found[1], 16)})", drawing)
    for colour, name in _CSS.items():
        drawing = drawing.replace(f": {colour}", f": {name}")
    opening = f'<svg role="img" aria-label="{html.escape(description)}" '
    return re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', lambda found: f"{opening}{found[1]}>", drawing)
