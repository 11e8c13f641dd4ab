"""What a shell command line runs, as far as that is certain before it runs.

A reader for the shell command language of POSIX.1-2017 (XCU chapter 2), wary on purpose. `/bin/sh`
is dash, bash or another, so what they read in different ways counts as not understood, and so does
every feature that is not known here. Whoever allows something asks for `plain`; whoever forbids
something looks at all `commands` and, where they are not the `whole`, takes the rest for possible.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

#: A longer text is not read; a person can be asked about it.
COMMAND_CHARS_MAX: Final = 20_000

#: How deep substitutions, subshells and commands within commands are followed.
NESTING_MAX: Final = 16

#: How many commands are looked at, those that others are given to run included.
COMMANDS_MAX: Final = 1_000

#: How many texts are read for one command line, those within others included.
TEXTS_MAX: Final = 100

#: At how many words of a command that runs another one the other is looked for.
WRAPPED_WORDS_MAX: Final = 64

#: Programs that run what they are given: commands, as words or as text, or programs of their own
#: language. Shells and builtins are among them; a version at the end of a name is left out.
RUNNERS: Final = frozenset(
    """
    . ash awk bash builtin busybox bwrap chroot chrt command csh dash doas env eval exec expect
    fakeroot find firejail fish flock gawk gdb ionice ksh lua ltrace mawk mksh nawk nice node nodejs
    nohup nsenter osascript parallel perf perl php pkexec posh prlimit pwsh python rbash rsh ruby
    runuser script sed setarch setpriv setsid sg sh source ssh start-stop-daemon stdbuf strace su
    sudo systemd-run tclsh tcsh time timeout toybox trap unbuffer unshare watch xargs yash zsh
    """.split()  # noqa: SIM905 - a list of words reads better so
)

#: Those of them that make one text of their words and run that.
JOINERS: Final = frozenset({"eval", "parallel", "rsh", "ssh", "trap", "watch"})

#: Actions of `find` that run a command.
FIND_RUNS: Final = frozenset({"-exec", "-execdir", "-ok", "-okdir"})

#: Builtins after which a name may stand for something else than the program of that name.
RENAMERS: Final = frozenset({"alias", "enable", "hash", "unalias"})

_SEPARATORS: Final = frozenset({";", "&", "&&", "|", "||"})
_RESERVED: Final = frozenset({"!", "{", "}", "if", "then", "elif", "else", "fi", "do", "done"})
_LOOPS: Final = frozenset({"while", "until"})

#: Words that begin something which shells read each in its way, or that is not read here.
_UNREAD: Final = frozenset({"case", "coproc", "esac", "function", "select", "[[", "]]", "time"})

#: Joins two lines, but not in a comment, within single quotes, or where the backslash is quoted.
_JOINT: Final = "\\\n"

_META: Final = frozenset(" \t\n;&|<>()")
_GLOB: Final = frozenset("*?[")

#: Where one of these is in a word, it may be a text of commands.
_TEXT: Final = _META | {"$", "`"}

_OPERATOR: Final = re.compile(r"[;&|]+")
_REDIRECTION: Final = re.compile(r"<<-|<<|<>|<&|>>|>\||>&|<|>")
_ASSIGNMENT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\[[^]]*\])?\+?=")
_PARAMETER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9@*#?$!-]")
_BRACED: Final = re.compile(
    r"\{(?:#?[A-Za-z_][A-Za-z0-9_]*|[0-9]+|[@*#?$!-])"
    r"(?:(?::?[-=+?]|%%?|##?)[A-Za-z0-9_./:*,@ -]*)?\}"
)
_SUMS: Final = re.compile(r"\(\([0-9 +*/%-]*\)\)")
_BACKTICKS: Final = re.compile(r"((?:[^`\\]|\\.)*)`", re.DOTALL)
_VERSION: Final = re.compile(r"[0-9.]+$")
_DELIMITER: Final = re.compile(
    r"(['\"]?)([A-Za-z0-9_]+)\1(?=[\s;&|<>)]|$)|\\([A-Za-z0-9_]+)(?=\s|$)"
)


@dataclass(frozen=True, slots=True)
class Word:
    """One word, quotes removed.

    Unless it is `known`, the shell makes something else of it: what it will expand stands in the
    text as it was written, a substitution as `$()`.
    """

    text: str
    known: bool = True


@dataclass(frozen=True, slots=True)
class Redirection:
    """Where input comes from or output goes: `>`, and the file or the descriptor."""

    operator: str
    target: Word

    @property
    def harmless(self) -> bool:
        """Whether no file is touched by it."""
        if not self.target.known:
            return False
        if self.operator in ("<&", ">&"):
            return self.target.text in ("-", "0", "1", "2")
        return self.target.text == "/dev/null" and not self.operator.startswith("<<")


@dataclass(frozen=True, slots=True)
class Command:
    """One simple command.

    One that is `given` stands in the words of another that may run it, so it need not be one.
    `within` names the subshells that it is in, from the outermost on.
    """

    words: tuple[Word, ...]
    redirections: tuple[Redirection, ...] = ()
    assigns: bool = False
    given: bool = False
    within: tuple[int, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether its words are what the program gets, and it touches no file by itself."""
        return (
            bool(self.words)
            and not self.assigns
            and all(word.known for word in self.words)
            and all(redirection.harmless for redirection in self.redirections)
        )

    @property
    def program(self) -> str:
        """The name of what is run, without its folder; empty where that is not known."""
        known = self.words and self.words[0].known
        return self.words[0].text.rpartition("/")[2] if known else ""

    @property
    def runs_others(self) -> bool:
        """Whether it may run what stands in its words."""
        return (_VERSION.sub("", self.program) or self.program) in RUNNERS

    @property
    def text(self) -> str:
        """The words with spaces between."""
        return " ".join(word.text for word in self.words)


@dataclass(frozen=True, slots=True)
class Script:
    """What a command line runs.

    `plain`: nothing but these commands, with these words, and nothing in it that shells read in
    different ways. `whole`: it runs these commands and no others, though some words are not known.
    """

    text: str
    commands: tuple[Command, ...]
    plain: bool
    whole: bool


class _Unclear(Exception):
    """Something that is not understood for certain; what was read before it counts."""


@dataclass(slots=True)
class _Budget:
    """How many texts may still be read, and how many subshells there have been."""

    texts: int = TEXTS_MAX
    subshells: int = 0

    def subshell(self) -> int:
        """Return the number of another one."""
        self.subshells += 1
        return self.subshells


def parse(text: str) -> Script:
    """Return what a command line runs. Never raises: what cannot be read is not `plain`."""
    return _parse(text, 0, _Budget())


def _parse(text: str, depth: int, budget: _Budget) -> Script:
    plain = _JOINT not in text
    reader = _Reader(text, depth, budget)
    budget.texts -= 1
    whole = True
    try:
        if len(text) > COMMAND_CHARS_MAX or depth > NESTING_MAX or not _is_text(text):
            raise _Unclear
        if budget.texts < 0:
            raise _Unclear
        reader.read("")
    except _Unclear:
        reader.stop()
        plain = whole = False
    commands, certain = _follow(reader.commands, depth, budget)
    return Script(text, commands, plain and certain, whole and certain)


def _is_text(text: str) -> bool:
    """Whether a text holds nothing that could be a blank to one shell and a letter to another."""
    return all(character.isprintable() or character in "\t\n" for character in text)


def _follow(
    found: Sequence[Command], depth: int, budget: _Budget
) -> tuple[tuple[Command, ...], bool]:
    """Return the commands and those that they are given to run, and whether these are all."""
    commands = list(found)
    certain = True
    for command in found:
        if not command.words:
            continue
        if not command.program or command.program in RENAMERS:
            certain = False
        if command.runs_others:
            given, whole = _given(command, depth, budget)
            commands += given
            certain = certain and whole
    return tuple(commands[:COMMANDS_MAX]), certain and len(commands) <= COMMANDS_MAX


def _given(command: Command, depth: int, budget: _Budget) -> tuple[list[Command], bool]:
    """Return what a command could run of its words: from each word on, and what is in each."""
    words = command.words[1 : WRAPPED_WORDS_MAX + 1]
    if command.program == "find":
        words = _after_exec(words)
    certain = len(command.words) <= WRAPPED_WORDS_MAX and all(word.known for word in words)
    within = command.within
    given = [Command(words[start:], given=True, within=within) for start in range(len(words))]
    texts = {word.text for word in words if len(word.text) > 1 and set(word.text) & _TEXT}
    if command.program in JOINERS:
        texts.add(" ".join(word.text for word in words))
    for text in sorted(texts):
        script = _parse(text, depth + 1, budget)
        shell = (*within, budget.subshell())
        given += [
            replace(found, given=True, within=(*shell, *found.within)) for found in script.commands
        ]
        certain = certain and script.whole
    return given, certain


def _after_exec(words: tuple[Word, ...]) -> tuple[Word, ...]:
    """Return the words of `find` from its first action on that runs a command."""
    for number, word in enumerate(words):
        if word.text in FIND_RUNS:
            return words[number + 1 :]
    return ()


@dataclass(slots=True)
class _Building:
    """A simple command on its way."""

    words: list[Word] = field(default_factory=list)
    redirections: list[Redirection] = field(default_factory=list)
    assigns: bool = False

    @property
    def begun(self) -> bool:
        return bool(self.words or self.redirections or self.assigns)

    def made(self, within: tuple[int, ...]) -> Command:
        """Return it as it is now."""
        return Command(tuple(self.words), tuple(self.redirections), self.assigns, within=within)


@dataclass(slots=True)
class _Piece:
    """A word on its way."""

    text: list[str] = field(default_factory=list)
    known: bool = True
    quoted: bool = False


class _Reader:
    """Reads one text from its beginning to its end, collecting the commands in it."""

    def __init__(self, text: str, depth: int, budget: _Budget) -> None:
        self._text = text
        self._at = 0
        self._depth = depth
        self._budget = budget
        self._within: tuple[int, ...] = ()
        self._heredocs: list[tuple[str, bool, bool]] = []
        self._command = _Building()
        self._head = False
        self.commands: list[Command] = []

    # -- commands

    def read(self, until: str) -> None:
        """Read commands up to the character that ends them, or to the end of the text."""
        while True:
            self._skip_blanks()
            character = self._peek()
            if not character:
                break
            if character == ")":
                self._end_command()
                self._close(until)
                return
            self._read_one(character)
        self._end_command()
        if until or self._heredocs:
            raise _Unclear

    def stop(self) -> None:
        """Keep what was read of the command that is not understood to its end."""
        if self._command.begun:
            self.commands.append(self._command.made(self._within))

    def _close(self, until: str) -> None:
        if until != ")" or self._heredocs:
            raise _Unclear
        self._at += 1

    def _read_one(self, character: str) -> None:
        if character == "\n":
            self._end_command()
            self._at += 1
            self._skip_heredocs()
        elif character in ";&|":
            self._operator()
        elif character == "(":
            self._subshell()
        elif character in "<>":
            self._redirection()
        else:
            self._word()

    def _operator(self) -> None:
        found = _OPERATOR.match(self._text, self._at)
        assert found is not None
        # `&>` is one operator to bash and two to others; `;;` and `|&` are not read.
        if found[0] not in _SEPARATORS or self._text[found.end() : found.end() + 1] in ("<", ">"):
            raise _Unclear
        self._at = found.end()
        self._expect_no_joint()
        self._end_command()

    def _expect_no_joint(self) -> None:
        """Refuse what goes on in the next line where that could make another sign of this one."""
        if self._text.startswith(_JOINT, self._at):
            raise _Unclear

    def _subshell(self) -> None:
        # After a word it makes a function of it, or an array; two are a sum to bash.
        if self._command.begun or self._head or self._text.startswith("((", self._at):
            raise _Unclear
        self._nested()

    def _nested(self) -> None:
        """Read commands in parentheses, from the opening one to behind the closing one."""
        self._at += 1
        self._expect_no_joint()
        self._depth += 1
        # Where a text begins that an open `<<` announced is then read in different ways.
        if self._depth > NESTING_MAX or self._heredocs:
            raise _Unclear
        outer, self._command = self._command, _Building()
        head, self._head = self._head, False
        within, self._within = self._within, (*self._within, self._budget.subshell())
        self.read(")")
        self._command, self._head, self._within = outer, head, within
        self._depth -= 1

    def _end_command(self) -> None:
        command, self._command = self._command, _Building()
        self._head = False
        if command.begun:
            if len(self.commands) >= COMMANDS_MAX:
                raise _Unclear
            self.commands.append(command.made(self._within))

    def _word(self) -> None:
        start = self._at
        if self._peek() == "#":
            end = self._text.find("\n", self._at)
            self._at = len(self._text) if end < 0 else end
            return
        piece = self._piece()
        word = Word("".join(piece.text), piece.known)
        written = self._text[start : self._at].replace(_JOINT, "")
        if self._peek() in ("<", ">") and written.isascii() and written.isdecimal():
            if len(written) > 1:
                raise _Unclear  # A descriptor to bash, a word to dash.
            self._redirection()
        elif self._head:
            pass  # The words of a `for` are no command; what is in them was read.
        elif not self._command.begun and not piece.quoted and self._keyword(word.text):
            pass
        elif not self._command.words and _ASSIGNMENT.match(written):
            self._command.assigns = True
        else:
            self._command.words.append(word)

    def _keyword(self, text: str) -> bool:
        """Whether this is a reserved word, after which a command may follow."""
        if text in _UNREAD:
            raise _Unclear
        self._head = text == "for"
        return self._head or text in _RESERVED or text in _LOOPS

    # -- redirections

    def _redirection(self) -> None:
        found = _REDIRECTION.match(self._text, self._at)
        assert found is not None
        operator = found[0]
        self._at = found.end()
        self._expect_no_joint()
        # `<(` and `>(` are commands, `<<<` is bash's own, and a `for` takes none in its words.
        if self._peek() in ("(", "<", ">", "&") or self._head:
            raise _Unclear
        self._skip_blanks()
        if operator in ("<<", "<<-"):
            self._heredoc(operator)
            return
        if self._peek() in _META or not self._peek():
            raise _Unclear
        piece = self._piece()
        target = Word("".join(piece.text), piece.known)
        self._command.redirections.append(Redirection(operator, target))

    def _heredoc(self, operator: str) -> None:
        found = _DELIMITER.match(self._text, self._at)
        if found is None:
            raise _Unclear
        self._at = found.end()
        quoted = bool(found[1] or found[3])
        self._heredocs.append((found[2] or found[3], quoted, operator == "<<-"))
        target = Word(found[2] or found[3])
        self._command.redirections.append(Redirection(operator, target))

    def _skip_heredocs(self) -> None:
        """Skip the texts that begin after this line; what one substitutes is read."""
        for delimiter, quoted, tabs in self._heredocs:
            while True:
                end = self._text.find("\n", self._at)
                line = self._text[self._at : end if end >= 0 else len(self._text)]
                if (line.lstrip("\t") if tabs else line) == delimiter:
                    self._at = min(self._at + len(line) + 1, len(self._text))
                    break
                if end < 0 or (not quoted and set(line) & {"$", "`", "\\"}):
                    raise _Unclear
                self._at = end + 1
        self._heredocs = []

    # -- words

    def _piece(self) -> _Piece:
        start = self._at
        piece = _Piece()
        bare: list[str] = []
        while (character := self._peek()) and character not in _META:
            if character == "'":
                self._single(piece)
            elif character == '"':
                self._double(piece)
            elif character == "\\":
                self._escaped(piece)
            elif character in "$`":
                self._expansion(piece, quoted=False)
            else:
                self._bare(piece, character, bare)
        # `{a,b}` and `{1..3}` are words of bash's; to others they are as they stand.
        written = "".join(bare)
        if "{" in written and ("," in written or ".." in written):
            piece.known = False
        if self._text[start : self._at] == "[":
            piece.known = True  # The command `test` by its other name.
        if self._heredocs and "\n" in self._text[start : self._at]:
            raise _Unclear
        return piece

    def _bare(self, piece: _Piece, character: str, bare: list[str]) -> None:
        if character in _GLOB or (character == "~" and (not bare or bare[-1] in "=:")):
            piece.known = False
        piece.text.append(character)
        bare.append(character)
        self._at += 1

    def _single(self, piece: _Piece) -> None:
        end = self._text.find("'", self._at + 1)
        if end < 0:
            raise _Unclear
        piece.text.append(self._text[self._at + 1 : end])
        piece.quoted = True
        self._at = end + 1

    def _escaped(self, piece: _Piece) -> None:
        following = self._text[self._at + 1 : self._at + 2]
        if not following:
            raise _Unclear
        if following != "\n":
            piece.text.append(following)
            piece.quoted = True
        self._at += 2

    def _double(self, piece: _Piece) -> None:
        piece.quoted = True
        self._at += 1
        while (character := self._peek()) != '"':
            if not character:
                raise _Unclear
            following = self._text[self._at + 1 : self._at + 2]
            if character == "\\" and following and following in '$`"\\\n':
                piece.text.append(following.strip("\n"))
                self._at += 2
            elif character in "$`":
                self._expansion(piece, quoted=True)
            else:
                piece.text.append(character)
                self._at += 1
        self._at += 1

    def _expansion(self, piece: _Piece, *, quoted: bool) -> None:
        """Take `$…` or a command in backticks."""
        start = self._at
        self._at += 1
        self._expect_no_joint()
        following = self._peek()
        if self._text[start] == "`":
            self._backticks(piece, quoted=quoted)
        elif following == "(":
            self._substitution(piece, start)
        elif following == "{":
            self._take(piece, _BRACED.match(self._text, self._at))
        elif following == "[" or (following in ("'", '"') and not quoted):
            raise _Unclear  # A sum and escapes to bash, a dollar and more to others.
        elif found := _PARAMETER.match(self._text, self._at):
            self._take(piece, found)
        else:
            piece.text.append("$")

    def _take(self, piece: _Piece, found: re.Match[str] | None) -> None:
        if found is None:
            raise _Unclear
        piece.text.append(f"${found[0]}")
        piece.known = False
        self._at = found.end()

    def _substitution(self, piece: _Piece, start: int) -> None:
        if self._text.startswith("((", self._at):
            found = _SUMS.match(self._text, self._at)
            if found is None:
                raise _Unclear  # A sum may hold names, whose values bash computes in turn.
            self._at = found.end()
        else:
            self._nested()
        self._replaced(piece)

    def _replaced(self, piece: _Piece) -> None:
        piece.text.append("$()")
        piece.known = False

    def _backticks(self, piece: _Piece, *, quoted: bool) -> None:
        found = _BACKTICKS.match(self._text, self._at)
        if found is None:
            raise _Unclear
        self._at = found.end()
        escaped = r'\\([$`\\"])' if quoted else r"\\([$`\\])"
        inner = _parse(re.sub(escaped, r"\1", found[1]), self._depth + 1, self._budget)
        within = (*self._within, self._budget.subshell())
        self.commands += [
            replace(found, within=(*within, *found.within)) for found in inner.commands
        ]
        self._replaced(piece)
        if not inner.whole:
            raise _Unclear

    # -- characters

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _skip_blanks(self) -> None:
        while self._peek() in (" ", "\t") or self._text.startswith(_JOINT, self._at):
            self._at += 1 if self._peek() != "\\" else len(_JOINT)
