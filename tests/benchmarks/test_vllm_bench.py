"""The vLLM bench without vLLM: its reference, what it compares, and how goals are judged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from safeside import Message, attach
from tidy import figure_row
from vllm_bench import goals_of, place_of
from vllm_matrix import STRENGTHS, Case, difference, make_bench, policy_of, prompts_of, reference


def test_the_reference_is_what_attach_gives(tmp_path: Path) -> None:
    """Token by token as ``Base.chat`` draws them, where no spare id is the likeliest."""
    bench = make_bench(Case("eager", n_new=6, lengths=(9,) * len(STRENGTHS)), tmp_path)
    encoded = bench.base.encode([Message("user", "Who sat on the mat?")])
    prompt = {"ids": encoded.ids, "strength": STRENGTHS[6], "n_new": 6}
    found = reference(bench, prompt)
    with attach(bench.base, aligners=[bench.aligner], guards=list(bench.guards)):
        wanted = bench.base.chat(
            [Message("user", "Who sat on the mat?")],
            strength=policy_of(STRENGTHS[6]),
            max_new_tokens=6,
            eos_token_id=-1,
        )
    assert bench.base.tokenizer.decode(found["tokens"], skip_special_tokens=True).strip() == wanted.text
    given = torch.tensor([step[-1] for step in found["steps"]])
    torch.testing.assert_close(given, torch.tensor(wanted.strength["refuse"]), atol=1e-5, rtol=0)


def test_differences_count_until_answers_part() -> None:
    first = {"tokens": [1, 2, 3], "steps": [[0.5], [0.4], [0.3]]}
    assert difference(first, {"tokens": [1, 9, 9], "steps": [[0.5], [0.3], [9.0]]}) == pytest.approx(0.1)
    assert difference(first, first) == 0.0


def test_long_prompts_share_their_first_blocks() -> None:
    long, other, short = prompts_of(Case("prefix", lengths=(260, 300, 20)))
    assert long["ids"][:256] == other["ids"][:256]
    assert [len(prompt["ids"]) for prompt in (long, other, short)] == [260, 300, 20]


def test_goals_are_of_decoding_beside_stock() -> None:
    labels = {"variant": "guard", "phase": "decode", "geometry": "toy"}
    rows = [
        figure_row(labels, "ratio_to_stock", 0.96),
        figure_row({**labels, "phase": "prefill"}, "ratio_to_stock", 0.5),
    ]
    rows += [figure_row({**labels, "variant": "guard_aligner"}, "ratio_to_stock", 0.89)]
    assert [(goal["variant"], goal["met"]) for goal in goals_of(rows)] == [("guard", True), ("guard_aligner", False)]
    assert len(set(map(place_of, rows))) == 3
