"""The own tools of profiles, for runs: what knows them is loaded with the first that may be run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ownware_gateway.custom import Given, Trust
from ownware_gateway.profile import Profile
from ownware_gateway.tools import Tool

if TYPE_CHECKING:
    from ownware_gateway.custom.keeper import Keeper


class OwnTools:
    """See `ownware_gateway.tools.Source`. Nothing is read, let alone run, of who is not trusted."""

    def __init__(self, trust: Trust, given: Given) -> None:
        self._trust = trust
        self._given = given
        self._keeper: Keeper | None = None

    async def connect(self, profile: Profile) -> None:
        """Read and describe the profile's tools, unless that was done with these very files."""
        if not profile.functions or self._trust.refusal(profile) is not None:
            return
        if self._keeper is None:
            from ownware_gateway.custom.keeper import Keeper

            self._keeper = Keeper(self._given)
        await self._keeper.connect(profile)

    def tools(self, profile: Profile) -> Mapping[str, Tool]:
        """Return the tools of the profile, as its files were when it was last connected."""
        if self._keeper is None or not profile.functions or self._trust.refusal(profile):
            return {}
        return self._keeper.tools(profile)

    def missing(self, profile: Profile) -> Mapping[str, str]:
        """Return which of the profile's functions are no tools now, with a sentence each."""
        why = self._trust.refusal(profile)
        if why is not None:
            return dict.fromkeys(profile.functions, why)
        if self._keeper is None or not profile.functions:
            return {}
        return self._keeper.missing(profile)
