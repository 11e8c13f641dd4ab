"""The processes of a benchmark: started, measured through /proc, and gone at its end."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Final

from ownware_gateway import datadir
from tests.bench.load import Load, Result
from tests.gateway import FAKE_KEY, write_profile

ROOT_FOLDER: Final = Path(__file__).parents[2]
PATIENCE_S: Final = 60.0

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


class Served:
    """A process that serves, and what it has used so far."""

    def __init__(self, process: Process, url: str, folder: Path) -> None:
        self._process = process
        self.url = url
        self.folder = folder
        self._proc = Path(f"/proc/{process.pid}")

    def memory_mb(self) -> float:
        """Resident memory, in millions of bytes."""
        return int((self._proc / "statm").read_text().split()[1]) * _PAGE_BYTES / 1e6

    def peak_mb(self) -> float:
        """The most resident memory since the start, or since `forget_peak`."""
        status = (self._proc / "status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6

    def forget_peak(self) -> None:
        """Measure the peak anew."""
        (self._proc / "clear_refs").write_text("5")

    def cpu_s(self) -> float:
        """Seconds of processor time, of the user and the system, of all threads."""
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

    def handles(self) -> int:
        """Open file handles."""
        return len(list((self._proc / "fd").iterdir()))

    async def counts(self) -> dict[str, int]:
        """Return what a gateway that was started as `counted` holds: `tasks`, `timers`."""
        self._process.send_signal(signal.SIGUSR1)
        while not (line := await _line(self._process)).startswith("{"):
            pass  # What it said at its start.
        return dict(json.loads(line))

    async def stop(self) -> None:
        """Stop it and wait until it is gone."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
        await self._process.wait()


@contextlib.asynccontextmanager
async def _process(folder: Path, *arguments: str, **environment: str) -> AsyncIterator[Process]:
    with (folder / "stderr").open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=errors,
            cwd=ROOT_FOLDER,
            env={**os.environ, **environment},
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        await process.wait()


async def _line(process: Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        return (await process.stdout.readline()).decode().strip()


@contextlib.asynccontextmanager
async def provider(folder: Path) -> AsyncIterator[str]:
    """Run the model server; yield its address."""
    async with _process(folder, "-m", "tests.bench.provider") as process:
        yield await _line(process)


@contextlib.asynccontextmanager
async def bare(folder: Path, provider_url: str) -> AsyncIterator[Served]:
    """Run the bare pipeline."""
    arguments = ("-m", "tests.bench.bare", "serve", str(folder), provider_url)
    async with _process(folder, *arguments) as process:
        yield Served(process, await _line(process), folder)


@contextlib.asynccontextmanager
async def gateway(
    folder: Path, provider_url: str, *flags: str, module: str = "ownware_gateway"
) -> AsyncIterator[Served]:
    """Run the gateway as a person does, with a profile `bench` whose model is the provider's.

    As the module `tests.bench.counted` it says on request what it holds.
    """
    write_profile(
        folder / "profiles", "bench", model="openai:bench", tools={"preset": "none"}, security={}
    )
    arguments = ["-m", module, "serve", "--port", "0", *flags]
    for name in ("data-dir", "profiles", "workspace"):
        arguments += [f"--{name}", str(folder / name)]
    environment = {"OPENAI_BASE_URL": f"{provider_url}/v1", "OPENAI_API_KEY": FAKE_KEY}
    async with _process(folder, *arguments, **environment) as process:
        while not (await _line(process)).startswith("Ownware Gateway"):
            pass
        found = datadir.running(folder / "data-dir")
        assert found is not None
        assert found[1] is not None
        yield Served(process, found[1], folder)


async def printed(*arguments: str) -> str:
    """Return what a process of ours prints, which must end well."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdin=DEVNULL, stdout=PIPE, cwd=ROOT_FOLDER
    )
    text, _ = await process.communicate()
    assert process.returncode == 0, arguments
    return text.decode()


async def carry(load: Load) -> Result:
    """Have the load client do something, in a process of its own."""
    text = await printed("-m", "tests.bench.load", json.dumps(asdict(load)))
    return Result(**json.loads(text))
