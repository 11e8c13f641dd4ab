"""Makes room in a model's window: says how full it is, drops tool results, has a summary written.

All of it is events of the run. `compaction.py` decides what a prompt leaves out; imported when a
prompt first becomes long.
"""

import asyncio
import dataclasses
from collections.abc import Sequence
from contextlib import aclosing
from typing import Final, Literal, Protocol

from ownware_gateway.calls import Assignment, Parts
from ownware_gateway.compaction import (
    ANSWER_FACTOR,
    INSTRUCTIONS,
    OMITTED,
    Drop,
    Room,
    answer_tokens,
    cut,
    cut_results,
    drop_results,
    pieces,
    question,
    room,
    said,
    shortened,
    summary_tokens,
)
from ownware_gateway.conversation import (
    conversation,
    kept_with_summary,
    last_failure,
    told_of,
    trim,
)
from ownware_gateway.errors import GatewayError
from ownware_gateway.events import (
    CompactionEnd,
    CompactionStart,
    ContextPressure,
    Event,
    Position,
    ToolResultDrop,
    Usage,
)
from ownware_gateway.log import Commit, Private, Spent
from ownware_gateway.models import (
    OVERFLOW,
    Answer,
    Dispatch,
    ModelError,
    Request,
    ToolTurn,
    UserTurn,
)
from ownware_gateway.run import RETRY_S
from ownware_gateway.tokens import message_tokens, prompt_tokens, text_tokens
from ownware_gateway.transcript import Turn

#: How much fuller the window must have become to be spoken of again, or for another try after a
#: summary has failed.
MARK_SHARE: Final = 0.05

#: How long the writing of a summary may take, all its pieces and tries together.
SUMMARY_S_MAX: Final = 120.0

#: How often a model is asked for a piece of a summary, when it fails in a way that may pass.
TRIES_MAX: Final = 2

#: How often the pieces are made half as long, when they are too long for the model.
HALVINGS_MAX: Final = 3

#: What a model of unknown window is given of a conversation at a time, in tokens.
PIECE_TOKENS: Final = 24_000

#: The least that it is given.
PIECE_TOKENS_MIN: Final = 1_000


class Store(Protocol):
    """Appends events of the run and folds them into its facts; see `Drive`."""

    def __call__(
        self,
        events: Sequence[Event],
        private: Sequence[Private] = (),
        spent: Spent | None = None,
    ) -> Commit:
        """Return the commit that says when they are durable."""
        ...


class Relief:
    """Keeps the prompts of one run within its model's window."""

    def __init__(self, parts: Parts, assignment: Assignment, store: Store) -> None:
        self._parts = parts
        self._profile = assignment.profile
        self._dispatch = assignment.dispatch
        self._history = assignment.history
        self._facts = assignment.history[-1]
        self._store = store
        self._known: int | None = assignment.profile.compaction.context_window
        self._asked = self._known is not None
        #: A window that a provider's refusal has shown to be smaller.
        self._shown: int | None = None
        #: How full it was when that was last said.
        self._said = 0.0

    @property
    def _turn(self) -> Turn:
        assert self._facts.turn is not None
        return self._facts.turn

    async def make_room(self, tokens: int, request: Request) -> bool:
        """Shorten what the next prompt tells, if it must be; return whether it was.

        `tokens` is about how many the request has. A prompt that a provider has refused is
        shortened in any case; raises ModelError where nothing is left to be left out of it.
        """
        forced = self._turn.overflowed
        full = prompt_tokens(request)
        if forced:
            # Whatever was counted for the answers before, the provider finds it too long.
            tokens = max(tokens, full)
        window = await self._window(tokens)
        if window is None:
            return False
        sizes = room(window, self._profile)
        if not forced and tokens <= sizes.limit:
            self._said = 0.0
            return False
        self._say(tokens, window)
        if not self._profile.compaction.enabled:
            return False
        failed_at = last_failure(self._history)
        if not forced and failed_at < tokens < min(failed_at + window * MARK_SHARE, sizes.full):
            # What was tried a moment ago is not tried again with each message.
            return False
        # What a provider has counted says how far the estimates are off.
        bench = _Bench(request, tokens, max(1.0, tokens / max(full, 1)), sizes, forced)
        shorter = await self._shorten(bench)
        if forced and not shorter:
            raise ModelError(
                "The prompt is too long for the model, and there is nothing that could be left out "
                "of it. Send less, or choose a model with a larger window.",
                code=OVERFLOW,
            )
        return shorter

    async def _window(self, tokens: int) -> int | None:
        """Return the window, as the profile, the catalogue or a refusal has it."""
        if not self._asked:
            self._known = await self._parts.catalogue.window(self._dispatch.id)
            self._asked = True
        if self._turn.overflowed:
            self._shown = min(tokens, self._shown or tokens)
        found = [window for window in (self._known, self._shown) if window is not None]
        return min(found, default=None)

    def _say(self, tokens: int, window: int) -> None:
        level = tokens / window
        if level < self._said + MARK_SHARE:
            return
        self._said = level
        self._store(
            [
                ContextPressure(
                    level=round(min(level, 1.0), 3),
                    token_count=tokens,
                    context_window=window,
                    turn_index=self._turn.index,
                )
            ]
        )

    async def _shorten(self, bench: "_Bench") -> bool:
        """Drop results if that is enough; otherwise have a summary, or what must do without one."""
        keep = self._profile.compaction.keep_turns
        drop = drop_results(self._history, keep)
        if drop is not None and bench.tokens - drop.tokens_saved * bench.ratio <= bench.sizes.goal:
            await self._drop(drop)
            return True
        shorter = False
        through = self._cut(bench)
        if through is not None:
            shorter = await self._compact(bench, through)
            if not shorter and (bench.forced or bench.tokens > bench.sizes.full):
                await self._omit(bench, through)
                shorter = True
        left = self._tokens(bench)
        if left > bench.sizes.full or (bench.forced and not shorter):
            # Results of the newest turn alone are more than fits.
            fixed = left / bench.ratio - self._results_tokens()
            last = cut_results(self._history, int(bench.sizes.goal / bench.ratio - fixed))
            if last is not None:
                await self._drop(last)
                shorter = True
        return shorter

    def _cut(self, bench: "_Bench") -> Position | None:
        keep = self._profile.compaction.keep_turns
        said_now = sum(map(message_tokens, bench.request.messages))
        fixed = prompt_tokens(bench.request) - said_now + summary_tokens(bench.sizes.window)
        left = int(bench.sizes.goal / bench.ratio) - fixed
        through = cut(self._history, keep, left)
        if through is None and bench.forced:
            # All that was to stay is too much for the provider.
            through = cut(self._history, 1, 0)
        return through

    def _tokens(self, bench: "_Bench", also: CompactionEnd | None = None) -> int:
        """Return about how many tokens the prompt has now, or would have then."""
        messages = conversation(self._history, also=also)
        return int(
            prompt_tokens(dataclasses.replace(bench.request, messages=messages)) * bench.ratio
        )

    def _results_tokens(self) -> int:
        told = conversation(self._history)
        return sum(text_tokens(message.text) for message in told if isinstance(message, ToolTurn))

    async def _drop(self, drop: Drop) -> None:
        event = ToolResultDrop(
            dropped_count=drop.results,
            bytes_reclaimed=drop.bytes_saved,
            kept_chars=drop.kept_chars,
            through=drop.through,
            turn_index=self._turn.index,
        )
        self._said = 0.0
        await self._store([event]).wait()

    # -- a summary

    async def _compact(self, bench: "_Bench", through: Position) -> bool:
        """Have a summary stand for what was said up to a place; return whether it does now."""
        await self._store([self._start(bench, "summary")]).wait()
        writer = _Writer(self._parts, summary_tokens(bench.sizes.window))
        detail: str | None = None
        summary = ""
        try:
            async with asyncio.timeout(SUMMARY_S_MAX):
                summary = await self._written(writer, bench, through)
        except TimeoutError:
            detail = f"There was no summary within {SUMMARY_S_MAX:g} s."
        except ModelError as error:
            detail = self._parts.masker.text(error.message)
        end = self._end(bench, "summary", through, self._parts.masker.text(summary))
        if detail is None and end.post_token_count >= bench.tokens:
            detail = "The summary is as long as what it would stand for."
        if detail is not None:
            end = end.model_copy(
                update={
                    "status": "failed",
                    "post_token_count": bench.tokens,
                    "saved_percent": 0,
                    "summary": None,
                    "through": None,
                    "detail": detail,
                }
            )
        if writer.usage.model:
            end = end.model_copy(update={"usage": writer.usage})
        await self._keep(end)
        return detail is None

    async def _written(self, writer: "_Writer", bench: "_Bench", through: Position) -> str:
        """Ask the small model, and the run's own one where that fails. Raises ModelError."""
        memory = told_of(self._history).summary or ""
        texts = said(self._history, through)
        failure: ModelError | None = None
        for dispatch in self._writers():
            own = dispatch.id == self._dispatch.id
            window = bench.sizes.window if own else await self._parts.catalogue.window(dispatch.id)
            try:
                return await writer.write(dispatch, memory, texts, window)
            except ModelError as error:
                failure = failure or error
        assert failure is not None
        raise failure

    def _writers(self) -> list[Dispatch]:
        small = self._profile.small_fast_model
        if small is None or small == self._dispatch.id:
            return [self._dispatch]
        try:
            return [self._parts.catalogue.resolve(small), self._dispatch]
        except GatewayError:
            # Its provider has no key here.
            return [self._dispatch]

    async def _omit(self, bench: "_Bench", through: Position) -> None:
        """Leave out what there is no summary of, with a sentence in its place."""
        before = told_of(self._history).summary or ""
        summary = before if before.endswith(OMITTED) else f"{before}\n\n{OMITTED}".strip()
        end = self._end(bench, "omission", through, summary)
        self._store([self._start(bench, "omission")])
        await self._keep(end)

    def _start(self, bench: "_Bench", strategy: Literal["summary", "omission"]) -> CompactionStart:
        return CompactionStart(
            strategy=strategy, pre_token_count=bench.tokens, turn_index=self._turn.index
        )

    def _end(
        self,
        bench: "_Bench",
        strategy: Literal["summary", "omission"],
        through: Position,
        summary: str,
    ) -> CompactionEnd:
        end = CompactionEnd(
            strategy=strategy,
            status="succeeded",
            pre_token_count=bench.tokens,
            post_token_count=0,
            saved_percent=0,
            summary=summary,
            through=through,
            turn_index=self._turn.index,
        )
        left = self._tokens(bench, also=end)
        saved = max(0, round(100 * (1 - left / max(bench.tokens, 1))))
        return end.model_copy(update={"post_token_count": left, "saved_percent": saved})

    async def _keep(self, end: CompactionEnd) -> None:
        private = []
        if end.through is not None:
            private.append(Private("summary", kept_with_summary(self._history, end.through)))
            self._said = 0.0
        cost_usd = end.usage.cost_usd if end.usage is not None else None
        spent = Spent(cost_usd) if cost_usd else None
        await self._store([end], private, spent).wait()
        trim(self._history)


@dataclasses.dataclass(frozen=True, slots=True)
class _Bench:
    """The prompt that is to be shortened, its tokens, and by what factor estimates are too low."""

    request: Request
    tokens: int
    ratio: float
    sizes: Room
    forced: bool


class _Writer:
    """Has models write a summary of so many tokens; `usage` is what they have used."""

    def __init__(self, parts: Parts, tokens: int) -> None:
        self._parts = parts
        self._tokens = tokens
        self.usage = Usage()

    async def write(
        self, dispatch: Dispatch, memory: str, texts: Sequence[str], window: int | None
    ) -> str:
        """Return a summary of the texts and of the memory before them. Raises ModelError."""
        # Beside the piece there must be room for the memory, the instructions and the answer.
        beside = text_tokens(INSTRUCTIONS) + (1 + ANSWER_FACTOR) * self._tokens
        size = PIECE_TOKENS if window is None else window * 9 // 10 - beside
        for _ in range(HALVINGS_MAX):
            try:
                summary = memory
                for piece in pieces(texts, max(size, PIECE_TOKENS_MIN)):
                    summary = await self._ask(dispatch, question(summary, piece, self._tokens))
                return summary
            except ModelError as error:
                if error.code != OVERFLOW:
                    raise
                size //= 2
        raise ModelError("The conversation is too long for the model that is to summarise it.")

    async def _ask(self, dispatch: Dispatch, text: str) -> str:
        request = Request(
            dispatch.name,
            [UserTurn(text)],
            INSTRUCTIONS,
            max_tokens=answer_tokens(self._tokens),
        )
        for attempt in range(1, TRIES_MAX + 1):
            try:
                return await self._answer(dispatch, request)
            except ModelError as error:
                if error.retry is None or attempt == TRIES_MAX:
                    raise
                await asyncio.sleep(RETRY_S)
        raise AssertionError("the last try returns or raises")

    async def _answer(self, dispatch: Dispatch, request: Request) -> str:
        answer: Answer | None = None
        async with aclosing(dispatch.model.stream(request)) as batches:  # type: ignore[type-var]
            async for parts in batches:
                for part in parts:
                    answer = part if isinstance(part, Answer) else answer
        if answer is None:
            raise ModelError("The summary ended in the middle.", retry="connection")
        usage = await self._parts.catalogue.price(dispatch.id, answer.usage)
        self.usage = self.usage.plus(usage)
        summary = shortened(answer.turn.text, self._tokens)
        if answer.stop_reason == "refusal" or not summary:
            raise ModelError(f"{dispatch.id} gave no summary ({answer.stop_reason}).")
        return summary
