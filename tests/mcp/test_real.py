"""Servers of others, as people install them: from PyPI beside this Python, from npm on the PATH.

    pip install mcp-server-time mcp-server-fetch mcp-server-git
    npm install --global @modelcontextprotocol/server-everything \\
        @modelcontextprotocol/server-filesystem
"""

import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.gateway import Gateways, get_json
from tests.loopback import Loopback
from tests.mcp.test_runs import AUTO, MakeProfile, calls
from tests.provider import Call, Provider

pytestmark = [pytest.mark.mcp, pytest.mark.timeout(120)]

Http = aiohttp.ClientSession


def python(module: str, *args: str, **fields: Any) -> dict[str, Any]:
    return {"command": sys.executable, "args": ["-m", module, *args], **fields}


def npm(command: str, *args: str, **fields: Any) -> dict[str, Any]:
    found = shutil.which(command)
    assert found is not None, f"{command} is not installed"
    return {"command": found, "args": list(args), "startTimeout": "60s", **fields}


@pytest.fixture
async def page() -> AsyncIterator[str]:
    """The address of a local web page."""

    async def serve(_: web.Request) -> web.Response:
        text = "<html><body><h1>A page</h1><p>Said on it: seventeen.</p></body></html>"
        return web.Response(text=text, content_type="text/html")

    app = web.Application()
    app.add_routes([web.get("/page.html", serve)])
    async with Loopback(app) as server:
        yield f"{server.url}/page.html"


async def test_servers_from_pypi(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    tmp_path: Path,
    page: str,
) -> None:
    repository = tmp_path / "repository"
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    (repository / "new.txt").write_text("new")
    servers = {
        "time": python("mcp_server_time", "--local-timezone", "UTC", trusted=True),
        "fetch": python("mcp_server_fetch", "--ignore-robots-txt", "--allow-private-ips"),
        "git": python("mcp_server_git", "--repository", str(repository)),
    }
    make_profile("assistant", tools={"preset": "none", "mcp": servers}, security=AUTO)
    up = await start_gateway()
    said = await calls(
        http,
        up.url,
        provider,
        Call("time__get_current_time", {"timezone": "Europe/Berlin"}),
        Call("fetch__fetch", {"url": page}),
        Call("git__git_status", {"repo_path": str(repository)}),
        Call("git__git_status", {"repo_path": "/no/such/place"}),
    )
    assert [is_error for _, is_error in said] == [False, False, False, True], said
    assert json.loads(said[0][0])["timezone"] == "Europe/Berlin"
    assert "Said on it: seventeen." in said[1][0]
    assert "new.txt" in said[2][0]
    states = {item["id"]: item["state"] for item in await get_json(http, up.url, "/mcp/servers")}
    assert states == {f"assistant:{name}": "ready" for name in servers}


async def test_servers_from_npm(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    tmp_path: Path,
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "note.txt").write_text("written down")
    servers = {
        "everything": npm("mcp-server-everything", trusted=True),
        "files": npm("mcp-server-filesystem", str(tmp_path / "files")),
    }
    make_profile("assistant", tools={"preset": "none", "mcp": servers}, security=AUTO)
    up = await start_gateway()
    said = await calls(
        http,
        up.url,
        provider,
        Call("everything__echo", {"message": "hello"}),
        Call("everything__get-sum", {"a": 2, "b": 3}),
        Call("everything__trigger-long-running-operation", {"duration": 1, "steps": 3}),
        Call("everything__get-tiny-image", {}),
        Call("files__read_text_file", {"path": str(tmp_path / "files" / "note.txt")}),
        Call("files__read_text_file", {"path": "/etc/passwd"}),
    )
    assert [is_error for _, is_error in said] == [False] * 5 + [True], said
    assert "hello" in said[0][0]
    assert "5" in said[1][0]
    assert "image/png" in said[3][0]
    assert "written down" in said[4][0]
