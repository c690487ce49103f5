"""What a leaf needs on a RabbitMQ, in the form of RabbitMQ's ``definitions.json``.

Names are those measured on the official clients: virtual host = tree, fanout exchange = branch, user and queue = leaf. That
the platform's own exchange type and queue arguments are the same is not known; no client depends on them.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from typing import Any

ALL_RIGHTS = {"configure": ".*", "write": ".*", "read": ".*"}


def password_hash(password: str) -> str:
    """Hash a password as RabbitMQ's ``rabbit_password_hashing_sha256`` does: base64(salt + SHA-256(salt + password))."""
    salt = secrets.token_bytes(4)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def user_definition(name: str, password: str, *tags: str) -> dict[str, Any]:
    """Describe a user."""
    return {
        "name": name,
        "password_hash": password_hash(password),
        "hashing_algorithm": "rabbit_password_hashing_sha256",
        "tags": list(tags),
    }


def leaf_permissions(leaf_id: str) -> dict[str, str]:
    """Give the least permission that a leaf's listener needs: read its own queue."""
    # Ids may hold characters that mean something in a pattern, such as dots.
    escaped = "".join(each if each.isalnum() or each in "-_" else f"\\{each}" for each in leaf_id)
    return {"configure": "", "write": "", "read": f"^{escaped}$"}


def leaf_definitions(
    tree_id: str, branch_id: str, leaf_id: str, session_token: str, admin: str = ""
) -> dict[str, list[dict[str, Any]]]:
    """Describe all that a leaf needs; ``admin`` also gets all rights in its tree."""
    permissions = [{"user": leaf_id, "vhost": tree_id, **leaf_permissions(leaf_id)}]
    if admin:
        permissions.append({"user": admin, "vhost": tree_id, **ALL_RIGHTS})
    lasting = {"vhost": tree_id, "durable": True, "auto_delete": False, "arguments": {}}
    binding = {"source": branch_id, "vhost": tree_id, "destination": leaf_id, "destination_type": "queue"}
    return {
        "vhosts": [{"name": tree_id}],
        "users": [user_definition(leaf_id, session_token)],
        "permissions": permissions,
        "exchanges": [{"name": branch_id, "type": "fanout", "internal": False, **lasting}],
        "queues": [{"name": leaf_id, **lasting}],
        "bindings": [{**binding, "routing_key": "", "arguments": {}}],
    }
