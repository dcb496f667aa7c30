"""What vLLM calls in each of its processes: the entry point ``vllm.general_plugins``."""

from __future__ import annotations

from vllm import ModelRegistry
from vllm import __version__ as vllm_version

from safeside.errors import UnsupportedError
from safeside.terminal import note
from safeside.vllm_plugin import PREFIX
from safeside.vllm_plugin.plan import check_version


def register() -> None:
    """Make ``Safeside...ForCausalLM`` known for every architecture of vLLM; nothing is imported until one is used.

    In another release of vLLM they stay unknown, so it refuses to start with them, and other engines start as ever.
    """
    try:
        check_version(vllm_version)
    except UnsupportedError as error:
        note(f"{PREFIX} architectures are not registered: {error}")
        return
    for architecture in list(ModelRegistry.get_supported_archs()):
        if architecture.endswith("ForCausalLM") and not architecture.startswith(PREFIX):
            ModelRegistry.register_model(PREFIX + architecture, f"safeside.vllm_plugin.model:{PREFIX}{architecture}")
