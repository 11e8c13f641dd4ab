"""Names of tools that others offer, as providers of models take them."""

import hashlib
import re
from typing import Final

from ownware_gateway.profile import SEPARATOR

#: What OpenAI and Anthropic take as the name of a tool, and how long it may be.
NAME_CHARS_MAX: Final = 64
_NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9_-]")

_DIGEST_CHARS: Final = 8


def tool_name(server: str, wire_name: str, *, distinct: bool = False) -> str:
    """Return `server__tool`; where it had to be changed beyond recognition, with a digest."""
    name = f"{server}{SEPARATOR}{_NOT_IN_NAMES.sub('_', wire_name)}"
    return _short(name, wire_name, distinct=distinct)


def argument_name(wire_name: str, *, distinct: bool = False) -> str:
    """Return the name of an argument as providers take it, with a digest likewise."""
    return _short(re.sub(r"[^A-Za-z0-9_.-]", "_", wire_name) or "_", wire_name, distinct=distinct)


def _short(name: str, wire_name: str, *, distinct: bool) -> str:
    if len(name) <= NAME_CHARS_MAX and not distinct:
        return name
    digest = hashlib.sha256(wire_name.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_CHARS]
    return f"{name[: NAME_CHARS_MAX - _DIGEST_CHARS - 1]}_{digest}"
