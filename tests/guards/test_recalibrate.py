"""Re-calibration on a user's traffic: the promise, what is refused, and an adapter whose weights are untouched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from safeside import Adapter, Base, Message, attach, load_adapter, save_adapter
from safeside.adapters.config import Calibration
from safeside.artifact import CARD_FILE, PROVENANCE_FILE, WEIGHTS_FILE, read_adapter
from safeside.errors import InputError
from safeside.facts import adapter_facts
from safeside.guards.calibrate import threshold_with_bound
from safeside.guards.recalibrate import Traffic, calibrate_command, recalibrate
from safeside.guards.score import judge, score_conversations
from safeside.guards.stream import AnswerStream, StreamOptions, fit_stop_rule, score_answers
from safeside.stopping import kept_rule
from safeside.tasks.learnt import load_learnt, save_learnt
from safeside.types import Example

LONG = "the cat sat on the mat and then " * 40


@pytest.fixture(scope="module")
def source(session_base: Base, random_guard: Callable[..., Adapter], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated guard, its weights stored in bfloat16."""
    guard = random_guard(session_base, kind="plr")
    guard.set_calibration(Calibration(scale=(0.5,), bias=(-0.1,), threshold=(0.9,)))
    folder = tmp_path_factory.mktemp("source") / "harm"
    return save_adapter(guard, folder, session_base, {"dataset": "none"}, dtype=torch.bfloat16)


def texts(n: int, word: str = "cat") -> list[str]:
    return [f"the {word} sat {index * 7919}" for index in range(n)]


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def prompts(path: Path, n: int, **values: object) -> Path:
    return write(path, [{"prompt": text, **values} for text in texts(n)])


def scores(base: Base, folder: Path, conversations: list[list[Message]]) -> np.ndarray:
    found = score_conversations(base, [load_adapter(folder, base)], conversations)
    return np.array([row.by_guard["harm"][0] for row in found])


def test_a_promise_is_kept_in_a_new_folder_and_the_weights_stay(tiny_base: Base, source: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    benign = prompts(tmp_path / "traffic.jsonl", 80)
    done = recalibrate(str(source), tiny_base, Traffic(benign, false_positive_rate=0.1), tmp_path / "mine")
    loaded = load_adapter(done.folder, tiny_base)
    expected = scores(tiny_base, source, [[Message("user", text)] for text in texts(80)])
    assert done.folder == tmp_path / "mine"
    assert list(done.modes) == ["prompt"]
    assert loaded.config.modes["prompt"] == done.modes["prompt"]
    assert loaded.thresholds_in("prompt") == pytest.approx((threshold_with_bound(expected, 0.1),), abs=1e-5)
    assert loaded.with_preset("strict").thresholds_in("prompt")[0] > expected.max()
    assert loaded.thresholds == (0.9,)
    verdicts = judge(tiny_base, [loaded], [[Message("user", text)] for text in texts(80)])
    assert 0 < sum(verdict.flagged for (verdict,) in verdicts) <= 8
    old, new = load_file(source / WEIGHTS_FILE), load_file(done.folder / WEIGHTS_FILE)
    assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    assert old.keys() == new.keys()
    read_adapter(done.folder)  # its checksum is that of its contents
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert not list(done.folder.glob("tmp*"))


def test_card_and_provenance_tell_of_it(tiny_base: Base, source: Path, tmp_path: Path) -> None:
    benign = prompts(tmp_path / "traffic.jsonl", 80)
    done = recalibrate(str(source), tiny_base, Traffic(benign, false_positive_rate=0.05), tmp_path / "mine")
    stamp = json.loads((done.folder / PROVENANCE_FILE).read_text())
    first = json.loads((source / PROVENANCE_FILE).read_text())
    assert stamp.items() >= first.items()
    assert stamp["calibrated for prompt"].startswith(
        "80 harmless rows of traffic.jsonl: at most 5% flagged, with 95% confidence; "
    )
    card = (done.folder / CARD_FILE).read_text()
    assert stamp["calibrated for prompt"] in card
    assert "| mode prompt | default " in card
    assert str(tmp_path) not in card + json.dumps(stamp)


def test_several_labels_are_promised_one_by_one_and_told_so(
    tiny_base: Base, random_guard: Callable[..., Adapter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The share under any label is that of the verdicts, which is above the promise here."""
    labels = ("a", "b", "c", "d", "e", "f")
    guard = save_adapter(random_guard(tiny_base, labels=labels), tmp_path / "six", tiny_base)
    benign = prompts(tmp_path / "traffic.jsonl", 300)
    rows, _ = calibrate_command(str(guard), tiny_base.name, Traffic(benign, None, 0.05), tmp_path / "mine")
    loaded = load_adapter(tmp_path / "mine", tiny_base)
    shares = {str(row["preset"]): row["flagged_under_any"] for row in rows}
    assert list(shares) == ["default", "strict", "balanced"]
    for preset, share in shares.items():
        chosen = loaded.with_preset(None if preset == "default" else preset)
        verdicts = judge(tiny_base, [chosen], [[Message("user", text)] for text in texts(300)])
        assert share == pytest.approx(np.mean([verdict.flagged for (verdict,) in verdicts]), abs=0.004)
    assert shares["default"] > 0.05
    told = f"{shares['default']:.1%}"
    assert f"one for each label; under one or more, {told} of the harmless rows" in " ".join(
        capsys.readouterr().err.split()
    )
    card = (tmp_path / "mine" / CARD_FILE).read_text()
    assert "at most 5% flagged under each label, with 95% confidence; under one or more " in card
    assert f"under one or more {told} at default, " in card
    assert card.count("of harmless texts flagged under each label)") == 3


def test_one_label_and_a_stream_have_one_promise(
    tiny_base: Base, source: Path, random_guard: Callable[..., Adapter], tmp_path: Path
) -> None:
    """A stream's is of whole answers, whatever the label that stops them."""
    two = save_adapter(random_guard(tiny_base, labels=("a", "b")), tmp_path / "two", tiny_base)
    asked = prompts(tmp_path / "prompts.jsonl", 60), answers(tmp_path / "answers.jsonl", 60)
    runs = ((source, Traffic(asked[0], None, 0.1)), (two, Traffic(asked[1], None, 0.1, "stream", 2)))
    for number, (guard, traffic) in enumerate(runs):
        rows, _ = calibrate_command(str(guard), tiny_base.name, traffic, tmp_path / str(number))
        assert not any("flagged_under_any" in row for row in rows)
        assert "under each label" not in (tmp_path / str(number) / CARD_FILE).read_text()


@pytest.mark.parametrize(("rate", "needed"), [(0.05, "59"), (0.01, "299"), (0.001, "2,995")])
def test_too_few_rows_are_refused_with_the_number_needed(
    tiny_base: Base, source: Path, tmp_path: Path, rate: float, needed: str
) -> None:
    benign = prompts(tmp_path / "traffic.jsonl", 40)
    with pytest.raises(InputError, match=f"Mode 'prompt': 40 harmless rows cannot promise .* it takes {needed}"):
        recalibrate(str(source), tiny_base, Traffic(benign, false_positive_rate=rate), tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_every_mode_of_the_rows_is_calibrated_or_the_one_asked_for(
    tiny_base: Base, source: Path, tmp_path: Path
) -> None:
    rows: list[object] = [{"prompt": text} for text in texts(12)]
    rows += [{"prompt": "how?", "response": text} for text in texts(14)]
    rows += [{"prompt": f"{LONG}{number}"} for number in range(3)]
    benign = write(tmp_path / "rows.jsonl", rows)
    done = recalibrate(str(source), tiny_base, Traffic(benign, false_positive_rate=0.7), tmp_path / "all")
    assert {mode: fit.n_harmless for mode, fit in done.modes.items()} == {"prompt": 12, "answer": 14, "windowed": 3}
    assert done.n_other_modes == 0
    one = recalibrate(str(source), tiny_base, Traffic(benign, false_positive_rate=0.3, mode="answer"), tmp_path / "one")
    assert list(one.modes) == ["answer"]
    assert one.n_other_modes == 15
    loaded = load_adapter(one.folder, tiny_base)
    talk = [Message("user", "how?"), Message("assistant", "like this")]
    (answer,), (prompt,) = judge(tiny_base, [loaded], [talk, talk[:1]])
    assert (answer.mode, answer.threshold, answer.reason) == ("answer", loaded.thresholds_in("answer")[0], "")
    assert prompt.threshold == 0.9
    assert "not calibrated for mode 'prompt'" in prompt.reason


def answers(path: Path, n: int, word: str = "cat") -> Path:
    return write(path, [{"prompt": "how?", "response": text} for text in texts(n, word)])


def test_a_mode_with_too_few_rows_stays_as_it_was(
    tiny_base: Base, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*({"prompt": text} for text in texts(60)), {"prompt": LONG}, {"prompt": "hat", "response": "mat"}]
    benign = write(tmp_path / "benign.jsonl", rows)
    values = calibrate_command(str(source), tiny_base.name, Traffic(benign, false_positive_rate=0.1), tmp_path / "new")
    done = values[1]
    assert {row["mode"] for row in values[0]} == {"prompt"}
    assert set(done["refused"]) == {"answer", "windowed"}
    assert done["n_other_modes"] == 2
    told = capsys.readouterr().err
    assert "Mode 'windowed': 1 harmless rows cannot promise" in told
    assert told.count("The mode is as it was") == 2
    assert set(load_adapter(tmp_path / "new", tiny_base).config.modes) == {"prompt"}
    with pytest.raises(InputError, match="1 harmless rows cannot promise"):
        recalibrate(str(source), tiny_base, Traffic(benign, mode="windowed", false_positive_rate=0.1), tmp_path / "b")


def test_copies_buy_no_promise(tiny_base: Base, source: Path, tmp_path: Path) -> None:
    """Neither of one text, nor beside 58 others; case and spacing make no other text."""
    copies = [{"prompt": "the cat sat"}] * 150 + [{"prompt": " The  cat sat"}] * 149
    one = write(tmp_path / "one.jsonl", copies)
    with pytest.raises(InputError, match=r"'prompt', each text counted once: 1 harmless rows cannot .* takes 299"):
        recalibrate(str(source), tiny_base, Traffic(one, false_positive_rate=0.01), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    few = write(tmp_path / "few.jsonl", [*({"prompt": text} for text in texts(57)), *copies])
    with pytest.raises(InputError, match=r"each text counted once: 58 harmless rows cannot promise .* takes 59"):
        recalibrate(str(source), tiny_base, Traffic(few, false_positive_rate=0.05), tmp_path / "new")


@pytest.mark.parametrize("copied", ["highest", "lowest"])
def test_a_promise_counts_each_text_once_and_each_flagged_row(
    tiny_base: Base, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], copied: str
) -> None:
    """Whichever is copied, no more rows are flagged than the distinct texts may have: of 80 at 10% that is 3."""
    found = scores(tiny_base, source, [[Message("user", text)] for text in texts(80)])
    many = texts(80)[int(found.argmax() if copied == "highest" else found.argmin())]
    benign = write(tmp_path / "benign.jsonl", [{"prompt": text} for text in [*texts(80), *[many] * 40]])
    _, summary = calibrate_command(str(source), tiny_base.name, Traffic(benign, None, 0.1), tmp_path / "new")
    fit = load_adapter(tmp_path / "new", tiny_base).config.modes["prompt"]
    highest = np.sort([*found, *[found.max() if copied == "highest" else found.min()] * 40])[-80:]
    assert fit.promise.threshold == pytest.approx((threshold_with_bound(highest, 0.1),), abs=1e-5)
    assert ((found >= fit.promise.threshold[0]).sum() == 0) == (copied == "highest")
    assert (summary["n_copies"], fit.n_harmless) == (40, 80)
    assert "40 harmless rows are copies of others" in " ".join(capsys.readouterr().err.split())
    assert (
        "80 harmless rows of benign.jsonl and 40 copies of them: at most" in (tmp_path / "new" / CARD_FILE).read_text()
    )


def test_a_stop_rule_is_kept_and_used_when_asked_for(tiny_base: Base, source: Path, tmp_path: Path) -> None:
    """The rule of ``fit_stop_rule`` on the same answers; prompts among the rows are left out and counted."""
    benign = answers(tmp_path / "answers.jsonl", 70)
    benign.write_text(benign.read_text() + "\n" + json.dumps({"prompt": "how?"}))
    traffic = Traffic(benign, None, 0.1, "stream", 3)
    done = recalibrate(str(source), tiny_base, traffic, tmp_path / "mine")
    guard = load_adapter(done.folder, tiny_base)
    talks = [[Message("user", "how?"), Message("assistant", text)] for text in texts(70)]
    scores = [row.scores for row in score_answers(tiny_base, guard, talks)]
    rule = fit_stop_rule(scores, 0.1, n_consecutive=3)
    kept = kept_rule(guard)
    assert kept is not None
    assert (kept.threshold, kept.n_consecutive) == (pytest.approx(rule.threshold, abs=1e-6), 3)
    found = done.modes["stream"]
    assert (found.n_harmless, found.promise.false_positive_rate, found.promise.confidence) == (70, 0.1, 0.95)
    assert (done.n_other_modes, done.n_unscored) == (1, 0)
    assert kept_rule(guard.with_preset("strict")).threshold > kept.threshold
    assert (
        "3 tokens in a row stop an answer; default " in adapter_facts(str(done.folder), tiny_base.name)["mode stream"]
    )
    again = recalibrate(str(done.folder), tiny_base, Traffic(benign, None, 0.2, "stream"), tmp_path / "again")
    assert again.modes["stream"].n_consecutive == 3  # the guard's own, unless told
    with attach(tiny_base, guards=[guard]):
        expected = tiny_base.chat(talks[0][:1], stop=kept, max_new_tokens=8, min_new_tokens=8)
        assert tiny_base.chat(talks[0][:1], stop=True, max_new_tokens=8, min_new_tokens=8) == expected
        options = StreamOptions(stop=True, max_new_tokens=8, generate={"min_new_tokens": 8})
        assert "".join(AnswerStream(tiny_base, talks[0][:1], options)).strip() == expected.text


def test_a_stop_rule_needs_answers_and_rows(tiny_base: Base, source: Path, tmp_path: Path) -> None:
    benign = prompts(tmp_path / "prompts.jsonl", 60)
    with pytest.raises(InputError, match="holds no row that is read in mode 'stream'; found 60 for 'prompt'"):
        recalibrate(str(source), tiny_base, Traffic(benign, mode="stream"), tmp_path / "none")
    few = answers(tmp_path / "answers.jsonl", 40)
    with pytest.raises(InputError, match=r"Mode 'stream', .*: 40 harmless rows cannot promise .* it takes 59"):
        recalibrate(str(source), tiny_base, Traffic(few, None, 0.05, "stream"), tmp_path / "none")
    with pytest.raises(InputError, match="those of a stop rule, for mode 'stream'"):
        Traffic(few, None, 0.05, "answer", 2)
    with pytest.raises(InputError, match="1 token in a row or more; got 0"):
        Traffic(few, None, 0.05, "stream", 0)


def named(row: dict[str, str], number: int) -> dict[str, str]:
    """The same answer to another question."""
    return {**row, "prompt": f"how {number * 7919}?"}


def test_a_stop_rule_rests_on_no_answer_too_short_for_it(tiny_base: Base, source: Path, tmp_path: Path) -> None:
    """Such a rule would stop every longer answer; with fewer tokens in a row it is the one of ``fit_stop_rule``."""
    short, long = ({"prompt": "how?", "response": text} for text in ("no", "the cat sat there and then the other sat"))
    benign = write(tmp_path / "answers.jsonl", [*(named(short, row) for row in range(59)), long])
    with pytest.raises(InputError, match=r"Mode 'stream', 8 tokens in a row: 59 of 60 harmless .* \(--consecutive\)"):
        recalibrate(str(source), tiny_base, Traffic(benign, None, 0.1, "stream"), tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    done = recalibrate(str(source), tiny_base, Traffic(benign, None, 0.1, "stream", 1), tmp_path / "mine")
    assert done.modes["stream"].promise.threshold[0] > 0.01
    harmful = answers(tmp_path / "harmful.jsonl", 40, "hat")
    mixed = write(tmp_path / "mixed.jsonl", [named(row, place) for place in range(30) for row in (short, long)])
    both = recalibrate(str(source), tiny_base, Traffic(mixed, harmful, 0.1, "stream", 8), tmp_path / "both")
    (fit,) = both.modes["stream"].maps  # short answers count for probabilities
    assert (fit.n_harmless, both.n_unscored) == (60, 0)


def test_harmful_answers_give_a_stream_probabilities(tiny_base: Base, source: Path, tmp_path: Path) -> None:
    benign, harmful = answers(tmp_path / "benign.jsonl", 60), answers(tmp_path / "harmful.jsonl", 40, "hat")
    done = recalibrate(str(source), tiny_base, Traffic(benign, harmful, 0.1, "stream", 2), tmp_path / "both")
    (fit,) = done.modes["stream"].maps
    assert (fit.n_harmless, fit.n_harmful) == (60, 40)
    same = recalibrate(str(done.folder), tiny_base, Traffic(benign, None, 0.1, "stream"), tmp_path / "same")
    assert same.modes["stream"].maps == (fit,)
    longer = recalibrate(str(done.folder), tiny_base, Traffic(benign, None, 0.1, "stream", 3), tmp_path / "longer")
    assert longer.modes["stream"].maps == ()  # it was of other scores


def test_harmful_rows_give_probabilities_and_later_runs_keep_them(
    tiny_base: Base, source: Path, tmp_path: Path
) -> None:
    benign = prompts(tmp_path / "benign.jsonl", 60)
    harmful = write(tmp_path / "harmful.jsonl", [{"prompt": text, "label": 1} for text in texts(40, "hat")])
    done = recalibrate(str(source), tiny_base, Traffic(benign, harmful, 0.1), tmp_path / "both")
    (fit,) = done.modes["prompt"].maps
    assert (fit.method, fit.n_harmless, fit.n_harmful) == ("platt", 60, 40)
    assert done.modes["prompt"].n_harmless == 60
    assert "probabilities from harmful.jsonl too" in (done.folder / CARD_FILE).read_text()
    again = recalibrate(str(done.folder), tiny_base, Traffic(benign, None, 0.2), tmp_path / "again")
    assert again.modes["prompt"].maps == (fit,)
    assert again.modes["prompt"].promise.false_positive_rate == 0.2
    ((verdict,),) = judge(tiny_base, [load_adapter(done.folder, tiny_base)], [[Message("user", "the hat")]])
    assert verdict.probability == pytest.approx(float(fit.probabilities(np.array([verdict.score]))[0]))


def test_an_error_of_other_rows_is_not_told_as_this_runs(
    tiny_base: Base, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By mode: answers get probabilities from the harmful answer rows; prompts keep theirs, and no error is told."""
    benign = prompts(tmp_path / "benign.jsonl", 60)
    harmful = write(tmp_path / "harmful.jsonl", [{"prompt": text} for text in texts(40, "hat")])
    first, name = tmp_path / "first", tiny_base.name
    _, fitted = calibrate_command(str(source), name, Traffic(benign, harmful, 0.1), first)
    (error,) = fitted["calibration_error"]["prompt"]
    assert set(error) == {"method", "before", "after"}
    other = write(tmp_path / "other.jsonl", [{"prompt": text} for text in texts(70, "mat")])
    _, kept = calibrate_command(str(first), name, Traffic(other, None, 0.1), tmp_path / "kept")
    assert kept["calibration_error"] == {"prompt": []}
    assert load_adapter(tmp_path / "kept", tiny_base).config.modes["prompt"].maps
    card = (tmp_path / "kept" / CARD_FILE).read_text()
    assert "70 harmless rows of other.jsonl, probabilities as they were: at most 10% flagged" in card
    assert "; 70 harmless rows; ECE " in card
    assert "(platt, on 60 harmless and 40 harmful rows) |" in card
    both = write(tmp_path / "both.jsonl", [{"prompt": "how?", "response": text} for text in texts(60)])
    both.write_text(both.read_text() + "\n" + other.read_text())
    bad = answers(tmp_path / "bad.jsonl", 40, "hat")
    _, mixed = calibrate_command(str(first), name, Traffic(both, bad, 0.1), tmp_path / "mixed")
    assert {mode: len(errors) for mode, errors in mixed["calibration_error"].items()} == {"answer": 1, "prompt": 0}
    stamp = json.loads((tmp_path / "mixed" / PROVENANCE_FILE).read_text())
    assert "probabilities as they were" in stamp["calibrated for prompt"]
    assert "probabilities from bad.jsonl too" in stamp["calibrated for answer"]
    assert "ECE" not in capsys.readouterr().err


def test_only_the_adapters_own_folder_is_changed_in_place(tiny_base: Base, source: Path, tmp_path: Path) -> None:
    benign = prompts(tmp_path / "traffic.jsonl", 60)
    traffic = Traffic(benign, false_positive_rate=0.1)
    copy = recalibrate(str(source), tiny_base, traffic, tmp_path / "copy").folder
    with pytest.raises(InputError, match=r"exists already\. Choose another --output"):
        recalibrate(str(source), tiny_base, traffic, copy)
    done = recalibrate(str(copy), tiny_base, Traffic(benign, false_positive_rate=0.2), tmp_path / "x" / ".." / "copy")
    assert load_adapter(copy, tiny_base).config.modes["prompt"].promise.false_positive_rate == 0.2
    assert sorted(file.name for file in done.folder.iterdir()) == sorted(file.name for file in source.iterdir())


def test_a_preset_that_no_mode_has_any_more_is_dropped_and_told(
    tiny_base: Base, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """299 rows promise 'balanced', 60 do not; what is written can be loaded."""
    many, few = prompts(tmp_path / "many.jsonl", 300), prompts(tmp_path / "few.jsonl", 60)
    first = recalibrate(str(source), tiny_base, Traffic(many, None, 0.1), tmp_path / "first").folder
    mine = save_adapter(load_adapter(first, tiny_base).with_preset("balanced"), tmp_path / "mine", tiny_base)
    kept = recalibrate(str(mine), tiny_base, Traffic(many, None, 0.1), mine)
    assert (kept.dropped_preset, load_adapter(mine, tiny_base).config.preset) == (None, "balanced")
    _, summary = calibrate_command(str(mine), tiny_base.name, Traffic(few, None, 0.1), mine)
    loaded = load_adapter(mine, tiny_base)
    assert (summary["dropped_preset"], loaded.config.preset) == ("balanced", None)
    assert loaded.thresholds_in("prompt") == loaded.config.modes["prompt"].promise.threshold
    assert "preset 'balanced' was dropped" in " ".join(capsys.readouterr().err.split())
    assert "preset 'balanced' was dropped" in (mine / CARD_FILE).read_text()


def test_the_default_folder_has_the_adapters_name(
    tiny_base: Base, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    benign = prompts(tmp_path / "traffic.jsonl", 60)
    assert recalibrate(str(source), tiny_base, Traffic(benign, None, 0.1)).folder == Path("harm-calibrated")
    assert (tmp_path / "harm-calibrated" / WEIGHTS_FILE).is_file()


def test_rows_that_cannot_be_used_are_counted(tiny_base: Base, source: Path, tmp_path: Path) -> None:
    rows = [{"prompt": text} for text in texts(60)]
    too_large = {"messages": [{"role": role, "content": LONG} for role in ("user", *["assistant"] * 3)]}
    benign = write(tmp_path / "rows.jsonl", [*rows, "{broken", {"question": "x"}, too_large])
    traffic = Traffic(benign, None, 0.2, "prompt")
    done = recalibrate(str(source), tiny_base, traffic, tmp_path / "mine")
    assert [row.line for row in done.bad] == [61, 62]
    assert (done.n_unscored, done.n_other_modes) == (1, 1)
    empty = write(tmp_path / "empty.jsonl", ["{broken"])
    with pytest.raises(InputError, match=r"holds no usable row\. The first problem: line 1, empty\.jsonl: not JSON"):
        recalibrate(str(source), tiny_base, Traffic(empty), tmp_path / "none")


def test_a_row_of_another_label_is_not_harmless(tiny_base: Base, source: Path, tmp_path: Path) -> None:
    rows = [{"prompt": text, "label": {"harm": 0, "violence": int(index < 3)}} for index, text in enumerate(texts(63))]
    benign = write(tmp_path / "rows.jsonl", rows)
    done = recalibrate(str(source), tiny_base, Traffic(benign, None, 0.2), tmp_path / "mine")
    assert done.modes["prompt"].n_harmless == 60
    assert [(row.line, "names 'violence'" in row.problem) for row in done.bad] == [(1, True), (2, True), (3, True)]


def test_rows_that_the_guard_learnt_from_are_left_out(tiny_base: Base, source: Path, tmp_path: Path) -> None:
    """Word for word after normalisation; a promise rests on the others alone."""
    guard = shutil.copytree(source, tmp_path / "guard")
    benign = prompts(tmp_path / "benign.jsonl", 70)
    unknown = recalibrate(str(guard), tiny_base, Traffic(benign, None, 0.2), tmp_path / "unknown")
    assert (unknown.n_learnt, unknown.modes["prompt"].n_harmless) == (None, 70)
    learnt = [Example((Message("user", text.upper()),), (0.0,)) for text in texts(20)]
    save_learnt(guard, learnt)
    done = recalibrate(str(guard), tiny_base, Traffic(benign, None, 0.2), tmp_path / "mine")
    assert (done.n_learnt, done.modes["prompt"].n_harmless) == (20, 50)
    assert load_learnt(done.folder).tolist() == load_learnt(guard).tolist()
    with pytest.raises(InputError, match=r"50 harmless rows cannot promise .* it takes 59"):
        recalibrate(str(guard), tiny_base, Traffic(benign, None, 0.05), tmp_path / "none")
    with pytest.raises(InputError, match=r"learnt from every row of .* Give harmless rows that it has not seen"):
        recalibrate(str(guard), tiny_base, Traffic(prompts(tmp_path / "old.jsonl", 20)), tmp_path / "none")


def test_a_text_is_harmless_or_harmful(tiny_base: Base, source: Path, tmp_path: Path) -> None:
    benign = prompts(tmp_path / "benign.jsonl", 60)
    (tmp_path / "link.jsonl").symlink_to(benign)
    for same in (benign, tmp_path / "link.jsonl"):
        with pytest.raises(InputError, match="is given as --benign and as --harmful; expected two files"):
            Traffic(benign, same)
    harmful = write(tmp_path / "harmful.jsonl", [{"prompt": "kill"}, {"prompt": texts(3)[2].upper() + " "}])
    with pytest.raises(
        InputError, match=r"1 rows are given as harmless and as harmful: the first is line 3 of .*line 2"
    ):
        recalibrate(str(source), tiny_base, Traffic(benign, harmful, 0.1), tmp_path / "none")


def test_rows_of_the_other_kind_are_refused(tiny_base: Base, source: Path, tmp_path: Path) -> None:
    benign = write(tmp_path / "benign.jsonl", [{"prompt": "hi", "label": 0}, {"prompt": "ho", "label": 1}])
    with pytest.raises(InputError, match="line 2: labelled harmful; expected harmless rows only"):
        recalibrate(str(source), tiny_base, Traffic(benign), tmp_path / "none")
    clean = prompts(tmp_path / "clean.jsonl", 60)
    with pytest.raises(InputError, match="line 1: labelled harmless; expected harmful rows only"):
        recalibrate(str(source), tiny_base, Traffic(clean, benign, 0.1), tmp_path / "none")


@pytest.mark.parametrize("rate", [0.0, 1.0, 5.0])
def test_a_rate_is_a_share(rate: float) -> None:
    with pytest.raises(InputError, match="lie between 0 and 1"):
        Traffic(Path("rows.jsonl"), None, rate)


def test_an_aligner_is_not_calibrated(tiny_base: Base, random_aligner: Callable[..., Adapter], tmp_path: Path) -> None:
    folder = save_adapter(random_aligner(tiny_base), tmp_path / "refuse", tiny_base)
    with pytest.raises(InputError, match="is an aligner and flags nothing"):
        recalibrate(str(folder), tiny_base, Traffic(prompts(tmp_path / "rows.jsonl", 60)), tmp_path / "none")
