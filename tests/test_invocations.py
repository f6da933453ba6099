"""MLflow's scoring protocol: each form of the same images, and what is refused."""

import base64
import json
from typing import Any

import pytest
from fastapi import HTTPException

from serve_apps.http import Wishes
from serve_apps.invocations import read

FILES = [b"\x89PNG", b"two"]
TEXT = [base64.b64encode(one).decode() for one in FILES]


@pytest.mark.parametrize(
    "plain",
    [
        {"dataframe_split": {"columns": ["image"], "data": [[one] for one in TEXT]}},
        {"dataframe_split": {"index": [0, 1], "columns": ["image"], "data": TEXT}},
        {"dataframe_records": [{"image": one} for one in TEXT]},
        {"inputs": TEXT},
        {"inputs": {"image": TEXT}},
        {"instances": [{"image": one} for one in TEXT]},
        {"instances": TEXT},
    ],
)
def test_every_form_holds_the_same_images(plain: dict[str, Any]) -> None:
    assert read(json.dumps(plain).encode(), "application/json; charset=utf-8", 8) == (FILES, Wishes())


def test_params_are_the_wishes_of_a_request() -> None:
    params = {"edge_only": True, "threshold": 0.5, "deadline_ms": 100}
    plain = {"inputs": TEXT, "params": params}
    assert read(json.dumps(plain).encode(), "application/json", 8) == (FILES, Wishes(**params))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("plain", "kind", "status", "says"),
    [
        ({"inputs": TEXT}, "text/csv", 415, "send application/json"),
        ("{", "application/json", 400, "cannot be read"),
        ({}, "", 400, "one of dataframe_split"),
        ([1], "", 400, "one of dataframe_split"),
        ({"inputs": TEXT, "instances": TEXT}, "", 400, "one of"),
        ({"inputs": []}, "", 400, "one or more images"),
        ({"inputs": [1]}, "", 400, "one or more images"),
        ({"inputs": None}, "", 400, "one or more images"),
        ({"inputs": {"picture": TEXT}}, "", 400, "one or more images"),
        ({"dataframe_split": {"columns": ["x"], "data": [["a"]]}}, "", 400, "one or more images"),
        ({"dataframe_split": {"columns": ["image"], "data": {"a": 1}}}, "", 400, "one or more images"),
        ({"dataframe_records": [{"x": 1}]}, "", 400, "one or more images"),
        ({"inputs": ["no base64!"]}, "", 400, "no base64"),
        ({"inputs": TEXT, "params": {"deadline_ms": -1}}, "", 400, "deadline_ms"),
        ({"inputs": TEXT, "params": "fast"}, "", 400, "params"),
        ({"inputs": TEXT * 5}, "", 413, "10 images and the limit is 8"),
    ],
)
def test_what_is_not_of_the_protocol_is_refused(plain: Any, kind: str, status: int, says: str) -> None:
    body = plain.encode() if isinstance(plain, str) else json.dumps(plain).encode()
    with pytest.raises(HTTPException) as caught:
        read(body, kind, 8)
    assert caught.value.status_code == status
    assert says in caught.value.detail
