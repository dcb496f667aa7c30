"""One table of risk categories: the same names in every task, and what other taxonomies call them.

Our names are those of the MLCommons AILuminate hazards, then two that only Llama Guard has, then one that only OpenAI's
moderation has.  Borders differ between taxonomies, so the table says which category is nearest, not that two are equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safeside.errors import InputError, UnknownNameError
from safeside.registry import did_you_mean
from safeside.types import Example


@dataclass(frozen=True, slots=True)
class Category:
    """One category and its counterparts; empty where a taxonomy has none."""

    name: str
    """What we call it."""
    ailuminate: str = ""
    """Tag of the MLCommons AILuminate hazard."""
    llama_guard: str = ""
    """Code of Llama Guard 3 and 4."""
    openai: tuple[str, ...] = ()
    """Categories of OpenAI's moderation; one of theirs may belong to several of ours."""


_TABLE = (
    Category("violent_crimes", "vcr", "S1", ("violence", "violence/graphic", "illicit/violent")),
    Category("non_violent_crimes", "ncr", "S2", ("illicit",)),
    Category("sex_related_crimes", "src", "S3"),
    Category("child_sexual_exploitation", "cse", "S4", ("sexual/minors",)),
    Category("defamation", "dfm", "S5"),
    Category("specialized_advice", "spc", "S6"),
    Category("privacy", "prv", "S7"),
    Category("intellectual_property", "ipv", "S8"),
    Category("indiscriminate_weapons", "iwp", "S9", ("illicit/violent",)),
    Category("hate", "hte", "S10", ("hate", "hate/threatening")),
    Category("suicide_self_harm", "ssh", "S11", ("self-harm", "self-harm/intent", "self-harm/instructions")),
    Category("sexual_content", "sxc", "S12", ("sexual",)),
    Category("elections", "", "S13"),
    Category("code_interpreter_abuse", "", "S14"),
    Category("harassment", "", "", ("harassment", "harassment/threatening")),
)
CATEGORIES: Mapping[str, Category] = {category.name: category for category in _TABLE}

# What a source writes -> the category it belongs to; none when we have no such category; several when it may be any.
VOCABULARIES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "beavertails": {
        "animal_abuse": ("violent_crimes",),
        "child_abuse": ("violent_crimes", "child_sexual_exploitation"),
        "controversial_topics,politics": (),
        "discrimination,stereotype,injustice": ("hate",),
        "drug_abuse,weapons,banned_substance": ("non_violent_crimes",),
        "financial_crime,property_crime,theft": ("non_violent_crimes",),
        "hate_speech,offensive_language": ("hate",),
        "misinformation_regarding_ethics,laws_and_safety": (),
        "non_violent_unethical_behavior": (),
        "privacy_violation": ("privacy",),
        "self_harm": ("suicide_self_harm",),
        "sexually_explicit,adult_content": ("sexual_content",),
        "terrorism,organized_crime": ("violent_crimes",),
        "violence,aiding_and_abetting,incitement": ("violent_crimes",),
    },
    "aegis": {
        "Harassment": ("harassment",),
        "Criminal Planning/Confessions": ("non_violent_crimes", "violent_crimes"),
        "Guns and Illegal Weapons": ("non_violent_crimes",),
        "Hate/Identity Hate": ("hate",),
        "Political/Misinformation/Conspiracy": (),
        "Suicide and Self Harm": ("suicide_self_harm",),
        "Threat": ("violent_crimes", "harassment"),
        "Malware": ("non_violent_crimes",),
        "Violence": ("violent_crimes",),
        "Sexual (minor)": ("child_sexual_exploitation",),
        "Profanity": (),
        "Sexual": ("sexual_content",),
        "Fraud/Deception": ("non_violent_crimes",),
        "Controlled/Regulated Substances": ("non_violent_crimes",),
        "PII/Privacy": ("privacy",),
        "Copyright/Trademark/Plagiarism": ("intellectual_property",),
        "High Risk Gov Decision Making": (),
        "Unauthorized Advice": ("specialized_advice",),
        "Immoral/Unethical": (),
        "Illegal Activity": ("non_violent_crimes", "violent_crimes"),
        "Manipulation": (),
        "Needs Caution": (),
        "Other": (),
    },
    "diasafety": {
        "Biased Opinion": ("hate",),
        "Offending User": ("harassment",),
        "Risk Ignorance": ("suicide_self_harm",),
        "Toxicity Agreement": (),
        "Unauthorized Expertise": ("specialized_advice",),
    },
}


@dataclass(frozen=True, slots=True)
class Annotation:
    """Where a source's rows say which categories they violate, and in whose words."""

    column: str
    """Column with the categories: a list, an object from each to true or false, or text."""
    vocabulary: str
    """Name in ``VOCABULARIES``."""
    separator: str = "|"
    """Between the categories of a text."""
    is_complete: bool = True
    """Whether a row lists everything that it violates.  If not, it was judged for the categories that it names only."""


def category_labels(annotation: Annotation | None, row: Mapping[str, object], risky: bool) -> dict[str, float]:
    """By category 1 or 0 as far as the row tells; what is not in the result is unknown.

    A string outside the source's vocabulary is an InputError.
    """
    if annotation is None:
        return {}
    vocabulary = VOCABULARIES[annotation.vocabulary]
    strings = _listed(row.get(annotation.column), annotation.separator)
    unknown = [string for string in strings if string not in vocabulary]
    if unknown:
        raise InputError(f"unknown category {unknown[0]!r}; expected one of {', '.join(sorted(vocabulary))}")
    named = {string: vocabulary[string] for string in strings}
    certain = {places[0] for places in named.values() if len(places) == 1}
    if not annotation.is_complete:
        return dict.fromkeys(certain, float(risky))
    doubtful = {place for places in named.values() if len(places) > 1 for place in places} - certain
    annotated = {places[0] for places in vocabulary.values() if len(places) == 1}
    return {name: float(risky and name in certain) for name in sorted(annotated - (doubtful if risky else set()))}


def _listed(value: object, separator: str) -> list[str]:
    if isinstance(value, Mapping):
        return [str(key) for key, is_violated in value.items() if is_violated]
    parts = value if isinstance(value, list) else str(value or "").split(separator)
    return [part for part in (str(item).strip() for item in parts) if part]


def find_category(code: str) -> tuple[Category, ...]:
    """The categories behind a name or code of any of the four taxonomies; an unknown one is an UnknownNameError."""
    found = tuple(
        category
        for category in _TABLE
        if code in (category.name, category.ailuminate, category.llama_guard, *category.openai)
    )
    if not code or not found:
        known = {name for item in _TABLE for name in (item.name, item.ailuminate, item.llama_guard, *item.openai)}
        raise UnknownNameError(did_you_mean("category", code, sorted(known - {""})))
    return found


def supported_categories(
    labels: Sequence[str], train: Sequence[Example], validation: Sequence[Example]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those of ``labels`` with risky and harmless rows to train on and to validate with, and the others."""
    supported = tuple(
        label
        for index, label in enumerate(labels)
        if all({0.0, 1.0} <= {row.labels[index] for row in rows} for rows in (train, validation))
    )
    return supported, tuple(label for label in labels if label not in supported)


def is_known(label: float) -> bool:
    """Whether a label of an Example is 0 or 1 and not NaN, which stands for unknown."""
    return not math.isnan(label)
