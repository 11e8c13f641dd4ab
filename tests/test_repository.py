"""What a clone must be: whole, the same everywhere, and free of the machine that it was made on."""

import contextlib
import http.client
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ownware_gateway import __version__
from tests.gateway import FAKE_KEY

ROOT = Path(__file__).parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

LOCKS = ("requirements.lock", "requirements-dev.lock")
GROUPS = {"requirements.lock": ("build",), "requirements-dev.lock": ("build", "test", "check")}

#: A pinned requirement with its marker, then nothing but hashes.
LOCKED = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9.-]*)==(?P<version>[0-9][0-9a-z.]*)(?P<marker> ; [^\\]+?)?"
    r"(?P<hashes>(?: --hash=sha256:[0-9a-f]{64})+)"
)

#: Folders that no clone has. The other folders of a person's machine begin like these.
MACHINE = re.compile(r"(?<![\w.~}\])])/(?:root|work|opt|home/\w+|Users/\w+)/\w|file:/{3}")

#: What a gateway imports when it is first used; the last line are packages that it may talk to
#: models or tools with one day, and that are large.
LAZY = {
    *("genai_prices", "jsonschema", "limits", "referencing", "yaml"),
    *("anthropic", "google", "httpx", "mcp", "ollama", "openai", "pydantic_ai", "requests"),
}

#: The packages that a start does import, with what they need themselves.
LOADED = {
    *("aiohttp", "aiohappyeyeballs", "aiosignal", "attr", "frozenlist", "idna", "multidict"),
    *("propcache", "yarl"),
    *("pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"),
    *("aiosqlite", "platformdirs", "ownware_gateway"),
}


def files() -> Iterator[Path]:
    """Every text file of a clone: what .gitignore leaves."""
    ignored = {
        line.strip("/\n") for line in (ROOT / ".gitignore").read_text("utf-8").split() if line
    }
    for folder, names, files in os.walk(ROOT):
        names[:] = [name for name in names if name not in {".git", *ignored}]
        yield from (Path(folder) / name for name in files)


def read(path: Path) -> str:
    return path.read_text("utf-8", errors="replace")


def locked(lock: str) -> list[re.Match[str]]:
    """The requirements of a lock file, each of which must be one."""
    joined = re.sub(r" \\\n\s+", " ", read(ROOT / lock)).splitlines()
    found = [LOCKED.fullmatch(line) for line in joined]
    odd = [line[:80] for line, match in zip(joined, found, strict=True) if match is None]
    assert odd == []
    return [match for match in found if match is not None]


def run_python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=25,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_file_names_a_folder_of_the_machine_it_was_written_on() -> None:
    # A clone in a folder of the root, such as /app, has a name that texts may hold.
    own = re.escape(f"{ROOT}") if len(ROOT.parts) > 2 else "$^"
    named = {
        str(path.relative_to(ROOT)): found
        for path in files()
        if (found := re.findall(f"{MACHINE.pattern}|{own}", read(path)))
    }
    assert named == {}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_file_holds_pinned_requirements_with_hashes_and_nothing_else(lock: str) -> None:
    assert len(locked(lock)) > 20


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_file_is_in_step_with_the_project(lock: str) -> None:
    wanted = list(PYPROJECT["project"]["dependencies"])
    for group in GROUPS[lock]:
        wanted += PYPROJECT["dependency-groups"][group]
    pinned: dict[str, list[str]] = {}
    for match in locked(lock):
        pinned.setdefault(canonicalize_name(match["name"]), []).append(match["version"])
    for text in wanted:
        requirement = Requirement(text)
        versions = pinned.get(canonicalize_name(requirement.name))
        assert versions, f"{lock} lacks {requirement.name}; run make lock"
        assert all(map(requirement.specifier.contains, versions)), f"{text}: {versions}"


def test_the_locked_build_backend_is_the_one_that_builds() -> None:
    assert PYPROJECT["build-system"]["requires"] == PYPROJECT["dependency-groups"]["build"]


def test_the_tests_run_with_the_very_packages_that_serve() -> None:
    # What more the tests need may widen where a package is wanted, which is all that a marker says.
    serving, testing = (
        {re.sub(r" ; .*?(?= --hash)", "", match[0]) for match in locked(lock)} for lock in LOCKS
    )
    assert serving - testing == set()


def test_every_module_can_be_imported_first() -> None:
    """A cycle of imports works from one end only."""
    package = ROOT / "ownware_gateway"
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in package.rglob("*.py")
    )
    assert len(modules) > 20
    code = """
import importlib, json, sys, traceback
failed = {}
for name in sys.argv[1:]:
    for known in [m for m in sys.modules if m.partition(".")[0] == "ownware_gateway"]:
        del sys.modules[known]
    try:
        importlib.import_module(name)
    except Exception:
        failed[name] = traceback.format_exc()
print(json.dumps(failed))
"""
    assert json.loads(run_python(code, *modules)) == {}


def imported(log: str) -> set[str]:
    """The modules in what `-X importtime` says."""
    lines = [line.split("|") for line in log.splitlines() if line.startswith("import time:")]
    return {line[2].strip() for line in lines}


def test_a_start_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    """The start of a gateway with a key, up to all that it prints and the answer to a request."""
    python = (sys.executable, "-X", "importtime")
    bare = subprocess.run([*python, "-c", ""], capture_output=True, text=True, timeout=25)
    log = tmp_path / "log"
    folders = ("--data-dir", str(tmp_path / "data"), "--profiles", str(ROOT / "profiles"))
    with log.open("w") as errors:
        gateway = subprocess.Popen(
            [*python, "-m", "ownware_gateway", "serve", "--port", "0", *folders],
            cwd=ROOT,
            env={**os.environ, "OPENAI_API_KEY": FAKE_KEY, "OLLAMA_HOST": "127.0.0.1:1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert gateway.stdout is not None
        address = urlsplit(gateway.stdout.readline().split()[-1]).netloc
        assert any(line.startswith("Models") for line in iter(gateway.stdout.readline, ""))
        client = http.client.HTTPConnection(address, timeout=10)
        with contextlib.closing(client):
            client.request("GET", "/api/v1/health")
            assert client.getresponse().status == 200
    finally:
        gateway.terminate()
        gateway.communicate(timeout=25)
    loaded = imported(log.read_text("utf-8")) - imported(bare.stderr)
    assert "ownware_gateway.engine" in loaded
    assert loaded & LAZY == set()
    assert loaded & {"ownware_gateway.compaction", "ownware_gateway.relief"} == set()
    packages = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names - LOADED
    # What was looked for and is not installed stands in the log as well; the first is Python's own.
    new = {name for name in packages if importlib.util.find_spec(name) is not None}
    assert {name for name in new if not name.startswith("_sysconfigdata")} == set()


def test_the_version_is_the_same_everywhere() -> None:
    assert PYPROJECT["project"]["version"] == __version__


def test_the_license_is_whole() -> None:
    text = read(ROOT / "LICENSE")
    assert "Apache License\n                           Version 2.0" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "The Ownware Gateway authors" in text


def test_continuous_integration_runs_the_command_of_the_readme() -> None:
    (command,) = re.findall(r"nodejs curl' && (.+)", read(ROOT / "README.md"))
    script = ROOT / ".ci" / "run"
    assert f"\n{command} || status=1\n" in read(script)
    assert os.access(script, os.X_OK)


def test_what_the_makefile_offers_is_what_the_documents_name() -> None:
    targets = set(re.findall(r"^([a-z][a-z ]*):", read(ROOT / "Makefile"), re.MULTILINE))
    names = {name for target in targets for name in target.split()}
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    fenced = r"^(?:[A-Z_]+=\S+ )?make ([a-z]+)|`make ([a-z]+)`|&& make ([a-z]+)$"
    named = {
        next(filter(None, found))
        for path in documents
        for found in re.findall(fenced, read(path), re.MULTILINE)
    }
    assert {"serve", "test", "check", "live", "browser", "soak", "lock"} <= named
    assert named - names == set()
