"""The compiler's half: there to be found, never asked."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget


class Compiler(BaseBackend):
    """Compiles nothing."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, options: dict[str, Any]) -> dict[str, Any]:
        return options

    def add_stages(self, stages: dict[str, Any], options: object, language: object) -> None:
        raise NotImplementedError("Set TRITON_INTERPRET=1: this back end compiles nothing.")

    def load_dialects(self, context: object) -> None:
        return None

    def get_module_map(self) -> dict[str, Any]:
        return {}
