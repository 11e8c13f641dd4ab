"""The conversations that were used last, so that the next run need not read them again.

Nothing here is needed to be right: what is not kept is read from the log. Only runs that have ended
are kept, and they are let go when a thread is deleted or the log is pruned.
"""

import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

from ownware_gateway.conversation import trim
from ownware_gateway.events import (
    ClientResult,
    QuestionRequest,
    QuestionResponse,
    ToolCallEnd,
    ValuePart,
)
from ownware_gateway.log import Log, Stream
from ownware_gateway.transcript import Call, RunFacts, Turn, load, load_told

#: What the histories of all threads take at most; the threads longest unused are let go first.
BYTES_MAX: Final = 4_194_304

#: The one used last may take more by itself: reading it again is what costs most.
ONE_BYTES_MAX: Final = 16_777_216

#: What a run, a turn and a call take beside what was said in them, as tracemalloc has it.
RUN_BYTES: Final = 4_000
TURN_BYTES: Final = 3_000
CALL_BYTES: Final = 2_000


@dataclass(frozen=True, slots=True)
class _Kept:
    """A history that reaches to a number, and what it takes."""

    through: int
    runs: list[RunFacts]
    size_bytes: int


_NOTHING: Final = _Kept(0, [], 0)


class Recent:
    """Folded histories of finished runs, by stream."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._kept: OrderedDict[Stream, _Kept] = OrderedDict()
        #: What all of them take.
        self.size_bytes = 0

    async def before(self, stream: Stream, seq: int) -> list[RunFacts]:
        """Return the stream's runs up to a number at which one ended, or 0 where none began.

        Those that a summary stands for in full are left out.
        """
        if seq == 0:
            return []
        known = self._take(stream)
        if known.through == seq:
            return known.runs
        if not known.through:
            return await load_told(self._log, stream, to=seq)
        return [*known.runs, *await load(self._log, stream, after=known.through, to=seq)]

    def keep(self, stream: Stream, seq: int, history: list[RunFacts]) -> None:
        """Keep a history up to the end of its last run, unless it is heavy."""
        self._take(stream)
        trim(history)
        size_bytes = sum(map(_size_bytes, history))
        if any(run.has_files for run in history) or size_bytes > ONE_BYTES_MAX:
            return
        self._kept[stream] = _Kept(seq, history, size_bytes)
        self.size_bytes += size_bytes
        while self.size_bytes > BYTES_MAX and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self.size_bytes -= oldest.size_bytes

    def forget(self, thread_id: str) -> None:
        """Let go of a thread that is being deleted."""
        for stream in [stream for stream in self._kept if stream.thread_id == thread_id]:
            self._take(stream)

    def clear(self) -> None:
        """Let go of everything."""
        self._kept.clear()
        self.size_bytes = 0

    def _take(self, stream: Stream) -> _Kept:
        known = self._kept.pop(stream, _NOTHING)
        self.size_bytes -= known.size_bytes
        return known


def _size_bytes(run: RunFacts) -> int:
    if run.size_bytes is None:
        turns = sum(map(_of_turn, run.turns))
        run.size_bytes = RUN_BYTES + sys.getsizeof(run.message.text) + turns
    return run.size_bytes


def _of_turn(turn: Turn) -> int:
    said = _of_json(turn.text, turn.thinking, turn.cut_text)
    calls = sum(map(_of_call, turn.calls.values()))
    if turn.answer is None:
        return TURN_BYTES + said + calls
    answer = turn.answer.turn
    # Counted again: an answer that was read from the log is another copy of what was shown.
    asked = [call.arguments for call in answer.tool_calls]
    kept = _of_json(answer.text, answer.thinking, asked, answer.raw)
    return TURN_BYTES + said + calls + kept


def _of_call(call: Call) -> int:
    said = 0 if call.end is None else _of_json(call.end.result, *_values(call.end))
    if isinstance(call.request, QuestionRequest):
        said += _of_json(call.request.question, call.request.options)
    if isinstance(call.response, QuestionResponse):
        said += _of_json(call.response.answer)
    if isinstance(call.response, ClientResult):
        said += sum(
            _of_json(item.result)
            for item in call.response.results or ()
            if item.tool_call_id == call.id
        )
    return CALL_BYTES + _of_json(call.input) + said


def _values(end: ToolCallEnd) -> list[Any]:
    return [part.value if isinstance(part, ValuePart) else "" for part in end.content or ()]


def _of_json(*values: Any) -> int:
    size_bytes = 0
    # A stack of our own: what a model writes may be nested deeper than functions may call.
    left = list(values)
    while left:
        value = left.pop()
        size_bytes += sys.getsizeof(value)
        if isinstance(value, dict):
            left += value.keys()
            left += value.values()
        elif isinstance(value, list):
            left += value
    return size_bytes
