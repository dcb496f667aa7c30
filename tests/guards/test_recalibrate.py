"""Re-calibration on a user's traffic: the promise, what is refused, and an adapter whose weights are untouched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from safeside import Adapter, Base, Message, load_adapter, save_adapter
from safeside.adapters.config import Calibration
from safeside.artifact import CARD_FILE, PROVENANCE_FILE, WEIGHTS_FILE, read_adapter
from safeside.errors import InputError
from safeside.guards.calibrate import threshold_with_bound
from safeside.guards.recalibrate import Traffic, recalibrate
from safeside.guards.score import judge, score_conversations

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
        "80 harmless rows of traffic.jsonl: at most 5.000% flagged, with 95% confidence; "
    )
    card = (done.folder / CARD_FILE).read_text()
    assert stamp["calibrated for prompt"] in card
    assert "| mode prompt | default " in card
    assert str(tmp_path) not in card + json.dumps(stamp)


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
    rows += [{"prompt": LONG}] * 3
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
    with pytest.raises(InputError, match="holds no row that is read in mode 'stream'; found 12 for 'prompt', 14 for"):
        recalibrate(str(source), tiny_base, Traffic(benign, mode="stream"), tmp_path / "none")


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


def test_only_the_adapters_own_folder_is_changed_in_place(tiny_base: Base, source: Path, tmp_path: Path) -> None:
    benign = prompts(tmp_path / "traffic.jsonl", 60)
    traffic = Traffic(benign, false_positive_rate=0.1)
    copy = recalibrate(str(source), tiny_base, traffic, tmp_path / "copy").folder
    with pytest.raises(InputError, match=r"exists already\. Choose another --output"):
        recalibrate(str(source), tiny_base, traffic, copy)
    done = recalibrate(str(copy), tiny_base, Traffic(benign, false_positive_rate=0.2), tmp_path / "x" / ".." / "copy")
    assert load_adapter(copy, tiny_base).config.modes["prompt"].promise.false_positive_rate == 0.2
    assert sorted(file.name for file in done.folder.iterdir()) == sorted(file.name for file in source.iterdir())


def test_the_default_folder_has_the_adapters_name(
    tiny_base: Base, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    benign = prompts(tmp_path / "traffic.jsonl", 60)
    assert recalibrate(str(source), tiny_base, Traffic(benign, None, 0.1)).folder == Path("harm-calibrated")
    assert (tmp_path / "harm-calibrated" / WEIGHTS_FILE).is_file()


def test_rows_that_cannot_be_used_are_counted(tiny_base: Base, source: Path, tmp_path: Path) -> None:
    rows = [{"prompt": text} for text in texts(60)]
    too_large = {"document": LONG, "summary": LONG}
    benign = write(tmp_path / "rows.jsonl", [*rows, "{broken", {"question": "x"}, too_large])
    traffic = Traffic(benign, None, 0.2, "prompt")
    done = recalibrate(str(source), tiny_base, traffic, tmp_path / "mine")
    assert [row.line for row in done.bad] == [61, 62]
    assert (done.n_unscored, done.n_other_modes) == (1, 1)
    empty = write(tmp_path / "empty.jsonl", ["{broken"])
    with pytest.raises(InputError, match=r"holds no usable row\. The first problem: line 1, empty\.jsonl: not JSON"):
        recalibrate(str(source), tiny_base, Traffic(empty), tmp_path / "none")


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
