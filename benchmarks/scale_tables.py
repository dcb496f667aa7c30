"""Tables of serving, of bulk scoring, of vLLM and of capacity; ``tables`` puts them into README and docs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from parts import BULK, SERVE, read_parts
from table_cells import Row, absent, markdown, ratio_cell, read_result, share_cell

CAPACITY = ("Qwen2.5-7B", "Llama-3.1-70B")
CACHED_TOKENS = 131_072  # tokens in flight: 64 requests of 2,048


def capacity_table(path: Path) -> str:
    """What one adapter of each method adds to a 7B and a 70B base: compute, weights and cache."""
    result = read_result(path.with_name("geometry.json"))
    rows = [row for row in result["rows"] if row["base"] in CAPACITY] if result else []
    if not any(row["metric"] == "cache_bytes" for row in rows):
        return absent(path.with_name("geometry.json"))
    lines = []
    for base in CAPACITY:
        for method in dict.fromkeys(str(row["method"]) for row in rows if row["base"] == base):
            found = {str(row["metric"]): row for row in rows if (row["base"], row["method"]) == (base, method)}
            value = {metric: float(row["value"]) for metric, row in found.items()}
            cached = value["cache_bytes"]
            lines.append([
                base if method == "base" else f"{base}, one `{method}`",
                _amount(2 * value["matmuls"] / 1e9),
                "" if method == "base" else share_cell([found["flops_share"]]),
                _amount(2 * value["params"] / 1e9),
                f"{cached / 1024:,.4g}",
                f"{cached * CACHED_TOKENS / 1e9:,.3g}",
            ])  # fmt: skip
    heads = (
        "one token through", "GFLOPs", "of the base", "weights, GB", "KV a token, KiB", f"KV of {CACHED_TOKENS:,}, GB",
    )  # fmt: skip
    return markdown(heads, lines)


def _amount(value: float) -> str:
    return f"{value:,.3g}" if value >= 1e-3 else "under 0.001"


def memory_table(path: Path) -> str:
    """What training takes by the memory model, part by part, beside what was held."""
    result = read_result(path)
    if result is None:
        return absent(path)
    rows = result["rows"]
    parts = ("weights", "gradients", "optimiser", "base_pass", "taps", "activations")
    lines = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        found = {row["metric"]: float(row["value"]) for row in rows if row["batch"] == batch}
        sizes = [found[f"{name}_bytes"] for name in (*parts, "predicted", "held")]
        lines.append([str(batch), *(f"{size / 1e6:,.0f}" for size in sizes), f"{found['predicted_to_held'] - 1:+.1%}"])
    verdict = "met" if result["notes"]["met"] else "missed"
    head = (
        f"MB of 10^6 bytes, by batch of {rows[0]['tokens']} tokens a row: an `lst` guard beside {rows[0]['geometry']} "
        f"in bfloat16. Goal: within 10%: {verdict}. Commit `{result['commit']}`, {result['machine']}.\n\n"
    )
    return head + markdown(["batch", *(name.replace("_", " ") for name in parts), "all", "held", ""], lines)


def bulk_table(path: Path) -> str:
    """Rows a second, memory and what kills lost, by guard, rows and workers."""
    result = read_result(path)
    if result is None:
        return absent(path)
    rows, lines = result["rows"], []
    for guard, n_rows, workers, engine in dict.fromkeys(map(_bulk_place, rows)):
        mine = [row for row in rows if _bulk_place(row) == (guard, n_rows, workers, engine)]
        found = {str(row["metric"]): float(row["value"]) for row in mine}
        kills = f"{found['kills']:.0f}" if "kills" in found else ""
        head = [f"{guard}, {n_rows:,} rows", str(engine), str(workers)]
        counts = [f"{found['lost']:.0f}", f"{found['duplicated']:.0f}"]
        lines.append([*head, f"{found['rows_per_s']:,.0f}", f"{found['peak_bytes'] / 1e6:,.0f} MB", kills, *counts])
    heads = ("guard", "engine", "workers", "rows a second", "most memory of a worker", "kills", "lost", "duplicated")
    measured = "; ".join(
        f"{name} at commit `{part['commit']}`, {part['machine']}, {part['notes']['cores']} cores, load average "
        f"{part['notes']['load_at_start']:.1f} at the start"
        for name, part in read_parts(path, BULK).items()
    )
    return f"Measured: {measured}.\n\n" + markdown(heads, lines)


def _bulk_place(row: Row) -> tuple[object, ...]:
    return row["guard"], row["n"], row["workers"], row["engine"]


def serve_table(path: Path) -> str:
    """Throughput and waiting by geometry, clients and variant; what faults cost; and whether memory is flat."""
    result = read_result(path)
    if result is None:
        return absent(path)
    rows, lines = result["rows"], []
    parts = read_parts(path, SERVE)
    notes = {name: value for part in parts.values() for name, value in part["notes"].items()}
    load = [row for row in rows if "variant" in row]
    for place in dict.fromkeys((row["geometry"], row["clients"], row["variant"]) for row in load):
        mine = {row["metric"]: row for row in load if (row["geometry"], row["clients"], row["variant"]) == place}
        waits = [_wait(mine, wait, scale) for wait, scale in (("ttft", 1.0), ("itl", 1000.0))]
        name = f"{place[0]}, {place[1]} clients, {place[2]}"
        lines.append([name, _times(mine, "tokens_per_s", 1.0), ratio_cell(mine["throughput_ratio"]), *waits])
    measured = "; ".join(f"{name} at commit `{part['commit']}`, {part['machine']}" for name, part in parts.items())
    columns = ("server", "tokens a second", "over the base", "first token, s", "between tokens, ms")
    tables = [_load_head(notes["goals"]), markdown(columns, lines)] if lines else ["Load is not measured yet."]
    return "\n\n".join([f"Measured: {measured}.", *tables, *_fault_parts(rows), *_long_parts(notes)])


def _load_head(goals: Sequence[Row]) -> str:
    met = [bool(goal["met"]) for goal in goals]
    return (
        "Median over interleaved rounds (95% bootstrap interval of the ratio); the goal, at least 0.95 of the base's "
        "throughput for the guarded ones on the 0.5B geometry, is met at the interval's lower end: "
        f"{sum(met)} of {len(met)} are. Waits are p50 (p99)."
    )


def _wait(rows: dict[object, Row], name: str, scale: float) -> str:
    """The median of a wait, and its 99th percentile where there is one."""
    late = _times(rows, f"{name}_p99", scale)
    return _times(rows, f"{name}_p50", scale) + (f" ({late})" if late else "")


def _times(rows: dict[object, Row], metric: str, scale: float) -> str:
    if metric not in rows:
        return ""
    value = float(rows[metric]["value"]) * scale
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _fault_parts(rows: Sequence[Row]) -> list[str]:
    counts = {(row["fault"], row["metric"]): row for row in rows if "fault" in row}
    metrics = ("injected", "lost", "leaked")
    lines = [
        [str(fault), *(f"{counts[fault, metric]['value']:.0f}" for metric in metrics), str(counts[fault, "lost"]["n"])]
        for fault in dict.fromkeys(fault for fault, _ in counts)
    ]
    return [markdown(("fault", *metrics, "requests beside it"), lines)] if lines else []


def _long_parts(notes: dict[str, Row]) -> list[str]:
    parts = []
    if guard := notes.get("guard"):
        parts.append(
            f"`safeside guard` read {guard['rows']:,} rows at {guard['rows_per_s']:.0f} a second, a kill included."
        )
    if soak := notes.get("soak"):
        word = "met" if soak["met"] else "missed"
        parts.append(
            f"In {soak['minutes']:g} minutes with {soak['clients']} clients and {soak['answers']:,} answers the memory "
            f"of the server grew by {float(soak['growth']):+.2%} (goal within 2%: {word})."
        )
    return parts


def vllm_table(path: Path) -> str:
    """Whether vLLM gives what attach gives, case by case, and what the adapters cost beside vLLM alone."""
    result = read_result(path)
    if result is None:
        return absent(path)
    rows, lines = result["rows"], []
    names = ("case", "model", "runner")
    for place in dict.fromkeys(tuple(row[name] for name in names) for row in rows if "case" in row):
        found = {row["metric"]: row for row in rows if tuple(row.get(name) for name in names) == place}
        share, difference = found["tokens_equal_share"], found["score_diff"]
        lines.append(
            [*map(str, place), f"{float(share['value']):.0%} of {share['n']}", f"{float(difference['value']):.1e}"]
        )
    costs = [row for row in rows if "variant" in row]
    goals = {(goal["geometry"], goal["variant"]): goal for goal in result["notes"]["goals"]}
    speeds = []
    for row in (row for row in costs if row["metric"] == "tokens_per_s"):
        place = {name: row[name] for name in ("geometry", "phase", "variant")}
        ratio = next(each for each in costs if each["metric"] == "ratio_to_stock" and place.items() <= each.items())
        goal = goals.get((row["geometry"], row["variant"])) if row["phase"] == "decode" else None
        told = f"{goal['goal']:.2f}: {'met' if goal['met'] else 'missed'}" if goal else ""
        speeds.append([*map(str, place.values()), f"{float(row['value']):,.1f}", ratio_cell(ratio), told])
    head = f"vLLM {result['notes']['vllm']}. Commit `{result['commit']}`, {result['machine']}.\n\n"
    parity = markdown(["case", "model", "runner", "prompts with equal tokens", "largest difference of a score"], lines)
    return (
        head
        + parity
        + "\n\n"
        + markdown(["geometry", "phase", "variant", "tokens a second", "of stock", "goal"], speeds)
    )
