"""A shell for the agent: it says what a command wrote, and leaves nothing of it running.

A command has its own session and process group, and a mark in its environment by which processes
that left both are found (where there is a /proc). When the shell has ended, the time is up or the
call is cancelled, all of them are killed: background processes do not outlive their call. Only a
process that has left the session and also dropped its environment can get away.
"""

import asyncio
import codecs
import os
import re
import signal
import subprocess
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from ownware_gateway.masking import without_begun, without_ended
from ownware_gateway.processes import signal_group, sweep_up
from ownware_gateway.tools import (
    KEPT_BYTES_MAX,
    OUTPUT_LIMIT_BYTES,
    TIMEOUT_S,
    Context,
    Output,
    Tool,
    ToolFailed,
    Whole,
)

#: The most that a call may ask for as its `timeout_s`.
TIMEOUT_MAX_S: Final = 600.0

#: The tool's own limit acts this much before the engine's, which would lose the output.
TIMEOUT_MARGIN_S: Final = 5.0

#: A command that writes more than this is killed.
OUTPUT_HARD_LIMIT_BYTES: Final = 64 * 1024 * 1024

#: What the notes in and under the output may take of `OUTPUT_LIMIT_BYTES`.
NOTES_BYTES: Final = 1024

#: How much of the beginning of an output is told, and how much of its end, where errors stand.
HEAD_BYTES: Final = OUTPUT_LIMIT_BYTES // 2 - NOTES_BYTES
TAIL_BYTES: Final = OUTPUT_LIMIT_BYTES // 2

#: How much of the beginning is kept, to be read on in.
KEPT_HEAD_BYTES: Final = KEPT_BYTES_MAX - TAIL_BYTES - NOTES_BYTES

#: Most progress lines of one call, and most characters of one.
PROGRESS_LINES_MAX: Final = 100
PROGRESS_LINE_CHARS_MAX: Final = 200

#: Time between SIGTERM and SIGKILL when the time is up; a cancelled command gets SIGKILL at once.
TERM_GRACE_S: Final = 0.5

#: How long the output may stay open after the shell has ended: a background process holds it.
PIPE_GRACE_S: Final = 0.2

#: How long to wait until killed processes are gone: when the time is up, and on cancellation.
KILL_WAIT_S: Final = 1.0
CANCEL_WAIT_S: Final = 0.05

#: The environment variable by which a command's processes are found.
MARK: Final = "OWNWARE_CALL"

READ_BYTES: Final = 65_536

#: Most reads that empty the pipe at the end; a pipe holds at most 1 MiB.
DRAIN_READS_MAX: Final = 16

_LINE_END: Final = re.compile(r"[\r\n]+")


async def shell_execute(context: Context, arguments: dict[str, Any]) -> Output:
    """Run a command in the workspace and return what it wrote and how it ended.

    Raises ToolFailed when it cannot be started.
    """
    command = _Command(context, arguments["command"])
    try:
        await command.wait(float(arguments.get("timeout_s", TIMEOUT_S)))
    finally:
        await command.close()
    return command.output()


class _Command:
    """A running command.

    A thread of its own waits for the shell and then kills what is left, so that no cancellation of
    the caller, however often, can interrupt that.
    """

    def __init__(self, context: Context, command: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._finished: asyncio.Future[None] = self._loop.create_future()
        self._drained = threading.Event()
        self._kept = _Kept()
        self._progress = _Progress(context.progress)
        self._mark = uuid.uuid4().hex
        self._watchdog = context.watchdog
        self._flooded = False
        self._limit_s: float | None = None
        self._left_over = 0
        self._pipe, write_end = os.pipe()
        # Before it runs: it may be done with its worst before anybody looks again.
        self._watch(None)
        try:
            self._process = self._start(context, command, write_end)
        except BaseException:
            os.close(self._pipe)
            self._forget()
            raise
        finally:
            os.close(write_end)
        os.set_blocking(self._pipe, False)
        self._loop.add_reader(self._pipe, self._read)
        self._watch(self._process.pid)
        threading.Thread(target=self._reap, name="shell-reaper", daemon=True).start()

    def _watch(self, session: int | None) -> None:
        # Without anybody who watches it runs all the same.
        with suppress(OSError):
            if self._watchdog is not None:
                self._watchdog.watch(session, f"{MARK}={self._mark}")

    def _forget(self) -> None:
        if self._watchdog is not None:
            self._watchdog.forget(f"{MARK}={self._mark}")

    def _start(self, context: Context, command: str, write_end: int) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(  # noqa: S603 -- running what it is told is what a shell is for
                ["/bin/sh", "-c", command],
                cwd=context.workspace,
                env={**context.environment, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                start_new_session=True,
            )
        except ValueError as error:
            raise ToolFailed(
                "The command holds a NUL or half a surrogate pair, which no shell can be given."
            ) from error
        except OSError as error:
            if not context.workspace.is_dir():
                raise ToolFailed("The workspace folder does not exist.") from error
            raise ToolFailed(f"The command could not be started: {error.strerror}.") from error

    async def wait(self, limit_s: float) -> None:
        """Wait until the command has ended, or stop it when the time is up."""
        await asyncio.wait([self._finished], timeout=limit_s)
        if self._finished.done():
            return
        if self._process.returncode is None:
            self._limit_s = limit_s
        self._signal(signal.SIGTERM)
        await asyncio.wait([self._finished], timeout=TERM_GRACE_S)
        self._signal(signal.SIGKILL)
        await asyncio.wait([self._finished], timeout=KILL_WAIT_S)

    async def close(self) -> None:
        """Kill what still runs and let go of the pipe."""
        try:
            if not self._finished.done():
                self._signal(signal.SIGKILL)
                self._drained.set()
                await asyncio.wait([self._finished], timeout=CANCEL_WAIT_S)
        finally:
            for _ in range(DRAIN_READS_MAX):
                if not self._read():
                    break
            self._loop.remove_reader(self._pipe)
            os.close(self._pipe)

    def output(self) -> Output:
        """Return what was kept of the output and, under it, how the command ended."""
        ending = self._ending()
        notes = [ending] if ending else []
        if self._left_over and not self._limit_s and not self._flooded:
            notes.append(
                f"[processes left in the background, ended with the command: {self._left_over}]"
            )
        whole = self._kept.whole()
        if not whole.text and not notes:
            notes.append("[no output]")
        between = "\n" if whole.text and notes and not whole.text.endswith("\n") else ""
        whole = whole._replace(end=between + "\n".join(notes))
        return Output(
            whole.told(whole.text),
            bool(whole.gap),
            self._kept.bytes_raw,
            is_error=bool(ending),
            whole=whole if whole.gap else None,
        )

    def _ending(self) -> str:
        code = self._process.returncode
        if self._flooded:
            return f"[killed: it wrote more than {OUTPUT_HARD_LIMIT_BYTES} bytes]"
        if self._limit_s is not None:
            return (
                f"[killed: it was not done after {self._limit_s:g} s;"
                f" timeout_s may be up to {TIMEOUT_MAX_S:g}]"
            )
        if code < 0:
            return f"[killed by {_signal_name(-code)}]"
        return f"[exit code {code}]" if code else ""

    def _read(self) -> bool:
        """Take what is in the pipe; return whether there may be more."""
        try:
            raw = os.read(self._pipe, READ_BYTES)
        except BlockingIOError:
            return False
        self._progress.add(self._kept.add(raw))
        if not raw:
            self._loop.remove_reader(self._pipe)
            self._drained.set()
        elif self._kept.bytes_raw > OUTPUT_HARD_LIMIT_BYTES and not self._flooded:
            self._flooded = True
            self._signal(signal.SIGKILL)
        return bool(raw)

    def _signal(self, number: signal.Signals) -> None:
        # Once the shell is reaped its number may belong to another: the reaper sees to the rest.
        if self._process.returncode is None:
            signal_group(self._process.pid, number)

    def _reap(self) -> None:
        self._process.wait()
        self._drained.wait(PIPE_GRACE_S)
        self._left_over = sweep_up(self._process.pid, f"{MARK}={self._mark}", self._watchdog)
        with suppress(RuntimeError):  # The loop is closed when the gateway has stopped.
            self._loop.call_soon_threadsafe(self._finished.set_result, None)


class _Kept:
    """The first and the last part of an output, and how much there was of it."""

    def __init__(self) -> None:
        self.bytes_raw = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._head = bytearray()
        self._tail = bytearray()
        self._bytes = 0

    def add(self, raw: bytes) -> str:
        """Take the next bytes (none at the end) and return their text."""
        self.bytes_raw += len(raw)
        text = self._decoder.decode(raw, final=not raw)
        # Bytes that are no UTF-8 grow when they are replaced, so the text is what is measured.
        data = text.encode()
        self._bytes += len(data)
        room = KEPT_HEAD_BYTES - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 2 * TAIL_BYTES:
            del self._tail[:-TAIL_BYTES]
        return text

    def whole(self) -> Whole:
        """Return what was kept, and which part of it is told; all of it where there is no gap."""
        gap = ""
        if (left_out := self._bytes - HEAD_BYTES - TAIL_BYTES) > 0:
            gap = f"\n[cut: {self.bytes_raw} bytes in all, {left_out} left out here]\n"
        return Whole(self._text(), HEAD_BYTES, gap, TAIL_BYTES)

    def _text(self) -> str:
        tail = self._tail[-TAIL_BYTES:]
        left_out = self._bytes - len(self._head) - len(tail)
        if not left_out:
            return (self._head + tail).decode()
        return (
            without_begun(self._head.decode("utf-8", "ignore"))
            + f"\n[{left_out} bytes are not kept here]\n"
            + without_ended(tail.decode("utf-8", "ignore"))
        )


class _Progress:
    """Tells an output line by line, short, and not without end."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._told = 0
        self._begun = ""

    def add(self, text: str) -> None:
        """Tell the lines that are whole with this text."""
        if self._told > PROGRESS_LINES_MAX:
            return
        *lines, self._begun = _LINE_END.split(self._begun + text)
        self._begun = self._begun[: PROGRESS_LINE_CHARS_MAX + 1]
        for line in filter(str.strip, lines):
            self._told += 1
            if self._told > PROGRESS_LINES_MAX:
                self._tell(f"… (only the first {PROGRESS_LINES_MAX} lines are shown while it runs)")
                return
            long = len(line) > PROGRESS_LINE_CHARS_MAX
            # What masks secrets would not recognise the first part of one.
            self._tell(without_begun(line[:PROGRESS_LINE_CHARS_MAX]) + "…" if long else line)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # A real-time signal has no name.
        return f"signal {number}"


TOOLS: Final[tuple[Tool, ...]] = (
    Tool(
        name="shell_execute",
        description=(
            "Run a command with /bin/sh in the workspace folder and return what it wrote (stdout"
            " and stderr together) and its exit code when that is not 0. There is no input and no"
            " terminal; each call is a new shell, so `cd` and variables do not carry over."
            " Processes left in the background are ended with the call."
        ),
        input_schema={
            "type": "object",
            "properties": {
                "command": {
                    "type": "string",
                    "minLength": 1,
                    "description": "The command line, for example: ls -la src && wc -l src/*.py",
                },
                "timeout_s": {
                    "type": "number",
                    "exclusiveMinimum": 0,
                    "maximum": TIMEOUT_MAX_S,
                    "default": TIMEOUT_S,
                    "description": "Seconds after which the command is stopped.",
                },
            },
            "required": ["command"],
            "additionalProperties": False,
        },
        call=shell_execute,
        timeout_s=TIMEOUT_MAX_S + TIMEOUT_MARGIN_S,
        subject=lambda arguments: str(arguments["command"]),
    ),
)
