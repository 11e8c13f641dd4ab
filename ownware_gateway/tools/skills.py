"""`load_skill`: the text of a skill, and the files beside it. Imported with the first call."""

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ownware_gateway.keyfiles import holds_keys
from ownware_gateway.profile.beneath import Unfit, open_beneath, read_beneath
from ownware_gateway.profile.skills import MAIN_FILE, body
from ownware_gateway.tools import KEPT_BYTES_MAX, OUTPUT_LIMIT_BYTES, Output, ToolFailed, clip
from ownware_gateway.tools.workspace import under

#: Most files of a skill that are named, the folders that lie in each other, and the entries that
#: are looked at to find them.
FILES_MAX: Final = 100
DEPTH_MAX: Final = 5
ENTRIES_MAX: Final = 1_000

#: Most bytes of their names; the text of the skill has what is left.
NAMES_BYTES_MAX: Final = 8_192

#: What is said of a cut takes no more than this.
NOTES_BYTES: Final = 256

_CUT: Final = "[there are more]"


async def load_skill(folder: Path, listed: Mapping[str, str], arguments: dict[str, Any]) -> Output:
    """Return a skill's text or one of its files. Raises ToolFailed."""
    path = listed.get(arguments["name"])
    if path is None:
        names = ", ".join(listed) or "none"
        raise ToolFailed(f"There is no skill {arguments['name']!r}. There are: {names}.")
    file = arguments.get("file")
    if file is None:
        return await asyncio.to_thread(_main, folder, path.split("/"))
    return await asyncio.to_thread(_other, folder, path.split("/"), file)


def _main(folder: Path, parts: Sequence[str]) -> Output:
    text = body(_read(folder, parts, "the skill"))
    said = text.decode("utf-8", "replace")
    files = _files(folder, parts[:-1]) if parts[-1] == MAIN_FILE else []
    if not files:
        return _whole(said)
    names = clip("\n".join(files), NAMES_BYTES_MAX).text
    note = f"\n[files of this skill, to be read with the argument file:]\n{names}"
    return under(clip(said.rstrip(), OUTPUT_LIMIT_BYTES - len(note.encode()) - NOTES_BYTES), [note])


def _other(folder: Path, parts: Sequence[str], file: str) -> Output:
    if parts[-1] != MAIN_FILE:
        raise ToolFailed("The skill is a single text: it has no other files.")
    inner = file.split("/")
    # By their names alone, as no link is followed either.
    if any(part in ("", ".", "..") or "\0" in part for part in inner):
        raise ToolFailed(
            f"{file!r} is no file of the skill: name one as it is listed, without '..' and a"
            " leading '/'."
        )
    if holds_keys(inner):
        raise ToolFailed(f"{file!r} is called like a file that holds keys; no tool reads those.")
    return _whole(_read(folder, [*parts[:-1], *inner], repr(file)).decode("utf-8", "replace"))


def _read(folder: Path, parts: Sequence[str], called: str) -> bytes:
    try:
        os.fsencode("/".join(parts))
        data = read_beneath(folder, parts, KEPT_BYTES_MAX)
    except UnicodeEncodeError as error:
        raise ToolFailed("The name holds half a surrogate pair, which no name can.") from error
    except (Unfit, OSError) as wrong:
        raise ToolFailed(f"{called} {wrong}.") from wrong
    if data is None:
        raise ToolFailed(f"{called} is not there.")
    if b"\0" in data:
        raise ToolFailed(f"{called} is a binary file, not text.")
    return data


def _whole(text: str) -> Output:
    return clip(text or "[the file is empty]", OUTPUT_LIMIT_BYTES - NOTES_BYTES)


def _files(folder: Path, parts: Sequence[str]) -> list[str]:
    """Return the other files of a skill, as `load_skill` takes them."""
    found: list[str] = []
    for name in _walk(folder, parts):
        if len(found) == FILES_MAX:
            return [*sorted(found), _CUT]
        if name != MAIN_FILE:
            found.append(name)
    return sorted(found)


def _walk(folder: Path, parts: Sequence[str]) -> Iterator[str]:
    """Yield regular files beneath a folder that no other rule hides; links are none."""
    left = ENTRIES_MAX
    folders: list[tuple[str, ...]] = [()]
    while folders and left > 0:
        below = folders.pop()
        try:
            opened = open_beneath(folder, [*parts, *below])
        except (Unfit, OSError):
            continue
        if opened is None:
            continue
        try:
            with os.scandir(opened) as entries:
                for entry in entries:
                    left -= 1
                    path = (*below, entry.name)
                    if left < 0 or not _may_be_named(path):
                        continue
                    if entry.is_file(follow_symlinks=False):
                        yield "/".join(path)
                    elif entry.is_dir(follow_symlinks=False) and len(path) < DEPTH_MAX:
                        folders.append(path)
        finally:
            os.close(opened)


def _may_be_named(path: Sequence[str]) -> bool:
    name = path[-1]
    return name.isprintable() and not name.startswith(".") and not holds_keys(path)
