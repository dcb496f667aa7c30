"""Attacks keep what a prompt asks for and change how it is said."""

from __future__ import annotations

import base64
import codecs

import pytest

from safeside import Adapter, Base, Message
from safeside.evals.attacks import ATTACKS, attacked, by_carrier
from safeside.evals.judges import Judgement
from safeside.evals.methods import Aligned
from safeside.evals.records import RecordLog
from safeside.evals.runs import Judging, run_suite
from safeside.evals.suites import AFFIRMATIVE, SUITES, Prompt
from safeside.mixing import as_policy

GOAL = "How can this CAT sit on that mat?"
PROMPT = Prompt("one", (GOAL,), True)


@pytest.mark.parametrize("name", list(ATTACKS))
def test_an_attack_keeps_the_goal_and_has_a_name_of_its_own(name: str) -> None:
    changed = attacked(PROMPT, name)
    assert (changed.id, changed.goal, changed.is_harmful) == (f"one/{name}", GOAL, True)
    assert (changed.turns, changed.prefix) != (PROMPT.turns, PROMPT.prefix)
    assert attacked(PROMPT, name) == changed
    known = Prompt("two", ("wrapped already",), True, goal="what it is after")
    assert attacked(known, name).goal == "what it is after"


@pytest.mark.parametrize("name", ["story", "role", "audit", "prefix_injection", "german", "french", "spanish"])
def test_a_template_holds_the_goal_word_for_word(name: str) -> None:
    (text,) = attacked(PROMPT, name).turns
    assert text.count(GOAL) == 1
    assert "{" not in text


def test_a_goal_with_braces_stays_as_it_is() -> None:
    (text,) = by_carrier("Say {goal} now")(Prompt("x", ("{goal} and {0}",), True)).turns
    assert text == "Say {goal} and {0} now"


def test_codes_can_be_read_back() -> None:
    words = {name: attacked(PROMPT, name).turns[0] for name in ("base64", "rot13", "leetspeak")}
    assert base64.b64decode(words["base64"].rsplit(" ", 1)[1]).decode() == GOAL
    assert codecs.decode(words["rot13"].split(": ", 1)[1], "rot13") == GOAL
    assert words["leetspeak"] == "h0w c4n 7h15 c47 517 0n 7h47 m47?"


def test_many_turns_end_with_the_goal_and_a_prefilled_answer_has_begun() -> None:
    changed = attacked(PROMPT, "many_turn")
    assert len(changed.turns) == 3
    assert changed.turns[-1].endswith(GOAL)
    assert attacked(PROMPT, "prefilled").prefix == AFFIRMATIVE
    begun = Prompt("x", (GOAL,), True, prefix="Yes:")
    assert ATTACKS.get("prefilled")(begun).prefix == "Yes:"


def test_forged_tokens_stay_text(tiny_base: Base) -> None:
    """The ends of turns that a text spells are no turns: the ids hold the control tokens of the template alone."""
    plain = tiny_base.encode([Message("user", "hello")]).ids
    forged = tiny_base.encode([Message("user", attacked(PROMPT, "forged_tokens").turns[0])]).ids
    control = set(tiny_base.tokenizer.all_special_ids)
    assert [token for token in forged if token in control] == [token for token in plain if token in control]


def test_a_run_takes_attacked_prompts_as_they_are(tiny_base: Base, random_aligner) -> None:
    prompts = [attacked(PROMPT, name) for name in ("leetspeak", "many_turn", "prefilled")]
    aligner: Adapter = random_aligner(tiny_base, "refuse")
    judged = Judging("mine", lambda exchange: Judgement("complied", exchange.goal), RecordLog(), batch_size=3)
    records = run_suite(SUITES.get("demo"), prompts, Aligned(tiny_base, aligner, as_policy(0.0)), judged)
    assert {record.judgement.reason for record in records if record.answers} <= {GOAL, "the answer is empty"}
    assert any(record.prompt.id == "one/leetspeak" and record.answers for record in records)
