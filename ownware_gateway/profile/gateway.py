"""What the gateway has for all profiles: the files that name it, and which profile uses what."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from ownware_gateway.errors import BootError
from ownware_gateway.profile import SEPARATOR, Tools
from ownware_gateway.profile.explain import explain

FILE_BYTES_MAX: Final = 1_048_576

_log: Final = logging.getLogger(__name__)

Named = TypeVar("Named", bound=BaseModel)


class Form(NamedTuple):
    """The form of a file: what it is called, and its field that holds things by their names."""

    called: str
    field: str
    model: type[BaseModel]


class Files(Generic[Named]):
    """What the files name, as they say now; a name in a later file beats an earlier one.

    A file that becomes wrong leaves what it said before; `problem` says what is wrong with it.
    """

    def __init__(self, form: Form, optional: Path, required: Path | None = None) -> None:
        """Read them; raise BootError when one is wrong, or the required one is not there."""
        if required is not None and not required.is_file():
            raise BootError(f"There is no {form.called} {required}.")
        self._form = form
        self._files = [optional, *([required] if required is not None else [])]
        self._read: list[bytes] = []
        self._found: dict[str, Named] = {}
        self._folders: dict[str, str] = {}
        self.problem: str | None = None
        self._load()

    @property
    def known(self) -> Mapping[str, Named]:
        """What they name, as they were read last."""
        return self._found

    def folder(self, name: str) -> str:
        """Return the folder of the file that a name stands in."""
        return self._folders[name]

    def refresh(self) -> Mapping[str, Named]:
        """Read the files if they have changed, and return what they name."""
        try:
            self._load()
        except BootError as error:
            if str(error) != self.problem:
                _log.warning("%s What it said before still holds.", error)
            self.problem = str(error)
        return self._found

    def _load(self) -> None:
        read = [_read(self._form.called, path) for path in self._files]
        if read == self._read:
            return
        found: dict[str, Any] = {}
        folders: dict[str, str] = {}
        for path, text in zip(self._files, read, strict=True):
            here = _understand(self._form, path, text)
            found |= here
            folders |= dict.fromkeys(here, str(path.parent))
        self._read, self._found, self._folders, self.problem = read, found, folders, None


def _read(called: str, path: Path) -> bytes:
    try:
        with path.open("rb") as opened:
            return opened.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise BootError(f"The {called} {path} cannot be read: {error.strerror}.") from error


def _understand(form: Form, path: Path, text: bytes) -> Mapping[str, Any]:
    if not text.strip():
        return {}
    if len(text) > FILE_BYTES_MAX:
        raise BootError(f"The {form.called} {path} is over {FILE_BYTES_MAX} bytes.")
    try:
        data = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BootError(f"The {form.called} {path} is not JSON{where}.") from error
    if not isinstance(data, dict):
        raise BootError(f'The {form.called} {path} must hold {{"{form.field}": {{…}}}}.')
    try:
        found: Any = form.model.model_validate(data)
    except ValidationError as error:
        # `from None`: the cause quotes what was given, secrets included.
        message = f"The {form.called} {path}: {explain(error, form.model)}"
        raise BootError(message) from None
    named: Mapping[str, Any] = found.named
    return named


def used(
    tools: Tools, own: Mapping[str, Named], gateway: Mapping[str, Named]
) -> Iterator[tuple[bool, str, Named]]:
    """Yield what a profile's agent uses: whether it is the profile's own, its name, and it.

    Of the gateway's it is what the profile names in `allow`, or all under the preset `full`; what
    the profile itself declares under a name goes before it.
    """
    for name, settings in own.items():
        if not tools.denies(f"{name}{SEPARATOR}*"):
            yield True, name, settings
    for name, settings in gateway.items():
        named = any(item.startswith(f"{name}{SEPARATOR}") for item in tools.allow)
        if (
            not tools.declares(name)
            and (named or tools.preset == "full")
            and not tools.denies(f"{name}{SEPARATOR}*")
        ):
            yield False, name, settings
