"""A patch teaches a family from a few examples, keeps the other scores, and leaves the base as it was."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from safeside import Adapter, Base, Message, load_adapter, save_adapter
from safeside.adapters.config import Calibration, ModeCalibration, Promise
from safeside.artifact import CARD_FILE, PROVENANCE_FILE, copy_adapter, find_adapter, read_config
from safeside.errors import InputError
from safeside.guards.score import judge, score_conversations
from safeside.guards.versions import roll_back
from safeside.stopping import kept_rule
from safeside.tasks.learnt import are_learnt, load_learnt, save_learnt
from safeside.train.patch import PatchReport, PatchRows, patch_guard
from safeside.train.patch_command import PatchFiles, patch_command
from safeside.train.patch_lesson import Lesson, Parts, PatchSettings, make_pool
from safeside.train.recipe import Recipe
from safeside.train.run import run_recipe
from safeside.types import Example
from twin import hash_of

WORDS = ("cat", "mat", "sat", "then", "they", "said", "how", "be")
SAME_SCORE = 1e-5  # float32 sums in another order
QUICK = PatchSettings(steps=60, replay_limit=60)


def rows(n: int, seed: int, word: str = "hat", share: float = 0.5, suffix: str = "") -> list[Example]:
    """Texts of a few words; those with ``word`` in them are harmful.  ``suffix`` is put behind each."""
    generator = random.Random(seed)
    result = []
    for _ in range(n):
        words = generator.choices(WORDS, k=generator.randint(2, 6))
        label = float(generator.random() < share)
        if label:
            words.insert(generator.randrange(len(words)), word)
        result.append(Example((Message("user", " ".join(words) + suffix),), (label,)))
    return result


def family(n: int, seed: int) -> list[Example]:
    """A family that the guard has never seen: every text with these symbols in it is harmful."""
    return rows(n, seed, "#%*!", share=1.0)


def write(path: Path, examples: list[Example]) -> Path:
    lines = [{"prompt": row.messages[0].content, "label": int(row.labels[0])} for row in examples]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's patches are about what it writes, not about what is learnt."""
    monkeypatch.setattr("safeside.train.patch_command.PatchSettings", partial(PatchSettings, steps=4))


@pytest.fixture(scope="module")
def trained(session_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guard of the tiny base that knows that hats are harmful."""
    root = tmp_path_factory.mktemp("patch")
    write(root / "train.jsonl", rows(240, 1))
    write(root / "validation.jsonl", rows(120, 2))
    values = {
        "name": "harm",
        "output": "unused",
        "data": {"train": ["train.jsonl"], "validation": ["validation.jsonl"]},
        "adapter": {"kind": "lst", "reduction": 2},
        "training": {"epochs": 6, "batch_size": 16, "learning_rate": 0.01, "patience": 6},
    }
    return run_recipe(Recipe.model_validate(values), data_root=root, output=root / "harm", base=session_base).folder


def scores(base: Base, guard: Adapter, some: list[Example]) -> np.ndarray:
    return np.array([row.by_guard["harm"][0] for row in score_conversations(base, [guard], [r.messages for r in some])])


@pytest.fixture(scope="module")
def patched(session_base: Base, trained: Path) -> tuple[Adapter, PatchReport]:
    guard = load_adapter(trained, session_base)
    return guard, patch_guard(session_base, guard, PatchRows(family(16, 3), rows(200, 4), family(40, 5)), QUICK)


def test_the_family_is_learnt_and_the_rest_is_kept(patched: tuple[Adapter, PatchReport]) -> None:
    _, report = patched
    assert report.detected[0] < 0.6  # symbols that it never saw
    assert report.detected[1] > 0.9
    assert report.auroc_elsewhere[0] > 0.9
    assert report.flagged_elsewhere[1] <= report.flagged_elsewhere[0]
    assert [len(part) for part in report.parts] == [16, 40, 60, 60]
    n_texts = len({row.messages[0].content for row in rows(200, 4)})
    assert (report.n_unused, report.n_repeated) == (n_texts - 120, 200 - n_texts)


def test_over_seeds_little_changes_elsewhere(
    tiny_base: Base, trained: Path, patched: tuple[Adapter, PatchReport]
) -> None:
    """Of one seed's 60 rows it is from 0.00 to -0.06, as the CPU rounds."""
    changes = [patched[1].elsewhere_change]
    for seed in (1, 2):
        guard = load_adapter(trained, tiny_base)
        given = PatchRows(family(16, 3), rows(200, 4), family(40, 5))
        changes.append(patch_guard(tiny_base, guard, given, replace(QUICK, seed=seed)).elsewhere_change)
    assert np.mean(changes) > -0.03


def test_the_report_is_what_scoring_says(tiny_base: Base, trained: Path, patched: tuple[Adapter, PatchReport]) -> None:
    guard, report = patched
    held_out = family(40, 5)
    old = load_adapter(trained, tiny_base)
    assert report.detected[0] == (scores(tiny_base, old, held_out) >= old.thresholds[0]).mean()
    assert report.detected[1] == (scores(tiny_base, guard, held_out) >= guard.thresholds[0]).mean()
    assert report.threshold == (old.thresholds, guard.thresholds)
    assert guard.thresholds >= old.thresholds


def test_without_replay_the_guard_forgets(tiny_base: Base, trained: Path, patched: tuple[Adapter, PatchReport]) -> None:
    """What replay is for: with its weight at zero other scores move."""
    without = load_adapter(trained, tiny_base)
    before = scores(tiny_base, without, rows(60, 9))
    patch_guard(tiny_base, without, PatchRows(family(16, 3), rows(200, 4)), replace(QUICK, replay_weight=0.0))
    moved = [np.abs(scores(tiny_base, guard, rows(60, 9)) - before).mean() for guard in (without, patched[0])]
    assert moved[0] > 2 * moved[1]


def test_a_pull_keeps_the_weights_near(tiny_base: Base, trained: Path) -> None:
    distances = []
    for pull in (0.0, 10.0):
        guard, old = load_adapter(trained, tiny_base), load_adapter(trained, tiny_base)
        patch_guard(tiny_base, guard, PatchRows(family(16, 3), rows(80, 4)), replace(QUICK, pull=pull, steps=8))
        pairs = zip(guard.parameters(), old.parameters(), strict=True)
        distances.append(sum(float((new - was).square().sum()) for new, was in pairs))
    assert distances[1] < distances[0] / 4


def test_the_base_is_untouched_and_the_same_seed_gives_the_same_guard(tiny_base: Base, trained: Path) -> None:
    before = hash_of(tiny_base.model)
    guards = [load_adapter(trained, tiny_base) for _ in range(2)]
    for guard in guards:
        patch_guard(tiny_base, guard, PatchRows(family(8, 3), rows(60, 4)), replace(QUICK, steps=8))
    assert all(torch.equal(*pair) for pair in zip(*(guard.parameters() for guard in guards), strict=True))
    assert hash_of(tiny_base.model) == before


def test_a_quarter_of_each_class_is_held_out(tiny_base: Base, trained: Path) -> None:
    guard = load_adapter(trained, tiny_base)
    mixed = [*family(8, 3), *rows(8, 6, share=0.0, suffix=" #%*!")]
    report = patch_guard(tiny_base, guard, PatchRows(mixed, rows(60, 4)), replace(QUICK, steps=8))
    assert [len(report.parts.examples), len(report.parts.held_out)] == [12, 4]
    assert np.isfinite([*report.detected, *report.passed]).all()


def test_every_example_is_learnt_from_as_often_as_any_other(
    tiny_base: Base, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: with 240 of them 60 steps of 8 would leave some out, so there are more."""
    seen: Counter[int] = Counter()
    learnt = Lesson._learnt

    def spied(lesson: Lesson, some: list[int]) -> torch.Tensor:
        seen.update(row for row in some if row in lesson.pool.examples)
        return learnt(lesson, some)

    monkeypatch.setattr(Lesson, "_learnt", spied)
    mixed = [*family(200, 3), *rows(40, 6, share=0.0, suffix=" #%*!")]
    some = PatchRows(mixed, rows(20, 4), ())
    patch_guard(tiny_base, load_adapter(trained, tiny_base), some, replace(QUICK, replay_size=1))
    assert set(seen) == set(range(240))
    assert set(seen.values()) == {4}


def test_other_scores_are_measured_on_rows_of_ones_own(tiny_base: Base, trained: Path) -> None:
    guard, elsewhere = load_adapter(trained, tiny_base), rows(30, 11)
    report = patch_guard(tiny_base, guard, PatchRows(family(8, 3), rows(80, 4), (), elsewhere), replace(QUICK, steps=8))
    assert sorted(map(id, report.parts.elsewhere)) == sorted(map(id, elsewhere))
    assert len(report.parts.replayed) == 60
    labels = np.array([row.labels[0] for row in elsewhere])
    assert report.auroc_elsewhere[1] == pytest.approx(roc_auc_score(labels, scores(tiny_base, guard, elsewhere)))


def test_rows_that_are_examples_too_are_not_measured_or_replayed(tiny_base: Base, trained: Path) -> None:
    new, replay = family(8, 3), rows(40, 4, suffix=" x")
    replay = list({row.messages[0].content: row for row in replay}.values())
    shouted = [replace(new[0], messages=(Message("user", new[0].messages[0].content.upper()),))]
    report = patch_guard(
        tiny_base,
        load_adapter(trained, tiny_base),
        PatchRows(new, [*replay, new[1]], [*family(6, 5), *shouted], [*rows(9, 11), new[2], replay[0]]),
        replace(QUICK, steps=4),
    )
    assert report.n_repeated == 4
    assert [len(part) for part in report.parts] == [8, 6, len(replay), 9]


def test_what_a_patch_is_measured_by_is_not_replayed(tiny_base: Base, trained: Path) -> None:
    new, replay = family(16, 3), rows(40, 4, suffix=" x")
    guard = load_adapter(trained, tiny_base)
    report = patch_guard(tiny_base, guard, PatchRows(new, [*replay, *new]), replace(QUICK, steps=4))
    held_out, kept = ({row.messages for row in part} for part in (report.parts.held_out, report.parts.replayed))
    assert len(held_out) == 4
    assert not held_out & (kept | {row.messages for row in report.parts.elsewhere})


def test_a_text_that_comes_often_is_not_both_replayed_and_measured(tiny_base: Base, trained: Path) -> None:
    often = rows(12, 4, suffix=" x") * 10
    report = patch_guard(tiny_base, load_adapter(trained, tiny_base), PatchRows(family(8, 3), often), QUICK)
    replayed, elsewhere = (
        {row.messages[0].content for row in some} for some in (report.parts.replayed, report.parts.elsewhere)
    )
    assert not replayed & elsewhere
    assert report.n_repeated == len(often) - len(replayed) - len(elsewhere)


def test_a_long_row_is_learnt_from_by_the_window_that_counts(tiny_base: Base, trained: Path, tmp_path: Path) -> None:
    """The same loss and gradient as of all its windows, which is the slow way."""
    long = Example((Message("user", "the cat sat " * 300 + "#%*! hat"),), (1.0,))
    guard = load_adapter(trained, tiny_base).float().requires_grad_(True)
    pool = make_pool(tiny_base, guard, Parts([long, *family(3, 3)], [], rows(8, 4), []), tmp_path)
    lesson = Lesson(tiny_base, guard, pool, QUICK)
    assert len(pool.of_row[0]) > 3
    assert [len(some) for some in lesson.counting] == [1] * 12
    gradients = []
    for fast in (True, False):
        lesson.counting = lesson.counting if fast else [list(some) for some in pool.of_row]
        loss = lesson._learnt(range(4)).sum()
        gradients.append(torch.autograd.grad(loss, [*guard.head.parameters()]))
    for quick, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(quick, slow)
    torch.testing.assert_close(lesson._learnt(range(12)).detach(), lesson.targets)


def test_each_label_is_learnt_by_its_own_windows(
    tiny_base: Base, random_guard: Callable[..., Adapter], tmp_path: Path
) -> None:
    """A label that goes by the lowest window, beside one that goes by the highest: as two guards would be read."""
    labels = ("harm", "unsupported")
    long = [
        Example((Message("user", f"{words} " * 150 + "#%*!"), Message("assistant", "it sat")), (1.0, 0.0))
        for words in ("the cat", "on the mat")
    ]
    short = [Example(row.messages, (*row.labels, 0.0)) for row in rows(8, 4)]
    lessons = [
        Lesson(
            tiny_base,
            guard := random_guard(tiny_base, seed=3, labels=labels, windows=ways).requires_grad_(True),
            make_pool(tiny_base, guard, Parts(long, [], short, []), tmp_path),
            QUICK,
        )
        for ways in (("max", "min"), "max", "min")
    ]
    mixed, highest, lowest = (lesson.targets for lesson in lessons)
    torch.testing.assert_close(mixed[:, 0], highest[:, 0])
    torch.testing.assert_close(mixed[:, 1], lowest[:, 1])
    assert not torch.allclose(mixed[:2, 1], highest[:2, 1])
    torch.testing.assert_close(lessons[0]._learnt(range(10)).detach(), mixed)
    assert all(len(some) == 2 for some in lessons[0].counting[:2])
    assert all(len(some) == 1 for some in lessons[0].counting[2:])


def test_long_examples_are_read_in_windows(tiny_base: Base, trained: Path) -> None:
    long, other = (Example((Message("user", words * 150 + "#%*!"),), (1.0,)) for words in ("the cat ", "the mat "))
    guard = load_adapter(trained, tiny_base)
    report = patch_guard(tiny_base, guard, PatchRows([long], rows(40, 4), [other]), replace(QUICK, steps=20))
    assert report.n_windowed == 2
    found = scores(tiny_base, guard, [other])[0] >= guard.thresholds[0]
    assert report.detected[1] == float(found)


def test_bfloat16_weights_are_measured_as_stored(tiny_base: Base, trained: Path) -> None:
    guard = load_adapter(trained, tiny_base)
    patch_guard(tiny_base, guard, PatchRows(family(8, 3), rows(60, 4)), replace(QUICK, steps=8), dtype=torch.bfloat16)
    assert all(torch.equal(value, value.bfloat16().float()) for value in guard.parameters())
    assert not any(parameter.requires_grad for parameter in guard.parameters())


def test_a_threshold_rises_only_where_more_would_be_flagged(tiny_base: Base, trained: Path) -> None:
    """A guard taught that everything is harmful: the threshold follows the harmless replay rows."""
    guard = load_adapter(trained, tiny_base)
    all_harmful = [replace(row, labels=(1.0,)) for row in rows(64, 7)]
    report = patch_guard(
        tiny_base, guard, PatchRows(all_harmful, rows(80, 4)), replace(QUICK, steps=30, replay_weight=0.0)
    )
    assert report.threshold[1] > report.threshold[0]
    assert report.flagged_elsewhere[1] <= report.flagged_elsewhere[0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("place", ["examples", "held_out"])
def test_a_text_of_the_family_with_two_labels_is_refused(tiny_base: Base, trained: Path, place: str, seed: int) -> None:
    some = {"examples": rows(16, 7), "replay": rows(40, 4), "elsewhere": rows(8, 5)}
    first = some["examples"][0]
    other = replace(first, labels=(1.0 - first.labels[0],), line=99)
    given = PatchRows(**{**some, place: [*some.get(place, []), other]})
    with pytest.raises(InputError, match=rf"lines {first.line} and 99 of their files have the same text, case"):
        patch_guard(tiny_base, load_adapter(trained, tiny_base), given, replace(QUICK, seed=seed))


def test_rows_that_cannot_teach_are_refused(
    tiny_base: Base, trained: Path, random_aligner: Callable[..., Adapter]
) -> None:
    guard = load_adapter(trained, tiny_base)
    harmless = rows(40, 4, share=0.0)
    for examples, replay, words in (
        (harmless, rows(40, 9, share=0.0, suffix=" x"), "are all harmless"),
        (family(4, 1), family(8, 2), "hold no harmless one"),
        (family(4, 1), [], "hold no harmless one"),
        ([], harmless, "no example to learn from"),
    ):
        with pytest.raises(InputError, match=words):
            patch_guard(tiny_base, guard, PatchRows(examples, replay), QUICK)
    with pytest.raises(InputError, match="is an aligner"):
        patch_guard(tiny_base, random_aligner(tiny_base), PatchRows(family(4, 1), harmless), QUICK)


def test_an_uncalibrated_guard_with_two_labels_is_patched(
    tiny_base: Base, random_guard: Callable[..., Adapter]
) -> None:
    guard = random_guard(tiny_base, labels=("a", "b"))
    both = [replace(row, labels=(row.labels[0], 0.0)) for row in family(8, 1)]
    replay = [replace(row, labels=(0.0, row.labels[0])) for row in rows(60, 2)]
    report = patch_guard(tiny_base, guard, PatchRows(both, replay), replace(QUICK, steps=8))
    assert isinstance(guard.config.calibration, Calibration)
    assert len(report.threshold[1]) == 2
    assert np.isfinite(report.auroc_elsewhere).all()  # label a has one class there and is left out


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_card_tells_of_the_patch_and_rollback_undoes_it(tiny_base: Base, trained: Path, tmp_path: Path) -> None:
    measured = {
        "validation auroc": "0.9",
        "validation, all": "fpr 0.05",
        "presets": "promised",
        "calibrated for x": "5%",
    }
    facts = {"train_rows": "240", **measured, "port held-out correlation": "0.9", "port flagged held-out": "0.1"}
    folder = save_adapter(load_adapter(trained, tiny_base), tmp_path / "harm", tiny_base, facts)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    files = PatchFiles(
        write(tmp_path / "new.jsonl", family(16, 3)),
        write(tmp_path / "replay.jsonl", rows(80, 4)),
        write(tmp_path / "more.jsonl", family(20, 5)),
    )
    summary = patch_command(str(folder), files, None, None, 0)
    stamp = json.loads((folder / PROVENANCE_FILE).read_text())
    assert summary["versions_before"] == 1
    assert stamp["patch file"] == "new.jsonl"
    assert (stamp["patch examples"], stamp["patch held-out examples"], stamp["train_rows"]) == ("16", "20", "240")
    assert stamp["patch detected held-out"] == summary["patch detected held-out"]
    card = (folder / CARD_FILE).read_text()
    assert "| patch auroc elsewhere |" in card
    assert stamp.keys().isdisjoint(facts.keys() - {"train_rows"})  # figures of the weights before
    assert "at a false-positive rate of" in before[CARD_FILE].decode()
    assert "at a false-positive rate of" not in card
    (threshold,) = load_adapter(folder, tiny_base).thresholds
    assert f"| thresholds | {threshold:.4f}, held from before the weights changed (no promise) |" in card
    assert "patch passed held-out" not in stamp  # no harmless row there
    roll_back(folder, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_flatters_or_was_not_used_is_told(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what was learnt joins the record: rows beyond the limit, and measured ones, may still be promised by."""
    monkeypatch.setattr("safeside.train.patch_command.PatchSettings", partial(PatchSettings, steps=4, replay_limit=20))
    known = rows(240, 1)  # that the guard learnt from
    files = PatchFiles(write(tmp_path / "new.jsonl", family(3, 3)), write(tmp_path / "known.jsonl", known))
    summary = patch_command(str(trained), files, tmp_path / "out", None, 0)
    assert summary["patch rows elsewhere known before"] == summary["patch rows elsewhere"] == "20"
    told = " ".join(capsys.readouterr().err.split())
    assert "20 of 20 rows elsewhere are ones that the guard had learnt from" in told
    n_unused = len({row.messages[0].content for row in known}) - 40
    assert f"40 rows of known.jsonl were replayed or measured; {n_unused} more were not used" in told
    assert "no example was held out" in told
    hashes = load_learnt(tmp_path / "out")
    before = load_learnt(trained)
    assert hashes is not None
    assert before is not None
    assert len(hashes) == len(before) + 3


def test_held_out_rows_of_a_patch_before_are_told(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replay, first = write(tmp_path / "replay.jsonl", rows(40, 4)), family(8, 3)
    patch_command(str(trained), PatchFiles(write(tmp_path / "1.jsonl", first), replay), tmp_path / "one", None, 0)
    more = write(tmp_path / "more.jsonl", [*first[:4], *family(4, 9)])
    files = PatchFiles(write(tmp_path / "2.jsonl", family(8, 5)), replay, more)
    learnt = load_learnt(tmp_path / "one")
    assert learnt is not None
    n_known = sum(are_learnt([*first[:4], *family(4, 9)], learnt))
    assert n_known > 1
    summary = patch_command(str(tmp_path / "one"), files, None, None, 0)
    assert summary["patch held-out examples known before"] == str(n_known)
    assert f"{n_known} of 8 held-out examples are ones that the guard had learnt from" in " ".join(
        capsys.readouterr().err.split()
    )


def test_replay_rows_are_asked_for_and_bad_lines_counted(trained: Path, tmp_path: Path) -> None:
    new = write(tmp_path / "new.jsonl", family(8, 3))
    with pytest.raises(InputError, match="Give rows like them with --replay"):
        patch_command(str(trained), PatchFiles(new), tmp_path / "out", None, 0)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("nothing\n")
    with pytest.raises(InputError, match="holds no usable row"):
        patch_command(str(trained), PatchFiles(empty, new), tmp_path / "out", None, 0)
    new.write_text(new.read_text() + "\nbroken\n")
    replay = write(tmp_path / "replay.jsonl", rows(40, 4))
    assert patch_command(str(trained), PatchFiles(new, replay), tmp_path / "out", None, 0)["bad_rows"] == 1


def test_packaged_rows_are_replayed_to_what_learnt_from_them(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not to whatever has the name and the base of ``builtin:harm``."""
    new, copy = write(tmp_path / "new.jsonl", family(8, 3)), tmp_path / "copy"
    config = read_config(find_adapter("builtin:harm")).model_copy(update={"name": "mine"})
    copy_adapter(find_adapter("builtin:harm"), copy, config, {})
    summary = patch_command(str(copy), PatchFiles(new), None, None, 0)
    assert summary["versions_before"] == 1
    assert summary["patch rows elsewhere known before"] == "0"
    assert "were not used" not in capsys.readouterr().err
    assert patch_command(str(copy), PatchFiles(new), None, None, 0)["versions_before"] == 2
    stranger = shutil.copytree(find_adapter("builtin:harm"), tmp_path / "stranger")
    save_learnt(stranger, family(8, 1))
    with pytest.raises(InputError, match=r"'harm' keeps no rows .* \(only builtin:harm and its copies"):
        patch_command(str(stranger), PatchFiles(new), None, None, 0)


def test_an_aligner_is_refused_before_rows_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'refuse' is an aligner; only guards are patched"):
        patch_command("builtin:refuse", PatchFiles(tmp_path / "none.jsonl"), tmp_path / "out", None, 0)


def test_a_calibration_that_no_longer_holds_is_told(
    tiny_base: Base, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A patch changes the scores, so promises made on the old ones go, and nobody is left to believe in them.

    The thresholds that judged still judge, and are what the report measures by.
    """
    guard = load_adapter(trained, tiny_base)
    promise = Promise(threshold=(0.9,), false_positive_rate=0.05)
    guard.set_mode("prompt", ModeCalibration(n_harmless=60, promise=promise, presets={"strict": promise}))
    guard.set_mode("answer", ModeCalibration(n_harmless=60, presets={"strict": promise}))
    guard.set_mode("stream", ModeCalibration(n_harmless=60, promise=promise, n_consecutive=2))
    folder = save_adapter(guard, tmp_path / "harm", tiny_base)
    files = PatchFiles(write(tmp_path / "new.jsonl", family(8, 3)), write(tmp_path / "replay.jsonl", rows(40, 4)))
    summary = patch_command(str(folder), files, None, None, 0)
    assert summary["patch dropped calibration"] == "answer, prompt, stream"
    told = " ".join(capsys.readouterr().err.split())
    assert "promises, presets and stop rules for mode answer, prompt, stream were dropped" in told
    after = load_adapter(folder, tiny_base)
    assert set(after.config.modes) == {"prompt"}
    (held,) = after.thresholds_in("prompt")
    assert held >= 0.9
    assert after.thresholds_in("answer") == after.thresholds
    assert summary["patch threshold, mode prompt"] == f"0.9000 to {held:.4f}"
    ((verdict,),) = judge(tiny_base, [after], [[Message("user", "the cat")]])
    assert verdict.threshold == held
    assert "what was promised for mode 'prompt' was of the scores before a patch" in verdict.reason
    assert kept_rule(after) is None


def test_a_promise_in_force_is_told_as_gone_though_its_threshold_was_the_guards_own(
    tiny_base: Base, trained: Path
) -> None:
    guard = load_adapter(trained, tiny_base)
    promise = Promise(threshold=guard.thresholds, false_positive_rate=0.05)
    guard.set_mode("prompt", ModeCalibration(n_harmless=60, promise=promise))
    patch_guard(tiny_base, guard, PatchRows(family(8, 3), rows(40, 4)), replace(QUICK, steps=4))
    assert "what was promised for mode 'prompt' was of the scores before a patch" in guard.fallback_note("prompt")
    assert guard.fallback_note("answer") == "not calibrated for mode 'answer': the guard's own threshold is used"


def test_a_patch_is_measured_by_the_thresholds_in_force(tiny_base: Base, trained: Path) -> None:
    guard = load_adapter(trained, tiny_base)
    held_out, replay = family(40, 5), rows(80, 4)
    strict = Promise(threshold=(0.02,), false_positive_rate=0.05)  # nearly everything reaches it
    guard.set_mode("prompt", ModeCalibration(n_harmless=60, presets={"strict": strict}))
    guard = guard.with_preset("strict")
    expected = (scores(tiny_base, guard, held_out) >= 0.02).mean()
    report = patch_guard(tiny_base, guard, PatchRows(family(8, 3), replay, held_out), replace(QUICK, steps=8))
    assert report.detected[0] == expected
    assert report.held["prompt"][0] == (0.02,)
    after = guard.thresholds_in("prompt")
    assert after == report.held["prompt"][1] >= (0.02,)
    assert report.detected[1] == (scores(tiny_base, guard, held_out) >= after[0]).mean()
    assert report.flagged_elsewhere[1] <= report.flagged_elsewhere[0]


def test_a_row_that_cannot_be_read_is_named(tiny_base: Base, trained: Path) -> None:
    long = (Message("user", "z" * 600), *[Message("assistant", "z" * 600)] * 3)
    examples = [*family(8, 3), Example(long, (1.0,), line=9)]
    with pytest.raises(
        InputError, match=r"The examples row in line 9 of its file cannot be read: The conversation has"
    ):
        patch_guard(tiny_base, load_adapter(trained, tiny_base), PatchRows(examples, rows(40, 4)), QUICK)
    blank = [*family(8, 3), Example((Message("user", "\u200b \u2060"),), (1.0,), line=2)]
    with pytest.raises(InputError, match=r"The held-out row in line 2 of its file cannot be read: .* holds no text"):
        patch_guard(tiny_base, load_adapter(trained, tiny_base), PatchRows(family(8, 1), rows(40, 4), blank), QUICK)
