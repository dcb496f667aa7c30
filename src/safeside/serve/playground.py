"""The playground: one page in the package that speaks the public wire, and nothing from elsewhere.

Written by hand in plain HTML, CSS and JavaScript: small files that need no build, no dependency and no network.  The
page cannot do what another client could not.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

_PAGE = files("safeside.serve").joinpath("page")
_KINDS = {
    "style.css": "text/css; charset=utf-8",
    "client.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
router = APIRouter(prefix="/playground", include_in_schema=False)


@router.get("")
def page() -> Response:
    """The page."""
    return _sent("index.html", "text/html; charset=utf-8")


@router.get("/{name}")
def part(name: str) -> Response:
    """Its style and scripts; nothing else has a name here."""
    kind = _KINDS.get(name)
    return Response(status_code=404) if kind is None else _sent(name, kind)


def _sent(name: str, kind: str) -> Response:
    return Response(_PAGE.joinpath(name).read_bytes(), media_type=kind, headers=_HEADERS)
