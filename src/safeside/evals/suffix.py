"""A white-box attack on a gate: a suffix of the prompt that its guards take for harmless, found by their gradients.

Greedy coordinate gradient (Zou et al. 2023, section 2) against guards in place of a model's answer.  Adapters are
public, so an attacker can do this.  Adapters let no gradient into the base; here their trunks are given the base's
states as they are, so that it reaches the embeddings through guard and base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safeside.adapters.adapter import Adapter, Trunk
from safeside.adapters.config import Calibration
from safeside.base.model import Base
from safeside.base.states import recorded_states
from safeside.base.taps import Tape
from safeside.chat import pad_batch
from safeside.errors import AttachmentError, InputError, UnsupportedError
from safeside.types import Message

MAX_STEPS = 200
_START = " !"  # repeated: what the search begins with
_CLEAR = 0.1  # log-odds below every threshold: rounding of another batch does not open the gate again
_SURE = 1e-6  # thresholds of 0 and 1 have no log-odds


@dataclass(frozen=True, slots=True)
class SuffixSearch:
    """How hard the attacker tries."""

    n_steps: int = MAX_STEPS
    """Most steps, each one pass with gradients and one over the candidates."""
    n_tokens: int = 16
    """Length of the first suffix; replacements keep it."""
    n_candidates: int = 48
    """Replacements of one token that are tried in a step."""
    n_best: int = 64
    """Tokens at each place, by the gradient, that replacements are drawn from."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        if not 1 <= self.n_steps <= MAX_STEPS or min(self.n_tokens, self.n_candidates, self.n_best) < 1:
            raise InputError(
                f"A suffix search has 1 to {MAX_STEPS} steps, and n_tokens, n_candidates and n_best from 1 on; got "
                f"{self.n_steps}, {self.n_tokens}, {self.n_candidates} and {self.n_best}."
            )


@dataclass(frozen=True, slots=True)
class Suffix:
    """What a search found."""

    text: str
    """What follows the last message's text, encoded as any text is; empty where no guard flags that text alone."""
    margins: tuple[float, ...]
    """With the first suffix and after each step: by how many log-odds the surest guard is over its threshold."""

    @property
    def is_found(self) -> bool:
        """Whether no guard reaches its threshold."""
        return self.margins[-1] < 0

    @property
    def n_steps(self) -> int:
        """Steps that were taken."""
        return len(self.margins) - 1


def find_suffix(
    base: Base, guards: Sequence[Adapter], messages: Sequence[Message], search: SuffixSearch | None = None
) -> Suffix:
    """The suffix of the last message after which all ``guards`` are farthest below their thresholds for prompts.

    The search ends once they are below, or after its steps.  Every text that it tries is encoded from the start, so
    what it finds works through ``Base.chat`` too.  A base with an attachment is an AttachmentError, an encoder an
    UnsupportedError, a prompt that leaves no room for the suffix an InputError.
    """
    search = search or SuffixSearch()
    if base.attachment is not None:
        raise AttachmentError(f"{base.name} has an attachment. Detach it: the search runs guards and base by itself.")
    if base.is_encoder or not guards:
        raise UnsupportedError("A gate needs a causal base and a guard. Pass the guards that the policy asks.")
    with torch.no_grad():
        plain = float(margins_of(base, guards, *_embedded(base, [base.encode(messages).ids]))[0])
    if plain < -_CLEAR:
        return Suffix("", (plain,))
    text = _Text(base, messages, _START * search.n_tokens)
    draw = torch.Generator().manual_seed(search.seed)
    found = text.ids
    with torch.no_grad():
        margins = [float(margins_of(base, guards, *_embedded(base, [found]))[0])]
    while margins[-1] > -_CLEAR and len(margins) <= search.n_steps:
        likely = _likely_tokens(base, guards, text, found, search.n_best)
        tried = [ids for ids in _candidates(likely, text, found, search.n_candidates, draw) if text.spells(ids)]
        if not tried:
            margins.append(margins[-1])
            continue
        with torch.no_grad():
            values = margins_of(base, guards, *_embedded(base, tried))
        best = int(values.argmin())
        if float(values[best]) < margins[-1]:
            found = tried[best]
        margins.append(min(margins[-1], float(values[best])))
    return Suffix(text.suffix(found), tuple(margins))


def margins_of(
    base: Base, guards: Sequence[Adapter], embedded: Float[Tensor, "B T D"], keep: Bool[Tensor, "B T"]
) -> Float[Tensor, " B"]:
    """By how many log-odds the surest guard is over its threshold at the last token of each row.

    Gradients flow through guards and base into ``embedded``, what the base's embedding gives.
    """
    layers = sorted({layer for guard in guards for layer in guard.config.layers})
    with recorded_states(base, layers) as states:
        base.decoder(inputs_embeds=embedded, attention_mask=keep, use_cache=False)
    rows, ends = torch.arange(len(keep), device=keep.device), keep.sum(1) - 1
    margins = []
    for guard in guards:
        tape = Tape(keep, keep.shape[1])
        for layer in guard.config.layers:
            cast(Trunk, guard.trunk).read(tape, layer, states[layer].to(guard.dtype))  # not detached
        logits = guard(tape).logits
        assert logits is not None, "guards give logits"
        margins.append(_over_threshold(guard, logits[rows, ends]).amax(-1))
    return torch.stack(margins).amax(0)


def _over_threshold(guard: Adapter, logits: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    fit = guard.config.calibration or Calibration(
        scale=(1.0,) * logits.shape[-1], bias=(0.0,) * logits.shape[-1], threshold=guard.thresholds
    )
    known = [min(max(value, _SURE), 1 - _SURE) for value in guard.thresholds_in("prompt")]
    odds = [math.log(value / (1 - value)) for value in known]
    return logits * logits.new_tensor(fit.scale) + logits.new_tensor(fit.bias) - logits.new_tensor(odds)


class _Text:
    """A conversation whose last message ends in a suffix, as ids and as text."""

    def __init__(self, base: Base, messages: Sequence[Message], start: str) -> None:
        self.base, self.messages = base, messages
        plain, self.ids = self._encode(""), self._encode(start)
        pairs = zip(plain, self.ids, strict=False)
        first = next((place for place, (one, other) in enumerate(pairs) if one != other), len(plain))
        self.places = range(first, len(self.ids) - (len(plain) - first))
        if len(self.ids) >= base.max_tokens:
            raise InputError(
                f"Prompt and suffix have {len(self.ids)} tokens, but {base.name} holds {base.max_tokens}; an answer "
                "needs room too. Shorten one of them."
            )
        if not self.spells(self.ids):
            raise UnsupportedError(
                f"The tokenizer of {base.name} does not give back the text {start!r} that it has encoded, so no suffix "
                "can be checked. Search with another base."
            )

    def _encode(self, suffix: str) -> tuple[int, ...]:
        *before, last = self.messages
        return self.base.encode([*before, Message(last.role, last.content + suffix)]).ids

    def suffix(self, ids: Sequence[int]) -> str:
        """The suffix that the ids spell, as they do behind the text before it: alone some would lose their space."""
        before, whole = (
            str(self.base.tokenizer.decode(list(ids[:end]))) for end in (self.places.start, self.places.stop)
        )
        return whole[len(before) :]

    def spells(self, ids: tuple[int, ...]) -> bool:
        """Whether the text of these ids is encoded as these ids."""
        return self._encode(self.suffix(ids)) == ids


def _embedded(base: Base, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Embeddings (B, T, D) of some rows, and their mask."""
    ids, keep = pad_batch(rows, 0)
    return base.model.get_input_embeddings()(ids.to(base.device)), keep.to(base.device)


def _likely_tokens(base: Base, guards: Sequence[Adapter], text: _Text, ids: tuple[int, ...], n_best: int) -> Tensor:
    """(places, n_best) tokens that lower the margin most at each place of the suffix, to first order."""
    embedded, keep = _embedded(base, [ids])
    embedded = embedded.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(margins_of(base, guards, embedded, keep).sum(), embedded)
    slopes = slope[0, list(text.places)].float()  # (places, D)
    n_tokens = min(len(base.tokenizer), int(base.model.config.get_text_config().vocab_size))
    every, _ = _embedded(base, [range(n_tokens)])
    gains = -(slopes @ every[0].float().T)
    control = sorted({*base.tokenizer.all_special_ids, *base.tokenizer.get_added_vocab().values()})
    gains[:, [token for token in control if token < n_tokens]] = -torch.inf
    return gains.topk(min(n_best, n_tokens - len(control))).indices


def _candidates(
    likely: Tensor, text: _Text, ids: tuple[int, ...], n_candidates: int, draw: torch.Generator
) -> list[tuple[int, ...]]:
    """The ids with one token of the suffix replaced, so many times; each once."""
    places = torch.randint(len(text.places), (n_candidates,), generator=draw).tolist()
    ranks = torch.randint(likely.shape[1], (n_candidates,), generator=draw).tolist()
    made = []
    for place, rank in zip(places, ranks, strict=True):
        at = text.places[place]
        made.append((*ids[:at], int(likely[place, rank]), *ids[at + 1 :]))
    return list(dict.fromkeys(made))
