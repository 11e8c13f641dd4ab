"""The way into the workspace: every tool that takes a path stays inside, whatever is put there."""

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ownware_gateway.tools import Context, Output, ToolFailed, files, parse_arguments, search
from ownware_gateway.tools.workspace import PATH_CHARS_MAX

BY_NAME = {tool.name: tool for tool in (*files.TOOLS, *search.TOOLS)}
OUTSIDE = "what no tool may show"

#: A call of each tool that takes a path.
CALLS: dict[str, dict[str, Any]] = {
    "read_file": {},
    "list_files": {},
    "glob": {"pattern": "**"},
    "grep": {"pattern": "."},
    "write_file": {"content": "overwritten"},
    "edit_file": {"old_text": OUTSIDE, "new_text": "overwritten"},
}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text(OUTSIDE)
    return folder


@pytest.fixture
def context(workspace: Path) -> Context:
    return Context(workspace)


async def call(context: Context, name: str, **arguments: Any) -> Output:
    tool = BY_NAME[name]
    return await tool.call(context, parse_arguments(tool, json.dumps(arguments)))


def untouched(workspace: Path) -> bool:
    outside = workspace.parent / "outside"
    return [file.read_text() for file in outside.iterdir()] == [OUTSIDE]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "path",
    ["../outside/secret.txt", "/etc/passwd", "a/../../outside", "..", "{outside}/secret.txt"],
)
async def test_a_path_out_of_the_workspace_is_refused(
    context: Context, workspace: Path, name: str, path: str
) -> None:
    path = path.format(outside=workspace.parent / "outside")
    with pytest.raises(ToolFailed, match="outside the workspace"):
        await call(context, name, path=path, **CALLS[name])
    assert untouched(workspace)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("path", ["link", "folder/link", "dangling", "way/secret.txt", "way"])
async def test_a_link_is_refused_wherever_it_stands_in_a_path(
    context: Context, workspace: Path, name: str, path: str
) -> None:
    outside = workspace.parent / "outside"
    (workspace / "folder").mkdir()
    (workspace / "link").symlink_to(outside / "secret.txt")
    (workspace / "folder" / "link").symlink_to("../../outside/secret.txt")
    (workspace / "dangling").symlink_to(outside / "made.txt")
    (workspace / "way").symlink_to(outside)
    with pytest.raises(ToolFailed, match="is a symbolic link, and links are not followed"):
        await call(context, name, path=path, **CALLS[name])
    assert untouched(workspace)


@pytest.mark.parametrize("path", ["now/secret.txt", "now"])
async def test_what_keeps_turning_into_a_link_never_leads_out(
    context: Context, workspace: Path, path: str
) -> None:
    outside = workspace.parent / "outside"
    inside = Path(str(workspace / path).replace("now", "real"))
    inside.parent.mkdir(exist_ok=True)
    inside.write_text("inside")
    (workspace / "link").symlink_to(outside if path != "now" else outside / "secret.txt")
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            for source in ("real", "link"):
                os.rename(workspace / source, workspace / "now")
                time.sleep(0)
                os.rename(workspace / "now", workspace / source)

    swapper = threading.Thread(target=swap)
    swapper.start()
    seen = set()
    try:
        for _ in range(150):
            for name in ("read_file", "edit_file"):
                try:
                    done = await call(context, name, path=path, **CALLS[name])
                    seen.add(done.text)
                except ToolFailed as error:
                    seen.add(str(error).split()[0])
    finally:
        over.set()
        swapper.join()
    # It was inside, a link, or not there; and the text to edit stands only outside.
    assert seen <= {"inside", "old_text", "now", "There"}
    assert untouched(workspace)


async def test_a_link_put_in_place_of_a_file_is_replaced_and_not_written_through(
    context: Context, workspace: Path
) -> None:
    await call(context, "write_file", path="notes.txt", content="mine")
    (workspace / "notes.txt").unlink()
    (workspace / "notes.txt").symlink_to(workspace.parent / "outside" / "secret.txt")
    with pytest.raises(ToolFailed, match="symbolic link"):
        await call(context, "write_file", path="notes.txt", content="mine")
    assert untouched(workspace)


async def test_searches_do_not_follow_links(context: Context, workspace: Path) -> None:
    (workspace / "way").symlink_to(workspace.parent / "outside")
    (workspace / "link.txt").symlink_to(workspace.parent / "outside" / "secret.txt")
    assert (await call(context, "glob", pattern="**")).text == "No file matches."
    assert (await call(context, "grep", pattern="tool")).text == "No line matches."
    listed = (await call(context, "list_files")).text
    assert listed == "link.txt (link, not followed)\nway (link, not followed)"


async def test_an_absolute_path_inside_is_fine_also_through_a_link_to_the_workspace(
    workspace: Path,
) -> None:
    (workspace / "a.txt").write_text("hello")
    alias = workspace.parent / "alias"
    alias.symlink_to(workspace)
    for root in (workspace, alias):
        read = await call(Context(alias), "read_file", path=str(root / "b" / ".." / "a.txt"))
        assert read.text == "hello"


@pytest.fixture
def special_files(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    os.mkfifo(workspace / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(workspace)  # The whole path may be too long for a socket's name.
        listener.bind("socket")
        yield


@pytest.mark.usefixtures("special_files")
@pytest.mark.parametrize("name", ["read_file", "grep", "write_file", "edit_file"])
@pytest.mark.parametrize("path", ["fifo", "socket"])
async def test_a_pipe_or_a_socket_is_refused_at_once(
    context: Context, name: str, path: str
) -> None:
    async with asyncio.timeout(5):
        with pytest.raises(ToolFailed, match="not a regular file"):
            await call(context, name, path=path, **CALLS[name])


@pytest.mark.usefixtures("special_files")
async def test_a_search_passes_pipes_and_sockets_by(context: Context, workspace: Path) -> None:
    (workspace / "text").write_text("found")
    async with asyncio.timeout(5):
        assert (await call(context, "grep", pattern=".")).text == "text:1: found"


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("a\0b", "NUL"),
        ("\ud800", "surrogate"),
        ("x" * 300, "too long"),
        ("x/" * PATH_CHARS_MAX, "do not fit"),
        ("file/below", "is a file, not a folder"),
    ],
)
async def test_a_path_that_cannot_be_is_refused_with_a_sentence(
    context: Context, workspace: Path, name: str, path: str, says: str
) -> None:
    (workspace / "file").write_text("")
    with pytest.raises(ToolFailed, match=says):
        await call(context, name, path=path, **CALLS[name])


async def test_a_missing_workspace_is_said(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match="workspace folder does not exist"):
        await call(Context(tmp_path / "gone"), "list_files")


async def test_no_descriptor_is_left_open(context: Context, workspace: Path) -> None:
    (workspace / "a" / "b").mkdir(parents=True)
    (workspace / "a" / "b" / "c.txt").write_text("c")

    async def everything() -> None:
        for name, arguments in CALLS.items():
            for path in ("a/b/c.txt", "a/b", "a/missing/c", "../out"):
                try:
                    await call(context, name, path=path, **arguments)
                except ToolFailed:
                    continue

    await everything()
    before = len(os.listdir("/dev/fd"))
    await everything()
    assert len(os.listdir("/dev/fd")) <= before


async def test_a_write_leaves_the_other_name_of_a_hard_link_alone(
    context: Context, workspace: Path
) -> None:
    os.link(workspace.parent / "outside" / "secret.txt", workspace / "a.txt")
    await call(context, "write_file", path="a.txt", content="mine")
    assert untouched(workspace)
    assert (workspace / "a.txt").read_text() == "mine"


async def test_a_missing_file_names_the_nearest_one(context: Context, workspace: Path) -> None:
    (workspace / "src").mkdir()
    (workspace / "src" / "main.py").touch()
    with pytest.raises(ToolFailed, match=r"no src/mian\.py\. Did you mean src/main\.py\?"):
        await call(context, "read_file", path="src/mian.py")
    with pytest.raises(ToolFailed, match=r"no scr\. Did you mean src\?"):
        await call(context, "read_file", path="scr/main.py")
    with pytest.raises(ToolFailed, match=r"no zzz\. list_files shows"):
        await call(context, "edit_file", path="zzz", old_text="a", new_text="b")


def test_the_tools_that_only_read_are_said_to() -> None:
    assert {tool.name for tool in BY_NAME.values() if tool.reads_only} == {
        "read_file",
        "list_files",
        "glob",
        "grep",
    }
    assert all(tool.safe_to_repeat == tool.reads_only for tool in BY_NAME.values())
    for tool in BY_NAME.values():
        assert tool.input_schema["additionalProperties"] is False
        assert all("description" in item for item in tool.input_schema["properties"].values())
