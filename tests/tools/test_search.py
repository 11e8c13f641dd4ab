"""Looking for files: what is found, what is left out and said so, and that every search ends."""

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ownware_gateway.tools import Context, Output, ToolFailed, parse_arguments
from ownware_gateway.tools.search import (
    DEPTH_MAX,
    GLOB_FILES_MAX,
    GREP_FILE_BYTES_MAX,
    GREP_LINES_MAX,
    TOOLS,
    grep,
)

BY_NAME = {tool.name: tool for tool in TOOLS}


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path)


async def call(context: Context, name: str, **arguments: Any) -> Output:
    tool = BY_NAME[name]
    return await tool.call(context, parse_arguments(tool, json.dumps(arguments)))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for path in (
        "README.md",
        "src/app.py",
        "src/deep/er/app.py",
        "src/deep/app.ts",
        "src/.hidden.py",
        "node_modules/x/index.ts",
        ".git/config",
        "a{1}.txt",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"this is {path}\nneedle\n")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*", "README.md a{1}.txt"),
        ("**/*.py", "src/.hidden.py src/app.py src/deep/er/app.py"),
        ("src/*.py", "src/.hidden.py src/app.py"),
        ("src/**/app.*", "src/app.py src/deep/app.ts src/deep/er/app.py"),
        ("src/deep/**", "src/deep/app.ts src/deep/er/app.py"),
        ("**/deep/**/*.{ts,py}", "src/deep/app.ts src/deep/er/app.py"),
        ("src/?pp.[pq]y", "src/app.py"),
        ("**/**/**/er/**/**/app.py", "src/deep/er/app.py"),
        (".git/*", ".git/config"),
        ("SRC/*", "No file matches."),
    ],
)
async def test_glob_finds(tree: Path, pattern: str, found: str) -> None:
    text = (await call(Context(tree), "glob", pattern=pattern)).text
    lines = [line for line in text.splitlines() if not line.startswith("[")]
    assert " ".join(lines) == found


async def test_glob_looks_below_its_path_and_answers_with_paths_of_the_workspace(
    tree: Path,
) -> None:
    context = Context(tree)
    assert (await call(context, "glob", pattern="*.ts", path="src/deep")).text == "src/deep/app.ts"
    text = (await call(context, "glob", pattern="**/index.ts")).text
    assert text == "No file matches.\n[not looked into: .git, node_modules]"
    text = (await call(context, "glob", pattern="**/index.ts", path="node_modules")).text
    assert text == "node_modules/x/index.ts"


@pytest.mark.parametrize("pattern", ["/etc/*", "../*", "", ".", "{a,b}" * 10])
async def test_a_glob_pattern_that_cannot_be_is_refused(context: Context, pattern: str) -> None:
    with pytest.raises(ToolFailed, match=r"no glob pattern|more than|must fit minLength"):
        await call(context, "glob", pattern=pattern)


async def test_glob_shows_so_many_files_and_says_that_there_are_more(
    context: Context, tmp_path: Path
) -> None:
    for number in range(GLOB_FILES_MAX + 1):
        (tmp_path / f"{number:05}").touch()
    lines = (await call(context, "glob", pattern="**")).text.splitlines()
    assert lines[-2] == f"{GLOB_FILES_MAX - 1:05}"
    assert lines[-1].startswith(f"[the first {GLOB_FILES_MAX} files are shown")


async def test_what_lies_too_deep_is_left_out_and_said_so(context: Context, tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["d"] * DEPTH_MAX)
    (folder / "d").mkdir(parents=True)
    (folder / "seen").touch()
    (folder / "d" / "too deep").touch()
    lines = (await call(context, "glob", pattern="**")).text.splitlines()
    assert lines == [
        "d/" * DEPTH_MAX + "seen",
        "[left out, as they are unreadable, too big or too deep: 1]",
    ]


async def test_a_pattern_of_many_stars_takes_no_time(context: Context, tmp_path: Path) -> None:
    (tmp_path / ("a" * 250)).touch()
    async with asyncio.timeout(5):
        text = (await call(context, "glob", pattern="**/" * 100 + "*a" * 100 + "*b")).text
    assert text == "No file matches."


async def test_grep_answers_with_path_line_number_and_line(tree: Path) -> None:
    context = Context(tree)
    text = (await call(context, "grep", pattern="need(le)?$", path="src/deep")).text
    assert text == "src/deep/app.ts:2: needle\nsrc/deep/er/app.py:2: needle"
    text = (await call(context, "grep", pattern="(?i)THIS IS", glob="*.md")).text
    assert text == "README.md:1: this is README.md\n[not looked into: .git, node_modules]"
    text = (await call(context, "grep", pattern="needle", glob="src/*.py")).text
    assert text.splitlines()[:2] == ["src/.hidden.py:2: needle", "src/app.py:2: needle"]
    text = (await call(context, "grep", pattern="this", path="src/app.py")).text
    assert text == "src/app.py:1: this is src/app.py"


async def test_the_end_of_a_file_is_no_empty_line(context: Context, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "empty").touch()
    assert (await call(context, "grep", pattern="^$")).text == "a.txt:2: "


async def test_grep_leaves_binary_and_big_files_out(context: Context, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\0needle")
    (tmp_path / "big").write_bytes(b"needle" * (GREP_FILE_BYTES_MAX // 6 + 1))
    text = (await call(context, "grep", pattern="needle")).text
    assert text == ("No line matches.\n[left out, as they are unreadable, too big or too deep: 1]")


async def test_grep_shows_the_part_of_a_long_line_that_matches(
    context: Context, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("x" * 5000 + "needle" + "y" * 5000)
    text = (await call(context, "grep", pattern="needle")).text
    assert "needle" in text
    assert len(text) < 400
    assert text.startswith("a.txt:1: …")
    assert text.endswith("…")


async def test_grep_shows_so_many_lines_and_says_that_it_stopped(
    context: Context, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("needle\n" * (GREP_LINES_MAX + 1))
    lines = (await call(context, "grep", pattern="needle")).text.splitlines()
    assert len(lines) == GREP_LINES_MAX + 1
    assert lines[-1] == f"[the first {GREP_LINES_MAX} lines are shown; narrow the search]"


@pytest.mark.parametrize(
    ("pattern", "says"),
    [("a(b", "at position 1"), ("*", "at position 0"), ("(" * 500 + ")" * 500, "recursion")],
)
async def test_a_wrong_regular_expression_is_said_with_its_place(
    context: Context, pattern: str, says: str
) -> None:
    with pytest.raises(ToolFailed, match=says):
        await call(context, "grep", pattern=pattern)


async def test_a_regular_expression_that_never_ends_is_stopped_in_time(
    context: Context, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("a" * 60 + "!")
    started = time.monotonic()
    with pytest.raises(ToolFailed, match=r"stopped after 0\.3 s"):
        await grep(context, {"pattern": "(a+)+$"}, time_limit_s=0.3)
    assert time.monotonic() - started < 2


async def test_what_was_found_before_the_time_was_up_is_shown(
    context: Context, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("aaa\n" + "a" * 60 + "!")
    found = await grep(context, {"pattern": "(a+)+$"}, time_limit_s=0.6)
    assert found.text.splitlines()[0] == "a.txt:1: aaa"
    assert "stopped after 0.6 s" in found.text


in_proc = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="children are found in /proc"
)


@in_proc
async def test_a_cancelled_search_stops_at_once(context: Context, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 60 + "!")
    search = asyncio.ensure_future(call(context, "grep", pattern="(a+)+$"))
    children = await searching_children()
    started = time.monotonic()
    search.cancel()
    with pytest.raises(asyncio.CancelledError):
        await search
    assert not children & children_of_this_process()
    assert time.monotonic() - started < 5


@in_proc
async def test_a_search_that_dies_is_no_search_without_a_match(
    context: Context, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("a" * 60 + "!")
    search = asyncio.ensure_future(call(context, "grep", pattern="(a+)+$"))
    for child in await searching_children():
        os.kill(int(child), signal.SIGKILL)
    with pytest.raises(ToolFailed, match="broke off"):
        await search


async def searching_children() -> set[str]:
    """Wait until a child of this process has computed for longer than a start takes."""
    async with asyncio.timeout(10):
        while not (children := {pid for pid in children_of_this_process() if cpu_ticks(pid) > 25}):
            await asyncio.sleep(0.001)
    return children


def children_of_this_process() -> set[str]:
    return {
        child
        for task in Path("/proc/self/task").iterdir()
        for child in (task / "children").read_text().split()
    }


def cpu_ticks(pid: str) -> int:
    """Return how long a process has computed: after a start, it is searching."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return int(user) + int(system)
