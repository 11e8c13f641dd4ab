"""The workspace: the one folder that file tools may touch, the paths and patterns of paths in it.

A path is walked one component at a time, each opened relative to the folder before it and without
following links, so that a link put in its place in between leads nowhere. Links are refused even
when they stay inside. What cannot be told apart is a hard link: a file that somebody linked into
the workspace is read as any other (a write replaces the link and leaves the other name's file).
"""

import asyncio
import difflib
import errno
import fnmatch
import itertools
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import BufferedReader
from pathlib import Path, PurePath
from typing import Any, Final

from ownware_gateway.tools import OUTPUT_LIMIT_BYTES, Context, Output, ToolFailed, clip

#: Most characters of a path.
PATH_CHARS_MAX: Final = 4096

#: Most names that one component of a glob pattern may stand for with its `{a,b}`.
ALTERNATIVES_MAX: Final = 64

#: Most entries of folders that one call looks at.
ENTRIES_MAX: Final = 200_000

#: Most names among which the nearest one is looked for.
NEAR_NAMES_MAX: Final = 1000

#: A file with a NUL in its first bytes, this many, is binary.
BINARY_PROBE_BYTES: Final = 8192

#: What an output may take beside the notes under it.
TEXT_BYTES_MAX: Final = OUTPUT_LIMIT_BYTES - 1024

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
#: Without O_NONBLOCK, opening a named pipe would wait for its other end for ever.
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY

#: A path inside the workspace, component by component; empty for the workspace itself.
Parts = tuple[str, ...]

Work = Callable[[Context, dict[str, Any], threading.Event], Output]


async def in_thread(work: Work, context: Context, arguments: dict[str, Any]) -> Output:
    """Do a tool's work off the event loop; the event tells it that the call was cancelled.

    Raises ToolFailed for what the operating system refuses, too.
    """
    cancelled = threading.Event()
    try:
        return await asyncio.to_thread(work, context, arguments, cancelled)
    except OSError as error:
        path = shown((arguments.get("path", "."),))
        raise ToolFailed(f"{path} failed: {error.strerror}.") from error
    finally:
        cancelled.set()


def resolve(workspace: Path, path: str) -> Parts:
    """Return where a path leads below the workspace; `..` is resolved by name, as no link is.

    Raises ToolFailed when it leads out, or can be no path.
    """
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ToolFailed("The path holds half a surrogate pair, which no name can.") from error
    if "\0" in path:
        raise ToolFailed("The path holds a NUL character, which no name can.")
    # The shell tells the agent the real path of a workspace that is reached through a link.
    for root in (os.path.normpath(workspace), os.path.realpath(workspace)):
        full = PurePath(os.path.normpath(os.path.join(root, path)))
        if full.is_relative_to(root):
            return full.relative_to(root).parts
    raise ToolFailed(
        f"{shown((path,))} is outside the workspace; paths are relative to the workspace folder."
    )


def resolve_file(workspace: Path, path: str) -> Parts:
    """Do as `resolve` does for a path that has to have a name in it."""
    parts = resolve(workspace, path)
    if not parts:
        raise ToolFailed("The path names the workspace folder itself; name a file in it.")
    return parts


def shown(parts: Sequence[str]) -> str:
    """Return a path on one line that cannot disturb what it is shown in."""
    path = "/".join(parts) or "."
    return path if path.isprintable() else ascii(path)


class Pattern:
    """A glob pattern over the components of a path: `*`, `?`, `[…]`, `{a,b}` and, alone, `**`.

    A set of positions in the pattern is carried down the tree, so that no folder is entered that
    cannot hold a match, and no pattern takes more than linear time.
    """

    def __init__(self, pattern: str) -> None:
        segments = [part for part in pattern.split("/") if part not in ("", ".")]
        if pattern.startswith("/") or ".." in segments or not segments:
            raise ToolFailed(
                f"{pattern!r} is no glob pattern below a folder: give the folder as path, and a"
                " pattern like '**/*.py' without '..' and a leading '/'."
            )
        self.names = frozenset(segments)
        self._segments = [None if part == "**" else _segment(part) for part in segments]
        self.start = self._skip({0})

    def step(self, positions: frozenset[int], name: str) -> frozenset[int]:
        """Return the positions after one more component; none when nothing can match any more."""
        after = set()
        for at in positions - {len(self._segments)}:
            segment = self._segments[at]
            if segment is None:
                after.add(at)
            elif segment.match(name):
                after.add(at + 1)
        return self._skip(after)

    def matches(self, positions: frozenset[int]) -> bool:
        """Whether a path that has led here matches."""
        return len(self._segments) in positions

    def _skip(self, positions: set[int]) -> frozenset[int]:
        """Add the positions behind each `**`, which may stand for nothing."""
        for at, segment in enumerate(self._segments):
            if segment is None and at in positions:
                positions.add(at + 1)
        return frozenset(positions)


def _segment(text: str) -> re.Pattern[str]:
    """Compile one component; fnmatch's own patterns never backtrack without bound."""
    pieces = re.split(r"\{([^{}]*)\}", text)
    choices = [piece.split(",") if index % 2 else [piece] for index, piece in enumerate(pieces)]
    names = itertools.islice(itertools.product(*choices), ALTERNATIVES_MAX + 1)
    alternatives = [fnmatch.translate("".join(name)) for name in names]
    if len(alternatives) > ALTERNATIVES_MAX:
        raise ToolFailed(f"{text!r} stands for more than {ALTERNATIVES_MAX} names.")
    return re.compile("|".join(alternatives))


@contextmanager
def open_folder(workspace: Path, parts: Parts, *, create: bool = False) -> Iterator[int]:
    """Open a folder of the workspace; its descriptor is yielded. Raises ToolFailed."""
    try:
        folder = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ToolFailed("The workspace folder does not exist or cannot be opened.") from error
    try:
        for depth in range(1, len(parts) + 1):
            below = enter(folder, parts[:depth], create=create)
            os.close(folder)
            folder = below
        yield folder
    finally:
        os.close(folder)


def enter(folder: int, parts: Parts, *, create: bool = False) -> int:
    """Open the folder that the last part names in the folder. Raises ToolFailed."""
    try:
        if create:
            with suppress(FileExistsError):
                os.mkdir(parts[-1], dir_fd=folder)
        return os.open(parts[-1], _FOLDER, dir_fd=folder)
    except OSError as error:
        raise failure(error, folder, parts) from error


def open_file(folder: int, parts: Parts) -> BufferedReader:
    """Open the regular file that the last part names in the folder. Raises ToolFailed."""
    try:
        # Opening a device can already have an effect, so it is looked at first, and once more
        # when it is open, because it may have been replaced in between.
        check_regular(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False), parts)
        opened = os.open(parts[-1], _FILE, dir_fd=folder)
        file = open(opened, "rb")  # noqa: SIM115 -- the caller closes it
    except OSError as error:
        raise failure(error, folder, parts) from error
    try:
        check_regular(os.fstat(file.fileno()), parts)
    except BaseException:
        file.close()
        raise
    return file


def check_regular(found: os.stat_result, parts: Parts) -> None:
    """Raise ToolFailed unless this is a regular file."""
    if stat.S_ISLNK(found.st_mode):
        raise _is_link(parts)
    if stat.S_ISDIR(found.st_mode):
        raise ToolFailed(f"{shown(parts)} is a folder; list_files shows what is in it.")
    if not stat.S_ISREG(found.st_mode):
        raise ToolFailed(f"{shown(parts)} is a pipe, a socket or a device, not a regular file.")


def _is_link(parts: Parts) -> ToolFailed:
    return ToolFailed(f"{shown(parts)} is a symbolic link, and links are not followed.")


def failure(error: OSError, folder: int, parts: Parts) -> ToolFailed:
    """Return a sentence that says why the last part cannot be used in the folder."""
    if error.errno == errno.ENOENT:
        return _missing(folder, parts)
    with suppress(OSError):
        mode = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode):
            return _is_link(parts)
        if error.errno == errno.ENOTDIR:
            return ToolFailed(f"{shown(parts)} is a file, not a folder.")
    return ToolFailed(f"{shown(parts)} cannot be used: {error.strerror}.")


def _missing(folder: int, parts: Parts) -> ToolFailed:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in itertools.islice(entries, NEAR_NAMES_MAX)]
    near = difflib.get_close_matches(parts[-1], names, n=1)
    hint = "list_files shows what there is."
    if near:
        hint = f"Did you mean {shown((*parts[:-1], near[0]))}?"
    return ToolFailed(f"There is no {shown(parts)}. {hint}")


def with_notes(text: str, notes: Sequence[str]) -> Output:
    """Return a text as an output, cut to its limit, and under it what else is to be known."""
    output = clip(text, TEXT_BYTES_MAX)
    return under(output, notes)


def under(output: Output, notes: Sequence[str]) -> Output:
    """Return an output with what else is to be known under its text."""
    if not notes:
        return output
    end = ("" if output.text.endswith("\n") else "\n") + "\n".join(notes)
    whole = output.whole and output.whole._replace(end=output.whole.end + end)
    return replace(output, text=output.text + end, whole=whole)


def schema(required: Sequence[str], **properties: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a tool's arguments."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def path_schema(description: str) -> dict[str, Any]:
    """Return the schema of an argument that is a path in the workspace."""
    return {
        "type": "string",
        "maxLength": PATH_CHARS_MAX,
        "description": f"{description}, relative to the workspace.",
    }
