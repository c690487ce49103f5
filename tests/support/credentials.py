"""Credentials for tests, and the list of secrets that must never show in a log."""

from __future__ import annotations

import re
import uuid

from branchkey_integrations.credentials import Credentials

#: Shorter strings occur in ordinary text by chance and would accuse the innocent.
SHORTEST_SECRET = 12

_secrets: set[str] = set()
#: Their first letters, by which a longer text is searched for all of them at once.
_heads: set[str] = set()
#: Those that fixtures and modules made, and those of the test that runs.
_lasting: set[str] = set()
_of_the_test: set[str] = set()
_LONG = 20_000
_WORD = re.compile(rf"[\w-]{{{SHORTEST_SECRET},}}")
#: As presigned links and the WebSocket's address carry them; what was hidden by us is no find.
_LINK = re.compile(r"[?&](?:x-amz-)?(?:signature|ticket|request_id)=[\w%.~+/-]{8,}", re.IGNORECASE)


def register_secret(value: str) -> str:
    """Have every later log record searched for ``value`` (a ticket, a signature…); returns it."""
    if len(value) >= SHORTEST_SECRET:
        _secrets.add(str(value))
        _heads.add(str(value[:SHORTEST_SECRET]))
        _of_the_test.add(str(value))
    return value


def keep_secrets_of_fixtures() -> None:
    """Take what was registered so far for secrets that outlive the test: its fixtures may be those of its module."""
    _lasting.update(_of_the_test)
    _of_the_test.clear()


def forget_secrets_of_the_test() -> None:
    """No longer count the secrets of the test that has ended among those in use."""
    _of_the_test.clear()


def forget_secrets() -> None:
    """No longer count any secret among those in use; its module has ended."""
    _lasting.clear()
    _of_the_test.clear()


def secrets_in_use() -> frozenset[str]:
    """Give those secrets that what the present test leaves behind can hold; few enough to look for each in large files."""
    return frozenset(_lasting | _of_the_test)


def holds_a_secret(text: str | bytes) -> bool:
    """Tell whether a registered secret stands anywhere in ``text``, or (in a string) a signed link or a ticket."""
    if isinstance(text, bytes):
        return any(secret.encode() in text for secret in secrets_in_use())
    if len(text) > _LONG:
        return _LINK.search(text) is not None or any(secret in text for secret in secrets_in_use())
    starts = {text[index : index + SHORTEST_SECRET] for index in range(len(text) - SHORTEST_SECRET + 1)} & _heads
    if starts and any(secret in text for secret in _secrets if secret[:SHORTEST_SECRET] in starts):
        return True
    return "=" in text and _LINK.search(text) is not None


def names_a_secret(text: str) -> bool:
    """Tell whether one of the words of ``text`` is a registered secret, or it holds a signed link or a ticket.

    Takes the same time however many secrets there are, so that every error of a whole run can be looked at.
    """
    return _LINK.search(text) is not None or any(word in _secrets for word in _WORD.findall(text))


def credential_fields(**changes: str) -> dict[str, str]:
    """Give the six documented strings, fresh at each call; ``changes`` replaces some."""
    fields = {
        "id": str(uuid.uuid4()),
        "name": "test-leaf",
        "session_token": f"token-{uuid.uuid4()}",
        "tree_id": str(uuid.uuid4()),
        "branch_id": str(uuid.uuid4()),
        "owner_id": str(uuid.uuid4()),
    }
    fields.update(changes)
    register_secret(fields["session_token"])
    return fields


def make_credentials(**changes: str) -> Credentials:
    """Make credentials with fresh ids and a fresh token; ``changes`` replaces some of the six strings."""
    return Credentials(**credential_fields(**changes))


def register_all_credentials() -> None:
    """From now on register the token of every ``Credentials`` made in this process, whoever makes it."""
    original = Credentials.__post_init__

    def checked_and_registered(self: Credentials) -> None:
        original(self)
        register_secret(self.session_token)

    Credentials.__post_init__ = checked_and_registered  # type: ignore[method-assign]
