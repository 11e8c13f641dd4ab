"""Profiles: who an agent is. A folder holds one per sub-folder: `agent.json` and `SOUL.md`.

Files are read again when they change, without a restart; a run keeps the version it started with.
A file that is wrong is named, with the field and what was expected, and takes no other down.
docs/profiles.md describes every field; a test holds it complete.
"""

import difflib
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticSerializationError

from ownware_gateway.errors import GatewayError

AGENT_FILES: Final = ("agent.json", "agent.yaml", "agent.yml")
FILE_BYTES_MAX: Final = 1_048_576
PROBLEMS_SHOWN_MAX: Final = 5
_UNITS_MS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

Preset = Literal["full", "coding", "readonly", "none"]
PermissionMode = Literal["auto", "ask", "deny", "allowlist"]


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


class Tools(_Strict):
    """Which tools the agent has: a preset, and what is added to it or taken away by name."""

    preset: Preset = "full"
    allow: list[str] = Field(default_factory=list)
    deny: list[str] = Field(default_factory=list)


class Security(_Strict):
    """When a person is asked, and how long the run waits for an answer."""

    permission_mode: PermissionMode = "ask"
    hitl_timeout_ms: DurationMs = 1_800_000


class Execution(_Strict):
    """What a run may take: active time, and money in US dollars."""

    timeout: DurationMs = 1_800_000
    max_cost_usd: float | None = Field(default=None, gt=0, allow_inf_nan=False)


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


class Profiles:
    """The profiles in a folder, always as they are on disk now."""

    def __init__(self, folder: Path, tools: Collection[str] | None = None) -> None:
        """`tools` are the names that a profile may allow and deny; None does not look at them."""
        self._folder = folder
        self._tools = tools
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
        """Return the profile unless it names a tool that there is not.

        A misspelt name in `deny` would leave on what was to be taken away.
        """
        if isinstance(item, Broken) or self._tools is None:
            return item
        for field in ("allow", "deny"):
            for name in getattr(item.tools, field):
                if name not in self._tools:
                    near = difflib.get_close_matches(name, self._tools, n=1)
                    known = ", ".join(sorted(self._tools))
                    hint = f"did you mean {near[0]!r}?" if near else f"there are: {known}."
                    message = f"The field 'tools.{field}' names no tool with {name!r}; {hint}"
                    return Broken(folder.name, message)
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
    expected = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    expected = re.sub(r"a valid dictionary or instance of \w+", "an object", expected)
    try:
        given = json.dumps(problem["input"], default=str)
    except (TypeError, ValueError):  # YAML has keys, and loops, that JSON has not
        given = str(problem["input"])
    given = given if len(given) <= 80 else given[:77] + "..."
    return f"The field {path!r} is {given}; expected: {expected}."


def _names(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Return the field names that are known at a path of a model, as they stand in a file."""
    for part in path:
        for name, info in model.model_fields.items():
            if part in (name, info.alias) and isinstance(info.annotation, type):
                model = info.annotation
                break
        else:
            return []
        if not issubclass(model, BaseModel):
            return []
    return [info.alias or name for name, info in model.model_fields.items() if name != "soul"]
