"""The slow, obvious twin of the core: no hooks of safeside's, no cache, no batching, mixing in logits.

A fast path is right when it gives what these functions give.  They run the base alone, hand its states to an adapter by
hand, and mix explicit logits ``(1 - s) z_base + s z_side``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from safeside import Adapter, Base
from safeside.adapters.adapter import SideOutput
from safeside.base.families import locate
from safeside.base.taps import Tape
from tiny import END, EOS

# Float32 sums of a few hundred terms of size 1 in another order: errors stay under 1e-5; ten times that is allowed.
SAME = 1e-4
# bfloat16 keeps 8 bits: one rounding of states of size 4 is 0.016, and logits sum 64 of them.
SAME_BFLOAT16 = 0.15


def close(found: Tensor, expected: Tensor, tolerance: float = SAME) -> None:
    """Assert that two tensors differ by no more than ``tolerance`` anywhere."""
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)


def positions_of(keep: Tensor) -> Tensor:
    """Position ids as ``generate`` makes them from a mask."""
    return (keep.long().cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def base_states(base: Base, ids: Tensor, keep: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """(embeddings, after block 1, ..., after block L *before* the final norm), and the final normed state."""
    assert base.attachment is None, "the twin runs on the bare base"
    last: list[Tensor] = []
    keep = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep
    options = {} if base.is_encoder else {"position_ids": positions_of(keep), "use_cache": False}
    norm = locate(base.decoder, base.family.norm) if base.family.norm else None
    handle = norm.register_forward_pre_hook(lambda _, args: last.append(args[0])) if norm is not None else None
    output = base.decoder(input_ids=ids, attention_mask=keep, output_hidden_states=True, **options)
    if handle is not None:
        handle.remove()
    states = list(output.hidden_states)
    return states[:-1] + (last or states[-1:]), output[0]


def run_by_hand(base: Base, adapter: Adapter, ids: Tensor, keep: Tensor | None = None) -> SideOutput:
    """What an adapter gives on a whole text, its taps read from the base's hidden states."""
    keep = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep
    states, final = base_states(base, ids, keep)
    tape = Tape(keep, ids.shape[1], is_causal=not base.is_encoder)
    for layer in adapter.config.layers:
        adapter.read(tape, layer, states[layer])
    tape.final = final
    with torch.no_grad():
        return adapter(tape)


@torch.no_grad()
def head_by_hand(base: Base, state: Tensor) -> Tensor:
    """Logits of a final state by the base's own head (scaling included, gemma2's soft-cap left out)."""
    cap, base.model.config.final_logit_softcapping = soft_cap(base), None

    def replace(module: nn.Module, args: object, output: object) -> object:
        output["last_hidden_state"] = state.to(base.dtype)
        return output

    handle = base.decoder.register_forward_hook(replace)
    ids = torch.zeros(state.shape[:2], dtype=torch.long)
    logits = base.model(input_ids=ids, use_cache=False).logits
    handle.remove()
    base.model.config.final_logit_softcapping = cap
    return logits


def soft_cap(base: Base) -> float | None:
    """The cap of the family's logits, where it has one (gemma2)."""
    return base.model.config.to_dict().get("final_logit_softcapping")


@torch.no_grad()
def mixed_logits(
    base: Base, ids: Tensor, parts: Sequence[tuple[Adapter, float | Tensor]], keep: Tensor | None = None
) -> Tensor:
    """``z_base + sum s_i (z_i - z_base)`` with z_i the logits of the base's state plus aligner i's delta."""
    state = base_states(base, ids, keep)[1]
    from_base = mixed = head_by_hand(base, state).float()
    for aligner, strength in parts:
        from_side = head_by_hand(base, state + run_by_hand(base, aligner, ids, keep).delta).float()
        mixed = mixed + strength * (from_side - from_base)
    cap = soft_cap(base)
    return mixed if cap is None else cap * torch.tanh(mixed / cap)


@dataclass
class Answer:
    """One greedy answer of the twin: its ids, and by aligner the strength behind each of them."""

    ids: list[int] = field(default_factory=list)
    strengths: dict[str, list[float]] = field(default_factory=dict)


def answer_by_hand(
    base: Base,
    prompt: Sequence[int],
    aligners: Mapping[Adapter, Callable[[list[float]], float]],
    guards: Sequence[Adapter],
    n_new: int,
    score_of: str = "",
) -> Answer:
    """Greedy decoding that recomputes everything on the whole text for every token.

    Each aligner comes with a function from the scores so far (of guard ``score_of``, from the prompt's last token on)
    to its strength.  Tokens that end a text are left out, as ``min_new_tokens`` does.
    """
    answer = Answer(strengths={aligner.config.name: [] for aligner in aligners})
    scores: list[float] = []
    for _ in range(n_new):
        ids = torch.tensor([[*prompt, *answer.ids]])
        asked = [guard for guard in guards if guard.config.name == score_of]
        scores += [float(run_by_hand(base, guard, ids).scores[0, -1].max()) for guard in asked]
        parts = [(aligner, rule(scores)) for aligner, rule in aligners.items()]
        for aligner, strength in parts:
            answer.strengths[aligner.config.name].append(strength)
        logits = mixed_logits(base, ids, parts)[0, -1]
        logits[[EOS, END]] = -torch.inf
        answer.ids.append(int(logits.argmax()))
    return answer


def pad(rows: Sequence[Sequence[int]], side: str, pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and keep mask of rows of different lengths, padded on one side."""
    width = max(map(len, rows))
    fill = [[pad_id] * (width - len(row)) for row in rows]
    pairs = list(zip(rows, fill, strict=True))
    ids = [[*gap, *row] if side == "left" else [*row, *gap] for row, gap in pairs]
    keep = [
        [False] * len(gap) + [True] * len(row) if side == "left" else [True] * len(row) + [False] * len(gap)
        for row, gap in pairs
    ]
    return torch.tensor(ids), torch.tensor(keep)


def hash_of(model: nn.Module) -> str:
    """sha256 over every byte of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def count_hooks(model: nn.Module) -> int:
    """Forward hooks and pre-hooks in all modules."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
