"""What a request may say of its strength, and the rule as numbers against the library's own policies."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safeside import fixed, ramp, step
from safeside.errors import InputError
from safeside.mixing import Policy
from safeside.vllm_plugin.strengths import NO_NUMBER, READS, Setting, curve, parse_strength, setting_of

THRESHOLDS = {"harm": 0.6, "hate": 0.3}
scores = st.floats(0.0, 1.0, width=32)
strengths = st.floats(0.0, 2.0, width=32)


pairs = st.tuples(strengths, strengths).map(sorted)
rising = st.tuples(scores, scores).map(sorted).filter(lambda pair: pair[1] - pair[0] > 1e-3)


def policies(at: list[float], between: list[float]) -> list[Policy]:
    """One policy of each kind."""
    return [fixed(between[0]), step("harm", at[0], *between), ramp("harm", *at, *between)]


@given(rising, pairs, st.lists(scores, min_size=1, max_size=8))
def test_the_curve_is_the_policy(at: list[float], between: list[float], found: list[float]) -> None:
    for policy in policies(at, between):
        settings = torch.tensor([setting_of(policy, 0, "answer")] * len(found), dtype=torch.float32)
        wanted = policy.strength(torch.tensor(found)).flatten().expand(len(found))
        torch.testing.assert_close(curve(settings, torch.tensor(found)), wanted, atol=2e-4, rtol=0)
        assert float(curve(settings[:1], torch.tensor([NO_NUMBER]))) == pytest.approx(policy.ceiling)


def test_numbers_and_policies_are_read() -> None:
    assert parse_strength(0.5, {}) == parse_strength("0.5", {}) == Setting(0, 0, 0.5, 0.5, 0, READS.index("always"))
    asked = {"policy": "step", "guard": "hate", "high": 1.5, "reads": "both"}
    assert parse_strength(json.dumps(asked), THRESHOLDS) == Setting(0.3, 0.3, 0.0, 1.5, 1, READS.index("both"))
    asked = {"policy": "ramp", "low": 0.2, "ceiling": 0.7}
    assert parse_strength(asked, {"harm": 0.6}) == Setting(0.2, 0.6, 0.0, 0.7, 0, READS.index("prompt"))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (2.5, "must lie in"),
        (-0.1, "must lie in"),
        (float("nan"), "must lie in"),
        (10**400, "must lie in"),
        ("[" * 100_000, "neither a number nor JSON"),
        (True, "number in"),
        (None, "number in"),
        ([0.5], "number in"),
        ("strong", "neither a number nor JSON"),
        ({"policy": "sigmoid", "guard": "harm"}, "no policy"),
        ({"policy": "ramp", "guard": "harm", "speed": 1}, "no policy"),
        ({"policy": "ramp", "guard": "harm", "threshold": 0.5}, "has no threshold"),
        ({"policy": "step", "guard": "harm", "ceiling": 1.0}, "has no ceiling"),
        ({"policy": "ramp", "guard": "nobody"}, "asks guard 'nobody'"),
        ({"policy": "ramp"}, "Name one"),
        ({"policy": "ramp", "guard": "harm", "low": 0.9, "high": 0.1}, "must rise"),
        ({"policy": "step", "guard": "harm", "low": 1.0, "high": 0.5}, "must not weaken"),
    ],
)
def test_what_is_no_strength_is_refused(value: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_strength(value, THRESHOLDS)
