"""How fast it is: to the first text, with one run and with twenty, in a replay, to many readers.

`python -m tests.bench.speed` runs it by itself. What a figure is held against (the bare pipeline,
the bare replay, a bare reader of the same streams) is measured right before it, in turn.
"""

import asyncio
import sqlite3
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from tests.bench import served
from tests.bench.load import Load, Result
from tests.bench.rows import Row
from tests.bench.served import Served

#: How often each measurement is made; a figure is the median.
ROUNDS: Final = 5

#: One run: 5,000 deltas at once; twenty: 1,000 each. Paced: one delta every 10 ms.
ONE: Final = "5000"
EACH_OF_TWENTY: Final = "1000"
PACED: Final = "300/10"
PACED_DELTAS: Final = 300

#: A thread of 20,000 events: so many deltas, and what a run has beside them.
REPLAYED: Final = "19994"

#: Of the slower of many readers, the first second is left out: they all open at the same time.
FAN_OUT: Final = "3000"
FAN_OUT_FAST: Final = "1000/5"
FAN_OUT_WIDE: Final = "250/20"


@dataclass(frozen=True, slots=True)
class Stage:
    """The processes that a measurement is made with."""

    provider: str
    bare: Served
    gateway: Served


@asynccontextmanager
async def stage(folder: Path) -> AsyncIterator[Stage]:
    """Start a model server, the bare pipeline and a gateway."""
    folder.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        provider = await stack.enter_async_context(served.provider(folder))
        bare = await stack.enter_async_context(served.bare(folder, provider))
        gateway = await stack.enter_async_context(served.gateway(folder, provider))
        yield Stage(provider, bare, gateway)


async def speed(folder: Path, rounds: int = ROUNDS) -> list[Row]:
    """Measure everything, each part with processes of its own."""
    rows: list[Row] = []
    for number, part in enumerate(PARTS):
        async with stage(folder / f"speed_{number}") as on:
            # What is imported and made on first use is not what is measured.
            await served.carry(Load(url=on.gateway.url, prompt="100", rounds=3))
            made = await part(on, rounds)
        for row in made:
            sys.stderr.write(row.line() + "\n")
        rows += made
    return rows


def at(values: Sequence[float], percent: float) -> float:
    """Return the value that so many percent of the values are not above."""
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


async def first_text(on: Stage, rounds: int) -> list[Row]:
    """POST of a run to its first text, in threads of 25 turns whose streams are open."""
    load = Load(url=on.gateway.url, prompt="3", threads=20, rounds=25, alone=True)
    results = [await served.carry(load) for _ in range(rounds)]
    p50 = median(at(result.first, 50) for result in results)
    p99 = median(at(result.first, 99) for result in results)
    count = len(results[0].first)
    return [
        Row(f"POST to first text, p50 of {count}", p50, "ms", "", "<= 4.5", p50 <= 4.5),
        Row(f"POST to first text, p99 of {count}", p99, "ms", "", "<= 15", p99 <= 15),
    ]


async def deltas(on: Stage, rounds: int) -> list[Row]:
    """Deltas without delay, from the model to a reader, durable before they are seen."""
    rows: list[Row] = []
    one = Load(url="", prompt=ONE)
    twenty = Load(url="", prompt=EACH_OF_TWENTY, threads=20)
    for what, load, least, part in (
        ("1 run x 5,000 deltas to a reader", one, 35_000, 0.6),
        ("20 runs x 1,000 deltas to 20 readers", twenty, 30_000, 0.0),
    ):
        bare, ours = await _in_turn(on, load, rounds)
        rate, bare_rate = median(map(_rate, ours)), median(map(_rate, bare))
        ratio = median(_rate(mine) / _rate(other) for mine, other in zip(ours, bare, strict=True))
        beside = f"bare pipeline {bare_rate:,.0f}/s, {_client(ours)}"
        rows.append(Row(what, rate, "/s", beside, f">= {least:,}", rate >= least))
        target = f">= {part:.0%}" if part else ""
        rows.append(Row(f"{what}, of bare", ratio * 100, "%", "", target, ratio >= part))
    return rows


async def paced(on: Stage, rounds: int) -> list[Row]:
    """The processor time that a delta costs when each comes by itself, every 10 ms."""
    rows = []
    for runs, most in ((20, 2.5), (1, 4.0)):
        ours: list[float] = []
        bare: list[float] = []
        for _ in range(rounds):
            read = ("-m", "tests.bench.bare", "read", on.provider, PACED, f"{runs}")
            bare.append(float(await served.printed(*read)) / runs / PACED_DELTAS * 1e6)
            before_s = on.gateway.cpu_s()
            await served.carry(Load(url=on.gateway.url, prompt=PACED, threads=runs))
            ours.append((on.gateway.cpu_s() - before_s) / runs / PACED_DELTAS * 1e6)
        ratio = median(mine / other for mine, other in zip(ours, bare, strict=True))
        what = f"CPU per paced delta of {runs} run{'s' if runs > 1 else ''}, x bare reading"
        beside = f"{median(ours):.0f} us with a reader each, bare {median(bare):.0f} us"
        rows.append(Row(what, ratio, "x", beside, f"<= {most}", ratio <= most))
    return rows


async def replay(on: Stage, rounds: int) -> list[Row]:
    """A finished thread of 20,000 events, from its start to its end."""
    await served.carry(Load(url=on.gateway.url, prompt=REPLAYED))
    (file,) = (on.gateway.folder / "data-dir").glob("*.db")
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as db:
        sql = "SELECT streams.key, threads.id FROM streams JOIN threads ON threads.key = thread_key"
        key, thread = db.execute(f"{sql} ORDER BY head DESC LIMIT 1").fetchone()
    bare_path = f"/replay?path={file}&key={key}"
    path = f"/api/v1/threads/{thread}/agents/root/events?follow=false"
    rows = []
    for readers, part in ((1, 0.5), (10, 0.0)):
        ours: list[Result] = []
        bare: list[Result] = []
        peak_mb = 0.0
        for _ in range(rounds):
            other = Load(url=on.bare.url, replay=bare_path, readers=readers)
            bare.append(await served.carry(other))
            before_mb = on.gateway.memory_mb()
            on.gateway.forget_peak()
            mine = Load(url=on.gateway.url, replay=path, readers=readers)
            ours.append(await served.carry(mine))
            peak_mb = max(peak_mb, on.gateway.peak_mb() - before_mb)
        rate = median(map(_rate, ours))
        ratio = median(_rate(mine) / _rate(other) for mine, other in zip(ours, bare, strict=True))
        beside = f"bare {median(map(_rate, bare)):,.0f}/s; {_client(ours)}"
        what = f"replay of 20,000 events to {readers} reader{'s' if readers > 1 else ''}"
        rows.append(Row(what, rate, "/s", beside, ">= 300,000", rate >= 300_000))
        target = f">= {part:.0%}" if part else ""
        rows.append(Row(f"{what}, of bare", ratio * 100, "%", "", target, ratio >= part))
        rows.append(Row(f"{what}, memory on the way", peak_mb, "MB", "", "<= 10", peak_mb <= 10))
    return rows


async def fan_out(on: Stage, rounds: int) -> list[Row]:
    """One run to 200 readers, as fast as it comes; none is dropped, or the load client fails."""
    load = Load(url=on.gateway.url, prompt=FAN_OUT, readers=200)
    results = []
    grown_mb = 0.0
    for _ in range(rounds):
        before_mb = on.gateway.memory_mb()
        on.gateway.forget_peak()
        results.append(await served.carry(load))
        grown_mb = max(grown_mb, on.gateway.peak_mb() - before_mb)
    rate = median(map(_rate, results))
    fewest = min(result.fewest for result in results)
    what = "200 readers x 3,000 deltas without delay"
    beside = f"each of the 200 got at least {fewest:,} events; {_client(results)}"
    return [
        Row(what, rate, "/s", beside, ">= 400,000", rate >= 400_000),
        Row(f"{what}, memory on the way", grown_mb, "MB", "", "<= 30", grown_mb <= 30),
    ]


async def fan_out_paced(on: Stage, rounds: int) -> list[Row]:
    """How old a paced delta is when a reader has it, from the model's socket to the reader's."""
    rows = []
    for readers, prompt, per_s, most in (
        (200, FAN_OUT_FAST, 200, 30),
        (1000, FAN_OUT_WIDE, 50, 250),
    ):
        load = Load(url=on.gateway.url, prompt=prompt, readers=readers)
        results = []
        cores = []
        for _ in range(rounds):
            before_s = on.gateway.cpu_s()
            results.append(await served.carry(load))
            cores.append((on.gateway.cpu_s() - before_s) / results[-1].took)
        p99 = median(at(result.late, 99) for result in results)
        p50 = median(at(result.late, 50) for result in results)
        what = f"{readers:,} readers, {per_s} deltas/s: p99 of their age"
        beside = f"p50 {p50:.1f} ms, {median(cores):.2f} of a core; {_client(results)}"
        rows.append(Row(what, p99, "ms", beside, f"<= {most}", p99 <= most))
    return rows


PARTS: Final[tuple[Callable[[Stage, int], Awaitable[list[Row]]], ...]] = (
    first_text,
    deltas,
    paced,
    replay,
    fan_out,
    fan_out_paced,
)


async def _in_turn(on: Stage, load: Load, rounds: int) -> tuple[list[Result], list[Result]]:
    """Have the bare pipeline and the gateway do the same, one after the other."""
    bare: list[Result] = []
    ours: list[Result] = []
    for _ in range(rounds):
        for server, results in ((on.bare, bare), (on.gateway, ours)):
            asked = Load(url=server.url, prompt=load.prompt, threads=load.threads)
            results.append(await served.carry(asked))
    return bare, ours


def _rate(result: Result) -> float:
    return result.frames / result.took


def _client(results: Sequence[Result]) -> str:
    """Say how busy the load client was: at a whole core it would be the bottleneck."""
    return f"client {median(result.busy for result in results):.2f} of a core"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        asyncio.run(speed(Path(made), int(sys.argv[1]) if sys.argv[1:] else ROUNDS))
