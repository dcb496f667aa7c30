"""SafeDecoding (Xu et al., ACL 2024): the first tokens are drawn from a mix of the base and a safer expert.

The expert is the base with a LoRA that learnt refusals.  At each of the first m tokens both distributions are computed;
of the tokens that are near the top of both, each gets ``p_base + a (p_expert - p_base)``.  Then the base goes on alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from safeside.base.model import Base
from safeside.errors import InputError
from safeside.evals.likelihood import Known, Likelihood, known_answers
from safeside.evals.methods import Conversation, digest_of_lora, key_of
from safeside.lora import Lora, load_lora
from safeside.types import Completion

_LEAST = 1e-8  # probability of a candidate that the expert thinks little of


@dataclass(frozen=True, slots=True)
class Mix:
    """How base and expert are mixed; the values are those of the released code."""

    n_tokens: int = 2
    """Tokens at the beginning of each answer that are drawn from the mix, m."""
    weight: float = 3.0
    """How far the mix goes from the base to the expert, and beyond; 0 is the base, 1 the expert."""
    n_candidates: int = 5
    """Tokens that the top of both distributions must share, c."""

    def __post_init__(self) -> None:
        if self.n_tokens < 1 or self.n_candidates < 1 or not 0 <= self.weight < float("inf"):
            raise InputError(
                "SafeDecoding needs n_tokens and n_candidates from 1 on and a finite weight from 0 on; got "
                f"{self.n_tokens}, {self.n_candidates} and {self.weight}."
            )


@dataclass(frozen=True, slots=True)
class SafeDecoding:
    """The base, helped by an expert, a LoRA in a peft folder, over the first tokens of each answer."""

    base: Base
    """The base."""
    expert: Path
    """As peft saves it."""
    mix: Mix = Mix()
    """How they are mixed."""
    name: str = "safe_decoding"
    """What figures call it."""
    policy_name: str = "fixed"
    """The same for every prompt."""

    @property
    def strength(self) -> float:
        """How far the mix goes towards the expert, in [0, 2]; the released weight, 3, counts as 1."""
        return min(self.mix.weight / Mix().weight, 2.0)

    @property
    def key(self) -> object:
        """Hashes of base and expert, and the mix."""
        return [*key_of(self.base), digest_of_lora(self.expert), repr(self.mix)]

    def answers(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[Completion]:
        """Answers; they cost ``mix.n_tokens`` passes of the expert more than the base alone."""
        if not conversations:
            return []
        with load_lora(self.expert, self.base) as lora, lora.scaled(0.0):
            lengths = [len(self.base.encode(messages, begun=True).ids) for messages in conversations]
            mixing = _Mixing(lora, lengths, self.mix)
            return self.base.chat_batch(
                conversations,
                max_new_tokens=max_new_tokens,
                begun=True,
                logits_processor=LogitsProcessorList([mixing]),
            )

    @torch.no_grad()
    def likelihoods(self, conversations: Sequence[Conversation]) -> list[Likelihood]:
        """Under the mix before its candidates are cut, which would make most known answers impossible."""
        with load_lora(self.expert, self.base) as lora:
            with lora.scaled(0.0):
                of_base = known_answers(self.base, conversations)
            of_expert = known_answers(self.base, conversations)
        return [self._likelihood(*pair) for pair in zip(of_base, of_expert, strict=True)]

    def _likelihood(self, of_base: Known, of_expert: Known) -> Likelihood:
        n_mixed = self.mix.n_tokens
        logits = self.base.head_logits(of_base.states[None])[0].float()
        found = logits.log_softmax(-1)
        expert = self.base.head_logits(of_expert.states[None, :n_mixed])[0].float().softmax(-1)
        mixed = _extrapolated(logits[:n_mixed].softmax(-1), expert, self.mix.weight)
        found[:n_mixed] = (mixed / mixed.sum(-1, keepdim=True)).log()
        taken = found.gather(-1, of_base.targets[:, None]).double()
        return Likelihood(-float(taken.sum()), len(of_base.targets))


class _Mixing(LogitsProcessor):
    """Asks the expert at the first tokens of one batch; its prompts have ``lengths`` tokens, padded on the left."""

    def __init__(self, lora: Lora, lengths: Sequence[int], mix: Mix) -> None:
        self.lora, self.lengths, self.mix = lora, lengths, mix
        self.cache = DynamicCache()
        self.n_mixed = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) of the next token: log-probabilities of the mix, or the base's own behind the first tokens."""
        if self.n_mixed >= self.mix.n_tokens:
            return scores
        n_seen = self.cache.get_seq_length()
        n_prompt = input_ids.shape[1] - self.n_mixed
        padding = n_prompt - torch.tensor(self.lengths, device=input_ids.device)
        keep = torch.arange(input_ids.shape[1], device=input_ids.device) >= padding[:, None]
        positions = (keep.long().cumsum(1) - 1).clamp_min(0)
        with self.lora.scaled(1.0):
            output = self.lora.base.model(
                input_ids=input_ids[:, n_seen:],
                attention_mask=keep,
                position_ids=positions[:, n_seen:],
                past_key_values=self.cache,
                use_cache=True,
            )
        self.n_mixed += 1
        return mixed_scores(scores.float(), output.logits[:, -1].float(), self.mix)


def mixed_scores(base_logits: Float[Tensor, "B V"], expert_logits: Float[Tensor, "B V"], mix: Mix) -> Tensor:
    """Log-probabilities (B, V) of the mix; minus infinity for what is no candidate."""
    of_base, of_expert = base_logits.softmax(-1), expert_logits.softmax(-1)
    mixed = torch.where(
        candidates(base_logits, expert_logits, mix.n_candidates), _extrapolated(of_base, of_expert, mix.weight), 0.0
    )
    return (mixed / mixed.sum(-1, keepdim=True)).log()


def _extrapolated(of_base: Tensor, of_expert: Tensor, weight: float) -> Tensor:
    """``p_base + weight (p_expert - p_base)``, nowhere below the least probability; not normed."""
    return (of_base + weight * (of_expert - of_base)).clamp_min(_LEAST)


def candidates(base_logits: Tensor, expert_logits: Tensor, n_least: int) -> Bool[Tensor, "B V"]:
    """The tokens that are among the top k of both, at the smallest k at which there are ``n_least`` of them."""
    ranks = [
        logits.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) for logits in (base_logits, expert_logits)
    ]
    worst = torch.maximum(*ranks)  # (B, V): a token is among the top k of both when this is less than k
    last = worst.kthvalue(min(n_least, worst.shape[-1]), dim=-1, keepdim=True).values
    return worst <= last
