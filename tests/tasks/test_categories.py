"""The table of categories: complete, one to one where it says so, and rows that tell only what they tell."""

from __future__ import annotations

import math

import pytest

from safeside import Message
from safeside.errors import InputError, UnknownNameError
from safeside.tasks.categories import (
    CATEGORIES,
    VOCABULARIES,
    Annotation,
    category_labels,
    find_category,
    is_known,
    supported_categories,
)
from safeside.types import Example

AILUMINATE = {"vcr", "ncr", "src", "cse", "iwp", "dfm", "spc", "prv", "ipv", "hte", "ssh", "sxc"}
OPENAI = {
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm",
    "self-harm/intent", "self-harm/instructions", "sexual", "sexual/minors", "violence", "violence/graphic",
}  # fmt: skip


def test_every_code_of_the_three_taxonomies_has_a_place() -> None:
    table = CATEGORIES.values()
    assert sorted(item.ailuminate for item in table if item.ailuminate) == sorted(AILUMINATE)
    assert sorted(item.llama_guard for item in table if item.llama_guard) == sorted(f"S{n}" for n in range(1, 15))
    assert {name for item in table for name in item.openai} == OPENAI


def test_sources_words_lead_to_categories() -> None:
    for vocabulary in VOCABULARIES.values():
        assert {name for places in vocabulary.values() for name in places} <= set(CATEGORIES)
    assert len(VOCABULARIES["beavertails"]) == 14


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("S10", ["hate"]),
        ("hte", ["hate"]),
        ("hate/threatening", ["hate"]),
        ("privacy", ["privacy"]),
        ("illicit/violent", ["violent_crimes", "indiscriminate_weapons"]),
    ],
)
def test_codes_are_found(code: str, names: list[str]) -> None:
    assert [category.name for category in find_category(code)] == names


@pytest.mark.parametrize("code", ["S15", "", "hat"])
def test_unknown_codes_are_errors(code: str) -> None:
    with pytest.raises(UnknownNameError, match="Unknown category"):
        find_category(code)


BEAVERTAILS = Annotation("category", "beavertails")


def test_a_complete_row_tells_all_that_its_source_annotates() -> None:
    known = category_labels(BEAVERTAILS, {"category": "privacy_violation|animal_abuse"}, True)
    assert {name for name, value in known.items() if value == 1} == {"privacy", "violent_crimes"}
    assert known["hate"] == 0.0
    assert "elections" not in known  # not among its words
    assert "child_sexual_exploitation" not in known  # only among words that mean something wider


def test_what_may_be_one_of_several_is_unknown() -> None:
    known = category_labels(BEAVERTAILS, {"category": "child_abuse"}, True)
    assert "violent_crimes" not in known
    assert known["hate"] == 0.0
    both = category_labels(BEAVERTAILS, {"category": "child_abuse|animal_abuse"}, True)
    assert both["violent_crimes"] == 1.0


@pytest.mark.parametrize("category", ["", None, [], {}, {"privacy_violation": False}])
def test_a_harmless_row_violates_nothing(category: object) -> None:
    known = category_labels(BEAVERTAILS, {"category": category}, False)
    assert set(known.values()) == {0.0}
    assert {"hate", "privacy", "violent_crimes"} <= set(known)


@pytest.mark.parametrize("category", [["privacy_violation"], {"privacy_violation": True, "self_harm": False}])
def test_lists_and_objects_are_read_too(category: object) -> None:
    known = category_labels(BEAVERTAILS, {"category": category}, True)
    assert (known["privacy"], known["suicide_self_harm"]) == (1.0, 0.0)


def test_a_row_judged_for_one_category_tells_of_that_one() -> None:
    own = Annotation("category", "diasafety", is_complete=False)
    assert category_labels(own, {"category": "Biased Opinion"}, False) == {"hate": 0.0}
    assert category_labels(own, {"category": "Biased Opinion"}, True) == {"hate": 1.0}
    assert category_labels(own, {"category": "Toxicity Agreement"}, True) == {}
    assert category_labels(None, {"category": "Biased Opinion"}, True) == {}


def test_a_word_outside_the_vocabulary_is_an_error() -> None:
    with pytest.raises(InputError, match="unknown category 'privacy'; expected one of animal_abuse"):
        category_labels(BEAVERTAILS, {"category": "privacy"}, True)


def rows(*labels: tuple[float, ...]) -> list[Example]:
    return [Example((Message("user", "x"),), values) for values in labels]


def test_a_category_needs_both_kinds_of_rows_on_both_sides() -> None:
    nan = math.nan
    train = rows((0, 0, 0, nan, 0), (1, 1, 0, nan, 1), (1, nan, nan, nan, nan))
    validation = rows((0, 0, 0, nan, 0), (1, 1, 1, nan, 0))
    names = ("harm", "hate", "privacy", "elections", "defamation")
    assert supported_categories(names, train, validation) == (("harm", "hate"), ("privacy", "elections", "defamation"))
    assert [is_known(value) for value in (0.0, 1.0, nan)] == [True, True, False]
