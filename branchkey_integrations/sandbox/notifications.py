"""The notification channel: a ticket lets a leaf in, then it hears all news until one side closes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.websockets import WebSocket

from branchkey_integrations.sandbox.answer import Answer, send_answer
from branchkey_integrations.sandbox.hub import Connection
from branchkey_integrations.sandbox.intercept import Interceptions, described, failed
from branchkey_integrations.sandbox.service import Service
from branchkey_integrations.sandbox.tickets import TicketOffice

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send


class WebSocketApp:
    """One route as an ASGI application: redeem the ticket, catch up, then pass on what the hub has."""

    def __init__(self, service: Service, interceptions: Interceptions, tickets: TicketOffice) -> None:
        self._service = service
        self._interceptions = interceptions
        self._tickets = tickets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one WebSocket from its upgrade to its end."""
        websocket = WebSocket(scope, receive, send)
        self._service.hit("ws")
        query = websocket.query_params
        leaf_id: list[str] = []

        async def work() -> Answer | None:
            found = self._tickets.redeem(query.get("ticket", ""), query.get("request_id", ""))
            if found is None:
                return Answer.error(401, "ticket: expected a fresh one, found one that is unknown, used or expired")
            leaf_id.append(found)
            return None

        await websocket.receive()  # the announcement of the upgrade
        try:
            answer = await self._interceptions.run("ws", described(scope), work, _nothing)
        except Exception as error:  # noqa: BLE001 - as in every route
            answer = failed("ws", error)
        if answer is None and not leaf_id:
            answer = Answer.error(401, "ticket: it was refused")
        if answer is not None:
            await send_answer(answer, scope, receive, send)
            return
        await websocket.accept()
        await self._serve(Connection(leaf_id[0], websocket))

    async def _serve(self, connection: Connection) -> None:
        hub = self._service.hub
        hub.add(connection)
        connection.catch_up(*self._service.news(connection.leaf_id))
        self._service.touch()
        tasks = [
            asyncio.ensure_future(connection.send_for_ever()),
            asyncio.ensure_future(_until_closed(connection.websocket)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hub.remove(connection)
            for task in tasks:
                task.cancel()
            # A socket that breaks while something is sent into it is the ordinary end of a connection.
            await asyncio.gather(*tasks, return_exceptions=True)
            self._service.touch()


async def _nothing() -> bytes:
    return b""


async def _until_closed(websocket: WebSocket) -> None:
    # Leaves send nothing; what one sends all the same is read and dropped.
    while (await websocket.receive())["type"] != "websocket.disconnect":
        pass
