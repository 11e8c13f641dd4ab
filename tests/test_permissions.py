from typing import Any

import pytest

from ownware_gateway.app import tools
from ownware_gateway.permissions import (
    CODING,
    READONLY,
    allowed_tools,
    judge,
    operation_hash,
)
from ownware_gateway.policies import Operation
from ownware_gateway.profile import Profile
from ownware_gateway.tools import Context, Output, Tool

ALL = tools()


async def no_call(context: Context, arguments: dict[str, Any]) -> Output:
    raise AssertionError((context, arguments))


def profile(mode: str = "ask", **tools: Any) -> Profile:
    return Profile.model_validate(
        {"name": "p", "security": {"permissionMode": mode}, "tools": tools}
    )


def call(tool: Tool, hashed: str = "hash", **arguments: Any) -> Operation:
    return Operation(tool, {"command": "ls", **arguments}, hashed)


READ = Tool("read_file", "", {}, no_call, reads_only=True)
WRITE = Tool("write_file", "", {}, no_call)
SHELL = Tool("shell_execute", "", {}, no_call, subject=lambda given: str(given["command"]))


@pytest.mark.parametrize(
    ("mode", "tool", "decision"),
    [
        ("auto", READ, "run"),
        ("auto", WRITE, "run"),
        ("auto", SHELL, "run"),
        ("ask", READ, "run"),
        ("ask", WRITE, "ask"),
        ("ask", SHELL, "ask"),
        ("deny", READ, "run"),
        ("deny", WRITE, "deny"),
        ("deny", SHELL, "deny"),
        ("allowlist", READ, "deny"),
        ("allowlist", WRITE, "deny"),
        ("allowlist", SHELL, "deny"),
    ],
    ids=lambda value: value.name if isinstance(value, Tool) else value,
)
def test_the_mode_and_the_kind_of_tool_decide(mode: str, tool: Tool, decision: str) -> None:
    verdict = judge(profile(mode), call(tool), set())
    assert verdict.decision == decision
    assert verdict.reason


@pytest.mark.parametrize("tool", [READ, WRITE, SHELL], ids=lambda tool: tool.name)
def test_an_allowlist_runs_what_it_names_and_nothing_else(tool: Tool) -> None:
    listed = profile("allowlist", allow=[tool.name])
    assert judge(listed, call(tool), set()).decision == "run"
    others = profile("allowlist", allow=[name for name in ALL if name != tool.name])
    verdict = judge(others, call(tool), set())
    assert verdict.decision == "deny"
    assert tool.name in verdict.reason


def test_naming_a_tool_under_allow_does_not_spare_the_question() -> None:
    assert judge(profile("ask", allow=["write_file"]), call(WRITE), set()).decision == "ask"


def test_always_holds_for_a_tool_by_its_name() -> None:
    granted = {"write_file", "hash of one file"}
    assert judge(profile(), call(WRITE, "hash of another"), granted).decision == "run"


def test_always_holds_for_the_shell_by_the_very_operation() -> None:
    granted = {"shell_execute", "hash of ls"}
    assert judge(profile(), call(SHELL, "hash of ls"), granted).decision == "run"
    assert judge(profile(), call(SHELL, "hash of rm"), granted).decision == "ask"


def test_always_does_not_outlive_a_profile_that_has_become_strict() -> None:
    granted = {"write_file", "shell_execute", "hash"}
    for tool in (WRITE, SHELL):
        assert judge(profile("deny"), call(tool), granted).decision == "deny"
        assert judge(profile("allowlist"), call(tool), granted).decision == "deny"


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        pytest.param({"preset": "full"}, set(ALL), id="full"),
        pytest.param({"preset": "coding"}, set(CODING), id="coding"),
        pytest.param({"preset": "readonly"}, set(READONLY), id="readonly"),
        pytest.param({"preset": "none"}, set(), id="none"),
        pytest.param({"preset": "none", "allow": ["grep"]}, {"grep"}, id="added"),
        pytest.param(
            {"preset": "readonly", "deny": ["grep", "glob"]},
            {"read_file", "list_files", "read_output", "web_search", "todo_write", "ask_user"},
            id="taken away",
        ),
        pytest.param(
            {"preset": "none", "allow": ["grep"], "deny": ["grep"]}, set(), id="deny beats allow"
        ),
        pytest.param({"preset": "none", "allow": ["fly"]}, set(), id="what does not exist"),
        pytest.param(
            {"preset": "full", "deny": ["shell_execute"]},
            set(ALL) - {"shell_execute"},
            id="full but for one",
        ),
    ],
)
def test_a_profile_has_its_preset_with_what_it_adds_and_takes_away(
    fields: dict[str, Any], names: set[str]
) -> None:
    assert set(allowed_tools(profile(**fields), ALL)) == names


def test_every_tool_of_a_preset_exists_and_readonly_only_reads() -> None:
    assert set(ALL) >= CODING
    assert all(ALL[name].reads_only for name in READONLY)
    assert {name for name in CODING if ALL[name].reads_only} == READONLY


def test_the_hash_does_not_depend_on_the_order_of_fields() -> None:
    one = operation_hash(b"key", "t", {"a": 1, "b": {"c": [1, 2], "d": None}})
    other = operation_hash(b"key", "t", {"b": {"d": None, "c": [1, 2]}, "a": 1})
    assert one == other


@pytest.mark.parametrize(
    ("key", "tool", "arguments"),
    [
        (b"other key", "t", {"a": "1"}),
        (b"key", "u", {"a": "1"}),
        (b"key", "t", {"a": "2"}),
        (b"key", "t", {"a": 1}),
        (b"key", "t", {"b": "1"}),
        (b"key", "t", {"a": ["1"]}),
        (b"key", "t", {}),
    ],
    ids=["key", "tool", "value", "type of value", "field", "shape", "nothing"],
)
def test_the_hash_depends_on_everything_else(
    key: bytes, tool: str, arguments: dict[str, Any]
) -> None:
    assert operation_hash(key, tool, arguments) != operation_hash(b"key", "t", {"a": "1"})


def test_the_hash_takes_half_a_character() -> None:
    assert len(operation_hash(b"key", "t", {"a": "\ud800"})) == 64


def test_a_server_or_service_brings_no_tool_that_is_built_in_by_its_name() -> None:
    for field, server in (("mcp", {"command": "true"}), ("services", {"spec": "a.json"})):
        fields: dict[str, Any] = {"preset": "none", field: {"grep": server}}
        own = profile(**fields)
        theirs = Tool("grep__find", "", {}, no_call, origin="it")
        assert set(allowed_tools(own, {**ALL, "grep__find": theirs})) == {"grep__find"}
