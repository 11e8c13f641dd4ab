"""The profiles that come with the gateway do what their descriptions say, on a real gateway."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from ownware_gateway.app import Gateway
from tests.gateway import (
    Gateways,
    get_json,
    open_stream,
    post_json,
    read_frames,
    run_events,
    start_run,
)
from tests.mcp import SERVER
from tests.provider import Call, Provider, Reply
from tests.sites import Site, answer
from tests.test_skills import ends, offered, system

Http = aiohttp.ClientSession

ROOT: Final = Path(__file__).parent.parent

#: Stands for the git server: the calls that it gets are what it answers.
GIT_SERVER: Final = f"""#!{sys.executable}
import importlib.util, json, sys
found = importlib.util.spec_from_file_location("server", {str(SERVER)!r})
server = importlib.util.module_from_spec(found)
found.loader.exec_module(server)
server.TOOLS.clear()
for name in "status diff_unstaged diff log show branch add commit reset".split():
    server.TOOLS["git_" + name] = server.schema(repo_path="string")
server.call = lambda number, name, arguments, meta: server.text(name + json.dumps(arguments))
server.main(sys.argv[1:])
"""


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    """A copy, since agents may add to it."""
    return Path(shutil.copytree(ROOT / "profiles", tmp_path / "profiles"))


async def ask(http: Http, up: Gateway, profile: str) -> dict[str, Any]:
    return await start_run(http, up.url, "go", profileId=profile, model="openai:test-model")


async def question(
    http: Http, up: Gateway, run: Mapping[str, Any], about: str, action: str
) -> dict[str, Any]:
    """Wait for a run's question about something, answer it, and return it."""
    async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
        read = await read_frames(
            response,
            until=lambda frame: frame.event == "permission.request" and about in frame.data,
        )
    path = f"/threads/{run['threadId']}/resume"
    assert (await post_json(http, up.url, path, {"action": action}))[0] == 200
    asked: dict[str, Any] = json.loads(read[-1].data)
    return asked


async def told(http: Http, up: Gateway, run: Mapping[str, Any]) -> list[tuple[str, bool]]:
    return ends(await run_events(http, up.url, run["runId"]))


def shell(command: str) -> Call:
    return Call("shell_execute", {"command": command})


async def test_all_of_them_can_be_used_on_a_plain_install(
    start_gateway: Gateways, http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    up = await start_gateway()
    found = await get_json(http, up.url, "/profiles")
    assert (found["broken"], found["warnings"]) == ([], [])
    assert len(found["items"]) == len(list((ROOT / "profiles").iterdir()))
    assert all(len(item["description"]) > 30 for item in found["items"])


# -- files


async def test_files_looks_freely_and_asks_before_it_moves_or_deletes(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    for name in ("b.txt", "a.txt"):
        (up.workspace / name).write_text(name)
    provider.reply(
        Reply(calls=[Call("load_skill", {"name": "organise-a-folder"})]),
        Reply(calls=[shell("ls && find . -name '*.txt' && wc -c a.txt")]),
        Reply(calls=[shell("mkdir -p old && mv -n b.txt old/")]),
        Reply(text=["done"]),
    )
    run = await ask(http, up, "files")
    await question(http, up, run, "mv -n", "approve")
    said = await told(http, up, run)
    assert "# Organise a folder" in said[0][0]
    assert "a.txt" in said[1][0]
    assert (up.workspace / "old" / "b.txt").read_text() == "b.txt"
    assert "- organise-a-folder: How to sort a folder" in system(provider.requests[0])
    assert "web_search" not in offered(provider.requests[0])

    provider.reply(Reply(calls=[shell("find . -name a.txt -delete")]))
    provider.reply(Reply(calls=[shell("rm -r old")]), Reply(text=["done"]))
    run = await ask(http, up, "files")
    await question(http, up, run, "-delete", "deny")
    assert (await question(http, up, run, "rm -r", "deny"))["rule"].startswith("policies.0 ")
    assert [is_error for _, is_error in await told(http, up, run)] == [True, True]
    assert (up.workspace / "a.txt").exists()
    assert (up.workspace / "old").exists()


# -- researcher


async def test_researcher_reads_a_page_with_a_yes_and_writes_notes_and_nothing_else(
    start_gateway: Gateways, http: Http, provider: Provider, profiles: Path
) -> None:
    async with Site() as site:
        site.pages["/facts"] = answer("<h1>Facts</h1><p>The sky is blue.</p>", "text/html")
        up = await start_gateway(fetch_private=(f"127.0.0.1:{site.port}",))
        url = f"http://127.0.0.1:{site.port}/facts"
        note = {"path": "notes/sky.md", "content": f"The sky is blue. [1]\n\n[1] {url}\n"}
        provider.reply(
            Reply(calls=[Call("web_fetch", {"url": url})]),
            Reply(calls=[Call("write_file", note)]),
            Reply(calls=[Call("write_file", {"path": "main.py", "content": "x"})]),
            Reply(calls=[Call("write_file", {"path": "notes/../x.md", "content": "x"})]),
            Reply(calls=[shell("ls")]),
            Reply(text=["Blue [1]"]),
        )
        run = await ask(http, up, "researcher")
        assert (await question(http, up, run, "web_fetch", "approve"))["input"] == {"url": url}
        said = await told(http, up, run)
        assert [is_error for _, is_error in said] == [False, False, True, True, True]
        assert "The sky is blue." in said[0][0]
        assert (up.workspace / "notes" / "sky.md").read_text() == note["content"]
        assert [path.name for path in up.workspace.iterdir()] == ["notes"]

        provider.reply(Reply(calls=[Call("remember", {"text": "Sources in English."})]))
        provider.reply(Reply(text=["done"]), Reply(text=["done"]))
        run = await ask(http, up, "researcher")
        await question(http, up, run, "remember", "approve")
        await told(http, up, run)
        await told(http, up, await ask(http, up, "researcher"))
        assert system(provider.requests[-1]).endswith(": Sources in English.")
        assert (profiles / "researcher" / "AGENTS.md").exists()


# -- git-helper


async def test_git_helper_looks_freely_and_asks_before_it_commits(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = tmp_path / "bin" / "mcp-server-git"
    command.parent.mkdir()
    command.write_text(GIT_SERVER)
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    up = await start_gateway()
    looks = [
        Call(f"git__git_{name}", {"repo_path": "."})
        for name in ("status", "diff_unstaged", "diff", "log", "show", "branch")
    ]
    option = {"repo_path": ".", "target": "--output=x"}
    commit = {"repo_path": ".", "message": "Add a test"}
    provider.reply(
        Reply(calls=looks),
        Reply(calls=[Call("git__git_diff", option)]),
        Reply(calls=[Call("git__git_commit", commit)]),
        Reply(text=["done"]),
    )
    run = await ask(http, up, "git-helper")
    assert (await question(http, up, run, "git_commit", "deny"))["input"] == commit
    said = await told(http, up, run)
    assert [is_error for _, is_error in said] == [False] * len(looks) + [True, True]
    assert "A rule of the profile denies this: policies.0" in said[-2][0]

    provider.reply(Reply(calls=[Call("git__git_log", {"repo_path": "/etc"})]))
    provider.reply(Reply(text=["done"]))
    run = await ask(http, up, "git-helper")
    await question(http, up, run, "/etc", "deny")
    await told(http, up, run)


async def test_git_helper_says_what_is_missing_where_its_server_is_not_installed(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    up = await start_gateway()
    (up.workspace / "a.txt").write_text("hello")
    provider.reply(Reply(calls=[Call("read_file", {"path": "a.txt"})]), Reply(text=["done"]))
    run = await ask(http, up, "git-helper")
    said = await run_events(http, up.url, run["runId"])
    assert ends(said) == [("hello", False)]
    assert said[-1]["status"] == "succeeded"
    notices = [event["text"] for event in said if event.get("notice")]
    assert len(notices) == 1
    assert "The MCP server 'git' is not available" in notices[0]
    assert "mcp-server-git" in notices[0]
    assert notices[0].strip().strip("[]") in system(provider.requests[0])


@pytest.mark.mcp
@pytest.mark.timeout(120)
async def test_git_helper_commits_with_the_real_server(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beside = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{beside}{os.pathsep}{os.environ['PATH']}")
    assert shutil.which("mcp-server-git"), "mcp-server-git is not installed"
    workspace = tmp_path / "repository"
    subprocess.run(["git", "init", "-q", str(workspace)], check=True)
    for name, value in (("user.name", "Test"), ("user.email", "test@example.com")):
        subprocess.run(["git", "-C", str(workspace), "config", name, value], check=True)
    (workspace / "new.txt").write_text("new")
    up = await start_gateway(workspace=str(workspace))
    here = {"repo_path": "."}
    provider.reply(
        Reply(calls=[Call("git__git_status", here)]),
        Reply(calls=[Call("git__git_add", {**here, "files": ["new.txt"]})]),
        Reply(calls=[Call("git__git_commit", {**here, "message": "Add new.txt"})]),
        Reply(calls=[Call("git__git_log", here)]),
        Reply(text=["done"]),
    )
    run = await ask(http, up, "git-helper")
    for name in ("git__git_add", "git__git_commit"):
        await question(http, up, run, name, "approve")
    said = await told(http, up, run)
    assert [is_error for _, is_error in said] == [False] * 4, said
    assert "new.txt" in said[0][0]
    assert "Add new.txt" in said[3][0]
