"""The agent's files: what comes back when they are read and listed, what stands in them after."""

import asyncio
import json
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from ownware_gateway.images import IMAGE_BYTES_MAX, SIDE_PX_MAX
from ownware_gateway.tools import (
    KEPT_BYTES_MAX,
    OUTPUT_LIMIT_BYTES,
    Context,
    Image,
    Output,
    ToolFailed,
    parse_arguments,
)
from ownware_gateway.tools.files import LIST_ENTRIES_MAX, READ_LINES, TOOLS
from tests.pictures import png

BY_NAME = {tool.name: tool for tool in TOOLS}


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path)


async def call(context: Context, name: str, **arguments: Any) -> Output:
    tool = BY_NAME[name]
    return await tool.call(context, parse_arguments(tool, json.dumps(arguments)))


async def test_a_text_is_read_exactly_as_it_is(context: Context, tmp_path: Path) -> None:
    text = "\ufeffeins\r\nzwei\n\n\tdrei ✓"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert await call(context, "read_file", path="a.txt") == Output(
        text, bytes_raw=len(text.encode())
    )


async def test_a_page_says_with_which_offset_to_go_on(context: Context, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\nfour")
    page = await call(context, "read_file", path="a.txt", offset=2, limit=2)
    assert page.text == "two\nthree\n[lines 2 to 3 are shown; go on with offset 4]"
    assert not page.truncated
    assert (await call(context, "read_file", path="a.txt", offset=4)).text == "four"
    with pytest.raises(ToolFailed, match="has 4 lines; offset 5 is past its end"):
        await call(context, "read_file", path="a.txt", offset=5)


async def test_a_long_file_comes_in_pages_that_hold_all_of_it(
    context: Context, tmp_path: Path
) -> None:
    lines = [f"{number} {'x' * 90}\n" for number in range(3 * READ_LINES)]
    (tmp_path / "long.txt").write_text("".join(lines))
    read: list[str] = []
    while len(read) < len(lines):
        page = await call(context, "read_file", path="long.txt", offset=len(read) + 1)
        assert len(page.text.encode()) <= OUTPUT_LIMIT_BYTES
        got = page.text.splitlines(keepends=True)
        if got[-1].startswith("["):
            assert page.truncated
            assert page.bytes_raw == sum(map(len, lines[len(read) :]))
            assert got.pop().endswith(f"go on with offset {len(read) + len(got) + 1}]")
        read += got
    assert read == lines


async def test_a_line_longer_than_an_output_is_cut_and_said_so(
    context: Context, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("é" * OUTPUT_LIMIT_BYTES + "\nnext\n")
    read = await call(context, "read_file", path="a.txt")
    assert read.truncated
    assert len(read.text.encode()) <= OUTPUT_LIMIT_BYTES
    assert "[line 1 is cut" in read.text
    assert read.bytes_raw == 2 * OUTPUT_LIMIT_BYTES + 6
    assert (await call(context, "read_file", path="a.txt", offset=2)).text == "next\n"


async def test_the_rest_of_a_long_line_is_at_hand(context: Context, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 300_000 + "end\nnext\n")
    read = await call(context, "read_file", path="a.txt")
    assert read.whole is not None
    assert read.whole.text == "x" * 300_000 + "end\n"
    assert read.text.endswith("[lines 1 to 1 are shown; go on with offset 2]")
    (tmp_path / "a.txt").write_bytes(b"\xff" * (KEPT_BYTES_MAX + 1000))
    read = await call(context, "read_file", path="a.txt")
    assert read.whole is not None
    assert len(read.whole.text.encode()) <= KEPT_BYTES_MAX


@pytest.mark.parametrize("name", ["a.png", "a.txt"])
async def test_an_image_is_shown_as_one_whatever_its_name(
    name: str, context: Context, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(png(20, 10))
    size = len(png(20, 10))
    read = await call(context, "read_file", path=name, offset=7)
    assert read.text == f"[image: {name}, image/png, 20×10 pixels, {size} bytes]"
    assert read.content == (Image("image/png", png(20, 10)),)


async def test_an_image_that_no_model_takes_is_said_to_be_too_large(
    context: Context, tmp_path: Path
) -> None:
    (tmp_path / "wide.png").write_bytes(png(SIDE_PX_MAX + 1, 1))
    (tmp_path / "heavy.png").write_bytes(png(filler=IMAGE_BYTES_MAX))
    for name in ("wide.png", "heavy.png"):
        with pytest.raises(
            ToolFailed, match=r"is an image of \d+×\d pixels, \d+ bytes; up to 8000"
        ):
            await call(context, "read_file", path=name)


async def test_what_is_no_text_is_said(context: Context, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ToolFailed, match="image is a binary file of 6 bytes, neither text nor"):
        await call(context, "read_file", path="image")
    latin = (await call(context, "read_file", path="latin")).text
    assert latin == "caf\ufffd\n[this is not UTF-8: what cannot be read is shown as \ufffd]"
    assert (await call(context, "read_file", path="empty")).text == "[the file is empty]"
    with pytest.raises(ToolFailed, match="folder is a folder; list_files"):
        await call(context, "read_file", path="folder")


async def test_a_folder_is_listed_in_order_with_sizes(context: Context, tmp_path: Path) -> None:
    assert (await call(context, "list_files")).text == "[the folder is empty]"
    (tmp_path / "b").mkdir()
    (tmp_path / "c.txt").write_text("12345")
    (tmp_path / "a\nb").touch()
    listed = (await call(context, "list_files", path=".")).text
    assert listed == "'a\\nb' (0 bytes)\nb/\nc.txt (5 bytes)"


async def test_a_long_listing_says_how_much_there_is(context: Context, tmp_path: Path) -> None:
    for number in range(LIST_ENTRIES_MAX + 5):
        (tmp_path / f"{number:05}").touch()
    lines = (await call(context, "list_files")).text.splitlines()
    assert len(lines) == LIST_ENTRIES_MAX + 1
    assert lines[-1].startswith(f"[{LIST_ENTRIES_MAX} of {LIST_ENTRIES_MAX + 5} entries are shown")


async def test_a_file_is_written_with_its_folders(context: Context, tmp_path: Path) -> None:
    done = await call(context, "write_file", path="a/b/c.txt", content="héllo\r\n")
    assert done.text == "Wrote a/b/c.txt: 8 bytes."
    assert (tmp_path / "a/b/c.txt").read_bytes() == "héllo\r\n".encode()
    done = await call(context, "write_file", path="a/b/c.txt", content="")
    assert done.text == "Replaced a/b/c.txt: 0 bytes."
    assert [file.name for file in (tmp_path / "a/b").iterdir()] == ["c.txt"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("write_file", {"content": "new"}),
        ("edit_file", {"old_text": "old", "new_text": "new"}),
    ],
)
async def test_a_replaced_file_keeps_its_permissions(
    context: Context, tmp_path: Path, name: str, arguments: dict[str, str]
) -> None:
    script = tmp_path / "run.sh"
    script.write_text("old")
    script.chmod(0o750)
    await call(context, name, path="run.sh", **arguments)
    assert script.read_text() == "new"
    assert stat.S_IMODE(script.stat().st_mode) == 0o750


async def test_whoever_reads_during_writes_sees_a_whole_file(
    context: Context, tmp_path: Path
) -> None:
    texts = ["a" * 100_000, "b" * 200_000]
    await call(context, "write_file", path="a.txt", content=texts[0])
    over = threading.Event()
    seen: set[str] = set()

    def watch() -> None:
        while not over.is_set():
            seen.add((tmp_path / "a.txt").read_text())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for number in range(20):
            await call(context, "write_file", path="a.txt", content=texts[number % 2])
    finally:
        over.set()
        watcher.join()
    assert seen
    assert seen <= set(texts)


async def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(
    context: Context, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ToolFailed, match="folder is a folder"):
        await call(context, "write_file", path="folder", content="x")
    with pytest.raises(ToolFailed, match="half a surrogate pair"):
        await call(context, "write_file", path="a.txt", content="\ud800")
    with pytest.raises(ToolFailed, match="names the workspace folder itself"):
        await call(context, "write_file", path=".", content="x")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


async def test_an_edit_replaces_the_one_place(context: Context, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"caf\xe9 = 1\nb = 2\n")
    done = await call(context, "edit_file", path="a.py", old_text="b = 2", new_text="b = 3\nc = 4")
    assert done.text == "Replaced 1 place in a.py."
    assert (tmp_path / "a.py").read_bytes() == b"caf\xe9 = 1\nb = 3\nc = 4\n"


async def test_an_edit_keeps_the_line_endings_of_the_file(context: Context, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\nthree\r\n")
    await call(context, "edit_file", path="a.txt", old_text="one\ntwo", new_text="1\n2\r\n2.5")
    assert (tmp_path / "a.txt").read_bytes() == b"1\r\n2\r\n2.5\r\nthree\r\n"


async def test_an_edit_that_could_be_meant_twice_changes_nothing_and_says_where(
    context: Context, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("x\ny\nx\n")
    with pytest.raises(ToolFailed, match=r"stands more than once in a\.txt \(lines 1, 3\)"):
        await call(context, "edit_file", path="a.txt", old_text="x", new_text="z")
    (tmp_path / "b.txt").write_text("aaa")
    with pytest.raises(ToolFailed, match="stands more than once"):
        await call(context, "edit_file", path="b.txt", old_text="aa", new_text="z")
    assert (tmp_path / "a.txt").read_text() == "x\ny\nx\n"
    done = await call(
        context, "edit_file", path="a.txt", old_text="x", new_text="z", replace_all=True
    )
    assert done.text == "Replaced 2 places in a.txt."
    assert (tmp_path / "a.txt").read_text() == "z\ny\nz\n"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("a  = 1", "b", "other spaces, tabs or line breaks"),
        ("missing", "b", "read_file shows"),
        ("", "b", "must fit minLength: 1"),
        ("a = 1", "a = 1", "are the same"),
    ],
)
async def test_an_edit_that_cannot_be_done_says_why(
    context: Context, tmp_path: Path, old: str, new: str, says: str
) -> None:
    (tmp_path / "a.py").write_text("a = 1\n")
    with pytest.raises(ToolFailed, match=says):
        await call(context, "edit_file", path="a.py", old_text=old, new_text=new)
    assert (tmp_path / "a.py").read_text() == "a = 1\n"


async def test_an_edit_that_would_grow_without_bound_is_refused(
    context: Context, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("a" * 1_000_000)
    with pytest.raises(ToolFailed, match="would be over"):
        await call(
            context,
            "edit_file",
            path="a.txt",
            old_text="a",
            new_text="b" * 1_000_000,
            replace_all=True,
        )
    with pytest.raises(ToolFailed, match=r"more than once in a\.txt \(lines 1, 1, 1, 1, 1, …\)"):
        await call(context, "edit_file", path="a.txt", old_text="a", new_text="b")
    with pytest.raises(ToolFailed, match="old_text is not in"):
        await call(context, "edit_file", path="a.txt", old_text="a" * 500_000 + "b", new_text="")


async def test_edits_of_one_file_at_the_same_time_are_all_kept(
    context: Context, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("".join(f"<{number}>" for number in range(20)))
    await asyncio.gather(
        *(
            call(context, "edit_file", path="a.txt", old_text=f"<{number}>", new_text=f"{number};")
            for number in range(20)
        )
    )
    assert (tmp_path / "a.txt").read_text() == "".join(f"{number};" for number in range(20))
