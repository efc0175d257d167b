"""What /metrics tells: vLLM's names under our prefix, so that dashboards need one change, and the experts'.

Legend: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from consilium.engine.request import Piece

_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
Loads = Mapping[int, Sequence[int]]


@final
class _Engine(Collector):
    """Loads of all layers and guesses, as they were told last."""

    def __init__(self) -> None:
        self.loads: Loads = {}
        self.guesses: tuple[int, int] = (0, 0)

    def collect(self) -> Iterable[Metric]:
        labels = ("layer", "expert")
        tokens = CounterMetricFamily(
            "consilium_expert_tokens", "Tokens that an expert computed.", labels=labels
        )
        imbalance = GaugeMetricFamily(
            "consilium_expert_imbalance",
            "Largest load over the mean of a layer: 1 is even.",
            labels=("layer",),
        )
        entropy = GaugeMetricFamily(
            "consilium_expert_entropy",
            "Entropy of a layer's loads over its largest: 1 is even.",
            labels=("layer",),
        )
        for layer, load_E in self.loads.items():
            for expert, count in enumerate(load_E):
                tokens.add_metric((str(layer), str(expert)), count)
            imbalance.add_metric((str(layer),), max(load_E) * len(load_E) / max(sum(load_E), 1))
            entropy.add_metric((str(layer),), _entropy(load_E))
        return tokens, imbalance, entropy, *self._guessed()

    def _guessed(self) -> Iterable[Metric]:
        guessed = CounterMetricFamily(
            "consilium:spec_decode_num_draft_tokens", "Tokens that were guessed.", value=self.guesses[0]
        )
        right = CounterMetricFamily(
            "consilium:spec_decode_num_accepted_tokens", "Of these, the right ones.", value=self.guesses[1]
        )
        return guessed, right


def _entropy(load_E: Sequence[int]) -> float:
    shares = [count / sum(load_E) for count in load_E if count]
    return (
        -sum(share * math.log(share) for share in shares) / math.log(len(load_E)) if len(load_E) > 1 else 1.0
    )


@final
class Metrics:
    """Counted in the event loop's thread."""

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        self._model = model
        self._experts = _Engine()
        self._registry.register(self._experts)
        self.running = self._gauge("num_requests_running", "Sequences that decode.")
        self.waiting = self._gauge("num_requests_waiting", "Sequences whose prompt is still to be read.")
        self.usage = self._gauge("kv_cache_usage_perc", "Share of the cache that sequences hold: 1 is all.")
        self.prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self.cached = self._counter("prefix_cache_hits", "Tokens of prompts that were not computed again.")
        self.queries = self._counter("prefix_cache_queries", "Tokens of prompts that were looked for.")
        self.generated = self._counter("generation_tokens", "Tokens of answers.")
        self.refused = self._counter("request_refused", "Requests that were answered by an error.", "status")
        self.finished = self._counter("request_success", "Sequences that ended.", "finished_reason")
        self.first = self._histogram("time_to_first_token_seconds", "From a request to its first token.")
        self.between = self._histogram(
            "inter_token_latency_seconds", "From one token of a sequence to the next."
        )
        self.whole = self._histogram(
            "e2e_request_latency_seconds", "From a request to the end of its answer."
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        made = Gauge(f"consilium:{name}", text, ("model_name",), registry=self._registry)
        return made.labels(self._model)

    def _counter(self, name: str, text: str, *more: str) -> Counter:
        made = Counter(f"consilium:{name}", text, ("model_name", *more), registry=self._registry)
        return made if more else made.labels(self._model)

    def _histogram(self, name: str, text: str) -> Histogram:
        labels = ("model_name",)
        made = Histogram(f"consilium:{name}", text, labels, registry=self._registry, buckets=_SECONDS)
        return made.labels(self._model)

    def count_refused(self, status: int) -> None:
        self.refused.labels(self._model, str(status)).inc()

    def count(self, piece: Piece, prompt: int | None, since: float) -> None:
        """A piece that came ``since`` seconds after the last; the first of a sequence has its ``prompt``."""
        self.generated.inc()
        if prompt is None:
            self.between.observe(since)
        else:
            self.first.observe(since)
            self.prompt.inc(prompt)
            self.queries.inc(prompt)
            self.cached.inc(piece.cached)
        if piece.finished is not None:
            self.finished.labels(self._model, piece.finished).inc()

    def text(self, loads: Loads, guesses: tuple[int, int]) -> bytes:
        self._experts.loads, self._experts.guesses = loads, guesses
        return generate_latest(self._registry)
