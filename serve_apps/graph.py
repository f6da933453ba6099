"""The graph on Ray Serve: `edge` (HTTP ingress; main, adaptive and extension block in one replica) and `cloud`.

    client --HTTP--> edge: main block on the micro-batch -+-> easy: main exit
                                                          +-> hard: extension exit
                                                          +-> complex: one call to `cloud` a micro-batch

Only complex samples hop, as one array a batch. If the cloud fails, the edge's best answer stands and says so.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Query, Request
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.handle import DeploymentHandle

from meanet.artifact import TrainedModel
from meanet.errors import UserError
from meanet.operating_point import policy_id
from meanet.routing import Bools, Exit, Policy, Reading
from meanet.runtime import Answers, CloudRuntime, EdgeRuntime, Images, Pending
from meanet.tracking import MODEL, Tracker
from serve_apps.batching import Batcher
from serve_apps.http import (
    MANY_IMAGES,
    MAX_IMAGE_BYTES,
    ONE_IMAGE,
    Answer,
    AppliedPolicy,
    BatchAnswer,
    Health,
    Joules,
    Milliseconds,
    ModelDescription,
    read_body,
    read_images,
)

CLOUD_TIMEOUT_S = 5.0
MAX_MICRO_BATCH = 64

api = FastAPI(title="MEANet", description="Images in, classes out; each answer says which exit gave it.")
EdgeOnly = Annotated[bool, Query(description="Nothing of this request leaves the edge.")]
Threshold = Annotated[
    float | None,
    Query(allow_inf_nan=False, description="In place of the operating point's threshold, in its gate's unit."),
]


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


@dataclass(frozen=True)
class CloudAnswer:
    """What the cloud deployment returns for N images."""

    class_ids: list[int]
    confidences: list[float]


@dataclass
class Task:
    """One image on its way through the edge."""

    image: Images
    num_bytes: int
    policy: Policy
    answer: "asyncio.Future[Answer]"


def _load(tracking_uri: str, version: int) -> TrainedModel:
    torch.set_num_threads(1)
    return Tracker(tracking_uri).download(version)


@serve.deployment(name="cloud", max_ongoing_requests=16, max_queued_requests=256)
class Cloud:
    """The deep network, for complex samples."""

    def __init__(self, tracking_uri: str, version: int) -> None:
        self._runtime = CloudRuntime(_load(tracking_uri, version))

    async def classify(self, images: Images) -> CloudAnswer:
        """Answers for (N, H, W, C) images."""
        reading = await asyncio.to_thread(self._runtime.run, images)
        return CloudAnswer(reading.pred.tolist(), reading.confidence.tolist())


@serve.deployment(name="edge", max_ongoing_requests=128, max_queued_requests=512)
@serve.ingress(api)
class Edge:
    """The edge device: answers what it can, asks the cloud for the rest."""

    def __init__(self, tracking_uri: str, version: int, cloud: DeploymentHandle[Any]) -> None:
        self._version, self._cloud = version, cloud
        self._model = _load(tracking_uri, version)
        self._policy = self._model.policy
        self._costs = self._model.costs
        self._runtime = EdgeRuntime(self._model)
        self._batcher: Batcher[Task] = Batcher(self._run, MAX_MICRO_BATCH)
        self._waiting: set[asyncio.Task[None]] = set()

    # HTTP

    @api.post("/v1/classify", openapi_extra=ONE_IMAGE)
    async def classify(self, request: Request, edge_only: EdgeOnly = False, threshold: Threshold = None) -> Answer:
        """Classify one image: PNG or JPEG bytes in the body."""
        body = await read_body(request, MAX_IMAGE_BYTES)
        return (await self._answer([body], self._policy_for(edge_only, threshold)))[0]

    @api.post("/v1/classify/batch", openapi_extra=MANY_IMAGES)
    async def classify_batch(
        self, request: Request, edge_only: EdgeOnly = False, threshold: Threshold = None
    ) -> BatchAnswer:
        """Classify many images in one request: multipart files, or an Arrow IPC stream with a column `image`."""
        images = await read_images(request)
        return BatchAnswer(answers=await self._answer(images, self._policy_for(edge_only, threshold)))

    @api.get("/v1/model")
    async def describe(self) -> ModelDescription:
        """What is served."""
        model = self._model
        return ModelDescription(
            name=MODEL,
            version=self._version,
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
        return Health(status="ok", model_version=self._version)

    def _policy_for(self, edge_only: bool, threshold: float | None) -> Policy:
        return self._policy.with_request(edge_only=edge_only, threshold=threshold)

    async def _answer(self, bodies: Sequence[bytes], policy: Policy) -> list[Answer]:
        images = await asyncio.to_thread(self._decode, bodies)
        loop = asyncio.get_running_loop()
        tasks = [
            Task(image, len(body), policy, loop.create_future()) for image, body in zip(images, bodies, strict=True)
        ]
        self._batcher.put(tasks)
        return await asyncio.gather(*(task.answer for task in tasks))

    def _decode(self, bodies: Sequence[bytes]) -> list[Images]:
        images = []
        for number, body in enumerate(bodies):
            try:
                images.append(self._model.preprocessing.decode(body))
            except UserError as error:
                where = f"image {number} of the batch: " if len(bodies) > 1 else ""
                raise HTTPException(422, f"{where}{error}") from error
        return images

    # The micro-batch

    async def _run(self, tasks: Sequence[Task]) -> None:
        """Give a micro-batch to the blocks: one pass for each policy in it, as a rule one."""
        for policy in {policy_id(task.policy) + str(task.policy.edge_only): task.policy for task in tasks}.values():
            group = [task for task in tasks if task.policy == policy]
            try:
                await self._run_group(group, policy)
            except Exception as error:  # whatever it is, these requests must hear of it
                for task in group:
                    if not task.answer.done():
                        task.answer.set_exception(error)

    async def _run_group(self, tasks: Sequence[Task], policy: Policy) -> None:
        images = np.stack([task.image for task in tasks])
        started = time.perf_counter()
        answers, pending = await asyncio.to_thread(self._runtime.run, images, policy)
        group = _Group(tasks, policy, images, answers, pending, 1000 * (time.perf_counter() - started))
        self._resolve(group, answers.exit != Exit.CLOUD, cloud_ms=0.0, reason=None)
        if len(pending.rows):  # the next micro-batch need not wait for this one's cloud
            waiting = asyncio.get_running_loop().create_task(self._ask_cloud(group))
            self._waiting.add(waiting)
            waiting.add_done_callback(self._waiting.discard)

    async def _ask_cloud(self, group: "_Group") -> None:
        rows = group.pending.rows
        started, reason = time.perf_counter(), None
        try:
            call = self._cloud.classify.remote(group.images[rows])
            reading = _checked(await asyncio.wait_for(call, CLOUD_TIMEOUT_S), len(rows), len(self._model.class_names))
            group.answers.accept(rows, Exit.CLOUD, reading)
        except Exception as error:  # a lost cloud raises many kinds; none may cost the client its answer
            reason = "cloud timed out" if isinstance(error, TimeoutError) else f"cloud failed: {type(error).__name__}"
            await asyncio.to_thread(self._runtime.finish, group.answers, group.pending, group.policy)
        waited = np.zeros(len(group.tasks), dtype=bool)
        waited[rows] = True
        self._resolve(group, waited, cloud_ms=1000 * (time.perf_counter() - started), reason=reason)

    def _resolve(self, group: "_Group", which: Bools, cloud_ms: float, reason: str | None) -> None:
        for row in np.flatnonzero(which):
            if not group.tasks[row].answer.done():
                group.tasks[row].answer.set_result(self._to_answer(group, int(row), cloud_ms, reason))

    def _to_answer(self, group: "_Group", row: int, cloud_ms: float, reason: str | None) -> Answer:
        answers, task, costs = group.answers, group.tasks[row], self._costs
        sent = bool(cloud_ms)
        entropy = float(answers.entropy[row])
        class_id = int(answers.pred[row])
        return Answer(
            class_id=class_id,
            class_name=self._model.class_names[class_id],
            exit=Exit(answers.exit[row]).label,
            confidence=float(answers.confidence[row]),
            entropy=entropy if math.isfinite(entropy) else None,
            degraded=reason is not None,
            reason=reason,
            joules=Joules(
                edge_compute=costs.main_joules + bool(answers.extended[row]) * costs.extension_joules,
                upload=float(costs.upload_joules(task.num_bytes)) if sent else 0.0,
                source=costs.tag,
            ),
            ms=Milliseconds(edge=group.edge_ms, cloud=cloud_ms),
            model_version=self._version,
            policy=AppliedPolicy(
                id=policy_id(group.policy),
                gate=group.policy.gate,
                thresholds=list(group.policy.thresholds),
                edge_only=group.policy.edge_only,
            ),
        )


@dataclass(frozen=True)
class _Group:
    """A micro-batch under one policy, after the edge's pass."""

    tasks: Sequence[Task]
    policy: Policy
    images: Images
    answers: Answers
    pending: Pending
    edge_ms: float


def _checked(answer: CloudAnswer, count: int, num_classes: int) -> Reading:
    """The cloud's answer as a reading; a wrong shape, class or number counts as a failure."""
    pred = np.asarray(answer.class_ids, dtype=np.int64)
    confidence = np.asarray(answer.confidences, dtype=np.float64)
    if pred.shape != (count,) or confidence.shape != (count,):
        raise ValueError(f"the cloud answered {pred.shape} for {count} images")
    if not (np.isfinite(confidence).all() and (pred >= 0).all() and (pred < num_classes).all()):
        raise ValueError("the cloud answered a class or a confidence that does not exist")
    return Reading(pred, confidence, np.zeros(count), np.zeros(count))


def app(args: AppArgs) -> serve.Application:
    """The application: `serve deploy serve_apps/meanet.yaml`, or `python -m serve_apps`."""
    version = Tracker(args.tracking_uri).version_of(args.version)
    environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    options = {"num_cpus": args.num_cpus, "runtime_env": environment}
    cloud = Cloud.options(num_replicas=args.cloud_replicas, ray_actor_options=options)
    edge = Edge.options(num_replicas=args.edge_replicas, ray_actor_options=options)
    return edge.bind(args.tracking_uri, version, cloud.bind(args.tracking_uri, version))
