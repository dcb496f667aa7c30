"""What vLLM calls in each of its processes: the entry point ``vllm.general_plugins``."""

from __future__ import annotations

from vllm import ModelRegistry

from safeside.vllm_plugin import PREFIX


def register() -> None:
    """Make ``Safeside...ForCausalLM`` known for every architecture of vLLM; nothing is imported until one is used."""
    for architecture in list(ModelRegistry.get_supported_archs()):
        if architecture.endswith("ForCausalLM") and not architecture.startswith(PREFIX):
            ModelRegistry.register_model(PREFIX + architecture, f"safeside.vllm_plugin.model:{PREFIX}{architecture}")
