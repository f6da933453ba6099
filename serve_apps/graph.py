"""The graph on Ray Serve: `edge` (HTTP ingress; main, adaptive and extension block in one replica) and `cloud`.

    client --HTTP--> edge: main block on the micro-batch -+-> easy: main exit
                                                          +-> hard: extension exit
                                                          +-> complex: one call to `cloud` a micro-batch

Only complex samples hop, as one array a batch. If the cloud fails, the edge's best answer stands and says so.
"""

import asyncio
import os
import uuid
from dataclasses import asdict
from importlib import metadata
from typing import Annotated, Any

import ray
from fastapi import FastAPI, HTTPException, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from starlette.middleware import Middleware

from meanet import engines
from meanet.runtime import Images
from serve_apps import events, front, gate, invocations, live_api, sight_api, v2
from serve_apps.cloud_calls import CloudAnswer, CloudRequest
from serve_apps.control import FOLLOW_S, Control
from serve_apps.edge import EdgeService
from serve_apps.fast_path import FastPath, ask, batch_as_json
from serve_apps.http import (
    MANY_IMAGES,
    MAX_BATCH_BYTES,
    MAX_BATCH_IMAGES,
    MAX_IMAGE_BYTES,
    MODEL,
    ONE_IMAGE,
    Answer,
    BatchAnswer,
    Health,
    ModelDescription,
    Wishes,
    read_body,
    read_images,
)
from serve_apps.live import Links, LiveCloud, LiveEdge
from serve_apps.placement import Pin, Replicas, options
from serve_apps.settings import Settings
from serve_apps.tally import Tally
from serve_apps.traces import cloud_pass, traceparent
from serve_apps.watched import Watched
from serve_apps.writes import Writes


def _made() -> FastAPI:
    made = FastAPI(
        title="MEANet",
        description="Images in, classes out; each answer says which exit gave it.",
        middleware=[
            Middleware(Watched, events=events.Events(), tracing=sight_api.tracing, echo=False),  # Serve hands ids back
            Middleware(gate.Gate, service=front.service_here),  # passes on what front's has passed
            Middleware(FastPath, service=front.service_here),
        ],
    )
    for part in (live_api, sight_api):  # included as routers they hold a lock, and Serve pickles the app
        made.router.routes.extend(part.router.routes)
    return made


api = _made()
Asked = Annotated[Wishes, Query()]


class AppArgs(BaseModel):
    """What a deployment may set, in code or in the YAML's `args`."""

    model_config = ConfigDict(extra="forbid")

    tracking_uri: str
    """MLflow store whose registry holds the model."""
    version: str = "champion"
    """Version number, or an alias, which is followed: a version that it comes to point at is rolled out."""
    follow_s: float = Field(default=FOLLOW_S, ge=0, allow_inf_nan=False)
    """How often MLflow is asked where the alias points, s; 0 = never."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Deadlines, breaker, bounds, budget and audit (`serve_apps.settings`) to begin with."""
    edge_replicas: Replicas = 1
    """Replicas of main, adaptive and extension block: a number, or {min, max, target_ongoing_requests, ...}."""
    cloud_replicas: Replicas = 1
    """Replicas of the cloud network, likewise."""
    pin: Pin = "auto"
    """Replicas take nodes that have the custom resource `edge` or `cloud`: auto = if the cluster has it."""
    engine: engines.Name = "auto"
    """What runs the networks: torch, onnx, onnx_int8 (the cloud's in float32); auto takes onnx, else torch."""
    num_cpus: float = 1.0
    """CPUs a replica reserves; each computes on one thread."""
    open_writes: bool = False
    """Without a token in MEANET_TOKEN, let writes through on loopback."""
    access_log: bool = False
    """A line in an edge replica's log for each request."""


@serve.deployment(name="cloud", max_ongoing_requests=16, max_queued_requests=256)
class Cloud:
    """The deep network, for complex samples."""

    async def __init__(self, links: Links) -> None:  # type: ignore[misc]  # Ray awaits it
        self._live = LiveCloud(links)
        await self._live.start()

    async def classify(self, request: CloudRequest, parent: str | None = None) -> CloudAnswer:
        """Answers for N samples, below the span of the request that the first traced one is of."""
        with cloud_pass(parent):
            return await self._live.classify(request)


@serve.deployment(
    name="edge",
    max_ongoing_requests=1024,  # the edge's own queue knows what it can answer in time
    max_queued_requests=256,
    backpressure_config=BackpressureConfig(retry_after_s=1),
)
@serve.ingress(api)
class Edge:
    """The edge device: answers what it can, asks the cloud for the rest."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, links: Links, cloud: DeploymentHandle[Any], writes: Writes, access_log: bool
    ) -> None:
        async def ask_cloud(request: CloudRequest) -> CloudAnswer:
            answer: CloudAnswer = await cloud.classify.remote(request, traceparent())
            return answer

        tally = Tally()
        self.live_edge = LiveEdge(links, ask_cloud, writes, tally)
        await self.live_edge.start()
        self.sight = sight_api.started(
            self._service,
            tally,
            links.control,
            access_log=access_log,
            gauges=self.live_edge.gauges,
            moving=lambda: self.live_edge.budget_moves,
        )

    @property
    def _service(self) -> EdgeService:
        return self.live_edge.service

    @api.post("/v1/classify", openapi_extra=ONE_IMAGE)
    async def classify(self, request: Request, wishes: Asked) -> Answer:
        """Classify one image: PNG or JPEG bytes in the body."""
        body = await read_body(request, MAX_IMAGE_BYTES)
        return (await self.answers([body], wishes))[0]

    @api.post("/v1/classify/batch", openapi_extra=MANY_IMAGES, response_model=BatchAnswer)
    async def classify_batch(self, request: Request, wishes: Asked) -> Response:
        """Classify many images in one request: multipart files, or an Arrow IPC stream with a column `image`."""
        images = await read_images(request)
        answers = await self.answers(images, wishes)
        return Response(batch_as_json(answers), media_type="application/json")

    # The Open Inference Protocol v2

    @api.get("/v2")
    async def server_metadata(self) -> dict[str, Any]:
        """Name and extensions of this server."""
        return {"name": MODEL, "version": metadata.version(MODEL), "extensions": ["binary_tensor_data"]}

    @api.get("/v2/health/live")
    async def live(self) -> dict[str, bool]:
        """The replica is up."""
        return {"live": True}

    @api.get("/v2/health/ready")
    async def ready(self) -> dict[str, bool]:
        """The replica is up and has loaded its model."""
        return {"ready": True}

    @api.post("/v2/repository/index")
    async def repository(self) -> list[dict[str, str]]:
        """The one model, its version and state."""
        return [{"name": MODEL, "version": str(self._service.served.version), "state": "READY", "reason": ""}]

    @api.get("/v2/models/{name}")
    @api.get("/v2/models/{name}/versions/{version}")
    async def model_metadata(self, name: str, version: int | None = None) -> dict[str, Any]:
        """Inputs and outputs."""
        self._check_served(name, version)
        taken = self._service.served.model.preprocessing
        return v2.model_metadata(MODEL, self._service.served.version, (taken.height, taken.width, taken.channels))

    @api.get("/v2/models/{name}/ready")
    @api.get("/v2/models/{name}/versions/{version}/ready")
    async def model_ready(self, name: str, version: int | None = None) -> dict[str, Any]:
        """The model answers."""
        self._check_served(name, version)
        return {"name": MODEL, "ready": True}

    @api.post("/v2/models/{name}/infer")
    @api.post("/v2/models/{name}/versions/{version}/infer")
    async def infer(self, request: Request, name: str, version: int | None = None) -> Response:
        """Classify the input `image`: BYTES of PNG or JPEG files, or UINT8 pixels; JSON or binary tensors."""
        self._check_served(name, version)
        body = await read_body(request, MAX_BATCH_BYTES)
        try:
            asked = await asyncio.to_thread(v2.read, body, request.headers.get(v2.HEADER_LENGTH), MAX_BATCH_IMAGES)
            wishes = Wishes.model_validate(asked.parameters)
        except ValueError as error:  # of either
            raise HTTPException(400, str(error)) from error
        images = asked.pixels if asked.encoded is None else asked.encoded
        assert images is not None, "a request has one or the other"
        answers = await self.answers(images, wishes)
        written = v2.respond(asked, answers, MODEL, self._service.served.version)
        return Response(written.body, headers=written.headers)

    def _check_served(self, name: str, version: int | None) -> None:
        if name != MODEL or version not in (None, self._service.served.version):
            asked = name if version is None else f"{name} version {version}"
            raise HTTPException(404, f"{asked} is not served: {MODEL} version {self._service.served.version} is")

    # MLflow's scoring protocol

    @api.get("/ping")
    @api.get("/health")
    async def ping(self) -> Health:
        """MLflow's names for the health check."""
        return await self.health()

    @api.get("/version")
    async def mlflow_version(self) -> Response:
        """The version of MLflow whose protocol this is, as its own scoring server says it."""
        return Response(metadata.version("mlflow"), media_type="text/plain")

    @api.post("/invocations")
    async def invocations(self, request: Request) -> dict[str, Any]:
        """Classify as `mlflow models serve` would: images in base64, as a frame or as inputs."""
        body = await read_body(request, MAX_BATCH_BYTES)
        kind = request.headers.get("content-type", "")
        images, wishes = await asyncio.to_thread(invocations.read, body, kind, MAX_BATCH_IMAGES)
        return invocations.predictions(await self.answers(images, wishes))

    @api.get("/v1/model")
    async def describe(self) -> ModelDescription:
        """What is served."""
        model = self._service.served.model
        return ModelDescription(
            name=MODEL,
            version=self._service.served.version,
            recipe=model.recipe.name,
            class_names=list(model.class_names),
            hard_classes=list(model.hard_classes),
            input={name: getattr(model.preprocessing, name) for name in ("height", "width", "channels")},
            macs=asdict(model.macs),
            operating_point=model.operating_point or {},
        )

    @api.get("/healthz")
    async def health(self) -> Health:
        """The replica is up and has loaded its model."""
        return Health(status="ok", model_version=self._service.served.version)

    async def answers(self, images: list[bytes] | Images, wishes: Wishes) -> list[Answer]:
        """The answers to bodies or pixels under a request's wishes; refusals are HTTP's."""
        return await ask(self._service, images, wishes)


def app(args: AppArgs) -> serve.Application:
    """The application: `serve deploy serve_apps/meanet.yaml`, or `python -m serve_apps`.

    Raises:
        UserError: the store's address holds a password; settings, version or open writes make no sense.
    """
    from meanet.tracking import Tracker, store_uri

    Settings().updated(args.settings)  # refused here, where it is read
    tracking_uri = store_uri(args.tracking_uri, "tracking_uri")
    version = Tracker(tracking_uri).version_of(args.version)
    running = _get_global_client(raise_if_no_controller_running=False)
    host = running.http_config.host if running else None
    writes = Writes.read(os.environ, open_writes=args.open_writes, host=host)
    resources = ray.cluster_resources() if ray.is_initialized() else {}  # type: ignore[no-untyped-call]
    # What the decorators make of the classes:
    control_deployment: Any = Control
    cloud_deployment: Any = Cloud
    edge_deployment: Any = Edge
    control = control_deployment.options(
        user_config={"settings": args.settings, "version": args.version, "follow_s": args.follow_s}
    ).bind(tracking_uri, version, args.version, uuid.uuid4().hex)
    links = Links(tracking_uri, version, args.engine, control)
    cloud = cloud_deployment.options(**options(args.cloud_replicas, "cloud", args.pin, resources, args.num_cpus))
    edge = edge_deployment.options(**options(args.edge_replicas, "edge", args.pin, resources, args.num_cpus))
    graph: serve.Application = edge.bind(links, cloud.bind(links), writes, args.access_log)
    return graph
