"""What Triton's interpreter does not do by itself, for vLLM's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder

_store = InterpreterBuilder.create_masked_store


def _masked_store(self: Any, ptrs: Any, value: Any, mask: Any, cache_policy: Any) -> Any:
    mask.data = mask.data.astype(np.bool_)
    return _store(self, ptrs, value, mask, cache_policy)


def mend() -> None:
    """One bit that is spread over a block becomes whole numbers there, which are refused as a mask: make them bits."""
    InterpreterBuilder.create_masked_store = _masked_store
