"""The loop: the same weights from the same seed, whether or not a run was killed on the way."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from safeside.errors import ConfigError, NotFiniteError
from safeside.train.loop import CHECKPOINT, Loop, Progress
from safeside.train.recipe import TrainingSection
from toy import N_ROWS, SETTINGS, Toy

# Gradients of a step summed in another order: float32 rounding, amplified by Adam's first steps.
SAME_WEIGHTS = 2e-5
N_STEPS = math.ceil(N_ROWS / 8)  # of an epoch


def settings(**changes: object) -> TrainingSection:
    return SETTINGS.model_copy(update=changes)


def run(**options: object) -> Toy:
    toy = Toy()
    toy.loop(**options).run()
    return toy


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def killer(step: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.step >= step:
            raise Killed

    return report


# ---- killed and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.0, 1e9])
@pytest.mark.parametrize("step", [1, 5, N_STEPS - 1, N_STEPS, N_STEPS + 1, 2 * N_STEPS + 7, 3 * N_STEPS])
def test_a_killed_run_ends_at_the_same_weights(tmp_path: Path, step: int, seconds: float) -> None:
    """With a checkpoint after every step, and with one after every epoch only."""
    expected = run()
    killed = Toy()
    with pytest.raises(Killed):
        killed.loop(settings(checkpoint_seconds=seconds), tmp_path, killer(step)).run()
    resumed = Toy(seed=9)  # whatever its first weights: they come from the checkpoint
    first = resumed.loop(settings(checkpoint_seconds=seconds), tmp_path)
    if not (tmp_path / CHECKPOINT).exists():  # killed before the first one: it starts anew
        resumed = Toy()
        first = resumed.loop(settings(checkpoint_seconds=seconds), tmp_path)
    outcome = first.run(resume=True)
    assert torch.equal(resumed.weights(), expected.weights())
    assert outcome.steps == 3 * N_STEPS
    assert len(outcome.history) == 3
    if seconds == 0:  # nothing is done twice: the step whose report was killed is the only one not yet saved
        assert len(killed.seen) + len(resumed.seen) <= 3 * N_STEPS + 1


def test_a_run_may_be_killed_many_times(tmp_path: Path) -> None:
    expected = run()
    for step in range(2, 3 * N_STEPS, 5):
        with pytest.raises(Killed):
            Toy().loop(folder=tmp_path, report=killer(step)).run(resume=True)
    last = Toy()
    outcome = last.loop(folder=tmp_path).run(resume=True)
    assert torch.equal(last.weights(), expected.weights())
    assert outcome.best_metric == max(outcome.history)


def test_a_kill_inside_the_validation_is_survived(tmp_path: Path) -> None:
    def kill() -> float:
        raise Killed

    with pytest.raises(Killed):
        Toy().loop(folder=tmp_path, metric_of=kill).run()
    last = Toy()
    last.loop(folder=tmp_path).run(resume=True)
    assert torch.equal(last.weights(), run().weights())


CHILD = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from toy import Toy
def report(progress):
    print(progress.step, flush=True)
    time.sleep(0.01)
Toy().loop(folder=Path({folder!r}), report=report).run()
"""


def test_sigkill_is_survived(tmp_path: Path) -> None:
    """A real one, at a time of its own choosing."""
    script = CHILD.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if int(line) == N_STEPS + 4:
                child.send_signal(signal.SIGKILL)
                break
    assert child.wait() == -signal.SIGKILL
    resumed = Toy(seed=9)
    resumed.loop(folder=tmp_path).run(resume=True)
    assert 0 < len(resumed.seen) < 3 * N_STEPS
    assert torch.equal(resumed.weights(), run().weights())


def test_a_half_written_checkpoint_is_never_read(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        Toy().loop(folder=tmp_path, report=killer(5)).run()
    (tmp_path / (CHECKPOINT + ".new")).write_bytes(b"half of one")
    last = Toy()
    last.loop(folder=tmp_path).run(resume=True)
    assert torch.equal(last.weights(), run().weights())


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    first = Toy()
    before = first.loop(folder=tmp_path).run()
    again = Toy(seed=3)
    outcome = again.loop(folder=tmp_path).run(resume=True)
    assert again.seen == []
    assert torch.equal(again.weights(), first.weights())
    assert (outcome.best_metric, outcome.history) == (before.best_metric, before.history)


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        (settings(learning_rate=0.5), {}),
        (settings(batch_size=4), {}),
        (settings(epochs=9), {}),
        (SETTINGS, {"seed": 1}),
        (SETTINGS, {"identity": "other rows"}),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, changed: TrainingSection, options: dict[str, object]
) -> None:
    run(folder=tmp_path)
    with pytest.raises(ConfigError, match="was made by another run"):
        Toy().loop(changed, tmp_path, **options).run(resume=True)
    shorter = Toy()
    shorter.lengths = shorter.lengths[:-1]
    with pytest.raises(ConfigError, match="was made by another run"):
        shorter.loop(folder=tmp_path).run(resume=True)
    Toy().loop(settings(checkpoint_seconds=7.0), tmp_path).run(resume=True)  # changes no weight: allowed


def test_without_resume_a_run_starts_anew(tmp_path: Path) -> None:
    run(folder=tmp_path)
    again = Toy()
    again.loop(folder=tmp_path).run()
    assert len(again.seen) == 3 * N_STEPS


# ---- order, seeds, batches -------------------------------------------------------------------------------------------


def test_every_row_is_seen_once_an_epoch_in_a_new_order() -> None:
    toy = run()
    epochs = [toy.seen[start : start + N_STEPS] for start in range(0, 3 * N_STEPS, N_STEPS)]
    for epoch in epochs:
        assert Counter(row for rows in epoch for row in rows) == Counter(range(N_ROWS))
    assert all(before != after for before, after in pairwise(epochs))


def test_rows_of_like_length_stand_together() -> None:
    toy = run()
    spreads = [max(lengths) - min(lengths) for rows in toy.seen for lengths in [[toy.lengths[row] for row in rows]]]
    assert sum(spreads) / len(spreads) < 5  # of lengths from 1 to 29, in batches of 8


def test_seeds_decide_the_weights() -> None:
    assert torch.equal(run(seed=3).weights(), run(seed=3).weights())
    assert not torch.equal(run(seed=3).weights(), run(seed=4).weights())


@pytest.mark.parametrize("batch_size", [16, 4])
def test_accumulated_batches_are_one_large_batch(batch_size: int) -> None:
    """Also for the last step of an epoch, whose batches are not full."""
    large = run(settings=settings(batch_size=32))
    small = run(settings=settings(batch_size=batch_size, accumulation=32 // batch_size))
    assert max(map(len, small.seen)) == batch_size
    assert (large.weights() - small.weights()).abs().max() < SAME_WEIGHTS


def test_accumulated_batches_may_be_weighted() -> None:
    """Where a loss is a mean over tokens, rows with many of them count for more, however they are split."""

    def trained(**changes: int) -> torch.Tensor:
        toy = Toy()

        def loss_of(rows: list[int]) -> torch.Tensor:
            weight = torch.tensor([float(toy.lengths[row]) for row in rows])
            logits = toy.module(toy.inputs[list(rows)])[:, 0]
            losses = torch.nn.functional.softplus(torch.where(toy.labels[list(rows)] > 0, -logits, logits))
            return (losses * weight).sum() / weight.sum()

        toy.loop(settings(**changes), loss_of=loss_of, weights=toy.lengths).run()
        return toy.weights()

    whole, split = trained(batch_size=32), trained(batch_size=8, accumulation=4)
    assert (whole - split).abs().max() < SAME_WEIGHTS


# ---- stopping, reports, precision ------------------------------------------------------------------------------------


def test_the_best_weights_are_kept_and_training_stops(tmp_path: Path) -> None:
    figures = iter([0.5, 0.9, 0.8, 0.9, 0.7, 0.99])
    kept: list[torch.Tensor] = []
    toy = Toy()

    def metric_of() -> float:
        kept.append(toy.weights())
        return next(figures)

    outcome = toy.loop(settings(epochs=6, patience=3), tmp_path, metric_of=metric_of).run()
    assert outcome.history == [0.5, 0.9, 0.8, 0.9, 0.7]  # three epochs that did not beat 0.9
    assert (outcome.best_metric, outcome.epochs) == (0.9, 5)
    assert torch.equal(toy.weights(), kept[1])
    assert not torch.equal(toy.weights(), kept[-1])


def test_training_learns_and_says_how_it_went() -> None:
    reports: list[Progress] = []
    toy = Toy()
    outcome = toy.loop(settings(epochs=12, learning_rate=0.1), report=reports.append).run()
    assert outcome.best_metric > 0.9
    steps = [report for report in reports if not math.isnan(report.loss)]
    assert [report.step for report in steps] == list(range(1, outcome.steps + 1))
    assert {report.n_steps for report in reports} == {12 * N_STEPS}
    assert steps[-1].loss < steps[0].loss
    assert [report.metric for report in reports if math.isnan(report.loss)] == outcome.history
    assert outcome.trainable_params == 6 * 16 + 16 + 16 + 1
    assert outcome.train_seconds > 0
    assert outcome.peak_bytes > 10_000_000
    assert outcome.peak_measure == "anonymous memory"


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    toy, rates = Toy(), []
    loop: Loop = toy.loop(settings(warmup=0.25), report=lambda _: rates.append(loop.optimizer.param_groups[0]["lr"]))
    loop.run()
    peak = SETTINGS.learning_rate
    assert max(rates) == pytest.approx(peak, rel=0.2)
    assert rates[0] == pytest.approx(peak / (0.25 * 3 * N_STEPS))
    assert rates[-1] == pytest.approx(peak / 10)


def test_weights_decay_in_matrices_only() -> None:
    loop = Toy().loop(settings(weight_decay=0.5))
    decayed, others = loop.optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert {parameter.ndim for parameter in decayed["params"]} == {2}
    assert {parameter.ndim for parameter in others["params"]} == {1}


def test_bfloat16_runs_beside_float32_in_one_process() -> None:
    dtypes: set[torch.dtype] = set()
    toy = Toy()
    handle = toy.module[0].register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    toy.loop(settings(precision="bfloat16")).run()
    handle.remove()
    assert torch.bfloat16 in dtypes
    assert toy.module[0].weight.dtype == torch.float32
    assert torch.equal(run().weights(), run().weights())
    assert (toy.weights() - run().weights()).abs().max() < 0.1


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    toy = Toy()
    calls = iter(range(100))

    def loss_of(rows: list[int]) -> torch.Tensor:
        return toy.loss_of(rows) * (math.nan if next(calls) == 4 else 1.0)

    with pytest.raises(NotFiniteError, match=r"The loss is nan at step 4; lower the learning rate"):
        toy.loop(folder=tmp_path, loss_of=loss_of).run()
    assert toy.weights().isfinite().all()


@pytest.mark.parametrize("figure", [math.nan, -math.inf])
def test_a_validation_figure_that_is_not_finite_is_an_error(figure: float) -> None:
    """Untrained weights must never pass for the best ones."""
    with pytest.raises(NotFiniteError, match="validation figure is"):
        Toy().loop(metric_of=lambda: figure).run()
