"""Attach and detach: order, hooks, errors, and the mix of several aligners."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from safeside import Adapter, Base, attach, fixed, load_base, ramp, step
from safeside.errors import AttachmentError, InputError, NotFiniteError, UnsupportedError
from safeside.verdicts import verdict_of
from twin import SAME, SAME_BFLOAT16, base_states, close, count_hooks, mixed_logits, run_by_hand

IDS = torch.tensor([[11, 90, 40, 77, 200, 9, 131, 50], [70, 12, 150, 33, 99, 70, 12, 8]])


@pytest.fixture(scope="module")
def aligners(session_base: Base, random_aligner) -> list[Adapter]:
    return [
        random_aligner(session_base, "first", seed=2),
        random_aligner(session_base, "second", seed=3, kind="plr"),
        random_aligner(session_base, "third", seed=4, kind="rtb"),
    ]


@pytest.fixture(scope="module")
def guard(session_base: Base, random_guard) -> Adapter:
    return random_guard(session_base)


@torch.no_grad()
def logits_of(base: Base, ids: Tensor = IDS, **options: object) -> Tensor:
    return base.model(ids, **options).logits


def test_hooks_are_gone_on_exit_and_on_exceptions(tiny_base: Base, aligners: list[Adapter], guard: Adapter) -> None:
    before, plain = count_hooks(tiny_base.model), logits_of(tiny_base)
    with attach(tiny_base, aligners, [guard]) as attachment:
        assert count_hooks(tiny_base.model) == before + 2 + tiny_base.n_layers + 1
        assert tiny_base.attachment is attachment
    assert count_hooks(tiny_base.model) == before
    with pytest.raises(ZeroDivisionError), attach(tiny_base, aligners, [guard]):
        raise ZeroDivisionError
    assert count_hooks(tiny_base.model) == before
    assert tiny_base.attachment is None
    assert torch.equal(logits_of(tiny_base), plain)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("readout", ["last", "attention"])
def test_a_row_of_padding_alone_has_no_score(tiny_family, random_guard, family: str, readout: str) -> None:
    """NaN, which flags; the other rows have the bits that they have beside any other row."""
    base = tiny_family(family)
    own = random_guard(base, readout=readout)
    keep = torch.ones(3, 8, dtype=torch.long)
    keep[0, 5:] = 0
    blank = keep.clone()
    blank[1] = 0
    with attach(base, guards=[own]) as attachment, torch.no_grad():
        found = []
        for mask in (keep, blank):
            base.decoder(input_ids=IDS[[0, 1, 0]], attention_mask=mask)
            found.append(attachment.record.scores["harm"])
    assert found[1][1].isnan().all()
    assert torch.equal(found[0][[0, 2]], found[1][[0, 2]])
    assert found[0].isfinite().all()
    assert verdict_of(own, found[1][1, -1].tolist()).flagged


def test_a_base_takes_one_attachment_at_a_time(tiny_base: Base, aligners: list[Adapter], guard: Adapter) -> None:
    first = attach(tiny_base, aligners[:1])
    for base in (tiny_base, replace(tiny_base)):  # another Base around the same model is no way around
        with pytest.raises(AttachmentError, match=r"already has an attachment\. Detach it"):
            attach(base, guards=[guard])
    first.detach()
    attach(tiny_base, guards=[guard]).detach()


def test_detach_twice_leaves_a_later_attachment_alone(tiny_base: Base, aligners: list[Adapter], guard: Adapter) -> None:
    first = attach(tiny_base, aligners[:1])
    first.detach()
    second = attach(tiny_base, guards=[guard])
    first.detach()
    assert tiny_base.attachment is second
    with pytest.raises(AttachmentError, match="already has an attachment"):
        attach(tiny_base, aligners[:1])


def test_a_detached_attachment_cannot_be_entered_again(tiny_base: Base, aligners: list[Adapter]) -> None:
    """It would look like safety and be none."""
    with attach(tiny_base, aligners[:1]) as attachment:
        pass
    gone = pytest.raises(AttachmentError, match=r"was detached: the base runs alone\. Call attach\(\) again")
    with gone, attachment:
        pass
    with gone, attachment.request(strength=1.0):
        pass


def test_an_exception_in_a_pass_leaves_the_next_one_working(tiny_base: Base, aligners: list[Adapter]) -> None:
    with attach(tiny_base, aligners[:1], strength=1.0):
        expected = logits_of(tiny_base)
        handle = tiny_base.blocks[1].register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits_of(tiny_base)
        handle.remove()
        assert torch.equal(logits_of(tiny_base), expected)


def test_a_failed_pass_spoils_its_cache_and_says_so(tiny_base: Base, aligners: list[Adapter]) -> None:
    with attach(tiny_base, aligners[:1], strength=1.0):
        cache = DynamicCache()
        logits_of(tiny_base, IDS[:, :4], past_key_values=cache)
        handle = tiny_base.blocks[1].register_forward_hook(lambda module, args, output: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits_of(tiny_base, IDS[:, 4:], past_key_values=cache)
        handle.remove()
        with pytest.raises(AttachmentError, match="8 tokens but the adapters have seen 4"):
            logits_of(tiny_base, IDS[:, 4:], past_key_values=cache)


def test_a_block_outside_its_decoder_is_an_error(tiny_base: Base, aligners: list[Adapter]) -> None:
    with attach(tiny_base, aligners[:1]), pytest.raises(AttachmentError, match="run the base model as a whole"):
        tiny_base.blocks[0](torch.zeros(1, 3, tiny_base.d_model))


def test_the_record_needs_a_pass(tiny_base: Base, guard: Adapter) -> None:
    with attach(tiny_base, guards=[guard]) as attachment, pytest.raises(AttachmentError, match="No forward pass"):
        _ = attachment.record


def test_a_pass_forgets_the_record_of_the_one_before(tiny_base: Base, guard: Adapter) -> None:
    """Its states are as large as the prompt; and a pass that fails does not pass for the one before."""
    with attach(tiny_base, guards=[guard]) as attachment:
        logits_of(tiny_base)
        held = weakref.ref(attachment.record.base_state)
        alive: list[bool] = []
        handle = tiny_base.blocks[0].register_forward_hook(lambda *_: alive.append(held() is not None))
        logits_of(tiny_base)
        handle.remove()
        assert alive == [False]
        assert attachment.record.scores["harm"].isfinite().all()
        with pytest.raises(InputError):
            tiny_base.decoder()
        with pytest.raises(AttachmentError, match="No forward pass has ended in this thread, or the last one failed"):
            _ = attachment.record


def test_a_call_without_inputs_is_an_error(tiny_base: Base, guard: Adapter) -> None:
    with attach(tiny_base, guards=[guard]), pytest.raises(InputError, match="without input_ids or inputs_embeds"):
        tiny_base.decoder()


def test_adapters_that_do_not_fit_are_refused(tiny_base, tiny_family, aligners, guard, random_guard) -> None:
    with pytest.raises(InputError, match="at least one aligner or guard"):
        attach(tiny_base)
    with pytest.raises(InputError, match=r"'harm' has role 'guard' but was passed as 'align'\. Swap"):
        attach(tiny_base, aligners=[guard])
    with pytest.raises(InputError, match=r"'first' has role 'align' but was passed as 'guard'"):
        attach(tiny_base, guards=aligners[:1])
    with pytest.raises(InputError, match="must differ within an attachment; got harm, harm"):
        attach(tiny_base, guards=[guard, random_guard(tiny_base)])
    stranger = guard.config.base.model_copy(update={"n_layers": 9})
    other = random_guard(tiny_base)
    other.config = guard.config.model_copy(update={"base": stranger})
    with pytest.raises(InputError, match=r"reads 9 layers of width 64, but .* has 3 of width 64\. Load the base"):
        attach(tiny_base, guards=[other])
    with pytest.raises(UnsupportedError, match="is an encoder"):
        attach(tiny_family("bert"), aligners=aligners[:1])
    assert tiny_base.attachment is None


def test_strengths_that_do_not_fit_are_refused(tiny_base: Base, aligners: list[Adapter], guard: Adapter) -> None:
    with pytest.raises(InputError, match="asks guard 'harm', which is not attached; attached guards: none"):
        attach(tiny_base, aligners, strength=ramp("harm", 0.2, 0.8))
    with pytest.raises(InputError, match="No aligner called frist; attached are first, second, third"):
        attach(tiny_base, aligners, strength={"frist": 1.0})
    with attach(tiny_base, aligners, [guard]) as attachment:
        with pytest.raises(InputError, match="asks guard 'spam'"), attachment.request(strength=step("spam", 0.5)):
            pass
        counts = pytest.raises(InputError, match=r"prompt_end counts tokens and starts at 1; got \(0, 3\)")
        with counts, attachment.request(prompt_end=[0, 3]):
            pass
        with (
            attachment.request(strength=fixed([0.1, 0.2, 0.3])),
            pytest.raises(InputError, match="3 values for a batch"),
        ):
            logits_of(tiny_base)
        with attachment.request(prompt_end=[3, 3, 3]), pytest.raises(InputError, match="prompt_end has 3 values for"):
            logits_of(tiny_base)
        rows = pytest.raises(InputError, match="has 2 values for 4 rows; expected one value, or one for each row")
        with rows, attachment.request(strength=[0.0, 1.0], prompt_end=[3, 3, 3, 3]):
            pass
    assert tiny_base.attachment is None


@pytest.mark.parametrize("settings", [{"strength": [0.0, 1.0]}, {"prompt_end": [3, 8]}])
def test_a_wider_batch_needs_to_be_announced(
    tiny_base: Base, aligners: list[Adapter], settings: dict[str, object]
) -> None:
    """Two settings for four rows: whose are they?  Only ``copies`` says that each row was repeated."""
    with attach(tiny_base, aligners) as attachment:
        with attachment.request(**settings), pytest.raises(InputError, match="2 values for a batch of 4 rows"):
            logits_of(tiny_base, IDS.repeat_interleave(2, 0))
        with attachment.request(**settings, copies=2):
            logits_of(tiny_base, IDS.repeat_interleave(2, 0))


def test_latched_strengths_need_the_prompts_end(tiny_base: Base, aligners: list[Adapter], guard: Adapter) -> None:
    with attach(tiny_base, aligners, [guard], strength=ramp(guard)) as attachment:
        with pytest.raises(
            AttachmentError, match=r"latched at the prompt's end, but prompt_end is not known\. Run ins"
        ):
            logits_of(tiny_base)
        with attachment.request(prompt_end=[8, 8]):
            logits_of(tiny_base)


@pytest.mark.parametrize("shape", [(2, 7), (2, 9), (1, 8)])
def test_a_mask_of_another_length_is_an_error(tiny_base: Base, guard: Adapter, shape: tuple[int, int]) -> None:
    wrong = pytest.raises(InputError, match=r"attention_mask has shape .* expected \(2, 8\) \(cached and new\)")
    with attach(tiny_base, guards=[guard]), wrong:
        logits_of(tiny_base, attention_mask=torch.ones(shape))


def test_several_aligners_add_up_in_any_order(tiny_base: Base, aligners: list[Adapter]) -> None:
    strengths = {"first": 0.3, "second": 0.9, "third": 1.4}
    expected = mixed_logits(tiny_base, IDS, [(aligner, strengths[aligner.name]) for aligner in aligners])
    state = base_states(tiny_base, IDS)[1]
    state = state + sum(strengths[one.name] * run_by_hand(tiny_base, one, IDS).delta for one in aligners)
    for order in itertools.permutations(aligners):
        with attach(tiny_base, order, strength=strengths):
            close(logits_of(tiny_base), expected)
            with torch.no_grad():
                close(tiny_base.decoder(IDS)[0], state)


def test_each_row_has_its_own_strength(tiny_base: Base, aligners: list[Adapter]) -> None:
    rows = torch.tensor([0.0, 1.5])
    expected = mixed_logits(tiny_base, IDS, [(aligners[0], rows[:, None, None])])
    for strength in (fixed(rows), rows, [0.0, 1.5], {"first": (0.0, 1.5)}):
        with attach(tiny_base, aligners[:1], strength=strength):
            close(logits_of(tiny_base), expected)


def test_aligners_left_out_of_a_mapping_are_off(tiny_base: Base, aligners: list[Adapter]) -> None:
    with attach(tiny_base, aligners, strength={"second": 0.8}):
        found = logits_of(tiny_base)
    close(found, mixed_logits(tiny_base, IDS, [(aligners[1], 0.8)]))


def test_a_request_overrides_the_attachment_and_ends(tiny_base: Base, aligners: list[Adapter]) -> None:
    plain = logits_of(tiny_base)
    with attach(tiny_base, aligners[:1], strength=1.0) as attachment:
        usual = logits_of(tiny_base)
        with attachment.request(strength=0.0):
            assert torch.equal(logits_of(tiny_base), plain)
            with attachment.request(strength=1.0):
                assert torch.equal(logits_of(tiny_base), usual)
            assert torch.equal(logits_of(tiny_base), plain)
        assert torch.equal(logits_of(tiny_base), usual)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_delta_that_is_not_finite_is_an_error_where_it_is_used(tiny_base, random_aligner, value: float) -> None:
    broken = random_aligner(tiny_base)
    with torch.no_grad():
        broken.head.up.weight[5, 0] = value
    plain = logits_of(tiny_base)
    with attach(tiny_base, [broken], strength=0.0) as attachment:
        assert torch.equal(logits_of(tiny_base), plain)
        for strength in (1.0, [0.0, 0.5]):
            with attachment.request(strength=strength), pytest.raises(NotFiniteError, match=r"NaN or infinity.*Detach"):
                logits_of(tiny_base)
        assert torch.equal(logits_of(tiny_base), plain)


def test_the_record_holds_the_reference_and_the_parts(tiny_base: Base, aligners: list[Adapter], guard: Adapter) -> None:
    final = base_states(tiny_base, IDS)[1]
    with attach(tiny_base, aligners[:2], [guard], strength={"first": 0.5, "second": 2.0}) as attachment:
        mixed = tiny_base.decoder(IDS)[0]
        record = attachment.record
    assert torch.equal(record.base_state, final)
    rebuilt = record.base_state + sum(record.strengths[name][..., None] * record.deltas[name] for name in record.deltas)
    close(mixed, rebuilt)
    assert list(record.deltas) == ["first", "second"]
    assert (mixed - final).abs().max() > 1000 * SAME


@torch.no_grad()
def test_a_bfloat16_base_takes_float32_adapters(tiny_folder, random_aligner) -> None:
    base = load_base(tiny_folder("llama"), dtype="bfloat16")
    aligner = random_aligner(base).float()
    with attach(base, [aligner], strength=1.0):
        found = base.model(IDS).logits
    assert found.dtype == torch.bfloat16
    close(found, mixed_logits(base, IDS, [(aligner, 1.0)]), SAME_BFLOAT16)


def test_no_gradient_passes_a_tap(tiny_base: Base, aligners: list[Adapter], guard: Adapter) -> None:
    """Not even into a base that could take one, such as one with a LoRA in training."""
    tiny_base.model.requires_grad_(True)
    try:
        with attach(tiny_base, aligners, [guard]) as attachment:
            tiny_base.model(IDS)
            deltas = sum(delta.square().sum() for delta in attachment.record.deltas.values())
            (deltas + attachment.record.logits["harm"].sum()).backward()
        assert all(parameter.grad is None for parameter in tiny_base.model.parameters())
        assert all(parameter.grad is not None for parameter in guard.parameters())
    finally:
        tiny_base.model.requires_grad_(False)
        for adapter in (*aligners, guard):
            adapter.zero_grad()


def test_guards_alone_leave_the_base_bit_for_bit(tiny_base: Base, guard: Adapter) -> None:
    plain = logits_of(tiny_base)
    with attach(tiny_base, guards=[guard]):
        assert torch.equal(logits_of(tiny_base), plain)


@pytest.mark.parametrize("given", ["builtin:harm", [1], 3])
def test_one_guard_intercepts(tiny_base: Base, given: object) -> None:
    with pytest.raises(InputError, match=r"intercept is one guard; got a (str|list|int)\."):
        attach(tiny_base, intercept=given)


def test_adapters_come_in_lists(tiny_base: Base, random_guard, random_aligner) -> None:
    guard, aligner = random_guard(tiny_base), random_aligner(tiny_base)
    for given in ({"guards": guard}, {"guards": "builtin:harm"}, {"guards": ["builtin:harm"]}, {"guards": None}):
        with pytest.raises(
            InputError, match=r"attach\(\) takes lists of adapters; guards is .* Write guards=\[\.\.\.\]"
        ):
            attach(tiny_base, **given)
    with pytest.raises(InputError, match="aligners is Adapter"):
        attach(tiny_base, aligner)
    with attach(tiny_base, (aligner,), (guard,)):
        pass
