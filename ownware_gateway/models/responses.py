"""OpenAI Responses (https://platform.openai.com/docs/api-reference/responses): OpenAI itself.

The stream's events are https://platform.openai.com/docs/api-reference/responses-streaming. Nothing
is stored there: the whole conversation goes along, reasoning sealed in `encrypted_content`
(https://platform.openai.com/docs/guides/reasoning).
"""

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final

from ownware_gateway.events import StopReason, Usage
from ownware_gateway.models import (
    ANY_TOOL,
    Answer,
    AssistantTurn,
    CallStart,
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
from ownware_gateway.models.openai import (
    call_ids,
    content,
    load,
    unique_id,
)

DIALECT: Final = "openai-responses"

#: The API refuses longer ids of calls; other providers' may be longer.
CALL_ID_LENGTH_MAX: Final = 64

#: Models without reasoning, which refuse to be asked for it sealed; all newer ones have it.
_UNREASONING: Final = re.compile(r"(?:ft:)?(?:gpt-[34]|gpt-5-chat|chatgpt)")

#: What the refusal of a summary says: they are for verified organisations, and for some models.
_SUMMARY_REFUSED: Final = re.compile(r"reasoning.summar")

_INCOMPLETE: Final[dict[str, StopReason]] = {
    "max_output_tokens": "max_tokens",
    "content_filter": "refusal",
}

#: Codes of a failed response that the same request would meet again; others may pass.
_FINAL: Final = re.compile(r"invalid|image|policy|unsupported|context_length|not_included")


@dataclass(frozen=True, slots=True)
class Responses:
    """A server that speaks OpenAI Responses at `<base_url>/responses`.

    `provider` is its name in messages.
    """

    pool: Pool
    _: KW_ONLY
    provider: str
    base_url: str
    key: str = field(repr=False)
    key_variable: str
    silence_s: float
    _unsummarised: set[str] = field(default_factory=set, init=False, repr=False)

    async def stream(self, request: Request) -> AsyncGenerator[Sequence[Part], None]:
        """Ask the model; see `Model.stream`."""
        summary = _thinks(request) and request.model not in self._unsummarised
        try:
            async with contextlib.aclosing(self._answer(request, summary=summary)) as batches:
                async for batch in batches:
                    yield batch
                return
        except ModelError as error:
            if not summary or error.retry or not _SUMMARY_REFUSED.search(error.message):
                raise
        # The model may reason, only not show it. The refusal comes before anything else.
        self._unsummarised.add(request.model)
        async with contextlib.aclosing(self._answer(request, summary=False)) as batches:
            async for batch in batches:
                yield batch

    def unable(self, request: Request) -> Sequence[str]:
        """Return what this model cannot honour; see `Model.unable`."""
        asked = {
            "stop": bool(request.stop),
            "seed": request.seed is not None,
            "input_audio": any(file.is_audio for file in request.files),
        }
        return [name for name, wanted in asked.items() if wanted]

    async def _answer(
        self, request: Request, *, summary: bool
    ) -> AsyncGenerator[Sequence[Part], None]:
        endpoint = Endpoint(
            provider=self.provider,
            url=f"{self.base_url.rstrip('/')}/responses",
            headers={"Authorization": f"Bearer {self.key}"},
            silence_s=self.silence_s,
            key_variable=self.key_variable,
        )
        body = _body(request, summary=summary)
        reply = _Reply(endpoint, request)
        async with contextlib.aclosing(self.pool.stream(endpoint, body)) as reads:
            async for payloads in reads:
                if parts := reply.read(payloads):
                    yield parts
                if reply.whole:
                    # Read to the end, so that the connection can be used again.
                    with contextlib.suppress(TimeoutError, ModelError):
                        async with asyncio.timeout(LINGER_TIMEOUT_S):
                            async for _ in reads:
                                pass
                    return
        raise ModelError(f"The answer of {self.provider} was cut off.", retry="connection")


def _thinks(request: Request) -> bool:
    return request.thinking not in (None, "off")


def _body(request: Request, *, summary: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": request.model,
        "input": [item for turn in request.messages for item in _items(turn, request.model)],
        "stream": True,
        "store": False,
    }
    if not _UNREASONING.match(request.model):
        body["include"] = ["reasoning.encrypted_content"]
    if request.system:
        body["instructions"] = request.system
    if request.tools:
        body["tools"] = [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.input_schema,
                # Strict is the default here, and takes only a part of JSON Schema.
                "strict": tool.strict,
            }
            for tool in request.tools
        ]
        if request.tool_choice is not None:
            one = {"type": "function", "name": request.tool_choice}
            body["tool_choice"] = "required" if request.tool_choice == ANY_TOOL else one
        if request.parallel_tool_calls is not None:
            body["parallel_tool_calls"] = request.parallel_tool_calls
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.max_tokens is not None:
        body["max_output_tokens"] = request.max_tokens
    if request.thinking is not None:
        body["reasoning"] = {"effort": request.thinking if _thinks(request) else "none"}
        if summary:
            body["reasoning"]["summary"] = "auto"
    return body | _asked(request)


def _asked(request: Request) -> dict[str, Any]:
    """Return the fields that a caller's options are."""
    body: dict[str, Any] = {}
    if request.top_p is not None:
        body["top_p"] = request.top_p
    if request.user is not None:
        # The field that took the place of `user`; the API refuses longer ones.
        body["safety_identifier"] = _wire_id(request.user)
    if request.response_format is not None:
        form = request.response_format
        body["text"] = {"format": {"type": form["type"], **form.get("json_schema", {})}}
    if request.verbosity is not None:
        body["text"] = {**body.get("text", {}), "verbosity": request.verbosity}
    return body


def _items(turn: Message, model: str) -> list[dict[str, Any]]:
    match turn:
        case UserTurn(text=text, files=files):
            said = [_part(part) for part in content(text, files)] if files else text
            return [{"type": "message", "role": "user", "content": said}]
        case ToolTurn():
            # The dialect has no field for a failure.
            text = f"Error: {turn.text}" if turn.is_error else turn.text
            call_id = _wire_id(turn.tool_call_id)
            parts = content(text, turn.images) if turn.images else ()
            output = [_part(part) for part in parts] or text
            return [{"type": "function_call_output", "call_id": call_id, "output": output}]
        case AssistantTurn(raw=list() as raw, dialect="openai-responses") if turn.model == model:
            return raw
        case AssistantTurn():
            return _said(turn)


def _said(turn: AssistantTurn) -> list[dict[str, Any]]:
    """Return the answer of another model; its thinking is not sealed in a way that opens here."""
    items: list[dict[str, Any]] = []
    if turn.text:
        items.append({"type": "message", "role": "assistant", "content": turn.text})
    items += [
        {
            "type": "function_call",
            "call_id": _wire_id(call.id),
            "name": call.name,
            "arguments": call.arguments,
        }
        for call in turn.tool_calls
    ]
    return items


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """Return a part of a Chat Completions message as this API names it."""
    match part["type"]:
        case "image_url":
            image = dict(part["image_url"])
            return {"type": "input_image", "image_url": image.pop("url"), **image}
        case "file":
            return {"type": "input_file", **part["file"]}
        case "input_audio":
            return {"type": "input_text", "text": "[Attached audio cannot be heard here.]"}
        case _:
            return {"type": "input_text", "text": part["text"]}


def _wire_id(call_id: str) -> str:
    if len(call_id) <= CALL_ID_LENGTH_MAX:
        return call_id
    # The same for a call and its output, and as unlike others as the whole.
    return hashlib.sha256(call_id.encode()).hexdigest()[:CALL_ID_LENGTH_MAX]


class _Reply:
    """Makes parts of a stream of events, and the whole answer of its last one."""

    def __init__(self, endpoint: Endpoint, request: Request) -> None:
        self.whole = False
        self._endpoint = endpoint
        self._model = request.model
        self._taken = call_ids(request)
        self._ids: dict[int, str] = {}
        self._items: dict[int, dict[str, Any]] = {}
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._place: tuple[int, int | None] = (-1, None)
        self._refused = False

    def read(self, payloads: Iterable[bytes]) -> list[Part]:
        """Return the parts in the events of one network read."""
        parts: list[Part] = []
        try:
            for payload in payloads:
                self._event(load(payload), parts)
        # What an event holds is looked into without asking first: here it may be anything.
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            message = f"{self._endpoint.provider} sent something that is no event of an answer."
            raise ModelError(message, retry="provider_error") from error
        return parts

    def _event(self, event: dict[str, Any], parts: list[Part]) -> None:
        match event["type"]:
            case "response.output_text.delta":
                parts.append(Text(self._write(self._text, event)))
            case "response.reasoning_summary_text.delta" | "response.reasoning_text.delta":
                parts.append(Thinking(self._write(self._thinking, event)))
            case "response.refusal.delta":
                self._refused = True
                parts.append(Text(self._write(self._text, event)))
            case "response.output_item.added" | "response.output_item.done":
                self._item(event["output_index"], event["item"], parts)
            case "response.completed" | "response.incomplete":
                self._end(event["response"], parts)
            case "response.failed":
                raise self._failed(event["response"].get("error"))
            case "error":
                raise self._failed(event.get("error") or event)
            case _:
                # Arguments come whole with their item.
                pass

    def _write(self, pieces: list[str], event: dict[str, Any]) -> str:
        """Return the delta, after an empty line where another message or thought begins."""
        place = (event["output_index"], event.get("summary_index"))
        gap = "\n\n" if pieces and place != self._place else ""
        self._place = place
        piece: str = gap + event["delta"]
        pieces.append(piece)
        return piece

    def _item(self, index: int, item: dict[str, Any], parts: list[Part]) -> None:
        """Keep an item of the output, which replaces what was known of it."""
        self._items[index] = item
        if item["type"] == "function_call":
            if index not in self._ids:
                given = _wire_id(item.get("call_id") or "")
                self._ids[index] = unique_id(given, self._taken)
                parts.append(CallStart(self._ids[index], item["name"]))
            item["call_id"] = self._ids[index]

    def _end(self, response: dict[str, Any], parts: list[Part]) -> None:
        for index, item in enumerate(response.get("output") or ()):
            self._item(index, item, parts)
        items = [self._items[index] for index in sorted(self._items)]
        calls = [_call(item) for item in items if item["type"] == "function_call"]
        turn = AssistantTurn(
            text="".join(self._text),
            thinking="".join(self._thinking),
            tool_calls=calls,
            dialect=DIALECT,
            model=self._model,
            raw=_returnable(items),
        )
        reason = (response.get("incomplete_details") or {}).get("reason")
        stop = _INCOMPLETE.get(str(reason), "refusal" if self._refused else "end_turn")
        # A limit may follow calls; each of them wants its result all the same.
        usage = _usage(response.get("usage") or {})
        parts.append(Answer(turn, "tool_use" if calls else stop, usage))
        self.whole = True

    def _failed(self, error: Any) -> ModelError:
        code = error.get("code") if isinstance(error, dict) else None
        status = 400 if isinstance(code, str) and _FINAL.search(code) else 500
        return reported(self._endpoint, error, status)


def _call(item: dict[str, Any]) -> ToolCall:
    arguments = item.get("arguments") or ""
    if not arguments.strip():
        # A call that was cut off before its first argument is not one that has none.
        arguments = "{}" if item.get("status", "completed") == "completed" else "{"
    return ToolCall(item["call_id"], item["name"], arguments)


def _returnable(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the items that the API takes back: reasoning only with what it led to."""
    kept = list(items)
    while kept and kept[-1]["type"] == "reasoning":
        kept.pop()
    return kept


def _usage(usage: dict[str, Any]) -> Usage:
    details = usage.get("input_tokens_details") or {}
    return Usage(
        input_tokens=usage.get("input_tokens") or 0,
        output_tokens=usage.get("output_tokens") or 0,
        cache_read_tokens=details.get("cached_tokens") or 0,
        cache_creation_tokens=details.get("cache_write_tokens") or 0,
    )
