"""Ports: maps that are exact where they can be, distillation that agrees, thresholds that flag as often as before."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.normalizers import Replace

from safeside import Adapter, Base, Message, attach, create_adapter, load_adapter, load_base, make_config, save_adapter
from safeside.adapters.config import Calibration, ModeCalibration, Promise
from safeside.adapters.sizing import flops_share
from safeside.artifact import CARD_FILE, PROVENANCE_FILE
from safeside.base.top import described
from safeside.errors import ConfigError, InputError, MismatchError, UnsupportedError
from safeside.guards.score import score_conversations
from safeside.train import port as port_module
from safeside.train.port import (
    Port,
    answered,
    best_method,
    calibrate_like,
    flagged_share,
    label_correlations,
    port_adapter,
)
from safeside.train.port_command import PortOptions, port_command
from safeside.train.port_map import Maps, ported_config
from safeside.train.port_text import Method, PortSettings, PortText, Side, read_text
from safeside.train.taps import TapStore, record_states
from safeside.types import Example, Mode
from tiny import CHAT_TEMPLATE, make_tiny
from twin import hash_of

WORDS = ("cat", "mat", "sat", "then", "they", "said", "how", "be", "hat", "the", "other", "there")
EXACT = 2e-3  # a small ridge, float32 states, and a trunk of several layers behind the fitted projections
MAP = PortSettings(method="map", ridge=1e-9)
DISTILL = PortSettings(method="distill", epochs=4, batch_size=8, max_new_tokens=4)


def texts(n: int, seed: int = 0) -> list[Example]:
    generator = random.Random(seed)
    some = [" ".join(generator.choices(WORDS, k=generator.randint(2, 9))) for _ in range(n)]
    return [Example((Message("user", text),)) for text in some]


def write(path: Path, rows: list[Example]) -> Path:
    path.write_text("\n".join(json.dumps({"text": row.messages[0].content}) for row in rows))
    return path


def scores(base: Base, guard: Adapter, some: list[Example]) -> np.ndarray:
    return np.array([row.by_guard["harm"][0] for row in score_conversations(base, [guard], [r.messages for r in some])])


@pytest.fixture
def guard(tiny_base: Base, random_guard: Callable[..., Adapter]) -> Adapter:
    made = random_guard(tiny_base)
    some = scores(tiny_base, made, texts(60, 9))
    made.set_calibration(Calibration(scale=(1.0,), bias=(0.0,), threshold=(float(np.quantile(some, 0.7)),)))
    return made


# ---- maps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"kind": "lst"}, {"kind": "lst", "layers": (2,)}, {"kind": "plr", "width": 32}])
def test_a_map_to_the_same_base_is_the_identity(
    tiny_base: Base, random_guard: Callable[..., Adapter], options: dict[str, object]
) -> None:
    """The old projections are the exact solution, and with enough text it is the only one."""
    old = random_guard(tiny_base, **options)
    done = port_adapter((tiny_base, old), tiny_base, texts(120), MAP)
    assert done.agreement > 1 - 1e-4
    assert np.abs(scores(tiny_base, done.adapter, texts(20, 5)) - scores(tiny_base, old, texts(20, 5))).max() < EXACT
    assert done.n_pairs > 0
    assert (done.n_rows, done.n_left_out) == (120, 0)


def test_a_fitted_projection_is_ordinary_least_squares(
    tiny_base: Base, tiny_family: Callable[[str], Base], guard: Adapter, tmp_path: Path
) -> None:
    """The slow twin: numpy's lstsq on the states of both bases, row by row, for the lowest tap."""
    new_base = tiny_family("gpt2")
    rows = read_text(tiny_base, new_base, texts(40), MAP)
    student = create_adapter(new_base, ported_config(guard.config, new_base))
    sides = [
        Side(base, adapter, some.ids, TapStore.build(base, some.ids, adapter.config.layers, tmp_path))
        for base, adapter, some in ((tiny_base, guard, rows.old), (new_base, student, rows.new))
    ]
    ridge = 1e-3
    Maps(*sides, rows.pairs, ridge).fold()
    inputs, targets = [], []
    for row, pairs in enumerate(rows.pairs):
        states = [record_states(side.base, side.batch([row]), (0,))[0] for side in sides]
        wanted = guard.trunk.taps["0"](states[0])[0].detach().numpy()
        given = torch.nn.functional.rms_norm(states[1][0], (new_base.d_model,), eps=1e-6).numpy()
        inputs += [np.append(given[second], 1.0) for _, second in pairs]
        targets += [wanted[first] for first, _ in pairs]
    matrix = np.array(inputs, np.float64)
    penalty = np.full(matrix.shape[1], ridge * (matrix[:, :-1] ** 2).sum(0).mean())
    penalty[-1] = 1e-9 * len(matrix)  # the bias
    stacked = np.vstack([matrix, np.diag(penalty**0.5)])
    expected, *_ = np.linalg.lstsq(stacked, np.vstack([targets, np.zeros((len(penalty), guard.config.width))]))
    fitted = student.trunk.taps["0"].project[0]
    found = np.vstack([fitted.weight.detach().numpy().T, fitted.bias.detach().numpy()])
    assert np.abs(found - expected).max() < EXACT


def test_a_map_to_another_base_carries_part_of_the_guard(
    tiny_base: Base, tiny_family: Callable[[str], Base], guard: Adapter
) -> None:
    base = tiny_family("gpt2")
    done = port_adapter((tiny_base, guard), base, texts(500), PortSettings(method="map"))
    fresh = port_adapter((tiny_base, guard), base, texts(500), replace(DISTILL, epochs=1, learning_rate=1e-9))
    assert done.agreement > abs(fresh.agreement) + 0.1
    assert done.adapter.config.base.fingerprint == base.fingerprint


@pytest.mark.parametrize(("n_layers", "expected"), [(1, (0, 1)), (2, (0, 1, 2)), (3, (0, 1, 2, 3)), (6, (0, 2, 4, 6))])
def test_taps_stay_at_their_relative_depth(
    tiny_base: Base, guard: Adapter, tmp_path: Path, n_layers: int, expected: tuple[int, ...]
) -> None:
    """Shallower bases lose rungs, deeper ones are tapped as often as before; maps work on all of them."""
    from transformers import AutoModelForCausalLM

    from tiny import tiny_config, tiny_tokenizer

    config = tiny_config("llama")
    config.num_hidden_layers, config.hidden_size = n_layers, 32
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = load_base(tmp_path)
    assert ported_config(guard.config, base).layers == expected
    done = port_adapter((tiny_base, guard), base, texts(100), PortSettings(method="map"))
    assert np.isfinite(scores(base, done.adapter, texts(5))).all()


@pytest.mark.parametrize(("layers", "size"), [(None, 0.6), ((1, 3), 0.3)])
def test_a_port_of_a_size_is_the_largest_that_keeps_it(
    tiny_base: Base, tiny_family: Callable[[str], Base], random_guard: Callable[..., Adapter],
    layers: tuple[int, ...] | None, size: float,
) -> None:  # fmt: skip
    """As many taps where the old one leaves layers out, all layers where it reads all."""
    old, base = random_guard(tiny_base, layers=layers, width=64), tiny_family("gpt2")
    assert ported_config(old.config, base).width == 64
    wide = ported_config(old.config, base, 10.0)
    assert (wide.width, wide.layers) == (base.d_model, ported_config(old.config, base).layers)
    narrow = ported_config(old.config, base, size)
    assert (narrow.width, narrow.head_dim) == (32, old.config.head_dim)
    grouped = ported_config(old.config.model_copy(update={"query_group": 2}), base, size)
    assert (grouped.width, grouped.query_group) == (64, 2)  # the narrowest there is
    assert narrow.base.fingerprint == base.fingerprint
    done = port_adapter((tiny_base, old), base, texts(100), replace(DISTILL, size=size, epochs=1))
    assert flops_share(base, done.adapter) <= size
    assert (done.adapter.config.width, done.adapter.config.layers) == (32, narrow.layers)
    with pytest.raises(UnsupportedError, match="a size is for --method distill"):
        port_adapter((tiny_base, old), base, texts(100), replace(MAP, size=0.6))
    with pytest.raises(ConfigError, match="share of the base's compute above 0"):
        ported_config(old.config, base, 0.0)
    with pytest.raises(ConfigError, match=r"for kinds lst and lst_plus; got 0\.1 for 'plr'"):
        ported_config(random_guard(tiny_base, kind="plr").config, base, 0.1)


@pytest.mark.parametrize("options", [{"feed_forward": 512}, {"labels": tuple(f"label{index}" for index in range(40))}])
def test_what_a_port_of_a_size_keeps_of_the_old_one_counts(
    tiny_base: Base,
    tiny_family: Callable[[str], Base],
    random_guard: Callable[..., Adapter],
    options: dict[str, object],
) -> None:
    """All labels; a feed-forward of the old width would take the whole of a small budget."""
    old, base = random_guard(tiny_base, width=64, **options), tiny_family("gpt2")
    made = create_adapter(base, ported_config(old.config, base, 0.6))
    assert made.config.labels == old.config.labels
    assert flops_share(base, made) <= 0.6
    wider = create_adapter(base, made.config.model_copy(update={"width": made.config.width + 32}))
    assert flops_share(base, wider) > 0.6


@pytest.mark.parametrize("options", [{"kind": "rtb"}, {"kind": "plr"}])
def test_kinds_as_wide_as_the_base_have_no_map(
    tiny_base: Base, tiny_family: Callable[[str], Base], random_guard: Callable[..., Adapter], options: dict[str, str]
) -> None:
    old = random_guard(tiny_base, **options)
    assert best_method(old) == "distill"
    with pytest.raises(UnsupportedError, match="Use --method distill"):
        port_adapter((tiny_base, old), tiny_family("gpt2"), texts(100), PortSettings())
    done = port_adapter((tiny_base, old), tiny_family("gpt2"), texts(100), DISTILL)
    assert done.n_pairs == 0


# ---- distillation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["distill", "both"])
def test_a_distilled_guard_agrees_with_the_old_one(
    tiny_base: Base, tiny_family: Callable[[str], Base], guard: Adapter, method: str
) -> None:
    base = tiny_family("gpt2")
    before = hash_of(tiny_base.model), hash_of(base.model)
    settings = PortSettings(method=method, epochs=8, batch_size=16, learning_rate=5e-3)
    done = port_adapter((tiny_base, guard), base, texts(240), settings)
    assert done.agreement > 0.3  # random bases: the old states of a text say little of the new ones
    assert (hash_of(tiny_base.model), hash_of(base.model)) == before
    assert not any(parameter.requires_grad for parameter in done.adapter.parameters())


def test_flag_rates_are_matched(tiny_base: Base, tiny_family: Callable[[str], Base], guard: Adapter) -> None:
    base = tiny_family("bert")
    done = port_adapter((tiny_base, guard), base, texts(400), PortSettings(method="map"))
    chosen = rows_of(read_text(tiny_base, base, texts(400), PortSettings()), "choosing")
    before, after = (
        float((scores(*side, chosen) >= side[1].thresholds[0]).mean())
        for side in ((tiny_base, guard), (base, done.adapter))
    )
    assert before - 1 / len(chosen) <= after <= before
    assert before > 0
    noise = 4 * (0.3 * 0.7 / done.n_measured) ** 0.5  # four standard deviations of a rate of 0.3
    assert abs(done.flagged[1] - done.flagged[0]) < noise


def rows_of(text: PortText, part: str) -> list[Example]:
    return [text.old.examples[row] for row in {"choosing": text.choosing, "measured": text.measured}[part]]


@pytest.mark.parametrize("n", [100, 137, 1000])
def test_no_row_serves_twice(tiny_base: Base, n: int) -> None:
    given = [
        replace(row, messages=(Message("user", f"{place} {row.messages[0].content}"),))
        for place, row in enumerate(texts(n))
    ]
    text = read_text(tiny_base, tiny_base, given, DISTILL)
    assert [*range(text.n_learnt), *text.choosing, *text.measured] == list(range(n))
    assert len(text.choosing) == len(text.measured) == n // 5
    again = read_text(tiny_base, tiny_base, [*given, *given[:40]], DISTILL)
    assert again.n_rows == n  # a copy could stand in two parts


@pytest.mark.parametrize("method", ["map", "distill", "both"])
def test_rows_to_measure_on_serve_nothing_else(
    tiny_base: Base, tiny_family: Callable[[str], Base], guard: Adapter, method: Method
) -> None:
    """With other such rows the ported guard is the same to the last digits, and only its figures are others."""
    base, given = tiny_family("gpt2"), texts(120)
    settings = PortSettings(method=method, epochs=3, batch_size=16, learning_rate=5e-3)
    measured = rows_of(read_text(tiny_base, base, given, settings), "measured")
    others = iter(texts(len(measured), 77))
    swapped = [next(others) if any(row is one for one in measured) else row for row in given]
    first, second = (port_adapter((tiny_base, guard), base, some, settings) for some in (given, swapped))
    assert first.n_measured == len(measured) == 24
    for name, tensor in first.adapter.state_dict().items():
        assert (tensor - second.adapter.state_dict()[name]).abs().max() < EXACT
    calibrations = [done.adapter.config.calibration for done in (first, second)]
    for field in ("scale", "bias", "threshold"):
        assert getattr(calibrations[0], field) == pytest.approx(getattr(calibrations[1], field), abs=EXACT)
    assert abs(first.agreement - second.agreement) > 10 * EXACT


def test_figures_are_those_of_the_rows_to_measure_on(
    tiny_base: Base, tiny_family: Callable[[str], Base], guard: Adapter
) -> None:
    """The slow twin: both guards attached to their bases."""
    base = tiny_family("gpt2")
    done = port_adapter((tiny_base, guard), base, texts(160), MAP)
    some = rows_of(read_text(tiny_base, base, texts(160), MAP), "measured")
    both = [scores(*side, some) for side in ((tiny_base, guard), (base, done.adapter))]
    odds = [np.log(found / (1 - found)) for found in both]
    assert done.correlations == (pytest.approx(np.corrcoef(*odds)[0, 1], abs=EXACT),)
    assert done.agreement == done.correlations[0]
    flagged = [(found >= side.thresholds[0]).mean() for found, side in zip(both, (guard, done.adapter), strict=True)]
    assert done.flagged == pytest.approx(flagged)


@pytest.mark.parametrize("settings", [MAP, DISTILL], ids=["map", "distill"])
def test_a_guard_is_calibrated_as_it_is_stored(
    tiny_base: Base, tiny_family: Callable[[str], Base], guard: Adapter, tmp_path: Path, settings: PortSettings
) -> None:
    """Rounded first: a threshold stands 2e-6 above a row, and rounding moves scores by a thousand times that."""
    base, some = tiny_family("gpt2"), texts(40, 3)
    done = port_adapter((tiny_base, guard), base, texts(120), settings, dtype=torch.bfloat16)
    stored = load_adapter(save_adapter(done.adapter, tmp_path / "ported", base, dtype=torch.bfloat16), base)
    assert stored.thresholds == done.adapter.thresholds
    assert np.abs(scores(base, stored, some) - scores(base, done.adapter, some)).max() < 1e-6
    whole = port_adapter((tiny_base, guard), base, texts(120), settings)
    assert np.abs(scores(base, whole.adapter, some) - scores(base, done.adapter, some)).max() > 1e-4


def test_a_constant_guard_has_no_correlation() -> None:
    rising = np.arange(20.0)
    old, new = np.stack([rising, rising, rising], 1), np.stack([rising, -rising, np.zeros(20)], 1)
    assert label_correlations(old, new) == (pytest.approx(1), pytest.approx(-1), pytest.approx(math.nan, nan_ok=True))


def test_a_port_that_follows_too_little_says_so_label_by_label(
    tiny_base: Base, random_guard: Callable[..., Adapter]
) -> None:
    done = port_adapter((tiny_base, random_guard(tiny_base, labels=("a", "finance"))), tiny_base, texts(100), MAP)
    assert done.warning is None
    assert replace(done, correlations=(0.5, 0.5)).warning is None
    low = replace(done, correlations=(0.499, math.nan)).warning
    assert "over 20 held-out rows" in low
    assert "0.499 (a), undefined (finance); expected at least 0.5" in low
    assert "(a)" not in replace(done, correlations=(0.9, -0.5)).warning


def test_calibration_copies_mean_spread_and_rate(tiny_base: Base, guard: Adapter) -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(400, 1))
    new = create_adapter(tiny_base, guard.config)
    modes: list[Mode] = ["prompt", "answer"] * 200
    calibrate_like(new, guard, logits, 3 * logits - 5, modes)
    assert new.config.calibration.scale[0] == pytest.approx(1 / 3)
    assert new.config.calibration.bias[0] == pytest.approx(5 / 3)
    assert new.config.calibration.false_positive_rate is None  # that was measured on the old guard
    rates = flagged_share(guard, logits, modes), flagged_share(new, 3 * logits - 5, modes)
    assert 0 < rates[0] == pytest.approx(rates[1], abs=1 / 400)
    rare = guard.config.calibration.model_copy(update={"threshold": (0.999999,)})
    guard.set_calibration(rare)
    calibrate_like(new, guard, logits, logits, modes)
    assert flagged_share(guard, logits, modes) == flagged_share(new, logits, modes) == 0
    assert new.thresholds == (0.999999,)
    promise = Promise(threshold=(0.8,), false_positive_rate=0.05)
    guard.set_mode("answer", ModeCalibration(n_harmless=60, promise=promise))
    noisy = logits + generator.normal(size=(400, 1))
    calibrate_like(new, guard, logits, noisy, modes)
    scores = [1 / (1 + np.exp(-some[1::2, 0])) for some in (logits, noisy)]
    scaled = new.config.calibration.scale[0] * noisy[1::2, 0] + new.config.calibration.bias[0]
    flagged = (1 / (1 + np.exp(-scaled)) >= new.thresholds_in("answer")[0]).mean()
    assert 0 < flagged <= (scores[0] >= 0.8).mean()  # of the answers alone, at the answers' threshold
    assert new.thresholds_in("prompt") == new.thresholds == (0.999999,)


def test_rows_that_a_base_cannot_read_whole_are_counted(
    tiny_base: Base, tiny_family: Callable[[str], Base], guard: Adapter
) -> None:
    odd = [Example((Message("user", "the cat " * 200),)), Example((Message("user", "say <|assistant|> now"),))]
    assert port_adapter((tiny_base, guard), tiny_family("gpt2"), [*texts(100), *odd], MAP).n_left_out == 2
    assert port_adapter((tiny_base, guard), tiny_family("gpt2"), [*texts(100), *odd], DISTILL).n_left_out == 1


BLANK = [Example((Message("user", text),)) for text in (" \n", "\u200b\u200d", "\u2800\ufeff ")]


@pytest.mark.parametrize("settings", [MAP, DISTILL], ids=["map", "distill"])
def test_rows_without_text_are_left_out_as_a_guard_leaves_them_unscored(
    tiny_base: Base, tiny_family: Callable[[str], Base], guard: Adapter, settings: PortSettings
) -> None:
    scored = score_conversations(tiny_base, [guard], [row.messages for row in BLANK])
    assert all("holds no text" in str(row.problem) for row in scored)
    for name in ("gpt2", "bert"):
        done = port_adapter((tiny_base, guard), tiny_family(name), [*texts(120), *BLANK], replace(settings, epochs=1))
        assert (done.n_rows, done.n_left_out) == (120, 3)


def test_prompts_without_text_are_not_answered(
    tiny_base: Base, sibling: Base, random_aligner: Callable[..., Adapter]
) -> None:
    rows = [*texts(120), *BLANK]
    done = port_adapter((tiny_base, random_aligner(tiny_base)), sibling, rows, replace(DISTILL, epochs=1))
    assert (done.n_rows, done.n_left_out) == (120, 3)


def test_text_that_a_tokenizer_makes_nothing_of_is_left_out(
    tiny_base: Base, tiny_family: Callable[[str], Base], guard: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_family("bert")
    monkeypatch.setattr(base.tokenizer.backend_tokenizer, "normalizer", Replace("hat", ""))
    odd = Example((Message("user", "hat"),))
    done = port_adapter((tiny_base, guard), base, [*texts(120), odd], replace(DISTILL, epochs=1))
    assert done.n_left_out == 1


def test_too_little_text_is_refused(tiny_base: Base, guard: Adapter) -> None:
    for some in ([], texts(99)):
        with pytest.raises(
            InputError, match=f"can read {len(some)} of {len(some)} rows of text; expected at least 100"
        ):
            port_adapter((tiny_base, guard), tiny_base, some, MAP)


# ---- aligners --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sibling(tmp_path: Path) -> Base:
    """Another architecture with the tiny llama's tokenizer and template."""
    return load_base(make_tiny("mistral", tmp_path / "sibling"))


def test_an_aligner_is_ported_where_the_tokenizer_is_shared(
    tiny_base: Base, sibling: Base, random_aligner: Callable[..., Adapter]
) -> None:
    aligner = random_aligner(tiny_base)
    before = port_adapter((tiny_base, aligner), sibling, texts(100), replace(DISTILL, epochs=1, learning_rate=1e-9))
    done = port_adapter((tiny_base, aligner), sibling, texts(100), replace(DISTILL, epochs=6, learning_rate=1e-2))
    assert 0 < done.agreement < 0.9 * before.agreement
    with attach(sibling, [done.adapter]):
        assert sibling.chat([Message("user", "the cat")], max_new_tokens=3).strength


def test_prompts_get_the_aligned_bases_own_answers(tiny_base: Base, random_aligner: Callable[..., Adapter]) -> None:
    aligner = random_aligner(tiny_base)
    given = Example((Message("user", "hi"), Message("assistant", "no")))
    rows = answered(tiny_base, aligner, [*texts(3), given], 4)
    with attach(tiny_base, [aligner]):
        expected = [tiny_base.chat(row.messages, max_new_tokens=4).text for row in texts(3)]
    assert rows[0] == given
    assert [row.messages[-1].content for row in rows[1:]] == [text for text in expected if text]


def test_aligners_of_other_tokenizers_templates_and_methods_are_refused(
    tiny_base: Base, tiny_family: Callable[[str], Base], random_aligner: Callable[..., Adapter], sibling: Base
) -> None:
    aligner = random_aligner(tiny_base)
    assert best_method(aligner) == "distill"
    with pytest.raises(UnsupportedError, match="cannot be ported by maps"):
        port_adapter((tiny_base, aligner), sibling, texts(100), PortSettings())
    with pytest.raises(UnsupportedError, match="is an encoder"):
        port_adapter((tiny_base, aligner), tiny_family("bert"), texts(100), DISTILL)
    with pytest.raises(MismatchError, match="has another tokenizer"):
        port_adapter((tiny_base, aligner), load_base("builtin"), texts(100), DISTILL)
    sibling.tokenizer.chat_template = CHAT_TEMPLATE.replace("<|end|>", "<|eos|>")
    with pytest.raises(MismatchError, match="other tokens"):
        port_adapter((tiny_base, aligner), sibling, texts(100), DISTILL)


@pytest.mark.parametrize("options", [{"depth": 2}, {"depth": 2, "lora_rank": 4}], ids=["full", "lora"])
def test_duplicated_blocks_become_those_of_the_new_base(
    tiny_base: Base, random_aligner: Callable[..., Adapter], tmp_path: Path, options: dict[str, int]
) -> None:
    """From the same relative depth up, whatever the new base's depth and width."""
    aligner = random_aligner(tiny_base, kind="toplayers", **options)
    changes = {"num_hidden_layers": 6, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    base = load_base(make_tiny("mistral", tmp_path / "deeper", **changes))
    before = port_adapter((tiny_base, aligner), base, texts(120), replace(DISTILL, epochs=1, learning_rate=1e-9))
    done = port_adapter((tiny_base, aligner), base, texts(120), replace(DISTILL, learning_rate=1e-2))
    config = done.adapter.config
    assert (config.depth, config.layers, config.blocks) == (4, (2,), described(base))
    assert done.agreement < 0.9 * before.agreement
    loaded = load_adapter(save_adapter(done.adapter, tmp_path / "ported", base), base)
    with attach(base, [loaded]):
        assert base.chat([Message("user", "the cat")], max_new_tokens=3).strength


def test_a_base_without_blocks_for_an_aligner_is_refused_before_any_answer(
    tiny_base: Base, random_aligner: Callable[..., Adapter], sibling: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: object) -> None:
        raise AssertionError("answers were written before the kind was looked at")

    def unlike(*_: object) -> None:
        raise UnsupportedError("their place in the stack counts")

    aligner = random_aligner(tiny_base, kind="toplayers", depth=1)
    monkeypatch.setattr("safeside.train.port.answered", answer)
    monkeypatch.setattr("safeside.base.top.Top.check_same", unlike)
    with pytest.raises(UnsupportedError, match="place in the stack"):
        port_adapter((tiny_base, aligner), sibling, texts(120), DISTILL)


def test_an_aligners_rows_without_an_answer_are_counted(
    tiny_base: Base, sibling: Base, random_aligner: Callable[..., Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that leave no room, prompts that the template refuses, and prompts that are answered with nothing."""
    aligner = random_aligner(tiny_base)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    for base in (tiny_base, sibling):
        monkeypatch.setattr(base.tokenizer, "chat_template", refusing)
    long = Example((Message("user", "the " * (tiny_base.max_tokens - 10)),))
    refused = Example((Message("system", "be good"), Message("user", "how")))
    given = [replace(row, messages=(*row.messages, Message("assistant", "no"))) for row in texts(120)]
    assert len(tiny_base.encode(long.messages).ids) < tiny_base.max_tokens
    done = port_adapter(
        (tiny_base, aligner), sibling, [*given, long, refused], replace(DISTILL, max_new_tokens=9, epochs=1)
    )
    assert (done.n_rows, done.n_left_out) == (120, 2)
    terse = random_aligner(tiny_base, kind="toplayers", depth=2, lora_rank=4)
    asked = port_adapter((tiny_base, terse), sibling, texts(120), replace(DISTILL, epochs=1))
    assert asked.n_rows + asked.n_left_out == 120
    assert asked.n_rows == len(answered(tiny_base, terse, texts(120), 4)) < 120


def test_answers_are_written_only_where_enough_rows_can_have_one(
    tiny_base: Base, sibling: Base, random_aligner: Callable[..., Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: object) -> None:
        raise AssertionError("answers were written for too few rows")

    aligner = random_aligner(tiny_base)
    monkeypatch.setattr("safeside.train.port.answered", answer)
    long = [Example((Message("user", "the " * tiny_base.max_tokens),))] * 120
    with pytest.raises(InputError, match="can read 5 of 125 rows"):
        port_adapter((tiny_base, aligner), sibling, [*texts(5), *long], DISTILL)


def test_rows_that_a_base_refuses_are_left_out_and_counted(
    tiny_base: Base, sibling: Base, random_guard: Callable[..., Adapter]
) -> None:
    refused = Example((Message("system", "be good"), Message("user", "how")))
    sibling.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    )
    done = port_adapter((tiny_base, random_guard(tiny_base)), sibling, [*texts(100), refused], MAP)
    assert (done.n_rows, done.n_left_out) == (100, 1)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_folder_says_where_it_came_from(
    tiny_base: Base, tiny_folder: Callable[[str], Path], guard: Adapter, tmp_path: Path
) -> None:
    source = save_adapter(guard, tmp_path / "harm", tiny_base, dtype=torch.bfloat16)
    text, output = write(tmp_path / "text.jsonl", texts(100)), tmp_path / "ported"
    summary = port_command(str(source), PortOptions(str(tiny_folder("gpt2")), text, output, "map"))
    stamp = json.loads((output / PROVENANCE_FILE).read_text())
    assert stamp["ported from"].startswith("harm on ")
    assert str(tiny_base.fingerprint) in stamp["ported from"]
    assert (stamp["port method"], stamp["port rows"], stamp["port text"]) == ("map", "100", "text.jsonl")
    assert summary["port held-out correlation"] == stamp["port held-out correlation"]
    base = load_base(tiny_folder("gpt2"))
    assert np.isfinite(scores(base, load_adapter(output, base), texts(3))).all()
    with pytest.raises(InputError, match="exists already"):
        port_command(str(source), PortOptions(str(tiny_folder("gpt2")), text, output))


def test_a_port_that_takes_much_more_of_its_base_says_so(
    tiny_base: Base, tiny_folder: Callable[[str], Path], random_guard: Callable[..., Adapter], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = save_adapter(random_guard(tiny_base, width=64), tmp_path / "harm", tiny_base)
    text, target = write(tmp_path / "text.jsonl", texts(100)), tiny_folder("gpt2")
    told: dict[float, str] = {}
    for much in (1e-3, 1e3):  # more than nothing, and never
        monkeypatch.setattr("safeside.train.port_command._MUCH_MORE", much)
        summary = port_command(str(source), PortOptions(str(target), text, tmp_path / f"at {much}", "map"))
        told[much] = capsys.readouterr().err
    base = load_base(target)
    new, old = (
        f"{flops_share(some, load_adapter(folder, some)):.4%}"
        for some, folder in ((base, tmp_path / "at 1000.0"), (tiny_base, source))
    )
    assert summary["port share of compute"] == f"{new} of the new base; the old one {old} of its own"
    assert "--method distill --size 0.01" in told[1e-3]
    assert "compute" not in told[1e3]
    port_command(str(source), PortOptions(str(target), text, tmp_path / "small", size=0.6))
    assert load_adapter(tmp_path / "small", base).config.width == 32
    assert "compute" not in capsys.readouterr().err
    port_command(str(source), PortOptions(str(target), text, tmp_path / "smallest", size=0.001))
    assert "of the new base's compute, not 0.10%: none is narrower" in capsys.readouterr().err


def test_a_reloaded_port_flags_what_its_card_says(
    tiny_base: Base, tiny_folder: Callable[[str], Path], guard: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scores are those that it was calibrated by, in the dtype of the old folder."""
    made: list[Port] = []

    def port(*words: object, **options: object) -> Port:
        made.append(port_adapter(*words, **options))
        return made[-1]

    monkeypatch.setattr("safeside.train.port_command.port_adapter", port)
    source = save_adapter(guard, tmp_path / "harm", tiny_base, dtype=torch.bfloat16)
    text, output = write(tmp_path / "text.jsonl", texts(120)), tmp_path / "ported"
    port_command(str(source), PortOptions(str(tiny_folder("gpt2")), text, output, "map"))
    base = load_base(tiny_folder("gpt2"))
    found = [scores(base, guard, texts(120)) for guard in (made[0].adapter, load_adapter(output, base))]
    assert np.abs(found[0] - found[1]).max() < 1e-6


def test_a_port_not_to_rely_on_is_told_and_on_the_card(
    tiny_base: Base, tiny_folder: Callable[[str], Path], guard: Adapter, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def ported(correlation: float) -> tuple[dict[str, object], Path, str]:
        def port(*words: object, **options: object) -> Port:
            return replace(port_adapter(*words, **options), correlations=(correlation,))

        monkeypatch.setattr("safeside.train.port_command.port_adapter", port)
        output = tmp_path / f"ported {correlation}"
        summary = port_command(str(source), PortOptions(str(tiny_folder("gpt2")), text, output, "map"))
        return summary, output, capsys.readouterr().err

    source, text = save_adapter(guard, tmp_path / "harm", tiny_base), write(tmp_path / "text.jsonl", texts(100))
    summary, output, told = ported(-0.006)
    warning = str(summary["port held-out warning"])
    assert "is -0.006 (harm); expected at least 0.5" in warning
    assert f"Warning: {warning}" in told
    assert json.loads((output / PROVENANCE_FILE).read_text())["port held-out warning"] == warning
    assert warning in (output / CARD_FILE).read_text()
    summary, _, told = ported(0.9)
    assert "port held-out warning" not in summary
    assert "Warning" not in told
    assert summary["port held-out rows"] == "20"


def test_the_default_folder_is_named_after_adapter_and_base(
    tiny_base: Base, tiny_folder: Callable[[str], Path], guard: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = save_adapter(guard, tmp_path / "source", tiny_base), write(tmp_path / "text.jsonl", texts(100))
    target = tiny_folder("gpt2")
    options = PortOptions(str(target), text, method="map")
    monkeypatch.chdir(tmp_path)
    assert port_command(str(source), options)["adapter"] == f"harm-on-{target.name}"
    assert load_adapter(tmp_path / f"harm-on-{target.name}", load_base(target)).name == "harm"
    with pytest.raises(InputError, match=f"harm-on-{target.name} exists already"):
        port_command(str(source), options)


def test_bad_calls_are_refused(
    tiny_base: Base, tiny_folder: Callable[[str], Path], guard: Adapter, tmp_path: Path
) -> None:
    source, empty = save_adapter(guard, tmp_path / "harm", tiny_base), write(tmp_path / "empty.jsonl", [])
    options = PortOptions(str(tiny_folder("gpt2")), empty, tmp_path / "ported")
    with pytest.raises(InputError, match="holds no usable row"):
        port_command(str(source), options)
    text = write(tmp_path / "text.jsonl", texts(100))
    with pytest.raises(InputError, match="no method 'maps'; expected one of map, distill, both"):
        port_command(str(source), replace(options, text=text, method="maps"))


def test_layers_without_a_base_of_their_own_stay_sorted(tiny_base: Base, tiny_family: Callable[[str], Base]) -> None:
    config = make_config(tiny_base, layers=(1, 3), reduction=2)
    assert ported_config(config, tiny_family("gpt2")).layers == (1, 3)


@pytest.mark.parametrize("after", [(0.1, 0.2, 0.6, 0.9), (0.1, 0.2, 0.3, 0.4), (0.9, 0.9, 0.6, 0.6)])
def test_a_threshold_that_flagged_nothing_flags_nothing(after: tuple[float, ...]) -> None:
    before, new = np.array([0.1, 0.2, 0.3, 0.4]), np.array(after)
    found = port_module._matched(0.5, before, new)
    assert not (new >= found).any()
    assert found >= 0.5
    assert (found == 0.5) == (max(after) < 0.5)
