"""MMLU through lm-eval: its prompts, its scoring by log-likelihood, its model class on the attached base.

Rows come from a folder, so nothing is fetched.  What is too long for the base's context is unscored and counted, where
lm-eval would cut it.  Needs the extra ``bench``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import datasets
import torch
import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM

from safeside.attach import Attachment, attach
from safeside.errors import InputError
from safeside.evals.methods import Aligned
from safeside.evals.runs import wilson
from safeside.evals.suites import SUITES, draw
from safeside.policies import counts_from_prompt
from safeside.tasks.rows import BadRow, open_rows, parse_rows
from safeside.types import Result

_LETTERS = "ABCD"
_BATCH = 8


class _AttachedModel(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's model on a base with an attachment: each context is a prompt, for gates that wait for its end."""

    def __init__(self, attachment: Attachment) -> None:
        base = attachment.base
        self.attachment = attachment
        waits = any(counts_from_prompt(policy) for policy in attachment.policies.values())
        self.knows_ends = waits
        super().__init__(
            pretrained=base.model,
            tokenizer=base.tokenizer,
            batch_size=1 if waits else _BATCH,  # of one row the context's end is known
            max_length=base.max_tokens,
        )

    def _model_call(self, inps: torch.Tensor, attn_mask: object = None, labels: object = None) -> torch.Tensor:
        if not self.knows_ends:
            logits: torch.Tensor = super()._model_call(inps)
            return logits
        with self.attachment.request(prompt_end=[inps.shape[1]]):
            gated: torch.Tensor = super()._model_call(inps)
            return gated


@dataclass(frozen=True, slots=True)
class Answered:
    """What lm-eval says of one question."""

    id: str
    """The row's name."""
    is_right: bool | None
    """Whether the letter with the highest likelihood is the answer; None where the question was too long."""


def run_mmlu(method: Aligned, data: Path, *, limit: int | None = None, n_shots: int = 0) -> Result:
    """``mmlu_accuracy`` of a base with its aligner, over the questions that suite ``mmlu`` draws of ``data``.

    ``n_shots`` solved questions of the subject's dev rows stand before each, as lm-eval puts them.
    """
    answered = answer_questions(method, data, limit=limit, n_shots=n_shots)
    known = [one.is_right for one in answered if one.is_right is not None]
    value = sum(known) / len(known) if known else float("nan")
    where = {
        "method": method.name,
        "policy": method.policy_name,
        "strength": f"{method.strength:g}",
        "judge": "",
    }
    return Result(
        "mmlu", "mmlu_accuracy", value, *wilson(sum(known), len(known)), len(known), len(answered) - len(known), where
    )


def answer_questions(method: Aligned, data: Path, *, limit: int | None = None, n_shots: int = 0) -> list[Answered]:
    """lm-eval's word on each question that is drawn, in no special order."""
    suite = SUITES.get("mmlu")
    wanted = [prompt.id for prompt in draw(suite, data)][:limit]
    rows, solved = _rows(suite.file(data), set(wanted)), _rows(data / "mmlu" / "dev.jsonl.gz")
    subjects = sorted({str(row["subject"]) for row in rows})
    tasks = [_task(subject, rows, solved) for subject in subjects]
    with attach(method.base, [method.aligner], list(method.guards), strength=method.policy) as attachment:
        model = _AttachedModel(attachment)
        found = simple_evaluate(model, tasks=tasks, num_fewshot=n_shots, bootstrap_iters=0, log_samples=True)
    assert found is not None
    return [
        Answered(str(sample["doc"]["id"]), bool(sample["acc"]) if _fits(model, sample) else None)
        for samples in found["samples"].values()
        for sample in samples
    ]


def _fits(model: _AttachedModel, sample: dict[str, object]) -> bool:
    """Whether lm-eval could give the whole question to the base."""
    arguments = sample["arguments"]
    pairs = list(arguments.values()) if isinstance(arguments, dict) else list(arguments)  # type: ignore[call-overload]
    texts = [list(pair.values()) if isinstance(pair, dict) else list(pair) for pair in pairs]
    return all(
        len(model.tok_encode(str(context)) + model.tok_encode(str(end))) <= model.max_length for context, end in texts
    )


def _rows(path: Path, wanted: set[str] | None = None) -> list[dict[str, object]]:
    found = []
    with open_rows(path) as handle:
        for row in parse_rows(handle):
            if isinstance(row, BadRow):
                raise InputError(f"{path}: line {row.line}: {row.problem}")
            if wanted is None or str(row[1].get("id")) in wanted:
                found.append({**row[1], "answer": _LETTERS.index(str(row[1]["answer"]))})
    return found


def _task(subject: str, rows: Sequence[dict[str, object]], solved: Sequence[dict[str, object]]) -> ConfigurableTask:
    """lm-eval's own task for one subject, on our rows."""
    folder = files("lm_eval") / "tasks" / "mmlu" / "default"
    place = folder / f"mmlu_{subject}.yaml"
    if not place.is_file():
        raise InputError(f"lm-eval knows no subject {subject!r} of MMLU. Check the rows' 'subject'.")
    own = yaml.safe_load(place.read_text(encoding="utf-8"))
    shared = yaml.safe_load((folder / str(own.pop("include"))).read_text(encoding="utf-8"))
    values = {**shared, **{name: value for name, value in own.items() if name != "tag"}}
    splits = {
        name: datasets.Dataset.from_list([row for row in some if row["subject"] == subject])
        for name, some in (("test", rows), ("dev", solved))
    }
    del values["dataset_path"], values["dataset_name"]
    return ConfigurableTask(config={**values, "custom_dataset": lambda **_: splits})
