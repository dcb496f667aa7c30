"""``report.html``: one self-contained page with pictures (inline SVG), no script and no network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment

_ONE = r"[+-]?[\d,]*\.?\d+%?"
_NUMBER = re.compile(rf"(under )?{_ONE}( \({_ONE} to {_ONE}\))?")
_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body{font:16px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem;color:#1c2430;background:#fff}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #dfe3ea}
p{max-width:62rem}.wide{overflow-x:auto}
table{border-collapse:collapse;margin:1rem 0;min-width:min(100%,62rem);font-size:.92rem}
th,td{padding:.35rem .6rem;border-bottom:1px solid #e6e9ef;text-align:left;vertical-align:top}
th{background:#f5f7fa}.number{text-align:right;font-variant-numeric:tabular-nums}td.number{white-space:nowrap}
.pictures{display:flex;flex-wrap:wrap;gap:1rem;max-width:66rem}
.pictures figure{margin:0;flex:1 1 26rem;min-width:0;max-width:31.2rem}figcaption{color:#596273;font-size:.9rem}
svg{max-width:100%;height:auto}.flagged{color:#c0392b;font-weight:600}p.note{color:#596273}
</style></head><body><h1>{{ title }}</h1><p class="note">{{ subtitle }}</p>
{% for section in sections %}<h2>{{ section.title }}</h2>{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% if section.pictures %}<div class="pictures">{% for caption, picture in section.pictures %}<figure>{{ picture|safe }}
<figcaption>{{ caption }}</figcaption></figure>{% endfor %}</div>{% endif %}
{% if section.rows %}<div class="wide"><table><thead><tr>{% for column in section.columns %}<th{% if
section.rows[0][loop.index0]|is_number %} class="number"{% endif %}>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in section.rows %}<tr>{% for cell in row %}<td{% if cell|is_number %} class="number"{% elif
cell == "FLAGGED" %} class="flagged"{% endif %}>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>
{% endif %}
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
    """Whether a cell stands on the right: a number, ``under`` one, or one with an interval, ``0.91 (0.88 to 0.93)``."""
    return _NUMBER.fullmatch(text) is not None
