"""What no profile, mode or answer of a person lets happen, as far as a call shows it.

Four floors: secrets of the gateway go to no tool, files that hold keys and the gateway's own files
are not read, nothing is deleted outside the workspace, and no agent changes what makes a profile.
For a shell they are no sandbox: what a command does is seen in its words alone, so a program that
is written for the purpose gets by.
"""

import functools
import itertools
import os.path
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Final

from ownware_gateway.keyfiles import holds_keys
from ownware_gateway.masking import Masker
from ownware_gateway.permissions import Verdict, stricter
from ownware_gateway.policies import Operation, normal
from ownware_gateway.shell_syntax import FIND_RUNS, Command, Script, Word

SECRETS: Final = "floor.secrets"
KEYS: Final = "floor.keys"
DELETION: Final = "floor.deletion"
PROFILE: Final = "floor.profile"

#: What of a profile's folder says who an agent is and what it may do, in lower case.
PROFILE_FILES: Final = frozenset(
    {"agent.json", "agent.yaml", "agent.yml", "agents.md", "skills", "soul.md", "tools"}
)

#: What the description of a profile's service is called: it says where the service answers.
DESCRIPTIONS: Final = (".json", ".yaml", ".yml")

#: Programs that remove the files that they are given, and those that do so with all but the last.
DELETES: Final = frozenset({"rm", "rmdir", "shred", "srm", "truncate", "unlink", "wipe"})
MOVES: Final = frozenset({"mv"})

#: Those of them that go on to where a link leads.
FOLLOWS_LINKS: Final = frozenset({"find", "shred", "truncate"})

#: Programs that use the names of files and show nothing of what is in them.
NAMES_ONLY: Final = frozenset(
    {"[", "basename", "chmod", "chown", "dirname", "echo", "ls", "mkdir", "printf", "pwd"}
    | {"readlink", "realpath", "rm", "rmdir", "stat", "test", "touch", "unlink"}
)

#: Programs that show files and change none, as long as nothing is redirected.
SHOWS_ONLY: Final = frozenset(
    {"[", "basename", "cat", "cd", "cmp", "diff", "dirname", "du", "echo", "egrep", "fgrep", "file"}
    | {"grep", "head", "jq", "less", "ls", "md5sum", "more", "printf", "pwd", "readlink"}
    | {"realpath", "rg", "sha256sum", "stat", "tail", "test", "wc"}
)

#: Programs whose last word is what they write, unless an option says where to.
COPIES: Final = frozenset({"cp", "install"})

#: Builtins after which a relative path means another folder.
CHANGES_FOLDER: Final = frozenset({"cd", "chdir", "popd", "pushd"})

#: Most folders that are tried as the one a command works in, and most characters of paths that are
#: followed to where they lead; where there are more, a person looks at it.
FOLDERS_MAX: Final = 8
FOLLOWED_CHARS_MAX: Final = 100_000

#: No file has a longer path, see PATH_MAX in limits.h of Linux.
PATH_CHARS_MAX: Final = 4_096

_PATH_ARGUMENT: Final = re.compile(r"path|file|dir|folder|ur[il]|source|dest", re.IGNORECASE)
_WILD: Final = re.compile(r"[*?\[{]")
_HOME: Final = re.compile(r"(?:~|\$HOME|\$\{HOME\})(?=/|$)")
_HERE: Final = re.compile(r"(?:\$PWD|\$\{PWD\})(?=/|$)")
_PATH_IN_TEXT: Final = re.compile(r"[^\s'\"`\\;&|<>(){}=@:,]+")
_DELETES_IN_TEXT: Final = re.compile(
    rf"(?<![\w.-])(?:{'|'.join(sorted(DELETES))})(?![\w.-])|-delete(?![\w-])"
)


@dataclass(frozen=True, slots=True)
class Ground:
    """Where calls happen: absolute paths.

    `roots` are the paths of the workspace, which may lie in the data directory. `follow` returns
    where a path leads when the links in it are followed; ValueError for what can be no path.
    `profiles` is the folder of profiles, links followed; empty when it is not known.
    """

    roots: tuple[str, ...]
    data_dir: str
    home: str
    follow: Callable[[str], str] = os.path.realpath
    profiles: str = ""

    def real(self, path: str) -> str:
        """Return where a path leads; what can be no path leads nowhere else."""
        try:
            return self.follow(path)
        except ValueError:
            return path

    def inside(self, path: str) -> bool:
        """Whether an absolute path is in the workspace, or is it."""
        return any(_is_in(path, root) for root in self.roots)

    def private(self, path: str) -> bool:
        """Whether an absolute path is the gateway's own, or holds keys."""
        if _is_in(path, self.data_dir) and not self.inside(path):
            return True
        # What the folders above the workspace are called says nothing about what is in it.
        root = next((root for root in self.roots if _is_in(path, root)), "")
        return holds_keys(path[len(root) :].split("/"))

    def makes_profile(self, path: str) -> bool:
        """Whether an absolute path is of what makes a profile, or a folder that holds it all."""
        path, profiles = path.lower(), self.profiles.lower()
        if not profiles or not _is_in(path, profiles):
            return False
        below = path[len(profiles) :].strip("/").split("/")
        return len(below) < 2 or below[1] in PROFILE_FILES or below[-1].endswith(DESCRIPTIONS)


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def floor(operation: Operation, ground: Ground, masker: Masker) -> Verdict | None:
    """Return what a floor says to a call: a refusal, a question, or nothing."""
    command = operation.command
    script = operation.script(command) if command is not None else None
    words = [command.text for command in script.commands] if script is not None else []
    if any(masker.knows(text) for text in (*_texts(dict(operation.arguments)), *words)):
        return Verdict(
            "deny", "The arguments hold a secret of the gateway, which no tool is given.", SECRETS
        )
    if script is None:
        return _paths_of_a_call(operation, ground) or _profile_of_a_call(operation, ground)
    places = list(_places(script, ground))
    if any(len(place.folders) > FOLDERS_MAX for place in places):
        return _too_many()
    found = (
        _reading(script, places, ground),
        _deletion(script, places, ground),
        _profile(script, places, ground),
    )
    said = [verdict for verdict in found if verdict is not None]
    return functools.reduce(stricter, said) if said else None


def _no_keys() -> Verdict:
    return Verdict(
        "deny",
        "It names a file that holds keys, or one of the gateway's own; no tool reads those.",
        KEYS,
    )


def _too_many() -> Verdict:
    return Verdict("ask", "It names too many paths to tell whether one of them holds keys.", KEYS)


def _texts(value: Any) -> Iterator[str]:
    """Yield all text in a JSON value, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield str(name)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


# -- tools that are given paths


def _paths_of_a_call(operation: Operation, ground: Ground) -> Verdict | None:
    if operation.tool.reads == "nothing":
        return None
    for text in _named_like_paths(operation.arguments):
        if any(_is_private(text.removeprefix("file://"), root, ground) for root in ground.roots):
            return _no_keys()
    return None


def _named_like_paths(value: Any, *, named: bool = False) -> Iterator[str]:
    """Yield the texts of arguments that are called like paths, and of fields within arguments."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _named_like_paths(item, named=named or bool(_PATH_ARGUMENT.search(name)))
    elif isinstance(value, list):
        for item in value:
            yield from _named_like_paths(item, named=named)
    elif isinstance(value, str) and named:
        yield value


def _is_private(text: str, folder: str, ground: Ground, *, follow: bool = True) -> bool:
    """Whether a path, as it is written, leads to keys; parts of it may be glob patterns."""
    if holds_keys(text.split("/")):
        return True
    written = _expanded(text, folder, ground)
    if written is None:
        return False
    path = normal(_fixed(written))
    return ground.private(path) or (follow and ground.private(ground.real(path)))


def _expanded(text: str, folder: str, ground: Ground) -> str | None:
    """Return the path that a word means in a folder; None where that is not known."""
    if found := _HOME.match(text):
        text = ground.home + text[found.end() :]
    elif found := _HERE.match(text):
        text = folder + text[found.end() :]
    if "$" in text or text.startswith("~") or len(text) > PATH_CHARS_MAX:
        return None
    return os.path.join(folder, text)


def _fixed(path: str) -> str:
    """Return a path up to its first part that is a pattern."""
    kept: list[str] = []
    for part in PurePath(path).parts:
        if _WILD.search(part):
            break
        kept.append(part)
    return str(PurePath(*kept)) if kept else "/"


# -- what makes a profile


def _no_profile() -> Verdict:
    return Verdict(
        "deny",
        "It changes what makes a profile: no agent says what agents may do. Tell the user.",
        PROFILE,
    )


def _perhaps_profile() -> Verdict:
    return Verdict(
        "ask", "It names what makes a profile, and that it changes none is not certain.", PROFILE
    )


def _profile_of_a_call(operation: Operation, ground: Ground) -> Verdict | None:
    if operation.tool.reads_only or not ground.profiles:
        return None
    for text in _named_like_paths(operation.arguments):
        path = text.removeprefix("file://")
        if any(_leads_to_profile(path, root, ground) for root in ground.roots):
            # What a tool of another program does with a path is not known.
            return _perhaps_profile() if operation.tool.origin else _no_profile()
    return None


def _leads_to_profile(text: str, folder: str, ground: Ground, *, follow: bool = True) -> bool:
    written = _expanded(text, folder, ground)
    if written is None:
        return False
    path = normal(_fixed(written))
    return ground.makes_profile(path) or (follow and ground.makes_profile(ground.real(path)))


# -- a shell


@dataclass(frozen=True, slots=True)
class _Place:
    """A command and the folders that it may work in, the likely one first.

    `known` says that there is no other.
    """

    command: Command
    folders: tuple[str, ...]
    known: bool


def _places(script: Script, ground: Ground) -> Iterator[_Place]:
    reached: dict[tuple[int, ...], tuple[tuple[str, ...], bool]] = {}
    for command in script.commands:
        shells = [command.within[:depth] for depth in range(len(command.within), 0, -1)]
        found = next((reached[shell] for shell in [*shells, ()] if shell in reached), None)
        folders, known = found or (ground.roots, script.whole)
        if command.program in CHANGES_FOLDER:
            folders, known = _changed(command, ground, folders, known=known)
            reached[command.within] = folders, known
        yield _Place(command, folders, known)


def _changed(
    command: Command, ground: Ground, folders: tuple[str, ...], *, known: bool
) -> tuple[tuple[str, ...], bool]:
    """Return where one may be after a command changed the folder; it may have failed to."""
    words = [word for word in command.words[1:] if not word.text.startswith("-")]
    paths = [_expanded(word.text, folder, ground) for word in words for folder in folders]
    sure = [normal(path) for path in paths if path and not _WILD.search(path)]
    known = known and command.program == "cd" and 0 < len(sure) == len(paths)
    folders = tuple(dict.fromkeys([*sure, *folders]))
    return folders[: FOLDERS_MAX + 1], known


def _reading(script: Script, places: Sequence[_Place], ground: Ground) -> Verdict | None:
    named = sorted(
        {
            (piece, folder)
            for place in places
            for word in _shown_words(place.command)
            for piece in _pieces(word.text)
            for folder in place.folders
        }
    )
    near = _affordable(named)
    if any(holds_keys(piece.split("/")) for piece, _ in named) or any(
        _is_private(piece, folder, ground) for piece, folder in near
    ):
        return _no_keys()
    if not script.whole or any(map(_passes_on, script.commands)):
        # What is named in one place may be used in another.
        folders = {*ground.roots, *(folder for place in places for folder in place.folders)}
        texts = (script.text, re.sub(r"['\"\\]", "", script.text))
        pieces = {piece for text in texts for piece in _PATH_IN_TEXT.findall(text)}
        if any(_is_private(item, at, ground, follow=False) for item in pieces for at in folders):
            return _no_keys()
    return _too_many() if len(near) < len(named) else None


def _affordable(named: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    """Return as many of these words and folders as may be followed."""
    chars = itertools.accumulate(len(word) + len(folder) for word, folder in named)
    return named[: sum(1 for count in chars if count <= FOLLOWED_CHARS_MAX)]


def _passes_on(command: Command) -> bool:
    """Whether a command runs others, sets a variable, or uses one."""
    texts = (word.text for word in command.words if not word.known)
    return command.runs_others or command.assigns or any("$" in text for text in texts)


def _shown_words(command: Command) -> list[Word]:
    """Return the words of a command that may name a file whose content it shows."""
    read = [item.target for item in command.redirections if item.operator in ("<", "<>")]
    if command.program in NAMES_ONLY and not command.given:
        return read
    words = command.words[1:]
    # The last word is where it goes, and nothing of that is shown.
    return [*read, *(words[:-1] if command.program in ("cp", "mv") else words)]


def _pieces(text: str) -> Iterable[str]:
    """Return what of a word may be a path: `--file=x`, `-fx`, `@x`, `HEAD:x` name one as well."""
    return [text, *re.split(r"[=@:,{}]", text), *([text[2:]] if text[:1] == "-" else [])]


def _deletion(script: Script, places: Sequence[_Place], ground: Ground) -> Verdict | None:
    doubt = not script.whole and _DELETES_IN_TEXT.search(script.text) is not None
    piped = any(command.program in ("xargs", "parallel") for command in script.commands)
    chars = 0
    for place in places:
        targets = _deleted(place.command)
        if targets is None:
            continue
        doubt = doubt or (place.command.given and piped)
        chars += sum(len(word.text) + len(at) for word in targets for at in place.folders)
        if chars > FOLLOWED_CHARS_MAX:
            doubt = True
            break
        for word in targets:
            outside = [_is_outside(word, place.command, ground, at) for at in place.folders]
            if outside[0]:
                return Verdict("deny", "Nothing is deleted outside the workspace.", DELETION)
            relative = not word.text.startswith(("/", "~", "$"))
            doubt = doubt or outside != [False] * len(outside) or (relative and not place.known)
    if not doubt:
        return None
    return Verdict(
        "ask", "It deletes, and that it does so only in the workspace is not certain.", DELETION
    )


def _deleted(command: Command) -> Sequence[Word] | None:
    """Return the words that name what a command deletes; None when it deletes nothing."""
    words = command.words[1:]
    texts = [word.text for word in words]
    if command.program in DELETES:
        return _operands(words)
    if command.program in MOVES:
        operands = _operands(words)
        return operands if any(text.startswith(("-t", "--t")) for text in texts) else operands[:-1]
    runs = bool(FIND_RUNS.intersection(texts))
    if command.program == "find" and (
        "-delete" in texts or (runs and any(PurePath(text).name in DELETES for text in texts))
    ):
        start = next((at for at, text in enumerate(texts) if text[:1] in ("-", "(", "!")), 0)
        return words[:start] or (Word("."),)
    return None


def _operands(words: Sequence[Word]) -> list[Word]:
    """Return the words that are no options."""
    texts = [word.text for word in words]
    end = texts.index("--") if "--" in texts else len(texts)
    before = [word for word in words[:end] if not word.text.startswith("-")]
    return [*before, *words[end + 1 :]]


def _is_outside(word: Word, command: Command, ground: Ground, folder: str) -> bool | None:
    """Return whether a word may lead out of the workspace; None when that is not known."""
    written = _expanded(word.text, folder, ground)
    if written is None or (not word.known and "{" in written):
        return None
    fixed = written if word.known else _fixed(written)
    if ".." in PurePath(written[len(fixed) :]).parts:
        return None
    path = normal(fixed)
    if not ground.inside(path):
        return True
    # A link is deleted itself, unless what is in it is meant.
    if path in ground.roots or fixed != written or command.program in FOLLOWS_LINKS:
        return not ground.inside(ground.real(path))
    return not ground.inside(ground.real(os.path.dirname(path)))


# -- a shell and what makes a profile


def _profile(script: Script, places: Sequence[_Place], ground: Ground) -> Verdict | None:
    if not ground.profiles:
        return None
    doubt = False
    left = FOLLOWED_CHARS_MAX
    for place in places:
        for word, writes in _used_words(place.command):
            for piece, folder in itertools.product(_pieces(word.text), place.folders):
                left -= len(piece) + len(folder)
                if left < 0:
                    return _perhaps_profile()
                if _leads_to_profile(piece, folder, ground):
                    if writes:
                        return _no_profile()
                    doubt = True
    if not doubt and (not script.whole or any(map(_passes_on, script.commands))):
        pieces = _PATH_IN_TEXT.findall(re.sub(r"['\"\\]", "", script.text))
        doubt = any(
            _leads_to_profile(piece, root, ground, follow=False)
            for piece in pieces
            for root in ground.roots
        )
    return _perhaps_profile() if doubt else None


def _used_words(command: Command) -> Iterator[tuple[Word, bool]]:
    """Yield the words of a command that may name what it changes, and whether it does for sure."""
    for item in command.redirections:
        if ">" in item.operator:
            yield item.target, True
    words = command.words[1:]
    if command.program in SHOWS_ONLY and not command.given:
        return
    if command.program in COPIES and not any(word.text.startswith(("-t", "--t")) for word in words):
        words = words[-1:]
    sure = command.program in DELETES | MOVES | COPIES | {"tee"} and not command.given
    for word in words:
        yield word, sure and word.known
