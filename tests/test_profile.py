import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ownware_gateway.errors import GatewayError
from ownware_gateway.profile import Profile, folder as module
from ownware_gateway.profile.folder import Profiles

FULL = {
    "name": "coder",
    "description": "Writes code.",
    "model": "anthropic:claude-x",
    "smallFastModel": "openai:gpt-5.5-mini",
    "temperature": 1,
    "maxTokens": 4096,
    "maxTurns": 20,
    "thinking": "low",
    "tools": {
        "preset": "coding",
        "allow": ["shell"],
        "deny": ["write_file"],
        "mcp": {},
        "services": {},
        "custom": {"enabled": False, "env": {"A": "b"}, "memoryMb": 512, "timeout": 30_000},
    },
    "security": {"permissionMode": "allowlist", "hitlTimeoutMs": "2h"},
    "policies": [
        {
            "kind": "rule",
            "tool": "shell*",
            "when": {"command": {"prefix": ["git status"]}},
            "decision": "allow",
        }
    ],
    "execution": {
        "timeout": "90s",
        "maxWallTime": "2d",
        "maxCostUsd": 0.5,
        "perDay": {"maxCostUsd": 5, "maxTurns": 500, "maxTime": "3h"},
    },
    "compaction": {"enabled": False, "threshold": 0.5, "keepTurns": 3, "contextWindow": 32_000},
    "subagents": {"reviewer": {"profile": "careful", "description": "Reads."}},
    "skills": {"enabled": False},
    "memory": {"enabled": True, "append": True, "workspace": False},
    "systemPrompt": "Be brief.",
}


def write(folder: Path, name: str, data: Any, file: str = "agent.json") -> Path:
    path = folder / name / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), "utf-8")
    return path


def message(folder: Path) -> str:
    (broken,) = Profiles(folder).broken()
    return broken.message


def names(profiles: Profiles) -> list[str]:
    return [profile.name for profile in profiles.all()]


def test_a_profile_needs_nothing_but_a_name(tmp_path: Path) -> None:
    write(tmp_path, "a", {"name": "assistant"})
    profile = Profiles(tmp_path).get("assistant")
    assert profile.max_turns == 100
    assert profile.tools.preset == "full"
    assert profile.security.permission_mode == "ask"
    assert profile.security.hitl_timeout_ms == 30 * 60_000
    assert profile.execution.timeout == 30 * 60_000
    assert profile.instructions == ""


def test_every_field_is_read(tmp_path: Path) -> None:
    write(tmp_path, "a", FULL)
    profile = Profiles(tmp_path).get("coder")
    assert profile.model_dump(mode="json") == FULL | {
        "temperature": 1.0,
        "security": {"permissionMode": "allowlist", "hitlTimeoutMs": 7_200_000},
        "execution": {
            "timeout": 90_000,
            "maxWallTime": 172_800_000,
            "maxCostUsd": 0.5,
            "perDay": {"maxCostUsd": 5.0, "maxTurns": 500, "maxTime": 10_800_000},
        },
    }


def test_a_profile_may_be_yaml(tmp_path: Path) -> None:
    text = "name: coder\nmodel: demo:echo\nexecution: {timeout: 5m}\ntools:\n  deny: [shell]\n"
    write(tmp_path, "a", text, "agent.yaml")
    write(tmp_path, "b", "name: other", "agent.yml")
    profiles = Profiles(tmp_path)
    assert names(profiles) == ["coder", "other"]
    assert profiles.get("coder").execution.timeout == 300_000
    assert profiles.get("coder").tools.deny == ["shell"]


def test_json_is_taken_before_yaml(tmp_path: Path) -> None:
    write(tmp_path, "a", {"name": "json"})
    write(tmp_path, "a", "name: yaml", "agent.yaml")
    assert names(Profiles(tmp_path)) == ["json"]


def test_the_soul_comes_before_the_system_prompt(tmp_path: Path) -> None:
    write(tmp_path, "a", FULL)
    write(tmp_path, "a", "\ufeff\nYou are é.\n\n", "SOUL.md")
    assert Profiles(tmp_path).get("coder").instructions == "You are é.\n\nBe brief."


def test_a_mark_of_byte_order_before_the_text_is_no_mistake(tmp_path: Path) -> None:
    write(tmp_path, "a", '\ufeff{"name": "a"}')
    assert names(Profiles(tmp_path)) == ["a"]


def test_what_is_no_profile_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / "odd" / "agent.json").mkdir(parents=True)
    assert Profiles(tmp_path).all() == []
    assert Profiles(tmp_path).broken() == []
    assert Profiles(tmp_path / "absent").all() == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": 7}, "The field 'name' is 7; expected: a valid string."),
        (
            {"tools": {"services": {"a b": {"spec": "x"}}}},
            "The name \"a b\" in 'tools.services' cannot be used; expected: letters, digits, -",
        ),
        ({"name": "a b"}, "The field 'name' is \"a b\"; expected: letters, digits and . _ - only"),
        ({"name": ""}, "The field 'name' is \"\"; expected: String should have at least 1"),
        ({"name": "a" * 129}, "expected: String should have at most 128 characters."),
        ({"description": None}, "The field 'description' is null; expected: a valid string."),
        ({"model": "gpt"}, "The field 'model' is \"gpt\"; expected: provider:model, like"),
        ({"temperature": 3}, "The field 'temperature' is 3; expected: less than or equal to 2."),
        ({"temperature": "1"}, "The field 'temperature' is \"1\"; expected: a valid number."),
        ({"temperature": float("nan")}, "The field 'temperature' is NaN; expected: a finite"),
        ({"maxTokens": 0}, "The field 'maxTokens' is 0; expected: greater than 0."),
        ({"maxTurns": True}, "The field 'maxTurns' is true; expected: a valid integer."),
        ({"maxTurns": 10_001}, "The field 'maxTurns' is 10001; expected: less than or equal to"),
        (
            {"thinking": "lots"},
            "The field 'thinking' is \"lots\"; expected: 'off', 'low', 'medium' or 'high'.",
        ),
        ({"tools": []}, "The field 'tools' is []; expected: an object."),
        (
            {"tools": {"preset": "all"}},
            "The field 'tools.preset' is \"all\"; expected: 'full', 'coding', 'readonly' or",
        ),
        ({"tools": {"deny": "x"}}, "The field 'tools.deny' is \"x\"; expected: a valid list."),
        ({"tools": {"deny": [1]}}, "The field 'tools.deny.0' is 1; expected: a valid string."),
        (
            {"security": {"permissionMode": "yolo"}},
            "The field 'security.permissionMode' is \"yolo\"; expected: 'auto', 'ask', 'deny' or",
        ),
        (
            {"security": {"hitlTimeoutMs": "soon"}},
            'The field \'security.hitlTimeoutMs\' is "soon"; expected: a duration like "30m"',
        ),
        ({"execution": {"timeout": "31d"}}, "The field 'execution.timeout' is \"31d\"; expected:"),
        ({"execution": {"timeout": 0}}, "The field 'execution.timeout' is 0; expected: greater"),
        ({"execution": {"timeout": 1.5}}, "The field 'execution.timeout' is 1.5; expected: a"),
        (
            {"execution": {"maxCostUsd": float("inf")}},
            "The field 'execution.maxCostUsd' is Infinity; expected: a finite number.",
        ),
        ({"maxTurn": 1}, "There is no field 'maxTurn'; did you mean 'maxTurns'?"),
        ({"max_turns": 1}, "There is no field 'max_turns'; did you mean 'maxTurns'?"),
        (
            {"security": {"permisionMode": "ask"}},
            "There is no field 'security.permisionMode'; did you mean 'permissionMode'?",
        ),
        (
            {"tools": {"zzz": 1}},
            "There is no field 'tools.zzz'; known are: preset, allow, deny, mcp, services, custom.",
        ),
        (
            {"tools": {"mcp": {"a": {"comand": "x"}}}},
            "There is no field 'tools.mcp.a.comand'; did you mean 'command'?",
        ),
        (
            {"tools": {"mcp": {"a": {"command": "x", "url": "https://a"}}}},
            "The field 'tools.mcp.a' is wrong: a server of transport http or sse has a 'url',",
        ),
        ({"tools": {"mcp": {"a": {"url": "ftp://a"}}}}, "The field 'tools.mcp.a.url' is"),
        ({"tools": {"mcp": {"a__b": {"command": "x"}}}}, "The name \"a__b\" in 'tools.mcp' cannot"),
        ({"soul": "x"}, "the field 'soul' is the text of SOUL.md beside it."),
        ({"notes": "x"}, "the field 'notes' is what AGENTS.md and the skills beside it say."),
        ({"listed": {"a": "/etc/passwd"}}, "the field 'listed' is the files of the skills"),
        (
            {"memory": {"apend": True}},
            "There is no field 'memory.apend'; did you mean 'append'?",
        ),
        ({"description": "x\ud800"}, "holds half a character, like \\ud800 alone."),
        ({"systemPrompt": ["x" * 200]}, "x..."),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_field_is_named_with_what_was_expected(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    write(tmp_path, "mine", FULL | change)
    said = message(tmp_path)
    assert said.startswith("mine/agent.json")
    assert sentence in said


def test_a_missing_name_is_said(tmp_path: Path) -> None:
    write(tmp_path, "a", {})
    assert message(tmp_path) == "a/agent.json: The field 'name' is required."


#: A few lines that stand for a hundred million values, where a profile may have any.
BOMB = (
    "name: a\ntools: {services: {s: {spec: x, auth: {path: /x, take: {path: t}, body: {\n"
    + "a: &a [x, x],\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}],\n" for a, b in pairwise("abcdefghi"))
    + "}}}}}\n"
)


def test_many_mistakes_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    write(tmp_path, "a", {"name": "a"} | {f"zz{number}": 1 for number in range(8)})
    said = message(tmp_path)
    assert said.count("There is no field") == 5
    assert said.endswith(" And 3 more.")


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("agent.json", "", "a/agent.json is not JSON: Expecting value at line 1, column 1."),
        ("agent.json", '{"name":\n"a" "b"}', "is not JSON: Expecting ',' delimiter at line 2"),
        ("agent.json", "[]", "must hold an object"),
        ("agent.json", "null", "must hold an object"),
        ("agent.json", "[" * 100_000, "is nested too deep."),
        ("agent.json", '{"name": ' + "9" * 5_000 + "}", "is not JSON: Exceeds the limit"),
        ("agent.yaml", "", 'a/agent.yaml must hold an object, like {"name": "assistant"}.'),
        ("agent.yaml", "name: [a", "a/agent.yaml is not YAML: while parsing a flow sequence"),
        ("agent.yaml", "name: !!python/name:os.system", "is not YAML: could not determine"),
        ("agent.yaml", "name: 2024-99-99", "is not YAML: month must be in 1..12."),
        ("agent.yaml", "[" * 100_000, "is nested too deep."),
        ("agent.yaml", "name: 2024-09-09", 'is "2024-09-09"; expected: a valid string.'),
        ("agent.yaml", "name: a\n1: x", "The field '1' is 1; expected: Keys should be strings."),
        ("agent.yaml", "name: a\ntools: {deny: {2024-01-01: x}}", "expected: a valid list."),
        ("agent.yaml", "name: a\ntools: &a [*a]", "it stands for more than 100000 values."),
        ("agent.yaml", BOMB, "it stands for more than 100000 values."),
        ("agent.json", '"' + "x" * 1_048_576, "a/agent.json is over 1048576 bytes."),
    ],
    ids=lambda value: value[:20],
)
def test_a_file_that_cannot_be_understood_is_named(
    tmp_path: Path, file: str, text: str, sentence: str
) -> None:
    write(tmp_path, "a", text, file)
    write(tmp_path, "b", {"name": "good"})
    assert sentence in message(tmp_path)
    assert names(Profiles(tmp_path)) == ["good"]


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a", {"name": "a"}).parent.joinpath("SOUL.md").write_bytes(b"\xff\xfe")
    assert message(tmp_path) == "A file of a cannot be read: it is not UTF-8 text."


def test_a_soul_that_is_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE_BYTES_MAX", 100)
    write(tmp_path, "a", {"name": "a"})
    write(tmp_path, "a", "x" * 100, "SOUL.md")
    assert names(Profiles(tmp_path)) == ["a"]
    write(tmp_path, "a", "x" * 101, "SOUL.md")
    assert message(tmp_path) == "a/SOUL.md is over 100 bytes."


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_takes_no_other_down(tmp_path: Path) -> None:
    write(tmp_path, "a", {"name": "a"}).parent.chmod(0)
    write(tmp_path, "b", {"name": "b"})
    assert message(tmp_path) == "A file of a cannot be read: Permission denied."
    assert names(Profiles(tmp_path)) == ["b"]
    (tmp_path / "a").chmod(0o700)


def test_one_broken_profile_takes_no_other_down(tmp_path: Path) -> None:
    write(tmp_path, "a", {"name": "a"})
    write(tmp_path, "b", "{")
    write(tmp_path, "c", {"name": "c"})
    profiles = Profiles(tmp_path)
    assert names(profiles) == ["a", "c"]
    assert [broken.folder for broken in profiles.broken()] == ["b"]


def test_a_change_is_seen_without_a_restart(tmp_path: Path) -> None:
    profiles = Profiles(tmp_path)
    assert names(profiles) == []
    path = write(tmp_path, "a", {"name": "a"})
    assert names(profiles) == ["a"]
    path.write_text("{")
    assert names(profiles) == []
    assert len(profiles.broken()) == 1
    path.write_text('{"name": "b"}')
    assert names(profiles) == ["b"]
    path.unlink()
    assert names(profiles) == []


def test_a_change_of_the_same_size_at_the_same_time_is_seen(tmp_path: Path) -> None:
    profiles = Profiles(tmp_path)
    path = write(tmp_path, "a", {"name": "aaa"})
    before = path.stat()
    assert names(profiles) == ["aaa"]
    path.write_text(json.dumps({"name": "bbb"}))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert names(profiles) == ["bbb"]


def test_a_change_of_the_soul_is_seen(tmp_path: Path) -> None:
    profiles = Profiles(tmp_path)
    write(tmp_path, "a", {"name": "a"})
    assert profiles.get("a").soul == ""
    soul = write(tmp_path, "a", "one", "SOUL.md")
    assert profiles.get("a").soul == "one"
    soul.write_text("two")
    assert profiles.get("a").soul == "two"
    soul.unlink()
    assert profiles.get("a").soul == ""


def test_what_did_not_change_is_not_built_again(tmp_path: Path) -> None:
    write(tmp_path, "a", FULL)
    profiles = Profiles(tmp_path)
    assert profiles.get("coder") is profiles.get("coder")


def test_a_profile_is_found_where_it_lies_now(tmp_path: Path) -> None:
    write(tmp_path, "ada", {"name": "ada", "description": "one"})
    write(tmp_path, "bob", {"name": "bob"})
    profiles = Profiles(tmp_path)
    assert profiles.get("ada").description == "one"
    write(tmp_path, "ada", {"name": "ada", "description": "two"})
    assert profiles.get("ada").description == "two"
    (tmp_path / "ada").rename(tmp_path / "zoe")
    assert Path(profiles.get("ada").folder).name == "zoe"
    write(tmp_path, "bob", {"name": "ada", "description": "three"})
    write(tmp_path, "zoe", {"name": "bob"})
    assert profiles.get("ada").description == "three"
    assert Path(profiles.get("bob").folder).name == "zoe"
    shutil.rmtree(tmp_path / "bob")
    assert profiles.find("ada") is None


def test_of_two_profiles_with_one_name_the_first_is_used_and_it_is_said(tmp_path: Path) -> None:
    write(tmp_path, "b", {"name": "same", "description": "second"})
    write(tmp_path, "a", {"name": "same", "description": "first"})
    profiles = Profiles(tmp_path)
    assert [profile.description for profile in profiles.all()] == ["first"]
    assert message(tmp_path) == ("Two folders hold a profile named 'same'; the first one is used.")


def test_the_first_of_two_profiles_is_used_once_it_is_said(tmp_path: Path) -> None:
    write(tmp_path, "b", {"name": "same", "description": "second"})
    profiles = Profiles(tmp_path)
    assert profiles.get("same").description == "second"
    write(tmp_path, "a", {"name": "same", "description": "first"})
    assert "the first one is used" in profiles.broken()[0].message
    assert profiles.get("same").description == "first"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("codr", "There is no profile named 'codr'. Did you mean 'coder'?"),
        ("zzz", "There is no profile named 'zzz'. There are: coder, writer."),
        ("../coder/x/y/z", "There is no profile named '../coder/x/y/z'. There are: coder, writer."),
    ],
)
def test_an_unknown_profile_is_answered_with_the_near_one(
    tmp_path: Path, asked: str, sentence: str
) -> None:
    write(tmp_path, "a", {"name": "writer"})
    write(tmp_path, "b", {"name": "coder"})
    with pytest.raises(GatewayError) as refused:
        Profiles(tmp_path).get(asked)
    assert (refused.value.code, refused.value.message) == ("not_found", sentence)


def test_without_any_profile_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(GatewayError, match=r"named 'a'\. There are no profiles\."):
        Profiles(tmp_path).get("a")


def test_asking_for_a_broken_profile_says_what_is_wrong(tmp_path: Path) -> None:
    write(tmp_path, "a", "{")
    with pytest.raises(
        GatewayError, match=r"The profile 'a' cannot be used\. a/agent\.json is not"
    ):
        Profiles(tmp_path).get("a")


@pytest.mark.parametrize(
    ("text", "duration_ms"),
    [
        ("250ms", 250),
        ("90s", 90_000),
        ("30m", 1_800_000),
        (" 2 h ", 7_200_000),
        ("30d", 2_592_000_000),
        (1, 1),
    ],
)
def test_a_duration_is_text_with_a_unit_or_milliseconds(
    tmp_path: Path, text: object, duration_ms: int
) -> None:
    write(tmp_path, "a", {"name": "a", "execution": {"timeout": text}})
    assert Profiles(tmp_path).get("a").execution.timeout == duration_ms


@pytest.mark.parametrize("text", ["", "30", "30 minutes", "1.5h", "-1s", "1h30m", "٣s", "9" * 5000])
def test_anything_else_is_no_duration(tmp_path: Path, text: str) -> None:
    write(tmp_path, "a", {"name": "a", "execution": {"timeout": text}})
    assert 'expected: a duration like "30m", "90s", "2h" or "1d"' in message(tmp_path)


@pytest.mark.parametrize("data", [{"name": "a"}, FULL])
def test_a_run_keeps_all_of_the_version_it_started_with(
    tmp_path: Path, data: dict[str, Any]
) -> None:
    write(tmp_path, "a", data)
    write(tmp_path, "a", 'é \N{KEY} "quoted"\n', "SOUL.md")
    write(tmp_path, "a", "A note.", "AGENTS.md")
    write(tmp_path, "a", "---\ndescription: A skill.\n---\n", "skills/s.md")
    profile = Profiles(tmp_path).get(str(data["name"]))
    assert profile.soul
    assert profile.notes
    assert Profile.restore(profile.dump()) == profile


def test_a_profile_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Profile(name="a").name = "b"  # type: ignore[misc]


def test_the_profile_as_clients_see_it_has_no_soul() -> None:
    assert "soul" not in Profile(name="a", soul="deep").model_dump(mode="json")


def test_a_server_is_described_in_the_words_of_other_programs_too(tmp_path: Path) -> None:
    servers = {
        "a": {"type": "streamable-http", "url": "https://a"},
        "b": {"url": "https://b"},
        "c": {"type": "sse", "url": "https://c"},
        "d": {"command": "d"},
    }
    write(tmp_path, "mine", {"name": "mine", "tools": {"mcp": servers}})
    found = Profiles(tmp_path).get("mine").tools.mcp
    assert [server.transport for server in found.values()] == ["http", "http", "sse", "stdio"]
    assert Profile.restore(Profiles(tmp_path).get("mine").dump()).tools.mcp == found
