"""OpenAI's moderation: its thirteen categories as far as a loaded guard was trained for them, and our own labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safeside.adapters.adapter import Adapter
from safeside.errors import UnknownNameError
from safeside.registry import did_you_mean
from safeside.serve.replies import finite
from safeside.tasks.categories import CATEGORIES
from safeside.types import Verdict

OPENAI_CATEGORIES = (
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm",
    "self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic",
)  # fmt: skip

_SIDES = (("input", "prompt"), ("output", "answer"))


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


def inline(
    model: str, guards: Sequence[str], prompt: Sequence[Verdict], answer: Sequence[Verdict]
) -> Mapping[str, object]:
    """OpenAI's inline moderation object by these guards: results for prompt and answer, an error where there are none.

    ``model`` is who is said to have judged.
    """
    own = ([verdict for verdict in verdicts if verdict.task in guards] for verdicts in (prompt, answer))
    return {key: _results(model, each, what) for (key, what), each in zip(_SIDES, own, strict=True)}


def _results(model: str, verdicts: Sequence[Verdict], what: str) -> dict[str, object]:
    if not verdicts:
        return {"type": "error", "code": "not_judged", "message": f"No guard of the policy judged the {what}."}
    result = {"type": "moderation_result", "model": model, **result_of(verdicts)}
    return {"type": "moderation_results", "model": model, "results": [result]}
