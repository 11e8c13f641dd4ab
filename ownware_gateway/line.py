"""A line of those who want to start a run on a thread that is busy: first come, first served."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from ownware_gateway.engine import Started
from ownware_gateway.errors import GatewayError
from ownware_gateway.events import ASKING
from ownware_gateway.log import Chunk, Log
from ownware_gateway.stream import CaughtUp, Streamer

#: How many may wait for one thread, and for how long.
WAITING_MAX: Final = 8
WAIT_S: Final = 60.0

#: By which a chunk of events is known to hold something that a run waits with.
_ASKS: Final = tuple(b"\nevent: %b\n" % kind.encode() for kind in sorted(ASKING))


@dataclass(slots=True)
class _Queue:
    #: Fair: whoever has waited longest gets it.
    first: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0


class There(Protocol):
    """Waits for somebody who may leave; raises ConnectionError then."""

    async def __call__(self, work: Awaitable[Any]) -> Any:
        """Return what the work returns."""
        ...


class Line:
    """The lines of all threads."""

    def __init__(self, log: Log, streamer: Streamer, wait_s: float = WAIT_S) -> None:
        self._log = log
        self._streamer = streamer
        self._wait_s = wait_s
        self._queues: dict[str, _Queue] = {}

    async def start(
        self,
        thread_id: str,
        attempt: Callable[[], Awaitable[Started]],
        there: There,
        busy: Callable[[str], Awaitable[None]],
    ) -> Started:
        """Start a run when it is its turn.

        `attempt` raises GatewayError `run_in_progress` as long as it is not; `busy` is told of the
        run that is in the way. Raises that error when the line is too long, or the wait. An attempt
        is never broken off: a run that is in the log has to be driven.
        """
        queue = self._queues.setdefault(thread_id, _Queue())
        if queue.waiting >= WAITING_MAX:
            raise GatewayError(
                "run_in_progress",
                f"{queue.waiting} requests wait for this conversation, as many as may; try later.",
            )
        queue.waiting += 1
        deadline_s = asyncio.get_running_loop().time() + self._wait_s
        try:
            await there(self._until(deadline_s, queue.first.acquire()))
            try:
                return await self._start(attempt, there, busy, deadline_s)
            finally:
                queue.first.release()
        finally:
            queue.waiting -= 1
            if not queue.waiting:
                del self._queues[thread_id]

    async def _start(
        self,
        attempt: Callable[[], Awaitable[Started]],
        there: There,
        busy: Callable[[str], Awaitable[None]],
        deadline_s: float,
    ) -> Started:
        while True:
            try:
                return await attempt()
            except GatewayError as error:
                if error.code != "run_in_progress":
                    raise
                run_id = error.details["runId"]
            await busy(run_id)
            await there(self._until(deadline_s, self._ended(run_id, busy)))

    async def _until(self, deadline_s: float, work: Awaitable[Any]) -> None:
        try:
            async with asyncio.timeout_at(deadline_s):
                await work
        except TimeoutError:
            raise GatewayError(
                "run_in_progress",
                f"The conversation was busy for {self._wait_s:g} s; wait for its run's end, answer "
                "its question, or cancel it.",
            ) from None

    async def _ended(self, run_id: str, busy: Callable[[str], Awaitable[None]]) -> None:
        """Wait until a run has ended."""
        run = await self._log.run(run_id)
        head = await self._log.head(run.stream) if run is not None else None
        if run is None or head is None:
            return
        async for item in self._streamer.follow(run.stream, head.last):
            # A chunk of deltas ends no run and asks nobody: no need to look.
            asks = isinstance(item, Chunk) and any(mark in item.data for mark in _ASKS)
            if asks or isinstance(item, CaughtUp):
                await busy(run_id)
            if isinstance(item, CaughtUp) or (isinstance(item, Chunk) and item.ends_run):
                run = await self._log.run(run_id)
                if run is None or run.terminal:
                    return
        raise GatewayError(
            "shutting_down", "The gateway is shutting down; try again.", retry_after_s=2
        )
