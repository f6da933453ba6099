"""BentoML with adaptive batching and raw bodies: `bentoml serve benchmarks.serving_peers.bento_app:EdgeService`."""

import os
from pathlib import Path
from typing import Any

import bentoml
from bentoml import IODescriptor
from pydantic import Field
from starlette.requests import Request

from benchmarks.serving_peers.predict import MAX_BATCH, Cloud, Edge, HttpCloud, unpack

FOLDER = Path(os.environ["SERVED_FOLDER"])
CLOUD = os.environ.get("CLOUD_ADDRESS")


class RawBody(IODescriptor):
    """The body's bytes as they came: the documented types would have them in JSON or in a form."""

    bodies: list[bytes] = Field(default_factory=list)

    @classmethod
    async def from_http_request(cls, request: Request, serde: Any) -> "RawBody":
        """A batch of one, which BentoML joins to others."""
        return cls.model_construct(bodies=[await request.body()])


@bentoml.service(workers=1, traffic={"timeout": 30}, logging={"access": {"enabled": False}})
class EdgeService:
    """Answers images in batches."""

    def __init__(self) -> None:
        self.edge = Edge(FOLDER, HttpCloud(CLOUD, "/classify") if CLOUD else None)

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=2000, input_spec=RawBody)
    def classify(self, bodies: list[bytes]) -> list[dict[str, Any]]:
        """The batch's answers."""
        return self.edge.predict(bodies)


@bentoml.service(workers=1, traffic={"timeout": 30}, logging={"access": {"enabled": False}})
class CloudService:
    """Answers whole batches, one a request."""

    def __init__(self) -> None:
        self.cloud = Cloud(FOLDER)

    @bentoml.api(input_spec=RawBody)
    def classify(self, bodies: list[bytes]) -> list[tuple[int, float]]:
        """Classes and confidences."""
        return self.cloud.classify(unpack(bodies[0]))
