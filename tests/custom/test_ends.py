"""What a call has started, however fast it multiplies, and what it holds open: nothing is left."""

import os
from collections.abc import Callable
from pathlib import Path

from tests.custom import AUTO, Http, alive, called, ends, pids, write_tools
from tests.gateway import Gateways
from tests.provider import Call, Provider

MakeProfile = Callable[..., Path]

TOOLS = '''
    import os, time

    PIDS = {pids!r}

    def _chain() -> None:
        """Be another process every moment, and note it if that can go on."""
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            if os.fork():
                os._exit(0)
        with open(PIDS, "a") as file:
            print(os.getpid(), file=file)
        os._exit(0)

    def chain() -> str:
        """Leave something that is gone before anybody can find it."""
        if not os.fork():
            _chain()
        time.sleep(0.1)
        return "done"

    def wait() -> str:
        """Be there for longer than any chain."""
        time.sleep(0.5)
        return "done"

    def tree() -> str:
        """Leave many processes."""
        read_end, write_end = os.pipe()
        if not os.fork():
            for _ in range(6):
                os.fork()
            with open(PIDS, "a") as file:
                print(os.getpid(), file=file)
            os.write(write_end, b"x")
            time.sleep(600)
        for _ in range(64):
            os.read(read_end, 1)
        return "done"

    def held() -> list[str]:
        """Name what is open beside the three that every program has."""
        paths = [f"/proc/self/fd/{{name}}" for name in os.listdir("/proc/self/fd") if int(name) > 2]
        return [os.readlink(path) for path in paths if os.path.lexists(path)]

    def fails() -> str:
        """End badly."""
        os._exit(3)
'''


async def test_what_a_call_has_started_ends_with_it_however_it_multiplies(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    tmp_path: Path,
) -> None:
    profile = make_profile("assistant", tools={"preset": "none"}, security=AUTO)
    write_tools(profile, tools=TOOLS.format(pids=str(tmp_path / "pids")))
    up = await start_gateway(trust_profiles=True)
    said = ends(await called(http, up.url, provider, Call("tree")))
    assert said == {"tree": ("done", False)}
    assert len(pids(tmp_path / "pids")) == 64
    said = ends(await called(http, up.url, provider, Call("chain"), Call("wait")))
    assert said == {"chain": ("done", False), "wait": ("done", False)}
    assert len(pids(tmp_path / "pids")) == 64
    assert not any(map(alive, pids(tmp_path / "pids")))


async def test_many_calls_leave_no_descriptor_open_and_are_given_none_of_the_gateways(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    profile = make_profile("assistant", tools={"preset": "none"}, security=AUTO)
    write_tools(profile, tools=TOOLS.format(pids=""))
    up = await start_gateway(trust_profiles=True)
    ((held, _),) = ends(await called(http, up.url, provider, Call("held"))).values()
    assert held.startswith('["pipe:')
    assert held.count(",") == 0
    before = len(os.listdir("/dev/fd"))
    for _ in range(2):
        await called(http, up.url, provider, *[Call("fails"), Call("held")] * 8)
    assert len(os.listdir("/dev/fd")) <= before
