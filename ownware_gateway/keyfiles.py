"""Which files hold keys, by their names alone: no agent reads them, whatever its profile says.

Names are compared as file systems that fold case do. docs/profiles.md lists them.
"""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Final

#: Folders in which everything but public keys counts, one name or a name in another.
FOLDERS: Final = (
    (".ssh",),
    (".gnupg",),
    (".aws",),
    (".azure",),
    (".kube",),
    (".password-store",),
    (".config", "gcloud"),
    (".config", "gh"),
    ("etc", "ssl", "private"),
)

#: Files that count, one name or a name in a folder.
FILES: Final = (
    (".env",),
    (".envrc",),
    (".netrc",),
    ("_netrc",),
    (".pgpass",),
    (".my.cnf",),
    (".pypirc",),
    (".git-credentials",),
    (".htpasswd",),
    (".vault-token",),
    ("application_default_credentials.json",),
    ("gateway-token",),
    ("id_rsa",),
    ("id_dsa",),
    ("id_ecdsa",),
    ("id_ecdsa_sk",),
    ("id_ed25519",),
    ("id_ed25519_sk",),
    (".cargo", "credentials.toml"),
    (".docker", "config.json"),
    (".gem", "credentials"),
    ("etc", "shadow"),
    ("etc", "gshadow"),
)

#: Endings that count.
ENDINGS: Final = (".pem", ".key", ".p12", ".pfx", ".jks", ".keystore", ".kdbx", ".ppk")

#: `.env.<anything>` counts but for these, which are written to be read.
EXAMPLES: Final = frozenset({".env.dist", ".env.example", ".env.sample", ".env.template"})

#: What of a process shows its environment or its memory.
PROCESS: Final = frozenset({"auxv", "environ", "maps", "mem"})

_WILD: Final = frozenset("*?[")

#: Stands in every path that counts; most paths are told by this at once.
_TELLS: Final = re.compile(
    "|".join(
        ["[*?[]", "proc", *map(re.escape, ENDINGS)]
        + [re.escape(names[-1]) for names in (*FOLDERS, *FILES)]
    )
)


def holds_keys(path: Sequence[str]) -> bool:
    """Return whether a file of this path, part by part, is one that holds keys.

    A part may be a glob pattern: it counts when a name that counts fits it, unless nearly every
    name does.
    """
    parts = [part.lower() for part in path if part not in ("", ".", "/")]
    if not parts or not _TELLS.search("/".join(parts)):
        return False
    name = parts[-1]
    if name.endswith(".pub"):
        return False
    return (
        name.endswith(ENDINGS)
        or (name.startswith(".env.") and name not in EXAMPLES)
        or any(_stands_in(folder, parts) for folder in FOLDERS)
        or any(_fits_all(file, parts[-len(file) :]) for file in FILES)
        or _is_process(parts)
    )


def _stands_in(folder: Sequence[str], parts: Sequence[str]) -> bool:
    starts = range(len(parts) - len(folder) + 1)
    return any(_fits_all(folder, parts[start : start + len(folder)]) for start in starts)


def _fits_all(names: Sequence[str], parts: Sequence[str]) -> bool:
    return len(names) == len(parts) and all(map(_fits, names, parts))


def _fits(name: str, part: str) -> bool:
    if not set(part) & _WILD:
        return name == part
    # No pattern that begins with a wild card means names that begin with a dot.
    tells = len(part) - sum(part.count(wild) for wild in _WILD) >= (1 if part[0] == "." else 2)
    return tells and fnmatchcase(name, part) and (name[0] != "." or part[0] in ".[")


def _is_process(parts: Sequence[str]) -> bool:
    return "proc" in parts[:-1] and any(_fits(name, parts[-1]) for name in PROCESS)
