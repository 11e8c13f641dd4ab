"""`remember` and `forget`: lines that an agent adds to the AGENTS.md of its own folder.

What an agent remembers may have been whispered to it by a page or a file. So a note is one line in
a place of its own, without what could pose as structure or hide, and no secret. Imported with the
first call.
"""

import asyncio
import errno
import fcntl
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from ownware_gateway.masking import Masker
from ownware_gateway.profile import NOTES_FILE
from ownware_gateway.profile.beneath import Unfit, read_beneath
from ownware_gateway.profile.knowledge import NOTES_BYTES_MAX, REMEMBERED
from ownware_gateway.profile.skills import one_line
from ownware_gateway.tools import Output, ToolFailed, clip

#: How long a writer waits for another one, and how often it looks.
TURN_S: Final = 10.0
LOOK_S: Final = 0.01

_NOTE: Final = re.compile(r"- \d{4}-\d{2}-\d{2}: (.*)")


async def remember(folder: Path, text: str, masker: Masker, now_ms: int) -> Output:
    """Add a note. Raises ToolFailed; then nothing was written."""
    note = one_line(text)
    if not note:
        raise ToolFailed("There is nothing in the text that can be seen. Nothing was remembered.")
    if masker.text(note) != note or masker.text(text) != text:
        raise ToolFailed(
            "The text holds what looks like a password or a key, and those are not remembered."
        )
    line = f"- {datetime.fromtimestamp(now_ms / 1000, UTC):%Y-%m-%d}: {note}"

    def added(before: str) -> str:
        if any(_same(note, known) for known in _notes(before).values()):
            return before
        return _added(before, line)

    if not await _rewrite(folder, added):
        return clip("This was remembered before; nothing was added.")
    return clip(f"Remembered, from the next run on: {note}")


async def forget(folder: Path, text: str) -> Output:
    """Remove a note. Raises ToolFailed; then nothing was written."""
    wanted = one_line(text)

    def removed(before: str) -> str:
        notes = _notes(before)
        found = {at for at, note in notes.items() if _same(wanted, note)} or {
            at for at, note in notes.items() if wanted and wanted.casefold() in note.casefold()
        }
        if not found:
            raise ToolFailed("Nothing like this was remembered; give its words as they are noted.")
        if len({notes[at].casefold() for at in found}) > 1:
            raise ToolFailed(f"{len(found)} notes hold these words; give one of them whole.")
        lines = before.split("\n")
        return "\n".join(line for at, line in enumerate(lines) if at not in found)

    await _rewrite(folder, removed)
    return clip("Forgotten, from the next run on.")


def _same(one: str, other: str) -> bool:
    return one.casefold() == other.casefold()


def _section(lines: list[str]) -> range | None:
    """Return where the lines under the heading are; None when there is no such heading."""
    bare = [line.rstrip() for line in lines]
    if REMEMBERED not in bare:
        return None
    start = bare.index(REMEMBERED) + 1
    end = next((at for at in range(start, len(bare)) if bare[at].startswith("#")), len(bare))
    return range(start, end)


def _notes(text: str) -> dict[int, str]:
    """Return what is remembered, by the number of its line."""
    lines = text.split("\n")
    found = {at: _NOTE.fullmatch(lines[at].rstrip()) for at in _section(lines) or ()}
    return {at: note[1] for at, note in found.items() if note is not None}


def _added(text: str, line: str) -> str:
    """Return the text with a line more at the end of what is remembered."""
    lines = text.split("\n")
    section = _section(lines)
    if section is None:
        return f"{text.rstrip()}\n\n{REMEMBERED}\n\n{line}\n".lstrip("\n")
    last = max((at for at in section if lines[at].strip()), default=section.start - 1)
    first = [""] if last < section.start else []
    after = lines[last + 1 :]
    if not any(after):
        after = [""]
    elif last < section.start:
        after = ["", *after]
    return "\n".join([*lines[: last + 1], *first, line, *after])


# -- the file


async def _rewrite(folder: Path, change: Callable[[str], str]) -> bool:
    """Write what a change makes of the file; return whether that is anything new."""
    cancelled = threading.Event()
    try:
        return await asyncio.to_thread(_rewritten, folder, change, cancelled)
    except Unfit as wrong:
        raise ToolFailed(f"{NOTES_FILE} {wrong}. Nothing was written.") from wrong
    except OSError as error:
        raise ToolFailed(
            f"{NOTES_FILE} in the folder of the profile cannot be written: {error.strerror}. Tell"
            " the user, who may allow it or write it there."
        ) from error
    finally:
        cancelled.set()


def _rewritten(folder: Path, change: Callable[[str], str], cancelled: threading.Event) -> bool:
    with _turn(folder, cancelled) as opened:
        data = read_beneath(folder, (NOTES_FILE,), NOTES_BYTES_MAX + 1) or b""
        if b"\0" in data:
            raise Unfit("is not text")
        try:
            before = data.decode()
        except UnicodeDecodeError as error:
            raise Unfit("is not UTF-8 text") from error
        if len(data) > NOTES_BYTES_MAX:
            raise _full()
        after = change(before)
        if after == before:
            return False
        if len(after.encode()) > NOTES_BYTES_MAX:
            raise _full()
        _put(opened, after.encode(), cancelled)
        return True


def _full() -> ToolFailed:
    return ToolFailed(
        f"{NOTES_FILE} is full, with its {NOTES_BYTES_MAX} bytes. Nothing was written: ask the user"
        " to make room in it."
    )


@contextmanager
def _turn(folder: Path, cancelled: threading.Event) -> Iterator[int]:
    """Hold the folder as its only writer, of this gateway and of others; yield it opened."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        give_up_s = time.monotonic() + TURN_S
        while True:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            if time.monotonic() > give_up_s:
                raise ToolFailed(f"Others are writing {NOTES_FILE}; try again.")
            if cancelled.wait(LOOK_S):
                raise ToolFailed("The call was cancelled; nothing was written.")
        yield opened
    finally:
        os.close(opened)


def _put(folder: int, data: bytes, cancelled: threading.Event) -> None:
    """Put the file in place at once: whoever reads it sees the old text or the new."""
    beside = f".{uuid.uuid4().hex}.tmp"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(beside, flags, 0o666, dir_fd=folder), "wb") as file:
            with suppress(FileNotFoundError):
                mode = os.stat(NOTES_FILE, dir_fd=folder, follow_symlinks=False).st_mode
                os.fchmod(file.fileno(), mode & 0o777)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if cancelled.is_set():
            raise ToolFailed("The call was cancelled; nothing was written.")
        os.replace(beside, NOTES_FILE, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    finally:
        with suppress(OSError):  # When all went well it has the file's name now.
            os.unlink(beside, dir_fd=folder)
