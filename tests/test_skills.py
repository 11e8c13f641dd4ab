"""Skills: what the system prompt lists, what `load_skill` reads, and what is left out."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from hypothesis import given, settings, strategies as st

from ownware_gateway.doctor import examine
from ownware_gateway.profile.beneath import Unfit
from ownware_gateway.profile.folder import Profiles
from ownware_gateway.profile.skills import (
    DESCRIPTION_CHARS_MAX,
    HEAD_BYTES_MAX,
    LIST_CHARS_MAX,
    SKILLS_MAX,
    parse,
)
from ownware_gateway.tools import OUTPUT_LIMIT_BYTES
from tests.gateway import (
    FAKE_KEY,
    Gateways,
    get_json,
    post_json,
    run_events,
    start_run,
    until_status,
    write_profile,
)
from tests.provider import Asked, Call, Provider, Reply
from tests.reliability.process import Follower, served, start

Http = aiohttp.ClientSession
MakeProfile = Callable[..., Path]

AUTO = {"permissionMode": "auto"}


def write(profile: Path, path: str, text: str | bytes) -> Path:
    file = profile / "skills" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def skill(description: str = "What it is for.", body: str = "Do it so.", name: str = "") -> str:
    named = f"name: {name}\n" if name else ""
    return f"---\n{named}description: {description}\n---\n{body}\n"


def system(asked: Asked) -> str:
    """The system prompt of a request."""
    said = asked.body["messages"][0]
    assert said["role"] in ("system", "developer"), said
    content: str = said["content"]
    return content


def offered(asked: Asked) -> set[str]:
    return {tool["function"]["name"] for tool in asked.body.get("tools", ())}


def ends(said: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    return [(item["result"], item["isError"]) for item in said if item["type"] == "tool.call.end"]


async def calls(http: Http, url: str, provider: Provider, *wanted: Call) -> list[tuple[str, bool]]:
    """Have the model call tools one after the other in one run; return what it was told."""
    provider.reply(*(Reply(calls=[call]) for call in wanted), Reply(text=["done"]))
    run = await start_run(http, url, "go")
    return ends(await run_events(http, url, run["runId"]))


def load(name: str, **file: str) -> Call:
    return Call("load_skill", {"name": name, **file})


# -- in a run


async def test_the_system_prompt_lists_skills_and_the_agent_reads_them(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    profile = make_profile("assistant", soul="You help.", tools={"preset": "none"})
    write(profile, "zebra.md", skill("Stripes."))
    write(profile, "paint/SKILL.md", skill('"How to paint: wet on wet."', "Be bold.", name="art"))
    write(profile, "paint/colours/red.md", "Red is warm.")
    write(profile, "paint/.hidden", "no")
    write(profile, "paint/server.pem", "no")
    up = await start_gateway()
    said = await calls(
        http,
        up.url,
        provider,
        load("zebra"),
        load("art"),
        load("art", file="colours/red.md"),
        load("nothing"),
        load("zebra", file="other.md"),
    )
    first = provider.requests[0]
    assert system(first).startswith("You help.\n\n# Skills\n\n")
    assert system(first).endswith("\n\n- art: How to paint: wet on wet.\n- zebra: Stripes.")
    assert "Be bold" not in system(first)
    assert {system(asked) for asked in provider.requests} == {system(first)}
    assert offered(first) == {"load_skill"}
    assert said[0] == ("Do it so.\n", False)
    assert said[1][0] == (
        "Be bold.\n\n[files of this skill, to be read with the argument file:]\ncolours/red.md"
    )
    assert said[2] == ("Red is warm.", False)
    assert said[3] == ("There is no skill 'nothing'. There are: art, zebra.", True)
    assert said[4] == ("The skill is a single text: it has no other files.", True)


async def test_a_profile_without_skills_has_neither_list_nor_tool(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    for name, fields in (
        ("off", {"skills": {"enabled": False}}),
        ("denied", {"tools": {"preset": "full", "deny": ["load_skill"]}}),
    ):
        write(make_profile(name, **fields), "a.md", skill())
    make_profile("none", tools={"preset": "full"})
    up = await start_gateway()
    for name in ("off", "denied", "none"):
        provider.reply(Reply(text=["done"]))
        run = await start_run(http, up.url, "go", profileId=name)
        await run_events(http, up.url, run["runId"])
        assert "load_skill" not in offered(provider.requests[-1]), name
        assert all(item["role"] == "user" for item in provider.requests[-1].body["messages"]), name


NOT_TO_BE_READ = [
    "../../agent.json",
    "a/../../../SOUL.md",
    "..",
    "/etc/passwd",
    "./SKILL.md",
    "a//b",
    "",
    "link.md",
    "out/agent.json",
    ".env",
    "key.pem",
    "pipe",
    "folder",
    "not-there.md",
    "a\0b",
    "\ud800",
    "binary",
    "x" * 500,
]


async def test_nothing_is_read_outside_of_the_folder_of_a_skill(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    profile = make_profile("assistant", soul="Private soul.", security=AUTO)
    folder = write(profile, "s/SKILL.md", skill()).parent
    (folder / "link.md").symlink_to(profile / "SOUL.md")
    (folder / "out").symlink_to(profile)
    (folder / ".env").write_text("Private key.")
    (folder / "key.pem").write_text("Private key.")
    (folder / "binary").write_bytes(b"a\0Private")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    up = await start_gateway()
    wanted = [load("s", file=file) for file in NOT_TO_BE_READ]
    said = await calls(http, up.url, provider, *wanted, load("s"))
    assert len(said) == len(wanted) + 1
    assert all(is_error and "Private" not in text for text, is_error in said[:-1]), said
    assert said[-1] == (
        "Do it so.\n\n[files of this skill, to be read with the argument file:]\nbinary",
        False,
    )


async def test_a_skill_is_read_as_it_is_now_and_never_through_a_link_put_in_its_place(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    profile = make_profile("assistant")
    file = write(profile, "s.md", skill(body="One."))
    (profile / "secret").write_text("Private.")
    up = await start_gateway()
    gates = [asyncio.Event() for _ in range(3)]
    provider.reply(*(Reply(calls=[load("s")], gate=gate) for gate in gates), Reply(text=["done"]))
    run = await start_run(http, up.url, "go")
    await provider.requested(1)
    write(profile, "s.md", skill(body="Two."))
    gates[0].set()
    await provider.requested(2)
    file.unlink()
    file.symlink_to(profile / "secret")
    gates[1].set()
    await provider.requested(3)
    file.unlink()
    gates[2].set()
    assert ends(await run_events(http, up.url, run["runId"])) == [
        ("Two.\n", False),
        ("the skill is a symbolic link, and links are not followed.", True),
        ("the skill is not there.", True),
    ]
    assert len({system(asked) for asked in provider.requests}) == 1


async def test_what_is_too_long_is_cut_and_says_so(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    profile = make_profile("assistant")
    write(profile, "s/SKILL.md", skill(body="\N{SNOWMAN}" * OUTPUT_LIMIT_BYTES))
    write(profile, "s/long.txt", "y" * (OUTPUT_LIMIT_BYTES + 1))
    for number in range(120):
        write(profile, f"s/{number:03}/{'n' * 200}.txt", "")
    up = await start_gateway()
    (text, _), (other, _) = await calls(
        http, up.url, provider, load("s"), load("s", file="long.txt")
    )
    assert len(text.encode()) <= OUTPUT_LIMIT_BYTES
    assert "\N{SNOWMAN}\n[cut: " in text
    assert text.count(f"{'n' * 200}.txt\n") >= 30
    assert len(other.encode()) <= OUTPUT_LIMIT_BYTES
    assert f"y\n[cut: {OUTPUT_LIMIT_BYTES + 1} bytes in all" in other
    assert "[read_output with tool_call_id" in other


async def test_rules_and_modes_hold_for_load_skill(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    up = await start_gateway()
    rule = {"tool": "load_skill", "when": {"name": {"equals": "s"}}, "decision": "deny"}
    for fields, wanted in (
        ({"security": {"permissionMode": "deny"}}, "Do it so.\n"),
        ({"policies": [rule]}, "A rule of the profile denies this: policies.0"),
        ({"security": {"permissionMode": "allowlist"}}, "only runs what its tools.allow names"),
        (
            {"security": {"permissionMode": "allowlist"}, "tools": {"allow": ["load_skill"]}},
            "Do it so.\n",
        ),
    ):
        write(make_profile("assistant", **fields), "s.md", skill())
        ((text, _),) = await calls(http, up.url, provider, load("s"))
        assert wanted in text, fields


async def test_a_run_may_be_started_with_skills_and_keeps_their_texts(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    profile = make_profile("assistant", soul="You help.")
    write(profile, "a.md", skill(body="First."))
    write(profile, "b.md", skill(body="Second."))
    up = await start_gateway()
    body = {"activeContext": {"skills": [{"id": "b", "name": "The other"}, {"id": "b"}]}}
    provider.reply(Reply(calls=[Call("write_file", {"path": "x", "content": ""})]))
    run = await start_run(http, up.url, "go", **body)
    await until_status(http, up.url, run, "waiting")
    before = system(provider.requests[0])
    assert before.endswith("- b: What it is for.\n\n# The skill b\n\nSecond.")
    write(profile, "b.md", skill(body="Changed."))
    up = await start_gateway.restart(up)
    provider.reply(Reply(text=["done"]))
    await post_json(http, up.url, f"/threads/{run['threadId']}/resume", {"action": "approve"})
    await run_events(http, up.url, run["runId"])
    assert system(provider.requests[1]) == before
    for skills, status in (([{"id": "c"}], 404), ([{"name": "b"}], 400), ([{"id": "b"}] * 9, 400)):
        body = {"activeContext": {"skills": skills}}
        path_body = {"profileId": "assistant", "prompt": "go", **body}
        assert (await post_json(http, up.url, "/run", path_body))[0] == status


async def test_a_run_keeps_the_list_and_notes_it_started_with_through_a_kill(
    tmp_path: Path, provider: Provider, http: Http
) -> None:
    environment = {"OPENAI_BASE_URL": provider.base_url, "OPENAI_API_KEY": FAKE_KEY}
    async with served(tmp_path, environment=environment) as gateway:
        profile = write_profile(gateway.profiles, "mine", soul="One soul.", security=AUTO)
        (profile / "AGENTS.md").write_text("One note.")
        write(profile, "s.md", skill("One skill."))
        gate = asyncio.Event()
        provider.reply(Reply(text=["Hel", "lo"], gate=gate, gate_after=1), Reply(text=["again"]))
        follower = Follower(http, gateway, await start(http, gateway, "go", profile="mine"))
        await provider.requested(1)
        gateway.kill()
        (profile / "SOUL.md").write_text("Another soul.")
        (profile / "AGENTS.md").write_text("Another note.")
        write(profile, "s.md", skill("Another skill."))
        write(profile, "t.md", skill("One more."))
        await gateway.died(1)
        await follower.follow()
        gate.set()
        assert follower.events[-1]["status"] == "succeeded"
        first, second = provider.requests
        assert "One note." in system(first)
        assert "- s: One skill." in system(first)
        assert system(second) == system(first)
        assert first.body["tools"] == second.body["tools"]


# -- what is wrong is said, and takes nothing else down


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("# A skill", "does not begin with front matter: a line of ---"),
        ("---\nname: a\n", "does not begin with front matter"),
        ("\n---\ndescription: x\n---\n", "does not begin with front matter"),
        ("", "does not begin with front matter"),
        (f"---\ndescription: x\nmore: {'x' * HEAD_BYTES_MAX}\n---\n", "in the first 8192 bytes"),
        ("---\n---\n", "has front matter without fields: write name: and description:"),
        ("---\n- a\n---\n", "has front matter without fields"),
        ("---\ndescription: [a\n---\n", "has front matter that is not YAML: while parsing"),
        ("---\ndescription: !!python/name:os.system\n---\n", "is not YAML: could not determine"),
        (f"---\ndescription: {'[' * 4_000}\n---\n", "with more than 64 brackets"),
        (f"---\ndescription: {'- ' * 4_000}\n---\n", "has front matter that is not YAML"),
        ("---\ndescription: 2024-99-99\n---\n", "has front matter that is not YAML: month must"),
        ("---\nname: a\n---\n", "has no description: a text that says what it is for"),
        ("---\ndescription:\n---\n", "has no description"),
        ("---\ndescription: true\n---\n", "has no description"),
        ('---\ndescription: " \\u200b\\n"\n---\n', "has no description"),
        (skill("x" * (DESCRIPTION_CHARS_MAX + 1)), "has a description of 1025 characters; 1024"),
        (skill(name="a b"), "has no name that can be used"),
        (skill(name="../a"), "has no name that can be used"),
        (skill(name="x" * 65), "has no name that can be used"),
        (skill(name="7"), "has no name that can be used"),
        (skill(name="schön"), "has no name that can be used"),
        (b"---\ndescription: \xff\xfe\n---\n", "is not UTF-8 text"),
    ],
    ids=lambda value: str(value[:30]),
)
def test_a_broken_skill_is_named_and_the_others_stay(
    text: str | bytes, sentence: str, tmp_path: Path
) -> None:
    profile = write_profile(tmp_path, "a")
    write(profile, "bad.md", text)
    write(profile, "good.md", skill())
    profiles = Profiles(tmp_path)
    assert list(profiles.get("a").listed) == ["good"]
    (warning,) = profiles.warnings()
    assert warning.folder == "a"
    assert warning.message.startswith("a: skills/bad.md ")
    assert sentence in warning.message
    assert profiles.broken() == []


@pytest.mark.parametrize(
    ("text", "name", "description"),
    [
        (skill("Say hello # world"), "s", "Say hello"),
        ('---\nname: "other"\ndescription: >\n  Two\n  lines.\n---\n', "other", "Two lines."),
        ("---\r\nname: s-2\r\ndescription: Windows.\r\n---\r\nx", "s-2", "Windows."),
        ("\ufeff---\ndescription: A mark.\n---\n", "s", "A mark."),
        (
            "---\nname: s\nlicense: MIT\nmetadata: {a: 1}\ndescription: Fields of others.\n---\n",
            "s",
            "Fields of others.",
        ),
        (
            skill("Ünïcödé, 漢字, \N{FACE WITH TEARS OF JOY}"),
            "s",
            "Ünïcödé, 漢字, \N{FACE WITH TEARS OF JOY}",
        ),
        (
            '---\ndescription: "a\\n# Orders\\n\\u202eb\\U000E0041"\n---\n',
            "s",
            "a # Orders b",
        ),
        (skill("x" * DESCRIPTION_CHARS_MAX), "s", "x" * DESCRIPTION_CHARS_MAX),
    ],
)
def test_front_matter_is_read_as_others_write_it(text: str, name: str, description: str) -> None:
    for path in ("skills/s.md", "skills/s/SKILL.md"):
        found = parse(path, text.encode())
        assert (found.name, found.description) == (name, description)


SCALARS = st.text(st.sampled_from("ab yesnotru-.,!?&*%@|>{}[]'\"\\é漢0~=\t"), max_size=12)


@settings(max_examples=300, deadline=None)
@given(name=SCALARS, description=SCALARS)
def test_front_matter_means_what_it_means_in_yaml(name: str, description: str) -> None:
    text = f"name: {name}\ndescription: {description}\n"
    try:
        fields = yaml.safe_load(text)
        wanted = (fields["name"], " ".join(fields["description"].split()))
    except (yaml.YAMLError, AttributeError, TypeError, KeyError, ValueError):
        wanted = None
    try:
        found = parse("skills/s.md", f"---\n{text}---\n".encode())
    except Unfit:
        return
    assert (found.name, found.description) == wanted


def test_of_two_skills_with_one_name_the_first_is_used_and_it_is_said(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, "a")
    write(profile, "one/SKILL.md", skill("First.", name="same"))
    write(profile, "two.md", skill("Second.", name="same"))
    profiles = Profiles(tmp_path)
    assert profiles.get("a").listed == {"same": "skills/one/SKILL.md"}
    assert [item.message for item in profiles.warnings()] == [
        "a: skills/two.md has the name of skills/one/SKILL.md, which is used."
    ]


def test_links_and_other_things_are_no_skills(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, "a")
    outside = tmp_path / "outside.md"
    outside.write_text(skill())
    write(profile, "good.md", skill())
    folder = profile / "skills"
    (folder / "link.md").symlink_to(outside)
    (folder / "dangling.md").symlink_to(tmp_path / "nowhere")
    (folder / "folder.md").mkdir()
    (folder / "linked").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.md")
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("not one")
    profiles = Profiles(tmp_path)
    assert list(profiles.get("a").listed) == ["good"]
    assert [item.message.removeprefix("a: skills/") for item in profiles.warnings()] == [
        "dangling.md is a symbolic link, and links are not followed.",
        "folder.md is not a regular file.",
        "link.md is a symbolic link, and links are not followed.",
        "linked/SKILL.md is a symbolic link, and links are not followed.",
        "pipe.md is not a regular file.",
    ]


def test_a_folder_of_skills_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, "a")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "s.md").write_text(skill())
    (profile / "skills").symlink_to(tmp_path / "elsewhere")
    profiles = Profiles(tmp_path)
    assert profiles.get("a").listed == {}
    assert "a: skills is a symbolic link" in profiles.warnings()[0].message


def test_the_list_has_an_end(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, "a")
    for number in range(SKILLS_MAX + 5):
        write(profile, f"s{number:03}.md", skill())
    profiles = Profiles(tmp_path)
    assert len(profiles.get("a").listed) == SKILLS_MAX
    assert "skills holds more than 100 skills" in profiles.warnings()[0].message
    for number in range(SKILLS_MAX):
        write(profile, f"s{number:03}.md", skill("x" * DESCRIPTION_CHARS_MAX))
    assert len(profiles.get("a").instructions) < LIST_CHARS_MAX + 1_000
    assert "has no room in the list" in profiles.warnings()[0].message


def test_skills_are_read_again_when_they_change_and_only_then(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, "a")
    profiles = Profiles(tmp_path)
    assert profiles.get("a").instructions == ""
    file = write(profile, "s.md", skill("One."))
    before = profiles.get("a")
    assert "- s: One." in before.instructions
    assert profiles.get("a") is before
    stat = file.stat()
    write(profile, "s.md", skill("Two."))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "- s: Two." in profiles.get("a").instructions
    write(profile, "t.md", "nonsense")
    assert len(profiles.warnings()) == 1
    (profile / "skills" / "t.md").unlink()
    assert profiles.warnings() == []
    file.unlink()
    assert profiles.get("a").instructions == ""
    assert profiles.get("a").brings == set()


async def test_clients_and_the_doctor_hear_of_what_was_left_out(
    start_gateway: Gateways, http: Http, profiles: Path, make_profile: MakeProfile
) -> None:
    profile = make_profile("assistant")
    write(profile, "good.md", skill())
    write(profile, "bad.md", "nonsense")
    up = await start_gateway()
    answer = await get_json(http, up.url, "/profiles")
    assert [item["id"] for item in answer["items"]] == ["assistant"]
    assert answer["items"][0]["skills"] == {"enabled": True, "names": ["good"]}
    assert answer["broken"] == []
    (warning,) = answer["warnings"]
    assert warning["folder"] == "assistant"
    assert "skills/bad.md does not begin with front matter" in warning["message"]
    said = [item.text for item in examine(up.data_dir, profiles) if item.level == "warn"]
    assert warning["message"] in said
