"""Let one rank of a distributed job talk to the platform, and every rank act on what it heard.

Rank 0 alone does input and output. What came of it, a value or an error, is broadcast, so that all ranks return the same
or raise the same. While rank 0 works, the others wait inside short broadcasts that rank 0 repeats every second from a
thread: none of them is longer than the process group's timeout, however long the work takes, and the work itself stays
in the main thread, where an interrupt reaches it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from branchkey_integrations.errors import BranchKeyError, ConfigurationError

_log = logging.getLogger("branchkey_integrations.torch")

_T = TypeVar("_T")
_BEAT_S = 1.0
_PLAIN = (str, bytes, int, float, bool, type(None))


def _membership() -> tuple[int, int]:
    """Give rank and number of ranks; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class Coordinator:
    """Run work on rank 0 and give every rank its result.

    Each method except the properties is collective: every rank calls it, in the same order. Without a process group, or
    in one of a single rank, the work is simply done. The default group is used; every rank of it trains the same model.

    Args:
        beat_s: seconds between two signs of life from rank 0; well below the group's timeout.
    """

    def __init__(self, *, beat_s: float = _BEAT_S) -> None:
        self._rank, self._size = _membership()
        self._beat_s = beat_s

    @property
    def is_main(self) -> bool:
        """Tell whether this is the rank that talks to the platform."""
        return self._rank == 0

    @property
    def rank(self) -> int:
        """Rank of this process, from 0."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of ranks, at least 1."""
        return self._size

    def run_on_main(self, work: Callable[[], _T]) -> _T:
        """Call ``work`` on rank 0, in its main thread, and return its result on every rank.

        Args:
            work: returns plain values or None; they cross process boundaries. May take any time.

        Raises:
            BaseException: what ``work`` raised, on every rank alike. An error of a type that might not cross process
                boundaries is raised as a :class:`BranchKeyError` with its name and text, on every rank.
        """
        self._check_membership()
        if self._size == 1:
            return work()
        if not self.is_main:
            kind, heard = self._pass_on(None)
            while kind == "beat":
                kind, heard = self._pass_on(None)
            if kind == "error":
                raise heard
            result: _T = heard
            return result
        beats = _Beats(self._beat, self._beat_s)
        try:
            with beats:
                value = work()
        except BaseException as error:
            portable = _portable(error)
            self._tell(portable)
            if portable is error:
                raise
            raise portable from error
        if beats.error is not None:
            raise beats.error
        self._pass_on(("value", value))
        return value

    def agree(self, work: Callable[[], _T]) -> list[_T]:
        """Call ``work`` on every rank and return all results in the order of the ranks, on every rank.

        Raises:
            BaseException: what ``work`` raised on the lowest rank on which it did, on every rank.
        """
        self._check_membership()
        if self._size == 1:
            return [work()]
        original: Exception | None = None
        verdict: tuple[str, Any]
        try:
            verdict = ("value", work())
        except Exception as error:  # noqa: BLE001  whatever it is, the other ranks wait to hear of it
            original = error
            verdict = ("error", _portable(error))
        verdicts: list[Any] = [None] * self._size
        dist.all_gather_object(verdicts, verdict)
        for rank, (kind, found) in enumerate(verdicts):
            if kind == "error":
                if rank != self._rank:
                    _log.error("Rank %d failed; every rank raises its error", rank)
                    raise found
                raise found from (original if verdict[1] is not original else None)
        return [found for _, found in verdicts]

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Copy rank 0's values of ``tensors`` into every rank's, in place and bit for bit.

        A difference in number, shape or dtype between ranks ends the process in torch: compare them with :meth:`agree`
        first. Needs the memory of the largest tensor once more.
        """
        self._check_membership()
        if self._size == 1:
            return
        for tensor in tensors:
            if tensor.numel() == 0:
                continue
            # Bytes, because no backend knows every dtype (gloo has no float8); contiguous, because strides may differ.
            values = tensor.detach().contiguous()
            wire = values.reshape(-1).view(torch.uint8)
            if wire.device.type == "cpu" and dist.get_backend() == "nccl":
                wire = wire.cuda()
            dist.broadcast(wire, src=0)
            if not self.is_main and wire.data_ptr() != tensor.data_ptr():
                received = wire.to(values.device).view(values.dtype).view(values.shape)
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(received)

    def _check_membership(self) -> None:
        if _membership() != (self._rank, self._size):
            raise ConfigurationError(
                what="process group",
                expected=f"rank {self._rank} of {self._size}, as when this was built",
                found="rank {} of {}".format(*_membership()),
                fix="Build it after torch.distributed.init_process_group() and close it before the group is destroyed",
            )

    def _pass_on(self, verdict: tuple[str, Any] | None) -> tuple[str, Any]:
        box = [verdict]
        dist.broadcast_object_list(box, src=0)
        received = box[0]
        if received is None:
            raise ConfigurationError(
                what="rank 0", expected="its verdict", found="nothing", fix="Call the same methods on every rank"
            )
        return received

    def _beat(self) -> None:
        self._pass_on(("beat", None))

    def _tell(self, error: BaseException) -> None:
        try:
            self._pass_on(("error", error))
        except RuntimeError:
            # The error itself matters more than that the others, who may be gone, could not be told.
            _log.warning("The other ranks could not be told of an error on rank 0", exc_info=True)


class _Beats:
    """Broadcast a sign of life at intervals while the block runs; after the block no thread is left."""

    def __init__(self, beat: Callable[[], None], interval_s: float) -> None:
        self.error: RuntimeError | None = None
        self._beat = beat
        self._interval_s = interval_s
        self._over = threading.Event()
        # The current accelerator is a matter of each thread, and object broadcasts use the current one.
        initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._device = torch.cuda.current_device() if initialized else None
        self._thread = threading.Thread(target=self._run, name="branchkey-beats", daemon=True)

    def __enter__(self) -> _Beats:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        while not self._over.wait(self._interval_s):
            try:
                self._beat()
            except RuntimeError as error:
                # A rank is gone; the main thread raises this as soon as its work is over.
                self.error = error
                return


def _portable(error: BaseException) -> BaseException:
    """Give ``error`` itself if it surely crosses process boundaries, else one of ours that says the same."""
    if isinstance(error, BranchKeyError):
        return error
    if type(error).__module__ == "builtins" and all(isinstance(argument, _PLAIN) for argument in error.args):
        return type(error)(*error.args) if error.__dict__ else error
    return BranchKeyError(
        what=f"{type(error).__name__} on one rank", found=str(error), fix="See the traceback of the rank it came from"
    )
