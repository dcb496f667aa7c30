"""The keys of vLLM's own server (``--api-key``, ``VLLM_API_KEY``): what it turns away is not read before it is."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

GUARDED = ("/v1", "/v2", "/inference", "/cohere")
"""Beginnings of the paths for which vLLM asks a key."""


class Keys:
    """Decides as vLLM's ``AuthenticationMiddleware`` does, which stands behind every ``--middleware``."""

    def __init__(self, given: Sequence[str] | None) -> None:
        known = [key for key in (given or [os.environ.get("VLLM_API_KEY", "")]) if key]
        self._digests = [hashlib.sha256(key.encode()).digest() for key in known]

    def turn_away(self, scope: Mapping[str, Any]) -> bool:
        """Whether vLLM answers with HTTP 401: it has keys, asks for one on this path, and was given none of them."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not self._digests or not path.startswith(GUARDED):
            return False
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"").decode("latin-1")
        scheme, _, key = given.partition(" ")
        digest = hashlib.sha256(key.encode()).digest()
        matches = [secrets.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() != "bearer" or not any(matches)
