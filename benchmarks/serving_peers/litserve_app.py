"""LitServe with batching and raw bodies: `python -m benchmarks.serving_peers.litserve_app edge|cloud PORT`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import litserve
from fastapi import Body

from benchmarks.serving_peers.predict import MAX_BATCH, Cloud, CloudAnswers, Edge, HttpCloud, unpack

FOLDER = Path(os.environ["SERVED_FOLDER"])
CLOUD = os.environ.get("CLOUD_ADDRESS")
Raw = Annotated[bytes, Body(media_type="application/octet-stream")]


class EdgeAPI(litserve.LitAPI):
    """Answers images in batches."""

    def setup(self, device: str) -> None:
        """Load the networks."""
        self.edge = Edge(FOLDER, HttpCloud(CLOUD, "/classify") if CLOUD else None)

    def decode_request(self, request: Raw) -> bytes:
        """The body as it came; decoded with its batch."""
        return request

    def batch(self, inputs: Sequence[bytes]) -> list[bytes]:
        """Of bytes nothing is stacked."""
        return list(inputs)

    def predict(self, bodies: list[bytes]) -> list[dict[str, Any]]:
        """The batch's answers."""
        return self.edge.predict(bodies)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One a request."""
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """JSON is made of it as it is."""
        return output


class CloudAPI(litserve.LitAPI):
    """Answers whole batches, one a request."""

    def setup(self, device: str) -> None:
        """Load the network."""
        self.cloud = Cloud(FOLDER)

    def decode_request(self, request: Raw) -> bytes:
        """The body as it came."""
        return request

    def predict(self, body: bytes) -> CloudAnswers:
        """Classes and confidences."""
        return self.cloud.classify(unpack(body))

    def encode_response(self, output: CloudAnswers) -> CloudAnswers:
        """JSON is made of it as it is."""
        return output


if __name__ == "__main__":
    role, port = sys.argv[1:]
    if role == "edge":
        api: litserve.LitAPI = EdgeAPI(max_batch_size=MAX_BATCH, batch_timeout=0.0, api_path="/classify")
    else:
        api = CloudAPI(api_path="/classify")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=30)
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning")
