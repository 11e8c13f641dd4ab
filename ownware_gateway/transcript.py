"""What the log says happened: events folded into runs, turns and calls.

Pure but for `load`, which reads. Deltas are skipped: what they say stands whole in a later event,
save the text of a turn that was cut off, which is fetched by itself.
"""

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

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
    ToolCall,
)
from ownware_gateway.permissions import grant

PAGE: Final = 500

NOTICE: Final = "\n\n[interrupted, answering again]\n\n"


#: Images of tools' outputs that a model is sent, the newest: so many, that many fewer once there
#: are more, and so much together. Providers limit both, and what a request takes.
IMAGES_MAX: Final = 20
IMAGES_STEP: Final = 5
IMAGES_BYTES_MAX: Final = 16_777_216


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


async def _load_images(log: Log, stream: Stream, runs: Sequence[RunFacts]) -> None:
    """Fetch the images of tools' outputs that a model would be sent, and no others."""
    calls = _with_images(runs)
    for call in calls[_first_shown(calls) :]:
        images: list[File] = []
        for part in image_parts(call):
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


def image_parts(call: Call) -> list[ImagePart]:
    """Return the images that a call gave back."""
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
        if call.end is not None and call.end.content is not None and image_parts(call)
    ]


def _first_shown(calls: Sequence[Call]) -> int:
    """Return the place of the first call whose images are still sent to the model.

    Only sizes that stand in the log decide, so it is the same after a restart. It only ever moves
    on, and where it is for the number of images, by several at once: what was sent before it has
    changed, and a provider's cache of it is lost.
    """
    sizes = [sum(part.size_bytes for part in image_parts(call)) for call in calls]
    counts = [len(image_parts(call)) for call in calls]
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
