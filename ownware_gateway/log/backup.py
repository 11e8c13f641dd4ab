"""Copies of the log: made while a gateway uses it, and put back when none does."""

import contextlib
import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Final

from ownware_gateway.errors import BootError
from ownware_gateway.log.group import Chore, GroupConnection
from ownware_gateway.log.marker import Marker
from ownware_gateway.log.statements import schema_versions
from ownware_gateway.log.upkeep import rejoin

#: How long a copy waits for a gateway that is in the middle of a commit.
BUSY_TIMEOUT_S: Final = 10.0

#: How many logs may be replaced within one second.
KEPT_MAX: Final = 100


def backup(database: Path, target: Path) -> int:
    """Copy the log to a new file as it is at this moment; return the copy's size in bytes.

    A gateway may go on using the log meanwhile. Raises BootError when there is no log, when the
    file exists already, or when it cannot be written.
    """
    if not database.is_file():
        raise BootError(f"There is no log at {database}.")
    part = target.with_name(f"{target.name}.part")
    try:
        if target.exists():
            raise BootError(f"{target} exists already; name a new file.")
        # Made first, so that nobody else may read it from the first byte on.
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
        with closing(_read_only(database)) as connection:
            connection.execute("VACUUM INTO ?", (str(part),))
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(target)
    except (OSError, sqlite3.Error) as error:
        part.unlink(missing_ok=True)
        raise BootError(f"The log cannot be copied to {target}: {_reason(error)}.") from error
    return target.stat().st_size


def restore(database: Path, source: Path) -> Path | None:
    """Put a copy in the place of the log; return where the one that was there is kept now.

    To be called by the holder of the data directory's lock. The log gets a new name, its numbers
    jump, and runs that were unfinished in the copy end as failed: what clients saw since cannot be
    told from what never happened. Raises BootError when the copy is no log of ours, is damaged, or
    is from a newer gateway; then nothing has changed.
    """
    check(source)
    part = database.with_suffix(".restore")
    kept = _free_name(database)
    try:
        shutil.copyfile(source, part)
        part.chmod(0o600)
        commits = _rejoin(part)
        replaced = None
        if database.exists():
            # A log that is too damaged for it is kept as it lies there.
            with contextlib.suppress(sqlite3.Error):
                _empty_wal(database)
            database.rename(kept)
            replaced = kept
        for rest in ("-wal", "-shm"):
            if Path(f"{database}{rest}").exists():
                Path(f"{database}{rest}").rename(f"{kept}{rest}")
        part.rename(database)
    except (OSError, sqlite3.Error) as error:
        part.unlink(missing_ok=True)
        raise BootError(f"The copy {source} cannot be restored: {_reason(error)}.") from error
    marker = Marker(database)
    marker.write(commits)
    marker.close()
    return replaced


def check(database: Path) -> None:
    """Raise BootError with what is wrong with a log's file; return when nothing is."""
    newest = schema_versions()[-1][0]
    try:
        with closing(_read_only(database, leave_nothing=True)) as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            damage = [row[0] for row in connection.execute("PRAGMA integrity_check(5)")]
            lost = connection.execute("PRAGMA foreign_key_check").fetchone()
    except (OSError, sqlite3.Error) as error:
        raise BootError(f"{database} is no log that can be read: {_reason(error)}.") from error
    if not 0 < version <= newest:
        raise BootError(
            f"{database} is of version {version}; this gateway knows versions 1 to {newest}."
        )
    if damage != ["ok"] or lost is not None:
        said = "; ".join(damage) if damage != ["ok"] else "rows refer to rows that are missing"
        raise BootError(f"{database} is damaged: {said}.")


def count_unfinished(database: Path) -> tuple[int, int]:
    """Return how many runs have not ended, and how many of them wait for a person."""
    with closing(_read_only(database, leave_nothing=True)) as connection:
        rows = connection.execute(
            "SELECT status = 'waiting', count(*) FROM runs WHERE terminal_at IS NULL GROUP BY 1"
        ).fetchall()
    counts = {bool(waiting): count for waiting, count in rows}
    return sum(counts.values()), counts.get(True, 0)


def _read_only(database: Path, *, leave_nothing: bool = False) -> sqlite3.Connection:
    """Open a log to read it; `leave_nothing` makes no file beside one that nobody uses."""
    at_rest = leave_nothing and not Path(f"{database}-wal").exists()
    more = "&immutable=1" if at_rest else ""
    return sqlite3.connect(
        f"{database.absolute().as_uri()}?mode=ro{more}", uri=True, timeout=BUSY_TIMEOUT_S
    )


def _free_name(database: Path) -> Path:
    """Return where the log that is there now can be kept."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (f".replaced-{stamp}{more}.db" for more in ("", *(f"-{n}" for n in range(1, KEPT_MAX))))
    for name in names:
        if not (kept := database.with_suffix(name)).exists():
            return kept
    raise BootError(f"There are too many replaced logs beside {database}; delete some.")


def _rejoin(database: Path) -> int:
    """Make a copy another log; return its count of commits."""
    with closing(GroupConnection(database, isolation_level=None)) as connection:
        connection.now_ms = lambda: 0
        connection.execute("PRAGMA journal_mode=DELETE").fetchall()
        work = Chore(rejoin)
        connection.executemany("", [work])
        if work.failure is not None:
            raise work.failure
        return connection.commits


def _empty_wal(database: Path) -> None:
    """Move what the write-ahead log holds into the file, which is all that is kept of it."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _reason(error: OSError | sqlite3.Error) -> str:
    return (error.strerror if isinstance(error, OSError) else str(error)) or str(error)
