"""Bulk runs without Ray, and what they wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from safeside.scale import bulk
from safeside.scale.bulk import BulkOptions, Worker
from safeside.scale.engines import ENGINES
from safeside.scale.ledger import Claim, begin_shard
from safeside.scale.places import Folder
from safeside.scale.reading import Shard


def without_ray(monkeypatch: pytest.MonkeyPatch, n_deaths: int = 0) -> None:
    """Have a worker in this process score all shards, each after ``n_deaths`` workers that only began it."""

    def pooled(options: BulkOptions, claim: Claim, shards: Sequence[Shard]) -> Iterator[dict[str, object]]:
        for shard in [shard for shard in shards for _ in range(n_deaths)]:
            begin_shard(Folder(claim.output, claim.writer), shard)
        return map(Worker(options, claim, ENGINES.get(options.engine).make), [asdict(shard) for shard in shards])

    monkeypatch.setattr(bulk, "_connect", lambda workers, resource: None)
    monkeypatch.setattr(bulk, "_pooled", pooled)


def read_jsonl(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for part in sorted(folder.glob("part-*")) for line in part.read_text().splitlines()]
