"""What ``safeside patch`` does: read the rows, patch with a progress bar, save beside the version before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from safeside.adapters.adapter import Adapter
from safeside.artifact import base_of, find_adapter, load_adapter, read_checksum, read_config, read_provenance
from safeside.base.model import BUILTIN_NAME
from safeside.errors import InputError
from safeside.guards.versions import count_versions, output_of, save_patched, stored_dtype
from safeside.provenance import provenance
from safeside.tasks.learnt import are_learnt, load_learnt
from safeside.tasks.rows import load_examples
from safeside.terminal import note
from safeside.train.command import training_bars
from safeside.train.patch import PatchReport, PatchRows, patch_guard, require_guard
from safeside.train.patch_lesson import PatchSettings
from safeside.train.splits import find_data
from safeside.types import Example

DEMO_REPLAY, DEMO_ELSEWHERE = "demo:train.jsonl.gz", "demo:validation.jsonl.gz"  # learnt from, and not
PACKAGED = f"{BUILTIN_NAME}:harm"
_MEASURED = ("validation", "presets", "calibrated for ", "port held-out ", "port flagged ", "patch ")
"""What the names of facts begin with that are figures and promises of the weights as they were."""


@dataclass(frozen=True, slots=True)
class PatchFiles:
    """The files of a patch."""

    examples: Path
    """Labelled rows of the new family."""
    replay: Path | None = None
    """Rows like those that the guard learnt from, half of them to measure by; for ``builtin:harm`` and its copies the
    packaged demo rows, its training rows to replay and its validation rows to measure by."""
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
    loaded, guard = read_checksum(source), load_adapter(adapter_name, base)
    rows, n_bad = _read(files, guard, source)
    settings = PatchSettings(seed=seed)
    with training_bars(guard.name) as (report, _):
        done = patch_guard(base, guard, rows, settings, dtype=stored_dtype(source), report=report)
    facts = {**patch_facts(done, files, settings), **_known_facts(done, source)}
    for told in _notes_of(done, files):
        note(told)
    learnt = [*done.parts.examples, *done.parts.replayed]
    save_patched(guard, source, target, base, {**_kept_facts(source), **facts}, learnt=learnt, loaded=loaded)
    return {"adapter": str(target), "versions_before": count_versions(target), "bad_rows": n_bad, **facts}


def patch_facts(done: PatchReport, files: PatchFiles, settings: PatchSettings) -> dict[str, str]:
    """What provenance and card say of a patch; figures that have no row behind them are left out."""
    pairs = {
        "patch detected held-out": done.detected,
        "patch passed held-out": done.passed,
        "patch flagged elsewhere": done.flagged_elsewhere,
        "patch auroc elsewhere": done.auroc_elsewhere,
    }
    thresholds = {"patch threshold": done.threshold}
    thresholds |= {f"patch threshold, mode {mode}": both for mode, both in done.held.items()}
    return {
        "patch file": files.examples.name,
        "patch examples": str(len(done.parts.examples)),
        "patch held-out examples": str(len(done.parts.held_out)),
        "patch replay rows": str(len(done.parts.replayed)),
        "patch rows elsewhere": str(len(done.parts.elsewhere)),
        "patch windowed rows": str(done.n_windowed),
        "patch seconds": f"{done.seconds:.1f}",
        "patch seed": str(settings.seed),
        **({"patch dropped calibration": ", ".join(done.dropped)} if done.dropped else {}),
        **{name: f"{old:.4f} to {new:.4f}" for name, (old, new) in pairs.items() if math.isfinite(old + new)},
        **{name: " to ".join(map(_by_label, both)) for name, both in thresholds.items()},
    }


def _by_label(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _known_facts(done: PatchReport, source: Path) -> dict[str, str]:
    """How many of the measured rows the guard learnt from before: figures on those flatter it."""
    known = load_learnt(source)
    if known is None:
        return {}
    facts = {}
    for name, rows, option in (
        ("rows elsewhere", done.parts.elsewhere, "--replay"),
        ("held-out examples", done.parts.held_out, "--held-out"),
    ):
        n_known = sum(are_learnt(rows, known)) if rows else 0
        if n_known:
            note(
                f"{n_known} of {len(rows)} {name} are ones that the guard had learnt from before: the figures on them "
                f"flatter it. Give {option} rows that it has not seen for better ones."
            )
        facts[f"patch {name} known before"] = str(n_known)
    return facts


def _notes_of(done: PatchReport, files: PatchFiles) -> Iterator[str]:
    """What the user must be told beside the figures."""
    if done.dropped:
        yield (
            f"promises, presets and stop rules for mode {', '.join(done.dropped)} were dropped, for the scores are "
            "new; the thresholds in force were kept, or raised. Run safeside calibrate again."
        )
    if done.n_repeated:
        yield f"{done.n_repeated} rows to measure or replay have the text of an example or of one another: left out."
    if done.n_unused and files.replay is not None:
        n_used = len(done.parts.replayed) + len(done.parts.elsewhere)
        yield f"{n_used} rows of {files.replay.name} were replayed or measured; {done.n_unused} more were not used."
    if not done.parts.held_out:
        yield "no example was held out, so nothing says what was learnt; expected 16 to 64 of them, or --held-out FILE."


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
    replay, elsewhere = files.replay, None
    if replay is None:
        if not _is_packaged(source):
            raise InputError(
                f"{guard.name!r} keeps no rows that it learnt from, and without some it would forget. Give rows like "
                f"them with --replay FILE (only {PACKAGED} and its copies have packaged ones)."
            )
        replay, elsewhere = (find_data(name, Path()) for name in (DEMO_REPLAY, DEMO_ELSEWHERE))
    given = [files.examples, replay, files.held_out, elsewhere]
    found = [None if path is None else _rows(path, guard) for path in given]
    examples, replayed, held_out, measured = (None if rows is None else rows[0] for rows in found)
    assert examples is not None
    assert replayed is not None
    return PatchRows(examples, replayed, held_out, measured), sum(rows[1] for rows in found if rows is not None)


def _rows(path: Path, guard: Adapter) -> tuple[list[Example], int]:
    examples, bad = load_examples(path, guard.config.labels)
    for row in bad:
        note(f"{path.name}: line {row.line} was left out: {row.problem}")
    if not examples:
        raise InputError(f"{path} holds no usable row; expected labelled rows as JSON lines. Check the file.")
    return examples, len(bad)
