"""Configurations: what is refused, and what comes back from JSON."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from references import reference
from safeside import Base, make_config
from safeside.adapters.config import (
    AdapterConfig,
    BaseReference,
    Calibration,
    ProbabilityMap,
    reference_of,
    require_valid,
)
from safeside.errors import ConfigError

GUARD = {"kind": "lst", "role": "guard", "name": "harm", "layers": (0, 3), "width": 64, "labels": ("harm",)}
ALIGNER = {**GUARD, "role": "align", "labels": ()}

PROMISE = {"threshold": (0.5,), "false_positive_rate": 0.05}
PROMISE_OF_TWO = {**PROMISE, "threshold": (0.5, 0.5)}
MAP = {"method": "platt", "error_before": 0.1, "error_after": 0.1, "n_harmless": 30, "n_harmful": 30}
MODE = {"n_harmless": 60}
STEPS = {**MAP, "method": "isotonic", "knots": [0], "levels": [0.5]}
MODES = {"prompt": {**MODE, "presets": {"strict": PROMISE}, "maps": [STEPS]}}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({**GUARD, "labels": ()}, "at least one label"),
        ({**GUARD, "labels": ("hate", "hate")}, "labels must differ"),
        ({**ALIGNER, "labels": ("harm",)}, "no labels"),
        ({**ALIGNER, "base": reference(is_encoder=True)}, "encoder"),
        ({**GUARD, "role": "judge"}, "role"),
        ({**GUARD, "name": ""}, "name"),
        ({**GUARD, "layers": ()}, "not empty"),
        ({**GUARD, "layers": (3, 1)}, "rising"),
        ({**GUARD, "layers": (1, 1)}, "rising"),
        ({**GUARD, "layers": (-1, 1)}, r"0\.\.3"),
        ({**GUARD, "layers": (0, 4)}, r"0\.\.3"),
        ({**GUARD, "width": 0}, "multiple of head_dim 32"),
        ({**GUARD, "width": 48}, "multiple of head_dim 32; got 48"),
        ({**GUARD, "width": 96, "head_dim": 64}, "multiple of head_dim 64"),
        ({**GUARD, "head_dim": 16}, "head_dim"),
        ({**GUARD, "width": 96, "query_group": 2}, "multiple of head_dim 32 times query_group 2; got 96"),
        ({**GUARD, "query_group": 0}, "query_group"),
        ({**GUARD, "width": -32}, "width"),
        ({**GUARD, "tap_rank": -1}, "tap_rank"),
        ({**GUARD, "bottleneck": 0}, "bottleneck"),
        ({**GUARD, "readout": "mean"}, "readout"),
        ({**GUARD, "gate": "token"}, "gate"),
        ({**GUARD, "deepness": 2}, "deepness"),
        (
            {**GUARD, "calibration": {"scale": (1, 1), "bias": (0, 0), "threshold": (0.5, 0.5)}},
            "2 entries for 1 ",
        ),
        ({**GUARD, "calibration": {"scale": (1,), "bias": (0, 0), "threshold": (0.5,)}}, "one entry for each label"),
        (
            {**GUARD, "modes": {"prompt": {**MODE, "presets": {"strict": PROMISE_OF_TWO}}}},
            "modes.prompt has 2 entries for 1 ",
        ),
        ({**GUARD, "modes": {"prompt": {**MODE, "promise": PROMISE_OF_TWO}}}, "modes.prompt has 2 entries for 1 "),
        ({**GUARD, "modes": {"prompt": {**MODE, "maps": [MAP, MAP]}}}, "modes.prompt has 2 entries for 1 "),
        ({**ALIGNER, "modes": {"prompt": {**MODE, "maps": [MAP]}}}, "modes.prompt has 1 entries for 0 labels"),
        ({**GUARD, "modes": {"later": MODE}}, "modes.later"),
        ({**GUARD, "modes": {"prompt": {**MODE, "presets": {"lax": PROMISE}}}}, "presets.lax"),
        ({**GUARD, "modes": {"prompt": {**MODE, "promise": {**PROMISE, "threshold": (1.5,)}}}}, "threshold"),
        ({**GUARD, "modes": {"prompt": MODE}, "preset": "strict"}, "preset 'strict' is in none of the modes"),
        ({**ALIGNER, "calibration": {"scale": (1,), "bias": (0,), "threshold": (0.5,)}}, "1 entries for 0 labels"),
    ],
)
def test_mistakes_are_config_errors(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        require_valid({"base": reference(), **values})


@pytest.mark.parametrize("field", ["scale", "bias", "threshold"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_calibration_is_finite(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        Calibration(**{"scale": (1.0,), "bias": (0.0,), "threshold": (0.5,), field: (value,)})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "isotonic"}, "an isotonic map has knots"),
        ({"knots": (0.0,), "levels": (0.0,)}, "and no other has any"),
        ({"method": "isotonic", "knots": (0.0, 0.5), "levels": (0.1,)}, "a level for each"),
        ({"method": "isotonic", "knots": (0.5, 0.2), "levels": (0.1, 0.3)}, "knots must rise"),
        ({"method": "isotonic", "knots": (0.5, 0.5), "levels": (0.1, 0.3)}, "knots must rise"),
        ({"method": "isotonic", "knots": (0.2, 0.5), "levels": (0.4, 0.3)}, "levels must not fall"),
        ({"method": "isotonic", "knots": (0.2,), "levels": (1.4,)}, "less than or equal to 1"),
        ({"slope": 0.0}, "slope"),
        ({"slope": float("inf")}, "slope"),
        ({"n_harmful": 0}, "n_harmful"),
    ],
)
def test_a_map_never_falls(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ProbabilityMap.model_validate({**MAP, **values})


def test_json_gives_the_same_configuration() -> None:
    config = require_valid(
        {"base": reference(), **GUARD, "calibration": None, "gate": "channel", "modes": MODES, "preset": "strict"}
    )
    assert AdapterConfig.model_validate_json(config.model_dump_json()) == config


def test_a_configuration_does_not_change() -> None:
    config = require_valid({"base": reference(), **GUARD})
    with pytest.raises(ValidationError, match="frozen"):
        config.width = 32


def test_a_reference_describes_its_base(tiny_base: Base) -> None:
    assert reference_of(tiny_base) == BaseReference(
        name=tiny_base.name,
        model_type="llama",
        fingerprint=tiny_base.fingerprint,
        n_layers=tiny_base.n_layers,
        d_model=tiny_base.d_model,
    )


def test_make_config_fills_what_is_usual() -> None:
    wide = reference(n_layers=4, d_model=1024)
    guard, aligner = make_config(wide), make_config(wide, role="align")
    assert (guard.layers, guard.width, guard.labels) == ((0, 1, 2, 3, 4), 64, ("harm",))
    assert (aligner.layers, aligner.width, aligner.labels) == ((0, 1, 2, 3, 4), 64, ())
    assert make_config(wide, reduction=8, head_dim=64).width == 128
    assert make_config(wide, reduction=8, query_group=3).width == 96
    with pytest.raises(ConfigError, match="query_group"):
        make_config(wide, query_group=0)
    assert make_config(wide, reduction=1000).width == 32
    assert make_config(wide, width=96, labels=("a", "b")).labels == ("a", "b")
    assert make_config(wide, kind="rtb").layers == (0, 1, 2, 3, 4)
