"""What vLLM is told of at its start."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest


def test_architectures_are_registered_in_the_tested_release(plugin: Callable[[str], Any]) -> None:
    plugin("register").register()
    models = sys.modules["vllm"].ModelRegistry.models
    assert models["SafesideLlamaForCausalLM"].target == "safeside.vllm_plugin.model:SafesideLlamaForCausalLM"
    assert "SafesideBertModel" not in models


def test_another_release_is_told_and_left_alone(
    plugin: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything of ours is imported that could miss a part of vLLM; engines without adapters start as ever."""
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.33.1")
    plugin("register").register()
    assert not any(name.startswith("Safeside") for name in sys.modules["vllm"].ModelRegistry.models)
    assert "vLLM 0.33.1 is installed; the plugin is tested with 0.32" in capsys.readouterr().err
