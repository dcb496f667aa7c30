"""The model in front of a base, on a stand-in for vLLM: what it refuses, and its scores against the library's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safeside import Adapter, Base, save_adapter
from safeside.errors import UnsupportedError
from safeside.vllm_plugin import slots
from safeside.vllm_plugin.kept import Drawn, kept_of
from safeside.vllm_plugin.plan import Pooled, plan_engine, read_engine_config

SAME = 1e-5  # differences of float32 near -60


@pytest.fixture
def config(session_base: Base, random_guard: Callable[..., Adapter], tmp_path: Path) -> SimpleNamespace:
    """vLLM's own configuration of an engine with one probe."""
    plan = plan_engine(session_base.folder, [save_adapter(random_guard(session_base, kind="plr"), tmp_path / "harm")])
    options, text = plan.engine_options(), session_base.model.config
    model = SimpleNamespace(
        model=options["model"], revision=None, logits_processors=options["logits_processors"], uses_mrope=False,
        runner_type="generate", logprobs_mode="raw_logprobs", hf_text_config=text,
    )  # fmt: skip
    parallel = SimpleNamespace(
        pipeline_parallel_size=1, decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False,
        enable_batch_sharded_sampling=False,
        worker_extension_cls=options["worker_extension_cls"],
    )  # fmt: skip
    return SimpleNamespace(
        additional_config=options["additional_config"], model_config=model, parallel_config=parallel, lora_config=None,
        speculative_config=None, instance_id=str(tmp_path), scheduler_config=SimpleNamespace(max_num_seqs=2),
    )  # fmt: skip


def pool(config: SimpleNamespace, base: Base, task: Pooled) -> None:
    """Make it the configuration of a pooling engine with the same probe."""
    (entry,) = read_engine_config(config.additional_config).adapters
    config.additional_config = plan_engine(base.folder, [entry.folder], pools=task).engine_options()[
        "additional_config"
    ]
    config.model_config.runner_type, config.model_config.logits_processors = "pooling", None


def test_scores_come_out_of_the_slots(plugin: Callable[[str], Any], config: SimpleNamespace) -> None:
    model = plugin("model").SafesideLlamaForCausalLM(vllm_config=config)
    model.load_weights([])
    with torch.no_grad():
        packed = model(torch.arange(7), torch.arange(7))
        logprobs = model.compute_logits(packed).log_softmax(-1)
    _, scores = slots.unpack(packed, model.state_width)
    assert 0 < float(scores.min()) < float(scores.max()) < 1
    found = torch.tensor([slots.read(row) for row in logprobs[:, model.places].tolist()])
    torch.testing.assert_close(found, scores, atol=SAME, rtol=0)


@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan])
def test_a_state_that_is_no_number_draws_the_stop(
    plugin: Callable[[str], Any], config: SimpleNamespace, broken: float
) -> None:
    """At the hottest temperature; scores beside it and the rows of others are as they were."""
    model = plugin("model").SafesideLlamaForCausalLM(vllm_config=config)
    model.load_weights([])
    with torch.no_grad():
        states, scores = slots.unpack(model(torch.arange(3), torch.arange(3)), model.state_width)
        model.aligns, model.stop_id = True, 5
        good = model.compute_logits(slots.pack(states, scores))
        states[1, 0] = broken
        found = model.compute_logits(slots.pack(states, scores))
    assert torch.equal(found[[0, 2]], good[[0, 2]])
    assert (found[1] / slots.HOTTEST).softmax(-1)[5] > 1 - 1e-6
    read = torch.tensor(slots.read(found[1].log_softmax(-1)[model.places].tolist()))
    torch.testing.assert_close(read, scores[1], atol=SAME, rtol=0)


def test_a_pooling_engine_gives_the_scores_alone(
    plugin: Callable[[str], Any], config: SimpleNamespace, session_base: Base
) -> None:
    """The scores of the engine that generates are the slow twin."""
    ids, made = torch.arange(7), plugin("model").SafesideLlamaForCausalLM
    generating = made(vllm_config=config)
    pool(config, session_base, "token_classify")
    pooling = made(vllm_config=config)
    for model in (generating, pooling):
        model.load_weights([])
    with torch.no_grad():
        _, wanted = slots.unpack(generating(ids, ids), generating.state_width)
        torch.testing.assert_close(pooling(ids, ids), wanted, atol=0, rtol=0)
    assert (generating.pooler, len(pooling.places)) == (None, 0)
    assert list(pooling.pooler.parts[0]) == ["token_classify"]


def test_a_prompt_that_was_preempted_has_the_rows_of_its_second_reading(plugin: Callable[[str], Any]) -> None:
    """vLLM keeps the rows of a chunk that it reads again."""
    poolers = plugin("pooling").guard_pooler("token_classify").parts[0]
    rows = torch.arange(12.0)[:, None]
    found = poolers["token_classify"].parts[1]([rows, None], SimpleNamespace(prompt_lens=torch.tensor([8, 3])))
    assert found[0].flatten().tolist() == [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]
    assert found[1] is None, "a prompt that is not read to its end"


def test_the_runner_is_the_planned(plugin: Callable[[str], Any], config: SimpleNamespace, session_base: Base) -> None:
    made = plugin("model").SafesideLlamaForCausalLM
    config.model_config.runner_type = "pooling"
    with pytest.raises(UnsupportedError, match="Runner pooling of an engine that was planned to generate"):
        made(vllm_config=config)
    pool(config, session_base, "classify")
    config.model_config.runner_type = "generate"
    with pytest.raises(UnsupportedError, match="Runner generate of an engine that was planned to pool"):
        made(vllm_config=config)


def test_rows_that_draw_for_a_tag_are_kept(plugin: Callable[[str], Any], config: SimpleNamespace) -> None:
    """The slow twin is what the slots carry."""
    model = plugin("model").SafesideLlamaForCausalLM(vllm_config=config)
    model.load_weights([])
    kept = kept_of(config)
    kept.begin("a", is_back=False)
    with torch.no_grad():
        packed = model(torch.arange(7), torch.arange(7))
        kept.expect([Drawn(5, "a", 0)])
        logprobs = model.compute_logits(packed).log_softmax(-1)
        model.compute_logits(packed[:2])  # as for log-probabilities of a prompt: nothing is drawn
    assert kept.take("a")[0] == pytest.approx(slots.read(logprobs[5, model.places].tolist()), abs=SAME)


@pytest.mark.parametrize("extension", ["", "others.Extension"])
def test_an_engine_from_whose_workers_nothing_is_read_is_refused(
    plugin: Callable[[str], Any], config: SimpleNamespace, extension: str
) -> None:
    config.parallel_config.worker_extension_cls = extension
    with pytest.raises(UnsupportedError, match="--worker-extension-cls"):
        plugin("model").SafesideLlamaForCausalLM(vllm_config=config)


def test_adapters_without_weights_are_refused(plugin: Callable[[str], Any], config: SimpleNamespace) -> None:
    """As --load-format dummy leaves them."""
    model = plugin("model").SafesideLlamaForCausalLM(vllm_config=config)
    with pytest.raises(UnsupportedError, match="--load-format"):
        model(torch.arange(7), torch.arange(7))


def test_sampling_from_shards_of_the_batch_is_refused(plugin: Callable[[str], Any], config: SimpleNamespace) -> None:
    """Else it would end at the first request: the scores are no states of a shard."""
    config.parallel_config.enable_batch_sharded_sampling = True
    with pytest.raises(UnsupportedError, match="Batch-sharded sampling: adapters need whole logits"):
        plugin("model").SafesideLlamaForCausalLM(vllm_config=config)


@pytest.mark.parametrize("mode", ["processed_logprobs", "raw_logits", "processed_logits"])
def test_other_log_probabilities_are_refused(plugin: Callable[[str], Any], config: SimpleNamespace, mode: str) -> None:
    config.model_config.logprobs_mode = mode
    with pytest.raises(UnsupportedError, match=f"Log-probabilities as {mode}"):
        plugin("model").SafesideLlamaForCausalLM(vllm_config=config)
