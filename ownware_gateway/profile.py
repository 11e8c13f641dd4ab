"""Profiles: who an agent is. A folder holds one per sub-folder: `agent.json` and `SOUL.md`.

Files are read again when they change, without a restart; a run keeps the version it started with.
A file that is wrong is named, with the field and what was expected, and takes no other down.
docs/profiles.md describes every field; a test holds it complete.
"""

import difflib
import json
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError, PydanticSerializationError

from ownware_gateway.errors import GatewayError
from ownware_gateway.masking import MASK

AGENT_FILES: Final = ("agent.json", "agent.yaml", "agent.yml")
FILE_BYTES_MAX: Final = 1_048_576
PROBLEMS_SHOWN_MAX: Final = 5

#: Most rules of a profile, most conditions of a rule, and most texts of a condition.
POLICIES_MAX: Final = 200
CONDITIONS_MAX: Final = 20
TEXTS_MAX: Final = 200
TEXT_CHARS_MAX: Final = 1000
_UNITS_MS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

#: Stands between an MCP server's name and its tool's: `server__tool`.
SEPARATOR: Final = "__"

#: Stands in a server's settings for a variable of the gateway's own environment.
VARIABLE: Final = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")

#: Fields whose values may be secrets: they are shown to nobody.
_SECRET_FIELDS: Final = frozenset({"env", "headers"})

Preset = Literal["full", "coding", "readonly", "none"]
PermissionMode = Literal["auto", "ask", "deny", "allowlist"]
Decision = Literal["allow", "ask", "deny"]
Transport = Literal["stdio", "http", "sse"]

#: With the separator in it, or an underscore at its end, `server__tool` could be read in two ways.
ServerName = Annotated[
    str, Field(max_length=32, pattern=r"^[A-Za-z0-9]+(?:(?:_|-+)[A-Za-z0-9]+)*$")
]

#: The tool that the rules of kind `shell` are about unless they name another.
SHELL: Final = "shell_execute"


def parse_duration_ms(value: object) -> object:
    """Return milliseconds from `"30m"`, `"90s"`, `"2h"`, `"1d"`, or a number of milliseconds."""
    if isinstance(value, str) and (
        found := re.fullmatch(r"([0-9]{1,15})\s*(ms|s|m|h|d)", value.strip())
    ):
        return int(found[1]) * _UNITS_MS[found[2]]
    if isinstance(value, str):
        raise ValueError('a duration like "30m", "90s", "2h" or "1d", or milliseconds')
    return value


DurationMs = Annotated[int, BeforeValidator(parse_duration_ms), Field(gt=0, le=30 * 86_400_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=False,
        validate_by_alias=True,
        serialize_by_alias=True,
        extra="forbid",
        frozen=True,
        strict=True,
        defer_build=True,
    )


class McpServer(_Strict):
    """An MCP server: a program to start (`command`), or an address to call (`url`).

    `${env:NAME}` in `args`, `env`, `url` and `headers` stands for a variable of the gateway's own
    environment. What a server says about its tools counts for permissions only when `trusted`.
    """

    transport: Transport = "stdio"
    command: str | None = Field(default=None, min_length=1)
    args: list[str] = Field(default_factory=list, max_length=256)
    env: dict[str, str] = Field(default_factory=dict)
    url: str | None = Field(default=None, pattern=r"^https?://[^\s/]+")
    headers: dict[str, str] = Field(default_factory=dict)
    description: str = ""
    enabled: bool = True
    trusted: bool = False
    start_timeout: DurationMs = 30_000
    call_timeout: DurationMs = 120_000

    @model_validator(mode="before")
    @classmethod
    def _words_of_others(cls, data: Any) -> Any:
        """Take the names that files of other programs have for the same thing."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if "type" in data and "transport" not in data:
            data["transport"] = data.pop("type")
        if data.get("transport") in ("streamable-http", "streamableHttp", "streamable_http"):
            data["transport"] = "http"
        if "transport" not in data and "url" in data:
            data["transport"] = "http"
        return data

    @model_validator(mode="after")
    def _one_way_to_reach_it(self) -> Self:
        # Its own kind of error, because that of a ValueError quotes all fields, secrets included.
        if self.transport == "stdio" and (self.command is None or self.url or self.headers):
            raise PydanticCustomError(
                "mcp_server", "a server of transport stdio has a 'command', no 'url' or 'headers'"
            )
        if self.transport != "stdio" and (self.url is None or self.command or self.env):
            raise PydanticCustomError(
                "mcp_server", "a server of transport http or sse has a 'url', no 'command' or 'env'"
            )
        return self

    def shown(self) -> dict[str, Any]:
        """Return the settings as people may see them, without values that may be secret."""
        fields = self.model_dump(mode="json")
        for name in _SECRET_FIELDS:
            fields[name] = {
                key: value if VARIABLE.fullmatch(value) else MASK
                for key, value in fields[name].items()
            }
        if self.url is not None:
            # A login or a query may hold one.
            fields["url"] = re.sub(r"(?<=://)[^/@]*@", "", self.url.partition("?")[0])
        return fields


class Tools(_Strict):
    """Which tools the agent has: a preset, and what is added to it or taken away by name.

    `server__*` in `allow` and `deny` stands for all tools of an MCP server.
    """

    preset: Preset = "full"
    allow: list[str] = Field(default_factory=list)
    deny: list[str] = Field(default_factory=list)
    mcp: dict[ServerName, McpServer] = Field(default_factory=dict, max_length=64)

    def allows(self, name: str) -> bool:
        """Whether `allow` names a tool, by itself or with its server."""
        return _listed(name, self.allow)

    def denies(self, name: str) -> bool:
        """Whether `deny` names a tool, by itself or with its server."""
        return _listed(name, self.deny)


def _listed(name: str, names: list[str]) -> bool:
    server, separator, _ = name.partition(SEPARATOR)
    return name in names or (bool(separator) and f"{server}{SEPARATOR}*" in names)


class Security(_Strict):
    """When a person is asked, and how long the run waits for an answer."""

    permission_mode: PermissionMode = "ask"
    hitl_timeout_ms: DurationMs = 1_800_000


class Execution(_Strict):
    """What a run may take: active time, and money in US dollars."""

    timeout: DurationMs = 1_800_000
    max_cost_usd: float | None = Field(default=None, gt=0, allow_inf_nan=False)


def _one_or_more(value: object) -> object:
    return [value] if isinstance(value, str) else value


def check_prefix(text: str) -> str:
    """Return a command's beginning. Raises ValueError when no command could begin so."""
    from ownware_gateway.shell_syntax import parse

    script = parse(text)
    own = [command for command in script.commands if not command.given]
    if not (script.plain and len(own) == 1 and own[0].plain and text.isprintable()) or (
        # Whatever the shell takes for more than words is none of these.
        shlex.split(text) != [word.text for word in own[0].words]
    ):
        raise ValueError(
            'the first words of one command, like "git status", without any of ; & | < > ( ) $ ` #'
            " and wild cards outside of quotes"
        )
    return text


def check_glob(text: str) -> str:
    """Return a pattern of paths. Raises ValueError when no path could fit it."""
    parts = text.removeprefix("/").split("/")
    if "" in parts or "." in parts or ".." in parts:
        raise ValueError(
            'a pattern of paths in the workspace, like "secrets/**", or of absolute ones, without'
            " empty parts, '.' and '..'"
        )
    return text


_Texts = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=TEXT_CHARS_MAX)]],
    BeforeValidator(_one_or_more),
    Field(min_length=1, max_length=TEXTS_MAX),
]


def _absent(value: object) -> bool:
    return value is None


class Condition(_Strict):
    """What an argument must be for a rule to fit: exactly one of these, one of its texts."""

    prefix: _Texts | None = Field(default=None, exclude_if=_absent)
    glob: _Texts | None = Field(default=None, exclude_if=_absent)
    pattern: _Texts | None = Field(default=None, exclude_if=_absent)
    equals: str | bool | int | float | None = Field(default=None, exclude_if=_absent)

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [self.prefix, self.glob, self.pattern, self.equals]
        if sum(value is not None for value in given) != 1:
            raise ValueError("exactly one of prefix, glob, pattern and equals")
        for text in self.prefix or ():
            check_prefix(text)
        for text in self.glob or ():
            check_glob(text)
        return self


class Policy(_Strict):
    """A rule: which tool, with which arguments, and what is decided.

    One of kind `shell` is short for two: commands that fit `denyPatterns` are denied, those that
    begin with `allowPrefixes` are allowed, and all others are left to the rules that follow.
    """

    kind: Literal["rule", "shell"] = "rule"
    tool: str = Field(default="", max_length=128, pattern=r"^[A-Za-z0-9_.*?-]*$")
    when: dict[str, Condition] = Field(default_factory=dict, max_length=CONDITIONS_MAX)
    decision: Decision | None = Field(default=None, exclude_if=_absent)
    allow_prefixes: _Texts | None = Field(default=None, exclude_if=_absent)
    deny_patterns: _Texts | None = Field(default=None, exclude_if=_absent)

    @field_validator("allow_prefixes")
    @classmethod
    def _prefixes(cls, texts: list[str] | None) -> list[str] | None:
        return texts and [check_prefix(text) for text in texts]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        lists = self.allow_prefixes or self.deny_patterns
        if self.kind == "rule" and (lists or self.decision is None or not self.tool):
            raise ValueError(
                "a tool and a decision; allowPrefixes and denyPatterns are for the kind 'shell'"
            )
        if self.kind == "shell" and (not lists or self.decision is not None or self.when):
            raise ValueError(
                "allowPrefixes or denyPatterns, and neither when nor decision in the kind 'shell'"
            )
        return self

    @property
    def tools(self) -> str:
        """The pattern of the names of the tools that it is about."""
        return self.tool or SHELL

    @property
    def arguments(self) -> set[str]:
        """The arguments that it looks at."""
        return {"command"} if self.kind == "shell" else set(self.when)


class Profile(_Strict):
    """An agent as its files describe it. `soul` is the text of SOUL.md."""

    name: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    model: str = Field(default="openai:gpt-5.5", pattern=r"^[a-z][a-z0-9_-]*:.+$")
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    max_tokens: int | None = Field(default=None, gt=0)
    max_turns: int = Field(default=100, gt=0, le=10_000)
    thinking: Literal["off", "low", "medium", "high"] | None = None
    tools: Tools = Field(default_factory=Tools)
    security: Security = Field(default_factory=Security)
    policies: list[Policy] = Field(default_factory=list, max_length=POLICIES_MAX)
    execution: Execution = Field(default_factory=Execution)
    system_prompt: str = ""
    soul: str = Field(default="", exclude=True)

    @property
    def instructions(self) -> str:
        """The system prompt: SOUL.md, then `systemPrompt`."""
        return "\n\n".join(part.strip() for part in (self.soul, self.system_prompt) if part.strip())

    def dump(self) -> str:
        """Return all of the profile as JSON, for a run to keep the version it started with."""
        return json.dumps(self.model_dump(mode="json") | {"soul": self.soul})

    @staticmethod
    def restore(text: str) -> "Profile":
        """Return the profile that `dump` wrote."""
        return Profile.model_validate_json(text)


@dataclass(frozen=True, slots=True)
class Broken:
    """A profile folder whose files are wrong, and a sentence that says how."""

    folder: str
    message: str


@dataclass(frozen=True, slots=True)
class Known:
    """What a profile may name: tools, and the gateway's MCP servers as they are now.

    `tools` holds the schemas of each one's arguments, by their names. `mcp_missing` says why MCP
    servers cannot be used at all, if they cannot.
    """

    tools: Mapping[str, Mapping[str, Any]]
    servers: Callable[[], Collection[str]] = tuple
    mcp_missing: str | None = None


class Profiles:
    """The profiles in a folder, always as they are on disk now."""

    def __init__(self, folder: Path, known: Known | None = None) -> None:
        """`known` is what a profile may name; None does not look at names."""
        self._folder = folder
        self._known = known
        self._read: dict[Path, tuple[list[bytes], Profile | Broken]] = {}

    def all(self) -> list[Profile]:
        """Return the usable profiles, by name."""
        found: dict[str, Profile] = {}
        for item in self._load():
            if isinstance(item, Profile):
                found.setdefault(item.name, item)
        return sorted(found.values(), key=lambda profile: profile.name)

    def broken(self) -> list[Broken]:
        """Return what is wrong with the others."""
        items = list(self._load())
        wrong = [item for item in items if isinstance(item, Broken)]
        names = [item.name for item in items if isinstance(item, Profile)]
        wrong += [
            Broken(name, f"Two folders hold a profile named {name!r}; the first one is used.")
            for name in sorted({name for name in names if names.count(name) > 1})
        ]
        return wrong

    def is_broken(self, name: str) -> bool:
        """Whether the profile's folder is there and its files are wrong, half saved perhaps."""
        return any(item.folder == name for item in self.broken())

    def _check(self, folder: Path, item: Profile | Broken) -> Profile | Broken:
        """Return the profile unless it names a tool or an argument that there is not.

        A misspelt name in `deny`, or in a rule, would leave on what was to be taken away.
        """
        known = self._known
        if isinstance(item, Broken) or known is None:
            return item
        if item.tools.mcp and known.mcp_missing is not None:
            return Broken(folder.name, known.mcp_missing)
        servers = _servers_named(item, known)
        for field in ("allow", "deny"):
            for name in getattr(item.tools, field):
                if (wrong := _unknown(name, known.tools, servers)) is not None:
                    message = f"The field 'tools.{field}' names no tool with {name!r}; {wrong}"
                    return Broken(folder.name, message)
        for index, policy in enumerate(item.policies):
            wrong = _never(policy, known, servers) or _hidden(policy, item.policies[:index])
            if wrong is not None:
                return Broken(folder.name, f"The field 'policies.{index}' can never fit: {wrong}")
        return item

    def get(self, name: str) -> Profile:
        """Return the profile of this name.

        Raises GatewayError `not_found`; its message says what is wrong with the profile's file,
        if that is the reason, or which name is near.
        """
        profiles = self.all()
        for profile in profiles:
            if profile.name == name:
                return profile
        for item in self._load():
            if isinstance(item, Broken) and item.folder == name:
                raise GatewayError(
                    "not_found", f"The profile {name!r} cannot be used. {item.message}"
                )
        names = [profile.name for profile in profiles]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        if not near:
            hint = f" There are: {', '.join(names)}." if names else " There are no profiles."
        raise GatewayError("not_found", f"There is no profile named {name!r}.{hint}")

    def _load(self) -> Iterator[Profile | Broken]:
        try:
            folders = sorted(self._folder.iterdir()) if self._folder.is_dir() else []
        except OSError as error:
            yield Broken(self._folder.name, f"The profiles cannot be read: {error.strerror}.")
            return
        for folder in folders:
            try:
                found = [file for name in AGENT_FILES if (file := folder / name).is_file()]
                if found:
                    yield self._check(folder, self._load_one(folder, found[0]))
            except OSError as error:
                yield Broken(
                    folder.name, f"A file of {folder.name} cannot be read: {error.strerror}."
                )
        self._read = {folder: read for folder, read in self._read.items() if folder in set(folders)}

    def _load_one(self, folder: Path, file: Path) -> Profile | Broken:
        soul = folder / "SOUL.md"
        # What a file says is compared, not its time: two edits may fall into one tick of a clock.
        read = [_read(path) if path.is_file() else b"" for path in (file, soul)]
        known = self._read.get(folder)
        if known is None or known[0] != read:
            self._read[folder] = known = (read, _understand(folder, file.name, *read))
        return known[1]


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names := sorted(names), n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names) or 'none'}."


def _servers_named(item: Profile, known: Known) -> set[str]:
    """Return the servers whose tools a profile may name."""
    names = (*item.tools.allow, *item.tools.deny, *(policy.tools for policy in item.policies))
    # The gateway's are read from files: not for a profile that names none.
    gateway = known.servers() if any(SEPARATOR in name for name in names) else ()
    return {*item.tools.mcp, *gateway}


def _unknown(name: str, tools: Collection[str], servers: Collection[str]) -> str | None:
    """Return what is wrong with the name of a tool; an MCP server's tools come and go."""
    server, separator, tool = name.partition(SEPARATOR)
    if separator and tool:
        return _no_server(server, servers)
    return None if name in tools else _near(name, tools)


def _no_server(name: str, servers: Collection[str]) -> str | None:
    """Return that there is no such MCP server; None when there is."""
    if name in servers:
        return None
    return f"no MCP server is named {name!r}, {_near(name, servers)}"


def _never(policy: Policy, known: Known, servers: Collection[str]) -> str | None:
    """Return why a rule fits no call of any tool; None when it may fit one."""
    server, separator, _ = policy.tools.partition(SEPARATOR)
    if separator:
        # What a server's tools are called, and take, is only known when it runs.
        return None if {"*", "?"} & set(server) else _no_server(server, servers)
    matched = [name for name in known.tools if fnmatchcase(name, policy.tools)]
    if not matched:
        return f"there is no tool {policy.tools!r}; {_near(policy.tools, known.tools)}"
    if policy.tools == "*":
        return None  # Tools of servers are meant too.
    for argument in policy.arguments:
        names = {name for tool in matched for name in known.tools[tool]}
        if argument not in names:
            return f"{policy.tools} has no argument {argument!r}; {_near(argument, names)}"
    for argument, condition in policy.when.items():
        if SHELL in matched and argument == "command" and condition.glob is not None:
            return "glob is for paths; prefix and pattern are for commands."
    return None


def _hidden(policy: Policy, before: Sequence[Policy]) -> str | None:
    """Return why a rule is never reached: one before it fits whatever it does."""
    for index, other in enumerate(before):
        covers = other.tools in ("*", policy.tools) or (
            not set(policy.tools) & {"*", "?"} and fnmatchcase(policy.tools, other.tools)
        )
        if other.kind == "rule" and not other.when and covers:
            return f"the first rule that fits decides, and policies.{index} fits every such call."
    return None


def _read(path: Path) -> bytes:
    with path.open("rb") as opened:
        return opened.read(FILE_BYTES_MAX + 1)


def _understand(folder: Path, name: str, agent: bytes, soul: bytes) -> Profile | Broken:
    where = f"{folder.name}/{name}"
    for part, said in ((name, agent), ("SOUL.md", soul)):
        if len(said) > FILE_BYTES_MAX:
            return Broken(folder.name, f"{folder.name}/{part} is over {FILE_BYTES_MAX} bytes.")
    try:
        soul_text = soul.decode("utf-8-sig")
        data = _parse(name, agent.decode("utf-8-sig"))
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
        return Broken(folder.name, f"A file of {folder.name} cannot be read: {reason}.")
    except ValueError as error:
        return Broken(folder.name, f"{where} is not {error}.")
    if not isinstance(data, dict):
        return Broken(folder.name, f'{where} must hold an object, like {{"name": "assistant"}}.')
    if "soul" in data:
        return Broken(folder.name, f"{where}: the field 'soul' is the text of SOUL.md beside it.")
    try:
        profile = Profile.model_validate({**data, "soul": soul_text})
        profile.model_dump_json()
    except ValidationError as error:
        return Broken(folder.name, f"{where}: {explain(error, Profile)}")
    except PydanticSerializationError:
        return Broken(folder.name, f"{where} holds half a character, like \\ud800 alone.")
    return profile


def _parse(name: str, text: str) -> Any:
    """Return what a file holds. Raises ValueError: what it is not, and where."""
    kind = "JSON" if name.endswith(".json") else "YAML"
    try:
        return json.loads(text) if kind == "JSON" else _parse_yaml(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"JSON: {error.msg} at {where}") from error
    except RecursionError as error:
        raise ValueError(f"{kind} that can be used: it is nested too deep") from error
    # A number or a date that Python cannot hold is a plain ValueError in both formats.
    except ValueError as error:
        raise ValueError(f"{kind}: {' '.join(str(error).split())}".rstrip(".")) from error


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return a validation's problems as sentences: field path, expected, nearest known name."""
    problems = error.errors()
    said = [_explain_one(problem, model) for problem in problems[:PROBLEMS_SHOWN_MAX]]
    if len(problems) > PROBLEMS_SHOWN_MAX:
        said.append(f"And {len(problems) - PROBLEMS_SHOWN_MAX} more.")
    return " ".join(said)


def _explain_one(problem: Any, model: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        names = _names(model, problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(names)}."
        return f"There is no field {path!r}; {hint}"
    if problem["type"] == "missing":
        return f"The field {path!r} is required."
    if problem["type"] == "mcp_server":
        return f"The field {path!r} is wrong: {problem['msg']}."
    expected = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    expected = re.sub(r"a valid dictionary or instance of \w+", "an object", expected)
    if not _SECRET_FIELDS.isdisjoint(problem["loc"]):
        return f"The field {path!r} is of another kind; expected: {expected}."
    try:
        given = json.dumps(problem["input"], default=str)
    except (TypeError, ValueError):  # YAML has keys, and loops, that JSON has not
        given = str(problem["input"])
    given = given if len(given) <= 80 else given[:77] + "..."
    return f"The field {path!r} is {given}; expected: {expected}."


def _names(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Return the field names that are known at a path of a model, as they stand in a file."""
    kind: Any = model
    for part in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields = kind.model_fields.items()
            found = [info.annotation for name, info in fields if part in (name, info.alias)]
        else:
            # The number of an item or the name of an entry: what is in the list or object.
            found = list(get_args(kind)[-1:])
        if not found:
            return []
        kind = found[0]
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return []
    return [info.alias or name for name, info in kind.model_fields.items() if name != "soul"]
