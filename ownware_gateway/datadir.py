"""The data directory: the one folder where a gateway keeps everything, and the lock on it.

The folder has mode 0700 and its files 0600, whatever the umask. One gateway uses it at a time: it
holds an exclusive `flock` on `gateway.lock`, which the kernel lets go of however the process ends.
"""

import errno
import fcntl
import os
import re
import secrets
import stat
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ownware_gateway.errors import BootError

LOCK_FILE: Final = "gateway.lock"
DATABASE: Final = "gateway.db"
TOKEN_FILE: Final = "gateway-token"  # noqa: S105 - the name of a file
TOKEN_BYTES: Final = 32
SMALL_FILE_BYTES_MAX: Final = 4_096

#: `running` holds a shared lock for a moment, so one refusal does not mean another gateway.
LOCK_TRIES: Final = 5
LOCK_PAUSE_S: Final = 0.02

#: The b64token of RFC 6750, section 2.1, and not so short that it could be guessed.
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]{32,}=*")


class DataDir:
    """An opened data directory, locked until it is closed."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock: int | None = lock

    @staticmethod
    def open(path: Path) -> "DataDir":
        """Create the folder or tighten it to mode 0700, and lock it.

        Raises BootError when it cannot be used, or when another gateway uses it.
        """
        try:
            _prepare(path)
            lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.fchmod(lock, 0o600)
                _take(lock, path)
                _write(lock, f"{os.getpid()}\n")
            except BaseException:
                os.close(lock)
                raise
        except OSError as error:
            raise BootError(
                f"The data directory {path} cannot be used: {_reason(error)}. "
                "Choose another with --data-dir."
            ) from error
        return DataDir(path, lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another gateway have the folder.

        The lock file stays: if it were removed, a gateway that opened it a moment before would
        lock a file that nobody else can see. For the same reason people must leave it alone.
        """
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def announce(self, url: str) -> None:
        """Write the gateway's address beside its process id, for `running` to find."""
        assert self._lock is not None, "the data directory is closed"
        _write(self._lock, f"{os.getpid()}\n{url}\n")

    def token(self) -> tuple[str, bool]:
        """Return the bearer token, and whether it was made just now.

        Raises BootError for a token file that holds no token: replacing it unasked could lock out
        everybody who has the right one.
        """
        assert self._lock is not None, "the data directory is closed"
        file = self.path / TOKEN_FILE
        try:
            if file.exists() and stat.S_IMODE(file.stat().st_mode) & 0o177:
                file.chmod(0o600)
            known = read_token(self.path)
            if known is not None:
                return known, False
            made = secrets.token_urlsafe(TOKEN_BYTES)
            _create(file, f"{made}\n")
        except OSError as error:
            raise BootError(f"The token file {file} cannot be used: {_reason(error)}.") from error
        return made, True

    @property
    def database(self) -> Path:
        """Where the log is kept."""
        return self.path / DATABASE

    @property
    def workspace(self) -> Path:
        """The folder that tools work in, unless a setting names another; not created here."""
        return self.path / "workspace"


def read_token(path: Path) -> str | None:
    """Return the token kept in a data directory, or None if there is none; needs no lock.

    Raises BootError when the file holds no token or may not be read.
    """
    file = path / TOKEN_FILE
    try:
        with file.open("rb") as opened:
            text = opened.read(SMALL_FILE_BYTES_MAX).decode("utf-8", "replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BootError(f"The token file {file} cannot be read: {_reason(error)}.") from error
    if not _TOKEN.fullmatch(text):
        raise BootError(
            f"The token file {file} holds no token of at least 32 URL-safe characters; "
            "delete it to have a new one made."
        )
    return text


def running(path: Path) -> tuple[int, str] | None:
    """Return the process id and address of the gateway that uses a data directory, if one does.

    The address is empty while the gateway starts. Raises BootError when the lock may not be read.
    """
    try:
        lock = os.open(path / LOCK_FILE, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BootError(f"The data directory {path} cannot be read: {_reason(error)}.") from error
    try:
        # A shared lock, so that two clients that look at once don't take each other for a gateway.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(lock)
    else:
        return None
    finally:
        os.close(lock)


def _prepare(path: Path) -> None:
    """Make the folder, or make it private. A folder that others live in too is refused."""
    if path.exists():
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is not a folder")
        if path.stat().st_mode & stat.S_ISVTX or path.resolve() == path.resolve().parent:
            raise PermissionError(errno.EPERM, "it is shared with other programs")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_IMODE(path.stat().st_mode) != 0o700:
        path.chmod(0o700)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "it is not writable")


def _take(lock: int, path: Path) -> None:
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_PAUSE_S)
        else:
            return
    holder = _holder(lock)
    who = "Another gateway" if holder is None else f"Another gateway (process {holder[0]})"
    raise BootError(f"{who} is using {path}; stop it or choose another --data-dir.")


def _holder(lock: int) -> tuple[int, str] | None:
    """Return what the lock file says; None while its holder has written nothing yet."""
    lines = os.pread(lock, SMALL_FILE_BYTES_MAX, 0).decode("utf-8", "replace").split("\n")
    if not lines[0].isdecimal():
        return None
    return int(lines[0]), lines[1] if len(lines) > 1 else ""


def _write(lock: int, text: str) -> None:
    # One write, then the cut: a reader finds whole lines at any moment.
    data = text.encode()
    os.pwrite(lock, data, 0)
    os.ftruncate(lock, len(data))


def _create(file: Path, text: str) -> None:
    """Write a file that is either whole or not there, mode 0600."""
    new = file.with_name(f"{file.name}.{secrets.token_hex(8)}.new")
    opened = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.fchmod(opened, 0o600)
        os.write(opened, text.encode())
        os.fsync(opened)
        # The lock on the folder is ours, so nobody else's file can be replaced.
        new.rename(file)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    finally:
        os.close(opened)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).rstrip(".")
