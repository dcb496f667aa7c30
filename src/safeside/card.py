"""The card of an adapter folder: its README, with what there is to know of the adapter."""

from __future__ import annotations

from collections.abc import Mapping

from safeside.adapters.adapter import Adapter
from safeside.adapters.config import Calibration
from safeside.adapters.sizing import adapter_matmuls


def _thresholds(calibration: Calibration) -> str:
    """A guard's own thresholds, and what they rest on."""
    values, rate = ", ".join(f"{value:.4f}" for value in calibration.threshold), calibration.false_positive_rate
    if rate is None:
        return f"{values}, held from before the weights changed (no promise)"
    by_label = " under each label" if len(calibration.threshold) > 1 else ""
    return f"{values} at a false-positive rate of {rate:.0%}{by_label} on validation data"


def card_of(adapter: Adapter, stamp: Mapping[str, str]) -> str:
    """The README of an adapter with the facts of its ``stamp``."""
    config = adapter.config
    use = (
        f'guards=[load_adapter("path/to/{config.name}", base)]'
        if config.role == "guard"
        else f'aligners=[load_adapter("path/to/{config.name}", base)], strength=1.0'
    )
    lines = [
        "---", "library_name: safeside", f"base_model: {config.base.name}", "tags: [safety, adapter]", "---", "",
        f"# {config.name}", "",
        f"A safeside {'guard' if config.role == 'guard' else 'aligner'} of kind `{config.kind}` for "
        f"`{config.base.name}` (fingerprint {config.base.fingerprint}): it reads layers "
        f"{', '.join(map(str, config.layers))} of the frozen base in the base's own forward pass.", "",
        "```python", "from safeside import attach, load_adapter, load_base",
        "", f'base = load_base("{config.base.name}")', f"with attach(base, {use}):", "    ...", "```", "",
        "| fact | value |", "|---|---|",
        f"| multiply-adds a token | {adapter_matmuls(adapter):,} |",
        *([f"| labels | {', '.join(config.labels)} |"] if config.labels else []),
        *([f"| thresholds | {_thresholds(config.calibration)} |"] if config.calibration else []),
        *(f"| mode {mode} | {found.summary} |" for mode, found in config.modes.items()),
        *(f"| {key} | {value} |" for key, value in sorted(stamp.items())),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
