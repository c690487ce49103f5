"""What the sandbox remembers of each upload, for whoever looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from branchkey_integrations.archive import Archive


@dataclass(frozen=True)
class Upload:
    """One update that was accepted; repeats of it are not listed again.

    Attributes:
        file_id: what the leaf was answered.
        leaf_id, leaf_name: who sent it.
        weighting: as it stands in the archive.
        metadata: what its JSON says, or the text itself where it is no JSON.
        headers: of the request, by lower-case name; the Authorization header only while the sandbox that got it runs.
        digest: SHA-256 of the file in the form of the ``x-bk-file-digest`` header.
        size_bytes: of the file.
        path: where the file lies, as long as the sandbox is open or its directory exists.
    """

    file_id: str
    leaf_id: str
    leaf_name: str
    weighting: float
    metadata: Any
    headers: Mapping[str, str] = field(repr=False)
    digest: str
    size_bytes: int
    path: str

    def __getstate__(self) -> dict[str, Any]:
        headers = {name: value for name, value in self.headers.items() if name != "authorization"}
        return {**vars(self), "headers": headers}

    @property
    def layers(self) -> list[np.ndarray[Any, Any]]:
        """The layers in order, read from disk at each access."""
        with Archive.open(self.path) as archive:
            return [archive[index] for index in range(len(archive))]

    def to_plain(self, number: int) -> dict[str, Any]:
        """Give what goes on disk: no secret, and the file's place is found by its id."""
        kept = ("file_id", "leaf_id", "leaf_name", "weighting", "metadata", "digest", "size_bytes")
        headers = {name: value for name, value in self.headers.items() if name != "authorization"}
        return {"number": number, "headers": headers, **{name: getattr(self, name) for name in kept}}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], path: str) -> Upload:
        """Make a record of what :meth:`to_plain` gave."""
        return cls(path=path, **{name: value for name, value in plain.items() if name != "number"})
