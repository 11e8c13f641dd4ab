"""Anthropic Messages (https://docs.anthropic.com/en/api/messages): Claude, and what speaks like it.

The stream's events are described at https://docs.anthropic.com/en/docs/build-with-claude/streaming,
thinking at https://docs.anthropic.com/en/docs/build-with-claude/adaptive-thinking and caching at
https://docs.anthropic.com/en/docs/build-with-claude/prompt-caching.
"""

import asyncio
import base64
import contextlib
import json
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
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
from ownware_gateway.models.http import LINGER_TIMEOUT_S, Endpoint, Pool, reported

DIALECT: Final = "anthropic"
VERSION: Final = "2023-06-01"

#: The API wants a limit in every request. Thinking counts into it, and no current model has less.
MAX_TOKENS: Final = 32_000

#: What Anthropic takes; a profile may say up to 2, as others do.
TEMPERATURE_MAX: Final = 1.0

#: Tokens of thinking for models that take a budget, and the least that the API accepts.
BUDGETS: Final[Mapping[str, int]] = {"low": 2_048, "medium": 8_192, "high": 16_384}
BUDGET_MIN: Final = 1_024

IMAGE_TYPES: Final = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp"})

#: What the API's words mean; `tool_use` follows from the calls.
STOP_REASONS: Final[Mapping[str, StopReason]] = {
    "end_turn": "end_turn",
    "max_tokens": "max_tokens",
    "model_context_window_exceeded": "max_tokens",
    "stop_sequence": "stop_sequence",
    "refusal": "refusal",
    "pause_turn": "pause_turn",
}

_CACHED: Final = {"cache_control": {"type": "ephemeral"}}
_CACHEABLE: Final = frozenset({"text", "image", "document", "tool_result"})

#: Claude up to 4.5, and other makers' models behind this API, think within a budget; later Claude
#: models refuse one and take an effort.
_BUDGETED: Final = re.compile(r"(?!claude-)|claude-(?:3|(?:opus|sonnet|haiku)-4(?!-[6-9]))")

#: Models after 4.6 refuse a temperature.
_SAMPLED: Final = re.compile(_BUDGETED.pattern + r"|claude-(?:opus|sonnet)-4-6")

#: Models after 4.5 whose thinking can be turned off, and how; of any other, the least is asked for.
_OFF: Final[Sequence[tuple[re.Pattern[str], str]]] = (
    (re.compile(r"claude-sonnet-5-5"), "between_tools"),
    (re.compile(r"claude-(?:opus|sonnet)-(?:4-[678]|5)(?!-\d(?:-|$))|claude-haiku-5"), "disabled"),
)

_NOT_IN_ID: Final = re.compile(r"[^a-zA-Z0-9_-]")


@dataclass(frozen=True, slots=True)
class Anthropic:
    """A server that speaks Anthropic Messages at `<base_url>/v1/messages`.

    `base_url` may end in `/v1` already; `provider` is its name in messages.
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
            url=f"{self.base_url.rstrip('/').removesuffix('/v1')}/v1/messages",
            headers={"x-api-key": self.key, "anthropic-version": VERSION},
            silence_s=self.silence_s,
            key_variable=self.key_variable,
        )
        answer = _Incoming(request, endpoint)
        async with contextlib.aclosing(self.pool.stream(endpoint, _body(request))) as reads:
            async for payloads in reads:
                parts: list[Part] = []
                for payload in payloads:
                    answer.take(payload, parts)
                if parts:
                    yield parts
                if answer.whole:
                    # Read to the end, so that the connection can be used again.
                    with contextlib.suppress(TimeoutError, ModelError):
                        async with asyncio.timeout(LINGER_TIMEOUT_S):
                            async for _ in reads:
                                pass
                    return
        raise ModelError(f"{self.provider} cut its answer off.", retry="connection")

    def unable(self, request: Request) -> Sequence[str]:
        """Return what this model cannot honour; see `Model.unable`."""
        thinks = request.thinking not in (None, "off")
        sampled = _SAMPLED.match(request.model) is not None and not thinks
        heat, form = request.temperature, request.response_format
        asked = {
            "temperature": heat is not None and (not sampled or heat > TEMPERATURE_MAX),
            "top_p": request.top_p is not None and not sampled,
            "seed": request.seed is not None,
            # It takes a schema and no free JSON.
            "response_format": form is not None and form["type"] != "json_schema",
            "input_audio": any(file.is_audio for file in request.files),
            "detail": request.has_detail,
            "reasoning_effort": request.finely,
            "verbosity": request.verbosity is not None,
            # A model that thinks decides itself what it calls.
            "tool_choice": request.tool_choice is not None and thinks,
        }
        return [name for name, wanted in asked.items() if wanted]


class _Incoming:
    """An answer while it comes in: the blocks so far, by their index."""

    def __init__(self, request: Request, endpoint: Endpoint) -> None:
        self.whole = False
        self._request = request
        self._endpoint = endpoint
        self._blocks: dict[int, dict[str, Any]] = {}
        self._pieces: dict[tuple[int, str], list[str]] = {}
        self._usage: dict[str, Any] = {}
        self._stop = ""
        self._ids = {
            call.id
            for turn in request.messages
            if isinstance(turn, AssistantTurn)
            for call in turn.tool_calls
        }

    def take(self, payload: bytes, parts: list[Part]) -> None:
        """Take an event and add the parts that it brings; unknown events bring none."""
        try:
            event = json.loads(payload)
            match event["type"]:
                case "content_block_delta":
                    self._delta(event["index"], event["delta"], parts)
                case "content_block_start":
                    self._start(event["index"], event["content_block"], parts)
                case "message_start":
                    self._count(event["message"].get("usage"))
                case "message_delta":
                    self._stop = event["delta"].get("stop_reason") or self._stop
                    self._count(event.get("usage"))
                case "message_stop":
                    self.whole = True
                    parts.append(self._answer())
                case "error":
                    raise reported(self._endpoint, event.get("error"))
                case _:
                    pass
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{self._endpoint.provider} sent an event that Anthropic Messages does not know.",
                retry="provider_error",
            ) from error

    def _start(self, index: int, block: dict[str, Any], parts: list[Part]) -> None:
        self._blocks[index] = block
        match block["type"]:
            case "text" if block["text"]:
                self._delta(index, {"type": "text_delta", "text": block["text"]}, parts)
            case "thinking" if block["thinking"]:
                thinking = {"type": "thinking_delta", "thinking": block["thinking"]}
                self._delta(index, thinking, parts)
            case "tool_use":
                block["id"] = self._unique(str(block.get("id") or ""))
                parts.append(CallStart(block["id"], block["name"]))
            case _:
                pass

    def _delta(self, index: int, delta: dict[str, Any], parts: list[Part]) -> None:
        match delta["type"]:
            case "text_delta":
                self._add(index, "text", delta["text"])
                parts.append(Text(delta["text"]))
            case "thinking_delta":
                self._add(index, "thinking", delta["thinking"])
                # The thoughts may be left out; then only the signature has a content.
                if delta["thinking"]:
                    parts.append(Thinking(delta["thinking"]))
            case "input_json_delta":
                self._add(index, "input", delta["partial_json"])
            case "signature_delta":
                self._add(index, "signature", delta["signature"])
            case "citations_delta":
                block = self._blocks[index]
                block["citations"] = [*(block.get("citations") or ()), delta["citation"]]
            case _:
                pass

    def _add(self, index: int, name: str, piece: str) -> None:
        self._pieces.setdefault((index, name), []).append(piece)

    def _count(self, usage: dict[str, Any] | None) -> None:
        # The figures grow; some servers repeat a known one as 0.
        self._usage |= {name: value for name, value in (usage or {}).items() if value}

    def _unique(self, given: str) -> str:
        base = _wire_id(given) or f"toolu_{len(self._request.messages)}"
        name, number = base, 1
        while name in self._ids:
            number += 1
            name = f"{base}_{number}"
        self._ids.add(name)
        return name

    def _answer(self) -> Answer:
        written: dict[int, str] = {}
        for (index, name), pieces in self._pieces.items():
            text = "".join(pieces)
            if name != "input":
                self._blocks[index][name] = text
            elif text.strip():
                written[index] = text
                self._blocks[index]["input"] = _object(text)
        order = sorted(self._blocks)
        blocks = [self._blocks[index] for index in order]
        calls = [
            ToolCall(
                block["id"], block["name"], written.get(index) or json.dumps(block.get("input", {}))
            )
            for index, block in zip(order, blocks, strict=True)
            if block["type"] == "tool_use"
        ]
        turn = AssistantTurn(
            text="".join(block["text"] for block in blocks if block["type"] == "text"),
            thinking="".join(block["thinking"] for block in blocks if block["type"] == "thinking"),
            tool_calls=calls,
            dialect=DIALECT,
            model=self._request.model,
            raw={"role": "assistant", "content": blocks},
        )
        # A limit or a refusal may follow calls; each of them wants its result all the same.
        stop = "tool_use" if calls else STOP_REASONS.get(self._stop, "end_turn")
        return Answer(turn, stop, _usage(self._usage))


def _usage(counts: Mapping[str, int]) -> Usage:
    # Anthropic's own input_tokens leave out what went through the cache.
    read = counts.get("cache_read_input_tokens", 0)
    created = counts.get("cache_creation_input_tokens", 0)
    return Usage(
        input_tokens=counts.get("input_tokens", 0) + read + created,
        output_tokens=counts.get("output_tokens", 0),
        cache_read_tokens=read,
        cache_creation_tokens=created,
    )


def _body(request: Request) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": request.model,
        "max_tokens": request.max_tokens or MAX_TOKENS,
        "stream": True,
        "messages": _messages(request),
    }
    if request.system.strip():
        body["system"] = [{"type": "text", "text": request.system, **_CACHED}]
    if request.tools:
        body["tools"] = [
            {
                "name": tool.name,
                "description": tool.description,
                "input_schema": tool.input_schema,
                **({"strict": True} if tool.strict else {}),
            }
            for tool in request.tools
        ]
        body |= _choice(request)
    body |= _thinking(request.model, request.thinking, body["max_tokens"])
    thinks = request.thinking not in (None, "off")
    if request.temperature is not None and not thinks and _SAMPLED.match(request.model):
        body["temperature"] = min(request.temperature, TEMPERATURE_MAX)
    if request.top_p is not None:
        body["top_p"] = request.top_p
    if request.stop:
        body["stop_sequences"] = list(request.stop)
    if request.user is not None:
        body["metadata"] = {"user_id": request.user}
    if request.response_format is not None:
        schema = request.response_format["json_schema"].get("schema", {})
        form = {"format": {"type": "json_schema", "schema": schema}}
        body["output_config"] = body.get("output_config", {}) | form
    return body


def _choice(request: Request) -> dict[str, Any]:
    """Return the field that says whether and how the model calls tools."""
    choice: dict[str, Any] = {"type": "auto"}
    if request.tool_choice is not None:
        one = {"type": "tool", "name": request.tool_choice}
        choice = {"type": "any"} if request.tool_choice == ANY_TOOL else one
    if request.parallel_tool_calls is False:
        choice["disable_parallel_tool_use"] = True
    return {} if choice == {"type": "auto"} else {"tool_choice": choice}


def _thinking(model: str, level: str | None, max_tokens: int) -> dict[str, Any]:
    """Return the fields that set how much the model thinks."""
    if level is None:
        return {}
    budgeted = _BUDGETED.match(model)
    if level == "off":
        ways = [way for pattern, way in _OFF if pattern.match(model)]
        if not ways and not budgeted:
            return {"output_config": {"effort": "low"}}
        return {"thinking": {"type": ways[0] if ways else "disabled"}}
    if not budgeted:
        return {
            # Without `display` current models think behind an empty text.
            "thinking": {"type": "adaptive", "display": "summarized"},
            "output_config": {"effort": level},
        }
    # A budget that leaves nothing for the answer is refused.
    budget = min(BUDGETS[level], max_tokens // 2)
    if budget < BUDGET_MIN:
        return {}
    return {"thinking": {"type": "enabled", "budget_tokens": budget}}


def _messages(request: Request) -> list[dict[str, Any]]:
    """Return the messages; turns of the same side in a row become one, as the API wants them."""
    messages: list[dict[str, Any]] = []
    for turn in request.messages:
        role = "assistant" if isinstance(turn, AssistantTurn) else "user"
        blocks = _blocks(turn, request.model)
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += blocks
        elif blocks:
            messages.append({"role": role, "content": blocks})
    if messages and messages[-1]["content"][-1]["type"] in _CACHEABLE:
        last = messages[-1]["content"]
        # A copy, because a block may be a part of `raw`.
        last[-1] = last[-1] | _CACHED
    return messages


def _blocks(turn: Message, model: str) -> list[dict[str, Any]]:
    match turn:
        case UserTurn():
            blocks = [_file(file) for file in turn.files]
            if turn.text.strip() or not blocks:
                blocks.append(_text(turn.text if turn.text.strip() else "(no text)"))
            return blocks
        case ToolTurn():
            return [_result(turn)]
        case AssistantTurn(dialect=dialect, model=made_by) if turn.raw and (dialect, made_by) == (
            DIALECT,
            model,
        ):
            # The API gives out blank text blocks that it does not take back.
            return [
                block
                for block in turn.raw["content"]
                if block["type"] != "text" or block["text"].strip()
            ]
        case AssistantTurn():
            return _said(turn)


def _said(turn: AssistantTurn) -> list[dict[str, Any]]:
    """Return the answer of another model; its thinking has no signature that this API knows."""
    blocks = [_text(turn.text)] if turn.text.strip() else []
    blocks += [
        {
            "type": "tool_use",
            "id": _wire_id(call.id),
            "name": call.name,
            "input": _object(call.arguments),
        }
        for call in turn.tool_calls
    ]
    return blocks


def _result(turn: ToolTurn) -> dict[str, Any]:
    block: dict[str, Any] = {"type": "tool_result", "tool_use_id": _wire_id(turn.tool_call_id)}
    if turn.images:
        said = [_text(turn.text)] if turn.text.strip() else []
        block["content"] = [*said, *map(_file, turn.images)]
    elif turn.text.strip():
        block["content"] = turn.text
    if turn.is_error:
        block["is_error"] = True
    return block


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _file(file: File) -> dict[str, Any]:
    if file.mime_type in IMAGE_TYPES:
        return {"type": "image", "source": _base64(file)}
    if file.mime_type == "application/pdf":
        return {"type": "document", "source": _base64(file), "title": file.filename}
    try:
        return _text(f"File {file.filename}:\n{file.data.decode()}")
    except UnicodeDecodeError:
        return _text(
            f"(The file {file.filename} is {file.mime_type}, {len(file.data)} bytes; "
            "it cannot be shown.)"
        )


def _base64(file: File) -> dict[str, str]:
    data = base64.b64encode(file.data).decode()
    return {"type": "base64", "media_type": file.mime_type, "data": data}


def _object(text: str) -> dict[str, Any]:
    """Return the object that the arguments are; the API takes nothing else, broken ones neither."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _wire_id(given: str) -> str:
    """Return a call id that the API accepts: other providers' may hold dots and colons."""
    return _NOT_IN_ID.sub("_", given)
