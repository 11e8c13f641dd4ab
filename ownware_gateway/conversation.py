"""What a model is told of what happened: runs as messages, with summaries and gaps; pure."""

import json
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from ownware_gateway.events import CompactionEnd, Position, SessionEnd, ToolCallEnd, ToolResultDrop
from ownware_gateway.models import AssistantTurn, Message, ToolCall, ToolTurn, UserTurn
from ownware_gateway.transcript import Call, RunFacts, Turn, grants, image_parts

#: Tool results of so many bytes or fewer are never left out of a prompt: it would save nothing.
DROPPED_BYTES_MIN: Final = 256

#: What stands under a result whose images are not sent, or not any more.
IMAGES_GONE: Final = "\n[Its images are not shown any more; call the tool again to see them.]"

#: What stands around a summary, in the message of a person that follows it.
SUMMARY_BEGINS: Final = (
    "[To save room, the gateway has replaced the conversation so far by this summary of it:]"
)
SUMMARY_ENDS: Final = "[End of the summary. The conversation goes on with this message:]"
SUMMARY_OF_RUN: Final = (
    "[End of the summary. It includes what you have done so far for this message, which you are "
    "working on:]"
)


class Told(NamedTuple):
    """What of a history a model is told: from a turn of a run on, `summary` in place of the rest.

    `drops` are the places up to which tool results are left out, with what stays of each.
    """

    run: int = 0
    turn: int = 0
    summary: str | None = None
    drops: Sequence[tuple[tuple[int, float], int]] = ()

    def kept_chars(self, run: int, turn: Turn) -> int | None:
        """Return how many characters of a turn's tool results are told; None for all."""
        kept = [chars for through, chars in self.drops if (run, turn.index) <= through]
        return min(kept) if kept else None


_ALL: Final = Told()


def conversation(runs: Sequence[RunFacts], *, also: CompactionEnd | None = None) -> list[Message]:
    """Return the messages to ask a model with: what was said, superseded turns left out.

    Every tool call has its result, and every run but the last ends with a word of the assistant:
    some providers refuse anything else. Where a summary stands for what was said first, it is the
    beginning of the first message of a person that follows it: that one is sent in any case. With
    `also`, they are what they would be after that.
    """
    told = told_of(runs, also)
    messages: list[Message] = []
    for place, run in enumerate(runs[told.run :], told.run):
        first_turn = told.turn if place == told.run else 0
        messages.append(_prompt(run, told if place == told.run else _ALL))
        for turn in run.turns:
            if not turn.superseded and turn.index >= first_turn:
                messages += turn_messages(turn, told.kept_chars(place, turn))
        last = messages[-1]
        spoke = isinstance(last, AssistantTurn) and not last.tool_calls
        if run.end is not None and not spoke:
            messages.append(AssistantTurn(f"[no answer: the run {_how_it_ended(run.end)}]"))
    return messages


def told_of(runs: Sequence[RunFacts], also: CompactionEnd | None = None) -> Told:
    """Return what of a history is told, as the last events about that say, and then `also`."""
    reliefs = [relief for run in runs for relief in run.reliefs]
    if also is not None:
        reliefs.append(also)
    if not reliefs:
        return _ALL
    places = {run.message.run_id: place for place, run in enumerate(runs)}

    def place_of(through: Position) -> tuple[int, float]:
        # What is not there any more was in front of all that is.
        run = places.get(through.run_id, -1)
        return run, float("inf") if through.turn_index is None else through.turn_index

    told = _ALL
    drops: list[tuple[tuple[int, float], int]] = []
    for relief in reliefs:
        if relief.through is None:
            continue
        place = place_of(relief.through)
        if isinstance(relief, ToolResultDrop):
            drops.append((place, relief.kept_chars))
        elif relief.through.turn_index is None or place[0] < 0:
            told = Told(place[0] + 1, 0, relief.summary)
        else:
            told = Told(place[0], relief.through.turn_index + 1, relief.summary)
    return told._replace(drops=drops)


def turn_messages(turn: Turn, kept_chars: int | None = None) -> Iterator[Message]:
    """Yield the messages of a turn; tool results are left out but for so many characters."""
    if not turn.complete:
        if turn.cut_text and turn.interrupted:
            yield AssistantTurn(turn.cut_text + "\n\n[interrupted]")
        return
    answer = turn.answer.turn if turn.answer is not None else _retold(turn)
    if answer.text or answer.tool_calls:
        yield answer
    for wanted in answer.tool_calls:
        call = turn.calls.get(wanted.id)
        if call is not None and call.end is not None:
            yield _told(wanted, call, call.end, kept_chars)
        else:
            yield ToolTurn(wanted.id, wanted.name, "Interrupted before it ended.", is_error=True)


def dropped(result: str, kept_chars: int) -> str:
    """Return what a model is told in place of a tool's result."""
    size = len(result.encode("utf-8", "replace"))
    if size <= DROPPED_BYTES_MIN or len(result) <= kept_chars:
        return result
    begins = f"{result[:kept_chars]}\n" if kept_chars else ""
    return f"{begins}[dropped to save room: {size} bytes; call the tool again if it is needed]"


def _prompt(run: RunFacts, told: Told) -> UserTurn:
    text = run.message.text
    if told.summary is not None:
        follows = SUMMARY_OF_RUN if told.turn else SUMMARY_ENDS
        text = f"{SUMMARY_BEGINS}\n\n{told.summary}\n\n{follows}\n\n{text}"
    return UserTurn(text, run.files)


def _told(wanted: ToolCall, call: Call, end: ToolCallEnd, kept_chars: int | None) -> ToolTurn:
    """Return a call's result, of which so many characters are left where it was dropped."""
    text = end.result if kept_chars is None else dropped(end.result, kept_chars)
    images = call.images if kept_chars is None else ()
    if len(images) < len(image_parts(call)):
        text += IMAGES_GONE
    return ToolTurn(wanted.id, wanted.name, text, end.is_error, images)


def _retold(turn: Turn) -> AssistantTurn:
    """Return an answer as its events tell it: those of a file bring nothing else."""
    calls = [ToolCall(call.id, call.name, json.dumps(call.input)) for call in turn.calls.values()]
    return AssistantTurn(turn.text or "", turn.thinking, calls)


def _how_it_ended(end: SessionEnd) -> str:
    if end.reason == "tool_use":
        return "ended without the results of its calls"
    return f"was {end.status}" if end.status == "cancelled" else f"{end.status} ({end.reason})"


def trim(history: list[RunFacts]) -> None:
    """Let go of runs that no prompt needs any more; what people have allowed there still holds."""
    first = told_of(history).run
    if 0 < first < len(history):
        history[first].inherited = frozenset(grants(history[: first + 1]))
        del history[:first]


def kept_with_summary(history: Sequence[RunFacts], through: Position) -> bytes:
    """Return what a summary's private fact holds, for `load_told`."""
    place = next(at for at, run in enumerate(history) if run.message.run_id == through.run_id)
    first = place + (through.turn_index is None)
    allowed = sorted(grants(history[: first + 1]))
    return json.dumps({"from": history[first].seq - 1, "grants": allowed}).encode()


def last_failure(history: Sequence[RunFacts]) -> int:
    """Return how many tokens the last prompt had that there was no summary for; 0 after one."""
    for run in reversed(history):
        if run.failed_at is not None or run.reliefs:
            return run.failed_at or 0
    return 0


def position(run: RunFacts, turn: Turn | None = None) -> Position:
    """Return the end of a turn, or of a whole run."""
    index = turn.index if turn is not None else None
    return Position(run_id=run.message.run_id, turn_index=index)
