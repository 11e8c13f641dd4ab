"""What all runs of a profile may take in a day of UTC, and what they have taken of it.

The sums stand in the log, and grow in the transaction of each answer: they outlive the process, and
the threads in which the money was spent.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

from ownware_gateway.errors import GatewayError
from ownware_gateway.log import DAY_MS, Log, Spent
from ownware_gateway.profile import Profile

MINUTE_MS: Final = 60_000


class Budgets:
    """The daily budgets of all profiles; `clock_ms` is the one that stamps the log."""

    def __init__(self, log: Log, clock_ms: Callable[[], int]) -> None:
        self._log = log
        self._clock_ms = clock_ms
        #: Model calls under way, by profile: none of them is in the sums yet.
        self._asked: Counter[str] = Counter()

    async def today(self, profile: Profile) -> tuple[Spent, int]:
        """Return what the profile's runs have spent today, and when the day ends, in ms."""
        day = self._clock_ms() // DAY_MS
        return await self._log.spent(profile.name, day), (day + 1) * DAY_MS

    async def admit(self, profile: Profile) -> None:
        """Raise GatewayError `budget_exceeded` when no run of the profile may begin today."""
        if not profile.execution.per_day.limited:
            return
        spent, ends_at = await self.today(profile)
        why = self._used_up(profile, spent, ends_at, under_way=0)
        if why is not None:
            left_s = (ends_at - self._clock_ms()) / 1000
            raise GatewayError("budget_exceeded", why, retry_after_s=left_s, resetsAt=ends_at)

    @contextlib.contextmanager
    def asking(self, profile: Profile) -> Iterator[int]:
        """Count a model call for as long as it takes; the value is how many began before it."""
        before = self._asked[profile.name]
        self._asked[profile.name] += 1
        try:
            yield before
        finally:
            self._asked[profile.name] -= 1
            if not self._asked[profile.name]:
                del self._asked[profile.name]

    async def used_up(self, profile: Profile, under_way: int) -> str | None:
        """Return which budget leaves no room for another model call, in a sentence, or None.

        Those `under_way` are sure to be answers; what they will cost is not known, so a budget of
        money may be passed by as many calls as are under way at that moment.
        """
        if not profile.execution.per_day.limited:
            return None
        spent, ends_at = await self.today(profile)
        return self._used_up(profile, spent, ends_at, under_way)

    def _used_up(self, profile: Profile, spent: Spent, ends_at: int, under_way: int) -> str | None:
        day = profile.execution.per_day
        if day.max_cost_usd is not None and spent.cost_usd >= day.max_cost_usd:
            taken = f"{spent.cost_usd:.4g} of {day.max_cost_usd:g} US dollars"
            name = "maxCostUsd"
        elif day.max_turns is not None and spent.turns + under_way >= day.max_turns:
            taken, name = f"{spent.turns + under_way} of {day.max_turns} model calls", "maxTurns"
        elif day.max_time is not None and spent.active_ms >= day.max_time:
            minutes = spent.active_ms / MINUTE_MS, day.max_time / MINUTE_MS
            taken, name = f"{minutes[0]:.4g} of {minutes[1]:g} minutes", "maxTime"
        else:
            return None
        until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ends_at // 1000))
        return (
            f"Runs of the profile {profile.name} have taken {taken} today "
            f"(execution.perDay.{name}); there is more from {until} on."
        )
