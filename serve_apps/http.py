"""What goes over HTTP: bounded bodies in, answers out. Every refusal is a 4xx with a JSON `detail`."""

from typing import Any, Literal

from fastapi import HTTPException, Request
from pydantic import BaseModel, Field

from serve_apps import multipart
from serve_apps.arrow import RefusedError, images_of

MODEL = "meanet"
"""The registered model's name, as in `meanet.tracking`, which would bring torch and MLflow with it."""
MAX_IMAGE_BYTES = 8 * 2**20
MAX_BATCH_BYTES = 64 * 2**20
MAX_BATCH_IMAGES = 2048
ARROW = "application/vnd.apache.arrow.stream"
MULTIPART = "multipart/form-data"

_BINARY = {"type": "string", "format": "binary"}
ONE_IMAGE: dict[str, Any] = {
    "requestBody": {"required": True, "content": {f"image/{kind}": {"schema": _BINARY} for kind in ("png", "jpeg")}}
}
MANY_IMAGES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            MULTIPART: {"schema": {"type": "object", "properties": {"image": {"type": "array", "items": _BINARY}}}},
            ARROW: {"schema": _BINARY},
        },
    }
}


class Wishes(BaseModel):
    """What a request may ask for, as query parameters."""

    edge_only: bool = Field(default=False, description="Nothing of this request leaves the edge.")
    threshold: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="In place of the operating point's threshold, in its gate's unit.",
    )
    deadline_ms: float | None = Field(
        default=None, ge=10, allow_inf_nan=False, description="Time for the whole request, the server's own at most."
    )


ExitName = Literal["main", "extension", "cloud"]
EXIT_NAMES: tuple[ExitName, ...] = ("main", "extension", "cloud")
"""By `meanet.routing.Exit`."""


class Joules(BaseModel):
    """What the answer cost the edge device."""

    edge_compute: float
    """J."""
    upload: float
    """J."""
    source: str
    """`modelled:<profiles>`."""


class Milliseconds(BaseModel):
    """Where the time of the answer's micro-batch went."""

    edge: float
    cloud: float
    """0 where the cloud was not asked."""
    upload: float
    """Of `cloud`, what the images' way there and the answer's back took: measured by the edge's clock, less what the
    cloud took by its own. 0 where the cloud did not answer."""
    upload_modelled: float
    """What the model's link would take for the same bytes."""


class AppliedPolicy(BaseModel):
    """The rule that was applied to this request."""

    id: str
    gate: str
    thresholds: list[float | None]
    edge_only: bool


class ServedBy(BaseModel):
    """Ray's ids of the nodes that had a part in the answer."""

    edge: str
    cloud: str | None
    """Null where the cloud did not answer."""


class Answer(BaseModel):
    """One image's answer."""

    class_id: int
    class_name: str
    exit: ExitName
    confidence: float
    """0..1, of the answer."""
    entropy: float | None
    """Of the main exit, nats; null where its logits were not finite."""
    degraded: bool
    """The cloud was wanted and not had."""
    reason: str | None
    """Why, where degraded."""
    joules: Joules
    ms: Milliseconds
    model_version: int
    policy: AppliedPolicy
    served_by: ServedBy


class BatchAnswer(BaseModel):
    """The answers of a batch, in the order of its images."""

    answers: list[Answer]


class Health(BaseModel):
    """The replica is up."""

    status: Literal["ok"]
    model_version: int


class ModelDescription(BaseModel):
    """What is served."""

    name: str
    version: int
    recipe: str
    class_names: list[str]
    hard_classes: list[int]
    input: dict[str, Any]
    """The image that the model takes: height, width, channels."""
    macs: dict[str, int]
    operating_point: dict[str, Any]


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, refused as soon as it is known to be too long.

    Raises:
        HTTPException: 413 above `limit` bytes.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large(int(announced), limit)
    chunks, total = [], 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > limit:
            raise too_large(total, limit)
        chunks.append(chunk)
    return b"".join(chunks)


def too_large(size: int, limit: int) -> HTTPException:
    """413, with the reason."""
    return HTTPException(413, f"the body has {size} bytes or more and the limit is {limit}: send less at a time")


async def read_images(request: Request) -> list[bytes]:
    """The images of a batch, in order.

    Raises:
        HTTPException: 413, 415 or 422, with the reason.
    """
    body = await read_body(request, MAX_BATCH_BYTES)
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type == ARROW:
        images = _from_arrow(body)
    elif content_type == MULTIPART:
        images = _from_multipart(body, request.headers["content-type"])
    else:
        raise HTTPException(415, f"content type {content_type!r}: send {MULTIPART} or {ARROW}")
    if not images:
        raise HTTPException(422, "the batch holds no images: send one or more")
    if len(images) > MAX_BATCH_IMAGES:
        raise HTTPException(413, f"the batch holds {len(images)} images and the limit is {MAX_BATCH_IMAGES}: split it")
    return images


def _from_arrow(body: bytes) -> list[bytes]:
    try:
        return images_of(body, MAX_BATCH_IMAGES)
    except RefusedError as error:
        raise HTTPException(422, f"the body's Arrow IPC stream is refused: {error}") from error


def _from_multipart(body: bytes, content_type: str) -> list[bytes]:
    try:
        return multipart.files_of(body, content_type, MAX_BATCH_IMAGES, MAX_IMAGE_BYTES)
    except multipart.RefusedError as error:
        raise HTTPException(422, f"the multipart body cannot be read: {error}") from error
