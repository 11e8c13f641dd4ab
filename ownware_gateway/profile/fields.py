"""What the fields of a profile have in common."""

import re
from typing import Annotated, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel

_UNITS_MS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

#: Fields whose values may be secrets: they are shown to nobody.
SECRET_FIELDS: Final = frozenset({"auth", "env", "headers", "inject"})

#: Forms of names, and how a person is told of them.
PROFILE_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
MODEL_NAME: Final = r"^[a-z][a-z0-9_-]*:.+$"
SERVER_NAME: Final = r"^[A-Za-z0-9]+(?:(?:_|-+)[A-Za-z0-9]+)*$"
IN_WORDS: Final = {
    PROFILE_NAME: "letters, digits and . _ - only, the first one a letter or a digit",
    MODEL_NAME: "provider:model, like openai:gpt-5.5",
    SERVER_NAME: "letters, digits, - and single _ between them",
}


def parse_duration_ms(value: object) -> object:
    """Return milliseconds from `"30m"`, `"90s"`, `"2h"`, `"1d"`, or a number of milliseconds."""
    if isinstance(value, str) and (
        found := re.fullmatch(r"([0-9]{1,15})\s*(ms|s|m|h|d)", value.strip())
    ):
        return int(found[1]) * _UNITS_MS[found[2]]
    if isinstance(value, str):
        raise ValueError('a duration like "30m", "90s", "2h" or "1d", or milliseconds')
    return value


DurationMs = Annotated[int, BeforeValidator(parse_duration_ms), Field(gt=0, le=30 * 86_400_000)]


class Strict(BaseModel):
    """A frozen part of a profile: camelCase, no other fields, no value of another kind."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=False,
        validate_by_alias=True,
        serialize_by_alias=True,
        extra="forbid",
        frozen=True,
        strict=True,
        defer_build=True,
    )


def one_or_more(value: object) -> object:
    """Return a list, also of what stands alone."""
    return [value] if isinstance(value, str) else value


def absent(value: object) -> bool:
    """Whether a field was left out, so that it is not written either."""
    return value is None
