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

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """A request takes a row."""
        super().add_request(req_index, new_req_data)
        setting = asked_setting(self.config, new_req_data.sampling_params)
        memory = self.memories.pop(new_req_data.req_id, None)
        self.table.put(req_index, setting, int(new_req_data.prompt_len), memory)
        self.row_of[new_req_data.req_id] = req_index

    def remove_request(self, req_id: str) -> None:
        """A request leaves its row: it ended, or it waits for memory."""
        super().remove_request(req_id)
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
        return {**super().prepare_inputs(input_batch, req_states), "safeside_rows": self.rows[:n_padded]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """The same buffer, all padding, for measuring and for the capture of graphs."""
        self.rows.fill_(self.table.padding)
        dummy = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**dummy, "safeside_rows": self.rows[:num_tokens]}
