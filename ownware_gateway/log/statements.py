"""The log's SQL: named statements and numbered schema versions, kept in `.sql` files."""

import re
from functools import cache
from pathlib import Path
from typing import Final

#: Not by importlib.resources, which would take a hundredth of a start.
_FOLDER: Final = Path(__file__).parent / "sql"


@cache
def statements() -> dict[str, str]:
    """Return every statement of queries.sql by its name."""
    text = (_FOLDER / "queries.sql").read_text("utf-8")
    parts = re.split(r"^-- (\w+) --$", text, flags=re.MULTILINE)
    return {
        name: body.strip().rstrip(";") for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def schema_versions() -> list[tuple[int, str]]:
    """Return (version, script) of every schema change, oldest first."""
    files = sorted(
        (item for item in _FOLDER.iterdir() if re.fullmatch(r"\d{4}_\w+\.sql", item.name)),
        key=lambda item: item.name,
    )
    return [(int(item.name[:4]), item.read_text("utf-8")) for item in files]
