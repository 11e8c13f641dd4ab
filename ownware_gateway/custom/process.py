"""A process for one request: started, watched, limited, and gone at the end with all it started.

It has a session of its own and a mark in its environment, as the commands of the shell have.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from ownware_gateway.processes import Watchdog, signal_group, sweep_up
from ownware_gateway.tools import ToolFailed

CHILD: Final = Path(__file__).with_name("child.py")

#: An answer that is longer is not taken; `child.py` refuses to send it.
ANSWER_BYTES_MAX: Final = 5 * 1_048_576

#: A tool that prints more than this is killed.
PRINTED_BYTES_MAX: Final = 16 * 1_048_576

#: Most lines of progress of one call, and most characters of one.
PROGRESS_LINES_MAX: Final = 100
PROGRESS_LINE_CHARS_MAX: Final = 200

#: The last of what it wrote to stderr, for the gateway's log.
STDERR_BYTES: Final = 8_192

#: How long the interpreter may take to be ready, which many at once make each other wait for.
START_S: Final = 30.0

#: How long it may go on when it has answered: threads that it has not ended, for example.
EXIT_GRACE_S: Final = 1.0

#: Time between SIGTERM and SIGKILL when the time is up; a cancelled call gets SIGKILL at once.
TERM_GRACE_S: Final = 0.5

#: How long its output may stay open after its end: something that it started holds it.
PIPE_GRACE_S: Final = 0.2

#: How long to wait until killed processes are gone: in good order, and on cancellation.
KILL_WAIT_S: Final = 1.0
CANCEL_WAIT_S: Final = 0.05

#: The environment variable by which its processes are found.
MARK: Final = "OWNWARE_TOOL"

READ_BYTES: Final = 65_536

#: Most reads that empty a pipe at the end; a pipe holds at most 1 MiB.
DRAIN_READS_MAX: Final = 16

_PROCESSORS: Final = os.cpu_count() or 1


class NotStarted(ToolFailed):
    """There was no process, so that nothing has happened."""


class Work(NamedTuple):
    """What a process is to do: a request for `child.py`, and what it is done with.

    It may take `limit_s` seconds of time and as many on each processor.
    """

    request: Mapping[str, Any]
    environment: Mapping[str, str]
    folder: Path
    memory_mb: int
    limit_s: float


class Tell(Protocol):
    """Who is told what is printed."""

    def __call__(self, line: str, /, *, was_cut: bool) -> None:
        """Take a line, whose end may have been cut off."""
        ...


class Answer(NamedTuple):
    """What came back, and the last that was written to stderr."""

    value: dict[str, Any]
    stderr: str


async def perform(work: Work, watchdog: Watchdog, progress: Tell) -> Answer:
    """Do some work in a process of its own.

    Raises ToolFailed in words that follow a name; what was written to stderr is its note.
    """
    process = _Process(work, watchdog, progress)
    try:
        await process.wait(work.limit_s)
    finally:
        await process.close()
    try:
        return process.answer()
    except ToolFailed as error:
        error.add_note(process.stderr)
        raise


class _Process:
    """A running process.

    A thread of its own gives it the request, waits for its end and then kills what is left, so that
    no cancellation of the caller, however often, can interrupt that.
    """

    def __init__(self, work: Work, watchdog: Watchdog, progress: Tell) -> None:
        self._loop = asyncio.get_running_loop()
        self._finished: asyncio.Future[None] = self._loop.create_future()
        self._moved = asyncio.Event()
        self._watchdog = watchdog
        self._drained = threading.Event()
        self._progress = _Progress(progress)
        self._mark = uuid.uuid4().hex
        self._work = work
        self._said = bytearray()
        self._lines = 0
        self._stderr = b""
        self._printed = 0
        self._stopped: str | None = None
        self._open: dict[int, Callable[[bytes], None]] = {}
        try:
            self._process = self._start()
        except OSError as error:
            self._close_pipes()
            raise NotStarted(f"could not be started: {error.strerror}.") from error
        for pipe in self._open:
            os.set_blocking(pipe, False)
            self._loop.add_reader(pipe, self._read, pipe)
        try:
            watchdog.watch(self._process.pid, f"{MARK}={self._mark}")
            request = self._encoded()
        except OSError as error:
            # It gets no request, and leaves by itself.
            self._stop(f"could not be watched: {error.strerror}")
            request = b""
        threading.Thread(
            target=self._reap, args=(request,), name="own-tool-reaper", daemon=True
        ).start()

    def _encoded(self) -> bytes:
        limits = {
            "memoryMb": self._work.memory_mb,
            # So that it ends by itself, should nobody be left to end it.
            "cpuS": int(self._work.limit_s * _PROCESSORS) + 1,
        }
        # As ASCII: half a surrogate pair in an argument is the child's to refuse.
        return json.dumps({**self._work.request, **limits}).encode() + b"\n"

    def _start(self) -> subprocess.Popen[bytes]:
        answer = self._pipe(self._take_answer)
        try:
            printed = self._pipe(self._take_printed)
            try:
                stderr = self._pipe(self._take_stderr)
                try:
                    return self._popen(answer, printed, stderr)
                finally:
                    os.close(stderr)
            finally:
                os.close(printed)
        finally:
            os.close(answer)

    def _pipe(self, take: Callable[[bytes], None]) -> int:
        """Make a pipe whose content is taken by this; return the end for writing."""
        read_end, write_end = os.pipe()
        self._open[read_end] = take
        return write_end

    def _popen(self, answer: int, printed: int, stderr: int) -> subprocess.Popen[bytes]:
        # Isolated from variables and folders of the user; text is UTF-8 whatever the language.
        flags = ["-I", "-X", "utf8", "-X", "faulthandler"]
        return subprocess.Popen(  # noqa: S603 - this package's own script
            [sys.executable, *flags, str(CHILD), str(answer)],
            cwd=self._work.folder,
            env={**self._work.environment, MARK: self._mark},
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=stderr,
            pass_fds=(answer,),
            start_new_session=True,
        )

    async def wait(self, limit_s: float) -> None:
        """Wait until it has answered and ended, or stop it when its time is up.

        The time counts from when it is ready to run what is the profile's.
        """
        if not await self._writes(1, START_S):
            why = f"was stopped: it was not ready after {START_S:g} s"
        elif not await self._writes(2, limit_s):
            why = f"was stopped: it was not done after {limit_s:g} s"
        else:
            why = ""
            await asyncio.wait([self._finished], timeout=EXIT_GRACE_S)
        if why:
            self._stop(why, signal.SIGTERM)
            await asyncio.wait([self._finished], timeout=TERM_GRACE_S)
        if not self._finished.done():
            self._signal(signal.SIGKILL)
            await asyncio.wait([self._finished], timeout=KILL_WAIT_S)

    async def _writes(self, lines: int, limit_s: float) -> bool:
        """Wait until it has written so many lines, or has ended; return whether it has in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self._lines < lines and not self._finished.done():
                    self._moved.clear()
                    await self._moved.wait()
        return self._lines >= lines or self._finished.done()

    async def close(self) -> None:
        """Kill what still runs and let go of the pipes."""
        try:
            if not self._finished.done():
                self._signal(signal.SIGKILL)
                self._drained.set()
                await asyncio.wait([self._finished], timeout=CANCEL_WAIT_S)
        finally:
            for pipe in list(self._open):
                for _ in range(DRAIN_READS_MAX):
                    if not self._read(pipe):
                        break
            self._close_pipes()

    def answer(self) -> Answer:
        """Return what it answered. Raises ToolFailed with how it ended when it did not."""
        if self._lines == 0:
            raise NotStarted(f"{self._stopped or self._ending()}.")
        if self._stopped is None and self._lines > 1:
            with suppress(ValueError, RecursionError):
                value = json.loads(self._said.partition(b"\n")[2])
                if isinstance(value, dict):
                    return Answer(value, self.stderr)
            raise ToolFailed("answered with something that is not what its process sends.")
        raise ToolFailed(f"{self._stopped or self._ending()}.")

    @property
    def stderr(self) -> str:
        """The last that it wrote there."""
        return self._stderr.decode("utf-8", "replace")

    def _ending(self) -> str:
        code = self._process.returncode
        if code is None:
            return "could not be ended"
        if code == -signal.SIGXCPU:
            return "was stopped: it used more time of the processor than it may"
        if code == -signal.SIGKILL:
            return "was killed from outside, perhaps for want of memory"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended its process (exit code {code}) before it returned anything"

    # -- what it writes

    def _read(self, pipe: int) -> bool:
        """Take what is in a pipe; return whether there may be more."""
        try:
            data = os.read(pipe, READ_BYTES)
        except BlockingIOError:
            return False
        if data:
            self._open[pipe](data)
            return True
        self._loop.remove_reader(pipe)
        os.close(pipe)
        del self._open[pipe]
        if not self._open:
            self._drained.set()
        return False

    def _close_pipes(self) -> None:
        for pipe in self._open:
            self._loop.remove_reader(pipe)
            os.close(pipe)
        self._open.clear()

    def _take_answer(self, data: bytes) -> None:
        self._said += data
        self._lines += data.count(b"\n")
        if len(self._said) > ANSWER_BYTES_MAX:
            self._said.clear()
            self._stop("was stopped: its answer is too long")
        self._moved.set()

    def _take_printed(self, data: bytes) -> None:
        self._count(data)
        self._progress.add(data)

    def _take_stderr(self, data: bytes) -> None:
        self._count(data)
        self._stderr = (self._stderr + data)[-STDERR_BYTES:]

    def _count(self, data: bytes) -> None:
        self._printed += len(data)
        if self._printed > PRINTED_BYTES_MAX:
            most = PRINTED_BYTES_MAX // 1_048_576
            self._stop(f"was stopped: it printed more than {most} MiB")

    # -- its end

    def _stop(self, why: str, number: signal.Signals = signal.SIGKILL) -> None:
        """End it; the first reason counts."""
        self._stopped = self._stopped or why
        self._signal(number)

    def _signal(self, number: signal.Signals) -> None:
        # Once it is reaped its number may belong to another: the reaper sees to the rest.
        if self._process.returncode is None:
            signal_group(self._process.pid, number)

    def _reap(self, request: bytes) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        with suppress(BrokenPipeError):
            stdin.write(request)
        with suppress(BrokenPipeError):
            stdin.close()
        if hasattr(os, "waitid"):  # Python has none on some systems.
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
            # All at once, as what forks and ends is gone before it is found; and before its number,
            # which is that of the group, can be another's.
            signal_group(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._drained.wait(PIPE_GRACE_S)
        sweep_up(self._process.pid, f"{MARK}={self._mark}", self._watchdog)
        with suppress(RuntimeError):  # The loop is closed when the gateway has stopped.
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self._finished.set_result(None)
        self._moved.set()


class _Progress:
    """Tells what is printed line by line, short, and not without end."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._told = 0
        self._begun = b""

    def add(self, data: bytes) -> None:
        """Tell the lines that are whole with this."""
        if self._told > PROGRESS_LINES_MAX:
            return
        *lines, self._begun = (self._begun + data).split(b"\n")
        # No character has more than 4 bytes.
        self._begun = self._begun[: 4 * PROGRESS_LINE_CHARS_MAX + 1]
        for line in filter(bytes.strip, lines):
            self._told += 1
            if self._told > PROGRESS_LINES_MAX:
                most = f"… (only the first {PROGRESS_LINES_MAX} lines are shown while it runs)"
                self._tell(most, was_cut=False)
                return
            text = line[: 4 * PROGRESS_LINE_CHARS_MAX + 1].decode("utf-8", "replace").rstrip("\r")
            long = len(text) > PROGRESS_LINE_CHARS_MAX
            self._tell(text[:PROGRESS_LINE_CHARS_MAX], was_cut=long)
