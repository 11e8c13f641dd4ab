"""Looking for files in the workspace: by name with `glob`, by what is in them with `grep`.

Searches never follow a link, pass by what is no regular file, and say what they left out.
"""

import asyncio
import functools
import itertools
import json
import os
import re
import resource
import signal
import stat
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ownware_gateway.keyfiles import holds_keys
from ownware_gateway.tools import Context, Output, Tool, ToolFailed
from ownware_gateway.tools.workspace import (
    BINARY_PROBE_BYTES,
    ENTRIES_MAX,
    Parts,
    Pattern,
    enter,
    in_thread,
    open_file,
    open_folder,
    path_schema,
    resolve,
    schema,
    shown,
    with_notes,
)

#: Most characters of a pattern.
PATTERN_CHARS_MAX: Final = 1000

#: How deep a search goes.
DEPTH_MAX: Final = 64

#: What a search leaves out unless it is asked for by name: it is big and nobody wrote it.
LEFT_OUT: Final = frozenset({".git", ".venv", "__pycache__", "node_modules"})

#: Most files that `glob` shows.
GLOB_FILES_MAX: Final = 500

#: Limits of `grep`: lines shown, characters of one, bytes of a file, time, memory.
GREP_LINES_MAX: Final = 200
GREP_LINE_CHARS_MAX: Final = 300
GREP_FILE_BYTES_MAX: Final = 4 * 1024 * 1024
GREP_TIME_S: Final = 20.0
GREP_MEMORY_BYTES: Final = 2 * 1024 * 1024 * 1024

#: Files that a walk comes to: each as the open folder it is in, and its path.
Files = Generator[tuple[int, Parts], None, None]


@dataclass(slots=True)
class _Walk:
    """A walk over the regular files below a folder, in order, and what it left out."""

    pattern: Pattern
    cancelled: threading.Event = field(default_factory=threading.Event)
    entries_left: int = ENTRIES_MAX
    left_out: set[str] = field(default_factory=set)
    skipped: int = 0
    keys: int = 0

    def files(self, folder: int, below: Parts, positions: frozenset[int]) -> Files:
        """Yield each matching file as the open folder it is in and its path."""
        for name, is_folder in self._entries(folder):
            if self.cancelled.is_set():
                return
            after = self.pattern.step(positions, name)
            path = (*below, name)
            if not is_folder and self.pattern.matches(after):
                yield folder, path
            elif is_folder and after:
                yield from self._folder(folder, path, after)

    def _entries(self, folder: int) -> list[tuple[str, bool]]:
        found = []
        with os.scandir(folder) as entries:
            for entry in itertools.islice(entries, self.entries_left):
                is_folder = entry.is_dir(follow_symlinks=False)
                if is_folder or entry.is_file(follow_symlinks=False):
                    found.append((entry.name, is_folder))
                self.entries_left -= 1
        return sorted(found)

    def _folder(self, folder: int, path: Parts, positions: frozenset[int]) -> Files:
        if path[-1] in LEFT_OUT and path[-1] not in self.pattern.names:
            self.left_out.add(path[-1])
            return
        child = None
        if len(path) <= DEPTH_MAX:
            with suppress(OSError, ToolFailed):
                child = enter(folder, path)
        if child is None:
            self.skipped += 1
            return
        try:
            yield from self.files(child, path, positions)
        finally:
            os.close(child)

    def notes(self) -> list[str]:
        """Return what whoever reads the result must know about what is not in it."""
        notes = []
        if self.entries_left <= 0:
            notes.append(f"[stopped after {ENTRIES_MAX} entries: name a folder as path]")
        if self.left_out:
            notes.append(f"[not looked into: {', '.join(sorted(self.left_out))}]")
        if self.skipped:
            notes.append(f"[left out, as they are unreadable, too big or too deep: {self.skipped}]")
        if self.keys:
            notes.append(f"[left out, as they hold keys: {self.keys}]")
        return notes


def _glob(context: Context, arguments: dict[str, Any], cancelled: threading.Event) -> Output:
    parts = resolve(context.workspace, arguments.get("path", "."))
    walk = _Walk(Pattern(arguments["pattern"]), cancelled)
    with (
        open_folder(context.workspace, parts) as folder,
        closing(walk.files(folder, parts, walk.pattern.start)) as files,
    ):
        found = [path for _, path in itertools.islice(files, GLOB_FILES_MAX + 1)]
    notes = walk.notes()
    if len(found) > GLOB_FILES_MAX:
        found.pop()
        notes.insert(0, f"[the first {GLOB_FILES_MAX} files are shown; narrow the pattern]")
    return with_notes("\n".join(sorted(map(shown, found))) or "No file matches.", notes)


#: What the child process of a search runs. It sees the standard library and this package alone.
_CHILD: Final = (
    "import sys; sys.path.append(sys.argv[1]);"
    "from ownware_gateway.tools.search import search_in_child; search_in_child()"
)

#: The child's exit code when its error output is what the model is told.
_REFUSED: Final = 3


async def grep(
    context: Context, arguments: dict[str, Any], time_limit_s: float = GREP_TIME_S
) -> Output:
    """Search files for a regular expression and return the lines that match.

    The search is a child process: a pattern that backtracks for ever would hold the interpreter's
    lock in a thread, and could not be stopped. Raises ToolFailed for a wrong pattern or path, and
    when the time is up before anything was found.
    """
    workspace = os.fspath(context.workspace)
    request = {"path": ".", "glob": "**", **arguments, "workspace": workspace}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-u", "-X", "utf8", "-c", _CHILD),
        str(Path(__file__).parents[2]),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=dict(context.environment),
    )
    try:
        written = await process.communicate(json.dumps([request, time_limit_s]).encode())
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        # A pipe that is not read to its end would be left open.
        await process.communicate()
    lines, said = (raw.decode("utf-8", "replace").rstrip("\n") for raw in written)
    if process.returncode == _REFUSED:
        raise ToolFailed(said)
    if process.returncode == -signal.SIGALRM:
        said = f"[stopped after {time_limit_s:g} s; simplify the pattern or name a path]"
        if not lines:
            raise ToolFailed(f"Nothing was found: {said}")
    elif process.returncode:
        raise ToolFailed("The search broke off: the pattern takes too much memory.")
    return with_notes(lines or "No line matches.", said.splitlines())


def search_in_child() -> None:
    """Search as standard input says; write the lines found, and as error output the notes.

    The limits end a search whose gateway is gone, too. No handler in Python could do it: it would
    have to wait until the regular expression has come to an end.
    """
    request, time_limit_s = json.load(sys.stdin)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, time_limit_s)
    with suppress(ValueError, OSError):  # Not every system knows or allows it.
        resource.setrlimit(resource.RLIMIT_AS, (GREP_MEMORY_BYTES, GREP_MEMORY_BYTES))
    try:
        notes = _search(request)
    except ToolFailed as error:
        sys.stderr.write(str(error))
        sys.exit(_REFUSED)
    sys.stderr.write("\n".join(notes))


def _search(request: dict[str, str]) -> list[str]:
    """Write the lines that match to standard output as they are found; return the notes."""
    wanted = _compiled(request["pattern"])
    glob = request["glob"]
    walk = _Walk(Pattern(glob if "/" in glob else f"**/{glob}"))
    notes, lines_left = [], GREP_LINES_MAX
    with closing(_searched(Path(request["workspace"]), request["path"], walk)) as files:
        for folder, path in files:
            text = _text_of(folder, path, walk)
            for line in itertools.islice(_matching(wanted, path, text), lines_left):
                sys.stdout.write(f"{line}\n")
                lines_left -= 1
            if not lines_left:
                notes.append(f"[the first {GREP_LINES_MAX} lines are shown; narrow the search]")
                break
    return notes + walk.notes()


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ToolFailed(f"{pattern!r} is no regular expression: {error}.") from error


def _searched(workspace: Path, path: str, walk: _Walk) -> Files:
    """Yield the files to search: the one that the path names, or those below the folder."""
    parts = resolve(workspace, path)
    if parts:
        with open_folder(workspace, parts[:-1]) as folder:
            if not _is_folder(folder, parts[-1]):
                open_file(folder, parts).close()
                yield folder, parts
                return
    with open_folder(workspace, parts) as folder:
        yield from walk.files(folder, parts, walk.pattern.start)


def _is_folder(folder: int, name: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:  # Opening it as a file says what is wrong.
        return False


def _text_of(folder: int, path: Parts, walk: _Walk) -> str:
    """Return what is in a text file; nothing when it holds keys, is binary or cannot be read."""
    if holds_keys(path):
        walk.keys += 1
        return ""
    data = None
    with suppress(OSError, ToolFailed), open_file(folder, path) as file:
        data = file.read(GREP_FILE_BYTES_MAX + 1)
    if data is None or len(data) > GREP_FILE_BYTES_MAX:
        walk.skipped += 1
        return ""
    return "" if b"\0" in data[:BINARY_PROBE_BYTES] else data.decode("utf-8", "replace")


def _matching(wanted: re.Pattern[str], path: Parts, text: str) -> Iterator[str]:
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        if found := wanted.search(line.rstrip("\r")):
            yield f"{shown(path)}:{number}: {_clipped(line.rstrip(), found.start())}"


def _clipped(line: str, at: int) -> str:
    """Return a line, or the part of a long one that the match is in."""
    start = max(0, min(at - GREP_LINE_CHARS_MAX // 3, len(line) - GREP_LINE_CHARS_MAX))
    end = start + GREP_LINE_CHARS_MAX
    return ("…" if start else "") + line[start:end] + ("…" if end < len(line) else "")


def _pattern_schema(description: str) -> dict[str, Any]:
    return {
        "type": "string",
        "minLength": 1,
        "maxLength": PATTERN_CHARS_MAX,
        "description": description,
    }


TOOLS: Final[tuple[Tool, ...]] = (
    Tool(
        name="glob",
        description=(
            "Find files of the workspace by name, in order. Folders such as"
            f" {' and '.join(sorted(LEFT_OUT)[:2])} are left out unless the pattern names them."
        ),
        input_schema=schema(
            ["pattern"],
            pattern=_pattern_schema(
                "The names to find, below path: * and ? within a name, [abc], {a,b}, and ** for"
                " any folders, for example **/*.py or src/**/test_*.{js,ts}"
            ),
            path={**path_schema("The folder to look in"), "default": "."},
        ),
        call=functools.partial(in_thread, _glob),
        reads_only=True,
        safe_to_repeat=True,
        reads="nothing",
    ),
    Tool(
        name="grep",
        description=(
            "Search text files of the workspace line by line for a regular expression and return"
            " the lines that match as `path:line number: line`."
        ),
        input_schema=schema(
            ["pattern"],
            pattern=_pattern_schema("A Python regular expression; (?i) in front ignores case."),
            path={**path_schema("The file or folder to search"), "default": "."},
            glob=_pattern_schema("Only files with such a name or path, for example *.py or src/**"),
        ),
        call=grep,
        reads_only=True,
        safe_to_repeat=True,
        reads="folder",
    ),
)
