"""OpenAI Chat Completions: the dialect of OpenAI, OpenRouter, Google, Ollama and most others.

The format is https://platform.openai.com/docs/api-reference/chat. Every server that copies it has
its quirks; what they send differently is understood here, and no more is asked of them than of the
original.
"""

import base64
import json
import re
import secrets
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final

from ownware_gateway.events import StopReason, Usage
from ownware_gateway.models import (
    ANY_TOOL,
    Answer,
    AssistantTurn,
    CallStart,
    File,
    Message,
    ModelError,
    Part,
    Request,
    Text,
    Thinking,
    ToolCall,
    ToolTurn,
    UserTurn,
)
from ownware_gateway.models.http import Endpoint, Pool, reported

DIALECT: Final = "openai"

_STOP: Final[dict[str, StopReason]] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "end_turn",
    "function_call": "end_turn",
    "content_filter": "refusal",
}

#: Ends that are no answer: OpenRouter's, vLLM's and DeepSeek's words for a failure.
_FAILURES: Final = frozenset({"error", "abort", "insufficient_system_resource"})

#: Where servers put the reasoning, in the order in which one of them is taken.
_REASONING: Final = ("reasoning_content", "reasoning")

#: OpenAI's own models, of which those that hear have "audio" in their name.
_OPENAIS: Final = re.compile(r"gpt-|chatgpt-|o\d")

#: The formats that audio may have (https://platform.openai.com/docs/guides/audio).
_AUDIO: Final = {"wav": "wav", "x-wav": "wav", "wave": "wav", "mpeg": "mp3", "mp3": "mp3"}

#: What of a tool call's piece is understood; the rest is kept and sent back (Google's signatures).
_CALL_FIELDS: Final = frozenset({"index", "id", "type", "function"})


@dataclass(frozen=True, slots=True)
class OpenAI:
    """A server that speaks Chat Completions at `<base_url>/chat/completions`.

    An empty `key` sends none: local servers want no key. `provider` is its name in messages and in
    model strings; `openai` and `openrouter` are spoken to in their own variants.
    """

    pool: Pool
    _: KW_ONLY
    provider: str
    base_url: str
    key: str = field(repr=False)
    key_variable: str
    silence_s: float

    async def stream(self, request: Request) -> AsyncGenerator[Sequence[Part], None]:
        """Ask the model; see `Model.stream`."""
        endpoint = Endpoint(
            provider=self.provider,
            url=f"{self.base_url.rstrip('/')}/chat/completions",
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            silence_s=self.silence_s,
            key_variable=self.key_variable,
        )
        reply = _Reply(endpoint, request)
        try:
            async with aclosing(self.pool.stream(endpoint, self._body(request))) as reads:
                async for payloads in reads:
                    if parts := reply.read(payloads):
                        yield parts
        except ModelError as error:
            # A whole answer whose connection then breaks is an answer: asking again costs twice.
            if error.retry != "connection" or not reply.finish_reason:
                raise
        yield reply.end()

    def _body(self, request: Request) -> dict[str, Any]:
        system = [{"role": "system", "content": request.system}] if request.system else []
        body: dict[str, Any] = {
            "model": request.model,
            "messages": [*system, *_messages(request)],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.tools:
            body["tools"] = [
                {
                    "type": "function",
                    "function": {
                        "name": tool.name,
                        "description": tool.description,
                        "parameters": tool.input_schema,
                        **({"strict": True} if tool.strict else {}),
                    },
                }
                for tool in request.tools
            ]
            body |= _choice(request)
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.max_tokens is not None:
            # OpenAI's reasoning models refuse the old name; most others know no other.
            name = "max_completion_tokens" if self.provider == "openai" else "max_tokens"
            body[name] = request.max_tokens
        return body | self._reasoning(request) | self._asked(request)

    def _asked(self, request: Request) -> dict[str, Any]:
        """Return the fields that a caller's options are."""
        asked = {
            "top_p": request.top_p,
            "stop": list(request.stop) or None,
            "seed": request.seed,
            "response_format": request.response_format,
            # Others may refuse a name that they do not know.
            "user": request.user if self.provider in _KNOWS_MORE else None,
            "verbosity": request.verbosity,
        }
        return {name: value for name, value in asked.items() if value is not None}

    def unable(self, request: Request) -> Sequence[str]:
        """Return what this model cannot honour; see `Model.unable`."""
        ollama = self.provider == "ollama"
        deaf = ollama or (
            self.provider == "openai"
            and _OPENAIS.match(request.model) is not None
            and "audio" not in request.model
        )
        formats = {audio_format(file) for file in request.files if file.is_audio}
        asked = {
            "input_audio": bool(formats) and (deaf or None in formats),
            # Its server takes these fields and does nothing with them.
            "detail": ollama and request.has_detail,
            "reasoning_effort": ollama and request.finely,
            "verbosity": request.verbosity is not None and self.provider not in _KNOWS_MORE,
            "tool_choice": ollama and request.tool_choice is not None,
            "parallel_tool_calls": ollama and request.parallel_tool_calls is False,
        }
        return [name for name, wanted in asked.items() if wanted]

    def _reasoning(self, request: Request) -> dict[str, Any]:
        if request.thinking is None:
            return {}
        effort = "none" if request.thinking == "off" else request.thinking
        if self.provider == "openrouter":
            return {"reasoning": {"effort": effort}}
        return {"reasoning_effort": effort}


#: Who takes fields that others refuse as unknown.
_KNOWS_MORE: Final = frozenset({"openai", "openrouter"})


def _choice(request: Request) -> dict[str, Any]:
    """Return the fields that say whether and how the model calls tools."""
    body: dict[str, Any] = {}
    if request.tool_choice == ANY_TOOL:
        body["tool_choice"] = "required"
    elif request.tool_choice is not None:
        body["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice}}
    if request.parallel_tool_calls is not None:
        body["parallel_tool_calls"] = request.parallel_tool_calls
    return body


def _messages(request: Request) -> list[dict[str, Any]]:
    """Return the messages.

    Results of tools can only be text here: their images follow as if a person had sent them, once
    all results of a turn are there.
    """
    messages: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    for turn in request.messages:
        if images and not isinstance(turn, ToolTurn):
            messages.append({"role": "user", "content": images})
            images = []
        messages.append(_message(turn, request.model))
        if isinstance(turn, ToolTurn) and turn.images:
            whose = f"[The images of {turn.tool_name}, call {turn.tool_call_id}:]"
            images += content(whose, turn.images)
    return [*messages, {"role": "user", "content": images}] if images else messages


def _message(turn: Message, model: str) -> dict[str, Any]:
    match turn:
        case UserTurn(text=text, files=files):
            return {"role": "user", "content": content(text, files) if files else text}
        case ToolTurn():
            # The dialect has no field for a failure.
            text = f"Error: {turn.text}" if turn.is_error else turn.text
            return {"role": "tool", "tool_call_id": turn.tool_call_id, "content": text}
        case AssistantTurn(raw=dict() as raw, dialect="openai") if turn.model == model:
            return _repaired(raw)
        case AssistantTurn():
            message: dict[str, Any] = {"role": "assistant", "content": turn.text}
            if turn.tool_calls:
                message["content"] = turn.text or None
                message["tool_calls"] = [
                    _call(call.id, call.name, call.arguments) for call in turn.tool_calls
                ]
            return _repaired(message)


def _repaired(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with arguments that every server can parse.

    A model may have written broken ones. Many servers read them before they ask the model, and
    would refuse the whole conversation from here on.
    """
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        if not _is_object(function["arguments"]):
            broken = json.dumps({"broken": function["arguments"]})
            call = call | {"function": function | {"arguments": broken}}
        calls.append(call)
    return message | {"tool_calls": calls}


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def content(text: str, files: Iterable[File]) -> list[dict[str, Any]]:
    """Return what a person said as parts of a message: the text first, then each file."""
    return [*([{"type": "text", "text": text}] if text else []), *map(_file, files)]


def _file(file: File) -> dict[str, Any]:
    kind = file.mime_type.partition(";")[0].strip().lower()
    if kind.startswith("text/") or kind.endswith(("json", "xml", "yaml")):
        return {"type": "text", "text": _fenced(file)}
    if kind.startswith("image/"):
        detail = {} if file.detail is None else {"detail": file.detail}
        return {"type": "image_url", "image_url": {"url": _data_uri(kind, file.data), **detail}}
    if kind == "application/pdf":
        data = _data_uri(kind, file.data)
        return {"type": "file", "file": {"filename": file.filename, "file_data": data}}
    if (form := audio_format(file)) is not None:
        data = base64.b64encode(file.data).decode()
        return {"type": "input_audio", "input_audio": {"data": data, "format": form}}
    return _unshown(file)


def _unshown(file: File) -> dict[str, Any]:
    kind = file.mime_type.partition(";")[0].strip().lower()
    size = f"{kind or 'of unknown type'}, {len(file.data)} bytes"
    return {
        "type": "text",
        "text": f"[The attached file {file.filename} ({size}) cannot be shown.]",
    }


def audio_format(file: File) -> str | None:
    """Return the dialect's name for a file's audio; None where it has none, or it is no audio."""
    kind, _, form = file.mime_type.partition(";")[0].strip().lower().partition("/")
    return _AUDIO.get(form) if kind == "audio" else None


def _fenced(file: File) -> str:
    text = file.data.decode("utf-8", "replace")
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{file.filename}:\n{fence}\n{text}\n{fence}"


def _data_uri(mime_type: str, data: bytes) -> str:
    return f"data:{mime_type};base64,{base64.b64encode(data).decode()}"


@dataclass(slots=True)
class _Call:
    """A tool call that is being written."""

    id: str
    given_id: str  # what the server calls it, which need not be unique
    index: int | None
    name: str = ""
    arguments: list[str] = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)
    shown: bool = False

    def continues(self, index: int | None, given_id: str, name: str) -> bool:
        """Return whether a piece with this index, id and name is part of this call.

        The index says so, if the server sends one. Without it, or where all calls of a server have
        the same, another id begins another call, and so does a name after whole arguments.
        """
        if index is not None and index != self.index:
            return False
        if not name:
            return True
        if given_id and self.given_id and (index is not None or given_id != self.given_id):
            return given_id == self.given_id
        return not self.arguments or (name == self.name and not _is_object(self.text()))

    def show(self) -> list[Part]:
        """Return what tells of the call, the first time that it has a name."""
        if self.shown or not self.name:
            return []
        self.shown = True
        return [CallStart(self.id, self.name)]

    def text(self) -> str:
        """Return the arguments; a call without any has an empty object."""
        return "".join(self.arguments).strip() or "{}"


class _Reply:
    """Makes parts of a stream of chunks, and puts the whole answer together."""

    def __init__(self, endpoint: Endpoint, request: Request) -> None:
        self.finish_reason = ""
        self._endpoint = endpoint
        self._model = request.model
        self._ids = call_ids(request)
        self._content: list[str] = []
        self._refusal: list[str] = []
        self._thinking: list[str] = []
        self._thinking_field = ""
        self._details: list[dict[str, Any]] = []
        self._extra: Any = None
        self._calls: list[_Call] = []
        self._usage = Usage()

    def read(self, payloads: Iterable[bytes]) -> list[Part]:
        """Return the parts in the chunks of one network read."""
        parts: list[Part] = []
        try:
            for payload in payloads:
                self._chunk(load(payload), parts)
        # What a chunk holds is looked into without asking first: here is where it may be anything.
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            message = f"{self._endpoint.provider} sent something that is no chunk of an answer."
            raise ModelError(message, retry="provider_error") from error
        return parts

    def end(self) -> list[Part]:
        """Return the last parts, once the stream is over."""
        who = self._endpoint.provider
        if not self.finish_reason:
            raise ModelError(f"The answer of {who} was cut off.", retry="connection")
        known = self.finish_reason in _STOP or self._content or self._calls
        if self.finish_reason in _FAILURES or not known:
            message = f"The answer of {who} ended with {self.finish_reason[:80]!r}."
            raise ModelError(message, retry="provider_error")
        if not all(call.name for call in self._calls):
            raise ModelError(f"{who} asked for a tool without a name.", retry="provider_error")
        parts: list[Part] = [part for call in self._calls for part in call.show()]
        calls = [ToolCall(call.id, call.name, call.text()) for call in self._calls]
        # Once: the conversation is kept in memory, and most of it is this text.
        content, refusal = "".join(self._content), "".join(self._refusal)
        turn = AssistantTurn(
            text=content + refusal,
            thinking="".join(self._thinking),
            tool_calls=calls,
            dialect=DIALECT,
            model=self._model,
            raw=self._raw(content, refusal),
        )
        return [*parts, Answer(turn, self._stop_reason(), self._usage)]

    def _stop_reason(self) -> StopReason:
        if self._calls:
            # Many servers say "stop" here.
            return "tool_use"
        if self._refusal:
            return "refusal"
        return _STOP.get(self.finish_reason, "end_turn")

    def _raw(self, content: str, refusal: str) -> dict[str, Any]:
        raw: dict[str, Any] = {"role": "assistant", "content": content}
        if self._calls or refusal:
            raw["content"] = content or None
        if refusal:
            raw["refusal"] = refusal
        if self._thinking_field:
            raw[self._thinking_field] = "".join(self._thinking)
        if self._details:
            raw["reasoning_details"] = self._details
        if self._extra:
            raw["extra_content"] = self._extra
        if self._calls:
            raw["tool_calls"] = [
                call.extras | _call(call.id, call.name, call.text()) for call in self._calls
            ]
        return raw

    def _chunk(self, chunk: dict[str, Any], parts: list[Part]) -> None:
        if chunk.get("error") or chunk.get("object") == "error":
            raise reported(self._endpoint, chunk.get("error") or chunk)
        if usage := chunk.get("usage"):
            self._usage = _usage(usage)
        if choices := chunk.get("choices"):
            if delta := choices[0].get("delta"):
                self._delta(delta, parts)
            if reason := choices[0].get("finish_reason"):
                self.finish_reason = str(reason)

    def _delta(self, delta: dict[str, Any], parts: list[Part]) -> None:
        words = delta.get("content")
        if len(delta) == 1 and words and isinstance(words, str):
            # Nearly every delta is nothing but this.
            self._content.append(words)
            parts.append(Text(words))
            return
        self._think(delta, parts)
        if content := _words(delta.get("content")):
            self._content.append(content)
            parts.append(Text(content))
        if refusal := _words(delta.get("refusal")):
            self._refusal.append(refusal)
            parts.append(Text(refusal))
        if extra := delta.get("extra_content"):
            self._extra = extra
        for piece in delta.get("tool_calls") or ():
            self._call(piece, parts)

    def _think(self, delta: dict[str, Any], parts: list[Part]) -> None:
        text = ""
        details = delta.get("reasoning_details") or ()
        for detail in details:
            self._detail(detail)
            text += detail.get("text") or detail.get("summary") or ""
        for name in _REASONING:
            # The same words may come under several names.
            if words := _words(delta.get(name)):
                text, self._thinking_field = words, name
                break
        if text:
            self._thinking.append(text)
            parts.append(Thinking(text))

    def _detail(self, detail: dict[str, Any]) -> None:
        """Keep a piece of OpenRouter's reasoning; pieces of one block are put together.

        See https://openrouter.ai/docs/use-cases/reasoning-tokens: the blocks go back as they came.
        """
        last = self._details[-1] if self._details else {}
        same = all(last.get(name) == detail.get(name) for name in ("type", "index"))
        if not last or not same or detail.get("type") == "reasoning.encrypted":
            self._details.append(dict(detail))
            return
        for name, value in detail.items():
            if name in ("text", "summary"):
                last[name] = (last.get(name) or "") + (value or "")
            elif value is not None:
                last[name] = value

    def _call(self, piece: dict[str, Any], parts: list[Part]) -> None:
        function = piece.get("function") or {}
        name, arguments = function.get("name") or "", function.get("arguments") or ""
        call = self._find(piece, name)
        # Some servers repeat the whole name in every piece.
        if name != call.name:
            call.name += name
        if arguments:
            text = arguments if isinstance(arguments, str) else json.dumps(arguments)
            call.arguments.append(text)
            parts += call.show()
        call.extras |= {key: value for key, value in piece.items() if key not in _CALL_FIELDS}

    def _find(self, piece: dict[str, Any], name: str) -> _Call:
        """Return the call that a piece belongs to, which may be a new one."""
        index, given_id = piece.get("index"), str(piece.get("id") or "")
        for call in reversed(self._calls):
            if call.continues(index, given_id, name):
                return call
        self._calls.append(_Call(unique_id(given_id, self._ids), given_id, index))
        return self._calls[-1]


def _usage(usage: dict[str, Any]) -> Usage:
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        input_tokens=usage.get("prompt_tokens") or 0,
        output_tokens=usage.get("completion_tokens") or 0,
        cache_read_tokens=details.get("cached_tokens") or 0,
        cache_creation_tokens=details.get("cache_write_tokens") or 0,
    )


def _words(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    # Mistral sends a list of parts.
    return "".join(part.get("text") or "" for part in value)


def call_ids(request: Request) -> set[str]:
    """Return the ids of all tool calls in the conversation so far."""
    return {
        call.id
        for turn in request.messages
        if isinstance(turn, AssistantTurn)
        for call in turn.tool_calls
    }


def unique_id(given: str, taken: set[str]) -> str:
    """Return an id for a new call, the given one if it may be, and take it."""
    call_id = given
    while not call_id or call_id in taken:
        call_id = f"call_{secrets.token_hex(12)}"
    taken.add(call_id)
    return call_id


def load(payload: bytes) -> Any:
    """Return the JSON value of an event, its text whole characters. Raises ValueError."""
    text = payload.decode("utf-8", "replace")
    if "\\ud" in text or "\\uD" in text:
        # JSON can name half a character, which nothing further on could write down.
        text = json.dumps(json.loads(text), ensure_ascii=False)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return json.loads(text)
