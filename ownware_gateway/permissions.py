"""May this call run? A pure decision from the profile, the tool and what a person has granted."""

import hashlib
import hmac
import json
from collections.abc import Set
from dataclasses import dataclass
from typing import Any, Final, Literal

from ownware_gateway.profile import Profile
from ownware_gateway.tools import Tool

#: What each preset of a profile contains, by tool name; `full` is every tool there is.
READONLY: Final = frozenset({"read_file", "list_files", "glob", "grep", "web_search", "todo_write"})
CODING: Final = READONLY | {"write_file", "edit_file", "shell_execute", "web_fetch"}
_PRESETS: Final = {"coding": CODING, "readonly": READONLY, "none": frozenset[str]()}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What happens with a call, and why; the reason is shown to the person or the model."""

    decision: Literal["run", "ask", "deny"]
    reason: str


def allowed_tools(profile: Profile, tools: dict[str, Tool]) -> dict[str, Tool]:
    """Return the tools that a profile's agent has: its preset, plus `allow`, minus `deny`."""
    preset = _PRESETS.get(profile.tools.preset)
    return {
        name: tool
        for name, tool in tools.items()
        if (preset is None or name in preset or name in profile.tools.allow)
        and name not in profile.tools.deny
    }


def judge(profile: Profile, tool: Tool, operation: str, grants: Set[str]) -> Verdict:
    """Return whether a call runs, needs a person's yes, or is refused.

    `operation` is the call's hash; `grants` holds what a person has allowed for the rest of the
    thread: the name of a tool, or for a tool with a subject (the shell) the very operation.
    """
    mode = profile.security.permission_mode
    if mode == "auto":
        return Verdict("run", "the profile runs every tool without asking")
    if mode == "allowlist":
        if tool.name in profile.tools.allow:
            return Verdict("run", "the profile's tools.allow names it")
        return Verdict(
            "deny", f"The profile only runs what its tools.allow names, not {tool.name}."
        )
    if tool.reads_only:
        return Verdict("run", "it only reads")
    if mode == "deny":
        return Verdict("deny", f"The profile lets no tool change anything, and {tool.name} may.")
    if (operation if tool.subject else tool.name) in grants:
        return Verdict("run", "a person allowed it for the rest of this thread")
    return Verdict("ask", f"{tool.name} may change something; the profile asks first.")


def stricter(one: Verdict, other: Verdict) -> Verdict:
    """Return the verdict that lets less happen."""
    return max(one, other, key=lambda verdict: ("run", "ask", "deny").index(verdict.decision))


def operation_hash(secret: bytes, tool_name: str, arguments: dict[str, Any]) -> str:
    """Return what binds a decision to a tool and its exact input.

    Keyed, so that what is masked in the request cannot be guessed from it.
    """
    text = json.dumps([tool_name, arguments], sort_keys=True, separators=(",", ":"))
    return hmac.new(secret, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
