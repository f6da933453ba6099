"""GET and PUT of policy, settings and version: read by anybody, written by the token's holder.

A PUT answers once every replica that serves has the change (200), or after `wait_s` that it goes on (202).
"""

import asyncio
import json
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve

from meanet.config import Gate
from meanet.errors import UserError
from meanet.routing import policy_id
from serve_apps.audit import is_drift
from serve_apps.control import Reply
from serve_apps.http import read_body
from serve_apps.keeping import why_no_budget
from serve_apps.live import LiveEdge
from serve_apps.wishes import PolicyWish

router = APIRouter()
_MAX_BODY = 64 * 2**10
_SLACK_S = 5.0
Body = TypeVar("Body", bound=BaseModel)


def _live() -> LiveEdge:
    live: LiveEdge = serve.get_replica_context().servable_object.live_edge  # type: ignore[attr-defined]
    return live


Live = Annotated[LiveEdge, Depends(_live)]
Wait = Annotated[float, Query(ge=0, le=50, allow_inf_nan=False, description="How long to wait for all replicas, s.")]


class PolicyBody(BaseModel):
    """In place of the operating point's policy; what is left out stays as that has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    gate: Gate | None = None
    thresholds: list[Annotated[float, Field(allow_inf_nan=False)] | None] | None = Field(
        default=None, description="In the gate's unit; null = never to the cloud.", max_length=100_000
    )
    num_hard_classes: int | None = Field(default=None, description="Of the trained ones, the hardest first.")
    edge_only: bool | None = None


class VersionBody(BaseModel):
    """What to serve."""

    model_config = ConfigDict(extra="forbid")

    version: int | str = Field(description="A version's number, or an alias, which is then followed.")


def _body_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "202": {"description": "Taken, and not everywhere yet."},
            "401": {"description": "The token is wrong or missing."},
            "403": {"description": "Writes are off, or not for this page."},
            "409": {"description": "Refused: the state before stands."},
            "415": {"description": "The body is no application/json."},
        },
    }


@router.get("/v1/policy")
async def get_policy(live: Live) -> dict[str, Any]:
    """The policy in force here, and where it comes from."""
    return _policy(live, await _view(live))


@router.put("/v1/policy", openapi_extra=_body_of({"anyOf": [PolicyBody.model_json_schema(), {"type": "null"}]}))
async def put_policy(request: Request, response: Response, live: Live, wait_s: Wait = 10.0) -> dict[str, Any]:
    """Put thresholds, gate, hard classes or edge_only in the operating point's place; null = back to that."""
    plain = await _written(request, live)
    served, wish = live.service.served, None
    if plain is not None:
        body = _checked(PolicyBody, plain)
        wish = PolicyWish.of({"version": served.version, **body.model_dump()})
        try:
            live.service.settings.check_thresholds(wish.thresholds or ())
            policy = wish.applied_to(served.model)
        except UserError as error:
            raise HTTPException(422, str(error)) from error
        if live.service.settings.budget is not None and (why := why_no_budget(policy)):
            raise HTTPException(409, f"a budget is set, and {why}; or set the budget to null")
    view = _after(await _ask(live.control.change_policy.remote(wish, wait_s), wait_s), response)
    return _policy(live, view)


@router.get("/v1/settings")
async def get_settings(live: Live) -> dict[str, Any]:
    """Deadlines, breaker, bounds, budget and audit."""
    return _settings(await _view(live))


@router.put("/v1/settings", openapi_extra=_body_of({"type": "object", "description": "Any of what GET shows."}))
async def put_settings(request: Request, response: Response, live: Live, wait_s: Wait = 10.0) -> dict[str, Any]:
    """Change some settings; the others stay."""
    plain = await _written(request, live)
    if not isinstance(plain, dict):
        raise HTTPException(422, "give an object of settings")
    try:
        wanted = live.service.settings.updated(plain)
    except UserError as error:
        raise HTTPException(422, str(error)) from error
    if wanted.budget is not None and (why := why_no_budget(live.service.served.policy)):
        raise HTTPException(409, f"budget: {why}")
    return _settings(_after(await _ask(live.control.change_settings.remote(plain, wait_s), wait_s), response))


@router.get("/v1/version")
async def get_version(live: Live) -> dict[str, Any]:
    """What is served, what is on its way, what was refused and why, and which replica has what."""
    return _version(await _view(live))


@router.put("/v1/version", openapi_extra=_body_of(VersionBody.model_json_schema()))
async def put_version(request: Request, response: Response, live: Live, wait_s: Wait = 30.0) -> dict[str, Any]:
    """Serve another version, with no request lost on the way, or follow an alias."""
    body = _checked(VersionBody, await _written(request, live))
    change = live.control.change_version.remote(str(body.version), wait_s)
    return _version(_after(await _ask(change, wait_s), response))


@router.get("/v1/audit")
async def get_audit(live: Live) -> dict[str, Any]:
    """How often the cloud disagrees with what the edge was sure of, over all replicas, and whether that is drift."""
    view = await _view(live)
    audits = [replica["audit"] for replica in view["replicas"] if replica.get("audit")]
    count, disagreed = (sum(audit[name] for audit in audits) for name in ("count", "disagreed"))
    expected = next((audit["expected"] for audit in audits if audit["expected"] is not None), None)
    setting = view["settings"]["audit"]
    drifted = None if expected is None else is_drift(disagreed, count, expected, setting["significance"])
    return {
        "share": setting["share"],
        "count": count,
        "disagreement": disagreed / count if count else None,
        "expected": expected,
        "drifted": drifted if drifted is None else drifted or any(audit["drifted"] for audit in audits),
        "version": view["version"],
    }


def _policy(live: LiveEdge, view: dict[str, Any]) -> dict[str, Any]:
    served = live.service.served
    policy = served.policy
    return {
        "version": served.version,
        "policy": {
            "id": policy_id(policy),
            "gate": policy.gate,
            "thresholds": list(policy.thresholds),
            "num_hard_classes": len(policy.hard_classes),
            "edge_only": policy.edge_only,
        },
        "source": "operating point" if view["policy"] is None else "operator",
        "moved_by_budget": live.service.settings.budget is not None and why_no_budget(policy) is None,
        "bounds": [view["settings"]["lowest_threshold"], view["settings"]["highest_threshold"]],
        **_spread(view),
    }


def _settings(view: dict[str, Any]) -> dict[str, Any]:
    return {"settings": view["settings"], **_spread(view)}


def _version(view: dict[str, Any]) -> dict[str, Any]:
    return {name: view[name] for name in ("version", "reference", "phase", "target", "refused")} | _spread(view)


def _spread(view: dict[str, Any]) -> dict[str, Any]:
    return {"revision": view["revision"], "replicas": view["replicas"]}


async def _view(live: LiveEdge) -> dict[str, Any]:
    view: dict[str, Any] = await _ask(live.control.view.remote(), 0.0)
    return view


async def _ask(call: Any, wait_s: float) -> Any:
    try:
        return await asyncio.wait_for(call, wait_s + _SLACK_S)
    except Exception as error:  # control restarts, or its node is gone: replicas go on with what they have
        raise HTTPException(
            503, f"control does not answer ({type(error).__name__}): ask again", {"Retry-After": "2"}
        ) from error


def _after(reply: Reply, response: Response) -> dict[str, Any]:
    outcome, view = reply
    if outcome.away:
        raise HTTPException(503, outcome.refused, {"Retry-After": "5"})
    if outcome.refused is not None:
        raise HTTPException(422 if outcome.nonsense else 409, outcome.refused)
    response.status_code = 200 if outcome.done else 202
    return view


async def _written(request: Request, live: LiveEdge) -> Any:
    """The JSON of a write that is allowed.

    Raises:
        HTTPException: 401 or 403; 413, 415 or 422 for its body.
    """
    refusal = live.writes.refusal(request.headers)
    if refusal is not None:
        raise HTTPException(refusal.status, refusal.detail, refusal.headers)
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"content type {kind!r}: send application/json")
    try:
        return json.loads(await read_body(request, _MAX_BODY))
    except (ValueError, RecursionError) as error:
        raise HTTPException(422, f"the body's JSON cannot be read: {error}") from error


def _checked(kind: type[Body], plain: Any) -> Body:
    try:
        return kind.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise HTTPException(422, f"{place}: {first['msg']}") from error
