"""What these tests share: settings of the servers of our own, and looking for processes."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any, Final

SERVER: Final = Path(__file__).with_name("server.py")


def local(*flags: str, **fields: Any) -> dict[str, Any]:
    """The settings of a server of our own, which `server.py` describes."""
    return {"command": sys.executable, "args": [str(SERVER), *flags], **fields}


def alive(pid: int) -> bool:
    """Whether there is a process of this number; one that is only waited for is none."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return False
    return state != b"Z"


def pids(file: Path) -> list[int]:
    """The process ids that servers have written to a file."""
    return [int(line) for line in file.read_text().split()] if file.exists() else []


async def gone(file: Path, limit_s: float = 10.0) -> None:
    """Wait until none of the processes in a file is alive."""
    async with asyncio.timeout(limit_s):
        while any(alive(pid) for pid in pids(file)):
            await asyncio.sleep(0.02)


async def written(file: Path, text: str, limit_s: float = 10.0) -> None:
    """Wait until a file holds this text."""
    async with asyncio.timeout(limit_s):
        while not file.exists() or text not in file.read_text():
            await asyncio.sleep(0.01)
