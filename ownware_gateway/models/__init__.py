"""Who speaks: the contract of a language model, the same for every provider.

An adapter turns a `Request` into its provider's dialect and the provider's stream into batches of
parts: one batch per network read, so that one burst of the provider becomes one append to the log.
The last part of a stream is always an `Answer`; a stream that ends without one was cut off, and the
adapter raises `ModelError` for it.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple, Protocol

from ownware_gateway.events import StopReason, Usage

#: How much a model may reason before it answers.
ThinkingLevel = Literal["off", "low", "medium", "high"]
#: What a caller may ask of models that have more levels than a profile names.
Effort = ThinkingLevel | Literal["minimal", "xhigh"]
Verbosity = Literal["low", "medium", "high"]

#: What may be tried again: the engine says so with a `recovery` event of this reason.
RetryReason = Literal["rate_limit", "provider_error", "connection"]


@dataclass(frozen=True, slots=True)
class File:
    """The bytes of an attachment.

    `detail` is how closely a model is to look at an image, `low` or `high`; None leaves it to the
    model.
    """

    filename: str
    mime_type: str
    data: bytes
    detail: str | None = None

    @property
    def is_audio(self) -> bool:
        """Whether it is to be heard."""
        return self.mime_type.lower().startswith("audio/")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call exactly as the model asked for it.

    `arguments` is the JSON text that the model wrote, which may be broken; `id` is unique in the
    conversation: an adapter replaces a missing or repeated id of its provider, in `raw` as well.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class UserTurn:
    """What a person said."""

    text: str
    files: Sequence[File] = ()


@dataclass(frozen=True, slots=True)
class AssistantTurn:
    """What the model answered.

    `raw` is the provider's own message (JSON), to be sent back verbatim, thinking signatures and
    call ids included, when `dialect` is the adapter's own and `model` the one that is asked; for
    any other pair the message is made from the other fields.
    """

    text: str
    thinking: str = ""
    tool_calls: Sequence[ToolCall] = ()
    dialect: str = ""
    model: str = ""
    raw: Any = None


@dataclass(frozen=True, slots=True)
class ToolTurn:
    """How a tool call ended, as the model is told; `images` are those that it gave back.

    One that failed has none: not every provider takes them then.
    """

    tool_call_id: str
    tool_name: str
    text: str
    is_error: bool = False
    images: Sequence[File] = ()


Message = UserTurn | AssistantTurn | ToolTurn


class ToolSpec(NamedTuple):
    """A tool as the model sees it; `input_schema` is JSON Schema of an object.

    `strict`: its provider is asked to let the model write nothing that does not fit.
    """

    name: str
    description: str
    input_schema: dict[str, Any]
    strict: bool = False


#: The `tool_choice` of a model that must call a tool, whichever; no tool has this name.
ANY_TOOL: Final = "*"


@dataclass(frozen=True, slots=True)
class Request:
    """One question to a model. `model` is the provider's own name, without our prefix.

    `messages` alternate as every provider wants it: each `AssistantTurn` with tool calls is
    followed by one `ToolTurn` for each call, in their order. `thinking` is how much the model may
    reason before it answers: None leaves the provider's default. `response_format` is OpenAI's
    `{"type": "json_object"}` or `{"type": "json_schema", "json_schema": …}`; `user` names to the
    provider who is behind the request. `tool_choice` is the tool that the model must call, by its
    name, or `ANY_TOOL`; without `parallel_tool_calls` being False it may call several at once.
    `verbosity` is how much the model says, where it can be told.
    """

    model: str
    messages: Sequence[Message]
    system: str = ""
    tools: Sequence[ToolSpec] = ()
    temperature: float | None = None
    max_tokens: int | None = None
    thinking: Effort | None = None
    top_p: float | None = None
    stop: Sequence[str] = ()
    seed: int | None = None
    response_format: Mapping[str, Any] | None = None
    user: str | None = None
    tool_choice: str | None = None
    parallel_tool_calls: bool | None = None
    verbosity: Verbosity | None = None

    @property
    def files(self) -> Sequence[File]:
        """All files that people have sent in the conversation."""
        turns = (turn for turn in self.messages if isinstance(turn, UserTurn))
        return [file for turn in turns for file in turn.files]

    @property
    def has_detail(self) -> bool:
        """Whether an image is to be looked at more or less closely than the model would."""
        return any(file.detail is not None for file in self.files)

    @property
    def finely(self) -> bool:
        """Whether the model is to reason as much as only some can be told."""
        return self.thinking in ("minimal", "xhigh")


#: The options that are fields of a request as well.
_ASKED: Final = (
    *("temperature", "top_p", "max_tokens", "seed", "response_format", "thinking", "user"),
    *("tool_choice", "parallel_tool_calls", "verbosity"),
)


class Options(NamedTuple):
    """What a caller asks of one run, over what its profile says; kept with the run.

    `instructions` come after the profile's own. A `bare` run has neither tools nor the profile's
    instructions. `metadata` is for the caller, and `door` for the door that started the run, to be
    found again; neither goes to a model. `client_tools` are tools that the caller runs itself, each
    with the fields of a `ToolSpec`.
    """

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    seed: int | None = None
    response_format: Mapping[str, Any] | None = None
    thinking: Effort | None = None
    user: str | None = None
    metadata: Mapping[str, str] | None = None
    instructions: str = ""
    bare: bool = False
    door: Mapping[str, Any] | None = None
    client_tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | None = None
    parallel_tool_calls: bool | None = None
    verbosity: Verbosity | None = None

    def apply(self, request: Request) -> Request:
        """Return the request with what is asked for here in place of what it says."""
        asked = {name: value for name in _ASKED if (value := getattr(self, name)) is not None}
        if self.stop:
            asked["stop"] = tuple(self.stop)
        return replace(request, **asked) if asked else request

    def dump(self) -> bytes:
        """Return it as JSON, without what was not asked for."""
        asked = {
            name: value
            for name, value in self._asdict().items()
            if value != Options._field_defaults[name]
        }
        return json.dumps(asked).encode()

    @staticmethod
    def restore(body: bytes) -> "Options":
        """Return the options that `dump` wrote; those of a newer gateway are left out."""
        known = json.loads(body).items()
        return Options(**{name: value for name, value in known if name in Options._fields})


#: Nothing is asked for but what the profile says.
AS_THE_PROFILE_SAYS: Final = Options()


class Text(NamedTuple):
    """A piece of the answer."""

    text: str


class Thinking(NamedTuple):
    """A piece of the reasoning."""

    text: str


class CallStart(NamedTuple):
    """The model has begun to ask for a tool; its arguments come with the `Answer`."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The whole answer, always the last part.

    `stop_reason` is one of the vocabulary's: `tool_use` exactly when there are tool calls,
    otherwise `end_turn`, `max_tokens`, `stop_sequence`, `refusal` or `pause_turn`.
    `usage.cost_usd` is left None by adapters: prices are the catalogue's business.
    """

    turn: AssistantTurn
    stop_reason: StopReason
    usage: Usage


Part = Text | Thinking | CallStart | Answer


class Model(Protocol):
    """What an adapter is."""

    def stream(self, request: Request) -> AsyncIterator[Sequence[Part]]:
        """Ask the model and yield its answer in batches, one per network read, none empty.

        The request is on its way when the first batch is asked for. Closing the iterator (or
        cancelling the task that reads it) cuts the upstream connection at once.
        Raises ModelError when the provider refuses, fails, or falls silent for too long.
        """
        ...

    def unable(self, request: Request) -> Sequence[str]:
        """Return what of a request's options and files this model is certain not to honour.

        By the names that OpenAI has for them, such as `seed` or `input_audio`; what a provider may
        yet refuse is not among them.
        """
        ...


#: The code of a prompt that is longer than the model's window.
OVERFLOW: Final = "context_overflow"


class ModelError(Exception):
    """A model call failed.

    `code` is `OVERFLOW` where the prompt is too long, else `provider_error`.
    `message` is for the person who runs the gateway: it names the provider, says what happened and
    what to do, and never contains a key. `retry` says why the same call may succeed later (None:
    it will not), `retry_after_s` when, if the provider said so.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "provider_error",
        retry: RetryReason | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.retry = retry
        self.retry_after_s = retry_after_s


class ModelInfo(NamedTuple):
    """A model that can be named in a request; the shape of an entry of `GET /models`."""

    id: str
    name: str
    provider: str
    has_credentials: bool
    default: bool = False
    context_window: int | None = None
    max_output_tokens: int | None = None
    input_cost_per_m_tok: float | None = None
    output_cost_per_m_tok: float | None = None


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Which model really answers: the adapter, its name for the model, and why, if another one.

    `id` is the `provider:model` string; `fallback_reason` is None when it is the one asked for.
    """

    id: str
    name: str
    model: Model = field(repr=False)
    fallback_reason: str | None = None


class Embedded(NamedTuple):
    """Texts as vectors, in their order, and how many tokens they were; `model` is who made them."""

    model: str
    vectors: Sequence[Sequence[float]]
    tokens: int


class Catalogue(Protocol):
    """All models that this gateway can reach."""

    async def embed(
        self, model_id: str, texts: Sequence[Any], dimensions: int | None = None
    ) -> Embedded:
        """Return the texts, or lists of their tokens, as vectors of an embedding model.

        An empty `model_id` is the one of the settings. Raises GatewayError `unknown_model`, and
        ModelError when the provider refuses or fails.
        """
        ...

    async def usable(self) -> Sequence[str]:
        """Return the ids of some models that can be used now, for a person to choose from.

        The built-in one is the last. Local servers are probed now; it takes nothing else.
        """
        ...

    async def list(self) -> list[ModelInfo]:
        """Return every known model, the built-in one last; local servers are probed now.

        Raises GatewayError `overloaded` when what is known of them cannot be read now.
        """
        ...

    def resolve(self, model_id: str) -> Dispatch:
        """Return the model with this `provider:model` string.

        Raises GatewayError `unknown_model` when the provider is unknown, the string is malformed,
        or the provider has no key; the message says what to do.
        """
        ...

    async def stand_in(self, model_id: str) -> Dispatch:
        """Return what may answer when the profile's own model has no key.

        That is a running local model, else the built-in one; never a cloud provider. Raises
        GatewayError `unknown_model` as `resolve` does when it is the model string that is wrong.
        """
        ...

    async def price(self, model_id: str, usage: Usage) -> Usage:
        """Return the usage with `model` and `cost_usd` filled in; an unknown price stays None."""
        ...

    async def window(self, model_id: str) -> int | None:
        """Return how many tokens prompt and answer may have together; None when it is unknown."""
        ...

    async def close(self) -> None:
        """Close every connection to a provider."""
        ...
