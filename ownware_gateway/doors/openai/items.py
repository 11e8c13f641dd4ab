"""What a response says: events folded into its output items, and the frames that tell it; pure.

One response is an interval of a run, as a completion is (see `chunks`), and its frames are numbered
from its first event on. The same events give the same frames with the same numbers whenever they
are read, so a stream goes on behind any of them by folding the interval again.

The shapes are https://platform.openai.com/docs/api-reference/responses.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from ownware_gateway.doors.openai.chunks import (
    Answer,
    Broke,
    Cut,
    Ended,
    HandedOver,
    Part,
    Paused,
    Said,
    Shape,
    Thought,
    completion_id,
    ended,
    parse_completion_id,
    paused,
    question,
    to_json,
)
from ownware_gateway.doors.openai.errors import Failed, Wrong
from ownware_gateway.events import ANSWERING, ASKING, Usage
from ownware_gateway.sse import Sent

#: What the server of the gateway's own tools is called in their items.
SERVER: Final = "ownware"

_LOST: Final = Wrong(
    410,
    "cursor_expired",
    "Some of the frames before this one are not kept any more, so that they cannot be counted; "
    "read the response without 'starting_after'.",
)

_PREFIX: Final = "resp_"
_COMPLETION: Final = "chatcmpl-"

#: What an item is called: its kind, its response, its place in there.
_ITEM_ID: Final = re.compile(r"(?:msg|rs|fc|mcp)_([0-9a-z-]+)_[0-9]{1,9}", re.ASCII)

#: Why a response is incomplete, by the reason that a completion would finish with.
_INCOMPLETE: Final = {"length": "max_output_tokens", "content_filter": "content_filter"}

#: What a response says of a request that did not say it.
_UNSAID: Final[Mapping[str, Any]] = {
    "background": False,
    "conversation": None,
    "frequency_penalty": 0.0,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}


def response_id(run_id: str, after: int | None = None) -> str:
    """Return the name of a response: of a run's first one, or of the one behind an event."""
    return _PREFIX + completion_id(run_id, after).removeprefix(_COMPLETION)


def parse_response_id(text: str) -> tuple[str, int | None] | None:
    """Return the run, and the event behind which the response begins; None for another name."""
    if not text.startswith(_PREFIX):
        return None
    return parse_completion_id(_COMPLETION + text.removeprefix(_PREFIX))


def response_of_item(item_id: str) -> str | None:
    """Return the name of the response that an item of an output belongs to, None for no such."""
    found = _ITEM_ID.fullmatch(item_id)
    return None if found is None else f"{_PREFIX}{found[1]}"


class Before(NamedTuple):
    """What the earlier responses of a run leave for the next one.

    `previous` is the last of them. Of calls that wait, by their ids: the arguments, the id of what
    was asked about them, and which are the client's to make.
    """

    previous: str | None = None
    arguments: Mapping[str, str] = {}
    asked: Mapping[str, str] = {}
    by_client: frozenset[str] = frozenset()


def before(run_id: str, events: Iterable[Mapping[str, Any]]) -> Before:
    """Return what a run's events leave for the response that begins behind them."""
    first: int | None = None
    arguments: dict[str, str] = {}
    asked: dict[str, str] = {}
    by_client: set[str] = set()
    is_paused = False
    for event in events:
        match event["type"]:
            case "tool.call.args_delta":
                arguments[event["toolCallId"]] = event["delta"]
            case kind if kind in ASKING:
                is_paused = True
                if kind == "client.call":
                    by_client.update(call["toolCallId"] for call in event["calls"])
                else:
                    asked[event["toolCallId"]] = event["requestId"]
            case kind if kind in ANSWERING and is_paused:
                first, is_paused = event["seq"] - 1, False
    return Before(response_id(run_id, first), arguments, asked, frozenset(by_client))


class ResponseShape(NamedTuple):
    """What every telling of a response says, and how it is to be told.

    `echo` is what was asked for, as a response repeats it. See `Shape` for the rest.
    """

    id: str
    run_id: str
    model: str
    created: int
    echo: Mapping[str, Any] = {}
    json: bool = False
    has_tools: bool = False
    brought: int = 0
    before: Before = Before()

    @property
    def chunks(self) -> Shape:
        """The same for what completions and responses have in common."""
        return Shape(
            self.id, self.run_id, self.model, self.created, json=self.json, brought=self.brought
        )


class Items:
    """Folds the events of one response into its items, and into the bodies of its frames.

    `answer.over` once nothing more can come; `wrong` is why there is no answer then.
    """

    def __init__(self, shape: ResponseShape) -> None:
        self.answer = Answer(shape.chunks, holds=shape.has_tools)
        self.wrong: Wrong | None = None
        self.status = "queued" if shape.echo.get("background") else "in_progress"
        self.output: list[dict[str, Any]] = []
        self.run_id = shape.run_id
        self._shape = shape
        self._name = shape.id.removeprefix(_PREFIX)
        self._begun = False
        self._more: dict[str, Any] = {"run_id": shape.run_id}
        self._incomplete: dict[str, Any] | None = None
        self._completed: int | None = None
        self._arguments = dict(shape.before.arguments)
        #: What is not done yet, by its place in the output: its text so far in pieces.
        self._open: dict[int, list[str]] = {}
        self._message: int | None = None
        self._thinking: int | None = None
        self._calls: dict[str, int] = {}

    def take(self, sent: Sent) -> None:
        """Take the next event, for whoever only wants what comes of it."""
        for _ in self.bodies(sent.type.decode(), json.loads(sent.data)):
            pass

    def bodies(self, kind: str, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Take the next event; yield the bodies of its frames, without their numbers."""
        yield from self._begin(kind)
        # Also where the answer is JSON: what was cut off is an item of its own here.
        cut = kind == "recovery" and event.get("supersedes") is not None
        for part in (Cut(),) if cut else self.answer.take(kind, event):
            yield from self._part(part, event)
        more = _BESIDE.get(kind)
        # What the client has brought along is no output.
        if more is not None and event.get("turnIndex", 0) >= self._shape.brought:
            yield from more(self, event)

    def response(self) -> dict[str, Any]:
        """Return the response as it is now."""
        shape, over = self._shape, self.answer.over
        return {
            "id": shape.id,
            "object": "response",
            "created_at": shape.created,
            "completed_at": self._completed if self.status == "completed" else None,
            "status": self.status,
            "error": _error(self.wrong),
            "incomplete_details": self._incomplete,
            "model": shape.model,
            "output": list(self.output),
            "usage": usage_shape(self.answer.usage) if over else None,
            **_UNSAID,
            **shape.echo,
            **self._more,
        }

    def _begin(self, kind: str) -> Iterator[dict[str, Any]]:
        if not self._begun:
            self._begun = True
            yield self._whole("response.created")
            if self.status == "queued":
                yield self._whole("response.queued")
            else:
                yield self._whole("response.in_progress")
        if self.status == "queued" and kind != "user.message":
            self.status = "in_progress"
            yield self._whole("response.in_progress")

    def _whole(self, kind: str) -> dict[str, Any]:
        return {"type": kind, "response": self.response()}

    # -- what the model says

    def _part(self, part: Part, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        match part:
            case Said(text, _, notice):
                # The gateway's own words are no part of an answer.
                if not notice:
                    yield from self._say(text)
            case Thought(text):
                yield from self._think(text)
            case Cut():
                yield from self._close_all(drop=True)
            case Paused(asked):
                yield from self._pause(asked)
            case HandedOver(calls):
                yield from self._hand_over(calls)
            case Ended():
                yield from self._end(part, event)
            case Broke(wrong):
                self.wrong = wrong
                yield from self._close_all()
                self.status = "failed"
                yield self._whole("response.failed")

    def _say(self, text: str) -> Iterator[dict[str, Any]]:
        yield from self._done_thinking()
        if self._message is None:
            item = {"type": "message", "status": "in_progress", "role": "assistant", "content": []}
            self._message = index = len(self.output)
            yield self._add(item, "msg")
            yield {
                "type": "response.content_part.added",
                **self._place(index),
                "content_index": 0,
                "part": text_part(""),
            }
        self._open[self._message].append(text)
        yield {
            "type": "response.output_text.delta",
            **self._place(self._message),
            "content_index": 0,
            "delta": text,
            "logprobs": [],
        }

    def _think(self, text: str) -> Iterator[dict[str, Any]]:
        if self._thinking is None:
            self._thinking = index = len(self.output)
            yield self._add({"type": "reasoning", "summary": [], "status": "in_progress"}, "rs")
            yield {
                "type": "response.reasoning_summary_part.added",
                **self._place(index),
                "summary_index": 0,
                "part": _summary(""),
            }
        self._open[self._thinking].append(text)
        yield {
            "type": "response.reasoning_summary_text.delta",
            **self._place(self._thinking),
            "summary_index": 0,
            "delta": text,
        }

    def _done_message(
        self, *, status: str = "completed", drop: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Close the message; one that is asked for again keeps nothing of its text."""
        if (index := self._message) is None:
            return
        self._message = None
        text = "".join(self._open[index])
        at = {**self._place(index), "content_index": 0}
        yield {"type": "response.output_text.done", **at, "text": text, "logprobs": []}
        yield {"type": "response.content_part.done", **at, "part": text_part(text)}
        yield self._close(index, {"status": status, "content": [] if drop else [text_part(text)]})

    def _done_thinking(self, *, status: str = "completed") -> Iterator[dict[str, Any]]:
        if (index := self._thinking) is None:
            return
        self._thinking = None
        text = "".join(self._open[index])
        at = {**self._place(index), "summary_index": 0}
        yield {"type": "response.reasoning_summary_text.done", **at, "text": text}
        yield {"type": "response.reasoning_summary_part.done", **at, "part": _summary(text)}
        yield self._close(index, {"status": status, "summary": [_summary(text)]})

    def _thought(self, _: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._done_thinking()

    def _said(self, _: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._done_thinking()
        yield from self._done_message()

    # -- tools

    def _asked_with(self, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        self._arguments[event["toolCallId"]] = event["delta"]
        yield from ()

    def _call(self, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        call_id = event["toolCallId"]
        if call_id in self._calls:
            return  # It only reads, and was begun before a restart.
        self._calls[call_id] = index = len(self.output)
        arguments = self._arguments.get(call_id)
        if arguments is None:
            arguments = to_json(event.get("input", {}))
        item = {
            "type": "mcp_call",
            "server_label": SERVER,
            "name": event["toolName"],
            "arguments": "",
            "approval_request_id": self._shape.before.asked.get(call_id),
            "output": None,
            "error": None,
            "status": "in_progress",
        }
        yield self._add(item, "mcp")
        at = self._place(index)
        yield {"type": "response.mcp_call.in_progress", **at}
        yield {"type": "response.mcp_call_arguments.delta", **at, "delta": arguments}
        yield {"type": "response.mcp_call_arguments.done", **at, "arguments": arguments}
        self.output[index] = {**self.output[index], "arguments": arguments}

    def _called(self, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if event["toolCallId"] in self._shape.before.by_client:
            return
        yield from self._call(event)
        index = self._calls.pop(event["toolCallId"])
        if event["isError"]:
            content = [{"type": "text", "text": event["result"]}]
            more = {
                "status": "failed",
                "error": {"type": "mcp_tool_execution_error", "content": content},
            }
        else:
            more = {"status": "completed", "output": event["result"]}
        yield {"type": f"response.mcp_call.{more['status']}", **self._place(index)}
        yield self._close(index, more)

    def _hand_over(self, calls: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Tell of calls that the client is to make: they are whole, so each is told at once."""
        yield from self._close_all()
        for call in calls:
            index, function = len(self.output), call["function"]
            item = {
                "type": "function_call",
                "call_id": call["id"],
                "name": function["name"],
                "arguments": "",
                "status": "in_progress",
            }
            yield self._add(item, "fc")
            at, arguments = self._place(index), function["arguments"]
            kind = "response.function_call_arguments"
            yield {"type": f"{kind}.delta", **at, "delta": arguments}
            yield {"type": f"{kind}.done", **at, "arguments": arguments}
            yield self._close(index, {"arguments": arguments, "status": "completed"})
        self.status = "completed"
        yield self._whole("response.completed")

    # -- ends

    def _pause(self, asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if "question" in asked:
            if sentence := question(self._shape.chunks, asked):
                yield from self._say(sentence)
        else:
            index = len(self.output)
            item = {
                "id": asked["requestId"],
                "type": "mcp_approval_request",
                "server_label": SERVER,
                "name": asked["toolName"],
                "arguments": to_json(asked["input"]),
            }
            yield self._add(item, "mcpr")
            yield self._close(index, {})
        yield from self._done_message()
        yield from self._close_all()
        self._more |= paused(self._shape.chunks, asked)
        self.status = "completed"
        yield self._whole("response.completed")

    def _end(self, end: Ended, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close_all()
        reason, more = ended(self._shape.chunks, end)
        self._more |= more
        self._completed = event["timestamp"] // 1000
        if end.status == "cancelled":
            self.status = "cancelled"
        elif reason in _INCOMPLETE:
            self.status = "incomplete"
            self._incomplete = {"reason": _INCOMPLETE[reason]}
        else:
            self.status = "completed"
        last = "completed" if self.status == "completed" else "incomplete"
        yield self._whole(f"response.{last}")

    def _close_all(self, *, drop: bool = False) -> Iterator[dict[str, Any]]:
        """Close what was cut off."""
        yield from self._done_thinking(status="incomplete")
        yield from self._done_message(status="incomplete", drop=drop)
        for index in self._calls.values():
            yield self._close(index, {"status": "incomplete"})
        self._calls.clear()

    # -- items

    def _add(self, item: dict[str, Any], prefix: str) -> dict[str, Any]:
        index = len(self.output)
        item = {"id": f"{prefix}_{self._name}_{index}", **item}
        self.output.append(item)
        self._open[index] = []
        return {"type": "response.output_item.added", "output_index": index, "item": item}

    def _close(self, index: int, more: Mapping[str, Any]) -> dict[str, Any]:
        del self._open[index]
        item = self.output[index] = {**self.output[index], **more}
        return {"type": "response.output_item.done", "output_index": index, "item": item}

    def _place(self, index: int) -> dict[str, Any]:
        return {"item_id": self.output[index]["id"], "output_index": index}


_BESIDE: Final[Mapping[str, Callable[[Items, Mapping[str, Any]], Iterator[dict[str, Any]]]]] = {
    "thinking.complete": Items._thought,
    "text.complete": Items._said,
    "tool.call.args_delta": Items._asked_with,
    "tool.call.execute": Items._call,
    "tool.call.end": Items._called,
}


class ResponseFrames:
    """The frames of one streamed response, from a number or a cursor on.

    `starting_after` is the number of the frame that a client has seen last, `seen` the number of
    its event and of the frame among those of this event.
    """

    def __init__(
        self, shape: ResponseShape, starting_after: int = -1, seen: tuple[int, int] = (0, 0)
    ) -> None:
        self.items = Items(shape)
        self._starting_after = starting_after
        self._seen = seen
        self._next = 0

    @property
    def answer(self) -> Answer:
        """How far the answer is."""
        return self.items.answer

    @property
    def finished(self) -> bool:
        """Whether the answer came to an end that a client can use."""
        return self.answer.over and self.items.wrong is None

    def of(self, sent: Sent) -> bytes:
        """Return the frames that an event becomes, those that were seen left out."""
        event = json.loads(sent.data)
        seq, pieces = event["seq"], []
        if sent.type == b"stream.gap" and self._next <= self._starting_after:
            raise Failed(_LOST, self.items.run_id)
        for place, body in enumerate(self.items.bodies(sent.type.decode(), event)):
            number, self._next = self._next, self._next + 1
            if number <= self._starting_after or (seq, place) <= self._seen:
                continue
            said = {"type": body["type"], "sequence_number": number, **body}
            pieces.append(
                b"event: %b\nid: %b.%d\ndata: %b\n\n"
                % (
                    body["type"].encode(),
                    sent.id,
                    place,
                    to_json(said).encode("utf-8", "replace"),
                )
            )
        return b"".join(pieces)

    def failure(self, wrong: Wrong) -> bytes:
        """Return the frame for a stream that ends before the response does.

        It has the number of the frame before it, for the stream goes on behind that one.
        """
        error = wrong.envelope()["error"]
        flat = {name: error[name] for name in ("code", "message", "param")}
        # Never before what the client has seen already.
        last = max(self._next - 1, self._starting_after, 0)
        said = {"type": "error", "sequence_number": last, **flat, "error": error}
        return b"event: error\ndata: %b\n\n" % to_json(said).encode("utf-8", "replace")


def text_part(text: str) -> dict[str, Any]:
    """Return a text as a part of an answer."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _summary(text: str) -> dict[str, Any]:
    return {"type": "summary_text", "text": text}


def _error(wrong: Wrong | None) -> dict[str, Any] | None:
    """Return what a response says of its failure; OpenAI's clients know few codes."""
    if wrong is None:
        return None
    error = wrong.envelope()["error"]
    return {"code": "server_error", "message": error["message"], "type": error["code"]}


def usage_shape(usage: Usage) -> dict[str, Any]:
    """Return what a response used; what a model has reasoned is not counted by itself."""
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cache_read_tokens,
            "cache_write_tokens": usage.cache_creation_tokens,
        },
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "cost_usd": usage.cost_usd,
    }
