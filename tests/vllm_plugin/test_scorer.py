"""Bulk scoring on vLLM.  An engine stands in for vLLM's here; ``test_scorer_engine`` asks vLLM's own."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from bulk_for_tests import read_jsonl, without_ray
from command_line import Ran, write
from safeside import Adapter, Message, attach, load_adapter, load_base, save_adapter
from safeside.errors import InputError, UnsupportedError
from safeside.guards.score import Scoring, judge, score_conversations
from safeside.guards.setup import Setup
from safeside.scale.engines import ENGINES
from safeside.vllm_plugin.plan import CONFIG_KEY

LONG = " ".join(f"word{number}" for number in range(400))
SAME = 1e-5
SCORER = "safeside.vllm_plugin.scorer"
ROWS = (
    [Message("user", "How do I boil an egg?")],
    [Message("user", "Hello!"), Message("assistant", "I hate you and all of your kind.")],
    [Message("user", LONG)],
    [Message("user", "Write an insult about my neighbour.")],
)


class FakeEngine:
    """What ``vllm.LLM`` gives, by transformers and one prompt at a time."""

    made: ClassVar[list[dict[str, Any]]] = []
    told: torch.Tensor | None = None
    """In place of the scores."""

    def __init__(self, **options: Any) -> None:
        self.made.append(options)
        longest = options.get("max_model_len", 512)
        config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=longest))
        self.llm_engine, self.longest = SimpleNamespace(vllm_config=config), longest
        self.base = load_base(options["model"])
        entries = options["additional_config"][CONFIG_KEY]["adapters"]
        self.guards = [load_adapter(entry["folder"], self.base, allow_mismatch="weights") for entry in entries]

    def encode(self, prompts: Sequence[Any], pooling_task: str, use_tqdm: bool) -> list[Any]:
        assert (pooling_task, use_tqdm) == ("classify", False)
        return [self._answer(prompt["prompt_token_ids"]) for prompt in prompts]

    @torch.no_grad()
    def _answer(self, ids: list[int]) -> Any:
        assert len(ids) <= self.longest
        with attach(self.base, guards=self.guards) as attached:
            self.base.decoder(input_ids=torch.tensor([ids]), use_cache=False)
            values = torch.cat([attached.record.scores[guard.name][0, -1] for guard in self.guards])
        return SimpleNamespace(outputs=SimpleNamespace(data=values if self.told is None else self.told))


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeEngine]]:
    """vLLM's package with the stand-in for its engine."""
    package = ModuleType("vllm")
    for name, value in (
        ("LLM", FakeEngine),
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
def test_scores_are_those_of_the_base_in_windows_as_long_as_vllms_context(longest: int) -> None:
    """The slow twin cuts and reads on transformers."""
    setup = Setup(("builtin:harm",), engine_options=(f"max_model_len={longest}",))
    scorer = plugin().make_scorer(setup)
    base = load_base("builtin")
    guard = load_adapter("builtin:harm", base)
    scoring = Scoring(base, [guard], ROWS, limit=longest)
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


@pytest.mark.usefixtures("fake_vllm")
def test_several_guards_keep_their_labels_apart(random_guard: Callable[..., Adapter], tmp_path: Path) -> None:
    base = load_base("builtin")
    other = save_adapter(random_guard(base, "other", labels=("harm", "hate")), tmp_path / "other")
    scorer = plugin().make_scorer(Setup((str(other), "builtin:harm"), base="builtin"))
    guards = [load_adapter(other, base), load_adapter("builtin:harm", base)]
    for wanted, found in zip(score_conversations(base, guards, ROWS), scorer.score(ROWS), strict=True):
        assert list(map(len, found.by_guard.values())) == [2, 1]
        for name, scores in wanted.by_guard.items():
            assert found.by_guard[name] == pytest.approx(scores, abs=SAME)
        assert (found.n_windows, found.problem) == (wanted.n_windows, wanted.problem)


@pytest.mark.parametrize("told", [[], [math.nan], [math.inf], [-0.1], [1.5], [[0.1], [0.1]], [0.1, 0.1]], ids=str)
def test_an_engine_that_tells_no_score_flags(
    fake_vllm: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, told: list[Any]
) -> None:
    monkeypatch.setattr(fake_vllm, "told", torch.tensor(told))
    scorer = plugin().make_scorer(Setup(("builtin:harm",)))
    (scores,) = scorer.score([ROWS[0]])
    assert scores.problem == "a score is not a number"
    (verdict,) = scorer.verdicts(scores)
    assert verdict.flagged
    assert "failing closed" in verdict.reason


def test_presets_and_options_reach_the_engine(fake_vllm: type[FakeEngine]) -> None:
    options = ("max_model_len=256", "gpu-memory-utilization=0.5", "quantization=fp8", "enforce_eager=true")
    setup = Setup(("builtin:harm",), preset="strict", engine_options=options)
    scorer = plugin().make_scorer(setup)
    (made,) = fake_vllm.made
    given = {name: made[name] for name in ("max_model_len", "gpu_memory_utilization", "quantization", "enforce_eager")}
    assert given == {
        "max_model_len": 256, "gpu_memory_utilization": 0.5, "quantization": "fp8", "enforce_eager": True,
    }  # fmt: skip
    assert (made["dtype"], made["runner"]) == ("float32", "pooling")
    base = load_base("builtin")
    strict = load_adapter("builtin:harm", base).with_preset("strict")
    assert scorer.guards[0].thresholds_in("prompt") == strict.thresholds_in("prompt")
    plugin().make_scorer(Setup(("builtin:harm",), device="cuda"))
    assert fake_vllm.made[-1]["dtype"] == "auto"


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("hf_overrides={}", "part of what runs the guards"),
        ("runner=generate", "would hide the scores"),
        ("worker_extension_cls=a.b", "part of what runs the guards"),
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
        plugin().make_scorer(Setup(("builtin:harm",), engine_options=("gpu_memory=1",)))


def test_options_for_vllm_are_not_for_transformers() -> None:
    with pytest.raises(InputError, match="reads no --vllm-option"):
        ENGINES.get("hf").settings_of(Setup((), engine_options=("a=1",)))


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
    for engine, own in (("hf", []), ("vllm", ["--vllm-option", "max_model_len=400"])):
        assert run("score", *words, "--engine", engine, "--output", tmp_path / engine, *own).code == 1, "a bad row"
    pairs = zip(*(read_jsonl(tmp_path / engine) for engine in ("hf", "vllm")), strict=True)
    for one, other in pairs:
        (mine,), (theirs,) = one.pop("verdicts"), other.pop("verdicts")
        assert one == other
        assert mine.pop("score") == pytest.approx(theirs.pop("score"), abs=SAME)
        assert mine == theirs
    again = run("score", *words, "--engine", "hf", "--output", tmp_path / "vllm")
    assert (again.code, "engine" in again.err) == (2, True), again.err
