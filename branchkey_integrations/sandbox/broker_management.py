"""Create leaves on a RabbitMQ that runs already, over its management HTTP API."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import requests
from requests.auth import HTTPBasicAuth

from branchkey_integrations.errors import SandboxError
from branchkey_integrations.sandbox.broker_definitions import ALL_RIGHTS, leaf_permissions

_TIMEOUT_S = 10.0
_MANAGEMENT_PORT = 15672
_AMQP_PORT = 5672


class ManagedBroker:
    """Talk to the management API as an administrator.

    Args:
        url: ``amqp://user:password@host:port``, optionally with ``?management=http://host:15672``.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._user = unquote(parts.username or "guest")
        self._password = unquote(parts.password or "guest")
        host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else str(parts.hostname)
        login = f"{quote(self._user, safe='')}:{quote(self._password, safe='')}"
        self.amqp_url = f"amqp://{login}@{host}:{parts.port or _AMQP_PORT}"
        given = parse_qs(parts.query).get("management", [""])[0]
        self._base = (given or f"http://{host}:{_MANAGEMENT_PORT}").rstrip("/")
        self._session = requests.Session()
        # An auth object of ours keeps requests from taking another login out of .netrc.
        self._session.auth = HTTPBasicAuth(self._user, self._password)

    def check(self) -> None:
        """See whether the API answers and admits this user as an administrator.

        Raises:
            SandboxError: it does not; says what is needed.
        """
        try:
            tags = self._call("GET", "whoami").json().get("tags", "")
        except (ValueError, AttributeError):
            raise self._needed("an answer of something else") from None
        if "administrator" not in (tags.split(",") if isinstance(tags, str) else tags):
            raise self._needed("a user without the tag administrator")

    def add_leaf(self, tree_id: str, branch_id: str, leaf_id: str, session_token: str) -> None:
        """Create vhost, user, permissions, exchange, queue and binding; what exists stays (0.07 s)."""
        tree, branch, leaf = (quote(name, safe="") for name in (tree_id, branch_id, leaf_id))
        queue = {"durable": True, "auto_delete": False, "arguments": {}}
        self._call("PUT", f"vhosts/{tree}")
        self._call("PUT", f"permissions/{tree}/{quote(self._user, safe='')}", ALL_RIGHTS)
        self._call("PUT", f"users/{leaf}", {"password": session_token, "tags": ""})
        self._call("PUT", f"permissions/{tree}/{leaf}", leaf_permissions(leaf_id))
        self._call("PUT", f"exchanges/{tree}/{branch}", {"type": "fanout", **queue})
        self._call("PUT", f"queues/{tree}/{leaf}", queue)
        self._call("POST", f"bindings/{tree}/e/{branch}/q/{leaf}", {"routing_key": "", "arguments": {}})

    def close(self) -> None:
        """Close the HTTP connections."""
        self._session.close()

    def _call(self, method: str, path: str, body: Any = None) -> requests.Response:
        try:
            answer = self._session.request(
                method, f"{self._base}/api/{path}", json=body, timeout=_TIMEOUT_S, allow_redirects=False
            )
        except requests.RequestException as error:
            raise self._needed(f"no answer ({type(error).__name__})") from None
        if answer.status_code in (401, 403):
            raise self._needed(f"a refusal of user {self._user!r} ({answer.status_code})")
        if not 200 <= answer.status_code < 300:
            raise SandboxError(
                what=f"broker management, {method} {path.split('/')[0]}",
                expected="success",
                found=f"status {answer.status_code}: {answer.text[:200]}",
                fix="Remove what is in the way on the broker, or use rabbitmq='auto'",
            )
        return answer

    def _needed(self, found: str) -> SandboxError:
        parts = urlsplit(self._base)
        return SandboxError(
            what="rabbitmq",
            expected=f"the management HTTP API at {parts.hostname}:{parts.port or 80} and an administrator's login",
            found=found,
            fix="Run: rabbitmq-plugins enable rabbitmq_management; name another place by ?management=http://host:15672",
        )
