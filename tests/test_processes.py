"""The watchdog by itself: what it watches is killed with this process, whatever became of it."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ownware_gateway import processes
from ownware_gateway.processes import Watchdog

MARK = "OWNWARE_TEST=1"

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="watchdogs are found in /proc"
)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process with the mark, in a session of its own, that would run for long."""
    environment = dict([MARK.split("=")])
    process = subprocess.Popen(["/bin/sleep", "600"], env=environment, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def watchdogs() -> list[int]:
    """The watchdogs that this process has started and has not seen the end of."""
    script, found = os.fsencode(processes.__file__), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_bytes().rpartition(b")")[2].split()[1]
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # It is gone.
            continue
        if int(parent) == os.getpid() and script in command:
            found.append(int(folder.name))
    return found


def test_a_watchdog_takes_over_what_one_that_was_killed_has_watched(
    sleeper: subprocess.Popen[bytes],
) -> None:
    watchdog = Watchdog()
    before = {*watchdogs()}
    watchdog.watch(sleeper.pid, MARK)
    (first,) = {*watchdogs()} - before
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    watchdog.watch(None, "OWNWARE_TEST=2")
    assert len({*watchdogs()} - before) == 1
    watchdog.close()
    assert sleeper.wait() == -signal.SIGKILL


def test_ends_may_be_told_while_the_watchdog_closes(sleeper: subprocess.Popen[bytes]) -> None:
    watchdog = Watchdog()
    before = {*watchdogs()}
    watchdog.watch(sleeper.pid, MARK)
    closing = threading.Thread(target=watchdog.close)
    closing.start()
    while closing.is_alive():
        watchdog.forget("OWNWARE_TEST=2")
    assert sleeper.wait() == -signal.SIGKILL
    assert {*watchdogs()} <= before
