"""The cells of the genes benchmark: one method on one task model, its answers to attacks and its work on the task."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import torch

from genes_guard import GuardReport, Packaged, guard_texts, packaged_for, report_of
from genes_models import (
    ANSWER,
    LABEL,
    MAIN_SHOTS,
    SAFE_LORA,
    SAFE_MERGE,
    SHIFT,
    TRIED_RESTA,
    Choice,
    Models,
    Setup,
    facts_of,
    loss_on,
)
from genes_rows import CLASSES, TASKS
from safeside.base.model import Base, load_base
from safeside.genes.apply import apply_genes
from safeside.genes.artifact import load_gene, save_gene
from safeside.genes.baselines import Matrices, difference, resta, safe_lora, safe_merge, weights_of, with_added
from safeside.genes.fit import fit_gene
from safeside.genes.gene import Gene
from safeside.genes.rows import Conversation, encode_texts
from safeside.provenance import git_commit, machine
from safeside.terminal import note
from tidy import write_json

Values = dict[str, object]
Maker = Callable[[], Values | None]
"""Makes a cell; None where it cannot be made for this base."""

SHOTS = (4, 8, 16, 32, 64)
WEIGHTS = (0.0, 0.5, 1.5, 2.0)  # of a fitted gene, for the curve over coefficients; 1 is the gene's own row
STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)  # of RESTA's vector, for its own curve
FEW, DRAWS = 2, 2  # layers of a gene, and how often they are drawn by chance, where selection is looked at closer
WEIGHT, RESTA, CHANCE = "weight-", "resta-strength-", "few-random-"  # how cells of curves begin
SELECTED = "few-shift"
UNCHANGED = "unchanged"  # a setting that every grid has
CURVE_TASKS = ("ag_news", "dolly")  # that the curves over shots and coefficients are drawn for
FIRST_CELLS = ("aligned", "finetuned", "dsa", "dsa_recalibrated")  # of every task model, also of those left out
_ROWS = 32  # of one pass


@dataclass(frozen=True)
class TaskBench:
    """All that is measured on one task model of one seed."""

    models: Models
    task: str

    @cached_property
    def base(self) -> Base:
        """The task model."""
        return load_base(self.models.task(self.task))

    def cells(self) -> Iterator[tuple[str, Maker]]:
        """Name and maker of every cell, those first that others are compared with."""
        yield "aligned", lambda: measured(load_base(self.models.aligned()), self)
        yield "finetuned", partial(self._stored, self.models.task)
        yield "gene-32", self._gene
        for method, choice in (("gene_random_layers", Choice("random")), ("gene_all_layers", Choice("all"))):
            yield f"{method}-{MAIN_SHOTS}", partial(self._gene, choice)
        yield "realigned", partial(self._stored, self.models.realigned)
        yield "resta", self._resta
        yield "safelora", self._safe_lora
        yield "safemerge", self._safe_merge
        yield "salora", partial(self._stored, self.models.salora)
        yield "dsa", partial(self._dsa, is_moved=False)
        yield "dsa_recalibrated", partial(self._dsa, is_moved=True)
        if self.task in CURVE_TASKS:
            yield from self._curves()
        for source in TASKS:
            if source != self.task:
                yield f"transfer-{source}", partial(self._transfer, source)

    def _curves(self) -> Iterator[tuple[str, Maker]]:
        """Over shots and strengths, of selection by chance, and of several in one model."""
        for shots in SHOTS:
            yield f"gene-{shots}", partial(self._gene, SHIFT, shots)
        for weight in WEIGHTS:
            yield f"{WEIGHT}{weight:g}", partial(self._gene, SHIFT, MAIN_SHOTS, weight)
        for strength in STRENGTHS:
            yield f"{RESTA}{strength:g}", partial(self._resta_at, strength)
        yield SELECTED, partial(self._gene, Choice("shift", FEW))
        for draw in range(1, DRAWS + 1):
            yield f"{CHANCE}{draw}", partial(self._gene, Choice("random", FEW, draw))
        for name, parts in (("first", (0,)), ("second", (1,)), ("both", (0, 1))):
            yield f"interference-{name}", partial(self._together, parts)
        for name, parts in (("aligner", ()), ("all", (0, 1))):
            yield f"interference-{name}", partial(self._together, parts, has_aligner=True)

    def shots(self, n_shots: int) -> tuple[list[Conversation], list[Conversation]]:
        """Refusals and task rows that scalars, and the settings of baselines, are chosen on."""
        return self.models.shots(self.task, n_shots)

    def fitted(self, choice: Choice = SHIFT, n_shots: int = MAIN_SHOTS) -> Gene:
        """The seed's gene, fitted on this task model; made once, for curves and transfers use it again."""

        def fit(place: Path) -> None:
            save_gene(fit_gene(self.base, self.models.gene(choice), *self.shots(n_shots)), place)

        return load_gene(self.models.made(f"fitted-{self.task}-{choice.title}-{n_shots}", fit))

    def _stored(self, folder_of: Callable[[str], Path]) -> Values:
        folder = folder_of(self.task)
        return {**measured(load_base(folder), self), **facts_of(folder)}

    def _gene(self, choice: Choice = SHIFT, n_shots: int = MAIN_SHOTS, weight: float = 1.0) -> Values:
        gene = self.fitted(choice, n_shots)
        with apply_genes(self.base, [gene], {gene.name: weight}):
            values = measured(self.base, self)
        results = gene.config.results
        facts = {"seconds": results["fit_seconds"], "trainable_params": results["trainable_params"]}
        chosen = {"layers": list(gene.config.layers), "coefficients": list(gene.config.coefficients)}
        return {**values, **facts, **chosen, "shots": n_shots}

    def _transfer(self, source: str) -> Values:
        """The gene as it was fitted on another task's model, on this one."""
        gene = TaskBench(self.models, source).fitted()
        with apply_genes(self.base, [gene]):
            return {**measured(self.base, self), "source": source}

    def _together(self, parts: Sequence[int], *, has_aligner: bool = False) -> Values | None:
        """Genes from halves of the harmful prompts, unfitted, and the packaged aligner behind its guard.

        Each alone, or together.
        """
        with ExitStack() as stack:
            if has_aligner:
                if self.packaged is None:
                    return None
                stack.enter_context(self.packaged.attached(self.base))
            if parts:
                stack.enter_context(apply_genes(self.base, [self.models.gene(part=part) for part in parts]))
            return measured(self.base, self)

    @cached_property
    def arithmetic(self) -> tuple[Matrices, Matrices]:
        """The task's update, and the safety vectors: the aligned model minus the base that it was made from."""
        aligned = weights_of(load_base(self.models.aligned()))
        unaligned = weights_of(load_base(self.models.setup.base))
        return difference(weights_of(self.base), aligned), difference(aligned, unaligned)

    @cached_property
    def own_vector(self) -> Matrices:
        """RESTA's safety vector: the aligned model minus its harmful fine-tune."""
        folders = self.models.aligned(), self.models.unaligned()
        return difference(*(weights_of(load_base(folder)) for folder in folders))

    def _resta_at(self, strength: float) -> Values:
        """So much of RESTA's own vector, nothing thinned."""
        return measured(with_added(self.base, resta(self.arithmetic[0], self.own_vector, strength)), self)

    def _resta(self) -> Values:
        """RESTA with its own safety vector, the aligned model minus its harmful fine-tune, and with the base's."""
        task, from_base = self.arithmetic
        vectors = {"unaligned": self.own_vector, "base": from_base}
        tried = product(vectors, *TRIED_RESTA)
        return self._best(
            {
                f"{vector}, {strength}, {density}": partial(
                    resta, task, vectors[vector], strength, density, self.models.seed
                )
                for vector, strength, density in tried
            }
        )

    def _safe_lora(self) -> Values:
        task, safety = self.arithmetic
        return self._best({str(value): partial(safe_lora, task, safety, value) for value in SAFE_LORA})

    def _safe_merge(self) -> Values:
        task, safety = self.arithmetic
        update = difference(weights_of(load_base(self.models.safety())), weights_of(load_base(self.models.aligned())))
        tried = {str(values): partial(safe_merge, task, safety, update, *values) for values in product(*SAFE_MERGE)}
        return self._best(tried)

    def _best(self, tried: Mapping[str, Callable[[], Matrices]]) -> Values:
        """The setting of a baseline with the lowest loss on what the gene's scalars are fitted on.

        One setting is always to change nothing.
        """
        started, shots = time.perf_counter(), self.shots(MAIN_SHOTS)
        settings: dict[str, Callable[[], Matrices]] = {UNCHANGED: dict, **tried}
        losses = {name: loss_on(with_added(self.base, make()), shots) for name, make in settings.items()}
        best = min(losses, key=losses.__getitem__)
        copy = with_added(self.base, settings[best]())
        facts = {"seconds": time.perf_counter() - started, "trainable_params": 0}
        return {**measured(copy, self), **facts, "setting": best, "losses": losses}

    @cached_property
    def packaged(self) -> Packaged | None:
        """The packaged guard and aligner; None where they are for another architecture than this base's."""
        return packaged_for(self.base)

    @cached_property
    def guard(self) -> GuardReport:
        """What the guard sees of this task model, and where its threshold moves."""
        return report_of(load_base(self.models.setup.base), self.base, guard_texts(self.models))

    def _dsa(self, *, is_moved: bool) -> Values | None:
        """The packaged guard and aligner, trained on the base, on the task model as they are.

        With its threshold where it is, or moved on unlabelled text.
        """
        if self.packaged is None:
            return None
        high, seconds = (self.guard.moved, self.guard.seconds) if is_moved else (None, 0.0)
        facts = {"seconds": self.packaged.seconds + seconds, "trainable_params": 0, "guard": self.guard.facts}
        with self.packaged.attached(self.base, high):
            return {**measured(self.base, self), **facts}


def measured(base: Base, bench: TaskBench) -> Values:
    """Answers to the attacks, and by test row how well the task is done; nothing where it has no answer to compare."""
    prompts = bench.models.attacks()
    answers: list[str] = []
    for start in range(0, len(prompts), _ROWS):
        answers += [item.text for item in base.chat_batch(prompts[start : start + _ROWS], max_new_tokens=ANSWER)]
    rows = bench.models.conversations(f"{bench.task}_test")
    if bench.task in CLASSES:
        names = Counter(messages[-1].content for messages in rows)
        majority = max(names.values()) / len(rows)
        return {"answers": answers, "accuracy": _right(base, rows), "nll": [], "majority": majority}
    accuracy, nll = _tokens(base, rows)
    return {"answers": answers, "accuracy": accuracy, "nll": nll}


def _right(base: Base, rows: Sequence[Conversation]) -> list[float]:
    """1 for every row that is answered with its class's name and nothing before it."""
    found: list[float] = []
    for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        answers = base.chat_batch([messages[:1] for messages in some], max_new_tokens=LABEL)
        found += [
            float(item.text.lower().startswith(messages[-1].content.lower()))
            for item, messages in zip(answers, some, strict=True)
        ]
    return found


@torch.no_grad()
def _tokens(base: Base, rows: Sequence[Conversation]) -> tuple[list[float], list[float]]:
    """Of each row the share of its answer's tokens that rank first, and their mean negative log-likelihood (nats)."""
    texts = encode_texts(base, rows, "test rows", answered=True)
    shares: list[float] = []
    losses: list[float] = []
    for start in range(0, len(texts), _ROWS):
        batch = texts.batch(base, range(start, min(start + _ROWS, len(texts))))
        row, place = batch.answer_places
        attached = base.attachment
        with attached.request(prompt_end=batch.starts.tolist()) if attached else nullcontext():
            states = batch.final_states(base)[row, place]
        scores = base.head_logits(states[None])[0].float().log_softmax(-1)
        wanted = batch.ids[row, place + 1]
        right, likely = (scores.argmax(-1) == wanted).float(), scores.gather(1, wanted[:, None])[:, 0]
        for number in range(len(batch.ids)):
            shares.append(float(right[row == number].mean()))
            losses.append(-float(likely[row == number].mean()))
    return shares, losses


def run_task(setup: Setup, job: tuple[int, str], names: Sequence[str] = ()) -> float:
    """Make every missing cell of one task of one seed, or those of ``names``; returns the seconds that it took."""
    cells = TaskBench(Models(setup, job[0]), job[1]).cells()
    return run_cells(setup, job, [(name, make) for name, make in cells if not names or name in names])


def run_cells(setup: Setup, job: tuple[int, str], cells: Sequence[tuple[str, Maker]]) -> float:
    """Make the cells of one task of one seed that are missing, each written at once; returns the seconds."""
    started, (seed, task) = time.perf_counter(), job
    for name, make in cells:
        path = cell_path(setup, seed, task, name)
        if not path.is_file():
            begun = time.perf_counter()
            values = make()
            if values is None:
                note(f"seed {seed}, {task}: {name} is left out; the packaged adapters do not fit {setup.base}")
                continue
            facts = {"cell_seconds": time.perf_counter() - begun, "commit": git_commit(), "machine": machine()}
            write_json(path, {**values, **facts})
    return time.perf_counter() - started


def cell_path(setup: Setup, seed: int, task: str, name: str) -> Path:
    """Where a cell is kept."""
    return setup.cells / f"{setup.key}-{seed}" / "cells" / f"{task}-{name}.json"


def read_cells(setup: Setup, seed: int, task: str) -> dict[str, Values]:
    """The cells of one task of one seed that are there, by name."""
    folder = cell_path(setup, seed, task, "").parent
    paths = sorted(folder.glob(f"{task}-*.json"))  # no task's name begins with another's and a hyphen
    return {path.stem.removeprefix(f"{task}-"): json.loads(path.read_text(encoding="utf-8")) for path in paths}
