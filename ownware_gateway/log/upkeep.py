"""What is done to whole threads and to the log itself: fork, adopt, delete, prune, rejoin.

Each is a function on the writer's connection, in one transaction. What is removed is said: where
events can no longer be replayed stands a `stream.gap`, under the number of the last of them.
"""

import json
import secrets
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any, Final, Literal

from ownware_gateway.events import DELTAS, Event, StreamGap
from ownware_gateway.log import ROOT, Record, Refused, Retention, Stream, Tombstone
from ownware_gateway.log.appends import INBOX_STREAM
from ownware_gateway.log.group import GroupConnection, numbered

#: After a restore the numbers go on far behind those that clients may have seen of what is lost.
RESTORE_JUMP: Final = 2**32

#: Runs that one transaction prunes, so that nobody waits long behind it.
PRUNED_AT_ONCE: Final = 20

_DELTAS_GONE: Final = 1
_ALL_GONE: Final = 2


def gap(from_seq: int, to_seq: int, reason: Literal["retention", "restored", "deleted"]) -> Record:
    """Return the event that stands in the place of others; it has no `seq` of its own."""
    event = StreamGap(from_seq=from_seq, to_seq=to_seq, reason=reason)
    return Record(to_seq, event.type, event.encode())


def fork(connection: GroupConnection, now: int, stream: Stream, at_seq: int, new_id: str) -> None:
    """Make a thread that begins as a copy, up to the end of a run. Refused where none ends."""
    row = connection.one("stream", stream.thread_id, stream.agent_id)
    if at_seq and (row is None or connection.one("ends_a_run", row[0], at_seq) is None):
        raise Refused(None)
    connection.run("copy_thread", id=new_id, from_id=stream.thread_id, at=at_seq, now=now)
    if row is None:
        return  # It is as empty as the one that it is made of.
    key = row[0]
    connection.run("add_stream", ROOT, new_id)
    new_key, _ = connection.find_stream(Stream(new_id))
    connection.run("copy_events", to_key=new_key, from_key=key, at=at_seq)
    connection.run("copy_private", to_key=new_key, from_key=key, at=at_seq)
    connection.run("move_head", at_seq, new_key)


def adopt(
    connection: GroupConnection, now: int, thread_id: str, title: str, events: Sequence[Event]
) -> None:
    """Make a thread of events from elsewhere."""
    records = numbered(0, [item.type for item in events], [item.encode() for item in events])
    connection.run("adopt_thread", id=thread_id, title=title, at=len(records), now=now)
    connection.run("add_stream", ROOT, thread_id)
    key, _ = connection.find_stream(Stream(thread_id))
    connection.store(key, records)


def delete(connection: GroupConnection, now: int, thread_id: str, by: str) -> list[str]:
    """Remove a thread; return the threads forked from it. Refused while a run is under way."""
    if (row := connection.one("tombstone", thread_id)) is not None:
        raise Refused(Tombstone(*row))
    streams = connection.all("thread_streams", thread_id)
    for _, agent_id, _ in streams:
        if (active := connection.active_run(Stream(thread_id, agent_id))) is not None:
            raise Refused(active)
    _hide(connection, "inbox_of_thread", thread_id, "deleted")
    connection.run("delete_permissions", thread_id)
    connection.run("delete_runs", thread_id)
    for key, _, _ in streams:
        connection.run("delete_events", key)
        connection.run("delete_private", key)
        connection.run("delete_stream", key)
    connection.run("delete_thread", thread_id)
    heads = json.dumps({agent_id: head for _, agent_id, head in streams})
    connection.run("add_tombstone", thread_id, heads, by, now)
    connection.run("add_meta", "unscrubbed", "1")
    return [fork_id for (fork_id,) in connection.all("forks", thread_id)]


def _hide(
    connection: GroupConnection, which: str, of: str, reason: Literal["retention", "deleted"]
) -> None:
    """Put gaps in the place of what the stream over all threads holds of a thread, or of runs."""
    key, _ = connection.find_stream(INBOX_STREAM)
    for (seq,) in connection.all(which, key, of):
        hidden = gap(seq, seq, reason)
        connection.run("replace_event", hidden.type, hidden.payload, key, seq)


def prune(connection: GroupConnection, now: int, policy: Retention) -> int:
    """Remove some of what the policy lets go; return how many events, 0 when there is no more."""
    for age_ms, level in ((policy.deltas_ms, _DELTAS_GONE), (policy.events_ms, _ALL_GONE)):
        if age_ms is not None and (gone := _prune_runs(connection, now - age_ms, level)):
            return gone
    if policy.bytes_max is not None and _size_bytes(connection) > policy.bytes_max:
        return _prune_runs(connection, now, _DELTAS_GONE) or _prune_runs(connection, now, _ALL_GONE)
    return 0


def _size_bytes(connection: GroupConnection) -> int:
    """Return what the log's pages in use take."""
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    return int((pages - free) * size)


def _prune_runs(connection: GroupConnection, before: int, level: int) -> int:
    runs = _old_runs(connection, before, level)
    gone = 0
    for run_key, stream_key, start, end in runs:
        if level == _ALL_GONE:
            gone += _replace(connection, stream_key, start + 1, end)
        else:
            events = connection.all("events_between", stream_key, start, end)
            for first, last in _said_again(events):
                gone += _replace(connection, stream_key, first, last)
        connection.run("run_pruned", level, run_key)
    if level == _ALL_GONE:
        keys = json.dumps([run[0] for run in runs])
        # Most runs ask nothing, and the stream over all threads is looked through from its start.
        if connection.one("asked_in_runs", keys) is not None:
            _hide(connection, "inbox_of_runs", keys, "retention")
    # Runs that held nothing to remove must not look like the end of the work.
    return gone or len(runs)


def _old_runs(connection: GroupConnection, before: int, level: int) -> list[Any]:
    """Return the next runs to prune, those first of which most is left.

    One state after the other: asked for all at once, those pruned already would be gone over.
    """
    runs: list[Any] = []
    for pruned in range(level):
        room = PRUNED_AT_ONCE - len(runs)
        runs += connection.all("old_runs", before=before, pruned=pruned, limit=room)
    return runs


def _said_again(events: Sequence[tuple[int, str]]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of deltas that stand whole in a later event: those of turns not cut off."""
    starts = [place for place, (_, kind) in enumerate(events) if kind == "turn.start"]
    for begin, end in pairwise([*starts, len(events)]):
        turn = events[begin:end]
        if all(kind != "text.complete" for _, kind in turn):
            continue  # What was shown of it stands nowhere else.
        for is_delta, group in groupby(turn, key=lambda event: event[1] in DELTAS):
            numbers = [seq for seq, _ in group]
            if is_delta:
                yield numbers[0], numbers[-1]


def _replace(connection: GroupConnection, stream_key: int, first: int, last: int) -> int:
    """Put a gap in the place of a range of events; return how many there were."""
    gone = connection.run("delete_between", stream_key, first, last)
    connection.run("delete_private_between", stream_key, first, last)
    stands_in = gap(first, last, "retention")
    connection.all("add_event", stream_key, stands_in.seq, stands_in.type, stands_in.payload)
    return gone


def rejoin(connection: GroupConnection, _now: int) -> None:
    """Make the log another one: it is older than what clients may have seen of it.

    It gets a new name, so that old cursors are recognised; the numbers of every stream jump, so
    that bare old ones cannot be mistaken, and a gap says so. Runs that were unfinished then are
    not driven again: what they did since is not known here.
    """
    connection.execute("UPDATE meta SET value = ? WHERE name = 'log_id'", (secrets.token_hex(32),))
    for key, head in connection.all("all_streams"):
        jump = gap(head + 1, head + RESTORE_JUMP, "restored")
        connection.all("add_event", key, jump.seq, jump.type, jump.payload)
        connection.run("move_head", jump.seq, key)
    connection.run("mark_restored")
