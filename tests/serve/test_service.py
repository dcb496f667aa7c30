"""What is recorded of an answer while the server around it changes."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

from safeside.serve.audit import AuditRecord
from safeside.serve.effective import Decision
from safeside.serve.keys import Caller
from safeside.serve.metrics import Metrics
from safeside.serve.row import Ended, Judged
from safeside.serve.service import Answering, Service


def test_an_answer_is_recorded_with_the_adapters_that_it_began_with() -> None:
    """A slow reader hears the end of an answer after the adapters were exchanged."""
    records: list[AuditRecord] = []
    engine = SimpleNamespace(base=SimpleNamespace(name="tiny"), adapters={}, metrics=Metrics())
    service = Service(engine, None, SimpleNamespace(append=records.append))  # type: ignore[arg-type]
    service.fingerprints = {"harm": "old"}
    policy = SimpleNamespace(name="p", version="1", audit_text=False)
    job = SimpleNamespace(ids=(1,), cancelled=threading.Event())

    async def listen() -> None:
        admission = SimpleNamespace(settle=lambda n_used: None)
        answering = Answering(Caller("shop"), policy, job, admission, asyncio.Queue(), "?")  # type: ignore[arg-type]
        for event in (Judged((), Decision("allow")), Ended("stop", 1, (), Decision("allow"), 0.0)):
            answering.inbox.put_nowait(event)
        async for _ in service.events(answering, lambda: asyncio.sleep(0, False)):
            service.fingerprints = {"harm": "new"}

    asyncio.run(listen())
    assert [record.adapters for record in records] == [{"harm": "old"}, {"harm": "old"}]
