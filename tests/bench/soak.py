"""A soak: runs in flight all the time, readers that come and go, and nothing that grows.

Run with `python -m tests.bench.soak [--minutes 30]`. What is compared are the first and the last
third of the time after the warm-up. Every reader checks that it gets each number once, in order.
"""

import argparse
import asyncio
import random
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any, Final

from ownware_gateway.datadir import DATABASE
from tests.bench.load import Poster, Reader
from tests.bench.memory import ASKING_PROMPT, ASKS, address, open_reader
from tests.bench.rows import Row
from tests.bench.served import Served, gateway, provider
from tests.gateway import write_profile

MINUTES: Final = 30.0
SAMPLE_S: Final = 10.0

#: A short soak is looked at more often than that, for there must be something to compare.
SAMPLES_MIN: Final = 36

#: The part of the time that is not looked at, and how long that is at least: caches fill.
WARM_UP: Final = 1 / 6
WARM_UP_S: Final = 90.0

#: Runs in flight all the time, of so many deltas at that pace; a thread has some, then it is left.
RUNS: Final = 50
PACED_PROMPT: Final = "200/40"
RUN_S: Final = 8.0
RUNS_PER_THREAD: Final = 5

#: Beside them a run of many deltas at once, and one that asks a person, each so often.
BURST_PROMPT: Final = "1000"
BURST_EVERY_S: Final = 1.0
ASK_EVERY_S: Final = 2.0

#: Readers; each stays with a thread for some visits, and every tenth stops reading on each of them.
READERS: Final = 200
VISITS: Final = (2, 5)
VISIT_S: Final = (0.5, 5.0)
AWAY_S: Final = (0.05, 1.0)
SLOW_EVERY: Final = 10

#: What counts as flat.
MEMORY_MB_MAX: Final = 5.0
COUNT_RATIO_MAX: Final = 1.1
LATENCY_RATIO_MAX: Final = 1.5
LATENCY_MS_MIN: Final = 5.0
WAL_MB_MAX: Final = 32.0

_END: Final = b"\nevent: session.end\n"
_ASKED: Final = b"\nevent: permission.request\n"
_ID: Final = re.compile(rb"\nid: ([0-9a-f]+\.([0-9]+))\n")


@dataclass(frozen=True, slots=True)
class Sample:
    """What there was at one moment, and the latencies since the last one, in milliseconds."""

    at_s: float
    memory_mb: float
    handles: float
    tasks: float
    wal_mb: float
    in_flight: float
    first_ms: list[float]


@dataclass(slots=True)
class Soak:
    """The state of the load."""

    served: Served
    over: asyncio.Event = field(default_factory=asyncio.Event)
    #: The thread that each worker has now, and what has been counted.
    threads: list[str] = field(default_factory=lambda: [""] * RUNS)
    in_flight: int = 0
    runs: int = 0
    asked: int = 0
    visits: int = 0
    frames: int = 0
    first_ms: list[float] = field(default_factory=list)
    #: Where a reader did not get the next number, in words.
    wrong: list[str] = field(default_factory=list)


class Visitor(asyncio.Protocol):
    """One visit of a reader: it goes on after `last_id` and checks that numbers follow."""

    def __init__(self, soak: Soak, thread: str, last_id: str) -> None:
        self._soak = soak
        self._thread = thread
        self._rest = b""
        self.last_id = last_id
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        last = f"Last-Event-ID: {self.last_id}\r\n" if self.last_id else ""
        path = f"/api/v1/threads/{self._thread}/agents/root/events"
        host = self._soak.served.url.removeprefix("http://")
        transport.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{last}\r\n".encode())

    def data_received(self, data: bytes) -> None:
        seen = self._rest + data
        # The line that may go on in the next read, and the end of the line before it.
        self._rest = seen[seen.rfind(b"\n") :]
        for found in _ID.finditer(seen):
            before = int(self.last_id.partition(".")[2] or 0)
            if int(found[2]) != before + 1:
                self._soak.wrong.append(f"{self._thread}: {found[2].decode()} after {before}")
            self.last_id = found[1].decode()
            self._soak.frames += 1


async def soak(folder: Path, minutes: float = MINUTES) -> list[Row]:
    """Carry the load for so long; say what has grown."""
    write_profile(folder / "profiles", ASKS, model="demo:assistant")
    async with (
        provider(folder) as model,
        gateway(folder, model, module="tests.bench.counted") as served,
    ):
        state = Soak(served)
        async with _load(state):
            samples = await _samples(state, minutes * 60)
        open_questions = await _post(state)("GET", "/api/v1/approvals", {})
        log_mb = (folder / "data-dir" / DATABASE).stat().st_size / 1e6
    assert not open_questions["items"], "a question was answered and is still open"
    return _rows(state, samples, log_mb)


# -- the load


@asynccontextmanager
async def _load(state: Soak) -> AsyncIterator[None]:
    work = [_runs(state, number) for number in range(RUNS)]
    work += [_bursts(state), _questions(state)]
    work += [_reads(state, number) for number in range(READERS)]
    tasks = [asyncio.ensure_future(item) for item in work]

    def fail_early(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            state.over.set()

    for task in tasks:
        task.add_done_callback(fail_early)
    try:
        yield
    finally:
        state.over.set()
        # Raises what one of them met, should they have broken off.
        await asyncio.gather(*tasks)


def _post(state: Soak) -> Poster:
    return Poster(*address(state.served.url))


async def _pause(state: Soak, seconds: float) -> bool:
    """Wait, but not longer than the soak; return whether it goes on."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await state.over.wait()
    return not state.over.is_set()


async def _runs(state: Soak, number: int) -> None:
    post = _post(state)
    # Not all at the same moment, neither the runs nor the threads.
    await _pause(state, number * RUN_S / RUNS)
    left = 1 + number % RUNS_PER_THREAD
    while not state.over.is_set():
        thread = (await post("POST", "/api/v1/threads", {"profileId": "bench"}))["id"]
        state.threads[number] = thread
        path = f"/api/v1/threads/{thread}/agents/root/events"
        reader = await open_reader(state.served.url, path, _END)
        await reader.open.wait()
        for _ in range(left):
            if not state.over.is_set():
                await _run(state, post, reader, thread, PACED_PROMPT)
        reader.close()
        left = RUNS_PER_THREAD


async def _run(state: Soak, post: Poster, reader: Reader, thread: str, prompt: str) -> None:
    loop = asyncio.get_running_loop()
    reader.next_round()
    began_s = loop.time()
    state.in_flight += 1
    body = {"profileId": "bench", "prompt": prompt, "threadId": thread}
    await post("POST", "/api/v1/run", body)
    await reader.ended.wait()
    state.in_flight -= 1
    state.runs += 1
    assert reader.finished, f"the stream of {thread} was cut off"
    assert reader.first_text_s is not None
    state.first_ms.append((reader.first_text_s - began_s) * 1e3)


async def _bursts(state: Soak) -> None:
    post = _post(state)
    while await _pause(state, BURST_EVERY_S):
        thread = (await post("POST", "/api/v1/threads", {"profileId": "bench"}))["id"]
        path = f"/api/v1/threads/{thread}/agents/root/events"
        reader = await open_reader(state.served.url, path, _END)
        await reader.open.wait()
        body = {"profileId": "bench", "prompt": BURST_PROMPT, "threadId": thread}
        reader.next_round()
        await post("POST", "/api/v1/run", body)
        await reader.ended.wait()
        reader.close()
        state.runs += 1


async def _questions(state: Soak) -> None:
    post = _post(state)
    while await _pause(state, ASK_EVERY_S):
        run = await post("POST", "/api/v1/run", {"profileId": ASKS, "prompt": ASKING_PROMPT})
        reader = await open_reader(state.served.url, f"/api/v1/runs/{run['runId']}/events", _ASKED)
        await reader.ended.wait()
        reader.close()
        await post("POST", f"/api/v1/threads/{run['threadId']}/resume", {"action": "approve"})
        state.asked += 1


async def _reads(state: Soak, number: int) -> None:
    chance = random.Random(number)
    slow = number % SLOW_EVERY == 0
    while await _pause(state, chance.uniform(*AWAY_S)):
        thread = chance.choice(state.threads)
        last_id = ""
        for _ in range(chance.randint(*VISITS) if thread else 0):
            last_id = await _visit(state, Visitor(state, thread, last_id), chance, slow=slow)
            await _pause(state, chance.uniform(*AWAY_S))


async def _visit(state: Soak, visitor: Visitor, chance: random.Random, *, slow: bool) -> str:
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: visitor, *address(state.served.url))
    transport = visitor.transport
    assert transport is not None
    await _pause(state, chance.uniform(*VISIT_S))
    if slow and not transport.is_closing():
        transport.pause_reading()
        await _pause(state, VISIT_S[1])
        transport.resume_reading()
        await _pause(state, VISIT_S[0])
    if transport.is_closing() and not state.over.is_set():
        state.wrong.append("a stream was cut off")
    transport.abort()
    state.visits += 1
    return visitor.last_id


# -- what is looked at


async def _samples(state: Soak, seconds: float) -> list[Sample]:
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    every_s = min(SAMPLE_S, seconds / SAMPLES_MIN)
    wal = state.served.folder / "data-dir" / f"{DATABASE}-wal"
    samples: list[Sample] = []
    for number in range(1, round(seconds / every_s) + 1):
        at_s = number * every_s
        if not await _pause(state, began_s + at_s - loop.time()):
            break
        first_ms, state.first_ms = state.first_ms, []
        sample = Sample(
            at_s,
            state.served.memory_mb(),
            state.served.handles(),
            (await state.served.counts())["tasks"],
            wal.stat().st_size / 1e6,
            state.in_flight,
            first_ms,
        )
        samples.append(sample)
        _say(sample, state)
    assert len(samples) >= SAMPLES_MIN, "the load broke off"
    return samples


def _say(sample: Sample, state: Soak) -> None:
    sys.stderr.write(
        f"{sample.at_s:6.0f} s  {sample.memory_mb:6.1f} MB  {sample.handles:.0f} handles  "
        f"{sample.tasks:.0f} tasks  WAL {sample.wal_mb:.1f} MB  {sample.in_flight:.0f} in flight  "
        f"{_p99(sample.first_ms):.0f} ms  {state.runs} runs  {state.visits} visits  "
        f"{state.frames} frames  {len(state.wrong)} wrong\n"
    )


def _p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else 0.0


def _p50(values: Sequence[float]) -> float:
    return quantiles(values, n=2)[0] if len(values) > 1 else 0.0


def _rows(state: Soak, samples: Sequence[Sample], log_mb: float) -> list[Row]:
    seconds = samples[-1].at_s
    # A short soak, for trying it out, has at least a quarter that is looked at.
    warm_s = max(seconds * WARM_UP, min(WARM_UP_S, seconds * 0.75))
    warm = [sample for sample in samples if sample.at_s > warm_s]
    third = len(warm) // 3
    thirds = warm[:third], warm[-third:]

    def compare(what: str, unit: str, of: Callable[[Sequence[Sample]], float], at_most: Any) -> Row:
        first, last = map(of, thirds)
        bound: float = at_most(first)
        return Row(
            f"soak: {what}", last, unit, f"{first:.1f} at first", f"≤ {bound:.1f}", last <= bound
        )

    def latency(quantile: Callable[[Sequence[float]], float]) -> Callable[[Any], float]:
        return lambda part: quantile([ms for sample in part for ms in sample.first_ms])

    def slower(first: float) -> float:
        return max(first * LATENCY_RATIO_MAX, first + LATENCY_MS_MIN)

    def more(first: float) -> float:
        return first * COUNT_RATIO_MAX

    wal_mb = max(sample.wal_mb for sample in samples)
    fewest = min(sample.in_flight for sample in warm)
    did = f"{state.runs} runs, {state.asked} questions, {state.frames} frames"
    return [
        compare(
            "memory",
            "MB",
            lambda part: fmean(sample.memory_mb for sample in part),
            lambda first: first + MEMORY_MB_MAX,
        ),
        compare("file handles", "", lambda part: fmean(s.handles for s in part), more),
        compare("tasks", "", lambda part: fmean(s.tasks for s in part), more),
        compare("POST to the first text, p50", "ms", latency(_p50), slower),
        compare("POST to the first text, p99", "ms", latency(_p99), slower),
        Row(
            "soak: write-ahead log at most",
            wal_mb,
            "MB",
            f"the log itself {log_mb:.0f} MB",
            f"≤ {WAL_MB_MAX:g} MB",
            wal_mb <= WAL_MB_MAX,
        ),
        Row("soak: fewest runs in flight", fewest, "", did, f"≥ {RUNS - 5}", fewest >= RUNS - 5),
        Row(
            f"soak: wrong numbers in {state.visits:,} visits",
            len(state.wrong),
            "",
            "; ".join(state.wrong[:3]),
            "0",
            not state.wrong,
        ),
    ]


async def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.soak")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as folder:
        for row in await soak(Path(folder), minutes):
            sys.stdout.write(f"{row.line()}\n")


if __name__ == "__main__":
    asyncio.run(_main())
