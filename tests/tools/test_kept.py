"""Reading on in an output that was cut."""

from pathlib import Path
from typing import Any

import pytest

from ownware_gateway.tools import OUTPUT_LIMIT_BYTES, Context, ToolFailed
from ownware_gateway.tools.kept import FOUND_MAX, LINE_CHARS_MAX, PAGE_CHARS, TOOLS, read_output


async def read(text: str, **arguments: Any) -> str:
    async def kept(call_id: str) -> str | None:
        return text if call_id == "c1" else None

    output = await read_output(Context(Path(), kept=kept), {"tool_call_id": "c1", **arguments})
    assert len(output.text.encode()) <= OUTPUT_LIMIT_BYTES
    assert not output.truncated
    return output.text


@pytest.mark.parametrize("limit", [7_000, PAGE_CHARS, 60_000])
async def test_the_pages_hold_all_of_it_whatever_its_characters(limit: int) -> None:
    text = "".join(f"{number:05}é\U0001f408" for number in range(20_000))
    whole, offset = "", 0
    for _ in range(40):
        page = await read(text, offset=offset, limit=limit)
        part, _, note = page.partition("\n[")
        whole += part
        if not note:
            break
        offset = int(note.rpartition(" ")[2].rstrip("]"))
        assert (
            note
            == f"{len(whole) - len(part)} to {offset} of {len(text)} characters are shown; "
            + (f"go on with offset {offset}]")
        )
    assert whole == text


async def test_lines_that_hold_a_text_come_with_their_place_in_whatever_case() -> None:
    text = "one\nTwo apples\nthree\ntwo pears"
    found = await read(text, contains="two")
    assert found == "4: Two apples\n21: two pears"
    assert await read(text, contains="two", offset=5) == "21: two pears"
    assert await read(text, contains="four") == "No line holds that."
    # In lower case this letter is two, and all behind it would be elsewhere.
    assert await read("\u0130\nTwo\ntwo", contains="two") == "6: two"


async def test_a_line_without_an_end_is_shown_in_parts_around_what_it_holds() -> None:
    text = "x" * 1000 + "needle" + "y" * 100_000 + "needle"
    first, last = (await read(text, contains="needle")).splitlines()
    assert first.startswith(f"{1000 - LINE_CHARS_MAX // 2}: x")
    assert first.endswith("y…")
    assert last.endswith("yneedle")


async def test_a_search_shows_so_many_lines_and_says_where_to_go_on() -> None:
    text = "needle\n" * (FOUND_MAX + 5)
    lines = (await read(text, contains="needle")).splitlines()
    assert len(lines) == FOUND_MAX + 1
    offset = int(lines[-1].rpartition(" ")[2].rstrip("]"))
    assert len((await read(text, contains="needle", offset=offset)).splitlines()) == 5


async def test_what_is_not_kept_is_said() -> None:
    with pytest.raises(ToolFailed, match="Nothing is kept of a call 'c9'"):
        await read("text", tool_call_id="c9")
    with pytest.raises(ToolFailed, match="has 4 characters; offset 4 is past its end"):
        await read("text", offset=4)


def test_it_only_reads() -> None:
    (tool,) = TOOLS
    assert tool.reads_only
    assert tool.safe_to_repeat
