"""Parts inside pages that are written by hand."""

from __future__ import annotations

import functools
import textwrap

from docgen.supported import refused
from safeside import Base, load_base

WIDTH = 120


def builtin_facts() -> str:
    """One sentence on the built-in base."""
    base = built_in_base()
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    return _wrapped(
        f"The built-in base has {parameters / 1e6:.1f} million parameters ({base.n_layers} layers of width "
        f"{base.d_model}) and a context of {base.max_tokens} tokens."
    )


def refused_facts() -> str:
    """One sentence on what is refused."""
    return _wrapped(f"Refused by name, each with a test: {'; '.join(refused())}.")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


@functools.cache
def built_in_base() -> Base:
    """The built-in base, loaded once."""
    return load_base("builtin")
