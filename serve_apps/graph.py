"""The graph on Ray Serve: `edge` (HTTP ingress; main, adaptive and extension block in one replica) and `cloud`.

    client --HTTP--> edge: main block on the micro-batch -+-> easy: main exit
                                                          +-> hard: extension exit
                                                          +-> complex: one call to `cloud` a micro-batch

Only complex samples hop, as one array a batch. If the cloud fails, the edge's best answer stands and says so.
"""

import asyncio
import math
from dataclasses import asdict
from importlib import metadata
from typing import Annotated, Any

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Query, Request, Response
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.handle import DeploymentHandle

from meanet.artifact import TrainedModel
from meanet.errors import UserError
from meanet.runtime import CloudRuntime, Images
from meanet.tracking import MODEL, Tracker
from serve_apps import events, invocations, sight_api, v2
from serve_apps.cloud_calls import CloudAnswer, CloudRequest
from serve_apps.edge import EdgeService, OverloadedError
from serve_apps.http import (
    MANY_IMAGES,
    MAX_BATCH_BYTES,
    MAX_BATCH_IMAGES,
    MAX_IMAGE_BYTES,
    ONE_IMAGE,
    Answer,
    BatchAnswer,
    Health,
    ModelDescription,
    Wishes,
    read_body,
    read_images,
)
from serve_apps.served import Served
from serve_apps.tally import Tally
from serve_apps.traces import cloud_pass, traceparent
from serve_apps.watched import Watched, answered


def _made() -> FastAPI:
    made = FastAPI(title="MEANet", description="Images in, classes out; each answer says which exit gave it.")
    made.router.routes.extend(
        sight_api.router.routes
    )  # included as a router they hold a lock, and Serve pickles the app
    # The outermost middleware, so added last; Serve hands ids back itself.
    made.add_middleware(Watched, events=events.Events(), tracing=sight_api.tracing, echo=False)
    return made


api = _made()
Asked = Annotated[Wishes, Query()]


class AppArgs(BaseModel):
    """What a deployment may set, in code or in the YAML's `args`."""

    model_config = ConfigDict(extra="forbid")

    tracking_uri: str
    """MLflow store whose registry holds the model."""
    version: str = "champion"
    """Version number or alias; resolved once, so that edge and cloud load the same."""
    edge_replicas: int = 1
    """Replicas of main, adaptive and extension block."""
    cloud_replicas: int = 1
    """Replicas of the cloud network."""
    num_cpus: float = 1.0
    """CPUs a replica reserves; each computes on one thread."""
    access_log: bool = False
    """A line in an edge replica's log for each request."""


def _load(tracking_uri: str, version: int) -> TrainedModel:
    torch.set_num_threads(1)
    return Tracker(tracking_uri).download(version)


@serve.deployment(name="cloud", max_ongoing_requests=16, max_queued_requests=256)
class Cloud:
    """The deep network, for complex samples."""

    def __init__(self, tracking_uri: str, version: int) -> None:
        model = _load(tracking_uri, version)
        self._runtime, self._preprocessing = CloudRuntime(model), model.preprocessing

    async def classify(self, request: CloudRequest, parent: str | None = None) -> CloudAnswer:
        """Answers for N samples, below the span of the request that the first traced one is of."""
        with cloud_pass(parent):
            reading = await asyncio.to_thread(lambda: self._runtime.run(request.pixels(self._preprocessing)))
        sound = np.isfinite(reading.entropy)  # logits that are not finite are no answer, and NaN says so
        return CloudAnswer(reading.pred.tolist(), np.where(sound, reading.confidence, np.nan).tolist())


@serve.deployment(name="edge", max_ongoing_requests=128, max_queued_requests=512)
@serve.ingress(api)
class Edge:
    """The edge device: answers what it can, asks the cloud for the rest."""

    def __init__(self, args: AppArgs, version: int, cloud: DeploymentHandle[Any], board: DeploymentHandle[Any]) -> None:
        async def ask_cloud(request: CloudRequest) -> CloudAnswer:
            answer: CloudAnswer = await cloud.classify.remote(request, traceparent())
            return answer

        tally = Tally()
        served = Served.of(_load(args.tracking_uri, version), version)
        self._service = EdgeService(served, ask_cloud, observer=tally)
        self.sight = sight_api.started(self._service, tally, board, access_log=args.access_log)

    @api.post("/v1/classify", openapi_extra=ONE_IMAGE)
    async def classify(self, request: Request, wishes: Asked) -> Answer:
        """Classify one image: PNG or JPEG bytes in the body."""
        body = await read_body(request, MAX_IMAGE_BYTES)
        return (await self.answers([body], wishes))[0]

    @api.post("/v1/classify/batch", openapi_extra=MANY_IMAGES)
    async def classify_batch(self, request: Request, wishes: Asked) -> BatchAnswer:
        """Classify many images in one request: multipart files, or an Arrow IPC stream with a column `image`."""
        images = await read_images(request)
        return BatchAnswer(answers=await self.answers(images, wishes))

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
    async def ping(self) -> Health:
        """MLflow's name for the health check."""
        return await self.health()

    @api.post("/invocations")
    async def invocations(self, request: Request) -> dict[str, Any]:
        """Classify as `mlflow models serve` would: images in base64, as a frame or as inputs."""
        body = await read_body(request, MAX_BATCH_BYTES)
        images = invocations.read(body, request.headers.get("content-type", ""), MAX_BATCH_IMAGES)
        answers = await self.answers(images, Wishes())
        return {"predictions": [answer.model_dump(include=set(invocations.COLUMNS)) for answer in answers]}

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
        deadline = None if wishes.deadline_ms is None else wishes.deadline_ms / 1000
        try:
            served = self._service.served
            policy = served.policy.with_request(edge_only=wishes.edge_only, threshold=wishes.threshold)
            if isinstance(images, list):
                answers = await self._service.answer(images, policy, deadline, served)
            else:
                answers = await self._service.answer_pixels(images, policy, deadline, served)
        except UserError as error:
            raise HTTPException(422, str(error)) from error
        except OverloadedError as error:
            headers = {"Retry-After": str(math.ceil(error.retry_after_s))}
            raise HTTPException(503, f"overloaded: {error}; try again later", headers) from error
        answered(answers)
        return answers


def app(args: AppArgs) -> serve.Application:
    """The application: `serve deploy serve_apps/meanet.yaml`, or `python -m serve_apps`."""
    version = Tracker(args.tracking_uri).version_of(args.version)
    environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    options = {"num_cpus": args.num_cpus, "runtime_env": environment}
    cloud_deployment: Any = Cloud  # what the decorators make of the classes
    edge_deployment: Any = Edge
    cloud = cloud_deployment.options(num_replicas=args.cloud_replicas, ray_actor_options=options)
    edge = edge_deployment.options(num_replicas=args.edge_replicas, ray_actor_options=options)
    graph: serve.Application = edge.bind(args, version, cloud.bind(args.tracking_uri, version), sight_api.board())
    return graph
