"""What an agent may do: the contract of a tool."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple, Protocol

from ownware_gateway.masking import without_begun
from ownware_gateway.processes import Watchdog

if TYPE_CHECKING:
    from ownware_gateway.profile import Profile

#: Most bytes of a tool's output that the model is told; the rest is cut and said so.
OUTPUT_LIMIT_BYTES: Final = 65_536

#: Most bytes of an output that was cut which are kept beside the log, to be read on in.
KEPT_BYTES_MAX: Final = 8 * 1_048_576

#: What may stand beside the text of one output: so many parts, so much of each, so much together.
PARTS_MAX: Final = 16
PART_BYTES_MAX: Final = 4 * 1_048_576
PARTS_BYTES_MAX: Final = 16 * 1_048_576

#: Structured values stand in the event, for every client to read: so long together, so deep.
VALUE_BYTES_MAX: Final = 65_536
VALUE_DEPTH_MAX: Final = 64

#: How long a call may take unless its tool says otherwise.
TIMEOUT_S: Final = 120.0

#: How deep arguments may be nested: what looks at them goes as deep as they do.
ARGUMENTS_DEPTH_MAX: Final = 64


class ToolFailed(Exception):
    """A call went wrong in a way the model can act on; the message is its result."""


class Value(NamedTuple):
    """A part of an output: what it says as a JSON value, for programs."""

    value: Any


class Image(NamedTuple):
    """A part of an output: an image, which the model is shown where it can see."""

    mime_type: str
    data: bytes


class Resource(NamedTuple):
    """A part of an output: a document or other file. `body` is None where there is only its name.

    `size_bytes` is what is said of one that is not there.
    """

    uri: str
    mime_type: str = ""
    body: str | bytes | None = None
    size_bytes: int | None = None


Part = Value | Image | Resource


class Whole(NamedTuple):
    """All of a text of which the model is told a part: it is kept, to be read on in.

    `text` has at most `KEPT_BYTES_MAX` bytes. Of it the first `head_bytes` and the last
    `tail_bytes` are told, with `gap` in between, which says so, and `end` under it.
    """

    text: str
    head_bytes: int
    gap: str
    tail_bytes: int = 0
    end: str = ""

    def told(self, text: str) -> str:
        """Return what is told of the text, or of what it has become with its secrets masked."""
        raw = text.encode("utf-8", "replace")
        if len(raw) <= self.head_bytes + self.tail_bytes:
            return raw.decode() + self.end
        head = raw[: self.head_bytes].decode("utf-8", "ignore")
        tail = raw[len(raw) - self.tail_bytes :].decode("utf-8", "ignore")
        return head + self.gap + tail + self.end


@dataclass(frozen=True, slots=True)
class Output:
    """What a call gave back: text for the model, at most `OUTPUT_LIMIT_BYTES`, and parts beside it.

    `whole` is what the text was cut from. The text says of each part that there is one: a model
    that cannot see reads no more than that.
    """

    text: str
    truncated: bool = False
    bytes_raw: int = 0
    is_error: bool = False
    content: Sequence[Part] = ()
    whole: Whole | None = field(default=None, repr=False)


async def _nothing_kept(_tool_call_id: str) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Context:
    """Where and how a call runs.

    `workspace` is the only folder that file tools may touch; `environment` is all that a child
    process gets of the gateway's own; `progress` takes a line for people who watch; `kept` returns
    the whole output of an earlier call of this conversation, None where none was kept; `watchdog`
    kills child processes that outlive the gateway.
    """

    workspace: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    progress: Callable[[str], None] = lambda line: None
    kept: Callable[[str], Awaitable[str | None]] = _nothing_kept
    watchdog: Watchdog | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool. `call` gets arguments that already fit `input_schema`.

    It returns text or an `Output`, raises ToolFailed for what the model can act on, and undoes
    what it holds (child processes included) when it is cancelled: on a cancelled run, and after
    `timeout_s`. `reads_only` tools need nobody's permission under mode `ask`. `safe_to_repeat`
    tools may run again after a crash cut them off. `subject` gives what a rule or a person's
    `always` is about, beside the tool's name: for the shell, the command. `exact` tools have none,
    and yet an `always` covers only the very same call. `reads` says what its output may show of the
    paths in its arguments: a file, all files of a folder, or no content. `origin` is set for a tool
    of another program: it tells which, as part of what a person decides about; the schema is then
    not ours, and that program checks the arguments. `asks` tools do not run: a call is a question
    to a person, `question` with perhaps `options` and `multiple` of its arguments, and the answer
    is its result. Tools `by_client` do not run here either: whoever started the run brought them,
    and makes their calls; `strict` ones want arguments that fit their schema, of the provider.
    """

    name: str
    description: str
    input_schema: dict[str, Any]
    call: Callable[[Context, dict[str, Any]], Awaitable[Output]] = field(repr=False)
    reads_only: bool = False
    safe_to_repeat: bool = False
    timeout_s: float = TIMEOUT_S
    reads: Literal["nothing", "file", "folder"] = "file"
    subject: Callable[[dict[str, Any]], str] | None = field(default=None, repr=False)
    exact: bool = False
    asks: bool = False
    origin: str = ""
    by_client: bool = False
    strict: bool = False

    @property
    def identity(self) -> str:
        """What tells this tool from any other, of the same name in another profile for example."""
        return f"{self.name} {self.origin}" if self.origin else self.name


class Source(Protocol):
    """Where tools of a profile come from that are not built in: MCP servers, for example."""

    async def connect(self, profile: "Profile") -> None:
        """Make ready what a profile's agent uses; return once it is, or cannot be for now."""
        ...

    def tools(self, profile: "Profile") -> Mapping[str, Tool]:
        """Return the tools that there are for a profile now, by name."""
        ...

    def missing(self, profile: "Profile") -> Mapping[str, str]:
        """Return what cannot be used now, by what its tools' names begin with, and why.

        Each is a sentence, for people and for the model.
        """
        ...


def clip(text: str, limit_bytes: int = OUTPUT_LIMIT_BYTES) -> Output:
    """Return the text as an output, cut to the limit with a sentence that says so."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= limit_bytes:
        return Output(raw.decode(), bytes_raw=len(raw))
    gap = f"\n[cut: {len(raw)} bytes in all, the first {limit_bytes} are shown]"
    return cut(Whole(keepable(raw), limit_bytes, gap), len(raw))


def cut(whole: Whole, bytes_raw: int) -> Output:
    """Return the output of which the model is told a part; `bytes_raw` is how much there was."""
    return Output(whole.told(whole.text), truncated=True, bytes_raw=bytes_raw, whole=whole)


def keepable(raw: bytes) -> str:
    """Return as much of the beginning of a text in UTF-8 as may be kept."""
    if len(raw) <= KEPT_BYTES_MAX:
        return raw.decode()
    return without_begun(raw[:KEPT_BYTES_MAX].decode("utf-8", "ignore"))


class _Schemas:
    """What knows JSON Schema: imported for the first call, since it is large and slow to come."""

    validator: ClassVar[Any] = None

    @classmethod
    def load(cls) -> None:
        import jsonschema

        cls.validator = jsonschema.Draft202012Validator


async def load_schemas() -> None:
    """Load what `parse_arguments` needs, away from the event loop, which it would hold up."""
    if _Schemas.validator is None:
        # There may be no file handle left to read it with; parse_arguments tries again.
        with suppress(OSError, ImportError):
            await asyncio.to_thread(_Schemas.load)


def parse_arguments(tool: Tool, text: str) -> dict[str, Any]:
    """Return the arguments that a model wrote for a tool, checked against its schema.

    Raises ToolFailed with what is wrong and where, for the model to correct.
    """
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ToolFailed(f"The arguments of {tool.name} are not JSON: {error}.") from None
    if _is_deep(arguments):
        raise ToolFailed(
            f"The arguments of {tool.name} are nested more than {ARGUMENTS_DEPTH_MAX} deep."
        )
    if tool.origin:
        return _of_another(tool, arguments)
    if _Schemas.validator is None:
        try:
            _Schemas.load()
        except (OSError, ImportError) as error:
            raise ToolFailed(
                f"The arguments of {tool.name} cannot be checked now: {error}. Try again."
            ) from None
    validator = _Schemas.validator(tool.input_schema)
    problems = sorted(validator.iter_errors(arguments), key=lambda problem: list(problem.path))
    if problems:
        said = "; ".join(f"{item.json_path}: {_said(item)}" for item in problems[:5])
        raise ToolFailed(f"The arguments of {tool.name} do not fit: {said[:1000]}.")
    assert isinstance(arguments, dict), tool.input_schema
    return arguments


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(ARGUMENTS_DEPTH_MAX + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inner for item in items]
    return bool(level)


def _of_another(tool: Tool, arguments: Any) -> dict[str, Any]:
    """Return the arguments for another program, checked no further than is safe.

    Its schema may hold a pattern that takes for ever, or references to fetch.
    """
    if not isinstance(arguments, dict):
        raise ToolFailed(f"The arguments of {tool.name} must be an object.")
    required = tool.input_schema.get("required")
    if isinstance(required, list):
        missing = [name for name in required if isinstance(name, str) and name not in arguments]
        if missing:
            names = ", ".join(missing[:5])
            raise ToolFailed(f"The arguments of {tool.name} do not fit: {names} missing.")
    return arguments


def _said(problem: Any) -> str:
    """Return what is wrong without the value, which may be a secret."""
    wanted = problem.validator_value
    match problem.validator:
        case "required":
            return str(problem.message)
        case "additionalProperties":
            known = ", ".join(problem.schema.get("properties", ())) or "none"
            return f"{problem.message}; known are: {known}"
        case "type":
            kinds = wanted if isinstance(wanted, list) else [wanted]
            return f"it must be of the type {' or '.join(kinds)}, not {_type(problem.instance)}"
        case "enum":
            return f"it must be one of: {', '.join(map(json.dumps, wanted))}"
        case _:
            return f"it must fit {problem.validator}: {json.dumps(wanted)}"


def _type(value: Any) -> str:
    """Return what JSON Schema calls the type of a value."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number" if isinstance(value, float) else "integer"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"
