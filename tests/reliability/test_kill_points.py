"""kill -9 wherever a run's state changes hands: the run goes on, and nothing happens twice."""

import asyncio
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from tests.reliability.process import (
    PATIENCE_S,
    Follower,
    Http,
    Served,
    check_effects,
    check_truth,
    rows,
    served,
    start,
)

#: One kill at each named point, each at another kind of step.
POINTS: Final = (
    "start.before",
    "commit.before:user.message",
    "start.after",
    "commit.after:session.start",
    "publish.before:text.delta",
    "tool:read_file.before",
    "tool:read_file.after",
    "commit.within:permission.request",
    "decide.before",
    "commit.after:permission.response",
    "decide.after",
    "tool:shell_execute.before",
    "tool:shell_execute.after",
    "publish.after:tool.call.end",
    "commit.before:session.end",
    "commit.within:session.end",
    "commit.after:session.end",
)

KINDS: Final = (
    "user.message",
    "session.start",
    "turn.start",
    "text.delta",
    "text.complete",
    "tool.call.start",
    "tool.call.args_delta",
    "permission.request",
    "permission.response",
    "tool.call.execute",
    "tool.call.end",
    "turn.end",
    "session.end",
)

#: Every point, at every kind of step, and at the first and the second of those.
ALL_POINTS: Final = (
    *(point for point in POINTS if ":" not in point),
    *(
        f"{where}:{kind}"
        for where, kind in itertools.product(
            ("commit.before", "commit.within", "commit.after", "publish.before", "publish.after"),
            KINDS,
        )
    ),
    *(
        f"tool:{tool}.{where}"
        for tool, where in itertools.product(("read_file", "shell_execute"), ("before", "after"))
    ),
)

#: Kills at random moments: how many, over how many runs at once, and for how long at most.
KILLS: Final = 500
RUNS: Final = 20
WALL_S: Final = 1_200.0


def prompt(name: str) -> str:
    """A turn with a free call, one with a call to be asked for, then an answer."""
    return f"read a.txt; then run: echo x >> {name}"


async def kill_at(http: Http, gateway: Served, point: str, passes: int, name: str) -> None:
    """Have a run meet its process's death at a point, and check what becomes of it."""
    deaths = len(gateway.deaths)
    gateway.arm(point, passes)
    follower = None
    try:
        async with asyncio.timeout(PATIENCE_S):
            follower = Follower(http, gateway, await start(http, gateway, prompt(name)))
            await follower.follow()
            await gateway.died(deaths + 1)
            await gateway.up.wait()
    except TimeoutError:
        seen = follower.frames[-1:] if follower is not None else "nothing"
        pytest.fail(f"{point}: reached: {not gateway.armed}, seen: {seen}, {gateway.said()}")
    assert gateway.deaths[deaths:] == [-9], gateway.said()
    check_truth(gateway.data, follower)
    lost = check_effects(gateway.work, follower.events)
    assert follower.events[-1]["status"] == "succeeded"
    if "tool" not in point:
        assert not lost
    if not lost:
        assert (gateway.work / name).read_text() == "x\n"


async def kill_at_each(http: Http, folder: Path, points: Sequence[tuple[str, int]]) -> None:
    async with served(folder) as gateway:
        (gateway.work / "a.txt").write_text("A")
        for number, (point, passes) in enumerate(points):
            await kill_at(http, gateway, point, passes, f"c{number}")
        ((unfinished,),) = rows(gateway.data, "SELECT count(*) FROM runs WHERE terminal_at IS NULL")
        ((started,),) = rows(gateway.data, "SELECT count(*) FROM runs")
        assert (started, unfinished) == (len(points), 0)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("part", range(2))
async def test_a_run_outlives_a_kill_at_each_named_point(
    http: Http, tmp_path: Path, part: int
) -> None:
    await kill_at_each(http, tmp_path, [(point, 1) for point in POINTS[part::2]])


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_a_run_outlives_a_kill_at_each_point_of_each_kind_of_step(
    http: Http, tmp_path: Path
) -> None:
    again = [
        point
        for point in ALL_POINTS
        if point.endswith((":text.delta", ":tool.call.execute", ":tool.call.end", ":turn.end"))
    ]
    points = [*((point, 1) for point in ALL_POINTS), *((point, 2) for point in again)]
    await kill_at_each(http, tmp_path, points)


async def keep_running(
    http: Http, gateway: Served, numbers: Iterator[int], ended: list[Follower]
) -> None:
    """Let one run after the other go through, until there are no more numbers for them."""
    for number in numbers:
        name = f"r{number}"
        profile, action = random.choice((("asks", "approve"), ("free", None), ("asks", "deny")))
        words = (
            f"read a.txt; then run: echo x >> {name}a and also run: echo x >> {name}b; "
            f"then run: echo x >> {name}c"
        )
        if random.random() < 0.2:
            words = "slowly count to 30"
        follower = Follower(http, gateway, await start(http, gateway, words, profile), action)
        await follower.follow()
        ended.append(follower)


async def kill_at_random(
    http: Http, gateway: Served, kills: int, runs: int, wall_s: float
) -> tuple[list[Follower], Counter[str]]:
    """Kill the process again and again while runs are under way; then let them all end."""
    over = False
    numbers = itertools.takewhile(lambda _: not over, itertools.count())
    followers: list[Follower] = []
    loads = [
        asyncio.ensure_future(keep_running(http, gateway, numbers, followers)) for _ in range(runs)
    ]
    began_s = time.monotonic()
    while len(gateway.deaths) < kills and time.monotonic() - began_s < wall_s:
        await gateway.up.wait()
        await asyncio.sleep(random.random() ** 2 * 1.5)
        gateway.kill()
        await gateway.died(len(gateway.deaths) + 1)
    over = True
    async with asyncio.timeout(120):
        await asyncio.gather(*loads)
    counts: Counter[str] = Counter()
    for follower in followers:
        check_truth(gateway.data, follower)
        counts["lost calls"] += check_effects(gateway.work, follower.events)
        end = follower.events[-1]
        assert end["status"] == "succeeded" or end["code"] == "crash_loop", end
        counts[end["code"] or "succeeded"] += 1
        counts["events"] += len(follower.frames)
    return followers, counts


async def soak_kills(
    http: Http, folder: Path, kills: int, runs: int, wall_s: float
) -> dict[str, Any]:
    async with served(folder) as gateway:
        (gateway.work / "a.txt").write_text("A")
        followers, counts = await kill_at_random(http, gateway, kills, runs, wall_s)
        ((unfinished,),) = rows(gateway.data, "SELECT count(*) FROM runs WHERE terminal_at IS NULL")
        loops = rows(gateway.data, "SELECT min(deaths) FROM runs WHERE code = 'crash_loop'")
        ((integrity,),) = rows(gateway.data, "PRAGMA integrity_check")
        # Whoever was cut off between its commit and its answer was not followed, and ended too.
        ((started,),) = rows(gateway.data, "SELECT count(*) FROM runs")
        assert unfinished == 0
        assert integrity == "ok"
        assert loops[0][0] is None or loops[0][0] >= 3
        assert set(gateway.deaths) == {-9}
        return {"kills": len(gateway.deaths), "runs": started, "followed": len(followers), **counts}


@pytest.mark.timeout(120)
async def test_runs_outlive_kills_at_random_moments(http: Http, tmp_path: Path) -> None:
    await soak_kills(http, tmp_path, kills=2, runs=4, wall_s=20.0)


@pytest.mark.soak
@pytest.mark.timeout(WALL_S + 300)
async def test_many_runs_outlive_many_kills_at_random_moments(
    http: Http, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = await soak_kills(http, tmp_path, KILLS, RUNS, WALL_S)
    with capsys.disabled():
        sys.stdout.write(f"{measured}\n")
    assert measured["kills"] >= KILLS, measured
