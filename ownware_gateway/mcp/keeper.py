"""Keeps one MCP server up: starts it, watches it, starts it again, and passes calls on to it.

One task owns the connection from its beginning to its end. Calls come from the tasks of runs; one
that is cancelled tells the server so and leaves the connection to the others.
"""

import asyncio
import contextlib
import hashlib
import importlib.util
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from ownware_gateway.masking import Masker
from ownware_gateway.mcp import SDK_MISSING, OfferedTool, State
from ownware_gateway.mcp.child import Child
from ownware_gateway.mcp.config import launch, secrets, variables
from ownware_gateway.mcp.offers import offers
from ownware_gateway.processes import Watchdog
from ownware_gateway.profile.servers import McpServer
from ownware_gateway.tools import Context, Output, Tool, ToolFailed

#: Attempts in a row before a server is given up, and the time that makes one count as steady.
RESTARTS_MAX: Final = 8
STEADY_S: Final = 60.0

#: The pause before the next attempt, doubled each time up to the maximum.
RESTART_S: Final = 0.5
RESTART_S_MAX: Final = 60.0

#: A server that was given up is tried again when it is wanted after so long.
REST_S: Final = 60.0

#: How often a server that nobody calls is asked whether it is there.
HEALTH_EVERY_S: Final = 30.0

#: The pause before a list of tools is read once more.
LIST_PAUSE_S: Final = 0.5

#: How long a call waits for a server that is being started again.
READY_WAIT_S: Final = 10.0

#: Calls that one server is given at the same time; more wait.
CALLS_AT_ONCE_MAX: Final = 32

#: How long what waits for a call may take beyond the call's own limit.
MARGIN_S: Final = 10.0

#: How long a connection may take to end in good order; a local server is killed in less.
STOP_S: Final = 4.0

#: How long calls under way may take when a server is stopped because its settings have changed.
RETIRE_S: Final = 30.0

_log: Final = logging.getLogger(__name__)


class Lost(Exception):
    """A connection is of no use any more; why, in words that follow the server's name."""


class Attention:
    """What a connection and its keeper have to say to each other: `news` is set after it."""

    def __init__(self) -> None:
        self.lost: str | None = None
        self.up = False
        #: The last answer over HTTP that refused something, which the SDK does not pass on.
        self.refused_with: int | None = None
        self.left = False
        self.list_changed = False
        self.suspect = False
        self.news = asyncio.Event()
        self._end: Callable[[], None] | None = None

    def lose(self, why: str) -> None:
        """Say that the connection is of no use any more; the first reason counts."""
        self.lost = self.lost or why
        self.news.set()

    def leave(self) -> None:
        """End the connection: in good order if it is up, else at once."""
        self.left = True
        self.news.set()
        if not self.up:
            self.cut()

    def cut(self) -> None:
        """End the connection, in whatever it is."""
        self.left = True
        if self._end is not None:
            self._end()

    def expire(self, why: str) -> None:
        """End the connection because it has taken too long to come about."""
        self.lose(why)
        self.cut()

    def doubt(self) -> None:
        """Have the server asked whether it is there."""
        self.suspect = True
        self.news.set()

    def on_leave(self, end: Callable[[], None]) -> None:
        """Take what ends the connection; it is called at once when that was asked for before."""
        self._end = end
        if self.left:
            end()


class Means(NamedTuple):
    """What a local server is started with, beside its own settings; `started` gets the process."""

    environment: Mapping[str, str]
    folder: Path
    watchdog: Watchdog
    started: Callable[[Child], None]


class Connection(Protocol):
    """What a keeper needs of `session.Session`, which is imported on first use."""

    attention: Attention

    @property
    def version(self) -> str | None:
        """The version of the protocol that is spoken."""
        ...

    async def list_tools(self) -> list[dict[str, Any]]:
        """Return the server's tools as JSON. Raises Lost."""
        ...

    async def ping(self) -> None:
        """Return when the server is there. Raises Lost when it is not."""
        ...

    async def call(
        self,
        name: str,
        arguments: dict[str, Any],
        timeout_s: float,
        progress: Callable[[str], None],
    ) -> Output:
        """Call a tool. Raises ToolFailed in words that follow the server's name."""
        ...


Use = Callable[[Connection], Awaitable[None]]


class Given(NamedTuple):
    """What every keeper works with.

    `lookup` reads a variable of the gateway's own environment; `environment` is what every local
    server gets of it unasked; `tasks` hold the tasks that are made here.
    """

    environment: Mapping[str, str]
    folder: Path
    lookup: Callable[[str], str | None]
    masker: Masker
    clock_ms: Callable[[], int]
    watchdog: Watchdog
    tasks: set[asyncio.Task[None]]


class Keeper:
    """Keeps one server."""

    def __init__(self, name: str, settings: McpServer, given: Given) -> None:
        self.name = name
        self.settings = settings
        self.state: State = "stopped"
        self.error: str | None = None
        self.offered: Sequence[OfferedTool] = ()
        self.left_out: Sequence[str] = ()
        self._tools: dict[str, Tool] = {}
        self.restarts = 0
        self.ready_since: int | None = None
        self._given = given
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._gone = False
        self._attention = Attention()
        self._connection: Connection | None = None
        self._child: Child | None = None
        self._settled = asyncio.Event()
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._free = asyncio.Semaphore(CALLS_AT_ONCE_MAX)
        self._calls = 0
        self._failed_s = 0.0
        self._origin = _origin(name, settings)

    # -- what is known of it

    @property
    def pid(self) -> int | None:
        """The number of its process, while it runs here."""
        runs = self._child is not None and self._child.ending is None
        return self._child.pid if self._child is not None and runs else None

    @property
    def version(self) -> str | None:
        """The version of the protocol that is spoken, while it is."""
        return self._connection.version if self._connection is not None else None

    def stderr(self) -> list[str]:
        """Return the last lines that it wrote there, also after its end."""
        lines = self._child.stderr.lines() if self._child is not None else []
        # Together, since a key of several lines is not recognised in one of them.
        return self._given.masker.text("\n".join(lines)).split("\n") if lines else []

    def unavailable(self) -> str | None:
        """Return why its tools cannot be used now, as a sentence; None when they can."""
        if self.state == "ready" or (self.state in ("starting", "waiting") and self.offered):
            return None
        why = self.error or "it has not been started"
        return f"The MCP server {self.name!r} is not available: {why.rstrip('.')}."

    def tools(self) -> dict[str, Tool]:
        """Return its tools; while it is started again, those that it had."""
        if self.unavailable() is not None:
            return {}
        return self._tools

    def _tool(self, offered: OfferedTool) -> Tool:
        trusted = self.settings.trusted
        reads_only = trusted and offered.reads_only is True
        return Tool(
            name=offered.name,
            description=offered.description,
            input_schema=offered.input_schema,
            call=partial(self.call, offered.wire_name),
            reads_only=reads_only,
            safe_to_repeat=reads_only or (trusted and offered.idempotent is True),
            timeout_s=self._call_s + READY_WAIT_S + MARGIN_S,
            # That something is destroyed is believed of anybody.
            exact=not trusted or offered.destructive is True,
            origin=self._origin,
        )

    @property
    def _call_s(self) -> float:
        return self.settings.call_timeout / 1000

    # -- its life

    def use(self) -> None:
        """Make sure that it is being kept; one that was given up has a rest first.

        One that was stopped stays stopped: a run may hold a tool of it for longer.
        """
        if self._gone:
            return
        loop = asyncio.get_running_loop()
        rested = self.state != "failed" or loop.time() - self._failed_s > REST_S
        if (self._task is None or self._task.done()) and rested:
            self._settled.clear()
            self._stopping.clear()
            self.state = "starting"
            self._task = loop.create_task(self._keep())
            self._given.tasks.add(self._task)
            self._task.add_done_callback(self._given.tasks.discard)

    async def settled(self) -> None:
        """Wait until it is up, or has failed once."""
        await self._settled.wait()

    async def stop(self) -> None:
        """End it, and all that it started, for good."""
        self._gone = True
        if self._task is not None and not self._task.done():
            self._stopping.set()
            self._attention.leave()
            await asyncio.wait({self._task}, timeout=STOP_S)
            for harder in (self._attention.cut, self._task.cancel):
                if not self._task.done():
                    harder()
                    await asyncio.wait({self._task}, timeout=STOP_S)
        self.offered = ()
        self._enter("stopped")

    async def retire(self) -> None:
        """End it when the calls under way are over, or have taken long enough."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETIRE_S):
                await self._idle.wait()
        await self.stop()

    def _enter(self, state: State, error: str | None = None) -> None:
        self.state = state
        self.error = self._given.masker.text(error) if error is not None else None
        self._changed.set()
        if state != "starting":
            self._settled.set()

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        while not self._stopping.is_set():
            self._enter("starting", self.error)
            began_s = loop.time()
            error = await self._once()
            if self._stopping.is_set():
                return
            failures = 1 if loop.time() - began_s > STEADY_S else failures + 1
            _log.warning("the MCP server %s %s", self.name, self._given.masker.text(error))
            if failures > RESTARTS_MAX:
                self._failed_s = loop.time()
                self.offered = ()
                self._enter("failed", f"it {error}, {failures} times in a row")
                return
            self._enter("waiting", f"it {error}")
            await self._pause(min(RESTART_S * 2 ** (failures - 1), RESTART_S_MAX))
            self.restarts += 1

    async def _pause(self, pause_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._stopping.wait()

    async def _once(self) -> str:
        """Keep it up for as long as it lasts; return why it did not, for words after its name."""
        attention = self._attention = Attention()
        start_s = self.settings.start_timeout / 1000
        timer = asyncio.get_running_loop().call_later(
            start_s, attention.expire, f"was not up within {start_s:g} s"
        )

        async def use(connection: Connection) -> None:
            self._offer(await connection.list_tools())
            timer.cancel()
            attention.up = True
            self._connection = connection
            self.ready_since = self._given.clock_ms()
            self._enter("ready")
            await self._watch(connection)

        try:
            await self._serve(attention, use)
        except Exception as error:  # noqa: BLE001 - whatever it does, it must not end its keeper
            return attention.lost or _why(error)
        finally:
            timer.cancel()
            self._connection = None
            self.ready_since = None
        return attention.lost or "was stopped"

    async def _serve(self, attention: Attention, use: Use) -> None:
        missing = [name for name in variables(self.settings) if self._given.lookup(name) is None]
        if missing:
            raise Lost(f"needs variables that the gateway does not have: {', '.join(missing)}")
        if importlib.util.find_spec("mcp") is None:
            raise Lost(f"cannot be used. {SDK_MISSING}")
        ready = launch(self.settings, self._given.lookup)
        self._given.masker.hide(secrets(ready, self._given.lookup))
        # It takes a while, in which others go on.
        session = await asyncio.to_thread(importlib.import_module, "ownware_gateway.mcp.session")
        means = Means(
            self._given.environment, self._given.folder, self._given.watchdog, self._started
        )
        await session.serve(ready, means, attention, use)

    def _started(self, child: Child) -> None:
        self._child = child

    def _offer(self, listed: Sequence[Mapping[str, Any]]) -> None:
        self.offered, self.left_out = offers(self.name, listed)
        self._tools = {offered.name: self._tool(offered) for offered in self.offered}

    async def _watch(self, connection: Connection) -> None:
        """Do what the connection asks for, for as long as it lasts. Raises Lost."""
        attention = connection.attention
        while attention.lost is None and not attention.left:
            # No time limit on the wait: it would be a cancellation that is not the SDK's own.
            alarm = asyncio.get_running_loop().call_later(HEALTH_EVERY_S, attention.doubt)
            await attention.news.wait()
            alarm.cancel()
            attention.news.clear()
            await self._attend(connection)

    async def _attend(self, connection: Connection) -> None:
        attention = connection.attention
        if attention.lost is not None or attention.left:
            return
        if attention.list_changed:
            attention.list_changed = False
            self._offer(await connection.list_tools())
            # However often it says so.
            await asyncio.sleep(LIST_PAUSE_S)
        # Who works on a call may have no time to answer.
        if attention.suspect and not self._calls:
            attention.suspect = False
            await connection.ping()

    # -- calls

    async def call(self, wire_name: str, context: Context, arguments: dict[str, Any]) -> Output:
        """Call a tool by the server's own name for it. Raises ToolFailed."""
        self._calls += 1
        self._idle.clear()
        try:
            async with self._free:
                connection = await self._ready()
                return await connection.call(wire_name, arguments, self._call_s, context.progress)
        except ToolFailed as error:
            raise ToolFailed(f"The MCP server {self.name!r} {error}") from error
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()
                if self._connection is not None and self._connection.attention.suspect:
                    self._connection.attention.news.set()

    async def _ready(self) -> Connection:
        """Return the connection, waiting a little for one that is being made."""
        self.use()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_WAIT_S):
                while self._sound() is None and self.state not in ("stopped", "failed"):
                    self._changed.clear()
                    await self._changed.wait()
        connection = self._sound()
        if connection is None:
            raise ToolFailed(f"is not available: {self.error or 'it was stopped'}.")
        return connection

    def _sound(self) -> Connection | None:
        """Return the connection unless it is lost; its keeper may not have noticed yet."""
        lost = self._connection is None or self._connection.attention.lost is not None
        return None if lost else self._connection


def _origin(name: str, settings: McpServer) -> str:
    """Return what tells a server from another of the same name: how it is reached."""
    reached = [name, settings.command, settings.args, settings.url]
    return hashlib.sha256(json.dumps(reached).encode()).hexdigest()[:16]


def _why(error: BaseException) -> str:
    """Return what broke a connection, for words after the server's name."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, Lost):
        return str(error)
    said = " ".join(str(error).split())[:300]
    return f"cannot be reached: {said or type(error).__name__}"
