"""Does it cost more to use a log that has grown? A large one beside a small one, turn by turn.

The logs are made once (about two minutes and 3 GB) and kept, in the user's cache folder unless a
folder is given; what a measurement adds is taken away at its end. Every figure is a ratio: what the
large log took, to what the small one took for the same request a moment before or after (lower
quartiles). `python -m tests.bench.growth [--folder F]` runs it by itself.
"""

import argparse
import asyncio
import json
import os
import shutil
import socket
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import platformdirs

from ownware_gateway.log.sqlite import SqliteLog
from ownware_gateway.log.statements import schema_versions
from ownware_gateway.profile.folder import Profiles
from tests.bench import served
from tests.bench.grown import FIRST_KEY, Shape, Threads, build, put_back, thread_id
from tests.bench.rows import Row
from tests.bench.served import Served
from tests.gateway import write_profile

#: Ten threads with ten thousand events; the first has ten.
SMALL: Final = Shape((Threads(1, 1, 10), Threads(9, 11, 101)))

#: A hundred thousand threads with ten million events; the first has ten, the second a million.
LARGE: Final = Shape((Threads(1, 1, 10), Threads(1, 2_000, 500), Threads(99_998, 1, 90)))

#: How much slower a large log may be than a small one.
RATIO_MAX: Final = 1.2

#: How often each request is made of each gateway; the first few are not counted.
ROUNDS: Final = 200
WARM_UP: Final = 10
RUNS: Final = 100
STARTS: Final = 12
LONG_STARTS: Final = 5

DELTAS: Final = 500
PAGE: Final = 5
REPLAYED: Final = 50

#: How long one answer may take.
PATIENCE_S: Final = 60.0

#: What a measurement took in the small log and in the large one.
Pair = tuple[list[float], list[float]]

T = TypeVar("T")

_HTTP_END: Final = b"\r\n\r\n"
_CAUGHT_UP: Final = b"\nevent: stream.replay.complete\n"
_TEXT: Final = b"\nevent: text.delta\n"
_END: Final = b"\nevent: session.end\n"


class Caller:
    """Asks one gateway, over blocking sockets: hardly any of the time is the client's own."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._address = (address.hostname, address.port)
        self._kept = self._connect()

    def _connect(self) -> socket.socket:
        connected = socket.create_connection(self._address, timeout=PATIENCE_S)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connected

    def close(self) -> None:
        self._kept.close()

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the JSON of an answer, which must be a good one."""
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} /api/v1{path} HTTP/1.1\r\nHost: {self._address[0]}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        self._kept.sendall(head.encode() + data)
        answer = _read(self._kept, _HTTP_END)
        said, _, rest = answer.partition(_HTTP_END)
        length = int(said.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        while len(rest) < length:
            rest += self._kept.recv(65_536)
        assert b" 20" in said[:12], rest
        return json.loads(rest)

    def follow(self, path: str) -> socket.socket:
        """Return a stream that has caught up."""
        stream = self._connect()
        stream.sendall(f"GET /api/v1{path} HTTP/1.1\r\nHost: {self._address[0]}\r\n\r\n".encode())
        _read(stream, _CAUGHT_UP)
        return stream

    def run(self, thread: str | None = None) -> tuple[float, float]:
        """Have a run; return the ms from the request to its first text, and to its end.

        It is in a thread of its own unless one is named.
        """
        if thread is None:
            thread = self.ask("POST", "/threads", {"profileId": "bench"})["id"]
        since = self.ask("GET", f"/threads/{thread}/agents")["agents"][0]["maxSeq"]
        with closing(self.follow(_events(thread, since))) as stream:
            began_s = time.perf_counter()
            body = {"profileId": "bench", "prompt": f"{DELTAS}", "threadId": thread}
            self.ask("POST", "/run", body)
            seen = _read(stream, _TEXT)
            first_s = time.perf_counter()
            if _END not in seen:
                _read(stream, _END)
            return (first_s - began_s) * 1e3, (time.perf_counter() - began_s) * 1e3


def _read(stream: socket.socket, until: bytes) -> bytes:
    seen = bytearray()
    place = 0
    while seen.find(until, place) < 0:
        place = max(0, len(seen) - len(until))
        data = stream.recv(262_144)
        assert data, bytes(seen)
        seen += data
    return bytes(seen)


def _events(thread: str, since: int) -> str:
    return f"/threads/{thread}/agents/root/events?since={since}"


@dataclass(frozen=True, slots=True)
class Log:
    """A log that was made, and where its first threads are."""

    folder: Path
    shape: Shape

    @property
    def file(self) -> Path:
        """The database, where a gateway looks for it."""
        return self.folder / "data-dir" / "gateway.db"

    def thread(self, number: int) -> str:
        """Return the name of a thread, counted from 0."""
        return thread_id(FIRST_KEY + number)

    def cursor(self) -> str:
        """Return where the page in the middle of the list of threads begins."""
        with closing(sqlite3.connect(self.file)) as connection:
            return ".".join(
                str(part)
                for part in connection.execute(
                    "SELECT updated_at, key FROM threads WHERE key = ?",
                    (FIRST_KEY + self.shape.threads // 2 + PAGE // 2,),
                ).fetchone()
            )


async def prepared(folder: Path, name: str, shape: Shape) -> Log:
    """Return the log of a shape, made now if it is not there yet."""
    log = Log(folder / f"{name}-{schema_versions()[-1][0]}-{sizes(shape)}", shape)
    if not log.file.exists():
        part = Log(log.folder.with_suffix(".part"), shape)
        shutil.rmtree(part.folder, ignore_errors=True)
        part.file.parent.mkdir(parents=True, mode=0o700)
        write_profile(part.folder / "profiles", "bench", model="openai:bench")
        profile = Profiles(part.folder / "profiles").get("bench")
        _say(f"making a log of {shape.events:,} events in {shape.threads:,} threads: {part.folder}")
        await build(part.file, shape, profile.dump().encode())
        part.folder.rename(log.folder)
    return log


def sizes(shape: Shape) -> str:
    """Return what tells a shape from another one, in the name of its folder."""
    return "-".join(f"{part.count}x{part.runs}x{part.events}" for part in shape.parts)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _row(what: str, took: Pair, unit: str = "ms") -> Row:
    """Return the row of a measurement that must not grow."""
    before, now = map(_undisturbed, took)
    beside = f"{before:.3f} {unit} to {now:.3f} {unit}"
    if len(took[0]) > 1:
        beside += f" (medians {median(took[0]):.3f} to {median(took[1]):.3f})"
    return Row(what, now / before, "×", beside, f"≤ {RATIO_MAX}", now / before <= RATIO_MAX)


def _undisturbed(times: Sequence[float]) -> float:
    """Return the lower quartile: what else the machine does only ever adds to a time."""
    return quantiles(times, n=4)[0] if len(times) > 1 else times[0]


def _turns(pair: tuple[T, T], rounds: int) -> Iterator[tuple[int, T]]:
    """Yield both, with their places, again and again; each as often first as last."""
    both = list(enumerate(pair))
    for number in range(rounds):
        yield from both if number % 2 else reversed(both)


def _each(small: Callable[[], object], large: Callable[[], object]) -> Pair:
    """Return how many ms each took, called in turns."""
    took: Pair = ([], [])
    for which, call in _turns((small, large), WARM_UP + ROUNDS):
        began_s = time.perf_counter()
        call()
        took[which].append((time.perf_counter() - began_s) * 1e3)
    return took[0][WARM_UP:], took[1][WARM_UP:]


def _memory(small: Served, large: Served) -> Pair:
    return [small.memory_mb()], [large.memory_mb()]


class Growth:
    """Two gateways, a small log and a large one."""

    def __init__(self, small: Log, large: Log) -> None:
        self.small, self.large = small, large
        self.rows: list[Row] = []

    async def measure(self, provider: str) -> list[Row]:
        """Measure everything."""
        await self._starts(provider)
        await self._opens()
        async with AsyncExitStack() as stack:
            gateways = (
                await stack.enter_async_context(served.gateway(self.small.folder, provider)),
                await stack.enter_async_context(served.gateway(self.large.folder, provider)),
            )
            memory = _memory(*gateways)
            self.rows.append(_row("memory at rest, after the start", memory, unit="MB"))
            callers = Caller(gateways[0].url), Caller(gateways[1].url)
            for caller in callers:
                stack.callback(caller.close)
            self._requests(*callers)
            self._runs(gateways, callers)
            memory = _memory(*gateways)
            self.rows.append(_row("memory at rest, after as much work", memory, unit="MB"))
            self._streams(*callers)
            # From here on the first thread has more than ten events.
            self._old_thread(callers)
            self._long(callers[1])
        return self.rows

    # -- starting

    async def _starts(self, provider: str) -> None:
        took: Pair = ([], [])
        for which, log in _turns((self.small, self.large), STARTS):
            _let_go(log.file)
            began_s = time.perf_counter()
            async with served.gateway(log.folder, provider) as gateway:
                with closing(Caller(gateway.url)) as caller:
                    caller.ask("GET", "/health")
                    took[which].append((time.perf_counter() - began_s) * 1e3)
        self.rows.append(_row("cold start to the first 200, file not in memory", took))

    async def _opens(self) -> None:
        """Measure what of a start has to do with the log: hidden, above, behind the imports."""
        took: Pair = ([], [])
        for which, log in _turns((self.small, self.large), 2 * STARTS):
            began_s = time.perf_counter()
            opened = await SqliteLog.open(log.file, lambda: 0)
            await opened.charge()
            await opened.unfinished()
            took[which].append((time.perf_counter() - began_s) * 1e3)
            await opened.close()
        self.rows.append(_row("of it: open the log, charge and find unfinished runs", took))

    # -- following

    def _streams(self, small: Caller, large: Caller) -> None:
        ten, long = self.large.thread(0), self.large.thread(1)
        long_head = self.large.shape.parts[1].head

        def opens(caller: Caller, thread: str, since: int) -> Callable[[], None]:
            return lambda: caller.follow(_events(thread, since)).close()

        took = _each(opens(small, self.small.thread(0), 10), opens(large, ten, 10))
        self.rows.append(_row("open a stream: ten events, small log to large log", took))
        took = _each(opens(large, ten, 10), opens(large, long, long_head))
        self.rows.append(_row("open a stream: ten events to a million events", took))
        took = _each(opens(large, ten, 1), opens(large, long, long_head - 9))
        self.rows.append(_row("replay the last 9: ten events to a million events", took))
        usual, head = self.small.thread(1), self.small.shape.parts[1].head
        took = _each(opens(small, usual, head - REPLAYED), opens(large, long, long_head - REPLAYED))
        self.rows.append(_row(f"replay the last {REPLAYED}: small log to a million events", took))

    # -- asking

    def _requests(self, small: Caller, large: Caller) -> None:
        usual = [log.thread(log.shape.threads - 2) for log in (self.small, self.large)]
        cursors = [log.cursor() for log in (self.small, self.large)]
        cases = {
            "threads: first page": [f"/threads?limit={PAGE}"] * 2,
            "threads: a page in the middle": [f"/threads?limit={PAGE}&cursor={c}" for c in cursors],
            "threads: of a profile": [f"/threads?limit={PAGE}&profileId=bench"] * 2,
            "threads: one": [f"/threads/{thread}" for thread in usual],
            "threads: one of a million events": [
                f"/threads/{self.small.thread(1)}",
                f"/threads/{self.large.thread(1)}",
            ],
            "runs: first page": [f"/runs?limit={PAGE}"] * 2,
            "runs: first page of a status": [f"/runs?limit={PAGE}&status=succeeded"] * 2,
            "runs: a status that none has": ["/runs?status=failed"] * 2,
            "runs: active": ["/runs?status=active"] * 2,
            "runs: active, of a thread of a million events": [
                f"/runs?status=active&threadId={self.small.thread(1)}",
                f"/runs?status=active&threadId={self.large.thread(1)}",
            ],
            "approvals": ["/approvals"] * 2,
        }
        for what, (before, now) in cases.items():
            took = _each(partial(small.ask, "GET", before), partial(large.ask, "GET", now))
            self.rows.append(_row(what, took))

    # -- running

    def _runs(self, gateways: tuple[Served, Served], callers: tuple[Caller, Caller]) -> None:
        first: Pair = ([], [])
        took: Pair = ([], [])
        cpu_ms = [0.0, 0.0]
        for caller in callers:
            caller.run()
        for which, caller in _turns(callers, RUNS):
            before_s = gateways[which].cpu_s()
            first_ms, end_ms = caller.run()
            cpu_ms[which] += (gateways[which].cpu_s() - before_s) * 1e3
            first[which].append(first_ms)
            took[which].append(end_ms)
        per_event = [total * 1e3 / RUNS / DELTAS for total in cpu_ms]
        cpu: Pair = ([per_event[0]], [per_event[1]])
        self.rows.append(_row("append: processor time per event", cpu, unit="µs"))
        self.rows.append(_row(f"append: a run of {DELTAS} deltas in a new thread", took))
        self.rows.append(_row("start: request to first text, new thread", first))

    def _old_thread(self, callers: tuple[Caller, Caller]) -> None:
        """Measure a run whose events have a place in the middle of the file."""
        took: Pair = ([], [])
        threads = self.small.thread(0), self.large.thread(0)
        for which, caller in _turns(callers, RUNS):
            took[which].append(caller.run(threads[which])[1])
        self.rows.append(_row(f"append: {DELTAS} deltas, in the oldest thread", took))

    def _long(self, large: Caller) -> None:
        """Measure what cannot be the same: a conversation of two thousand runs is sent whole."""
        took: dict[int, list[float]] = {}
        for number in (0, 1) * LONG_STARTS:
            took.setdefault(number, []).append(large.run(self.large.thread(number))[0])
        ratio = median(took[1]) / median(took[0])
        beside = f"{median(took[0]):.1f} ms to {median(took[1]):.1f} ms"
        what = "start: request to first text, 2,000 runs of history"
        self.rows.append(Row(what, ratio, "×", beside, "", met=True))


def _let_go(file: Path) -> None:
    """Have the kernel forget what it holds of a file."""
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


async def growth(folder: Path) -> list[Row]:
    """Measure with the logs of a folder, which are made there if it has none."""
    folder.mkdir(parents=True, exist_ok=True)
    small = await prepared(folder, "small", SMALL)
    large = await prepared(folder, "large", LARGE)
    with tempfile.TemporaryDirectory() as scratch:
        async with served.provider(Path(scratch)) as provider:
            try:
                return await Growth(small, large).measure(provider)
            finally:
                for log in (small, large):
                    put_back(log.file, log.shape)


def default_folder() -> Path:
    """Return where the logs are kept between runs."""
    return platformdirs.user_cache_path("ownware-gateway") / "bench-growth"


def main() -> int:
    """Measure, print, and say whether every target was met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=default_folder())
    rows = asyncio.run(growth(parser.parse_args().folder))
    sys.stdout.write("".join(f"{row.line()}\n" for row in rows))
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
