"""The state of runner V2: which rows of a batch draw tokens of requests with a tag."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from safeside.vllm_plugin.kept import Kept
from safeside.vllm_plugin.strengths import Setting
from safeside.vllm_plugin.table import RequestTable


def test_only_passes_that_read_a_request_to_its_end_draw(plugin: Callable[[str], Any]) -> None:
    rows = {  # by id: tokens read before, tokens of this pass, and tokens known when the request came (back)
        "part of a prompt": (0, 6, 10),
        "its end": (6, 4, 10),
        "without a tag": (0, 10, 10),
        "third token": (11, 1, 10),
        "part, come back": (0, 11, 13),
        "come back": (11, 2, 13),
    }
    before, new, whole = (np.array(column) for column in zip(*rows.values(), strict=True))
    batch = SimpleNamespace(
        req_ids=list(rows), num_computed_tokens_np=before, num_scheduled_tokens=new, prefill_len_np=whole
    )
    tagged = {name: (name.upper(), 10) for name in rows if name != "without a tag"}
    drawn = plugin("runner_v2").SafesideModelState._drawn(SimpleNamespace(tagged=tagged), batch)
    assert [tuple(one) for one in drawn] == [(1, "ITS END", 0), (3, "THIRD TOKEN", 2), (5, "COME BACK", 3)]


def test_requests_that_leave_can_be_pushed_out_and_those_of_the_batch_cannot(
    plugin: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = plugin("runner_v2")
    monkeypatch.setattr(runner.DefaultModelState, "remove_request", lambda self, req_id: None, raising=False)
    state, table = object.__new__(runner.SafesideModelState), RequestTable(4, [slice(0, 1)], torch.device("cpu"))
    names = ["runs", "first", "second", "third"]
    vars(state).update(
        table=table, kept=Kept(2), memories=OrderedDict(), row_of={name: row for row, name in enumerate(names)},
        tagged={name: (name.upper(), 3) for name in names},
    )  # fmt: skip
    for row, name in enumerate(names):
        table.put(row, Setting(0.0, 0.0, 0.5, 0.5), 3)
        state.kept.begin(name.upper(), is_back=False)
    for name in names[1:]:
        state.remove_request(name)
    assert (list(state.kept.running), list(state.kept.left)) == (["RUNS"], ["SECOND", "THIRD"])
    assert list(state.tagged) == ["runs"]
