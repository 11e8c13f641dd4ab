"""Gateways that are processes, to be killed; clients that follow them; what the log holds."""

import asyncio
import contextlib
import json
import math
import os
import random
import signal
import sqlite3
import sys
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import aiohttp

from ownware_gateway import datadir, sse
from ownware_gateway.events import decode
from tests.gateway import write_profile
from tests.reliability.runner import ARMED
from tests.test_run import check_whole

ROOT_FOLDER: Final = Path(__file__).parents[2]

#: How long anything here may take on a busy machine, so that what never comes is a clear failure.
PATIENCE_S: Final = 25.0

#: The pause before a cut connection is made again.
AGAIN_S: Final = 0.01

Http = aiohttp.ClientSession

#: How much a connection brings, on average, before its client hangs up.
CUT_BYTES: Final = 700

#: What a connection fails with whose gateway is gone.
CUT: Final = (aiohttp.ClientError, ConnectionError, TimeoutError)


class Served:
    """A gateway's process in a folder of its own, started again whenever it dies.

    `up` is set while there is one that answers; `deaths` holds the exit codes of those that were.
    """

    def __init__(self, folder: Path, *flags: str, environment: Mapping[str, str]) -> None:
        self.data = folder / "data"
        self.work = folder / "work"
        self.profiles = folder / "profiles"
        self.url = ""
        self.up = asyncio.Event()
        self.deaths: list[int] = []
        self.pid = 0
        self._armed = folder / "armed"
        self._errors = folder / "stderr"
        self._flags = flags
        self.environment = {**os.environ, **environment, ARMED: str(self._armed)}
        self._process: Process | None = None
        self._died = asyncio.Condition()
        write_profile(self.profiles, "asks", model="demo:assistant")
        write_profile(
            self.profiles, "free", model="demo:assistant", security={"permissionMode": "auto"}
        )
        write_profile(
            self.profiles,
            "tree",
            model="demo:assistant",
            subagents={"reader": {"profile": "free"}, "writer": {"profile": "asks"}},
        )

    def arm(self, point: str, passes: int = 1) -> None:
        """Have the process kill itself when it passes a named point for so many times."""
        new = self._armed.with_suffix(".new")
        new.write_text(json.dumps({"point": point, "pass": passes, "id": uuid.uuid4().hex}))
        new.rename(self._armed)

    @property
    def armed(self) -> bool:
        """Whether the point has not been reached yet."""
        return self._armed.exists()

    async def start(self) -> None:
        """Start it and wait until it is ready; it is found by the file that it locks."""
        arguments = ["-m", "tests.reliability.runner", "serve", "--port", "0", *self._flags]
        folders = {"data-dir": self.data, "profiles": self.profiles, "workspace": self.work}
        for name, folder in folders.items():
            arguments += [f"--{name}", str(folder)]
        with self._errors.open("ab") as errors:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *arguments,
                stdout=PIPE,
                stderr=errors,
                cwd=ROOT_FOLDER,
                env=self.environment,
            )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        while line := (await self._process.stdout.readline()).decode():
            if line.startswith("Ownware Gateway"):
                break
        found = datadir.running(self.data)
        if found is not None and found[1]:
            self.url = found[1]
            self.up.set()

    async def keep_up(self) -> None:
        """Start it again whenever it dies, as a supervisor would."""
        while True:
            assert self._process is not None
            code = await self._process.wait()
            self.up.clear()
            async with self._died:
                self.deaths.append(code)
                self._died.notify_all()
            await self.start()

    async def died(self, count: int) -> None:
        """Wait until it has died so many times."""
        async with asyncio.timeout(PATIENCE_S), self._died:
            await self._died.wait_for(lambda: len(self.deaths) >= count)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    async def end(self) -> None:
        """Kill it for good."""
        self.up.clear()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.communicate()

    def said(self) -> str:
        """Return what the processes wrote to stderr."""
        return self._errors.read_text()


@contextlib.asynccontextmanager
async def served(
    folder: Path, *flags: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Served]:
    """Keep a gateway up in a folder, whatever kills it."""
    gateway = Served(folder, *flags, environment=environment or {})
    keeper: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(PATIENCE_S):
            await gateway.start()
        keeper = asyncio.ensure_future(gateway.keep_up())
        yield gateway
    finally:
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait({keeper})
        await gateway.end()


class Reachable(Protocol):
    """A gateway that may be away at times: `up` is set while it answers at `url`."""

    url: str
    up: asyncio.Event


async def ask(
    http: Http, gateway: Reachable, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, Any]:
    """Send a request until an answer comes, through restarts; return its status and JSON."""
    while True:
        await gateway.up.wait()
        try:
            async with http.request(
                method, f"{gateway.url}/api/v1{path}", json=body, headers=headers
            ) as response:
                if response.status != 503:
                    return response.status, await response.json()
        except CUT:
            pass
        await asyncio.sleep(AGAIN_S)


async def start(
    http: Http, gateway: Reachable, prompt: str, profile: str = "asks", **body: Any
) -> dict[str, Any]:
    """Start a run, once, however often the request must be sent; return the answer."""
    body = {"profileId": profile, "prompt": prompt, **body}
    key = {"Idempotency-Key": uuid.uuid4().hex}
    status, answer = await ask(http, gateway, "POST", "/run", body, **key)
    assert status == 200, answer
    assert isinstance(answer, dict)
    return answer


class Follower:
    """Follows a run through cuts and restarts, as an EventSource would, and keeps every byte.

    With an `action` it answers what the run asks. It hangs up by itself for `cuts` times, after a
    random number of bytes.
    """

    def __init__(
        self,
        http: Http,
        gateway: Reachable,
        run: Mapping[str, Any],
        action: str | None = "approve",
        cuts: int = 0,
    ) -> None:
        self.run = run
        self.frames: list[bytes] = []
        self.resets = 0
        self.last_id: str | None = None
        self.cuts = 0
        self._cuts_wanted = cuts
        self._http = http
        self._gateway = gateway
        self._action = action

    async def follow(self) -> bytes:
        """Read until the run has ended; return its frames."""
        while not await self._connect():
            await asyncio.sleep(AGAIN_S)
        return b"".join(self.frames)

    async def _connect(self) -> bool:
        """Read what one connection brings; return whether it was the last."""
        await self._gateway.up.wait()
        headers = {} if self.last_id is None else {"Last-Event-ID": self.last_id}
        url = f"{self._gateway.url}/api/v1/runs/{self.run['runId']}/events"
        rest = b""
        left = random.expovariate(1 / CUT_BYTES) if self.cuts < self._cuts_wanted else math.inf
        try:
            async with self._http.get(url, headers=headers) as response:
                if response.status == 204:
                    return True
                assert response.status == 200, await response.text()
                async for data in response.content.iter_any():
                    left -= len(data)
                    if left < 0:
                        data = data[: int(left)]
                    *blocks, rest = (rest + data).split(b"\n\n")
                    for block in blocks:
                        if await self._take(block + b"\n\n"):
                            return True
                    if left < 0:
                        self.cuts += 1
                        response.close()
                        return False
        except CUT:
            pass
        return False

    async def _take(self, frame: bytes) -> bool:
        if frame.startswith(b"event: done\n"):
            return True
        self.resets += frame.startswith(b"event: stream.reset\n")
        if frame.startswith(b"id: "):
            name, event = frame.split(b"\n")[:2]
            if event == b"event: permission.request" and self._action is not None:
                asked = json.loads(frame.partition(b"\ndata: ")[2])
                body = {"action": self._action, "requestId": asked["requestId"]}
                path = f"/threads/{self.run['threadId']}/resume"
                status, answer = await ask(self._http, self._gateway, "POST", path, body)
                # An answer that was sent before the process died may have arrived.
                assert status in (200, 409), answer
            # Only now: who is stopped while it answers must be asked again.
            self.frames.append(frame)
            self.last_id = name.removeprefix(b"id: ").decode()
        return False

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(frame.partition(b"\ndata: ")[2]) for frame in self.frames]


# -- the truth


def rows(data: Path, sql: str, *values: object) -> list[Any]:
    """Return what a statement finds in a log, past the gateway."""
    with contextlib.closing(sqlite3.connect(data / datadir.DATABASE)) as database:
        return database.execute(sql, values).fetchall()


def transcript(data: Path, thread_id: str, epoch: str, agent_id: str = "root") -> list[bytes]:
    """Return a thread's frames as the log's rows say they are."""
    found = rows(
        data,
        "SELECT seq, type, payload FROM events WHERE stream_key = (SELECT streams.key FROM streams "
        "JOIN threads ON threads.key = thread_key WHERE threads.id = ? AND agent_id = ?) "
        "ORDER BY seq",
        thread_id,
        agent_id,
    )
    return [sse.frame(f"{epoch}.{seq}", kind, payload) for seq, kind, payload in found]


def check_truth(data: Path, follower: Follower) -> None:
    """Fail unless a client saw its run whole, in order, once, and byte for byte as it is kept."""
    assert follower.last_id is not None
    assert not follower.resets
    said = follower.events
    start_seq = follower.run["startSeq"]
    assert [event["seq"] for event in said] == list(range(start_seq + 1, start_seq + len(said) + 1))
    epoch = follower.last_id.partition(".")[0]
    kept = transcript(data, follower.run["threadId"], epoch)
    assert kept[start_seq : start_seq + len(said)] == follower.frames
    check_whole([decode(json.dumps(event).encode()) for event in said])


def check_effects(folder: Path, said: list[dict[str, Any]]) -> int:
    """Fail unless every call of a run had its effect at most once; return how many were lost.

    A command of these tests appends a line to a file named by itself: `echo x >> NAME`.
    """
    lost = 0
    executed = [
        event["toolCallId"]
        for event in said
        if event["type"] == "tool.call.execute" and event["toolName"] == "shell_execute"
    ]
    assert len(executed) == len(set(executed)), "nothing is run twice"
    for end in (event for event in said if event["type"] == "tool.call.end"):
        (started,) = (
            event
            for event in said
            if event["type"] == "tool.call.args_delta" and event["toolCallId"] == end["toolCallId"]
        )
        command = json.loads(started["delta"]).get("command", "")
        name = command.rpartition(" >> ")[2].split(";")[0].strip()
        if end["toolName"] != "shell_execute" or not name:
            continue
        file = folder / name
        count = len(file.read_text().splitlines()) if file.exists() else 0
        assert count <= 1, f"{name} {count} times"
        if end["isError"]:
            lost += 1
        else:
            assert count == 1, f"{name} is said to have happened"
    return lost
