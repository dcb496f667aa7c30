"""Bulk scoring on vLLM.  An engine stands in for vLLM's here; ``test_scorer_engine`` asks vLLM's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from bulk_for_tests import read_jsonl, without_ray
from command_line import Ran, write
from safeside import Message, attach, load_adapter, load_base
from safeside.errors import InputError, UnsupportedError
from safeside.guards.score import Scoring, judge
from safeside.guards.setup import Setup
from safeside.scale.engines import ENGINES
from safeside.vllm_plugin.plan import CONFIG_KEY
from safeside.vllm_plugin.slots import GAP

LONG = " ".join(f"word{number}" for number in range(400))
SAME = 1e-5
SCORER = "safeside.vllm_plugin.scorer"
SPARE = ("<|system|>",)
ROWS = (
    [Message("user", "How do I boil an egg?")],
    [Message("user", "Hello!"), Message("assistant", "I hate you and all of your kind.")],
    [Message("user", LONG)],
    [Message("user", "Write an insult about my neighbour.")],
)


class FakeEngine:
    """What ``vllm.LLM`` gives, by transformers and one prompt at a time."""

    made: ClassVar[list[dict[str, Any]]] = []
    is_masked = False

    def __init__(self, **options: Any) -> None:
        self.made.append(options)
        longest = options.get("max_model_len", 512)
        config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=longest))
        self.llm_engine, self.longest = SimpleNamespace(vllm_config=config), longest
        self.base = load_base(options["model"])
        entries = options["additional_config"][CONFIG_KEY]["adapters"]
        self.guards = [load_adapter(entry["folder"], self.base, allow_mismatch="weights") for entry in entries]

    def generate(self, prompts: Sequence[Any], params: Any, use_tqdm: bool) -> list[Any]:
        assert (params.max_tokens, params.temperature, use_tqdm) == (1, 0.0, False)
        return [self._answer(prompt["prompt_token_ids"], params.logprob_token_ids) for prompt in prompts]

    @torch.no_grad()
    def _answer(self, ids: list[int], slots: Sequence[int]) -> Any:
        assert len(ids) < self.longest, "vLLM needs a place for the token that is drawn"
        with attach(self.base, guards=self.guards) as attached:
            self.base.decoder(input_ids=torch.tensor([ids]), use_cache=False)
            values = [attached.record.scores[guard.name][0, -1] for guard in self.guards]
        told = [-GAP, *(-GAP + float(value) for value in torch.cat(values))]
        step = {slot: SimpleNamespace(logprob=value) for slot, value in zip(slots, told, strict=True)}
        return SimpleNamespace(outputs=[SimpleNamespace(logprobs=[] if self.is_masked else [step])])


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeEngine]]:
    """vLLM's package with the stand-in for its engine."""
    package = ModuleType("vllm")
    for name, value in (
        ("LLM", FakeEngine),
        ("SamplingParams", lambda **values: SimpleNamespace(**values)),
        ("TokensPrompt", dict),
    ):
        monkeypatch.setattr(package, name, value, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setattr("safeside.vllm_plugin.plan.version", lambda name: "0.32.0")
    monkeypatch.setattr(FakeEngine, "made", [])
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "0")
    yield FakeEngine
    del sys.modules[SCORER]  # it holds the stand-in


def plugin() -> ModuleType:
    """The module under test, which needs vLLM to be imported."""
    return importlib.import_module(SCORER)


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize("longest", [512, 200])
def test_scores_are_those_of_the_base_in_windows_a_token_shorter(longest: int) -> None:
    """The slow twin cuts and reads on transformers."""
    setup = Setup(("builtin:harm",), spare_tokens=SPARE, engine_options=(f"max_model_len={longest}",))
    scorer = plugin().make_scorer(setup)
    base = load_base("builtin")
    guard = load_adapter("builtin:harm", base)
    scoring = Scoring(base, [guard], ROWS, limit=longest - 1)
    with attach(base, guards=[guard]) as attached:
        for batch in scoring.batches(1):
            scoring.read(batch, attached)
    wanted, found = scoring.scores(), scorer.score(ROWS)
    for mine, theirs in zip(wanted, found, strict=True):
        assert theirs.by_guard["harm"] == pytest.approx(mine.by_guard["harm"], abs=SAME)
        assert (theirs.n_windows, theirs.place, theirs.problem) == (mine.n_windows, mine.place, mine.problem)
    assert found[2].n_windows > 1
    verdicts = [scorer.verdicts(scores)[0] for scores in found]
    if longest == 512:
        alone = [row[0] for row in judge(base, [guard], [ROWS[0], ROWS[1], ROWS[3]])]
        for one, other in zip(alone, [verdicts[0], verdicts[1], verdicts[3]], strict=True):
            assert (one.flagged, one.threshold, one.mode, one.reason) == (
                other.flagged, other.threshold, other.mode, other.reason,
            )  # fmt: skip


def test_an_engine_that_tells_no_score_flags(fake_vllm: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_vllm, "is_masked", True)
    scorer = plugin().make_scorer(Setup(("builtin:harm",), spare_tokens=SPARE))
    (scores,) = scorer.score([ROWS[0]])
    assert scores.problem == "a score is not a number"
    (verdict,) = scorer.verdicts(scores)
    assert verdict.flagged
    assert "failing closed" in verdict.reason


def test_presets_and_options_reach_the_engine(fake_vllm: type[FakeEngine]) -> None:
    options = ("max_model_len=256", "gpu-memory-utilization=0.5", "quantization=fp8", "enforce_eager=true")
    setup = Setup(("builtin:harm",), preset="strict", spare_tokens=SPARE, engine_options=options)
    scorer = plugin().make_scorer(setup)
    (made,) = fake_vllm.made
    given = {name: made[name] for name in ("max_model_len", "gpu_memory_utilization", "quantization", "enforce_eager")}
    assert given == {
        "max_model_len": 256, "gpu_memory_utilization": 0.5, "quantization": "fp8", "enforce_eager": True,
    }  # fmt: skip
    assert made["dtype"] == "float32"
    base = load_base("builtin")
    strict = load_adapter("builtin:harm", base).with_preset("strict")
    assert scorer.guards[0].thresholds_in("prompt") == strict.thresholds_in("prompt")
    plugin().make_scorer(Setup(("builtin:harm",), spare_tokens=SPARE, device="cuda"))
    assert fake_vllm.made[-1]["dtype"] == "auto"


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("hf_overrides={}", "part of what runs the guards"),
        ("enable-lora=true", "do not run beside it"),
        ("trust_remote_code=true", "no code of a checkpoint"),
        ("tensor_parallel_size=2", "a worker has one accelerator"),
        ("enforce_eager=True", "expected JSON: enforce_eager=true"),
        ("max_model_len", "expected name=value"),
        ("=3", "expected name=value"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_starts(option: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        plugin().settings_of(Setup((), engine_options=(option,)))
    with pytest.raises(InputError, match="given twice"):
        plugin().settings_of(Setup((), engine_options=("max_model_len=1", "max-model-len=2")))


@pytest.mark.usefixtures("fake_vllm")
def test_scores_depend_on_the_engines_options() -> None:
    made = [plugin().settings_of(Setup((), engine_options=options)) for options in ((), ("max_model_len=256",))]
    assert made[0] != made[1]
    assert plugin().settings_of(Setup((), device="cuda")) != made[0]
    assert ENGINES.get("hf").settings_of(Setup(())) == {}


def test_an_engine_that_does_not_start_is_told(fake_vllm: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FakeEngine, **options: Any) -> None:
        raise TypeError("no such argument")

    monkeypatch.setattr(fake_vllm, "__init__", refuse)
    with pytest.raises(InputError, match=r"vLLM did not start with .*no such argument"):
        plugin().make_scorer(Setup(("builtin:harm",), spare_tokens=SPARE, engine_options=("gpu_memory=1",)))


def test_options_for_vllm_are_not_for_transformers() -> None:
    for setup in (Setup((), spare_tokens=("x",)), Setup((), engine_options=("a=1",))):
        with pytest.raises(InputError, match="reads no --spare-token"):
            ENGINES.get("hf").settings_of(setup)


def test_a_release_that_is_not_tested_is_refused(fake_vllm: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safeside.vllm_plugin.plan.version", lambda name: "0.31.2")
    with pytest.raises(UnsupportedError, match=r"vLLM 0\.31\.2 is installed"):
        plugin().settings_of(Setup(()))
    assert fake_vllm.made == []


@pytest.mark.usefixtures("fake_vllm")
def test_a_bulk_run_on_vllm_gives_the_lines_of_one_on_transformers(
    run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    rows = [{"text": "How do I boil an egg?"}, {"prompt": "Hello!", "response": "I hate you."}, {"text": " "}]
    words = ["--input", write(tmp_path / "rows.jsonl", rows), "--guard", "builtin:harm", "--json"]
    for engine, own in (("hf", []), ("vllm", ["--spare-token", *SPARE, "--vllm-option", "max_model_len=400"])):
        assert run("score", *words, "--engine", engine, "--output", tmp_path / engine, *own).code == 1, "a bad row"
    pairs = zip(*(read_jsonl(tmp_path / engine) for engine in ("hf", "vllm")), strict=True)
    for one, other in pairs:
        (mine,), (theirs,) = one.pop("verdicts"), other.pop("verdicts")
        assert one == other
        assert mine.pop("score") == pytest.approx(theirs.pop("score"), abs=SAME)
        assert mine == theirs
    again = run("score", *words, "--engine", "hf", "--output", tmp_path / "vllm")
    assert (again.code, "engine" in again.err) == (2, True), again.err
