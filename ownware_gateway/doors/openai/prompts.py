"""How chat UIs word what they send: prompts of their own, and what they put before a message."""

from typing import Final

#: How the prompts begin that chat UIs ask by themselves, for a title say.
HELPER: Final = "### Task:"

#: How the prompt begins and ends in which Open WebUI puts what it has found in files before a
#: person's words: its own RAG_TEMPLATE. No other is read: one that does not end so would let what
#: stands in a file answer for the person.
FOUND_BEGINS: Final = "### Task:\nRespond to the user query using the provided context"
FOUND_ENDS: Final = "\n</context>\n"


def is_helper(text: str) -> bool:
    """Whether a chat UI asks this for itself, and no person."""
    return text.lstrip().startswith(HELPER) and not text.startswith(FOUND_BEGINS)


def words_of(text: str) -> str:
    """Return what a person says in a message, without what was found in files for it."""
    if text.startswith(FOUND_BEGINS):
        # What was found may hold the mark too; the person's words are behind the last one.
        text = text.rpartition(FOUND_ENDS)[2]
    return text.strip()
