"""A run on the terminal: what the agent says on stdout, all about it on stderr.

What an agent or a tool says is shown without the codes that could control the terminal.
"""

import asyncio
import contextlib
import json
import os
import re
import sys
import termios
from collections.abc import Sequence
from typing import Any, Final

from ownware_gateway.client import Client
from ownware_gateway.errors import GatewayError

#: How often a person may give an answer that is none before the question counts as denied.
ANSWERS_MAX: Final = 5
ANSWER_BYTES_MAX: Final = 4_096
ANSWERS: Final = {"y": "approve", "n": "deny", "a": "always"}

#: The most characters of a tool call's input that its line shows; a question shows all of it.
CALL_CHARS_MAX: Final = 160

#: What could control a terminal or make a text look like another: control characters except line
#: feed and tab, and those that change the direction of writing.
_CONTROL: Final = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

#: Options that are chosen by their numbers.
_NUMBERS: Final = re.compile(r"[0-9]{1,3}(?:[, ]+[0-9]{1,3})*")

#: How a run ended, if not well.
ENDS: Final = {"failed": "failed", "cancelled": "was cancelled", "timed_out": "timed out"}


class Terminal:
    """A run on the terminal: what the agent says on stdout, all about it on stderr."""

    def __init__(self, client: Client, started: dict[str, Any], *, yes: bool) -> None:
        self._client = client
        self._run = started
        self._yes = yes
        self._since: int = started["startSeq"]
        self._line_is_open = False

    async def follow(self) -> int:
        """Show the run from where it was left, to its end; return the exit code."""
        thread_id, run_id = self._run["threadId"], self._run["runId"]
        code = 1
        events = self._client.events(thread_id, self._since, run_id=run_id)
        async with contextlib.aclosing(events):
            async for event in events:
                self._since = event.get("seq", self._since)
                if event["type"] == "permission.request":
                    await self._decide(event)
                elif event["type"] == "question.request":
                    await self._answer(event)
                elif event["type"] == "session.end":
                    code = 0 if event["status"] == "succeeded" else 1
                self._show(event)
        return code

    def _show(self, event: dict[str, Any]) -> None:
        match event:
            case {"type": "text.delta", "text": text, "notice": True}:
                self._about(text.strip())
            case {"type": "text.delta", "text": text}:
                self._text(text)
            case {"type": "tool.call.execute", "toolName": name, "input": given}:
                shown = json.dumps(given, ensure_ascii=False)
                more = "…" if len(shown) > CALL_CHARS_MAX else ""
                self._about(f"> {name} {shown[:CALL_CHARS_MAX]}{more}")
            case {"type": "tool.call.end"} if (said := _outcome(event)) is not None:
                self._about(said)
            case {"type": "agent.spawn", "name": name, "agentId": agent, "task": task}:
                more = "…" if len(task) > CALL_CHARS_MAX else ""
                self._about(f"> {name} ({agent}) begins: {task[:CALL_CHARS_MAX]}{more}")
            case {"type": "agent.complete", "agentId": agent, "status": status}:
                self._about(f"> {agent} has ended: {status}.")
            case {"type": "recovery", "detail": detail}:
                self._about(f"Trying again: {detail}")
            case {"type": "error", "message": message}:
                self._about(f"Error: {message}")
            case {"type": "session.end", "status": status, "code": code}:
                self._about(f"The run {ENDS[status]} ({code})." if status in ENDS else "")
            case _:
                pass

    def _text(self, text: str) -> None:
        """Show what the agent says; to a terminal without the codes that could control it."""
        print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)
        self._line_is_open = not text.endswith("\n") if text else self._line_is_open

    def _about(self, said: str) -> None:
        if self._line_is_open:
            self._text("\n")
        if said:
            note(printable(said))

    async def _decide(self, asked: dict[str, Any]) -> None:
        """Have a question answered, by whoever is there."""
        shown = json.dumps(asked["input"], indent=2, ensure_ascii=False)
        agent = f" of {asked['agentId']}" if "agentId" in asked else ""
        self._about(f"{asked['toolName']}{agent} asks for permission: {asked['reason']}\n{shown}")
        if self._yes:
            action = "approve"
            self._about("Approved: --yes.")
        elif sys.stdin.isatty() and sys.stderr.isatty():
            action = await _ask()
        else:
            action = "deny"
            self._about("Denied: there is no terminal to ask on. --yes approves everything.")
        await self._resume(asked, action)

    async def _answer(self, asked: dict[str, Any]) -> None:
        """Have a question of the model answered in words, by whoever is there."""
        options: list[str] = asked["options"] or []
        shown = "".join(f"\n  {number}. {option}" for number, option in enumerate(options, 1))
        self._about(f"{asked['question']}{shown}")
        said = None
        if sys.stdin.isatty() and sys.stderr.isatty():
            said = await _ask_words(options, multiple=asked["multiple"])
        else:
            note("Not answered: there is no terminal to ask on.")
        await self._resume(asked, "deny" if said is None else "answer", said)

    async def _resume(self, asked: dict[str, Any], action: str, answer: str | None = None) -> None:
        thread_id, request_id = self._run["threadId"], asked["requestId"]
        try:
            await self._client.resume(thread_id, action, request_id, answer)
        except GatewayError as error:
            # Somebody else was faster, or it took too long: the run goes on with that answer.
            self._about(error.message)


def _outcome(ended: dict[str, Any]) -> str | None:
    """Return what is said of a call that has ended; nothing where all has been said."""
    if ended["isError"]:
        return f"> {ended['toolName']} failed: {ended['result']}"
    parts = ", ".join(map(_described, ended.get("content") or ()))
    return f"> {ended['toolName']} gave back {parts}" if parts else None


def _described(part: dict[str, Any]) -> str:
    """Return a word about a part of a tool's output."""
    match part:
        case {"kind": "json"}:
            return "a value"
        case {"mimeType": kind, "sizeBytes": int(size)}:
            return f"{kind} of {size} bytes"
        case {"uri": uri}:
            return str(uri)
        case _:
            return "something"


async def _ask() -> str:
    """Return a person's answer to a question that stands on the terminal."""
    # What was typed before the question cannot be meant as its answer.
    termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
    for _ in range(ANSWERS_MAX):
        print("Allow? [y]es / [n]o / [a]lways: ", end="", file=sys.stderr, flush=True)
        line = await _read_line(sys.stdin.fileno())
        if not line:
            break
        if action := ANSWERS.get(line.strip().lower()[:1]):
            return action
    note("Denied: no answer.")
    return "deny"


async def _ask_words(options: Sequence[str], *, multiple: bool) -> str | None:
    """Return what a person answers to a question that stands on the terminal; None for nothing."""
    termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
    choose = "numbers, or your own words" if multiple else "a number, or your own words"
    for _ in range(ANSWERS_MAX):
        hint = f" ({choose})" if options else ""
        print(f"Answer{hint}, Ctrl-D for none: ", end="", file=sys.stderr, flush=True)
        line = await _read_line(sys.stdin.fileno())
        if not line:
            break
        if line.strip():
            return chosen(line.strip(), options, multiple=multiple)
    note("Not answered.")
    return None


def chosen(line: str, options: Sequence[str], *, multiple: bool) -> str:
    """Return the answer that a line means: numbers stand for options, all else for itself."""
    if line in options or not _NUMBERS.fullmatch(line):
        return line
    numbers = [int(number) for number in re.findall(r"[0-9]+", line)]
    known = all(0 < number <= len(options) for number in numbers)
    if not known or (len(numbers) > 1 and not multiple):
        return line
    return ", ".join(options[number - 1] for number in numbers)


async def _read_line(terminal: int) -> str:
    """Return the next line, or nothing at its end; a thread that reads could not be cancelled."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(terminal, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(terminal)
    return os.read(terminal, ANSWER_BYTES_MAX).decode("utf-8", "replace")


def printable(text: str) -> str:
    """Return the text with what could control a terminal made visible."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def say(text: str) -> None:
    """Print a line."""
    print(text, flush=True)


def note(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)
