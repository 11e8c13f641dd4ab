"""What the machine can do without a gateway, by the same libraries: the limits to compare with.

`serve` has the paths that the load client uses and does only what no gateway can leave out: read
the provider's stream, put each delta into SQLite with `synchronous=FULL`, write it to the readers.
There is no validation, no auth, no profile, no state, no error handled.
"""

import asyncio
import json
import queue
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

import aiohttp
from aiohttp import web

_PAGE_ROWS: Final = 500


class Pipeline:
    """Threads are numbers; each has its events in memory too, for whoever follows it."""

    def __init__(self, folder: Path, provider: str) -> None:
        self._provider = provider
        self._queue: queue.SimpleQueue[list[tuple[int, int, bytes]]] = queue.SimpleQueue()
        self._path = folder / "bare.db"
        self._frames: dict[int, list[bytes]] = {}
        self._numbers: dict[int, int] = {}
        self._news: dict[int, asyncio.Event] = {}
        self._loop = asyncio.get_running_loop()
        self._http = aiohttp.ClientSession()
        self._runs: set[asyncio.Task[None]] = set()
        threading.Thread(target=self._write, daemon=True).start()

    def _write(self) -> None:
        db = sqlite3.connect(self._path, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute(
            "CREATE TABLE events (thread INTEGER, seq INTEGER, payload BLOB,"
            " PRIMARY KEY (thread, seq)) WITHOUT ROWID"
        )
        while True:
            rows = self._queue.get()
            while not self._queue.empty():
                rows += self._queue.get()
            db.execute("BEGIN IMMEDIATE")
            db.executemany("INSERT INTO events VALUES (?, ?, ?)", rows)
            db.execute("COMMIT")
            self._loop.call_soon_threadsafe(self._publish, rows)

    def _publish(self, rows: list[tuple[int, int, bytes]]) -> None:
        for thread, _, payload in rows:
            self._frames[thread].append(payload)
        for thread in {row[0] for row in rows}:
            self._news[thread].set()
            self._news[thread] = asyncio.Event()

    def _append(self, thread: int, kind: str, fields: list[dict[str, Any]]) -> None:
        first = self._numbers[thread]
        self._numbers[thread] = first + len(fields)
        rows = []
        for seq, values in enumerate(fields, first + 1):
            data = json.dumps({"type": kind, **values, "seq": seq}, separators=(",", ":"))
            frame = b"id: %d\nevent: %b\ndata: %b\n\n" % (seq, kind.encode(), data.encode())
            rows.append((thread, seq, frame))
        self._queue.put(rows)

    async def make(self, _: web.Request) -> web.Response:
        thread = len(self._frames)
        self._frames[thread], self._numbers[thread] = [], 0
        self._news[thread] = asyncio.Event()
        return web.json_response({"id": str(thread)})

    async def start(self, request: web.Request) -> web.Response:
        body = await request.json()
        thread = int(body["threadId"])
        self._append(thread, "user.message", [{"text": body["prompt"]}])
        run = asyncio.ensure_future(self._run(thread, body["prompt"]))
        self._runs.add(run)
        run.add_done_callback(self._runs.discard)
        return web.json_response({"runId": thread})

    async def _run(self, thread: int, prompt: str) -> None:
        asked = {"stream": True, "messages": [{"role": "user", "content": prompt}]}
        async with self._http.post(f"{self._provider}/v1/chat/completions", json=asked) as answer:
            rest = b""
            while data := await answer.content.readany():
                *blocks, rest = (rest + data).split(b"\n\n")
                chunks = [json.loads(b[6:]) for b in blocks if b and b != b"data: [DONE]"]
                deltas = [
                    {"text": choices[0]["delta"]["content"], "turnIndex": 0}
                    for chunk in chunks
                    if (choices := chunk["choices"]) and choices[0]["delta"]
                ]
                if deltas:
                    self._append(thread, "text.delta", deltas)
        self._append(thread, "session.end", [{"status": "succeeded"}])

    async def events(self, request: web.Request) -> web.StreamResponse:
        thread = int(request.match_info["thread"])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"event: stream.replay.complete\ndata: {}\n\n")
        cursor = 0
        while True:
            news = self._news[thread]
            if cursor < len(self._frames[thread]):
                frames = self._frames[thread][cursor:]
                cursor += len(frames)
                await response.write(b"".join(frames))
            else:
                await news.wait()


async def replay(request: web.Request) -> web.StreamResponse:
    """Write a thread of a gateway's log, by SELECT and join of frames, a page at a time."""
    db = sqlite3.connect(request.query["path"], isolation_level=None)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    after = 0
    sql = "SELECT seq, type, payload FROM events WHERE stream_key = ? AND seq > ? LIMIT ?"
    while rows := db.execute(sql, (request.query["key"], after, _PAGE_ROWS)).fetchall():
        await response.write(
            b"".join(
                b"id: %d\nevent: %b\ndata: %b\n\n" % (seq, kind.encode(), payload)
                for seq, kind, payload in rows
            )
        )
        after = rows[-1][0]
    await response.write(b"event: done\ndata: {}\n\n")
    return response


async def read(provider: str, prompt: str, runs: int) -> None:
    """Read the provider's streams with aiohttp and do nothing with them; print the CPU it took."""

    async def one(http: aiohttp.ClientSession) -> None:
        asked = {"stream": True, "messages": [{"role": "user", "content": prompt}]}
        async with http.post(f"{provider}/v1/chat/completions", json=asked) as answer:
            while await answer.content.readany():
                pass

    async with aiohttp.ClientSession() as http:
        began_s = time.process_time()
        await asyncio.gather(*(one(http) for _ in range(runs)))
        sys.stdout.write(f"{time.process_time() - began_s}\n")


async def serve(folder: Path, provider: str) -> None:
    """Serve the bare pipeline and the bare replay until the process is stopped."""
    pipeline = Pipeline(folder, provider)
    app = web.Application()
    app.add_routes(
        [
            web.post("/api/v1/threads", pipeline.make),
            web.post("/api/v1/run", pipeline.start),
            web.get("/api/v1/threads/{thread}/agents/root/events", pipeline.events),
            web.get("/replay", replay),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sys.stdout.write(f"http://127.0.0.1:{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", given_folder, given_provider]:
            asyncio.run(serve(Path(given_folder), given_provider))
        case ["read", given_provider, given_prompt, given_runs]:
            asyncio.run(read(given_provider, given_prompt, int(given_runs)))
        case _:
            sys.exit("serve FOLDER PROVIDER, or read PROVIDER PROMPT RUNS")
