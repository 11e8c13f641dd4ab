"""What a command line runs, and that nothing which is taken for understood runs anything else."""

import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from ownware_gateway.shell_syntax import (
    COMMAND_CHARS_MAX,
    COMMANDS_MAX,
    NESTING_MAX,
    Script,
    parse,
)

#: How many commands the comparison with real shells makes up, and the number they come from.
MADE_UP: Final = 4_000
SEED: Final = 7

PIECES: Final = (
    *("ls", "ls", "git status", "git status", "pwn", "pwn", "p", "wn", " ", " ", " ", " "),
    *(";", "&", "&&", "|", "||", "|&", "\n", "'", '"', "\\", "\\\n", "$", "$(", ")", "(", "`"),
    *("${", "}", "{ ", "; }", "<", ">", ">>", "2>", "&>", ">&", "<<", "<<<", "<(", "<<E\n"),
    *("\nE\n", "#", " #", "! ", "if ", "then ", "fi", "while ", "do ", "done", "for x in "),
    *("case x in ", "esac", "x)", ";;", "$'", "\\x3b", "$((", "))", "*", "?", "[", "]", "~"),
    *("a=", "1", "/dev/null", "&1", "$x", "${x@P}", "f()", "eval ", "exec ", "alias ", "\t"),
    *("\r", "\x0b", "\u00a0", "..", ",", "=", "[[ ", "coproc ", "function f"),
)


def own(text: str) -> list[str]:
    return [command.text for command in parse(text).commands if not command.given]


def given(text: str) -> list[str]:
    return [command.text for command in parse(text).commands if command.given]


def allowed(script: Script) -> bool:
    """Whether nothing but `ls` and `git status` is run, as a rule that allows them decides."""
    commands = [command for command in script.commands if not command.given]
    texts = [[word.text for word in command.words] for command in commands]
    known = all(words[:1] == ["ls"] or words[:2] == ["git", "status"] for words in texts)
    return script.plain and bool(texts) and known and all(item.plain for item in commands)


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("git status", ["git status"]),
        ("  git\tstatus  ", ["git status"]),
        ("a; b && c || d | e & f\ng", ["a", "b", "c", "d", "e", "f", "g"]),
        ("'a b' \"c  d\" e\\ f g''h", ["a b c  d e f gh"]),
        ('"\\$x\\"\\`\\\\\\n" \'\\n$x`y`\'', ['$x"`\\\\n \\n$x`y`']),
        ("a # b; c\nd", ["a", "d"]),
        ("a#b ''#c", ["a#b #c"]),
        ("(a; b) ; { c; }", ["a", "b", "c"]),
        ("if a; then b; elif c; then d; else e; fi", ["a", "b", "c", "d", "e"]),
        ("while ! a; do b; done", ["a", "b"]),
        ("for i in 1 2; do a; done", ["a"]),
        ("a 2>&1 >/dev/null </dev/null", ["a"]),
        ("a '\n' b", ["a \n b"]),
        ("HEAD~1 a{}b {} x=1 -x=~", ["HEAD~1 a{}b {} x=1 -x=~"]),
        ("", []),
        ("# nothing", []),
    ],
)
def test_the_commands_of_a_line_are_found_with_their_words(text: str, commands: list[str]) -> None:
    assert own(text) == commands
    assert parse(text).whole


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("a $(b c)", ["b c", "a $()"]),
        ('a "$(b "$(c)")"', ["c", "b $()", "a $()"]),
        ("a `b \\`c\\``", ["c", "b $()", "a $()"]),
        ("x=$(a) y=1 b", ["a", "b"]),
        ("a > $(b)", ["b", "a"]),
        ("for i in $(a); do b; done", ["a", "b"]),
        ("cat <<E\nrm x\nE\nls", ["cat", "ls"]),
        ("cat <<'E' | wc\n$(rm)\nE\nls", ["cat", "wc", "ls"]),
        ("cat <<-E\n\trm\n\tE\nls", ["cat", "ls"]),
    ],
)
def test_what_is_substituted_is_found_too_and_what_is_only_text_is_not(
    text: str, commands: list[str]
) -> None:
    assert own(text) == commands
    assert parse(text).whole


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("sudo -u x rm y", "rm y"),
        ("env A=1 timeout 5 nice rm y", "rm y"),
        ("/usr/bin/env rm y", "rm y"),
        ("sh -c 'a; rm y'", "rm y"),
        ("bash -xc \"sh -c 'rm y'\"", "rm y"),
        ("eval rm y", "rm y"),
        ("eval 'rm' \"y\"", "rm y"),
        ("find . -exec rm y \\;", "rm y ;"),
        ("ls | xargs -0 rm", "rm"),
        ("trap 'rm y' EXIT", "rm y"),
        ("ssh host rm y", "rm y"),
        ("python3.11 -c 'rm y'", "rm y"),
        ("command rm y", "rm y"),
        ("exec rm y", "rm y"),
    ],
)
def test_what_a_command_is_given_to_run_is_found_too(text: str, command: str) -> None:
    assert command in given(text)


@pytest.mark.parametrize(
    "text",
    [
        "$x a",
        "$(a) b",
        "/bin/r? a",
        "~/x a",
        "f() { a; }",
        "function f { a; }",
        "case a in b) c;; esac",
        "a |& b",
        "a &> b",
        "a <(b)",
        "a <<< b",
        "a $'b'",
        'a $"b"',
        "a $[1]",
        "a $((x))",
        "((a))",
        "[[ a ]]",
        "time a",
        "coproc a",
        "select i in a; do b; done",
        "a ${x@P}",
        "a ${!x}",
        "a ${x:-$(b)}",
        "alias a=b",
        "a=(b c)",
        "a !(b)",
        "a 12>b",
        "a <<E",
        "a <<E\nb",
        "a <<E\n$(b)\nE",
        "a <<E $(\nb\nE\n)",
        "a <<$'E'\nb\nE",
        "a 'b",
        'a "b',
        "a `b",
        "a $(b",
        "a )",
        "a \\",
        "a;;b",
        "a\rb",
        "a\u00a0b",
        "a\0b",
        "a\x0bb",
        "sh -c 'case a in b) c;; esac'",
        "sudo $x",
        "a; " * (COMMANDS_MAX + 1),
        "(" * (NESTING_MAX + 1) + "a" + ")" * (NESTING_MAX + 1),
        "a " + "b" * COMMAND_CHARS_MAX,
    ],
    ids=lambda text: text[:30],
)
def test_what_is_not_understood_is_neither_plain_nor_whole(text: str) -> None:
    script = parse(text)
    assert not script.whole
    assert not script.plain or not all(command.plain for command in script.commands)


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("rm \\\n-rf x", ["rm -rf x"]),
        ("r\\\nm x", ["rm x"]),
        ("i\\\nf rm x; then a; fi", ["rm x", "a"]),
        ("x\\\n=1 rm x", ["rm x"]),
        ('"r\\\nm" x', ["rm x"]),
        ("ls # a \\\nrm x", ["ls", "rm x"]),
        ("ls \\\\\nrm x", ["ls \\", "rm x"]),
        ("ls '\\\n'\nrm x", ["ls \\\n", "rm x"]),
        ("cat <<'E'\na\\\nE\nrm x\nE", ["cat", "rm x", "E"]),
        ("ls \\\n# rm\nrm x", ["ls", "rm x"]),
    ],
)
def test_a_line_that_goes_on_is_read_as_the_shell_joins_it_and_not_plain(
    text: str, commands: list[str]
) -> None:
    assert own(text) == commands
    assert parse(text).whole
    assert not parse(text).plain


@pytest.mark.parametrize(
    "text",
    ["a &\\\n& b", "a <\\\n<E\nb\nE", '"$\\\n(a)"', "$\\\n(a)", "(\\\n(a))", "a >\\\n&b"],
)
def test_a_sign_that_goes_on_in_the_next_line_is_not_understood(text: str) -> None:
    assert not parse(text).whole


def test_commands_within_commands_within_commands_come_to_an_end() -> None:
    text = "rm x"
    for _ in range(8):
        text = f"eval {text!r} {text!r}"
    assert not parse(text[:COMMAND_CHARS_MAX]).plain
    assert not parse("eval " * 5_000).whole


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A folder of programs that only tell that they were run, and with which first word."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("ls", "git", "pwn"):
        stub = folder / name
        told = 'case "$1" in status) echo "git status";; *) echo git;; esac'
        say = told if name == "git" else f"echo {name}"
        stub.write_text(f'#!/bin/sh\n{{ {say}; }} >> "$TOLD"\n')
        stub.chmod(0o755)
    return folder


def run(shell: str, text: str, stubs: Path) -> set[str]:
    """Run a text in a shell and return what was run, and which files it left."""
    told = stubs.parent / "told"
    told.unlink(missing_ok=True)
    work = stubs.parent / "work"
    work.mkdir(exist_ok=True)
    subprocess.run(
        [shell, "-c", text],
        cwd=work,
        env={"PATH": str(stubs), "TOLD": str(told)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=10,
        check=False,
    )
    ran = set(told.read_text().splitlines()) if told.exists() else set()
    return ran | {f"file {path.name}" for path in work.iterdir()}


def made_up() -> Iterator[tuple[str, str]]:
    """Yield lines that nobody would write, and a shell to run each in."""
    shells = [found for name in ("dash", "bash", "sh") if (found := shutil.which(name))]
    chosen = random.Random(SEED)
    for number in range(MADE_UP):
        pieces = chosen.choices(PIECES, k=chosen.randint(2, 12))
        text = chosen.choice(("ls ", "git status ", "")) + "".join(pieces)
        # Of the others there are many, and they cannot go wrong.
        if set(text) & set("<>{}$`\n#'\""):
            yield text, shells[number % len(shells)]


def test_what_is_taken_for_plain_runs_nothing_else_in_real_shells(stubs: Path) -> None:
    plain = [(text, shell) for text, shell in made_up() if allowed(parse(text))]
    for text, shell in plain:
        assert run(shell, text, stubs) <= {"ls", "git status"}, (shell, text)
    assert len(plain) > 50


def test_what_is_taken_for_the_whole_is_all_that_real_shells_run(stubs: Path) -> None:
    whole = [
        (text, shell)
        for text, shell in made_up()
        if "wn" in text
        and (script := parse(text)).whole
        and all(command.program != "pwn" for command in script.commands)
    ]
    for text, shell in whole:
        assert "pwn" not in run(shell, text, stubs), (shell, text)
    assert len(whole) > 50
