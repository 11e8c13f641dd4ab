"""Servers that are called over HTTP: their headers are secret, their answers have limits."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.gateway import Gateways, get_json
from tests.loopback import Loopback
from tests.mcp.test_runs import AUTO, MakeProfile, calls
from tests.provider import Call, Provider

Http = aiohttp.ClientSession


class Remote(Loopback):
    """A server on loopback that speaks the streamable HTTP transport at `/mcp`, and SSE at `/sse`.

    `sessions` are those that it knows; to empty the set is to be started anew. `wants` is the only
    authorization that it takes.
    """

    def __init__(self) -> None:
        self.sessions: set[str] = set()
        self.wants: str | None = None
        self.begun = 0
        self.ended = 0
        self.authorization: set[str] = set()
        self._streams: list[asyncio.Queue[dict[str, Any] | None]] = []
        app = web.Application(client_max_size=2**26)
        app.add_routes(
            [
                web.post("/mcp", self._post),
                web.get("/mcp", self._refuse),
                web.delete("/mcp", self._end),
                web.get("/sse", self._sse),
                web.post("/messages", self._message),
            ]
        )
        super().__init__(app)

    async def __aexit__(self, *error: object) -> None:
        for stream in self._streams:
            stream.put_nowait(None)
        await super().__aexit__(*error)

    @property
    def streams(self) -> int:
        """How often somebody has connected over SSE."""
        return len(self._streams)

    def hang_up(self) -> None:
        """End the latest connection over SSE."""
        self._streams[-1].put_nowait(None)

    async def _post(self, request: web.Request) -> web.Response:
        message = await request.json()
        self.authorization.add(request.headers.get("Authorization", ""))
        if self.wants is not None and request.headers.get("Authorization") != self.wants:
            return web.Response(status=401)
        session = request.headers.get("Mcp-Session-Id")
        if session is not None and session not in self.sessions:
            return web.Response(status=404)
        if "id" not in message:
            return web.Response(status=202)
        headers = {}
        if message["method"] == "initialize":
            self.begun += 1
            session = f"session-{self.begun}"
            self.sessions.add(session)
            headers["Mcp-Session-Id"] = session
        return web.json_response(_answer(message, request), headers=headers)

    async def _refuse(self, request: web.Request) -> web.Response:
        return web.Response(status=405)

    async def _end(self, request: web.Request) -> web.Response:
        self.sessions.discard(request.headers["Mcp-Session-Id"])
        self.ended += 1
        return web.Response()

    async def _sse(self, request: web.Request) -> web.StreamResponse:
        self.authorization.add(request.headers.get("Authorization", ""))
        response = web.StreamResponse()
        response.content_type = "text/event-stream"
        await response.prepare(request)
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._streams.append(queue)
        await response.write(b"event: endpoint\ndata: /messages\n\n")
        while (message := await queue.get()) is not None:
            await response.write(b"event: message\ndata: %b\n\n" % json.dumps(message).encode())
        return response

    async def _message(self, request: web.Request) -> web.Response:
        message = await request.json()
        if "id" in message:
            self._streams[-1].put_nowait(_answer(message, request))
        return web.Response(status=202)


def _answer(message: dict[str, Any], request: web.Request) -> dict[str, Any]:
    match message["method"]:
        case "initialize":
            result: dict[str, Any] = {
                "protocolVersion": "2025-06-18",
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "remote", "version": "1"},
            }
        case "tools/list":
            tool = {"description": "", "inputSchema": {"type": "object"}}
            result = {"tools": [{**tool, "name": name} for name in ("say", "who", "much")]}
        case "tools/call" if message["params"]["name"] == "say":
            said = json.dumps(message["params"]["arguments"])
            result = {"content": [{"type": "text", "text": said}]}
        case "tools/call" if message["params"]["name"] == "who":
            result = {"content": [{"type": "text", "text": request.headers["Authorization"]}]}
        case "tools/call":
            result = {"content": [{"type": "text", "text": "x" * 10_000_000}]}
        case method:
            error = {"code": -32601, "message": f"no {method}"}
            return {"jsonrpc": "2.0", "id": message["id"], "error": error}
    return {"jsonrpc": "2.0", "id": message["id"], "result": result}


@pytest.fixture
async def remote() -> AsyncIterator[Remote]:
    async with Remote() as up:
        yield up


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    value = "passed-" + "on-by-word"
    monkeypatch.setenv("TEST_TOKEN", value)
    return value


@pytest.mark.parametrize(("path", "transport"), [("mcp", "http"), ("sse", "sse")])
async def test_a_server_is_called_over_http_with_its_headers_which_nobody_else_sees(
    path: str,
    transport: str,
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    remote: Remote,
    secret: str,
) -> None:
    server = {
        "url": f"{remote.url}/{path}?key=literal-value",
        "transport": transport,
        "headers": {
            "Authorization": "Bearer ${env:TEST_TOKEN}",
            "X-Plain": "in the file",
            "Accept-Language": "en-GB;q=0.9",
        },
    }
    make_profile("assistant", tools={"preset": "none", "mcp": {"far": server}}, security=AUTO)
    up = await start_gateway()
    given = [Call("far__who", {}), Call("far__say", {"said": secret})]
    said = await calls(http, up.url, provider, *given, Call("far__say", {"said": "en-GB;q=0.9"}))
    assert said[0] == ("[secret]", False)
    assert said[1] == (
        "The arguments hold a secret of the gateway, which no tool is given.",
        True,
    )
    assert said[2] == ('{"said": "en-GB;q=0.9"}', False)
    assert remote.authorization == {f"Bearer {secret}"}
    shown = json.dumps(
        [await get_json(http, up.url, "/mcp/servers"), await get_json(http, up.url, "/profiles")]
    )
    for value in (secret, "in the file", "literal-value"):
        assert value not in shown


async def test_a_server_that_has_forgotten_the_session_is_connected_again(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    remote: Remote,
) -> None:
    server = {"url": f"{remote.url}/mcp"}
    make_profile("assistant", tools={"preset": "none", "mcp": {"far": server}}, security=AUTO)
    up = await start_gateway()
    say = Call("far__say", {})
    assert await calls(http, up.url, provider, say) == [("{}", False)]
    remote.sessions.clear()
    lost, again = await calls(http, up.url, provider, say, say)
    assert lost == (
        "The MCP server 'far' was started anew and did nothing; it is being connected again.",
        True,
    )
    assert again == ("{}", False)
    await start_gateway.stop(up)
    assert (remote.begun, remote.sessions) == (2, set())


async def test_an_answer_that_is_too_large_costs_the_call_and_not_the_connection(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    remote: Remote,
) -> None:
    server = {"url": f"{remote.url}/mcp"}
    make_profile("assistant", tools={"preset": "none", "mcp": {"far": server}}, security=AUTO)
    up = await start_gateway()
    much, say = await calls(http, up.url, provider, Call("far__much", {}), Call("far__say", {}))
    assert much[1]
    assert "8388608 are allowed" in much[0]
    assert say == ("{}", False)
    assert remote.begun == 1


async def test_a_connection_that_ends_is_made_again(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    remote: Remote,
) -> None:
    server = {"url": f"{remote.url}/sse", "type": "sse"}
    make_profile("assistant", tools={"preset": "none", "mcp": {"far": server}}, security=AUTO)
    up = await start_gateway()
    assert await calls(http, up.url, provider, Call("far__say", {})) == [("{}", False)]
    remote.hang_up()
    assert await calls(http, up.url, provider, Call("far__say", {})) == [("{}", False)]
    assert remote.streams == 2


async def test_a_server_that_wants_another_token_is_said_to(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    remote: Remote,
) -> None:
    remote.wants = "Bearer another"
    server = {"url": f"{remote.url}/mcp", "headers": {"Authorization": "Bearer mine"}}
    make_profile("assistant", tools={"preset": "none", "mcp": {"far": server}}, security=AUTO)
    up = await start_gateway()
    ((said, is_error),) = await calls(http, up.url, provider, Call("far__say", {}))
    assert is_error
    assert "(HTTP 401)" in said
