"""Who reads which run through this door: what a retry joins, and what nobody reads any more.

Kept in memory. After a restart a retry is recognised by what the run keeps of its request.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from ownware_gateway.engine import Engine, all_options
from ownware_gateway.errors import GatewayError
from ownware_gateway.log import Log, Run
from ownware_gateway.stream import Streamer

#: How long after its last reader has left a run without a conversation is cancelled.
LEFT_S: Final = 15.0

#: Requests that a retry can be told from; the oldest are forgotten first.
REQUESTS_MAX: Final = 10_000

#: Runs of one and the same request that are remembered, the newest.
SAME_MAX: Final = 100

#: Unfinished runs that are looked at after a restart.
RECALLED_MAX: Final = 1_000


class Reading(NamedTuple):
    """A completion: a run's, from its start or from behind an event."""

    run_id: str
    after: int | None = None


async def asked_for(log: Log, run: Run) -> list[tuple[Reading, Mapping[str, Any]]]:
    """Return the completions of a run that requests of this door have led to, with what it kept."""
    return [
        (Reading(run.id, None if seq == run.start_seq + 1 else seq - 1), options.door)
        for seq, options in await all_options(log, run)
        if options.door is not None and "fingerprint" in options.door
    ]


@dataclass(slots=True)
class _Read:
    """A run that is read, or was until just now."""

    readers: int = 0
    timer: asyncio.TimerHandle | None = None


class Readers:
    """The readers of all runs that this door has started."""

    def __init__(self, engine: Engine, log: Log, streamer: Streamer, *, cancels: bool) -> None:
        self._engine = engine
        self._log = log
        self._streamer = streamer
        self._cancels = cancels
        self._runs: dict[str, _Read] = {}
        self._requests: OrderedDict[str, list[Reading]] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._recalled = False
        self._recalling = asyncio.Lock()

    def note(self, fingerprint: str, reading: Reading) -> None:
        """Note what a request has led to."""
        known = self._requests.setdefault(fingerprint, [])
        if reading not in known:
            known.append(reading)
            del known[:-SAME_MAX]
        self._requests.move_to_end(fingerprint)
        while len(self._requests) > REQUESTS_MAX:
            self._requests.popitem(last=False)

    async def find(self, fingerprint: str) -> Reading | None:
        """Return what the same request has led to and is not over: what has the fewest readers."""
        await self._recall()
        alive = [item for item in self._requests.get(fingerprint, ()) if await self._alive(item)]
        if fingerprint in self._requests:
            self._requests[fingerprint] = alive
        # The newest of them. One whose client has left may count it for a moment yet.
        return min(reversed(alive), key=self._readers_of, default=None)

    async def _alive(self, reading: Reading) -> bool:
        run = await self._log.run(reading.run_id)
        return run is not None and not run.terminal and run.cancel_requested_at is None

    def _readers_of(self, reading: Reading) -> int:
        read = self._runs.get(reading.run_id)
        return 0 if read is None else read.readers

    async def _recall(self) -> None:
        """Find, once, what the runs that an earlier process has left were asked for."""
        async with self._recalling:
            if self._recalled:
                return
            for run in (await self._log.unfinished())[-RECALLED_MAX:]:
                for reading, door in await asked_for(self._log, run):
                    self.note(door["fingerprint"], reading)
            self._recalled = True

    def enter(self, run: Run) -> None:
        """Count a reader."""
        read = self._runs.setdefault(run.id, _Read())
        read.readers += 1
        if read.timer is not None:
            read.timer.cancel()
            read.timer = None

    def leave(self, run: Run, *, finished: bool, once: bool) -> None:
        """Let a reader go: `finished` if it got the end, `once` if the run is for nobody else."""
        read = self._runs[run.id]
        read.readers -= 1
        if read.readers:
            return
        if finished or not once or not self._cancels or self._streamer.leaving:
            del self._runs[run.id]
            return
        loop = asyncio.get_running_loop()
        read.timer = loop.call_later(LEFT_S, self._cancel, run.id)

    def _cancel(self, run_id: str) -> None:
        self._runs.pop(run_id, None)
        if not self._streamer.leaving:
            task = asyncio.get_running_loop().create_task(self._stop(run_id))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _stop(self, run_id: str) -> None:
        with contextlib.suppress(GatewayError):
            await self._engine.cancel(run_id, "nobody reads it")
