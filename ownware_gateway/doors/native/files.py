"""Threads as files: one JSON object a line, a header first, then every event."""

import contextlib
import json
from typing import Any, Final

from pydantic import ValidationError

from ownware_gateway.errors import GatewayError
from ownware_gateway.events import Event, SessionEnd, UserMessage, decode
from ownware_gateway.log import Thread
from ownware_gateway.transcript import RunFacts

FORMAT: Final = "ownware.thread"
VERSION: Final = 1

#: Events that one file may hold; what is larger is no conversation.
EVENTS_MAX: Final = 500_000


def export_header(thread: Thread) -> bytes:
    """Return the first line of a file."""
    header = {"format": FORMAT, "version": VERSION, "threadId": thread.id, "title": thread.title}
    return json.dumps(header, ensure_ascii=False).encode() + b"\n"


def parse_export(data: bytes) -> tuple[str, list[Event]]:
    """Return the title and the events of a file; raises GatewayError with the line that is wrong.

    Every run in it must have ended: a file is history, and nothing in it may go on.
    """
    lines = data.split(b"\n")
    if lines and not lines[-1].strip():
        lines.pop()
    title = _title(lines[0])
    if len(lines) > EVENTS_MAX:
        raise GatewayError("payload_too_large", f"A file holds at most {EVENTS_MAX} events.")
    events: list[Event] = []
    run: RunFacts | None = None
    for number, line in enumerate(lines[1:], 2):
        event = _event(line, number)
        # Where something was removed, the new thread simply goes on: its numbers are its own.
        if event.type != "stream.gap":
            run = _follow(run, event, number)
            events.append(event)
    if not events:
        raise _wrong(len(lines), "there is no event in the file")
    if run is not None:
        raise _wrong(len(lines), f"the run {run.message.run_id} has no end")
    return title, events


def _follow(run: RunFacts | None, event: Event, number: int) -> RunFacts | None:
    """Return the run that is open after an event; raises GatewayError where it cannot stand."""
    match event:
        case UserMessage() if run is None:
            return RunFacts(event)
        case SessionEnd(run_id=run_id) if run is not None and run.message.run_id == run_id:
            return None
        case UserMessage() | SessionEnd():
            raise _wrong(number, f"a {event.type} cannot stand here")
        case _ if run is None:
            raise _wrong(number, f"a {event.type} stands outside of a run")
        case _:
            pass
    try:
        run.apply(event)
    except KeyError:
        raise _wrong(number, f"a {event.type} of a call that the run does not have") from None
    return run


def _title(line: bytes) -> str:
    header: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        header = json.loads(line)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _wrong(1, f'the first line must be a header with "format": "{FORMAT}"')
    if header.get("version") != VERSION:
        raise _wrong(1, f"this gateway reads version {VERSION} of the format")
    title = header.get("title", "")
    # JSON can spell what is no text, such as half a surrogate pair.
    return title[:200].encode("utf-8", "replace").decode() if isinstance(title, str) else ""


def _event(line: bytes, number: int) -> Event:
    try:
        return decode(line)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        raise _wrong(number, f"{path or 'it'}: {first['msg']}") from None


def _wrong(line: int, what: str) -> GatewayError:
    return GatewayError("invalid_request", f"The file cannot be read: line {line}: {what}.")
