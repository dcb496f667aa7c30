"""Which adapter it was: a hash of its configuration and weights as they are in memory."""

from __future__ import annotations

import hashlib

import torch

from safeside.adapters.adapter import Adapter

_DIGITS = 16


def fingerprint_of(adapter: Adapter) -> str:
    """16 hexadecimal digits."""
    digest = hashlib.sha256(adapter.config.model_dump_json().encode())
    for name, tensor in sorted(adapter.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]
