"""Keeps the tools of trusted profiles as their files are: describes them anew when those change."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.util import decode_source
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ownware_gateway.custom import Given, docstrings, named
from ownware_gateway.custom.process import START_S, Answer, NotStarted, Work, perform
from ownware_gateway.masking import SECRET_NAME
from ownware_gateway.profile import Custom, Profile
from ownware_gateway.profile.fields import parse_duration_ms
from ownware_gateway.profile.functions import FOLDER, Function, digest, functions, read_code
from ownware_gateway.profile.servers import VARIABLE
from ownware_gateway.tools import Context, Output, Tool, ToolFailed, clip

#: How long the files of a profile may take to be imported and described.
DESCRIBE_S: Final = 30.0

#: How long files that could not be described are left alone, unless they change.
REST_S: Final = 60.0

#: Calls at once, of all runs: each is a process.
CALLS_AT_ONCE_MAX: Final = 64

#: How long a call waits for others to end, and what the engine's own limit leaves beside.
QUEUE_S: Final = 60.0
MARGIN_S: Final = 5.0

#: The most that a tool may say of how long it may take.
TIMEOUT_MS_MAX: Final = 86_400_000

#: What a model is given of a tool at most.
SCHEMA_CHARS_MAX: Final = 32_768
DESCRIPTION_CHARS_MAX: Final = 4_096

#: Profiles whose tools are kept.
PROFILES_MAX: Final = 256

#: What is said of a call that was cut off.
MAY_HAVE_HAPPENED: Final = "It may have had its effect, in whole or in part."

_log: Final = logging.getLogger(__name__)


class _Described(BaseModel):
    """A tool as its own process describes it; a number as `timeout` is seconds."""

    model_config = ConfigDict(defer_build=True)

    input_schema: dict[str, Any] = Field(alias="schema")
    reads_only: bool = False
    safe_to_repeat: bool = False
    timeout: str | float | None = None


class _Description(BaseModel):
    """What came of describing a profile's functions: tools, and why others are none, by name."""

    model_config = ConfigDict(defer_build=True)

    tools: dict[str, _Described]
    left_out: dict[str, str] = Field(alias="leftOut")


class _Version(NamedTuple):
    """A profile's files as they were read, and the settings that they are run with."""

    profile: str
    folder: str
    code: Mapping[str, bytes]
    digest: str
    custom: Custom


class _Kept(NamedTuple):
    """What came of a version; `until_s` is when to try again what went wrong."""

    version: _Version | None
    tools: Mapping[str, Tool]
    missing: Mapping[str, str]
    until_s: float | None = None


class Keeper:
    """The tools of each trusted profile, by its folder."""

    def __init__(self, given: Given) -> None:
        self._given = given
        self._kept: dict[str, _Kept] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._free = asyncio.Semaphore(CALLS_AT_ONCE_MAX)

    def tools(self, profile: Profile) -> Mapping[str, Tool]:
        """Return the tools of a profile, as its files were when it was last connected."""
        kept = self._kept.get(profile.folder)
        return {} if kept is None else kept.tools

    def missing(self, profile: Profile) -> Mapping[str, str]:
        """Return which of the functions are no tools, with a sentence each."""
        kept = self._kept.get(profile.folder)
        return {} if kept is None else kept.missing

    async def connect(self, profile: Profile) -> None:
        """Read the files of a profile, and describe the functions in them if they have changed."""
        async with self._locks.setdefault(profile.folder, asyncio.Lock()):
            found = self._read(profile)
            if isinstance(found, str):
                self._keep(profile, _Kept(None, {}, dict.fromkeys(profile.functions, found)))
                return
            kept = self._kept.get(profile.folder)
            now_s = asyncio.get_running_loop().time()
            if kept is None or kept.version != found or (kept.until_s or now_s + 1) <= now_s:
                self._keep(profile, await self._describe(found))

    def _keep(self, profile: Profile, kept: _Kept) -> None:
        self._kept.pop(profile.folder, None)
        self._kept[profile.folder] = kept
        for folder in list(self._kept)[:-PROFILES_MAX]:
            del self._kept[folder]
            self._locks.pop(folder, None)

    def _read(self, profile: Profile) -> _Version | str:
        """Return the profile's files, or why they are not run, as a sentence."""
        folder = Path(profile.folder)
        begins = f"{named(profile.functions)} in tools/ of the profile {profile.name!r}"
        try:
            code = read_code(folder)
        except (OSError, ValueError) as error:
            return f"{begins} cannot be read: {str(error).rstrip('.')}."
        if _within(self._given.workspace, [folder / FOLDER / file for file in code]):
            return (
                f"{begins} cannot be used: the files lie in the workspace, where agents may write "
                "what the gateway would then run. Choose another workspace, or move the profiles."
            )
        lacking = [name for name in self._variables(profile) if self._given.lookup(name) is None]
        if lacking:
            return f"{begins} need variables that the gateway does not have: {', '.join(lacking)}."
        self._hide(profile)
        return _Version(
            profile.name, str(folder.absolute()), code, digest(code), profile.tools.custom
        )

    # -- what their environment is

    def _variables(self, profile: Profile) -> list[str]:
        texts = profile.tools.custom.env.values()
        return list(dict.fromkeys(name for text in texts for name in VARIABLE.findall(text)))

    def _environment(self, custom: Custom) -> dict[str, str]:
        def filled(text: str) -> str:
            return VARIABLE.sub(lambda found: self._given.lookup(found[1]) or "", text)

        own = {name: filled(text) for name, text in custom.env.items()}
        return {**self._given.environment, **own}

    def _hide(self, profile: Profile) -> None:
        """Have what is named like a secret, where it goes or where it comes from, seen nowhere."""
        values = {
            value
            for name, value in self._environment(profile.tools.custom).items()
            if name in profile.tools.custom.env and SECRET_NAME.match(name)
        }
        named_so = filter(SECRET_NAME.match, self._variables(profile))
        self._given.masker.hide(values | {self._given.lookup(name) or "" for name in named_so})

    # -- describing

    async def _describe(self, version: _Version) -> _Kept:
        began_s = asyncio.get_running_loop().time()
        try:
            found = functions(version.code)
        except ValueError as error:
            # The profile is not usable with them; a run that is under way has no such tools.
            return _Kept(version, {}, {FOLDER: str(error)})
        try:
            said = await self._ask(version, [item for item in found.values() if item.doc])
        except ToolFailed as error:
            why = (
                f"{named(found)} in {FOLDER}/ of the profile {version.profile!r} cannot be used: "
                f"importing them {error}"
            )
            self._note(version, f"in {FOLDER}/", _notes(error))
            return _Kept(version, {}, self._told(dict.fromkeys(found, why)), began_s + REST_S)
        left_out = dict(said.left_out)
        tools: dict[str, Tool] = {}
        for item in found.values():
            try:
                if not item.doc:
                    raise ValueError("it has no docstring, which is what a model knows of it")
                if item.name not in left_out:
                    tools[item.name] = self._tool(version, item, said.tools[item.name])
            except ValueError as error:
                left_out[item.name] = f"{item.name!r} in {FOLDER}/{item.file} is no tool: {error}."
        until_s = began_s + REST_S if said.left_out else None
        return _Kept(version, tools, self._told(left_out), until_s)

    async def _ask(self, version: _Version, wanted: Sequence[Function]) -> _Description:
        """Have functions described. Raises ToolFailed in words that follow what was done."""
        asked = [{"file": item.file, "name": item.name} for item in wanted]
        answer = await self._perform(version, {"functions": asked, "call": None}, DESCRIBE_S)
        try:
            said = _Description.model_validate(answer.value)
        except ValidationError:
            raise ToolFailed("gave no answer that can be understood.") from None
        lacking = [item.name for item in wanted if item.name not in {**said.tools, **said.left_out}]
        if lacking:
            raise ToolFailed(f"gave no answer about {', '.join(lacking)}.")
        return said

    def _told(self, missing: Mapping[str, str]) -> Mapping[str, str]:
        """Return why functions are no tools as a model may be told of it; the log is told too."""
        told = {name: self._given.masker.text(why) for name, why in missing.items()}
        for why in dict.fromkeys(told.values()):
            _log.warning("%s", why)
        return told

    def _tool(self, version: _Version, function: Function, described: _Described) -> Tool:
        """Return a tool. Raises ValueError with what is wrong with it."""
        doc = docstrings.parse(function.doc)
        schema = described.input_schema
        for name, text in doc.parameters.items():
            if name in schema["properties"]:
                schema["properties"][name].setdefault("description", text)
        if len(str(schema)) > SCHEMA_CHARS_MAX:
            raise ValueError(f"its schema has more than {SCHEMA_CHARS_MAX} characters")
        limit_s = _seconds(described.timeout) or version.custom.timeout / 1000
        return Tool(
            name=function.name,
            description=(doc.text or function.doc)[:DESCRIPTION_CHARS_MAX],
            input_schema=schema,
            call=partial(self._call, version, function, limit_s),
            reads_only=described.reads_only,
            safe_to_repeat=described.reads_only or described.safe_to_repeat,
            timeout_s=QUEUE_S + START_S + limit_s + MARGIN_S,
            origin=f"{version.profile}/{FOLDER}/{function.file} {version.digest}",
        )

    # -- calls

    async def _call(
        self,
        version: _Version,
        function: Function,
        limit_s: float,
        context: Context,
        arguments: dict[str, Any],
    ) -> Output:
        """Call a function in a process of its own. Raises ToolFailed."""
        wanted = {"file": function.file, "name": function.name, "arguments": arguments}
        request = {"functions": [], "call": wanted}
        try:
            async with self._slot():
                answer = await self._perform(version, request, limit_s, context)
        except NotStarted as error:
            self._note(version, function.name, _notes(error))
            raise ToolFailed(f"{function.name} {error}") from error
        except ToolFailed as error:
            self._note(version, function.name, _notes(error))
            raise ToolFailed(f"{function.name} {error} {MAY_HAVE_HAPPENED}") from error
        text, wrong = answer.value.get("text"), answer.value.get("error")
        if isinstance(text, str):
            return clip(text)
        behind = str(answer.value.get("traceback", "")) + answer.stderr
        self._note(version, function.name, behind)
        raise ToolFailed(str(wrong or "It returned nothing that can be read."))

    def _note(self, version: _Version, name: str, said: str) -> None:
        """Tell the gateway's log what stood behind a failure; the model need not know."""
        if said:
            text = self._given.masker.text(said)
            _log.warning("the tool %s of the profile %s failed:\n%s", name, version.profile, text)

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(QUEUE_S):
                await self._free.acquire()
        except TimeoutError:
            raise NotStarted(
                f"was not called: {CALLS_AT_ONCE_MAX} such calls are under way. Try again."
            ) from None
        try:
            yield
        finally:
            self._free.release()

    async def _perform(
        self,
        version: _Version,
        request: dict[str, Any],
        limit_s: float,
        context: Context | None = None,
    ) -> Answer:
        files = {name: decode_source(text) for name, text in version.code.items()}
        where = {"folder": f"{version.folder}/{FOLDER}", "files": files}
        work = Work(
            {**request, **where},
            self._environment(version.custom),
            self._given.workspace,
            version.custom.memory_mb,
            limit_s,
        )
        tell = partial(self._tell, context) if context is not None else _nobody
        return await perform(work, self._given.watchdog, tell)

    def _tell(self, context: Context, line: str, *, was_cut: bool) -> None:
        context.progress(f"{self._given.masker.cut(line)}…" if was_cut else line)


def _notes(error: ToolFailed) -> str:
    """Return what stood on stderr when a process ended badly."""
    return "".join(getattr(error, "__notes__", ()))


def _nobody(_line: str, *, was_cut: bool) -> None:
    """Leave out what files print when they are imported to be described."""


def _within(workspace: Path, files: Iterable[Path]) -> bool:
    """Whether one of the files lies in the workspace, by its own path or by where that leads."""
    roots = {os.path.abspath(workspace), os.path.realpath(workspace)}
    paths = {path for file in files for path in (os.path.abspath(file), os.path.realpath(file))}
    return any(Path(path).is_relative_to(root) for path in paths for root in roots)


def _seconds(timeout: str | float | None) -> float | None:
    """Return a tool's own limit in seconds. Raises ValueError for what is none."""
    if timeout is None:
        return None
    value: object = None
    with suppress(ValueError):
        value = parse_duration_ms(timeout) if isinstance(timeout, str) else timeout * 1000
    if not isinstance(value, int | float) or not 0 < value <= TIMEOUT_MS_MAX:
        raise ValueError(
            f'its timeout {timeout!r} must be seconds, or a text like "30s"; above 0, and at most '
            "a day"
        )
    return value / 1000
