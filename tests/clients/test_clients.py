"""The clients that people have, unchanged but for the base URL.

Each is installed into an environment of its own from a lock file here, once: `make clients`. It
needs the package indexes, and Node 20 with npm.
"""

import asyncio
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Final

import pytest

from tests.gateway import Gateways
from tests.provider import Call, Provider, Reply

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
GOLDEN: Final = HERE.parent / "golden"
#: A folder that no clone has and `make clean` removes.
INSTALLED: Final = ROOT / ".venv" / "clients"

INSTALL_S: Final = 600
RUN_S: Final = 120


def folder(name: str, lock: Path) -> Path:
    """Where a client is installed; another lock file is another place."""
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()[:12]
    return INSTALLED / f"{name}-{digest}"


def python_of(name: str) -> str:
    """The Python that has a client, which is installed if it is not yet."""
    lock = HERE / f"{name}.lock"
    place = folder(name, lock)
    python = place / "bin" / "python"
    if not (place / "whole").exists():
        venv.create(place, with_pip=False, clear=True)
        # Little of what is installed is ever imported, so nothing is compiled beforehand.
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-compile"]
        run([*pip, "--quiet", "--require-hashes", "-r", str(lock)])
        (place / "whole").touch()
    return str(python)


def node_modules() -> Path:
    """A folder with the client for Node, and the script beside it."""
    place = folder("node", HERE / "node" / "package-lock.json")
    npm = shutil.which("npm")
    assert npm is not None, "npm is not installed"
    if not (place / "whole").exists():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(HERE / "node", place)
        # In its folder: with --prefix npm would not read what is set for all of the machine.
        run([npm, "ci", "--no-audit", "--no-fund"], place)
        (place / "whole").touch()
    for script in HERE.glob("node/*.mjs"):
        shutil.copy(script, place)
    return place


def run(command: list[str], folder: Path | None = None) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S)
    assert done.returncode == 0, done.stderr[-2000:]


async def talk(url: str, *command: str) -> str:
    """Have a client talk to the gateway; return its name and version."""
    return str(json.loads((await output(url, *command)).splitlines()[-1])["client"])


async def output(url: str, *command: str) -> str:
    """Return what a client that talks to the gateway writes."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env={"PATH": os.environ["PATH"], "HOME": str(INSTALLED), "GATEWAY": url},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(RUN_S):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()[-4000:]
    return out.decode()


@pytest.fixture
def scripted(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> Provider:
    """A model server that repeats what is said, and fails or calls tools where it is told to."""
    take = provider._take

    async def taken(request: object) -> object:
        reply, asked = await take(request)  # type: ignore[arg-type]
        if '"FAIL"' in json.dumps(asked.body.get("messages", "")):
            reply = Reply(status=400, error="no such thing")
        if (last := asked.body.get("messages", [{}])[-1]).get("content") == "CALL":
            calls = [Call("weather", {"city": city}, id=city) for city in ("Rome", "Oslo")]
            reply = Reply(text=["I look."], calls=calls)
        elif last.get("role") == "tool":
            results = [m["content"] for m in asked.body["messages"] if m["role"] == "tool"]
            reply = Reply(text=[" and ".join(results)])
        return reply, asked

    monkeypatch.setattr(provider, "_take", taken)
    return provider


@pytest.mark.parametrize("name", ["openai", "langchain", "litellm"])
async def test_a_python_client_works(
    start_gateway: Gateways, scripted: Provider, name: str
) -> None:
    lock = "langchain-openai" if name == "langchain" else name
    python = await asyncio.to_thread(python_of, lock)
    up = await start_gateway()
    script = HERE / "scripts" / f"{name}_python.py"
    assert (await talk(up.url, python, str(script), str(GOLDEN))).startswith(lock)


@pytest.mark.parametrize("language", ["python", "js"])
async def test_the_examples_of_the_page_work(
    start_gateway: Gateways, scripted: Provider, tmp_path: Path, language: str
) -> None:
    page = (ROOT / "docs" / "openai.md").read_text("utf-8")
    blocks = re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    up = await start_gateway()
    example = "".join(blocks).replace("http://localhost:3011", up.url)
    if language == "python":
        command = [await asyncio.to_thread(python_of, "openai"), "-c", example]
    else:
        place = await asyncio.to_thread(node_modules)
        script = place / "example.mjs"
        script.write_text(example, "utf-8")
        node = shutil.which("node")
        assert node is not None, "Node is not installed"
        command = [node, str(script)]
    assert "Hello!" in await output(up.url, *command)


async def test_the_client_for_node_works(start_gateway: Gateways, scripted: Provider) -> None:
    place = await asyncio.to_thread(node_modules)
    node = shutil.which("node")
    assert node is not None, "Node is not installed"
    up = await start_gateway()
    assert "Node" in await talk(up.url, node, str(place / "openai.mjs"))
