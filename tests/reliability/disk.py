"""A disk in memory that forgets what was not synced when its power is cut, and SQLite on it.

Until a file is synced its writes are only on their way: a cut keeps any part of them, in any order,
torn at any sector. A new file's name is durable with its first sync, a removal with the next one of
any file. SQLite is apsw's own, whose VFS layer can be written in Python; the group transaction and
its SQL are the gateway's, by way of the few methods of a connection that they use.
"""

import contextlib
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import apsw

from ownware_gateway.log.group import GroupConnection
from ownware_gateway.log.statements import schema_versions, statements

SECTOR_BYTES: Final = 512

#: Pages in the write-ahead log at which it is moved into the file; small, so that cuts meet it.
CHECKPOINT_PAGES: Final = 24

_SQL: Final = statements()
_numbers: Final = itertools.count()


class PowerCut(Exception):
    """The power is gone."""


@dataclass
class Content:
    """One file: what programs see, what is durable, and what is on its way in between."""

    seen: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    named: bool = False
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        _write(self.seen, offset, data)
        self.pending.append((offset, data))

    def truncate(self, size: int) -> None:
        del self.seen[size:]
        self.pending.append((size, None))

    def sync(self) -> None:
        self.durable = bytearray(self.seen)
        self.named = True
        self.pending.clear()

    def cut(self, chance: random.Random, keep: float) -> None:
        """Forget what was on its way, or keep some sectors of it."""
        for offset, data in self.pending:
            if data is None:
                if chance.random() < keep:
                    del self.durable[offset:]
                continue
            for start in range(0, len(data), SECTOR_BYTES):
                if chance.random() < keep:
                    _write(self.durable, offset + start, data[start : start + SECTOR_BYTES])
        self.pending.clear()
        self.seen = bytearray(self.durable)


def _write(target: bytearray, offset: int, data: bytes) -> None:
    if len(target) < offset:
        target.extend(bytes(offset - len(target)))
    target[offset : offset + len(data)] = data


class Disk:
    """Files by name. `operations` counts what is asked of it; the cut comes at `cut_at`."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.files: dict[str, Content] = {}
        self.removed: dict[str, Content] = {}
        self.operations = 0
        self.cut_at: int | None = None
        self.syncs = 0
        self.lives = 0

    def touch(self, life: int) -> None:
        """Count an operation of somebody who came in a life of this number; none gets over."""
        if life != self.lives:
            raise apsw.IOError("the power was gone meanwhile")
        self.operations += 1
        if self.cut_at is not None and self.operations >= self.cut_at:
            raise apsw.IOError("the power is gone")

    def sync(self, content: Content) -> None:
        """Make a file durable, and what was done to names before, as journaled file systems do."""
        self.syncs += 1
        content.sync()
        self.removed.clear()

    @property
    def dark(self) -> bool:
        return self.cut_at is not None and self.operations >= self.cut_at

    def power_up(self) -> None:
        """Have the power back: only what is durable is there."""
        keep = self.chance.choice((0.0, 0.0, 0.5, 0.9, 1.0))
        # A removal that was not synced may not have happened.
        for name, content in self.removed.items():
            if name not in self.files and self.chance.random() < 0.5:
                self.files[name] = content
        self.removed.clear()
        for name, content in list(self.files.items()):
            content.cut(self.chance, keep)
            if not content.named and self.chance.random() >= keep:
                del self.files[name]
        self.cut_at = None
        self.lives += 1


class Vfs(apsw.VFS):
    """SQLite's way to such a disk, until its power is cut."""

    def __init__(self, disk: Disk) -> None:
        self.name = f"power-{next(_numbers)}"
        self.disk = disk
        self.life = disk.lives
        super().__init__(self.name, "")

    def xOpen(self, name: Any, flags: list[int]) -> Any:  # noqa: N802 - named by SQLite
        self.disk.touch(self.life)
        text = f"temp-{next(_numbers)}" if name is None else _text(name)
        content = self.disk.files.setdefault(text, Content())
        flags[1] = flags[0]
        return File(self.disk, content)

    def xDelete(self, name: str, sync: bool) -> None:  # noqa: N802
        self.disk.touch(self.life)
        content = self.disk.files.pop(name, None)
        if content is None:
            raise apsw.IOError("no such file")
        if content.named and not sync:
            self.disk.removed[name] = content

    def xAccess(self, name: str, _flags: int) -> bool:  # noqa: N802
        return name in self.disk.files

    def xFullPathname(self, name: str) -> str:  # noqa: N802
        return name


def _text(name: Any) -> str:
    return str(name.filename() if hasattr(name, "filename") else name)


class File:
    """An open file."""

    def __init__(self, disk: Disk, content: Content) -> None:
        self._disk = disk
        self._life = disk.lives
        self._content = content

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        self._disk.touch(self._life)
        return bytes(self._content.seen[offset : offset + amount])

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        self._disk.touch(self._life)
        self._content.write(offset, bytes(data))

    def xTruncate(self, size: int) -> None:  # noqa: N802
        self._disk.touch(self._life)
        self._content.truncate(size)

    def xSync(self, _flags: int) -> None:  # noqa: N802
        self._disk.touch(self._life)
        self._disk.sync(self._content)

    def xFileSize(self) -> int:  # noqa: N802
        return len(self._content.seen)

    def xLock(self, _level: int) -> None:  # noqa: N802
        return None

    def xUnlock(self, _level: int) -> None:  # noqa: N802
        return None

    def xCheckReservedLock(self) -> bool:  # noqa: N802
        return False

    def xClose(self) -> None:  # noqa: N802
        return None

    def xFileControl(self, _operation: int, _pointer: int) -> bool:  # noqa: N802
        return False

    def xSectorSize(self) -> int:  # noqa: N802
        return SECTOR_BYTES

    def xDeviceCharacteristics(self) -> int:  # noqa: N802
        return 0


class Cursor:
    """The part of a cursor that the log uses."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self._cursor = connection.cursor()

    def execute(self, sql: str, parameters: Any = ()) -> "Cursor":
        self._cursor.execute(sql, parameters or None)
        return self

    def fetchone(self) -> Any:
        return self._cursor.fetchone()

    def fetchall(self) -> list[Any]:
        return self._cursor.fetchall()

    @property
    def rowcount(self) -> int:
        return self._connection.changes()


class Group:
    """The gateway's group transaction on a connection of apsw's."""

    def __init__(self, vfs: Vfs, synchronous: str = "FULL") -> None:
        self.commits = 0
        self.owner: str | None = None
        self.now_ms: Callable[[], int] = lambda: 1_000_000
        self._connection = apsw.Connection("gateway.db", vfs=vfs.name)
        # A disk in memory shares no memory between processes; the log's bytes are the same.
        self._connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        for pragma in ("journal_mode=WAL", f"synchronous={synchronous}", "secure_delete=ON"):
            self._connection.execute(f"PRAGMA {pragma}").fetchall()
        self._connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}").fetchall()

    def make(self) -> None:
        """Make the tables, as the log does."""
        for version, script in schema_versions():
            self._connection.execute(
                f"BEGIN IMMEDIATE;\n{script}\nPRAGMA user_version={version};\nCOMMIT;"
            )
        for name, value in (("log_id", "id"), ("secret", "00"), ("commits", "0")):
            self.execute(_SQL["add_meta"], (name, value))
        row = {"id": "~approvals", "title": "", "profile_id": None, "model": None, "now": 0}
        self.execute(_SQL["add_thread"], row)
        self.execute(_SQL["add_stream"], ("root", "~approvals"))

    @property
    def in_transaction(self) -> bool:
        return self._connection.in_transaction

    def rollback(self) -> None:
        self._connection.execute("ROLLBACK")

    def execute(self, sql: str, parameters: Any = ()) -> Cursor:
        return Cursor(self._connection).execute(sql, parameters)

    def store(self, stream_key: int, records: Sequence[Any]) -> None:
        rows = [(stream_key, item.seq, item.type, item.payload) for item in records]
        self._connection.executemany(_SQL["add_event"], rows)
        self.execute(_SQL["move_head"], (records[-1].seq, stream_key))

    def commit(self, group: Sequence[Any]) -> None:
        """Commit a group of work, as `GroupConnection` does."""
        GroupConnection.executemany(self, "", group)  # type: ignore[arg-type]

    def close(self) -> None:
        """Let go of everything, however little the disk takes part."""
        with contextlib.suppress(apsw.Error):
            self._connection.close(True)


# Everything else is the gateway's own code, unchanged.
for _name in (
    "_commit",
    "_perform",
    "one",
    "run",
    "all",
    "find_run",
    "active_run",
    "find_permission",
    "find_stream",
):
    setattr(Group, _name, vars(GroupConnection)[_name])
