"""The configuration of an engine on vLLM, and how such an engine tells scores."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from references import reference
from safeside import make_config
from safeside.vllm_plugin.plan import CONFIG_KEY, AdapterEntry, EngineConfig

MODELS = SimpleNamespace(base_model_paths=[SimpleNamespace(name=name) for name in ("toy", "small")])
SLOTS = (300, 301, 302, 303)


def engine(*, aligner: bool = True) -> EngineConfig:
    guard = make_config(reference(), kind="lst", role="guard", name="harm", labels=("harm", "hate"), width=32)
    configs = [guard, make_config(reference(), kind="lst", role="align", name="refuse", width=32)]
    entries = [AdapterEntry(folder="nowhere", content="c", config=config) for config in configs[: 1 + aligner]]
    return EngineConfig(base=reference().fingerprint, adapters=tuple(entries), slots=SLOTS[: 3 + aligner])


def application(
    config: EngineConfig,
    *,
    client: object = None,
    n_copies: int = 1,
    parser: str | None = None,
    reasoning: str = "",
    keys: Sequence[str] | None = None,
) -> SimpleNamespace:
    """What a middleware sees of vLLM's server."""
    vllm_config = SimpleNamespace(
        additional_config={CONFIG_KEY: config.as_json()},
        model_config=SimpleNamespace(tokenizer="nowhere"),
        parallel_config=SimpleNamespace(data_parallel_size=n_copies),
        structured_outputs_config=SimpleNamespace(reasoning_parser=reasoning),
    )
    args = SimpleNamespace(api_key=keys, tool_call_parser=parser)
    state = SimpleNamespace(vllm_config=vllm_config, openai_serving_models=MODELS, engine_client=client, args=args)
    return SimpleNamespace(state=state)


def slots_of(step: Sequence[float]) -> dict[int, float]:
    return dict(zip(SLOTS, [-60.0, *(-60.0 + value for value in step)], strict=True))


def chat_entry(step: Sequence[float]) -> dict[str, Any]:
    tops = [{"token": f"token_id:{slot}", "logprob": value, "bytes": []} for slot, value in slots_of(step).items()]
    return {"token": "token_id:9", "logprob": -0.5, "bytes": [104, 105], "top_logprobs": tops}
