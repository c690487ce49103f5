"""The six strings that make a process a leaf, and where they may come from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, Union, cast

from branchkey_integrations.errors import CredentialsError
from branchkey_integrations.redaction import Secret

ENVIRONMENT_PREFIX = "BRANCHKEY_"
#: Names a file, besides the six variables ``BRANCHKEY_ID`` … ``BRANCHKEY_OWNER_ID``.
FILE_VARIABLE = "BRANCHKEY_CREDENTIALS"

CredentialsSource = Union["Credentials", Mapping[str, Any], str, "os.PathLike[str]", None]

_ADVICE = "Create the leaf through the platform's /v2/entities endpoint and pass its answer unchanged"


@dataclass(frozen=True)
class Credentials:
    """Hold one leaf's credentials; the session token shows in no repr, also not in one of ``vars()`` or ``asdict()``.

    The field names are those of the platform's ``/v2/entities`` answer. ``id`` names the leaf, its AMQP user and its
    queue; ``tree_id`` is the AMQP virtual host; ``branch_id`` the group that is averaged. ``owner_id`` is never sent.

    Raises:
        CredentialsError: a field is missing, empty, not a string, or holds characters that cannot go into a header.
    """

    id: str
    name: str
    session_token: str
    tree_id: str
    branch_id: str
    owner_id: str = ""

    def __post_init__(self) -> None:
        # First, since an error below takes this object along in its traceback.
        if isinstance(self.session_token, str):
            object.__setattr__(self, "session_token", Secret(self.session_token))
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str):
                raise CredentialsError(
                    what=f"credentials field {field.name!r}",
                    expected="a string",
                    found=type(value).__name__,
                    fix=_ADVICE,
                )
            if not value.strip() and field.name != "owner_id":
                raise CredentialsError(
                    what=f"credentials field {field.name!r}",
                    expected="a non-empty string",
                    found="nothing",
                    fix=_ADVICE,
                )
            # ``name`` is free text and travels in a JSON body; the others become headers, paths and queue names.
            if field.name != "name" and not (value.isascii() and value.isprintable() and " " not in value):
                raise CredentialsError(
                    what=f"credentials field {field.name!r}",
                    expected="printable ASCII without blanks",
                    found="other characters",
                    fix="Copy the value again: a line break or quote may have come along",
                )
        for field_name in ("id", "branch_id"):
            if any(character in getattr(self, field_name) for character in "/?#:\\%"):
                raise CredentialsError(
                    what=f"credentials field {field_name!r}", expected="an id", found="a path or URL", fix=_ADVICE
                )

    @classmethod
    def load(cls, source: CredentialsSource = None) -> Credentials:
        """Make credentials from whatever the user has.

        Args:
            source: ready credentials, a mapping, the path of a JSON file, or None for the environment: the file named by
                ``BRANCHKEY_CREDENTIALS``, else ``BRANCHKEY_ID``, ``BRANCHKEY_NAME``, ``BRANCHKEY_SESSION_TOKEN``,
                ``BRANCHKEY_TREE_ID``, ``BRANCHKEY_BRANCH_ID`` and optionally ``BRANCHKEY_OWNER_ID``.
        """
        source = _without_plain_token(source)
        if isinstance(source, Credentials):
            return source
        if isinstance(source, Mapping):
            return cls.from_dict(source)
        if isinstance(source, (str, os.PathLike)):
            return cls.from_file(source)
        if source is None:
            return cls.from_env()
        raise CredentialsError(
            what="credentials",
            expected="a dict, the path of a JSON file, or None",
            found=type(source).__name__,
            fix=_ADVICE,
        )

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Credentials:
        """Make credentials from a mapping; unknown keys are ignored, as the platform may add some."""
        # Under the same name: whoever prints a traceback with local variables must not see the plain token.
        mapping = _without_plain_token(mapping)
        known = {field.name for field in fields(cls)}
        missing = sorted(known - {"owner_id"} - set(mapping))
        if missing:
            raise CredentialsError(
                what="credentials",
                expected="the keys " + ", ".join(field.name for field in fields(cls)),
                found=f"no {', '.join(missing)}",
                fix=_ADVICE,
            )
        return cls(**{key: mapping[key] for key in known if key in mapping})

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Credentials:
        """Read credentials from a JSON file that holds the six keys, or them under ``data``."""
        name = os.fspath(path)
        try:
            text = Path(name).read_text(encoding="utf-8-sig")  # some editors put a byte order mark in front
        except (OSError, UnicodeDecodeError) as error:
            reason = (error.strerror or "not readable") if isinstance(error, OSError) else "not UTF-8 text"
            raise CredentialsError(
                what=f"credentials file {name!r}",
                expected="a readable JSON file",
                found=reason,
                fix="Check path and permissions",
            ) from error
        try:
            content, text = json.loads(text), ""
        except (ValueError, RecursionError):
            text = ""
            # ``from None``: the decoder's error carries the whole text, and that text holds a secret.
            raise CredentialsError(
                what=f"credentials file {name!r}", expected="JSON", found="text that is not JSON", fix=_ADVICE
            ) from None
        if isinstance(content, dict) and isinstance(content.get("data"), dict):
            content = content["data"]
        content = _without_plain_token(content)
        if not isinstance(content, dict):
            raise CredentialsError(
                what=f"credentials file {name!r}", expected="a JSON object", found=type(content).__name__, fix=_ADVICE
            )
        return cls.from_dict(content)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Credentials:
        """Read credentials from ``BRANCHKEY_*`` variables; see :meth:`load`."""
        environ = _ours_of(os.environ if environ is None else environ)
        if environ.get(FILE_VARIABLE):
            return cls.from_file(environ[FILE_VARIABLE])
        variables = {field.name: ENVIRONMENT_PREFIX + field.name.upper() for field in fields(cls)}
        found = {key: environ[variable] for key, variable in variables.items() if environ.get(variable)}
        missing = [variables[key] for key in variables if key not in found and key != "owner_id"]
        if missing:
            raise CredentialsError(
                what="credentials",
                expected=f"{FILE_VARIABLE} or the BRANCHKEY_* variables in the environment",
                found=f"no {', '.join(missing)}",
                fix="Set them, or pass credentials as a dict or as the path of a JSON file",
            )
        return cls(**found)

    def to_dict(self) -> dict[str, str]:
        """Give the six strings, the secret among them, as the documented mapping."""
        # str(): the mapping is for whoever wants the plain token, to pickle it for another process, say.
        return {field.name: str(getattr(self, field.name)) for field in fields(self)}

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{field.name}={'***' if field.name == 'session_token' else repr(getattr(self, field.name))}"
            for field in fields(self)
        )
        return f"Credentials({shown})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "Credentials hold a secret and do not pickle. Give the other process the path of the credentials file,"
            " or pass to_dict() and mind where it goes."
        )

    def __copy__(self) -> Credentials:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Credentials:
        return self


def _without_plain_token(content: Any) -> Any:
    """Copy a mapping of credentials or variables, so that its repr does not show the token; give anything else as it is."""
    if not isinstance(content, Mapping):
        return content
    return {
        key: Secret(value) if _names_token(key) and isinstance(value, str) else value for key, value in content.items()
    }


def _ours_of(environ: Mapping[str, str]) -> dict[str, str]:
    """Pick our variables; the others, too, are nothing for a traceback."""
    ours = {name: value for name, value in environ.items() if name.startswith(ENVIRONMENT_PREFIX)}
    return cast("dict[str, str]", _without_plain_token(ours))


def _names_token(key: object) -> bool:
    return isinstance(key, str) and key.upper().endswith("SESSION_TOKEN")
