"""`POST /v1/classify` without a web framework, before FastAPI: its cost a request is what a small network's is.

Takes what is usual and answers as FastAPI's route does, refusals too; anything unusual goes on to FastAPI.
"""

import asyncio
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from meanet.errors import UserError
from serve_apps.edge import EdgeService, OverloadedError
from serve_apps.http import MAX_IMAGE_BYTES, Answer, Wishes, too_large
from serve_apps.watched import answered

PATH = "/v1/classify"
_NUMBER = r"\d{1,9}(\.\d{1,9})?"
_PLAIN_QUERY = re.compile(f"(edge_only=(true|false)|threshold=-?{_NUMBER}|deadline_ms={_NUMBER})(&|$)".encode())
_QUERY_BYTES = 100
_KEPT = 256
BODY_S = 60.0
"""How long a body may take, as any request may that Serve handles."""
_WISHES = "meanet.wishes"
"""In the scope of a request that is answered here."""


async def ask(service: EdgeService, images: Any, wishes: Wishes) -> list[Answer]:
    """The answers to bodies or (N, H, W, C) pixels under a request's wishes.

    Raises:
        HTTPException: 422 and 503 with Retry-After, with the reason.
    """
    deadline = None if wishes.deadline_ms is None else wishes.deadline_ms / 1000
    try:
        served = service.served
        policy = served.policy
        if wishes.threshold is not None:
            service.settings.check_thresholds([wishes.threshold])
        if wishes.edge_only or wishes.threshold is not None:
            policy = policy.with_request(edge_only=wishes.edge_only, threshold=wishes.threshold)
        if isinstance(images, list):
            answers = await service.answer(images, policy, deadline, served)
        else:
            answers = await service.answer_pixels(images, policy, deadline, served)
    except UserError as error:
        raise HTTPException(422, str(error)) from error
    except OverloadedError as error:
        headers = {"Retry-After": str(math.ceil(error.retry_after_s))}
        raise HTTPException(503, f"overloaded: {error}; try again later", headers) from error
    answered(answers)
    return answers


class FastPath:
    """ASGI middleware."""

    def __init__(
        self,
        app: ASGIApp,
        service: Callable[[], EdgeService],
        around: Callable[[ASGIApp], ASGIApp] = lambda answering: answering,
    ) -> None:
        """Stand before an application.

        Args:
            app: it.
            service: asked for at each request: a replica has it only once it is up.
            around: what a request goes through that is answered here.
        """
        self._app, self._service, self._answering = app, service, around(self._answer)
        self._wishes: dict[bytes, Wishes] = {b"": Wishes()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        wishes = None
        if scope["type"] == "http" and scope["path"] == PATH and scope["method"] == "POST":
            wishes = self._wishes_of(scope["query_string"])
        if wishes is None:
            await self._app(scope, receive, send)
            return
        scope[_WISHES] = wishes
        await self._answering(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(BODY_S):
                body = await _body(scope, receive)
            if body is None:  # the client is gone
                return
            (answer,) = await ask(self._service(), [body], scope[_WISHES])
        except TimeoutError:
            await JSONResponse({"detail": f"the body did not come within {BODY_S:g} s: send it faster"}, 408)(
                scope, receive, send
            )
            return
        except HTTPException as error:
            refusal = JSONResponse({"detail": error.detail}, error.status_code, error.headers)
            await refusal(scope, receive, send)
            return
        content = as_json(answer)
        headers = [(b"content-length", b"%d" % len(content)), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _wishes_of(self, query: bytes) -> Wishes | None:
        """What a plain query asks for; None where FastAPI is to read it."""
        known = self._wishes.get(query)
        if known is not None or len(query) > _QUERY_BYTES:
            return known
        words, place = {}, 0
        while place < len(query):
            found = _PLAIN_QUERY.match(query, place)
            if found is None:
                return None
            name, _, value = found.group(1).decode().partition("=")
            if name in words:
                return None
            words[name], place = value, found.end()
        try:
            wishes = Wishes.model_validate(words)
        except ValueError:  # FastAPI's words are better
            return None
        if len(self._wishes) < _KEPT:
            self._wishes[query] = wishes
        return wishes


async def _body(scope: Scope, receive: Receive) -> bytes | None:
    """As `http.read_body`."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > MAX_IMAGE_BYTES:
            raise too_large(int(value), MAX_IMAGE_BYTES)
    message = await receive()
    if not message.get("more_body", False) and message["type"] == "http.request":
        body: bytes = message.get("body", b"")
        if len(body) > MAX_IMAGE_BYTES:
            raise too_large(len(body), MAX_IMAGE_BYTES)
        return body
    chunks, total = [], 0
    while message["type"] == "http.request":
        chunk = message.get("body", b"")
        total += len(chunk)
        if total > MAX_IMAGE_BYTES:
            raise too_large(total, MAX_IMAGE_BYTES)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)
        message = await receive()
    return None


_texts: dict[str, str] = {}
_policies: dict[tuple[str, bool], str] = {}


def as_json(answer: Answer) -> bytes:
    """What pydantic would write, at a tenth of the time."""
    joules, ms, policy = answer.joules, answer.ms, answer.policy
    applied = _policies.get((policy.id, policy.edge_only))
    if applied is None:
        thresholds = ",".join("null" if value is None else _number(value) for value in policy.thresholds)
        applied = (
            f'{{"id":{_text(policy.id)},"gate":{_text(policy.gate)},"thresholds":[{thresholds}],'
            f'"edge_only":{_truth(policy.edge_only)}}}'
        )
        _keep(_policies, (policy.id, policy.edge_only), applied)
    return (
        f'{{"class_id":{answer.class_id},"class_name":{_text(answer.class_name)},"exit":"{answer.exit}",'
        f'"confidence":{_number(answer.confidence)},"entropy":{_number(answer.entropy)},'
        f'"degraded":{_truth(answer.degraded)},"reason":{"null" if answer.reason is None else _text(answer.reason)},'
        f'"joules":{{"edge_compute":{_number(joules.edge_compute)},"upload":{_number(joules.upload)},'
        f'"source":{_text(joules.source)}}},"ms":{{"edge":{_number(ms.edge)},"cloud":{_number(ms.cloud)},'
        f'"upload":{_number(ms.upload)},"upload_modelled":{_number(ms.upload_modelled)}}},'
        f'"model_version":{answer.model_version},"policy":{applied},"served_by":{{"edge":{_text(answer.served_by.edge)},'
        f'"cloud":{"null" if answer.served_by.cloud is None else _text(answer.served_by.cloud)}}}}}'
    ).encode()


def batch_as_json(answers: Sequence[Answer]) -> bytes:
    """Of a batch."""
    return b'{"answers":[' + b",".join(map(as_json, answers)) + b"]}"


def _number(value: float | None) -> str:
    return "null" if value is None or not math.isfinite(value) else repr(float(value))


def _truth(value: bool) -> str:
    return "true" if value else "false"


def _text(value: str) -> str:
    """Quoted and escaped; class names and the like are few."""
    known = _texts.get(value)
    if known is None:
        known = json.dumps(value, ensure_ascii=False)
        _keep(_texts, value, known)
    return known


def _keep(kept: dict[Any, str], key: Any, value: str) -> None:
    if len(kept) >= 16 * _KEPT:
        kept.clear()
    kept[key] = value
