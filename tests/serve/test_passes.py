"""One pass for rows of different requests, and rows that join and leave: against each row alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from safeside import Adapter, Base, attach, fixed, ramp, step
from safeside.mixing import Policy
from safeside.policies import timed
from safeside.serve.batch import Rows, joined, selected
from safeside.serve.passes import Pass, Runner, Setting
from safeside.types import Message

CLOSE = 2e-5  # float32: another batch shape is another order of sums
FAMILIES = ("llama", "gemma2", "opt")  # rotary, with windows, with learned positions
Make = Callable[..., Adapter]


@pytest.fixture
def runner(tiny_base: Base, random_guard: Make, random_aligner: Make) -> Runner:
    return Runner(tiny_base, [random_guard(tiny_base)], [random_aligner(tiny_base)])


def prompt(base: Base, text: str) -> tuple[int, ...]:
    return base.encode([Message("user", text)]).ids


def setting(ids: Sequence[int], policy: Policy) -> Setting:
    return Setting(len(ids), {"refuse": policy})


POLICIES = (
    fixed(0.0),
    fixed(0.7),
    ramp("harm", 0.2, 0.8),
    step("harm", 0.5, 0.1, 1.5),
    timed(ramp("harm", 0.3, 0.6, latched=False), reads="both", margin=0.1),
    timed(fixed(1.0), first_tokens=2),
)


@torch.no_grad()
def greedy(runner: Runner, ids: Sequence[int], policy: Policy, n_tokens: int) -> list[Pass]:
    """Passes of one row alone."""
    found = [runner.prefill([ids], [setting(ids, policy)])]
    for _ in range(n_tokens):
        found.append(runner.step(found[-1].rows, [int(found[-1].logits.argmax())], [setting(ids, policy)]))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_mixed_batch_is_its_rows_alone(
    family: str, tiny_family: Callable[[str], Base], random_guard: Make, random_aligner: Make
) -> None:
    """Rows of every policy and of different lengths join one by one, while the others are at another token."""
    base = tiny_family(family)
    runner = Runner(base, [random_guard(base)], [random_aligner(base)])
    try:
        texts = ["cat " * (1 + 2 * index) for index in range(len(POLICIES))]
        prompts = [prompt(base, text) for text in texts]
        alone = [greedy(runner, ids, policy, len(POLICIES)) for ids, policy in zip(prompts, POLICIES, strict=True)]
        rows: Rows | None = None
        settings: list[Setting] = []
        n_fed = [0] * len(prompts)
        for index, (ids, policy) in enumerate(zip(prompts, POLICIES, strict=True)):
            begun = runner.prefill([ids], [setting(ids, policy)])
            rows = begun.rows if rows is None else joined(rows, begun.rows)
            settings.append(setting(ids, policy))
            tokens = [int(alone[row][n_fed[row]].logits.argmax()) for row in range(index + 1)]
            found = runner.step(rows, tokens, settings)
            rows = found.rows
            for row in range(index + 1):
                n_fed[row] += 1
                expected = alone[row][n_fed[row]]
                assert torch.allclose(found.logits[row], expected.logits[0], atol=1e-4, rtol=0.0)
                assert found.scores[row][-1]["harm"] == pytest.approx(expected.scores[0][-1]["harm"], abs=CLOSE)
                assert found.strengths[row] == pytest.approx(expected.strengths[0], abs=CLOSE * 10)
    finally:
        runner.detach()


@pytest.mark.parametrize("judge_every", [2, 3, 50])
@torch.no_grad()
def test_tokens_that_waited_have_the_scores_of_those_that_did_not(
    tiny_base: Base, random_guard: Make, random_aligner: Make, judge_every: int
) -> None:
    """Rows join and leave under way; what waits is judged before they join, and when it is asked for."""
    texts = ["cat", "the cat sat on the mat", "then the hat is in", "how can it be"]
    prompts = [prompt(tiny_base, text) for text in texts]
    policies = [fixed(0.0), fixed(0.7), step("harm", 0.5, 0.1, 1.5), ramp("harm", 0.2, 0.8)]
    settings = [setting(ids, policy) for ids, policy in zip(prompts, policies, strict=True)]
    adapters = [random_guard(tiny_base)], [random_aligner(tiny_base)]
    heard: dict[int, dict[int, list[float]]] = {}
    lags = set()
    for every in (1, judge_every):
        runner = Runner(tiny_base, *adapters, every)
        own = heard[every] = {row: [] for row in range(len(prompts))}

        def hear(
            scores: tuple[tuple[object, ...], ...], rows: Sequence[int], own: dict[int, list[float]] = own
        ) -> None:
            for row, tokens in zip(rows, scores, strict=True):
                own[row] += [token["harm"][0] for token in tokens]  # type: ignore[index]

        present, rows = [0, 1], runner.prefill(prompts[:2], settings[:2]).rows
        for number in range(12):
            if number in (4, 7):  # one joins
                hear(runner.judge(rows), present)
                new = len(prompts) - 2 if number == 4 else len(prompts) - 1
                rows = joined(rows, runner.prefill([prompts[new]], [settings[new]]).rows)
                present.append(new)
            if number == 9:  # one leaves
                rows, present = selected(rows, [0, 2, 3]), [present[place] for place in (0, 2, 3)]
            found = runner.step(rows, [20 + row for row in present], [settings[row] for row in present])
            hear(found.scores, present)
            lags.add(number + 1 - len(own[0]))
            rows = found.rows
        hear(runner.step(rows, [9] * 3, [settings[row] for row in present], judges_now=True).scores, present)
        runner.detach()
    assert len(lags) > 1
    assert {row: len(scores) for row, scores in heard[1].items()} == {0: 13, 1: 9, 2: 9, 3: 6}
    for row, scores in heard[1].items():
        waited = heard[judge_every][row]
        assert waited == pytest.approx(scores[: len(waited)], abs=CLOSE)
        assert len(waited) == len(scores) or row == 1, "only who left early may be unheard at the end"


@torch.no_grad()
def test_no_token_waits_beside_a_strength_that_follows_the_answer(
    tiny_base: Base, random_guard: Make, random_aligner: Make
) -> None:
    runner = Runner(tiny_base, [random_guard(tiny_base)], [random_aligner(tiny_base)], 8)
    ids = prompt(tiny_base, "the cat")
    for policy, n_heard in ((fixed(0.5), 0), (ramp("harm", 0.2, 0.8), 0), (ramp("harm", 0.2, 0.8, latched=False), 1)):
        rows = runner.prefill([ids], [setting(ids, policy)]).rows
        assert [len(found) for found in runner.step(rows, [20], [setting(ids, policy)]).scores] == [n_heard]


@torch.no_grad()
def test_rows_with_tokens_that_wait_do_not_join(tiny_base: Base, random_guard: Make) -> None:
    runner, ids = Runner(tiny_base, [random_guard(tiny_base)], [], 8), prompt(tiny_base, "the cat")
    first, second = (runner.prefill([ids], [Setting(len(ids), {})]).rows for _ in range(2))
    first = runner.step(first, [20], [Setting(len(ids), {})]).rows
    with pytest.raises(AssertionError, match="judged before rows join"):
        joined(first, second)


@torch.no_grad()
def test_the_strength_of_each_row_is_what_attach_gives(
    tiny_base: Base, random_guard: Make, random_aligner: Make
) -> None:
    """The oracle is the attachment's own answer under each policy."""
    guard, aligner = random_guard(tiny_base), random_aligner(tiny_base)
    ids = prompt(tiny_base, "the cat sat on the mat")
    runner = Runner(tiny_base, [guard], [aligner])
    found = [greedy(runner, ids, policy, 6) for policy in POLICIES]
    runner.detach()
    for policy, passes in zip(POLICIES, found, strict=True):
        with attach(tiny_base, [aligner], [guard], strength=policy):
            answer = tiny_base.chat([Message("user", "the cat sat on the mat")], max_new_tokens=7, eos_token_id=[-1])
        assert [one.strengths[0]["refuse"] for one in passes] == pytest.approx(answer.strength["refuse"][:7], abs=1e-6)
        ids_written = [int(one.logits.argmax()) for one in passes]
        assert tiny_base.tokenizer.decode(ids_written, skip_special_tokens=True).strip() == answer.text


@torch.no_grad()
def test_other_rows_change_no_bit_at_equal_shape(runner: Runner) -> None:
    """Text, strength and policy of the other rows."""
    own = prompt(runner.base, "the cat sat")
    others = [prompt(runner.base, text) for text in ("the dog ran", "a hat is in", "how can it b")]
    length = max(map(len, (own, *others)))
    found = []
    for other, policy in [(others[0], fixed(0.0)), (others[1], fixed(2.0)), (others[2], ramp("harm", 0.0, 0.1))]:
        padded = (*other, *other)[:length]
        settings = [setting(own, ramp("harm", 0.2, 0.8)), setting(padded, policy)]
        first = runner.prefill([own, padded], settings)
        passes = [first]
        for _ in range(4):
            tokens = [int(logits.argmax()) for logits in passes[-1].logits]
            passes.append(runner.step(passes[-1].rows, tokens, settings))
        found.append(passes)
    for passes in found[1:]:
        for one, other_pass in zip(found[0], passes, strict=True):
            assert torch.equal(one.logits[0], other_pass.logits[0])
            assert one.scores[0] == other_pass.scores[0]
            assert one.strengths[0] == other_pass.strengths[0]
    assert not torch.equal(found[0][1].logits[1], found[1][1].logits[1])


@torch.no_grad()
def test_rows_that_leave_free_their_slots_and_change_nothing_but_the_shape(runner: Runner) -> None:
    prompts = [prompt(runner.base, text) for text in ("cat", "the cat sat on the mat and the hat", "then the")]
    settings = [setting(ids, fixed(0.5)) for ids in prompts]
    first = runner.prefill(prompts, settings)
    expected = runner.step(first.rows, [5, 6, 7], settings)
    again = runner.prefill(prompts, settings)
    left = selected(again.rows, [0, 2])
    assert left.keep.shape == (2, max(len(prompts[0]), len(prompts[2])))
    assert all(layer.keys.shape[2] == left.keep.shape[1] for layer in left.cache.layers if layer.get_seq_length())
    found = runner.step(left, [5, 7], [settings[0], settings[2]])
    assert torch.allclose(found.logits, expected.logits[[0, 2]], atol=1e-4)


@torch.no_grad()
def test_without_adapters_the_base_runs_alone(tiny_base: Base) -> None:
    runner, ids = Runner(tiny_base, [], []), prompt(tiny_base, "the cat")
    found = runner.prefill([ids], [Setting(len(ids), {})])
    assert torch.equal(found.logits[0], tiny_base.model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1])
    assert (found.scores, found.strengths) == ((({},),), ({},))
    assert tiny_base.attachment is None


@torch.no_grad()
def test_the_head_reads_states_without_gaps(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gaps, be it before a single row, CPUs copy a tied head's matrix: 0.41 s for 0.02 s at a 0.5B geometry."""
    seen: list[tuple[int, ...]] = []

    def head_logits(base: Base, states: torch.Tensor) -> torch.Tensor:
        seen.append(states.stride())
        return plain(base, states)

    plain = Base.head_logits
    monkeypatch.setattr(Base, "head_logits", head_logits)
    width, ids = tiny_base.d_model, prompt(tiny_base, "the cat")
    for n_rows in (1, 2):
        Runner(tiny_base, [], []).prefill([ids] * n_rows, [Setting(len(ids), {})] * n_rows)
    assert seen == [(width, width, 1)] * 2
