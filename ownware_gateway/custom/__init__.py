"""Python functions of profiles as tools: whom the operator trusts to bring them, and the limits.

`source.py` is what runs use, `keeper.py` knows the files, `process.py` runs `child.py`, in which
they are described and called: no code of a profile is ever run in the gateway's own process.
"""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from ownware_gateway.masking import Masker
from ownware_gateway.processes import Watchdog
from ownware_gateway.profile import Profile

#: Most functions that a sentence names.
NAMED_MAX: Final = 5


class Trust(NamedTuple):
    """The profiles whose code may be run: all, or those in folders of these names.

    By the folder, which the operator has named, and not by what a file in it says of itself.
    """

    everyone: bool = False
    folders: frozenset[str] = frozenset()

    def refusal(self, profile: Profile) -> str | None:
        """Return why the profile's own tools are not run, as a sentence; None when they may be."""
        folder = Path(profile.folder).name
        if not profile.functions or self.everyone or folder in self.folders:
            return None
        flag = f"--trust-profile {shlex.quote(folder)}"
        return (
            f"{named(profile.functions)} in tools/ of the profile {profile.name!r} cannot be used: "
            "it is code, and the profile is not trusted. To trust it, start the gateway with "
            f"{flag}."
        )


class Given(NamedTuple):
    """What the tools of every profile are run with.

    `environment` is what each process gets of the gateway's own; `lookup` reads another variable
    of it, which a profile's settings name.
    """

    environment: Mapping[str, str]
    workspace: Path
    lookup: Callable[[str], str | None]
    masker: Masker
    watchdog: Watchdog


def named(functions: Mapping[str, object]) -> str:
    """Return the names of functions, for the beginning of a sentence."""
    names = [repr(name) for name in list(functions)[:NAMED_MAX]]
    more = len(functions) - len(names)
    last = f"{more} more" if more else names.pop() if len(names) > 1 else ""
    return f"{', '.join(names)} and {last}" if last else names[0]
