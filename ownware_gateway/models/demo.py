"""The built-in offline model: no key, no network, always the same answer to the same prompt.

It follows simple patterns, and says so. These are what it understands in the last user message:

- `list files [in FOLDER]`, `ls`; `read NAME`; `find NAME`; `search TEXT [in PATH]`;
  `write NAME: TEXT`, `create a file NAME with TEXT`; `replace OLD with NEW in NAME`;
  `run: COMMAND`, ``run `COMMAND` ``, `$ COMMAND`; `ask me: QUESTION [OPTION, OPTION]`;
  `ask AGENT to TASK`: it calls that tool, then quotes the result.
- ` and also ` between them: parallel calls. `; then ` between them: one turn after the other.
- `count to N`, `slowly count to N`: as many deltas. `think about X`: reasoning first.
- `my name is X`, later `what is my name?`; `what did I say?`: it answers from the conversation.
- Anything else: what it is and what it can do.
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ownware_gateway.events import StopReason, Usage
from ownware_gateway.models import (
    Answer,
    AssistantTurn,
    CallStart,
    Message,
    Part,
    Request,
    Text,
    Thinking,
    ToolCall,
    ToolTurn,
    UserTurn,
)

DIALECT: Final = "demo"

#: The most that it counts to, and the most parts in a batch while it does.
COUNT_MAX: Final = 100_000
BATCH_PARTS_MAX: Final = 64

#: The pause after each number of a slow count.
SLOW_PACE_S: Final = 0.01

#: The most characters of a tool's result, or of a message, that an answer quotes.
QUOTE_LENGTH_MAX: Final = 200

PARALLEL: Final = " and also "
SEQUENTIAL: Final = "; then "

ABOUT: Final = (
    "I am the built-in offline model: I follow simple patterns and know nothing of the world. "
    "I can list files, read NAME, find NAME, search TEXT, write NAME: TEXT, run: COMMAND, "
    "count to 10, think about something, and remember your name. "
    "Set a provider's key to talk to a real model."
)

_FLAGS: Final = re.IGNORECASE | re.DOTALL

#: What calls which tool; the names of the groups are the names of the tool's arguments.
_CALLS: Final = tuple(
    (re.compile(pattern, _FLAGS), tool)
    for pattern, tool in (
        (r"(?:list|show) (?:the |my |all )?files(?: in (?P<path>\S+?))?[.!]?", "list_files"),
        (r"ls(?: (?P<path>\S+))?", "list_files"),
        (r"read (?:the file )?(?P<path>\S+)", "read_file"),
        (r"find (?:the file )?(?P<pattern>\S+)", "glob"),
        (r"search (?:for )?(?P<pattern>.+?)(?: in (?P<path>\S+))?", "grep"),
        (r"write (?P<path>[^\s:]+): ?(?P<content>.*)", "write_file"),
        (r"create (?:a )?file (?P<path>\S+) with (?P<content>.*)", "write_file"),
        (r"replace (?P<old_text>.+) with (?P<new_text>.*) in (?P<path>\S+)", "edit_file"),
        (r"run: ?(?P<command>.+)", "shell_execute"),
        (r"run `(?P<command>[^`]+)`[.!]?", "shell_execute"),
        (r"\$ (?P<command>.+)", "shell_execute"),
        (r"ask me: ?(?P<question>.+?)(?: \[(?P<options>[^][]+)\])?", "ask_user"),
        (r"ask (?P<agent>[\w-]+) to (?P<task>.+)", "spawn_agent"),
    )
)
_COUNT: Final = re.compile(r"(?:please )?(?P<slow>slowly )?count to (?P<n>\d{1,9})[.!]?", _FLAGS)
_THINK: Final = re.compile(r"(?:please )?think about (?P<topic>.+?)[.!?]?", _FLAGS)
_ASKS_NAME: Final = re.compile(r"what(?: is|'s|’s) my name|who am i\b", _FLAGS)
_ASKS_SAID: Final = re.compile(r"what did i (?:just )?say", _FLAGS)
_NAME: Final = re.compile(r"\bmy name is (?P<name>[^\W\d][\w'’-]*)", _FLAGS)
_GREETING: Final = re.compile(r"(?:hello|hi|hey|good (?:morning|evening|day))\b.*", _FLAGS)
_WORD: Final = re.compile(r"\s*\S+\s*")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A tool call that the prompt asks for."""

    tool: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Reply:
    """What is answered: `pieces` are its deltas, at most `batch` of them at a time."""

    pieces: Sequence[str]
    thinking: Sequence[str] = ()
    calls: Sequence[_Wanted] = ()
    batch: int = 1
    pace_s: float = 0.0


class Demo:
    """The built-in offline model."""

    async def stream(self, request: Request) -> AsyncGenerator[Sequence[Part], None]:
        """Answer by the patterns, word by word."""
        reply = _reply(request)
        whole, stopped = _up_to(reply.pieces, request.stop)
        cut = request.max_tokens is not None and len(whole) > request.max_tokens
        pieces = whole[: request.max_tokens]
        thinking = () if request.thinking == "off" else reply.thinking
        for parts in _batches([*map(Thinking, thinking), *map(Text, pieces)], reply.batch):
            yield parts
            await asyncio.sleep(reply.pace_s)
        calls = [
            ToolCall(f"call_{len(request.messages)}_{n}", want.tool, json.dumps(want.arguments))
            for n, want in enumerate(reply.calls, 1)
        ]
        if calls:
            yield [CallStart(call.id, call.name) for call in calls]
        turn = AssistantTurn("".join(pieces), "".join(thinking), calls, DIALECT, request.model)
        usage = Usage(input_tokens=_input_tokens(request), output_tokens=_output_tokens(turn))
        ends: StopReason = "stop_sequence" if stopped else "end_turn"
        stop: StopReason = "tool_use" if calls else "max_tokens" if cut else ends
        yield [Answer(turn, stop, usage)]

    def unable(self, request: Request) -> Sequence[str]:
        """Return what this model cannot honour; see `Model.unable`.

        Its answer is always the same, so whatever steers chance is honoured.
        """
        asked = {
            "response_format": request.response_format is not None,
            "input_audio": any(file.is_audio for file in request.files),
            "detail": request.has_detail,
            "reasoning_effort": request.finely,
            "verbosity": request.verbosity is not None,
            "tool_choice": request.tool_choice is not None,
        }
        return [name for name, wanted in asked.items() if wanted]


def _up_to(pieces: Sequence[str], stop: Sequence[str]) -> tuple[Sequence[str], bool]:
    """Return the pieces before the first of some texts, and whether one was there."""
    text = "".join(pieces)
    ends = [place for word in stop if (place := text.find(word)) >= 0]
    if not ends:
        return pieces, False
    return _words(text[: min(ends)]), True


def _batches(parts: Sequence[Part], size: int) -> Iterator[Sequence[Part]]:
    for start in range(0, len(parts), size):
        yield parts[start : start + size]


def _reply(request: Request) -> _Reply:
    start, prompt = _prompt(request.messages)
    since = request.messages[start + 1 :]
    steps = _steps(prompt.text.strip())
    results = [message for message in since if isinstance(message, ToolTurn)]
    done = sum(isinstance(message, AssistantTurn) for message in since)
    # After a refusal the rest of a chain makes no sense.
    if done < len(steps) and not any(result.is_error for result in results):
        return _call(steps[done], {tool.name for tool in request.tools})
    if results:
        return _say(" ".join(map(_report, results)))
    return _talk(prompt, [m for m in request.messages[:start] if isinstance(m, UserTurn)])


def _prompt(messages: Sequence[Message]) -> tuple[int, UserTurn]:
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index]
        if isinstance(message, UserTurn):
            return index, message
    return -1, UserTurn("")


def _steps(text: str) -> list[list[_Wanted]]:
    """Return the turns of calls that a prompt asks for.

    A text is cut at the separators only when every part of it is a call: a file's content may
    hold the same words.
    """
    steps = []
    for step in text.split(SEQUENTIAL):
        wanted = [_wanted(part) for part in step.split(PARALLEL)]
        steps.append([want for want in wanted if want is not None])
        if len(steps[-1]) < len(wanted):
            whole = _wanted(text)
            return [] if whole is None else [[whole]]
    return steps


def _wanted(text: str) -> _Wanted | None:
    text = re.sub(r"(?i)^please ", "", text.strip())
    for pattern, tool in _CALLS:
        if found := pattern.fullmatch(text):
            given = found.groupdict().items()
            arguments: dict[str, Any] = {name: value for name, value in given if value}
            if tool == "glob" and "/" not in arguments["pattern"]:
                arguments["pattern"] = f"**/{arguments['pattern']}"
            if tool == "write_file":
                arguments.setdefault("content", "")
            if tool == "edit_file":
                arguments.setdefault("new_text", "")
            if "options" in arguments:
                arguments["options"] = re.split(r"\s*,\s*", arguments["options"].strip())
            return _Wanted(tool, arguments)
    return None


def _call(step: Sequence[_Wanted], tools: set[str]) -> _Reply:
    for want in step:
        if want.tool not in tools:
            return _say(f"I have no tool named {want.tool} here, so I cannot do that.")
    names = " and ".join(want.tool for want in step)
    return _Reply(_words(f"I will use {names}."), calls=step)


def _report(result: ToolTurn) -> str:
    quote = _quote(result.text)
    if result.is_error:
        return f"I could not use {result.tool_name}: {quote}"
    return f"{result.tool_name} answered: {quote}" if quote else f"{result.tool_name} is done."


def _talk(prompt: UserTurn, before: Sequence[UserTurn]) -> _Reply:
    text = prompt.text.strip()
    if found := _COUNT.fullmatch(text):
        return _count(int(found["n"]), slowly=found["slow"] is not None)
    if found := _THINK.fullmatch(text):
        topic = _quote(found["topic"])
        thoughts = f"The question is about {topic}. I only follow patterns, so this is all I think."
        return _say(f"I have thought about {topic}, as far as I can. {ABOUT}", _words(thoughts))
    if _ASKS_NAME.search(text):
        names = [found["name"] for turn in before if (found := _NAME.search(turn.text))]
        return _say(f"Your name is {names[-1]}." if names else "You have not told me your name.")
    if _ASKS_SAID.search(text):
        said = _quote(before[-1].text) if before else ""
        return _say(f"You said: {said}" if said else "You have said nothing before this.")
    if found := _NAME.search(text):
        return _say(f"Nice to meet you, {found['name']}. I will remember your name.")
    return _say(_greet(text) + _files(prompt) + ABOUT)


def _greet(text: str) -> str:
    return "Hello! " if _GREETING.fullmatch(text) else ""


def _files(prompt: UserTurn) -> str:
    names = ", ".join(file.filename for file in prompt.files)
    return f"I cannot look into what you sent: {_quote(names)}. " if names else ""


def _count(n: int, *, slowly: bool) -> _Reply:
    if n > COUNT_MAX:
        return _say(f"I count to {COUNT_MAX} at most.")
    pieces = [f"{i} " for i in range(1, n + 1)]
    return _Reply(pieces, pace_s=SLOW_PACE_S) if slowly else _Reply(pieces, batch=BATCH_PARTS_MAX)


def _say(text: str, thinking: Sequence[str] = ()) -> _Reply:
    return _Reply(_words(text), thinking)


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def _quote(text: str) -> str:
    text = " ".join(text[: QUOTE_LENGTH_MAX * 4].split())
    return text if len(text) <= QUOTE_LENGTH_MAX else text[:QUOTE_LENGTH_MAX] + " …"


def _input_tokens(request: Request) -> int:
    """Return about how many tokens a prompt has: one a word."""
    texts = [request.system, *(message.text for message in request.messages)]
    return sum(len(text.split()) for text in texts)


def _output_tokens(turn: AssistantTurn) -> int:
    texts = [turn.text, turn.thinking, *(call.arguments for call in turn.tool_calls)]
    return sum(len(text.split()) for text in texts)
