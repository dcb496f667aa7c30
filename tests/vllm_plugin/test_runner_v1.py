"""The logits processor that follows requests."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_for_tests import engine
from safeside.errors import InputError, UnsupportedError
from safeside.vllm_plugin.kept import Kept
from safeside.vllm_plugin.table import RequestTable


@pytest.mark.parametrize("is_v2", [False, True])
def test_a_base_without_its_adapters_is_refused(plugin: Callable[[str], Any], is_v2: bool) -> None:
    """As a second --hf-overrides starts it: ordinary logits would be read as scores."""
    config = SimpleNamespace(
        use_v2_model_runner=is_v2, model_config=SimpleNamespace(architectures=["LlamaForCausalLM"])
    )
    with pytest.raises(UnsupportedError, match="runs LlamaForCausalLM, without its guards and aligners"):
        plugin("runner_v1").Strengths(config, "cpu")
    config.model_config.architectures = ["SafesideLlamaForCausalLM"]
    config.use_v2_model_runner = True
    plugin("runner_v1").Strengths(config, "cuda")


def asked(**values: Any) -> SimpleNamespace:
    usual: dict[str, Any] = {"n": 1, "temperature": 1.0}
    absent = ("extra_args", "structured_outputs", "logprob_token_ids", "logit_bias", "allowed_token_ids")
    return SimpleNamespace(**{**usual, **dict.fromkeys(absent), **values})


@pytest.mark.parametrize(
    ("facts", "params", "said"),
    [
        ({}, {"extra_args": {"safeside_tags": "a"}}, "There is no safeside_tags; expected safeside_strength or"),
        ({"slots": []}, {"extra_args": {"safeside_tag": "a"}}, "the engine has no guard"),
        ({}, {"extra_args": {"safeside_tag": ""}}, "a text that no other request has"),
        ({}, {"extra_args": {"safeside_tag": 7}}, "a text that no other request has; got 7"),
        ({}, {"extra_args": {"safeside_tag": "a"}, "n": 2}, "which 2 answers would share"),
        ({}, {"structured_outputs": {}, "logprob_token_ids": [8, 9]}, "In Python give it a safeside_tag"),
        ({}, {"n": 2, "structured_outputs": {}, "logprob_token_ids": [8]}, "Over HTTP ask for n=1"),
        ({}, {"logit_bias": {7: 1.0, 9: 100.0}}, r"'logit_bias' names \[9\]: these ids carry scores"),
        ({}, {"allowed_token_ids": [9, 8, 7]}, r"'allowed_token_ids' names \[8, 9\]"),
    ],
)
def test_requests_whose_scores_could_not_be_read_are_refused(
    plugin: Callable[[str], Any], facts: dict[str, Any], params: dict[str, Any], said: str
) -> None:
    usual = {"slots": [9, 8], "aligns": False, "thresholds": {"harm": 0.5}}
    strengths = type("Named", (plugin("runner_v1").Strengths,), {"facts": {**usual, **facts}})
    with pytest.raises(InputError, match=said):
        strengths.validate_params(asked(**params))
    strengths.validate_params(asked(extra_args={"safeside_tag": "a"} if facts.get("slots") != [] else {}))
    strengths.validate_params(asked(structured_outputs={}))
    strengths.validate_params(asked(logit_bias={7: 1.0}, allowed_token_ids=[6, 7]))


def test_tags_follow_their_requests_through_the_batch(plugin: Callable[[str], Any]) -> None:
    """Rows are moved, swapped, left and taken again, and the number of drawn tokens is read from vLLM's own lists."""
    runner = plugin("runner_v1")
    strengths = object.__new__(runner.Strengths)
    table = RequestTable(8, [slice(0, 1)], torch.device("cpu"))
    vars(strengths).update(config=engine(), table=table, kept=Kept(8), params={}, tagged={})

    def step(**changes: Any) -> list[tuple[int, str, int]]:
        update = SimpleNamespace(**{"removed": [], "added": [], "moved": [], **changes}) if changes else None
        strengths.update_state(update)
        return sorted(tuple(drawn) for drawn in strengths.kept.drawn)

    tagged, lists = {tag: asked(extra_args={"safeside_tag": tag}) for tag in "abc"}, {tag: [] for tag in "abc"}
    added = [(row, tagged[tag], [1], lists[tag]) for row, tag in enumerate("abc")]
    assert step(added=[*added, (3, asked(), [1], [])]) == [(0, "a", 0), (1, "b", 0), (2, "c", 0)]
    lists["a"] += [5, 6]
    assert step() == [(0, "a", 2), (1, "b", 0), (2, "c", 0)]
    assert step(moved=[(0, 3, True)]) == [(1, "b", 0), (2, "c", 0), (3, "a", 2)]
    assert step(removed=[1], moved=[(3, 1, False)]) == [(1, "a", 2), (2, "c", 0)]
    assert step(added=[(1, tagged["b"], [1], lists["b"])]) == [(1, "b", 0), (2, "c", 0)], "a was preempted"
    assert step(added=[(0, tagged["a"], [1], [5, 6])]) == [(0, "a", 2), (1, "b", 0), (2, "c", 0)]
    assert all(blocks is not None for blocks in strengths.kept.running.values()), "who comes back is no other request"
    assert (set(strengths.kept.running), list(strengths.kept.left)) == (set("abc"), [])
    step(added=[(4, asked(extra_args={"safeside_tag": "a"}), [1], [])])
    assert strengths.kept.running["a"] is None
    step(removed=[2])
    assert list(strengths.kept.left) == ["c"]


def test_a_row_that_another_request_fills_up_is_left_too(plugin: Callable[[str], Any]) -> None:
    """Where a request is preempted and another one moved onto its row at once, vLLM tells of the move alone."""
    strengths = object.__new__(plugin("runner_v1").Strengths)
    table, kept = RequestTable(8, [slice(0, 1)], torch.device("cpu")), Kept(8)
    vars(strengths).update(config=engine(), table=table, kept=kept, params={}, tagged={})
    first, last = (asked(extra_args={"safeside_tag": tag}) for tag in "ab")
    strengths.update_state(SimpleNamespace(removed=[], added=[(1, first, [1], []), (2, last, [1], [])], moved=[]))
    table.decided[1] = 0.75
    strengths.update_state(SimpleNamespace(removed=[], added=[], moved=[(2, 1, False)]))
    assert (list(kept.running), list(kept.left)) == (["b"], ["a"])
    strengths.update_state(SimpleNamespace(removed=[], added=[(2, first, [1], [])], moved=[]))
    assert kept.running["a"] == [], "it is back, and no other request with its tag"
    assert table.decided[2].tolist() == [0.75], "what was decided of its prompt stays"
    assert {row: tag for row, (tag, _) in strengths.tagged.items()} == {1: "b", 2: "a"}
