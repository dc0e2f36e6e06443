"""The service's counters in Prometheus' text format (exposition format 0.0.4)."""

from __future__ import annotations

from labs.serving.service import Service


def exposition(service: Service) -> str:
    """Names end with their unit; counters with ``_total``."""
    counters = service.counters
    lines: list[str] = []

    def add(name: str, kind: str, text: str, values: dict[str, float]) -> None:
        lines.append(f"# HELP perflab_{name} {text}")
        lines.append(f"# TYPE perflab_{name} {kind}")
        lines.extend(f"perflab_{name}{labels} {value!r}" for labels, value in values.items())

    for name, value, text in (
        ("requests_accepted", counters.accepted, "Requests that were accepted."),
        ("requests_finished", counters.finished, "Requests whose last token was written."),
        ("requests_refused", counters.refused, "Requests answered with 429."),
        ("requests_aborted", counters.aborted, "Requests given up by their client."),
        ("requests_failed", counters.failed, "Requests given up after losing several workers."),
        ("requests_retried", counters.retried, "Requests read again because a worker was lost."),
        ("workers_lost", counters.lost_workers, "Workers that were lost and replaced."),
        ("tokens_written", counters.tokens, "Tokens that were written."),
        ("hand_overs", counters.hand_overs, "Prompts whose keys and values went to another worker."),
        ("handed_over_bytes", counters.handed_bytes, "Bytes of keys and values sent."),
    ):
        add(f"{name}_total", "counter", text, {"": value})
    add("requests_in_house", "gauge", "Requests being served.", {"": len(service.dispatcher.requests)})
    workers = range(len(service.workers))
    add(
        "cache_held_ratio",
        "gauge",
        "Share of a worker's blocks that sequences hold.",
        {f'{{worker="{index}"}}': service.occupancy[index] for index in workers},
    )
    found, looked_up = (sum(pair[side] for pair in service.hits) for side in (0, 1))
    share = found / looked_up if looked_up else 0.0
    add("prefix_hit_ratio", "gauge", "Share of prompt tokens found in a cache.", {"": share})
    alive = {f'{{worker="{index}"}}': float(service.dispatcher.alive[index]) for index in workers}
    add("worker_up", "gauge", "1 while the worker is there.", alive)
    return "\n".join(lines) + "\n"
