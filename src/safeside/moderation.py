"""OpenAI's moderation: its request, and its thirteen categories as far as a guard was trained for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from safeside.adapters.adapter import Adapter
from safeside.errors import UnknownNameError, UnsupportedError
from safeside.registry import did_you_mean
from safeside.tasks.categories import CATEGORIES
from safeside.types import Verdict

Text = Annotated[str, StringConstraints(max_length=1 << 20)]
OPENAI_CATEGORIES = (
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm",
    "self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic",
)  # fmt: skip


def given_fields(values: Any) -> Any:
    """The fields that were given: clients send null for those that were not."""
    return {name: value for name, value in values.items() if value is not None} if isinstance(values, dict) else values


class Record(BaseModel):
    """A checked object of a request.  A field that is null is as if it were left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    _without_nulls = model_validator(mode="before")(given_fields)


class TextPart(Record):
    """A part of a message that is text."""

    type: Literal["text"]
    text: Text


class ImagePart(Record):
    """A part of a message that is a picture: no guard reads one."""

    type: Literal["image_url"]
    image_url: dict[str, str]


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ModerationRequest(Record):
    """``POST /v1/moderations``."""

    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=10_000)]
        | Annotated[list[Part], Field(min_length=1, max_length=256)]
    )
    model: str | None = None
    """A guard's name; all of them unless given."""

    @property
    def texts(self) -> list[str]:
        """Each text to judge; a list of parts is one."""
        if isinstance(self.input, str):
            return [self.input]
        texts = [item for item in self.input if isinstance(item, str)]
        return texts or [text_of([item for item in self.input if not isinstance(item, str)])]


def text_of(content: str | list[Part]) -> str:
    """The text of a message; a picture is an UnsupportedError."""
    if isinstance(content, str):
        return content
    if any(isinstance(part, ImagePart) for part in content):
        raise UnsupportedError("Pictures cannot be read, and so not judged. Send text.")
    return "".join(part.text for part in content if isinstance(part, TextPart))


def category_of(guard: str, label: str) -> str:
    """What a guard's label is called in results.

    It is OpenAI's name where the label is that name, or our category whose nearest it is; the narrower categories of
    OpenAI's beside it are other questions, which the guard was not trained for.  Any other label keeps its own name.
    """
    if label in OPENAI_CATEGORIES:
        return label
    category = CATEGORIES.get(label)
    if category is not None and category.openai:
        return category.openai[0]
    return label if label == guard else f"{guard}/{label}"


def unsupported(guards: Sequence[Adapter]) -> list[str]:
    """OpenAI's categories that no label of these guards stands for."""
    known = {category_of(guard.name, label) for guard in guards for label in guard.config.labels}
    return [name for name in OPENAI_CATEGORIES if name not in known]


def result_of(verdicts: Sequence[Verdict]) -> dict[str, object]:
    """One result: by category whether it is flagged and the highest score, null where a guard could not score."""
    flagged: dict[str, bool] = {}
    scores: dict[str, float | None] = {}
    for verdict in verdicts:
        name = category_of(verdict.task, verdict.label)
        score = finite(verdict.score)
        before = scores.get(name, score)
        scores[name] = None if score is None or before is None else max(score, before)
        flagged[name] = flagged.get(name, False) or verdict.flagged
    return {
        "flagged": any(flagged.values()),
        "categories": flagged,
        "category_scores": scores,
        "category_applied_input_types": {name: ["text"] for name in flagged},
    }


def chosen(model: str | None, guards: Sequence[str], served: str) -> tuple[str, ...]:
    """The guards that a moderation by ``model`` asks: one by its name, all by that of the served model or none.

    Any other name is an UnknownNameError: nothing is answered in the name of a model that did not judge.
    """
    if model is not None and model not in (*guards, served):
        raise UnknownNameError(did_you_mean("guard", model, [*guards, served]))
    return tuple(guard for guard in guards if model in (None, served, guard))


def finite(value: float) -> float | None:
    """The number, or None where it is none: NaN is not JSON."""
    return value if math.isfinite(value) else None
