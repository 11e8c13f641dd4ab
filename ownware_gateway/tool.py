"""How a Python tool of a profile says what its signature and its docstring cannot.

It imports nothing that is large: it is loaded in the process of a tool. docs/custom-tools.md has
the rules for files that hold tools.
"""

from collections.abc import Callable
from typing import Any, Final, TypeVar, overload

#: The attribute of a function that holds what was said about it.
ATTRIBUTE: Final = "__ownware_tool__"

F = TypeVar("F", bound=Callable[..., Any])


class ToolError(Exception):
    """What the model is told in these very words, without the exception's name."""


@overload
def tool(function: F, /) -> F: ...


@overload
def tool(
    *, reads_only: bool = False, safe_to_repeat: bool = False, timeout: str | float | None = None
) -> Callable[[F], F]: ...


def tool(
    function: F | None = None,
    /,
    *,
    reads_only: bool = False,
    safe_to_repeat: bool = False,
    timeout: str | float | None = None,
) -> F | Callable[[F], F]:
    """Say more about a function that is a tool; the function itself stays as it is.

    `reads_only`: it changes nothing, so that mode `ask` asks nobody; it is then safe to repeat too.
    `safe_to_repeat`: a call that a crash cut off may be made again. `timeout`: how long a call may
    take, in seconds or as `"30s"`, `"2m"`.
    """

    def mark(marked: F) -> F:
        said = {"reads_only": reads_only, "safe_to_repeat": safe_to_repeat, "timeout": timeout}
        setattr(marked, ATTRIBUTE, said)
        return marked

    return mark if function is None else mark(function)
