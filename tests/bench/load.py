"""The load client: counts the frames of many streams, and how old they are, without parsing them.

It is a process of its own and does little more than read, so that it is no bottleneck: `busy` in
what it says is the part of a core that it took. Run with a `Load` as JSON; it prints a `Result`.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from tests.bench.provider import SENT

#: Begins each log event on the wire; a frame about the stream itself has no id.
_FRAME: Final = b"\nid: "
_TEXT: Final = b'"type":"text.delta","text":"'
_SENT: Final = _TEXT + SENT.encode()
_SENT_DIGITS: Final = 20
_END: Final = b"\nevent: session.end\n"
_DONE: Final = b"\nevent: done\n"
_CAUGHT_UP: Final = b"\nevent: stream.replay.complete\n"

#: How long a whole load may take, so that one that hangs is a clear failure.
PATIENCE_S: Final = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is to be done. Every stream is open before the first run starts.

    There are so many `threads`, each followed by `readers`, and each gets `rounds` runs, one after
    the other: all threads at once, or, `alone`, never two runs at a time. `replay` is a path to be
    read instead, from its start to where it has caught up, by `readers` at once.
    """

    url: str
    prompt: str = ""
    threads: int = 1
    readers: int = 1
    rounds: int = 1
    alone: bool = False
    replay: str = ""


@dataclass(slots=True)
class Result:
    """What came of it. Times are seconds, `late` and `first` milliseconds.

    `frames` are log events over all readers, from the first request to the last frame in `took`
    seconds. `late` is how old a paced delta was when it came, `first` how long after the request
    the first text of a run came.
    """

    frames: int = 0
    fewest: int = 0
    took: float = 0.0
    busy: float = 0.0
    late: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)


class Reader(asyncio.Protocol):
    """One stream. `ended` is set at its end or when it is cut off, `open` once it has caught up."""

    def __init__(self, path: str, host: str, until: bytes) -> None:
        self._request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        self._until = until
        self._rest = b""
        self.frames = 0
        self.last_s = 0.0
        self.late: list[float] = []
        self.first_text_s: float | None = None
        self.open = asyncio.Event()
        self.ended = asyncio.Event()
        self.finished = False
        self._awaits_text = False
        self._transport: asyncio.Transport | None = None

    def next_round(self) -> None:
        """Wait for the first text, and for the end, of another run."""
        self.ended.clear()
        self.first_text_s = None
        self._awaits_text = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        seen = self._rest + data
        # What may be the start of a mark that goes on in the next read.
        self._rest = seen[-4:] if _FRAME[:1] in seen[-4:] else b""
        self.frames += seen.count(_FRAME)
        self.last_s = now_s
        if (at := data.find(_SENT)) >= 0:
            sent = data[at + len(_SENT) : at + len(_SENT) + _SENT_DIGITS]
            if len(sent) == _SENT_DIGITS:
                self.late.append(now_s * 1e3 - int(sent) / 1e6)
        if self._awaits_text and _TEXT in data:
            self._awaits_text = False
            self.first_text_s = now_s
        if not self.open.is_set() and _CAUGHT_UP in data:
            self.open.set()
        if self._until in data:
            self.finished = True
            self.ended.set()

    def connection_lost(self, _: Exception | None) -> None:
        self.open.set()
        self.ended.set()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class Poster:
    """One kept connection that sends requests and reads whole answers."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __call__(self, method: str, path: str, body: dict[str, Any]) -> Any:
        """Send a request; return the answer's JSON."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        data = json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.split(b"content-length: ")[1].split(b"\r\n")[0])
        text = await reader.readexactly(length)
        assert b" 20" in answer[:12], text
        return json.loads(text)


async def carry(load: Load) -> Result:
    """Do what the load says."""
    address = urlsplit(load.url)
    name, port = address.hostname, address.port
    assert name is not None
    assert port is not None
    host = f"{name}:{port}"
    loop = asyncio.get_running_loop()

    async def open_reader(path: str, until: bytes) -> Reader:
        _, reader = await loop.create_connection(lambda: Reader(path, host, until), name, port)
        return reader

    result = Result()
    if load.replay:
        readers = [await open_reader(load.replay, _DONE) for _ in range(load.readers)]
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        await asyncio.gather(*(reader.ended.wait() for reader in readers))
    else:
        posters = [Poster(name, port) for _ in range(load.threads)]
        threads = [
            (await post("POST", "/api/v1/threads", {"profileId": "bench"}))["id"]
            for post in posters
        ]
        followed = [
            [
                await open_reader(f"/api/v1/threads/{thread}/agents/root/events", _END)
                for _ in range(load.readers)
            ]
            for thread in threads
        ]
        readers = [reader for group in followed for reader in group]
        await asyncio.gather(*(reader.open.wait() for reader in readers))
        began_s, began_cpu_s = time.monotonic(), time.process_time()

        async def one(post: Poster, thread: str, group: list[Reader]) -> None:
            for _ in range(load.rounds):
                for reader in group:
                    reader.next_round()
                posted_s = time.monotonic()
                body = {"profileId": "bench", "prompt": load.prompt, "threadId": thread}
                await post("POST", "/api/v1/run", body)
                await asyncio.gather(*(reader.ended.wait() for reader in group))
                result.first += [
                    (reader.first_text_s - posted_s) * 1e3
                    for reader in group
                    if reader.first_text_s is not None
                ]

        if load.alone:
            for each in zip(posters, threads, followed, strict=True):
                await one(*each)
        else:
            await asyncio.gather(*map(one, posters, threads, followed))
    result.busy = time.process_time() - began_cpu_s
    result.took = max(reader.last_s for reader in readers) - began_s
    result.busy /= time.monotonic() - began_s
    result.frames = sum(reader.frames for reader in readers)
    result.fewest = min(reader.frames for reader in readers)
    result.late = [late for reader in readers for late in reader.late]
    assert all(reader.finished for reader in readers), "a stream was cut off"
    for reader in readers:
        reader.close()
    return result


async def _main() -> None:
    load = Load(**json.loads(sys.argv[1]))
    async with asyncio.timeout(PATIENCE_S):
        result = await carry(load)
    json.dump(asdict(result), sys.stdout)


if __name__ == "__main__":
    asyncio.run(_main())
