"""Pictures as inline SVG: the same figures give the same bytes, and nothing is asked of the network."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

Array = NDArray[np.float64]

BLUE, RED, GREY = "#2457a6", "#c0392b", "#8a8f98"
_INK, _FAINT = "#1c2430", "#d5d9e0"
_STYLE: Any = {"svg.hashsalt": "safeside", "axes.spines.top": False, "axes.spines.right": False}
_NAMESPACE = re.compile(r' xmlns(:xlink)?="[^"]*"')  # a page knows them; so it names no address at all
_GRID = np.unique(np.concatenate([np.linspace(0, 0.1, 21), np.linspace(0.1, 1, 46)]))  # false alarms, finer where few


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows."""

    label: str
    """Its title."""
    limits: tuple[float | None, float | None] = (None, None)
    """Both ends; as the figures ask for where None."""
    goal: float | None = None
    """Where a dashed line stands."""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve."""

    name: str
    """What the legend calls it."""
    x: Sequence[float]
    """Positions, rising."""
    y: Sequence[float]
    """A value at each."""
    colour: str = BLUE
    """Of line and band."""
    style: str = "-"
    """Matplotlib's ``-``, ``--``, ``:`` or ``-.``."""
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """Lower and upper ends around it."""
    marker: str = ""
    """At each position; none unless given."""
    width: float = 2.0
    """Of the stroke, in points."""


@dataclass(frozen=True, slots=True)
class Dot:
    """One figure with its interval, on a row of its own or on that of the dot before with the same name."""

    name: str
    """Of the row."""
    value: float
    """Where the dot stands."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end."""
    colour: str = BLUE
    """Of dot and interval."""
    kind: str = ""
    """What the legend calls dots of this colour; no entry when empty."""


def roc_picture(labels: Array, scores: Mapping[str, Array]) -> str:
    """ROC curves by name, the first one in front."""
    lines = []
    for (name, values), colour in zip(scores.items(), (BLUE, GREY, RED), strict=False):
        false_alarms, hits, _ = roc_curve(labels, values)
        lines.append(Line(name, false_alarms.tolist(), hits.tolist(), colour))
    return lines_picture(
        lines, Axis("share of harmless prompts flagged"), Axis("share of harmful prompts caught"), True
    )


def roc_points(labels: Array, scores: Array) -> tuple[list[float], list[float]]:
    """False alarms and what is caught at each: the same few dozen of the former however many rows, so that curves can
    be averaged and pages stay small."""
    false_alarms, hits, _ = roc_curve(labels, scores)
    return [0.0, *_GRID.tolist()], [0.0, *np.interp(_GRID, false_alarms, hits).tolist()]


def histogram_picture(labels: Array, scores: Array, threshold: float, rows: str = "prompts") -> str:
    """Scores of harmful and harmless ``rows``, and the threshold between."""
    x, y = Axis("score"), Axis(rows)
    canvas, axes = _axes(x, y)
    bins = np.linspace(0, 1, 31).tolist()
    axes.hist(scores[labels == 0], bins=bins, color=BLUE, alpha=0.65, label="harmless")
    axes.hist(scores[labels == 1], bins=bins, color=RED, alpha=0.65, label="harmful")
    axes.axvline(threshold, color=_INK, linestyle="--", linewidth=1, label="threshold")
    axes.legend(frameon=False)
    return _svg(canvas, x, y)


def strength_picture(strengths: Sequence[float], curves: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    """Refusal rate (value, low, high) over strength, one line each."""
    styles = ((RED, "-"), (BLUE, "-"), (RED, "--"), (BLUE, "--"))
    lines = []
    for (name, points), (colour, style) in zip(curves.items(), styles, strict=False):
        values, lows, highs = zip(*points, strict=True)
        lines.append(Line(name, strengths, values, colour, style, (lows, highs), "o"))
    return lines_picture(lines, Axis("strength"), Axis("share of answers that refuse", (-0.03, 1.03)))


def reliability_picture(curves: Mapping[str, tuple[Array, Array]], n_bins: int = 10) -> str:
    """Share of harmful rows over predicted probability, for (labels, probabilities) by name: the diagonal is right.

    Bins of equal width; a dot's area grows with its rows (Guo et al. 2017, arXiv 1706.04599, figure 1).
    """
    x, y = Axis("predicted probability", (-0.03, 1.03)), Axis("share that is harmful", (-0.03, 1.03))
    canvas, axes = _axes(x, y)
    axes.plot([0, 1], [0, 1], color=_FAINT, linewidth=1)
    for (name, (labels, probabilities)), colour in zip(curves.items(), (GREY, BLUE, RED), strict=False):
        bins = np.minimum((probabilities * n_bins).astype(int), n_bins - 1)
        counts = np.bincount(bins, minlength=n_bins)
        some = counts > 0
        predicted = np.bincount(bins, weights=probabilities, minlength=n_bins)[some] / counts[some]
        harmful = np.bincount(bins, weights=labels, minlength=n_bins)[some] / counts[some]
        axes.plot(predicted, harmful, color=colour, linewidth=1.5, label=name)
        axes.scatter(
            predicted, harmful, s=12 + 180 * counts[some] / counts.sum(), color=colour, alpha=0.75, linewidths=0
        )
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    return _svg(canvas, x, y)


def lines_picture(lines: Sequence[Line], x: Axis, y: Axis, has_diagonal: bool = False) -> str:
    """Curves, the first in front; a legend below where there are more than four."""
    names = [line for line in lines if line.name]
    is_below = len(names) > 4
    canvas, axes = _axes(x, y, 3.6 + 0.2 * ((len(names) + 1) // 2) * is_below)
    if has_diagonal:
        axes.plot([0, 1], [0, 1], color=_FAINT, linewidth=1)
    for order, line in enumerate(lines):  # whatever their number, the first is the uppermost
        axes.plot(
            line.x,
            line.y,
            line.style,
            color=line.colour,
            marker=line.marker,
            markersize=4,
            label=line.name or None,
            linewidth=line.width,
            zorder=3 - order / 100,
        )
        if line.band is not None:
            axes.fill_between(line.x, *line.band, color=line.colour, alpha=0.12, linewidth=0)
    if is_below:
        canvas.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=8)
    elif names:
        axes.legend(frameon=False, fontsize=8)
    return _svg(canvas, x, y)


def dots_picture(dots: Sequence[Dot], x: Axis) -> str:
    """Figures with their intervals, a row for each name from top to bottom; dots of one row stand side by side."""
    rows: dict[str, list[Dot]] = {}
    for dot in dots:
        rows.setdefault(dot.name, []).append(dot)
    kinds = list(dict.fromkeys(dot.kind for dot in dots if dot.kind))
    room = sum(max(0.27, 0.11 * (len(some) + 1)) for some in rows.values())  # inches
    y = Axis("", (len(rows) - 0.4, -0.6))
    canvas, axes = _axes(x, y, 0.9 + max(room, 0.7) + 0.2 * ((len(kinds) + 1) // 2))
    axes.grid(axis="x", color="#eceff4")
    axes.set_axisbelow(True)
    named: set[str] = set()
    for row, some in enumerate(rows.values()):
        for place, dot in enumerate(some):
            height = row + 0.7 * ((place + 1) / (len(some) + 1) - 0.5)
            axes.plot([dot.low, dot.high], [height] * 2, color=dot.colour, linewidth=2, alpha=0.45)
            label = None if dot.kind in named else dot.kind or None
            axes.plot([dot.value], [height], "o", color=dot.colour, markersize=4.5, label=label)
            named.add(dot.kind)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.xaxis.set_major_locator(MaxNLocator(6))  # more of them run into one another on narrow ranges
    if kinds:
        canvas.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=8)
    return _svg(canvas, x, y)


def _axes(x: Axis, y: Axis, height: float = 3.6):  # type: ignore[no-untyped-def]
    canvas = Canvas(figsize=(5.2, height), layout="constrained")
    with mpl.rc_context(_STYLE):
        axes = canvas.subplots()
    axes.set_xlabel(x.label)
    axes.set_ylabel(y.label)
    if x.goal is not None:
        axes.axvline(x.goal, color=_INK, linestyle="--", linewidth=1)
    if y.goal is not None:
        axes.axhline(y.goal, color=_INK, linestyle="--", linewidth=1)
    return canvas, axes


def _svg(canvas: Canvas, x: Axis, y: Axis) -> str:
    (axes,) = canvas.axes
    axes.set_xlim(*x.limits)  # after the curves: an end that is left open follows them
    axes.set_ylim(*y.limits)
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        canvas.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    return _NAMESPACE.sub("", text[text.index("<svg") :])
