"""`ownware doctor`: every finding, what it says to do, and that looking changes nothing."""

import asyncio
import json
import os
import re
import shutil
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp
import pytest

from ownware_gateway import __version__, cli
from ownware_gateway.datadir import DATABASE, LOCK_FILE, TOKEN_FILE, DataDir
from ownware_gateway.doctor import FREE_BYTES_MIN, WAL_BYTES_MAX, Finding, examine
from ownware_gateway.log import Stream
from ownware_gateway.log.sqlite import SqliteLog
from ownware_gateway.log.statements import schema_versions
from tests.gateway import Gateways, start_run, until_status
from tests.log import Clock, delta, drives, question, session_start, starts, whole_run
from tests.provider import Call, Provider, Reply

Output = pytest.CaptureFixture[str]
MakeProfile = Callable[..., Path]


@pytest.fixture
async def data(tmp_path: Path) -> Path:
    """A data directory as a gateway leaves it: a token, a log with one run."""
    folder = tmp_path / "data"
    with DataDir.open(folder) as opened:
        opened.token()
    log = await SqliteLog.open(folder / DATABASE, Clock())
    for number in range(30):
        await whole_run(log, f"run_{number}", delta("x" * 1_000))
    await log.close()
    return folder


def look(data: Path, profiles: Path, level: str | None = None) -> list[str]:
    """What is found, or only what is found of a level."""
    found = examine(data, profiles)
    return [item.text for item in found if level in (None, item.level)]


def one(found: list[str], word: str) -> str:
    (text,) = (item for item in found if word in item)
    return text


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.name: (stat.S_IMODE(path.stat().st_mode), path.read_bytes())
        for path in folder.iterdir()
    }


async def test_all_is_well_with_what_a_gateway_leaves_and_looking_changes_nothing(
    data: Path, profiles: Path, capsys: Output
) -> None:
    before = snapshot(data)
    arguments = ["doctor", "--data-dir", str(data), "--profiles", str(profiles)]
    assert cli.run(arguments) == 0
    out = capsys.readouterr().out
    assert snapshot(data) == before
    assert all(line.startswith(("ok ", "warn ")) for line in out.splitlines())
    for word in (
        __version__,
        sqlite3.sqlite_version,
        "private",
        "No gateway uses",
        "a token",
        "MiB of disk",
        "The log is whole",
        "Runs that have not ended: 0.",
        "assistant",
    ):
        assert word in out
    assert "fail" not in out


def test_before_the_first_start_there_is_nothing_to_be_wrong(
    tmp_path: Path, profiles: Path, capsys: Output
) -> None:
    arguments = ["doctor", "--data-dir", str(tmp_path / "none"), "--profiles", str(profiles)]
    assert cli.run(arguments) == 0
    assert "a first start makes it" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


class Fault(NamedTuple):
    """Something that is wrong, how it is brought about, and what is said."""

    level: str
    cause: Callable[[Path], object]
    words: tuple[str, ...]


def opened_to_others(name: str) -> Callable[[Path], object]:
    return lambda data: (data / name).chmod(0o644)


def overwrite(data: Path) -> None:
    raw = bytearray((data / DATABASE).read_bytes())
    raw[4096 * 4 : 4096 * 6] = b"\xff" * 8192
    (data / DATABASE).write_bytes(raw)


def execute(sql: str) -> Callable[[Path], object]:
    def do(data: Path) -> None:
        with closing(sqlite3.connect(data / DATABASE)) as connection, connection:
            connection.execute(sql)

    return do


def large_wal(data: Path) -> None:
    wal = data / f"{DATABASE}-wal"
    wal.touch(0o600)
    # A hole: it takes no space, and SQLite finds no valid frame in it.
    os.truncate(wal, WAL_BYTES_MAX + 1)


NEWER: Final = schema_versions()[-1][0] + 1

FAULTS: Final[dict[str, Fault]] = {
    "open folder": Fault("fail", lambda data: data.chmod(0o755), ("chmod 700",)),
    "open log": Fault("fail", opened_to_others(DATABASE), ("chmod 600", DATABASE)),
    "open token": Fault("fail", opened_to_others(TOKEN_FILE), ("chmod 600", TOKEN_FILE)),
    "open lock": Fault("fail", opened_to_others(LOCK_FILE), ("chmod 600", LOCK_FILE)),
    "bad token": Fault(
        "fail", lambda data: (data / TOKEN_FILE).write_text("short"), ("delete it",)
    ),
    "no database": Fault(
        "fail", lambda data: (data / DATABASE).write_bytes(b"x" * 9_000), ("no log", "database")
    ),
    "damage": Fault("fail", overwrite, (DATABASE,)),
    "orphans": Fault(
        "fail", execute("DELETE FROM threads WHERE id = 'thread_1'"), ("damaged", "backup")
    ),
    "newer": Fault("fail", execute(f"PRAGMA user_version={NEWER}"), (f"version {NEWER}", "knows")),
    "large wal": Fault("warn", large_wal, ("write-ahead log", "restart")),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_what_is_wrong_is_found_and_what_to_do_is_said(
    data: Path, profiles: Path, capsys: Output, name: str
) -> None:
    fault = FAULTS[name]
    fault.cause(data)
    found = look(data, profiles, fault.level)
    assert any(all(word in text for word in fault.words) for text in found), found
    arguments = ["doctor", "--data-dir", str(data), "--profiles", str(profiles)]
    assert cli.run(arguments) == (1 if fault.level == "fail" else 0)
    out, err = capsys.readouterr()
    assert f"\n{fault.level:<5} " in out
    assert err == ""


async def test_a_disk_that_is_nearly_full_is_worth_a_word(
    data: Path, profiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(data)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=FREE_BYTES_MIN - 1))
    assert "Make room" in one(look(data, profiles, "warn"), "MiB of disk")


async def test_profiles_that_cannot_be_used_are_named(data: Path, profiles: Path) -> None:
    (profiles / "broken").mkdir()
    (profiles / "broken" / "agent.json").write_text(json.dumps({"name": "broken", "modle": "x"}))
    assert "modle" in one(look(data, profiles, "warn"), "broken")
    assert "ownware init" in one(look(data, profiles / "none", "warn"), "no profiles")


@pytest.mark.parametrize(
    "wrong",
    [
        {"tools": {"deny": ["shel_execute"]}},
        {"policies": [{"tool": "no__such", "decision": "deny"}]},
        {"subagents": {"a": {"profile": "b"}}, "tools": {"allow": ["spawn_agents"]}},
    ],
)
async def test_a_profile_that_a_gateway_would_refuse_is_found_before_it_starts(
    wrong: dict[str, Any], start_gateway: Gateways, make_profile: MakeProfile, capsys: Output
) -> None:
    make_profile("mine", **wrong)
    up = await start_gateway()
    (refused,) = up.profiles.broken()
    assert refused.message.startswith("mine: The field ")
    settings = ["--data-dir", str(up.data_dir), "--profiles", str(make_profile("other").parent)]
    assert cli.run(["doctor", *settings]) == 0
    assert f"\nwarn  {refused.message}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mcp.json", "services.json"])
async def test_a_file_that_keeps_a_gateway_from_starting_is_found(
    data: Path, profiles: Path, capsys: Output, name: str
) -> None:
    arguments = ["doctor", "--data-dir", str(data), "--profiles", str(profiles)]
    (data / name).write_text("{}")
    assert cli.run(arguments) == 0
    (data / name).write_text("{")
    assert cli.run(arguments) == 1
    out = capsys.readouterr().out
    assert re.search(rf"\nfail  The .*{name} is not JSON at line 1", out)
    assert "Profiles in" in out


async def test_runs_that_have_not_ended_are_counted(data: Path, profiles: Path) -> None:
    log = await SqliteLog.open(data / DATABASE, Clock())
    for thread_id in ("thread_a", "thread_b"):
        stream = Stream(thread_id)
        log.append(starts(f"run_{thread_id}", stream))
        asked = [session_start("x"), question(f"q_{thread_id}")]
        await log.append(drives(f"run_{thread_id}", *asked, stream=stream)).wait()
    log.append(starts("run_new"))
    await log.close()
    text = one(look(data, profiles), "have not ended")
    assert text == "Runs that have not ended: 3. Of them wait for a person: 2."


async def test_it_looks_while_a_gateway_is_at_work(
    start_gateway: Gateways,
    http: aiohttp.ClientSession,
    provider: Provider,
    profiles: Path,
) -> None:
    up = await start_gateway()
    provider.reply(Reply(calls=[Call("write_file", {"path": "a", "content": "a"})]))
    run = await start_run(http, up.url, "go")
    await until_status(http, up.url, run, "waiting")
    found = await asyncio.to_thread(lambda: list(examine(up.data_dir, profiles)))
    assert all(isinstance(item, Finding) for item in found)
    assert [item for item in found if item.level == "fail"] == []
    texts = [item.text for item in found]
    assert str(os.getpid()) in one(texts, "A gateway (process")
    assert up.url in one(texts, "A gateway (process")
    assert one(texts, "have not ended").startswith("Runs that have not ended: 1.")
