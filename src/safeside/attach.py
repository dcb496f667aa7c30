"""``attach``: guards and aligners on a frozen base, as hooks that are gone on exit.

One pre-hook on the decoder reads mask and cache before the base writes them; hooks on the tapped blocks let each
adapter read; one hook on the decoder runs guards, policies and aligners and returns the output with the mixed final
state.  The base's own head does the rest, so ``generate``, pipelines and evaluation tools see the safe model with no
code of ours.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from safeside.adapters.adapter import Adapter
from safeside.base.families import is_updated
from safeside.base.model import Base
from safeside.base.states import with_final
from safeside.base.taps import SideCache, Tape
from safeside.checks import cache_of, check_adapters, check_intercept, keep_mask, refuse_compiled, refuse_packed
from safeside.errors import AttachmentError, BlockedError, InputError
from safeside.gates import answer_standings, blocked_prompts, seen_so_far, strength_of
from safeside.mixing import as_policies, mix
from safeside.policies import check_guards, guards_of
from safeside.request import (
    ForwardPass,
    PassRecord,
    Request,
    RequestLayer,
    add_layers,
    check_group,
    check_seen,
    columns_of,
    discard_pass,
    ended_request,
    history_of,
    request_in_force,
    request_layer,
)
from safeside.stopping import Standing, as_rules
from safeside.traces import traces_of
from safeside.types import StrengthTrace, Verdict
from safeside.verdicts import LORA_NOTE, prompt_and_answer_verdicts

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Thread(threading.local):
    """What one thread has in flight.  Requests in different threads never meet."""

    current: ForwardPass | None = None
    request: Request | None = None
    record: PassRecord | None = None


class Attachment:
    """Adapters on a base, made by ``attach``.  Use it as a context manager, or call ``detach``."""

    def __init__(
        self,
        base: Base,
        aligners: Sequence[Adapter],
        guards: Sequence[Adapter],
        strength: object,
        intercept: Adapter | None = None,
        *,
        judge_every: int = 1,
    ) -> None:
        if intercept is not None:
            check_intercept(base, intercept)
            guards = guards if any(guard is intercept for guard in guards) else [*guards, intercept]
        check_adapters(base, aligners, guards)
        if base.decoder in _attached:
            raise AttachmentError(f"{base.name} already has an attachment. Detach it, or attach all adapters at once.")
        self.base = base
        self.aligners = {adapter.name: adapter for adapter in aligners}
        self.guards = {adapter.name: adapter for adapter in guards}
        self.intercept = intercept
        self.policies = as_policies(strength, list(self.aligners))
        check_guards(self.policies, list(self.guards))
        check_group(judge_every)
        self.judge_every = judge_every if self.guards else 1  # without a guard there is nothing to judge
        self._adapters = {**self.guards, **self.aligners}
        self._thread = _Thread()
        self._signature = inspect.signature(base.decoder.forward)
        self._handles: list[RemovableHandle] = []
        self._install()

    def __enter__(self) -> Attachment:
        self._check_attached()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Remove every hook; the base is bit for bit what it was.  Safe to call twice."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _attached.discard(self.base.decoder)
        torch.compiler.reset()
        if self.base.attachment is self:
            self.base.attachment = None

    @contextlib.contextmanager
    def request(
        self,
        *,
        strength: object = None,
        prompt_end: Sequence[int] | Tensor | None = None,
        copies: int = 1,
        stop: object = None,
        judge_every: int | None = None,
    ) -> Iterator[None]:
        """Settings for the forward passes that this thread runs inside the ``with`` block.

        ``strength`` replaces the attachment's (anything that ``attach`` takes); ``prompt_end`` holds the number of
        prompt tokens of each row, padding not counted, and is what latched policies and interception wait for.
        ``copies`` is how many rows ``generate`` makes of each: ``num_beams`` or ``num_return_sequences``.  ``stop`` is
        a StopRule for the only guard, rules by guard, or True (those in the artifacts): what ``standings`` judges by.
        ``judge_every`` replaces the attachment's.  All of it stays with the caches that these passes fill.
        """
        self._check_attached()
        if strength is not None and not self.aligners:
            raise InputError("A strength was given but only guards are attached. Call attach(base, aligners=[...]).")
        policies = self.policies if strength is None else as_policies(strength, list(self.aligners))
        check_guards(policies, list(self.guards))
        ends = None if prompt_end is None else tuple(int(end) for end in prompt_end)
        if ends is not None and min(ends, default=0) < 1:
            raise InputError(f"prompt_end counts tokens and starts at 1; got {ends}.")
        rules = as_rules(stop, list(self.guards.values()))
        group = self.judge_every if judge_every is None or not self.guards else judge_every
        request = Request(policies, ends, copies, rules, group)
        before, self._thread.request = self._thread.request, request
        try:
            yield
        finally:
            self._thread.request = before

    @property
    def record(self) -> PassRecord:
        """The last forward pass of this thread, where it ended: base state, deltas, strengths, scores."""
        if self._thread.record is None:
            raise AttachmentError("No forward pass has ended in this thread, or the last one failed. Run the base.")
        return self._thread.record

    @torch.no_grad()
    def judge(self, cache: DynamicCache) -> dict[str, Tensor]:
        """Judge the tokens of ``cache`` that still wait; by guard their scores (B, T, K), nothing where none waits."""
        layer = request_layer(cache)
        if layer is None or not layer.waiting:
            return {}
        layer.refuse_foreign(self)
        layer.spent = "A guard failed on tokens of this cache that had waited for it."  # unless it does not
        tapes = layer.waiting.take(layer.keep)
        outputs = {name: guard(tapes[name], self._side_cache(cache, name)) for name, guard in self.guards.items()}
        layer.judged(torch.cat([output.scores for output in outputs.values()], -1))
        layer.spent = ""
        return {name: output.scores for name, output in outputs.items()}

    def verdicts(self, cache: DynamicCache, answer_lengths: Sequence[int] | None = None) -> list[tuple[Verdict, ...]]:
        """For each row: every guard on the prompt and, where tokens follow it, on the answer so far.

        ``answer_lengths`` counts each row's own answer tokens when a batch padded behind them.
        """
        ends = ended_request(cache).prompt_end or ()
        guards = list(self.guards.values())
        self.judge(cache)
        return prompt_and_answer_verdicts(guards, history_of(cache), ends, answer_lengths, is_updated(self.base.model))

    def standings(self, cache: DynamicCache, answer_lengths: Sequence[int]) -> list[Standing]:
        """For each row how its answer of so many tokens stands by the request's stop rules and the intercepting guard.

        Tokens that were not fed to the base yet are not scored, and so not clear while there is a rule.
        """
        self.judge(cache)
        return self.standings_so_far(cache, answer_lengths)

    def standings_so_far(self, cache: DynamicCache, answer_lengths: Sequence[int]) -> list[Standing]:
        """As ``standings``, while the answer is written: tokens that wait to be judged are not clear either."""
        guards = list(self.guards.values())
        return answer_standings(ended_request(cache), history_of(cache), guards, self.intercept, answer_lengths)

    def strengths(self, cache: DynamicCache) -> list[dict[str, tuple[float, ...]]]:
        """For each row and aligner, the strength behind each answer token."""
        return [{trace.aligner: trace.strengths for trace in row} for row in self.traces(cache)]

    def traces(self, cache: DynamicCache) -> list[tuple[StrengthTrace, ...]]:
        """For each row and aligner, which guard set the strength behind each answer token, and by which score."""
        self.judge(cache)
        layer, history = request_layer(cache), history_of(cache)
        assert layer is not None
        return traces_of(layer.request, history, list(self.guards.values()), list(self.aligners))

    def _install(self) -> None:
        torch.compiler.reset()  # code compiled before would go on without these hooks, and so without safety
        decoder, blocks = self.base.decoder, self.base.blocks
        self._handles.append(decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
        for layer in sorted({layer for adapter in self._adapters.values() for layer in adapter.config.layers}):
            if layer == 0:
                self._handles.append(blocks[0].register_forward_pre_hook(self._embedding_tap, with_kwargs=True))
            else:
                self._handles.append(blocks[layer - 1].register_forward_hook(self._block_tap(layer)))
        self._handles.append(decoder.register_forward_hook(self._finish))
        _attached.add(decoder)
        self.base.attachment = self

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the base runs: find its mask and cache, while the cache still holds only past tokens."""
        refuse_compiled()
        self._thread.record = None  # a prompt's states are large: none keeps two
        bound = self._signature.bind(*args, **kwargs).arguments
        bound.update(bound.pop("kwargs", {}))
        inputs = bound.get("input_ids") if bound.get("input_ids") is not None else bound.get("inputs_embeds")
        if inputs is None:
            raise InputError("The base was called without input_ids or inputs_embeds.")
        (n_rows, n_new), cache = inputs.shape[:2], cache_of(self.base, bound, kwargs)
        layer = request_layer(cache) if cache is not None else None
        if layer is not None:
            layer.refuse_foreign(self)
        n_past = cache.get_seq_length() if cache is not None else 0
        refuse_packed(bound, n_new)
        keep = keep_mask(bound.get("attention_mask"), n_rows, n_new, n_past, inputs.device)
        check_seen(layer, n_past)
        request = request_in_force(self, layer, self._thread.request, n_new).for_rows(n_rows)
        if layer is not None and cache is not None:
            if layer.waiting and request != layer.request:
                self.judge(cache)
            layer.request = request
        elif cache is not None:
            counts = [sum(adapter.n_cache_layers for adapter in some.values()) for some in (self.guards, self.aligners)]
            add_layers(cache, self.base.n_layers, counts, RequestLayer(self, request))
        tape = Tape(keep, n_new, is_causal=not self.base.is_encoder)
        current = ForwardPass({name: tape.fork() for name in self._adapters}, cache, request)
        if current.may_wait:
            for name in self.guards:  # rows may come and leave before they are judged: all are read alike
                current.tapes[name].few = True
        elif cache is not None:
            self.judge(cache)
        self._thread.current = current
        return args, kwargs

    def _embedding_tap(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._read(0, args[0] if args else kwargs["hidden_states"])

    def _block_tap(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._read(layer, output[0] if isinstance(output, tuple) else output)

        return hook

    def _read(self, layer: int, hidden: Tensor) -> None:
        refuse_compiled()
        current = self._thread.current
        if current is None:
            raise AttachmentError("A block ran outside its decoder; run the base model as a whole.")
        for name, adapter in self._adapters.items():
            if layer in adapter.config.layers:
                adapter.read(current.tapes[name], layer, hidden)
        if self.intercept is not None and layer == self.intercept.config.layers[-1] and not current.may_wait:
            self._judge_prompts(self.intercept, current)

    def _judge_prompts(self, guard: Adapter, current: ForwardPass) -> None:
        """The intercepting guard has all its taps: run it now, and stop the pass when it blocks every prompt."""
        tape, layer = current.tapes[guard.name], current.layer
        current.early[guard.name] = output = guard(tape, self._side_cache(current.cache, guard.name))
        assert output.scores is not None
        seen = seen_so_far(layer, columns_of(list(self.guards.values()))[guard.name], output.scores, tape)
        verdicts = blocked_prompts(
            guard, seen, current.request, tape, [LORA_NOTE] if is_updated(self.base.model) else []
        )
        if verdicts is None:
            return
        self._thread.current = None
        if layer is not None and current.cache is not None:
            reason = "The prompts on this cache were blocked before the base had read them."
            discard_pass(current.cache, self.base.n_layers, layer, reason)
        raise BlockedError(
            f"Guard {guard.name!r} blocked every prompt of this batch after block {guard.config.layers[-1]}; there is "
            "no output. Use base.chat, which gives the verdicts, or catch BlockedError.",
            verdicts,
        )

    def _finish(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After the base ran: guards, strengths, aligners, mix."""
        current, self._thread.current = self._thread.current, None
        assert current is not None
        final: Tensor = output[0]
        record = PassRecord(final)
        for tape in current.tapes.values():
            tape.final = final
        if not current.may_wait:
            self._run_guards(current, record)
        self._run_aligners(current, record, layer := current.layer)
        if layer is not None:
            self._store(current, record, layer)
        self._thread.record = record
        if not self.aligners:
            return output
        names = list(record.deltas)
        mixed = mix(final, [record.deltas[name] for name in names], [record.strengths[name] for name in names])
        return with_final(output, mixed)

    def _side_cache(self, cache: DynamicCache | None, name: str) -> SideCache | None:
        if cache is None:
            return None
        before = list(self._adapters)[: list(self._adapters).index(name)]
        return SideCache(cache, self.base.n_layers + sum(self._adapters[other].n_cache_layers for other in before))

    def _run_guards(self, current: ForwardPass, record: PassRecord) -> None:
        for name, guard in self.guards.items():
            output = current.early.get(name) or guard(current.tapes[name], self._side_cache(current.cache, name))
            assert output.scores is not None
            assert output.logits is not None
            record.scores[name], record.logits[name] = output.scores, output.logits

    def _store(self, current: ForwardPass, record: PassRecord, layer: RequestLayer) -> None:
        """Keep what the pass gave with the request, and judge its tokens where enough of them have waited."""
        tape, own = next(iter(current.tapes.values())), {name: current.tapes[name] for name in self.guards}
        has_failed = any(tape.failure for tape in own.values())
        if current.may_wait and has_failed and current.cache is not None:
            self.judge(current.cache)  # those before have nothing to do with it
        layer.store(record, tape, waits=current.may_wait)
        if not current.may_wait or current.cache is None:
            return
        layer.waiting.add(own)
        if has_failed or len(layer.waiting) >= current.request.group:
            record.scores = {name: scores[:, -1:] for name, scores in self.judge(current.cache).items()}

    def _run_aligners(self, current: ForwardPass, record: PassRecord, layer: RequestLayer | None) -> None:
        for name, aligner in self.aligners.items():
            strength, is_final = self._strength(current, record, layer, name)
            record.strengths[name] = strength
            has_missed = layer is not None and name in layer.skipped
            if (is_final or has_missed) and not strength.any():
                if layer is not None and aligner.n_cache_layers:
                    layer.skipped.add(name)
                continue
            if has_missed:
                raise AttachmentError(
                    f"Aligner {name!r} was off for good on this cache and has not seen its tokens. "
                    "Start with a new DynamicCache() for a request in which it may be on."
                )
            record.deltas[name] = aligner(current.tapes[name], self._side_cache(current.cache, name)).delta

    def _strength(
        self, current: ForwardPass, record: PassRecord, layer: RequestLayer | None, name: str
    ) -> tuple[Tensor, bool]:
        """Strength (B, T) of one aligner, and whether it can change no more during this request."""
        policy, tape = current.request.policies[name], current.tapes[name]
        columns = columns_of(list(self.guards.values()))
        seen = {
            guard: seen_so_far(layer, columns[guard], record.scores.get(guard), tape) for guard in guards_of(policy)
        }
        strength, is_decided = strength_of(policy, current.request.prompt_end, seen, tape)
        # A cache may be re-used at another fixed strength, so it is always written.
        return strength, is_decided and (policy.guard is not None or layer is None)

    def _check_attached(self) -> None:
        if not self._handles:
            raise AttachmentError("This attachment was detached: the base runs alone. Call attach() again.")


def attach(
    base: Base,
    aligners: Sequence[Adapter] = (),
    guards: Sequence[Adapter] = (),
    strength: object = 1.0,
    *,
    intercept: Adapter | None = None,
    judge_every: int = 1,
) -> Attachment:
    """Attach guards and aligners to ``base``; use the result in a ``with`` statement or call its ``detach``.

    ``strength`` is a number in [0, 2], one number a row, ``fixed``, ``step`` or ``ramp``, or a mapping from aligner to
    any of these (aligners left out are off).  ``intercept`` is a guard that judges each prompt as soon as the last
    layer that it reads has run, and blocks what it flags: when it blocks the whole batch the deeper layers never run.
    It need not be in ``guards`` too; its passes need ``prompt_end``.

    With ``judge_every`` above 1 the guards judge an answer's tokens in groups of so many, for a fraction of the cost of
    each by itself, and with the same scores.  A stop rule ends an answer where it would have, with fewer than so many
    tokens more that are computed and never shown.  Where a strength follows the scores of an answer none waits.

    A base that cannot take hooks safely is an UnsupportedError that names why; adapters that do not fit the base, their
    list or each other are an InputError; a base takes one attachment at a time, a second is an AttachmentError.
    """
    return Attachment(base, aligners, guards, strength, intercept, judge_every=judge_every)
