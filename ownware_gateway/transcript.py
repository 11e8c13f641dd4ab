"""What the log says happened: events folded into runs, turns and calls, and those into messages.

Pure but for `load`, which reads. Deltas are skipped: what they say stands whole in a later event,
save the text of a turn that was cut off, which is fetched by itself.
"""

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from ownware_gateway.events import (
    AgentComplete,
    AgentSpawn,
    Answers,
    Asks,
    ClientCall,
    ClientResult,
    CompactionEnd,
    CompactionStart,
    Error,
    Event,
    ImagePart,
    PermissionRequest,
    PermissionResponse,
    Position,
    QuestionRequest,
    QuestionResponse,
    Recovery,
    RunCancel,
    SessionEnd,
    SessionStart,
    StopReason,
    TextComplete,
    TextDelta,
    ThinkingComplete,
    ThinkingDelta,
    ToolCallArgsDelta,
    ToolCallEnd,
    ToolCallExecute,
    ToolCallStart,
    ToolResultDrop,
    TurnEnd,
    TurnInterrupted,
    TurnStart,
    Usage,
    UserMessage,
)
from ownware_gateway.log import Log, Record, Stream
from ownware_gateway.models import (
    AssistantTurn,
    File,
    Message,
    ToolCall,
    ToolTurn,
    UserTurn,
)
from ownware_gateway.permissions import grant

PAGE: Final = 500

NOTICE: Final = "\n\n[interrupted, answering again]\n\n"

#: Tool results of so many bytes or fewer are never left out of a prompt: it would save nothing.
DROPPED_BYTES_MIN: Final = 256


#: Images of tools' outputs that a model is sent, the newest: so many, that many fewer once there
#: are more, and so much together. Providers limit both, and what a request takes.
IMAGES_MAX: Final = 20
IMAGES_STEP: Final = 5
IMAGES_BYTES_MAX: Final = 16_777_216

#: What stands under a result whose images are not sent, or not any more.
IMAGES_GONE: Final = "\n[Its images are not shown any more; call the tool again to see them.]"


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer as the private facts keep it: enough to go on and to send it back."""

    turn: AssistantTurn
    stop_reason: StopReason
    usage: Usage

    def dump(self) -> bytes:
        """Return it as JSON."""
        turn = self.turn
        body = {
            "text": turn.text,
            "thinking": turn.thinking,
            "calls": [[call.id, call.name, call.arguments] for call in turn.tool_calls],
            "dialect": turn.dialect,
            "model": turn.model,
            "raw": turn.raw,
            "stopReason": self.stop_reason,
            "usage": self.usage.model_dump(),
        }
        return json.dumps(body).encode()

    @staticmethod
    def restore(body: bytes) -> "Answer":
        """Return the answer that `dump` wrote."""
        data = json.loads(body)
        turn = AssistantTurn(
            text=data["text"],
            thinking=data["thinking"],
            tool_calls=[ToolCall(*call) for call in data["calls"]],
            dialect=data["dialect"],
            model=data["model"],
            raw=data["raw"],
        )
        return Answer(turn, data["stopReason"], Usage.model_validate(data["usage"]))


@dataclass(slots=True)
class Call:
    """One tool call and how far it got. `input` is as shown, secrets masked."""

    id: str
    name: str
    input: dict[str, Any] = field(default_factory=dict)
    request: Asks | None = None
    response: Answers | None = None
    executing: bool = False
    #: The agent whose run the call is, and how that ended.
    agent: AgentSpawn | None = None
    complete: AgentComplete | None = None
    end: ToolCallEnd | None = None
    end_seq: int = 0
    #: The images that it gave back, as far as they are still sent to a model.
    images: Sequence[File] = ()

    @property
    def agent_is_open(self) -> bool:
        """Whether an agent's run is the call, and what came of it is not told here yet."""
        return self.agent is not None and self.end is None


@dataclass(slots=True)
class Turn:
    """One call of the model and the tools it asked for."""

    index: int
    timestamp: int
    seq: int = 0
    complete_seq: int = 0
    text: str | None = None
    thinking: str = ""
    #: Something of an answer that is not complete was shown, so asking again must say so.
    shown: bool = False
    #: How often in a row the call was tried again.
    retries: int = 0
    #: How often the prompt was too long for the provider, and whether that is to be helped now.
    overflows: int = 0
    overflowed: bool = False
    #: The prompt was made shorter since the answer before this turn.
    relieved: bool = False
    calls: dict[str, Call] = field(default_factory=dict)
    answer: Answer | None = None
    end: TurnEnd | None = None
    interrupted: bool = False
    superseded: bool = False
    cut_text: str = ""

    @property
    def complete(self) -> bool:
        """Whether the model's answer is whole."""
        return self.text is not None


@dataclass(slots=True)
class RunFacts:
    """Everything that the log says of one run."""

    message: UserMessage
    seq: int = 0
    #: A copy from another thread or a file: it tells what was said and grants nothing.
    copied: bool = False
    files: Sequence[File] = ()
    session: SessionStart | None = None
    turns: list[Turn] = field(default_factory=list)
    cancel: RunCancel | None = None
    error: Error | None = None
    end: SessionEnd | None = None
    #: What other agents, which work for this one, have asked people and may do since, as `grants`.
    asked_below: dict[str, Asks] = field(default_factory=dict)
    granted_below: set[str] = field(default_factory=set)
    #: What is left out of prompts since then, in the order in which that was decided.
    reliefs: list[CompactionEnd | ToolResultDrop] = field(default_factory=list)
    #: A compaction that has begun and not ended.
    compacting: CompactionStart | None = None
    #: How many tokens the prompt had that there was no summary for, if that was so in the end.
    failed_at: int | None = None
    #: What the summaries in this run have cost.
    summing: Usage = field(default_factory=Usage)
    #: What people have allowed in runs before this one that need not be read any more.
    inherited: frozenset[str] = frozenset()
    #: What it takes in memory, in bytes; found out once, by whoever keeps it.
    size_bytes: int | None = None

    @property
    def turn(self) -> Turn | None:
        """The turn that is under way, or was last."""
        return self.turns[-1] if self.turns else None

    @property
    def usage(self) -> Usage:
        """What the run's model calls used so far, the ones whose turn has not ended included.

        So is what its agents have used whose runs have ended.
        """
        # The summaries first: the sum names the model that has answered last.
        total = self.summing
        for turn in self.turns:
            if turn.end is not None:
                total = total.plus(turn.end.usage)
            elif turn.answer is not None:
                total = total.plus(turn.answer.usage)
            for call in turn.calls.values():
                if call.complete is not None and call.complete.usage is not None:
                    total = total.plus_agent(call.complete.usage)
        return total

    @property
    def spent_usd(self) -> float:
        """What the run and its agents have cost as far as prices are known."""
        costs = [self.summing.cost_usd]
        for turn in self.turns:
            if turn.end is not None:
                costs.append(turn.end.usage.cost_usd)
            elif turn.answer is not None:
                costs.append(turn.answer.usage.cost_usd)
            for call in turn.calls.values():
                if call.complete is not None and call.complete.usage is not None:
                    costs += [call.complete.usage.cost_usd, call.complete.known_cost_usd]
        return sum(cost for cost in costs if cost is not None)

    @property
    def open_agents(self) -> list[Call]:
        """The calls that are runs of agents, and of which it is not told yet what came of them."""
        if self.turn is None:
            return []
        return [call for call in self.turn.calls.values() if call.agent_is_open]

    @property
    def has_agents(self) -> bool:
        """Whether it has ever had another agent work for it."""
        calls = (call for turn in self.turns for call in turn.calls.values())
        return any(call.agent is not None for call in calls)

    @property
    def turns_done(self) -> int:
        """How many answers the model has finished."""
        return sum(turn.complete for turn in self.turns)

    @property
    def has_files(self) -> bool:
        """Whether bytes of files are held: attachments, or images that a tool gave back."""
        return bool(self.files) or any(
            call.images for turn in self.turns for call in turn.calls.values()
        )

    def open_question(self) -> Asks | None:
        """Return what a person is asked now, by the run's own agent or by one that works for it."""
        return self.question() or next(iter(self.asked_below.values()), None)

    def question(self) -> Asks | None:
        """Return the run's own question to a person that has no answer yet."""
        if self.turn is None:
            return None
        return next(
            (
                call.request
                for call in self.turn.calls.values()
                if call.request is not None and call.response is None and call.end is None
            ),
            None,
        )

    def apply(self, event: Event, seq: int = 0) -> None:
        """Take the next event of the run."""
        match event:
            case SessionStart():
                self.session = event
            case TurnStart():
                # A turn that takes the place of one that was cut off goes on counting its retries.
                self.turns.append(_next_turn(self.turn, event, seq))
            case RunCancel():
                self.cancel = event
            case Error():
                self.error = event
            case SessionEnd():
                self.end = event
            case (
                PermissionRequest(agent_id=str())
                | PermissionResponse(agent_id=str())
                | QuestionRequest(agent_id=str())
                | QuestionResponse(agent_id=str())
            ):
                _apply_from_below(self, event)
            case _ if self.turns:
                _apply_to_turn(self, self.turns[-1], event, seq)
            case _:
                pass


def _apply_from_below(
    run: RunFacts,
    event: PermissionRequest | PermissionResponse | QuestionRequest | QuestionResponse,
) -> None:
    """Take what another agent has asked a person; its calls are told of in its own stream."""
    match event:
        case PermissionRequest() | QuestionRequest():
            run.asked_below[event.request_id] = event
        case PermissionResponse() | QuestionResponse():
            asked = run.asked_below.pop(event.request_id, None)
            if not isinstance(asked, PermissionRequest):
                return  # An answer in words allows nothing.
            if isinstance(event, PermissionResponse) and event.granted and event.always:
                run.granted_below |= {grant(asked.tool_name, asked.rule), asked.operation_hash}


def _next_turn(before: Turn | None, event: TurnStart, seq: int) -> Turn:
    turn = Turn(event.turn_index, event.timestamp, seq)
    if before is not None and not before.complete:
        turn.retries, turn.overflows = before.retries, before.overflows
        turn.overflowed, turn.relieved = before.overflowed, before.relieved
    return turn


def _apply_to_turn(run: RunFacts, turn: Turn, event: Event, seq: int) -> None:
    match event:
        case TextDelta(notice=False) | ThinkingDelta():
            turn.shown = True
        case ThinkingComplete():
            turn.thinking = event.text
        case TextComplete():
            turn.text = event.text
            turn.complete_seq = seq
            turn.retries = 0
        case TurnEnd():
            turn.end = event
        case TurnInterrupted():
            turn.interrupted = True
        case ToolResultDrop() | CompactionStart() | CompactionEnd():
            _relieve(run, turn, event)
        case Recovery():
            _recover(run, turn, event)
        case _:
            _apply_to_call(turn, event, seq)


def _recover(run: RunFacts, turn: Turn, event: Recovery) -> None:
    if event.reason == "prompt_too_long":
        turn.overflows, turn.overflowed = event.attempt, True
    elif event.reason != "restart":
        turn.retries = event.attempt
    if event.supersedes is not None:
        _supersede(run, event.supersedes)


def _relieve(
    run: RunFacts, turn: Turn, event: ToolResultDrop | CompactionStart | CompactionEnd
) -> None:
    if isinstance(event, CompactionStart):
        run.compacting = event
        return
    if isinstance(event, CompactionEnd):
        run.compacting = None
        if event.usage is not None:
            run.summing = event.usage.plus(run.summing) if run.summing.model else event.usage
        run.failed_at = event.pre_token_count if event.through is None else None
        if event.through is None:
            return
    run.reliefs.append(event)
    turn.overflowed, turn.relieved = False, True


def _supersede(run: RunFacts, index: int) -> None:
    # From the end: it is one of the last, and a run may have very many.
    for turn in reversed(run.turns):
        if turn.index == index:
            turn.superseded = True
            return


def _apply_to_call(turn: Turn, event: Event, seq: int) -> None:
    match event:
        case ToolCallStart():
            turn.shown = True
            turn.calls[event.tool_call_id] = Call(event.tool_call_id, event.tool_name)
        case ToolCallArgsDelta():
            turn.calls[event.tool_call_id].input = _object(event.delta)
        case ToolCallExecute():
            turn.calls[event.tool_call_id].executing = True
            turn.calls[event.tool_call_id].input = event.input
        case ToolCallEnd():
            turn.calls[event.tool_call_id].end = event
            turn.calls[event.tool_call_id].end_seq = seq
        case PermissionRequest():
            turn.calls[event.tool_call_id].request = event
            turn.calls[event.tool_call_id].input = event.input
        case QuestionRequest():
            turn.calls[event.tool_call_id].request = event
        case PermissionResponse() | QuestionResponse() | ClientResult():
            for call in turn.calls.values():
                if call.request is not None and call.request.request_id == event.request_id:
                    call.response = event
        case _:
            _apply_to_agent(turn, event)


def _apply_to_agent(turn: Turn, event: Event) -> None:
    match event:
        case ClientCall():
            for called in event.calls:
                turn.calls[called.tool_call_id].request = event
        case AgentSpawn():
            turn.calls[event.tool_call_id].agent = event
        case AgentComplete():
            for call in turn.calls.values():
                if call.agent is not None and call.agent.agent_id == event.agent_id:
                    call.complete = event
        case _:
            pass


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def fold(records: Sequence[tuple[int, Event]]) -> list[RunFacts]:
    """Return the runs that a stream's events, with their numbers, tell of."""
    runs: list[RunFacts] = []
    for seq, event in records:
        if isinstance(event, UserMessage):
            runs.append(RunFacts(event, seq))
        elif runs:
            runs[-1].apply(event, seq)
    return runs


async def load(
    log: Log, stream: Stream, *, after: int = 0, to: int | None = None, files: bool = True
) -> list[RunFacts]:
    """Return the runs of a stream as the log has it now, answers and cut-off text included.

    `after` and `to` are numbers at which a run ended: only what is between them is read. `files`
    fetches the bytes of attachments, and of tools' images, too.
    """
    facts = [(record.seq, record.event()) async for record in _facts(log, stream, after)]
    runs = fold([(seq, event) for seq, event in facts if to is None or seq <= to])
    private = await log.private(stream, "message", after=after)
    answers = {seq: body for seq, _, body in private}
    attached: dict[int, list[bytes]] = {}
    if files and any(run.message.attachments for run in runs):
        for seq, _, body in await log.private(stream, "attachment", after=after):
            attached.setdefault(seq, []).append(body)
    thread = await log.thread(stream.thread_id)
    for run in runs:
        run.copied = thread is not None and run.seq <= thread.history_to
        run.files = [
            File(item.filename, item.mime_type, body, item.detail)
            for item, body in zip(
                run.message.attachments or (), attached.get(run.seq, ()), strict=False
            )
        ]
        for turn in run.turns:
            if turn.complete_seq in answers:
                turn.answer = Answer.restore(answers[turn.complete_seq])
            elif not turn.complete and not turn.superseded:
                await _load_cut_text(log, stream, turn)
    if files:
        await _load_images(log, stream, runs)
    return runs


async def load_told(log: Log, stream: Stream, *, to: int) -> list[RunFacts]:
    """Return a stream's runs up to a number, those left out that a summary stands for in full."""
    last = await log.last_summary(stream, to)
    if last is None:
        return await load(log, stream, to=to)
    seq, body = last
    kept = json.loads(body)
    runs = await load(log, stream, after=kept["from"], to=to)
    told_in = next((run for run in reversed(runs) if run.seq <= seq), None)
    if told_in is not None and not told_in.copied:
        runs[0].inherited = frozenset(kept["grants"])
    return runs


def kept_with_summary(history: Sequence[RunFacts], through: Position) -> bytes:
    """Return what a summary's private fact holds, for `load_told`."""
    place = next(at for at, run in enumerate(history) if run.message.run_id == through.run_id)
    first = place + (through.turn_index is None)
    allowed = sorted(grants(history[: first + 1]))
    return json.dumps({"from": history[first].seq - 1, "grants": allowed}).encode()


async def _load_images(log: Log, stream: Stream, runs: Sequence[RunFacts]) -> None:
    """Fetch the images of tools' outputs that a model would be sent, and no others."""
    calls = _with_images(runs)
    for call in calls[_first_shown(calls) :]:
        images: list[File] = []
        for part in _image_parts(call):
            body = await log.private_at(stream, call.end_seq, "image", part.index)
            if body is not None:
                images.append(image_file(part.mime_type, part.index, body))
        call.images = images


async def _facts(log: Log, stream: Stream, after: int) -> AsyncIterator[Record]:
    while records := await log.read(stream, after, limit=PAGE, deltas=False):
        for record in records:
            yield record
        after = records[-1].seq


async def _load_cut_text(log: Log, stream: Stream, turn: Turn) -> None:
    """Fetch what was shown of an answer that never became whole."""
    pieces: list[str] = []
    after = turn.seq
    while records := await log.read(stream, after, limit=PAGE):
        for record in records:
            if record.type in _TURN_OVER:
                turn.cut_text = "".join(pieces)
                return
            text = _text_of(record)
            turn.shown |= bool(text) or record.type in _SHOWN
            pieces += text
        after = records[-1].seq
    turn.cut_text = "".join(pieces)


_TURN_OVER: Final = frozenset({"turn.start", "turn.interrupted", "session.end", "user.message"})
#: What beside the model's own text shows something of an answer; a notice is none of it.
_SHOWN: Final = frozenset({"thinking.delta", "tool.call.start"})


def _text_of(record: Record) -> list[str]:
    if record.type != "text.delta":
        return []
    event = record.event()
    return [event.text] if isinstance(event, TextDelta) and not event.notice else []


def _image_parts(call: Call) -> list[ImagePart]:
    if call.end is None or call.end.content is None or call.end.is_error:
        return []
    return [part for part in call.end.content if isinstance(part, ImagePart)]


def _with_images(runs: Sequence[RunFacts]) -> list[Call]:
    """Return the calls that gave images back, in their order."""
    return [
        call
        for run in runs
        for turn in run.turns
        for call in turn.calls.values()
        if call.end is not None and call.end.content is not None and _image_parts(call)
    ]


def _first_shown(calls: Sequence[Call]) -> int:
    """Return the place of the first call whose images are still sent to the model.

    Only sizes that stand in the log decide, so it is the same after a restart. It only ever moves
    on, and where it is for the number of images, by several at once: what was sent before it has
    changed, and a provider's cache of it is lost.
    """
    sizes = [sum(part.size_bytes for part in _image_parts(call)) for call in calls]
    counts = [len(_image_parts(call)) for call in calls]
    too_many = -(-max(0, sum(counts) - IMAGES_MAX) // IMAGES_STEP) * IMAGES_STEP
    too_big = max(0, sum(sizes) - IMAGES_BYTES_MAX)
    for place, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        if too_many <= 0 and too_big <= 0:
            return place
        too_many -= count
        too_big -= size
    return len(calls)


def let_go(runs: Sequence[RunFacts]) -> None:
    """Let go of the images that no model is sent any more."""
    calls = _with_images(runs)
    for call in calls[: _first_shown(calls)]:
        call.images = ()


def image_file(mime_type: str, index: int, data: bytes) -> File:
    """Return an image of a tool's output as a model is sent it."""
    return File(f"image-{index}.{mime_type.rpartition('/')[2]}", mime_type, data)


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


def _how_it_ended(end: SessionEnd) -> str:
    if end.reason == "tool_use":
        return "ended without the results of its calls"
    return f"was {end.status}" if end.status == "cancelled" else f"{end.status} ({end.reason})"


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


def trim(history: list[RunFacts]) -> None:
    """Let go of runs that no prompt needs any more; what people have allowed there still holds."""
    first = told_of(history).run
    if 0 < first < len(history):
        history[first].inherited = frozenset(grants(history[: first + 1]))
        del history[:first]


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


def _prompt(run: RunFacts, told: Told) -> UserTurn:
    text = run.message.text
    if told.summary is not None:
        follows = SUMMARY_OF_RUN if told.turn else SUMMARY_ENDS
        text = f"{SUMMARY_BEGINS}\n\n{told.summary}\n\n{follows}\n\n{text}"
    return UserTurn(text, run.files)


#: What stands around a summary, in the message of a person that follows it.
SUMMARY_BEGINS: Final = (
    "[To save room, the gateway has replaced the conversation so far by this summary of it:]"
)
SUMMARY_ENDS: Final = "[End of the summary. The conversation goes on with this message:]"
SUMMARY_OF_RUN: Final = (
    "[End of the summary. It includes what you have done so far for this message, which you are "
    "working on:]"
)


def dropped(result: str, kept_chars: int) -> str:
    """Return what a model is told in place of a tool's result."""
    size = len(result.encode("utf-8", "replace"))
    if size <= DROPPED_BYTES_MIN or len(result) <= kept_chars:
        return result
    begins = f"{result[:kept_chars]}\n" if kept_chars else ""
    return f"{begins}[dropped to save room: {size} bytes; call the tool again if it is needed]"


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


def _told(wanted: ToolCall, call: Call, end: ToolCallEnd, kept_chars: int | None) -> ToolTurn:
    """Return a call's result, of which so many characters are left where it was dropped."""
    text = end.result if kept_chars is None else dropped(end.result, kept_chars)
    images = call.images if kept_chars is None else ()
    if len(images) < len(_image_parts(call)):
        text += IMAGES_GONE
    return ToolTurn(wanted.id, wanted.name, text, end.is_error, images)


def _retold(turn: Turn) -> AssistantTurn:
    """Return an answer as its events tell it: those of a file bring nothing else."""
    calls = [ToolCall(call.id, call.name, json.dumps(call.input)) for call in turn.calls.values()]
    return AssistantTurn(turn.text or "", turn.thinking, calls)


def grants(runs: Sequence[RunFacts]) -> set[str]:
    """Return what people have allowed for the rest of the thread, as `permissions.grant` names it.

    Hashes of the very operations are among them.
    """
    allowed: set[str] = set()
    for run in runs:
        allowed |= run.inherited
        if run.copied:
            continue
        allowed |= run.granted_below
        for turn in run.turns:
            for call in turn.calls.values():
                asked, said = call.request, call.response
                if (
                    isinstance(asked, PermissionRequest)
                    and isinstance(said, PermissionResponse)
                    and said.granted
                    and said.always
                ):
                    allowed |= {grant(asked.tool_name, asked.rule), asked.operation_hash}
    return allowed


def messages(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """Return the conversation as people read it: the answer of `GET /threads/{id}/messages`."""
    shown: list[dict[str, Any]] = []
    for run in runs:
        attachments = run.message.attachments
        shown.append(
            {
                "id": f"{run.message.run_id}.user",
                "role": "user",
                "content": run.message.text,
                "parts": [{"kind": "text", "text": run.message.text}],
                "attachments": attachments and [item.model_dump() for item in attachments],
                "usage": None,
                "timestamp": run.message.timestamp,
                "model": None,
            }
        )
        if run.turns or run.error is not None:
            shown.append(_reply(run))
    return shown


def _reply(run: RunFacts) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for turn in run.turns:
        if not turn.superseded:
            parts += _parts(turn)
    if run.error is not None:
        parts.append({"kind": "error", "code": run.error.code, "text": run.error.message})
    return {
        "id": f"{run.message.run_id}.assistant",
        "role": "assistant",
        "content": "\n\n".join(part["text"] for part in parts if part["kind"] == "text"),
        "parts": parts,
        "usage": run.usage.model_dump(),
        "status": run.end.status if run.end is not None else "running",
        "timestamp": run.turns[0].timestamp if run.turns else run.message.timestamp,
        "model": run.session.model if run.session is not None else None,
    }


def _parts(turn: Turn) -> Iterator[dict[str, Any]]:
    if turn.thinking:
        yield {"kind": "thinking", "text": turn.thinking}
    text = turn.text if turn.text is not None else turn.cut_text
    if text:
        part: dict[str, Any] = {"kind": "text", "text": text}
        yield part if turn.complete else part | {"interrupted": True}
    for call in turn.calls.values():
        yield {
            "kind": "tool",
            "toolCallId": call.id,
            "toolName": call.name,
            "input": call.input,
            "result": call.end.result if call.end is not None else None,
            "isError": call.end.is_error if call.end is not None else None,
            "granted": call.response.granted if call.response is not None else None,
            **_kept(call),
        }
        if call.agent is not None:
            yield {
                "kind": "subagent",
                "toolCallId": call.id,
                "agentId": call.agent.agent_id,
                "name": call.agent.name,
                "status": call.complete.status if call.complete is not None else "running",
            }


def _kept(call: Call) -> dict[str, Any]:
    """Return what there is of a call's output beside its result, and where it can be fetched."""
    end = call.end
    if end is None or (end.content is None and end.output_bytes_kept is None):
        return {}
    shown: dict[str, Any] = {"outputSeq": call.end_seq}
    if end.output_bytes_kept is not None:
        shown["outputBytesKept"] = end.output_bytes_kept
    if end.content is not None:
        shown["content"] = [part.model_dump(mode="json") for part in end.content]
    return shown
