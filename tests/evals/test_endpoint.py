"""The HTTP client against a server that speaks the protocol, late, rarely, wrongly or not at all."""

from __future__ import annotations

import json
import socket
import threading

import pytest

from endpoint_for_tests import Answer, serving
from safeside.errors import InputError
from safeside.evals.endpoint import ChatClient, Endpoint, EndpointError, endpoint_of, estimated_tokens

QUICK = 0.4  # seconds: what a test waits for a server that says nothing
PATIENT = 30.0


def client(url: str, waited: list[float] | None = None, **changes: object) -> ChatClient:
    values: dict[str, object] = {"timeout_s": PATIENT, "n_retries": 3, "key": "secret-key", **changes}
    return ChatClient(Endpoint(url, "grader", **values), ([] if waited is None else waited).append)  # type: ignore[arg-type]


def test_a_reply_is_asked_for_as_the_protocol_says() -> None:
    with serving(Answer("fine", n_tokens=42)) as server:
        asked = client(server.url + "/", max_reply_tokens=77)
        reply = asked.ask("How good?")
        assert (reply.text, reply.n_tokens, asked.n_spent) == ("fine", 42, 42)
        assert server.asked == [
            {
                "model": "grader",
                "messages": [{"role": "user", "content": "How good?"}],
                "temperature": 0,
                "max_tokens": 77,
                "path": "/v1/chat/completions",
                "authorization": "Bearer secret-key",
            }
        ]
        client(server.url, key=None).ask("x")
        assert server.asked[-1]["authorization"] is None


def test_without_usage_tokens_are_estimated_from_above() -> None:
    with serving(Answer("good", n_tokens=None)) as server:
        reply = client(server.url).ask("How?")
    assert reply.n_tokens == estimated_tokens("How?") + estimated_tokens("good") > 10


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_what_may_pass_is_tried_again_and_waited_for_longer(status: int) -> None:
    waited: list[float] = []
    with serving(Answer(status=status), Answer(status=status), Answer("fine")) as server:
        assert client(server.url, waited).ask("x").text == "fine"
        assert len(server.asked) == 3
    assert waited == [1.0, 2.0]


def test_the_endpoint_says_how_long_to_wait_within_reason() -> None:
    waited: list[float] = []
    busy = [Answer(status=429, headers={"Retry-After": text}) for text in ("7", "100000", "Wed, 21 Oct 2015", "\u00b2")]
    with serving(*busy, Answer("fine")) as server:
        client(server.url, waited, n_retries=4).ask("x")
    assert waited == [7.0, 60.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Answer(status=429), "4 attempts failed, the last: status 429"),
        (Answer(body=b"<html>welcome</html>"), "not a chat completion: '<html>"),
        (Answer(body=b'{"choices": []}'), "not a chat completion"),
        (Answer(body=b"[1, 2]"), "not a chat completion"),
        (Answer(body=b"\xff\xfe"), "not a chat completion"),
        (Answer(body=json.dumps({"choices": [{"message": {"content": None}}]}).encode()), "without text: None"),
        (Answer(body=b"[" * 200_000), "not a chat completion"),
        (Answer(body=b" " * ((1 << 20) + 1)), "a reply of more than 1048576 bytes"),
        (Answer(hangs_up=True), "the connection failed"),
        (Answer(body=b"short", headers={"Content-Length": "900"}), "attempts failed"),
    ],
)
def test_what_stays_wrong_is_an_error_with_its_reason(answer: Answer, problem: str) -> None:
    waited: list[float] = []
    with serving(answer) as server:
        asked = client(server.url, waited)
        with pytest.raises(EndpointError, match=problem) as caught:
            asked.ask("x")
        assert len(server.asked) == 4
    assert len(waited) == 3
    assert caught.value.n_tokens == asked.n_spent == 4 * estimated_tokens("x")
    assert "secret-key" not in str(caught.value)


@pytest.mark.parametrize(
    "answer", [Answer("fine", wait_s=20.0), Answer("fine", drip_s=0.1), Answer("fine", header_drip_s=0.05)]
)
def test_a_server_that_is_silent_or_drips_is_given_up(answer: Answer) -> None:
    with (
        serving(answer) as server,
        pytest.raises(EndpointError, match=r"2 attempts failed, the last: no reply within 0.4 s"),
    ):
        client(server.url, timeout_s=QUICK, n_retries=1).ask("x")


def test_a_host_whose_name_is_looked_up_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def silent(*_: object, **__: object) -> None:
        asked.wait(20.0)
        raise OSError("given up long ago")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    with pytest.raises(EndpointError, match=r"the last: no reply within 0.4 s"):
        client("http://somewhere/v1", timeout_s=QUICK, n_retries=0).ask("x")
    asked.set()


@pytest.mark.parametrize("n_tokens", [7, None])
def test_lone_surrogates_of_a_reply_are_replaced(n_tokens: int | None) -> None:
    with serving(Answer("so \ud83d good \udc00", n_tokens=n_tokens)) as server:
        reply = client(server.url).ask("x")
    assert reply.text == "so \ufffd good \ufffd"
    assert reply.n_tokens == (n_tokens or estimated_tokens("x") + estimated_tokens(reply.text))


def test_nobody_there_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match="the connection failed"):
            client(url, n_retries=0).ask("x")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_will_not_pass_is_not_tried_again(status: int) -> None:
    with serving(Answer(status=status)) as server:
        with pytest.raises(EndpointError, match=f"status {status}; check the endpoint's address, key and model"):
            client(server.url).ask("x")
        assert len(server.asked) == 1
    with serving(Answer(status=500), Answer(status=status)) as server:
        with pytest.raises(EndpointError, match=f"status {status}") as caught:
            client(server.url).ask("x")
        assert caught.value.n_tokens == estimated_tokens("x")  # the first attempt may be charged


def test_a_redirect_is_refused_so_that_the_key_stays_here() -> None:
    with serving(Answer("stolen")) as other:
        moved = Answer(status=302, headers={"Location": other.url + "/chat/completions"})
        with serving(moved) as server, pytest.raises(EndpointError, match="status 302"):
            client(server.url).ask("x")
        assert other.asked == []


def test_after_five_failures_in_a_row_nothing_more_is_asked() -> None:
    with serving(Answer(status=500)) as server:
        asked = client(server.url, n_retries=0)
        for _ in range(7):
            with pytest.raises(EndpointError):
                asked.ask("x")
        assert len(server.asked) == 5
    with serving(*[Answer(status=500)] * 4, Answer("fine"), Answer(status=500)) as server:
        asked = client(server.url, n_retries=0)
        for _ in range(8):
            try:
                asked.ask("x")
            except EndpointError:
                continue
        assert len(server.asked) == 8  # a reply between them: it is alive


def test_the_ceiling_is_never_passed() -> None:
    with serving(Answer("fine", n_tokens=400)) as server:
        asked = client(server.url, max_tokens=1000, max_reply_tokens=300)
        asked.ask("x")
        asked.ask("x")
        with pytest.raises(EndpointError, match="not asked: 800 of 1000 tokens are spent, and this may take 316"):
            asked.ask("x")
        assert len(server.asked) == 2
    with serving(Answer(status=500)) as server:  # failed attempts may be charged too
        with pytest.raises(EndpointError, match="not asked"):
            client(server.url, max_tokens=340, max_reply_tokens=300).ask("x")
        assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"url": "localhost:8000"}, "An endpoint is an address"),
        ({"url": "file:///etc/passwd"}, "An endpoint is an address"),
        ({"url": "http://me:secret@host/v1"}, "An endpoint is an address"),
        ({"model": " "}, "needs the name of a model"),
        ({"timeout_s": 0.0}, "timeout_s must be above 0"),
        ({"timeout_s": float("nan")}, "timeout_s must be above 0"),
        ({"n_retries": -1}, "at least 0"),
        ({"max_tokens": 0}, "at least 1"),
    ],
)
def test_an_endpoint_is_checked(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        Endpoint(**{"url": "http://host/v1", "model": "grader", **changes})  # type: ignore[arg-type]


def test_an_endpoint_from_options() -> None:
    assert endpoint_of(None, None, "key", 5) is None
    assert endpoint_of("http://host/v1", "grader", "key", 5) == Endpoint(
        "http://host/v1", "grader", "key", max_tokens=5
    )
    for url, model in (("http://host/v1", None), (None, "grader")):
        with pytest.raises(InputError, match="needs --endpoint URL and --judge-model NAME"):
            endpoint_of(url, model, None, 5)
    assert "key" not in repr(Endpoint("http://host/v1", "grader", "secret-key")).replace("key=", "")
