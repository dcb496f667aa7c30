"""What ``safeside patch`` does: read the rows, patch with a progress bar, save beside the version before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from safeside.adapters.adapter import Adapter
from safeside.artifact import base_of, find_adapter, load_adapter, read_config, read_provenance
from safeside.base.model import BUILTIN_NAME
from safeside.errors import InputError
from safeside.guards.versions import count_versions, output_of, save_patched, stored_dtype
from safeside.provenance import provenance
from safeside.tasks.learnt import load_learnt
from safeside.tasks.rows import load_examples
from safeside.terminal import note
from safeside.train.command import training_bars
from safeside.train.patch import PatchReport, PatchRows, PatchSettings, patch_guard, require_guard
from safeside.train.splits import find_data
from safeside.types import Example

DEMO_REPLAY = "demo:train.jsonl.gz"
PACKAGED = f"{BUILTIN_NAME}:harm"
_MEASURED = ("validation", "presets", "calibrated for ", "port held-out ", "port flagged ", "patch ")
"""What the names of facts begin with that are figures and promises of the weights as they were."""


@dataclass(frozen=True, slots=True)
class PatchFiles:
    """The files of a patch."""

    examples: Path
    """Labelled rows of the new family."""
    replay: Path | None = None
    """Rows like those that the guard learnt from; the packaged demo rows for ``builtin:harm`` and its copies."""
    held_out: Path | None = None
    """More of the family, only measured; a quarter of the examples unless given."""


def patch_command(
    adapter_name: str, files: PatchFiles, output: Path | None, base_name: str | None, seed: int
) -> dict[str, object]:
    """Patch an adapter and save it to ``output`` (its own folder unless given); returns what the card says of it."""
    source = find_adapter(adapter_name)
    require_guard(read_config(source))
    target = output_of(adapter_name, source, output)
    base = base_of(adapter_name, base_name)
    guard = load_adapter(adapter_name, base)
    rows, n_bad = _read(files, guard, source)
    settings = PatchSettings(seed=seed)
    with training_bars(guard.name) as (report, _):
        done = patch_guard(base, guard, rows, settings, dtype=stored_dtype(source), report=report)
    facts = patch_facts(done, files, settings)
    if done.dropped:
        note(
            f"promises, presets and stop rules for mode {', '.join(done.dropped)} were dropped, for the scores are "
            "new; the thresholds in force were kept, or raised. Run safeside calibrate again."
        )
    learnt = [*rows.examples, *rows.replay]
    save_patched(guard, source, target, base, {**_kept_facts(source), **facts}, learnt=learnt)
    return {"adapter": str(target), "versions_before": count_versions(target), "bad_rows": n_bad, **facts}


def patch_facts(done: PatchReport, files: PatchFiles, settings: PatchSettings) -> dict[str, str]:
    """What provenance and card say of a patch; figures that have no row behind them are left out."""
    pairs = {
        "patch detected held-out": done.detected,
        "patch passed held-out": done.passed,
        "patch flagged elsewhere": done.flagged_elsewhere,
        "patch auroc elsewhere": done.auroc_elsewhere,
        "patch threshold": (max(done.threshold[0]), max(done.threshold[1])),
        **{f"patch threshold, mode {mode}": (max(old), max(new)) for mode, (old, new) in done.held.items()},
    }
    return {
        "patch file": files.examples.name,
        "patch examples": str(done.n_examples),
        "patch held-out examples": str(done.n_held_out),
        "patch replay rows": str(done.n_replay),
        "patch windowed rows": str(done.n_windowed),
        "patch seconds": f"{done.seconds:.1f}",
        "patch seed": str(settings.seed),
        **({"patch dropped calibration": ", ".join(done.dropped)} if done.dropped else {}),
        **{name: f"{old:.4f} to {new:.4f}" for name, (old, new) in pairs.items() if math.isfinite(old + new)},
    }


def _kept_facts(source: Path) -> dict[str, str]:
    """What the old provenance says of the training, without what is stamped anew or was of the old weights."""
    facts = read_provenance(source)
    return {key: value for key, value in facts.items() if key not in provenance() and not key.startswith(_MEASURED)}


def _is_packaged(source: Path) -> bool:
    """Whether the guard learnt from all that ``builtin:harm`` did: that guard, or one made from it."""
    packaged, own = load_learnt(find_adapter(PACKAGED)), load_learnt(source)
    return packaged is not None and own is not None and bool(np.isin(packaged, own).all())


def _read(files: PatchFiles, guard: Adapter, source: Path) -> tuple[PatchRows, int]:
    """The rows of all files, and how many lines could not be used."""
    replay = files.replay
    if replay is None:
        if not _is_packaged(source):
            raise InputError(
                f"{guard.name!r} keeps no rows that it learnt from, and without some it would forget. Give rows like "
                f"them with --replay FILE (only {PACKAGED} and its copies have packaged ones)."
            )
        replay = find_data(DEMO_REPLAY, Path())
    examples, n_bad = _rows(files.examples, guard)
    replayed, n_bad_replay = _rows(replay, guard)
    held_out, n_bad_held_out = (None, 0) if files.held_out is None else _rows(files.held_out, guard)
    return PatchRows(examples, replayed, held_out), n_bad + n_bad_replay + n_bad_held_out


def _rows(path: Path, guard: Adapter) -> tuple[list[Example], int]:
    examples, bad = load_examples(path, guard.config.labels)
    for row in bad:
        note(f"{path.name}: line {row.line} was left out: {row.problem}")
    if not examples:
        raise InputError(f"{path} holds no usable row; expected labelled rows as JSON lines. Check the file.")
    return examples, len(bad)
