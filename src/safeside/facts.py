"""What ``safeside info`` says."""

from __future__ import annotations

from safeside.adapters.sizing import adapter_matmuls, base_matmuls, flops_share
from safeside.artifact import base_of, find_adapter, load_adapter, read_config, read_provenance
from safeside.base.model import load_base

TARGET_SHARE = 0.01


def base_facts(name: str) -> dict[str, object]:
    """Layers, widths, cost and fingerprint of a base."""
    base = load_base(name)
    return {
        "base": base.name,
        "architecture": base.model.config.model_type,
        "family": base.family.name,
        "role": "encoder (guards only)" if base.is_encoder else "causal language model",
        "n_layers": base.n_layers,
        "d_model": base.d_model,
        "parameters": sum(parameter.numel() for parameter in base.model.parameters()),
        "context_tokens": base.max_tokens,
        "matmuls_per_token": base_matmuls(base),
        "fingerprint": str(base.fingerprint),
        "has_chat_template": base.tokenizer.chat_template is not None,
    }


def adapter_facts(name: str, base_name: str | None, allow_mismatch: str | None = None) -> dict[str, object]:
    """An adapter's dimensions, its exact share of the base's compute, thresholds and provenance."""
    folder = find_adapter(name)
    config, made = read_config(folder), read_provenance(folder)
    base = base_of(name, base_name)
    adapter = load_adapter(name, base, allow_mismatch=allow_mismatch)
    share = flops_share(base, adapter)
    verdict = "within 1%" if share <= TARGET_SHARE else f"{share / TARGET_SHARE:.1f} times the 1% target"
    return {
        "adapter": config.name,
        "kind": config.kind,
        "role": config.role,
        "base": f"{config.base.name} ({config.base.fingerprint})",
        "layers": list(config.layers),
        "width": config.width,
        **({"query_group": config.query_group} if config.query_group > 1 else {}),
        "labels": list(config.labels),
        "thresholds": list(adapter.thresholds),
        **{f"mode {mode}": found.summary for mode, found in config.modes.items()},
        "parameters": sum(parameter.numel() for parameter in adapter.parameters()),
        "matmuls_per_token": adapter_matmuls(adapter),
        "flops_share": share,
        "cost": f"{share:.4%} of the base's compute: {verdict}",
        **({"provenance": made} if made else {}),
    }
