"""Credentials for tests, and the list of secrets that must never show in a log."""

from __future__ import annotations

import re
import uuid

from branchkey_integrations.credentials import Credentials

#: Shorter strings occur in ordinary text by chance and would accuse the innocent.
SHORTEST_SECRET = 12

_secrets: set[str] = set()
_WORD = re.compile(rf"[\w-]{{{SHORTEST_SECRET},}}")
#: As presigned links and the WebSocket's address carry them; what was hidden by us is no find.
_LINK = re.compile(r"[?&](?:x-amz-)?(?:signature|ticket|request_id)=[\w%.~+/-]{8,}", re.IGNORECASE)


def register_secret(value: str) -> str:
    """Have every later log record searched for ``value`` (a ticket, a signature…); returns it."""
    if len(value) >= SHORTEST_SECRET:
        _secrets.add(value)
    return value


def names_a_secret(text: str) -> bool:
    """Tell whether one of the words of ``text`` is a registered secret, or it holds a signed link or a ticket.

    Takes the same time however many secrets there are, so that every error of a whole run can be looked at.
    """
    return _LINK.search(text) is not None or any(word in _secrets for word in _WORD.findall(text))


def known_secrets() -> frozenset[str]:
    """Give the secrets registered so far, those of all credentials made in this process among them."""
    return frozenset(_secrets)


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
