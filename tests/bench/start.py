"""How long a start takes, and what a gateway holds that nobody uses yet.

Each beside a process that only imports the packages that no gateway can do without, in turn, so
that both meet the same machine. `python -m tests.bench.start` runs it by itself.
"""

import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Final

from ownware_gateway.settings import Settings, variable
from tests.bench.rows import Row
from tests.bench.served import PATIENCE_S, ROOT_FOLDER
from tests.gateway import write_profile

#: What is imported to compare with.
BASE: Final = "import aiohttp.web, aiosqlite, yaml, platformdirs, pydantic"

ROUNDS: Final = 5
RATIO_MAX: Final = 1.5
IDLE_MB_MAX: Final = 65.0

#: How long after the start the memory is looked at.
IDLE_S: Final = 3.0

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def _environment() -> dict[str, str]:
    """Return the environment without settings and keys, and with compiled modules kept."""
    ours = {"PYTHONDONTWRITEBYTECODE", *(variable(item.name) for item in fields(Settings))}
    return {name: value for name, value in os.environ.items() if name not in ours}


@contextlib.contextmanager
def _process(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT_FOLDER,
        env=_environment(),
    )
    assert process.stdout is not None
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        process.stdout.close()


def _memory_mb(process: subprocess.Popen[bytes]) -> float:
    statm = Path(f"/proc/{process.pid}/statm").read_text()
    return int(statm.split()[1]) * _PAGE_BYTES / 1e6


def _ask(address: str) -> None:
    """Send one request, which must be answered with a 200."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as client:
        client.sendall(f"GET /api/v1/health HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
        assert client.recv(64).startswith(b"HTTP/1.1 200 ")


@contextlib.contextmanager
def _base() -> Iterator[tuple[float, subprocess.Popen[bytes]]]:
    """Import the packages; yield how many seconds after its start the process had them."""
    began_s = time.perf_counter()
    code = f"{BASE}\nprint(flush=True)\nimport time\ntime.sleep({PATIENCE_S})"
    with _process("-c", code) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield time.perf_counter() - began_s, process


@contextlib.contextmanager
def _gateway(profiles: Path) -> Iterator[tuple[float, subprocess.Popen[bytes]]]:
    """Start a gateway on an empty folder; yield the seconds from then to its first 200."""
    with tempfile.TemporaryDirectory(dir=profiles.parent) as folder:
        arguments = ["-m", "ownware_gateway", "serve", "--port", "0"]
        arguments += ["--data-dir", f"{folder}/data", "--profiles", str(profiles)]
        began_s = time.perf_counter()
        with _process(*arguments) as process:
            assert process.stdout is not None
            # It says its address once it listens. Trying a port again and again until then would
            # take some of its processor.
            _ask(process.stdout.readline().decode().rpartition("//")[2].strip())
            yield time.perf_counter() - began_s, process


def _measure(folder: Path, rounds: int) -> list[Row]:
    profiles = folder / "start-profiles"
    write_profile(profiles, "bench", security={})
    with _base(), _gateway(profiles):
        pass  # Not counted: now all that can be is compiled and in the system's cache.
    base_s, cold_s = [], []
    for _ in range(rounds):
        with _base() as (took_s, _process_of_base):
            base_s.append(took_s)
        with _gateway(profiles) as (took_s, _process_of_gateway):
            cold_s.append(took_s)
    with _base() as (_, base), _gateway(profiles) as (_, gateway):
        time.sleep(IDLE_S)
        base_mb, idle_mb = _memory_mb(base), _memory_mb(gateway)
    base_median_s, cold_median_s = statistics.median(base_s), statistics.median(cold_s)
    ratio = cold_median_s / base_median_s
    beside = f"{base_median_s:.3f} s for the import of the base packages; medians of {rounds}"
    return [
        Row("cold start, to the first 200", cold_median_s, "s", beside, "", True),
        Row(
            "cold start / import of the base packages",
            ratio,
            "x",
            f"fastest: {min(cold_s):.3f} s and {min(base_s):.3f} s",
            f"<= {RATIO_MAX}",
            ratio <= RATIO_MAX,
        ),
        Row(
            f"idle memory, {IDLE_S:g} s after the start",
            idle_mb,
            "MB",
            f"{base_mb:.1f} MB with the base packages alone",
            f"<= {IDLE_MB_MAX:g}",
            idle_mb <= IDLE_MB_MAX,
        ),
    ]


async def start(folder: Path, rounds: int = ROUNDS) -> list[Row]:
    """Measure it, in a folder that is empty or not there yet; return the rows of the table."""
    # Off the loop, which has nothing else to do meanwhile: blocking sockets are the lightest.
    return await asyncio.to_thread(_measure, folder, rounds)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as given:
        for row in asyncio.run(start(Path(given))):
            sys.stdout.write(f"{row.line()}\n")
