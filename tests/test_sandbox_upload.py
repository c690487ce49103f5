"""The upload: what is taken from which client, what is refused and how the refusal reads."""

from __future__ import annotations

import json
import os
import socket
import tracemalloc
from collections.abc import Iterator
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests

from branchkey_integrations.sandbox import Sandbox, service
from tests.support.raw_leaf import TIMEOUT_S, RawLeaf, digest_of, npz

ARRAYS = [np.arange(6, dtype="f4").reshape(2, 3), np.ones(3, "f4")]


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=2) as opened:
        yield opened


@pytest.fixture
def leaf(sandbox: Sandbox) -> RawLeaf:
    return RawLeaf(sandbox)


def refused(answer: requests.Response, status: int, *words: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    for word in words:
        assert word in error


def test_an_upload_is_answered_201_and_recorded_whole(sandbox: Sandbox, leaf: RawLeaf) -> None:
    content = npz(ARRAYS, 1530.0)
    metadata = {"client_version": "3.0.1", "kind": "federated_learning", "file_size": len(content)}
    answer = leaf.upload(content, metadata=json.dumps(metadata))
    assert answer.status_code == 201
    (upload,) = sandbox.uploads
    assert answer.json()["data"] == {"file_id": upload.file_id}
    assert upload.leaf_id == leaf.credentials.id
    assert upload.leaf_name == "leaf-0"
    assert upload.weighting == 1530.0
    assert upload.metadata == metadata
    assert [layer.tolist() for layer in upload.layers] == [array.tolist() for array in ARRAYS]
    assert [layer.dtype.name for layer in upload.layers] == ["float32", "float32"]
    assert upload.size_bytes == len(content)
    assert upload.digest == digest_of(content)
    assert upload.headers["x-bk-file-size"] == str(len(content))
    assert upload.headers["leaf"] == "true"
    assert upload.headers["authorization"] == leaf.authorization["Authorization"]
    assert leaf.credentials.session_token not in repr(upload)


def test_the_upload_of_2_7_1_is_taken_without_extra_headers_and_with_metadata_that_is_no_json(
    sandbox: Sandbox, leaf: RawLeaf
) -> None:
    metadata = "{'key1':'value1', 'key2':'value2'}"
    content = npz(ARRAYS, 3)
    answer = requests.post(
        f"{sandbox.url}/api/v1/file/upload",
        headers={**leaf.authorization, "accept": "application/json"},
        files={
            "data": (None, json.dumps({"leaf_name": "old", "metadata": metadata})),
            "file": ("model_weights.npz", content),
        },
        timeout=TIMEOUT_S,
    )
    assert answer.status_code == 201
    assert sandbox.uploads[0].metadata == metadata
    assert sandbox.uploads[0].weighting == 3.0
    assert "x-bk-file-digest" not in sandbox.uploads[0].headers


@pytest.mark.parametrize("data", ["", "no json", "[]", '{"leaf_name": 5, "metadata": null}', '"text"'])
def test_a_data_part_of_nonsense_harms_nothing(sandbox: Sandbox, leaf: RawLeaf, data: str) -> None:
    assert leaf.upload(npz(ARRAYS), data=data).status_code == 201
    assert (sandbox.uploads[0].leaf_name, sandbox.uploads[0].metadata) == ("", "")


def test_the_parts_may_come_in_any_order_and_with_odd_names(sandbox: Sandbox, leaf: RawLeaf) -> None:
    content = npz(ARRAYS)
    answer = leaf.request(
        "POST",
        "/api/v1/file/upload",
        files=[
            ("file", ('Gewichte "ü".npz', content)),
            ("other", (None, "x")),
            ("data", (None, json.dumps({"leaf_name": "Städtisches Klinikum", "metadata": "{}"}))),
        ],
    )
    assert answer.status_code == 201
    assert sandbox.uploads[0].leaf_name == "Städtisches Klinikum"
    assert sandbox.uploads[0].digest == digest_of(content)


def test_a_body_in_chunks_without_a_length_is_taken(sandbox: Sandbox, leaf: RawLeaf) -> None:
    request = requests.Request("POST", "http://x", files={"file": ("a.npz", npz(ARRAYS))}).prepare()
    body: bytes = request.body  # type: ignore[assignment]
    pieces = (body[start : start + 7] for start in range(0, len(body), 7))
    answer = leaf.request(
        "POST", "/api/v1/file/upload", headers={"Content-Type": request.headers["Content-Type"]}, data=pieces
    )
    assert answer.status_code == 201
    assert sandbox.uploads[0].size_bytes == len(npz(ARRAYS))


def test_size_and_digest_are_checked_when_they_are_there(sandbox: Sandbox, leaf: RawLeaf) -> None:
    content = npz(ARRAYS)
    size, digest = str(len(content)), digest_of(content)
    refused(leaf.upload(content, headers={"x-bk-file-size": "17"}), 400, "x-bk-file-size", "17", size)
    refused(leaf.upload(content, headers={"x-bk-file-size": "many"}), 400, "x-bk-file-size", "many")
    wrong = digest_of(b"something else")
    refused(leaf.upload(content, headers={"x-bk-file-digest": wrong}), 400, "x-bk-file-digest", wrong, digest)
    refused(leaf.upload(content, headers={"x-bk-file-digest": digest[7:]}), 400, "x-bk-file-digest")
    assert sandbox.uploads == []
    assert leaf.upload(content, headers={"x-bk-file-size": size, "x-bk-file-digest": None}).status_code == 201


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npz(ARRAYS, None), ["weighting"]),
        (npz(ARRAYS, 0.0), ["weighting"]),
        (npz(ARRAYS, -5.0), ["weighting", "-5"]),
        (npz(ARRAYS, np.nan), ["weighting", "nan"]),
        (npz(ARRAYS, np.inf), ["weighting", "inf"]),
        (npz(ARRAYS, "abc"), ["weighting"]),
        (npz([]), ["layer"]),
        (npz([ARRAYS[0], np.array([1.0, np.nan], "f4")]), ["layer_1"]),
        (npz([np.array([np.inf])]), ["layer_0"]),
        (npz([np.array(["text"])]), ["layer_0"]),
        (npz([ARRAYS[0]], layer_2=ARRAYS[1]), ["layer_1"]),
        (npz([ARRAYS[0]], layer_00=ARRAYS[1]), ["layer_00"]),
        (b"<?xml version='1.0'?><Error/>", ["NPZ"]),
        (b"", ["NPZ"]),
        (npz(ARRAYS)[:200], ["NPZ"]),
    ],
)
def test_contents_that_cannot_be_averaged_are_refused_by_name(
    sandbox: Sandbox, leaf: RawLeaf, content: bytes, words: list[str]
) -> None:
    refused(leaf.upload(content), 422, "upload", *words)
    assert sandbox.uploads == []
    # The leaf is not barred: its next upload counts.
    assert leaf.upload(npz(ARRAYS)).status_code == 201


def test_pickled_layers_are_refused_unopened(sandbox: Sandbox, leaf: RawLeaf) -> None:
    refused(leaf.upload(npz([np.array([{"a": 1}], dtype=object)])), 422, "layer_0")
    assert sandbox.uploads == []


def test_analytics_are_refused_by_metadata_and_by_entry(sandbox: Sandbox, leaf: RawLeaf) -> None:
    metadata = json.dumps({"kind": "federated_analytics"})
    refused(leaf.upload(npz(ARRAYS), metadata=metadata), 422, "federated_analytics")
    entry = np.array("federated_analytics")
    refused(leaf.upload(npz([], 0.0, age_n=np.array([5]), __bk_payload_kind__=entry)), 422, "federated_analytics")
    assert sandbox.uploads == []
    learning = np.array("federated_learning")
    assert leaf.upload(npz(ARRAYS, __bk_payload_kind__=learning)).status_code == 201


@pytest.mark.parametrize(
    ("headers", "body", "words"),
    [
        ({"Content-Type": "application/json"}, b"{}", ["multipart/form-data"]),
        ({"Content-Type": None}, b"{}", ["multipart/form-data"]),
        ({"Content-Type": "multipart/form-data"}, b"x", ["multipart/form-data"]),
        ({"Content-Type": "multipart/form-data; boundary=" + "b" * 300}, b"x", ["boundary"]),
        ({"Content-Type": "multipart/form-data; boundary=b"}, b"nonsense", ["malformed"]),
        ({"Content-Type": "multipart/form-data; boundary=b"}, b"", ["breaks off"]),
        ({"Content-Type": "multipart/form-data; boundary=b"}, b"--b--\r\n", ["'file'"]),
        (
            {"Content-Type": "multipart/form-data; boundary=b"},
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.npz"\r\n\r\nPK',
            ["breaks off"],
        ),
        (
            {"Content-Type": "multipart/form-data; boundary=b"},
            b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nPK\r\n--b--\r\n',
            ["'file'"],
        ),
    ],
)
def test_a_body_that_is_no_upload_is_refused(sandbox: Sandbox, leaf: RawLeaf, headers, body, words) -> None:
    refused(leaf.request("POST", "/api/v1/file/upload", headers=headers, data=body), 400, *words)
    assert sandbox.uploads == []


def test_a_field_beyond_a_mebibyte_is_refused(leaf: RawLeaf) -> None:
    refused(leaf.upload(npz(ARRAYS), data="x" * (2**20 + 1)), 413, "'data'")


@pytest.mark.parametrize("status", ["pause", "stop"])
def test_uploads_are_refused_with_409_while_the_run_is_not_started(
    sandbox: Sandbox, leaf: RawLeaf, status: str
) -> None:
    getattr(sandbox, status)()
    refused(leaf.upload(npz(ARRAYS)), 409, "run", repr(status))
    refused(leaf.upload(b"junk that is not even looked at"), 409, "run", repr(status))
    assert sandbox.uploads == []
    sandbox.start()
    assert leaf.upload(npz(ARRAYS)).status_code == 201


def test_a_run_that_is_paused_while_the_upload_comes_in_refuses_it(
    sandbox: Sandbox, leaf: RawLeaf, monkeypatch
) -> None:
    real = service.check_contents

    def pausing(parcel):
        sandbox.pause()
        return real(parcel)

    monkeypatch.setattr(service, "check_contents", pausing)
    refused(leaf.upload(npz(ARRAYS)), 409, "'pause'")
    assert sandbox.uploads == []
    assert os.listdir(os.path.join(sandbox.directory, "uploads")) == []


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_413_and_an_equal_one_is_taken(chunked: bool) -> None:
    content = npz([np.random.default_rng(0).standard_normal(30_000)])
    request = requests.Request("POST", "http://x", files={"file": ("a.npz", content)}).prepare()
    body: bytes = request.body  # type: ignore[assignment]
    headers = {"Content-Type": request.headers["Content-Type"]}
    for limit, status in ((len(body), 201), (len(body) - 1, 413)):
        with Sandbox(max_upload_bytes=limit) as sandbox:
            data = iter([body[:1000], body[1000:]]) if chunked else body
            answer = RawLeaf(sandbox).request("POST", "/api/v1/file/upload", headers=headers, data=data)
            assert answer.status_code == status
            assert len(sandbox.uploads) == (status == 201)
            if status == 413:
                assert f"at most {limit} bytes" in answer.json()["error"]
                # With a length in front nothing is read at all.
                assert ("found more" if chunked else f"found {len(body)}") in answer.json()["error"]


def test_a_connection_that_breaks_off_leaves_nothing_behind(sandbox: Sandbox, leaf: RawLeaf) -> None:
    address = urlsplit(sandbox.url)
    incoming = os.path.join(sandbox.directory, "incoming")
    with socket.create_connection((address.hostname, address.port), timeout=TIMEOUT_S) as connection:
        head = (
            "POST /api/v1/file/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\n"
            f"Authorization: {leaf.authorization['Authorization']}\r\n\r\n"
            '--b\r\nContent-Disposition: form-data; name="file"; filename="a.npz"\r\n\r\nPK'
        )
        connection.sendall(head.encode())
        assert sandbox.wait_for(lambda: os.listdir(incoming))
    assert sandbox.wait_for(lambda: not os.listdir(incoming))
    assert sandbox.uploads == []
    assert leaf.upload(npz(ARRAYS)).status_code == 201


def test_a_large_upload_is_never_whole_in_memory(sandbox: Sandbox, leaf: RawLeaf) -> None:
    size = 48 << 20
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.npz"\r\n\r\n'

    def body() -> Iterator[bytes]:
        yield head
        for _ in range(size >> 16):
            yield b"\0" * (1 << 16)
        yield b"\r\n--b--\r\n"

    tracemalloc.start()
    try:
        # Not an archive, so that only the way to the disk is measured.
        headers = {"Content-Type": "multipart/form-data; boundary=b", "x-bk-file-size": "1"}
        answer = leaf.request("POST", "/api/v1/file/upload", headers=headers, data=body())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    refused(answer, 400, f"found a file of {size}")
    assert peak < 6 << 20
