"""A base without weights encodes and cuts texts as the base does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from safeside import Message, load_base
from safeside.base.shell import load_base_shell
from safeside.errors import InputError
from safeside.guards.windows import windows

LONG = " ".join(f"word{number}" for number in range(400))
CONVERSATIONS = (
    [Message("user", "Hello!")],
    [Message("system", "Be brief."), Message("user", "Hello!"), Message("assistant", "Good day.")],
    [Message("user", LONG)],
    [Message("user", LONG), Message("assistant", "A claim.")],
)


def test_it_has_dimensions_and_no_weights() -> None:
    base, shell = load_base("builtin"), load_base_shell("builtin")
    assert {parameter.device.type for parameter in shell.model.parameters()} == {"meta"}
    assert (shell.max_tokens, shell.d_model, shell.n_layers) == (base.max_tokens, base.d_model, base.n_layers)
    assert (shell.name, shell.folder, shell.is_encoder) == (base.name, base.folder, base.is_encoder)
    assert shell.fingerprint == base.fingerprint


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("combine", ["max", "min"])
def test_texts_are_encoded_and_cut_as_for_the_base(messages: list[Message], combine: str) -> None:
    base, shell = load_base("builtin"), load_base_shell("builtin")
    if combine == "min" and len(messages) == 1:
        assert shell.encode(messages) == base.encode(messages)
        return
    cut = [windows(one, messages, combine=combine) for one in (base, shell)]  # type: ignore[arg-type]
    assert cut[0] == cut[1]
    assert [shell.encode(part) for part in cut[1]] == [base.encode(part) for part in cut[0]]


def test_what_is_no_base_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        load_base_shell(tmp_path)
    copy = shutil.copytree(load_base("builtin").folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    for load in (load_base, load_base_shell):
        with pytest.raises(InputError, match="no weight files"):
            load(copy)
