"""The vocabulary: everything that can happen in a run, as it stands in the log and on the wire.

Field names are snake_case here and camelCase on the wire. `seq` is not a field: the log assigns it
when it stores an event. docs/protocol.md describes every type and field; a test holds it complete.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticSerializationError

StopReason = Literal[
    "end_turn",
    "tool_use",
    "max_tokens",
    "max_turns",
    "budget_exceeded",
    "aborted",
    "error",
    "refusal",
    "pause_turn",
    "stop_sequence",
]
RunStatus = Literal[
    "accepted",
    "running",
    "waiting",
    "cancel_requested",
    "succeeded",
    "failed",
    "cancelled",
    "timed_out",
]
EndStatus = Literal["succeeded", "failed", "cancelled", "timed_out"]
Decision = Literal["allow", "deny"]
DecidedBy = Literal["user", "policy", "cancel", "timeout"]
AgentStatus = Literal["completed", "error", "aborted"]


def _absent(value: object) -> bool:
    return value is None


def _join_surrogates(value: Any) -> Any:
    """Return the value with surrogate pairs joined in its text and lone halves replaced."""
    match value:
        case str():
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case dict():
            return {_join_surrogates(key): _join_surrogates(item) for key, item in value.items()}
        case list():
            return [_join_surrogates(item) for item in value]
        case _:
            return value


class Wire(BaseModel):
    """A frozen record with camelCase names on the wire."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        frozen=True,
        protected_namespaces=(),
        defer_build=True,  # Each at its first use: the start of the gateway needs none.
    )


class Event(Wire):
    """Something that happened in a run."""

    type: str

    def encode(self) -> bytes:
        """Return the event as one line of JSON, without its seq."""
        try:
            return self.__pydantic_serializer__.to_json(self)
        except PydanticSerializationError:
            # Half of a surrogate pair, from a provider that cut a character in two.
            whole = _join_surrogates(self.model_dump(mode="python"))
            return type(self).model_validate(whole).encode()


class Usage(Wire):
    """What a model call, or a whole run, used.

    `input_tokens` counts the whole prompt; the two cache figures are the parts of it that were
    read from, or written to, the provider's cache. `cost_usd` is None when no price is known.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_creation_tokens: int = 0
    model: str = ""
    cost_usd: float | None = None

    def plus(self, other: "Usage") -> "Usage":
        """Return the sum; its cost is unknown as soon as one of the costs is."""
        cost = None
        if not self.model:
            cost = other.cost_usd
        elif self.cost_usd is not None and other.cost_usd is not None:
            cost = self.cost_usd + other.cost_usd
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cache_read_tokens=self.cache_read_tokens + other.cache_read_tokens,
            cache_creation_tokens=self.cache_creation_tokens + other.cache_creation_tokens,
            model=other.model,
            cost_usd=cost,
        )

    def plus_agent(self, other: "Usage") -> "Usage":
        """Return the sum with what an agent has used; the model named is still one's own."""
        if not other.model:
            return self  # It has asked none.
        return self.plus(other).model_copy(update={"model": self.model or other.model})


class Attachment(Wire):
    """A file that came with a message; its bytes are kept beside the log, not in it.

    `detail` is there for an image that is to be looked at more or less closely than usual.
    """

    filename: str
    mime_type: str
    size_bytes: int
    detail: str | None = Field(default=None, exclude_if=lambda value: value is None)


class Fallback(Wire):
    """Why another model answers than the profile names."""

    requested_model: str
    reason: str


class UserMessage(Event):
    """A person's message; the first event of every run."""

    type: Literal["user.message"] = "user.message"
    run_id: str
    text: str
    attachments: list[Attachment] | None = None
    timestamp: int


class SessionStart(Event):
    """The run begins; `model` is what is really asked."""

    type: Literal["session.start"] = "session.start"
    run_id: str
    session_id: str
    profile_id: str
    model: str
    fallback: Fallback | None = Field(default=None, exclude_if=_absent)
    timestamp: int


class TurnStart(Event):
    """One call of the model begins."""

    type: Literal["turn.start"] = "turn.start"
    turn_index: int
    timestamp: int


class TextDelta(Event):
    """A piece of the answer. A `notice` is the gateway speaking, not the model."""

    type: Literal["text.delta"] = "text.delta"
    text: str
    turn_index: int
    notice: bool = Field(default=False, exclude_if=lambda notice: not notice)


class TextComplete(Event):
    """The model's answer of this turn is whole; the text may be empty beside tool calls.

    It is the last event of every model call that was not cut off.
    """

    type: Literal["text.complete"] = "text.complete"
    text: str
    turn_index: int


class ThinkingDelta(Event):
    """A piece of the model's reasoning."""

    type: Literal["thinking.delta"] = "thinking.delta"
    text: str
    turn_index: int


class ThinkingComplete(Event):
    """The model's reasoning of this turn, whole."""

    type: Literal["thinking.complete"] = "thinking.complete"
    text: str
    turn_index: int


class ToolCallStart(Event):
    """The model asks for a tool; what with is not known yet."""

    type: Literal["tool.call.start"] = "tool.call.start"
    tool_call_id: str
    tool_name: str
    input: dict[str, Any] = Field(default_factory=dict)
    turn_index: int


class ToolCallArgsDelta(Event):
    """The arguments of a call as JSON text, secrets masked; sent whole, once."""

    type: Literal["tool.call.args_delta"] = "tool.call.args_delta"
    tool_call_id: str
    delta: str
    turn_index: int


class ToolCallExecute(Event):
    """The tool is about to run: committed before it has any effect.

    `decision` and `rule` are there where a rule of the profile allowed it.
    """

    type: Literal["tool.call.execute"] = "tool.call.execute"
    tool_call_id: str
    tool_name: str
    input: dict[str, Any]
    turn_index: int
    decision: Decision | None = Field(default=None, exclude_if=_absent)
    rule: str | None = Field(default=None, exclude_if=_absent)


class ToolCallProgress(Event):
    """A line of what a running tool has to say."""

    type: Literal["tool.call.progress"] = "tool.call.progress"
    tool_call_id: str
    progress: str
    turn_index: int


class ValuePart(Wire):
    """A part of a tool's output: a JSON value, secrets masked."""

    kind: Literal["json"] = "json"
    value: Any


class ImagePart(Wire):
    """A part of a tool's output: an image. Its bytes are kept beside the log, under `index`."""

    kind: Literal["image"] = "image"
    mime_type: str
    size_bytes: int = Field(ge=0)
    index: int = Field(ge=0)


class ResourcePart(Wire):
    """A part of a tool's output: a document or other file, kept under `index` if it was given."""

    kind: Literal["resource"] = "resource"
    uri: str
    mime_type: str
    size_bytes: int | None = Field(default=None, ge=0)
    index: int | None = Field(default=None, ge=0, exclude_if=_absent)


ContentPart = Annotated[ValuePart | ImagePart | ResourcePart, Field(discriminator="kind")]


class ToolCallEnd(Event):
    """How a call ended; `result` is what the model is told, secrets masked.

    `output_bytes_kept` is there where more of it is kept than `result` holds, `content` where there
    was more than text. `decision` and `rule` are there where a rule or a floor denied it.
    """

    type: Literal["tool.call.end"] = "tool.call.end"
    tool_call_id: str
    tool_name: str
    result: str
    is_error: bool
    duration_ms: int
    turn_index: int
    truncated: bool = False
    output_bytes_raw: int
    output_bytes_kept: int | None = Field(default=None, exclude_if=_absent)
    content: list[ContentPart] | None = Field(default=None, exclude_if=_absent)
    decision: Decision | None = Field(default=None, exclude_if=_absent)
    rule: str | None = Field(default=None, exclude_if=_absent)


class PermissionRequest(Event):
    """The run waits for a person's yes; `operation_hash` binds the answer to this very input.

    `rule` is what asks, where it is not the profile's mode. `agent_id` is there where another agent
    asks, which works for this one.
    """

    type: Literal["permission.request"] = "permission.request"
    request_id: str
    tool_call_id: str
    tool_name: str
    input: dict[str, Any]
    reason: str
    operation_hash: str
    expires_at: int
    turn_index: int
    rule: str | None = Field(default=None, exclude_if=_absent)
    agent_id: str | None = Field(default=None, exclude_if=_absent)


class PermissionResponse(Event):
    """The answer to a request; `always` extends it to the rest of the thread."""

    type: Literal["permission.response"] = "permission.response"
    request_id: str
    granted: bool
    decided_by: DecidedBy
    reason: str
    always: bool = Field(default=False, exclude_if=lambda always: not always)
    turn_index: int
    agent_id: str | None = Field(default=None, exclude_if=_absent)


class AgentSpawn(Event):
    """A call of this run is another agent's run from here on, in a stream of its own.

    In the append of the call's `tool.call.execute`: it is fixed which run it is before it begins.
    """

    type: Literal["agent.spawn"] = "agent.spawn"
    agent_id: str
    parent_agent_id: str
    run_id: str
    tool_call_id: str
    name: str
    profile_name: str
    model: str
    task: str
    time_left_ms: int
    ends_at: int | None = Field(default=None, exclude_if=_absent)
    max_cost_usd: float | None = Field(default=None, exclude_if=_absent)
    turn_index: int


class AgentComplete(Event):
    """An agent's run has ended; `result` is what the model is told of it.

    `known_cost_usd` is what is known of its cost, where the sum in `usage` is not.
    """

    type: Literal["agent.complete"] = "agent.complete"
    agent_id: str
    result: str
    status: AgentStatus
    error: str | None = Field(default=None, exclude_if=_absent)
    duration_ms: int
    usage: Usage | None = Field(default=None, exclude_if=_absent)
    known_cost_usd: float | None = Field(default=None, exclude_if=_absent)
    turn_count: int | None = Field(default=None, exclude_if=_absent)
    turn_index: int


class QuestionRequest(Event):
    """The run waits for a person's answer in words, to a question that the model has asked.

    `options` are what the model suggests, of which `multiple` may be chosen; any text answers.
    `operation_hash` binds the answer to this very question.
    """

    type: Literal["question.request"] = "question.request"
    request_id: str
    tool_call_id: str
    tool_name: str
    question: str
    options: list[str] | None
    multiple: bool
    operation_hash: str
    expires_at: int
    turn_index: int
    agent_id: str | None = Field(default=None, exclude_if=_absent)


class QuestionResponse(Event):
    """A person's answer to a question, secrets masked; None where there is none, and why."""

    type: Literal["question.response"] = "question.response"
    request_id: str
    answer: str | None
    decided_by: DecidedBy
    reason: str
    turn_index: int
    agent_id: str | None = Field(default=None, exclude_if=_absent)

    @property
    def granted(self) -> bool:
        """Whether there is an answer."""
        return self.answer is not None


class CalledTool(Wire):
    """A call that the client is to make; its arguments stand in `tool.call.args_delta`."""

    tool_call_id: str
    tool_name: str


class ClientCall(Event):
    """The run waits for what the client's own tools give back: all such calls of the turn at once.

    `usage` is what the model call has used that wants them: the turn's end comes with the results.
    """

    type: Literal["client.call"] = "client.call"
    request_id: str
    calls: list[CalledTool]
    operation_hash: str
    expires_at: int
    usage: Usage
    turn_index: int


class ToolResult(Wire):
    """What a tool of the client's gave back, secrets masked."""

    tool_call_id: str
    result: str


class ClientResult(Event):
    """The results of the client's tools, one for each call; None where there are none, and why."""

    type: Literal["client.result"] = "client.result"
    request_id: str
    results: list[ToolResult] | None
    decided_by: DecidedBy
    reason: str
    turn_index: int

    @property
    def granted(self) -> bool:
        """Whether there are results."""
        return self.results is not None


class TurnEnd(Event):
    """One turn is over: the model call and the tools it asked for."""

    type: Literal["turn.end"] = "turn.end"
    turn_index: int
    stop_reason: StopReason
    usage: Usage
    timestamp: int


class TurnInterrupted(Event):
    """The turn was cut off and the run ends here."""

    type: Literal["turn.interrupted"] = "turn.interrupted"
    turn_index: int
    reason: Literal["aborted", "timeout"]
    timestamp: int


class Recovery(Event):
    """Something went wrong and the run goes on; a superseded turn's text is not part of the answer.

    The text shown so far in turn `supersedes` is followed by a notice and asked for again.
    """

    type: Literal["recovery"] = "recovery"
    reason: Literal["rate_limit", "provider_error", "connection", "restart", "prompt_too_long"]
    attempt: int
    detail: str
    turn_index: int
    supersedes: int | None = Field(default=None, exclude_if=_absent)


class Position(Wire):
    """A place in a conversation: the end of a turn, or of a whole run where `turn_index` is None.

    Named and not numbered, so that it means the same in a fork and in a thread read from a file.
    """

    run_id: str
    turn_index: int | None = None


class ContextPressure(Event):
    """The prompt fills this share of the model's window; said when it rises over another mark."""

    type: Literal["context.pressure"] = "context.pressure"
    level: float
    token_count: int
    context_window: int
    turn_index: int


class ToolResultDrop(Event):
    """Tool results up to a place are left out of prompts from here on; the log keeps them.

    Of each its first `kept_chars` characters stay, and a sentence stands in place of the rest.
    """

    type: Literal["tool_result.drop"] = "tool_result.drop"
    dropped_count: int
    bytes_reclaimed: int
    kept_chars: int
    through: Position
    turn_index: int


class CompactionStart(Event):
    """What was said so far is about to be put into fewer words. It may be begun more than once."""

    type: Literal["compaction.start"] = "compaction.start"
    strategy: Literal["summary", "omission"]
    pre_token_count: int
    turn_index: int


class CompactionEnd(Event):
    """From here on `summary` stands in prompts for all up to `through`; the log keeps that.

    One that has failed changes nothing, and `detail` says why. `usage` is what the summary cost.
    """

    type: Literal["compaction.end"] = "compaction.end"
    strategy: Literal["summary", "omission"]
    status: Literal["succeeded", "failed"]
    pre_token_count: int
    post_token_count: int
    saved_percent: int
    summary: str | None = Field(default=None, exclude_if=_absent)
    through: Position | None = Field(default=None, exclude_if=_absent)
    usage: Usage | None = Field(default=None, exclude_if=_absent)
    detail: str | None = Field(default=None, exclude_if=_absent)
    turn_index: int


class RunCancel(Event):
    """Somebody wants the run to stop; from here on it can only end as cancelled."""

    type: Literal["run.cancel"] = "run.cancel"
    run_id: str
    requested_by: str


class Error(Event):
    """Something failed for good; the run ends."""

    type: Literal["error"] = "error"
    code: str
    message: str
    recoverable: bool
    turn_index: int | None = Field(default=None, exclude_if=_absent)


class SessionEnd(Event):
    """The run has ended; nothing of it follows."""

    type: Literal["session.end"] = "session.end"
    run_id: str
    session_id: str
    status: EndStatus
    reason: StopReason
    code: str | None = None
    total_usage: Usage
    turn_count: int
    timestamp: int


class StreamGap(Event):
    """Events that cannot be replayed stood here; it bears the number of the last of them."""

    type: Literal["stream.gap"] = "stream.gap"
    from_seq: int
    to_seq: int
    reason: Literal["retention", "restored", "deleted"]


AnyEvent = (
    UserMessage
    | SessionStart
    | TurnStart
    | TextDelta
    | TextComplete
    | ThinkingDelta
    | ThinkingComplete
    | ToolCallStart
    | ToolCallArgsDelta
    | ToolCallExecute
    | ToolCallProgress
    | ToolCallEnd
    | PermissionRequest
    | PermissionResponse
    | QuestionRequest
    | QuestionResponse
    | ClientCall
    | ClientResult
    | AgentSpawn
    | AgentComplete
    | TurnEnd
    | TurnInterrupted
    | Recovery
    | ContextPressure
    | ToolResultDrop
    | CompactionStart
    | CompactionEnd
    | RunCancel
    | Error
    | SessionEnd
    | StreamGap
)

EVENTS: Final[Mapping[str, type[Event]]] = {
    event.model_fields["type"].default: event for event in get_args(AnyEvent)
}

#: What a run waits with for somebody outside, and what comes back: a person, who is asked whether a
#: call may run or what the call itself asks, or a client whose tools are called. The one place that
#: says which these are; at most one of them is open in a thread.
Asks = PermissionRequest | QuestionRequest | ClientCall
Answers = PermissionResponse | QuestionResponse | ClientResult
ASKING: Final = frozenset(event.model_fields["type"].default for event in get_args(Asks))
ANSWERING: Final = frozenset(event.model_fields["type"].default for event in get_args(Answers))

#: What a person is asked, and the answers: they also stand in the stream over all threads and in
#: those of the agents above.
ASKED: Final = (ASKING | ANSWERING) - {"client.call", "client.result"}

#: Events that only show progress: what they say stands whole in a later event, so folds skip them.
DELTAS: Final = frozenset({"text.delta", "thinking.delta", "tool.call.progress"})


class _Decoder:
    """Builds the union's validator on first use: the start of the gateway needs none."""

    adapter: ClassVar[TypeAdapter[AnyEvent] | None] = None


def decode(payload: bytes) -> AnyEvent:
    """Return the event that a payload of the log holds.

    Raises pydantic.ValidationError for a payload that this version does not know.
    """
    if _Decoder.adapter is None:
        _Decoder.adapter = TypeAdapter(Annotated[AnyEvent, Field(discriminator="type")])
    return _Decoder.adapter.validate_json(payload)
