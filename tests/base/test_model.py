"""``Base``: loading, its properties, and ``chat`` against the slow twin."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safeside import Adapter, Base, Message, attach, load_base, ramp
from safeside.adapters.config import Calibration
from safeside.base.model import _NOT_FOR_CHAT
from safeside.errors import InputError, UnsupportedError
from tiny import FAMILY_NAMES, N_LAYERS, N_POSITIONS, WIDTH
from twin import SAME, answer_by_hand, base_states, close, run_by_hand

QUESTION = [Message("system", "be good"), Message("user", "how can this be?")]
SHORT = [Message("user", "the cat")]
LONG = [Message("user", "one"), Message("assistant", "two"), Message("user", "and then the other cat sat there")]
N_NEW = 6
PLENTY = {"max_new_tokens": N_NEW, "min_new_tokens": N_NEW}


@pytest.fixture(scope="module")
def guard(session_base: Base, random_guard) -> Adapter:
    return random_guard(session_base, readout="attention")


@pytest.fixture(scope="module")
def aligner(session_base: Base, random_aligner) -> Adapter:
    return random_aligner(session_base)


@pytest.fixture
def stop_at(tiny_base: Base) -> Iterator[Callable[[int], None]]:
    """``stop_at(token)`` makes ``token`` the one that ends an answer."""
    config = tiny_base.model.generation_config
    before = config.eos_token_id

    def set_stop(token: int) -> None:
        config.eos_token_id = [token]

    yield set_stop
    config.eos_token_id = before


def ids_of(base: Base, conversation: list[Message]) -> list[int]:
    return list(base.encode(conversation).ids)


# Loading.


def test_a_loaded_base_is_frozen_and_knows_itself(tiny_base: Base, tiny_folder: Callable[[str], Path]) -> None:
    assert not any(parameter.requires_grad for parameter in tiny_base.model.parameters())
    assert not tiny_base.model.training
    assert (tiny_base.n_layers, tiny_base.d_model, tiny_base.max_tokens) == (N_LAYERS, WIDTH, N_POSITIONS)
    assert tiny_base.dtype == torch.float32
    assert tiny_base.device.type == "cpu"
    assert tiny_base.folder == tiny_folder("llama")
    assert not tiny_base.is_encoder
    assert load_base(tiny_folder("bert")).is_encoder


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtype_is_float32_on_cpu_unless_given(tiny_folder, tmp_path: Path, stored: torch.dtype) -> None:
    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "base"))
    weights = {name: tensor.to(stored) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_base(folder).dtype == torch.float32
    assert load_base(str(folder), dtype="bfloat16").dtype == torch.bfloat16
    assert load_base(folder, dtype=torch.float16).dtype == torch.float16


def test_what_cannot_be_loaded_says_what_to_give(tiny_folder, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"Cannot load a base from 'no such name'.*Expected 'builtin', 'minilm', a folder"
    ):
        load_base("no such name")
    with pytest.raises(InputError, match=r"has no config\.json; expected a folder made by save_pretrained"):
        load_base(tmp_path)


@pytest.mark.parametrize("model_type", ["gemma3", "lama", "falcon"])
def test_an_unknown_architecture_names_register_family(tiny_folder, tmp_path: Path, model_type: str) -> None:
    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "base"))
    change_config(folder, model_type=model_type)
    with pytest.raises(UnsupportedError, match=rf"Unknown model type '{model_type}'.*call register_family\("):
        load_base(folder)


def test_no_code_of_a_checkpoint_is_run(tiny_folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "base"))
    ran = tmp_path / "ran"
    (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\n")
    classes = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    change_config(folder, auto_map=classes)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["theirs.Slow", "theirs.Fast"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert type(load_base(folder).model).__name__ == "LlamaForCausalLM"
    change_config(folder, model_type="theirs")
    with pytest.raises(UnsupportedError, match="Unknown model type 'theirs'"):
        load_base(folder)
    assert not ran.exists()


def change_config(folder: Path, **values: object) -> None:
    """Set fields of the checkpoint's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("family_name", FAMILY_NAMES)
def test_head_logits_are_the_models_own(tiny_family, random_aligner, family_name: str) -> None:
    base = tiny_family(family_name)
    ids = torch.arange(20, 32)[None]
    with torch.no_grad():
        expected, final = base.model(ids).logits, base_states(base, ids)[1]
        close(base.head_logits(final), expected)
        with attach(base, [random_aligner(base)]):
            close(base.head_logits(final), expected)


# Chat.


@pytest.mark.parametrize("latched", [True, False], ids=["latched", "each token"])
def test_chat_is_what_the_twin_answers(tiny_base: Base, guard: Adapter, aligner: Adapter, latched: bool) -> None:
    prompt = ids_of(tiny_base, QUESTION)

    def rule(scores: list[float]) -> float:
        return 1.2 * min(max((scores[0 if latched else -1] - 0.1) / 0.8, 0.0), 1.0)

    expected = answer_by_hand(tiny_base, prompt, {aligner: rule}, [guard], N_NEW, score_of="harm")
    scores = run_by_hand(tiny_base, guard, torch.tensor([[*prompt, *expected.ids]])).scores[0, :, 0].tolist()
    with attach(tiny_base, [aligner], [guard], strength=ramp(guard, 0.1, 0.9, ceiling=1.2, latched=latched)):
        found = tiny_base.chat(QUESTION, **PLENTY)
    assert found.text == tiny_base.tokenizer.decode(expected.ids, skip_special_tokens=True).strip()
    assert found.strength == {"refuse": pytest.approx(expected.strengths["refuse"], abs=SAME)}
    assert [verdict.score for verdict in found.verdicts] == pytest.approx(
        [scores[len(prompt) - 1], scores[-1]], abs=SAME
    )
    assert [(verdict.mode, verdict.reason) for verdict in found.verdicts] == [("prompt", ""), ("answer", "")]
    assert (found.n_prompt_tokens, found.n_new_tokens, found.finish_reason) == (len(prompt), N_NEW, "length")


@pytest.mark.parametrize("family_name", ["llama", "gpt2", "opt", "gemma2", "mistral"])
def test_a_batch_answers_like_one_by_one(tiny_family, random_guard, random_aligner, family_name: str) -> None:
    base = tiny_family(family_name)
    guard, aligner = random_guard(base), random_aligner(base)
    conversations, strengths = [QUESTION, SHORT, LONG], [0.5, 1.0, 0.0]
    with attach(base, [aligner], [guard]):
        for given in (strengths, ramp(guard, 0.0, 1.0, ceiling=2.0)):
            together = base.chat_batch(conversations, strength=given, **PLENTY)
            for row, (conversation, found) in enumerate(zip(conversations, together, strict=True)):
                alone = base.chat(conversation, strength=given[row] if given is strengths else given, **PLENTY)
                assert found.text == alone.text
                assert found.n_prompt_tokens == alone.n_prompt_tokens
                assert found.strength["refuse"] == pytest.approx(alone.strength["refuse"], abs=SAME)
                for mine, theirs in zip(found.verdicts, alone.verdicts, strict=True):
                    assert mine.score == pytest.approx(theirs.score, abs=SAME)


def test_rows_that_stop_early_are_judged_at_their_own_end(tiny_base, guard, aligner, stop_at) -> None:
    prompt = ids_of(tiny_base, SHORT)
    free = tiny_base.model.generate(torch.tensor([prompt]), **PLENTY, do_sample=False)[0, len(prompt) :].tolist()
    stop_at(free[3])
    with attach(tiny_base, [aligner], [guard], strength=0.0):
        found, longer = tiny_base.chat_batch([SHORT, QUESTION], max_new_tokens=N_NEW)
        alone = tiny_base.chat(SHORT, max_new_tokens=N_NEW)
    assert (found.text, found.finish_reason) == (alone.text, "stop")
    assert found.n_new_tokens < longer.n_new_tokens
    assert len(found.strength["refuse"]) == found.n_new_tokens
    for mine, theirs in zip(found.verdicts, alone.verdicts, strict=True):
        assert mine.score == pytest.approx(theirs.score, abs=SAME)


def test_a_stop_token_of_the_callers_own_is_the_end(tiny_base, guard, aligner) -> None:
    """Padding behind a row that ended early is no part of its answer: a guard would read it and pass."""
    prompt = ids_of(tiny_base, SHORT)
    free = tiny_base.model.generate(torch.tensor([prompt]), **PLENTY, do_sample=False)[0, len(prompt) :].tolist()
    for stop in (free[3], [free[3], free[5]]):
        with attach(tiny_base, [aligner], [guard], strength=0.0):
            found, _ = tiny_base.chat_batch([SHORT, QUESTION], max_new_tokens=N_NEW, eos_token_id=stop)
            alone = tiny_base.chat(SHORT, max_new_tokens=N_NEW, eos_token_id=stop)
        assert (found.text, found.n_new_tokens, found.finish_reason) == (alone.text, free.index(free[3]), "stop")
        for mine, theirs in zip(found.verdicts, alone.verdicts, strict=True):
            assert mine.score == pytest.approx(theirs.score, abs=SAME)


def test_a_stop_token_ends_the_text_and_is_heard(tiny_base: Base, guard: Adapter, stop_at) -> None:
    prompt = ids_of(tiny_base, SHORT)
    free = tiny_base.model.generate(torch.tensor([prompt]), **PLENTY, do_sample=False)[0].tolist()
    answer = free[len(prompt) :]
    stop_at(answer[3])
    kept = answer[: answer.index(answer[3])]
    scores = run_by_hand(tiny_base, guard, torch.tensor([[*prompt, *kept, answer[3]]])).scores[0, :, 0]
    with attach(tiny_base, guards=[guard]):
        found = tiny_base.chat(SHORT, max_new_tokens=N_NEW)
    assert (found.finish_reason, found.n_new_tokens) == ("stop", len(kept))
    assert found.text == tiny_base.tokenizer.decode(kept, skip_special_tokens=True).strip()
    assert found.verdicts[1].score == pytest.approx(float(scores[-1]), abs=SAME)


def test_the_last_token_of_an_answer_is_scored(tiny_base: Base, random_guard) -> None:
    """``generate`` never feeds its last token; an answer that only that token makes risky must be flagged."""
    guard = random_guard(tiny_base, seed=11)
    prompt = ids_of(tiny_base, QUESTION)
    text = tiny_base.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, min_new_tokens=12)
    scores = run_by_hand(tiny_base, guard, text).scores[0, :, 0].tolist()
    turns = [n for n in range(2, 13) if scores[len(prompt) + n - 1] > scores[len(prompt) + n - 2] + 0.05]
    n_new = turns[0]
    threshold = (scores[len(prompt) + n_new - 1] + scores[len(prompt) + n_new - 2]) / 2
    guard.set_calibration(Calibration(scale=(1.0,), bias=(0.0,), threshold=(threshold,)))
    with attach(tiny_base, guards=[guard]):
        flagged = [
            tiny_base.chat(QUESTION, max_new_tokens=n, min_new_tokens=n).verdicts[1].flagged for n in (n_new - 1, n_new)
        ]
    assert flagged == [False, True]


def test_a_prompt_that_does_not_fit_is_an_error(tiny_family, random_guard) -> None:
    base = tiny_family("gpt2")  # absolute positions: one too many would be an index error
    message = [Message("user", "z" * 200)]
    n_prompt = len(ids_of(base, message))
    room = N_POSITIONS - n_prompt
    with attach(base, guards=[random_guard(base)]):
        full = base.chat(message, max_new_tokens=room, min_new_tokens=room)
        with pytest.raises(
            InputError, match=rf"{n_prompt} tokens and the answer may take {room + 1}, but .* holds 256\. Shorten"
        ):
            base.chat(message, max_new_tokens=room + 1)
    assert full.n_new_tokens == room
    assert len(full.verdicts) == 2


@pytest.mark.parametrize("text", ["", " \n", "\u200b"])
def test_a_conversation_that_says_nothing_has_nothing_to_judge(tiny_base: Base, random_guard, text: str) -> None:
    """A guard would score the template; without one the base answers as ever."""
    empty = [Message("system", ""), Message("user", text)]
    assert tiny_base.chat(empty, max_new_tokens=1).n_new_tokens == 1
    guard = random_guard(tiny_base)
    for options in ({"guards": [guard]}, {"intercept": guard}):
        with attach(tiny_base, **options), pytest.raises(InputError, match="holds no text"):
            tiny_base.chat_batch([SHORT, empty])


def test_what_chat_refuses(tiny_base: Base, tiny_family, aligner: Adapter) -> None:
    with pytest.raises(UnsupportedError, match="is an encoder and cannot answer; expected a causal"):
        tiny_family("bert").chat(SHORT)
    with pytest.raises(InputError, match=r"nothing is attached\. Call attach"):
        tiny_base.chat(SHORT, strength=1.0)
    for option in sorted(_NOT_FOR_CHAT):
        with pytest.raises(UnsupportedError, match=rf"one answer a row.*got {option}\. Leave it out, or call"):
            tiny_base.chat(SHORT, **{option: 2})
    for option, value in {"use_cache": False, "input_ids": None, "max_length": 9, "output_scores": True}.items():
        with pytest.raises(UnsupportedError, match=rf"got {option}\."):
            tiny_base.chat(SHORT, **{option: value})
    with attach(tiny_base, [aligner]), pytest.raises(InputError, match="has 2 values for 4 rows"):
        tiny_base.chat_batch([SHORT] * 4, strength=[0.0, 1.0], max_new_tokens=1)
    assert tiny_base.chat_batch([]) == []


@pytest.mark.parametrize("messages", ["hi", None, [{"role": "user", "content": "hi"}], ["hi"], SHORT[0]])
def test_only_messages_are_a_conversation(tiny_base: Base, messages: object) -> None:
    for ask in (tiny_base.chat, tiny_base.encode, lambda given: tiny_base.chat_batch([given])):
        with pytest.raises(InputError, match=r"A conversation is a list of Message\(role, content\); got"):
            ask(messages)


@pytest.mark.parametrize("n", [0, -3])
def test_an_answer_has_at_least_one_token(tiny_base: Base, n: int) -> None:
    with pytest.raises(InputError, match=f"max_new_tokens must be at least 1; got {n}"):
        tiny_base.chat(SHORT, max_new_tokens=n)


def test_a_strength_without_an_aligner_is_an_error(tiny_base: Base, random_guard) -> None:
    with attach(tiny_base, guards=[random_guard(tiny_base)]) as attachment:
        with pytest.raises(InputError, match="only guards are attached"):
            tiny_base.chat(SHORT, strength=1.7)
        with pytest.raises(InputError, match="only guards are attached"), attachment.request(strength=0.0):
            pass
        assert tiny_base.chat(SHORT, max_new_tokens=1).verdicts


def test_sampling_options_reach_generate(tiny_base: Base) -> None:
    texts = set()
    for seed in range(4):
        torch.manual_seed(seed)
        texts.add(tiny_base.chat(SHORT, do_sample=True, temperature=2.0, **PLENTY).text)
    assert len(texts) > 1
    assert tiny_base.chat(SHORT, **PLENTY) == tiny_base.chat(SHORT, **PLENTY)
