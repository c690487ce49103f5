"""What other people on the same machine can do: planted links, shared folders, changed files; and where secrets show there."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import pickle
import socket
import stat
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations import Client, channel
from branchkey_integrations.api import MultipartBody
from branchkey_integrations.config import Endpoint
from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import (
    ArchiveError,
    AuthenticationError,
    ConfigurationError,
    CredentialsError,
    NotificationError,
    TLSError,
)
from branchkey_integrations.http_session import Bearer
from branchkey_integrations.listeners import Ticket
from branchkey_integrations.listeners.amqp import AmqpListener
from branchkey_integrations.listeners.websocket import WebSocketListener
from branchkey_integrations.options import RoundOptions
from branchkey_integrations.quarantine import Quarantine
from branchkey_integrations.redaction import Secret
from branchkey_integrations.rounds import RoundEngine
from branchkey_integrations.sandbox import Sandbox
from branchkey_integrations.spool import Spool
from tests.support.credentials import credential_fields, make_credentials
from tests.support.stores import small_store

ROUND: dict[str, Any] = {
    "round": 3, "layout": "l", "update_id": "u", "leaf_id": "leaf", "branch_id": "b", "run_number": 1,
}  # fmt: skip


def mode_of(path: object) -> int:
    return stat.S_IMODE(os.stat(str(path)).st_mode)


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file of the user to which somebody else has planted links."""
    file = tmp_path / "precious"
    file.write_text("of the user")
    return file


# --- planted links, and rights ----------------------------------------------------------------------------------------


def test_links_in_the_quarantine_are_replaced_and_not_followed(tmp_path: Path, precious: Path) -> None:
    folder = tmp_path / "refused"
    folder.mkdir()
    for name in ("a1.npz", "a1.json", "a1.npz.part", "a1.json.part"):
        (folder / name).symlink_to(precious)
    kept = Quarantine(str(folder)).keep(io.BytesIO(b"PK bad"), "a1", ArchiveError(what="archive", found="bad"))
    assert precious.read_text() == "of the user"
    assert Path(kept).read_bytes() == b"PK bad"
    assert not Path(kept).is_symlink()
    assert json.loads((folder / "a1.json").read_text())["found"] == "bad"


def test_links_in_the_output_folder_are_replaced_and_not_followed(tmp_path: Path, precious: Path) -> None:
    with Sandbox() as sandbox, Client(sandbox.credentials[0], sandbox.url, output_dir=tmp_path / "out") as client:
        aggregation_id = sandbox.publish([np.ones(2)])
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / f"{aggregation_id}.npz").symlink_to(precious)
        path = Path(client.file_download(aggregation_id))
    assert precious.read_text() == "of the user"
    assert not path.is_symlink()
    with np.load(path) as archive:
        assert archive["layer_0"].tolist() == [1.0, 1.0]


def test_links_in_the_spool_are_replaced_and_not_followed(tmp_path: Path, precious: Path) -> None:
    spool = Spool(str(tmp_path), "leaf", 1000)
    folder = tmp_path / "leaf"
    folder.mkdir()
    for name in ("update.npz", "update.json", "update.json.part", "metrics.jsonl.part"):
        (folder / name).symlink_to(precious)
    assert spool.put([np.ones(2)], 1.0, **ROUND) is not None
    spool.add_metrics("a1", {"loss": 1.0}, "train")
    spool.add_metrics("a2", {"loss": 2.0}, "train")
    spool.drop_metrics(1)
    assert precious.read_text() == "of the user"
    found = spool.newest()
    assert found is not None
    assert found.round == 3
    assert spool.metrics() == [("a2", {"loss": 2.0}, "train")]


def test_nobody_else_may_look_into_quarantine_and_spool(tmp_path: Path) -> None:
    umask = os.umask(0)  # the least careful user
    try:
        Quarantine(str(tmp_path / "refused")).keep(io.BytesIO(b"PK"), "a1", ArchiveError(what="archive"))
        Spool(str(tmp_path / "spool"), "leaf", 1000).put([np.ones(2)], 1.0, **ROUND)
    finally:
        os.umask(umask)
    assert mode_of(tmp_path / "refused") == 0o700
    assert mode_of(tmp_path / "spool" / "leaf") == 0o700


def test_what_is_on_its_way_has_no_name_in_the_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
    (tmp_path / "shared").mkdir(mode=0o777)
    large, seen = np.arange(3_000_000.0), []

    def look(*_: object) -> None:
        seen.append(os.listdir(tmp_path / "shared"))

    with Sandbox() as sandbox:
        sandbox_files = set(os.listdir(tmp_path / "shared"))
        with Client(sandbox.credentials[0], sandbox.url, output_dir=tmp_path / "out") as client:
            client.upload([large], 1.0, note=look)
            with client.open_aggregation(sandbox.publish([large])) as archive:
                assert archive[0][5] == 5.0
                look()
    assert len(seen) >= 3
    assert all(set(names) <= sandbox_files for names in seen)


# --- changed files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "null", "5", "{}", '{"round": 3}', '{"round": 3, "more": 1}', "[" * 100_000, "\x00\xff", '{"a": 1e999}',
        json.dumps({**ROUND, "size_bytes": [], "digest": {}}),
    ],
)  # fmt: skip
def test_a_changed_note_beside_a_waiting_update_is_no_update(tmp_path: Path, content: str) -> None:
    spool = Spool(str(tmp_path), "leaf", 1000)
    assert spool.put([np.ones(2)], 1.0, **ROUND) is not None
    (tmp_path / "leaf" / "update.json").write_text(content)
    (tmp_path / "leaf" / "metrics.jsonl").write_text(content + "\n")
    assert spool.newest() is None
    assert spool.metrics() == []
    assert spool.put([np.ones(2)], 1.0, **ROUND) is not None


@pytest.mark.parametrize("planted", ["../../precious", "x/../../../precious", "x" * 300, ["a1"]])
def test_an_id_that_somebody_wrote_into_the_journal_leads_nowhere(
    planted: object, tmp_path: Path, precious: Path
) -> None:
    options = RoundOptions(timeout_s=0.5, journal=tmp_path / "journal")
    # Of two leaves one sends, so no aggregate comes but the one that is written in.
    with Sandbox(leaves=2) as sandbox:
        with Client(sandbox.credentials[0], sandbox.url, output_dir=tmp_path / "out") as client:
            engine = RoundEngine(client, options)
            engine.submit(small_store(), samples=1)
            engine.close()
        (journal,) = (tmp_path / "journal").glob("*.jsonl")
        with journal.open("a") as file:
            file.write(json.dumps({"event": "announced", "aggregation_id": planted}) + "\n")
        with Client(sandbox.credentials[0], sandbox.url, output_dir=tmp_path / "out") as client:
            engine, store = RoundEngine(client, options), small_store()
            before = store.read()
            with pytest.raises(NotificationError, match="expected letters, digits"):
                engine.submit(store, samples=1) and engine.collect(store)
            engine.close()
        assert sandbox.hits("download") == 0
    assert all(np.array_equal(*pair) for pair in zip(store.read(), before))
    assert precious.read_text() == "of the user"


# --- what goes into requests ------------------------------------------------------------------------------------------


def test_the_name_of_a_file_cannot_add_a_header_or_a_part() -> None:
    name = 'x"\r\nContent-Type: text/html\r\n\r\n--boundary\r\n.npz'
    body = b"".join(MultipartBody("{}", io.BytesIO(b"PK"), 2, name))
    head = body.split(b"\r\n\r\n")[1].split(b"\r\n")
    assert b"\r\nContent-Type" not in body
    assert body.count(b"\r\n--") == 2
    assert any(b'filename="x%22%0D%0AContent-Type: text/html' in line for line in head)


def test_the_name_of_a_leaf_stays_a_name(tmp_path: Path) -> None:
    name = 'ward"}\r\nX-Header: 1\r\n--'
    with Sandbox() as sandbox:
        fields = {**sandbox.credentials[0].to_dict(), "name": name}
        with Client(fields, sandbox.url, output_dir=tmp_path) as client:
            client.upload([np.ones(1)], 1.0)
        (upload,) = sandbox.uploads
    assert upload.leaf_name == name
    assert "x-header" not in upload.headers


def test_a_token_that_crosses_a_network_in_the_clear_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def resolver(host: object, *rest: Any, **more: Any) -> Any:
        return real("127.0.0.1" if host == "branch.test" else host, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    with Sandbox() as sandbox:
        url = sandbox.url.replace("127.0.0.1", "branch.test")
        with pytest.warns(
            UserWarning, match=r"token and all weights cross the network to branch\.test:\d+ in the"
        ) as seen:
            Client(sandbox.credentials[0], url).close()
    assert [warning.filename for warning in seen] == [__file__]
    options: dict[str, Any] = {"verify": True, "retry": None, "on_event": print, "on_failure": print}
    with pytest.warns(UserWarning, match=r"token crosses the network to broker\.test:5672 in the clear"):
        channel._amqp(make_credentials(), "broker.test", 5672, None, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        channel._amqp(make_credentials(), "broker.test", 5671, None, **options)
        channel._amqp(make_credentials(), "127.0.0.1", 5672, None, **options)


# --- tools that print variables -----------------------------------------------------------------------------------------


def printed_with_variables(error: BaseException) -> str:
    """Print an error as crash reporters do: with the variables of each frame below this test, and of all that led to it."""
    assert error.__traceback__ is not None
    below = error.with_traceback(error.__traceback__.tb_next)
    return "".join(traceback.TracebackException.from_exception(below, capture_locals=True).format())


def test_a_crash_report_with_variables_holds_no_token(tmp_path: Path) -> None:
    with Sandbox() as sandbox:
        fields = {**sandbox.credentials[0].to_dict(), "session_token": "token-that-is-refused-here"}
        with pytest.raises(AuthenticationError) as refused:
            Client(fields, sandbox.url)
    report = printed_with_variables(refused.value)
    assert "credentials = Credentials(" in report
    assert "session_token=***" in report
    assert fields["session_token"] not in report


@pytest.mark.parametrize("way", ["mapping", "given dict", "file", "environment"])
def test_a_crash_report_of_bad_credentials_holds_no_token(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = credential_fields(id="../escape")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "somebody-elses-secret")
    source: Any = {"mapping": fields, "given dict": fields, "file": tmp_path / "leaf.json", "environment": None}[way]
    load = Credentials.from_dict if way == "given dict" else Credentials.load
    (tmp_path / "leaf.json").write_text(json.dumps({"data": fields}))
    for name, value in fields.items():
        monkeypatch.setenv(f"BRANCHKEY_{name.upper()}", value)
    with pytest.raises(CredentialsError) as caught:
        load(source)
    report = printed_with_variables(caught.value)
    assert "from_dict" in report or "from_env" in report
    assert "'***'" in report
    assert fields["session_token"] not in report
    assert "somebody-elses-secret" not in report


def test_what_is_half_made_has_a_repr_for_a_crash_report(tmp_path: Path) -> None:
    (tmp_path / "none.pem").write_text("no certificate")
    options: dict[str, Any] = {"verify": str(tmp_path / "none.pem"), "on_event": print, "on_failure": print}
    credentials = make_credentials()
    for make in (
        lambda: AmqpListener(credentials, "127.0.0.1", 5671, tls=True, **options),
        lambda: WebSocketListener(
            credentials, Endpoint.parse("https://127.0.0.1"), lambda: Ticket("", ""), proxies=None, **options
        ),
        lambda: WebSocketListener(
            credentials,
            Endpoint.parse("https://127.0.0.1"),
            lambda: Ticket("", ""),
            proxies=None,
            ping_interval_s=-1,
            **options,
        ),
    ):
        with pytest.raises((TLSError, ConfigurationError)) as caught:
            make()
        assert f"Listener({credentials.id!r}, '127.0.0.1" in printed_with_variables(caught.value)


def test_fields_copies_and_pickles_of_what_holds_a_token_do_not_show_it() -> None:
    credentials = make_credentials()
    token = str(credentials.session_token)
    bearer = Bearer(credentials)
    for shown in (vars(credentials), dataclasses.asdict(credentials), copy.deepcopy(vars(credentials)), vars(bearer)):
        assert token not in repr(shown)
        assert "'***'" in repr(shown)
    for kept in (credentials, vars(credentials), dataclasses.asdict(credentials), bearer, {"a": [bearer]}):
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(kept)
    assert pickle.loads(pickle.dumps(credentials.to_dict()))["session_token"] == token
    assert json.loads(json.dumps(dataclasses.asdict(credentials)))["session_token"] == token


def test_a_secret_is_the_string_that_it_is_but_for_its_repr() -> None:
    secret = Secret("abc-def")
    assert secret == "abc-def"
    table: dict[str, int] = {secret: 1}
    assert (f"{secret}", "%s" % secret, secret + "!", table["abc-def"]) == ("abc-def", "abc-def", "abc-def!", 1)  # noqa: UP031
    assert type(str(secret)) is str
    assert repr(secret) == "'***'" == repr(secret[:3]) == f"{secret!r}"
    assert secret[:3] == "abc"
    assert copy.copy(secret) is secret is copy.deepcopy(secret)
