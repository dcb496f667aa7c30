"""``report.html``: one self-contained page with pictures (inline SVG), no script and no network."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

_STYLE: Any = {"svg.hashsalt": "safeside", "axes.spines.top": False, "axes.spines.right": False}
_NAMESPACE = re.compile(r' xmlns(:xlink)?="[^"]*"')  # a page knows them; so it names no address at all
BLUE, RED, GREY = "#2457a6", "#c0392b", "#8a8f98"

_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1c2430;background:#fff}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #dfe3ea}
table{border-collapse:collapse;margin:1rem 0;width:100%}th,td{padding:.35rem .6rem;border-bottom:1px solid #e6e9ef;
text-align:left;vertical-align:top}th{background:#f5f7fa}.number{text-align:right;font-variant-numeric:tabular-nums}
.pictures{display:flex;flex-wrap:wrap;gap:1rem}.pictures figure{margin:0;flex:1 1 26rem}figcaption{color:#596273;
font-size:.9rem}svg{max-width:100%;height:auto}.flagged{color:#c0392b;font-weight:600}p.note{color:#596273}
</style></head><body><h1>{{ title }}</h1><p class="note">{{ subtitle }}</p>
{% for section in sections %}<h2>{{ section.title }}</h2>{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% if section.pictures %}<div class="pictures">{% for caption, picture in section.pictures %}<figure>{{ picture|safe }}
<figcaption>{{ caption }}</figcaption></figure>{% endfor %}</div>{% endif %}
{% if section.rows %}<table><thead><tr>{% for column in section.columns %}<th{% if
section.rows[0][loop.index0]|is_number %} class="number"{% endif %}>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in section.rows %}<tr>{% for cell in row %}<td{% if cell|is_number %} class="number"{% elif
cell == "FLAGGED" %} class="flagged"{% endif %}>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table>{% endif %}
{% endfor %}</body></html>
"""


@dataclass(slots=True)
class Section:
    """One part of the page: words, pictures (caption, SVG) and a table of text cells."""

    title: str
    text: str = ""
    pictures: list[tuple[str, str]] = field(default_factory=list)
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def write_report(path: Path, title: str, subtitle: str, sections: Sequence[Section]) -> Path:
    """Write the page; every text is escaped, pictures are our own SVG."""
    environment = Environment(autoescape=True)
    environment.filters["is_number"] = _is_number
    path.parent.mkdir(parents=True, exist_ok=True)
    page = environment.from_string(_PAGE).render(title=title, subtitle=subtitle, sections=sections)
    path.write_text(page, encoding="utf-8")
    return path


def _is_number(text: str) -> bool:
    return text.replace(".", "").replace("-", "").replace("%", "").replace(",", "").isdigit()


def roc_picture(labels: NDArray[np.float64], scores: Mapping[str, NDArray[np.float64]]) -> str:
    """ROC curves by name, the first one in front."""
    canvas, axes = _axes("share of harmless prompts flagged", "share of harmful prompts caught")
    for (name, values), colour in zip(scores.items(), (BLUE, GREY, RED), strict=False):
        false_alarms, hits, _ = roc_curve(labels, values)
        axes.plot(false_alarms, hits, color=colour, label=name, linewidth=2)
    axes.plot([0, 1], [0, 1], color="#d5d9e0", linewidth=1)
    axes.legend(frameon=False, loc="lower right")
    return _svg(canvas)


def histogram_picture(labels: NDArray[np.float64], scores: NDArray[np.float64], threshold: float) -> str:
    """Scores of harmful and harmless rows, and the threshold between."""
    canvas, axes = _axes("score", "prompts")
    bins = np.linspace(0, 1, 31).tolist()
    axes.hist(scores[labels == 0], bins=bins, color=BLUE, alpha=0.65, label="harmless")
    axes.hist(scores[labels == 1], bins=bins, color=RED, alpha=0.65, label="harmful")
    axes.axvline(threshold, color="#1c2430", linestyle="--", linewidth=1, label="threshold")
    axes.legend(frameon=False)
    return _svg(canvas)


def strength_picture(strengths: Sequence[float], curves: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    """Refusal rate (value, low, high) over strength, one line each."""
    canvas, axes = _axes("strength", "share of answers that refuse")
    styles = ((RED, "-"), (BLUE, "-"), (RED, "--"), (BLUE, "--"))
    for (name, points), (colour, line) in zip(curves.items(), styles, strict=False):
        values, lows, highs = (np.array(column) for column in zip(*points, strict=True))
        axes.plot(strengths, values, line, color=colour, marker="o", label=name, linewidth=2)
        axes.fill_between(strengths, lows, highs, color=colour, alpha=0.12)
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False, fontsize=8)
    return _svg(canvas)


def _axes(x_label: str, y_label: str):  # type: ignore[no-untyped-def]
    canvas = Canvas(figsize=(5.2, 3.6), layout="constrained")
    with mpl.rc_context(_STYLE):
        axes = canvas.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return canvas, axes


def _svg(canvas: Canvas) -> str:
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        canvas.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    return _NAMESPACE.sub("", text[text.index("<svg") :])
