"""A question to a person, in the middle of a run. It does not run: the run waits for the answer."""

from typing import Any, Final

from ownware_gateway.tools import Context, Output, Tool

QUESTION_CHARS_MAX: Final = 4_000
OPTIONS_MAX: Final = 10
OPTION_CHARS_MAX: Final = 200


async def ask_user(context: Context, arguments: dict[str, Any]) -> Output:
    """Never called: a call of a tool that asks ends with a person's answer."""
    raise AssertionError("a question does not run")


TOOLS: Final[tuple[Tool, ...]] = (
    Tool(
        name="ask_user",
        description=(
            "Ask the user a question and wait for the answer, which is the result. Use it where"
            " going on without an answer would be a guess: what is meant, which of several ways,"
            " something only the user knows. One question a call, short, with all that is needed to"
            " answer it. The user may answer something else than the options, or decline. Never ask"
            " for a password or a key: it would be hidden from you."
        ),
        input_schema={
            "type": "object",
            "properties": {
                "question": {
                    "type": "string",
                    "pattern": r"\S",
                    "maxLength": QUESTION_CHARS_MAX,
                    "description": "The question, for example: Which of the two files is meant?",
                },
                "options": {
                    "type": "array",
                    "maxItems": OPTIONS_MAX,
                    "description": "Likely answers to choose from, each short.",
                    "items": {
                        "type": "string",
                        "pattern": r"\S",
                        "maxLength": OPTION_CHARS_MAX,
                    },
                },
                "multiple": {
                    "type": "boolean",
                    "default": False,
                    "description": "Whether several options may be chosen.",
                },
            },
            "required": ["question"],
            "additionalProperties": False,
        },
        call=ask_user,
        reads_only=True,
        reads="nothing",
        asks=True,
    ),
)
