"""Which functions in a profile's `tools/*.py` are tools, read without running any of it."""

import ast
import hashlib
import re
import warnings
from collections.abc import Mapping
from importlib.util import decode_source
from pathlib import Path
from typing import Final, NamedTuple

#: Beside the profile's other files.
FOLDER: Final = "tools"

#: Most files, and bytes of them together: they are read whenever a run starts.
FILES_MAX: Final = 64
BYTES_MAX: Final = 262_144

#: Most tools of one profile.
FUNCTIONS_MAX: Final = 64

#: What providers take as the name of a tool; two underscores stand between a server and its tool.
_NAME: Final = re.compile(r"(?!.*__)[A-Za-z][A-Za-z0-9_]{0,63}")


class Function(NamedTuple):
    """A function that is a tool: where it stands, what it takes, what it says of itself."""

    name: str
    file: str
    parameters: tuple[str, ...]
    doc: str


def read_code(folder: Path) -> dict[str, bytes]:
    """Return the Python files in a profile's folder of tools, by name.

    Raises OSError, and ValueError with a sentence when they are too many or too large.
    """
    found: dict[str, bytes] = {}
    left = BYTES_MAX
    for path in sorted((folder / FOLDER).glob("*.py")):
        if path.name.startswith(".") or not path.is_file():
            continue
        with path.open("rb") as opened:
            found[path.name] = opened.read(left + 1)
        left -= len(found[path.name])
        if left < 0:
            raise ValueError(f"The files of {FOLDER}/ have more than {BYTES_MAX} bytes together.")
        if len(found) > FILES_MAX:
            raise ValueError(f"There are more than {FILES_MAX} Python files in {FOLDER}/.")
    return found


def digest(code: Mapping[str, bytes]) -> str:
    """Return what tells these files, names and contents, from any others."""
    hashed = hashlib.sha256()
    for name, text in sorted(code.items()):
        hashed.update(f"{len(name.encode())} {name} {len(text)} ".encode() + text)
    return hashed.hexdigest()


def functions(code: Mapping[str, bytes]) -> dict[str, Function]:
    """Return the functions that are tools, by name: those at the top of a file, but for `_name`.

    A file called `_name.py` holds none. Raises ValueError with a sentence for a file that is no
    Python, and for names that no tool, or two tools, would have.
    """
    found: dict[str, Function] = {}
    for file, text in code.items():
        if file.startswith("_"):
            continue
        where = f"{FOLDER}/{file}"
        if not file.removesuffix(".py").isidentifier():
            raise ValueError(f"{where} must be called like a Python module: letters, digits, _.")
        for function in _functions_of(file, text, where):
            other = found.get(function.name)
            if other is not None and other.file != file:
                raise ValueError(
                    f"{where} and {FOLDER}/{other.file} both hold a function {function.name!r}."
                )
            found[function.name] = function
    if len(found) > FUNCTIONS_MAX:
        raise ValueError(
            f"{FOLDER}/ holds {len(found)} functions that are tools; {FUNCTIONS_MAX} are allowed. "
            "Begin the names of those that are none with _."
        )
    return found


def _functions_of(file: str, text: bytes, where: str) -> list[Function]:
    found = []
    for node in _parse(text, where).body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name[0] == "_":
            continue
        if not _NAME.fullmatch(node.name):
            raise ValueError(
                f"{where}: {node.name!r} cannot be the name of a tool, which has up to 64 letters, "
                "digits and single _. Begin it with _ if it is none."
            )
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        names = tuple(argument.arg for argument in arguments)
        found.append(Function(node.name, file, names, ast.get_docstring(node) or ""))
    return found


def _parse(text: bytes, where: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            # Of an escape that Python does not know, for example; it is told when the file is run.
            warnings.simplefilter("ignore")
            return ast.parse(decode_source(text), where)
    except SyntaxError as error:
        at = f" at line {error.lineno}" if error.lineno else ""
        raise ValueError(f"{where} is no Python: {error.msg}{at}.") from None
    except (ValueError, RecursionError, MemoryError):
        raise ValueError(f"{where} is no Python that can be read.") from None
