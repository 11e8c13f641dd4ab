"""The rules of a profile: does one of them fit this call? Pure.

What allows must fit for certain; what asks or denies must be ruled out for certain. So a rule that
allows says yes or no, and one that asks or denies may also say `maybe`.
"""

import hashlib
import json
import os.path
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import PurePath
from typing import Any, Final, Literal

from ownware_gateway.profile import Profile
from ownware_gateway.profile.rules import Condition, Decision, Policy
from ownware_gateway.shell_syntax import Command, Script, Word, parse
from ownware_gateway.tools import Tool

Match = Literal["yes", "maybe", "no"]

#: How much of a rule is told with an event; of a longer one, a hash tells it from others.
RULE_CHARS_MAX: Final = 200

#: Programs that run what an option says, or write where it says: with one of these options a
#: command is not allowed by a prefix that does not name it. As complete as anybody knows.
DOES_MORE: Final[Mapping[str, tuple[str, ...]]] = {
    "fd": ("-x", "-X", "--exec", "--exec-batch"),
    "find": (
        *("-exec", "-execdir", "-ok", "-okdir", "-delete"),
        *("-fls", "-fprint", "-fprint0", "-fprintf", "-files0-from"),
    ),
    "git": (
        *("-c", "-O", "-x", "--config-env", "--contents", "--exec", "--exec-path", "--ext-diff"),
        *("--extcmd", "--git-dir", "--no-index", "--open-files-in-pager", "--output"),
        *("--receive-pack", "--textconv", "--upload-pack", "--work-tree"),
    ),
    "go": ("-exec", "-toolexec", "-vettool", "-overlay"),
    "rg": ("--hostname-bin", "--pre"),
    "rsync": ("-e", "--rsh", "--rsync-path", "--delete", "--remove-source-files"),
    "sort": ("-o", "-T", "--compress-program", "--output", "--temporary-directory"),
    "tar": (
        *("-F", "-I", "--checkpoint-action", "--info-script", "--new-volume-script"),
        *("--rsh-command", "--to-command", "--use-compress-program"),
    ),
    "tree": ("-o", "-R"),
}

#: Interpreters: a prefix that names what they run allows its arguments too.
INTERPRETERS: Final = frozenset({"lua", "node", "nodejs", "perl", "php", "python", "ruby"})

_WILD: Final = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Operation:
    """A call as rules see it. `hash` binds it to its exact arguments.

    Relative paths in the arguments mean the workspace, whose absolute paths are `roots`.
    """

    tool: Tool
    arguments: Mapping[str, Any]
    hash: str
    roots: tuple[str, ...] = ("/",)
    _scripts: dict[str, Script] = field(default_factory=dict, init=False, repr=False)

    @property
    def command(self) -> str | None:
        """The command line that a shell is given; None for other tools."""
        return self.tool.subject(dict(self.arguments)) if self.tool.subject else None

    def script(self, text: str) -> Script:
        """Return what a command line runs; read once."""
        if text not in self._scripts:
            self._scripts[text] = parse(text)
        return self._scripts[text]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule; `name` says which, for people and for the log."""

    name: str
    tool: str
    when: Mapping[str, Condition]
    decision: Decision


def rules(profile: Profile) -> Iterator[Rule]:
    """Yield a profile's rules in their order."""
    for index, policy in enumerate(profile.policies):
        if policy.kind == "rule":
            assert policy.decision is not None
            yield Rule(_name(index, policy), policy.tool, policy.when, policy.decision)
            continue
        if policy.deny_patterns:
            when = {"command": Condition(pattern=policy.deny_patterns)}
            yield Rule(_name(index, policy), policy.tools, when, "deny")
        if policy.allow_prefixes:
            when = {"command": Condition(prefix=policy.allow_prefixes)}
            yield Rule(_name(index, policy), policy.tools, when, "allow")


def _name(index: int, policy: Policy) -> str:
    said = policy.model_dump(mode="json", exclude_defaults=True)
    text = json.dumps(said, ensure_ascii=False, separators=(", ", ": "))
    if len(text) > RULE_CHARS_MAX:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        text = f"{text[:RULE_CHARS_MAX]}… ({digest})"
    return f"policies.{index} {text}"


def fits(rule: Rule, operation: Operation) -> Match:
    """Return whether a rule fits a call; `maybe` only for one that asks or denies."""
    if not fnmatchcase(operation.tool.name, rule.tool):
        return "no"
    sure = rule.decision == "allow"
    said = [_holds(rule, name, operation, sure=sure) for name in rule.when]
    found = _weakest(said)
    return "no" if sure and found == "maybe" else found


def _weakest(said: Iterable[Match]) -> Match:
    return min(said, key=("no", "maybe", "yes").index, default="yes")


def _strongest(said: Iterable[Match]) -> Match:
    return max(said, key=("no", "maybe", "yes").index, default="no")


def _holds(rule: Rule, name: str, operation: Operation, *, sure: bool) -> Match:
    condition = rule.when[name]
    value = operation.arguments.get(name)
    if value is None:
        value = _default(operation.tool, name)
    if value is None:
        return "no"
    if condition.equals is not None:
        return _same(condition.equals, value, sure=sure or not operation.tool.origin)
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        return "no" if sure else "maybe"
    if sure:
        return _weakest(_fits_text(condition, item, operation) for item in values)
    return _strongest(_may_fit_text(condition, item, operation) for item in values)


def _same(wanted: Any, value: Any, *, sure: bool) -> Match:
    """Return whether a value is this very one.

    One of another kind may become it: another program may take "5" for 5.
    """
    if type(wanted) is type(value):
        return "yes" if wanted == value else "no"
    return "no" if sure else "maybe"


def _default(tool: Tool, name: str) -> Any:
    """Return what an argument is when it is left out; the schema may be another program's."""
    properties = tool.input_schema.get("properties")
    described = properties.get(name) if isinstance(properties, dict) else None
    return described.get("default") if isinstance(described, dict) else None


def _fits_text(condition: Condition, text: str, operation: Operation) -> Match:
    """Return whether a text fits for certain, as what allows must."""
    if condition.prefix is not None:
        prefixes = [_words(prefix) for prefix in condition.prefix]
        ok = _each(operation.script(text), lambda command: _allowed(command, prefixes))
    elif condition.pattern is not None:
        patterns = condition.pattern
        if text == operation.command:
            ok = _each(
                operation.script(text),
                lambda command: any(fnmatchcase(command.text, pattern) for pattern in patterns),
            )
        else:
            ok = any(fnmatchcase(text, pattern) for pattern in patterns)
    else:
        # Where a name on the way is a link, `..` leads elsewhere than it seems.
        plain = text != operation.command and ".." not in PurePath(text).parts
        ok = plain and any(
            _steps(pattern, path, fold=False)[0]
            for pattern in condition.glob or ()
            for path in _paths(pattern, text, operation.roots)
        )
    return "yes" if ok else "no"


def _may_fit_text(condition: Condition, text: str, operation: Operation) -> Match:
    """Return whether a text fits, or cannot be told not to, as what asks or denies must."""
    if condition.prefix is not None:
        script = operation.script(text)
        prefixes = [_words(prefix) for prefix in condition.prefix]
        found = [_may_begin(command, words) for command in script.commands for words in prefixes]
        return _strongest([*found, "no" if script.whole else "maybe"])
    if condition.pattern is not None:
        return _strongest(_may_be_like(pattern, text, operation) for pattern in condition.pattern)
    found = []
    for pattern in condition.glob or ():
        for path in _paths(pattern, text, operation.roots):
            fitted, below = _steps(pattern, path, fold=True)
            reads_below = below and operation.tool.reads == "folder"
            found.append("yes" if fitted else "maybe" if reads_below else "no")
    return _strongest(found)


# -- commands


@lru_cache(maxsize=1024)
def _words(prefix: str) -> tuple[str, ...]:
    """Return the words of a prefix, which a profile has checked."""
    return tuple(word.text for word in parse(prefix).commands[0].words)


def _each(script: Script, allowed: Callable[[Command], bool]) -> bool:
    """Whether all that a command line runs is understood and allowed, and there is something."""
    own = [command for command in script.commands if not command.given]
    return script.plain and bool(own) and all(item.plain and allowed(item) for item in own)


def _allowed(command: Command, prefixes: Sequence[tuple[str, ...]]) -> bool:
    words = tuple(word.text for word in command.words)
    return any(
        words[: len(prefix)] == prefix and _may_follow(command, prefix, words[len(prefix) :])
        for prefix in prefixes
    )


def _may_follow(command: Command, prefix: tuple[str, ...], rest: tuple[str, ...]) -> bool:
    """Whether these words after a prefix leave it the command that was allowed."""
    program = command.program
    if not rest:
        return True
    if program in DOES_MORE:
        return not any(_has_option(option, rest) for option in DOES_MORE[program])
    if program.rstrip("0123456789.") in INTERPRETERS:
        return any(not word.startswith("-") for word in prefix[1:])
    return not command.runs_others


def _has_option(option: str, words: Iterable[str]) -> bool:
    """Whether one of the words may be this option: shortened, with a value, or with others."""
    if option.startswith("--"):
        names = (word.partition("=")[0] for word in words if word.startswith("--"))
        return any(len(name) > 2 and option.startswith(name) for name in names)
    if len(option) > 2:
        return any(word.lstrip("-").partition("=")[0] == option[1:] for word in words)
    short = (word for word in words if word.startswith("-") and not word.startswith("--"))
    return any(option[1] in word for word in short)


def _may_begin(command: Command, prefix: tuple[str, ...]) -> Match:
    """Return whether a command is what a prefix forbids, however it may be written."""
    if not command.words:
        return "no"
    if not command.words[0].known:
        return "maybe"
    # Some file systems fold case, and a folder before the name changes nothing.
    if command.program.casefold() != PurePath(prefix[0]).name.casefold():
        return "no"
    rest = command.words[1:]
    texts = [word.text for word in rest]
    if texts[: len(prefix) - 1] == list(prefix[1:]) and all(
        word.known for word in rest[: len(prefix) - 1]
    ):
        return "yes"
    if not all(word.known for word in rest):
        return "maybe"
    options = [word for word in prefix[1:] if word.startswith("-")]
    left = iter(texts)
    # Options may come in between and in another order: `git -C . push` pushes too.
    in_order = all(word in left for word in prefix[1:] if not word.startswith("-"))
    return "maybe" if in_order and all(_may_hold(option, texts) for option in options) else "no"


def _may_hold(option: str, words: Sequence[str]) -> bool:
    """Whether an option may stand in the words in another form, long for short as well."""
    letters = option.strip("-")[:1] if option.startswith("--") else option[1:]
    if option.startswith("--") and _has_option(option, words):
        return True
    long = {word[2:3] for word in words if word.startswith("--")}
    return all(_has_option(f"-{letter}", words) or letter in long for letter in letters)


def _may_be_like(pattern: str, text: str, operation: Operation) -> Match:
    pattern = _folded(pattern)
    texts = [text, " ".join(text.split())]
    if text != operation.command:
        return "yes" if any(fnmatchcase(_folded(item), pattern) for item in texts) else "no"
    script = operation.script(text)
    for command in script.commands:
        # What `xargs` runs gets more words than stand there.
        texts += [f"{form} " if command.given else form for form in _forms(command.words)]
    if any(fnmatchcase(_folded(item), pattern) for item in [*texts, *map(str.rstrip, texts)]):
        return "yes"
    return "maybe" if not script.whole or _unknown_may_fit(pattern, script) else "no"


def _forms(words: Sequence[Word]) -> list[str]:
    """Return a command as text, and so without the folder of its program."""
    texts = [word.text for word in words]
    short = [PurePath(texts[0]).name, *texts[1:]] if texts and texts[0] else texts
    return [" ".join(texts), " ".join(short)]


def _unknown_may_fit(pattern: str, script: Script) -> bool:
    """Whether words that are not known yet could make a command fit a pattern."""
    fixed = _WILD.split(pattern)[0]
    for command in script.commands:
        if all(word.known for word in command.words):
            continue
        count = next(n for n, word in enumerate(command.words) if not word.known)
        for begun in map(_folded, _forms(command.words[:count])):
            if f"{begun} ".startswith(fixed) or fixed.startswith(begun):
                return True
    return False


# -- paths


def _paths(pattern: str, text: str, roots: Sequence[str]) -> list[tuple[str, ...]]:
    """Return a path as a pattern sees it: from the root, or from the workspace if it is in it."""
    found = []
    for root in roots:
        full = PurePath(normal(os.path.join(root, text)))
        if pattern.startswith("/"):
            found.append(full.parts[1:])
        elif full.is_relative_to(root):
            found.append(full.relative_to(root).parts)
    return found


def normal(path: str) -> str:
    """Return an absolute path with `.` and `..` resolved by name, and one slash in front."""
    return "/" + os.path.normpath(path).lstrip("/")


def _steps(pattern: str, path: Sequence[str], *, fold: bool) -> tuple[bool, bool]:
    """Return whether a path fits a pattern, and whether something below it may."""
    segments = [_folded(part) if fold else part for part in pattern.split("/") if part]
    at = _skip({0}, segments)
    for name in path:
        name = _folded(name) if fold else name
        after = set()
        for position in at - {len(segments)}:
            if segments[position] == "**":
                after.add(position)
            elif fnmatchcase(name, segments[position]):
                after.add(position + 1)
        at = _skip(after, segments)
    return len(segments) in at, bool(at - {len(segments)})


def _skip(positions: set[int], segments: Sequence[str]) -> set[int]:
    """Add the positions behind each `**`, which may stand for nothing."""
    for at, segment in enumerate(segments):
        if segment == "**" and at in positions:
            positions.add(at + 1)
    return positions


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()
