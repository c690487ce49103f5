"""The leaves of the branch: their credentials, and who may speak as one of them."""

from __future__ import annotations

import hmac
import secrets
import uuid
from collections.abc import Mapping
from typing import Any

from branchkey_integrations.credentials import Credentials


class Roster:
    """Make leaves and recognise them. Not thread-safe for writers; readers need no lock."""

    def __init__(self) -> None:
        self.tree_id = str(uuid.uuid4())
        self.branch_id = str(uuid.uuid4())
        self._owner_id = str(uuid.uuid4())
        self._leaves: dict[str, Credentials] = {}

    def __len__(self) -> int:
        return len(self._leaves)

    @property
    def credentials(self) -> list[Credentials]:
        """All leaves, in the order of their making."""
        return list(self._leaves.values())

    def make(self, name: str | None) -> Credentials:
        """Make credentials for one more leaf, which is no member before :meth:`add`."""
        return Credentials(
            id=str(uuid.uuid4()),
            name=f"leaf-{len(self)}" if name is None else name,
            session_token=secrets.token_urlsafe(24),
            tree_id=self.tree_id,
            branch_id=self.branch_id,
            owner_id=self._owner_id,
        )

    def add(self, leaf: Credentials) -> None:
        """Take a leaf in."""
        self._leaves[leaf.id] = leaf

    def place_of(self, leaf_id: str) -> str:
        """Give the leaf's place in the order of their making, as text; unlike its id it is the same in every sandbox."""
        return str(list(self._leaves).index(leaf_id))

    def authenticate(self, header: str | None) -> Credentials | None:
        """Give the leaf whose ``Authorization: Bearer <id>:<session_token>`` this is."""
        scheme, _, value = (header or "").partition(" ")
        leaf_id, _, token = value.strip().partition(":")
        leaf = self._leaves.get(leaf_id)
        # An unknown leaf costs as much time as a known one.
        known = leaf.session_token if leaf is not None else "x" * 32
        good = hmac.compare_digest(known.encode("utf-8"), token.encode("utf-8", "surrogateescape"))
        return leaf if good and scheme.lower() == "bearer" else None

    def to_plain(self) -> dict[str, Any]:
        """Give all of it, tokens included, as what JSON can hold."""
        return {
            "tree_id": self.tree_id,
            "branch_id": self.branch_id,
            "owner_id": self._owner_id,
            "leaves": [leaf.to_dict() for leaf in self._leaves.values()],
        }

    def load_plain(self, plain: Mapping[str, Any]) -> None:
        """Take over what :meth:`to_plain` gave; KeyError, TypeError or ValueError when it is something else."""
        self.tree_id = str(plain["tree_id"])
        self.branch_id = str(plain["branch_id"])
        self._owner_id = str(plain["owner_id"])
        for each in plain["leaves"]:
            self.add(Credentials.from_dict(each))
