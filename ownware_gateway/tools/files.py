"""The agent's files: read in pages, listed, written whole and edited in place."""

import functools
import itertools
import os
import stat
import threading
import uuid
from contextlib import suppress
from dataclasses import replace
from io import BufferedReader
from typing import Any, Final

from ownware_gateway.images import IMAGE_BYTES_MAX, SIDE_PX_MAX, look
from ownware_gateway.tools import (
    KEPT_BYTES_MAX,
    OUTPUT_LIMIT_BYTES,
    Context,
    Image,
    Output,
    Tool,
    ToolFailed,
    Whole,
    clip,
    cut,
    keepable,
)
from ownware_gateway.tools.workspace import (
    BINARY_PROBE_BYTES,
    ENTRIES_MAX,
    TEXT_BYTES_MAX,
    Parts,
    check_regular,
    failure,
    in_thread,
    open_file,
    open_folder,
    path_schema,
    resolve,
    resolve_file,
    schema,
    shown,
    under,
    with_notes,
)

#: Lines that `read_file` returns unless it is asked for another number.
READ_LINES: Final = 2000

#: How far into a file `read_file` goes to find a line.
READ_BYTES_MAX: Final = 256 * 1024 * 1024

#: The biggest file that can be edited or written.
EDIT_BYTES_MAX: Final = 10 * 1024 * 1024

#: Most entries that `list_files` shows.
LIST_ENTRIES_MAX: Final = 1000

#: Most places that an error names.
PLACES_MAX: Final = 5

#: Two edits of one file at the same time would lose one of them, and a write is short.
_ONE_WRITER: Final = threading.Lock()


def _read(context: Context, arguments: dict[str, Any], cancelled: threading.Event) -> Output:
    parts = resolve_file(context.workspace, arguments["path"])
    first: int = arguments.get("offset", 1)
    with open_folder(context.workspace, parts[:-1]) as folder, open_file(folder, parts) as file:
        size = os.fstat(file.fileno()).st_size
        if b"\0" in file.read(BINARY_PROBE_BYTES):
            file.seek(0)
            return _image(file, parts, size)
        file.seek(0)
        lines = _skip(file, first - 1, cancelled)
        if first > 1 and not file.peek(1):
            raise ToolFailed(f"{shown(parts)} has {lines} lines; offset {first} is past its end.")
        return _page(file, first, arguments.get("limit", READ_LINES), size - file.tell())


def _image(file: BufferedReader, parts: Parts, size: int) -> Output:
    """Return what is in a binary file, if it is an image."""
    data = file.read(IMAGE_BYTES_MAX)
    picture = look(data)
    if picture is None:
        raise ToolFailed(
            f"{shown(parts)} is a binary file of {size} bytes, neither text nor an image."
        )
    sides = f"{picture.width_px}×{picture.height_px} pixels, {size} bytes"
    if size > len(data) or not picture.can_be_shown:
        raise ToolFailed(
            f"{shown(parts)} is an image of {sides}; up to {SIDE_PX_MAX} pixels a side and "
            f"{IMAGE_BYTES_MAX} bytes can be shown."
        )
    said = f"[image: {shown(parts)}, {picture.mime_type}, {sides}]"
    return Output(said, bytes_raw=size, content=(Image(picture.mime_type, data),))


def _skip(file: BufferedReader, lines_max: int, cancelled: threading.Event) -> int:
    """Go on by this many lines, or to the end; return how many lines that was."""
    lines = looked_at = 0
    ended = True
    while lines < lines_max and (piece := file.readline(OUTPUT_LIMIT_BYTES)):
        looked_at += len(piece)
        if looked_at > READ_BYTES_MAX or cancelled.is_set():
            raise ToolFailed(f"The offset lies more than {READ_BYTES_MAX} bytes into the file.")
        ended = piece.endswith(b"\n")
        lines += ended
    return lines + (not ended)


def _page(file: BufferedReader, first: int, lines_max: int, left_bytes: int) -> Output:
    """Return the next lines, as many as were asked for and there is room for."""
    lines: list[bytes] = []
    room = TEXT_BYTES_MAX
    while len(lines) < lines_max and (line := file.readline(room + 1)):
        if len(line) > room:
            if not lines:
                return _long_line(file, line, first, left_bytes)
            break
        lines.append(line)
        room -= len(line)
    raw = b"".join(lines)
    if not raw:
        return Output("[the file is empty]")
    text, notes = _text(raw)
    if more := len(raw) < left_bytes:
        last = first + len(lines) - 1
        notes.append(f"[lines {first} to {last} are shown; go on with offset {last + 1}]")
    output = with_notes(text, notes)
    cut = output.truncated or (more and len(lines) < lines_max)
    return replace(output, truncated=cut, bytes_raw=left_bytes if cut else len(raw))


def _text(raw: bytes) -> tuple[str, list[str]]:
    try:
        return raw.decode(), []
    except UnicodeDecodeError:
        note = "[this is not UTF-8: what cannot be read is shown as \ufffd]"
        return raw.decode("utf-8", "replace"), [note]


def _long_line(file: BufferedReader, begun: bytes, number: int, left_bytes: int) -> Output:
    """Return the beginning of a line that is longer than what can be shown."""
    line = begun
    if not line.endswith(b"\n"):
        line += file.readline(KEPT_BYTES_MAX - len(begun))
    gap = f"\n[line {number} is cut: it is longer than what can be shown]"
    kept = keepable(line.decode("utf-8", "replace").encode())
    notes = []
    if len(line) < left_bytes:
        notes.append(f"[lines {number} to {number} are shown; go on with offset {number + 1}]")
    return under(cut(Whole(kept, TEXT_BYTES_MAX, gap), left_bytes), notes)


def _list(context: Context, arguments: dict[str, Any], _: threading.Event) -> Output:
    parts = resolve(context.workspace, arguments.get("path", "."))
    with open_folder(context.workspace, parts) as folder, os.scandir(folder) as entries:
        looked_at = list(itertools.islice(entries, ENTRIES_MAX))
        listed = sorted(looked_at, key=lambda entry: entry.name)[:LIST_ENTRIES_MAX]
        lines = [_described(entry) for entry in listed]
    notes = []
    if len(looked_at) > len(listed):
        notes.append(
            f"[{len(listed)} of {len(looked_at)} entries are shown; glob finds files by name]"
        )
    return with_notes("\n".join(lines) or "[the folder is empty]", notes)


def _described(entry: os.DirEntry[str]) -> str:
    name = shown((entry.name,))
    if entry.is_symlink():
        return f"{name} (link, not followed)"
    if entry.is_dir(follow_symlinks=False):
        return f"{name}/"
    if not entry.is_file(follow_symlinks=False):
        return f"{name} (not a regular file)"
    try:
        return f"{name} ({entry.stat(follow_symlinks=False).st_size} bytes)"
    except OSError:  # It was removed since.
        return f"{name} (gone)"


def _write(context: Context, arguments: dict[str, Any], cancelled: threading.Event) -> Output:
    parts = resolve_file(context.workspace, arguments["path"])
    data = _encoded(arguments, "content")
    with _ONE_WRITER, open_folder(context.workspace, parts[:-1], create=True) as folder:
        mode = _mode(folder, parts)
        _put(folder, parts, data, mode, cancelled)
    done = "Wrote" if mode is None else "Replaced"
    return clip(f"{done} {shown(parts)}: {len(data)} bytes.")


def _edit(context: Context, arguments: dict[str, Any], cancelled: threading.Event) -> Output:
    parts = resolve_file(context.workspace, arguments["path"])
    old, new = _encoded(arguments, "old_text"), _encoded(arguments, "new_text")
    if old == new:
        raise ToolFailed("old_text and new_text are the same.")
    with _ONE_WRITER, open_folder(context.workspace, parts[:-1]) as folder:
        with open_file(folder, parts) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(EDIT_BYTES_MAX + 1)
        if len(data) > EDIT_BYTES_MAX:
            raise ToolFailed(f"{shown(parts)} is over {EDIT_BYTES_MAX} bytes; too big to edit.")
        if 0 < data.count(b"\r\n") == data.count(b"\n"):
            old, new = _with_crlf(old), _with_crlf(new)
        places = _places(data, old)
        if not places:
            raise _not_there(parts, data, old)
        if len(places) > 1 and not arguments.get("replace_all", False):
            raise _not_unique(parts, data, places)
        count = data.count(old)
        if len(data) + count * (len(new) - len(old)) > EDIT_BYTES_MAX:
            raise ToolFailed(f"{shown(parts)} would be over {EDIT_BYTES_MAX} bytes.")
        _put(folder, parts, data.replace(old, new), mode, cancelled)
    return clip(f"Replaced {count} {'place' if count == 1 else 'places'} in {shown(parts)}.")


def _encoded(arguments: dict[str, Any], name: str) -> bytes:
    try:
        data: bytes = arguments[name].encode()
    except UnicodeEncodeError as error:
        raise ToolFailed(f"{name} holds half a surrogate pair, which UTF-8 cannot.") from error
    if len(data) > EDIT_BYTES_MAX:
        raise ToolFailed(f"{name} is over {EDIT_BYTES_MAX} bytes.")
    return data


def _with_crlf(text: bytes) -> bytes:
    return text.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def _places(data: bytes, old: bytes) -> list[int]:
    """Return where the text begins, one place more than an error names at most.

    Places that overlap are as many to choose from.
    """
    places: list[int] = []
    at = data.find(old)
    while at >= 0 and len(places) <= PLACES_MAX:
        places.append(at)
        at = data.find(old, at + 1)
    return places


def _not_there(parts: Parts, data: bytes, old: bytes) -> ToolFailed:
    hint = "read_file shows what is in it."
    if b" ".join(old.split()) in b" ".join(data.split()):
        hint = "It is there with other spaces, tabs or line breaks."
    return ToolFailed(f"old_text is not in {shown(parts)}. {hint}")


def _not_unique(parts: Parts, data: bytes, places: list[int]) -> ToolFailed:
    lines = [str(data.count(b"\n", 0, place) + 1) for place in places]
    if len(lines) > PLACES_MAX:
        lines[-1] = "…"
    return ToolFailed(
        f"old_text stands more than once in {shown(parts)} (lines {', '.join(lines)});"
        " add lines around it, or set replace_all."
    )


def _mode(folder: int, parts: Parts) -> int | None:
    """Return the permissions of the file that is to be replaced, None when there is none."""
    try:
        found = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise failure(error, folder, parts) from error
    check_regular(found, parts)
    return stat.S_IMODE(found.st_mode)


def _put(
    folder: int, parts: Parts, data: bytes, mode: int | None, cancelled: threading.Event
) -> None:
    """Put a whole file in place at once: whoever reads it sees the old bytes or the new.

    A link that was put there in the meantime is replaced, not followed.
    """
    beside = f".{uuid.uuid4().hex}.tmp"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(beside, flags, 0o666, dir_fd=folder), "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if cancelled.is_set():
            raise ToolFailed("The call was cancelled; nothing was written.")
        os.replace(beside, parts[-1], src_dir_fd=folder, dst_dir_fd=folder)
    except OSError as error:
        raise failure(error, folder, parts) from error
    finally:
        with suppress(OSError):  # When all went well it has the file's name now.
            os.unlink(beside, dir_fd=folder)


TOOLS: Final[tuple[Tool, ...]] = (
    Tool(
        name="read_file",
        description=(
            "Read a text file of the workspace, exactly as it is. A long file comes in pages: the"
            " note at the end says which offset to go on with. A file that is an image (PNG, JPEG,"
            " GIF, WebP) is shown as one."
        ),
        input_schema=schema(
            ["path"],
            path=path_schema("The file"),
            offset={
                "type": "integer",
                "minimum": 1,
                "default": 1,
                "description": "The number of the first line to read; lines count from 1.",
            },
            limit={
                "type": "integer",
                "minimum": 1,
                "default": READ_LINES,
                "description": "Most lines to read.",
            },
        ),
        call=functools.partial(in_thread, _read),
        reads_only=True,
        safe_to_repeat=True,
    ),
    Tool(
        name="list_files",
        description="List a folder of the workspace: folders end in /, files come with their size.",
        input_schema=schema([], path={**path_schema("The folder"), "default": "."}),
        call=functools.partial(in_thread, _list),
        reads_only=True,
        safe_to_repeat=True,
        reads="nothing",
    ),
    Tool(
        name="write_file",
        description=(
            "Write a whole text file in the workspace, with the folders it needs; a file that is"
            " there already is replaced. For a change to a file, edit_file is better."
        ),
        input_schema=schema(
            ["path", "content"],
            path=path_schema("The file"),
            content={"type": "string", "description": "The whole new text of the file."},
        ),
        call=functools.partial(in_thread, _write),
        reads="nothing",
    ),
    Tool(
        name="edit_file",
        description=(
            "Replace a piece of a text file in the workspace. old_text must stand in the file"
            " exactly so, and only once unless replace_all is set."
        ),
        input_schema=schema(
            ["path", "old_text", "new_text"],
            path=path_schema("The file"),
            old_text={
                "type": "string",
                "minLength": 1,
                "description": "The text to replace, copied exactly, with enough around it.",
            },
            new_text={"type": "string", "description": "What stands there afterwards."},
            replace_all={
                "type": "boolean",
                "default": False,
                "description": "Replace every place, not only a single one.",
            },
        ),
        call=functools.partial(in_thread, _edit),
    ),
)
