"""Names and sizes: what becomes of listed tools, and of lines that are too long."""

import re
from typing import Any

import pytest
from hypothesis import given, settings, strategies as some

from ownware_gateway.mcp.child import MESSAGE_BYTES_MAX, TooLong, _Splitter, _Tail
from ownware_gateway.mcp.offers import (
    LEFT_OUT_MAX,
    SCHEMA_BYTES_MAX,
    TOOLS_MAX,
    offers,
)
from ownware_gateway.tools.names import NAME_CHARS_MAX


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "inputSchema": {"type": "object"}, **fields}


@settings(max_examples=30)
@given(some.lists(some.text(min_size=1, max_size=100), unique=True, max_size=20))
def test_names_are_what_providers_take_and_no_two_are_the_same(names: list[str]) -> None:
    found, left_out = offers("server", [tool(name) for name in names])
    assert left_out == []
    assert [item.wire_name for item in found] == names
    assert len({item.name for item in found}) == len(names)
    for item in found:
        assert re.fullmatch(r"[A-Za-z0-9_-]+", item.name)
        assert item.name.startswith("server__")
        assert len(item.name) <= NAME_CHARS_MAX


def test_a_name_that_needs_no_change_keeps_its_place() -> None:
    found, _ = offers("s", [tool("get-sum"), tool("get.sum"), tool("get_sum")])
    assert [item.name for item in found[:2]] == ["s__get-sum", "s__get_sum"]
    assert re.fullmatch(r"s__get_sum_[0-9a-f]{8}", found[2].name)


def test_what_cannot_be_offered_is_left_out_and_said() -> None:
    large = {"type": "object", "description": "x" * SCHEMA_BYTES_MAX}
    found, left_out = offers(
        "s",
        [tool("good"), tool("a", inputSchema={"type": "string"}), tool("b", inputSchema=large)],
    )
    assert [item.wire_name for item in found] == ["good"]
    assert found[0].input_schema == {"type": "object", "properties": {}}
    assert "'a' is left out: its input is no object" in left_out[0]
    assert "'b' is left out: its schema has" in left_out[1]
    many, left_out = offers("s", [tool(f"t{number}") for number in range(1_000)])
    assert len(many) == TOOLS_MAX
    assert len(left_out) == LEFT_OUT_MAX + 1


@settings(max_examples=30)
@given(some.lists(some.binary(max_size=30).filter(lambda data: b"\n" not in data)), some.data())
def test_lines_come_out_whole_however_they_come_in(lines: list[bytes], data: Any) -> None:
    sent = b"".join(line + b"\n" for line in lines)
    splitter, read = _Splitter(), []
    while sent:
        size = data.draw(some.integers(1, len(sent)))
        read += splitter.feed(sent[:size])
        sent = sent[size:]
    assert read == lines


@pytest.mark.parametrize("piece", [65_536, 3 * MESSAGE_BYTES_MAX])
def test_of_a_line_that_is_too_long_only_the_ends_are_kept(piece: int) -> None:
    sent = b"BEGIN" + b"x" * MESSAGE_BYTES_MAX + b"END\nnext\n"
    splitter, read = _Splitter(), []
    for start in range(0, len(sent), piece):
        read += splitter.feed(sent[start : start + piece])
        assert sum(map(len, splitter._pieces)) <= MESSAGE_BYTES_MAX
    long, following = read
    assert isinstance(long, TooLong)
    assert long.size_bytes == MESSAGE_BYTES_MAX + 8
    assert long.head.startswith(b"BEGIN")
    assert long.tail.endswith(b"END")
    assert following == b"next"


def test_the_last_lines_are_kept_and_a_half_one_is_not() -> None:
    tail = _Tail()
    for number in range(10_000):
        tail.add(f"line {number}\n".encode())
    lines = tail.lines()
    assert lines[-1] == "line 9999"
    assert len(lines) == 20
    tail.add(b"y" * 100_000)
    assert tail.lines() == ["y" * 500]
