"""OpenTelemetry traces of requests: off unless an endpoint is named, as its own variables have it.

    POST /v1/classify               the request; child of the client's `traceparent`, if it sent one
      edge pass                     the micro-batch that its images went through
      cloud call                    as long as they waited for the cloud
      cloud pass                    in the cloud's replica, by the `traceparent` that goes up with the images

Source: https://www.w3.org/TR/trace-context/, https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

import contextlib
import importlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

from serve_apps.events import LOGGER, TRACE_ID
from serve_apps.http import Answer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_PACKAGE = "opentelemetry-exporter-otlp-proto-http"
TRACEPARENT: ContextVar[str | None] = ContextVar("traceparent", default=None)
"""Of the request or the cloud call at hand, where it is traced: goes up to the cloud with the images."""
_MAX_SPANS = 16
"""Of a batch, so many images have spans of their own."""


def traceparent() -> str | None:
    """`TRACEPARENT` here."""
    return TRACEPARENT.get()


class Tracing:
    """Makes the spans of a replica."""

    def __init__(self, exporter: "SpanExporter", service: str, *, at_once: bool = False) -> None:
        """Trace.

        Args:
            exporter: where finished spans go.
            service: its name in the traces.
            at_once: export each span when it ends, and not in batches from a thread.
        """
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor((SimpleSpanProcessor if at_once else BatchSpanProcessor)(exporter))
        self._tracer = self._provider.get_tracer("meanet")
        self._propagator = TraceContextTextMapPropagator()

    def close(self) -> None:
        """Export what is left."""
        self._provider.shutdown()

    @contextlib.contextmanager
    def request(self, scope: Mapping[str, Any], request_id: str) -> Iterator["Span"]:
        """The span of an HTTP request, while the block runs."""
        from opentelemetry.trace import SpanKind

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes = {
            "http.request.method": scope["method"],
            "url.path": scope["path"],
            "meanet.request_id": request_id,
        }
        with self._tracer.start_as_current_span(
            f"{scope['method']} {scope['path']}",
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            attributes=attributes,
        ) as span:
            carrier: dict[str, str] = {}
            self._propagator.inject(carrier)
            TRACEPARENT.set(carrier["traceparent"] if span.is_recording() else None)
            TRACE_ID.set(f"{span.get_span_context().trace_id:032x}")
            yield span

    def answered(self, answers: Sequence[Answer]) -> None:
        """Spans of what these answers' images went through, which is over just now, below the request's own."""
        from opentelemetry.trace import SpanKind

        now = time.time_ns()
        for answer in answers[:_MAX_SPANS]:
            cloud_starts = now - int(1e6 * answer.ms.cloud)
            edge = self._tracer.start_span(
                "edge pass",
                start_time=cloud_starts - int(1e6 * answer.ms.edge),
                attributes={"meanet.exit": answer.exit, "meanet.model_version": answer.model_version},
            )
            edge.end(cloud_starts)
            if answer.ms.cloud:
                cloud = self._tracer.start_span("cloud call", start_time=cloud_starts, kind=SpanKind.CLIENT)
                if answer.reason:
                    cloud.set_attribute("meanet.degraded", answer.reason)
                cloud.end(now)

    @contextlib.contextmanager
    def cloud_pass(self, traceparent: str) -> Iterator[None]:
        """The span of the cloud's network over a micro-batch, below the request that named itself."""
        parent = self._propagator.extract({"traceparent": traceparent})
        with self._tracer.start_as_current_span("cloud pass", context=parent):
            yield


def cloud_pass(traceparent: str | None) -> contextlib.AbstractContextManager[None]:
    """The span of this process's cloud pass, where the request is traced and this process traces."""
    tracing = None if traceparent is None else of_process("meanet-cloud")
    return contextlib.nullcontext() if tracing is None or traceparent is None else tracing.cloud_pass(traceparent)


@cache
def of_process(service: str) -> Tracing | None:
    """As this process's environment asks for it, made once."""
    return tracing_of(os.environ, service, logging.getLogger(LOGGER))


def tracing_of(environment: Mapping[str, str], service: str, logger: logging.Logger) -> Tracing | None:
    """As the environment asks for it; None, and a line that says why, where it cannot be had."""
    if not environment.get(ENDPOINT):
        return None
    try:
        exporting = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError:
        fields = {"remedy": f"pip install {_PACKAGE}", "endpoint": environment[ENDPOINT]}
        logger.warning("no traces: the OTLP exporter is not installed", extra={"fields": fields})
        return None
    return Tracing(exporting.OTLPSpanExporter(), environment.get("OTEL_SERVICE_NAME", service))
