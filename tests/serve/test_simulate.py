"""``safeside policy`` and ``safeside key``: what a policy would have done, and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import Ran, write
from safeside import Base, load_adapter, load_base
from safeside.guards.score import judge
from safeside.serve.keys import Keys
from safeside.tasks.rows import messages_of

Run = Callable[..., Ran]
POLICY = """
adapters: {{harm: {adapters}/harm, refuse: {adapters}/refuse}}
deployment: house
tenants: {{school: minors}}
policies:
  house:
    prompt: [{{guard: harm, action: block, threshold: {block}}}, {{guard: harm, action: steer, low: 0, high: 1}}]
    answer: [{{guard: harm, action: annotate, threshold: 0}}]
  minors: {{prompt: [{{guard: harm, action: block, threshold: 0}}]}}
  watching: {{mode: shadow, prompt: [{{guard: harm, action: block, threshold: 0}}]}}
"""
ROWS = [{"prompt": f"the cat sat {index * 7919}"} for index in range(5)] + [
    {"prompt": "how can this be", "response": "they said"}
]


@pytest.fixture
def policy(adapters: Path, tmp_path: Path) -> Callable[[float], Path]:
    """The file of policies that blocks prompts from a score on."""

    def made(block: float) -> Path:
        path = tmp_path / "policy.yaml"
        path.write_text(POLICY.format(adapters=adapters, block=block))
        return path

    return made


@pytest.fixture
def scores(adapters: Path, session_base: Base) -> list[float]:
    """The slow twin: the guard's score of each row's prompt, one at a time."""
    base = load_base(session_base.folder)
    guard = load_adapter(adapters / "harm", base)
    prompts = [messages_of({"prompt": row["prompt"]}) for row in ROWS]
    return [judge(base, [guard], [prompt])[0][0].score for prompt in prompts]


def test_what_would_have_been_blocked_and_why(
    run: Run, policy: Callable[[float], Path], session_base: Base, scores: list[float], tmp_path: Path
) -> None:
    line = sum(sorted(scores)[2:4]) / 2
    data = write(tmp_path / "rows.jsonl", ROWS)
    done = run("policy", "simulate", policy(line), "--data", data, "--base", session_base.folder)
    assert done.code == 0
    assert [row["action"] == "block" for row in done.lines] == [score >= line for score in scores]
    for row, score in zip(done.lines, scores, strict=True):
        if row["action"] == "block":
            assert row["reason"] == f"harm: harm {score:.3f} >= {line:.3f}"
            assert (row["stage"], row["guard"]) == ("prompt", "harm")
        assert row["strength"] == pytest.approx(score, abs=1e-5)  # the ramp from 0 to 1
    summary = json.loads(done.err.removeprefix("safeside: "))
    assert summary["rows"] == 6
    assert summary["block"] == sum(row["action"] == "block" for row in done.lines)


def test_tenants_and_named_policies_are_those_of_a_request(
    run: Run, policy: Callable[[float], Path], session_base: Base, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS)
    file, base = policy(1.0), ("--base", session_base.folder, "--json")
    school = run("policy", "simulate", file, "--data", data, "--tenant", "school", *base).json
    assert school["summary"]["block"] == 6
    watching = run("policy", "simulate", file, "--data", data, "--policy", "watching", *base).json
    assert (watching["summary"]["block"], watching["summary"]["intended_block"]) == (0, 6)
    assert {row["intended"] for row in watching["rows"]} == {"block"}
    assert run("policy", "simulate", file, "--data", data, "--policy", "watchin", *base).code == 2
    typo = run("policy", "simulate", file, "--data", data, "--tenant", "scool", *base)
    assert (typo.code, typo.out) == (2, "")
    assert "Unknown tenant 'scool'; expected one of school" in typo.err


def test_rows_that_cannot_be_scored_fail_closed_and_are_counted(
    run: Run, policy: Callable[[float], Path], session_base: Base, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", ["rubbish", {"nothing": 1}, ROWS[0]])
    done = run("policy", "simulate", policy(1.0), "--data", data, "--base", session_base.folder, "--json")
    assert done.code == 1
    assert [row["action"] for row in done.json["rows"]] == ["block", "block", "steer"]
    assert done.json["summary"]["n_bad"] == 2
    assert "not JSON" in done.json["rows"][0]["problem"]
    assert done.json["rows"][0]["scores"] == {"harm/harm": None}


def test_a_file_is_checked_with_and_without_its_adapters(
    run: Run, policy: Callable[[float], Path], session_base: Base, tmp_path: Path
) -> None:
    file = policy(0.5)
    found = run("policy", "check", file, "--json").json
    assert [(row["policy"], row["holds_for"], row["rules"], row["mode"]) for row in found] == [
        ("house", "everybody", 3, "enforce"),
        ("minors", "school", 1, "enforce"),
        ("watching", "who asks for it", 1, "shadow"),
    ]
    assert run("policy", "check", file, "--base", session_base.folder).code == 0
    assert "house" in run("policy", "check", file).out
    file.write_text(file.read_text().replace("{guard: harm, action: steer", "{guard: hram, action: steer"))
    assert run("policy", "check", file).code == 0  # names are known once adapters are
    broken = run("policy", "check", file, "--base", session_base.folder)
    assert (broken.code, broken.out) == (2, "")
    assert "Policy 'house', prompt rule 2: Unknown guard 'hram'" in broken.err
    file.write_text("deployment: house")
    assert "Unknown policy 'house'" in run("policy", "check", file).err


def test_an_adapter_goes_by_its_own_name(
    run: Run, policy: Callable[[float], Path], session_base: Base, adapters: Path
) -> None:
    file = policy(0.5)
    file.write_text(file.read_text().replace(f"{adapters}/harm", f"{adapters}/two"))
    broken = run("policy", "check", file, "--base", session_base.folder)
    assert broken.code == 2
    assert "is called 'two', not 'harm'" in broken.err


def test_a_key_is_shown_once_and_works(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    done = run("key", file, "alice", "--tenant", "school", "--may-loosen", "--requests-per-minute", "5")
    assert done.code == 0
    caller = Keys.load(file).authenticate(f"Bearer {done.out.strip()}")
    assert (caller.tenant, caller.key, caller.may_loosen, caller.is_admin) == ("school", "alice", True, False)
    assert caller.limits.requests_per_minute == 5
    assert run("key", file, "alice", "--tenant", "school").code == 2
    admin = run("key", file, "bob", "--tenant", "ops", "--admin", "--json").json
    assert Keys.load(file).authenticate(f"Bearer {admin['key']}").is_admin
