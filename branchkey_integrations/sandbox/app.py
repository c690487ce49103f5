"""The routes of PROTOCOL section 2, as an ASGI application over :class:`Service`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union
from urllib.parse import quote, urlsplit

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute

from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import CredentialsError
from branchkey_integrations.sandbox.answer import Answer, send_answer
from branchkey_integrations.sandbox.intercept import Interceptions, described, failed
from branchkey_integrations.sandbox.notifications import WebSocketApp
from branchkey_integrations.sandbox.reception import Refusal, receive_upload, remove_quietly
from branchkey_integrations.sandbox.service import Service
from branchkey_integrations.sandbox.tickets import EXPIRED, GOOD, LinkSigner, TicketOffice

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

_MOST_JSON_BYTES = 1 << 20
_API = "/api/v1"

Endpoint = Callable[[Request], Awaitable[Answer]]


class App:
    """Answer requests.

    Args:
        service: what does the work.
        interceptions: where tests stand between request and answer.
        tickets, links: the permissions that run out.
        max_upload_bytes: largest multipart body; None means no limit.
        model_config: goes into the branch configuration, if given.
    """

    def __init__(
        self,
        service: Service,
        interceptions: Interceptions,
        tickets: TicketOffice,
        links: LinkSigner,
        max_upload_bytes: int | None,
        model_config: Mapping[str, Any] | None,
    ) -> None:
        self._service = service
        self._interceptions = interceptions
        self._tickets = tickets
        self._links = links
        self._max_upload_bytes = max_upload_bytes
        self._model_config = model_config

    def build(self) -> Starlette:
        """Put the routes together. Errors are JSON objects with a string ``error``, whoever finds them."""

        def route(path: str, name: str, method: str, endpoint: Endpoint) -> BaseRoute:
            return Route(path, _Exchange(self._service, self._interceptions, name, endpoint), methods=[method])

        routes: list[BaseRoute] = [
            route(f"{_API}/run/{{branch_id}}", "run", "GET", self._run),
            route(f"{_API}/file/upload", "upload", "POST", self._upload),
            route(f"{_API}/file/download/{{aggregation_id}}", "download", "GET", self._download),
            route("/objects/{aggregation_id}", "object", "GET", self._object),
            route(f"{_API}/performance/analysis", "metrics", "POST", self._metrics),
            route(f"{_API}/config/branch/{{branch_id}}", "config", "GET", self._config),
            route(f"{_API}/ws/ticket", "ticket", "POST", self._ticket),
            route("/v2/entities", "entities", "POST", self._entities),
            route("/api/v2/entities", "entities", "POST", self._entities),
            WebSocketRoute(f"{_API}/ws", WebSocketApp(self._service, self._interceptions, self._tickets)),
        ]
        return Starlette(routes=routes, exception_handlers={404: _as_json, 405: _as_json})

    # --- who asks ------------------------------------------------------------------------------------------------

    def _leaf(self, request: Request) -> Credentials:
        leaf = self._service.roster.authenticate(request.headers.get("authorization"))
        if leaf is None:
            raise Refusal(401, "Authorization: expected 'Bearer <id>:<session_token>' of a leaf of this branch")
        return leaf

    def _leaf_of_branch(self, request: Request) -> Credentials:
        leaf = self._leaf(request)
        if request.path_params["branch_id"] != leaf.branch_id:
            raise Refusal(404, f"branch: expected {leaf.branch_id}, found {request.path_params['branch_id'][:80]!r}")
        return leaf

    # --- endpoints -------------------------------------------------------------------------------------------------

    async def _run(self, request: Request) -> Answer:
        leaf = self._leaf_of_branch(request)
        return Answer.json({"data": {"branch_id": leaf.branch_id, **self._service.run_details(leaf.id)}, "error": None})

    async def _upload(self, request: Request) -> Answer:
        leaf = self._leaf(request)
        self._service.require_started()
        _limit(request, self._max_upload_bytes)
        headers = dict(request.headers)
        path = self._service.store.incoming_path(f"{id(request):x}.npz")
        loop = asyncio.get_running_loop()
        try:
            parcel = await receive_upload(headers, request.stream(), path, self._max_upload_bytes)
            receipt = await loop.run_in_executor(self._service.checks, self._service.accept, leaf, parcel, headers)
        finally:
            remove_quietly(path)
        return Answer.json({"data": {"file_id": receipt.file_id}, "error": None}, 201)

    async def _download(self, request: Request) -> Answer:
        leaf = self._leaf(request)
        aggregation_id = request.path_params["aggregation_id"]
        if not self._service.fetched(leaf.id, aggregation_id):
            raise Refusal(404, f"aggregate: expected an id that was announced, found {aggregation_id[:80]!r}")
        # The host that the leaf used is one that it can reach, whatever stands in between.
        base = urlsplit(str(request.base_url))
        query = self._links.query(aggregation_id)
        url = f"{base.scheme}://{base.netloc}/objects/{quote(aggregation_id, safe='')}?{query}"
        return Answer.json({"data": {"download_url": url}, "error": None})

    async def _object(self, request: Request) -> Answer:
        for name in ("authorization", "leaf"):
            if name in request.headers:
                # S3 takes one way of authentication at a time, and refuses any second one beside the signature.
                message = "Only one auth mechanism allowed; the link is signed, and there is a header beside it"
                return Answer.xml(400, "InvalidArgument", message)
        aggregation_id = request.path_params["aggregation_id"]
        query = request.query_params
        verdict = self._links.check(aggregation_id, query.get("expires", ""), query.get("signature", ""))
        if verdict != GOOD:
            return Answer.xml(403, "AccessDenied", "Request has expired" if verdict == EXPIRED else "Access Denied")
        path = Path(self._service.store.aggregate_path(aggregation_id))
        if not path.exists():
            return Answer.xml(404, "NoSuchKey", "The specified key does not exist.")
        return Answer(200, path, "binary/octet-stream")

    async def _metrics(self, request: Request) -> Answer:
        self._leaf(request)
        # Clients send no Content-Type here, so none is asked for.
        content = await _json_body(request)
        if not isinstance(content, dict):
            raise Refusal(400, "metrics: expected a JSON object as the body")
        self._service.add_metrics(content)
        return Answer.json({"data": {}, "error": None}, 201)

    async def _config(self, request: Request) -> Answer:
        leaf = self._leaf_of_branch(request)
        created = self._service.created_at
        content: dict[str, Any] = {
            "branch": {"id": leaf.branch_id, "name": "sandbox", "tree_id": leaf.tree_id},
            "service": "federated_learning",
            "created_at": created,
            "updated_at": created,
        }
        if self._model_config is not None:
            content["model_config"] = dict(self._model_config)
        return Answer.json({"data": content, "error": None})

    async def _ticket(self, request: Request) -> Answer:
        ticket = self._tickets.issue(self._leaf(request).id)
        content = {"ticket_id": ticket.ticket_id, "request_id": ticket.request_id, "expires_at": ticket.expires_at}
        return Answer.json({"data": content, "error": None})

    async def _entities(self, request: Request) -> Answer:
        content = await _json_body(request)
        name = content.get("name") if isinstance(content, dict) else None
        if not isinstance(content, (dict, type(None))) or not isinstance(name, (str, type(None))):
            raise Refusal(400, "entity: expected no body or a JSON object with a string 'name'")
        loop = asyncio.get_running_loop()
        try:
            # A broker has to be told first, and that takes longer than the loop may stand still.
            leaf = await loop.run_in_executor(self._service.checks, self._service.add_leaf, name)
        except CredentialsError as error:
            raise Refusal(400, f"entity: {error}") from error
        return Answer.json({"data": leaf.to_dict(), "error": None}, 201)


class _Exchange:
    """One route as an ASGI application: count, intercept, run the endpoint, answer."""

    def __init__(self, service: Service, interceptions: Interceptions, name: str, endpoint: Endpoint) -> None:
        self._service = service
        self._interceptions = interceptions
        self._name = name
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        self._service.hit(self._name)

        async def work() -> Answer:
            try:
                return await self._endpoint(request)
            except Refusal as refusal:
                return refusal.answer
            except ClientDisconnect:
                return Answer.cut()
            except Exception as error:  # noqa: BLE001 - the leaf is answered, the log says the rest
                return failed(self._name, error)

        try:
            answer = await self._interceptions.run(self._name, described(scope), work, request.body)
            assert answer is not None  # noqa: S101 - only the WebSocket route answers None
        except Exception as error:  # noqa: BLE001 - a handler's own fault; it is raised where the handler was put in place
            answer = failed(self._name, error)
        await send_answer(answer, scope, receive, send)


async def _as_json(request: Request, error: Exception) -> Response:
    status = int(getattr(error, "status_code", 500))
    path = request.url.path[:200]
    message = f"path: nothing is at {path!r}" if status == 404 else f"method: {request.method} is not for {path!r}"
    return Response(Answer.error(status, message).read(), status, getattr(error, "headers", None), "application/json")


def _limit(request: Request, most: int | None) -> None:
    length = request.headers.get("content-length", "")
    if most is not None and length.isdecimal() and int(length) > most:
        raise Refusal(413, f"body: expected at most {most} bytes, found {length[:30]}")


async def _json_body(request: Request) -> Union[dict[str, Any], list[Any], str, float, bool, None]:
    _limit(request, _MOST_JSON_BYTES)
    body = bytearray()
    async for piece in request.stream():
        body.extend(piece)
        if len(body) > _MOST_JSON_BYTES:
            raise Refusal(413, f"body: expected at most {_MOST_JSON_BYTES} bytes, found more")
    if not body:
        return None
    try:
        content: Union[dict[str, Any], list[Any], str, float, bool, None] = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "body: expected JSON") from None
    return content
