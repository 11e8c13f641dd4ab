"""May this call run? A pure decision from the profile, the tool and what a person has granted."""

import hashlib
import hmac
import json
from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from ownware_gateway.profile import BROUGHT, SEPARATOR, Profile
from ownware_gateway.tools import Tool

if TYPE_CHECKING:
    from ownware_gateway.policies import Operation, Rule

#: What each preset of a profile contains, by tool name; `full` is every tool there is.
READONLY: Final = frozenset(
    {"read_file", "list_files", "glob", "grep", "read_output", "web_search", "todo_write"}
    | {"ask_user"}
)
CODING: Final = READONLY | {"write_file", "edit_file", "shell_execute", "web_fetch"}
_PRESETS: Final = {"coding": CODING, "readonly": READONLY, "none": frozenset[str]()}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What happens with a call, and why; the reason is shown to the person or the model.

    `rule` is what decided: a rule of the profile or a floor; None for the mode. `client`: it is a
    tool of the client's, who runs it.
    """

    decision: Literal["run", "ask", "deny", "client"]
    reason: str
    rule: str | None = None


def allowed_tools(profile: Profile, tools: dict[str, Tool]) -> dict[str, Tool]:
    """Return the tools that a profile's agent has: its preset, plus `allow`, minus `deny`.

    Its own under any preset are the tools of the MCP servers and services that it declares itself,
    the functions in its folder, and those of `BROUGHT` that it brings, which nothing else gives it.
    """
    preset = _PRESETS.get(profile.tools.preset)
    return {
        name: tool
        for name, tool in tools.items()
        if (
            name in profile.brings
            if name in BROUGHT
            else (
                preset is None
                or name in preset
                or profile.tools.allows(name)
                # By their origin: a server may have the very name of a tool that is built in.
                or (bool(tool.origin) and _is_own(profile, name))
            )
        )
        and not profile.tools.denies(name)
    }


def _is_own(profile: Profile, name: str) -> bool:
    return name in profile.functions or profile.tools.declares(name.partition(SEPARATOR)[0])


def judge(profile: Profile, operation: "Operation", grants: Set[str]) -> Verdict:
    """Return whether a call runs, needs a person's yes, or is refused.

    The first rule that fits decides, and where none does, the mode. A rule before it that asks or
    denies and cannot be ruled out makes it a question at least. `grants` holds what a person has
    allowed for the rest of the thread, as `grant` names it, or the very operation where the tool
    says that only that counts; it answers questions and beats no refusal.
    """
    from ownware_gateway.policies import fits, rules

    doubt: Verdict | None = None
    verdict: Verdict | None = None
    for rule in rules(profile):
        match fits(rule, operation):
            case "yes":
                verdict = _by_rule(rule, operation, grants)
                break
            case "maybe" if doubt is None:
                reason = f"It is not certain that this is not meant by {rule.name}"
                doubt = _ask(operation, grants, Verdict("ask", reason, rule.name))
    if verdict is None:
        verdict = _by_mode(profile, operation, grants)
    return verdict if doubt is None else stricter(verdict, doubt)


def _by_rule(rule: "Rule", operation: "Operation", grants: Set[str]) -> Verdict:
    match rule.decision:
        case "allow":
            return Verdict("run", "a rule of the profile allows it", rule.name)
        case "ask":
            reason = f"A rule of the profile asks first: {rule.name}"
            return _ask(operation, grants, Verdict("ask", reason, rule.name))
        case "deny":
            reason = f"A rule of the profile denies this: {rule.name}"
            return Verdict("deny", reason, rule.name)


def _by_mode(profile: Profile, operation: "Operation", grants: Set[str]) -> Verdict:
    tool, mode = operation.tool, profile.security.permission_mode
    if mode == "auto":
        return Verdict("run", "the profile runs every tool without asking")
    if mode == "allowlist":
        if profile.tools.allows(tool.name):
            return Verdict("run", "the profile's tools.allow names it")
        return Verdict(
            "deny", f"The profile only runs what its tools.allow names, not {tool.name}."
        )
    if tool.reads_only:
        return Verdict("run", "it only reads")
    if mode == "deny":
        return Verdict("deny", f"The profile lets no tool change anything, and {tool.name} may.")
    verdict = Verdict("ask", f"{tool.name} may change something; the profile asks first.")
    return _ask(operation, grants, verdict)


def _ask(operation: "Operation", grants: Set[str], verdict: Verdict) -> Verdict:
    """Return the question, or that it has been answered for the rest of the thread."""
    tool = operation.tool
    wanted = operation.hash if tool.subject or tool.exact else grant(tool.name, verdict.rule)
    if wanted in grants:
        return Verdict("run", "a person allowed it for the rest of this thread")
    return verdict


def grant(tool_name: str, rule: str | None) -> str:
    """Return what an `always` to a question about a tool grants, beside the very operation.

    The answer to one rule's question is none to another's: it was about other calls.
    """
    return tool_name if rule is None else f"{tool_name} {rule}"


def stricter(one: Verdict, other: Verdict) -> Verdict:
    """Return the verdict that lets less happen; the first of two that let the same happen."""
    return max(one, other, key=lambda verdict: ("run", "ask", "deny").index(verdict.decision))


def operation_hash(secret: bytes, identity: str, arguments: dict[str, Any]) -> str:
    """Return what binds a decision to a tool, by its identity, and its exact input.

    Keyed, so that what is masked in the request cannot be guessed from it.
    """
    text = json.dumps([identity, arguments], sort_keys=True, separators=(",", ":"))
    return hmac.new(secret, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
