"""Recipes of kind ``lora`` end to end, and their loss against the obvious one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from recipes_for_tests import preference_rows, recipe, write
from safeside import Base, Message, load_base
from safeside.base.families import has_lora
from safeside.errors import ConfigError, UnknownNameError
from safeside.lora import LoraShape, add_lora, load_lora
from safeside.train.alignment import AlignmentLoss
from safeside.train.command import train_command
from safeside.train.loop import Progress
from safeside.train.recipe import Recipe, TrainingSection
from safeside.train.rows import Rows
from safeside.train.run import TAPS, run_recipe
from safeside.train.run_lora import LoraSource, run_lora
from safeside.train.splits import encode_rows
from safeside.types import Example

LORA = {"kind": "lora", "lora_rank": 4, "reduction": None}
SHORT = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01}
DPO = {**SHORT, "objective": "dpo", "beta": 0.2}
BENIGN = {"benign": ["benign.jsonl"]}
SAME_LOSS = 1e-5


def lora_recipe(training: dict[str, object], data: dict[str, object] | None = None, **adapter: object) -> Recipe:
    values = recipe("preferences", training=training, data=data or {}).model_dump()
    section = {"kind": "lora", "role": "align", "lora_rank": 4, **adapter}
    return Recipe.model_validate({**values, "adapter": section})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name, seed in (("train", 1), ("validation", 2)):
        write(root / f"preferences_{name}.jsonl", preference_rows(24, seed))
    answered = [{"prompt": row["prompt"], "response": "so they said"} for row in preference_rows(12, 3)]
    write(root / "benign.jsonl", answered)
    return root


def weights_in(folder: Path, base: Base) -> torch.Tensor:
    with load_lora(folder, base) as lora:
        return torch.cat([update.detach().flatten() for update in lora.updates])


@pytest.mark.parametrize(
    ("training", "adapter", "metric"),
    [
        (SHORT, {}, "negative answer loss (nats)"),
        (DPO, {}, "negative DPO loss"),
        (DPO, {"depth": 1}, "negative DPO loss"),
    ],
    ids=["sft", "dpo", "dpo-top"],
)
def test_it_learns_and_the_base_is_back(
    tiny_base: Base, data: Path, tmp_path: Path, training: dict[str, object], adapter: dict[str, object], metric: str
) -> None:
    """``tiny_base`` itself checks that no byte of it has changed."""
    plain = tiny_base.chat([Message("user", "the cat sat")], max_new_tokens=6).text
    run = run_lora(lora_recipe(training, **adapter), data_root=data, output=tmp_path, base=tiny_base)
    assert not has_lora(tiny_base.model)
    assert run.validation_metric == metric
    assert run.outcome.best_metric == max(run.outcome.history)
    assert run.outcome.history[-1] > (-0.65 if training is DPO else -5.0), "a fresh LoRA has -0.693, or -6.4"
    n_layers = 7 * adapter.get("depth", 3)
    assert len(weights_in(tmp_path, tiny_base)) == run.outcome.trainable_params
    facts = json.loads((tmp_path / "provenance.json").read_text())
    assert {"train_seconds", "peak_bytes", "trainable_params", "flops_share"} <= set(facts)
    with load_lora(tmp_path, tiny_base) as lora:
        assert len(lora.updates) == 2 * n_layers
        with lora.scaled(0.0):
            assert tiny_base.chat([Message("user", "the cat sat")], max_new_tokens=6).text == plain
    assert not (tmp_path / TAPS).exists()
    assert not (tmp_path / "checkpoint.pt").exists()


def pairs(base: Base, n: int = 3) -> Rows:
    rows = preference_rows(n, 7)
    answers = [Message("assistant", str(row[key])) for row in rows for key in ("chosen", "rejected")]
    return encode_rows(
        base,
        [
            Example((Message("user", str(row["prompt"])), answers[2 * place]), rejected=answers[2 * place + 1])
            for place, row in enumerate(rows)
        ],
    )


def sequence_log_prob(base: Base, ids: tuple[int, ...], start: int) -> torch.Tensor:
    """Log-probability of the tokens from ``start`` on, one text alone."""
    found = F.log_softmax(base.model(input_ids=torch.tensor([ids])).logits[0].float(), -1)
    return sum(found[place - 1, ids[place]] for place in range(start, len(ids)))  # type: ignore[return-value]


def test_dpo_has_the_switched_off_base_as_reference(tiny_base: Base) -> None:
    """The oracle: equation 7 with four passes a pair, the reference from another copy of the base."""
    rows, plain = pairs(tiny_base), load_base(tiny_base.folder)
    with add_lora(tiny_base, LoraShape(rank=4), seed=1) as lora:
        with torch.no_grad():
            for update in lora.updates:
                update.add_(0.05 * torch.randn(update.shape, generator=torch.Generator().manual_seed(2)))
        loss = AlignmentLoss(tiny_base, LoraSource(lora, 0, None), rows, TrainingSection(objective="dpo", beta=0.3))
        found = loss(range(3))
        found.backward()
        assert all(update.grad is not None and bool(update.grad.any()) for update in lora.updates)
        expected = torch.zeros(())
        with torch.no_grad():
            for row in range(3):
                ratios = [
                    sequence_log_prob(tiny_base, part.ids[row], part.answer_starts[row])
                    - sequence_log_prob(plain, part.ids[row], part.answer_starts[row])
                    for part in (rows, rows.rejected)
                ]
                expected = expected - F.logsigmoid(0.3 * (ratios[0] - ratios[1])) / 3
    torch.testing.assert_close(found.detach(), expected, rtol=SAME_LOSS, atol=SAME_LOSS)


@pytest.mark.parametrize("training", [DPO, SHORT], ids=["dpo", "sft"])
def test_stored_references_and_live_ones_learn_the_same(
    tiny_base: Base, data: Path, tmp_path: Path, training: dict[str, object]
) -> None:
    found = []
    for cache_taps in (True, False):
        settings = {**training, "epochs": 1, "kl_weight": 0.5, "cache_taps": cache_taps}
        run = run_lora(lora_recipe(settings, BENIGN), data_root=data, output=tmp_path / str(cache_taps), base=tiny_base)
        assert run.validation_metric.endswith("divergence included")
        found.append(weights_in(run.folder, tiny_base))
    torch.testing.assert_close(*found, rtol=0.05, atol=1e-2)


def test_plain_sft_costs_one_pass_a_batch(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    n_passes = 0

    def count(*_: object) -> None:
        nonlocal n_passes
        n_passes += 1

    handle = tiny_base.decoder.register_forward_hook(count)
    try:
        run = run_lora(lora_recipe({**SHORT, "epochs": 1}), data_root=data, output=tmp_path, base=tiny_base)
    finally:
        handle.remove()
    assert n_passes == run.outcome.steps + 1  # and one of all validation rows


def test_a_killed_run_goes_on(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    values = lora_recipe(DPO)
    whole = run_lora(values, data_root=data, output=tmp_path / "whole", base=tiny_base)

    def kill(progress: Progress) -> None:
        if progress.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_lora(values, data_root=data, output=tmp_path / "killed", base=tiny_base, report=kill)
    assert not has_lora(tiny_base.model), "a killed run leaves the base as it was"
    with pytest.raises(ConfigError, match="made by another run"):
        run_lora(lora_recipe(DPO, depth=1), data_root=data, output=tmp_path / "killed", base=tiny_base, resume=True)
    resumed = run_lora(values, data_root=data, output=tmp_path / "killed", base=tiny_base, resume=True)
    assert torch.equal(weights_in(resumed.folder, tiny_base), weights_in(whole.folder, tiny_base))


def test_the_command_trains_one(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (data / "preferences_train.jsonl").read_text().splitlines()]
    texts = [[Message("user", row["prompt"]), Message("assistant", row["rejected"])] for row in rows]
    lengths = sorted(len(tiny_base.encode(text).ids) for text in texts)
    path = tmp_path / "lora.toml"
    path.write_text(
        f'name = "lora"\noutput = "unused"\n[base]\nname = "{tiny_base.folder}"\n[data]\n'
        'train = ["preferences_train.jsonl"]\nvalidation = ["preferences_validation.jsonl"]\n'
        f"max_tokens = {lengths[12]}\n"
        '[adapter]\nkind = "lora"\nrole = "align"\ndepth = 2\n[training]\nepochs = 1\n'
    )
    summary = train_command(path, data, tmp_path / "out", resume=False)
    assert summary is not None
    assert (summary["kind"], summary["adapter"]) == ("lora", str(tmp_path / "out"))
    assert 12 < summary["train_rows"] < 24
    assert summary["rows_too_long"] >= 24 - summary["train_rows"]
    assert 0 < summary["flops_share"] < 1


def test_what_a_lora_does_not_read() -> None:
    with pytest.raises(ValueError, match="leave out reduction, width"):
        Recipe.model_validate({**lora_recipe(SHORT).model_dump(), "adapter": {**LORA, "role": "align", "width": 8}})
    for adapter in ({"kind": "lora"}, {"kind": "lora", "role": "align", "lora_rank": 0}):
        with pytest.raises(ValueError, match="set role = 'align'"):
            Recipe.model_validate({**lora_recipe(SHORT).model_dump(), "adapter": adapter})


def test_each_kind_has_its_run(tiny_base: Base, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Call run_lora"):
        run_recipe(lora_recipe(SHORT), output=tmp_path, base=tiny_base)
    with pytest.raises(ConfigError, match="is for run_recipe"):
        run_lora(recipe("preferences"), output=tmp_path, base=tiny_base)
    with pytest.raises(UnknownNameError, match="Unknown adapter kind"):
        recipe("preferences", adapter={"kind": "loraa"}).adapter_config(tiny_base)
