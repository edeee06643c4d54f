"""Services: what every public route works with. Made once per process."""

from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from router.admission import Admission
from router.cluster import Cluster
from router.config import RouterConfig
from router.prompts import Limits, TextModel
from runtime.clock import Clock
from runtime.life import ProcessLife
from runtime.metrics import RouterMetrics


@dataclass(frozen=True)
class Services:
    config: RouterConfig
    model: TextModel
    cluster: Cluster
    admission: Admission
    life: ProcessLife
    clock: Clock
    registry: CollectorRegistry
    metrics: RouterMetrics
    started_at: int

    def limits(self) -> Limits:
        return self.cluster.limits(self.model.max_model_len, self.model.vocab_size)


def make_services(
    config: RouterConfig,
    model: TextModel,
    cluster: Cluster,
    life: ProcessLife,
    clock: Clock,
    registry: CollectorRegistry,
    started_at: int,
) -> Services:
    """`started_at`: Unix time, for clients who ask when the model was created."""
    admission = Admission(config.max_queued_tokens)
    metrics = RouterMetrics(registry)
    metrics.queued_tokens.set_function(lambda: admission.queued_tokens)
    metrics.in_flight.set_function(lambda: admission.num_requests)
    metrics.workers.labels("prefill").set_function(lambda: cluster.num_ready("prefill"))
    metrics.workers.labels("decode").set_function(lambda: cluster.num_ready("decode"))
    metrics.workers.labels("store").set_function(lambda: cluster.num_ready("store"))
    return Services(config, model, cluster, admission, life, clock, registry, metrics, started_at)
