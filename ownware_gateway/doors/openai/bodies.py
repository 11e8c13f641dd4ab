"""What comes in through the OpenAI door: checked field by field, nothing silently ignored."""

import base64
import binascii
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar

from aiohttp import web
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ownware_gateway.doors import body_of
from ownware_gateway.doors.openai.errors import refuse
from ownware_gateway.doors.openai.tools import check_results, read_choice, read_tools
from ownware_gateway.errors import GatewayError
from ownware_gateway.history import NOBODY_SPOKE, joined
from ownware_gateway.models import (
    AssistantTurn,
    Effort,
    File,
    Message,
    Options,
    ToolCall,
    ToolTurn,
    UserTurn,
    Verbosity,
)
from ownware_gateway.profile.explain import explain
from ownware_gateway.profile.fields import one_or_more

#: All text of the messages together; as much as a prompt of the native door may have.
TEXT_CHARS_MAX: Final = 1_048_576
MESSAGES_MAX: Final = 2_000
FILES_MAX: Final = 32
FILE_BYTES_MAX: Final = 8 * 1_048_576
TEXTS_MAX: Final = 2_048

#: How deep a body may be: what Python's own limit lets in, it may not let out again.
NESTING_MAX: Final = 100

#: What may be said and changes nothing: the value that the gateway has anyway, or a hint that
#: steers only how a provider works. An asterisk is any value.
NEUTRAL: Final[Mapping[str, Sequence[Any]]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (True, False),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "prompt_cache_key": ("*",),
    "prompt_cache_retention": ("*",),
    "prediction": ("*",),
}

#: Why some of the others are refused.
_WHY: Final = {
    "functions": "it is of old; use tools",
    "function_call": "it is of old; use tool_choice",
    "n": "there is one answer to a request",
}

#: How much a model is to reason, in OpenAI's words and in ours.
EFFORTS: Final[Mapping[str, Effort]] = {
    "none": "off",
    "minimal": "minimal",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "xhigh",
}

_DATA_URI: Final = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w=.+-]+)*;base64,", re.ASCII)
_EXTENSIONS: Final = {"jpeg": "jpg", "svg+xml": "svg", "plain": "txt"}

#: OpenAI's own limit.
_SCHEMA_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")

_Body = TypeVar("_Body", bound=BaseModel)

#: Brings the file that an address leads to; raises GatewayError.
Fetch = Callable[[str, str], Awaitable[File]]


class Body(BaseModel):
    """A body as OpenAI writes them: snake_case, no field that is not known, no other types."""

    model_config = ConfigDict(
        extra="forbid", strict=True, protected_namespaces=(), defer_build=True
    )


class StreamOptions(Body):
    """How a stream is to be; `include_obfuscation` asks for padding, of which there is none."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class RunBody(Body):
    """What completions and responses are asked for alike."""

    model: str = Field(default="", max_length=256)
    stream: bool = False
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    user: str | None = Field(default=None, min_length=1, max_length=512)
    safety_identifier: str | None = Field(default=None, min_length=1, max_length=512)
    metadata: (
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None
    ) = Field(default=None, max_length=16)
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def asked(self, tools: Sequence[Mapping[str, Any]], choice: Any) -> Options:
        """Return that as options of the run, with tools and a choice as completions have them.

        A choice of no tool takes the client's away, and leaves the agent its own. Raises
        GatewayError for tools that are none.
        """
        known = read_tools(tools)
        chosen = read_choice(choice, known)
        if choice == "none":
            known = ()
        return Options(
            temperature=self.temperature,
            top_p=self.top_p,
            user=self.user or self.safety_identifier,
            metadata=self.metadata,
            client_tools=known,
            tool_choice=chosen,
            parallel_tool_calls=self.parallel_tool_calls if known else None,
        )


class ChatBody(RunBody):
    """`POST /v1/chat/completions`, without what is neutral."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MESSAGES_MAX)
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, gt=0, le=2**31)
    max_completion_tokens: int | None = Field(default=None, gt=0, le=2**31)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=500)]] | None,
        BeforeValidator(one_or_more),
        Field(max_length=4),
    ] = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    response_format: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    verbosity: Verbosity | None = None

    def options(self) -> Options:
        """Return what is asked of the run; raises GatewayError where a part of it is none."""
        return self.asked(self.tools, self.tool_choice)._replace(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            stop=tuple(self.stop or ()),
            seed=self.seed,
            response_format=response_format_of(self.response_format),
            thinking=EFFORTS[self.reasoning_effort] if self.reasoning_effort else None,
            verbosity=verbosity_of(self.verbosity),
        )


class EmbeddingsBody(Body):
    """`POST /v1/embeddings`."""

    model: str = Field(default="", max_length=256)
    input: str | list[str] | list[int] | list[list[int]]
    dimensions: int | None = Field(default=None, gt=0, le=65_536)
    encoding_format: Literal["float", "base64"] = "float"

    def texts(self) -> list[Any]:
        """Return what is to be embedded: texts, or lists of tokens. Raises GatewayError."""
        given = self.input
        one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        texts: list[Any] = [given] if one else list(given)
        if not 1 <= len(texts) <= TEXTS_MAX or not all(texts):
            raise refuse("input", f"The field 'input' must be 1 to {TEXTS_MAX} texts, none empty.")
        return texts


class EmbedBody(Body):
    """`POST /embed`."""

    text: str = Field(min_length=1, max_length=TEXT_CHARS_MAX)


class ExecuteBody(Body):
    """`POST /execute`."""

    prompt: str = Field(min_length=1, max_length=TEXT_CHARS_MAX)
    model_name: str = Field(default="", max_length=256)
    model_provider: str = Field(default="", max_length=64)


class Conversation(NamedTuple):
    """What a list of messages holds: what the model is told, what was said, what is new.

    `tail` are the person's messages at the end; where the gateway has the conversation only the
    last of them is new. Where results of tools are at the end, `answered` are the model's turns
    with their results since the person's last message.
    """

    instructions: str
    history: Sequence[Message]
    tail: Sequence[UserTurn]
    answered: Sequence[AssistantTurn | ToolTurn] = ()

    @property
    def turns(self) -> Sequence[Message]:
        """All of it, in its order."""
        return [*self.history, *self.tail, *self.answered]

    @property
    def last_calls(self) -> AssistantTurn | None:
        """The last answer that wants calls, unless the model has said something else since."""
        turns = [*self.history, *self.answered]
        last = next((turn for turn in reversed(turns) if isinstance(turn, AssistantTurn)), None)
        return last if last is not None and last.tool_calls else None

    @property
    def results(self) -> Sequence[ToolTurn]:
        """The results of the last calls."""
        results: list[ToolTurn] = []
        for turn in reversed([*self.history, *self.answered]):
            if isinstance(turn, AssistantTurn):
                break
            if isinstance(turn, ToolTurn):
                results.insert(0, turn)
        return results if self.last_calls is not None else []

    @property
    def prompt(self) -> UserTurn:
        """All that the person has said since the last answer, as one message."""
        prompt = self.tail[0]
        for turn in self.tail[1:]:
            prompt = joined(prompt, turn)
        return prompt


async def read_json(request: web.Request) -> dict[str, Any]:
    """Return the request's body; raises GatewayError when it is no JSON object."""
    data = await body_of(request)
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise GatewayError(
            "invalid_request", f"The body is not JSON: {error.msg} at {where}."
        ) from None
    except (ValueError, RecursionError):
        raise GatewayError("invalid_request", "The body is not JSON that can be read.") from None
    if not isinstance(value, dict):
        raise GatewayError("invalid_request", "The body must be a JSON object.")
    if _is_deeper(value, NESTING_MAX):
        raise GatewayError(
            "invalid_request", f"The body is nested more than {NESTING_MAX} deep; make it flatter."
        )
    return value


def _is_deeper(value: Any, most: int) -> bool:
    """Whether objects and lists stand in one another more often than that."""
    level = [value]
    for _ in range(most):
        level = [
            item
            for inner in level
            for item in (inner.values() if isinstance(inner, dict) else inner)
            if isinstance(item, dict | list)
        ]
    return bool(level)


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def parse(raw: Mapping[str, Any], model: type[_Body]) -> _Body:
    """Return a body; raises GatewayError that names the field which is wrong.

    A field that is null is as good as none: clients send all that they know.
    """
    try:
        return model.model_validate({k: v for k, v in raw.items() if v is not None})
    except ValidationError as error:
        first = error.errors()[0]["loc"]
        param = str(first[0]) if first else None
        raise GatewayError("invalid_request", explain(error, model), param=param) from None


def parse_chat(raw: Mapping[str, Any]) -> ChatBody:
    """Return a request for a completion; raises GatewayError for what cannot be honoured."""
    return parse(without_neutral(raw, NEUTRAL), ChatBody)


def without_neutral(raw: Mapping[str, Any], neutral: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return the fields that may change something.

    Raises GatewayError for one that is only taken where it changes nothing, and would.
    """
    left: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in neutral:
            left[name] = value
        elif value is not None and "*" not in neutral[name] and value not in neutral[name]:
            why = _WHY.get(name, "leave it out")
            raise refuse(name, f"The field {name!r} cannot be honoured: {why}.")
    return left


def verbosity_of(given: Verbosity | None) -> Verbosity | None:
    """Return how much a model is asked to say, if not what every model does by itself."""
    return None if given == "medium" else given


def response_format_of(given: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the format of an answer, None for plain text; raises GatewayError."""
    if given is None or given == {"type": "text"}:
        return None
    kind, schema = given.get("type"), given.get("json_schema")
    if given == {"type": "json_object"}:
        return given
    fits = (
        kind == "json_schema"
        and set(given) == {"type", "json_schema"}
        and isinstance(schema, dict)
        and _SCHEMA_NAME.fullmatch(str(schema.get("name", "")))
        and isinstance(schema.get("schema", {}), dict)
        and set(schema) <= {"name", "schema", "strict", "description"}
    )
    if not fits:
        raise refuse(
            "response_format",
            "The field 'response_format' must be text, json_object, or json_schema with a "
            "'json_schema' of 'name', 'schema' and perhaps 'strict' and 'description'.",
        )
    return given


async def conversation(messages: Sequence[Mapping[str, Any]], fetch: Fetch) -> Conversation:
    """Return what the messages hold, their files fetched. Raises GatewayError."""
    _check_size(messages)
    instructions: list[str] = []
    turns: list[Message] = []
    reader = _Reader(fetch)
    for index, message in enumerate(messages):
        path, role = f"messages.{index}", message.get("role")
        match role:
            case "system" | "developer":
                instructions.append(_text(message.get("content"), f"{path}.content"))
            case "user":
                turns.append(await reader.user(message, path))
            case "assistant":
                turns.append(_assistant(message, path))
            case "tool":
                turns.append(_tool(message, path, turns))
            case _:
                raise refuse(
                    "messages",
                    f"The field '{path}.role' must be system, developer, user, assistant or tool.",
                )
    answered = _answered(turns)
    tail: list[UserTurn] = []
    while turns and isinstance(turn := turns[-1], UserTurn):
        tail.insert(0, turn)
        turns.pop()
    if answered:
        return Conversation("\n\n".join(filter(None, instructions)), turns, tail, answered)
    if not tail or not any(turn.text.strip() or turn.files for turn in tail):
        raise refuse("messages", "The last message must be the user's, and say something.")
    return Conversation("\n\n".join(filter(None, instructions)), turns, tail)


def _answered(turns: list[Message]) -> list[AssistantTurn | ToolTurn]:
    """Take off the turns since the last person's message if they end with results of tools.

    Raises GatewayError when a call among the last ones has none.
    """
    if not turns or not isinstance(turns[-1], ToolTurn):
        return []
    since = max((at for at, turn in enumerate(turns, 1) if isinstance(turn, UserTurn)), default=0)
    answered = [turn for turn in turns[since:] if not isinstance(turn, UserTurn)]
    del turns[since:]
    if not turns:
        turns.append(UserTurn(NOBODY_SPOKE))
    place = max(at for at, turn in enumerate(answered) if isinstance(turn, AssistantTurn))
    asked = answered[place]
    assert isinstance(asked, AssistantTurn)
    check_results(asked, [turn for turn in answered[place:] if isinstance(turn, ToolTurn)])
    return answered


def _check_size(messages: Sequence[Mapping[str, Any]]) -> None:
    size = 0
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        texts = [part.get("text") for part in parts if isinstance(part, dict)]
        calls = message.get("tool_calls")
        size += len(json.dumps(calls, ensure_ascii=False)) if calls else 0
        size += sum(len(text) for text in texts if isinstance(text, str))
    if size > TEXT_CHARS_MAX:
        raise refuse(
            "messages",
            f"The messages have {size} characters; {TEXT_CHARS_MAX} are allowed.",
        )


def _text(content: Any, path: str) -> str:
    """Return content that may be nothing but text."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise refuse("messages", f"The field '{path}' must be a text or a list of parts.")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(kind) if kind in ("text", "refusal") else None
        if not isinstance(text, str):
            raise refuse("messages", f"The field '{path}.{index}' must be a part of type text.")
        texts.append(text)
    return "".join(texts)


def _assistant(message: Mapping[str, Any], path: str) -> AssistantTurn:
    if message.get("audio") is not None or message.get("function_call") is not None:
        raise refuse("messages", f"The field '{path}' holds audio or a function call of old.")
    given = message.get("tool_calls") or []
    if not isinstance(given, list):
        raise refuse("messages", f"The field '{path}.tool_calls' must be a list.")
    calls = [_call(item, f"{path}.tool_calls.{index}") for index, item in enumerate(given)]
    if len({call.id for call in calls}) < len(calls):
        raise refuse("messages", f"The field '{path}.tool_calls' has an id more than once.")
    text = _text(message.get("content"), f"{path}.content")
    return AssistantTurn(text or _text(message.get("refusal"), f"{path}.refusal"), tool_calls=calls)


def _call(item: Any, path: str) -> ToolCall:
    function = item.get("function") if isinstance(item, dict) else None
    said = function if isinstance(function, dict) else {}
    given = [item.get("id"), said.get("name"), said.get("arguments")] if said else []
    texts = [text for text in given if isinstance(text, str)]
    if len(texts) != 3:
        raise refuse("messages", f"The field '{path}' must be a function call with an id.")
    return ToolCall(*texts)


def _tool(message: Mapping[str, Any], path: str, before: Sequence[Message]) -> ToolTurn:
    call_id = message.get("tool_call_id")
    # Up to what a person said last: a result that comes later has no call to belong to.
    for turn in reversed(before):
        if isinstance(turn, UserTurn):
            break
        if isinstance(turn, AssistantTurn):
            for call in turn.tool_calls:
                if call.id == call_id:
                    text = _text(message.get("content"), f"{path}.content")
                    return ToolTurn(call.id, call.name, text)
    raise refuse("messages", f"The field '{path}.tool_call_id' names no tool call before it.")


class _Reader:
    """Reads what people said, with the files that came with it."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._files = 0

    async def user(self, message: Mapping[str, Any], path: str) -> UserTurn:
        content, name = message.get("content"), message.get("name")
        texts: list[str] = [f"{name}:"] if isinstance(name, str) and name else []
        if not isinstance(content, list):
            return UserTurn(" ".join([*texts, _text(content, f"{path}.content")]))
        files: list[File] = []
        for index, part in enumerate(content):
            where = f"{path}.content.{index}"
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
            else:
                files.append(await self._file(kind, part, where))
        return UserTurn("\n".join(texts), files)

    async def _file(self, kind: Any, part: Any, where: str) -> File:
        self._files += 1
        if self._files > FILES_MAX:
            raise refuse("messages", f"The messages hold more than {FILES_MAX} files.")
        given = part.get(kind) if kind in ("image_url", "input_audio", "file") else None
        if not isinstance(given, dict):
            raise refuse(
                "messages",
                f"The field '{where}' must be a part of type text, image_url, input_audio or file.",
            )
        if kind == "image_url":
            return await self._image(given, where, self._files)
        return (_audio if kind == "input_audio" else _document)(given, where, self._files)

    async def _image(self, given: Mapping[str, Any], where: str, number: int) -> File:
        url, detail = given.get("url"), given.get("detail")
        if detail not in (None, "auto", "low", "high"):
            raise refuse(
                "messages", f"The field '{where}.image_url.detail' must be auto, low or high."
            )
        detail = None if detail == "auto" else detail
        if not isinstance(url, str):
            raise refuse("messages", f"The field '{where}.image_url.url' is required.")
        if not url.startswith("data:"):
            return replace(await self._fetch(url, where), detail=detail)
        mime_type, data = _data_uri(url, f"{where}.image_url.url")
        if not mime_type.startswith("image/"):
            raise refuse("messages", f"The field '{where}' is {mime_type} and no image.")
        extension = mime_type.removeprefix("image/")
        name = f"image-{number}.{_EXTENSIONS.get(extension, extension)}"
        return File(name, mime_type, data, detail)


def _audio(given: Mapping[str, Any], where: str, number: int) -> File:
    form = given.get("format")
    if form not in ("wav", "mp3"):
        raise refuse("messages", f"The field '{where}.input_audio.format' must be wav or mp3.")
    data = _decoded(given.get("data"), f"{where}.input_audio.data")
    return File(f"audio-{number}.{form}", "audio/wav" if form == "wav" else "audio/mpeg", data)


def _document(given: Mapping[str, Any], where: str, number: int) -> File:
    if given.get("file_id") is not None:
        raise refuse("messages", f"The field '{where}.file.file_id' names a file that is not here.")
    text, name = given.get("file_data"), given.get("filename") or f"file-{number}"
    if not isinstance(text, str) or not isinstance(name, str):
        raise refuse("messages", f"The field '{where}.file.file_data' must be base64.")
    mime_type, data = "application/pdf", b""
    if text.startswith("data:"):
        mime_type, data = _data_uri(text, f"{where}.file.file_data")
    else:
        data = _decoded(text, f"{where}.file.file_data")
    return File(re.sub(r"[/\\\x00-\x1f]", "_", name)[:255], mime_type, data)


def _data_uri(uri: str, path: str) -> tuple[str, bytes]:
    found = _DATA_URI.match(uri)
    if found is None:
        raise refuse("messages", f"The field '{path}' is no data URI in base64.")
    mime_type = (found["type"] or "application/octet-stream").lower()
    return mime_type, _decoded(uri[found.end() :], path)


def _decoded(text: Any, path: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise refuse("messages", f"The field '{path}' is not base64.") from None
    if not data:
        raise refuse("messages", f"The field '{path}' is empty.")
    if len(data) > FILE_BYTES_MAX:
        raise refuse(
            "messages",
            f"The field '{path}' has {len(data)} bytes; {FILE_BYTES_MAX} are allowed.",
        )
    return data
