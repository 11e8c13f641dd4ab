"""The rules of a profile: which calls they fit, and that nobody talks his way around them."""

import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from ownware_gateway.app import tools
from ownware_gateway.permissions import grant, judge
from ownware_gateway.policies import RULE_CHARS_MAX, Operation, rules
from ownware_gateway.profile import Profile
from ownware_gateway.profile.folder import Profiles
from ownware_gateway.profile.names import Known
from ownware_gateway.tools import Context, Output, Tool
from tests.gateway import write_profile

ALL: Final = tools()
ROOTS: Final = ("/srv/work",)
KNOWN: Final = Known(
    {name: tool.input_schema["properties"] for name, tool in ALL.items()},
    servers=lambda: ["server"],
)


async def no_call(context: Context, arguments: dict[str, Any]) -> Output:
    raise AssertionError((context, arguments))


def profile(*policies: dict[str, Any], mode: str = "ask") -> Profile:
    return Profile.model_validate(
        {"name": "p", "security": {"permissionMode": mode}, "policies": list(policies)}
    )


def call(name: str, **arguments: Any) -> Operation:
    tool = ALL.get(name) or Tool(name, "", {}, no_call)
    return Operation(tool, arguments, "hash", ROOTS)


def shell(command: str) -> Operation:
    return call("shell_execute", command=command)


def decide(rules: Profile, operation: Operation, grants: set[str] | None = None) -> str:
    return judge(rules, operation, grants or set()).decision


def when(tool: str, decision: str, **conditions: Any) -> dict[str, Any]:
    return {"tool": tool, "when": conditions, "decision": decision}


def commands(decision: str, *prefixes: str) -> dict[str, Any]:
    return when("shell_execute", decision, command={"prefix": list(prefixes)})


# -- which rule decides


def test_the_first_rule_that_fits_decides_and_the_mode_where_none_does() -> None:
    rules = profile(
        when("write_file", "deny", path={"glob": "secrets/**"}),
        when("write_file", "allow", path={"glob": "**/*.md"}),
        {"tool": "write_*", "decision": "ask"},
        mode="auto",
    )
    assert decide(rules, call("write_file", path="secrets/a.md", content="")) == "deny"
    assert decide(rules, call("write_file", path="docs/a.md", content="")) == "run"
    assert decide(rules, call("write_file", path="a.py", content="")) == "ask"
    assert decide(rules, call("edit_file", path="a.py")) == "run"


@pytest.mark.parametrize("mode", ["auto", "ask", "deny", "allowlist"])
def test_a_rule_decides_in_every_mode(mode: str) -> None:
    for decision, verdict in (("allow", "run"), ("ask", "ask"), ("deny", "deny")):
        for name in ("read_file", "write_file", "shell_execute"):
            rules = profile({"tool": name, "decision": decision}, mode=mode)
            operation = call(name, path="a", command="ls")
            assert decide(rules, operation) == verdict
            found = judge(rules, operation, set())
            assert found.rule is not None
            assert found.rule.startswith('policies.0 {"tool": "')


def test_the_mode_has_no_rule() -> None:
    assert judge(profile(), call("write_file", path="a"), set()).rule is None


def test_an_answer_for_the_thread_is_for_the_rule_that_asked() -> None:
    rules = profile(
        when("write_file", "deny", path={"glob": "a"}),
        when("write_file", "ask", path={"glob": "b*"}),
    )
    asked = judge(rules, call("write_file", path="b1"), set())
    granted = {grant("write_file", asked.rule), "hash of b1"}
    assert decide(rules, call("write_file", path="b2"), granted) == "run"
    assert decide(rules, call("write_file", path="c"), granted) == "ask"
    assert decide(rules, call("write_file", path="a"), granted) == "deny"
    by_mode = {grant("write_file", None)}
    assert decide(rules, call("write_file", path="c"), by_mode) == "run"
    assert decide(rules, call("write_file", path="b1"), by_mode) == "ask"
    changed = profile(when("write_file", "ask", path={"glob": "**"}))
    assert decide(changed, call("write_file", path="b1"), granted) == "ask"


def test_an_answer_for_a_command_beats_no_rule_that_denies_it() -> None:
    granted = {"shell_execute", "hash"}
    assert decide(profile(commands("ask", "rm")), shell("rm a"), granted) == "run"
    assert decide(profile(commands("deny", "rm")), shell("rm a"), granted) == "deny"


def test_two_long_rules_that_begin_the_same_are_told_apart() -> None:
    names = {
        rule.name
        for last in ("a", "b")
        for rule in rules(profile(commands("ask", *["x" * 50] * 9, last)))
    }
    assert len(names) == 2
    assert all(len(name) < RULE_CHARS_MAX + 50 for name in names)


# -- commands that are allowed by their beginning


CAREFUL: Final = profile(
    commands("allow", "git status", "git diff", "git log", "ls", "cat", "find", "sort", "echo"),
    mode="auto",
)


def allowing(*prefixes: str) -> Profile:
    return profile(commands("allow", *prefixes), {"tool": "*", "decision": "deny"}, mode="auto")


@pytest.mark.parametrize(
    "command",
    [
        "git status",
        "git status --short -- src",
        "  git   status  ",
        "git status && ls -la src; git diff --stat",
        "git log --oneline | cat",
        "git diff 2>&1 >/dev/null",
        "git status # what has changed",
        "(cd_is_not_here=1; true) 2>/dev/null || ls",
        "if git diff --quiet; then ls; fi",
        "'git' \"status\"",
        "ls 'a b' \"c;d\" e\\ f",
        "ls\nls",
        "find . -name '*.py'",
        "sort -u a.txt",
    ],
)
def test_what_begins_as_the_profile_allows_runs(command: str) -> None:
    allowed = allowing("git status", "git diff", "git log", "ls", "cat", "find", "sort", "true")
    expected = "deny" if "=1" in command else "run"
    assert decide(allowed, shell(command)) == expected


#: Each begins with what is allowed, or looks like it, and runs `pwn` or writes a file all the same.
ESCAPES: Final = (
    "git status; pwn",
    "git status;pwn",
    "git status & pwn",
    "git status && pwn",
    "git nothing || pwn",
    "git status | pwn",
    "git status |& pwn",
    "git status\npwn",
    "git status # \npwn",
    "git status \\\n; pwn",
    "git status $(pwn)",
    'git status "$(pwn)"',
    "git status `pwn`",
    'git status "`pwn`"',
    "git status ${x:-$(pwn)}",
    "git status ${x:=`pwn`}",
    'git status "${x:-$(pwn)}"',
    "git status $((0+$(pwn)0))",
    "git status <(pwn)",
    "git status > >(pwn)",
    "git status <<E\n$(pwn)\nE",
    "git status <<E\n`pwn`\nE",
    "git status <<'E'\nx\nE\npwn",
    "git status <<-E\n\tx\n\tE\npwn",
    "ls <<< $(pwn)",
    "git status > new",
    "git status >> new",
    "git status >| new",
    "git status 2> new",
    "git status &> new",
    "git status >& new",
    "git status <> new",
    "git status > $'new'",
    "> new git status",
    "x=$(pwn) git status",
    "PATH=/nowhere:$PATH; pwn; git status",
    "GIT=$(pwn); git status",
    "(git status; pwn)",
    "{ git status; pwn; }",
    "if git status; then pwn; fi",
    "for x in $(pwn); do git status; done",
    "for x in 1; do pwn; done; git status",
    "while pwn; do git status; break; done",
    "until ! pwn; do break; done; git status",
    "case x in x) pwn;; esac; git status",
    "git() { pwn; }; git status",
    "ls() { pwn; }\nls",
    "function git { pwn; }; git status",
    "alias ls=pwn\nls",
    "shopt -s expand_aliases\nalias ls=pwn\nls",
    "! pwn; git status",
    "eval pwn; git status",
    "exec pwn git status",
    "command pwn git status",
    "env pwn git status",
    "nohup pwn git status",
    "timeout 5 pwn git status",
    "nice pwn git status",
    "sh -c pwn git status",
    "sh -c 'git status; pwn'",
    "bash -c 'pwn' git status",
    "echo git status | xargs pwn",
    "find . -maxdepth 0 -exec pwn \\;",
    "find . -maxdepth 0 -ok pwn \\; </dev/null; pwn",
    "find . -maxdepth 0 -exec sh -c pwn \\;",
    "find . -maxdepth 0 -fprint new",
    "sort -o new /dev/null",
    "sort -unonew /dev/null",
    "sort --outp=new /dev/null",
    "git status '\n' ; pwn",
    'git status "\'" ; pwn ; echo "\'"',
    "git status \\' ; pwn ; echo \\'",
    "git status $'\\'' ; pwn ; echo $'\\''",
    "git status $'x\\'y'; pwn #'",
    "ls {,}; pwn",
    "coproc pwn; wait; git status",
    "time pwn; git status",
    "[[ 1 && $(pwn) ]]; git status",
    "((x=$(pwn)0)); git status",
    "a=($(pwn)); git status",
    "x='a[$(pwn)]'; git status $((x))",
    "x='$(pwn)'; git status ${x@P}",
    "trap pwn EXIT; git status",
    "$(echo pwn); git status",
    "p''wn; git status",
    "p\\wn; git status",
    "pw${nothing}n; git status",
)


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A folder of programs: `git`, and `pwn`, which leaves a file where it was run."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, line in (("git", '[ "$1" = status ]'), ("pwn", ': > "$MARK"')):
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "work").mkdir()
    return folder


def does_more(command: str, stubs: Path) -> bool:
    """Whether a command runs `pwn`, or writes a file, in one of the shells that there are."""
    work, mark = stubs.parent / "work", stubs.parent / "mark"
    for name in ("sh", "dash", "bash"):
        found = shutil.which(name)
        if found is None:
            continue
        subprocess.run(
            [found, "-c", command],
            cwd=work,
            env={"PATH": f"{stubs}:/usr/bin:/bin", "MARK": str(mark)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=10,
            check=False,
        )
        if mark.exists() or any(work.iterdir()):
            return True
    return False


@pytest.mark.parametrize("command", ESCAPES)
def test_no_way_to_do_more_is_allowed_by_a_beginning(command: str, stubs: Path) -> None:
    assert does_more(command, stubs), "or this is no way to do more"
    allowed = allowing("git status", "ls", "find", "sort", "echo", "true")
    assert decide(allowed, shell(command)) == "deny"
    asking = profile(commands("allow", "git status", "ls", "find", "sort", "echo"))
    assert decide(asking, shell(command)) == "ask"


@pytest.mark.parametrize(
    "command",
    [
        "git diff --output=new",
        "git diff --outp new",
        "git diff --ext-diff",
        "git diff --no-index /dev/null /etc/hosts",
        "git log --textconv",
        "git -c core.pager=pwn log",
        "git --exec-path=/tmp status",
        "git",
        "git statusx",
        "gits tatus",
        "gitstatus",
        "./git status",
        "/tmp/git status",
        "LS",
        "lsx",
        "ls *",
        "ls ?.txt",
        "ls [a]",
        "ls ~",
        "ls $HOME",
        "ls {a,b}",
        "ls < /etc/passwd",
        "cat /etc/passwd >&2 2>&3",
        "ls\u00a0",
        "ls\r",
        "ls \0",
        "",
        " ",
        "# ls",
        "sudo ls",
        "find . -delete",
        "find -files0-from x",
        "x=1 ls",
        "ls 12>x",
        "ls " + "a" * 20_000,
    ],
    ids=lambda command: command[:30],
)
def test_what_is_not_certain_to_be_allowed_is_not(command: str) -> None:
    allowed = allowing("git status", "git diff", "git log", "ls", "cat", "find")
    assert decide(allowed, shell(command)) == "deny"


def test_a_prefix_that_names_an_option_allows_it() -> None:
    assert decide(allowing("find . -delete"), shell("find . -delete")) == "run"
    assert decide(allowing("git -c a=b log"), shell("git -c a=b log -3")) == "run"


def test_a_command_that_runs_another_is_allowed_word_for_word() -> None:
    allowed = allowing("timeout 5 ls", "sh -c ls", "env", "sed -n 1p a")
    for command in ("timeout 5 ls", "sh -c ls", "sh -c 'ls'", "env", "sed -n 1p a"):
        assert decide(allowed, shell(command)) == "run"
    for command in ("timeout 5 ls -l", "sh -c ls -c pwn", "env pwn", "sed -n 1p a -e 1e"):
        assert decide(allowed, shell(command)) == "deny"


def test_an_interpreter_is_allowed_with_what_the_prefix_has_it_run() -> None:
    allowed = allowing("python -m pytest", "node", "perl -e")
    assert decide(allowed, shell("python -m pytest -q tests")) == "run"
    for command in ("node -e x", "node x.js", "perl -e x", "python -c x"):
        assert decide(allowed, shell(command)) == "deny"
    assert decide(allowed, shell("node")) == "run"


# -- commands that are denied


@pytest.mark.parametrize(
    "command",
    [
        "rm x",
        "/bin/rm x",
        "RM x",
        "r''m x",
        "\\rm x",
        "ls; rm x",
        "ls $(rm x)",
        "ls `rm x`",
        "(rm x)",
        "! rm x",
        "if ls; then rm x; fi",
        "for i in 1; do rm $i; done",
        "x=1 rm x",
        ">y rm x",
        "rm x <<E\nE",
        "rm $x",
        "sudo -n rm x",
        "env -i A=1 rm x",
        "timeout -k 1 5 rm x",
        "nohup rm x &",
        "ls | xargs -n1 rm",
        "find . -exec rm {} +",
        "sh -c 'ls; rm x'",
        "bash -lc \"sh -c 'rm x'\"",
        "eval 'rm x'",
        "command rm x",
        "exec rm x",
        "busybox rm x",
        "rm \\\n x",
    ],
)
@pytest.mark.parametrize("rule", ["prefix", "pattern", "shell"])
def test_what_is_denied_is_denied_wherever_it_stands(command: str, rule: str) -> None:
    policy = {
        "prefix": commands("deny", "rm"),
        "pattern": when("shell_execute", "deny", command={"pattern": ["rm", "rm *"]}),
        "shell": {"kind": "shell", "denyPatterns": ["rm", "rm *"]},
    }[rule]
    assert decide(profile(policy, mode="auto"), shell(command)) == "deny"


@pytest.mark.parametrize(
    "command",
    [
        "$x x",
        "$(echo rm) x",
        "/bin/r? x",
        "f() { rm x; }; f",
        "case x in x) rm x;; esac",
        "alias a=rm\na x",
        'sh -c "$x"',
        "eval $x",
        "$'\\x72m' x",
        "ls <(rm x)",
        "awk 'BEGIN { system(\"rm x\") }'",
        "python -c 'import os; os.system(\"rm x\")'",
        "sudo " + "-n " * 100 + "rm x",
        "ls " + "a" * 20_000,
    ],
    ids=lambda command: command[:30],
)
def test_a_person_is_asked_where_it_is_not_certain_that_a_command_is_not_the_denied_one(
    command: str,
) -> None:
    for policy in (commands("deny", "rm"), {"kind": "shell", "denyPatterns": ["rm *"]}):
        verdict = judge(profile(policy, mode="auto"), shell(command), set())
        assert verdict.decision == "ask"
        assert verdict.rule is not None


@pytest.mark.parametrize(
    "command",
    [
        "ls",
        "echo rm x",
        "ls # rm x",
        "cat <<E\nrm x\nE",
        "git commit -m 'rm x; rm y'",
        "for i in 1; do wc $i; done",
        "rmx",
        "ls -rm",
        "find . -name rm",
    ],
)
def test_what_is_certain_not_to_be_denied_runs(command: str) -> None:
    for policy in (commands("deny", "rm"), {"kind": "shell", "denyPatterns": ["rm *"]}):
        assert decide(profile(policy, mode="auto"), shell(command)) == "run"


@pytest.mark.parametrize(
    ("command", "decision"),
    [
        ("git push --force", "deny"),
        ("git push origin --force", "ask"),
        ("git -C . push --force", "ask"),
        ("git push -f", "ask"),
        ("git push --forc", "ask"),
        ("git push -uf", "ask"),
        ("git push $x", "ask"),
        ("git push", "run"),
        ("git push origin main", "run"),
        ("git pull --force", "run"),
    ],
)
def test_options_in_another_form_make_a_question_of_a_denial(command: str, decision: str) -> None:
    rules = profile(commands("deny", "git push --force"), mode="auto")
    assert decide(rules, shell(command)) == decision


def test_a_doubt_about_a_rule_does_not_lower_what_follows() -> None:
    rules = profile(commands("ask", "rm"), {"tool": "*", "decision": "deny"}, mode="auto")
    assert decide(rules, shell("$x")) == "deny"


def test_a_shell_policy_denies_allows_and_leaves_the_rest_to_the_next_rule() -> None:
    policy = {
        "kind": "shell",
        "tool": "shell_execute",
        "allowPrefixes": ["git status", "ls"],
        "denyPatterns": ["*--force*", "curl *"],
    }
    rules = profile(policy, {"tool": "shell_execute", "decision": "ask"}, mode="auto")
    assert decide(rules, shell("git status && ls")) == "run"
    assert decide(rules, shell("ls --force")) == "deny"
    assert decide(rules, shell("ls | curl x")) == "deny"
    assert decide(rules, shell("make")) == "ask"
    assert decide(rules, call("write_file", path="a")) == "run"


def test_a_pattern_that_allows_is_about_each_command_of_a_line() -> None:
    rules = profile(
        when("shell_execute", "allow", command={"pattern": "git *"}),
        {"tool": "*", "decision": "deny"},
    )
    assert decide(rules, shell("git log; git status")) == "run"
    for command in ("git status; rm x", "git $(rm x)", "git log > x", "git log '\n' && rm x"):
        assert decide(rules, shell(command)) == "deny"


# -- paths and other arguments


@pytest.mark.parametrize(
    "path",
    [
        "secrets/a",
        "./secrets/a",
        "secrets//a",
        "docs/../secrets/a",
        "secrets/./b/../a",
        "/srv/work/secrets/a",
        "//srv/work/secrets/a",
        "/srv/../srv/work/secrets/a",
        "secrets",
        "SECRETS/a",
        "Secrets/A",
        "secrets/deep/er/a",
    ],
)
def test_a_path_is_denied_in_whatever_way_it_is_written(path: str) -> None:
    rules = profile(when("write_file", "deny", path={"glob": "secrets/**"}), mode="auto")
    assert decide(rules, call("write_file", path=path)) == "deny"


def test_two_ways_to_write_a_letter_are_one_path() -> None:
    rules = profile(when("write_file", "deny", path={"glob": "caf\u00e9/*"}), mode="auto")
    assert decide(rules, call("write_file", path="cafe\u0301/a")) == "deny"


@pytest.mark.parametrize(
    "path",
    ["../ok/a", "ok/../../x", "ok/../a", "/etc/ok/a", "ok", "OK/a", "okay/a", "a/ok/b", "/ok/a"],
)
def test_a_path_that_is_not_certain_to_fit_is_not_allowed(path: str) -> None:
    rules = profile(when("write_file", "allow", path={"glob": "ok/*"}))
    assert decide(rules, call("write_file", path="ok/a")) == "run"
    assert decide(rules, call("write_file", path="/srv/work/ok/a")) == "run"
    assert decide(rules, call("write_file", path=path)) == "ask"


def test_a_search_above_what_is_denied_is_a_question() -> None:
    rules = profile(when("*", "deny", path={"glob": "secrets/**"}), mode="auto")
    assert decide(rules, call("grep", pattern="x", path="secrets")) == "deny"
    assert decide(rules, call("grep", pattern="x", path=".")) == "ask"
    assert decide(rules, call("grep", pattern="x")) == "ask"
    assert decide(rules, call("grep", pattern="x", path="src")) == "run"
    assert decide(rules, call("read_file", path="src")) == "run"


def test_an_absolute_pattern_is_about_absolute_paths() -> None:
    rules = profile(when("fs__*", "deny", path={"glob": "/etc/**"}), mode="auto")
    for path in ("/etc/passwd", "../../etc/passwd", "//etc/passwd"):
        assert decide(rules, call("fs__read", path=path)) == "deny"
    assert decide(rules, call("fs__read", path="etc/passwd")) == "run"


def test_a_list_fits_when_all_of_it_is_allowed_or_any_of_it_denied() -> None:
    allow = profile(when("fs__*", "allow", paths={"glob": "ok/*"}))
    deny = profile(when("fs__*", "deny", paths={"glob": "ok/*"}), mode="auto")
    for paths, allowed, denied in (
        (["ok/a", "ok/b"], "run", "deny"),
        (["ok/a", "x"], "ask", "deny"),
        (["x"], "ask", "run"),
        ([{"path": "ok/a"}], "ask", "ask"),
        ({"path": "ok/a"}, "ask", "ask"),
        (7, "ask", "ask"),
    ):
        assert decide(allow, call("fs__read", paths=paths)) == allowed
        assert decide(deny, call("fs__read", paths=paths)) == denied


def test_equals_compares_values_and_their_types() -> None:
    rules = profile(when("fs__x", "allow", force={"equals": False}, n={"equals": 1}))
    assert decide(rules, call("fs__x", force=False, n=1)) == "run"
    for force, number in ((0, 1), (True, 1), (False, True), (False, "1"), (None, 1)):
        assert decide(rules, call("fs__x", force=force, n=number)) == "ask"


def test_a_value_of_another_kind_may_be_the_denied_one_for_another_program() -> None:
    theirs = Tool("shop__delete", "", {}, no_call, origin="shop")
    rules = profile(when("shop__delete", "deny", id={"equals": 5}), mode="auto")
    for value, decision in ((5, "deny"), ("5", "ask"), (5.0, "ask"), ([5], "ask"), (6, "run")):
        assert decide(rules, Operation(theirs, {"id": value}, "hash", ROOTS)) == decision
    ours = profile(when("edit_file", "deny", replace_all={"equals": True}), mode="auto")
    assert decide(ours, call("edit_file", path="a", replace_all=False)) == "run"


def test_all_conditions_of_a_rule_must_hold() -> None:
    rules = profile(
        when("edit_file", "deny", path={"glob": "*.py"}, new_text={"pattern": "*eval(*"}),
        mode="auto",
    )
    assert decide(rules, call("edit_file", path="a.py", new_text="x = EVAL(y)")) == "deny"
    assert decide(rules, call("edit_file", path="a.md", new_text="eval(y)")) == "run"
    assert decide(rules, call("edit_file", path="a.py", new_text="y")) == "run"
    assert decide(rules, call("edit_file", path="a.py")) == "run"


def test_a_pattern_takes_linear_time() -> None:
    rules = profile(when("fs__x", "deny", text={"pattern": "*a" * 200 + "b"}), mode="auto")
    assert decide(rules, call("fs__x", text="a" * 20_000)) == "run"


# -- profiles that cannot be used


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ({"tool": "x"}, "expected: a tool and a decision;"),
        ({"decision": "allow"}, "expected: a tool and a decision;"),
        ({"tool": "*", "decision": "permit"}, "expected: 'allow', 'ask' or 'deny'."),
        ({"tool": "*", "decison": "deny"}, "There is no field 'policies.0.decison'; did you mean"),
        (
            {"tool": "*", "decision": "deny", "When": {}},
            "There is no field 'policies.0.When'; did you mean 'when'?",
        ),
        (commands("deny"), "should have at least 1 item"),
        (when("*", "deny", path={}), "expected: exactly one of prefix, glob, pattern and equals."),
        (when("*", "deny", path={"glob": "a", "pattern": "a"}), "expected: exactly one of"),
        (
            when("*", "deny", path={"gob": "a"}),
            "There is no field 'policies.0.when.path.gob'; did you mean 'glob'?",
        ),
        (when("*", "deny", path={"glob": "../a"}), "expected: a pattern of paths in"),
        (when("*", "deny", path={"glob": "a/"}), "expected: a pattern of paths in"),
        (when("*", "deny", path={"glob": "./a"}), "expected: a pattern of paths in"),
        (when("*", "deny", path={"glob": ""}), "should have at least 1 character"),
        (when("*", "deny", path={"equals": None}), "expected: exactly one of"),
        (commands("allow", "git status;"), "expected: the first words of one command"),
        (commands("allow", "git status | cat"), "expected: the first words of one command"),
        (commands("allow", "ls *"), "expected: the first words of one command"),
        (commands("deny", "ls 'a"), "expected: the first words of one command"),
        (commands("deny", "A=1 ls"), "expected: the first words of one command"),
        (commands("deny", "! ls"), "expected: the first words of one command"),
        (commands("deny", "(ls)"), "expected: the first words of one command"),
        (commands("deny", "ls 2>&1"), "expected: the first words of one command"),
        (commands("deny", "if"), "expected: the first words of one command"),
        (commands("deny", " "), "expected: the first words of one command"),
        (commands("deny", "ls # x"), "expected: the first words of one command"),
        ({"kind": "shell"}, "expected: allowPrefixes or denyPatterns"),
        ({"kind": "shell", "allowPrefixes": ["ls;"]}, "expected: the first words of one command"),
        (
            {"kind": "shell", "denyPatterns": ["x"], "decision": "deny"},
            "expected: allowPrefixes or denyPatterns, and neither when nor decision",
        ),
        (
            {"kind": "shell", "denyPatterns": ["x"], "allowDangerous": True},
            "There is no field 'policies.0.allowDangerous'; did you mean",
        ),
        (
            {"tool": "wirte_file", "decision": "deny"},
            "'policies.0' can never fit: there is no tool 'wirte_file'; did you mean 'write_file'?",
        ),
        ({"tool": "writ-*", "decision": "deny"}, "there is no tool 'writ-*'"),
        (
            {"tool": "sever__*", "decision": "deny"},
            "'policies.0' can never fit: no MCP server or service is named 'sever', did you mean",
        ),
        ({"tool": "a b", "decision": "deny"}, "String should match pattern"),
        (
            when("write_file", "deny", pth={"glob": "a"}),
            "can never fit: write_file has no argument 'pth'; did you mean 'path'?",
        ),
        (when("*_file", "deny", command={"prefix": "a"}), "*_file has no argument 'command'"),
        (when("shell_execute", "deny", command={"glob": "rm"}), "glob is for paths;"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value)[:40],
)
def test_a_rule_that_is_wrong_or_can_never_fit_makes_the_profile_unusable(
    tmp_path: Path, policy: dict[str, Any], sentence: str
) -> None:
    write_profile(tmp_path, "p", policies=[policy])
    (broken,) = Profiles(tmp_path, KNOWN).broken()
    assert sentence in broken.message


@pytest.mark.parametrize(
    "policy",
    [
        {"tool": "server__*", "decision": "ask"},
        {"tool": "*__delete", "decision": "deny"},
        {"tool": "own_*__delete", "decision": "deny"},
        when("server__x", "deny", anything={"glob": "a"}),
        when("*", "deny", anything={"pattern": "a"}),
        {"kind": "shell", "denyPatterns": ["x"]},
        {"tool": "*_file", "decision": "deny"},
    ],
    ids=str,
)
def test_a_rule_may_be_about_tools_that_are_not_known_yet(
    tmp_path: Path, policy: dict[str, Any]
) -> None:
    write_profile(tmp_path, "p", policies=[policy])
    assert Profiles(tmp_path, KNOWN).broken() == []


@pytest.mark.parametrize("first", ["*", "write_file", "write_*"])
def test_a_rule_behind_one_that_fits_all_its_calls_is_a_mistake(tmp_path: Path, first: str) -> None:
    rules = [{"tool": first, "decision": "allow"}, when("write_file", "deny", path={"glob": "a"})]
    write_profile(tmp_path, "p", policies=rules)
    (broken,) = Profiles(tmp_path, KNOWN).broken()
    assert "'policies.1' can never fit: the first rule that fits decides" in broken.message
    write_profile(tmp_path, "p", policies=rules[::-1])
    assert Profiles(tmp_path, KNOWN).broken() == []


def test_a_run_keeps_rules_as_they_are() -> None:
    kept = profile(
        {"kind": "shell", "allowPrefixes": ["ls"], "denyPatterns": ["rm *"]},
        when("write_file", "deny", path={"glob": ["a", "b"]}, content={"equals": "x"}),
    )
    assert Profile.restore(kept.dump()) == kept
    assert list(rules(Profile.restore(kept.dump()))) == list(rules(kept))


@pytest.mark.parametrize("properties", [None, [], {"path": True}, {"path": {"type": "string"}}])
def test_a_schema_of_another_program_may_say_anything_of_an_argument_that_is_left_out(
    properties: Any,
) -> None:
    tool = Tool("server__x", "", {"type": "object", "properties": properties}, no_call)
    rules = profile(when("server__x", "deny", path={"glob": "a"}), mode="auto")
    assert decide(rules, Operation(tool, {}, "hash", ROOTS)) == "run"
    assert decide(rules, Operation(tool, {"path": "a"}, "hash", ROOTS)) == "deny"
