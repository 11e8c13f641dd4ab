"""A model provider for tests: a server on loopback that says what it was told to, in any dialect.

It speaks OpenAI Chat Completions, OpenAI Responses and Anthropic Messages, lists models, and passes
for Ollama.
"""

import asyncio
import itertools
import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from aiohttp import web
from multidict import CIMultiDictProxy

from tests.loopback import Loopback

#: How long a test may wait for something to arrive here.
PATIENCE_S: Final = 10.0

OPENAI_STOP: Final = {
    "end_turn": "stop",
    "max_tokens": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
    "stop_sequence": "stop",
}


#: Why a response is incomplete; for any other reason it is complete.
RESPONSES_STOP: Final = {"max_tokens": "max_output_tokens", "refusal": "content_filter"}


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call that the model makes; without an id it gets one of its own."""

    name: str
    arguments: Mapping[str, Any] | str = field(default_factory=dict)
    id: str = ""

    @property
    def text(self) -> str:
        return self.arguments if isinstance(self.arguments, str) else json.dumps(self.arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """How one request is answered.

    The answer is made of deltas: each piece of `thinking`, each of `text`, each call; after them
    comes the end. `cut_after`, `hang_after` and `gate_after` count deltas; -1 is before the
    headers. A `gate` is waited for once, there. A `body` is sent as it is, its pieces in place of
    the deltas and no end. `error` is the message of a status that is not 200, or in place of the
    end. `stop` is one of our own stop reasons; None is the one that fits.
    """

    text: Sequence[str] = ()
    thinking: Sequence[str] = ()
    calls: Sequence[Call] = ()
    stop: str | None = None
    usage: tuple[int, int] = (10, 5)
    cached: int = 0
    delay_s: float = 0.0
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Sequence[bytes] | None = None
    error: str | None = None
    error_type: str = "api_error"
    cut_after: int | None = None
    hang: bool = False
    hang_after: int = 0
    gate: asyncio.Event | None = None
    gate_after: int = 0

    @property
    def stop_reason(self) -> str:
        return self.stop or ("tool_use" if self.calls else "end_turn")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it came; `peer` is the same for requests on one connection."""

    peer: Any
    path: str
    headers: CIMultiDictProxy[str]
    body: dict[str, Any]


class Provider(Loopback):
    """The server: `async with Provider() as provider:`, then script it with `reply`.

    A request that finds no reply is answered with `default`, or with the last thing that the user
    said, word by word. `disconnected` is set when a client leaves before its answer is over.
    """

    def __init__(self) -> None:
        self.requests: list[Asked] = []
        self.models = ["test-model"]
        self.default: Reply | None = None
        self.disconnected = asyncio.Event()
        self.disconnects = 0
        self._replies: deque[Reply] = deque()
        self._replies_of: dict[str, deque[Reply]] = {}
        self._arrived = asyncio.Condition()
        self._numbers = itertools.count(1)
        app = web.Application(client_max_size=128 * 2**20)
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/responses", self._responses),
                web.post("/v1/messages", self._messages),
                web.post("/v1/embeddings", self._embeddings),
                web.get("/v1/models", self._models),
                web.get("/api/tags", self._tags),
            ]
        )
        super().__init__(app)

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    def reply(self, *replies: Reply) -> None:
        """Add answers for the next requests, in their order."""
        self._replies.extend(replies)

    def reply_as(self, model: str, *replies: Reply) -> None:
        """Add answers for the next requests to one model, whenever they come."""
        self._replies_of.setdefault(model, deque()).extend(replies)

    async def requested(self, count: int = 1) -> list[Asked]:
        """Wait until so many requests have come in all, and return them."""
        async with asyncio.timeout(PATIENCE_S), self._arrived:
            await self._arrived.wait_for(lambda: len(self.requests) >= count)
        return self.requests[:count]

    async def left(self) -> None:
        """Wait until a client has left before its answer was over."""
        async with asyncio.timeout(PATIENCE_S):
            await self.disconnected.wait()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        reply, asked = await self._take(request)
        return await self._answer(request, reply, openai_deltas(reply, asked.body["model"]))

    async def _responses(self, request: web.Request) -> web.StreamResponse:
        reply, asked = await self._take(request)
        return await self._answer(request, reply, responses_deltas(reply, asked.body["model"]))

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        reply, asked = await self._take(request)
        return await self._answer(request, reply, anthropic_deltas(reply, asked.body["model"]))

    async def _embeddings(self, request: web.Request) -> web.Response:
        """Return for each text its length, and a half."""
        reply, asked = await self._take(request)
        if reply.status != 200:
            return web.json_response({"error": _error(reply)}, status=reply.status)
        data = [
            {"object": "embedding", "index": index, "embedding": [float(len(text)), 0.5]}
            for index, text in enumerate(asked.body["input"])
        ]
        usage = {"prompt_tokens": 7, "total_tokens": 7}
        return web.json_response({"object": "list", "data": data, "usage": usage})

    async def _models(self, request: web.Request) -> web.Response:
        models = [{"id": name, "object": "model", "type": "model"} for name in self.models]
        return web.json_response({"object": "list", "data": models, "has_more": False})

    async def _tags(self, request: web.Request) -> web.Response:
        return web.json_response({"models": [{"name": n, "model": n} for n in self.models]})

    async def _take(self, request: web.Request) -> tuple[Reply, Asked]:
        assert request.transport is not None
        peer = request.transport.get_extra_info("peername")
        asked = Asked(peer, request.path, request.headers, await request.json())
        async with self._arrived:
            self.requests.append(asked)
            self._arrived.notify_all()
        replies = self._replies_of.get(asked.body["model"]) or self._replies
        reply = replies.popleft() if replies else self.default or _echo(asked.body)
        calls = [c if c.id else replace(c, id=f"call_{next(self._numbers)}") for c in reply.calls]
        return replace(reply, calls=calls), asked

    async def _answer(
        self, request: web.Request, reply: Reply, deltas: list[bytes]
    ) -> web.StreamResponse:
        """Send the deltas: together where nothing comes between them, else one in a packet."""
        response = web.StreamResponse(status=reply.status)
        response.content_type = "text/event-stream" if reply.status == 200 else "application/json"
        response.headers.update(reply.headers)
        try:
            waiting: list[bytes] = []
            for number, delta in enumerate([b"", *deltas], start=-1):
                if _stops(reply, number) or reply.delay_s:
                    await _write(response, waiting)
                if not await _go_on(request, reply, number):
                    return response
                if number == -1:
                    await response.prepare(request)
                waiting.append(delta)
            # The last stop is where all deltas are sent: before the end of the response.
            await _write(response, waiting)
            if await _go_on(request, reply, len(deltas)):
                await response.write_eof()
        except (asyncio.CancelledError, ConnectionError):
            self.disconnects += 1
            self.disconnected.set()
            raise
        return response


def sse(*chunks: object) -> bytes:
    """Return an event stream of these chunks: JSON values, or bytes as they are."""
    return b"".join(
        b"data: %b\n\n" % (chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode())
        for chunk in chunks
    )


def openai_deltas(reply: Reply, model: str) -> list[bytes]:
    """Return the stream of Chat Completions for a reply: one item for each delta, and the end."""
    if reply.body is not None or reply.status != 200:
        return _given(reply, {"error": _error(reply) | {"param": None, "code": None}})

    def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1_700_000_000,
            "model": model,
            "choices": [choice],
        }

    def call(index: int, call: Call) -> bytes:
        half = len(call.text) // 2
        function = {"name": call.name, "arguments": ""}
        first = {"index": index, "id": call.id, "type": "function", "function": function}
        pieces = [
            {"index": index, "function": {"arguments": part}}
            for part in (call.text[:half], call.text[half:])
        ]
        return sse(*(chunk({"tool_calls": [piece]}) for piece in (first, *pieces)))

    deltas = [
        *(sse(chunk({"reasoning_content": piece})) for piece in reply.thinking),
        *(sse(chunk({"content": piece})) for piece in reply.text),
        *itertools.starmap(call, enumerate(reply.calls)),
    ]
    prompt, completion = reply.usage
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": reply.cached},
    }
    end = sse(
        chunk({}, OPENAI_STOP.get(reply.stop_reason, reply.stop_reason)),
        chunk({}) | {"choices": [], "usage": usage},
        b"[DONE]",
    )
    if reply.error is not None:
        end = sse({"error": _error(reply)})
    begin = sse(chunk({"role": "assistant", "content": ""}))
    first, *rest = [*deltas, end]
    return [begin + first, *rest]


def responses_deltas(reply: Reply, model: str) -> list[bytes]:
    """Return the stream of Responses for a reply: one item for each delta, and the end."""
    if reply.body is not None or reply.status != 200:
        return _given(reply, {"error": _error(reply) | {"param": None, "code": None}})
    items: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    if reply.thinking:
        summary = [{"type": "summary_text", "text": "".join(reply.thinking)}]
        reasoning = {"type": "reasoning", "summary": summary, "encrypted_content": "sealed"}
        kind = "response.reasoning_summary_text.delta"
        pieces = [{"type": kind, "summary_index": 0, "delta": piece} for piece in reply.thinking]
        items.append((reasoning, pieces))
    if reply.text:
        said = [{"type": "output_text", "text": "".join(reply.text), "annotations": []}]
        message = {"type": "message", "role": "assistant", "content": said}
        kind = "response.output_text.delta"
        pieces = [{"type": kind, "content_index": 0, "delta": piece} for piece in reply.text]
        items.append((message, pieces))
    for call in reply.calls:
        half = len(call.text) // 2
        made = {"type": "function_call", "call_id": call.id, "name": call.name}
        kind = "response.function_call_arguments.delta"
        pieces = [{"type": kind, "delta": part} for part in (call.text[:half], call.text[half:])]
        items.append((made | {"arguments": call.text}, pieces))

    reason = RESPONSES_STOP.get(reply.stop_reason)
    prompt, completion = reply.usage
    response: dict[str, Any] = {
        "id": "resp_1",
        "object": "response",
        "status": "incomplete" if reason else "completed",
        "model": model,
        "output": [_responses_done(index, item) for index, (item, _) in enumerate(items)],
        "incomplete_details": {"reason": reason} if reason else None,
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": reply.cached},
            "output_tokens": completion,
            "total_tokens": prompt + completion,
        },
    }
    created = response | {"status": "in_progress", "output": [], "usage": None}
    begin = _named({"type": "response.created", "response": created})
    deltas = [
        delta
        for index, (item, pieces) in enumerate(items)
        for delta in _responses_item(index, item, pieces)
    ]
    end = _named({"type": f"response.{response['status']}", "response": response})
    if reply.error is not None:
        error = _error(reply)
        end = _named({"type": "error", "code": error["type"], "message": error["message"]})
    first, *rest = [*deltas, end]
    return [begin + first, *rest]


def _responses_done(index: int, item: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"item_{index}", "status": "completed"} | item


def _responses_item(index: int, item: dict[str, Any], pieces: list[dict[str, Any]]) -> list[bytes]:
    """Return an item of the output as one item for each delta; a call is one delta."""
    done = _responses_done(index, item)
    empty: dict[str, Any] = {
        "summary": [],
        "content": [],
        "arguments": "",
        "encrypted_content": None,
    }
    added = done | {"status": "in_progress"} | {name: empty[name] for name in empty if name in done}
    place = {"output_index": index}
    events = [_named(piece | place | {"item_id": done["id"]}) for piece in pieces]
    if item["type"] == "function_call":
        events = [b"".join(events)]
    added_event = {"type": "response.output_item.added", "item": added}
    events[0] = _named(added_event | place) + events[0]
    events[-1] += _named({"type": "response.output_item.done", "item": done} | place)
    return events


def anthropic_deltas(reply: Reply, model: str) -> list[bytes]:
    """Return the stream of Messages for a reply: one item for each delta, and the end."""
    if reply.body is not None or reply.status != 200:
        return _given(reply, {"type": "error", "error": _error(reply)})
    blocks: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    if reply.thinking:
        pieces = [{"type": "thinking_delta", "thinking": piece} for piece in reply.thinking]
        blocks.append(({"type": "thinking", "thinking": "", "signature": ""}, pieces))
    if reply.text:
        pieces = [{"type": "text_delta", "text": piece} for piece in reply.text]
        blocks.append(({"type": "text", "text": ""}, pieces))
    for call in reply.calls:
        half = len(call.text) // 2
        start = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        parts = [call.text[:half], call.text[half:]]
        pieces = [{"type": "input_json_delta", "partial_json": part} for part in parts]
        blocks.append((start, pieces))

    usage = {
        "input_tokens": reply.usage[0] - reply.cached,
        "cache_read_input_tokens": reply.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": 1,
    }
    message: dict[str, Any] = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }
    begin = _named({"type": "message_start", "message": message}) + _named({"type": "ping"})
    deltas = [
        delta
        for index, (start, pieces) in enumerate(blocks)
        for delta in _anthropic_block(index, start, pieces)
    ]
    delta = {"stop_reason": reply.stop_reason, "stop_sequence": None}
    ending = {"type": "message_delta", "delta": delta, "usage": {"output_tokens": reply.usage[1]}}
    end = _named(ending) + _named({"type": "message_stop"})
    if reply.error is not None:
        end = _named({"type": "error", "error": _error(reply)})
    first, *rest = [*deltas, end]
    return [begin + first, *rest]


def _anthropic_block(
    index: int, start: dict[str, Any], pieces: list[dict[str, Any]]
) -> list[bytes]:
    """Return a content block as one item for each delta; a call is one delta."""
    events = [
        _named({"type": "content_block_delta", "index": index, "delta": piece}) for piece in pieces
    ]
    if start["type"] == "tool_use":
        events = [b"".join(events)]
    begin = {"type": "content_block_start", "index": index, "content_block": start}
    end = _named({"type": "content_block_stop", "index": index})
    if start["type"] == "thinking":
        signature = {"type": "signature_delta", "signature": f"signature-{index}"}
        end = _named({"type": "content_block_delta", "index": index, "delta": signature}) + end
    events[0] = _named(begin) + events[0]
    events[-1] += end
    return events


def _named(event: dict[str, Any]) -> bytes:
    return b"event: %b\n" % event["type"].encode() + sse(event)


def _given(reply: Reply, error: dict[str, Any]) -> list[bytes]:
    if reply.body is None:
        return [json.dumps(error).encode()]
    return [reply.body] if isinstance(reply.body, bytes) else list(reply.body)


def _error(reply: Reply) -> dict[str, Any]:
    return {"type": reply.error_type, "message": reply.error or "The test wants it so."}


def _echo(body: dict[str, Any]) -> Reply:
    """Return what the user said last, in pieces that begin with their space."""
    turns = body["input"] if "input" in body else body["messages"]
    turns = [turn for turn in turns if isinstance(turn, dict)]
    said = [turn["content"] for turn in turns if turn.get("role") == "user"]
    last = said[-1] if said else ""
    if not isinstance(last, str):
        last = " ".join(part["text"] for part in last if part["type"] in ("text", "input_text"))
    first, *rest = last.split(" ")
    return Reply(text=[first, *(f" {word}" for word in rest)])


def _stops(reply: Reply, number: int) -> bool:
    """Return whether something happens before the delta of this number."""
    return (
        number == reply.cut_after
        or (reply.gate is not None and number == reply.gate_after)
        or (reply.hang and number == reply.hang_after)
    )


async def _go_on(request: web.Request, reply: Reply, number: int) -> bool:
    """Do what happens before the delta of this number; return whether the answer goes on."""
    if reply.gate is not None and number == reply.gate_after:
        await reply.gate.wait()
    if reply.hang and number == reply.hang_after:
        await asyncio.Event().wait()
    if number == reply.cut_after:
        assert request.transport is not None
        request.transport.abort()
        return False
    if reply.delay_s and number > 0:
        await asyncio.sleep(reply.delay_s)
    return True


async def _write(response: web.StreamResponse, waiting: list[bytes]) -> None:
    if data := b"".join(waiting):
        await response.write(data)
    waiting.clear()
