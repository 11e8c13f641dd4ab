"""The agent's own list of what is to do. It is kept by the log alone: each call holds all of it."""

from typing import Any, Final

from ownware_gateway.tools import Context, Output, Tool, clip

TASKS_MAX: Final = 100
TASK_CHARS_MAX: Final = 500

_MARKS: Final = {"pending": "[ ]", "in_progress": "[~]", "completed": "[x]"}


async def todo_write(context: Context, arguments: dict[str, Any]) -> Output:
    """Return the list as it is now, a line for each task."""
    lines = [
        f"{_MARKS[task.get('status', 'pending')]} {number}. {' '.join(task['content'].split())}"
        for number, task in enumerate(arguments["tasks"], 1)
    ]
    return clip("\n".join(lines) or "The list is empty.")


TOOLS: Final[tuple[Tool, ...]] = (
    Tool(
        name="todo_write",
        description=(
            "Keep a list of what is to do, for work of several steps; the user sees it too. Each"
            " call replaces the whole list, so pass every task, in order. Set a task to"
            " in_progress before you begin it, one at a time, and to completed as soon as it is"
            " done and checked, not earlier."
        ),
        input_schema={
            "type": "object",
            "properties": {
                "tasks": {
                    "type": "array",
                    "maxItems": TASKS_MAX,
                    "description": "All tasks, in order; none empties the list.",
                    "items": {
                        "type": "object",
                        "properties": {
                            "content": {
                                "type": "string",
                                "pattern": r"\S",
                                "maxLength": TASK_CHARS_MAX,
                                "description": "What is to do, for example: Add a test",
                            },
                            "status": {
                                "enum": list(_MARKS),
                                "default": "pending",
                                "description": "How far it is.",
                            },
                        },
                        "required": ["content"],
                        "additionalProperties": False,
                    },
                }
            },
            "required": ["tasks"],
            "additionalProperties": False,
        },
        call=todo_write,
        reads_only=True,
        reads="nothing",
        safe_to_repeat=True,
    ),
)
