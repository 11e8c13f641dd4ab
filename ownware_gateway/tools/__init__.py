"""What an agent may do: the contract of a tool."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Protocol

if TYPE_CHECKING:
    from ownware_gateway.profile import Profile

#: Most bytes of a tool's output that reach the log and the model; the rest is cut and said so.
OUTPUT_LIMIT_BYTES: Final = 65_536

#: How long a call may take unless its tool says otherwise.
TIMEOUT_S: Final = 120.0


class ToolFailed(Exception):
    """A call went wrong in a way the model can act on; the message is its result."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a call gave back: at most `OUTPUT_LIMIT_BYTES` of text, and how much there was."""

    text: str
    truncated: bool = False
    bytes_raw: int = 0
    is_error: bool = False


@dataclass(frozen=True, slots=True)
class Context:
    """Where and how a call runs.

    `workspace` is the only folder that file tools may touch; `environment` is all that a child
    process gets of the gateway's own; `progress` takes a line for people who watch.
    """

    workspace: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    progress: Callable[[str], None] = lambda line: None


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
    is its result.
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
    note = f"\n[cut: {len(raw)} bytes in all, the first {limit_bytes} are shown]"
    return Output(
        raw[:limit_bytes].decode("utf-8", "ignore") + note, truncated=True, bytes_raw=len(raw)
    )


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
    if problem.validator in ("required", "additionalProperties"):
        return str(problem.message)
    return f"it must fit {problem.validator}: {json.dumps(problem.validator_value)}"
