"""What Prometheus reads at /metrics. Names of adapters are no labels: there may be thousands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from deltaw.serve.bridge import Generation
    from deltaw.serve.serving import Serving

_SHORT = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)
_LONG = (0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("deltaw_requests", "Answered requests.", ("route", "status"), **own)
        self.tokens = Counter("deltaw_tokens", "Tokens read (prompt) and made (output).", ("kind",), **own)
        self.cancelled = Counter("deltaw_cancelled", "Requests whose client went away.", **own)
        self.first = Histogram(
            "deltaw_time_to_first_token_seconds", "From the engine's queue to the first token.", buckets=_LONG, **own
        )
        self.gaps = Histogram("deltaw_time_between_tokens_seconds", "Between two tokens.", buckets=_SHORT, **own)
        self.whole = Histogram("deltaw_generation_seconds", "From the queue to the last token.", buckets=_LONG, **own)

    def watch(self, serving: Serving) -> None:
        """Also tell what the engine, the queue and residency hold when they are asked."""
        self.registry.register(_Now(serving))

    def ended(self, generation: Generation, now_s: float) -> None:
        """A generation's times."""
        self.tokens.labels("output").inc(generation.n_tokens)
        if generation.first_s is not None:
            self.first.observe(generation.first_s - generation.began_s)
        for gap in generation.gaps_s:
            self.gaps.observe(gap)
        self.whole.observe(now_s - generation.began_s)

    def text(self) -> bytes:
        """The page, in Prometheus' text format."""
        return generate_latest(self.registry)


class _Now:
    """Gauges that are read when they are asked for."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    def collect(self) -> Iterator[Metric]:
        """One metric after another."""
        served = self.serving.served
        stats = served.engine.stats()
        gauges = {
            "deltaw_requests_running": ("Sequences in steps.", stats.running),
            "deltaw_requests_waiting": ("Sequences in the engine's queue.", stats.waiting),
            "deltaw_sequences_admitted": ("Sequences in the server.", self.serving.admission.sequences),
            "deltaw_kv_bytes_used": ("KV cache in use.", stats.kv_bytes_used),
            "deltaw_kv_bytes": ("KV cache.", stats.kv_bytes),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        yield CounterMetricFamily("deltaw_preemptions", "Requests that lost their pages.", value=stats.preemptions)
        yield CounterMetricFamily("deltaw_prefix_hits", "Prompt tokens read from pages.", value=stats.prefix_hits)
        residency = served.residency
        tiers = {"host": residency.host, "active": residency.active}
        count = GaugeMetricFamily("deltaw_adapters", "Adapters in a tier.", labels=("tier",))
        size = GaugeMetricFamily("deltaw_adapter_bytes", "Bytes of the adapters in a tier.", labels=("tier",))
        gone = CounterMetricFamily("deltaw_adapter_evictions", "Adapters that left a tier.", labels=("tier",))
        for name, tier in tiers.items():
            count.add_metric((name,), len(tier.items))
            size.add_metric((name,), tier.bytes)
            gone.add_metric((name,), tier.evictions)
        loads = CounterMetricFamily("deltaw_adapter_loads", "Loads into a tier.", labels=("tier", "result"))
        for key, n in residency.loads.items():
            loads.add_metric(key, n)
        yield from (count, size, gone, loads)
