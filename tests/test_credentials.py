"""Credentials: from where they may come, what is refused, and that the token never shows."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import CredentialsError
from tests.support.credentials import credential_fields, make_credentials

FIELDS = ("id", "name", "session_token", "tree_id", "branch_id", "owner_id")
REQUIRED = FIELDS[:-1]


def _variables(fields: dict[str, str]) -> dict[str, str]:
    return {f"BRANCHKEY_{key.upper()}": value for key, value in fields.items()}


def test_the_documented_dict_is_taken_as_it_is() -> None:
    fields = credential_fields()
    credentials = Credentials.load(fields)
    assert credentials.to_dict() == fields
    assert tuple(fields) == FIELDS


def test_ready_credentials_pass_through() -> None:
    credentials = make_credentials()
    assert Credentials.load(credentials) is credentials


def test_unknown_keys_are_ignored_as_the_platform_may_add_some() -> None:
    fields = credential_fields()
    assert Credentials.load({**fields, "created_at": "2026", "error": None}).to_dict() == fields


def test_the_owner_is_optional() -> None:
    fields = credential_fields()
    del fields["owner_id"]
    assert Credentials.load(fields).owner_id == ""


@pytest.mark.parametrize("wrap", [lambda fields: fields, lambda fields: {"data": fields, "error": None}])
@pytest.mark.parametrize("as_text", [True, False])
def test_a_file_holds_the_keys_or_the_platforms_whole_answer(tmp_path: Path, wrap: Any, as_text: bool) -> None:
    fields = credential_fields(name="Ward 7, Süd")
    path = tmp_path / "leaf.json"
    path.write_text(json.dumps(wrap(fields)), encoding="utf-8")
    assert Credentials.load(str(path) if as_text else path).to_dict() == fields


def test_the_environment_gives_the_six_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = credential_fields()
    for name, value in _variables(fields).items():
        monkeypatch.setenv(name, value)
    assert Credentials.load().to_dict() == fields


def test_a_file_named_in_the_environment_wins_over_single_variables(tmp_path: Path) -> None:
    in_file, in_variables = credential_fields(), credential_fields()
    path = tmp_path / "leaf.json"
    path.write_text(json.dumps(in_file), encoding="utf-8")
    environ = {**_variables(in_variables), "BRANCHKEY_CREDENTIALS": str(path)}
    assert Credentials.from_env(environ).to_dict() == in_file


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str) -> None:
    fields = credential_fields()
    del fields[key]
    with pytest.raises(CredentialsError) as caught:
        Credentials.load(fields)
    assert caught.value.found == f"no {key}"
    assert caught.value.expected == "the keys " + ", ".join(FIELDS)


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("empty", [None, ""])
def test_a_missing_variable_is_named(key: str, empty: str | None) -> None:
    environ = _variables(credential_fields())
    name = f"BRANCHKEY_{key.upper()}"
    if empty is None:
        del environ[name]
    else:
        environ[name] = empty
    with pytest.raises(CredentialsError, match=rf"found no {name}\."):
        Credentials.from_env(environ)


def test_all_missing_variables_are_named_at_once() -> None:
    with pytest.raises(CredentialsError) as caught:
        Credentials.from_env({})
    assert caught.value.found == "no " + ", ".join(f"BRANCHKEY_{key.upper()}" for key in REQUIRED)


@pytest.mark.parametrize("key", FIELDS)
@pytest.mark.parametrize(("value", "kind"), [(5, "int"), (None, "NoneType"), (b"x", "bytes"), (["x"], "list")])
def test_a_value_that_is_no_string_is_refused_by_key_and_type(key: str, value: object, kind: str) -> None:
    with pytest.raises(CredentialsError) as caught:
        Credentials.load({**credential_fields(), key: value})
    assert (caught.value.what, caught.value.found) == (f"credentials field {key!r}", kind)


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_a_blank_value_is_refused(key: str, blank: str) -> None:
    with pytest.raises(
        CredentialsError, match=f"credentials field '{key}': expected a non-empty string, found nothing"
    ):
        Credentials.load({**credential_fields(), key: blank})


@pytest.mark.parametrize("key", ["id", "session_token", "tree_id", "branch_id", "owner_id"])
@pytest.mark.parametrize("bad", ["a\r\nX-Header: b", "a b", "ä", "a\x00", "a\n", "a\u2028", '"a"\t'])
def test_what_cannot_be_a_header_is_refused_without_being_shown(key: str, bad: str) -> None:
    with pytest.raises(CredentialsError) as caught:
        Credentials.load({**credential_fields(), key: bad})
    assert caught.value.what == f"credentials field {key!r}"
    assert caught.value.found == "other characters"


def test_the_name_is_free_text() -> None:
    assert make_credentials(name="Ward 7, Süd/Ost").name == "Ward 7, Süd/Ost"


@pytest.mark.parametrize("key", ["id", "branch_id"])
@pytest.mark.parametrize("bad", ["../evil", "a/b", "a?b", "a#b", "http://a", "a\\b", "a%2fb"])
def test_an_id_that_would_change_the_url_is_refused(key: str, bad: str) -> None:
    with pytest.raises(CredentialsError, match=f"'{key}': expected an id, found a path or URL"):
        make_credentials(**{key: bad})


@pytest.mark.parametrize("source", [5, True, [("id", "a")], b"path", object()])
def test_any_other_source_is_refused_by_its_type(source: Any) -> None:
    with pytest.raises(CredentialsError) as caught:
        Credentials.load(source)
    assert caught.value.found == type(source).__name__


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"{not json", "text that is not JSON"),
        (b"", "text that is not JSON"),
        (b"[]", "list"),
        (b'"x"', "str"),
        (b"null", "NoneType"),
        (b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_a_file_that_holds_no_credentials_is_refused(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "leaf.json"
    path.write_bytes(content)
    with pytest.raises(CredentialsError) as caught:
        Credentials.load(path)
    assert caught.value.what == f"credentials file {str(path)!r}"
    assert caught.value.found == found


def test_a_file_that_windows_saved_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    fields = credential_fields()
    path = tmp_path / "leaf.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(fields).encode())
    assert Credentials.load(path).to_dict() == fields


@pytest.mark.parametrize(("name", "reason"), [("nowhere.json", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(CredentialsError, match=f"expected a readable JSON file, found {reason}"):
        Credentials.load(tmp_path / name)


def test_deeply_nested_json_is_refused_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "leaf.json"
    path.write_text("[" * 200_000, encoding="utf-8")
    with pytest.raises(CredentialsError):
        Credentials.load(path)


def test_the_token_shows_in_no_text() -> None:
    credentials = make_credentials(id="leaf-1", session_token="the-token-itself", owner_id="")
    shown = [repr(credentials), str(credentials), f"{credentials}", "%r" % [credentials], repr({"c": credentials})]
    assert not any("the-token-itself" in text for text in shown)
    assert repr(credentials).startswith("Credentials(id='leaf-1', name='test-leaf', session_token=***, tree_id='")


def test_a_broken_file_does_not_show_the_token_in_the_traceback(tmp_path: Path) -> None:
    path = tmp_path / "leaf.json"
    path.write_text('{"session_token": "the-token-itself", }', encoding="utf-8")
    with pytest.raises(CredentialsError) as caught:
        Credentials.load(path)
    error = caught.value
    assert error.__cause__ is None
    assert error.__suppress_context__
    shown = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    assert "the-token-itself" not in shown


def test_a_bad_token_is_not_shown_by_its_own_error() -> None:
    with pytest.raises(CredentialsError) as caught:
        make_credentials(session_token="the-token-itself\n")
    assert "the-token-itself" not in str(caught.value)
    assert "the-token-itself" not in repr(caught.value)


def test_credentials_do_not_pickle_and_say_what_to_do_instead() -> None:
    with pytest.raises(TypeError, match="hold a secret and do not pickle"):
        pickle.dumps(make_credentials())


def test_a_copied_model_or_callback_keeps_the_same_credentials() -> None:
    credentials = make_credentials()
    assert copy.copy(credentials) is credentials
    assert copy.deepcopy({"client": [credentials]})["client"][0] is credentials


def test_they_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_credentials().id = "other"  # type: ignore[misc]


def test_logging_them_logs_no_token(caplog: pytest.LogCaptureFixture) -> None:
    credentials = make_credentials()
    logging.getLogger("branchkey_integrations").warning("using %s", credentials)
    assert caplog.messages == [f"using {credentials!r}"]
    assert credentials.session_token not in caplog.text


@given(st.dictionaries(st.sampled_from([*FIELDS, "other"]), st.one_of(st.text(), st.integers(), st.none())))
def test_any_mapping_gives_credentials_or_a_named_error(mapping: dict[str, Any]) -> None:
    result: Credentials | CredentialsError
    try:
        result = Credentials.load(mapping)
    except CredentialsError as error:
        result = error
    if isinstance(result, CredentialsError):
        assert result.what.startswith("credentials")
        assert result.fix
    else:
        assert all(result.to_dict()[key] == mapping[key] for key in FIELDS if key in mapping)
