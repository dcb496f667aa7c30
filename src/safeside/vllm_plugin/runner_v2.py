"""Runner V2, which vLLM uses on GPUs: it tells of requests through the model's own ``ModelState``."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState

from safeside.vllm_plugin.kept import Drawn, kept_of, tag_of
from safeside.vllm_plugin.plan import read_engine_config
from safeside.vllm_plugin.runner_v1 import asked_setting, table_of

_KEPT = 8  # times as many memories as rows: of requests that left, finished or preempted


class SafesideModelState(DefaultModelState):
    """Writes each request into the table, and gives ``forward`` every token's row in one lasting buffer.

    A preempted request comes back as a new one.  Its memory is kept by its id; one whose memory was pushed out gets the
    ceiling of its policy, because its prompt's score is not known.
    """

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.config = read_engine_config(vllm_config.additional_config)
        self.table = table_of(vllm_config, device)
        self.rows = torch.full((self.max_num_tokens,), self.table.padding, dtype=torch.long, device=device)
        self.row_of: dict[str, int] = {}
        self.memories: OrderedDict[str, Tensor] = OrderedDict()
        self.kept = kept_of(vllm_config)
        self.tagged: dict[str, tuple[str, int]] = {}
        """By id, the tag of a request that has one, and the length of its prompt."""

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """A request takes a row."""
        super().add_request(req_index, new_req_data)
        req_id, params, n_prompt = new_req_data.req_id, new_req_data.sampling_params, int(new_req_data.prompt_len)
        memory = self.memories.pop(req_id, None)
        self.table.put(req_index, asked_setting(self.config, params), n_prompt, memory)
        self.row_of[req_id] = req_index
        if params is not None and (tag := tag_of(params.extra_args)) is not None:
            self.kept.begin(tag, is_back=memory is not None)
            self.tagged[req_id] = tag, n_prompt

    def remove_request(self, req_id: str) -> None:
        """A request leaves its row: it ended, or it waits for memory."""
        super().remove_request(req_id)
        if req_id in self.tagged:
            self.kept.leave(self.tagged.pop(req_id)[0])
        row = self.row_of.pop(req_id, None)
        if row is None:
            return
        self.memories[req_id] = self.table.memory(row)
        while len(self.memories) > _KEPT * self.table.padding:
            self.memories.popitem(last=False)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Every token's row, beside what the base needs."""
        rows = np.repeat(input_batch.idx_mapping_np, input_batch.num_scheduled_tokens)
        n_padded = input_batch.num_tokens_after_padding
        self.rows[: len(rows)].copy_(torch.from_numpy(rows.astype(np.int64)), non_blocking=True)
        self.rows[len(rows) : n_padded].fill_(self.table.padding)
        self.kept.expect(self._drawn(input_batch) if self.tagged else ())
        return {**super().prepare_inputs(input_batch, req_states), "safeside_rows": self.rows[:n_padded]}

    def _drawn(self, input_batch: InputBatch) -> list[Drawn]:
        """The tokens that requests with a tag draw in a pass: those that it does not read to their end draw none."""
        ends = input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens
        places = zip(input_batch.req_ids, ends.tolist(), input_batch.prefill_len_np.tolist(), strict=True)
        drawing = [(row, req_id, end) for row, (req_id, end, whole) in enumerate(places) if end >= whole]
        tagged = [(row, end, *self.tagged[req_id]) for row, req_id, end in drawing if req_id in self.tagged]
        return [Drawn(row, tag, end - n_prompt) for row, end, tag, n_prompt in tagged]

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """The same buffer, all padding, for measuring and for the capture of graphs."""
        self.rows.fill_(self.table.padding)
        dummy = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**dummy, "safeside_rows": self.rows[:num_tokens]}
