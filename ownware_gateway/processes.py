"""Child processes to their end: all that one has started is found and killed.

A child that is started in a session of its own, with a mark in its environment, is found with
everything that it started, also what left the session (where there is a /proc).

Run as a script this is the watchdog: it kills the processes that it was told of when its standard
input ends, which happens however the gateway dies. It uses nothing but the standard library.
"""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

#: How often to look for processes that are left, and how long to wait before the next look.
SWEEPS_MAX: Final = 10
SWEEP_PAUSE_S: Final = 0.002
LOOKS_IN_VAIN: Final = 2

#: How long the watchdog gives what may leave by itself: servers whose input has ended with the
#: gateway.
ORPHANS_GRACE_S: Final = 1.0

_PROC: Final = Path("/proc")


def signal_group(leader: int, number: int) -> None:
    """Send a signal to all of a process group, if there still is one.

    Once its leader is reaped, and nobody of it is left, the number may become another's.
    """
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def sweep(session: int | None, mark: bytes) -> int:
    """Kill the processes of a session or with a mark until none is left; return how many.

    `mark` is `NAME=value` as it stands in the environment. Where there is no /proc only the process
    group that is named like the session is killed, and 0 is returned. Blocks for some milliseconds.
    Raises OSError when no file handle is left to look with.
    """
    if not (_PROC / "self" / "stat").exists():
        if session is not None:
            signal_group(session, signal.SIGKILL)
        return 0
    seen: set[int] = set()
    looks_in_vain = 0
    for _ in range(SWEEPS_MAX):
        alive = [int(name) for name in os.listdir(_PROC) if _belongs(name, session, mark)]
        for pid in alive:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        # Once is not enough: the environment of one that is becoming another program is empty.
        looks_in_vain = 0 if alive else looks_in_vain + 1
        if looks_in_vain == LOOKS_IN_VAIN:
            break
        seen.update(alive)
        time.sleep(SWEEP_PAUSE_S)
    return len(seen)


def _belongs(name: str, session: int | None, mark: bytes) -> bool:
    """Whether this entry of /proc is a live process of the session or with the mark, see proc(5).

    The name of the program, which may hold anything, stands in parentheses before the fields.
    """
    if not name.isdigit():
        return False
    try:
        state, _, _, its_session = (
            (_PROC / name / "stat").read_bytes().rpartition(b")")[2].split()[:4]
        )
        if state in (b"Z", b"X"):
            return False
        if int(its_session) == session:
            return True
        return mark in (_PROC / name / "environ").read_bytes().split(b"\0")
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return False  # It is gone, or another user's.


class Watchdog:
    """A process that kills sessions when this one is gone; it starts with the first of them.

    Not PR_SET_PDEATHSIG: that reaches the child alone and not what it started, and exists on Linux
    only.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        #: What is watched, by its mark, in the words in which it was told.
        self._watched: dict[str, str] = {}
        #: Threads that have seen a process to its end say so beside the event loop.
        self._lock = threading.Lock()

    def watch(self, session: int | None, mark: str, *, leaves: bool = False) -> None:
        """Have what has a mark killed when this process dies, and its session once that is known.

        That is a little later where it `leaves` by itself. Raises OSError when there is nobody to
        do so.
        """
        line = f"{'~' if leaves else '+'} {session or 0} {mark}\n"
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            self._watched[mark] = line
            self._tell(line)

    def forget(self, mark: str) -> None:
        """Leave it alone: it has ended, and the number of its session may become another's."""
        with self._lock:
            self._watched.pop(mark, None)
            self._tell(f"- 0 {mark}\n")

    def close(self) -> None:
        """End the watchdog; what it still watches is killed."""
        with self._lock:
            process, self._process = self._process, None
            self._watched.clear()
        if process is not None:
            _let_go(process)
            process.wait()

    def _start(self) -> None:
        """Start the watchdog, or the next one, which takes over what the last one has watched."""
        last = self._process
        self._process = subprocess.Popen(  # noqa: S603 - this file
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,
        )
        if last is not None:
            _let_go(last)
        self._tell("".join(self._watched.values()))

    def _tell(self, lines: str) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            # Somebody has killed it: the next session starts another one.
            with suppress(BrokenPipeError):
                self._process.stdin.write(lines.encode())
                self._process.stdin.flush()


def sweep_up(session: int, mark: str, watchdog: Watchdog | None) -> int:
    """Kill what a child that has ended has left, and have it watched no more; return how many.

    Where no file handle is left to look with, the watchdog finds them at its end, by the mark: the
    number of the session may be another's by then. Blocks for some milliseconds.
    """
    try:
        found = sweep(session, mark.encode())
    except OSError:
        with suppress(OSError):
            if watchdog is not None:
                watchdog.watch(None, mark)
        return 0
    if watchdog is not None:
        watchdog.forget(mark)
    return found


def _let_go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()


def _stand_by() -> None:
    """Take sessions from standard input; kill what is left of them when it ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    watched: dict[str, tuple[int | None, bool]] = {}
    for line in sys.stdin:
        sign, session, mark = line.rstrip("\n").split(" ", 2)
        if sign == "-":
            watched.pop(mark, None)
        else:
            watched[mark] = int(session) or None, sign == "~"
    for later in (False, True):
        left = [(leader, mark) for mark, (leader, leaves) in watched.items() if leaves is later]
        if left and later:
            time.sleep(ORPHANS_GRACE_S)
        for its_leader, its_mark in left:
            sweep(its_leader, its_mark.encode())


if __name__ == "__main__":
    _stand_by()
