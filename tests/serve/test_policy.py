"""The book of policies: reading, binding, reloading, and who gets what."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies_for_tests import GUARD, STRENGTHS, Wish, policies
from safeside import Adapter, Base, fixed
from safeside.errors import AccessError, ConfigError, InputError, UnknownNameError
from safeside.serve.effective import EffectivePolicy
from safeside.serve.keys import Caller
from safeside.serve.merging import strictest
from safeside.serve.policy import PolicyBook
from safeside.serve.rules import Policy

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "policies").glob("*.yaml"))
BOOK = """
adapters: {harm: builtin:harm}
deployment: standard
tenants: {school: [minors, quiet], laboratory: watching}
policies:
  standard:
    prompt: [{guard: harm, action: block, threshold: 0.9}, {guard: harm, action: steer, low: 0.4, high: 0.8}]
    ceiling: 1.5
  minors: {prompt: [{guard: harm, action: block, threshold: 0.6}], floor: 0.5, hold_back: 16}
  quiet: {audit_text: false}
  watching: {mode: shadow, prompt: [{guard: harm, action: block, threshold: 0.1}], floor: 0.5}
  other: {prompt: [{guard: harm, action: annotate, threshold: 0.3}]}
"""
SCHOOL, TESTER = Caller("school"), Caller("school", may_loosen=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(BOOK)
    return path


@pytest.fixture
def book(file: Path) -> PolicyBook:
    return PolicyBook.load(file)


def bound(book: PolicyBook, guard: Adapter) -> PolicyBook:
    book.bind({GUARD: guard}, ["refuse"])
    return book


# ---- who gets what ---------------------------------------------------------------------------------------------------


def test_deployment_tenant_and_request_hold_together(book: PolicyBook) -> None:
    assert book.resolve(Caller("stranger")).name == "standard"
    assert book.resolve(SCHOOL).name == "standard+minors+quiet"
    asked = book.resolve(SCHOOL, Wish("other"))
    assert asked.name == "standard+minors+quiet+other"
    held = [book.policies[name] for name in ("standard", "minors", "quiet", "other")]
    assert asked.policy == strictest([*held, Policy(on_error="block", hold_back=8)])
    assert book.resolve(SCHOOL, Wish("minors")).name == "standard+minors+quiet"  # once is enough
    assert (asked.version, asked.policy.floor, asked.hold_back) == (book.version, 0.5, 16)


def test_a_caller_knows_its_own_policies_and_those_of_no_tenant(book: PolicyBook) -> None:
    assert book.known_to(Caller("school", "web")) == ("standard", "minors", "quiet", "other")
    stranger = Caller("stranger", "web")
    assert book.known_to(stranger) == ("standard", "other")
    for hidden in ("minors", "watching"):  # as if it were not there
        with pytest.raises(UnknownNameError, match=f"Unknown policy '{hidden}'; expected one of other, standard"):
            book.resolve(stranger, Wish(hidden))
    for operator in (
        Caller("local"),
        Caller("stranger", "web", is_admin=True),
        Caller("stranger", "web", may_loosen=True),
    ):
        assert book.known_to(operator) == tuple(book.policies)


def test_a_request_may_ask_for_more_strength(book: PolicyBook, guard: Adapter) -> None:
    bound(book, guard)
    assert book.resolve(SCHOOL, Wish(strength=0.75)).strengths()["refuse"].floor == 0.75
    assert book.resolve(SCHOOL, Wish(strength=0.75)).strengths()["refuse"].ceiling == 1.0
    assert book.resolve(SCHOOL, Wish(strength=1.5)).strengths()["refuse"].floor == 1.5


@pytest.mark.parametrize(
    ("wish", "error", "message"),
    [
        (Wish(strength=0.4), AccessError, r"Strength 0.4 is below the floor 0.5 of policy standard\+minors\+quiet"),
        (Wish(mode="shadow"), AccessError, "Mode 'shadow' lets nothing act, which this key may not ask for"),
        (Wish(strength=1.6), InputError, r"must lie in \[0, 1.5\]; got 1.6"),
        (Wish(strength=float("nan")), InputError, "got nan"),
        (Wish(strength=-1.0), InputError, "got -1"),
        (Wish("minor"), UnknownNameError, "Unknown policy 'minor'; .* Did you mean 'minors'"),
    ],
)
def test_a_request_may_not_ask_for_less(book: PolicyBook, wish: Wish, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        book.resolve(SCHOOL, wish)


def test_a_key_that_may_loosen_gets_exactly_what_it_asks_for(book: PolicyBook, guard: Adapter) -> None:
    bound(book, guard)
    assert book.resolve(TESTER).policy == book.resolve(SCHOOL).policy  # it asked for nothing
    assert book.resolve(TESTER, Wish("other")).name == "other"
    for strength in (0.0, 2.0):
        assert book.resolve(TESTER, Wish(strength=strength)).strengths() == {"refuse": fixed(strength)}
    shadow = book.resolve(TESTER, Wish(mode="shadow"))
    assert shadow.is_shadow
    assert shadow.strengths() == {"refuse": fixed(0.0)}


def test_shadow_belongs_to_its_own_rules_and_a_request_may_enforce_them(book: PolicyBook) -> None:
    caller = Caller("laboratory")
    watching = book.resolve(caller)
    assert not watching.is_shadow
    assert {rule.mode for rule in watching.policy.prompt} == {"enforce", "shadow"}
    assert watching.policy.floor == 0.0
    enforced = book.resolve(caller, Wish(mode="enforce"))
    assert {rule.mode for rule in enforced.policy.prompt} == {"enforce"}
    assert enforced.policy.floor == 0.5


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(policies(), min_size=3, max_size=3), STRENGTHS, st.sampled_from([None, "enforce"]))
def test_no_request_loosens_without_the_right(tmp_path: Path, found: list[Policy], strength: float, mode: str) -> None:
    """Whatever the policies are: every rule still holds, and floor, hold-back and genes only grow."""
    path = tmp_path / "random.yaml"
    dumped = {name: policy.model_dump_json(exclude_defaults=True) for name, policy in zip("abc", found, strict=True)}
    listed = ", ".join(f"{name}: {policy}" for name, policy in dumped.items())
    path.write_text(f"deployment: a\ntenants: {{t: b}}\npolicies: {{{listed}}}")
    book = PolicyBook.load(path)
    before = book.resolve(Caller("t"))
    with suppress(AccessError, InputError):  # a strength below the floor, or above the ceiling
        after = book.resolve(Caller("t"), Wish("c", strength, mode))
        check_no_looser(before, after, strength, mode)


def check_no_looser(before: EffectivePolicy, after: EffectivePolicy, strength: float, mode: str | None) -> None:
    for old, new in ((before.policy.prompt, after.policy.prompt), (before.policy.answer, after.policy.answer)):
        for rule in old:
            assert rule in new or rule.model_copy(update={"mode": "enforce"}) in new
        assert mode is None or {rule.mode for rule in new} <= {"enforce"}
    assert after.policy.floor >= max(before.policy.floor, strength)
    assert after.hold_back >= before.hold_back
    order = ("annotate", "steer", "block")
    assert order.index(after.on_error) >= order.index(before.on_error)
    assert set(after.policy.genes) >= set(before.policy.genes)
    assert after.exact_strength is None


@pytest.mark.parametrize("tenant", ["stranger", "careless"])
def test_nobody_loosens_what_the_deployment_leaves_to_the_defaults(tmp_path: Path, tenant: str) -> None:
    lax = "{on_error: annotate, hold_back: 0}"
    text = f"deployment: a\ntenants: {{careless: lax}}\npolicies: {{a: {{}}, lax: {lax}}}"
    book = PolicyBook.load(_written(tmp_path / "policy.yaml", text))
    asked = book.resolve(Caller(tenant), Wish("lax"))
    assert (asked.on_error, asked.hold_back) == ("block", 8)
    tested = book.resolve(Caller(tenant, may_loosen=True), Wish("lax"))
    assert (tested.on_error, tested.hold_back) == ("annotate", 0)


def test_a_strength_needs_an_aligner(tmp_path: Path, guard: Adapter) -> None:
    book = PolicyBook.load(_written(tmp_path / "policy.yaml", "{deployment: a, policies: {a: {}}}"))
    book.bind({GUARD: guard}, [])
    for caller in (SCHOOL, TESTER):
        with pytest.raises(InputError, match="no aligner is loaded"):
            book.resolve(caller, Wish(strength=0.5))
        assert book.resolve(caller, Wish(strength=0.0)).strengths() == {}


def test_no_request_has_texts_logged(tmp_path: Path) -> None:
    """Only the deployment and the tenant may; a request may have fewer logged."""
    text = """
    deployment: plain
    tenants: {told: keeps}
    policies: {plain: {}, keeps: {audit_text: true}, drops: {audit_text: false}}
    """
    book = PolicyBook.load(_written(tmp_path / "policy.yaml", text))
    for may_loosen in (False, True):
        assert not book.resolve(Caller("other", may_loosen=may_loosen), Wish("keeps")).audit_text
        assert book.resolve(Caller("told", may_loosen=may_loosen), Wish("keeps")).audit_text
        assert not book.resolve(Caller("told", may_loosen=may_loosen), Wish("drops")).audit_text
    assert book.resolve(Caller("told")).audit_text


# ---- reading and reloading -------------------------------------------------------------------------------------------


def test_the_version_is_that_of_the_content(file: Path, book: PolicyBook, tmp_path: Path) -> None:
    assert PolicyBook.load(file).version == book.version
    (tmp_path / "more.yaml").write_text("policies: {}")
    file.write_text(BOOK + "include: [more.yaml]")
    first = book.reload()
    assert first != PolicyBook.load(_written(tmp_path / "same.yaml", BOOK)).version
    (tmp_path / "more.yaml").write_text("policies: {late: {floor: 0.1}}")
    assert book.reload() not in (first, "")
    assert book.policies["late"].floor == 0.1


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected a mapping"),
        ("{", "is not YAML"),
        ("deployment: 2024-13-45", "is not YAML"),
        ("deployment: 0x_", "is not YAML"),
        ("deployment: standard", "Unknown policy 'standard'"),
        ("policies: {a: {}}", "deployment: Field required"),
        ("deployment: []\npolicies: {a: {}}", "deployment"),
        ("deployment: a\ndeployment: a\npolicies: {a: {}}", "'deployment' stands twice"),
        ("deployment: a\npolicies: {a: {strenght: 1}}", "policies.a.strenght: Extra inputs"),
        ("deployment: a\npolicies: {a: {on_error: allow}}", "policies.a.on_error"),
        ("deployment: a\npolicies: {a: {floor: 3}}", "policies.a.floor"),
        ("deployment: a\npolicies: {a: {floor: .nan}}", "policies.a.floor"),
        ("deployment: a\npolicies: {a: {floor: 1, ceiling: 0.5}}", "ceiling 0.5 is below"),
        ("deployment: a\npolicies: {a: {hold_back: -1}}", "policies.a.hold_back"),
        ("deployment: a\npolicies: {a: {prompt: [{guard: g, action: explode}]}}", "policies.a.prompt.0"),
        ("deployment: a\npolicies: {a: {prompt: [{guard: g, action: replace}]}}", "needs a text to send instead"),
        ("deployment: a\npolicies: {a: {prompt: [{guard: g, action: block, text: x}]}}", "only 'replace' has one"),
        (
            "deployment: a\npolicies: {a: {prompt: [{guard: g, action: block, threshold: 1, preset: strict}]}}",
            "a preset or a threshold, not both",
        ),
        ("deployment: a\npolicies: {a: {prompt: [{guard: g, action: steer, low: 0.5}]}}", "needs both low and high"),
        ("deployment: a\npolicies: {a: {prompt: [{guard: g, action: steer, low: 1, high: 0}]}}", "must not be above"),
        (
            "deployment: a\npolicies: {a: {prompt: [{guard: g, action: steer, floor: 1, ceiling: 0.5}]}}",
            "floor 1.0 must not be above",
        ),
        (
            "deployment: a\npolicies: {a: {prompt: [{guard: g, action: steer, low: 0, high: 1, preset: strict}]}}",
            "low and high or a preset",
        ),
        ("deployment: a\npolicies: {a: {answer: [{guard: g, action: block, labels: [x]}]}}", "leave labels out"),
        ("deployment: a\npolicies: {'../a': {}}", "policies"),
        ("deployment: a\ninclude: [none.yaml]\npolicies: {a: {}}", "none.yaml cannot be read"),
        ("deployment: a\n1: 2", "a key must be text"),
        ("deployment: a\npolicies: {a: {}, [b]: {}}", "a key must be text"),
    ],
)
def test_what_is_wrong_is_told_and_a_reload_keeps_the_old_book(
    file: Path, book: PolicyBook, text: str, problem: str
) -> None:
    before = book.version
    file.write_text(text)
    with pytest.raises(ConfigError) as told:
        book.reload()
    assert problem in str(told.value)
    assert str(file.parent) in str(told.value)
    assert (book.version, book.resolve(SCHOOL).name) == (before, "standard+minors+quiet")
    with pytest.raises(ConfigError):
        PolicyBook.load(file)


def test_files_that_cannot_be_read_are_told(tmp_path: Path, file: Path, book: PolicyBook) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml cannot be read"):
        PolicyBook.load(tmp_path / "nothing.yaml")
    for content in (b"\xff\xfe\x00", b"a: " + b"[" * 200, b"#" * (1 << 19)):
        file.write_bytes(content)
        with pytest.raises(ConfigError):
            book.reload()


def test_a_policy_stands_in_one_file(tmp_path: Path, file: Path) -> None:
    (tmp_path / "more.yaml").write_text("policies: {minors: {}}")
    file.write_text(BOOK + "include: [more.yaml]")
    with pytest.raises(ConfigError, match="policy minors stands in another file already"):
        PolicyBook.load(file)


def test_requests_see_one_edition_while_it_is_reloaded(file: Path, book: PolicyBook) -> None:
    """The version and the floor of an answer always belong together."""
    texts = [BOOK, BOOK.replace("floor: 0.5, hold", "floor: 0.7, hold")]
    floors, stop = {book.version: 0.5}, threading.Event()
    file.write_text(texts[1])
    floors[book.reload()] = 0.7

    def reload() -> None:
        for turn in range(15):
            file.write_text(texts[turn % 2])
            book.reload()
        stop.set()

    thread = threading.Thread(target=reload)
    thread.start()
    while not stop.is_set():
        found = book.resolve(SCHOOL)
        assert found.policy.floor == floors[found.version]
    thread.join()


# ---- binding ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guard(session_base: Base, random_guard: Callable[..., Adapter]) -> Adapter:
    return random_guard(session_base, name=GUARD, labels=("hate", "theft"))


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        ("prompt: [{guard: harmm, action: block}]", "prompt rule 1: Unknown guard 'harmm'; .* Did you mean 'harm'"),
        (
            "answer: [{guard: harm, action: annotate, labels: [thef]}]",
            "answer rule 1: Unknown label of guard harm 'thef'",
        ),
        ("prompt: [{guard: harm, action: block, preset: strict}]", "has no preset 'strict'"),
        ("prompt: [{guard: harm, action: steer, aligner: kind}]", "Unknown aligner 'kind'"),
        ("genes: [safe]", "needs gene 'safe', which is not loaded; loaded are none"),
    ],
)
def test_what_is_not_loaded_is_told(tmp_path: Path, guard: Adapter, policy: str, problem: str) -> None:
    path = _written(tmp_path / "p.yaml", f"deployment: a\npolicies: {{a: {{}}, b: {{{policy}}}}}")
    with pytest.raises(ConfigError, match=f"Policy 'b'.*{problem}"):
        bound(PolicyBook.load(path), guard)


def test_steering_needs_an_aligner(book: PolicyBook, guard: Adapter) -> None:
    with pytest.raises(ConfigError, match="Policy 'standard', prompt rule 2: it steers, but no aligner is loaded"):
        book.bind({GUARD: guard}, [])


def test_what_a_policy_needs_cannot_be_unloaded_nor_reloaded_away(file: Path, book: PolicyBook, guard: Adapter) -> None:
    bound(book, guard)
    with pytest.raises(ConfigError, match="Unknown guard 'harm'"):
        book.bind({}, ["refuse"])
    file.write_text(BOOK.replace("guard: harm", "guard: hate"))
    with pytest.raises(ConfigError, match="Unknown guard 'hate'"):
        book.reload()
    assert book.resolve(SCHOOL).adapters == {GUARD: guard}
    assert book.resolve(SCHOOL).policy.prompt[0].guard == GUARD


def test_policies_that_hold_together_steer_by_one_guard(
    tmp_path: Path, session_base: Base, random_guard: Callable[..., Adapter], guard: Adapter
) -> None:
    text = (
        "deployment: a\ntenants: {{t: {tenant}}}\npolicies:\n"
        "  a: {{prompt: [{{guard: harm, action: steer, low: 0, high: 1}}]}}\n"
        "  b: {{prompt: [{{guard: hate, action: steer, low: 0, high: 1}}]}}"
    )
    guards = {GUARD: guard, "hate": random_guard(session_base, name="hate")}
    book = PolicyBook.load(_written(tmp_path / "p.yaml", text.format(tenant="a")))
    book.bind(guards, ["refuse"])
    with pytest.raises(InputError, match="Policies a, b cannot hold together: Steer rules of harm and hate"):
        book.resolve(Caller("t"), Wish("b"))
    with pytest.raises(ConfigError, match="Steer rules of harm and hate"):
        PolicyBook.load(_written(tmp_path / "p.yaml", text.format(tenant="b"))).bind(guards, ["refuse"])


def test_genes_that_are_loaded_are_enough(tmp_path: Path, guard: Adapter) -> None:
    book = PolicyBook.load(_written(tmp_path / "p.yaml", "deployment: a\npolicies: {a: {genes: [safe]}}"))
    book.bind({GUARD: guard}, [], ["safe", "kind"])
    assert book.resolve(SCHOOL).policy.genes == ("safe",)


# ---- the examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_valid(path: Path) -> None:
    book = PolicyBook.load(path)
    for tenant in ("", *book.tenants):
        assert book.resolve(Caller(tenant)).guards
    for policy in book.policies.values():
        assert policy.description


def test_there_are_examples() -> None:
    assert EXAMPLES
