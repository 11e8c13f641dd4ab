"""A model server that is no bottleneck: Chat Completions, ready-made bytes, straight to the socket.

The last word of the prompt says what it answers: `5000` is so many deltas at once, `300/10` is 300
deltas with 10 ms between them. Each is a network packet of its own then, and says when it was sent.
"""

import asyncio
import json
import sys
import time
from typing import Final

_HEADERS: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)

#: How much is written before the socket is waited for.
_BURST_BYTES: Final = 262_144

#: What the text of a paced delta begins with, before the nanoseconds of the monotonic clock.
SENT: Final = "@"


def _http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _delta(text: str) -> bytes:
    """Return a chunk as OpenAI's servers send it, all of its wrapping included."""
    chunk = {
        "id": "chatcmpl-CQfT3u0sZcYbLxUAgVd2pXw7mN1Rk",
        "object": "chat.completion.chunk",
        "created": 1_790_000_000,
        "model": "bench-2026-01-01",
        "service_tier": "default",
        "system_fingerprint": "fp_50cad350e4",
        "choices": [
            {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
        ],
    }
    return _http_chunk(b"data: %b\n\n" % json.dumps(chunk, separators=(",", ":")).encode())


_WORD: Final = _delta(" word")
_END: Final = b"".join(
    _http_chunk(data)
    for data in (
        b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":5}}\n\n',
        b"data: [DONE]\n\n",
        b"",
    )
)


class _Connection(asyncio.Protocol):
    """One connection of the gateway, which may bring one request after the other."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._answering: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=_BURST_BYTES)

    def connection_lost(self, _: Exception | None) -> None:
        if self._answering is not None:
            self._answering.cancel()

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if not blank:
            return
        length = next(
            int(line[15:])
            for line in head.lower().split(b"\r\n")
            if line[:15] == b"content-length:"
        )
        if len(body) < length:
            return
        self._received.clear()
        said = json.loads(body)["messages"][-1]["content"]
        count, _, pace_ms = said.split()[-1].partition("/")
        self._answering = asyncio.ensure_future(self._answer(int(count), float(pace_ms or 0)))

    async def _answer(self, count: int, pace_ms: float) -> None:
        assert self._transport is not None
        if pace_ms:
            await self._paced(self._transport, count, pace_ms / 1000)
            return
        self._transport.write(_HEADERS)
        burst = _BURST_BYTES // len(_WORD)
        for start in range(0, count, burst):
            self._transport.write(_WORD * min(burst, count - start))
            await self._may_write.wait()
        self._transport.write(_END)

    async def _paced(self, transport: asyncio.Transport, count: int, pace_s: float) -> None:
        loop = asyncio.get_running_loop()
        transport.write(_HEADERS)
        began_s = loop.time()
        for number in range(count):
            await asyncio.sleep(began_s + number * pace_s - loop.time())
            transport.write(_delta(f"{SENT}{time.monotonic_ns():020d}"))
        transport.write(_END)


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(_Connection, "127.0.0.1", 0)
    sys.stdout.write(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve())
