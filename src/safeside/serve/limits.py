"""What one key may use: token buckets of requests and of tokens, and the size of one request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, PositiveInt

from safeside.errors import InputError, LimitError


class Limits(BaseModel):
    """Rates and sizes of one key; None is no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: PositiveInt | None = None
    """A minute's worth may come at once."""
    tokens_per_minute: PositiveInt | None = None
    """Tokens of prompts and answers together."""
    max_prompt_tokens: PositiveInt | None = None
    """Of one request."""
    max_new_tokens: PositiveInt | None = None
    """Of one answer."""


NO_LIMITS = Limits()


@dataclass(slots=True)
class _Bucket:
    """So many are left at this time; it fills at ``rate`` a second up to ``size``."""

    size: float
    left: float
    updated: float

    @property
    def rate(self) -> float:
        return self.size / 60.0

    def fill(self, now: float) -> None:
        self.left = min(self.size, self.left + (now - self.updated) * self.rate)
        self.updated = now

    def wait_s(self, amount: float) -> float:
        """Seconds until ``amount`` is there."""
        return max(0.0, (amount - self.left) / self.rate)


class Admission:
    """One request that was let in, with the tokens set aside for it."""

    def __init__(self, limiter: Limiter, key: str, n_tokens: int) -> None:
        self._limiter = limiter
        self._key = key
        self._n_tokens = n_tokens

    def settle(self, n_used: int) -> None:
        """Give back the tokens that were set aside and not used.  Only the first call counts."""
        unused, self._n_tokens = self._n_tokens - n_used, n_used
        self._limiter.give_back(self._key, unused)


class Limiter:
    """The buckets of all keys.  Safe to use from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._requests: dict[str, _Bucket] = {}
        self._tokens: dict[str, _Bucket] = {}

    def admit(self, key: str, limits: Limits, n_prompt_tokens: int, max_new_tokens: int) -> Admission:
        """Let one request of ``key`` in, its prompt and longest answer set aside.

        Too many at present are a LimitError that says when to come back; what could never be let in is an InputError.
        """
        _check_sizes(limits, n_prompt_tokens, max_new_tokens)
        n_tokens = n_prompt_tokens + max_new_tokens
        with self._lock:
            for bucket, amount in self._open(key, limits, n_tokens):
                bucket.left -= amount
        return Admission(self, key, n_tokens)

    def refuse_used_up(self, key: str, limits: Limits) -> None:
        """Raise the LimitError of ``admit`` where not even the smallest request could be let in; it takes nothing."""
        with self._lock:
            self._open(key, limits, 1)

    def _open(self, key: str, limits: Limits, n_tokens: int) -> list[tuple[_Bucket, int]]:
        """The key's buckets with what one request takes from each; too little in one is a LimitError."""
        wanted = [
            (self._bucket(self._requests, key, limits.requests_per_minute), 1),
            (self._bucket(self._tokens, key, limits.tokens_per_minute), n_tokens),
        ]
        found = [(bucket, amount) for bucket, amount in wanted if bucket is not None]
        wait_s = max((bucket.wait_s(amount) for bucket, amount in found), default=0.0)
        if wait_s > 0:
            raise LimitError(f"This key has used up its share for now. Come back in {wait_s:.1f} s.", wait_s)
        return found

    def give_back(self, key: str, n_tokens: int) -> None:
        """Return tokens that were set aside for a request of ``key``."""
        with self._lock:
            bucket = self._tokens.get(key)
            if bucket is not None:
                bucket.left = min(bucket.size, bucket.left + n_tokens)

    def _bucket(self, buckets: dict[str, _Bucket], key: str, size: int | None) -> _Bucket | None:
        """The key's bucket, filled up to now; a new one is full.  None where there is no limit."""
        if size is None:
            buckets.pop(key, None)
            return None
        now = self._clock()
        bucket = buckets.setdefault(key, _Bucket(size, size, now))
        bucket.size = size  # the file of keys may have changed
        bucket.fill(now)
        return bucket


def _check_sizes(limits: Limits, n_prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise an InputError where a request could never be let in."""
    for what, n_asked, most in (
        ("prompt tokens", n_prompt_tokens, limits.max_prompt_tokens),
        ("new tokens", max_new_tokens, limits.max_new_tokens),
        ("tokens of prompt and answer", n_prompt_tokens + max_new_tokens, limits.tokens_per_minute),
    ):
        if most is not None and n_asked > most:
            raise InputError(f"This request asks for {n_asked:,} {what}; its key allows {most:,}. Ask for less.")
