"""The overhead bench on a tiny geometry: what is timed is what it says, and goals are judged at the upper end."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import overhead
import overhead_variants
from overhead import Settings, goals_of, seconds_of
from overhead_variants import Guarded, Plan, SecondPass, WithStandalone, build, random_base, tapped_config
from safeside.adapters.adapter import Adapter
from safeside.adapters.sizing import flops_share
from safeside.train.taps import Batch
from tidy import figure_row
from tiny import VOCABULARY, tiny_config
from workers import numbers_alone

SMALL = Settings(n_tokens=8, n_steps=3, pairs=3, threads=1)
SAME = 1e-5  # float32 in another order


KEEPS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import overhead, torch
assert overhead.tune_memory(overhead.KEEP_MEMORY)
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.fixture(autouse=True)
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the allocator would be told: this process goes on after the bench, with its memory as ever."""
    told: list[object] = []
    monkeypatch.setattr(overhead, "tune_memory", lambda options: bool(told.append(options)))
    return told


@pytest.fixture
def geometry(monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny llama as a geometry, in float32."""

    def opened(name: str, device: str, dtype: str) -> object:
        assert (name, device, dtype) == ("tiny", "cpu", "bfloat16")
        return random_base(tiny_config("llama"), name, device, torch.float32)

    monkeypatch.setattr(overhead_variants, "open_base", opened)
    return "tiny"


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))


def mask(ids: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(ids)


@torch.no_grad()
def test_variants_share_their_weights_and_nothing_else(geometry: str, ids: torch.Tensor) -> None:
    variants = build(Plan(geometry, ("base", "guard", "second_pass", "standalone")))
    weights = [variant.base.model.get_input_embeddings().weight for variant in variants.values()]
    assert all(weight is weights[0] for weight in weights)
    plain = variants["base"].base.decoder(input_ids=ids)[0]
    assert all(torch.equal(variant.base.decoder(input_ids=ids)[0], plain) for variant in variants.values())
    assert variants["base"].base.attachment is None
    assert variants["guard"].base.attachment is not None


@torch.no_grad()
def test_decoding_goes_on_from_the_prompt(geometry: str, ids: torch.Tensor) -> None:
    """Each guard's judgement after one step is that of the whole text at once."""
    variants = build(Plan(geometry, ("guard", "second_pass", "standalone")))
    last = ids[:, -1:]

    guard = variants["guard"]
    assert isinstance(guard, Guarded)
    guard.step(last, mask(ids), guard.prefill(ids[:, :-1]))
    stepped = guard.attachment.record.scores["harm"][:, -1]
    guard.prefill(ids)
    torch.testing.assert_close(stepped, guard.attachment.record.scores["harm"][:, -1], rtol=SAME, atol=SAME)

    second = variants["second_pass"]
    assert isinstance(second, SecondPass)
    for name, tensor in second.tuned.named_parameters():
        if "lora_B" in name:  # zero at the start: a second pass would be the first
            tensor.fill_(0.1)
    cache = second.prefill(ids[:, :-1])[1]
    stepped = second._judge(last, mask(ids), cache)
    whole = second.head(second.tuned(input_ids=ids, output_hidden_states=True).hidden_states[-1][:, -1]).sigmoid()
    torch.testing.assert_close(stepped, whole, rtol=SAME, atol=SAME)

    standalone = variants["standalone"]
    assert isinstance(standalone, WithStandalone)
    stepped = standalone._judge(last, mask(ids), standalone.prefill(ids[:, :-1])[1])[:, -1]
    whole = standalone.model(Batch((0, 1), ids, mask(ids).bool())).output.scores
    torch.testing.assert_close(stepped, whole[:, -1], rtol=SAME, atol=SAME)


@torch.no_grad()
def test_a_timing_leaves_the_caches_as_they_were(geometry: str, ids: torch.Tensor) -> None:
    for variant in build(Plan(geometry, ("base", "guard", "second_pass", "standalone"))).values():
        caches = variant.prefill(ids)
        assert seconds_of(variant, ids, SMALL, caches) > 0
        assert [cache.get_seq_length() for cache in caches] == [8] * len(caches)


def test_fewer_taps_cost_no_more(geometry: str) -> None:
    config = overhead_variants.config_of("Qwen2.5-0.5B")
    base = overhead_variants.geometry_base(config)
    shares = {}
    for n_taps in (None, 12, 3, 1):
        made = tapped_config(base, n_taps)
        with torch.device("meta"):
            shares[n_taps] = flops_share(base, Adapter(made))
        assert made.layers[-1] == 24
        assert len(made.layers) == (n_taps or 25)
    assert all(0.007 < share <= 0.01 for share in shares.values())  # widths come in steps of 32
    assert tapped_config(base, 3, 4).query_group == 4


def test_a_geometry_is_as_large_as_its_checkpoint(geometry: str) -> None:
    """A head that is tied takes nothing of its own."""
    base = random_base(tiny_config("llama", tie_word_embeddings=True), "tied", "cpu", torch.float32)
    assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    variants = build(Plan(geometry, ("base", "guard_2_group_1_every_3")))
    assert isinstance(variants["guard_2_group_1_every_3"], Guarded)
    assert variants["guard_2_group_1_every_3"].attachment.judge_every == 3


def test_a_goal_is_met_at_the_upper_end_only() -> None:
    def row(variant: str, geometry: str, value: float, high: float) -> dict[str, object]:
        labels = {"geometry": geometry, "phase": "prefill", "batch": 1, "variant": variant}
        return figure_row(labels, "ratio_to_base", value, (value, high))

    rows = [row("guard", "x", 1.01, 1.02), row("guard", "x", 1.01, 1.04), row("guard", "builtin", 2.0, 2.0)]
    goals = goals_of([*rows, row("second_pass", "x", 2.0, 2.1), row("guard_3", "x", 1.0, 1.01)])
    assert [(goal["goal"], goal["met"]) for goal in goals] == [(1.03, True), (1.03, False), (1.03, True)]


def test_it_writes_every_row(
    tmp_path: Path, geometry: str, monkeypatch: pytest.MonkeyPatch, tuned: list[object]
) -> None:
    small = ["--tokens", "8", "--steps", "2", "--pairs", "2", "--threads", "1", "--batches", "1", "2"]
    small += [
        "--geometries",
        geometry,
        "--taps",
        "2",
        "--groups",
        "1",
        "--every",
        "2",
        "--output",
        str(tmp_path),
        "--parts",
    ]
    path = overhead.main([*small, "time"])
    result = json.loads(path.read_text())
    found = {(row["phase"], row["batch"], row["variant"], row["metric"]) for row in result["rows"]}
    beside = ("guard", "second_pass", "standalone", "guard_2", "guard_2_group_1")
    cases = [(phase, batch) for phase in ("prefill", "decode") for batch in (1, 2)]
    assert found == {
        *((*case, name, metric) for case in cases for name in beside for metric in ("ratio_to_base", "flops_share")),
        *((*case, name, "seconds") for case in cases for name in ("base", *beside)),
        *(
            ("decode", batch, f"{name}_every_2", metric)
            for batch in (1, 2)
            for name in ("guard", "guard_2", "guard_2_group_1")
            for metric in ("ratio_to_base", "flops_share", "seconds")
        ),
    }
    goals = result["notes"]["parts"]["time"]["notes"]["goals"]
    assert {goal["metric"] for goal in goals} == {"ratio_to_base", "flops_share"}
    assert all(row["low"] <= row["value"] <= row["high"] for row in result["rows"])

    monkeypatch.setattr(overhead, "_peaks", lambda plan, name, batch, settings: [100, 200, 9_700_000])
    both = json.loads(overhead.main([*small, "peaks"]).read_text())  # the rows of the other part stay
    assert [row for row in both["rows"] if row["part"] == "time"] == result["rows"]
    assert {row["metric"] for row in both["rows"] if row["part"] == "peaks"} == {"peak_bytes", "peak_ratio"}
    assert {goal["metric"] for goal in both["notes"]["parts"]["peaks"]["notes"]["goals"]} == {"peak_ratio"}
    assert tuned == [overhead.KEEP_MEMORY]  # for times, and not for what starts the processes of peaks


@pytest.mark.parametrize("every", ["1", "3", "0"])
def test_groups_that_no_timing_holds_whole_are_refused(every: str) -> None:
    with pytest.raises(SystemExit, match=rf"--every {every} is not a number above 1 that divides --steps 4\."):
        overhead.main(["--steps", "4", "--every", every, "--parts", "time"])


def test_a_process_prints_its_peaks(geometry: str, capsys: pytest.CaptureFixture[str], tuned: list[object]) -> None:
    overhead.print_peaks(
        {"geometry": geometry, "dtype": "bfloat16", "name": "guard", "batch": 1, "settings": asdict(SMALL)}
    )
    prompt, decoding, share = map(int, capsys.readouterr().out.split())
    assert min(prompt, decoding) > 50 * 2**20  # the libraries alone take more
    guarded = build(Plan(geometry, ("guard",)))["guard"]
    assert share == round(guarded.extra_matmuls * 1e9) > 0
    assert tuned == [overhead.GIVE_BACK_AT_ONCE]


def test_peaks_are_the_lowest_of_a_variant_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "base": iter([[100, 210, 0], [110, 200, 0], [120, 220, 0]]),
        "guard": iter([[105, 220, 9_730_001], [101, 230, 9_730_001], [104, 240, 9_730_001]]),
    }
    monkeypatch.setattr(overhead, "_peaks", lambda plan, name, batch, settings: next(found[name]))
    rows = overhead.peak_rows(Plan("x", ("base", "guard")), 1, SMALL)
    ratios = {row["phase"]: row["value"] for row in rows if row["metric"] == "peak_ratio"}
    assert ratios == {"prefill": 1.01, "decode": 1.1}
    assert {row["variant"]: row["flops_share"] for row in rows} == {"base": 0.0, "guard": 0.009730001}


def test_the_first_round_tells_how_long_the_others_take(geometry: str, capsys: pytest.CaptureFixture[str]) -> None:
    overhead.measure(build(Plan(geometry, ("base",))), "prefill", 2, SMALL)
    assert "prefill batch 2: 3 rounds will take about 0.0 minutes" in capsys.readouterr().err


def test_a_prompt_longer_than_the_base_holds_is_refused(geometry: str) -> None:
    variants = build(Plan(geometry, ("base",)))
    with pytest.raises(SystemExit, match="holds 256 tokens; expected 300"):
        overhead.measure(variants, "prefill", 1, Settings(n_tokens=300, n_steps=3, pairs=1))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_peak_is_that_of_the_process_and_not_of_its_parent() -> None:
    ballast = np.ones(150_000_000)  # 1.2 GB, which the parent holds when the child begins
    job = {
        "geometry": "builtin",
        "dtype": "bfloat16",
        "name": "base",
        "batch": 1,
        "settings": asdict(Settings(16, 1, 1, threads=1)),
    }
    peaks = numbers_alone(Path(overhead.__file__), job)
    assert len(peaks) == 3
    assert all(100e6 < peak < ballast.nbytes for peak in peaks[:2])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is kept is up to glibc")
def test_a_process_can_keep_what_it_frees() -> None:
    """80 MB are 20,000 pages, asked for anew each time unless they are kept."""
    command = [sys.executable, "-W", "error", "-c", KEEPS, str(Path(overhead.__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100


def test_what_a_process_held_before_is_forgotten() -> None:
    block = torch.ones(50_000_000)
    before = overhead._peak_bytes("cpu")
    del block
    overhead._forget_peak("cpu")
    assert overhead._peak_bytes("cpu") < before - 150_000_000
