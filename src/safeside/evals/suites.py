"""Suites: named sets of prompts on which an adapter is measured, at several strengths for an aligner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from safeside.adapters.adapter import Adapter
from safeside.attach import attach
from safeside.base.model import Base
from safeside.errors import InputError
from safeside.evals.judges import JUDGES
from safeside.mixing import ramp
from safeside.registry import Registry
from safeside.tasks.rows import load_examples
from safeside.types import Message, Result

MAX_NEW_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Suite:
    """Harmful and harmless prompts, and the judge of the answers to them."""

    name: str
    """What results call the suite."""
    path: Path
    """A file of labelled rows; of each the first message is the prompt."""
    judge: str = "refusal_phrases"
    """Name of a registered judge."""
    limit: int = 200
    """Prompts of each label that an aligner is measured on; guards are measured on all."""


SUITES: Registry[Suite] = Registry("suite")
SUITES.register("demo", Suite("demo", Path(str(files("safeside.builtin") / "demo" / "test.jsonl.gz"))))


def run_aligner_suite(
    base: Base,
    aligner: Adapter,
    suite: Suite,
    strengths: Sequence[float],
    *,
    guard: Adapter | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Result]:
    """Refusal rates by strength: on harmful prompts (wanted), on harmless ones (over-refusal).

    With ``guard`` each strength is the ceiling of a ramp around the guard's threshold: targeted alignment.
    """
    harmful, harmless = suite_prompts(suite)
    results = []
    for strength in strengths:
        answers = answer(base, aligner, [*harmful, *harmless], strength, guard=guard, advance=advance)
        parts = {"harmful": answers[: len(harmful)], "harmless": answers[len(harmful) :]}
        for kind, texts in parts.items():
            refused = sum(map(JUDGES.get(suite.judge), texts))
            low, high = wilson(refused, len(texts))
            rate, setting = refused / len(texts), {"strength": f"{strength:g}"}
            results.append(Result(suite.name, f"refusal_rate_{kind}", rate, low, high, len(texts), 0, setting))
    return results


def suite_prompts(suite: Suite) -> tuple[list[str], list[str]]:
    """At most ``limit`` harmful and harmless prompts, the first of each in file order."""
    examples, bad = load_examples(suite.path, ("label",))
    if bad:
        raise InputError(f"{suite.path}: line {bad[0].line}: {bad[0].problem}")
    harmful = [example.messages[0].content for example in examples if example.labels[0] == 1]
    harmless = [example.messages[0].content for example in examples if example.labels[0] == 0]
    if not harmful or not harmless:
        raise InputError(f"{suite.path} holds prompts of one label only; a suite needs harmful and harmless ones.")
    return harmful[: suite.limit], harmless[: suite.limit]


def answer(
    base: Base,
    aligner: Adapter,
    prompts: Sequence[str],
    strength: float,
    *,
    guard: Adapter | None = None,
    batch_size: int = 25,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Greedy answers to ``prompts`` with the aligner at ``strength``; ``guard`` gates it by a ramp at its threshold."""
    policy: object = strength
    if guard is not None and strength > 0:
        policy = ramp(guard, ceiling=strength)
    texts: list[str] = []
    with attach(base, [aligner], [guard] if guard is not None else [], strength=policy):
        for start in range(0, len(prompts), batch_size):
            some = [[Message("user", prompt)] for prompt in prompts[start : start + batch_size]]
            texts += [completion.text for completion in base.chat_batch(some, max_new_tokens=MAX_NEW_TOKENS)]
            advance(len(some))
    return texts


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95% Wilson interval of a share."""
    if n == 0:
        return 0.0, 1.0
    z, share = 1.96, hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))
