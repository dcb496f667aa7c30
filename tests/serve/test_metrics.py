"""Every instrument, its labels, and a registry of its own."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from safeside.serve.metrics import Metrics


def families(metrics: Metrics) -> dict[str, set[str]]:
    """By name the labels that its samples carry."""
    found = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        found[family.name] = {label for sample in family.samples for label in sample.labels} - {"le"}
    return found


def test_what_is_counted_and_by_what() -> None:
    metrics = Metrics()
    metrics.requests.labels(route="/v1/chat/completions", status="200").inc()
    metrics.tokens.labels(kind="answer").inc(3)
    metrics.verdicts.labels(guard="harm", action="block").inc()
    metrics.guard_seconds.labels(guard="harm").observe(0.01)
    metrics.guard_failures.labels(guard="harm", kind="nan").inc()
    metrics.streams_stopped.labels(guard="harm").inc()
    metrics.policy_reloads.labels(result="refused").inc()
    assert {name: labels for name, labels in families(metrics).items() if not name.endswith("_created")} == {
        "safeside_requests": {"route", "status"},
        "safeside_tokens": {"kind"},
        "safeside_time_to_first_token_seconds": set(),
        "safeside_inter_token_latency_seconds": set(),
        "safeside_queue_depth": set(),
        "safeside_requests_running": set(),
        "safeside_verdicts": {"guard", "action"},
        "safeside_strength": set(),
        "safeside_guard_seconds": {"guard"},
        "safeside_guard_failures": {"guard", "kind"},
        "safeside_streams_stopped": {"guard"},
        "safeside_policy_reloads": {"result"},
        "safeside_audit_failures": set(),
    }


def test_two_servers_in_one_process_do_not_share_counts() -> None:
    first, second = Metrics(), Metrics()
    first.audit_failures.inc()
    assert b"safeside_audit_failures_total 1.0" in first.exposition()
    assert b"safeside_audit_failures_total 0.0" in second.exposition()
