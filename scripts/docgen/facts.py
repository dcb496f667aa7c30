"""Parts inside pages that are written by hand."""

from __future__ import annotations

import functools

from docgen.supported import refused_line
from safeside import Base, load_base


def builtin_facts() -> str:
    """One sentence on the built-in base."""
    base = built_in_base()
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    return (
        f"The built-in base has {parameters / 1e6:.1f} million parameters ({base.n_layers} layers of width "
        f"{base.d_model}) and a context of {base.max_tokens} tokens."
    )


def refused_facts() -> str:
    """One sentence on what is refused."""
    return refused_line()


@functools.cache
def built_in_base() -> Base:
    """The built-in base, loaded once."""
    return load_base("builtin")
