"""The strengths of a batch against the slow twin: each request alone, token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from hypothesis import given
from hypothesis import strategies as st

from safeside.vllm_plugin.strengths import NO_NUMBER, READS, Setting, curve
from safeside.vllm_plugin.table import RequestTable

COLUMNS = (slice(0, 2), slice(2, 3))  # a guard of two labels and one of one
N_ROWS = 4


@dataclass
class Slow:
    """One request: its rule, its prompt's end, and what its gate remembers."""

    setting: Setting
    end: int
    decided: list[float] = field(default_factory=lambda: [math.nan, math.nan])
    highest: list[float] = field(default_factory=lambda: [-math.inf, -math.inf])

    def strength(self, position: int, scores: list[float]) -> float:
        """Of one token, in the words of the policies."""
        risks = [max(scores[:2]) if all(map(math.isfinite, scores[:2])) else NO_NUMBER, scores[2]]
        risks[1] = risks[1] if math.isfinite(risks[1]) else NO_NUMBER
        if position == self.end - 1:
            self.decided = list(risks)
        reads, guard = READS[self.setting.reads], self.setting.guard
        if position < self.end - 1 and reads != "always":
            return 0.0
        if position >= self.end - 1:
            self.highest = [max(pair) for pair in zip(self.highest, risks, strict=True)]
        known = self.decided[guard]
        known = NO_NUMBER if math.isnan(known) else known
        lost = NO_NUMBER if math.isnan(self.decided[guard]) else -1.0
        score = {
            "always": 0.0, "prompt": known, "answer": risks[guard], "both": max(known, risks[guard]),
            "maximum": max(self.highest[guard], lost),
        }[reads]  # fmt: skip
        return float(curve(torch.tensor(self.setting, dtype=torch.float32), torch.tensor(score)))


settings = st.builds(
    Setting,
    st.floats(0.0, 0.25, width=32),
    st.floats(0.5, 1.0, width=32),
    st.floats(0.0, 1.0, width=32),
    st.floats(1.0, 2.0, width=32),
    st.integers(0, 1),
    st.integers(0, len(READS) - 1),
)


@given(
    st.lists(st.tuples(settings, st.integers(1, 5)), min_size=1, max_size=N_ROWS),
    st.lists(st.lists(st.integers(0, 3), min_size=N_ROWS, max_size=N_ROWS), min_size=1, max_size=5),
    st.integers(0, 1000),
)
def test_chunks_of_any_size_give_what_single_tokens_give(
    requests: list[tuple[Setting, int]], chunks: list[list[int]], seed: int
) -> None:
    """Chunked prefill, decoding, requests that leave with their memory and come back in another row, padding."""
    generator = torch.Generator().manual_seed(seed)
    table, slow = RequestTable(N_ROWS, COLUMNS, torch.device("cpu")), [Slow(*request) for request in requests]
    rows, positions = list(range(len(slow))), [0] * len(slow)
    for row, request in enumerate(slow):
        table.put(row, request.setting, request.end)
    for chunk in chunks:
        flat = [(index, positions[index] + offset) for index in range(len(slow)) for offset in range(chunk[index])]
        scores = torch.rand(len(flat) + 2, 3, generator=generator)
        scores[torch.rand(scores.shape, generator=generator) < 0.05] = math.nan
        places = torch.tensor([rows[index] for index, _ in flat] + [table.padding] * 2)
        found = table.strengths(places, torch.tensor([position for _, position in flat] + [0, 0]), scores)
        wanted = [
            slow[index].strength(position, scores[place].tolist()) for place, (index, position) in enumerate(flat)
        ]
        torch.testing.assert_close(found, torch.tensor([*wanted, 0.0, 0.0]), atol=1e-5, rtol=0)
        positions = [position + n for position, n in zip(positions, chunk, strict=False)]
        memories = [table.memory(row) for row in rows]
        rows = torch.randperm(N_ROWS, generator=generator)[: len(slow)].tolist()
        for row, request, memory in zip(rows, slow, memories, strict=True):
            table.put(row, request.setting, request.end, memory)


def test_a_request_whose_memory_is_lost_fails_closed() -> None:
    table = RequestTable(2, COLUMNS, torch.device("cpu"))
    for reads in ("prompt", "both", "maximum"):
        table.put(0, Setting(0.2, 0.8, 0.1, 1.5, 0, READS.index(reads)), prompt_end=3)
        found = table.strengths(torch.tensor([0]), torch.tensor([7]), torch.zeros(1, 3))
        assert found.tolist() == [1.5], reads


def test_rows_move_and_change_places() -> None:
    table = RequestTable(3, COLUMNS, torch.device("cpu"))
    for row, strength in enumerate((0.25, 0.5)):
        table.put(row, Setting(0, 0, strength, strength), prompt_end=row + 1)
    table.swap(0, 1)
    table.move(0, 2)
    rows = torch.tensor([0, 1, 2])
    assert table.strengths(rows, torch.zeros(3).long(), torch.zeros(3, 3)).tolist() == [0.5, 0.25, 0.5]
    assert table.ends.tolist() == [2, 1, 2, 0]
