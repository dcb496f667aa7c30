"""The record of what a guard learnt from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from safeside import Message
from safeside.errors import FormatError
from safeside.tasks.leakage import text_of
from safeside.tasks.learnt import LEARNT_FILE, are_learnt, hashes_of, learnt_notes, load_learnt, save_learnt, unseen_of
from safeside.types import Example


def rows(*texts: str) -> list[Example]:
    return [Example((Message("user", text),), (0.0,)) for text in texts]


def test_texts_are_known_again_whatever_their_case_and_spacing(tmp_path: Path) -> None:
    save_learnt(tmp_path, rows("The cat sat.", "and then", "the CAT  sat. "))
    hashes = load_learnt(tmp_path)
    assert hashes is not None
    assert hashes.tolist() == sorted(set(hashes.tolist()))
    assert len(hashes) == 2
    assert are_learnt(rows("the cat sat.", "the cat sat", " AND then\n"), hashes) == [True, False, True]
    answered = [Example((Message("user", "and then"), Message("assistant", "no")), (0.0,))]
    assert are_learnt(answered, hashes) == [False]  # another conversation
    assert are_learnt([], hashes) == []


def test_what_was_learnt_is_left_out_counted_and_told() -> None:
    asked = rows("a", "B ", "c")
    assert unseen_of(asked, hashes_of(rows("b", "A", "d"))) == (asked[2:], 2)
    assert unseen_of(asked, hashes_of([])) == (asked, 0)
    assert unseen_of(asked, None) == (asked, None)
    (told,) = learnt_notes("mine", 2, "figures on them would flatter it")
    assert told == "2 rows were left out: the guard learnt from them, and figures on them would flatter it"
    assert learnt_notes("mine", 0, "why") == []
    (unknown,) = learnt_notes("mine", None, "why")
    assert unknown.startswith("mine keeps no record of the rows that it learnt from; ")


def test_a_hash_is_the_first_four_bytes_of_sha256() -> None:
    (example,) = rows("Caf\u00e9 ?")
    digest = hashlib.sha256(text_of(example).encode()).digest()
    assert hashes_of([example]).tolist() == [int.from_bytes(digest[:4], "little")]


def test_what_is_learnt_further_joins_a_record_and_never_starts_one(tmp_path: Path) -> None:
    old, new, bare = (tmp_path / name for name in ("old", "new", "bare"))
    for folder in (old, new, bare):
        folder.mkdir()
    save_learnt(new, rows("b"), before=bare)
    assert load_learnt(new) is None
    save_learnt(old, rows("a"))
    save_learnt(new, rows("b"), before=old)
    hashes = load_learnt(new)
    assert hashes is not None
    assert are_learnt(rows("a", "b", "c"), hashes) == [True, True, False]


@pytest.mark.parametrize("content", [b"", b"x" * 40, {"other": np.zeros(1, np.uint32)}, {"hashes": np.zeros(1)}])
def test_a_broken_record_is_an_error(tmp_path: Path, content: object) -> None:
    if isinstance(content, bytes):
        (tmp_path / LEARNT_FILE).write_bytes(content)
    else:
        save_file(content, tmp_path / LEARNT_FILE)
    with pytest.raises(FormatError, match=r"learnt\.safetensors (cannot be read|holds float64)"):
        load_learnt(tmp_path)
