"""How soon the first words come through each door, of one gateway, in turn.

`python -m tests.bench.doors` runs it by itself. The native reader has its stream open before it
asks; the other doors are given no such start.
"""

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Final

import aiohttp

from tests.bench import served
from tests.bench.rows import Row

#: How often each door is asked, beside some times that do not count.
ROUNDS: Final = 300
WARM: Final = 20

#: How many times the native door's p50 another door's may be.
TIMES_MAX: Final = 1.3

PROMPT: Final = "3"


async def doors(folder: Path) -> list[Row]:
    """Measure the p50 of the first text, through the native door and through OpenAI's."""
    async with (
        served.provider(folder) as provider,
        served.gateway(folder, provider) as gateway,
        aiohttp.ClientSession() as http,
    ):
        thread_id = await _thread(http, gateway.url)
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(WARM + ROUNDS):
            ours.append(await _native(http, gateway.url, thread_id))
            theirs.append(await _openai(http, gateway.url))
    native, openai = median(ours[WARM:]), median(theirs[WARM:])
    what = f"first text through the OpenAI door, p50 of {ROUNDS}, x native"
    beside = f"{openai:.2f} ms, native {native:.2f} ms"
    return [
        Row(what, openai / native, "x", beside, f"<= {TIMES_MAX}", openai <= native * TIMES_MAX)
    ]


async def _thread(http: aiohttp.ClientSession, url: str) -> str:
    async with http.post(f"{url}/api/v1/threads", json={}) as response:
        return str((await response.json())["id"])


async def _native(http: aiohttp.ClientSession, url: str, thread_id: str) -> float:
    """Return how many milliseconds it takes from a run's POST to its first text."""
    path = f"{url}/api/v1/threads/{thread_id}/agents/root"
    async with http.get(f"{path}/events/history?limit=1") as response:
        last = (await response.json())["maxSeq"]
    async with http.get(f"{path}/events?since={last}") as stream:
        await _until(stream, b"stream.replay.complete")
        began_s = time.perf_counter()
        body = {"profileId": "bench", "prompt": PROMPT, "threadId": thread_id}
        asked = asyncio.ensure_future(http.post(f"{url}/api/v1/run", json=body))
        await _until(stream, b"event: text.delta")
        took_ms = (time.perf_counter() - began_s) * 1000
        (await asked).close()
        await _until(stream, b"event: session.end")
    return took_ms


async def _openai(http: aiohttp.ClientSession, url: str) -> float:
    began_s = time.perf_counter()
    body = {
        "model": "bench",
        "stream": True,
        "messages": [{"role": "user", "content": PROMPT}],
    }
    headers = {"X-Conversation-Id": "bench"}
    async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as stream:
        # The first chunk has a role and an empty text.
        await _until(stream, b'"delta":{"content":"')
        took_ms = (time.perf_counter() - began_s) * 1000
        await _until(stream, b"[DONE]")
    return took_ms


async def _until(stream: aiohttp.ClientResponse, mark: bytes) -> None:
    """Read on until something has come, which may be in what was read together with it."""
    rest: bytearray = getattr(stream, "_bench_rest", bytearray())
    async with asyncio.timeout(served.PATIENCE_S):
        while mark not in rest:
            rest += await stream.content.readany()
    del rest[: rest.index(mark) + len(mark)]
    stream._bench_rest = rest  # type: ignore[attr-defined]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as given:
        for row in asyncio.run(doors(Path(given))):
            sys.stdout.write(row.line() + "\n")
