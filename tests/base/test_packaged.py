"""Bases inside installed packages: found without being imported, and only with the weights that are known."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from safeside import Adapter, Base, Message, attach, load_base
from safeside.base.packaged import PACKAGED, PackagedBase, packaged_folder
from safeside.chat import pad_batch
from safeside.errors import InputError, MissingExtraError
from safeside.guards.score import score_conversations
from safeside.guards.windows import windows

PADDING = 1e-5  # of a score in float32: other batch shapes round differently


@pytest.fixture
def package(tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package with the tiny BERT inside, known as ``small``; importing it is an error."""
    folder = tmp_path / "package_with_a_base"
    shutil.copytree(tiny_folder("bert"), folder / "model")
    (folder / "__init__.py").write_text("raise RuntimeError('a package of weights must not be run')\n")
    digest = hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PACKAGED, "small", PackagedBase("package_with_a_base", "model", digest, "small"))
    return folder


def test_the_folder_of_an_installed_package_is_found(package: Path) -> None:
    assert packaged_folder("small") == package / "model"
    base = load_base("small")
    assert base.name == "small"
    assert base.is_encoder


def test_other_weights_are_refused(package: Path) -> None:
    weights = package / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=rf"have sha256 [0-9a-f]{{64}}; expected {PACKAGED['small'].weights}"):
        load_base("small")
    weights.unlink()
    with pytest.raises(InputError, match=r"has no model/model\.safetensors\. Reinstall"):
        load_base("small")


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "small", PackagedBase("no_such_package_here", "model", "", "small"))
    with pytest.raises(MissingExtraError, match=r"no-such-package-here.*pip install 'safeside\[small\]'"):
        load_base("small")


@pytest.fixture(scope="module")
def minilm() -> Base:
    if find_spec(PACKAGED["minilm"].module) is None:
        pytest.skip("the extra minilm is not installed")
    return load_base("minilm")


def test_minilm_has_its_published_shape(minilm: Base) -> None:
    assert (minilm.n_layers, minilm.d_model, minilm.max_tokens) == (6, 384, 512)
    assert minilm.is_encoder


def test_nothing_is_cut_or_padded_as_minilm_s_tokenizer_file_asks(minilm: Base) -> None:
    """Its tokenizer.json says: cut at 128, pad to 128."""
    assert len(minilm.encode([Message("user", "hello")]).ids) == 3
    assert len(minilm.encode([Message("user", "hello " * 400)]).ids) == 402


def test_minilm_reads_messages_with_separators_and_no_control_token_of_a_user(minilm: Base) -> None:
    talk = [Message("user", "hi [SEP] there"), Message("assistant", "[CLS] you [MASK]")]
    encoded = minilm.encode(talk)
    tokens = minilm.tokenizer.convert_ids_to_tokens(encoded.ids)
    assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")
    assert [tokens.count(name) for name in ("[CLS]", "[SEP]", "[MASK]")] == [1, 2, 0]
    assert tokens[encoded.answer_start - 1] == "[SEP]"


@pytest.mark.parametrize("readout", ["last", "attention"])
@pytest.mark.parametrize("kind", ["plr", "rtb", "lst"])
def test_guards_on_minilm_see_the_whole_text_and_no_padding(
    minilm: Base, random_guard: Callable[..., Adapter], kind: str, readout: str
) -> None:
    guard = random_guard(minilm, kind=kind, readout=readout)
    texts = ["the cat sat on the mat", "a quite different and much longer text about the weather of a day in may"]
    rows = [minilm.encode([Message("user", text)]).ids for text in texts]
    changed = [*rows[0][:-2], rows[0][-2] + 1, rows[0][-1]]  # another last word
    scores = []
    with torch.no_grad(), attach(minilm, guards=[guard]) as attachment:
        for batch in ([rows[0]], rows, [changed]):
            ids, keep = pad_batch(batch, 0)
            minilm.decoder(input_ids=ids, attention_mask=keep)
            scores.append(attachment.record.scores["harm"][0, : len(rows[0]), 0])
    torch.testing.assert_close(scores[0], scores[1], atol=PADDING, rtol=0)
    assert abs(scores[0][1] - scores[2][1]) > 10 * PADDING  # the first word's score sees the last word


def test_long_texts_on_minilm_are_windows_of_its_512_positions(
    minilm: Base, random_guard: Callable[..., Adapter]
) -> None:
    talk = [Message("user", "a word and another one " * 300)]
    parts = windows(minilm, talk)
    lengths = [len(minilm.encode(part).ids) for part in parts]
    assert len(parts) > 2
    assert 450 < max(lengths) <= 512
    guard = random_guard(minilm)
    whole, *each = score_conversations(minilm, [guard], [talk, *parts])
    assert whole.n_windows == len(parts)
    assert whole.by_guard["harm"][0] == pytest.approx(max(row.by_guard["harm"][0] for row in each), abs=PADDING)
