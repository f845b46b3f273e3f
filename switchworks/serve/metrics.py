"""What Prometheus reads at /metrics."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from switchworks.engine import Answer
from switchworks.paging import expert_cache
from switchworks.serve.hosting import Hosted

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self, models: Mapping[str, Hosted]) -> None:
        self._models, self.registry = models, CollectorRegistry()

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            settings = {"buckets": tuple(buckets), "registry": self.registry}
            return Histogram(f"switchworks_{name}", text, ["model"], **settings)

        self._requests = Counter(
            "switchworks_requests",
            "Requests by path and status",
            ["path", "status"],
            registry=self.registry,
        )
        self._first = histogram("time_to_first_token_seconds", "From arrival", SECONDS)
        self._token = histogram("time_per_token_seconds", "Of those after the first", TOKEN_SECONDS)
        self._whole = histogram("request_seconds", "From arrival to answer", SECONDS)
        self._rows = histogram("batch_size", "Texts and beams decoded in a step", ROWS)
        for name, hosted in models.items():
            hosted.engine.on_step = self._rows.labels(name).observe
        self.registry.register(self)

    def count(self, path: str, status: int) -> None:
        """A response was sent."""
        self._requests.labels(path, str(status)).inc()

    def answered(self, model: str, answer: Answer) -> None:
        """An engine has given an answer."""
        self._whole.labels(model).observe(answer.seconds)
        if answer.first_token_seconds is None:
            return
        self._first.labels(model).observe(answer.first_token_seconds)
        longest = max(len(text.tokens) for text in answer.texts)
        if longest > 1:
            between = (answer.seconds - answer.first_token_seconds) / (longest - 1)
            self._token.labels(model).observe(between)

    def collect(self) -> Iterable[Metric]:
        """What engines count themselves, read when it is asked for."""
        gauges = {
            "waiting": GaugeMetricFamily("switchworks_queue_size", "Waiting", labels=["model"]),
            "working": GaugeMetricFamily("switchworks_running", "At work", labels=["model"]),
        }
        tokens = CounterMetricFamily("switchworks_tokens", "Tokens", labels=["model", "kind"])
        labels = ["model", "layer", "expert"]
        load = CounterMetricFamily("switchworks_expert_tokens", "Sent to experts", labels=labels)
        labels = ["model", "kind"]
        reads = CounterMetricFamily("switchworks_expert_cache", "Experts on disk", labels=labels)
        for name, hosted in self._models.items():
            engine = hosted.engine
            for attribute, gauge in gauges.items():
                gauge.add_metric([name], getattr(engine, attribute))
            tokens.add_metric([name, "input"], engine.counts.inputs)
            tokens.add_metric([name, "output"], engine.counts.tokens)
            for layer, experts in engine.expert_load().items():
                for expert, count in enumerate(experts):
                    load.add_metric([name, layer, str(expert)], count)
            if (cache := expert_cache(engine.model)) is not None:
                whole = cache.cold + cache.steady
                reads.add_metric([name, "hits"], whole.hits)
                reads.add_metric([name, "misses"], whole.misses)
                reads.add_metric([name, "bytes"], whole.bytes_read)
        return [*gauges.values(), tokens, load, reads]

    def text(self) -> bytes:
        """All of it in Prometheus' format."""
        return generate_latest(self.registry)
