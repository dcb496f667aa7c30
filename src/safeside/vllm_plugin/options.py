"""Options of a vLLM engine that scores in bulk, as people write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from safeside.errors import InputError

_PLANNED = "it is part of what runs the guards"
OWN_OPTIONS = {
    **dict.fromkeys(("model", "tokenizer", "hf_overrides", "additional_config"), _PLANNED),
    **dict.fromkeys(("logits_processors", "worker_extension_cls"), _PLANNED),
    **dict.fromkeys(("runner", "convert", "pooler_config"), "it would hide the scores"),
    **dict.fromkeys(("speculative_config", "spec_method", "enable_lora"), "guards do not run beside it"),
    **dict.fromkeys(("tensor_parallel_size", "pipeline_parallel_size"), "a worker has one accelerator"),
    "trust_remote_code": "no code of a checkpoint is ever run",
}
"""Arguments of ``vllm.LLM`` that cannot be given, and why not."""


def engine_options(given: Sequence[str]) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` from ``name=value``, a value being JSON (``true``, not ``True``) or else text.

    What has no ``=``, a name that is given twice, and those of OWN_OPTIONS are an InputError.
    """
    found: dict[str, Any] = {}
    for item in given:
        name, sign, value = item.partition("=")
        name = name.strip().replace("-", "_")
        if not sign or not name.isidentifier():
            raise InputError(f"{item!r} is no option of vLLM; expected name=value, such as max_model_len=4096.")
        if name in OWN_OPTIONS:
            raise InputError(f"{name!r} is not for scoring in bulk: {OWN_OPTIONS[name]}. Leave it out.")
        if name in found:
            raise InputError(f"{name!r} is given twice. Give it once.")
        found[name] = _value(name, value)
    return found


def _value(name: str, text: str) -> Any:
    if text in ("True", "False", "None"):
        raise InputError(
            f"{name}={text} is Python; expected JSON: {name}={ {'None': 'null'}.get(text, text.lower()) }."
        )
    try:
        return json.loads(text)
    except ValueError:
        return text
