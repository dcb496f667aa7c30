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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache
from transformers.utils.generic import ModelOutput

from safeside.adapters.adapter import Adapter
from safeside.base.families import has_lora
from safeside.base.model import Base
from safeside.base.taps import SideCache, Tape
from safeside.checks import check_adapters, keep_mask, refuse_compiled, refuse_packed
from safeside.errors import AttachmentError, InputError, UnsupportedError
from safeside.mixing import Policy, as_policies, mix
from safeside.request import PassRecord, Request, RequestLayer, SideLayer, history_of, request_layer
from safeside.types import Verdict
from safeside.verdicts import prompt_and_answer_verdicts

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Pass:
    """One forward pass of the base in flight: its tapes, its cache and its request."""

    def __init__(self, tapes: dict[str, Tape], cache: DynamicCache | None, request: Request) -> None:
        self.tapes = tapes
        self.cache = cache
        self.request = request


class _Thread(threading.local):
    """What one thread has in flight.  Requests in different threads never meet."""

    current: _Pass | None = None
    request: Request | None = None
    record: PassRecord | None = None


class Attachment:
    """Adapters on a base, made by ``attach``.  Use it as a context manager, or call ``detach``."""

    def __init__(self, base: Base, aligners: Sequence[Adapter], guards: Sequence[Adapter], strength: object) -> None:
        check_adapters(base, aligners, guards)
        if base.decoder in _attached:
            raise AttachmentError(f"{base.name} already has an attachment. Detach it, or attach all adapters at once.")
        self.base = base
        self.aligners = {adapter.name: adapter for adapter in aligners}
        self.guards = {adapter.name: adapter for adapter in guards}
        self.policies = as_policies(strength, list(self.aligners))
        self._check_gates(self.policies)
        self.base_has_lora = has_lora(base.model)
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
        self, *, strength: object = None, prompt_end: Sequence[int] | Tensor | None = None, copies: int = 1
    ) -> Iterator[None]:
        """Settings for the forward passes that this thread runs inside the ``with`` block.

        ``strength`` replaces the attachment's (anything that ``attach`` takes); ``prompt_end`` holds the number of
        prompt tokens of each row, padding not counted, and is what latched policies wait for.  ``copies`` is how many
        rows ``generate`` makes of each: ``num_beams`` or ``num_return_sequences``.
        """
        self._check_attached()
        if strength is not None and not self.aligners:
            raise InputError("A strength was given but only guards are attached. Call attach(base, aligners=[...]).")
        policies = self.policies if strength is None else as_policies(strength, list(self.aligners))
        self._check_gates(policies)
        ends = None if prompt_end is None else tuple(int(end) for end in prompt_end)
        if ends is not None and min(ends, default=0) < 1:
            raise InputError(f"prompt_end counts tokens and starts at 1; got {ends}.")
        before, self._thread.request = self._thread.request, Request(policies, ends, copies)
        try:
            yield
        finally:
            self._thread.request = before

    @property
    def record(self) -> PassRecord:
        """The last forward pass of this thread: base state, deltas, strengths, scores."""
        if self._thread.record is None:
            raise AttachmentError("No forward pass has run in this thread yet. Run the base first.")
        return self._thread.record

    def verdicts(self, cache: DynamicCache, answer_lengths: Sequence[int] | None = None) -> list[tuple[Verdict, ...]]:
        """For each row: every guard on the prompt and, where tokens follow it, on the answer so far.

        ``answer_lengths`` counts each row's own answer tokens when a batch padded behind them.
        """
        layer = request_layer(cache)
        if layer is None or layer.request.prompt_end is None:
            raise AttachmentError("Verdicts need the prompt's end. Run inside attachment.request(prompt_end=[...]).")
        return prompt_and_answer_verdicts(
            list(self.guards.values()),
            history_of(cache),
            layer.request.prompt_end,
            answer_lengths,
            self.base_has_lora,
        )

    def strengths(self, cache: DynamicCache) -> list[dict[str, tuple[float, ...]]]:
        """For each row and aligner, the strength behind each answer token."""
        layer, history = request_layer(cache), history_of(cache)
        assert layer is not None
        ends = layer.request.prompt_end or (1,) * history.positions.shape[0]
        rows = []
        for row, end in enumerate(ends):
            used = history.strengths[row, history.positions[row] >= end - 1]
            rows.append({name: tuple(used[:, index].tolist()) for index, name in enumerate(self.aligners)})
        return rows

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
        refuse_compiled(torch.compiler.is_compiling())
        bound = self._signature.bind(*args, **kwargs).arguments
        bound.update(bound.pop("kwargs", {}))
        inputs = bound.get("input_ids") if bound.get("input_ids") is not None else bound.get("inputs_embeds")
        if inputs is None:
            raise InputError("The base was called without input_ids or inputs_embeds.")
        n_rows, n_new = inputs.shape[:2]
        cache = self._cache_of(bound, kwargs)
        n_past = cache.get_seq_length() if cache is not None else 0
        refuse_packed(bound, n_new)
        keep = keep_mask(bound.get("attention_mask"), n_rows, n_new, n_past, inputs.device)
        request = self._request_of(cache, n_past, n_rows, n_new)
        tape = Tape(keep, n_new, is_causal=not self.base.is_encoder)
        self._thread.current = _Pass({name: tape.fork() for name in self._adapters}, cache, request)
        return args, kwargs

    def _cache_of(self, bound: dict[str, Any], kwargs: dict[str, Any]) -> DynamicCache | None:
        """The request's cache.  The one that the base would make for itself is made here, so that it can be shared."""
        if self.base.is_encoder:
            return None
        cache = bound.get("past_key_values")
        if cache is None:
            use_cache = bound.get("use_cache")
            wanted = self.base.model.config.get_text_config().use_cache if use_cache is None else use_cache
            if not wanted or ("past_key_values" in bound and "past_key_values" not in kwargs):
                return None
            kwargs["past_key_values"] = cache = DynamicCache(config=self.base.model.config)
        if not isinstance(cache, DynamicCache) or cache.offloading:
            name = "An offloaded DynamicCache" if isinstance(cache, DynamicCache) else f"A {type(cache).__name__}"
            raise UnsupportedError(
                f"{name} is refused: adapters grow their own layers behind those of the base. "
                "Pass past_key_values=DynamicCache(), or leave cache_implementation unset."
            )
        return cache

    def _request_of(self, cache: DynamicCache | None, n_past: int, n_rows: int, n_new: int) -> Request:
        """The request in force: the thread's own, else the one that the cache already carries, else the default."""
        layer = request_layer(cache) if cache is not None else None
        if layer is not None and layer.owner is not self:
            raise AttachmentError("This cache belongs to another attachment. Start with a new DynamicCache().")
        n_seen = 0 if layer is None else layer.get_seq_length()
        if n_seen != n_past:
            raise AttachmentError(
                f"The cache holds {n_past} tokens but the adapters have seen {n_seen}: it was used without them, or a "
                "pass failed. Start with a new DynamicCache()."
            )
        request = self._thread.request or (layer.request if layer is not None else Request(self.policies))
        if layer is not None and self._thread.request is None:
            layer.refuse_new_turn(n_new)
        if request.prompt_end is None and layer is not None:
            request = replace(request, prompt_end=layer.request.prompt_end)
        request = request.for_rows(n_rows)
        if cache is not None and layer is None:
            self._grow(cache, request)
        elif layer is not None:
            layer.request = request
        return request

    def _grow(self, cache: DynamicCache, request: Request) -> None:
        n_side = sum(adapter.n_cache_layers for adapter in self._adapters.values())
        missing = self.base.n_layers + n_side - len(cache.layers)
        cache.layers.extend(SideLayer() for _ in range(missing))  # type: ignore[no-untyped-call]
        cache.layers.append(RequestLayer(self, request))

    def _embedding_tap(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._read(0, args[0] if args else kwargs["hidden_states"])

    def _block_tap(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._read(layer, output[0] if isinstance(output, tuple) else output)

        return hook

    def _read(self, layer: int, hidden: Tensor) -> None:
        refuse_compiled(torch.compiler.is_compiling())
        current = self._thread.current
        if current is None:
            raise AttachmentError("A block ran outside its decoder; run the base model as a whole.")
        for name, adapter in self._adapters.items():
            if layer in adapter.config.layers:
                adapter.read(current.tapes[name], layer, hidden)

    def _finish(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After the base ran: guards, strengths, aligners, mix."""
        current, self._thread.current = self._thread.current, None
        assert current is not None
        final: Tensor = output[0]
        record = PassRecord(final)
        for tape in current.tapes.values():
            tape.final = final
        self._run_guards(current, record)
        layer = request_layer(current.cache) if current.cache is not None else None
        self._run_aligners(current, record, layer)
        if layer is not None:
            layer.update(*self._entries(current, record))
        self._thread.record = record
        if not self.aligners:
            return output
        names = list(record.deltas)
        mixed = mix(final, [record.deltas[name] for name in names], [record.strengths[name] for name in names])
        return _with_final(output, mixed)

    def _side_cache(self, cache: DynamicCache | None, name: str) -> SideCache | None:
        if cache is None:
            return None
        before = list(self._adapters)[: list(self._adapters).index(name)]
        return SideCache(cache, self.base.n_layers + sum(self._adapters[other].n_cache_layers for other in before))

    def _run_guards(self, current: _Pass, record: PassRecord) -> None:
        for name, guard in self.guards.items():
            output = guard(current.tapes[name], self._side_cache(current.cache, name))
            record.scores[name], record.logits[name] = output.scores, output.logits

    def _run_aligners(self, current: _Pass, record: PassRecord, layer: RequestLayer | None) -> None:
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
        self, current: _Pass, record: PassRecord, layer: RequestLayer | None, name: str
    ) -> tuple[Tensor, bool]:
        """Strength (B, T) of one aligner, and whether it can change no more during this request."""
        policy = current.request.policies[name]
        tape = current.tapes[name]
        shape = tape.keep_new.shape
        if policy.guard is None:
            values = policy.strength(torch.zeros((), device=tape.keep.device)).expand(shape)
            return (
                values,
                layer is None,
            )  # a cache may be re-used at another strength, so it is always written
        new = record.scores[policy.guard].amax(-1)  # (B, T)
        if not policy.latched:
            return policy.strength(new) * self._after_prompt(current, tape), False
        scores, positions = self._seen(layer, policy.guard, new, tape)
        ends = torch.tensor(current.request.prompt_end, device=new.device)[:, None]
        at_end = positions == ends - 1
        value = policy.strength(scores.gather(1, at_end.int().argmax(1, keepdim=True))[:, 0])
        decided = at_end.any(1)
        on = decided[:, None] & (tape.positions >= ends - 1)
        return torch.where(on, value[:, None], 0.0), bool(decided.all())

    @staticmethod
    def _after_prompt(current: _Pass, tape: Tape) -> Tensor:
        """1 where a strength may act: everywhere without ``prompt_end``, else from the prompt's last token on."""
        if current.request.prompt_end is None:
            return torch.ones((), device=tape.keep.device)
        ends = torch.tensor(current.request.prompt_end, device=tape.keep.device)[:, None]
        return (tape.positions >= ends - 1).float()

    def _seen(self, layer: RequestLayer | None, guard: str, new: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
        """Scores and token indices (B, S) of all tokens so far, those of this pass included."""
        positions = torch.where(tape.keep_new, tape.positions, -1)
        if layer is None or layer.keys is None or layer.values is None or not layer.keys.numel():
            return new, positions
        start = self._column(guard)
        stop = start + len(self.guards[guard].config.labels)
        past = layer.keys[:, 0, :, start:stop].amax(-1)
        return torch.cat([past, new], 1), torch.cat([layer.values[:, 0, :, -1].long(), positions], 1)

    def _column(self, guard: str) -> int:
        """First column of a guard's scores in the request's layer."""
        names = list(self.guards)
        return sum(len(self.guards[name].config.labels) for name in names[: names.index(guard)])

    def _entries(self, current: _Pass, record: PassRecord) -> tuple[Tensor, Tensor]:
        """What the request's layer stores of this pass: scores (B, 1, T, K) and strengths with indices."""
        tape = next(iter(current.tapes.values()))
        n_rows, n_new = tape.keep_new.shape
        scores = [*record.scores.values()] or [torch.zeros(n_rows, n_new, 1, device=tape.keep.device)]
        indices = torch.where(tape.keep_new, tape.positions, -1).float()
        strengths = [record.strengths[name].expand(n_rows, n_new) for name in self.aligners]
        return torch.cat(scores, -1).detach()[:, None], torch.stack([*strengths, indices], -1).detach()[:, None]

    def _check_attached(self) -> None:
        if not self._handles:
            raise AttachmentError("This attachment was detached: the base runs alone. Call attach() again.")

    def _check_gates(self, policies: dict[str, Policy]) -> None:
        for name, policy in policies.items():
            if policy.guard is not None and policy.guard not in self.guards:
                raise InputError(
                    f"The strength of {name!r} asks guard {policy.guard!r}, which is not attached; attached guards: "
                    f"{', '.join(self.guards) or 'none'}. Pass it in attach(guards=[...])."
                )


def attach(
    base: Base,
    aligners: Sequence[Adapter] = (),
    guards: Sequence[Adapter] = (),
    strength: object = 1.0,
) -> Attachment:
    """Attach guards and aligners to ``base``; use the result in a ``with`` statement or call its ``detach``.

    ``strength`` is a number in [0, 2], one number a row, ``fixed``, ``step`` or ``ramp``, or a mapping from aligner to
    any of these (aligners left out are off).  A base that cannot take hooks safely is an UnsupportedError that names
    why; adapters that do not fit the base, their list or each other are an InputError; a base takes one attachment at a
    time, a second is an AttachmentError.
    """
    return Attachment(base, aligners, guards, strength)


def _with_final(output: Any, final: Tensor) -> Any:
    """The decoder's output with another final state."""
    if isinstance(output, ModelOutput):
        output["last_hidden_state"] = final
        return output
    return (final, *output[1:])
