"""Whether what a profile names is there: tools, servers, arguments of tools."""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from ownware_gateway.profile import SEPARATOR, Profile
from ownware_gateway.profile.rules import SHELL, Policy


class Known(NamedTuple):
    """What a profile may name: tools, and the gateway's MCP servers and services as they are now.

    `tools` holds the schemas of each one's arguments, by their names.
    """

    tools: Mapping[str, Mapping[str, Any]]
    servers: Callable[[], Collection[str]] = tuple
    services: Callable[[], Collection[str]] = tuple


def wrong_name(profile: Profile, known: Known) -> str | None:
    """Return what a profile names and there is not, as a sentence; None when all is there.

    A misspelt name in `deny`, or in a rule, would leave on what was to be taken away.
    """
    if both := sorted({*profile.tools.mcp} & {*profile.tools.services}):
        return (
            f"The fields 'tools.mcp' and 'tools.services' both have {both[0]!r}: of which of them "
            f"would {both[0]}{SEPARATOR}tool be?"
        )
    for name in profile.functions:
        if name in known.tools:
            return f"The function {name!r} in tools/ has the name of a tool that is built in."
    own = {name: dict.fromkeys(taken) for name, taken in profile.functions.items()}
    known = known._replace(tools={**known.tools, **own})
    servers = _servers_named(profile, known)
    for field in ("allow", "deny"):
        for name in getattr(profile.tools, field):
            if (wrong := _unknown(name, known.tools, servers)) is not None:
                return f"The field 'tools.{field}' names no tool with {name!r}; {wrong}"
    for index, policy in enumerate(profile.policies):
        wrong = _never(policy, known, servers) or _hidden(policy, profile.policies[:index])
        if wrong is not None:
            return f"The field 'policies.{index}' can never fit: {wrong}"
    return None


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names := sorted(names), n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names) or 'none'}."


def _servers_named(item: Profile, known: Known) -> set[str]:
    """Return the servers and services whose tools a profile may name."""
    names = (*item.tools.allow, *item.tools.deny, *(policy.tools for policy in item.policies))
    # The gateway's are read from files: not for a profile that names none.
    named = any(SEPARATOR in name for name in names)
    gateway = (*known.servers(), *known.services()) if named else ()
    return {*item.tools.mcp, *item.tools.services, *gateway}


def _unknown(name: str, tools: Collection[str], servers: Collection[str]) -> str | None:
    """Return what is wrong with the name of a tool; an MCP server's tools come and go."""
    server, separator, tool = name.partition(SEPARATOR)
    if separator and tool:
        return _no_server(server, servers)
    return None if name in tools else _near(name, tools)


def _no_server(name: str, servers: Collection[str]) -> str | None:
    """Return that there is no such MCP server or service; None when there is."""
    if name in servers:
        return None
    return f"no MCP server or service is named {name!r}, {_near(name, servers)}"


def _never(policy: Policy, known: Known, servers: Collection[str]) -> str | None:
    """Return why a rule fits no call of any tool; None when it may fit one."""
    server, separator, _ = policy.tools.partition(SEPARATOR)
    if separator:
        # What a server's tools are called, and take, is only known when it runs.
        return None if {"*", "?"} & set(server) else _no_server(server, servers)
    matched = [name for name in known.tools if fnmatchcase(name, policy.tools)]
    if not matched:
        return f"there is no tool {policy.tools!r}; {_near(policy.tools, known.tools)}"
    if policy.tools == "*":
        return None  # Tools of servers are meant too.
    for argument in policy.arguments:
        names = {name for tool in matched for name in known.tools[tool]}
        if argument not in names:
            return f"{policy.tools} has no argument {argument!r}; {_near(argument, names)}"
    for argument, condition in policy.when.items():
        if SHELL in matched and argument == "command" and condition.glob is not None:
            return "glob is for paths; prefix and pattern are for commands."
    return None


def _hidden(policy: Policy, before: Sequence[Policy]) -> str | None:
    """Return why a rule is never reached: one before it fits whatever it does."""
    for index, other in enumerate(before):
        covers = other.tools in ("*", policy.tools) or (
            not set(policy.tools) & {"*", "?"} and fnmatchcase(policy.tools, other.tools)
        )
        if other.kind == "rule" and not other.when and covers:
            return f"the first rule that fits decides, and policies.{index} fits every such call."
    return None
