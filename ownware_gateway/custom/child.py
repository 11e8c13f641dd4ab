"""The process of a profile's tools: describes the functions of its files, or calls one, and ends.

It is run as a script. A request comes as JSON on standard input, files included: what is run is
what the gateway has read and not what stands on the disk by then. Two lines go to a descriptor of
their own, so that whatever is printed is progress: an empty one when nothing but the profile's code
is left to be run, and the answer as JSON.
"""

import importlib
import inspect
import json
import os
import resource
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec, spec_from_file_location, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple, get_type_hints

import pydantic_core
from pydantic import ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema

#: The package that a profile's files make up, for those that import each other.
PACKAGE: Final = "tools"

#: The longest answer, in bytes: far more than reaches a model.
ANSWER_BYTES_MAX: Final = 4 * 1_048_576

#: Files and connections that a tool may have open.
OPEN_FILES_MAX: Final = 512

#: How much of a traceback the gateway's log gets, and of a message the model.
TRACEBACK_CHARS_MAX: Final = 8_000
MESSAGE_CHARS_MAX: Final = 4_000

#: Wrong arguments that are told.
PROBLEMS_SHOWN_MAX: Final = 5

_NO_WRITER: Final = 3


class NoTool(Exception):
    """A function that cannot be a tool; the message says why, for words after its name."""


# -- the profile's files, as modules


class Files:
    """Imports the files of a profile from the request: a finder and a loader as importlib has them.

    Without its base classes, whose module takes a tenth of the time of a call to import.
    """

    def __init__(self, folder: str, files: dict[str, str]) -> None:
        self._folder = folder
        self._files = files

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return where a module of the profile comes from; None for any other."""
        if fullname == PACKAGE:
            spec = ModuleSpec(PACKAGE, None, is_package=True)
            spec.submodule_search_locations = []
            return spec
        if self._file(fullname) not in self._files:
            return None
        loader: Any = self
        return spec_from_loader(fullname, loader, origin=self.get_filename(fullname))

    def _file(self, fullname: str) -> str:
        package, _, name = fullname.rpartition(".")
        return f"{name}.py" if package == PACKAGE else ""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the import system to make the module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Run the file."""
        name = module.__name__
        code = compile(self.get_source(name), self.get_filename(name), "exec", dont_inherit=True)
        exec(code, module.__dict__)  # noqa: S102 - this is what an import does

    def get_filename(self, fullname: str) -> str:
        """Return where its file lies, so that it finds what lies beside it."""
        return os.path.join(self._folder, self._file(fullname))

    def get_source(self, fullname: str) -> str:
        """Return its text, for tracebacks too."""
        return self._files[self._file(fullname)]

    def is_package(self, fullname: str) -> bool:
        """Return that it has no modules of its own."""
        return False


def _have_own_package() -> None:
    """Make the gateway's package importable, wherever it lies: tools use its `tool` module."""
    init = Path(__file__).parents[1] / "__init__.py"
    spec = spec_from_file_location(init.parent.name, init)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)


def _function(file: str, name: str) -> Callable[..., Any]:
    """Import a file and return one of its functions. Raises NoTool, and whatever the file does."""
    module = importlib.import_module(f"{PACKAGE}.{file.removesuffix('.py')}")
    function = getattr(module, name, None)
    if not callable(function):
        raise NoTool("is no function when the file has been run")
    return function  # type: ignore[no-any-return]


# -- signatures


class _Untitled(GenerateJsonSchema):
    """As pydantic's, without a title for each field, which says its name once more."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


class Arguments(NamedTuple):
    """What a function takes: a pydantic model whose fields have the parameters as aliases.

    The fields have names of our own since those of parameters may be a model's own, as `copy` is.
    """

    model: Any
    names: dict[str, str]


def arguments_of(function: Callable[..., Any]) -> Arguments:
    """Return what a function takes. Raises NoTool."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
        hints = get_type_hints(inspect.unwrap(function), include_extras=True)
    except Exception as error:
        raise NoTool(f"has a type hint that cannot be used: {_said(error)}") from error
    fields: dict[str, Any] = {}
    names: dict[str, str] = {}
    for index, parameter in enumerate(parameters):
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise NoTool(f"takes {parameter}; each parameter must be one that has a name")
        if parameter.name not in hints:
            raise NoTool(f"has no type hint for {parameter.name!r}")
        default = ... if parameter.default is parameter.empty else parameter.default
        field = f"p{index}"
        names[field] = parameter.name
        fields[field] = (hints[parameter.name], Field(default, alias=parameter.name))
    try:
        config = ConfigDict(extra="forbid")
        model = create_model("Arguments", __config__=config, **fields)
    except (PydanticUserError, TypeError, ValueError, NameError) as error:
        raise NoTool(f"has a type hint that cannot be described: {_said(error)}") from error
    return Arguments(model, names)


def schema_of(arguments: Arguments) -> dict[str, Any]:
    """Return the JSON schema of what a function takes. Raises NoTool."""
    try:
        with warnings.catch_warnings():
            # Of a default that is no JSON: it is left out, and the function knows it.
            warnings.simplefilter("ignore")
            schema: dict[str, Any] = arguments.model.model_json_schema(schema_generator=_Untitled)
    except PydanticUserError as error:
        raise NoTool(f"has a type hint that cannot be described: {_said(error)}") from error
    schema.pop("title", None)
    schema.setdefault("properties", {})
    return schema


# -- what is asked


def describe(wanted: list[dict[str, str]]) -> dict[str, Any]:
    """Return the tools among functions, and for the others why they are none."""
    tools: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    failed: dict[str, str] = {}
    for item in wanted:
        file, name = item["file"], item["name"]
        if file in failed:
            left_out[name] = failed[file]
            continue
        try:
            tools[name] = _described(_function(file, name))
        except NoTool as why:
            left_out[name] = f"{name!r} in {PACKAGE}/{file} {why}."
        except BaseException as error:  # noqa: BLE001 - the file may do anything
            traceback.print_exc()
            failed[file] = left_out[name] = f"{PACKAGE}/{file} cannot be run: {_said(error)}."
    return {"tools": tools, "leftOut": left_out}


def _described(function: Callable[..., Any]) -> dict[str, Any]:
    # Only now: where the package lies, `main` has told.
    marked = getattr(function, importlib.import_module("ownware_gateway.tool").ATTRIBUTE, {})
    return {"schema": schema_of(arguments_of(function)), **marked}


def call(file: str, name: str, given: dict[str, Any], memory_mb: int) -> dict[str, Any]:
    """Return what a function gave back, as text, or why there is nothing."""
    try:
        function = _function(file, name)
        values = _checked(function, given)
        if isinstance(values, str):
            return {"error": values}
        result = function(**values)
        if inspect.isawaitable(result):
            # Only now: it takes a third of the time of a call that needs none.
            result = importlib.import_module("asyncio").run(_awaited(result))
        text = _text(result)
    except MemoryError as error:
        said = f"MemoryError: it needs more than the {memory_mb} MiB that it may have."
        return {"error": said, "traceback": _traced(error)}
    except BaseException as error:  # noqa: BLE001 - the function may raise anything
        return {"error": _said(error), "traceback": _traced(error)}
    return {"text": text}


def _checked(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any] | str:
    """Return the arguments as the function wants them, or what is wrong with them.

    Without the values, which may be secrets. What was not given is left to the function.
    """
    arguments = arguments_of(function)
    try:
        taken = arguments.model.model_validate_json(json.dumps(given))
    except ValidationError as error:
        problems = error.errors(include_input=False, include_url=False)[:PROBLEMS_SHOWN_MAX]
        said = "; ".join(
            ": ".join(filter(None, (".".join(map(str, problem["loc"])), problem["msg"])))
            for problem in problems
        )
        return f"The arguments do not fit: {said}."
    return {arguments.names[field]: getattr(taken, field) for field in taken.model_fields_set}


async def _awaited(result: Any) -> Any:
    return await result


def _text(result: Any) -> str:
    if result is None:
        return "[nothing returned]"
    if isinstance(result, str):
        return result
    return pydantic_core.to_json(result, by_alias=True).decode()


def _said(error: BaseException) -> str:
    """Return an exception as a model is told of it; where it comes from stands in the log."""
    try:
        message = str(error)[:MESSAGE_CHARS_MAX]
    except Exception:  # noqa: BLE001 - it is code of the profile too
        message = "it cannot be said why"
    kind = type(error).__name__
    plain = type(error) is ValueError or kind == "ToolError"
    return message if plain and message else f"{kind}: {message}" if message else kind


def _traced(error: BaseException) -> str:
    with suppress(Exception):
        return "".join(traceback.format_exception(error))[-TRACEBACK_CHARS_MAX:]
    return type(error).__name__


# -- the process


def _limit(memory_mb: int, cpu_s: int) -> None:
    """Set the limits for all that follows; those that a system does not know are left out."""
    for kind, value in (
        (resource.RLIMIT_AS, memory_mb * 1_048_576),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_NOFILE, OPEN_FILES_MAX),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):
            _, hard = resource.getrlimit(kind)
            most = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (most, most))


def _request() -> dict[str, Any]:
    """Read what is asked; leave at once when the gateway is gone before it was whole."""
    text = sys.stdin.buffer.read()
    if not text.endswith(b"\n"):
        os._exit(_NO_WRITER)
    # Nothing is left to be read: a tool has no input.
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    request: dict[str, Any] = json.loads(text)
    return request


def main() -> None:
    """Do what is asked, once."""
    own, descriptor = os.getpid(), int(sys.argv[1])
    pipe = os.fstat(descriptor)
    os.set_inheritable(descriptor, False)  # noqa: FBT003 - by position alone
    request = _request()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _limit(request["memoryMb"], request["cpuS"])
    _have_own_package()
    sys.meta_path.insert(0, Files(request["folder"], request["files"]))
    os.write(descriptor, b"\n")
    wanted = request["call"]
    if wanted is None:
        answer = describe(request["functions"])
    else:
        answer = call(wanted["file"], wanted["name"], wanted["arguments"], request["memoryMb"])
    if os.getpid() != own:
        os._exit(0)  # The tool has forked, and both have come back.
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    now = os.fstat(descriptor)
    if (now.st_dev, now.st_ino) != (pipe.st_dev, pipe.st_ino):
        os._exit(_NO_WRITER)  # It was closed, and is a file of the tool's by now.
    left = memoryview(_line(answer))
    while left:
        left = left[os.write(descriptor, left) :]


def _line(answer: dict[str, Any]) -> bytes:
    line = json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    if len(line) > ANSWER_BYTES_MAX:
        most = ANSWER_BYTES_MAX // 1_048_576
        return _line({"error": f"It returned {len(line)} bytes; at most {most} MiB can be taken."})
    return line


if __name__ == "__main__":
    main()
