"""A secret that shows anywhere but in a log record is found too: each place, in a pytest of its own."""

from __future__ import annotations

import gc
import os
import re
import sys

import pytest

from tests.support import disclosures, leaks
from tests.support.credentials import holds_a_secret, register_secret

#: Places where a secret shows without a log record or an error of ours. The classes pretend to be of this package.
_DISCLOSURES = """
import pickle, subprocess, sys, warnings, zipfile
import pytest
from branchkey_integrations.config import Endpoint
from branchkey_integrations.errors import ApiError
from branchkey_integrations.transport import Transport
from tests.support.credentials import make_credentials, register_secret

def ours(name, **members):
    return type(name, (), {"__module__": "branchkey_integrations.made_up", **members})

class Loud:
    def __init__(self): self.token = str(make_credentials().session_token)

Shown = ours("Shown", __repr__=lambda self: f"Shown({self.words})")
Keeper = ours("Keeper")
Packed = ours("Packed", __reduce__=lambda self: (str, (self.packed,)))
kept = []

@pytest.fixture
def holder():
    kept.append(Shown())
    yield kept[-1]
    kept.clear()

def new_transport():
    return Transport(Endpoint.parse("http://127.0.0.1:9"), make_credentials())

def test_has_it_in_a_repr(holder):
    holder.words = Loud().token

def test_had_it_in_a_field_while_a_client_closed():
    keeper = Keeper()
    keeper.inner = {"headers": [Loud().token]}
    new_transport().close()

class Slotted:
    __slots__ = ("packed",)
    def __reduce__(self): return str, (self.packed,)
Slotted.__module__ = "branchkey_integrations.made_up"

def test_has_it_in_a_pickle():
    kept.append(Slotted())
    kept[0].packed = Loud().token
    kept.append([])  # a container that the collector follows holds it

def test_forgets_what_it_kept():
    kept.clear()

def test_leaves_it_in_a_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "journal.jsonl").write_bytes(b"\\x80\\x04x" + Loud().token.encode() + b"q\\x01")

def test_leaves_it_in_a_packed_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "leaf" * 500 + Loud().token)

def test_leaves_a_file_that_is_meant_to_hold_it(tmp_path):
    (tmp_path / "leaf.json").write_text('{"session_token": "%s"}' % Loud().token)

def test_prints_it():
    print("leaf", Loud().token)

def test_prints_it_and_reads_it(capsys):
    print("leaf", Loud().token)
    assert "token-" in capsys.readouterr().out

def test_starts_a_process_that_prints_it():
    token = Loud().token
    subprocess.run([sys.executable, "-c", f"print('{token}')"], capture_output=True, text=True, check=True)

def test_warns_of_it():
    with warnings.catch_warnings(record=True):
        warnings.warn(Loud().token, stacklevel=1)

def through_us(words, error):
    \"\"\"Run as if this were a function of ours.\"\"\"
    code = "def inner(words):\\n    raise error\\ninner(words)"
    exec(compile(code, "made_up.py", "exec"), {"__name__": "branchkey_integrations.made_up", "error": error, "words": words})

def test_has_it_in_a_local_variable_of_a_traceback():
    with pytest.raises(ApiError):
        through_us([Loud().token], ApiError(what="x"))

def test_has_it_in_the_cause_of_an_error():
    with pytest.raises(ApiError):
        try:
            raise OSError(5, Loud().token)
        except OSError as error:
            raise ApiError(what="x") from error

def test_has_it_in_the_fields_of_a_foreign_error():
    error = ValueError("x")
    error.request = Loud().token
    with pytest.raises(ValueError):
        through_us(1, error)

def test_has_it_where_nobody_prints_it():
    token = Loud().token
    with pytest.raises(ApiError):
        try:
            raise OSError(5, token)
        except OSError:
            raise ApiError(what="x") from None
    with pytest.raises(ValueError):
        raise ValueError(token)

def test_fails_and_has_printed_it():
    print("found by", Loud().token)
    raise AssertionError("for another reason")
"""
_DISCLOSED = {
    "test_has_it_in_a_repr": "a secret stands in the repr of a Shown",
    "test_had_it_in_a_field_while_a_client_closed": "a secret stands in the fields of a Keeper",
    "test_has_it_in_a_pickle": "a secret stands in the pickle of a Slotted",
    "test_leaves_it_in_a_file": "a secret stands in the file a/journal.jsonl",
    "test_leaves_it_in_a_packed_checkpoint": "a secret stands in the file model.keras",
    "test_prints_it": "a secret was printed",
    "test_prints_it_and_reads_it": "a secret was printed",
    "test_starts_a_process_that_prints_it": "a secret was printed by a process",
    "test_warns_of_it": "a secret stands in a warning",
    "test_has_it_in_a_local_variable_of_a_traceback": "the local variable 'inner: words' that goes along with a ApiError",
    "test_has_it_in_the_cause_of_an_error": "a secret stands in the texts or fields of a OSError",
    "test_has_it_in_the_fields_of_a_foreign_error": "a secret stands in the texts or fields of a ValueError",
}
_DISCREET = {
    "test_forgets_what_it_kept", "test_leaves_a_file_that_is_meant_to_hold_it",
    "test_has_it_where_nobody_prints_it",
}  # fmt: skip
_WIDE = """
import pytest
from tests.support.credentials import make_credentials

@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return tmp_path_factory.mktemp("wide"), str(make_credentials().session_token)

def test_begins(wide):
    (wide[0] / "theirs").write_text("nothing yet")

def test_puts_it_into_its_own_folder(wide, tmp_path):
    (tmp_path / "mine").write_text(wide[1])

def test_ends(wide):
    (wide[0] / "theirs").write_text(wide[1])
"""


def test_each_disclosure_fails_its_test_with_the_place_and_without_the_secret(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(leaks.REPOSITORY), *filter(None, sys.path)]))
    pytester.makeconftest('pytest_plugins = ["tests.support.guards"]')
    pytester.makepyfile(test_disclosures=_DISCLOSURES)

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-q")

    text = result.stdout.str()
    assert result.parseoutcomes()["errors"] == len(_DISCLOSED), text
    for name, complaint in _DISCLOSED.items():
        section = text.split(f"ERROR at teardown of {name} ")[1].split("\n___")[0]
        assert complaint in section, text
    for name in _DISCREET:
        assert name not in text
    # A test that fails for another reason keeps what it has printed; no other secret is quoted.
    (failed,) = re.findall(r"found by (token-[0-9a-f-]+)", text)
    assert set(re.findall(r"token-[0-9a-f-]{36}", text)) == {failed}


def test_a_secret_of_a_wider_fixture_is_looked_for_until_its_module_ends(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(leaks.REPOSITORY), *filter(None, sys.path)]))
    pytester.makeconftest('pytest_plugins = ["tests.support.guards"]')
    pytester.makepyfile(test_first=_WIDE, test_second="def test_other(): pass")

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-q")

    text = result.stdout.str()
    assert result.parseoutcomes() == {"passed": 4, "errors": 2}, text
    assert "ERROR at teardown of test_puts_it_into_its_own_folder" in text
    assert "a secret stands in the file mine" in text
    assert "ERROR at teardown of test_ends" in text
    assert "a secret stands in the file theirs" in text


@pytest.mark.parametrize("text", ["{}", "x{}", "{}q\x01", "Bearer a:{}", "_{}_", "é{}", "  {}" * 2000])
def test_a_secret_is_found_whatever_it_is_joined_to(text: str) -> None:
    secret = register_secret("token-made-for-this-search")
    assert holds_a_secret(text.replace("{}", secret))
    assert holds_a_secret(text.replace("{}", secret).encode())
    assert not holds_a_secret(text.replace("{}", secret[:-1]))


def test_a_signed_link_is_found_that_nobody_registered() -> None:
    assert holds_a_secret("GET /o?X-Amz-Signature=0123456789")
    assert not holds_a_secret("GET /o?X-Amz-Signature=<hidden> and x=1")


def test_what_frameworks_brought_along_is_not_passed_over_each_time() -> None:
    assert gc.get_freeze_count() > 10_000
    assert disclosures.of_objects([object(), 5, "text"]) == []
