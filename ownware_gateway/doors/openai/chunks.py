"""What a completion says: events folded into parts, and those into OpenAI's shapes; pure.

One completion is an interval of a run: from its first event, or from an answer to what it waits
for, to its end or the next thing that it waits for. The same events give the same frames whenever
they are read, so a stream that was cut is gone on with by reading it again and leaving out what
was sent.

The shapes are https://platform.openai.com/docs/api-reference/chat.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from ownware_gateway.doors.openai.errors import Wrong, run_failed
from ownware_gateway.doors.openai.tools import calls_of
from ownware_gateway.events import Usage
from ownware_gateway.sse import Sent

DONE: Final = b"data: [DONE]\n\n"

#: What a question ends with, before the run that asks it: how it is answered through this door.
APPROVES: Final = "Answer /approve or /deny."
ANSWERS: Final = "Your next message is the answer; /deny declines."

#: What stands between the texts of two turns.
_GAP: Final = "\n\n"

#: How a run ends, in OpenAI's words; for any other reason it simply stops.
_FINISH: Final = {
    "max_tokens": "length",
    "max_turns": "length",
    "budget_exceeded": "length",
    "refusal": "content_filter",
}

#: Some clients end a line where Python's `splitlines` does.
_SPLITTERS: Final = re.compile("[\x85\u2028\u2029]")

_RUN_ID_PREFIX: Final = "run_"
_ID_PREFIX: Final = "chatcmpl-"


class Shape(NamedTuple):
    """What every chunk of a completion says, and how it is to be told.

    `json` is an answer that a program reads: nothing but the last turn's text may be in it. Where
    the agent `has_tools`, a text is held back until it is certain that no call follows. The first
    `brought` turns of the run came from the client and are not told again.
    """

    id: str
    run_id: str
    model: str
    created: int
    include_usage: bool = False
    json: bool = False
    has_tools: bool = False
    brought: int = 0


class Said(NamedTuple):
    """A piece of the answer; a `notice` is the gateway speaking, and no part of it.

    `gap` goes before it in a stream, so that turns do not run into one another.
    """

    text: str
    gap: str = ""
    notice: bool = False


class Thought(NamedTuple):
    """A piece of the reasoning; `gap` goes before it, so that turns do not run into one another."""

    text: str
    gap: str = ""


class Cut(NamedTuple):
    """What was said in this turn is no part of the answer: the model is asked again."""


class Paused(NamedTuple):
    """The run waits for a person; `asked` is the `permission.request` or `question.request`."""

    asked: Mapping[str, Any]


class HandedOver(NamedTuple):
    """The run waits for the client's tools; `calls` as a message has them."""

    calls: Sequence[Mapping[str, Any]]


class Ended(NamedTuple):
    """The run has ended, and its answer with it."""

    reason: str
    status: str


class Broke(NamedTuple):
    """The answer ends here, and is none."""

    wrong: Wrong


Part = Said | Thought | Cut | Paused | HandedOver | Ended | Broke


class Answer:
    """Folds the events of one completion into parts. `over` once nothing more can come.

    `exact` are the arguments of calls that the client is to make, by the request they wait with:
    the events have them with secrets masked, so they are to be put here before.
    """

    def __init__(self, shape: Shape, *, holds: bool) -> None:
        self.over = False
        self.usage = Usage()
        self.exact: dict[str, Sequence[str]] = {}
        self._run_id = shape.run_id
        self._brought = shape.brought
        #: The turn of which an earlier completion has told what it has used.
        self._counted = -1
        self._json = shape.json
        self._holds = shape.json and holds
        self._failure = run_failed("internal", "The run failed.")
        self._text = ""
        self._thought = False
        self._thinking_shown = self._calls = False
        self._reasoned = False
        #: The last character that was said.
        self._last = ""
        self._gap = ""

    @property
    def gap(self) -> str:
        """What goes before something new that is said."""
        return _GAP if self._last not in ("", "\n") else ""

    def take(self, kind: str, event: Mapping[str, Any]) -> Sequence[Part]:
        """Return what an event adds to the answer."""
        if kind == "text.delta":
            return self._delta(event)
        if kind == "thinking.delta":
            return self._think(event["text"])
        if event.get("turnIndex", self._brought) < self._brought:
            return ()
        take = _TAKE.get(kind)
        return take(self, event) if take is not None else ()

    def _delta(self, event: Mapping[str, Any]) -> Sequence[Part]:
        text: str = event["text"]
        if event.get("notice"):
            if self._json:
                return ()
            self._last = text[-1:] or self._last
            return (Said(text, notice=True),)
        if self._holds:
            return ()
        self._text += text
        return (self._said(text),)

    def _said(self, text: str) -> Said:
        gap, self._gap, self._last = self._gap, "", text[-1:] or self._last
        return Said(text, gap)

    def _think(self, text: str) -> Sequence[Part]:
        gap = _GAP if self._reasoned and not self._thinking_shown else ""
        self._thinking_shown = self._reasoned = True
        return (Thought(text, gap),)

    def _turn_start(self, _: Mapping[str, Any]) -> Sequence[Part]:
        self._text = ""
        self._thinking_shown = self._calls = False
        self._gap = self.gap
        return ()

    def _thinking_complete(self, event: Mapping[str, Any]) -> Sequence[Part]:
        # Its deltas may not be kept any more.
        return () if self._thinking_shown or not event["text"] else self._think(event["text"])

    def _call(self, _: Mapping[str, Any]) -> Sequence[Part]:
        self._calls = True
        return ()

    def _text_complete(self, event: Mapping[str, Any]) -> Sequence[Part]:
        text: str = event["text"]
        left = text[len(self._text) :]
        if not left or (self._holds and self._calls):
            return ()
        self._text = text
        return (self._said(left),)

    def _turn_end(self, event: Mapping[str, Any]) -> Sequence[Part]:
        if event["turnIndex"] != self._counted:
            self.usage = self.usage.plus(Usage.model_validate(event["usage"]))
        return ()

    def _hand_over(self, event: Mapping[str, Any]) -> Sequence[Part]:
        self.over = True
        # The turn ends with the results, in the next completion.
        self.usage = self.usage.plus(Usage.model_validate(event["usage"]))
        return (HandedOver(calls_of(event, self.exact[event["requestId"]], self._run_id)),)

    def _handed_in(self, event: Mapping[str, Any]) -> Sequence[Part]:
        self._counted = event["turnIndex"]
        return ()

    def _beside(self, event: Mapping[str, Any]) -> Sequence[Part]:
        # What a sub-agent or a summary has used is the run's to pay, too.
        if (used := event.get("usage")) is not None:
            self.usage = self.usage.plus_agent(Usage.model_validate(used))
        return ()

    def _recovery(self, event: Mapping[str, Any]) -> Sequence[Part]:
        if event.get("supersedes") is None:
            return ()
        if self._json and self._text:
            self.over = True
            message = (
                "The answer was cut off and is being asked for again; what was sent is no JSON of "
                "its own. Ask again."
            )
            return (Broke(Wrong(502, "interrupted", message)),)
        return (Cut(),)

    def _question(self, event: Mapping[str, Any]) -> Sequence[Part]:
        self.over = True
        return (Paused(event),)

    def _error(self, event: Mapping[str, Any]) -> Sequence[Part]:
        self._failure = run_failed(event["code"], event["message"])
        return ()

    def _end(self, event: Mapping[str, Any]) -> Sequence[Part]:
        self.over = True
        if event["status"] == "timed_out":
            message = "The run took longer than its profile lets it."
            return (Broke(run_failed("timed_out", message)),)
        if event["reason"] == "error":
            return (Broke(self._failure),)
        return (Ended(event["reason"], event["status"]),)


_TAKE: Final = {
    "turn.start": Answer._turn_start,
    "thinking.complete": Answer._thinking_complete,
    "tool.call.start": Answer._call,
    "text.complete": Answer._text_complete,
    "turn.end": Answer._turn_end,
    "agent.complete": Answer._beside,
    "compaction.end": Answer._beside,
    "recovery": Answer._recovery,
    "permission.request": Answer._question,
    "question.request": Answer._question,
    "client.call": Answer._hand_over,
    "client.result": Answer._handed_in,
    "error": Answer._error,
    "session.end": Answer._end,
}


class Frames:
    """The frames of one streamed completion, from a cursor on.

    `seen` is the number of the event, and of the frame of it, that a client has seen last.
    """

    def __init__(self, shape: Shape, seen: tuple[int, int] = (0, 0)) -> None:
        self.answer = Answer(shape, holds=shape.has_tools)
        #: Whether the answer came to an end that a client can use.
        self.finished = False
        self._shape = shape
        self._seen = seen
        self._begun = False
        head = {"id": shape.id, "object": "chat.completion.chunk", "created": shape.created}
        usage = ',"usage":null' if shape.include_usage else ""
        self._before = (
            to_json({**head, "model": shape.model})[:-1] + ',"choices":[{"index":0,"delta":'
        )
        self._after = f',"logprobs":null,"finish_reason":null}}]{usage}}}'
        self._head = head | {"model": shape.model}

    def of(self, sent: Sent) -> bytes:
        """Return the frames that an event becomes, those that were seen left out."""
        event = json.loads(sent.data)
        bodies: list[str] = []
        if not self._begun:
            self._begun = True
            bodies.append(self._delta({"role": "assistant", "content": ""}))
        for part in self.answer.take(sent.type.decode(), event):
            bodies += self._bodies(part)
        seq = event["seq"]
        return b"".join(
            b"id: %b.%d\ndata: %b\n\n" % (sent.id, number, body.encode("utf-8", "replace"))
            for number, body in enumerate(bodies)
            if (seq, number) > self._seen
        )

    def failure(self, wrong: Wrong) -> bytes:
        """Return the frame for a stream that ends before the answer does."""
        body = wrong.envelope() | {"run_id": self._shape.run_id}
        return b"data: %b\n\n" % to_json(body).encode("utf-8", "replace")

    def _delta(self, delta: Mapping[str, Any]) -> str:
        return self._before + to_json(delta) + self._after

    def _bodies(self, part: Part) -> Iterator[str]:
        match part:
            case Said(text, gap):
                yield self._delta({"content": gap + text})
            case Thought(text, gap):
                yield self._delta({"reasoning_content": gap + text})
            case Cut():
                pass
            case Paused(asked):
                if sentence := question(self._shape, asked):
                    yield self._delta({"content": self.answer.gap + sentence})
                yield from self._end("stop", paused(self._shape, asked))
            case HandedOver(calls):
                for index, call in enumerate(calls):
                    yield self._delta({"tool_calls": [{"index": index, **call}]})
                yield from self._end("tool_calls", {"run_id": self._shape.run_id})
            case Ended():
                yield from self._end(*ended(self._shape, part))
            case Broke(wrong):
                yield to_json(wrong.envelope() | {"run_id": self._shape.run_id})

    def _end(self, reason: str, more: Mapping[str, Any]) -> Iterator[str]:
        self.finished = True
        choice = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": reason}
        last = {**self._head, "choices": [choice], **more}
        if not self._shape.include_usage:
            yield to_json(last)
            return
        yield to_json(last | {"usage": None})
        yield to_json({**self._head, "choices": [], "usage": usage_shape(self.answer.usage)})


class Whole:
    """One completion that is sent when it is whole."""

    def __init__(self, shape: Shape) -> None:
        self.answer = Answer(shape, holds=True)
        self.wrong: Wrong | None = None
        self._shape = shape
        self._turns: list[list[str]] = [[]]
        self._thinking: list[str] = []
        self._calls: Sequence[Mapping[str, Any]] = ()
        self._end: tuple[str, Mapping[str, Any]] = ("stop", {})

    def take(self, sent: Sent) -> None:
        """Take the next event."""
        kind = sent.type.decode()
        if kind == "turn.start":
            self._turns.append([])
        for part in self.answer.take(kind, json.loads(sent.data)):
            self._add(part)

    def _add(self, part: Part) -> None:
        match part:
            case Said(text, _, notice):
                if not notice:
                    self._turns[-1].append(text)
            case Thought(text, gap):
                self._thinking.append(gap + text)
            case Cut():
                self._turns[-1] = []
            case Paused(asked):
                self._turns.append([question(self._shape, asked)])
                self._end = "stop", paused(self._shape, asked)
            case HandedOver(calls):
                self._calls = calls
                self._end = "tool_calls", {"run_id": self._shape.run_id}
            case Ended():
                self._end = ended(self._shape, part)
            case Broke(wrong):
                self.wrong = wrong

    def body(self) -> dict[str, Any]:
        """Return the completion."""
        reason, more = self._end
        content = ""
        for text in filter(None, map("".join, self._turns)):
            content += _GAP + text if content and not content.endswith("\n") else text
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self._calls and not content else content,
            "refusal": None,
        }
        if self._calls:
            message["tool_calls"] = self._calls
        if self._thinking:
            message["reasoning_content"] = "".join(self._thinking)
        shape = self._shape
        return {
            "id": shape.id,
            "object": "chat.completion",
            "created": shape.created,
            "model": shape.model,
            "choices": [
                {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
            ],
            "usage": usage_shape(self.answer.usage),
            **more,
        }


def question(shape: Shape, asked: Mapping[str, Any]) -> str:
    """Return what a person is asked, in a sentence; nothing where only a program reads it."""
    if shape.json:
        return ""
    if "question" in asked:
        options = enumerate(asked["options"] or (), 1)
        listed = "".join(f"\n{number}. {option}" for number, option in options)
        return f"{asked['question']}{listed}\n\n[{ANSWERS} ({shape.run_id})]"
    what = json.dumps(asked["input"], ensure_ascii=False)
    return (
        f"[{asked['toolName']} {what} needs your approval: "
        f"{asked['reason'].rstrip('.')}. "
        f"{APPROVES} ({shape.run_id})]"
    )


def paused(shape: Shape, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the extra fields of a completion that ends with a question."""
    names = {"request_id": asked["requestId"], "tool_call_id": asked["toolCallId"]}
    if "question" in asked:
        words = {name: asked[name] for name in ("question", "options", "multiple")}
        pending = {**names, **words, "expires_at": asked["expiresAt"]}
        return {"run_id": shape.run_id, "pending_questions": [pending]}
    pending = {
        **names,
        "tool_name": asked["toolName"],
        "arguments": asked["input"],
        "reason": asked["reason"],
        "expires_at": asked["expiresAt"],
    }
    return {"run_id": shape.run_id, "pending_approvals": [pending]}


def ended(shape: Shape, end: Ended) -> tuple[str, dict[str, Any]]:
    """Return the finish reason and the extra fields of a completion that is over."""
    more = {"run_id": shape.run_id}
    if end.status != "succeeded":
        more["run_status"] = end.status
    return _FINISH.get(end.reason, "stop"), more


def usage_shape(usage: Usage) -> dict[str, Any]:
    """Return what a completion used; `cost_usd` is null where no price is known."""
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cache_read_tokens},
        "cost_usd": usage.cost_usd,
    }


def completion_id(run_id: str, after: int | None = None) -> str:
    """Return the name of a completion: of a run's first one, or of the one behind an event."""
    name = f"{_ID_PREFIX}{run_id.removeprefix(_RUN_ID_PREFIX)}"
    return name if after is None else f"{name}-{after}"


def parse_completion_id(text: str) -> tuple[str, int | None] | None:
    """Return the run, and the event behind which the completion begins; None for another name."""
    if not text.startswith(_ID_PREFIX):
        return None
    name, dash, after = text.removeprefix(_ID_PREFIX).partition("-")
    if dash and not (after.isascii() and after.isdigit() and len(after) < 19):
        return None
    return f"{_RUN_ID_PREFIX}{name}", int(after) if dash else None


def to_json(value: Any) -> str:
    """Return it as JSON that stays on one line for every client."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return _SPLITTERS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
