"""Whatever is done to the log, in whatever order: it holds what a simple model in memory holds."""

import asyncio
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ownware_gateway import sse
from ownware_gateway.events import (
    ANSWERING,
    ASKING,
    DELTAS,
    Answers,
    DecidedBy,
    Event,
    PermissionResponse,
    QuestionResponse,
    TextComplete,
    TurnStart,
)
from ownware_gateway.log import (
    INBOX,
    Append,
    Cancels,
    Decides,
    Drives,
    Gone,
    Guard,
    IdempotencyKey,
    KeptStart,
    NewRun,
    Permission,
    Refused,
    Retention,
    Run,
    Starts,
    Stream,
    Tombstone,
)
from ownware_gateway.log.sqlite import SqliteLog
from tests.log import (
    Clock,
    cancel,
    delta,
    message,
    question,
    read_chunks,
    session_end,
    session_start,
    words,
)

T = TypeVar("T")

#: How long a question of this test may wait, and how far the clock moves at a time.
EXPIRY_MS: Final = 50

#: How the names of questions begin that want an answer in words.
IN_WORDS: Final = "ask"

THREADS: Final = ("t0", "t1", "t2", "t3")

thread_names = st.sampled_from(THREADS)

#: Chooses one of however many there are.
picks = st.integers(0, 11)


def choose(items: Sequence[T], pick: int) -> T:
    return items[pick % len(items)]


def response(request_id: str, *, granted: bool, by: DecidedBy) -> Answers:
    """The answer to what was asked, of its kind."""
    if request_id.startswith(IN_WORDS):
        text = "words" if granted else None
        return QuestionResponse(
            request_id=request_id, answer=text, decided_by=by, reason="", turn_index=0
        )
    return PermissionResponse(
        request_id=request_id, granted=granted, decided_by=by, reason="", turn_index=0
    )


@dataclass
class ModelRun:
    id: str
    thread_id: str
    start: int
    generation: int = 1
    deaths: int = 0
    under_way: bool = True
    cancelled: bool = False
    asked: tuple[str, int] | None = None
    end: int | None = None
    status: str = "running"
    complete: bool = False
    pruned: int = 0


@dataclass
class ModelThread:
    """`events` holds payloads as they are stored, gaps included, by number."""

    events: dict[int, bytes] = field(default_factory=dict)
    types: dict[int, str] = field(default_factory=dict)
    head: int = 0
    run: ModelRun | None = None
    forks: list[str] = field(default_factory=list)

    def store(self, events: Sequence[Event]) -> None:
        for event in events:
            self.head += 1
            self.events[self.head] = b'%b,"seq":%d}' % (event.encode()[:-1], self.head)
            self.types[self.head] = event.type

    def hide(self, first: int, last: int) -> None:
        for seq in range(first, last + 1):
            self.events.pop(seq, None)
            self.types.pop(seq, None)
        gap = {"type": "stream.gap", "fromSeq": first, "toSeq": last, "reason": "retention"}
        self.events[last] = json.dumps(gap, separators=(",", ":")).encode()
        self.types[last] = "stream.gap"


class Truth(RuleBasedStateMachine):
    """Drives a log and a model of it; they must agree after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.lives = 0
        self.count = 0
        self.threads: dict[str, ModelThread] = {}
        self.runs: dict[str, ModelRun] = {}
        self.deleted: set[str] = set()
        self.keys: dict[str, str] = {}
        self.inbox: list[str | None] = []
        self.log = self.do(SqliteLog.open(self.file, self.clock))

    @property
    def file(self) -> Path:
        return self.folder / f"{self.lives}" / "gateway.db" if self.lives else self.folder / "g.db"

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(work)

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}_{self.count}"

    def teardown(self) -> None:
        try:
            self.compare_all()
        finally:
            self.do(self.log.close())
            self.loop.close()
            shutil.rmtree(self.folder)

    # -- appends

    def append(self, thread_id: str, guard: Guard, events: Sequence[Event]) -> Any:
        """Append; return None when it was stored, or the winner when it was refused."""

        async def appended() -> Any:
            try:
                await self.log.append(Append(Stream(thread_id), guard, events)).wait()
            except Refused as refused:
                return refused.winner or "nobody"
            return None

        return self.do(appended())

    def drive(self, run: ModelRun, *events: Event) -> None:
        assert self.append(run.thread_id, Drives(run.id, run.generation), events) is None
        self.threads[run.thread_id].store(events)
        told = ASKING | ANSWERING
        self.inbox += [run.thread_id for event in events if event.type in told]

    def runs_like(self, *, asked: bool = False, askable: bool = False) -> list[ModelRun]:
        return [
            run
            for run in self.unfinished()
            if (not asked or run.asked is not None) and (not askable or not run.cancelled)
        ]

    def active(self, thread_id: str) -> ModelRun | None:
        thread = self.threads.get(thread_id)
        return thread.run if thread is not None else None

    @initialize()
    def begin(self) -> None:
        """Have something under way from the first step on."""
        self.start("t0", "k1")
        self.start("t1", None)
        self.ask(1)

    @rule(thread_id=thread_names, key=st.sampled_from([None, None, "k1", "k2"]))
    def start(self, thread_id: str, key: str | None) -> None:
        run_id = self.name("run")
        row = NewRun(id=run_id, profile_id="p", model="m", timeout_ms=1, title="t")
        named = IdempotencyKey("me", "route", key, "print") if key is not None else None
        winner = self.append(thread_id, Starts(row, named), [message(run_id)])
        active = self.active(thread_id)
        if key in self.keys:
            assert isinstance(winner, KeptStart)
            assert winner.run_id == self.keys[key]
            assert (winner.run is not None) is (winner.run_id in self.runs)
        elif thread_id in self.deleted:
            assert isinstance(winner, Tombstone)
        elif active is not None:
            assert isinstance(winner, Run)
            assert winner.id == active.id
        else:
            assert winner is None
            thread = self.threads.setdefault(thread_id, ModelThread())
            run = ModelRun(run_id, thread_id, thread.head)
            thread.run = self.runs[run_id] = run
            thread.store([message(run_id)])
            if key is not None:
                self.keys[key] = run_id
            self.drive(run, session_start(run_id), TurnStart(turn_index=0, timestamp=1))
        self.compare(thread_id)

    @precondition(lambda self: self.runs_like())
    @rule(pick=picks, count=st.integers(1, 5), back=st.integers(0, 1))
    def write(self, pick: int, count: int, back: int) -> None:
        run = choose(self.runs_like(), pick)
        events = [delta("x" * count)] * count
        if back:
            guard = Drives(run.id, run.generation - back)
            assert isinstance(self.append(run.thread_id, guard, events), Run)
        else:
            self.drive(run, *events)
        self.compare(run.thread_id)

    @precondition(lambda self: self.runs_like())
    @rule(pick=picks, whole=st.sampled_from((True, True, False)))
    def end(self, pick: int, whole: bool) -> None:
        run = choose(self.runs_like(), pick)
        thread_id = run.thread_id
        events: list[Event] = []
        if run.asked is not None:
            events.append(response(run.asked[0], granted=False, by="cancel"))
        if whole:
            events.append(TextComplete(text="all", turn_index=0))
        status = "cancelled" if run.cancelled else "succeeded"
        self.drive(run, *events, session_end(run.id, status))  # type: ignore[arg-type]
        run.end, run.status = self.threads[thread_id].head, status
        run.asked, run.complete = None, whole
        self.threads[thread_id].run = None
        stale = self.append(thread_id, Drives(run.id, run.generation), [delta()])
        assert isinstance(stale, Run)
        assert stale.terminal
        self.compare(thread_id)

    # -- people

    @precondition(lambda self: self.runs_like(askable=True))
    @rule(pick=picks)
    def ask(self, pick: int) -> None:
        run = choose(self.runs_like(askable=True), pick)
        thread_id = run.thread_id
        in_words = pick % 2 == 1
        request_id = self.name(IN_WORDS if in_words else "perm")
        asked = (words if in_words else question)(
            request_id, expires_at=self.clock.now_ms + EXPIRY_MS
        )
        if run.asked is not None:
            with pytest.raises(sqlite3.IntegrityError):
                self.append(thread_id, Drives(run.id, run.generation), [asked])
        else:
            self.drive(run, asked)
            run.asked = request_id, asked.expires_at
            run.status, run.under_way = "waiting", False
        self.compare(thread_id)

    @precondition(lambda self: self.runs_like(askable=True))
    @rule(pick=picks, granted=st.booleans(), late=st.booleans())
    def ask_and_answer(self, pick: int, granted: bool, late: bool) -> None:
        run = choose(self.runs_like(askable=True), pick)
        if run.asked is None:
            self.ask(pick)
        asked = self.runs_like(asked=True)
        self.answer(asked.index(run), granted, late)

    @precondition(lambda self: self.runs_like(asked=True))
    @rule(pick=picks, granted=st.booleans(), late=st.booleans())
    def answer(self, pick: int, granted: bool, late: bool) -> None:
        run = choose(self.runs_like(asked=True), pick)
        thread_id = run.thread_id
        assert run.asked is not None
        request_id, expires_at = run.asked
        by: DecidedBy = "timeout" if late else "user"
        answer = response(request_id, granted=granted and not late, by=by)
        winner = self.append(thread_id, Decides(request_id, late), [answer])
        expired = expires_at <= self.clock.now_ms
        if run.cancelled or expired is not late:
            assert isinstance(winner, Permission)
            assert winner.granted is None
            return
        assert winner is None
        self.threads[thread_id].store([answer])
        self.inbox.append(thread_id)
        run.asked, run.status, run.under_way = None, "running", True
        for second in (False, True):
            lost = self.append(thread_id, Decides(request_id, second), [answer])
            assert isinstance(lost, Permission)
            assert lost.granted is (granted and not late)
        self.compare(thread_id)

    @precondition(lambda self: self.runs_like())
    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        run = choose(self.runs_like(), pick)
        thread_id = run.thread_id
        winner = self.append(thread_id, Cancels(run.id), [cancel(run.id)])
        assert isinstance(winner, Run) is run.cancelled
        if winner is None:
            self.threads[thread_id].store([cancel(run.id)])
            run.cancelled, run.status = True, "cancel_requested"
        self.compare(thread_id)

    @rule(ms=st.integers(1, EXPIRY_MS))
    def wait(self, ms: int) -> None:
        self.clock.now_ms += ms

    # -- deaths

    @rule()
    def crash(self) -> None:
        """The process dies: the next one finds the files as they are at this moment."""
        before = self.file
        self.lives += 1
        self.file.parent.mkdir()
        for suffix in ("", "-wal"):
            found = Path(f"{before}{suffix}")
            if found.exists():
                shutil.copy(found, f"{self.file}{suffix}")
        self.do(self.log.close())
        self.recover()

    @rule()
    def stop(self) -> None:
        """The process ends in good order."""
        self.do(self.log.rest())
        self.do(self.log.close())
        for run in self.unfinished():
            run.under_way = False
        self.recover()

    def recover(self) -> None:
        self.log = self.do(SqliteLog.open(self.file, self.clock))
        self.do(self.log.charge())
        for run in self.unfinished():
            run.deaths += run.under_way
            run.under_way = False
            if run.status != "waiting":
                taken = self.do(self.log.take_over(run.id))
                run.generation += 1
                run.under_way = True
                assert (taken.generation, taken.deaths) == (run.generation, run.deaths)
        self.compare_all()

    def unfinished(self) -> list[ModelRun]:
        return [run for run in self.runs.values() if run.end is None]

    # -- threads

    @precondition(lambda self: 0 < len(self.threads) < 8)
    @rule(pick=picks, data=st.data())
    def fork(self, pick: int, data: st.DataObject) -> None:
        thread_id = choose(sorted(self.threads), pick)
        thread = self.threads[thread_id]
        ends = [seq for seq, kind in thread.types.items() if kind == "session.end"]
        at_seq = data.draw(st.sampled_from([0, *ends, *thread.events]))
        new_id = self.name("fork")

        async def forked() -> bool:
            try:
                await self.log.fork(thread_id, at_seq, new_id)
            except Refused:
                return False
            return True

        assert self.do(forked()) is (at_seq == 0 or at_seq in ends)
        if at_seq == 0 or at_seq in ends:
            thread.forks.append(new_id)
            copy = ModelThread(head=at_seq)
            copy.events = {seq: body for seq, body in thread.events.items() if seq <= at_seq}
            copy.types = {seq: kind for seq, kind in thread.types.items() if seq <= at_seq}
            self.threads[new_id] = copy
            self.compare(new_id)

    @precondition(lambda self: self.old_runs(1))
    @rule()
    def prune_deltas(self) -> None:
        self.do(self.pruned(Retention(deltas_ms=0)))
        for run in self.old_runs(1):
            if run.complete:
                self.hide_deltas(run)
            run.pruned = 1
        self.compare_all()

    @precondition(lambda self: self.old_runs(2))
    @rule()
    def prune_all(self) -> None:
        self.do(self.pruned(Retention(events_ms=0)))
        for run in self.old_runs(2):
            assert run.end is not None
            self.threads[run.thread_id].hide(run.start + 1, run.end)
            run.pruned = 2
        self.compare_all(inbox=False)
        # Which of the questions over all threads went is known by their gaps only.
        records = self.do(self.log.read(Stream(INBOX), 0, limit=10_000))
        for place, record in enumerate(records):
            if record.type == "stream.gap":
                self.inbox[place] = None

    async def pruned(self, policy: Retention) -> None:
        # Whatever has ended is older than nothing by now.
        self.clock.now_ms += 1
        while await self.log.prune(policy):
            pass

    def old_runs(self, level: int) -> list[ModelRun]:
        return [run for run in self.runs.values() if run.end is not None and run.pruned < level]

    def hide_deltas(self, run: ModelRun) -> None:
        thread = self.threads[run.thread_id]
        assert run.end is not None
        first = None
        for seq in range(run.start + 1, run.end + 1):
            if thread.types.get(seq) in DELTAS:
                first = first or seq
            elif first is not None:
                thread.hide(first, seq - 1)
                first = None

    @precondition(lambda self: len(self.threads) > 1)
    @rule(pick=picks)
    def delete(self, pick: int) -> None:
        thread_id = choose(sorted(self.threads), pick)
        thread = self.threads[thread_id]

        async def deleted() -> Any:
            try:
                return await self.log.delete(thread_id, "me")
            except Refused as refused:
                return refused.winner

        got = self.do(deleted())
        if thread.run is not None:
            assert isinstance(got, Run)
            assert got.id == thread.run.id
            return
        assert got == [name for name in thread.forks if name in self.threads]
        del self.threads[thread_id]
        self.deleted.add(thread_id)
        self.runs = {name: run for name, run in self.runs.items() if run.thread_id != thread_id}
        self.inbox = [None if name == thread_id else name for name in self.inbox]
        with pytest.raises(Gone):
            self.do(self.log.chunk(Stream(thread_id), 0))
        assert self.do(self.log.tombstone(thread_id)) is not None
        self.compare_all()

    # -- agreement

    def compare(self, thread_id: str) -> None:
        thread = self.threads.get(thread_id)
        if thread is None:
            return
        read = self.do(self.log.read(Stream(thread_id), 0, limit=10_000))
        assert {record.seq: json.loads(record.payload) for record in read} == {
            seq: json.loads(body) for seq, body in thread.events.items()
        }
        assert [record.payload for record in read if record.type != "stream.gap"] == [
            body for seq, body in sorted(thread.events.items()) if thread.types[seq] != "stream.gap"
        ]
        frames = list(sse.Parser().feed(self.do(read_chunks(self.log, Stream(thread_id)))))
        assert [frame.data.encode() for frame in frames] == [record.payload for record in read]
        head = self.do(self.log.head(Stream(thread_id)))
        assert head is not None
        assert head.last == thread.head
        for run in self.runs.values():
            if run.thread_id == thread_id:
                self.compare_run(run)

    def compare_run(self, run: ModelRun) -> None:
        row = self.do(self.log.run(run.id))
        assert row is not None
        assert (row.status, row.generation, row.deaths, row.start_seq, row.end_seq) == (
            run.status,
            run.generation,
            run.deaths,
            run.start,
            run.end,
        )

    def compare_all(self, *, inbox: bool = True) -> None:
        for thread_id in self.threads:
            self.compare(thread_id)
        unfinished = self.unfinished()
        assert [run.id for run in self.do(self.log.unfinished())] == [run.id for run in unfinished]
        asked = {run.asked[0] for run in unfinished if run.asked is not None}
        assert {item.request_id for item in self.do(self.log.pending())} == asked
        if inbox:
            records = self.do(self.log.read(Stream(INBOX), 0, limit=10_000))
            assert [record.seq for record in records] == list(range(1, len(self.inbox) + 1))
            assert [json.loads(record.payload).get("threadId") for record in records] == self.inbox


TestTheLogAgreesWithAModelOfIt = pytest.mark.timeout(120)(Truth.TestCase)
TestTheLogAgreesWithAModelOfIt.settings = settings(
    max_examples=15,
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.soak
@pytest.mark.timeout(1_200)
def test_the_log_agrees_with_a_model_of_it_for_long() -> None:
    longer = settings(
        TestTheLogAgreesWithAModelOfIt.settings, max_examples=300, stateful_step_count=80
    )
    run_state_machine_as_test(Truth, settings=longer)
