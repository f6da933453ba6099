"""What lies in an S3 server's bucket of a training's checkpoints, for those who kill one or the other."""

import json
import tempfile
from pathlib import Path
from typing import Any

from jobs._s3_server import S3Server

BUCKET = "meanet"


class Bucket:
    """Looks at what lies there, past whatever stands before the server."""

    def __init__(self, server: S3Server, prefix: str) -> None:
        """Below a prefix."""
        import boto3

        session = boto3.session.Session(server.key, server.secret, region_name="us-east-1")
        self._prefix, self._client = f"{prefix}/", session.client("s3", endpoint_url=server.url)

    def uploads(self) -> set[str]:
        """Ids of uploads in parts that are open."""
        listed = self._client.list_multipart_uploads(Bucket=BUCKET, Prefix=self._prefix)
        return {upload["UploadId"] for upload in listed.get("Uploads", ())}

    def keys(self) -> dict[str, int]:
        """Key -> bytes."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=self._prefix)
        return {one["Key"]: one["Size"] for page in pages for one in page.get("Contents", ())}

    def newest(self) -> tuple[str | None, list[dict[str, Any]], float]:
        """Folder, history and MB of the newest checkpoint that lies whole in the bucket: it is read to its end."""
        for key in sorted((key for key in self.keys() if key.endswith("/state.pt")), reverse=True):
            history, megabytes = self._read(key)
            if history is not None:
                return key.split("/")[-2], history, megabytes
        return None, [], 0.0

    def registered(self) -> int:
        """Epochs of the checkpoint that Ray's own snapshot names as the latest."""
        for key in self.keys():
            if key.endswith("checkpoint_manager_snapshot.json"):
                snapshot = json.loads(self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
                name = snapshot["latest_checkpoint_result"]["checkpoint_dir_name"]
                return len(self._read(f"{key.rpartition('/')[0]}/{name}/state.pt")[0] or ())
        return 0

    def empty(self) -> set[str]:
        """Checkpoints' folders that hold no whole one."""
        keys = self.keys()
        folders = {key.split("/")[-2] for key in keys if "/checkpoint_" in key and "snapshot" not in key}
        return folders - {key.split("/")[-2] for key in keys if key.endswith("/state.pt")}

    def _read(self, key: str) -> tuple[list[dict[str, Any]] | None, float]:
        import torch

        with tempfile.NamedTemporaryFile() as file:
            self._client.download_fileobj(BUCKET, key, file)
            file.flush()
            try:
                state: dict[str, Any] = torch.load(file.name, weights_only=True, map_location="cpu")
            except (RuntimeError, EOFError):
                return None, 0.0
            return list(state["history"]), Path(file.name).stat().st_size / 1e6
