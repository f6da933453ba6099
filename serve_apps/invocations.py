"""MLflow's scoring protocol as `mlflow models serve` speaks it, for the one input that the model has: images in base64.

Source: https://mlflow.org/docs/latest/ml/deployment/deploy-model-locally/ (JSON of `dataframe_split`,
`dataframe_records`, `inputs` or `instances`).
"""

import base64
import binascii
from collections.abc import Sequence
from typing import Any

from fastapi import HTTPException
from pydantic import ValidationError

from serve_apps import json_size
from serve_apps.http import Answer, Wishes

COLUMNS = ("class_id", "class_name", "exit", "confidence", "entropy")
"""Of the predictions, as the registered model's signature names them."""
_ABOUT = ("degraded", "reason", "model_version")
"""Of them, what only a server knows; the policy's id beside these."""
_KEYS = ("dataframe_split", "dataframe_records", "inputs", "instances")


def read(body: bytes, content_type: str, limit: int) -> tuple[list[bytes], Wishes]:
    """The images of a request, in order, and what its `params` wish.

    Raises:
        HTTPException: 415 unless it is JSON; 400 with the reason for what cannot be read; 413 above `limit` images,
            or for more structure than their JSON has.
    """
    kind = content_type.split(";", maxsplit=1)[0].strip().lower()
    if kind not in ("application/json", ""):
        raise HTTPException(415, f"content type {kind!r}: send application/json")
    try:
        plain = json_size.loads(body)
    except json_size.CrowdedError as error:
        raise HTTPException(413, str(error)) from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body's JSON cannot be read: {error}") from error
    given = [key for key in _KEYS if isinstance(plain, dict) and key in plain]
    if len(given) != 1:
        raise HTTPException(400, f"give an object with one of {', '.join(_KEYS)}")
    try:
        wishes = Wishes.model_validate(plain.get("params") or {})
    except ValidationError as error:
        raise HTTPException(400, f"params: {error}") from error
    cells = _cells(given[0], plain[given[0]])
    if len(cells) > limit:
        raise HTTPException(413, f"{len(cells)} images and the limit is {limit}: split the request")
    if not cells or not all(isinstance(cell, str) for cell in cells):
        raise HTTPException(400, "give one or more images, each a string in base64, in a column or under a key `image`")
    try:
        return [base64.b64decode(cell, validate=True) for cell in cells], wishes
    except (binascii.Error, ValueError) as error:
        raise HTTPException(400, f"an image is no base64: {error}") from error


def predictions(answers: Sequence[Answer]) -> dict[str, Any]:
    """What goes back."""
    rows = (answer.model_dump(include={*COLUMNS, *_ABOUT}) | {"policy": answer.policy.id} for answer in answers)
    return {"predictions": list(rows)}


def _cells(key: str, content: Any) -> list[Any]:
    if key == "dataframe_split" and isinstance(content, dict):
        columns, rows = content.get("columns", ["image"]), content.get("data")
        if columns == ["image"] and isinstance(rows, list):
            return [row[0] if isinstance(row, list) and len(row) == 1 else row for row in rows]
        return []
    if isinstance(content, dict):
        content = content.get("image")
    if not isinstance(content, list):
        return []
    return [row.get("image") if isinstance(row, dict) else row for row in content]
