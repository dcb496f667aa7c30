"""OpenAI's inline moderation of a prompt and its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safeside.moderation import result_of
from safeside.types import Verdict

_SIDES = (("input", "prompt"), ("output", "answer"))


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
