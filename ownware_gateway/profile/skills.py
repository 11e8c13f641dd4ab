"""Skills: texts in a profile's folder that its agent reads when a task needs them.

`skills/<name>.md`, or `skills/<name>/SKILL.md` with other files beside it. A text begins with front
matter, YAML between two lines of `---`, of which `name` and `description` count; it is the layout
of https://agentskills.io/specification. Imported when a profile has a folder `skills`.
"""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from ownware_gateway.profile.beneath import Unfit, open_beneath, read_beneath

FOLDER: Final = "skills"
MAIN_FILE: Final = "SKILL.md"

#: Most skills of a profile, and most entries of the folder that are looked at to find them.
SKILLS_MAX: Final = 100
ENTRIES_MAX: Final = 1_000

#: How far into a file its front matter may go.
HEAD_BYTES_MAX: Final = 8_192

#: Most brackets that it may open: the parser's time grows with their square.
BRACKETS_MAX: Final = 64

NAME_CHARS_MAX: Final = 64
DESCRIPTION_CHARS_MAX: Final = 1_024

#: Most characters of the list in the system prompt; skills that have no room are left out.
LIST_CHARS_MAX: Final = 16_384

LIST_BEGINS: Final = (
    "# Skills\n\nThese texts say how to do certain things. Before you do something that one of them"
    " is about, read it with load_skill."
)

#: A name goes into the system prompt and is an argument of a tool.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HEAD: Final = re.compile(
    rb"\A(?:\xef\xbb\xbf)?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE
)

#: A line that means the same in YAML and here: a text that begins with a letter and stands alone.
_PLAIN: Final = re.compile(r"([A-Za-z][A-Za-z_-]*): +([A-Za-z][^:#]*)")
#: What YAML 1.1 does not take for a text (https://yaml.org/type/bool.html, null.html).
_NO_TEXT: Final = frozenset({"yes", "no", "true", "false", "on", "off", "null", "y", "n"})


class Skill(NamedTuple):
    """A skill as its front matter says; `path` is its text's file, from the profile's folder."""

    name: str
    description: str
    path: str


#: A path from the profile's folder, and its first bytes, or what is wrong with it.
Found = tuple[str, bytes | str]


def find(folder: Path) -> list[Found]:
    """Return the files of a profile's skills, by their names, as they are on disk now."""
    try:
        opened = open_beneath(folder, (FOLDER,))
        if opened is None:
            return []
        try:
            names = _names(opened)
        finally:
            os.close(opened)
    except Unfit as wrong:
        return [(FOLDER, str(wrong))]
    found: list[Found] = []
    for name in names:
        parts = (FOLDER, name) if name.endswith(".md") else (FOLDER, name, MAIN_FILE)
        try:
            head = read_beneath(folder, parts, HEAD_BYTES_MAX)
        except Unfit as wrong:
            found.append(("/".join(parts), str(wrong)))
        else:
            if head is not None:
                found.append(("/".join(parts), head))
        if len(found) > SKILLS_MAX:
            return [*found[:SKILLS_MAX], (FOLDER, f"holds more than {SKILLS_MAX} skills")]
    return found


def _names(folder: int) -> list[str]:
    """Return the names in the folder that may be skills."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in itertools.islice(entries, ENTRIES_MAX)]
    return sorted(name for name in names if not name.startswith("."))


def understand(found: Sequence[Found]) -> tuple[list[Skill], list[str]]:
    """Return the skills of files by their names, and what is wrong with others, in sentences."""
    skills: dict[str, Skill] = {}
    wrong: list[str] = []
    room = LIST_CHARS_MAX
    for path, head in found:
        try:
            if isinstance(head, str):
                raise Unfit(head)
            skill = parse(path, head)
        except Unfit as error:
            wrong.append(f"{_shown(path)} {error}.")
            continue
        if (other := skills.get(skill.name)) is not None:
            wrong.append(f"{path} has the name of {other.path}, which is used.")
            continue
        room -= len(_line(skill))
        if room < 0:
            wrong.append(
                f"{path} has no room in the list of skills, of {LIST_CHARS_MAX} characters."
            )
            continue
        skills[skill.name] = skill
    return [skills[name] for name in sorted(skills)], wrong


def _shown(path: str) -> str:
    return path if path.isprintable() else ascii(path)


def render(skills: Sequence[Skill]) -> str:
    """Return what the system prompt says of skills."""
    return "\n".join([LIST_BEGINS, "", *map(_line, skills)]) if skills else ""


def _line(skill: Skill) -> str:
    return f"- {skill.name}: {skill.description}"


def parse(path: str, head: bytes) -> Skill:
    """Return the skill that a file begins as. Raises Unfit."""
    matter = _HEAD.match(head)
    if matter is None:
        raise Unfit(
            "does not begin with front matter: a line of ---, lines for name and description, and"
            f" another line of ---, in the first {HEAD_BYTES_MAX} bytes"
        )
    try:
        fields = _fields(matter[1].decode())
    except UnicodeDecodeError:
        raise Unfit("is not UTF-8 text") from None
    parts = path.split("/")
    given = parts[-2] if parts[-1] == MAIN_FILE else parts[-1].removesuffix(".md")
    name, description = fields.get("name", given), fields.get("description")
    if not isinstance(name, str) or len(name) > NAME_CHARS_MAX or not _NAME.fullmatch(name):
        raise Unfit(
            "has no name that can be used: letters, digits and . _ - only, at most"
            f" {NAME_CHARS_MAX}, the first one a letter or a digit"
        )
    if not isinstance(description, str) or not (text := one_line(description)):
        raise Unfit("has no description: a text that says what it is for, and when")
    if len(text) > DESCRIPTION_CHARS_MAX:
        raise Unfit(
            f"has a description of {len(text)} characters; {DESCRIPTION_CHARS_MAX} are allowed"
        )
    return Skill(name, text, path)


def one_line(text: str) -> str:
    """Return a text as one line of what can be seen.

    White space of every kind becomes a space. Of the invisible, only what joins letters stays:
    the rest may order text anew, or hide some.
    """
    kept = (char for char in " ".join(text.split()) if char.isprintable() or char in "\u200c\u200d")
    return "".join(kept)


def body(text: bytes) -> bytes:
    """Return a skill's text without its front matter."""
    return _HEAD.sub(b"", text, count=1).lstrip(b"\r\n")


def _fields(text: str) -> dict[str, Any]:
    """Return what front matter says. Raises Unfit."""
    plain = list(_plain_fields(text))
    if None not in plain:
        # As most are: YAML, which is slow to load, would say the same.
        return dict(field for field in plain if field is not None)
    if text.count("[") + text.count("{") > BRACKETS_MAX:
        raise Unfit(f"has front matter with more than {BRACKETS_MAX} brackets")
    import yaml  # noqa: PLC0415 - it is slow to load

    try:
        fields = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Unfit(f"has front matter that is not YAML: {reason}") from error
    if not isinstance(fields, dict):
        raise Unfit("has front matter without fields: write name: and description:")
    return fields


def _plain_fields(text: str) -> Iterator[tuple[str, str] | None]:
    """Yield the field of each line; None for one that must be left to YAML."""
    for line in text.replace("\r\n", "\n").rstrip("\n").split("\n"):
        found = _PLAIN.fullmatch(line) if line.isprintable() else None
        value = found[2].rstrip(" ") if found else ""
        yield (found[1], value) if found and value.lower() not in _NO_TEXT else None
