"""Tools that do what no tool should: each costs its call, which says what it was, and no more."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from ownware_gateway.tools import Context, ToolFailed
from tests.custom import AUTO, Http, called, ends, gone, own_tools, write_tools
from tests.gateway import Gateways
from tests.provider import Call, Provider

MakeProfile = Callable[..., Path]

#: What each does, and what the model is told of it.
FAULTS: Final = {
    "garbage": (
        "os.write(int(sys.argv[1]), b'no answer\\n')",
        "garbage answered with something that is not what its process sends.",
    ),
    "closes": ("os.closerange(3, 256)", "closes ended its process (exit code"),
    "reuses": (
        "os.closerange(3, 256); held.extend(open(PIDS, 'a') for _ in range(64))",
        "reuses ended its process (exit code 3)",
    ),
    "forks": ("_fork()", "came back"),
    "leaves": ("_fork() or (os.setsid(), time.sleep(600))", "came back"),
    "ignores": (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); note(); time.sleep(600)",
        "ignores was stopped: it was not done after 1 s. It may have had its effect",
    ),
    "floods": (
        "note(); [os.write(1, b'x' * 65536) for _ in range(1000)]",
        "floods was stopped: it printed more than 16 MiB",
    ),
    "chatters": ("[print('line', n) for n in range(1000)]", "came back"),
    "huge": ("return 'x' * 50_000_000", "It returned 50000013 bytes; at most 4 MiB can be taken."),
    "exits": ("os._exit(0)", "ended its process (exit code 0) before it returned anything"),
    "leaves_python": ("sys.exit(3)", "SystemExit: 3"),
    "crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", "crashes was ended by SIGSEGV"),
    "recurses": ("recurses()", "RecursionError: maximum recursion depth exceeded"),
    "hungers": ("return len(b'x' * 10**10)", "MemoryError: it needs more than the 256 MiB"),
    "opens": ("held.extend(open(os.devnull) for _ in range(1000))", "OSError: [Errno 24]"),
    "raises": ("raise KeyError('who')", "KeyError: 'who'"),
    "refuses": ("raise ValueError('There is no such city.')", "There is no such city."),
    "no_json": ("return object()", "PydanticSerializationError: "),
    "endless": ("x = []; x.append(x); return x", "ValueError"),
    "bad_words": ("raise Odd()", "Odd: it cannot be said why"),
    "threads": ("threading.Thread(target=time.sleep, args=(600,)).start()", "came back"),
    "reads": ("return sys.stdin.read() + 'nothing'", "nothing"),
    "none": ("return None", "[nothing returned]"),
}

HEAD: Final = """
import os, signal, sys, threading, time
from ownware_gateway.tool import tool

PIDS = {pids!r}
held = []

class Odd(Exception):
    def __str__(self):
        raise RuntimeError

def _note():
    with open(PIDS, "a") as file:
        file.write(f"{{os.getpid()}}\\n")

note = _note

def _fork():
    "Return in both processes, when the other one has noted who it is."
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.read(read_end, 1)
    else:
        note()
        os.write(write_end, b"x")
    return pid
"""

FUNCTION: Final = '''
{decorator}
def {name}() -> object:
    """Do it."""
    {body}
    return "came back"
'''


def faults(pids: Path) -> str:
    return HEAD.format(pids=str(pids)) + "".join(
        FUNCTION.format(
            name=name,
            body=body,
            decorator="@tool(timeout=1)" if name == "ignores" else "@tool",
        )
        for name, (body, _) in FAULTS.items()
    )


async def test_whatever_a_tool_does_its_call_says_so_and_the_gateway_goes_on(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tools = {"preset": "none", "custom": {"memoryMb": 256}}
    profile = make_profile("assistant", tools=tools, security=AUTO)
    write_tools(profile, faults=faults(tmp_path / "pids"))
    up = await start_gateway(trust_profiles=True)
    said = await called(http, up.url, provider, *map(Call, FAULTS))
    assert said[-1]["status"] == "succeeded"
    told = ends(said)
    wrong = {name: told[name] for name, (_, words) in FAULTS.items() if words not in told[name][0]}
    assert wrong == {}
    fine = {"came back", "nothing", "[nothing returned]"}
    assert {name: failed for name, (_, failed) in told.items()} == {
        name: words not in fine for name, (_, words) in FAULTS.items()
    }
    lines = [
        event["progress"]
        for event in said
        if event["type"] == "tool.call.progress" and event["progress"].startswith("line ")
    ]
    assert len(lines) == 100
    # Where an exception comes from is for the operator, not for the model.
    assert "faults.py" not in str(told)
    assert "tools/faults.py" in caplog.text
    assert "Fatal Python error: Segmentation fault" in caplog.text
    await gone(tmp_path / "pids", 4)
    # A tool that reused the descriptor of the answer has not written it to its file.
    assert "came back" not in (tmp_path / "pids").read_text()


async def test_files_that_cannot_be_imported_cost_their_own_tools(
    tmp_path: Path, make_profile: MakeProfile
) -> None:
    profile = make_profile("mine")
    good = 'def {}() -> str:\n    """Work."""\n    return "done"\n'
    write_tools(
        profile,
        good=good.format("works"),
        lacks="import no_such_package\n" + good.format("lacks"),
        leaves="import sys\nsys.exit(4)\n" + good.format("leaves"),
        rebound=good.format("rebound") + "rebound = 3\n",
    )
    async with own_tools(profile, tmp_path / "work") as (own, read):
        assert set(own.tools(read)) == {"works"}
        assert own.missing(read) == {
            "lacks": "tools/lacks.py cannot be run: "
            "ModuleNotFoundError: No module named 'no_such_package'.",
            "leaves": "tools/leaves.py cannot be run: SystemExit: 4.",
            "rebound": "'rebound' in tools/rebound.py is no function when the file has been run.",
        }
        output = await own.tools(read)["works"].call(Context(tmp_path), {})
        assert output.text == "done"


async def test_an_import_that_never_ends_is_ended(
    tmp_path: Path, make_profile: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ownware_gateway.custom.keeper.DESCRIBE_S", 0.5)
    profile = make_profile("mine")
    write_tools(
        profile,
        endless='import os, time\nopen("pid", "w").write(str(os.getpid()))\n'
        'time.sleep(600)\ndef work() -> str:\n    """Work."""\n    return "done"\n',
    )
    async with own_tools(profile, tmp_path / "work") as (own, read):
        assert own.tools(read) == {}
        (why,) = own.missing(read).values()
        assert "importing them was stopped: it was not done after 0.5 s" in why
        await gone(tmp_path / "work" / "pid", 1)
        # It is not tried again with each call of the model.
        (tmp_path / "work" / "pid").unlink()
        await own.connect(read)
        assert not (tmp_path / "work" / "pid").exists()


async def test_a_call_that_finds_no_room_is_not_made(
    tmp_path: Path, make_profile: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ownware_gateway.custom.keeper.CALLS_AT_ONCE_MAX", 0)
    monkeypatch.setattr("ownware_gateway.custom.keeper.QUEUE_S", 0.01)
    profile = make_profile("mine")
    write_tools(profile, work='def work() -> str:\n    """Work."""\n    return "done"\n')
    async with own_tools(profile, tmp_path / "work") as (own, read):
        with pytest.raises(ToolFailed, match="was not called: 0 such calls are under way"):
            await own.tools(read)["work"].call(Context(tmp_path), {})


async def test_what_was_not_ready_in_time_has_done_nothing(
    tmp_path: Path, make_profile: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = make_profile("mine")
    write_tools(profile, work='def work() -> str:\n    """Work."""\n    return "done"\n')
    async with own_tools(profile, tmp_path / "work") as (own, read):
        monkeypatch.setattr("ownware_gateway.custom.process.START_S", 0)
        with pytest.raises(ToolFailed, match=r"work was stopped: it was not ready after 0 s\."):
            await own.tools(read)["work"].call(Context(tmp_path), {})


async def test_what_cannot_be_watched_is_given_nothing_to_do(
    tmp_path: Path, make_profile: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = make_profile("mine")
    write_tools(profile, work='def work() -> str:\n    """Work."""\n    return "done"\n')

    def watch(self: object, pid: int, mark: str) -> None:
        raise OSError(24, "Too many open files")

    async with own_tools(profile, tmp_path / "work") as (own, read):
        monkeypatch.setattr("ownware_gateway.processes.Watchdog.watch", watch)
        with pytest.raises(ToolFailed, match="could not be watched: Too many open files"):
            await own.tools(read)["work"].call(Context(tmp_path), {})
