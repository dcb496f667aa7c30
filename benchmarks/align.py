"""The alignment benchmark: what every aligner and baseline refuses, what that costs in usefulness, and who wins.

    python benchmarks/align.py --data ../shared/data               all of it; a killed run goes on where it was
    python benchmarks/align.py --data ../shared/data --minutes 30  makes nothing new after so many minutes
    python benchmarks/align.py --data ../shared/data --quick       a few rows and prompts, into a temporary folder

All learn from the same rows with one loop.  Validation prompts choose among tries, aligners, strengths and thresholds
of the gate; test prompts are answered with what was chosen.  On the built-in base ``harmful_rate`` is the share of
harmful prompts that the rules judge does not see refused: a proxy of compliance, no measure of harm.  Writes
align.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from align_answers import FURTHER, MAIN, NEW_TOKENS, Questions, Study
from align_cost import cost_rows
from align_figures import GOALS, PAPER_POINTS
from align_jobs import Bench, jobs_of
from align_training import KINDS, Clock, MissingError, Setup
from safeside.evals.endpoint import endpoint_of
from safeside.evals.judges import JUDGES, JudgeOptions
from safeside.terminal import note
from tidy import RESULTS, Row, result_of, write_json

CELLS = Path(__file__).parent / ".cells" / "align"


def run(bench: Bench, output: Path, cost: Path) -> Path:
    """Make what there is time for and write align.json; returns its path."""
    started, rows, left_out = time.perf_counter(), list[Row](), list[str]()
    for title, job in jobs_of(bench):
        before = time.perf_counter()
        try:
            rows += job()
        except MissingError:
            left_out.append(title)
            note(f"{title}: left out, there was no time")
            continue
        note(f"{title}: {time.perf_counter() - before:.0f} s")
    rows += cost_rows(cost)
    notes = {
        **bench.notes,
        "goals": GOALS,
        "paper_points": PAPER_POINTS,
        "judge": f"{bench.study.questions.judge}; by refusal_phrases harmful_rate is a proxy of compliance",
        "answer_tokens": bench.study.questions.new_tokens,
        "prompts_a_suite": bench.study.questions.limit,
        "prompts_seen_before": {name: bench.study.questions.n_seen(name) for name in (*MAIN, *FURTHER)},
        "left_out": left_out,
        "rows": bench.study.setup.counts,
        "intervals": "rates: 95% Wilson; utility: 95% bootstrap over answers; headline: 95% paired bootstrap over "
        "prompts, answers and seeds",
    }
    return write_json(output / "align.json", result_of("align", time.perf_counter() - started, rows, notes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--base", default="builtin", help="builtin, a folder or a hub name")
    parser.add_argument("--device", default="cpu", help="of the base")
    parser.add_argument("--judge", default="refusal_phrases", choices=list(JUDGES), help="of all answers")
    parser.add_argument("--endpoint", help="chat endpoint of a judge that asks one; its key is SAFESIDE_JUDGE_KEY")
    parser.add_argument("--judge-model", help="what the endpoint calls its model")
    parser.add_argument("--judge-tokens", type=int, default=2_000_000, help="most tokens to spend on the endpoint")
    parser.add_argument("--answer-tokens", type=int, default=NEW_TOKENS, help="of an answer, at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the headline and of LoRA-DPO")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="of aligners")
    parser.add_argument("--tries", type=int, default=3, choices=(1, 2, 3), help="settings that aligners choose from")
    parser.add_argument("--baseline-tries", type=int, choices=range(1, 8), default=7, help="that LoRAs choose from")
    parser.add_argument("--prompts", type=int, default=100, help="of each suite")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="then nothing new is made")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cells", type=Path, help="folder of cached cells")
    parser.add_argument("--output", type=Path, help="folder of the result file")
    parser.add_argument("--quick", action="store_true", help="prove that it works: few rows and prompts, one epoch")
    return parser


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, run, and say where the results are."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.prompts < 1 or len(set(options.seeds)) < len(options.seeds):
        parser.error("--prompts starts at 1, and --seeds are different numbers")
    torch.set_num_threads(options.threads)
    scratch = Path(tempfile.gettempdir()) / "safeside-bench"
    if options.quick:
        options.seeds, options.prompts, options.tries, options.baseline_tries = options.seeds[:1], 3, 1, 1
    setup = Setup(
        options.data,
        options.cells or (scratch / "align-cells" if options.quick else CELLS),
        options.base,
        32 if options.quick else None,
        1 if options.quick else None,
        Clock(time.monotonic() + 60 * options.minutes),
        options.device,
    )
    key = os.environ.get("SAFESIDE_JUDGE_KEY")
    asked = JudgeOptions(options.data, endpoint_of(options.endpoint, options.judge_model, key, options.judge_tokens))
    questions = Questions(setup, options.prompts, options.judge, asked, options.answer_tokens)
    n_tries = (options.tries, options.baseline_tries)
    bench = Bench(Study(questions), tuple(options.seeds), *n_tries, tuple(options.kinds))
    assert setup.counts
    path = run(bench, options.output or (scratch if options.quick else RESULTS), setup.cells / "cost.json")
    note(f"wrote {path}")
    return path


if __name__ == "__main__":
    main()
