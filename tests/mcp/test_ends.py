"""What is left of a server that was removed, or that could not be looked after: nothing."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from ownware_gateway.masking import Masker
from ownware_gateway.mcp.child import Child
from ownware_gateway.mcp.config import ServerFiles
from ownware_gateway.mcp.keeper import Given
from ownware_gateway.mcp.supervisor import Supervisor
from ownware_gateway.processes import Watchdog
from ownware_gateway.profile.servers import McpServer
from ownware_gateway.tools import Context, ToolFailed
from tests.mcp import gone, local, pids

PATIENCE_S = 20.0


async def test_a_tool_that_a_run_still_holds_does_not_bring_a_removed_server_back(
    tmp_path: Path,
) -> None:
    tasks: set[asyncio.Task[None]] = set()
    watched = Given(
        dict(os.environ), tmp_path, os.environ.get, Masker(set()), lambda: 0, Watchdog(), tasks
    )
    servers = Supervisor(ServerFiles(tmp_path / "mcp.json"), watched)
    settings = McpServer.model_validate(local("--pids", str(tmp_path / "pids")))
    await servers.add("clock", settings)
    held = next(iter(servers._keepers[None, "clock"].tools().values()))
    started = pids(tmp_path / "pids")
    assert len(started) == 1

    await servers.remove("clock")
    await gone(tmp_path / "pids")
    with pytest.raises(ToolFailed, match="not available"):
        await held.call(Context(tmp_path), {})
    assert pids(tmp_path / "pids") == started
    async with asyncio.timeout(PATIENCE_S):
        await servers.close()
    watched.watchdog.close()


async def test_a_server_that_cannot_be_watched_is_not_left_running(tmp_path: Path) -> None:
    class Blind(Watchdog):
        def watch(self, session: int | None, mark: str, *, leaves: bool = False) -> None:
            raise OSError(24, "Too many open files")

    program = f"import os, sys, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    command = [sys.executable, "-c", f"{program}; time.sleep(600)"]
    with pytest.raises(OSError, match="Too many open files"):
        await Child.start(command, dict(os.environ), tmp_path, Blind())
    await gone(tmp_path / "pid")
