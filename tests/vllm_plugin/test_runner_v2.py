"""The state of runner V2: which rows of a batch draw tokens of requests with a tag."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np


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
