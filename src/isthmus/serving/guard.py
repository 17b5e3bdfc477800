"""What stands before the application: size of bodies, the key, and the name it is called by.

A pure ASGI layer, so that a body that is too large is never held in memory.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LOCAL = ("localhost", "127.0.0.1", "[::1]", "::1")

HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        b"img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)


class RefusedError(Exception):
    """A body outgrew its limit or came too slowly while it was read."""


class Guard:
    """Refuses requests before they reach the application.

    Args:
        app: The application.
        max_body: Bytes of a body at most.
        body_s: Seconds within which a body has to be there.
        api_key: Key that ``/v1`` and ``/api`` ask for; empty asks for none.
        hosts: Names that a ``Host`` header may have; empty allows all. Keeps pages of other sites
            from reaching a server on loopback through a name of their own (DNS rebinding).
    """

    def __init__(
        self, app: Any, *, max_body: int, body_s: float, api_key: str, hosts: tuple[str, ...]
    ) -> None:
        self.app, self.max_body, self.body_s, self.hosts = app, max_body, body_s, hosts
        self.api_key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.lower(): v for k, v in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rsplit(":", 1)[0] if host.rpartition(":")[2].isdigit() else host
        if self.hosts and name.lower() not in self.hosts:
            await refuse(send, 421, f"this server is not called {name[:100]!r}", "host")
            return
        if scope["path"].startswith(("/v1", "/api")) and not self._knows(headers):
            await refuse(send, 401, "give the API key as 'Authorization: Bearer KEY'", "api_key")
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_body:
            await self._too_large(send)
            return
        read, started, large, late, whole = 0, False, False, False, False
        until = asyncio.get_running_loop().time() + self.body_s

        async def limited() -> MutableMapping[str, Any]:
            nonlocal read, large, late, whole
            if whole:  # what comes now is that the client leaves
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                late = True
                raise RefusedError from None
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if read > self.max_body:
                    large = True
                    raise RefusedError
            return message

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if (large or late) and not started:
                return  # whatever the application makes of it, it is said below
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        with suppress(RefusedError):
            await self.app(scope, limited, noted)
        if large and not started:
            await self._too_large(send)
        elif late and not started:
            words = f"the body did not arrive within {self.body_s:g} s"
            await refuse(send, 408, words, "body")

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        if not self.api_key:
            return True
        given = headers.get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        # compared in constant time, whatever was given
        return hmac.compare_digest(key.strip(), self.api_key) and scheme.lower() == b"bearer"

    async def _too_large(self, send: Send) -> None:
        await refuse(send, 413, f"the body has more than {self.max_body} bytes", "body")


def body_of(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """An error in the shape of OpenAI's."""
    kinds = {401: "authentication_error", 429: "rate_limit_error", 404: "not_found_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


async def refuse(send: Send, status: int, message: str, param: str) -> None:
    """Send an error and be done."""
    body = json.dumps(body_of(status, message, param)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status in (408, 413, 421):
        headers.append((b"connection", b"close"))  # what is left of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *HEADERS]})
    await send({"type": "http.response.body", "body": body})
