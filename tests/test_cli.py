"""The command line: real processes where signals, terminals and start-up matter."""

import asyncio
import contextlib
import json
import os
import pty
import shutil
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
import pytest

from ownware_gateway import __version__, cli
from ownware_gateway.datadir import DataDir
from ownware_gateway.profile.folder import Profiles
from ownware_gateway.terminal import chosen
from tests.gateway import (
    FAKE_KEY,
    PATIENCE_S,
    Gateways,
    get_json,
    start_run,
    until_status,
    write_profile,
)
from tests.provider import Provider, Reply

OWNWARE: Final = (sys.executable, "-m", "ownware_gateway")

#: How long a start may take on a busy machine; alone it takes about half a second.
START_S: Final = 8.0

Output = pytest.CaptureFixture[str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, as a person finds it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@dataclass
class Serving:
    """A gateway that is a process; `lines` is what it has printed."""

    process: Process
    url: str
    lines: list[str]

    def field(self, name: str) -> str:
        """Return what stands beside a name."""
        (found,) = (line for line in self.lines if line.startswith(name))
        return found.removeprefix(name).strip()

    async def until(self, beginning: str) -> None:
        """Read on until a line begins so."""
        assert self.process.stdout is not None
        while line := (await self.process.stdout.readline()).decode():
            self.lines.append(line.rstrip("\n"))
            if line.startswith(beginning):
                return
        pytest.fail(f"{beginning!r} was never printed: {self.lines}")

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), PATIENCE_S)


@contextlib.asynccontextmanager
async def serving(*flags: str) -> AsyncIterator[Serving]:
    """Run `ownware serve` in the current folder."""
    arguments = (*OWNWARE, "serve", "--port", "0", *flags)
    process = await asyncio.create_subprocess_exec(*arguments, stdout=PIPE, stderr=PIPE)
    try:
        async with asyncio.timeout(START_S):
            serve = Serving(process, "", [])
            await serve.until("Ownware Gateway")
            serve.url = serve.lines[0].split()[-1]
            yield serve
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def ownware(*arguments: str) -> tuple[int, str, str]:
    """Run a command to its end; return exit code, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        *OWNWARE, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=PIPE, stderr=PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


# --- serve ------------------------------------------------------------------------------------


async def test_a_gateway_prints_its_address_and_answers(
    here: Path, http: aiohttp.ClientSession
) -> None:
    write_profile(here / "profiles", "helper")
    broken = here / "profiles" / "odd"
    broken.mkdir()
    (broken / "agent.json").write_text('{"name": "odd", "modle": "x:y"}', encoding="utf-8")
    async with serving("--data-dir", "data", "--workspace", "work") as serve:
        # Nothing but the address has been waited for.
        assert (await get_json(http, serve.url, "/health"))["status"] == "healthy"
        await serve.until("Models")
        assert serve.field("Profiles") == f"helper (in {here / 'profiles'})"
        assert any("did you mean 'model'?" in line for line in serve.lines)
        assert serve.field("Data") == str(here / "data")
        assert serve.field("Workspace") == str(here / "work")
        assert "demo:assistant" in serve.field("Models")
        assert await serve.stop() == 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("flags", [(), ("--require-auth",)], ids=["open", "with a token"])
async def test_the_printed_curl_command_answers(here: Path, flags: Sequence[str]) -> None:
    write_profile(here / "profiles", "helper")
    async with serving("--data-dir", "a folder", *flags) as serve:
        await serve.until("Models")
        start = serve.lines.index("Try it:") + 1
        command = "\n".join(serve.lines[start : start + 2])
        shell = await asyncio.create_subprocess_exec("sh", "-c", command, stdout=PIPE, stderr=PIPE)
        out, _ = await shell.communicate()
        answer = json.loads(out)
        assert answer["profileId"] == "helper"
        assert answer["model"] == "demo:assistant"


async def test_the_token_is_printed_once_and_later_by_its_command(here: Path) -> None:
    flags = ("--data-dir", "data", "--require-auth")
    async with serving(*flags) as serve:
        await serve.until("Models")
        token = serve.field("Token").split()[0]
        await serve.stop()
    async with serving(*flags) as serve:
        await serve.until("Models")
        assert token not in "\n".join(serve.lines)
        assert "token --data-dir" in serve.field("Token")
    assert await ownware("token", "--data-dir", "data") == (0, f"{token}\n", "")


async def test_a_key_of_ones_own_is_the_token_and_is_not_printed(
    here: Path, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_profile(here / "profiles", "helper")
    key = "own-" + "k" * 12
    folder = ("--data-dir", "data")
    async with serving(*folder, "--api-key", key) as serve:
        await serve.until("Models")
        assert key not in "\n".join(serve.lines)
        assert any("$OWNWARE_API_KEY" in line for line in serve.lines)
        async with http.get(f"{serve.url}/v1/models") as response:
            assert response.status == 401
        http.headers["Authorization"] = f"Bearer {key}"
        async with http.get(f"{serve.url}/v1/models/helper") as response:
            assert response.status == 200
        monkeypatch.setenv("OWNWARE_API_KEY", key)
        code, _, err = await ownware("run", "helper", "hello", *folder)
        assert code == 0, err
    assert await ownware("token", *folder) == (0, f"{key}\n", "")


async def test_without_a_profile_it_says_what_to_do(here: Path) -> None:
    async with serving("--data-dir", "data") as serve:
        await serve.until("Models")
        assert serve.field("Profiles").startswith("none")
        assert any("init" in line for line in serve.lines)
        assert not any("curl" in line for line in serve.lines)


async def test_an_exposed_gateway_warns(here: Path) -> None:
    async with serving("--data-dir", "data", "--host", "0.0.0.0") as serve:
        await serve.until("Models")
        assert "plain HTTP" in serve.field("Warning")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_it_gracefully(here: Path, number: signal.Signals) -> None:
    async with serving("--data-dir", "data") as serve:
        assert await serve.stop(number) == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"]
)
async def test_a_second_signal_stops_it_at_once_and_nothing_is_lost(
    here: Path,
    http: aiohttp.ClientSession,
    provider: Provider,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", provider.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", FAKE_KEY)
    write_profile(here / "profiles", "assistant")
    provider.reply(Reply(text=["never"], hang=True))
    async with serving("--data-dir", "data") as serve:
        run = await start_run(http, serve.url, "hang")
        await provider.requested()
        serve.process.send_signal(number)
        assert serve.process.stderr is not None
        while b"stopping" not in await serve.process.stderr.readline():
            pass
        assert await serve.stop(number) == code
    async with serving("--data-dir", "data") as serve:
        await serve.until("Runs")
        assert serve.field("Runs").startswith("1 unfinished")
        await until_status(http, serve.url, run, "succeeded")


async def test_a_second_gateway_on_a_data_directory_names_the_first(here: Path) -> None:
    async with serving("--data-dir", "data") as serve:
        code, out, err = await ownware("serve", "--port", "0", "--data-dir", "data")
        assert (code, out) == (1, "")
        assert f"process {serve.process.pid}" in err
        assert err.count("\n") == 1


async def test_no_secret_reaches_the_log(
    here: Path,
    http: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", FAKE_KEY)
    flags = ("--data-dir", "data", "--require-auth", "--log-level", "debug")
    async with serving(*flags) as serve:
        await serve.until("Models")
        token = serve.field("Token").split()[0]
        for secret in (token, FAKE_KEY):
            async with http.get(f"{serve.url}/api/v1/{secret}?a={secret}") as response:
                assert response.status == 401
        await serve.stop()
        assert serve.process.stderr is not None
        said = (await serve.process.stderr.read()).decode()
    assert "/api/v1/" in said
    assert token not in said
    assert FAKE_KEY not in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--port", "70000"], "from 0 to 65535"),
        (["serve", "--port", "many"], "invalid int value"),
        (["serve", "--cors-origin", "*"], "is not an origin"),
        (["serv"], "invalid choice"),
        (["run", "assistant"], "required"),
        (["token"], "no token"),
    ],
)
def test_what_cannot_be_done_is_a_sentence_and_exit_code_1(
    here: Path, capsys: Output, arguments: list[str], says: str
) -> None:
    assert cli.run(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert "Traceback" not in err


def test_a_variable_that_does_not_fit_is_named(
    here: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWNWARE_PORT", "many")
    assert cli.run(["serve"]) == 1
    assert "OWNWARE_PORT" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["serve", "--help"]])
def test_help_is_no_error(capsys: Output, arguments: list[str]) -> None:
    assert cli.run(arguments) == 0
    assert "usage: ownware" in capsys.readouterr().out


def test_version(capsys: Output) -> None:
    assert cli.run(["version"]) == 0
    assert capsys.readouterr().out == f"ownware {__version__}\n"


async def test_output_that_nobody_reads_is_no_traceback(here: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    process = await asyncio.create_subprocess_exec(*OWNWARE, "version", stdout=write, stderr=PIPE)
    os.close(write)
    _, err = await process.communicate()
    assert (process.returncode, err) == (1, b"")


# --- init, models -----------------------------------------------------------------------------


def test_init_writes_a_profile_that_works_and_says_what_is_next(here: Path, capsys: Output) -> None:
    assert cli.run(["init", "helper"]) == 0
    profiles = Profiles(here / "profiles")
    assert profiles.broken() == []
    assert profiles.get("helper").soul
    assert "run helper" in capsys.readouterr().out
    assert cli.run(["run", "helper", "hello"]) == 0


def test_init_never_overwrites(here: Path, capsys: Output) -> None:
    folder = here / "profiles" / "assistant"
    folder.mkdir(parents=True)
    (folder / "SOUL.md").write_text("mine", encoding="utf-8")
    assert cli.run(["init"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert [file.name for file in folder.iterdir()] == ["SOUL.md"]
    assert (folder / "SOUL.md").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("name", ["../up", "", ".hidden", "a b", "a/b"])
def test_init_refuses_what_is_no_name(here: Path, capsys: Output, name: str) -> None:
    assert cli.run(["init", name]) == 1
    assert "cannot be named" in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_models_lists_what_can_be_used_and_says_what_the_others_need(
    here: Path, capsys: Output
) -> None:
    assert cli.run(["models"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["MODEL", "demo:assistant"]
    assert "--all" in err
    assert cli.run(["models", "--all"]) == 0
    _, first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("demo:assistant")
    assert any("openai:" in line and "needs OPENAI_API_KEY" in line for line in others)
    assert list(here.iterdir()) == []


async def test_models_asks_the_gateway_that_is_up(
    start_gateway: Gateways, tmp_path: Path, capsys: Output
) -> None:
    await start_gateway(require_auth=True)
    # This process has no key; the gateway has one.
    code = await asyncio.to_thread(cli.run, ["models", "--data-dir", str(tmp_path / "data")])
    assert code == 0
    assert "openai:" in capsys.readouterr().out


# --- run --------------------------------------------------------------------------------------


@pytest.fixture
def assistant(here: Path) -> Path:
    write_profile(here / "profiles", "assistant")
    return here


def test_run_says_the_answer_on_stdout_and_the_rest_on_stderr(
    assistant: Path, capsys: Output
) -> None:
    assert cli.run(["run", "assistant", "count to 3", "--data-dir", "data"]) == 0
    out, err = capsys.readouterr()
    assert out == "1 2 3 \n"
    assert "OPENAI_API_KEY is not set" in err
    assert "thread_" in err


def test_run_goes_on_with_a_thread(assistant: Path, capsys: Output) -> None:
    assert cli.run(["run", "assistant", "my name is Ada", "--data-dir", "data"]) == 0
    thread_id = capsys.readouterr().err.split("Thread: ")[1].split()[0]
    command = ["run", "assistant", "what is my name?", "--data-dir", "data"]
    assert cli.run([*command, "--thread", thread_id, "--model", "demo:assistant"]) == 0
    assert capsys.readouterr().out == "Your name is Ada.\n"


def test_with_no_terminal_to_ask_on_the_answer_is_no(assistant: Path, capsys: Output) -> None:
    assert cli.run(["run", "assistant", "write a.txt: hi", "--workspace", "work"]) == 0
    err = capsys.readouterr().err
    assert '"path": "a.txt"' in err
    assert "Denied: there is no terminal to ask on" in err
    assert not (assistant / "work" / "a.txt").exists()


def test_yes_approves(assistant: Path, capsys: Output) -> None:
    assert cli.run(["run", "assistant", "write a.txt: hi", "--workspace", "work", "--yes"]) == 0
    assert "Approved" in capsys.readouterr().err
    assert (assistant / "work" / "a.txt").read_text(encoding="utf-8") == "hi"


def test_run_of_an_unknown_profile_is_a_sentence(assistant: Path, capsys: Output) -> None:
    assert cli.run(["run", "asistant", "hi"]) == 1
    assert "Did you mean 'assistant'?" in capsys.readouterr().err


def test_a_gateway_that_never_says_its_address_is_a_sentence(
    assistant: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "STARTING_S", 0.2)
    with DataDir.open(assistant / "data"):
        assert cli.run(["run", "assistant", "hi", "--data-dir", "data"]) == 1
    assert "try again" in capsys.readouterr().err


async def test_run_uses_the_gateway_that_is_up(
    start_gateway: Gateways, http: aiohttp.ClientSession, tmp_path: Path, capsys: Output
) -> None:
    up = await start_gateway(require_auth=True)
    command = ["run", "assistant", "hello you", "--data-dir", str(tmp_path / "data")]
    assert await asyncio.to_thread(cli.run, command) == 0
    assert capsys.readouterr().out == "hello you\n"
    http.headers["Authorization"] = f"Bearer {up.token}"
    assert len((await get_json(http, up.url, "/threads"))["items"]) == 1


async def test_a_run_that_fails_is_exit_code_1(
    start_gateway: Gateways, provider: Provider, tmp_path: Path, capsys: Output
) -> None:
    await start_gateway()
    provider.reply(Reply(status=400, error="No such luck."))
    command = ["run", "assistant", "hi", "--data-dir", str(tmp_path / "data")]
    assert await asyncio.to_thread(cli.run, command) == 1
    err = capsys.readouterr().err
    assert "Error: " in err
    assert "No such luck." in err
    assert "The run failed (" in err


async def test_ctrl_c_cancels_the_run(
    start_gateway: Gateways, provider: Provider, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    up = await start_gateway()
    provider.reply(Reply(text=["never"], hang=True))
    command = ("run", "assistant", "hang", "--data-dir", str(tmp_path / "data"))
    process = await asyncio.create_subprocess_exec(*OWNWARE, *command, stdout=PIPE, stderr=PIPE)
    try:
        await provider.requested()
        (run,) = (await get_json(http, up.url, "/runs"))["items"]
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 130
    assert b"was cancelled" in err
    assert run["threadId"].encode() in err
    assert (await get_json(http, up.url, f"/runs/{run['runId']}"))["status"] == "cancelled"


@contextlib.asynccontextmanager
async def at_a_terminal(*arguments: str) -> AsyncIterator[tuple[Process, int]]:
    """Run a command on a terminal of its own; yield it and the other end of the terminal."""
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *OWNWARE, *arguments, stdin=theirs, stdout=theirs, stderr=theirs
    )
    try:
        yield process, ours
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        os.close(theirs)
        os.close(ours)


async def seen(terminal: int, words: bytes) -> bytes:
    """Read from a terminal up to some words and return all of it."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(terminal, readable.set)
    said = b""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while words not in said:
                await readable.wait()
                readable.clear()
                said += os.read(terminal, 65_536)
    finally:
        loop.remove_reader(terminal)
    return said


@pytest.mark.parametrize(("answer", "written"), [(b"y\n", True), (b"n\n", False), (b"\x04", False)])
async def test_at_a_terminal_a_person_is_asked(
    assistant: Path, answer: bytes, written: bool
) -> None:
    command = ("run", "assistant", "write a.txt: \x1b[2J\u202ehi", "--workspace", "work")
    async with at_a_terminal(*command) as (process, terminal):
        said = await seen(terminal, b"lways: ")
        assert b'"path": "a.txt"' in said
        # What is asked about cannot take over the terminal that it is shown on.
        assert b"\x1b" not in said
        assert "\u202e" not in said.decode()
        os.write(terminal, answer)
        await seen(terminal, b"Thread: ")
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0
    assert (assistant / "work" / "a.txt").exists() is written


async def test_what_was_typed_before_the_question_is_no_answer(assistant: Path) -> None:
    command = ("run", "assistant", "write a.txt: hi", "--workspace", "work")
    async with at_a_terminal(*command) as (process, terminal):
        os.write(terminal, b"y\n")
        await seen(terminal, b"lways: ")
        os.write(terminal, b"n\n")
        await seen(terminal, b"Thread: ")
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0
    assert not (assistant / "work" / "a.txt").exists()


async def test_always_is_asked_once_and_what_is_no_answer_again(assistant: Path) -> None:
    prompt = "write a.txt: hi; then write b.txt: hi"
    command = ("run", "assistant", prompt, "--workspace", "work")
    async with at_a_terminal(*command) as (process, terminal):
        await seen(terminal, b"lways: ")
        os.write(terminal, b"what?\n")
        await seen(terminal, b"lways: ")
        os.write(terminal, b"a\n")
        assert b"Allow?" not in (await seen(terminal, b"Thread: ")).replace(b"a\r\n", b"")
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0
    assert (assistant / "work" / "b.txt").exists()


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (b"2\n", b"ask_user answered: dark green"),
        (b"\n3\n", b"ask_user answered: 3"),
        (b"none of them\n", b"ask_user answered: none of them"),
        (b"\x04", b"ask_user failed: The person declined to answer."),
    ],
    ids=["a number", "again after nothing", "words", "the end"],
)
async def test_at_a_terminal_a_person_answers_a_question(
    assistant: Path, typed: bytes, says: bytes
) -> None:
    prompt = "ask me: Which\x1b[2J colour? [red, dark green]"
    async with at_a_terminal("run", "assistant", prompt) as (process, terminal):
        said = await seen(terminal, b"none: ")
        assert b"  1. red\r\n  2. dark green\r\n" in said
        assert b"\x1b" not in said
        os.write(terminal, typed)
        assert says in await seen(terminal, b"Thread: ")
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0


def test_with_no_terminal_a_question_is_declined_whatever_was_approved(
    assistant: Path, capsys: Output
) -> None:
    assert cli.run(["run", "assistant", "ask me: Why?", "--yes"]) == 0
    out, err = capsys.readouterr()
    assert "Why?" in err
    assert "Not answered: there is no terminal to ask on" in err
    assert "The person declined to answer." in out


@pytest.mark.parametrize(
    ("line", "multiple", "means"),
    [
        ("1", False, "red"),
        ("2", True, "10"),
        ("1, 3", True, "red, blue"),
        ("3 1", True, "blue, red"),
        ("1, 3", False, "1, 3"),
        ("0", False, "0"),
        ("4", False, "4"),
        ("10", False, "10"),
        ("²", False, "²"),
        ("1 or 2", True, "1 or 2"),
        ("red", False, "red"),
    ],
)
def test_numbers_stand_for_options_and_all_else_for_itself(
    line: str, multiple: bool, means: str
) -> None:
    assert chosen(line, ["red", "10", "blue"], multiple=multiple) == means


async def test_ctrl_c_at_a_question_cancels_the_run(assistant: Path) -> None:
    command = ("run", "assistant", "write a.txt: hi", "--workspace", "work")
    async with at_a_terminal(*command) as (process, terminal):
        await seen(terminal, b"lways: ")
        process.send_signal(signal.SIGINT)
        await seen(terminal, b"was cancelled")
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 130
    assert not (assistant / "work" / "a.txt").exists()
