"""The commands around the log: tail a thread, copy the log, put a copy back."""

import asyncio
import contextlib
import json
import signal
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from ownware_gateway import cli
from ownware_gateway.app import Gateway
from ownware_gateway.log.backup import check
from ownware_gateway.terminal import printable
from tests.gateway import PATIENCE_S, Gateways, post_json, run_events, start_run, until_status
from tests.provider import Call, Provider, Reply
from tests.test_cli import OWNWARE

Http = aiohttp.ClientSession
Output = pytest.CaptureFixture[str]
Json = dict[str, Any]

WRITE: Final = Call("write_file", {"path": "a", "content": "a"})


@contextlib.asynccontextmanager
async def tail(up: Gateway, *arguments: str) -> AsyncIterator[Process]:
    """Run `ownware log` on a gateway's data directory."""
    process = await asyncio.create_subprocess_exec(
        *OWNWARE, "log", *arguments, "--data-dir", str(up.data_dir), stdout=PIPE, stderr=PIPE
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def read_until(process: Process, kind: str) -> list[Json]:
    """Read events up to the next one of a type."""
    assert process.stdout is not None
    found: list[Json] = []
    async with asyncio.timeout(PATIENCE_S):
        while not found or found[-1]["type"] != kind:
            line = await process.stdout.readline()
            assert line, found
            found.append(json.loads(line))
    return found


async def command(*arguments: str) -> int:
    """Run a command here, beside a gateway that is up in this loop."""
    return await asyncio.to_thread(cli.run, arguments)


# -- log


async def test_log_shows_what_happened_and_then_what_happens(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    run = await start_run(http, up.url, "hello there")
    said = await run_events(http, up.url, run["runId"])
    async with tail(up, run["threadId"]) as process:
        assert await read_until(process, "session.end") == said
        later = await start_run(http, up.url, "again", threadId=run["threadId"])
        more = await read_until(process, "session.end")
        assert more == await run_events(http, up.url, later["runId"])
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 130
    async with tail(up, run["threadId"], "--since", str(said[-1]["seq"])) as process:
        assert await read_until(process, "session.end") == more


async def test_log_goes_on_through_a_restart_of_the_gateway(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    run = await start_run(http, up.url, "hello")
    async with tail(up, run["threadId"]) as process:
        said = await read_until(process, "session.end")
        up = await start_gateway.restart(up)
        await start_run(http, up.url, "again", threadId=run["threadId"])
        said += await read_until(process, "session.end")
    assert [event["seq"] for event in said] == list(range(1, len(said) + 1))


async def test_log_ends_when_its_thread_is_deleted(start_gateway: Gateways, http: Http) -> None:
    up = await start_gateway()
    run = await start_run(http, up.url, "hello")
    async with tail(up, run["threadId"]) as process:
        await read_until(process, "session.end")
        async with http.delete(f"{up.url}/api/v1/threads/{run['threadId']}") as response:
            assert response.status == 200
        (reset,) = await read_until(process, "stream.reset")
        assert reset["reason"] == "thread_deleted"
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0


async def test_log_shows_no_code_that_could_control_a_terminal(
    start_gateway: Gateways, http: Http, capsys: Output
) -> None:
    up = await start_gateway()
    prompt = "\x1b]0;evil\x07\x9b2J \u202e"
    run = await start_run(http, up.url, prompt)
    await run_events(http, up.url, run["runId"])
    async with tail(up, run["threadId"]) as process:
        assert process.stdout is not None
        raw = (await process.stdout.readline()).decode()
    assert all(printable(character) == character for character in raw.rstrip("\n"))
    assert "evil" in raw


async def test_log_says_what_is_missing(
    start_gateway: Gateways, tmp_path: Path, capsys: Output
) -> None:
    assert await command("log", "thread_x", "--data-dir", str(tmp_path / "none")) == 1
    assert "No gateway is using" in capsys.readouterr().err
    up = await start_gateway()
    assert await command("log", "thread_x", "--data-dir", str(up.data_dir)) == 1
    assert "no thread 'thread_x'" in capsys.readouterr().err


async def test_log_uses_the_token_of_the_data_directory(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway(require_auth=True)
    headers = {"Authorization": f"Bearer {up.token}"}
    body = {"profileId": "assistant", "prompt": "hello"}
    async with http.post(f"{up.url}/api/v1/run", json=body, headers=headers) as response:
        run = await response.json()
    async with tail(up, run["threadId"]) as process:
        assert (await read_until(process, "session.end"))[-1]["status"] == "succeeded"


# -- backup, restore


async def test_a_copy_is_made_of_a_gateway_that_is_at_work_and_put_back(
    start_gateway: Gateways, http: Http, provider: Provider, tmp_path: Path, capsys: Output
) -> None:
    up = await start_gateway()
    kept = await start_run(http, up.url, "kept")
    await run_events(http, up.url, kept["runId"])
    provider.reply(Reply(calls=[WRITE]))
    waiting = await start_run(http, up.url, "write")
    await until_status(http, up.url, waiting, "waiting")
    data, copy = str(up.data_dir), tmp_path / "copy.db"
    assert await command("backup", str(copy), "--data-dir", data) == 0
    assert str(copy) in capsys.readouterr().out
    check(copy)
    assert await command("backup", str(copy), "--data-dir", data) == 1
    assert "exists already" in capsys.readouterr().err
    assert await command("restore", str(copy), "--data-dir", data) == 1
    assert "Another gateway (process" in capsys.readouterr().err
    lost = await start_run(http, up.url, "lost")
    await run_events(http, up.url, lost["runId"])
    await start_gateway.stop(up)
    assert await command("restore", str(copy), "--data-dir", data) == 0
    out = capsys.readouterr().out
    (replaced,) = up.data_dir.glob("gateway.replaced-*.db")
    assert str(replaced) in out
    check(replaced)
    up = await start_gateway()
    ended = await run_events(http, up.url, waiting["runId"])
    assert ended[-1]["code"] == "restored"
    for run, status in ((kept, 200), (lost, 404)):
        async with http.get(f"{up.url}/api/v1/runs/{run['runId']}") as response:
            assert response.status == status
    status, _ = await post_json(http, up.url, "/run", {"profileId": "assistant", "prompt": "x"})
    assert status == 200


async def test_what_cannot_be_restored_changes_nothing_and_is_a_sentence(
    start_gateway: Gateways, http: Http, tmp_path: Path, capsys: Output
) -> None:
    up = await start_gateway()
    run = await start_run(http, up.url, "hello")
    await run_events(http, up.url, run["runId"])
    await start_gateway.stop(up)
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"garbage" * 1_000)
    for file in (garbage, tmp_path / "none"):
        assert await command("restore", str(file), "--data-dir", str(up.data_dir)) == 1
        err = capsys.readouterr().err
        assert str(file) in err
        assert err.count("\n") == 1
    up = await start_gateway()
    assert (await run_events(http, up.url, run["runId"]))[-1]["status"] == "succeeded"


async def test_a_copy_begins_a_new_data_directory(
    start_gateway: Gateways, http: Http, tmp_path: Path, capsys: Output
) -> None:
    up = await start_gateway()
    run = await start_run(http, up.url, "hello")
    await run_events(http, up.url, run["runId"])
    copy, other = tmp_path / "copy.db", tmp_path / "other"
    assert await command("backup", str(copy), "--data-dir", str(up.data_dir)) == 0
    assert await command("restore", str(copy), "--data-dir", str(other)) == 0
    assert "kept in" not in capsys.readouterr().out
    moved = await start_gateway(data_dir=str(other))
    assert (await run_events(http, moved.url, run["runId"]))[-1]["status"] == "succeeded"


def test_without_a_log_there_is_nothing_to_copy(tmp_path: Path, capsys: Output) -> None:
    assert cli.run(["backup", str(tmp_path / "x"), "--data-dir", str(tmp_path)]) == 1
    assert "There is no log" in capsys.readouterr().err
