"""What ``safeside port`` does: read the text, port with a progress bar, save."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from safeside.adapters.adapter import Adapter
from safeside.adapters.config import LADDERS
from safeside.adapters.sizing import flops_share
from safeside.artifact import base_of, find_adapter, load_adapter, read_config, require_new, save_adapter
from safeside.base.model import Base, load_base
from safeside.errors import InputError
from safeside.guards.versions import stored_dtype
from safeside.tasks.learnt import save_learnt
from safeside.tasks.rows import load_examples
from safeside.terminal import note
from safeside.train.command import training_bars
from safeside.train.port import Port, best_method, port_adapter
from safeside.train.port_text import METHODS, Method, PortSettings

_MUCH_MORE = 1.25


@dataclass(frozen=True, slots=True)
class PortOptions:
    """The options of ``safeside port``."""

    to: str
    """The new base."""
    text: Path
    """Rows without labels."""
    output: Path | None = None
    """A new folder; ``NAME-on-BASE``, the new base's last name, unless given."""
    method: str | None = None
    """One of METHODS; the best that the adapter's kind allows, unless given."""
    base: str | None = None
    """The old base; the one that the adapter names, unless given."""
    size: float | None = None
    """Most of the new base's compute (0.01 is 1%), with ``distill``; the old width unless given."""
    seed: int = 0
    """Of the first weights and of every draw."""


def port_command(adapter_name: str, options: PortOptions) -> dict[str, object]:
    """Port an adapter and save it; returns what the card says of it."""
    source = find_adapter(adapter_name)
    output = require_new(options.output or Path(f"{read_config(source).name}-on-{Path(options.to).resolve().name}"))
    examples, bad = load_examples(options.text, ())
    for row in bad:
        note(f"{options.text.name}: line {row.line} was left out: {row.problem}")
    if not examples:
        raise InputError(f"{options.text} holds no usable row; expected rows as JSON lines. Check the file.")
    old_base, base = base_of(adapter_name, options.base), load_base(options.to)
    old = load_adapter(adapter_name, old_base)
    method = _method(options.method) or ("distill" if options.size is not None else best_method(old))
    settings = PortSettings(method=method, size=options.size, seed=options.seed)
    with training_bars(old.name) as (report, _):
        done = port_adapter((old_base, old), base, examples, settings, dtype=stored_dtype(source), report=report)
    facts = port_facts(done, settings, options) | _shares((old_base, old), (base, done.adapter), options.size)
    if done.n_left_out:
        note(
            f"{done.n_left_out} rows of {options.text.name} were left out: they hold no text, a base refuses them or "
            "has no room for them and their answer, they are not traced to characters, or they got no answer"
        )
    if done.warning:
        note(f"Warning: {done.warning}")
    if old.config.modes:
        note(
            f"promises, presets and stop rules for mode {', '.join(old.config.modes)} stay behind, for the scores are "
            "new; thresholds flag no larger share than before of the text that set them. Run safeside calibrate on the "
            "new base."
        )
    came_from = {"ported from": f"{old.name} on {old_base.name} ({old_base.fingerprint})"}
    save_adapter(done.adapter, output, base, {**came_from, **facts}, dtype=stored_dtype(source))
    if old.config.role == "guard":
        save_learnt(output, examples, before=source)
    return {"adapter": str(output), **came_from, **facts, "bad_rows": len(bad)}


def _method(name: str | None) -> Method | None:
    for method in METHODS:
        if name == method:
            return method
    if name is None:
        return None
    raise InputError(f"There is no method {name!r}; expected one of {', '.join(METHODS)}.")


def _shares(old: tuple[Base, Adapter], new: tuple[Base, Adapter], size: float | None) -> dict[str, str]:
    """What provenance and card say of the cost; more than was asked for, or much more than before, is told of."""
    before, after = flops_share(*old), flops_share(*new)
    if size is not None and after > size:
        note(f"Warning: it takes {after:.2%} of the new base's compute, not {size:.2%}: none is narrower.")
    elif size is None and after > _MUCH_MORE * before:
        smaller = "port with --method distill --size 0.01" if new[1].config.kind in LADDERS else "train one there"
        note(
            f"Warning: it takes {after:.2%} of the new base's compute; the old one takes {before:.2%} of its own. For "
            f"a smaller one {smaller}."
        )
    return {"port share of compute": f"{after:.4%} of the new base; the old one {before:.4%} of its own"}


def port_facts(done: Port, settings: PortSettings, options: PortOptions) -> dict[str, str]:
    """What provenance and card say of a port."""
    what = "divergence (nats a token)" if done.adapter.config.role == "align" else "correlation"
    facts = {
        "port method": settings.method,
        "port text": options.text.name,
        "port rows": str(done.n_rows),
        "port rows left out": str(done.n_left_out),
        "port paired positions": str(done.n_pairs),
        "port held-out rows": str(done.n_measured),
        f"port held-out {what}": f"{done.agreement:.4f}",
        "port seconds": f"{done.seconds:.1f}",
        "port seed": str(settings.seed),
    }
    if math.isfinite(done.flagged[0]):
        facts["port flagged held-out"] = f"{done.flagged[0]:.4f} by the old, {done.flagged[1]:.4f} by the new"
    if done.warning:
        facts["port held-out warning"] = done.warning
    return facts
