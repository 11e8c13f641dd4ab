"""What tests use to run real gateways and to read their streams; conftest.py has the fixtures."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlsplit

import aiohttp

from ownware_gateway import sse
from ownware_gateway.app import Gateway, gateway
from ownware_gateway.settings import load
from ownware_gateway.sse import Frame

#: How long a test may wait for a frame, so that one that never comes is a clear failure.
PATIENCE_S: Final = 10.0

#: Looks like a key, opens nothing.
FAKE_KEY: Final = "sk-" + "t" * 24

#: What `write_profile` writes unless a field says otherwise.
PROFILE: Final[Mapping[str, Any]] = {
    "model": "openai:test-model",
    "tools": {"preset": "coding"},
    "security": {"permissionMode": "ask"},
}


def write_profile(folder: Path, name: str, *, soul: str = "", **fields: Any) -> Path:
    """Write a profile's folder into `folder` and return it; `fields` are those of agent.json."""
    profile = folder / name
    profile.mkdir(parents=True, exist_ok=True)
    agent = {"name": name, **PROFILE, **fields}
    (profile / "agent.json").write_text(json.dumps(agent), encoding="utf-8")
    if soul:
        (profile / "SOUL.md").write_text(soul, encoding="utf-8")
    return profile


class Gateways:
    """Starts real gateways in this process; those still up at the end of a test are stopped.

    `await start_gateway(port=0, **settings)` returns a `Gateway`. Without a `data_dir` all of a
    test's gateways share one, so that a stopped one can be started again on its log.
    """

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        self._defaults = defaults
        self._up: dict[int, tuple[AsyncExitStack, Mapping[str, Any]]] = {}

    async def __call__(self, **settings: Any) -> Gateway:
        """Start one; the settings are fields of `Settings`."""
        settings = {**self._defaults, **settings}
        stack = AsyncExitStack()
        up = await stack.enter_async_context(gateway(load(environ={}, overrides=settings)))
        self._up[id(up)] = stack, settings
        return up

    async def stop(self, up: Gateway) -> None:
        """Stop one gracefully; its data directory stays."""
        stack, _ = self._up.pop(id(up))
        await stack.aclose()

    async def restart(self, up: Gateway, **changed: Any) -> Gateway:
        """Stop one, and start it again on the same data directory and port."""
        _, settings = self._up[id(up)]
        await self.stop(up)
        return await self(**{**settings, "port": urlsplit(up.url).port, **changed})

    async def stop_all(self) -> None:
        """Stop those that are up, the last one first."""
        while self._up:
            stack, _ = self._up.popitem()[1]
            await stack.aclose()


async def start_run(
    http: aiohttp.ClientSession, url: str, prompt: str, **body: Any
) -> dict[str, Any]:
    """Start a run of the profile `assistant`, unless the body says otherwise; return the answer."""
    body = {"profileId": "assistant", "prompt": prompt, **body}
    async with http.post(f"{url}/api/v1/run", json=body) as response:
        answer: dict[str, Any] = await response.json()
        assert response.status == 200, answer
        return answer


async def get_json(http: aiohttp.ClientSession, url: str, path: str) -> Any:
    """Return the JSON of `GET /api/v1{path}`, which must be a 200."""
    async with http.get(f"{url}/api/v1{path}") as response:
        answer = await response.json()
        assert response.status == 200, answer
        return answer


async def post_json(
    http: aiohttp.ClientSession, url: str, path: str, body: Any = None
) -> tuple[int, Any]:
    """Return status and JSON of `POST /api/v1{path}`."""
    async with http.post(f"{url}/api/v1{path}", json=body or {}) as response:
        return response.status, await response.json()


@contextlib.asynccontextmanager
async def open_stream(
    http: aiohttp.ClientSession, url: str, path: str, last_event_id: str | None = None
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Open the event stream `/api/v1{path}`, which must be a 200; leaving hangs up."""
    headers = {"Accept": "text/event-stream"}
    if last_event_id is not None:
        headers["Last-Event-ID"] = last_event_id
    async with http.get(f"{url}/api/v1{path}", headers=headers) as response:
        assert response.status == 200, await response.text()
        yield response


async def frames(response: aiohttp.ClientResponse) -> AsyncIterator[Frame]:
    """Yield a stream's frames as they come; one iterator per response."""
    parser = sse.Parser()
    async for data in response.content.iter_any():
        for frame in parser.feed(data):
            yield frame


async def read_frames(
    response: aiohttp.ClientResponse, until: str | Callable[[Frame], bool] | None = None
) -> list[Frame]:
    """Read frames up to one of this type, or that fits, or the end. Call once per response.

    Fails when it does not come within PATIENCE_S, or when the stream ends before it.
    """
    read = []
    async with asyncio.timeout(PATIENCE_S):
        async for frame in frames(response):
            read.append(frame)
            if until is not None and (
                frame.event == until if isinstance(until, str) else until(frame)
            ):
                return read
    assert until is None, f"the stream ended after {[frame.event for frame in read]}"
    return read


def events(read: list[Frame]) -> list[dict[str, Any]]:
    """Return the log's events among frames, as dicts; envelope frames are left out."""
    return [json.loads(frame.data) for frame in read if frame.id is not None]


def text(read: list[dict[str, Any]]) -> str:
    """Return what the deltas among events say."""
    return "".join(event["text"] for event in read if event["type"] == "text.delta")


async def run_events(http: aiohttp.ClientSession, url: str, run_id: str) -> list[dict[str, Any]]:
    """Wait until a run has ended and return its events."""
    async with open_stream(http, url, f"/runs/{run_id}/events") as response:
        return events(await read_frames(response, until="done"))


async def until_status(
    http: aiohttp.ClientSession, url: str, run: Mapping[str, Any], status: str
) -> dict[str, Any]:
    """Follow a run's stream until the run has this status, and return the run.

    For `waiting` that is its next question; for an end, its `session.end`.
    """
    event_type = "permission.request" if status == "waiting" else "session.end"
    async with open_stream(http, url, f"/runs/{run['runId']}/events") as response:
        await read_frames(response, until=event_type)
    found: dict[str, Any] = await get_json(http, url, f"/runs/{run['runId']}")
    assert found["status"] == status, found
    return found


class Proxy:
    """A TCP proxy in front of a gateway that cuts connections: `async with Proxy(url, cut)`.

    `cut` gets what one connection has brought from the gateway so far and returns how much of it
    may pass before the connection is cut off, or None while it may go on. The first `deaf`
    connections are accepted and go nowhere.
    """

    def __init__(self, url: str, cut: Callable[[bytes], int | None], *, deaf: int = 0) -> None:
        self.deaf = deaf
        self._target = urlsplit(url)
        self._cut = cut
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self.url = ""
        self.cuts = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: one that the server made could outlive the proxy.
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one connection on."""
        if self.deaf:
            self.deaf -= 1
            while await reader.read(65_536):
                pass
            writer.close()
            return
        try:
            there = await asyncio.open_connection(self._target.hostname, self._target.port)
        except ConnectionError:
            writer.transport.abort()
            return
        out = asyncio.ensure_future(_pump(reader, there[1]))
        try:
            await self._pump_back(there[0], writer)
        except ConnectionError:
            pass
        finally:
            out.cancel()
            writer.transport.abort()
            there[1].transport.abort()
            await asyncio.gather(out, return_exceptions=True)

    async def _pump_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        brought = b""
        while data := await reader.read(65_536):
            passed, brought = len(brought), brought + data
            end = self._cut(brought)
            writer.write(brought[passed:end])
            await writer.drain()
            if end is not None:
                self.cuts += 1
                # Closed, not aborted: what was written before arrives.
                writer.close()
                await writer.wait_closed()
                return


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
