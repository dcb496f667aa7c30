"""Requests made from the server's own OpenAPI document, and from its records: no answer is ever a server's error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from schemathesis.specs.openapi.checks import positive_data_acceptance

from safeside import Adapter, Base
from safeside.errors import SafesideError
from safeside.serve.app import create_app
from safeside.serve.audit import AuditLog
from safeside.serve.engine import Engine
from safeside.serve.policy import PolicyBook
from safeside.serve.service import Service, ServiceLimits
from safeside.serve.wire import ChatRequest, CompletionRequest, ModerationRequest
from serving_for_tests import running_at

POLICY = """
policies:
  house:
    prompt: [{action: steer, guard: harm, low: 0.3, high: 0.8}]
    answer: [{action: block, guard: harm, threshold: 0.9, n_consecutive: 2}]
deployment: [house]
"""
FEW = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def service(
    session_base: Base,
    random_guard: Callable[..., Adapter],
    random_aligner: Callable[..., Adapter],
    tmp_path_factory: pytest.TempPathFactory,
) -> Service:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "policy.yaml").write_text(POLICY)
    guard, aligner = random_guard(session_base), random_aligner(session_base)
    book = PolicyBook.load(folder / "policy.yaml")
    book.bind({"harm": guard}, [aligner.name])
    engine = Engine(session_base, [guard, aligner])
    limits = ServiceLimits(default_max_tokens=2)
    return Service(engine, book, AuditLog(f"sqlite:///{folder}/audit.db"), model="tiny", limits=limits)


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with running_at(create_app(service)) as url:
        yield url


def test_the_openapi_document_holds(url: str) -> None:
    """Status codes, content types and schemas are those of the document, and none is a 5xx."""
    seen = set()
    for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @FEW
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(excluded_checks=[positive_data_acceptance])  # some rules no schema can say

        check()
        seen.add(operation.path)
    assert {"/v1/chat/completions", "/v1/completions", "/v1/moderations", "/v1/adapters/load", "/metrics"} <= seen


SMALL = st.sampled_from(["", "x", "the cat", "<|eos|>", "\0", "é\ud800", "a" * 300])
CHATS = st.fixed_dictionaries(
    {"model": st.sampled_from(["tiny", "other"]), "messages": st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "robot"]), "content": SMALL}),
        max_size=3,
    )},
    optional={
        "max_tokens": st.sampled_from([0, 1, 3, 10**9]),
        "temperature": st.sampled_from([0, 1e-30, 0.5, 2, 3, "1"]),
        "top_p": st.sampled_from([0, 1e-30, 0.5, 1]),
        "seed": st.integers(-(2**64), 2**64),
        "stop": st.one_of(SMALL, st.lists(SMALL, max_size=5)),
        "stream": st.booleans(),
        "logprobs": st.booleans(),
        "top_logprobs": st.integers(-1, 21),
        "safety": st.fixed_dictionaries({}, optional={
            "policy": st.sampled_from(["house", "none", ""]),
            "strength": st.floats(allow_nan=False),
            "mode": st.sampled_from(["enforce", "shadow", "off"]),
            "tokens": st.booleans(),
        }),
    },
)  # fmt: skip


@given(CHATS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_chat_is_answered_or_refused(service: Service, url: str, body: dict[str, object]) -> None:
    headers = {"Content-Type": "application/json"}
    found = httpx.post(f"{url}/v1/chat/completions", content=json.dumps(body), headers=headers, timeout=60)
    assert found.status_code in (200, 400, 403, 404), found.text
    if found.status_code != 200:
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    assert service.engine.is_ready


@given(st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["model", "messages", "input", "prompt", "role", "content", "type", "text", "safety", "stop"]),
        inner, max_size=4,
    ),
    max_leaves=12,
))  # fmt: skip
@settings(max_examples=50)
def test_records_take_anything_or_say_why_not(body: object) -> None:
    for kind in (ChatRequest, CompletionRequest, ModerationRequest):
        try:
            found = kind.model_validate(body)
        except ValidationError:
            continue
        try:
            _ = found.texts if isinstance(found, ModerationRequest) else (found.stops, found.wanted, found.n_logprobs)
        except SafesideError:
            continue
