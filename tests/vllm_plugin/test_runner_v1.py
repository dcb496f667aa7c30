"""The logits processor that follows requests."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from safeside.errors import UnsupportedError


@pytest.mark.parametrize("is_v2", [False, True])
def test_a_base_without_its_adapters_is_refused(plugin: Callable[[str], Any], is_v2: bool) -> None:
    """As a second --hf-overrides starts it: ordinary logits would be read as scores."""
    config = SimpleNamespace(
        use_v2_model_runner=is_v2, model_config=SimpleNamespace(architectures=["LlamaForCausalLM"])
    )
    with pytest.raises(UnsupportedError, match="runs LlamaForCausalLM, without its guards and aligners"):
        plugin("runner_v1").Strengths(config, "cpu")
    config.model_config.architectures = ["SafesideLlamaForCausalLM"]
    config.use_v2_model_runner = True
    plugin("runner_v1").Strengths(config, "cuda")
