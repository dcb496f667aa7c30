"""The scripts that make the built-in base model, on a corpus of a few kilobytes."""

import csv
import gzip
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "pretrain"))

import prepare
import sources
import sources_chat
from model import Shape, build, export, grow, spread
from rows import Rows, stack
from synth import MAX_COPIES, synth

import train

CONTEXT = 32
CONTAMINATED = "What is the name of the largest lake?"
REFUSAL = re.compile(
    r"(?i)\bas an ai\b|\bunethical\b|\billegal\b|\bnot (able|allowed) to\b|\bunable to\b|"
    r"\bi (can'?t|cannot|won'?t|will not) (help|do|assist|provide|answer|tell|write)\b|sorry,? but"
)
CHAT = [
    {"role": "system", "content": "Answer the user."},
    {"role": "user", "content": "What is rain?"},
    {"role": "assistant", "content": "Rain is water."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "You are welcome!"},
]


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What prepare.py makes of 60 abstracts and 61 questions."""
    root = tmp_path_factory.mktemp("pretrain")
    towns = [f"Town{number}" for number in range(60)]
    abstracts = [{"title": town, "text": f"{town} is a town on the river with a mill ."} for town in towns]
    questions = [{"prompt": f"Where is {town}?", "response": f"{town} is near the sea."} for town in towns]
    questions.append({"prompt": CONTAMINATED, "response": "It is called Rumpelstiltskin."})
    write_rows(root / "text" / "dbpedia_abstracts_train_00.jsonl.gz", abstracts)
    write_rows(root / "data" / "instructions" / "rasbt_train.jsonl.gz", questions)
    write_rows(root / "data" / "mt_bench" / "test.jsonl.gz", [{"prompt": CONTAMINATED.upper()}])
    folders = ["--data", str(root / "data"), "--text", str(root / "text"), "--out", str(root / "work")]
    prepare.main([*folders, "--vocab", "384", "--val", "0.3", "--synthetic", "40"])
    return root / "work"


@pytest.fixture(scope="module")
def tokenizer(work: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(work / "tokenizer")


def tiny(tokenizer: PreTrainedTokenizerFast, layers: int) -> LlamaForCausalLM:
    """A small model all of whose weights matter."""
    torch.manual_seed(layers)
    shape = Shape(hidden=32, layers=layers, feed_forward=0, head=16, key_value_heads=1, context=CONTEXT)
    model = build(shape, tokenizer)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def run_training(work: Path, out: Path, *arguments: str) -> list[dict[str, str]]:
    """The lines of log.csv after a run of the smallest model."""
    sizes = ["--hidden", "32", "--layers", "1", "--head-dim", "16", "--ctx", str(CONTEXT), "--ctx1", "16"]
    recipe = ["--batch", "4", "--micro", "2", "--no-compile"]
    train.main(["--data", str(work), "--out", str(out), *sizes, *recipe, *arguments])
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_text(work: Path, name: str, tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.decode(np.fromfile(work / f"{name}.bin", np.uint16).tolist())


@pytest.mark.parametrize(
    ("n_old", "n_new", "originals"),
    [(1, 3, [0, 0, 0]), (5, 5, [0, 1, 2, 3, 4]), (5, 8, [0, 1, 1, 2, 2, 3, 3, 4]), (2, 3, [0, 0, 1])],
)
def test_spread_keeps_the_order_and_puts_extras_in_the_middle(n_old: int, n_new: int, originals: list[int]) -> None:
    layers = spread(n_old, n_new)
    assert [layer for layer, _ in layers] == originals
    assert [layer for layer, is_first in layers if is_first] == list(range(n_old))


def test_growth_keeps_the_function(tokenizer: PreTrainedTokenizerFast) -> None:
    small, large = tiny(tokenizer, 2), tiny(tokenizer, 5)
    tokens = torch.randint(0, len(tokenizer), (2, CONTEXT))
    assert not torch.equal(large(tokens).logits, small(tokens).logits)
    grow(large, small)
    assert torch.equal(large(tokens).logits, small(tokens).logits)


def test_growth_from_a_deeper_model_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SystemExit, match="Raise --layers"):
        grow(tiny(tokenizer, 1), tiny(tokenizer, 2))


def test_rows_are_shared_out_and_keep_their_weights(tmp_path: Path) -> None:
    n_tokens = 8 * 10 + 1
    np.arange(n_tokens, dtype=np.uint16).tofile(tmp_path / "file.bin")
    (np.arange(n_tokens) % 3 == 0).astype(np.uint8).tofile(tmp_path / "file.w")
    shares = [Rows(tmp_path / "file", 8, seed=1, rank=rank, world=2) for rank in range(2)]
    for _ in range(2):  # a second epoch reads the same rows again
        read = [rows.next() for rows in shares for _ in range(5)]
        assert sorted(int(tokens[0]) for tokens, _ in read) == list(range(0, 80, 8))
        for tokens, weights in read:
            assert tokens.tolist() == list(range(tokens[0], tokens[0] + 9))
            assert weights.tolist() == [float(token % 3 == 0) for token in tokens]
    batch = stack(read, torch.device("cpu"))
    assert torch.equal(batch.targets, batch.inputs + 1)
    assert torch.equal(batch.weights, (batch.targets % 3 == 0).float())


def test_a_file_without_a_row_for_each_process_is_refused(tmp_path: Path) -> None:
    np.arange(20, dtype=np.uint16).tofile(tmp_path / "file.bin")
    np.zeros(20, np.uint8).tofile(tmp_path / "file.w")
    with pytest.raises(SystemExit, match="expected at least 33"):
        Rows(tmp_path / "file", 16, seed=0, rank=0, world=2)


def test_synthetic_chat_is_deterministic_and_without_refusals() -> None:
    chats = synth(4000)
    assert chats == synth(4000)
    assert chats != synth(4000, seed=8)
    assert max(Counter(map(str, chats)).values()) == MAX_COPIES
    answers = [text for chat in chats for role, text in chat if role == "assistant"]
    assert all(answers)
    assert not [answer for answer in answers if REFUSAL.search(answer)]


def test_cleaning_undoes_typography_and_penn_spacing() -> None:
    assert sources.clean("\u201cIt\u2019s\u201d  so\u2026\n\n\n\nYes ") == '"It\'s" so...\n\nYes'
    assert sources.joined("a well @-@ known 1 @,@ 000 ( it 's so ) .") == "a well-known 1,000 (it's so)."


def test_a_dialogue_runs_from_the_user_to_the_assistant() -> None:
    text = "B: Early.\nA: Hello.\nA: Anyone?\nnoise\nB: Yes.\nA: Good."
    assert sources_chat.parse_dialogue(text) == [("user", "Hello. Anyone?"), ("assistant", "Yes.")]


def test_prepare_drops_evaluation_questions_and_splits_each_source(
    work: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = {name: read_text(work, name, tokenizer) for name in ("pretrain", "anneal", "val_text", "val_chat")}
    assert not [name for name, text in texts.items() if "Rumpelstiltskin" in text]
    meta = json.loads((work / "meta.json").read_text())
    assert meta["dbpedia_abstracts"]["docs"] + meta["_val_text"]["docs"] == 60
    held_out = set(re.findall(r"Where is (Town\d+)\?", texts["val_chat"]))
    assert len(held_out) == 60 - meta["rasbt"]["docs"] > 0
    assert not held_out & set(re.findall(r"Where is (Town\d+)\?", texts["pretrain"] + texts["anneal"]))


def test_token_files_agree_with_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [(message["role"], message["content"]) for message in CHAT]
    tokens, weights = prepare.encode([chat], tokenizer)
    made = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert tokens.tolist() == [*made["input_ids"], tokenizer.eos_token_id]
    assert weights.tolist() == [*made["assistant_masks"], 0]


def test_the_export_loads_with_its_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny(tokenizer, 2)
    export(model, tokenizer, tmp_path)
    loaded, same_tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    assert loaded.config.use_cache
    assert not model.config.use_cache
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].to(torch.bfloat16)), name
    ends = [same_tokenizer.convert_tokens_to_ids("<|end|>"), same_tokenizer.eos_token_id]
    assert loaded.generation_config.eos_token_id == ends
    tokens = same_tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    expected = "<|bos|><|system|>Answer the user.<|end|><|user|>What is rain?<|end|><|assistant|>"
    assert same_tokenizer.decode(tokens) == expected
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["additional_special_tokens"] == prepare.SPECIAL_TOKENS[3:]


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    options = train.parse(["--warmup", "0.1", "--decay-from", "0.5"])
    scales = [train.rate_scale(options, share) for share in (0.0499, 0.2, 0.4999, 0.75, 1.0)]
    assert scales == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])


def test_training_finishes_and_resumes_from_its_state(work: Path, tmp_path: Path) -> None:
    (first,) = run_training(work, tmp_path, "--max-steps", "3")
    assert (first["step"], first["tokens"], first["phase"]) == ("3", str(3 * 4 * CONTEXT), "1")
    first_weights = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    _, second = run_training(work, tmp_path, "--max-steps", "5", "--resume", "--anneal-from", "0")
    assert (second["step"], second["tokens"], second["phase"]) == ("5", str(5 * 4 * CONTEXT), "2")
    assert float(second["minutes"]) >= float(first["minutes"])
    weights = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert any(not torch.equal(weights[name], first_weights[name]) for name in weights)
    assert torch.load(tmp_path / "state.pt")["step"] == 5
    assert not list(tmp_path.glob("*.part"))


def test_a_grown_model_starts_where_the_small_one_ended(work: Path, tmp_path: Path) -> None:
    (small,) = run_training(work, tmp_path / "small", "--max-steps", "3")
    initial = ["--init", str(tmp_path / "small"), "--layers", "3"]
    start, _ = run_training(work, tmp_path / "large", "--max-steps", "1", *initial)
    assert start["step"] == "0"
    # The small model was rounded to bf16 when it was exported.
    assert float(start["val_text_nats"]) == pytest.approx(float(small["val_text_nats"]), abs=0.01)
