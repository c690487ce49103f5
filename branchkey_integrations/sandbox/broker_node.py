"""A private RabbitMQ node: the installed broker with its own ports and folder, for as long as it is needed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from branchkey_integrations.errors import SandboxError
from branchkey_integrations.sandbox import broker_install as install
from branchkey_integrations.sandbox.broker_definitions import ALL_RIGHTS, user_definition
from branchkey_integrations.sandbox.broker_process import Keeper, Sweeper, answers, end, free_ports, write

_READY = b"completed with"
_BOOT_S = 60.0
_CTL_S = 30.0
_TRIES = 3
_TAIL_LINES = 20


class PrivateBroker:
    """Run a private RabbitMQ node on loopback. Linux only; needs Debian's ``rabbitmq-server`` (tried with 3.10.8).

    Nothing is left running or on disk after :meth:`stop`, nor after a kill -9 of this process. Several can run side by side.

    Args:
        definitions: what shall exist from the start, in the form of RabbitMQ's ``definitions.json``; an administrator
            (see :attr:`amqp_url`) is added.
        tls: paths of certificate chain and key, for a second listener that speaks TLS.
        ca: path of the CA that signed them, if the clients do not know it.
        management: also start the management HTTP API (stopping takes 5 seconds longer).
        erl_args: further arguments of the Erlang machine, such as ``-rabbit consumer_timeout 3000``.

    Raises:
        SandboxError: on :meth:`start`, when the broker is not installed or does not come up.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        definitions: Mapping[str, Any] | None = None,
        *,
        tls: tuple[str, str] | None = None,
        ca: str | None = None,
        management: bool = False,
        erl_args: str = "",
    ) -> None:
        self.admin = "admin"
        self.password = secrets.token_urlsafe(16)
        self.port = 0
        self.tls_port: int | None = None
        self.management_port: int | None = None
        self._definitions = dict(definitions or {})
        self._tls = tls
        self._ca = ca
        self._management = management
        self._erl_args = erl_args
        self._folder = ""
        self._node = ""
        self._environment: dict[str, str] = {}
        self._epmd: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._sweeper: Sweeper | None = None
        self._keeper = Keeper()

    def __repr__(self) -> str:
        return f"PrivateBroker({self.host}:{self.port}, running={self.running})"

    def __enter__(self) -> PrivateBroker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def amqp_url(self) -> str:
        """URL with the administrator's name and password."""
        return f"amqp://{self.admin}:{self.password}@{self.host}:{self.port}"

    @property
    def running(self) -> bool:
        """Whether the node's process runs."""
        return self._server is not None and self._server.poll() is None

    @property
    def pid(self) -> int | None:
        """Process id of the node, None while it does not run."""
        return self._server.pid if self.running and self._server is not None else None

    def start(self) -> None:
        """Start the node and return when it takes connections (2.5 to 6 s)."""
        if self.running:
            return
        install.check()
        failure = SandboxError()
        for _ in range(_TRIES):
            try:
                self._prepare()
                self._boot()
            except SandboxError as error:
                failure = error
                self.stop()
                # A port that was free when it was chosen may be taken when it is used; anything else will not heal.
                if "eaddrinuse" not in error.found:
                    break
            except BaseException:
                self.stop()
                raise
            else:
                return
        raise failure

    def stop(self) -> None:
        """Stop the node in good order (1.1 s) and remove its folder."""
        for process in (self._server, self._epmd):
            if process is not None:
                end(process)
        self._server = self._epmd = None
        self._keeper.stop()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = ""
        sweeper, self._sweeper = self._sweeper, None
        if sweeper is not None:
            sweeper.dismiss()

    def restart(self, *, kill: bool = False) -> None:
        """Stop and start the node on the same ports, with what is durable kept; ``kill`` stops it by SIGKILL."""
        self.halt(kill=kill)
        self.resume()

    def halt(self, *, kill: bool = False) -> None:
        """Stop the node but keep its folder and ports for :meth:`resume`."""
        server, self._server = self._server, None
        if server is not None:
            end(server, signal.SIGKILL if kill else signal.SIGTERM)

    def resume(self) -> None:
        """Start the node again after :meth:`halt`, and return when it takes connections."""
        if not self._folder:
            raise SandboxError(what="private broker", expected="one that was halted", found="one that was stopped")
        if not self.running:
            self._boot()

    def ctl(self, *arguments: str) -> str:
        """Run ``rabbitmqctl`` against the node and return what it prints (0.4 to 0.7 s).

        Raises:
            SandboxError: it failed.
        """
        command = [install.script("rabbitmqctl"), "-q", "-n", self._node, *arguments]
        try:
            done = subprocess.run(  # noqa: S603 - no shell
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_CTL_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise SandboxError(
                what=f"rabbitmqctl {arguments[0]}", expected=f"an answer within {_CTL_S:g} s", found="none"
            ) from None
        if done.returncode != 0:
            found = (done.stderr or done.stdout).decode("utf-8", "replace")
            raise SandboxError(what=f"rabbitmqctl {arguments[0]}", expected="success", found=found or "no word")
        return done.stdout.decode("utf-8", "replace")

    def import_definitions(self, definitions: Mapping[str, Any]) -> None:
        """Create what ``definitions`` describes on the running node; what exists stays."""
        path = os.path.join(self._folder, f"import-{secrets.token_hex(4)}.json")
        write(path, json.dumps(definitions))
        try:
            self.ctl("import_definitions", path)
        finally:
            os.unlink(path)

    def log_tail(self) -> str:
        """Give the last lines of what the node wrote, for messages."""
        lines: list[str] = []
        if self._folder:
            logs = os.path.join(self._folder, "log")
            names = [os.path.join(logs, name) for name in sorted(os.listdir(logs))] if os.path.isdir(logs) else []
            for path in [*names, os.path.join(self._folder, "boot.out")]:
                with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as stream:
                    lines += [line.rstrip() for line in stream if line.strip()]
        return "\n".join(lines[-_TAIL_LINES:])

    def _prepare(self) -> None:
        folder = self._folder = tempfile.mkdtemp(prefix="branchkey-rabbitmq-")
        self._sweeper = Sweeper(folder)
        ports = free_ports(5)
        self.port, distribution, epmd = ports[:3]
        self.tls_port = ports[3] if self._tls is not None else None
        self.management_port = ports[4] if self._management else None
        self._node = f"branchkey{self.port}@localhost"
        home = os.path.join(folder, "home")
        os.mkdir(home, 0o700)
        write(os.path.join(folder, "rabbitmq.conf"), "\n".join([*self._settings(folder), ""]))
        write(os.path.join(folder, "enabled_plugins"), "[rabbitmq_management]." if self._management else "[].")
        write(os.path.join(folder, "definitions.json"), json.dumps(self._all_definitions()))
        # Only what is needed is handed on: RABBITMQ_* and ERL_* variables of the user would change the private node.
        self._environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "HOME": home,
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": os.path.join(folder, "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": os.path.join(folder, "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": os.path.join(folder, "mnesia"),
            "RABBITMQ_LOG_BASE": os.path.join(folder, "log"),
            "RABBITMQ_PID_FILE": os.path.join(folder, "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "+B i -kernel inet_dist_use_interface {127,0,0,1} " + self._erl_args
            ).strip(),
            "ERL_EPMD_PORT": str(epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_CRASH_DUMP": "/dev/null",
            # The start script then becomes the node instead of watching over it: one process, one pid.
            "RUNNING_UNDER_SYSTEMD": "true",
        }
        # Without an epmd of its own the node would start one as a daemon, which outlives everything.
        self._epmd = self._keeper.launch([install.epmd(), "-port", str(epmd)], self._environment, None)
        if not answers(epmd, self._epmd, _CTL_S):
            raise SandboxError(
                what="private broker", expected="Erlang's port mapper epmd", found="one that ended (eaddrinuse)"
            )

    def _settings(self, folder: str) -> list[str]:
        settings = [
            f"listeners.tcp.1 = {self.host}:{self.port}",
            f"load_definitions = {os.path.join(folder, 'definitions.json')}",
        ]
        if self._tls is not None:
            certificate, key = self._tls
            settings += [
                f"listeners.ssl.1 = {self.host}:{self.tls_port}",
                f"ssl_options.certfile = {os.path.abspath(certificate)}",
                f"ssl_options.keyfile = {os.path.abspath(key)}",
                "ssl_options.verify = verify_none",
                "ssl_options.fail_if_no_peer_cert = false",
            ]
            if self._ca is not None:
                settings.append(f"ssl_options.cacertfile = {os.path.abspath(self._ca)}")
        if self._management:
            settings += [f"management.tcp.ip = {self.host}", f"management.tcp.port = {self.management_port}"]
        return settings

    def _all_definitions(self) -> dict[str, Any]:
        given = self._definitions
        vhosts = [{"name": "/"}, *given.get("vhosts", [])]
        rights = [{"user": self.admin, "vhost": vhost["name"], **ALL_RIGHTS} for vhost in vhosts]
        return {
            **given,
            "vhosts": vhosts,
            "users": [user_definition(self.admin, self.password, "administrator"), *given.get("users", [])],
            "permissions": [*rights, *given.get("permissions", [])],
        }

    def _boot(self) -> None:
        boot = os.path.join(self._folder, "boot.out")
        with open(boot, "wb") as output:
            self._server = self._keeper.launch([install.script("rabbitmq-server")], self._environment, output.fileno())
        write(os.path.join(self._folder, "node.pid"), str(self._server.pid))
        deadline = time.monotonic() + _BOOT_S
        while True:
            with open(boot, "rb") as stream:
                text = stream.read()
            if _READY in text:
                return
            ended = self._server.poll() is not None
            if ended or time.monotonic() > deadline:
                raise SandboxError(
                    what="private broker",
                    expected=f"a RabbitMQ node that is up within {_BOOT_S:g} s",
                    found=("one that ended: " if ended else "one still starting: ")
                    + install.why(text.decode("utf-8", "replace") + self.log_tail()),
                    fix="Check memory and disk space, or use a running broker: amqp://user:password@host:port",
                )
            time.sleep(0.05)
