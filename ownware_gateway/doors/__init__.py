"""Doors: a request comes in, in some protocol; the log's events go out in that protocol's frames.

A door turns requests into `start`, `decide` and `cancel` of the engine and translates what the log
says. It never runs an agent and keeps no state. Each door exports a class with `routes()`.
"""

import asyncio
from typing import Final

from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError

from ownware_gateway.errors import GatewayError

#: How long the body of a request may take to arrive: the largest comes in time at 2.5 Mbit/s.
BODY_S: Final = 120.0


async def body_of(request: web.Request) -> bytes:
    """Return the request's body as it is. Raises GatewayError `invalid_request`, `body_timeout`."""
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError:
        raise GatewayError(
            "body_timeout", f"The request's body did not arrive within {BODY_S:g} s."
        ) from None
    except (web.RequestPayloadError, ContentEncodingError):
        raise GatewayError(
            "invalid_request", "The body cannot be read: it is not what its headers say."
        ) from None
