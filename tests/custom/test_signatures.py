"""What functions become for a model: schemas from signatures, descriptions from docstrings."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ownware_gateway.custom import docstrings, named
from ownware_gateway.profile import Profile
from ownware_gateway.profile.folder import Profiles
from ownware_gateway.profile.functions import digest
from ownware_gateway.profile.names import Known
from ownware_gateway.tools import Context, ToolFailed
from tests.custom import own_tools, write_tools

MakeProfile = Callable[..., Path]

FUNCTIONS = '''
from __future__ import annotations

import asyncio
import enum
import functools
import json as _json
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Literal, Optional

from pydantic import BaseModel, Field

from ownware_gateway.tool import ToolError, tool

class Unit(enum.Enum):
    METRIC = "metric"
    OTHER = "other"

@dataclass
class Place:
    lat: float
    lon: float

class Report(BaseModel):
    title: str
    lines: list[str] = []

def _helper(): ...

def basic(text: str, count: int, share: float, yes: bool) -> dict:
    """Take what is plain."""
    return {"text": text, "count": count, "share": share, "yes": yes}

def defaults(words: list[str], counts: dict[str, int] = {}, unit: Unit = Unit.METRIC,
             kind: Literal["a", "b"] = "a", note: Optional[str] = None) -> dict:
    """Take what has defaults."""
    return {"words": words, "unit": repr(unit), "kind": kind, "note": note, "counts": counts}

def models(place: Place, report: Report | None = None, day: date | None = None) -> Report:
    """Take what has parts."""
    return Report(title=type(place).__name__, lines=[str(place.lat), str(day), repr(report)])

def limits(size: Annotated[int, Field(ge=1, le=9, description="How much.")], *, copy: bool = False,
           model_config: str = "x", sentinel: object = object()) -> bool:
    """Take what is limited.

    Args:
        size: Never seen.
        copy (bool): Whether to copy,
            or not.
        absent: Not there.

    Returns:
        Something.
    """
    return copy

@tool(timeout="90s")
@functools.cache
def wrapped(text: str) -> tuple:
    """Be wrapped."""
    return (text, 1)

@tool(reads_only=True)
async def later(text: str) -> str:
    """Be later."""
    await asyncio.sleep(0)
    raise ToolError(text)

def undocumented(x: int): return x

def untyped(x) -> int:
    """Lack a hint."""
    return x

def many(*things: int) -> int:
    """Take many."""
    return 1

def strange(call: __import__("threading").Lock) -> int:
    """Take what no model can write."""
    return 1

def unknown(call: NoSuchType) -> int:
    """Take what there is not."""
    return 1

@tool(timeout="soon")
def impatient() -> int:
    """Have an odd limit."""
    return 1
'''


async def test_a_signature_becomes_a_schema_and_its_values(
    tmp_path: Path, make_profile: MakeProfile
) -> None:
    profile = make_profile("mine", tools={"custom": {"timeout": "5s"}})
    write_tools(profile, all=FUNCTIONS)
    async with own_tools(profile, tmp_path / "work") as (own, read):
        tools, missing = own.tools(read), own.missing(read)

        def taken(name: str) -> Any:
            return tools[name].input_schema["properties"]

        async def result(name: str, **arguments: Any) -> str:
            return (await tools[name].call(Context(tmp_path), arguments)).text

        assert set(tools) == {"basic", "defaults", "models", "limits", "wrapped", "later"}
        assert tools["basic"].input_schema == {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "count": {"type": "integer"},
                "share": {"type": "number"},
                "yes": {"type": "boolean"},
            },
            "required": ["text", "count", "share", "yes"],
            "additionalProperties": False,
        }
        assert tools["defaults"].input_schema["required"] == ["words"]
        assert taken("defaults")["kind"] == {
            "default": "a",
            "enum": ["a", "b"],
            "type": "string",
        }
        assert tools["defaults"].input_schema["$defs"]["Unit"]["enum"] == ["metric", "other"]
        assert taken("limits")["size"] == {
            "type": "integer",
            "minimum": 1,
            "maximum": 9,
            "description": "How much.",
        }
        assert taken("limits")["copy"]["description"] == "Whether to copy, or not."
        assert tools["limits"].description == "Take what is limited."
        assert [tools[name].timeout_s for name in ("basic", "wrapped")] == [100, 185]
        assert tools["later"].reads_only
        assert tools["later"].safe_to_repeat
        assert not tools["basic"].safe_to_repeat
        assert {name: why.split(" in tools/all.py ")[-1] for name, why in missing.items()} == {
            "undocumented": "is no tool: it has no docstring, which is what a model knows of it.",
            "untyped": "has no type hint for 'x'.",
            "many": "takes *things: 'int'; each parameter must be one that has a name.",
            "strange": missing["strange"].split(" in tools/all.py ")[-1],
            "unknown": "has a type hint that cannot be used: "
            "NameError: name 'NoSuchType' is not defined.",
            "impatient": "is no tool: its timeout 'soon' must be seconds, or a text like "
            '"30s"; above 0, and at most a day.',
        }
        assert "'strange' in tools/all.py has a type hint that cannot be" in missing["strange"]

        assert await result("defaults", words=["a"], unit="other") == (
            '{"words":["a"],"unit":"<Unit.OTHER: \'other\'>","kind":"a","note":null,"counts":{}}'
        )
        assert await result(
            "models", place={"lat": 1, "lon": 2}, report={"title": "x"}, day="2026-01-02"
        ) == ('{"title":"Place","lines":["1.0","2026-01-02","Report(title=\'x\', lines=[])"]}')
        assert await result("limits", size=1, copy=True) == "true"
        assert await result("wrapped", text="ü 𝄞") == '["ü 𝄞",1]'
        with pytest.raises(ToolFailed, match="do not fit: Invalid JSON"):
            await result("wrapped", text="half a character, \ud800")
        with pytest.raises(ToolFailed, match=r"^Not today\.$"):
            await result("later", text="Not today.")
        with pytest.raises(ToolFailed) as failed:
            await result("limits", size=10, other="a secret")
        assert str(failed.value) == (
            "The arguments do not fit: size: Input should be less than or equal to 9; "
            "other: Extra inputs are not permitted."
        )


async def test_the_example_of_the_documents_works(
    tmp_path: Path, make_profile: MakeProfile
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "custom-tools.md").read_text("utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    profile = make_profile("mine")
    write_tools(profile, weather=example)
    lines: list[str] = []
    async with own_tools(profile, tmp_path / "work") as (own, read):
        forecast = own.tools(read)["forecast"]
        said = forecast.input_schema["properties"]["city"]["description"]
        assert said == "Which city, by its English name."
        output = await forecast.call(Context(tmp_path, progress=lines.append), {"city": "Bern"})
        assert output.text == '{"city":"Bern","days":1,"sky":"clear"}'
        assert lines == ["asking for Bern"]
        with pytest.raises(ToolFailed, match=r"^There is no weather station in Atlantis\.$"):
            await forecast.call(Context(tmp_path), {"city": "Atlantis"})


GOOGLE = """Do it.

More of it: with a colon.

Args:
    city (str, optional): Where: in a city.
    days: How long,
        in days.

    *rest: The others.

Raises:
    ValueError: When not.
"""

NUMPY = """Do it.

More of it: with a colon.

Parameters
----------
city : str, optional
    Where: in a city.
days : int
    How long,
    in days.
rest
    The others.

Returns
-------
dict
    What came of it.
"""

SPHINX = """Do it.

More of it: with a colon.

:param str city: Where: in a city.
:param days: How long,
    in days.
:param rest: The others.
:type rest: list
:returns: what: it is
"""


@pytest.mark.parametrize("doc", [GOOGLE, NUMPY, SPHINX])
def test_a_docstring_is_taken_apart_whichever_habit_it_follows(doc: str) -> None:
    found = docstrings.parse(doc)
    assert found.text == "Do it.\n\nMore of it: with a colon."
    assert found.parameters == {
        "city": "Where: in a city.",
        "days": "How long, in days.",
        "rest": "The others.",
    }


@pytest.mark.parametrize("doc", ["", "Do it.", "Args", "Example of a: thing\n\n- a: b\n- c: d"])
def test_a_docstring_of_no_habit_is_a_description(doc: str) -> None:
    assert docstrings.parse(doc) == (doc, {})


# -- what the folder reader sees, without running anything


def reads(profile: Path, **known: dict[str, Any]) -> Profile | str:
    """The profile, or what is wrong with it."""
    profiles = Profiles(profile.parent, Known({"grep": {"path": {}}, **known}))
    broken = [item.message for item in profiles.broken() if item.folder == profile.name]
    return broken[0] if broken else profiles.get(profile.name)


GOOD = "def work(city: str, *, days=1): ...\nasync def rest(): ...\ndef _no(): ...\nx = len\n"


def test_functions_are_known_by_name_before_anything_is_run(make_profile: MakeProfile) -> None:
    policies = [{"tool": "work", "when": {"city": {"equals": "x"}}, "decision": "deny"}]
    profile = make_profile("mine", tools={"deny": ["rest"]}, policies=policies)
    write_tools(profile, a="raise SystemExit\n" + GOOD, _b="def other(): ...")
    read = reads(profile)
    assert isinstance(read, Profile)
    assert read.functions == {"work": ["city", "days"], "rest": []}
    assert Profile.restore(read.dump()).functions == read.functions
    make_profile("mine", tools={"deny": ["rset"]})
    assert reads(profile) == (
        "mine: The field 'tools.deny' names no tool with 'rset'; did you mean 'rest'?"
    )
    make_profile("mine", policies=[{**policies[0], "when": {"town": {"equals": "x"}}}])
    assert "work has no argument 'town'" in str(reads(profile))
    make_profile("mine", tools={"custom": {"enabled": False}})
    assert getattr(reads(profile), "functions", None) == {}


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        ({"a": "def (:"}, "mine/tools/a.py is no Python: invalid syntax at line 1."),
        ({"a": "-" * 99_999 + "1"}, "mine/tools/a.py is no Python that can be read."),
        ({"a": "\0"}, "mine/tools/a.py is no Python"),
        ({"a": "def grep(): ..."}, "The function 'grep' in tools/ has the name of a tool"),
        ({"a": "def a__b(): ..."}, "mine/tools/a.py: 'a__b' cannot be the name of a tool"),
        ({"a": "def größe(): ..."}, "mine/tools/a.py: 'größe' cannot be the name of a tool"),
        ({"a": f"def {'x' * 65}(): ..."}, "cannot be the name of a tool"),
        ({"a": GOOD, "b": GOOD}, "mine/tools/b.py and tools/a.py both hold a function 'work'."),
        ({"a-b": GOOD}, "mine/tools/a-b.py must be called like a Python module"),
        ({"a": "#" * 262_145}, "mine: The files of tools/ have more than 262144 bytes together."),
        ({f"a{n}": "" for n in range(65)}, "mine: There are more than 64 Python files in tools/."),
        (
            {"a": "".join(f"def f{n}(): ...\n" for n in range(65))},
            "mine/tools/ holds 65 functions that are tools; 64 are allowed.",
        ),
    ],
)
def test_files_that_can_hold_no_tools_are_named(
    make_profile: MakeProfile, files: dict[str, str], wrong: str
) -> None:
    profile = make_profile("mine")
    write_tools(profile, **files)
    assert wrong in str(reads(profile))
    # Another profile is not taken down.
    assert isinstance(reads(profile.parent / "assistant"), Profile)


def test_what_files_are_is_told_by_all_that_is_in_them() -> None:
    codes = [{}, {"a": b"b"}, {"a": b"", "b": b""}, {"a": b"1 b 0 "}, {"a": b"", "1": b"b"}]
    assert len({digest(code) for code in codes}) == len(codes)
    assert digest({"a": b"1", "b": b"2"}) == digest({"b": b"2", "a": b"1"})


def test_functions_are_named_in_a_sentence() -> None:
    assert named({"a": 1}) == "'a'"
    assert named(dict.fromkeys("ab")) == "'a' and 'b'"
    assert named(dict.fromkeys("abcdefgh")) == "'a', 'b', 'c', 'd', 'e' and 3 more"
