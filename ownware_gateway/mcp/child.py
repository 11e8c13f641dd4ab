"""A server's process: lines to it and from it, the last that it wrote to stderr, and its end.

It has a session of its own, and the environment that it is given and no more. Whatever it does, it
is gone when it was closed, with all that it started.
"""

import asyncio
import signal
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from ownware_gateway.processes import Watchdog, signal_group, sweep_up

#: The longest message that is taken; of a longer one only the size is known.
MESSAGE_BYTES_MAX: Final = 8 * 1_048_576

#: Who writes more than this without the end of a line is given up.
LINE_BYTES_MAX: Final = 256 * 1_048_576

#: How much is kept of both ends of a line that is too long: one of them tells what it answers.
ENDS_BYTES: Final = 512

#: Lines, and bytes of them, that wait to be handled before no more are read.
LINES_WAITING_MAX: Final = 64
BYTES_WAITING_MAX: Final = 1_048_576

#: How long the output may stay open after the server has ended: something that it started holds it.
PIPE_GRACE_S: Final = 0.2

#: The last of what a server wrote to stderr.
STDERR_BYTES: Final = 16_384
STDERR_LINES_MAX: Final = 20
STDERR_LINE_CHARS_MAX: Final = 500

#: How long a server may take to leave when its input has ended, and then after SIGTERM.
EXIT_GRACE_S: Final = 1.0
TERM_GRACE_S: Final = 1.0

#: How long to wait until a killed process is gone.
KILL_WAIT_S: Final = 1.0

#: The environment variable by which a server's processes are found.
MARK: Final = "OWNWARE_SERVER"

_STDIN, _STDOUT, _STDERR = 0, 1, 2


@dataclass(frozen=True, slots=True)
class TooLong:
    """A line that was not kept: its size, and both its ends."""

    size_bytes: int
    head: bytes
    tail: bytes


class Child(asyncio.SubprocessProtocol):
    """A running server."""

    def __init__(self) -> None:
        self.stderr = _Tail()
        self._mark = uuid.uuid4().hex
        self._watchdog: Watchdog | None = None
        self._transport: asyncio.SubprocessTransport | None = None
        self._splitter = _Splitter()
        self._lines: deque[bytes | TooLong] = deque()
        self._waiting_bytes = 0
        self._news = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._exited = asyncio.Event()
        self._closed = asyncio.Event()
        self._paused = False
        self._ended = False

    @staticmethod
    async def start(
        command: Sequence[str], environment: Mapping[str, str], folder: Path, watchdog: Watchdog
    ) -> "Child":
        """Start a server. Raises OSError or ValueError when it cannot be started."""
        child = Child()
        await asyncio.get_running_loop().subprocess_exec(
            lambda: child,
            *command,
            env={**environment, MARK: child._mark},
            cwd=folder,
            start_new_session=True,
        )
        try:
            watchdog.watch(child.pid, f"{MARK}={child._mark}", leaves=True)
        except BaseException:
            # Nobody would look after it.
            await child.close()
            raise
        child._watchdog = watchdog
        return child

    @property
    def pid(self) -> int:
        """The number of its process."""
        assert self._transport is not None
        return self._transport.get_pid()

    @property
    def ending(self) -> str | None:
        """How it ended, for words after its name; None while it runs."""
        assert self._transport is not None
        code = self._transport.get_returncode()
        if code is None:
            return None
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    async def ended(self) -> str:
        """Return how it ended, once it has written its last; it may run on without a word."""
        await _within(self._exited, PIPE_GRACE_S)
        return self.ending or "closed its output"

    async def read(self) -> bytes | TooLong | None:
        """Return the next line that it wrote; None when there will be no more."""
        while not self._lines:
            if self._ended:
                return None
            self._news.clear()
            await self._news.wait()
        line = self._lines.popleft()
        self._waiting_bytes -= len(line) if isinstance(line, bytes) else 0
        if self._paused and not self._lines:
            self._paused = False
            self._pipe(_STDOUT).resume_reading()
        return line

    async def write(self, line: bytes) -> None:
        """Send it a line. Raises BrokenPipeError when it does not listen any more."""
        await self._writable.wait()
        pipe = cast(asyncio.WriteTransport, self._pipe(_STDIN))
        if pipe.is_closing():
            raise BrokenPipeError
        pipe.write(line + b"\n")

    async def close(self) -> None:
        """End it and all that it started: first politely, by the end of its input."""
        assert self._transport is not None
        try:
            self._pipe(_STDIN).close()
            if not await _within(self._exited, EXIT_GRACE_S):
                self._signal(signal.SIGTERM)
                await _within(self._exited, TERM_GRACE_S)
        finally:
            self._signal(signal.SIGKILL)
            try:
                # In a thread, which no second cancellation interrupts.
                await asyncio.to_thread(sweep_up, self.pid, f"{MARK}={self._mark}", self._watchdog)
            finally:
                self._transport.close()
                await _within(self._closed, KILL_WAIT_S)

    def _signal(self, number: signal.Signals) -> None:
        # Once it is reaped its number may belong to another: the sweep sees to the rest.
        if not self._exited.is_set():
            signal_group(self.pid, number)

    def _pipe(self, number: int) -> asyncio.ReadTransport:
        assert self._transport is not None
        return cast(asyncio.ReadTransport, self._transport.get_pipe_transport(number))

    # -- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the process."""
        self._transport = cast(asyncio.SubprocessTransport, transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Take what it wrote."""
        if fd == _STDERR:
            self.stderr.add(data)
            return
        lines = self._splitter.feed(data)
        self._lines.extend(lines)
        self._waiting_bytes += sum(len(line) for line in lines if isinstance(line, bytes))
        if self._splitter.size_bytes > LINE_BYTES_MAX:
            self._end()
        full = len(self._lines) > LINES_WAITING_MAX or self._waiting_bytes > BYTES_WAITING_MAX
        if full and not self._paused:
            self._paused = True
            self._pipe(_STDOUT).pause_reading()
        self._news.set()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        """Note that there will be no more of what it wrote, or that it takes no more."""
        if fd == _STDOUT:
            self._end()
        if fd == _STDIN:
            self._writable.set()

    def process_exited(self) -> None:
        """Note that it has ended; what it started may still hold its pipes open."""
        self._exited.set()
        asyncio.get_running_loop().call_later(PIPE_GRACE_S, self._end)

    def _end(self) -> None:
        self._ended = True
        self._news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that all of it is gone."""
        self._closed.set()

    def pause_writing(self) -> None:
        """Hold writers back: it does not read what it was sent."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Let writers go on."""
        self._writable.set()


async def _within(event: asyncio.Event, limit_s: float) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await event.wait()
    return event.is_set()


class _Splitter:
    """Cuts what comes into lines, and never holds more of one than may be."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._pieces: list[bytes] = []
        self._head = b""
        self._tail = b""

    def feed(self, data: bytes) -> list[bytes | TooLong]:
        """Return the lines that end in this piece."""
        *ends, rest = data.split(b"\n")
        lines = []
        for end in ends:
            self._add(end)
            lines.append(self._take())
        self._add(rest)
        return lines

    def _add(self, piece: bytes) -> None:
        if len(self._head) < ENDS_BYTES:
            self._head += piece[: ENDS_BYTES - len(self._head)]
        self.size_bytes += len(piece)
        if self.size_bytes > MESSAGE_BYTES_MAX:
            kept = b"".join([*self._pieces[-1:], piece]) if self._pieces else self._tail + piece
            self._tail = kept[-ENDS_BYTES:]
            self._pieces.clear()
        elif piece:
            self._pieces.append(piece)

    def _take(self) -> bytes | TooLong:
        if self.size_bytes > MESSAGE_BYTES_MAX:
            line: bytes | TooLong = TooLong(self.size_bytes, self._head, self._tail)
        else:
            line = b"".join(self._pieces)
        self.size_bytes, self._head, self._tail = 0, b"", b""
        self._pieces.clear()
        return line


class _Tail:
    """The last of what was written."""

    def __init__(self) -> None:
        self._kept = b""
        self._cut = False

    def add(self, data: bytes) -> None:
        """Take the next piece."""
        kept = self._kept + data[-STDERR_BYTES:]
        self._cut = self._cut or len(kept) > STDERR_BYTES
        self._kept = kept[-STDERR_BYTES:]

    def lines(self) -> list[str]:
        """Return the last lines, whole ones: in half a key nobody recognises it."""
        lines = self._kept.decode("utf-8", "replace").splitlines()
        whole = lines[1:] if self._cut and len(lines) > 1 else lines
        return [line[:STDERR_LINE_CHARS_MAX] for line in whole[-STDERR_LINES_MAX:]]
