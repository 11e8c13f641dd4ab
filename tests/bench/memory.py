"""What the gateway holds: for an idle stream, for a run that waits, and after much work.

Run with `python -m tests.bench.memory`.
"""

import asyncio
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from tests.bench.load import Load, Poster, Reader
from tests.bench.rows import Row
from tests.bench.served import Served, bare, carry, gateway, provider
from tests.gateway import write_profile

#: Asks a person before each call that changes something; the built-in model makes such a call.
ASKS: Final = "asks"
ASKING_PROMPT: Final = "write a.txt: x"

IDLE_STREAMS: Final = 500
IDLE_KB_MAX: Final = 16.0

WAITING_RUNS: Final = 10_000
WAITING_MB_MAX: Final = 5.0

FINISHED_THREADS: Final = 600
FINISHED_DELTAS: Final = 500
KEPT_MB_MAX: Final = 20.0

#: Streams, and runs, of each kind before anything is measured, so that what is made once is made.
WARM_STREAMS: Final = 20
WARM_RUNS: Final = 1_000

#: How many requests, and threads with a run, there are at once.
AT_ONCE: Final = 20

#: How long a gateway is left alone before its memory is looked at.
SETTLE_S: Final = 2.0

#: How long it may take until a gateway has noticed that the clients of idle streams have left.
LEFT_S: Final = 60.0

#: The tasks of a gateway in which nothing happens: it has one that waits for a signal.
TASKS_AT_REST: Final = 3

_COUNTED: Final = "tests.bench.counted"


async def memory(folder: Path) -> list[Row]:
    """Measure all of it; the figures are of the gateway's process alone."""
    async with provider(folder) as model:
        return [
            *await idle_streams(folder, model),
            *await waiting_runs(folder, model),
            *await memory_given_back(folder, model),
        ]


def _new(folder: Path, name: str) -> Path:
    made = folder / name
    made.mkdir()
    write_profile(made / "profiles", ASKS, model="demo:assistant")
    return made


# -- idle streams


async def idle_streams(folder: Path, model: str) -> list[Row]:
    """Return what a stream costs on which nothing happens."""
    async with bare(_new(folder, "idle-bare"), model) as served:
        bare_kb = await _idle_kb(served, IDLE_STREAMS)
    rows = []
    for where, threads in (("on as many threads", IDLE_STREAMS), ("on one thread", 1)):
        async with gateway(_new(folder, f"idle-{threads}"), model, module=_COUNTED) as served:
            kb = await _idle_kb(served, threads)
            tasks = (await served.counts())["tasks"] / (IDLE_STREAMS + WARM_STREAMS)
        beside = f"bare aiohttp {bare_kb:.1f} KB; {tasks:.1f} tasks each, aiohttp has 2"
        what = f"{IDLE_STREAMS} idle streams {where}, each"
        met = kb <= IDLE_KB_MAX
        rows.append(Row(what, kb, "KB", beside, f"≤ {IDLE_KB_MAX:g} KB", met))
    return rows


async def _idle_kb(served: Served, threads: int) -> float:
    post = Poster(*address(served.url))
    names = [
        (await post("POST", "/api/v1/threads", {"profileId": "bench"}))["id"]
        for _ in range(threads)
    ]

    async def open_streams(count: int) -> list[Reader]:
        paths = [f"/api/v1/threads/{names[n % threads]}/agents/root/events" for n in range(count)]
        readers = [await open_reader(served.url, path) for path in paths]
        await asyncio.gather(*(reader.open.wait() for reader in readers))
        await asyncio.sleep(SETTLE_S)
        return readers

    warm = await open_streams(WARM_STREAMS)
    before_mb = served.memory_mb()
    readers = await open_streams(IDLE_STREAMS)
    after_mb = served.memory_mb()
    assert not any(reader.ended.is_set() for reader in readers), "an idle stream was cut off"
    for reader in warm + readers:
        reader.close()
    return (after_mb - before_mb) * 1e3 / IDLE_STREAMS


def address(url: str) -> tuple[str, int]:
    """Return the host and the port of a server."""
    found = urlsplit(url)
    assert found.hostname is not None
    assert found.port is not None
    return found.hostname, found.port


async def open_reader(url: str, path: str, until: bytes = b"\nevent: done\n") -> Reader:
    """Open a stream of the gateway's, or of the bare server's."""
    host, port = address(url)
    _, reader = await asyncio.get_running_loop().create_connection(
        lambda: Reader(path, f"{host}:{port}", until), host, port
    )
    return reader


# -- runs that wait


async def waiting_runs(folder: Path, model: str) -> list[Row]:
    """Return what runs cost that wait for a person, and the start of a gateway that has them."""
    folder = _new(folder, "waiting")
    began_s = time.monotonic()
    async with gateway(folder, model, module=_COUNTED) as served:
        empty_s = time.monotonic() - began_s
        await _have_wait(served.url, WARM_RUNS)
        await asyncio.sleep(SETTLE_S)
        before, before_mb = await served.counts(), served.memory_mb()
        await _have_wait(served.url, WAITING_RUNS)
        await asyncio.sleep(SETTLE_S)
        after, after_mb = await served.counts(), served.memory_mb()
    began_s = time.monotonic()
    async with gateway(folder, model, module=_COUNTED) as served:
        started_s = time.monotonic() - began_s
        again = await served.counts()
        again_mb, peak_mb = served.memory_mb(), served.peak_mb()
    many = f"{WAITING_RUNS:,} waiting runs"
    tasks, timers = (after[name] - before[name] for name in ("tasks", "timers"))
    grown_mb = after_mb - before_mb
    beside = f"from {before_mb:.1f} to {after_mb:.1f} MB"
    held = f"{again['tasks']} tasks, {again['timers']} timers, {again_mb:.1f} MB"
    return [
        Row(many, grown_mb, "MB", beside, f"≤ {WAITING_MB_MAX:g} MB", grown_mb <= WAITING_MB_MAX),
        Row(f"{many}: tasks", tasks, "", "more than without them", "0", tasks <= 0),
        Row(f"{many}: timers", timers, "", "more than without them", "0", timers <= 0),
        Row(
            f"start of a gateway with {many}",
            started_s,
            "s",
            f"{empty_s:.2f} s without; then {held}, at most {peak_mb:.1f} MB",
            "≤ 1 s more",
            started_s <= empty_s + 1,
        ),
    ]


async def _have_wait(url: str, count: int) -> None:
    """Have runs ask a person, each on a thread of its own, and wait until all of them do."""
    asked = await open_reader(url, "/api/v1/approvals/events")
    await asked.open.wait()
    seen = asked.frames

    async def start_some() -> None:
        post = Poster(*address(url))
        for _ in range(count // AT_ONCE):
            await post("POST", "/api/v1/run", {"profileId": ASKS, "prompt": ASKING_PROMPT})

    await asyncio.gather(*(start_some() for _ in range(AT_ONCE)))
    while asked.frames - seen < count:
        assert not asked.ended.is_set(), "the stream of the questions was cut off"
        await asyncio.sleep(0.1)
    asked.close()


# -- memory given back


async def memory_given_back(folder: Path, model: str) -> list[Row]:
    """Return what is left in memory of threads that have finished.

    It starts after one run, for code and tables that are loaded on first use are no part of it.
    """
    async with gateway(_new(folder, "finished"), model, module=_COUNTED) as served:
        load = Load(url=served.url, prompt=str(FINISHED_DELTAS), threads=AT_ONCE)
        booted_mb = served.memory_mb()
        await carry(replace(load, threads=1))
        await _streams_are_gone(served)
        before_mb = served.memory_mb()
        grown_mb = []
        for _ in range(FINISHED_THREADS // AT_ONCE):
            await carry(load)
            grown_mb.append(served.memory_mb() - before_mb)
        await _streams_are_gone(served)
        kept_mb = served.memory_mb() - before_mb
        peak_mb = served.peak_mb() - before_mb
    beside = (
        f"the first run {before_mb - booted_mb:.1f} MB, then {grown_mb[0]:.1f} after {AT_ONCE}, "
        f"{grown_mb[len(grown_mb) // 2]:.1f} after half of them, {peak_mb:.1f} at most"
    )
    what = f"{FINISHED_THREADS} finished threads of {FINISHED_DELTAS} deltas leave"
    return [Row(what, kept_mb, "MB", beside, f"≤ {KEPT_MB_MAX:g} MB", kept_mb <= KEPT_MB_MAX)]


async def _streams_are_gone(served: Served) -> None:
    """Wait until the gateway has noticed that clients have left, and has nothing under way."""
    async with asyncio.timeout(LEFT_S):
        while (await served.counts())["tasks"] > TASKS_AT_REST:
            await asyncio.sleep(0.5)
    await asyncio.sleep(SETTLE_S)


async def _main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for row in await memory(Path(folder)):
            sys.stdout.write(f"{row.line()}\n")


if __name__ == "__main__":
    asyncio.run(_main())
