"""The tool calls of one run: whether they may run, the question to a person, and running them."""

import asyncio
import importlib
import json
import logging
import os.path
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from ownware_gateway.budgets import Budgets
from ownware_gateway.events import (
    AgentSpawn,
    Asks,
    Event,
    PermissionRequest,
    QuestionRequest,
    ToolCallEnd,
    ToolCallExecute,
    ToolCallProgress,
)
from ownware_gateway.log import Commit, Log, Permission, Private, Refused, Run
from ownware_gateway.masking import MASK, Masker
from ownware_gateway.models import AS_THE_PROFILE_SAYS, Catalogue, Dispatch, Options
from ownware_gateway.permissions import (
    Verdict,
    allowed_tools,
    judge,
    operation_hash,
    stricter,
)
from ownware_gateway.processes import Watchdog
from ownware_gateway.profile import SEPARATOR, SPAWN, Profile
from ownware_gateway.tools import (
    Context,
    Output,
    Source,
    Tool,
    ToolFailed,
    clip,
    load_schemas,
    parse_arguments,
)
from ownware_gateway.transcript import Call, RunFacts, Turn, grants, let_go

if TYPE_CHECKING:
    from ownware_gateway.floors import Ground
    from ownware_gateway.outputs import Settled
    from ownware_gateway.policies import Operation

#: Calls of one turn that run at the same time.
PARALLEL_CALLS_MAX: Final = 16

#: The longest line of progress that is kept.
PROGRESS_CHARS_MAX: Final = 2_000

#: The tool that reads on in an output of which a part was told.
READ_ON: Final = "read_output"

#: What is said of a call that had begun when the gateway stopped.
INTERRUPTED: Final = Verdict(
    "deny",
    "Interrupted: the gateway stopped while this ran. It may have had its effect, in whole or in "
    "part, and is not run again by itself.",
)

#: How deep agents may be below a run that nobody spawned: its own agents are at 1.
DEPTH_MAX: Final = 3

#: The module that brings all others that judge, and the one that takes in what a call gives back.
_RULES: Final = "ownware_gateway.floors"
_OUTPUTS: Final = "ownware_gateway.outputs"

_KEY_BEGINS: Final = re.compile("-----BEGIN [A-Z ]*PRIVATE KEY")

_log: Final = logging.getLogger(__name__)


class Parts(NamedTuple):
    """What every run is driven with."""

    log: Log
    catalogue: Catalogue
    tools: Mapping[str, Tool]
    sources: Sequence[Source]
    masker: Masker
    workspace: Path
    data_dir: Path
    environment: Mapping[str, str]
    watchdog: Watchdog
    clock_ms: Callable[[], int]
    new_id: Callable[[str], str]


class Family(Protocol):
    """What a run needs of whoever drives runs, for the agents that work for it."""

    def profile(self, profile_id: str) -> Profile:
        """Return a profile as it is now. Raises GatewayError `not_found`."""
        ...

    async def begin(self, parent: Run, spawn: AgentSpawn, task: str) -> None:
        """Begin an agent's run, unless it has begun. Raises GatewayError when it cannot."""
        ...

    async def recall(self, run_id: str) -> None:
        """Have an agent's run stop."""
        ...


class Above(NamedTuple):
    """A run that another one works for, directly or not: its profile, then and now."""

    run: Run
    profile: Profile
    profile_now: Profile


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one run is driven with: `history` ends with the run itself.

    `profile` is what it started with, `profile_now` what the files say today: it goes on as the
    first, but may do nothing that either of them would not let it. `above` are the runs that it
    works for, the nearest first.
    """

    run: Run
    profile: Profile
    profile_now: Profile
    dispatch: Dispatch
    history: list[RunFacts]
    family: Family
    restarted: bool = False
    above: Sequence[Above] = ()
    options: Options = AS_THE_PROFILE_SAYS
    budgets: Budgets = field(kw_only=True)

    @property
    def ends_at(self) -> int | None:
        """When the run has taken all the time by the clock that it may, in ms; None for never."""
        wall_ms = self.profile.execution.max_wall_time
        return None if wall_ms is None else self.run.accepted_at + wall_ms


async def load_checks() -> None:
    """Load what calls are checked and judged with, away from the event loop.

    `Calls.judge` tries again if it cannot be loaded now.
    """
    await load_schemas()
    for name in (_RULES, _OUTPUTS):
        if name not in sys.modules:
            with suppress(OSError, ImportError):
                await asyncio.to_thread(importlib.import_module, name)


class Store(Protocol):
    """Appends events of the run and folds them into its facts."""

    def __call__(
        self, events: Sequence[Event], private: Sequence[Private] = (), *, asks: bool = False
    ) -> Commit:
        """Return the commit that says when they are durable.

        One that `asks` is refused while another question is open in the thread.
        """
        ...


class Calls:
    """The tools that a run's agent has, and what becomes of its calls."""

    def __init__(self, parts: Parts, assignment: Assignment, store: Store) -> None:
        self._parts = parts
        self._run = assignment.run
        self._profile = assignment.profile
        self._profile_now = assignment.profile_now
        self._options = assignment.options
        self._above = assignment.above
        #: What people have allowed for the rest of the thread when any of its agents asked.
        self.granted_elsewhere: frozenset[str] = frozenset()
        self._history = assignment.history
        self._facts = assignment.history[-1]
        self._store = store
        self._ends_at = assignment.ends_at
        self._loop = asyncio.get_running_loop()

    async def connect(self) -> None:
        """Have ready what the agent's tools need; what cannot be is `missing`."""
        if self._options.bare:
            return
        for source in self._parts.sources:
            await source.connect(self._profile_now)

    @property
    def tools(self) -> dict[str, Tool]:
        """The tools that the agent has now: those of servers come and go.

        What a source is, the files say; that it may be used, both versions of the profile must.
        A tool that is built in has its name whoever else wants it, and a client's tool only where
        nobody else does.
        """
        if self._options.bare:
            return {}
        offered: dict[str, Tool] = {}
        for source in self._parts.sources:
            offered |= source.tools(self._profile_now)
        offered |= self._parts.tools
        if len(self._above) >= DEPTH_MAX:
            offered.pop(SPAWN, None)
        own = allowed_tools(self._profile, allowed_tools(self._profile_now, offered))
        return self._of_client | own if self._options.client_tools else own

    @cached_property
    def _of_client(self) -> dict[str, Tool]:
        from ownware_gateway.client_tools import tools_of

        return tools_of(self._options)

    @property
    def missing(self) -> Mapping[str, str]:
        """What cannot be used now, by what its tools' names begin with, with a sentence each."""
        if self._options.bare:
            return {}
        found: dict[str, str] = {}
        for source in self._parts.sources:
            found |= source.missing(self._profile_now)
        return found

    @cached_property
    def _ground(self) -> "Ground":
        return _ground(self._parts, self._profile_now.folder)

    @property
    def _turn(self) -> Turn:
        assert self._facts.turn is not None
        return self._facts.turn

    def judge(self, call: Call) -> Verdict:
        """Return whether a call may run, needs a person's yes, or is refused."""
        try:
            return self._judged(call)
        except (OSError, ImportError) as error:
            # What judges is read at the first use, and there may be no file handle left for that.
            return Verdict("deny", f"{call.name} cannot be judged now: {error}. Try again.")

    def _judged(self, call: Call) -> Verdict:
        tools = self.tools
        tool = tools.get(call.name)
        if call.executing and (tool is None or not tool.safe_to_repeat):
            return INTERRUPTED
        if tool is None:
            return Verdict("deny", self._absent(call.name, tools))
        if tool.by_client:
            return Verdict("client", "the client runs it")
        try:
            arguments = self._arguments(tool, call)
        except ToolFailed as error:
            return Verdict("deny", str(error))
        # What a call has given back could not be taken in without it.
        importlib.import_module(_OUTPUTS)
        operation = self._operation(tool, arguments)
        if call.request is not None and call.request.operation_hash != operation.hash:
            changed = f"{tool.name} is not what it was when a person was asked."
            return INTERRUPTED if call.executing else Verdict("deny", changed)
        verdict = self._verdict(operation)
        if call.executing and verdict.decision == "ask":
            # Nobody is asked again for what has begun: it goes on only if that was answered.
            granted = call.response is not None and call.response.granted
            return Verdict("run", "a person allowed it") if granted else INTERRUPTED
        return verdict

    def _verdict(self, operation: "Operation") -> Verdict:
        """Return the strictest word of the floors and of the profile, as it was and as it is.

        Whoever it works for has a word too: what that agent may not do itself, or not without a
        person's yes, it does not get done by others. Which tools that agent has is no part of it.
        """
        from ownware_gateway.floors import floor

        granted = grants(self._history) | self.granted_elsewhere
        verdict = stricter(
            judge(self._profile, operation, granted),
            judge(self._profile_now, operation, granted),
        )
        for above in self._above:
            for profile in (above.profile, above.profile_now):
                said = judge(profile, operation, granted)
                reason = f"{said.reason} So says the profile {profile.name!r}, which it works for."
                verdict = stricter(verdict, Verdict(said.decision, reason, said.rule))
        held = floor(operation, self._ground, self._parts.masker)
        verdict = verdict if held is None else stricter(held, verdict)
        if operation.tool.asks and verdict.decision == "run":
            # Whether it may be asked is no question to a person as well.
            return Verdict("ask", f"{operation.tool.name} asks a person")
        return verdict

    def _absent(self, name: str, tools: Mapping[str, Tool]) -> str:
        why = self.missing.get(name.partition(SEPARATOR)[0])
        if why is not None:
            return f"There is no tool named {name!r} now. {why}"
        if name == SPAWN and len(self._above) >= DEPTH_MAX:
            return f"Agents are spawned {DEPTH_MAX} deep and not deeper; do the task yourself."
        names = ", ".join(sorted(tools)) or "none"
        return f"There is no tool named {name!r}. There are: {names}."

    def _operation(self, tool: Tool, arguments: dict[str, Any]) -> "Operation":
        """Return a call as rules see it, bound to this very tool and its arguments."""
        from ownware_gateway.policies import Operation

        hashed = operation_hash(self._parts.log.secret, tool.identity, arguments)
        return Operation(tool, arguments, hashed, self._ground.roots)

    def _arguments(self, tool: Tool, call: Call) -> dict[str, Any]:
        """Return the exact arguments of a call; raises ToolFailed when they do not fit."""
        answer = self._turn.answer
        assert answer is not None
        wanted = next(item for item in answer.turn.tool_calls if item.id == call.id)
        return parse_arguments(tool, wanted.arguments)

    async def ask(self, call: Call, reason: str, rule: str | None) -> bool:
        """Append what a person is asked: whether a call may run, or the question that it is.

        Returns False when another agent of the thread is asking: nothing is appended then.
        """
        return await self._wait_for([call], self._request(call, reason, rule))

    async def hand_over(self, calls: Sequence[Call]) -> bool:
        """Append that calls wait for the client, whose tools they are; returns what `ask` does."""
        from ownware_gateway.client_tools import handed_over

        request_id = self._parts.new_id("client")
        secret = self._parts.log.secret
        event, exact = handed_over(secret, self._turn, calls, request_id, self._expires_at())
        return await self._wait_for(calls, event, [exact])

    async def _wait_for(
        self, calls: Sequence[Call], asked: Asks, private: Sequence[Private] = ()
    ) -> bool:
        try:
            await self._store([asked], private, asks=True).wait()
        except Refused as refused:
            if not isinstance(refused.winner, Permission):
                raise
            for call in calls:
                call.request = None
            return False
        return True

    def _expires_at(self) -> int:
        expires_at = self._parts.clock_ms() + self._profile.security.hitl_timeout_ms
        # Nobody drives a run that waits; at the end of its time it goes on, and ends.
        return expires_at if self._ends_at is None else min(expires_at, self._ends_at)

    def _request(self, call: Call, reason: str, rule: str | None) -> Asks:
        tool = self.tools[call.name]
        arguments = self._arguments(tool, call)
        shown = self._parts.masker.value(arguments)
        hashed = self._operation(tool, arguments).hash
        expires_at = self._expires_at()
        if tool.asks:
            options = shown.get("options") or None
            return QuestionRequest(
                request_id=self._parts.new_id("ask"),
                tool_call_id=call.id,
                tool_name=call.name,
                question=shown["question"],
                options=options,
                multiple=options is not None and shown.get("multiple", False),
                operation_hash=hashed,
                expires_at=expires_at,
                turn_index=self._turn.index,
            )
        return PermissionRequest(
            request_id=self._parts.new_id("perm"),
            tool_call_id=call.id,
            tool_name=call.name,
            input=shown,
            reason=self._parts.masker.text(reason),
            operation_hash=hashed,
            expires_at=expires_at,
            turn_index=self._turn.index,
            rule=self._masked(rule),
        )

    def begun(self, call: Call, rule: str | None) -> tuple[dict[str, Any], ToolCallExecute]:
        """Return the exact arguments of a call that may run, and the event that it begins.

        `rule` is what lets it, if one does.
        """
        arguments = self._arguments(self.tools[call.name], call)
        return arguments, self._execution(call, arguments, rule)

    async def run(self, calls: Sequence[Call], rules: Mapping[str, str]) -> None:
        """Run calls together; `rules` are what lets them, by their ids, where a rule does.

        That they begin is durable before any of them has an effect.
        """
        turn = self._turn
        # Looked up once: a server's tools may change while this goes on.
        tools = self.tools
        arguments = [self._arguments(tools[call.name], call) for call in calls]
        begin = [
            self._execution(call, given, rules.get(call.id))
            for call, given in zip(calls, arguments, strict=True)
        ]
        await self._store(begin).wait()
        free = asyncio.Semaphore(PARALLEL_CALLS_MAX)
        try:
            async with asyncio.TaskGroup() as group:
                for call, given in zip(calls, arguments, strict=True):
                    group.create_task(self._call(turn, call, tools[call.name], given, free))
        except ExceptionGroup as failures:
            # One says it all: the run is not ours any more, and the other calls were cut off.
            raise failures.exceptions[0] from None

    def _execution(
        self, call: Call, arguments: dict[str, Any], rule: str | None
    ) -> ToolCallExecute:
        return ToolCallExecute(
            tool_call_id=call.id,
            tool_name=call.name,
            input=self._parts.masker.value(arguments),
            turn_index=self._turn.index,
            decision="allow" if rule is not None else None,
            rule=self._masked(rule),
        )

    def _masked(self, rule: str | None) -> str | None:
        return None if rule is None else self._parts.masker.text(rule)

    async def _call(
        self, turn: Turn, call: Call, tool: Tool, arguments: dict[str, Any], free: asyncio.Semaphore
    ) -> None:
        async with free:
            began_s = self._loop.time()
            output = await self._output(tool, call, arguments)
            took_ms = int((self._loop.time() - began_s) * 1000)
            settled = await self._settled(call, output)
        ended = ToolCallEnd(
            tool_call_id=call.id,
            tool_name=call.name,
            result=settled.text,
            is_error=output.is_error,
            duration_ms=took_ms,
            turn_index=turn.index,
            truncated=output.truncated,
            output_bytes_raw=output.bytes_raw,
            output_bytes_kept=settled.bytes_kept,
            content=settled.content,
        )
        call.images = () if output.is_error else settled.images
        commit = self._store([ended], settled.private)
        if settled.images:
            let_go(self._history)
        await commit.wait()

    async def _settled(self, call: Call, output: Output) -> "Settled":
        """Return an output masked and taken apart: what the model is told, and what is kept."""
        from ownware_gateway.outputs import settle

        read_on = None
        if output.whole is not None and READ_ON in self.tools:
            read_on = f"{READ_ON} with tool_call_id {json.dumps(call.id)} shows the rest"
        return await settle(output, self._parts.masker, read_on)

    async def _kept(self, tool_call_id: str) -> str | None:
        """Return the whole output of an earlier call of this run's stream, if one was kept."""
        body = await self._parts.log.kept_output(self._run.stream, tool_call_id)
        return None if body is None else body.decode("utf-8", "replace")

    async def _output(self, tool: Tool, call: Call, arguments: dict[str, Any]) -> Output:
        in_key = False

        def progress(line: str) -> None:
            nonlocal in_key
            # A key of many lines cannot be recognised in one of them.
            in_key = in_key or _KEY_BEGINS.search(line) is not None
            shown = MASK if in_key else self._parts.masker.text(line)[:PROGRESS_CHARS_MAX]
            in_key = in_key and "-----END" not in line
            self._store(
                [
                    ToolCallProgress(
                        tool_call_id=call.id, progress=shown, turn_index=self._turn.index
                    )
                ]
            )

        parts = self._parts
        context = Context(
            parts.workspace, parts.environment, progress, self._kept, watchdog=parts.watchdog
        )
        try:
            async with asyncio.timeout(tool.timeout_s):
                return await tool.call(context, arguments)
        except ToolFailed as error:
            return _failed(str(error))
        except TimeoutError:
            return _failed(f"Stopped: {tool.name} took longer than {tool.timeout_s:g} s.")
        except Exception:  # noqa: BLE001 - a tool's bug is the model's to hear of, not the run's end
            _log.exception("the tool %s failed in run %s", tool.name, self._run.id)
            return _failed(f"{tool.name} failed inside the gateway; its log says why.")


def _ground(parts: Parts, profile_folder: str) -> "Ground":
    """Return the folders that floors are about, by the names that a call may have for them."""
    from ownware_gateway.floors import Ground

    workspace = os.path.normpath(parts.workspace)
    home = parts.environment.get("HOME") or os.path.expanduser("~")
    roots = tuple(dict.fromkeys((workspace, os.path.realpath(workspace))))
    return Ground(
        roots,
        os.path.realpath(parts.data_dir),
        os.path.normpath(home),
        profiles=os.path.realpath(os.path.dirname(profile_folder)) if profile_folder else "",
    )


def _failed(message: str) -> Output:
    return replace(clip(message), is_error=True)
