"""The playground in a real browser: type, slide, see the answer change, see a block."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from safeside import Adapter, Base, Message
from safeside.guards.score import score_conversations
from safeside.serve.app import create_app
from safeside.serve.audit import AuditLog
from safeside.serve.engine import Engine
from safeside.serve.keys import Keys, make_key
from safeside.serve.playground import router
from safeside.serve.policy import PolicyBook
from safeside.serve.service import Service
from safeside.serve.threaded import in_thread

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PROMPTS = ("the cat sat on the mat", "how can this be", "they said there and then", "the other cat")
TIMEOUT_MS = 30_000


@dataclass(frozen=True)
class Served:
    """A server, the keys that it knows, and prompts that its policy lets through and blocks."""

    url: str
    tester: str
    user: str
    fine: str
    blocked: str


@pytest.fixture(scope="module")
def served(
    session_base: Base,
    random_guard: Callable[..., Adapter],
    random_aligner: Callable[..., Adapter],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("playground")
    guard, aligner = random_guard(session_base), random_aligner(session_base)
    conversations = [(Message("user", prompt),) for prompt in PROMPTS]
    scores = [row.by_guard["harm"][0] for row in score_conversations(session_base, [guard], conversations)]
    (low, fine), *_, (high, blocked) = sorted(zip(scores, PROMPTS, strict=True))
    assert high - low > 0.01
    (folder / "policy.yaml").write_text(
        "deployment: house\npolicies:\n"
        f"  house: {{prompt: [{{guard: harm, action: block, threshold: {(low + high) / 2}}}]}}\n"
        "  marked: {answer: [{guard: harm, action: annotate, threshold: 0}]}\n"
    )
    tester = make_key(folder / "keys.yaml", "tester", {"tenant": "lab", "may_loosen": True})
    user = make_key(folder / "keys.yaml", "user", {"tenant": "shop"})
    book = PolicyBook.load(folder / "policy.yaml")
    book.bind({"harm": guard}, [aligner.name])
    keys = Keys.load(folder / "keys.yaml")
    engine = Engine(session_base, [guard, aligner])
    service = Service(engine, book, AuditLog(f"sqlite:///{folder}/audit.db"), keys=keys, model="tiny")
    with in_thread(create_app(service)) as url:
        yield Served(url, tester, user, fine, blocked)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def opened(browser: Browser, served: Served) -> Iterator[tuple[Page, list[str]]]:
    """One page for the module, and what it logged or loaded from elsewhere."""
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if "Policy" in message.text else None)
    page.on("request", lambda sent: None if sent.url.startswith((served.url, "data:")) else problems.append(sent.url))
    page.goto(f"{served.url}/playground")
    expect(page.locator("#served")).to_contain_text("needs a key")
    yield page, problems
    page.close()


@pytest.fixture
def page(opened: tuple[Page, list[str]], served: Served) -> Iterator[Page]:
    """The playground, fresh, with the tester's key; a script that fails and a request to elsewhere fail the test."""
    page, problems = opened
    page.reload()
    connect(page, served.tester)
    yield page
    assert problems == []


def connect(page: Page, key: str) -> None:
    page.fill("#key", key)
    page.press("#key", "Enter")
    expect(page.locator("#served")).to_contain_text("tiny")


def ask(page: Page, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.click("#send")
    expect(page.locator(".turn").last).to_have_class("turn done", timeout=TIMEOUT_MS)


def text(page: Page, side: str) -> str:
    return page.locator(f".turn .{side} .text").last.inner_text()


def slide(page: Page, strength: str) -> None:
    """Move the slider and wait until the last question was answered again."""
    with page.expect_response(lambda response: response.url.endswith("/chat/completions")):
        page.locator("#strength").fill(strength)
    expect(page.locator(".turn").last).to_have_class("turn done", timeout=TIMEOUT_MS)


def test_type_slide_and_see_the_answer_change(page: Page, served: Served) -> None:
    page.fill("#tokens", "8")
    page.check("#set-strength")
    page.locator("#strength").fill("0")
    ask(page, served.fine)
    base = text(page, "base")
    assert base
    assert text(page, "safe") == base  # strength 0 is the base
    n_tokens = page.locator(".token").count()
    assert 1 <= n_tokens <= 8
    assert page.locator(".token").first.get_attribute("title").count("harm 0.") == 1
    expect(page.locator(".trace svg")).to_have_attribute("aria-label", re.compile("Strength from 0.00 to 0.00"))
    slide(page, "2")
    expect(page.locator("#strength-value")).to_have_text("2.00")
    assert text(page, "safe") != base == text(page, "base")
    expect(page.locator(".safe .badge")).to_contain_text("steered")
    expect(page.locator(".trace svg")).to_have_attribute("aria-label", re.compile("Strength from 2.00 to 2.00"))


def test_a_block_is_seen_and_said_in_words(page: Page, served: Served) -> None:
    page.fill("#tokens", "8")
    ask(page, served.blocked)
    expect(page.locator(".safe .badge")).to_have_text("\u2716 blocked")
    expect(page.locator(".safe .text")).to_have_text("(nothing was sent)")
    expect(page.locator(".reason")).to_contain_text("harm: harm 0.")
    expect(page.locator("tr.over td").last).to_contain_text("flagged")
    assert text(page, "base")  # the base itself had an answer
    assert page.locator(".token").count() == 0


def test_a_policy_is_added_and_the_conversation_goes_on(page: Page, served: Served) -> None:
    page.fill("#tokens", "4")
    page.uncheck("#compare")
    page.select_option("#policy", "marked")
    ask(page, served.fine)
    expect(page.locator(".safe .badge")).to_contain_text("annotated")
    expect(page.locator(".reason")).to_contain_text("marked")
    assert page.locator(".token.over").count() == page.locator(".token").count() > 0
    assert not page.locator(".base").is_visible()
    with page.expect_request(lambda sent: sent.url.endswith("/chat/completions")) as sent:
        ask(page, "how can this be")
    roles = [message["role"] for message in sent.value.post_data_json["messages"]]
    assert roles in (["user", "assistant", "user"], ["user"])  # an empty answer is not history
    page.click("#clear")
    assert page.locator(".turn").count() == 0


def test_a_key_that_may_not_loosen_is_told_so_where_the_base_would_stand(page: Page, served: Served) -> None:
    connect(page, served.user)
    page.fill("#tokens", "4")
    ask(page, served.fine)
    expect(page.locator(".base .text")).to_contain_text("needs a key that may loosen")
    expect(page.locator(".base .badge")).to_have_text("not shown")
    assert text(page, "safe")


def test_a_users_text_is_never_markup(page: Page) -> None:
    page.fill("#tokens", "2")
    ask(page, "<img src=x onerror=alert(1)><b>the cat</b>")
    expect(page.locator(".asked")).to_have_text("<img src=x onerror=alert(1)><b>the cat</b>")
    assert page.locator(".asked *").count() == 0


def test_themes_can_be_chosen(page: Page) -> None:
    def ground() -> str:
        return page.locator("body").evaluate("element => getComputedStyle(element).backgroundColor")

    seen = []
    for name in ("dark", "light"):
        page.click("#theme")
        expect(page.locator("#theme")).to_have_text(f"Theme: {name}")
        seen.append(ground())
    assert len(set(seen)) == 2


# ---- without a browser -----------------------------------------------------------------------------------------------


def test_the_page_needs_no_key_and_nothing_from_elsewhere(served: Served) -> None:
    page = httpx.get(f"{served.url}/playground")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    parts = re.findall(r'(?:href|src)="(playground/[^"]+)"', page.text)
    assert set(parts) == {"playground/style.css", "playground/app.js"}
    texts = [page.text, *(httpx.get(f"{served.url}/playground/{name}").text for name in names())]
    for found in texts:
        assert set(re.findall(r"https?://[^\s\"']+", found)) <= {"http://www.w3.org/2000/svg"}
        assert "innerHTML" not in found


def names() -> list[str]:
    folder = Path(__file__).parents[2] / "src" / "safeside" / "serve" / "page"
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".html")


@pytest.mark.parametrize("name", ["index.html", "nothing.js", "..%2Fapp.py", "%2e%2e/app.py", "..", "style.css/x"])
def test_no_other_file_can_be_fetched(served: Served, name: str) -> None:
    assert httpx.get(f"{served.url}/playground/{name}").status_code == 404


def test_the_router_serves_every_part_of_the_page(served: Served) -> None:
    assert {route.path for route in router.routes} == {"/playground", "/playground/{name}"}
    assert all(httpx.get(f"{served.url}/playground/{name}").status_code == 200 for name in names())
