"""What a server counts, for Prometheus.  Labels hold names that operators chose, never a user's text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from safeside.serve.rules import Action

_LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_STRENGTHS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


class Metrics:
    """One server's instruments, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by route and HTTP status.", "route", "status")
        self.tokens = self._counter(
            "tokens", "Tokens by kind: prompts that were judged, and answers to where their clients heard.", "kind"
        )
        self.time_to_first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self.inter_token_latency = self._histogram("inter_token_latency_seconds", "From one token to the next.")
        self.queue_depth = Gauge("safeside_queue_depth", "Requests that wait for the engine.", registry=self.registry)
        self.running = Gauge("safeside_requests_running", "Requests in the engine.", registry=self.registry)
        self.verdicts = self._counter(
            "verdicts", "Texts that a guard judged, by the action that its own rules took.", "guard", "action"
        )
        self.strength = self._histogram("strength", "Strength behind each token of an answer.", buckets=_STRENGTHS)
        self.guard_seconds = self._histogram("guard_seconds", "Time that a guard takes for one pass.", "guard")
        self.guard_failures = self._counter(
            "guard_failures", "Guards that could not score, by kind: error, nan or timeout.", "guard", "kind"
        )
        self.streams_stopped = self._counter("streams_stopped", "Answers that a guard ended.", "guard")
        self.policy_reloads = self._counter(
            "policy_reloads", "Reloads of the policy file: loaded or refused.", "result"
        )
        self.audit_failures = self._counter("audit_failures", "Decisions that could not be made durable.")

    def count_verdicts(self, guards: Iterable[str], actions: Mapping[str, Action]) -> None:
        """Count one text that these guards judged; those that ``actions`` leaves out asked for nothing."""
        for guard in guards:
            self.verdicts.labels(guard, actions.get(guard, "allow")).inc()

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"safeside_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = _LATENCIES) -> Histogram:
        return Histogram(f"safeside_{name}", text, labels, registry=self.registry, buckets=buckets)
