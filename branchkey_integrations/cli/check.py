"""``check``: connect as a leaf and say what works, a line each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from branchkey_integrations.api import Api
from branchkey_integrations.client import Client
from branchkey_integrations.config import Endpoint, RetryPolicy, check_verify
from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import BranchKeyError
from branchkey_integrations.transport import Transport

#: Somebody sits and waits for the answer, so there is one repeat only.
_RETRY = RetryPolicy(attempts=2, budget_s=5.0)


def run_check(arguments: argparse.Namespace) -> int:
    """Check credentials, run, branch configuration and the notification channel; gives 1 when one of them failed.

    A failure of one does not end the check of the others, so that all that is wrong is known at once.

    Raises:
        CredentialsError, ConfigurationError: without them nothing can be tried.
    """
    source = None if arguments.credentials in (None, "env") else arguments.credentials
    credentials = Credentials.load(source)
    endpoint = Endpoint.parse(arguments.host)
    verify = check_verify(arguments.ca) if arguments.ca is not None else True
    _good("credentials", f"leaf {credentials.name!r} ({credentials.id}) of branch {credentials.branch_id}")

    transport = Transport(endpoint, credentials, verify=verify, timeout_s=arguments.timeout_s, retry=_RETRY)
    try:
        api = Api(transport, credentials)
        results = [
            _try("run", lambda: _run(api)),
            _try("configuration", lambda: _configuration(api)),
            _try("notifications", lambda: _notifications(arguments, credentials)),
        ]
    finally:
        transport.close()
    return 0 if all(results) else 1


def _run(api: Api) -> str:
    details = api.run_details()
    hint = "" if details.status == "start" else "; updates are refused until it is started"
    return f"status {details.status!r}, number {details.number}{hint}"


def _configuration(api: Api) -> str:
    branch = api.branch_config().get("branch")
    name = branch.get("name") if isinstance(branch, dict) else None
    return f"branch {name!r}" if name else "there, without a branch name"


def _notifications(arguments: argparse.Namespace, credentials: Credentials) -> str:
    client = Client(
        credentials,
        host=arguments.host,
        rbmq_host=arguments.rbmq_host,
        rbmq_port=arguments.rbmq_port,
        ssl=True if arguments.ca is None else arguments.ca,
        notifications=arguments.notifications,
        retry=_RETRY,
        timeout_s=arguments.timeout_s,
    )
    # The constructor returns when the channel is ready and raises when it is refused.
    with client:
        return f"ready over {client.notifications}"


def _try(what: str, check: Callable[[], str]) -> bool:
    try:
        _good(what, check())
    except BranchKeyError as error:
        sys.stdout.flush()
        print(f"error: {what}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return False
    return True


def _good(what: str, found: str) -> None:
    print(f"ok     {what + ':':<15} {found}", flush=True)
