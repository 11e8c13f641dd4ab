"""Looks at a data directory and says what is well, what is not, and what to do about it."""

import os
import shutil
import sqlite3
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from ownware_gateway import __version__
from ownware_gateway.custom import Trust
from ownware_gateway.datadir import DATABASE, LOCK_FILE, TOKEN_FILE, read_token, running
from ownware_gateway.errors import BootError
from ownware_gateway.log.backup import check, count_unfinished
from ownware_gateway.profile.folder import Profiles
from ownware_gateway.profile.names import Known

#: Less free space than this is worth a word: the log stops when there is none.
FREE_BYTES_MIN: Final = 1_073_741_824

#: A write-ahead log beyond this means that something keeps it from being emptied.
WAL_BYTES_MAX: Final = 268_435_456

#: SQLite before this version may damage a log that two processes write and checkpoint at the same
#: moment (https://sqlite.org/releaselog/3_51_3.html); the gateway's lock keeps it to one.
SQLITE_SOUND: Final = (3, 51, 3)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was looked at; `fail` keeps a gateway from working, `warn` may one day."""

    level: Literal["ok", "warn", "fail"]
    text: str


def examine(
    data_dir: Path,
    profiles: Path,
    trust: Trust | None = None,
    known: Callable[[], Known | None] = lambda: None,
) -> Iterator[Finding]:
    """Look at everything, and yield what is found as it is found. Changes nothing.

    `known` returns what profiles may name, and raises BootError when that cannot be read.
    """
    yield Finding(
        "ok",
        f"Ownware Gateway {__version__}, Python {sys.version.split()[0]}, "
        f"SQLite {sqlite3.sqlite_version}.",
    )
    if not data_dir.is_dir():
        yield Finding("warn", f"There is no data directory {data_dir}; a first start makes it.")
        return
    yield from _modes(data_dir)
    yield from _lock(data_dir)
    yield from _token(data_dir)
    yield from _disk(data_dir)
    yield from _log(data_dir / DATABASE)
    try:
        names = known()
    except BootError as error:
        yield Finding("fail", str(error))
        names = None
    yield from _profiles(Profiles(profiles, names), profiles, trust or Trust())


def _modes(data_dir: Path) -> Iterator[Finding]:
    files = [LOCK_FILE, TOKEN_FILE, DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm"]
    wide = [
        path
        for path, allowed in [(data_dir, 0o700), *((data_dir / name, 0o600) for name in files)]
        if path.exists() and stat.S_IMODE(path.stat().st_mode) & ~allowed
    ]
    for path in wide:
        mode = "700" if path == data_dir else "600"
        yield Finding("fail", f"Others may read {path}. Run: chmod {mode} '{path}'")
    if not wide:
        yield Finding("ok", f"The data directory {data_dir} is private.")
    if not os.access(data_dir, os.W_OK):
        yield Finding("fail", f"The data directory {data_dir} is not writable for this user.")


def _lock(data_dir: Path) -> Iterator[Finding]:
    try:
        holder = running(data_dir)
    except BootError as error:
        yield Finding("fail", str(error))
        return
    if holder is None:
        yield Finding("ok", "No gateway uses the data directory now.")
    else:
        yield Finding("ok", f"A gateway (process {holder[0]}) uses it, at {holder[1] or 'start'}.")


def _token(data_dir: Path) -> Iterator[Finding]:
    try:
        has_token = read_token(data_dir) is not None
    except BootError as error:
        yield Finding("fail", str(error))
        return
    yield Finding("ok", "There is a token." if has_token else "There is no token yet.")


def _disk(data_dir: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(data_dir).free
    level: Literal["ok", "warn"] = "ok" if free >= FREE_BYTES_MIN else "warn"
    advice = "" if level == "ok" else " Make room: without any, no run goes on."
    yield Finding(level, f"{free // 1_048_576} MiB of disk are free.{advice}")


def _log(database: Path) -> Iterator[Finding]:
    if not database.exists():
        yield Finding("ok", "There is no log yet.")
        return
    try:
        check(database)
    except BootError as error:
        yield Finding("fail", f"{error} To put a backup in its place, run: ownware restore FILE")
        return
    yield Finding("ok", f"The log is whole: {database.stat().st_size // 1024} KiB.")
    unfinished, waiting = count_unfinished(database)
    yield Finding(
        "ok", f"Runs that have not ended: {unfinished}. Of them wait for a person: {waiting}."
    )
    wal = database.with_name(f"{database.name}-wal")
    if wal.exists() and wal.stat().st_size > WAL_BYTES_MAX:
        yield Finding(
            "warn",
            f"The write-ahead log has {wal.stat().st_size // 1_048_576} MiB; another program may "
            "hold the log open. A restart of the gateway empties it.",
        )
    if sqlite3.sqlite_version_info < SQLITE_SOUND:
        yield Finding(
            "ok",
            f"SQLite {sqlite3.sqlite_version} can damage a database that two processes write at "
            "once; do not write to gateway.db with another program.",
        )


def _profiles(profiles: Profiles, folder: Path, trust: Trust) -> Iterator[Finding]:
    names = [profile.name for profile in profiles.all()]
    if names:
        yield Finding("ok", f"Profiles in {folder}: {', '.join(names)}.")
    else:
        yield Finding("warn", f"There are no profiles in {folder}. Run: ownware init")
    for item in (*profiles.broken(), *profiles.warnings()):
        yield Finding("warn", item.message)
    for profile in profiles.all():
        if (why := trust.refusal(profile)) is not None:
            yield Finding("warn", why)
