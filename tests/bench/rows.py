"""What a benchmark says: one line of the table."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """A figure and what to hold it against.

    `beside` is what was measured in the same run to compare with, in words; `target` is what the
    figure should be, empty where there is none, and then `met` is True.
    """

    what: str
    value: float
    unit: str
    beside: str
    target: str
    met: bool

    def line(self) -> str:
        """Return the row as a line of text."""
        mark = "  " if not self.target else "ok" if self.met else "NO"
        figure = f"{self.value:>9.2f} {self.unit:<4} {self.target:<9}"
        return f"{mark}  {self.what:<58} {figure} {self.beside}"
