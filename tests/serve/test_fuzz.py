"""Requests made from the server's own OpenAPI document, and from its records: no answer is ever a server's error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

from safeside import Adapter, Base
from safeside.artifact import save_adapter
from safeside.errors import SafesideError
from safeside.moderation import ModerationRequest
from safeside.serve.app import AppOptions, create_app
from safeside.serve.audit import AuditLog
from safeside.serve.engine import Engine
from safeside.serve.keys import Keys, make_key
from safeside.serve.policy import PolicyBook
from safeside.serve.service import Service, ServiceLimits
from safeside.serve.threaded import in_thread
from safeside.serve.wire import ChatRequest, CompletionRequest

POLICY = """
policies:
  house:
    prompt: [{action: steer, guard: harm, low: 0.3, high: 0.8}]
    answer: [{action: block, guard: harm, threshold: 0.9, n_consecutive: 2}]
deployment: [house]
"""
FEW = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))

_EXCLUDED = [positive_data_acceptance, ignored_auth]  # some rules no schema can say; most requests here have no key
RIGHTS: dict[str, dict[str, object]] = {"user": {"tenant": "shop"}, "admin": {"tenant": "ops", "is_admin": True}}


@dataclass(frozen=True)
class Running:
    """A server, where adapters may come from, and its keys."""

    service: Service
    url: str
    root: Path
    keys: dict[str, str]

    def headers(self, name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[name]}"}

    def post(self, path: str, body: object, key: str) -> httpx.Response:
        headers = {"Content-Type": "application/json", **self.headers(key)}
        return httpx.post(f"{self.url}{path}", content=json.dumps(body), headers=headers, timeout=60)


@pytest.fixture(scope="module")
def running(
    session_base: Base,
    random_guard: Callable[..., Adapter],
    random_aligner: Callable[..., Adapter],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    """A server with a key for a user and one for an administrator, who may load two adapters."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "policy.yaml").write_text(POLICY)
    guard, aligner = random_guard(session_base), random_aligner(session_base)
    book = PolicyBook.load(folder / "policy.yaml")
    book.bind({"harm": guard}, [aligner.name])
    engine = Engine(session_base, [guard, aligner])
    limits = ServiceLimits(default_max_tokens=2)
    (folder / "adapters").mkdir()
    for name in ("calm", "kind"):
        save_adapter(random_aligner(session_base, name), folder / "adapters" / name)
    audit = AuditLog(f"sqlite:///{folder}/audit.db")
    keys = {name: make_key(folder / "keys.yaml", name, rights) for name, rights in RIGHTS.items()}
    service = Service(engine, book, audit, keys=Keys.load(folder / "keys.yaml"), model="tiny", limits=limits)
    with in_thread(create_app(service, AppOptions((folder / "adapters",)))) as url:
        yield Running(service, url, folder / "adapters", keys)


def test_the_openapi_document_holds(running: Running) -> None:
    """Status codes, content types and schemas are those of the document, and none is a 5xx: with each key, and none."""
    seen = set()
    url, asks = running.url, [{}, *(running.headers(name) for name in RIGHTS)]
    for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy(), headers=st.sampled_from(asks))
        @FEW
        def check(case: schemathesis.Case, headers: dict[str, str]) -> None:
            case.call_and_validate(headers=headers, excluded_checks=_EXCLUDED)

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
def test_any_chat_is_answered_or_refused(running: Running, body: dict[str, object]) -> None:
    found = running.post("/v1/chat/completions", body, "user")
    assert found.status_code in (200, 400, 403, 404), found.text
    if found.status_code != 200:
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    assert running.service.engine.is_ready


NAMES = st.sampled_from(["calm", "kind", "harm", "refuse", "gone", "", "\ud800", "a/b"])
PATHS = st.sampled_from(["{root}/calm", "{root}/kind", "{root}/gone", "{root}", "{root}/../keys.yaml", "{root}/calm/..",
                         "/", "", ".", "builtin:refuse", "a\0b", "\udc80", "x" * 5000])  # fmt: skip
ACTS = st.lists(
    st.fixed_dictionaries({"path": PATHS, "name": NAMES, "in_place": st.booleans(), "loads": st.booleans()}),
    min_size=1,
    max_size=5,
)


@given(ACTS, st.integers(0, 1))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_adapters_come_and_go_or_stay(running: Running, acts: list[dict[str, object]], vllm: int) -> None:
    """What an administrator may do in any order: none is a server's error, and what policies need stays."""
    load, unload, name, path = (("load", "unload", "name", "path"), ("load", "unload", "lora_name", "lora_path"))[vllm]
    for act in acts:
        before = dict(running.service.fingerprints)
        body = {name: act["name"]}
        if act["loads"]:
            body |= {path: str(act["path"]).replace("{root}", str(running.root)), "load_inplace": act["in_place"]}
        found = running.post(f"/v1/adapters/{load if act['loads'] else unload}", body, "admin")
        assert found.status_code in (200, 400, 403, 404), found.text
        after = running.service.engine.adapters
        assert "harm" in after  # the guard that the policy names
        assert len(after) > 1  # its rule is content with any aligner
        assert set(after) <= {"harm", "refuse", "calm", "kind"}
        assert running.post(f"/v1/adapters/{load}", body, "user").status_code in (400, 403)
        if found.status_code == 200:
            assert (act["name"] in after) == act["loads"]
        else:
            assert running.service.fingerprints == before
            assert set(after) == set(before)
            assert set(found.json()["error"]) == {"message", "type", "param", "code"}


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
