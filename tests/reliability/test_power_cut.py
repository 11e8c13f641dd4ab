"""The power is cut in the middle of anything: what was acknowledged is there, and in order."""

import itertools
import random
from collections.abc import Sequence
from typing import Any, Final

import pytest

apsw = pytest.importorskip("apsw", reason="its VFS layer lets a disk forget what was not synced")

from ownware_gateway.events import TextComplete, TurnStart  # noqa: E402 - only where apsw is
from ownware_gateway.log import (  # noqa: E402
    INBOX,
    Append,
    Cancels,
    Decides,
    Drives,
    NewRun,
    Private,
    Refused,
    Retention,
    Starts,
    Stream,
)
from ownware_gateway.log.appends import Appending  # noqa: E402
from ownware_gateway.log.group import Chore, Work  # noqa: E402
from ownware_gateway.log.upkeep import prune  # noqa: E402
from tests.log import (  # noqa: E402
    cancel,
    delta,
    message,
    question,
    reply,
    session_end,
    session_start,
)
from tests.reliability.disk import Disk, Group, PowerCut, Vfs  # noqa: E402

THREADS: Final = 3

#: The most groups that are committed between two cuts.
GROUPS_MAX: Final = 30

Key = tuple[str, int]


class Life:
    """What a log is used for, from power cut to power cut; `kept` is what it acknowledged."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.disk = Disk(self.chance)
        self.kept: dict[Key, bytes] = {}
        self.gone: set[Key] = set()
        self.commits = 0
        self.runs: dict[str, str] = {}
        self.asked: dict[str, str] = {}
        self._numbers = itertools.count(1)

    def work(self) -> tuple[Work, str]:
        """Return something that a gateway does next on one of its threads."""
        thread = f"t{self.chance.randrange(THREADS)}"
        stream = Stream(thread)
        run_id = self.runs.get(thread)
        if run_id is None:
            run_id = f"run_{next(self._numbers)}"
            row = NewRun(id=run_id, profile_id="p", model="m", timeout_ms=1, title="t")
            private = [Private("profile", self.chance.randbytes(self.chance.randrange(2_000)))]
            turn = TurnStart(turn_index=0, timestamp=1)
            begin = Append(stream, Starts(row), [message(run_id), turn], private)
            return Appending(begin), f"start {thread} {run_id}"
        if thread in self.asked and self.chance.random() < 0.5:
            request = self.asked[thread]
            answer = Append(stream, Decides(request), [reply(request)])
            return Appending(answer), f"answer {thread}"
        mine = Drives(run_id, 1)
        dice = self.chance.random()
        if dice < 0.1:
            whole = TextComplete(text="all of it", turn_index=0)
            end = Append(stream, mine, [whole, session_end(run_id)])
            return Appending(end), f"end {thread}"
        if dice < 0.2 and thread not in self.asked:
            request = f"perm_{next(self._numbers)}"
            asked = [session_start(run_id), question(request)]
            return Appending(Append(stream, mine, asked)), f"ask {thread} {request}"
        if dice < 0.25:
            return Appending(Append(stream, Cancels(run_id), [cancel(run_id)])), "cancel"
        if dice < 0.28:
            return Chore(lambda c, now: prune(c, now, Retention(deltas_ms=-1))), "prune"
        texts = [
            delta("x" * self.chance.randrange(1_500)) for _ in range(self.chance.randrange(1, 6))
        ]
        return Appending(Append(stream, mine, texts)), "text"

    def apply(self, said: str) -> None:
        """Note what an acknowledged piece of work has changed."""
        match said.split():
            case ["start", thread, run_id]:
                self.runs[thread] = run_id
            case ["end", thread]:
                del self.runs[thread]
                self.asked.pop(thread, None)
            case ["ask", thread, request]:
                self.asked[thread] = request
            case ["answer", thread]:
                del self.asked[thread]
            case _:
                pass

    def live(self, group: Group) -> None:
        """Commit group after group until the power goes; raises PowerCut."""
        for _ in range(GROUPS_MAX):
            works: list[tuple[Work, str]] = []
            threads: set[str] = set()
            for _ in range(self.chance.randrange(1, 5)):
                work, said = self.work()
                stream = said.split()[1] if len(said.split()) > 1 else said
                if stream not in threads:
                    threads.add(stream)
                    works.append((work, said))
            try:
                group.commit([work for work, _ in works])
            except apsw.Error:
                assert self.disk.dark
                raise PowerCut from None
            self.acknowledge(works, group)

    def acknowledge(self, works: Sequence[tuple[Work, str]], group: Group) -> None:
        self.commits = group.commits
        for work, said in works:
            if work.failure is not None:
                assert isinstance(work.failure, Refused), work.failure
                continue
            self.apply(said)
            for stream, records in work.appended:
                for record in records:
                    key = stream.thread_id, record.seq
                    assert key not in self.kept, "a number was given twice"
                    self.kept[key] = record.payload

    def check(self, group: Group) -> None:
        """Fail unless the log is whole and holds all that it acknowledged."""
        assert group.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert group.execute("PRAGMA foreign_key_check").fetchall() == []
        there = stored(group)
        lost = [key for key, payload in self.kept.items() if there.get(key) != payload]
        # What retention has taken away is said by a gap.
        gaps = [key for key in lost if b'"text.delta"' in self.kept[key] and covered(there, key)]
        assert sorted(lost) == sorted(gaps), "acknowledged, and lost"
        for key in gaps:
            del self.kept[key]
            self.gone.add(key)
        check_numbers(group, there)
        (commits,) = group.execute(
            "SELECT CAST(value AS INTEGER) FROM meta WHERE name = 'commits'"
        ).fetchone()
        assert commits >= self.commits, "the counter beside the log would be ahead of it"

    def learn(self, group: Group) -> None:
        """Take for acknowledged what the log holds now: it is served from here on."""
        self.kept.update(stored(group))
        self.runs = dict(
            group.execute(
                "SELECT threads.id, runs.id FROM runs JOIN threads ON threads.key = thread_key "
                "WHERE terminal_at IS NULL"
            ).fetchall()
        )
        self.asked = dict(
            group.execute(
                "SELECT threads.id, request_id FROM permissions JOIN runs ON runs.key = run_key "
                "JOIN threads ON threads.key = thread_key "
                "WHERE granted IS NULL AND terminal_at IS NULL"
            ).fetchall()
        )


def stored(group: Group) -> dict[Key, bytes]:
    found = group.execute(
        "SELECT threads.id, seq, payload FROM events JOIN streams ON stream_key = streams.key "
        "JOIN threads ON threads.key = thread_key"
    ).fetchall()
    return {(thread, seq): payload for thread, seq, payload in found}


def covered(there: dict[Key, bytes], key: Key) -> bool:
    """Whether a gap stands in the place of an event."""
    thread, seq = key
    following = [number for name, number in there if name == thread and number >= seq]
    return bool(following) and b'"stream.gap"' in there[thread, min(following)]


def check_numbers(group: Group, there: dict[Key, bytes]) -> None:
    """Fail unless each stream counts from 1 to its head, but for gaps that say so."""
    heads = group.execute(
        "SELECT threads.id, head FROM streams JOIN threads ON threads.key = thread_key"
    ).fetchall()
    for thread, head in heads:
        numbers = sorted(seq for name, seq in there if name == thread)
        assert (numbers[-1] if numbers else 0) == head
        for before, after in itertools.pairwise([0, *numbers]):
            assert after == before + 1 or b'"stream.gap"' in there[thread, after]
    assert {name for name, _ in heads} >= {INBOX} or not heads


def cuts(seed: int, count: int, synchronous: str = "FULL") -> dict[str, Any]:
    """Cut the power so many times, at any operation, and look at what is there after each."""
    life = Life(seed)
    group = Group(Vfs(life.disk), synchronous)
    group.make()
    life.learn(group)
    happened = 0
    while happened < count:
        life.disk.cut_at = life.disk.operations + life.chance.randrange(1, 300)
        try:
            life.live(group)
        except PowerCut:
            happened += 1
        else:
            life.disk.cut_at = life.disk.operations
        group.close()
        life.disk.power_up()
        group = Group(Vfs(life.disk), synchronous)
        life.check(group)
        life.learn(group)
    group.close()
    return {"cuts": happened, "events": len(life.kept) + len(life.gone), "syncs": life.disk.syncs}


@pytest.mark.parametrize("seed", range(2))
def test_nothing_acknowledged_is_lost_when_the_power_is_cut(seed: int) -> None:
    measured = cuts(seed, 100)
    assert measured["events"] > 500, measured


def test_a_disk_that_is_not_synced_at_every_commit_does_lose_events() -> None:
    """The disk of these tests forgets: what the log relies on is what makes the difference."""
    with pytest.raises(AssertionError, match="acknowledged, and lost"):
        cuts(0, 50, synchronous="NORMAL")


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(100, 200))
def test_nothing_acknowledged_is_lost_in_many_power_cuts(seed: int) -> None:
    measured = cuts(seed, 200)
    assert measured["cuts"] == 200
    # There has to be something to lose; how much is up to the seed.
    assert measured["events"] > 800, measured
