"""Files beneath a folder, read without following links, so that nothing leads out of it.

Imported when a profile has notes or skills.
"""

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
#: Without O_NONBLOCK, opening a named pipe would wait for its other end for ever.
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


class Unfit(ValueError):
    """What cannot be used, in words that follow its name: `is a symbolic link …`."""


def read_beneath(root: Path, parts: Sequence[str], limit_bytes: int) -> bytes | None:
    """Return the first bytes of a regular file; None when there is none. Raises Unfit."""
    try:
        folder = open_beneath(root, parts[:-1])
        if folder is None:
            return None
        try:
            # Opening a device can already have an effect, so it is looked at first.
            _check(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode)
            with open(os.open(parts[-1], _FILE, dir_fd=folder), "rb") as file:
                _check(os.fstat(file.fileno()).st_mode)
                return file.read(limit_bytes)
        finally:
            os.close(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unfit(error) from error


def open_beneath(root: Path, parts: Sequence[str]) -> int | None:
    """Return the descriptor of a folder; None when there is none. Raises Unfit."""
    try:
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        for part in parts:
            try:
                below = _enter(folder, part)
            finally:
                os.close(folder)
            folder = below
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unfit(error) from error
    return folder


def _enter(folder: int, name: str) -> int:
    # A link is refused with another error on each system: it is told by looking.
    if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        raise Unfit("is a symbolic link, and links are not followed")
    return os.open(name, _FOLDER, dir_fd=folder)


def _check(mode: int) -> None:
    if stat.S_ISLNK(mode):
        raise Unfit("is a symbolic link, and links are not followed")
    if not stat.S_ISREG(mode):
        raise Unfit("is not a regular file")


def _unfit(error: OSError) -> Unfit:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise error  # It says nothing about the file.
    return Unfit(f"cannot be read: {error.strerror}")
