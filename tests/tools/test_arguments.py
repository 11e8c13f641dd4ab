"""Checking the arguments of a call, before anything that it takes has been imported."""

import json
import subprocess
import sys
from typing import Any

import pytest

from ownware_gateway.tools import Context, Output, Tool, ToolFailed, parse_arguments

HEAD = """
import asyncio, resource, sys, threading
from ownware_gateway.tools import ToolFailed, files, load_schemas, parse_arguments
(tool,) = (tool for tool in files.TOOLS if tool.name == "read_file")
assert "jsonschema" not in sys.modules
"""


def run_python(code: str) -> None:
    """Run it in a fresh interpreter, where nothing is imported yet."""
    subprocess.run([sys.executable, "-c", HEAD + code], check=True, timeout=20)


def test_what_checks_them_is_not_imported_on_the_event_loops_thread() -> None:
    run_python("""
class Watch:
    threads = set()

    def find_spec(self, name, *_):
        if name.startswith("jsonschema"):
            self.threads.add(threading.current_thread())

sys.meta_path.insert(0, Watch())
asyncio.run(load_schemas())
assert parse_arguments(tool, '{"path": "a"}') == {"path": "a"}
assert Watch.threads and threading.main_thread() not in Watch.threads
""")


def test_without_a_file_handle_they_are_not_checked_and_with_one_they_are() -> None:
    run_python("""
async def main():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    await load_schemas()
    try:
        parse_arguments(tool, '{"path": "a"}')
    except ToolFailed as error:
        assert "Try again" in str(error), error
    else:
        raise AssertionError("not checked, and taken")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert parse_arguments(tool, '{"path": "a"}') == {"path": "a"}
    try:
        parse_arguments(tool, '{"path": 1}')
    except ToolFailed as error:
        assert "$.path" in str(error), error
    else:
        raise AssertionError("not checked")

asyncio.run(main())
""")


async def nothing(_context: Context, _arguments: dict[str, Any]) -> Output:
    return Output("")


TOOL = Tool(
    name="paint",
    description="",
    input_schema={
        "type": "object",
        "properties": {
            "path": {"type": "string", "maxLength": 5},
            "count": {"type": "integer", "minimum": 1},
            "colour": {"enum": ["red", "blue"]},
            "size": {"type": ["number", "null"]},
            "layers": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["path"],
        "additionalProperties": False,
    },
    call=nothing,
)

SECRET = "sk-" + "s" * 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ('{"path": "a"', "are not JSON: Expecting ',' delimiter: line 1 column 13 (char 12)."),
        ('{"path": }', "are not JSON: Expecting value: line 1 column 10 (char 9)."),
        ("path: a", "are not JSON: Expecting value: line 1 column 1 (char 0)."),
        ("[" * 100_000, "are not JSON: "),
        (["a"], "do not fit: $: it must be of the type object, not array."),
        ("", "do not fit: $: 'path' is a required property."),
        ({}, "do not fit: $: 'path' is a required property."),
        (
            {"path": "a", "pth": SECRET},
            "do not fit: $: Additional properties are not allowed ('pth' was unexpected); "
            "known are: path, count, colour, size, layers.",
        ),
        ({"path": 1}, "do not fit: $.path: it must be of the type string, not integer."),
        ({"path": None}, "do not fit: $.path: it must be of the type string, not null."),
        ({"path": True}, "do not fit: $.path: it must be of the type string, not boolean."),
        ({"path": {"x": 1}}, "do not fit: $.path: it must be of the type string, not object."),
        (
            {"path": "a", "count": "2"},
            "do not fit: $.count: it must be of the type integer, not string.",
        ),
        (
            {"path": "a", "count": 1.5},
            "do not fit: $.count: it must be of the type integer, not number.",
        ),
        ({"path": "a", "count": 0}, "do not fit: $.count: it must fit minimum: 1."),
        (
            {"path": "a", "colour": SECRET},
            'do not fit: $.colour: it must be one of: "red", "blue".',
        ),
        (
            {"path": "a", "size": "big"},
            "do not fit: $.size: it must be of the type number or null, not string.",
        ),
        (
            {"path": "a", "layers": ["x", 2]},
            "do not fit: $.layers[1]: it must be of the type string, not integer.",
        ),
        ({"path": SECRET}, "do not fit: $.path: it must fit maxLength: 5."),
    ],
)
def test_what_is_wrong_with_them_is_said_with_its_place_and_never_its_value(
    arguments: Any, said: str
) -> None:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    with pytest.raises(ToolFailed) as failed:
        parse_arguments(TOOL, text)
    assert str(failed.value).startswith(f"The arguments of paint {said}")
    assert SECRET not in str(failed.value)


def test_many_things_that_are_wrong_are_said_together_and_not_without_end() -> None:
    with pytest.raises(ToolFailed) as failed:
        parse_arguments(TOOL, json.dumps({"layers": list(range(100)), "count": "x"}))
    assert str(failed.value).count("must be of the type") == 4
    assert "'path' is a required property" in str(failed.value)
