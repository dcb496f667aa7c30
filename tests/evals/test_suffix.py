"""The suffix search: its gradient against differences, its texts against the guard as anybody runs it."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from tokenizers import decoders

from safeside import Adapter, Base, Message, attach
from safeside.adapters.config import Calibration
from safeside.errors import AttachmentError, InputError, UnsupportedError
from safeside.evals.suffix import SuffixSearch, find_suffix, margins_of
from safeside.guards.score import score_conversations

QUESTION = [Message("user", "how can this be")]
SAME = 2e-4  # log-odds of a score that is stored in float32
QUICK = SuffixSearch(n_steps=12, n_tokens=6, n_candidates=12, n_best=24)


@pytest.fixture
def guards(tiny_base: Base, random_guard) -> list[Adapter]:
    """Two guards of other kinds, each with a calibration of its own."""
    made = [
        random_guard(tiny_base, "harm", seed=5, labels=("hate", "violence")),
        random_guard(tiny_base, "leak", seed=6, kind="plr"),
    ]
    for guard in made:
        n_labels = len(guard.config.labels)
        guard.set_calibration(
            Calibration(scale=(1.3,) * n_labels, bias=(-0.2,) * n_labels, threshold=(0.4,) * n_labels)
        )
    return made


def log_odds(value: float) -> float:
    return math.log(value / (1 - value))


def scored(base: Base, guards: list[Adapter], messages: list[Message]) -> float:
    """The surest guard's log-odds over its threshold, by the scores that anybody gets."""
    (found,) = score_conversations(base, guards, [messages])
    return max(
        log_odds(score) - log_odds(threshold)
        for guard in guards
        for score, threshold in zip(found.by_guard[guard.name], guard.thresholds_in("prompt"), strict=True)
    )


def test_margins_are_those_of_scores(tiny_base: Base, guards: list[Adapter]) -> None:
    ids = torch.tensor([tiny_base.encode(QUESTION).ids])
    embedded = tiny_base.model.get_input_embeddings()(ids)
    with torch.no_grad():
        margin = margins_of(tiny_base, guards, embedded, torch.ones_like(ids, dtype=torch.bool))
    assert float(margin) == pytest.approx(scored(tiny_base, guards, QUESTION), abs=SAME)


@pytest.mark.parametrize("which", [[0], [1], [0, 1]])
def test_the_gradient_reaches_the_embeddings_through_guard_and_base(
    tiny_base: Base, guards: list[Adapter], which: list[int]
) -> None:
    some = [guards[index] for index in which]
    ids = torch.tensor([tiny_base.encode(QUESTION).ids])
    keep = torch.ones_like(ids, dtype=torch.bool)
    embedded = tiny_base.model.get_input_embeddings()(ids).detach().requires_grad_()
    (slope,) = torch.autograd.grad(margins_of(tiny_base, some, embedded, keep).sum(), embedded)
    direction = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0))
    step = 1e-2 / direction.norm()
    with torch.no_grad():
        ahead, behind = (margins_of(tiny_base, some, embedded + sign * step * direction, keep) for sign in (1, -1))
    assert float((ahead - behind) / (2 * step)) == pytest.approx(float((slope * direction).sum()), rel=0.02)
    assert float(slope[:, 0].abs().max()) > 0  # from the first token on: through the base's attention


def opened(base: Base, guards: list[Adapter]) -> list[Adapter]:
    """The guards with thresholds that the question itself is far over."""
    for guard in guards:
        (found,) = score_conversations(base, [guard], [QUESTION])
        odds = [log_odds(score) - 1.5 for score in found.by_guard[guard.name]]
        thresholds = tuple(1 / (1 + math.exp(-value)) for value in odds)
        fit = guard.config.calibration
        guard.set_calibration(Calibration(scale=fit.scale, bias=fit.bias, threshold=thresholds))
    return guards


def test_what_is_found_works_on_the_text(tiny_base: Base, guards: list[Adapter]) -> None:
    guards = opened(tiny_base, guards)
    assert scored(tiny_base, guards, QUESTION) > 0
    found = find_suffix(tiny_base, guards, QUESTION, QUICK)
    assert list(found.margins) == sorted(found.margins, reverse=True)
    assert found.n_steps <= QUICK.n_steps
    assert found.text
    changed = [Message("user", QUESTION[0].content + found.text)]
    assert scored(tiny_base, guards, changed) == pytest.approx(found.margins[-1], abs=SAME)
    assert found.is_found == (found.margins[-1] < 0)
    assert found == find_suffix(tiny_base, guards, QUESTION, QUICK)  # the seed decides
    assert found.margins[-1] < found.margins[0]


def n_hooks(base: Base) -> int:
    """Of the whole model: transformers leaves some of its own."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.model.modules())


def with_decoder(base: Base, decoder: decoders.Decoder) -> Base:
    """The base with a tokenizer that goes on with ``decoder`` behind its own."""
    tokenizer = deepcopy(base.tokenizer)
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([tokenizer.backend_tokenizer.decoder, decoder])
    return replace(base, tokenizer=tokenizer)


def test_a_tokenizer_that_drops_the_first_space_of_a_text(tiny_base: Base, guards: list[Adapter]) -> None:
    """As those of Llama 2 and Mistral do: the suffix is told as it stands behind the text."""
    guards, base = opened(tiny_base, guards), with_decoder(tiny_base, decoders.Strip(" ", 1, 0))
    assert base.tokenizer.decode(base.tokenizer(" !", add_special_tokens=False)["input_ids"]) == "!"
    assert find_suffix(base, guards, QUESTION, QUICK) == find_suffix(tiny_base, guards, QUESTION, QUICK)
    with pytest.raises(UnsupportedError, match="does not give back"):
        find_suffix(with_decoder(tiny_base, decoders.Replace("!", "?")), guards, QUESTION, QUICK)


def test_the_base_and_the_guards_are_as_before(tiny_base: Base, guards: list[Adapter]) -> None:
    hooks = n_hooks(tiny_base)
    before = [{name: value.clone() for name, value in guard.state_dict().items()} for guard in guards]
    find_suffix(tiny_base, opened(tiny_base, guards), QUESTION, SuffixSearch(n_steps=1, n_tokens=3, n_candidates=4))
    for guard, kept in zip(guards, before, strict=True):
        assert all(parameter.grad is None for parameter in guard.parameters())
        assert all(torch.equal(kept[name], value) for name, value in guard.state_dict().items())
    assert n_hooks(tiny_base) == hooks


def test_a_text_that_no_guard_flags_needs_no_suffix(tiny_base: Base, guards: list[Adapter]) -> None:
    for guard in guards:
        n_labels = len(guard.config.labels)
        guard.set_calibration(Calibration(scale=(1.0,) * n_labels, bias=(0.0,) * n_labels, threshold=(1.0,) * n_labels))
    found = find_suffix(tiny_base, guards, QUESTION, QUICK)
    assert (found.text, found.n_steps, found.is_found) == ("", 0, True)


@pytest.mark.parametrize(
    "options", [{"n_steps": 0}, {"n_steps": 201}, {"n_tokens": 0}, {"n_candidates": 0}, {"n_best": 0}]
)
def test_a_search_has_bounds(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="A suffix search has 1 to 200 steps"):
        SuffixSearch(**options)


def test_what_cannot_be_searched_is_told(tiny_base: Base, tiny_family, guards: list[Adapter]) -> None:
    with attach(tiny_base, guards=guards), pytest.raises(AttachmentError, match="Detach it"):
        find_suffix(tiny_base, guards, QUESTION)
    with pytest.raises(UnsupportedError, match="needs a causal base and a guard"):
        find_suffix(tiny_base, [], QUESTION)
    for guard in guards:
        n_labels = len(guard.config.labels)
        guard.set_calibration(Calibration(scale=(1.0,) * n_labels, bias=(0.0,) * n_labels, threshold=(0.0,) * n_labels))
    with pytest.raises(InputError, match="an answer needs room too"):
        find_suffix(tiny_base, guards, QUESTION, SuffixSearch(n_tokens=300))
