"""The examples, run as a person would run them, against a gateway that is up."""

import asyncio
import contextlib
import os
import shutil
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import pytest

from ownware_gateway.app import Gateway
from tests.gateway import PATIENCE_S, Gateways, Proxy

EXAMPLES: Final = Path(__file__).parent.parent / "examples"
DEMO: Final = "demo:assistant"

NODE: Final = pytest.param(
    ("node", str(EXAMPLES / "chat.mjs")),
    id="chat.mjs",
    marks=pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
)
PYTHON: Final = pytest.param((sys.executable, str(EXAMPLES / "chat.py")), id="chat.py")

chats = pytest.mark.parametrize("command", [NODE, PYTHON])

Command = tuple[str, ...]


@pytest.fixture
async def up(start_gateway: Gateways) -> Gateway:
    """A gateway without keys, so that the built-in model is the first usable one."""
    return await start_gateway(openai_api_key="", openai_base_url="", require_auth=True)


@contextlib.asynccontextmanager
async def running(command: Command, url: str, token: str | None) -> AsyncIterator[Process]:
    """Run an example, its output and errors in one stream."""
    environment = {**os.environ, "OWNWARE_GATEWAY": url, "OWNWARE_GATEWAY_TOKEN": token or ""}
    process = await asyncio.create_subprocess_exec(
        *command, stdin=PIPE, stdout=PIPE, stderr=STDOUT, env=environment
    )
    try:
        async with asyncio.timeout(PATIENCE_S * 2):
            yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def finished(command: Command, url: str, token: str | None, typed: str) -> tuple[int, str]:
    """Run an example with this input; return its exit code and output."""
    async with running(command, url, token) as process:
        out, _ = await process.communicate(typed.encode())
        assert process.returncode is not None
        return process.returncode, out.decode()


@chats
async def test_a_chat_keeps_one_conversation_and_asks_before_a_tool_runs(
    command: Command, up: Gateway
) -> None:
    typed = "my name is Ada\nwrite a.txt: hi\ny\nwrite b.txt: hi\nn\nwhat is my name?\n"
    code, said = await finished(command, up.url, up.token, typed)
    assert code == 0
    assert DEMO in said
    assert '"path": "a.txt"' in said
    assert "the answer was no" in said
    assert "Your name is Ada." in said
    assert (up.workspace / "a.txt").read_text(encoding="utf-8") == "hi"
    assert not (up.workspace / "b.txt").exists()


@chats
async def test_a_chat_answers_a_question_by_its_number_in_words_or_not_at_all(
    command: Command, up: Gateway
) -> None:
    asking = "ask me: Which colour? [red, green]\n"
    typed = f"{asking}2\n{asking}3\n{asking}rather blue\n{asking}\nask me: Why?\n1\n"
    code, said = await finished(command, up.url, up.token, typed)
    assert code == 0
    assert "Which colour?\n  1. red\n  2. green\n" in said
    for answer in ("green", "3", "rather blue", "1"):
        assert f"ask_user answered: {answer}\n" in said
    assert "I could not use ask_user: The person declined to answer." in said


@chats
async def test_a_chat_goes_on_after_cut_connections(command: Command, up: Gateway) -> None:
    def cut(brought: bytes) -> int | None:
        # Only the stream is cut: after 2 KB, which is a few words of the answer.
        return 2_000 if b"text/event-stream" in brought and len(brought) > 2_000 else None

    async with Proxy(up.url, cut) as proxy:
        code, said = await finished(command, proxy.url, up.token, "count to 30\n")
    assert code == 0
    assert proxy.cuts > 1
    assert said.count(" ".join(map(str, range(1, 31)))) == 1


@chats
async def test_a_chat_goes_on_after_a_restart(
    command: Command, up: Gateway, start_gateway: Gateways
) -> None:
    async with running(command, up.url, up.token) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"write a.txt: hi\n")
        await process.stdout.readuntil(b"lways: ")
        up = await start_gateway.restart(up)
        out, _ = await process.communicate(b"y\n")
    assert process.returncode == 0
    assert b"write_file answered" in out
    assert (up.workspace / "a.txt").exists()


@chats
@pytest.mark.parametrize(
    ("typed", "flags", "says"),
    [
        ("hi\n", ("--model", "nobody:x"), "nobody"),
        ("", (), "Ctrl-D ends"),
    ],
    ids=["unknown model", "nothing said"],
)
async def test_a_chat_says_what_is_wrong(
    command: Command, up: Gateway, typed: str, flags: Command, says: str
) -> None:
    code, said = await finished((*command, *flags), up.url, up.token, typed)
    assert says in said
    assert "Traceback" not in said
    assert code == (1 if typed else 0)


@chats
async def test_a_chat_with_a_wrong_token_says_so(command: Command, up: Gateway) -> None:
    code, said = await finished(command, up.url, "x" * 43, "hi\n")
    assert code == 1
    assert "The token is missing or wrong" in said


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_the_walkthrough_walks_through(
    up: Gateway, make_profile: Callable[..., Path]
) -> None:
    # With a second profile: what the script takes out of an answer must not depend on one.
    make_profile("another")
    code, said = await finished(("sh", str(EXAMPLES / "walkthrough.sh")), up.url, up.token, "")
    assert code == 0, said
    assert '"status":"healthy"' in said
    # The fourth event: in the whole stream, after since=3, after the third id.
    assert said.count(".4\n") == 3
    assert said.count('"approved":true') == 2
    assert '"answer":"green"' in said
    assert '"status":"succeeded"' in said
    written = (up.workspace / "hello.txt").read_text(encoding="utf-8")
    assert written == "hello from a walk-through"
