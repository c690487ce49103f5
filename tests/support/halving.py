"""A branch whose aggregates differ from what was sent, and are known beforehand."""

from __future__ import annotations

import threading

from branchkey_integrations.sandbox import Sandbox


class Halving:
    """A branch whose aggregate of an update is half of it."""

    def __enter__(self) -> Sandbox:
        self.branch = Sandbox(leaves=1, quorum=2).open()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.answer, daemon=True)
        self.thread.start()
        return self.branch

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join(20)
        self.branch.close()

    def answer(self) -> None:
        answered = 0
        while not self.over.wait(0.01):
            uploads = self.branch.uploads
            for upload in uploads[answered:]:
                self.branch.publish([layer / 2 for layer in upload.layers])
            answered = len(uploads)
