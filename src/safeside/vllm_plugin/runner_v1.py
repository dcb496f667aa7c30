"""Runner V1, which vLLM uses on a CPU: it tells of requests through a logits processor that changes no logits.

Runner V2 has the processor for the check of parameters alone; see ``runner_v2``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2

from safeside.errors import InputError, UnsupportedError
from safeside.vllm_plugin import PREFIX
from safeside.vllm_plugin.kept import TAG, Drawn, kept_of, tag_of
from safeside.vllm_plugin.plan import PROCESSOR, EngineConfig, read_engine_config
from safeside.vllm_plugin.slots import HOTTEST
from safeside.vllm_plugin.strengths import KEY, Setting, parse_strength
from safeside.vllm_plugin.table import RequestTable

_MEMORY = "safeside_memory"  # beside KEY, in the worker alone: what a preempted request remembers
_NAME = PROCESSOR.partition(":")[2]
_tables: dict[str, RequestTable] = {}
_MASKED = (
    "A grammar masks the ids that carry scores: it came with structured output, or from the server's parser with tools "
    "or a chat. Scores of such a request are kept for one answer at a time. Over HTTP ask for n=1, of a server without "
    f"data parallelism, or leave out what brings the grammar (such as 'strict' in a tool). In Python give it a {TAG} "
    "and read its scores by collective_rpc, without logprob_token_ids."
)


def table_of(vllm_config: VllmConfig, device: torch.device) -> RequestTable:
    """The requests of this engine in this process: one object for its runner and its model."""
    if vllm_config.instance_id not in _tables:
        config = read_engine_config(vllm_config.additional_config)
        ends = [0]
        for guard in config.guards:
            ends.append(ends[-1] + len(guard.labels))
        columns = [slice(start, stop) for start, stop in pairwise(ends)]
        n_rows = vllm_config.scheduler_config.max_num_seqs
        _tables[vllm_config.instance_id] = RequestTable(n_rows, columns, device)
    return _tables[vllm_config.instance_id]


def asked_setting(config: EngineConfig, params: SamplingParams | None) -> Setting:
    """The rule of one request, or the engine's where it asks for none."""
    extra = (params.extra_args if params is not None else None) or {}
    return parse_strength(extra.get(KEY, config.strength), config.thresholds)


def batch_rows(table: RequestTable, positions: Tensor) -> Tensor:
    """Each token's row: requests follow each other in the flat batch, and tokens behind them are padding."""
    metadata = get_forward_context().attn_metadata
    n_tokens = positions.shape[0]
    if metadata is None:  # a run for measuring memory
        return torch.full((n_tokens,), table.padding, device=positions.device)
    if not isinstance(metadata, dict):
        raise UnsupportedError("Batches in parts (micro-batching) are refused with adapters. Start without them.")
    starts = next(iter(metadata.values())).query_start_loc
    rows = torch.repeat_interleave(torch.arange(len(starts) - 1, device=starts.device), starts.diff())
    return torch.cat([rows, rows.new_full((n_tokens - len(rows),), table.padding)])


class Strengths(ProcessorV1, ProcessorV2):
    """Follows requests into the batch, through it, and out.  Its name holds what the check of parameters needs."""

    facts: ClassVar[dict[str, Any]] = {}

    def __init__(self, vllm_config: VllmConfig, device: Any, is_pin_memory: bool = False) -> None:
        architectures = vllm_config.model_config.architectures
        if not any(name.startswith(PREFIX) for name in architectures):
            raise UnsupportedError(
                f"The engine runs {', '.join(architectures)}, without its guards and aligners; expected {PREFIX} "
                "before the name. Start it with the --hf-overrides that safeside serve --engine vllm prints alone."
            )
        if vllm_config.use_v2_model_runner:
            return  # requests come through the model's state
        if torch.device(device).type != "cpu":
            raise UnsupportedError(
                "Runner V1 replays graphs that would freeze the strengths; on a GPU adapters need runner V2. Unset "
                "VLLM_USE_V2_MODEL_RUNNER."
            )
        self.config = read_engine_config(vllm_config.additional_config)
        self.table = table_of(vllm_config, device)
        self.kept = kept_of(vllm_config)
        self.params: dict[int, SamplingParams] = {}
        self.tagged: dict[int, tuple[str, Sequence[int]]] = {}
        """By row, the tag of a request that has one, and the tokens that it has drawn."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise an InputError for a strength that cannot be (HTTP 400), and for what would hide or draw the scores."""
        extra = sampling_params.extra_args or {}
        if unknown := [key for key in extra if key.startswith("safeside") and key not in (KEY, TAG)]:
            raise InputError(f"There is no {', '.join(unknown)}; expected {KEY} or {TAG}.")
        if KEY in extra:
            if not cls.facts["aligns"]:
                raise InputError(f"{KEY} was given but the engine has no aligner. Leave it out.")
            parse_strength(extra[KEY], cls.facts["thresholds"])
        if TAG in extra:
            cls._check_tag(extra[TAG], sampling_params.n)
        cls._check_ids(sampling_params)

    @classmethod
    def _check_ids(cls, sampling_params: SamplingParams) -> None:
        """What could draw the ids that carry scores, or would hide them."""
        slots = set(cls.facts["slots"])
        if slots and sampling_params.temperature > HOTTEST:
            raise InputError(
                f"A temperature above {HOTTEST:g} could draw the ids that carry scores; got "
                f"{sampling_params.temperature}."
            )
        named = {"logit_bias": sampling_params.logit_bias, "allowed_token_ids": sampling_params.allowed_token_ids}
        for name, ids in named.items():
            if found := sorted(slots & set(ids or ())):
                raise InputError(f"{name!r} names {found}: these ids carry scores and are never drawn. Leave them out.")
        if sampling_params.structured_outputs is not None and slots & set(sampling_params.logprob_token_ids or ()):
            raise InputError(_MASKED)

    @classmethod
    def _check_tag(cls, tag: object, n_answers: int) -> None:
        if not cls.facts["slots"]:
            raise InputError(f"{TAG} was given but the engine has no guard. Leave it out.")
        if not isinstance(tag, str) or not tag:
            raise InputError(f"{TAG} is a text that no other request has; got {tag!r}.")
        if n_answers != 1:
            raise InputError(f"Scores are kept by {TAG}, which {n_answers} answers would share. Ask for n=1.")

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Of V2: this processor changes no logits."""
        return False

    def apply(self, logits: Tensor, *context: object) -> Tensor:
        """The logits as they are."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Nothing is changed."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Before each pass: who left, came and moved, in this order; then which tokens it draws.

        A pass that reads only a part of a prompt draws nothing; the one that does writes over its scores.
        """
        if batch_update is not None:
            self._follow(batch_update)
        self.kept.expect([Drawn(row, tag, len(tokens)) for row, (tag, tokens) in self.tagged.items()])

    def _follow(self, batch_update: BatchUpdate) -> None:
        for row in batch_update.removed:
            self._leave(row)
        for row, params, prompt, tokens in batch_update.added:
            self._leave(row)  # a row that is taken again at once is not told as removed
            memory = (params.extra_args or {}).get(_MEMORY)
            self.params[row] = params
            self.table.put(row, asked_setting(self.config, params), len(prompt or ()), memory)
            if (tag := tag_of(params.extra_args)) is not None:
                self.kept.begin(tag, is_back=memory is not None)
                self.tagged[row] = tag, tokens
        for first, second, direction in batch_update.moved:
            self._move(first, second, direction == MoveDirectionality.SWAP)

    def _leave(self, row: int) -> None:
        """Give the request in ``row``, if there is one, its memory: it may come back."""
        if row in self.tagged:
            self.kept.leave(self.tagged.pop(row)[0])
        if (params := self.params.pop(row, None)) is not None:
            params.extra_args = {**(params.extra_args or {}), _MEMORY: self.table.memory(row)}

    def _move(self, first: int, second: int, is_swap: bool) -> None:
        if not is_swap:
            self._leave(second)  # of a row that another one fills up at once nobody is told that it was left
        (self.table.swap if is_swap else self.table.move)(first, second)
        _move(self.params, first, second, is_swap)
        _move(self.tagged, first, second, is_swap)


def _move(held: dict[int, Any], first: int, second: int, is_swap: bool) -> None:
    """What is held by row ``first`` goes to ``second``, which loses or swaps its own."""
    found = {second: held.pop(first, None), first: held.pop(second, None)}
    rows = (second, first) if is_swap else (second,)
    held.update({row: found[row] for row in rows if found[row] is not None})


def __getattr__(name: str) -> type[Strengths]:
    """``Strengths_`` + facts in hexadecimal JSON (of ``Plan.processor``), made once."""
    if not name.startswith(_NAME):
        raise AttributeError(name)
    facts = json.loads(bytes.fromhex(name.removeprefix(_NAME)))
    made: type[Strengths] = type(name, (Strengths,), {"facts": facts, "__module__": __name__})
    globals()[name] = made
    return made
