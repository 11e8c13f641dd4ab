"""One call of an operation: logged in if need be, sent once, and what came of it."""

import secrets
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

import aiohttp
from aiohttp.abc import AbstractResolver

from ownware_gateway.outbound import Limits, NotReached, Outbound, Policy, Refused, Request
from ownware_gateway.services.config import Filled
from ownware_gateway.services.login import LoginState
from ownware_gateway.services.request import Built, bear, build
from ownware_gateway.services.results import RESPONSE_BYTES_MAX, Answered, render
from ownware_gateway.services.spec import Operation
from ownware_gateway.tools import Output, ToolFailed

#: How long a connection may take.
CONNECT_S: Final = 10.0

#: What a log-in may be the answer to: the call was refused, so it may be made again.
_REFUSED: Final = frozenset({401, 403})


class Ways(NamedTuple):
    """How a service is called: where it is, what its calls bear, and how long one may take."""

    base: str
    base_path: str
    filled: Filled
    policy: Policy
    resolver: AbstractResolver | None
    login: LoginState | None
    timeout_s: float


async def call(
    ways: Ways, operation: Operation, arguments: Mapping[str, Any], cut: Callable[[str], str]
) -> Output:
    """Call an operation; `cut` is as for `render`. Raises ToolFailed in words for the model."""
    boundary = secrets.token_hex(16)
    built = build(operation, arguments, ways.filled, ways.base_path, boundary)
    limits = Limits(
        bytes_max=RESPONSE_BYTES_MAX,
        total_s=ways.timeout_s,
        connect_s=min(CONNECT_S, ways.timeout_s),
        silence_s=ways.timeout_s,
    )
    # Connections of its own: one that was kept may be closed on the other side, and then nobody
    # knows whether the request has had its effect.
    async with Outbound(ways.policy, limits, ways.resolver) as outbound:
        answered = await _logged_in(ways, operation, built, outbound)
    return render(answered, f"{operation.method} {operation.path}", cut)


async def _logged_in(
    ways: Ways, operation: Operation, built: Built, outbound: Outbound
) -> Answered:
    send = partial(_send, ways, operation, outbound=outbound)
    if ways.login is None:
        return await send(built)
    borne = await ways.login.value(outbound)
    answered = await send(bear(built, borne))
    if answered.status in _REFUSED:
        other = await ways.login.renew(borne, answered.status, outbound)
        if other is not None:
            answered = await send(bear(built, other))
    return answered


async def _send(ways: Ways, operation: Operation, built: Built, *, outbound: Outbound) -> Answered:
    request = Request(
        ways.base,
        built.method,
        headers=built.headers,
        body=built.body,
        target=built.target,
        once=True,
    )
    try:
        async with outbound.open(request) as response:
            data, is_whole = await outbound.read(response)
            kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
            charset = response.charset or "utf-8"
            return Answered(response.status, kind, charset, data, is_whole)
    except NotReached as error:
        raise ToolFailed(_why(operation, error)) from None


def _why(operation: Operation, error: NotReached) -> str:
    said = f"{operation.method} {operation.path} failed: {error}"
    unsent = isinstance(error, Refused) or isinstance(error.__cause__, aiohttp.ClientConnectorError)
    if unsent or operation.method in ("GET", "HEAD"):
        return said
    return f"{said} It may have had its effect, in whole or in part."
