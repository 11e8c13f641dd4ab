"""A counter beside the database, which notices an older file that was put in its place.

The database counts its commits; the marker holds a count that was reached. A database that has
not got there is not the one that the marker was written for.
"""

import contextlib
import os
from pathlib import Path
from typing import Final

_DIGITS: Final = 20


class Marker:
    """The counter's file. What it holds is never ahead of the database it stands beside."""

    def __init__(self, database: Path) -> None:
        self._path = database.with_suffix(".counter")
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._closed = False

    def read(self) -> int:
        """Return the count, 0 when there is none."""
        text = os.pread(self._file, _DIGITS, 0)
        return int(text) if text.strip().isdigit() else 0

    def write(self, commits: int) -> None:
        """Keep a count that is durable in the database. Not synced: being behind is harmless.

        So is not being written at all, on a full disk say.
        """
        with contextlib.suppress(OSError):
            os.pwrite(self._file, b"%0*d" % (_DIGITS, commits), 0)

    def close(self) -> None:
        """Close the file, if it is not closed already."""
        if not self._closed:
            self._closed = True
            os.close(self._file)
