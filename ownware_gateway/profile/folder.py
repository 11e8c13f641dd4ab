"""The profiles in a folder, always as they are on disk now."""

import difflib
import json
import os.path
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from ownware_gateway.errors import GatewayError
from ownware_gateway.profile import NOTES_FILE, Profile, Tools
from ownware_gateway.profile.explain import explain
from ownware_gateway.profile.names import Known, wrong_name

AGENT_FILES: Final = ("agent.json", "agent.yaml", "agent.yml")
FILE_BYTES_MAX: Final = 1_048_576

#: The agent that a model is when it is asked without a profile. A profile of this name in the
#: folder takes its place.
PLAIN: Final = "plain"

#: Most values of a YAML file, each counted wherever its name stands for it.
YAML_VALUES_MAX: Final = 100_000

#: Fields of a profile that stand in none of its AGENT_FILES.
_KEPT_ELSEWHERE: Final = {
    "soul": "the text of SOUL.md beside it",
    "folder": "where the file lies",
    "notes": "what AGENTS.md and the skills beside it say",
    "listed": "the files of the skills beside it",
    "functions": "what stands in tools/*.py beside it",
}


@dataclass(frozen=True, slots=True)
class Broken:
    """A profile folder whose files are wrong, and a sentence that says how."""

    folder: str
    message: str


def plain() -> Profile:
    """Return the profile of a model by itself: no tools, and nothing that it is told."""
    description = "A model by itself: no tools, no instructions."
    return Profile(name=PLAIN, description=description, tools=Tools(preset="none"))


#: What agent.json and SOUL.md hold, and the files of tools/.
_Files = tuple[list[bytes], dict[str, bytes]]


class _Kept(NamedTuple):
    """What a folder's files said when they were read last, and what came of it.

    `found` are the notes and skills of the profile that `item` is without them.
    """

    read: _Files
    item: Profile | Broken
    found: list[tuple[str, bytes | str]]
    whole: Profile | Broken
    wrong: list[str]


class Profiles:
    """The profiles in a folder, always as they are on disk now."""

    def __init__(
        self, folder: Path, known: Known | None = None, workspace: Path | None = None
    ) -> None:
        """`known` is what a profile may name; None does not look at names.

        `workspace` is where the notes lie that a profile may ask for with `memory.workspace`.
        """
        self._folder = folder
        self._known = known
        self._workspace = workspace
        self._read: dict[Path, _Kept] = {}
        #: Where the profiles lie that were found last, by name.
        self._found: dict[str, Path] = {}

    def all(self) -> list[Profile]:
        """Return the usable profiles, by name."""
        found: dict[str, Profile] = {}
        for item in self._load():
            if isinstance(item, Profile):
                found.setdefault(item.name, item)
        return sorted(found.values(), key=lambda profile: profile.name)

    def broken(self) -> list[Broken]:
        """Return what is wrong with the others."""
        items = list(self._load())
        wrong = [item for item in items if isinstance(item, Broken)]
        names = [item.name for item in items if isinstance(item, Profile)]
        wrong += [
            Broken(name, f"Two folders hold a profile named {name!r}; the first one is used.")
            for name in sorted({name for name in names if names.count(name) > 1})
        ]
        return wrong

    def warnings(self) -> list[Broken]:
        """Return what is wrong in the folders of usable profiles, and was left out."""
        usable = [item.folder for item in self._load() if isinstance(item, Profile)]
        return [
            Broken(folder.name, f"{folder.name}: {said}")
            for folder, kept in self._read.items()
            if str(folder) in usable
            for said in kept.wrong
        ]

    def is_broken(self, name: str) -> bool:
        """Whether the profile's folder is there and its files are wrong, half saved perhaps."""
        return any(item.folder == name for item in self.broken())

    def _check(self, folder: Path, item: Profile | Broken) -> Profile | Broken:
        """Return the profile unless it names what there is not."""
        if isinstance(item, Broken) or self._known is None:
            return item
        wrong = wrong_name(item, self._known)
        return item if wrong is None else Broken(folder.name, f"{folder.name}: {wrong}")

    def get(self, name: str, skills: Sequence[str] = ()) -> Profile:
        """Return the profile of this name, with the texts of these skills in its system prompt.

        There always is one named PLAIN.

        Raises GatewayError `not_found`; its message says what is wrong with the profile's file,
        if that is the reason, or which name is near.
        """
        if (profile := self.find(name)) is not None:
            return _with_skills(profile, skills) if skills else profile
        for item in self._load():
            if isinstance(item, Broken) and item.folder == name:
                raise GatewayError(
                    "not_found", f"The profile {name!r} cannot be used. {item.message}"
                )
        if name == PLAIN:
            return plain()
        names = [profile.name for profile in self.all()]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        if not near:
            hint = f" There are: {', '.join(names)}." if names else " There are no profiles."
        raise GatewayError("not_found", f"There is no profile named {name!r}.{hint}")

    def find(self, name: str) -> Profile | None:
        """Return the profile of this name as it is now, if there is a usable one.

        It is looked for where it was found last, and only then everywhere: a run does not start
        slower because there are a hundred others.
        """
        if (folder := self._found.get(name)) is not None:
            profile = self._load_from(folder)
            if isinstance(profile, Profile) and profile.name == name:
                return profile
        return next((profile for profile in self.all() if profile.name == name), None)

    def _load(self) -> Iterator[Profile | Broken]:
        try:
            folders = sorted(self._folder.iterdir()) if self._folder.is_dir() else []
        except OSError as error:
            yield Broken(self._folder.name, f"The profiles cannot be read: {error.strerror}.")
            return
        found: dict[str, Path] = {}
        for folder in folders:
            if (item := self._load_from(folder)) is not None:
                if isinstance(item, Profile):
                    found.setdefault(item.name, folder)
                yield item
        self._found = found
        there = set(folders)
        self._read = {folder: read for folder, read in self._read.items() if folder in there}

    def _load_from(self, folder: Path) -> Profile | Broken | None:
        """Return what lies in a folder now; None where no profile does."""
        try:
            for name in AGENT_FILES:
                if (file := folder / name).is_file():
                    return self._check(folder, self._load_one(folder, file))
        except OSError as error:
            return Broken(folder.name, f"A file of {folder.name} cannot be read: {error.strerror}.")
        return None

    def _load_one(self, folder: Path, file: Path) -> Profile | Broken:
        soul = folder / "SOUL.md"
        # What a file says is compared, not its time: two edits may fall into one tick of a clock.
        texts = [_read(path) if path.is_file() else b"" for path in (file, soul)]
        try:
            read = (texts, _read_code(folder))
        except ValueError as error:
            return Broken(folder.name, f"{folder.name}: {error}")
        known = self._read.get(folder)
        if known is None or known.read != read:
            item = _with_functions(_understand(folder, file.name, *texts), read[1])
            known = _Kept(read, item, [], item, [])
        self._read[folder] = known = self._with_knowledge(folder, known)
        return known.whole

    def _with_knowledge(self, folder: Path, known: _Kept) -> _Kept:
        """Return the profile with the notes and skills that lie in its folder now."""
        item = known.item
        if isinstance(item, Broken):
            return known
        has_any = item.memory.workspace or any(
            os.path.lexists(folder / name) for name in (NOTES_FILE, "skills")
        )
        if not has_any:
            # Most have none, and load nothing for it.
            return known._replace(found=[], whole=item, wrong=[]) if known.found else known
        from ownware_gateway.profile import knowledge

        found = knowledge.find(item, self._workspace)
        if found == known.found:
            return known
        whole, wrong = knowledge.understand(item, found)
        return known._replace(found=found, whole=whole, wrong=wrong)


def _with_skills(profile: Profile, names: Sequence[str]) -> Profile:
    from ownware_gateway.profile import knowledge

    return knowledge.with_skills(profile, names)


def _read(path: Path) -> bytes:
    with path.open("rb") as opened:
        return opened.read(FILE_BYTES_MAX + 1)


def _read_code(folder: Path) -> dict[str, bytes]:
    if not (folder / "tools").is_dir():
        return {}
    from ownware_gateway.profile.functions import read_code

    return read_code(folder)


def _with_functions(item: Profile | Broken, code: dict[str, bytes]) -> Profile | Broken:
    """Return the profile with the names of its own tools, none of which is run for that."""
    if not code or isinstance(item, Broken) or not item.tools.custom.enabled:
        return item
    from ownware_gateway.profile.functions import functions

    try:
        found = functions(code)
    except ValueError as error:
        return Broken(Path(item.folder).name, f"{Path(item.folder).name}/{error}")
    names = {name: list(function.parameters) for name, function in found.items()}
    return item.model_copy(update={"functions": names})


def _understand(folder: Path, name: str, agent: bytes, soul: bytes) -> Profile | Broken:
    where = f"{folder.name}/{name}"
    for part, said in ((name, agent), ("SOUL.md", soul)):
        if len(said) > FILE_BYTES_MAX:
            return Broken(folder.name, f"{folder.name}/{part} is over {FILE_BYTES_MAX} bytes.")
    try:
        soul_text = soul.decode("utf-8-sig")
        data = _parse(name, agent.decode("utf-8-sig"))
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
        return Broken(folder.name, f"A file of {folder.name} cannot be read: {reason}.")
    except ValueError as error:
        return Broken(folder.name, f"{where} is not {error}.")
    if not isinstance(data, dict):
        return Broken(folder.name, f'{where} must hold an object, like {{"name": "assistant"}}.')
    for field, kept in _KEPT_ELSEWHERE.items():
        if field in data:
            return Broken(folder.name, f"{where}: the field {field!r} is {kept}.")
    try:
        profile = Profile.model_validate({**data, "soul": soul_text, "folder": str(folder)})
        profile.model_dump_json()
    except ValidationError as error:
        return Broken(folder.name, f"{where}: {explain(error, Profile)}")
    except PydanticSerializationError:
        return Broken(folder.name, f"{where} holds half a character, like \\ud800 alone.")
    return profile


def _parse(name: str, text: str) -> Any:
    """Return what a file holds. Raises ValueError: what it is not, and where."""
    kind = "JSON" if name.endswith(".json") else "YAML"
    try:
        return json.loads(text) if kind == "JSON" else _parse_yaml(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"JSON: {error.msg} at {where}") from error
    except RecursionError as error:
        raise ValueError(f"{kind} that can be used: it is nested too deep") from error
    # A number or a date that Python cannot hold is a plain ValueError in both formats.
    except ValueError as error:
        raise ValueError(f"{kind}: {' '.join(str(error).split())}".rstrip(".")) from error


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    _check_values(value)
    return value


def _check_values(value: Any) -> None:
    """Raise ValueError where there are too many: a few lines can stand for millions."""
    left, count = [value], 0
    while left:
        item = left.pop()
        count += 1
        if count > YAML_VALUES_MAX:
            raise ValueError(f"it stands for more than {YAML_VALUES_MAX} values")
        if isinstance(item, dict):
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)
