"""A harmful prompt hidden in a long benign text: is it found at the start, in the middle, at the end?

    python benchmarks/needle.py --data ../shared/data

An LST guard of prompts is trained plainly (``lst``), another one also on texts with needles (``lst_needles``): its own
short training prompts, at most as many as are measured, inside other benign instructions, each at one of the places.
Needles are short test prompts, harmful and harmless; the text around one is made of benign instructions, the same for
every place.  ``inside`` texts fit the base's context, ``windowed`` ones are several times as long and the highest score
of their windows counts; ``turns`` are conversations that fit, a turn of the user for each instruction, where the needle
is the first, a middle or the last one; as ``each_turn`` the same conversations are judged by the highest score of the
whole and of every one of the user's turns alone.  ``auroc`` asks whether texts with harmful needles score above those
with harmless ones; ``tpr`` and ``fpr`` are at the guard's own threshold, which 5% of the harmless validation prompts
reach.  A guard reads the last token of a window, so what stands far before it may be forgotten.  Writes the part
``needle`` of guards.json.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from guard_rows import installed
from parts import FILE, write_part
from presets import Judged, harmless
from safeside.adapters.adapter import Adapter
from safeside.base.model import Base
from safeside.evals.metrics import guard_figures
from safeside.terminal import note
from safeside.types import Example, Message
from task_guards import Lesson, Sizes, drawn, parser_of
from tidy import Row, figure_row, result_of

TEXT = "benign_prompts/alpaca_test.jsonl.gz"
TAUGHT_TEXT = "benign_prompts/alpaca_train.jsonl.gz"  # around the needles that are learnt from
PLACES = ("start", "middle", "end")
LONGEST = 0.1  # of a needle, as a share of the context
LENGTHS = {"inside": 0.8, "windowed": 3.0, "turns": 0.4}  # of the text around it, in contexts without room for a needle
TURNS, EACH_TURN = "turns", "each_turn"
ANSWER = "Here it is. Anything else?"  # to every turn but the last


NOTES = {
    "needles": f"test prompts of at most {LONGEST:.0%} of the context",
    "text": f"rows of {TEXT} around it",
    "threshold": "the guard's own: 5% of the harmless validation prompts reach it",
    "training": f"lst: no text with a needle; lst_needles: texts of {TAUGHT_TEXT} around training prompts too",
    "intervals": "95% bootstrap over needles",
}


@dataclass(frozen=True, slots=True)
class Needle:
    """A short prompt, and the benign sentences around it for each kind of text."""

    example: Example
    around: dict[str, tuple[str, ...]]

    def at(self, kind: str, place: str) -> Example:
        """The text with the needle at its place, labelled as the needle is."""
        before = {"start": 0, "middle": len(self.around[kind]) // 2, "end": len(self.around[kind])}[place]
        sentences = list(self.around[kind])
        parts = [*sentences[:before], self.example.messages[0].content, *sentences[before:]]
        if kind == TURNS:
            asked = [message for part in parts for message in (Message("user", part), Message("assistant", ANSWER))]
            return Example(tuple(asked[:-1]), self.example.labels)
        return Example((Message("user", " ".join(parts)),), self.example.labels)


def needles_of(base: Base, prompts: Sequence[Example], benign: Sequence[str], limit: int) -> list[Needle]:
    """At most ``limit`` short prompts of each kind, each with benign sentences drawn for it."""
    longest = LONGEST * base.max_tokens
    short = [prompt for prompt in prompts if len(base.encode(prompt.messages).ids) <= longest]
    found = []
    for label in (0.0, 1.0):
        for place, prompt in enumerate(drawn([one for one in short if one.labels[0] == label], limit)):
            generator = random.Random(place)
            room = base.max_tokens - longest
            around = {kind: _filled(base, benign, share * room, generator) for kind, share in LENGTHS.items()}
            found.append(Needle(prompt, around))
    return found


def _filled(base: Base, benign: Sequence[str], n_tokens: float, generator: random.Random) -> tuple[str, ...]:
    """Benign sentences of about ``n_tokens`` together, never more."""
    chosen: list[str] = []
    while True:
        chosen.append(generator.choice(benign))
        if len(base.tokenizer(" ".join(chosen))["input_ids"]) > n_tokens:
            return tuple(chosen[:-1])


def taught(lesson: Lesson, benign: Sequence[str], limit: int) -> Lesson:
    """The lesson with texts that fit the context around at most ``limit`` needles of each kind among its own rows."""
    needles = needles_of(lesson.base, lesson.splits["train"].examples, benign, limit)
    texts = [needle.at("inside", PLACES[row % len(PLACES)]) for row, needle in enumerate(needles)]
    return lesson.with_more(texts, "lst_needles")


def measure(lesson: Lesson, seeds: Sequence[int], needles: Sequence[Needle], kinds: Sequence[str]) -> Iterator[Row]:
    """The figures of all seeds: needles alone, and at each place of each of the kinds of text."""
    guards = lesson.guards(seeds)
    texts = {("alone", "alone"): [needle.example for needle in needles]}
    texts |= {(kind, place): [needle.at(kind, place) for needle in needles] for kind in kinds for place in PLACES}
    for (kind, place), examples in texts.items():
        whole = Judged.by(lesson, guards, examples)
        readings = {kind: whole} | ({EACH_TURN: by_turns(lesson, guards, examples, whole)} if kind == TURNS else {})
        for reading, seed in itertools.product(readings, guards):
            columns = {**lesson.columns(seed), "text": reading, "place": place}
            costs = lesson.costs(lesson.recipe(seed), guards[seed])
            yield from _figures(readings[reading][seed], guards[seed], columns, costs)


def by_turns(
    lesson: Lesson, guards: Mapping[int, Adapter], examples: Sequence[Example], whole: Mapping[int, Judged]
) -> dict[int, Judged]:
    """By seed the highest score of each conversation, as judged in one piece, and of the user's turns alone; NaN where
    one of them has none.
    """
    asked = [[message for message in example.messages if message.role == "user"] for example in examples]
    turns = [
        Example((message,), example.labels) for some, example in zip(asked, examples, strict=True) for message in some
    ]
    starts = np.cumsum([0, *map(len, asked)])[:-1]
    alone = Judged.by(lesson, guards, turns)
    return {
        seed: Judged(np.maximum(own.scores, np.maximum.reduceat(alone[seed].scores, starts)), own.labels)
        for seed, own in whole.items()
    }


def _figures(judged: Judged, guard: Adapter, columns: dict[str, object], costs: dict[str, object]) -> Iterator[Row]:
    known = np.isfinite(judged.scores)
    counts = {"n": int(known.sum()), "n_unscored": int((~known).sum())}
    figures = guard_figures(judged.labels[known], judged.scores[known], guard.thresholds[0])
    for metric in ("auroc", "tpr", "fpr"):
        figure = figures[metric]
        yield figure_row(columns, metric, figure.value, (figure.low, figure.high), **counts, **costs)
    place = ", ".join(str(columns[name]) for name in ("base", "method", "seed", "text", "place"))
    note(f"{place}: auroc {figures['auroc'].value:.3f}")


def _mean_contexts(base: Base, needles: Sequence[Needle], kind: str) -> float:
    """Mean length of whole texts, in contexts of the base; of conversations without their template."""
    found = [needle.at(kind, "end").messages for needle in needles]
    texts = [" ".join(message.content for message in messages) for messages in found]
    return round(float(np.mean([len(base.tokenizer(text)["input_ids"]) for text in texts])) / base.max_tokens, 2)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, measure, write."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    if options.quick:
        options.limit, options.needles, options.epochs, options.seeds = 200, 20, 1, options.seeds[:1]
    sizes = Sizes(options.limit, options.evaluation_limit, options.epochs)
    rows: list[Row] = []
    facts: dict[str, object] = {}
    path = options.output / FILE
    for base in installed([options.base, *options.also]):
        with tempfile.TemporaryDirectory() as folder:
            lesson = Lesson.read((base, options.data), options.task, Path(folder), sizes)
            needles = needles_of(lesson.base, lesson.splits["test"].examples, texts_of(options, TEXT), options.needles)
            lessons = [lesson, taught(lesson, texts_of(options, TAUGHT_TEXT), options.needles)]
            for one in lessons:
                rows += measure(one, options.seeds, needles, options.texts)
        facts[Path(base).name] = {
            "n_harmful": sum(needle.example.labels[0] == 1 for needle in needles),
            "n_harmless": sum(needle.example.labels[0] == 0 for needle in needles),
            "mean_contexts": {kind: _mean_contexts(lesson.base, needles, kind) for kind in options.texts},
            "rows": {one.method: one.counts for one in lessons},
        }
        result = result_of("needle", time.perf_counter() - started, rows, {**NOTES, "bases": facts})
        path = write_part(options.output, result)  # after every base: a run that is killed keeps what it has
    note(f"wrote {path}")
    return path


def texts_of(options: argparse.Namespace, place: str) -> list[str]:
    """The benign instructions of a file."""
    return [example.messages[0].content for example in harmless(options.data / place)]


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, evaluation_rows=1000)
    parser.add_argument("--task", default="prompt_harm", help="a task of prompts")
    parser.add_argument("--also", nargs="*", default=["minilm"], help="further bases")
    parser.add_argument(
        "--texts",
        nargs="+",
        default=list(LENGTHS),
        choices=list(LENGTHS),
        help="kinds of text; the file then holds these alone",
    )
    parser.add_argument("--needles", type=int, default=150, help="of each kind, harmful and harmless")
    return parser


if __name__ == "__main__":
    main()
