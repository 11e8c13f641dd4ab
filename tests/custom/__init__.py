"""What these tests share: profiles with tools of their own, calling those, and their processes."""

import asyncio
import os
import textwrap
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp

from ownware_gateway.custom import Given, Trust
from ownware_gateway.custom.source import OwnTools
from ownware_gateway.masking import Masker
from ownware_gateway.processes import Watchdog
from ownware_gateway.profile import Profile
from ownware_gateway.profile.folder import Profiles
from tests.gateway import run_events, start_run
from tests.provider import Call, Provider, Reply

Http = aiohttp.ClientSession

AUTO: Final = {"permissionMode": "auto"}


def write_tools(profile: Path, **files: str) -> None:
    """Write files of tools, by their names without `.py`, into a profile's folder."""
    (profile / "tools").mkdir(exist_ok=True)
    for name, text in files.items():
        (profile / "tools" / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")


@asynccontextmanager
async def own_tools(
    profile: Path, workspace: Path, environment: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[OwnTools, Profile]]:
    """Connect the tools of a profile without a gateway around them."""
    workspace.mkdir(exist_ok=True)
    read = Profiles(profile.parent).get(profile.name)
    harmless = {"PATH": os.environ["PATH"]}
    given = Given(harmless, workspace, (environment or {}).get, Masker(), Watchdog())
    own = OwnTools(Trust(everyone=True), given)
    await own.connect(read)
    try:
        yield own, read
    finally:
        await asyncio.to_thread(given.watchdog.close)


def ends(said: list[dict[str, Any]]) -> dict[str, tuple[str, bool]]:
    """What the model was told of its calls, by the names of the tools."""
    return {
        event["toolName"]: (event["result"], event["isError"])
        for event in said
        if event["type"] == "tool.call.end"
    }


async def called(
    http: Http, url: str, provider: Provider, *wanted: Call, **body: Any
) -> list[dict[str, Any]]:
    """Have the model make these calls at once in one run; return its events."""
    provider.reply(Reply(calls=wanted), Reply(text=["done"]))
    run = await start_run(http, url, "go", **body)
    return await run_events(http, url, run["runId"])


def alive(pid: int) -> bool:
    """Whether there is a process of this number; one that is only waited for is none."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return False
    return state != b"Z"


def pids(file: Path) -> list[int]:
    """The process ids that tools have written to a file."""
    return [int(line) for line in file.read_text().split()] if file.exists() else []


async def written(file: Path, count: int, limit_s: float = 10.0) -> None:
    """Wait until so many processes stand in a file."""
    async with asyncio.timeout(limit_s):
        while len(pids(file)) < count:
            await asyncio.sleep(0.01)


async def gone(file: Path, count: int, limit_s: float = 10.0) -> None:
    """Wait until so many processes stand in a file, and none of them is alive."""
    await written(file, count, limit_s)
    async with asyncio.timeout(limit_s):
        while any(map(alive, pids(file))):
            await asyncio.sleep(0.02)
