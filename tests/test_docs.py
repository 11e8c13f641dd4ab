"""The documents say what the code does: complete, without inventions, and their commands work."""

import asyncio
import functools
import json
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import aiohttp
import pytest
from pydantic import BaseModel
from pydantic.alias_generators import to_camel

from ownware_gateway import cli
from ownware_gateway.app import tools
from ownware_gateway.doors.native import Native
from ownware_gateway.errors import CODES
from ownware_gateway.events import ASKING, EVENTS, Attachment, Fallback, StopReason, Usage, Wire
from ownware_gateway.floors import DELETION, KEYS, PROFILE, SECRETS
from ownware_gateway.log.statements import schema_versions
from ownware_gateway.masking import Masker
from ownware_gateway.models import Answer, Request, UserTurn
from ownware_gateway.models.catalogue import DEMO_ID, PROVIDERS
from ownware_gateway.models.demo import ABOUT, Demo
from ownware_gateway.permissions import allowed_tools
from ownware_gateway.profile import BROUGHT, SPAWN, PermissionMode, Preset, Profile
from ownware_gateway.profile.folder import Profiles
from ownware_gateway.profile.servers import McpServer
from ownware_gateway.profile.services import Login, Service
from ownware_gateway.settings import Settings, variable
from ownware_gateway.tools.knowledge import Knowledge
from tests.bench.__main__ import kept, page
from tests.gateway import (
    Gateways,
    get_json,
    open_stream,
    post_json,
    read_frames,
    run_events,
    start_run,
    until_status,
)

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
SOURCE = "\n".join(
    path.read_text("utf-8")
    for folder in ("ownware_gateway", "examples", "profiles")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".sql", ".mjs", ".json"}
)

#: Commands that install or stay are for people; `.ci/run` runs them.
LEFT_OUT = re.compile(r"(?:[A-Z_]+=\S+ )?make |\$\(command -v sudo\)|\.ci/run")


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def section(text: str, title: str) -> str:
    """What stands under a heading, up to the next one of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}\n", text, re.MULTILINE)
    assert found, title
    rest = text[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def table(text: str) -> list[list[str]]:
    """The cells of the first table in a text, its head left out."""
    rows = re.search(r"^\|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert rows, text[:200]
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
        for line in rows[1].splitlines()
    ]


def ticked(text: str) -> list[str]:
    return [name for _, name in re.findall(r"(`+) ?(.+?) ?\1", text)]


def snake(name: str) -> str:
    return re.sub(r"([A-Z])", r"_\1", name).lower()


def routes() -> set[tuple[str, str]]:
    # Its routes can be named before it has anything to open onto.
    found = Native.__new__(Native).routes()
    return {
        (route.method, re.sub(r"\{(\w+)\}", lambda name: f"{{{to_camel(name[1])}}}", route.path))
        for route in found
    }


def aliases(model: type[BaseModel]) -> dict[str, str]:
    """Field names on the wire, with a ? where the field may be absent."""
    return {
        item.alias: f"{item.alias}?" if item.exclude_if else item.alias
        for name, item in model.model_fields.items()
        if name != "type" and item.alias
    }


# -- the protocol


def test_every_route_has_a_section_in_the_protocol_and_no_other_has() -> None:
    headings = re.findall(r"^### `(\w+) (/\S+)`$", read("docs/protocol.md"), re.MULTILINE)
    assert set(headings) == routes()
    assert len(headings) == len(set(headings))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_names_only_routes_that_exist(document: Path) -> None:
    known = {(method, re.compile(re.sub(r"\{\w+\}", "[^/]+", path))) for method, path in routes()}
    named = re.findall(
        r"(?:\b(GET|POST|PUT|PATCH|DELETE) |localhost:3011)(/api/v1[^\s`?\"']*)",
        document.read_text("utf-8"),
    )
    unknown = [
        (method, path)
        for method, path in named
        if not any(m == (method or m) and pattern.fullmatch(path) for m, pattern in known)
    ]
    assert unknown == []


def test_the_protocol_describes_every_error_code_and_no_other() -> None:
    rows = table(section(read("docs/protocol.md"), "Errors"))
    described = {ticked(code)[0]: (int(status), category) for status, code, category, _ in rows}
    assert described == CODES
    assert len(rows) == len(CODES)


def test_the_protocol_describes_every_event_with_all_its_fields_and_no_other() -> None:
    rows = table(section(read("docs/protocol.md"), "Events"))
    described = {ticked(name)[0]: set(ticked(names)) for name, names, _ in rows}
    assert described == {name: set(aliases(event).values()) for name, event in EVENTS.items()}


def test_the_protocol_says_what_every_field_of_an_event_holds() -> None:
    text = section(read("docs/protocol.md"), "Events")
    rows = {ticked(name)[0]: said for name, said in table(text[text.index("What the fields") :])}
    assert set(rows) == {name for event in EVENTS.values() for name in aliases(event)}
    parts: dict[str, type[Wire]] = {
        "usage": Usage,
        "attachments": Attachment,
        "fallback": Fallback,
    }
    for name, part in parts.items():
        shape = f"{{{', '.join(aliases(part))}}}"
        assert shape in rows[name]


def test_the_protocol_lists_the_stop_reasons_and_the_envelope_frames() -> None:
    text = read("docs/protocol.md")
    assert set(ticked(section(text, "Stop reasons"))) == set(get_args(StopReason))
    sent = set(re.findall(r"sse\.envelope\(\s*\"([a-z.]+)\"", SOURCE))
    assert len(sent) > 3
    assert {ticked(row[0])[0] for row in table(section(text, "Envelope frames"))} == sent


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_names_in_a_document_exist_in_the_code(document: Path) -> None:
    """`snake_case`, `camelCase` and `--flags` in backticks."""
    text = re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    words = {word for name in ticked(text) for word in re.findall(r"[\w-]+", name)}
    names = {
        word
        for word in words
        if re.fullmatch(r"[a-z]+(?:_[a-z]+)+|[a-z]+(?:[A-Z][a-z]+)+|--[a-z-]+", word)
    }
    assert {name for name in names if not {name, snake(name)} & names_in_the_code()} == set()


@functools.cache
def names_in_the_code() -> frozenset[str]:
    """Every word of the code, with and without the hyphens in it."""
    files = ("pyproject.toml", "Makefile", ".ci/run", "tests/bench/__main__.py")
    others = "".join(map(read, files)) + "--require-hashes"
    tests = list((ROOT / "tests").rglob("*.py"))
    cases = [
        name for path in tests for name in re.findall(r"def (test_\w+)", path.read_text("utf-8"))
    ]
    known = " ".join([SOURCE, others, *(path.stem for path in tests), *cases])
    return frozenset(re.findall(r"[\w-]+", known)) | frozenset(re.findall(r"\w+", known))


async def test_the_protocol_names_every_field_that_an_answer_has(
    start_gateway: Gateways, http: aiohttp.ClientSession
) -> None:
    up = await start_gateway()
    text = read("docs/protocol.md")
    run = await start_run(http, up.url, "write notes.txt: hello", model=DEMO_ID)
    await until_status(http, up.url, run, "waiting")
    thread = f"/threads/{run['threadId']}"

    async def check(route: str, path: str, *within: str) -> None:
        answer = await get_json(http, up.url, path)
        for key in within:
            answer = answer[key]
        item = answer[0] if isinstance(answer, list) else answer
        names = set(item) - set(re.findall(r"\w+", section(text, f"`GET /api/v1{route}`")))
        assert names == set(), route

    assert set(run) <= set(re.findall(r"\w+", section(text, "`POST /api/v1/run`")))
    await check("/runs/{runId}", f"/runs/{run['runId']}")
    await check("/runs", "/runs")
    await check("/approvals", "/approvals", "items")
    await check("/threads/{threadId}", thread)
    await check("/threads", "/threads")
    await check("/threads/{threadId}/agents", f"{thread}/agents")
    await check("/threads/{threadId}/agents", f"{thread}/agents", "agents")
    events = "/threads/{threadId}/agents/{agentId}/events/history"
    await check(events, f"{thread}/agents/root/events/history")
    await check("/models", "/models")
    await check("/profiles", "/profiles")
    await check("/health", "/health")
    await check("/ready", "/ready")
    _, answer = await post_json(http, up.url, f"{thread}/resume", {"action": "approve"})
    resume = section(text, "`POST /api/v1/threads/{threadId}/resume`")
    assert set(answer) <= set(re.findall(r"\w+", resume))
    await run_events(http, up.url, run["runId"])
    await check("/threads/{threadId}/messages", f"{thread}/messages")
    reply = (await get_json(http, up.url, f"{thread}/messages"))[1]
    told = set(re.findall(r"\w+", section(text, "`GET /api/v1/threads/{threadId}/messages`")))
    assert {name for part in [reply, *reply["parts"]] for name in part} <= told


# -- configuration


def test_the_configuration_lists_every_setting_with_its_flag_and_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["serve", "--help"]) == 0
    flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    expected = {}
    for item in fields(Settings):
        flag = f"--{item.name.replace('_', '-')}"
        default = item.default
        if isinstance(default, bool | tuple):
            default = int(default) if isinstance(default, bool) else ""
        expected[variable(item.name)] = (flag if flag in flags else "", str(default))
        flags.discard(flag)
    assert flags == set()
    described = {
        ticked(name)[0]: ("".join(ticked(flag)), "".join(ticked(default)))
        for flag, name, default, _ in table(read("docs/configuration.md"))
    }
    assert described == expected


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_names_only_variables_that_exist(document: Path) -> None:
    known = {variable(item.name) for item in fields(Settings)}
    named = re.findall(
        r"\bOWNWARE_[A-Z_]+|\b[A-Z]+_(?:API_KEY|BASE_URL|HOST)\b", document.read_text("utf-8")
    )
    assert set(named) - known == set()


def test_the_configuration_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    commands = set(re.findall(r"^    ([a-z]+) ", capsys.readouterr().out, re.MULTILINE))
    rows = table(section(read("docs/configuration.md"), "Commands"))
    described = {ticked(row[0])[0].split()[1]: " ".join(row) for row in rows}
    assert set(described) == commands
    for command, said in described.items():
        assert cli.run([command, "--help"]) == 0
        known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        assert set(re.findall(r"--[a-z-]+", said)) <= known


# -- profiles, tools, models


def profile_fields(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in model.model_fields.items():
        kind = item.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from profile_fields(kind, f"{path}{item.alias or name}.")
        elif not item.exclude:
            default = None if item.is_required() else item.get_default(call_default_factory=True)
            yield f"{path}{item.alias or name}", default


def test_the_profiles_page_lists_every_field_with_its_default() -> None:
    rows = table(section(read("docs/profiles.md"), "Fields"))
    described = {
        ticked(name)[0]: json.loads(ticked(default)[0]) if default else None
        for name, default, _ in rows
    }
    assert described == dict(profile_fields(Profile))


def test_the_page_of_mcp_servers_lists_every_field_with_its_default() -> None:
    rows = table(section(read("docs/mcp.md"), "Fields of a server"))
    described = {ticked(name)[0]: json.loads(ticked(default)[0]) for name, default, _ in rows}
    assert described == dict(profile_fields(McpServer))


def test_the_page_of_services_lists_every_field_with_its_default() -> None:
    rows = table(section(read("docs/services.md"), "Fields of a service"))
    described = {
        ticked(name)[0]: json.loads(ticked(default)[0]) if default else None
        for name, default, _ in rows
    }
    assert described == dict(profile_fields(Service))
    rows = table(section(read("docs/services.md"), "Logging in"))
    assert {ticked(row[0])[0] for row in rows} == {
        item.alias or name for name, item in Login.model_fields.items()
    }


def test_the_profiles_page_lists_every_tool_with_its_arguments_and_presets() -> None:
    known = tools()
    presets: dict[str, set[str]] = {name: set() for name in known}
    for preset in get_args(Preset):
        profile = Profile.model_validate({"name": "x", "tools": {"preset": preset}})
        for name in allowed_tools(profile, known):
            presets[name].add(preset)
    expected = {
        name: (set(tool.input_schema["properties"]), presets[name]) for name, tool in known.items()
    }
    rows = table(section(read("docs/profiles.md"), "Tools"))
    described = {
        ticked(name)[0]: (set(ticked(arguments)), set(ticked(within)))
        for name, arguments, within, _ in rows
    }
    assert described == expected


def test_the_profiles_page_lists_the_tools_that_a_folder_brings() -> None:
    text = read("docs/profiles.md")
    rows = [*table(section(text, "Skills")), *table(section(text, "Memory"))]
    described = {ticked(row[0])[0]: set(ticked(row[1])) for row in rows}
    brought = Knowledge(Masker(), lambda: 0).known()
    assert {*brought, SPAWN} == BROUGHT
    assert described == {
        name: set(tool.input_schema["properties"]) for name, tool in brought.items()
    }


def test_the_profiles_page_lists_the_floors() -> None:
    rows = table(section(read("docs/profiles.md"), "Floors"))
    assert {ticked(row[0])[0] for row in rows} == {SECRETS, KEYS, DELETION, PROFILE}


def test_the_profiles_page_lists_the_permission_modes() -> None:
    rows = table(section(read("docs/profiles.md"), "Permissions"))
    assert [ticked(row[0])[0] for row in rows] == list(get_args(PermissionMode))


def test_the_profiles_that_come_with_the_gateway_are_valid_and_described() -> None:
    profiles = Profiles(ROOT / "profiles")
    assert profiles.broken() == []
    named = re.findall(
        r"^- `([\w-]+)`", section(read("docs/profiles.md"), "What comes with the gateway"), re.M
    )
    assert sorted(named) == [profile.name for profile in profiles.all()]
    for profile in profiles.all():
        assert profile.instructions
        assert set(profile.tools.allow + profile.tools.deny) <= set(tools())


def test_the_models_page_lists_every_provider_with_its_key_and_address() -> None:
    rows = table(section(read("docs/models.md"), "Providers"))
    described = {ticked(row[0])[0]: row[1:3] for row in rows}
    assert set(described) == {*(provider.id for provider in PROVIDERS), "demo"}
    for provider in PROVIDERS:
        key, address = described[provider.id]
        assert ticked(key) == ([variable(provider.key)] if provider.key else [])
        assert ticked(address) == [variable(provider.url)]


async def test_the_built_in_model_understands_every_prompt_on_the_models_page() -> None:
    rows = table(section(read("docs/models.md"), "The built-in model"))
    profile = Profile.model_validate({"name": "x"})
    specs: Any = list(allowed_tools(profile, tools()).values())
    for prompts, does in rows:
        wanted = {name for name in ticked(does) if name in tools()}
        for prompt in ticked(prompts):
            request = Request("assistant", [UserTurn(prompt)], tools=specs)
            parts = [part async for batch in Demo().stream(request) for part in batch]
            assert isinstance(parts[-1], Answer)
            called = {call.name for call in parts[-1].turn.tool_calls}
            assert called <= wanted, prompt
            assert bool(called) == bool(wanted), prompt
            assert parts[-1].turn.text != ABOUT, prompt


# -- the documents themselves


def test_the_performance_page_shows_the_results_that_are_kept() -> None:
    assert page(kept()) in read("docs/performance.md")


def test_the_readme_names_every_marker_and_how_to_run_it() -> None:
    pyproject = tomllib.loads(read("pyproject.toml"))
    markers = {
        text.partition(":")[0] for text in pyproject["tool"]["pytest"]["ini_options"]["markers"]
    }
    rows = table(section(read("README.md"), "Tests"))
    described = {ticked(marker)[0]: ticked(command)[0] for marker, command, _ in rows}
    assert described == {marker: f"make {marker}" for marker in markers}


def slugs(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and anchor not in slugs(file.read_text("utf-8"))):
            broken.append(target)
    assert broken == []


def test_the_architecture_tells_the_story_of_the_folders_and_layers_that_there_are() -> None:
    text = read("docs/architecture.md")
    listed = re.findall(r"^├── (\S+)|^└── (\S+)", text, re.MULTILINE)
    package = ROOT / "ownware_gateway"
    there = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in package.iterdir()
        if not path.name.startswith("__") or path.name == "__main__.py"
    }
    assert sorted(map("".join, listed)) == sorted(there - {"py.typed"})
    contracts = tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = [set(layer.split(" | ")) for layer in contracts[0]["layers"]]
    (written,) = re.findall(r"^`(__main__ ▸[^`]+)`", text, re.MULTILINE)
    assert [set(layer.split(", ")) for layer in " ".join(written.split()).split(" ▸ ")] == layers


def test_the_promises_are_numbered_from_one_on() -> None:
    numbers = re.findall(r"^(\d+)\. ", read("docs/reliability.md"), re.MULTILINE)
    assert [int(number) for number in numbers] == list(range(1, len(numbers) + 1))


def test_the_changelog_names_the_newest_schema_version_of_the_log_and_no_other() -> None:
    named = re.findall(r"schema version (\d+)", read("docs/changelog.md"), re.IGNORECASE)
    assert [int(version) for version in named] == [schema_versions()[-1][0]]


def test_every_document_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    left = [ROOT / "README.md"]
    while left:
        document = left.pop()
        reached.add(document)
        for target in re.findall(r"\]\(([^)#\s]+)[)#]", document.read_text("utf-8")):
            path = (document.parent / target).resolve()
            found = sorted(path.glob("*.md")) if path.is_dir() else [path]
            left += [item for item in found if item in DOCUMENTS and item not in reached]
    assert reached == set(DOCUMENTS)


async def run_shell(block: str, environment: dict[str, str]) -> tuple[str, str]:
    """Run a block as it would be pasted; return what it wrote, and TID, which the next one uses."""
    script = f"set -euo pipefail\n{block}\nprintf '\\n%s' \"${{TID:-}}\""
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-c",
        script,
        cwd=ROOT,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(20):
        out, err = await process.communicate()
    assert process.returncode == 0, f"{block}\n{err.decode()}"
    said, _, thread_id = out.decode().rpartition("\n")
    return said, thread_id


async def settle(http: aiohttp.ClientSession, url: str) -> None:
    """Wait until every run has ended or asks something, as a person does who reads on."""
    for run in (await get_json(http, url, "/runs?status=active"))["items"]:
        # In this order: a question up to `seq` that has no answer is seen in the status.
        agents = await get_json(http, url, f"/threads/{run['threadId']}/agents")
        seq = agents["agents"][0]["maxSeq"]
        if (await get_json(http, url, f"/runs/{run['runId']}"))["status"] != "waiting":
            path = f"/runs/{run['runId']}/events?since={seq}"
            async with open_stream(http, url, path) as response:
                await read_frames(response, lambda f: f.event in {*ASKING, "done"})


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
async def test_the_commands_of_a_document_work(
    name: str, start_gateway: Gateways, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    up = await start_gateway(
        profiles=str(ROOT / "profiles"), openai_api_key="", ollama_host="127.0.0.1:9"
    )
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "OWNWARE_DATA_DIR": str(up.data_dir),
        "OWNWARE_GATEWAY": up.url,
    }
    said = ""
    blocks = [
        block
        for block in re.findall(r"^```sh\n(.*?)^```", read(name), re.MULTILINE | re.DOTALL)
        if not LEFT_OUT.match(block)
    ]
    assert len(blocks) > 3
    for block in blocks:
        block = block.replace("http://localhost:3011", up.url)
        block = block.replace(
            ".venv/bin/ownware", f"{shlex.quote(sys.executable)} -m ownware_gateway"
        )
        wrote, environment["TID"] = await run_shell(block, environment)
        assert '"error":' not in wrote
        said += wrote
        await settle(http, up.url)
    assert "event: text.delta" in said
    assert "event: done" in said
    assert (await get_json(http, up.url, "/runs?status=failed"))["items"] == []
    if "resume" in "".join(blocks):
        assert (up.workspace / "notes.txt").read_text("utf-8") == "hello"
