"""What every adapter must do, whoever wrote it: ``CHECKS`` take an adapter of one kind and role and its base."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from safeside import Adapter, Attachment, Base, attach, create_adapter, load_adapter, save_adapter

SAME = 1e-4  # float32 sums in another order, over a few layers
SAME_BFLOAT16 = 0.1  # of scores and of deltas of size 1: 8 bits, over a few layers
TEXTS = ([9, 20, 31, 42, 53, 64, 75, 86], [11, 12, 13], [99, 98, 97, 96, 95])


def attached(base: Base, adapter: Adapter, strength: float = 1.0) -> Attachment:
    if adapter.config.role == "guard":
        return attach(base, guards=[adapter])
    return attach(base, aligners=[adapter], strength=strength)


def output_of(base: Base, adapter: Adapter, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scores or deltas of every token in one pass without a cache."""
    with attached(base, adapter) as attachment, torch.no_grad():
        base.model(ids, attention_mask=mask, use_cache=False)
        return last_output(attachment, adapter)


def last_output(attachment: Attachment, adapter: Adapter) -> Tensor:
    kept = attachment.record.scores if adapter.config.role == "guard" else attachment.record.deltas
    return kept[adapter.name]


def check_shapes(base: Base, adapter: Adapter) -> None:
    """Scores (B, T, K) in [0, 1], or deltas (B, T, D); logits and scores agree."""
    found = output_of(base, adapter, torch.tensor([TEXTS[0], TEXTS[0][::-1]]))
    size = len(adapter.config.labels) if adapter.config.role == "guard" else base.d_model
    assert found.shape == (2, len(TEXTS[0]), size)
    assert found.isfinite().all()
    assert found.std() > 1e-3, "an adapter with random weights should not give one constant"
    if adapter.config.role == "guard":
        assert found.dtype == torch.float32
        assert 0 <= found.min() <= found.max() <= 1


def check_padding_changes_nothing(base: Base, adapter: Adapter) -> None:
    """Rows of a padded batch, on either side, give what each gives alone."""
    longest = max(map(len, TEXTS))
    alone = [output_of(base, adapter, torch.tensor([text]))[0] for text in TEXTS]
    for side in ("left", "right"):
        rows, masks = [], []
        for text in TEXTS:
            gap = [0] * (longest - len(text))
            rows.append([*gap, *text] if side == "left" else [*text, *gap])
            masks.append([token > 0 for token in rows[-1]])
        mask = torch.tensor(masks)
        found = output_of(base, adapter, torch.tensor(rows), mask.long())
        for row, expected in enumerate(alone):
            torch.testing.assert_close(found[row][mask[row]], expected, rtol=SAME, atol=SAME)


def check_cached_equals_recomputed(base: Base, adapter: Adapter) -> None:
    """Token by token, and in two chunks, with a cache: as the whole text without one."""
    ids = torch.tensor([TEXTS[0]])
    whole = output_of(base, adapter, ids)
    for cuts in (range(ids.shape[1]), (0, 5)):
        steps = zip(cuts, [*cuts[1:], ids.shape[1]], strict=True)
        with attached(base, adapter) as attachment, torch.no_grad():
            cache, parts = DynamicCache(), []
            for start, stop in steps:
                base.model(ids[:, start:stop], past_key_values=cache, use_cache=True)
                parts.append(last_output(attachment, adapter))
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=SAME, atol=SAME)


def check_strength_zero_is_the_base(base: Base, adapter: Adapter) -> None:
    """A guard, or an aligner at strength 0, leaves every logit of the base bit for bit; so does detaching."""
    ids = torch.tensor([TEXTS[0]])
    with torch.no_grad():
        expected = base.model(ids).logits
        with attached(base, adapter, strength=0.0):
            assert torch.equal(base.model(ids).logits, expected)
        if adapter.config.role == "align":
            with attached(base, adapter):
                assert not torch.equal(base.model(ids).logits, expected)
        assert torch.equal(base.model(ids).logits, expected)


def check_saving_and_loading(base: Base, adapter: Adapter) -> None:
    """The same outputs bit for bit after a round trip to disk."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_adapter(save_adapter(adapter, folder, base), base)
    ids = torch.tensor([TEXTS[0]])
    assert loaded.config == adapter.config
    assert torch.equal(output_of(base, loaded, ids), output_of(base, adapter, ids))


def check_no_gradient_reaches_the_base(base: Base, adapter: Adapter) -> None:
    """Even where the base's weights ask for one; every weight of the adapter gets one."""
    trained = create_adapter(base, adapter.config)
    trained.load_state_dict(adapter.state_dict())
    base.model.requires_grad_(True)
    try:
        with attached(base, trained) as attachment:
            base.model(torch.tensor([TEXTS[0]]), use_cache=False)
            last_output(attachment, trained).square().sum().backward()
        assert all(parameter.grad is None for parameter in base.model.parameters())
    finally:
        base.model.requires_grad_(False)
    missing = [name for name, parameter in trained.named_parameters() if parameter.grad is None]
    assert missing == []


def check_bfloat16(base: Base, adapter: Adapter) -> None:
    """In bfloat16 outputs stay finite and close."""
    ids = torch.tensor([TEXTS[0]])
    half = create_adapter(base, adapter.config)
    half.load_state_dict(adapter.state_dict())
    found, expected = output_of(base, half.bfloat16().eval(), ids), output_of(base, adapter, ids)
    torch.testing.assert_close(found.float(), expected, rtol=SAME_BFLOAT16, atol=SAME_BFLOAT16)


def check_an_untrained_aligner_is_the_base(base: Base, adapter: Adapter) -> None:
    """Fresh from ``create_adapter``, at full strength."""
    if adapter.config.role == "guard":
        return
    ids = torch.tensor([TEXTS[0]])
    with torch.no_grad():
        expected = base.model(ids).logits
        with attached(base, create_adapter(base, adapter.config)):
            assert torch.equal(base.model(ids).logits, expected)


CHECKS: tuple[Callable[[Base, Adapter], None], ...] = (
    check_shapes,
    check_padding_changes_nothing,
    check_cached_equals_recomputed,
    check_strength_zero_is_the_base,
    check_saving_and_loading,
    check_no_gradient_reaches_the_base,
    check_bfloat16,
    check_an_untrained_aligner_is_the_base,
)
