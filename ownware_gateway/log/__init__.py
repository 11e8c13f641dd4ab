"""The event log: an append-only stream per (thread, agent), durable before it is visible.

This is the contract; whoever keeps the log implements all of it and nothing more.

- Nobody sees an event before its transaction is committed.
- In each stream `seq` is 1, 2, 3 …: no hole, no reuse, not after a crash either.
- Every append carries a guard, checked in its transaction: a refused append stores nothing.
- Rows beside the events (`Run`, `Thread`, `Permission`) only make them quick to find; they change
  in the transaction of the event that changes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, Protocol

from ownware_gateway.events import (
    AnyEvent,
    DecidedBy,
    Event,
    Fallback,
    RunStatus,
    Usage,
    decode,
)

#: The run's own agent; sub-agents have streams of their own.
ROOT: Final = "root"

#: What people are asked, in all threads, as a stream of its own; no thread can have this name.
INBOX: Final = "~approvals"

#: A day of what has been spent. Days are of UTC, by the clock that stamps the log.
DAY_MS: Final = 86_400_000

#: The frames of one chunk take at most this many bytes, or are a single larger frame.
CHUNK_BYTES_MAX: Final = 65_536


#: What a run without a task waits for: a person's answer, the end of one of its agents, or its turn
#: to ask a person, which another agent of its thread has now.
RestsOn = Literal["person", "agents", "line"]


class Stream(NamedTuple):
    """Names one stream of events."""

    thread_id: str
    agent_id: str = ROOT


class Record(NamedTuple):
    """One stored event; `payload` is its JSON exactly as it goes on the wire, `seq` included.

    A tuple, as the database gives it: a replay makes no object for each event.
    """

    seq: int
    type: str
    payload: bytes

    def event(self) -> AnyEvent:
        """Return the event itself."""
        return decode(self.payload)


class Chunk(NamedTuple):
    """Some frames in a row, joined, ready for a socket.

    A chunk never goes on past the end of a run: `ends_run` says that its last event is one, or a
    gap that may have swallowed one.
    """

    data: bytes
    last_seq: int
    ends_run: bool


class Head(NamedTuple):
    """What is known of a stream: its name in cursors, where it can be read from, its last number.

    `earliest` is the number of the first event that is kept, or that the first gap stands for.
    """

    epoch: str
    earliest: int
    last: int


class Run(NamedTuple):
    """A run as it is now; times are milliseconds since 1970."""

    id: str
    thread_id: str
    agent_id: str
    profile_id: str
    model: str
    status: RunStatus
    code: str | None
    generation: int
    start_seq: int
    end_seq: int | None
    timeout_ms: int
    active_ms: int
    deaths: int
    usage: Usage
    accepted_at: int
    started_at: int | None
    updated_at: int
    terminal_at: int | None
    cancel_requested_at: int | None
    #: Whose agent it is, and the name that this one's profile has for it; None for one by itself.
    parent_run_id: str | None = None
    name: str | None = None
    #: What it waits for while it has no task; None where there is something to do.
    rests_on: RestsOn | None = None

    @property
    def terminal(self) -> bool:
        """Whether the run has ended."""
        return self.terminal_at is not None

    @property
    def stream(self) -> Stream:
        """The stream that the run is an interval of."""
        return Stream(self.thread_id, self.agent_id)


class Thread(NamedTuple):
    """A conversation, and the run under way in it, if any."""

    id: str
    profile_id: str | None
    model: str | None
    title: str
    created_at: int
    updated_at: int
    history_to: int
    forked_from: str | None
    active_run_id: str | None
    hidden: bool = False


class Permission(NamedTuple):
    """What is asked of a person, and the answer: `granted` is None until there is one.

    `question` is None where a call asks whether it may run. Where the call itself asks, it is what
    (`question`, `options`, `multiple`) until it is answered, and empty from then on. Where calls
    wait for a client that makes them, it is `calls`, until there are results, and then no calls.
    """

    request_id: str
    run_id: str
    thread_id: str
    agent_id: str
    tool_name: str
    operation_hash: str
    turn_index: int
    requested_at: int
    expires_at: int
    granted: bool | None
    decided_by: DecidedBy | None
    decided_at: int | None
    question: Mapping[str, Any] | None = None

    @property
    def kind(self) -> Literal["permission", "question", "client"]:
        """Whether a yes is asked for, an answer in words, or the results of a client's tools."""
        if self.question is None:
            return "permission"
        return "client" if "calls" in self.question else "question"


class NewRun(NamedTuple):
    """What the row of a run starts with; the thread is made if it does not exist.

    One that is another run's agent names that run, and its own name there.
    """

    id: str
    profile_id: str
    model: str
    timeout_ms: int
    title: str
    parent_run_id: str | None = None
    name: str | None = None


class IdempotencyKey(NamedTuple):
    """Names a request to start a run, so that sending it again starts no other.

    `caller` is who sent it, `fingerprint` tells its body from another one.
    """

    caller: str
    route: str
    key: str
    fingerprint: str


class KeptStart(NamedTuple):
    """A start that was sent before; `run` is None when its thread has been deleted since."""

    fingerprint: str
    run_id: str
    run: Run | None
    fallback: Fallback | None


class Opening(NamedTuple):
    """How a thread begins: `history` is how many of the append's first events are no run's.

    They are there to be read, and are never driven. A `hidden` thread is left out of lists.
    """

    history: int = 0
    hidden: bool = False


class Starts(NamedTuple):
    """Guard: the stream has no unfinished run, the thread was never deleted, the key is new.

    The append makes the run's row, and the thread's unless it `goes_on`: then it must exist. With
    an `opening` it must not. For an agent's run: it has never begun, and the run whose agent it is
    goes on and is not to stop.
    """

    run: NewRun
    key: IdempotencyKey | None = None
    fallback: Fallback | None = None
    goes_on: bool = False
    opening: Opening | None = None


class Drives(NamedTuple):
    """Guard: the run has not ended and its generation is still this one. The engine's own.

    `asks` a person: no other question is open in the thread, whichever agent asked it.
    """

    run_id: str
    generation: int
    asks: bool = False


class Decides(NamedTuple):
    """Guard: the request is undecided, has not expired, and its run is not being cancelled.

    `late` is the gateway's own: the request has expired.
    """

    request_id: str
    late: bool = False


class Cancels(NamedTuple):
    """Guard: the run has not ended and nobody has asked to cancel it."""

    run_id: str


Guard = Starts | Drives | Decides | Cancels


@dataclass(frozen=True, slots=True)
class Private:
    """What is kept beside an event of its append, the last one by default.

    Nobody sees a `profile`, `options`, a `message`, an `attachment` or a `summary`, and nobody but
    the client who is to make them the exact arguments of its `calls`. What a tool
    gave back, its whole `output`, an `image` or another `resource`, can be fetched by whoever may
    read the event.
    """

    kind: Literal[
        "profile",
        "options",
        "message",
        "attachment",
        "summary",
        "calls",
        "output",
        "image",
        "resource",
    ]
    body: bytes
    index: int = 0
    place: int = -1


class Spent(NamedTuple):
    """What model calls took: US dollars as far as prices are known, answers, active time."""

    cost_usd: float = 0.0
    turns: int = 0
    active_ms: int = 0


@dataclass(frozen=True, slots=True)
class Append:
    """Events to be stored together or not at all; `active_ms` updates the driven run's row.

    What a model call has cost is `spent`: it is added to what the run's profile has spent that day,
    and so is what `active_ms` has grown by, but for `charged_ms`: its agents' time, which counts
    for the day where they append it. Deltas may wait a moment for others to share their
    commit, unless they are to go `at_once`.
    """

    stream: Stream
    guard: Guard
    events: Sequence[Event]
    private: Sequence[Private] = ()
    active_ms: int | None = field(default=None, kw_only=True)
    charged_ms: int = field(default=0, kw_only=True)
    spent: Spent | None = field(default=None, kw_only=True)
    at_once: bool = field(default=False, kw_only=True)


class Tombstone(NamedTuple):
    """What is left of a deleted thread."""

    thread_id: str
    deleted_by: str
    deleted_at: int


class Gone(Exception):
    """The stream has been deleted."""


class Refused(Exception):
    """The guard of an append did not hold; `winner` is the fact that won, if there is one."""

    def __init__(self, winner: "Run | Permission | KeptStart | Tombstone | None") -> None:
        super().__init__("the append was refused")
        self.winner = winner


class Commit(Protocol):
    """An append under way."""

    async def wait(self) -> int:
        """Return the seq of the first event once all of them are durable; raises Refused."""
        ...


class Log(Protocol):
    """What the log can do. Reads see committed events only."""

    @property
    def secret(self) -> bytes:
        """A random key of this log, for hashes that nobody may guess."""
        ...

    def append(self, append: Append) -> Commit:
        """Take events to be committed with the next group, in the order of the calls."""
        ...

    async def begin(self, append: Append) -> Run:
        """Append what a run starts with; return the run as it is then. Raises Refused."""
        ...

    async def take_over(self, run_id: str) -> Run:
        """Raise the run's generation, so that whoever drove it can write nothing more."""
        ...

    async def park(
        self,
        guard: Drives,
        rests_on: RestsOn,
        *,
        agents: int,
        cancelled: bool,
        active_ms: int | None = None,
    ) -> bool:
        """Note that a run has no task and what it waits for; False when there is something to do.

        That is so when not so many of its agents are under way, when it was asked to stop since
        (or was not), when nobody is ahead of it in the line, and when no person is asked. Whoever
        goes on with it starts from `active_ms`. Raises Refused when the run is not the caller's
        any more.
        """
        ...

    async def ready(self, thread_id: str) -> list[str]:
        """Return the unfinished runs of a thread that have something to do, oldest first."""
        ...

    async def agents_below(self, run_id: str) -> int:
        """Return how many agents a run, and its agents in turn, have begun."""
        ...

    async def charge(self) -> None:
        """Count a death for every run that was under way when the last process ended.

        To be called once, before anything is driven.
        """
        ...

    async def rest(self) -> None:
        """Note that no run is under way: the process ends in good order."""
        ...

    async def kept_start(self, key: IdempotencyKey) -> KeptStart | None:
        """Return what was started with this key before."""
        ...

    async def head(self, stream: Stream) -> Head | None:
        """Return what is known of the stream; None when there is no such stream."""
        ...

    async def read(
        self, stream: Stream, after: int, *, limit: int = 500, deltas: bool = True
    ) -> list[Record]:
        """Return the events with a seq above `after`, in order, at most `limit`."""
        ...

    async def private(
        self, stream: Stream, kind: str, *, after: int = 0
    ) -> list[tuple[int, int, bytes]]:
        """Return (seq, index, body) of the private facts of a kind above a seq, in order."""
        ...

    async def private_at(self, stream: Stream, seq: int, kind: str, index: int = 0) -> bytes | None:
        """Return one private fact of an event; None when there is none."""
        ...

    async def last_summary(self, stream: Stream, to: int) -> tuple[int, bytes] | None:
        """Return (seq, body) of the last private fact `summary` up to a seq."""
        ...

    async def spent(self, profile_id: str, day: int) -> Spent:
        """Return what a profile's runs have spent in a day of UTC, counted from 1970."""
        ...

    async def kept_output(self, stream: Stream, tool_call_id: str) -> bytes | None:
        """Return the whole output of a stream's latest call with this id of which one is kept."""
        ...

    async def chunk(self, stream: Stream, after: int) -> Chunk | None:
        """Return the next frames after a cursor, as many as fit; None when there are none yet.

        Raises Gone when the stream has been deleted; so does `wait`.
        """
        ...

    async def gap(self, stream: Stream, after: int) -> int | None:
        """Return the end of the gap that a cursor is inside of; None when it is in none."""
        ...

    async def wait(self, stream: Stream, after: int, timeout_s: float) -> bool:
        """Return True once there may be events above `after`; False when the time is over.

        Level-triggered: it returns at once when they are there already. May return True early.
        """
        ...

    def wake(self) -> None:
        """End every wait now; for a gateway that is leaving."""
        ...

    async def run(self, run_id: str) -> Run | None:
        """Return a run."""
        ...

    async def runs(self, query: "RunQuery") -> list[tuple[int, Run]]:
        """Return (position, run), newest first; a position is where the next page goes on."""
        ...

    async def active_run(self, stream: Stream) -> Run | None:
        """Return the unfinished run of a stream."""
        ...

    async def unfinished(self) -> list[Run]:
        """Return every run that has not ended, oldest first."""
        ...

    async def thread(self, thread_id: str) -> Thread | None:
        """Return a thread."""
        ...

    async def threads(self, query: "ThreadQuery") -> list[tuple[str, Thread]]:
        """Return (position, thread), most recently changed first."""
        ...

    async def make_thread(self, thread_id: str, *, title: str, profile_id: str | None) -> Thread:
        """Make an empty thread."""
        ...

    async def rename(self, thread_id: str, title: str) -> None:
        """Give the thread another title."""
        ...

    async def fork(self, thread_id: str, at_seq: int, new_id: str) -> Thread:
        """Make a thread whose root stream begins as a copy of another's up to a number."""
        ...

    async def adopt(self, thread_id: str, title: str, events: Sequence[Event]) -> Thread:
        """Make a thread of events from elsewhere: history that is never driven."""
        ...

    async def delete(self, thread_id: str, by: str) -> list[str]:
        """Remove every trace of a thread but its name; return the threads forked from it."""
        ...

    async def tombstone(self, thread_id: str) -> Tombstone | None:
        """Return what is left of a deleted thread."""
        ...

    async def prune(self, policy: "Retention") -> int:
        """Remove some of what need not be kept; return how many events, 0 when nothing is left."""
        ...

    async def agents(self, thread_id: str) -> list[tuple[str, int]]:
        """Return (agent id, last seq) of the thread's streams."""
        ...

    async def agent_runs(self, thread_id: str) -> dict[str, Run]:
        """Return the latest run of each of the thread's agents, by the agent's id."""
        ...

    async def permission(self, request_id: str) -> Permission | None:
        """Return a question to a person."""
        ...

    async def pending(
        self, *, run_id: str | None = None, thread_id: str | None = None
    ) -> list[Permission]:
        """Return the undecided questions, of a run, of a thread or of all, oldest first."""
        ...

    async def healthy(self) -> str | None:
        """Return None when the log can write, otherwise a sentence that says what is wrong."""
        ...

    async def close(self) -> None:
        """Commit what is under way and close the log."""
        ...


class RunQuery(NamedTuple):
    """Which runs: of a status (`active` is all that have not ended), of a thread, before a one."""

    status: str | None = None
    thread_id: str | None = None
    before: int | None = None
    limit: int = 50


class ThreadQuery(NamedTuple):
    """Which threads: of a profile, changed before a position, with the hidden ones if so."""

    profile_id: str | None = None
    before: str | None = None
    limit: int = 50
    hidden: bool = False


class Retention(NamedTuple):
    """What need not be kept. A gap says what was removed; runs under way are never touched.

    `deltas_ms` and `events_ms` are ages, since the end of the run, after which its deltas, and all
    its events, may go; `bytes_max` is the size of the log above which the oldest go, deltas first.
    None keeps for ever.
    """

    deltas_ms: int | None = None
    events_ms: int | None = None
    bytes_max: int | None = None
