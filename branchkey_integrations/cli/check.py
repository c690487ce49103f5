"""``check``: connect as a leaf and say what works: a line each on standard output, and each cause of a failure on the other."""

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

    A failure of one does not end the check of the others, so that all that is wrong is known at once. What a script reads is
    on standard output: ``ok`` or ``failed``, the step, and for a failure the type of its error.

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
        failures = _Failures()
        failures.of("run", lambda: _run(api))
        failures.of("configuration", lambda: _configuration(api))
        failures.of("notifications", lambda: _notifications(arguments, credentials))
    finally:
        transport.close()
    return 1 if failures.found else 0


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


class _Failures:
    """Try step after step and tell how each ended; a cause that several share is told in full with the first of them."""

    def __init__(self) -> None:
        self.found: dict[tuple[object, ...], str] = {}  # the step at which each cause was met first

    def of(self, step: str, check: Callable[[], str]) -> None:
        """Try one step, and report it at once: the next one may take as long as its deadline lets it."""
        try:
            _good(step, check())
        except BranchKeyError as error:
            # Without `what`, which is the request: a network that is down is one cause, whatever was asked for.
            cause = (type(error), error.expected, error.found, error.fix)
            first = self.found.setdefault(cause, step)
            again = "" if first == step else f", as for {first}"
            _say("failed", step, f"{type(error).__name__}{again}")
            if first == step:
                print(f"error: {step}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def _good(what: str, found: str) -> None:
    _say("ok", what, found)


def _say(verdict: str, what: str, found: str) -> None:
    print(f"{verdict:<7}{what + ':':<15} {found}", flush=True)
