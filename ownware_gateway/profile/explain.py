"""What is wrong with a file, in sentences that a person can act on."""

import difflib
import json
import re
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError

from ownware_gateway.profile.fields import IN_WORDS, SECRET_FIELDS

PROBLEMS_SHOWN_MAX: Final = 5


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return a validation's problems as sentences: field path, expected, nearest known name."""
    problems = error.errors()
    said = [_explain_one(problem, model) for problem in problems[:PROBLEMS_SHOWN_MAX]]
    if len(problems) > PROBLEMS_SHOWN_MAX:
        said.append(f"And {len(problems) - PROBLEMS_SHOWN_MAX} more.")
    return " ".join(said)


def _explain_one(problem: Any, model: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        names = _names(model, problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(names)}."
        return f"There is no field {path!r}; {hint}"
    if problem["type"] == "missing":
        return f"The field {path!r} is required."
    if problem["type"] in ("mcp_server", "service"):
        return f"The field {path!r} is wrong: {problem['msg']}."
    expected = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    expected = re.sub(r"a valid dictionary or instance of \w+", "an object", expected)
    expected = IN_WORDS.get(problem.get("ctx", {}).get("pattern"), expected)
    if not SECRET_FIELDS.isdisjoint(problem["loc"]):
        return f"The field {path!r} is of another kind; expected: {expected}."
    try:
        given = json.dumps(problem["input"], default=str)
    except (TypeError, ValueError):  # YAML has keys, and loops, that JSON has not
        given = str(problem["input"])
    given = given if len(given) <= 80 else given[:77] + "..."
    if problem["loc"][-1:] == ("[key]",):
        within = ".".join(str(part) for part in problem["loc"][:-2])
        return f"The name {given} in {within!r} cannot be used; expected: {expected}."
    return f"The field {path!r} is {given}; expected: {expected}."


def _names(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Return the field names that are known at a path of a model, as they stand in a file."""
    kind: Any = model
    for part in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields = kind.model_fields.items()
            found = [info.annotation for name, info in fields if part in (name, info.alias)]
        else:
            # The number of an item or the name of an entry: what is in the list or object.
            found = list(get_args(kind)[-1:])
        if not found:
            return []
        kind = found[0]
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return []
    return [info.alias or name for name, info in kind.model_fields.items() if not info.exclude]
