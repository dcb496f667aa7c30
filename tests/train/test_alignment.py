"""Losses of aligners against a twin that takes rows one by one, in whole logits, and against TRL."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from safeside import Adapter, Base, Message, create_adapter, make_config
from safeside.errors import ConfigError
from safeside.train.alignment import AlignmentLoss
from safeside.train.losses import dpo_losses
from safeside.train.recipe import TrainingSection
from safeside.train.rows import Rows
from safeside.train.splits import encode_rows
from safeside.train.taps import FINAL, Batch, Forward, LiveTaps, StoredTaps, TapStore
from safeside.types import Example
from twin import base_states, head_by_hand, run_by_hand

SAME = 1e-4  # float32 sums over answers of a dozen tokens
SAME_AS_TRL = 1e-6
PROMPTS = ("cat sat", "how can they be", "the mat", "then the other cat said there")
KINDS = ("lst", "lst_plus", "toplayers", "state_map")


def preferences() -> list[Example]:
    answers = (("no", "yes, the hat"), ("not that, no", "the cat"), ("no no no", "on"), ("never", "then and there"))
    return [
        Example((Message("user", prompt), Message("assistant", chosen)), rejected=Message("assistant", rejected))
        for prompt, (chosen, rejected) in zip(PROMPTS, answers, strict=True)
    ]


def benign() -> list[Example]:
    answered = Example((Message("user", "what is a hat"), Message("assistant", "a hat is worn")))
    return [answered, Example((Message("user", "where is the cat"),)), Example((Message("user", "mat"),))]


def rows_of(base: Base, *, with_rejected: bool = True, with_benign: bool = True) -> Rows:
    rows = encode_rows(base, preferences())
    if not with_rejected:
        rows.rejected = None
    if with_benign:
        rows.benign = encode_rows(base, benign())
    return rows


def settings(**values: object) -> TrainingSection:
    return TrainingSection(**{"objective": "dpo", "beta": 0.3, **values})


class Twin:
    """One row at a time: logits of base and mix from the slow twin, every sum written out."""

    def __init__(self, base: Base, aligner: Adapter, training: TrainingSection) -> None:
        self.base, self.aligner, self.training = base, aligner, training

    def both(self, ids: Sequence[int]) -> tuple[Tensor, ...]:
        """Log-probabilities (T, V) of the mix and of the base."""
        row = torch.tensor([ids])
        state = base_states(self.base, row)[1]
        mixed = state + run_by_hand(self.base, self.aligner, row).delta
        return tuple(head_by_hand(self.base, one)[0].double().log_softmax(-1) for one in (mixed, state))

    def of_answer(self, ids: Sequence[int], start: int) -> tuple[float, float]:
        mixed, plain = self.both(ids)
        places = range(start, len(ids))
        return sum(float(mixed[t - 1, ids[t]]) for t in places), sum(float(plain[t - 1, ids[t]]) for t in places)

    def divergences(self, ids: Sequence[int], start: int) -> list[float]:
        mixed, plain = self.both(ids)
        places = range(start - 1, max(start, len(ids) - 1))
        return [float((plain[t].exp() * (plain[t] - mixed[t])).sum()) for t in places]

    def loss(self, rows: Rows, some: Sequence[int]) -> float:
        total = weight = 0.0
        for row in some:
            if row >= len(rows.ids):
                place = row - len(rows.ids)
                values = self.divergences(rows.benign.ids[place], rows.benign.answer_starts[place])
                size = 1 if self.training.objective == "dpo" else max(1, len(values))
                total += self.training.kl_weight * size * sum(values) / len(values)
                weight += size
                continue
            own, reference = self.of_answer(rows.ids[row], rows.answer_starts[row])
            if self.training.objective == "sft":
                total -= own
                weight += len(rows.ids[row]) - rows.answer_starts[row]
                continue
            worse, worse_reference = self.of_answer(rows.rejected.ids[row], rows.rejected.answer_starts[row])
            margin = self.training.beta * ((own - reference) - (worse - worse_reference))
            total += math.log1p(math.exp(-margin))
            total -= self.training.sft_weight * own / (len(rows.ids[row]) - rows.answer_starts[row])
            weight += 1
        return total / weight


@pytest.mark.parametrize("family", ["llama", "granite", "gpt2"])
@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize("some", [[0], [3, 1], [0, 1, 2, 3], [2, 4], [5, 0, 6], [6, 5, 4], range(7)])
def test_a_loss_is_its_twin(
    tiny_family: Callable[[str], Base], random_aligner, family: str, objective: str, some: Sequence[int]
) -> None:
    base = tiny_family(family)
    aligner, training = random_aligner(base), settings(objective=objective, kl_weight=0.7)
    rows = rows_of(base, with_rejected=objective == "dpo")
    loss = AlignmentLoss(base, LiveTaps(base, aligner), rows, training)
    assert loss(some).item() == pytest.approx(Twin(base, aligner, training).loss(rows, some), rel=SAME, abs=SAME)


@pytest.mark.parametrize("some", [[0, 2], range(7)])
def test_the_chosen_answers_count_by_themselves(tiny_base: Base, random_aligner, some: Sequence[int]) -> None:
    aligner, rows = random_aligner(tiny_base), rows_of(tiny_base)
    found = {}
    for weight in (0.0, 0.6):
        training = settings(kl_weight=0.7, sft_weight=weight)
        found[weight] = AlignmentLoss(tiny_base, LiveTaps(tiny_base, aligner), rows, training)(some).item()
        expected = Twin(tiny_base, aligner, training).loss(rows, some)
        assert found[weight] == pytest.approx(expected, rel=SAME, abs=SAME)
    assert found[0.6] > found[0.0]


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_the_metric_is_minus_the_loss_of_all_rows(tiny_base: Base, random_aligner, objective: str) -> None:
    aligner, training = random_aligner(tiny_base), settings(objective=objective, kl_weight=0.7)
    rows = rows_of(tiny_base, with_rejected=objective == "dpo")
    loss = AlignmentLoss(tiny_base, LiveTaps(tiny_base, aligner), rows, training)
    assert loss.metric() == pytest.approx(-Twin(tiny_base, aligner, training).loss(rows, range(7)), rel=SAME)
    assert loss.name.endswith("divergence included")


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_weights_add_batches_up(tiny_base: Base, random_aligner, objective: str) -> None:
    """What the loop relies on: the weighted mean of two parts is the whole."""
    rows, source = rows_of(tiny_base, with_rejected=objective == "dpo"), LiveTaps(tiny_base, random_aligner(tiny_base))
    loss = AlignmentLoss(tiny_base, source, rows, settings(objective=objective, kl_weight=0.5))
    assert len(loss.weights) == len(loss.lengths) == 7
    parts = [[0, 5, 2], [1, 3, 4, 6]]
    sizes = [sum(loss.weights[row] for row in part) for part in parts]
    whole = sum(loss(part).item() * size for part, size in zip(parts, sizes, strict=True)) / sum(sizes)
    assert whole == pytest.approx(loss(range(7)).item(), rel=SAME)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_aligner_prefers_nothing_and_can_learn(tiny_base: Base, kind: str) -> None:
    aligner = create_adapter(tiny_base, make_config(tiny_base, role="align", kind=kind))
    loss = AlignmentLoss(tiny_base, LiveTaps(tiny_base, aligner), rows_of(tiny_base), settings(kl_weight=1.0))
    pairs, divergences = loss(range(4)), loss(range(4, 7))
    assert pairs.item() == pytest.approx(math.log(2), abs=1e-5)
    assert divergences.item() == pytest.approx(0.0, abs=1e-5)
    (pairs + divergences).backward()
    assert any(float(parameter.grad.abs().max()) > 0 for parameter in aligner.parameters())


# ---- one pass of the base --------------------------------------------------------------------------------------------


@pytest.fixture
def passes(tiny_base: Base) -> Iterator[list[int]]:
    """Rows of every pass of the base's decoder, in order."""
    seen: list[int] = []
    handle = tiny_base.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    yield seen
    handle.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_takes_one_pass_of_the_base(tiny_base: Base, random_aligner, passes: list[int], kind: str) -> None:
    """Chosen, rejected and benign texts, the reference and the divergence: all from one."""
    aligner = random_aligner(tiny_base, kind=kind)
    loss = AlignmentLoss(tiny_base, LiveTaps(tiny_base, aligner), rows_of(tiny_base), settings(kl_weight=0.5))
    passes.clear()  # making an adapter may run the base
    loss([0, 1, 2, 5]).backward()
    assert passes == [2 * 3 + 1]


@pytest.mark.parametrize("kind", KINDS)
def test_stored_states_take_none_and_give_the_same(
    tiny_base: Base, random_aligner, passes: list[int], tmp_path, kind: str
) -> None:
    aligner, rows = random_aligner(tiny_base, kind=kind), rows_of(tiny_base)
    store = TapStore.build(tiny_base, rows.texts, (*aligner.config.layers, FINAL), tmp_path)
    live = AlignmentLoss(tiny_base, LiveTaps(tiny_base, aligner), rows, settings(kl_weight=0.5))
    stored = AlignmentLoss(tiny_base, StoredTaps(store, aligner), rows, settings(kl_weight=0.5))
    expected = live(range(7)).item()
    passes.clear()
    found = stored(range(7))
    found.backward()
    assert passes == []
    assert found.item() == pytest.approx(expected, rel=SAME)


def test_only_answers_move_the_delta(tiny_base: Base) -> None:
    rows = rows_of(tiny_base, with_benign=False)
    length = max(map(len, rows.texts))
    delta = torch.zeros(8, length, 64, requires_grad=True)
    states = torch.randn(8, length, 64)

    def source(batch: Batch) -> Forward:
        n = batch.ids.shape[1]
        return Forward(SimpleNamespace(delta=delta[:, :n]), states[:, :n])

    AlignmentLoss(tiny_base, source, rows, settings())(range(4)).backward()
    touched = delta.grad.abs().sum(-1) > 0
    starts = [*rows.answer_starts, *rows.rejected.answer_starts]
    for row, (ids, start) in enumerate(zip(rows.texts, starts, strict=True)):
        expected = [start - 1 <= place < len(ids) - 1 for place in range(length)]
        assert touched[row].tolist() == expected, "answer tokens only, each by the state before it"


# ---- TRL -------------------------------------------------------------------------------------------------------------

# Sums of log-probabilities of four pairs, and what the DPOTrainer of TRL 1.16 makes of them.
LOG_PROBS = {
    "chosen": [-12.5, -3.25, -40.0, -7.75],
    "rejected": [-11.0, -9.5, -38.0, -7.75],
    "reference_chosen": [-14.0, -3.5, -30.0, -8.0],
    "reference_rejected": [-10.5, -8.0, -41.0, -8.0],
}
TRL_LOSSES = {0.01: 0.7052595, 0.1: 0.8604412, 0.5: 1.9640890, 2.0: 6.6852622}


def ratios() -> tuple[Tensor, Tensor]:
    values = {name: torch.tensor(value) for name, value in LOG_PROBS.items()}
    return values["chosen"] - values["reference_chosen"], values["rejected"] - values["reference_rejected"]


@pytest.mark.parametrize("beta", TRL_LOSSES)
def test_the_dpo_loss_is_that_of_trl(beta: float) -> None:
    assert float(dpo_losses(*ratios(), beta).mean()) == pytest.approx(TRL_LOSSES[beta], abs=SAME_AS_TRL)


@pytest.mark.parametrize("beta", TRL_LOSSES)
def test_trl_itself_agrees(beta: float) -> None:
    """TRL's own code on the same log-probabilities, one token an answer; run where it is installed."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer", reason="trl is not installed")
    gather = SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value, gather=lambda value: value)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=gather, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=beta, loss_types=["sigmoid"],
        loss_weights=[1.0], label_smoothing=0.0, _total_train_tokens=0, _tp_size=1, use_weighting=False,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    both = torch.tensor([*LOG_PROBS["chosen"], *LOG_PROBS["rejected"]])[:, None]
    outputs = SimpleNamespace(log_probs=both, entropy=both, mean_logits=both, is_top1=both > 0)
    mask = torch.tensor([[0, 1]] * 8)
    inputs = {
        "input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "ref_chosen_logps": torch.tensor(LOG_PROBS["reference_chosen"]),
        "ref_rejected_logps": torch.tensor(LOG_PROBS["reference_rejected"]),
    }  # fmt: skip
    found = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    assert float(dpo_losses(*ratios(), beta).mean()) == pytest.approx(float(found), abs=SAME_AS_TRL)


def test_dpo_by_hand() -> None:
    found = dpo_losses(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0]), 0.5)
    expected = [-F.logsigmoid(torch.tensor(0.75)), -F.logsigmoid(torch.tensor(-1.0))]
    assert found.tolist() == pytest.approx([float(value) for value in expected])
    assert dpo_losses(torch.tensor([500.0]), torch.tensor([-500.0]), 1.0).tolist() == [0.0]
    assert dpo_losses(torch.tensor([-500.0]), torch.tensor([500.0]), 1.0).tolist() == [1000.0]


# ---- what cannot be learnt -------------------------------------------------------------------------------------------


def test_dpo_needs_preferences(tiny_base: Base, random_aligner) -> None:
    source = LiveTaps(tiny_base, random_aligner(tiny_base))
    with pytest.raises(ConfigError, match="every row needs 'prompt', 'chosen' and 'rejected'"):
        AlignmentLoss(tiny_base, source, rows_of(tiny_base, with_rejected=False), settings())


def test_rows_without_an_answer_are_refused(tiny_base: Base, random_aligner) -> None:
    source = LiveTaps(tiny_base, random_aligner(tiny_base))
    rows = encode_rows(tiny_base, [Example((Message("user", "cat"),))])
    with pytest.raises(ConfigError, match="every row needs 'prompt' and 'response'"):
        AlignmentLoss(tiny_base, source, rows, settings(objective="sft"))
