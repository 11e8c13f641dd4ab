"""The built-in offline model follows its patterns, always in the same way."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from ownware_gateway.models import (
    Answer,
    AssistantTurn,
    CallStart,
    File,
    Message,
    Part,
    Request,
    Text,
    Thinking,
    ToolSpec,
    ToolTurn,
    UserTurn,
)
from ownware_gateway.models.demo import BATCH_PARTS_MAX, COUNT_MAX, Demo

TOOLS = [
    ToolSpec(name, "", {"type": "object"})
    for name in (
        "read_file",
        "list_files",
        "glob",
        "grep",
        "write_file",
        "edit_file",
        "shell_execute",
        "ask_user",
    )
]


async def batches(
    *messages: Message | str, tools: Sequence[ToolSpec] = TOOLS, max_tokens: int | None = None
) -> list[Sequence[Part]]:
    turns = [UserTurn(message) if isinstance(message, str) else message for message in messages]
    request = Request("assistant", turns, tools=tools, max_tokens=max_tokens)
    return [batch async for batch in Demo().stream(request)]


async def ask(*messages: Message | str, tools: Sequence[ToolSpec] = TOOLS) -> Answer:
    answer = (await batches(*messages, tools=tools))[-1][-1]
    assert isinstance(answer, Answer)
    return answer


def called(answer: Answer) -> list[tuple[str, dict[str, str]]]:
    return [(call.name, json.loads(call.arguments)) for call in answer.turn.tool_calls]


async def test_a_greeting_is_answered_with_what_it_is_and_what_it_can_do() -> None:
    answer = await ask("Hello there!")
    assert answer.turn.text.startswith("Hello! I am the built-in offline model: I follow simple")
    assert "list files" in answer.turn.text
    assert answer.stop_reason == "end_turn"


async def test_the_deltas_are_words_and_make_up_the_text() -> None:
    found = await batches("tell me a story")
    answer = found[-1][-1]
    assert isinstance(answer, Answer)
    deltas = [part.text for batch in found[:-1] for part in batch if isinstance(part, Text)]
    assert "".join(deltas) == answer.turn.text
    assert len(deltas) == len(answer.turn.text.split())
    assert all(found)


async def test_an_answer_ends_before_what_it_is_to_stop_at() -> None:
    request = Request("assistant", [UserTurn("count to 9")], stop=("7", "4"))
    *_, answer = [part async for batch in Demo().stream(request) for part in batch]
    assert isinstance(answer, Answer)
    assert (answer.turn.text, answer.stop_reason) == ("1 2 3 ", "stop_sequence")


async def test_the_same_prompt_has_the_same_answer() -> None:
    assert await batches("run: ls and also list files") == await batches(
        "run: ls and also list files"
    )


@pytest.mark.parametrize(
    ("prompt", "tool", "arguments"),
    [
        ("list files", "list_files", {}),
        ("List the files in src.", "list_files", {"path": "src"}),
        ("ls", "list_files", {}),
        ("ls docs/api", "list_files", {"path": "docs/api"}),
        ("read README.md", "read_file", {"path": "README.md"}),
        ("please read the file a/b.txt", "read_file", {"path": "a/b.txt"}),
        ("find notes.txt", "glob", {"pattern": "**/notes.txt"}),
        ("find src/*.py", "glob", {"pattern": "src/*.py"}),
        ("search for two words in src", "grep", {"pattern": "two words", "path": "src"}),
        ("search TODO", "grep", {"pattern": "TODO"}),
        ("write a.txt: one\ntwo", "write_file", {"path": "a.txt", "content": "one\ntwo"}),
        ("write a.txt:", "write_file", {"path": "a.txt", "content": ""}),
        (
            "create a file a.txt with hi there",
            "write_file",
            {"path": "a.txt", "content": "hi there"},
        ),
        (
            "replace old with new words in a.txt",
            "edit_file",
            {"path": "a.txt", "old_text": "old", "new_text": "new words"},
        ),
        ("run: echo 'a; b'", "shell_execute", {"command": "echo 'a; b'"}),
        ("run `make test`", "shell_execute", {"command": "make test"}),
        ("$ git status", "shell_execute", {"command": "git status"}),
        ("ask me: Which one?", "ask_user", {"question": "Which one?"}),
        (
            "ask me: Which [kind] of colour? [red, dark green ,blue]",
            "ask_user",
            {
                "question": "Which [kind] of colour?",
                "options": ["red", "dark green", "blue"],
            },
        ),
    ],
)
async def test_a_command_calls_its_tool(prompt: str, tool: str, arguments: dict[str, Any]) -> None:
    answer = await ask(prompt)
    assert called(answer) == [(tool, arguments)]
    assert answer.stop_reason == "tool_use"


async def test_a_call_is_announced_before_the_answer() -> None:
    found = await batches("ls")
    (call,) = found[-1][-1].turn.tool_calls  # type: ignore[union-attr]
    assert found[-2] == [CallStart(call.id, "list_files")]


@pytest.mark.parametrize("prompt", ["list your wishes", "run away", "read", "find me a good book"])
async def test_other_words_call_nothing(prompt: str) -> None:
    assert called(await ask(prompt)) == []


async def test_also_makes_parallel_calls_with_ids_of_their_own() -> None:
    answer = await ask("list files and also read a.txt")
    assert called(answer) == [("list_files", {}), ("read_file", {"path": "a.txt"})]
    assert len({call.id for call in answer.turn.tool_calls}) == 2


async def test_then_makes_calls_one_turn_after_the_other() -> None:
    prompt = UserTurn("write a.txt: hi; then read a.txt")
    first = await ask(prompt)
    assert called(first) == [("write_file", {"path": "a.txt", "content": "hi"})]
    written = ToolTurn(first.turn.tool_calls[0].id, "write_file", "Written.")
    second = await ask(prompt, first.turn, written)
    assert called(second) == [("read_file", {"path": "a.txt"})]
    assert second.turn.tool_calls[0].id != first.turn.tool_calls[0].id
    read = ToolTurn(second.turn.tool_calls[0].id, "read_file", "hi")
    last = await ask(prompt, first.turn, written, second.turn, read)
    assert last.turn.text == "write_file answered: Written. read_file answered: hi"
    assert last.stop_reason == "end_turn"


async def test_a_separator_within_a_content_is_content() -> None:
    answer = await ask("write a.txt: eat; then sleep")
    assert called(answer) == [("write_file", {"path": "a.txt", "content": "eat; then sleep"})]


async def test_a_denied_call_is_said_and_ends_the_chain() -> None:
    prompt = UserTurn("run: rm x; then list files")
    first = await ask(prompt)
    denied = ToolTurn(first.turn.tool_calls[0].id, "shell_execute", "Denied: no.", is_error=True)
    answer = await ask(prompt, first.turn, denied)
    assert answer.turn.text == "I could not use shell_execute: Denied: no."
    assert answer.stop_reason == "end_turn"


async def test_a_long_result_is_quoted_in_short() -> None:
    prompt = UserTurn("read big.txt")
    first = await ask(prompt)
    answer = await ask(
        prompt, first.turn, ToolTurn(first.turn.tool_calls[0].id, "read_file", "word " * 10_000)
    )
    assert answer.turn.text.startswith("read_file answered: word word")
    assert len(answer.turn.text) < 300


async def test_results_of_an_earlier_run_are_not_told_again() -> None:
    first = await ask("ls")
    result = ToolTurn(first.turn.tool_calls[0].id, "list_files", "secrets.txt")
    answer = await ask("ls", first.turn, result, AssistantTurn("done"), "hello")
    assert "secrets.txt" not in answer.turn.text


async def test_a_tool_that_it_was_not_given_is_not_called() -> None:
    answer = await ask("run: ls", tools=TOOLS[:2])
    assert called(answer) == []
    assert answer.turn.text == "I have no tool named shell_execute here, so I cannot do that."


async def test_it_remembers_a_name_from_the_conversation() -> None:
    told = await ask("Hi, my name is Zoë.")
    assert told.turn.text.startswith("Nice to meet you, Zoë.")
    asked = await ask("Hi, my name is Zoë.", told.turn, "What is my name?")
    assert asked.turn.text == "Your name is Zoë."
    assert (await ask("What's my name?")).turn.text == "You have not told me your name."


async def test_it_remembers_what_was_said() -> None:
    answer = await ask("blue sky", AssistantTurn("…"), "What did I say?")
    assert answer.turn.text == "You said: blue sky"


async def test_it_names_the_files_that_it_cannot_look_into() -> None:
    answer = await ask(UserTurn("look", [File("cat.png", "image/png", b"x")]))
    assert "cat.png" in answer.turn.text


async def test_counting_has_one_delta_a_number_in_big_batches() -> None:
    found = await batches("count to 1000")
    deltas = [part.text for batch in found[:-1] for part in batch if isinstance(part, Text)]
    assert deltas == [f"{i} " for i in range(1, 1001)]
    assert max(map(len, found)) == BATCH_PARTS_MAX
    answer = found[-1][-1]
    assert isinstance(answer, Answer)
    assert answer.usage.input_tokens == 3
    assert answer.usage.output_tokens == 1000


async def test_slow_counting_has_one_delta_a_batch() -> None:
    found = await batches("slowly count to 3")
    assert found[:-1] == [[Text("1 ")], [Text("2 ")], [Text("3 ")]]


async def test_it_does_not_count_without_end() -> None:
    answer = await ask(f"count to {COUNT_MAX + 1}")
    assert answer.turn.text == f"I count to {COUNT_MAX} at most."


async def test_thinking_comes_before_the_text() -> None:
    found = await batches("think about the sea")
    kinds = [type(part) for batch in found for part in batch]
    assert kinds == sorted(kinds, key=[Thinking, Text, Answer].index)
    answer = found[-1][-1]
    assert isinstance(answer, Answer)
    assert "the sea" in answer.turn.thinking
    assert Thinking in kinds


async def test_an_answer_stops_at_the_limit_of_the_request() -> None:
    answer = (await batches("count to 10", max_tokens=4))[-1][-1]
    assert isinstance(answer, Answer)
    assert answer.turn.text == "1 2 3 4 "
    assert answer.stop_reason == "max_tokens"
