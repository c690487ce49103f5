"""Let one rank of a distributed job talk to the platform, and every rank act on what it heard.

Rank 0 alone does input and output. What came of it, a value or an error, is broadcast, so that all ranks return the same
or raise the same. While rank 0 works, the others wait inside short broadcasts that rank 0 repeats every second from a
thread: none of them is longer than the process group's timeout, however long the work takes, and the work itself stays
in the main thread, where an interrupt reaches it. Where the work needs all ranks (a layer that lies in shards), rank 0
calls them to a named part of it, through the same broadcasts.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from branchkey_integrations.errors import BranchKeyError, ConfigurationError
from branchkey_integrations.torch.lifeline import Lifeline, RankLost

_log = logging.getLogger("branchkey_integrations.torch")

_T = TypeVar("_T")
_BEAT_S = 1.0
#: Tensors up to this size are sent together, several in one broadcast.
_BUCKET_BYTES = 4 * 1024 * 1024
_ALIGNED = 16
_PLAIN = (str, bytes, int, float, bool, type(None))


def _membership() -> tuple[int, int]:
    """Give rank and number of ranks; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class Coordinator:
    """Run work on rank 0 and give every rank its result.

    Methods are collective unless they say otherwise: every rank calls them, in the same order. Without a process group, or
    in one of a single rank, the work is simply done. The default group is used; every rank of it trains the same model.
    When another rank is gone they raise a :class:`BranchKeyError` that says so, of the process group.

    Args:
        beat_s: seconds between two signs of life from rank 0; well below the group's timeout.
    """

    def __init__(self, *, beat_s: float = _BEAT_S) -> None:
        self._rank, self._size = _membership()
        self._beat_s = beat_s
        self._parts: Mapping[str, Callable[..., Any]] = {}
        self._line: Lifeline | None = None

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

    def run_on_main(self, work: Callable[[], _T], parts: Mapping[str, Callable[..., Any]] | None = None) -> _T:
        """Call ``work`` on rank 0, in its main thread, and return its result on every rank.

        Args:
            work: returns plain values or None; they cross process boundaries. May take any time.
            parts: what ``work`` may ask of every rank, by name, through :meth:`everywhere`.

        Raises:
            BaseException: what ``work`` raised, on every rank alike. An error of a type that might not cross process
                boundaries is raised as a :class:`BranchKeyError` with its name and text, on every rank.
            BranchKeyError: another rank is gone, or was silent for longer than the group's timeout.
        """
        self._check_membership()
        self._parts = parts or {}
        try:
            if self._size == 1:
                return work()
            return self._work(work) if self.is_main else self._attend()
        finally:
            self._parts = {}

    def everywhere(self, name: str, *args: Any, in_main_thread: bool = False) -> Any:
        """Do a part of the work on every rank at once and give what it gave on rank 0; call it from inside the work.

        Args:
            name: which of the parts that were handed to :meth:`run_on_main`.
            args: plain values for it; they cross process boundaries.
            in_main_thread: do it in rank 0's main thread as well, as a user's own code expects. An interrupt may then
                fall between two collectives.

        Raises:
            BaseException: what the part raised on the lowest rank on which it did.
            RankLost: another rank is gone.
        """
        if self._size == 1:
            return self._parts[name](*args)
        line = self._line
        if line is None:
            raise RuntimeError(f"part {name!r} was asked for outside the work")

        def announced() -> Any:
            try:
                self._pass_on(("part", (name, args)))
                value, error = self._take_part(name, args)
            except RuntimeError as lost:
                raise RankLost(str(lost)) from lost
            if error is not None:
                raise error
            return value

        if not in_main_thread:
            return line.call(announced)
        with line.held():
            return announced()

    @property
    def lost(self) -> bool:
        """Tell, on rank 0 and from inside the work, whether another rank was found to be gone."""
        return self._line is not None and self._line.error is not None

    def check_all_there(self) -> None:
        """Demand, on rank 0 and from inside the work, that no rank is gone.

        Raises:
            RankLost: one is; :meth:`run_on_main` turns it into an error for people.
        """
        if self._line is not None and self._line.error is not None:
            raise RankLost(str(self._line.error)) from self._line.error

    def _work(self, work: Callable[[], _T]) -> _T:
        line = self._line = Lifeline(self._beat, self._beat_s)
        try:
            with line:
                value = work()
        except BaseException as error:
            if isinstance(error, RankLost) or (line.error is not None and isinstance(error, Exception)):
                raise self._gone(line.error or error) from error
            portable = _portable(error)
            if line.error is None:
                self._tell(portable)
            if portable is error:
                raise
            raise portable from error
        finally:
            self._line = None
        if line.error is not None:
            raise self._gone(line.error) from line.error
        with self._talking():
            self._pass_on(("value", value))
        return value

    def _attend(self) -> Any:
        while True:
            with self._talking():
                kind, heard = self._pass_on(None)
                if kind == "part":
                    # What went wrong here is known to rank 0 by now, and rank 0 decides what becomes of it.
                    self._take_part(*heard)
            if kind == "error":
                raise heard
            if kind == "value":
                return heard

    def _take_part(self, name: str, args: tuple[Any, ...]) -> tuple[Any, BaseException | None]:
        """Do this rank's share; give its value, and the error of the lowest rank that had one."""
        value, mine = None, None
        try:
            value = self._parts[name](*args)
        except BaseException as error:  # noqa: BLE001  whatever it is, the other ranks wait to hear of it
            _log.debug("Part %s failed on rank %d", name, self._rank, exc_info=True)
            mine = _portable(error)
        found: list[Any] = [None] * self._size
        dist.all_gather_object(found, mine)
        return value, next((error for error in found if error is not None), None)

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        """Say it for people when another rank cannot be reached."""
        try:
            yield
        except RuntimeError as error:
            raise self._gone(error) from error

    def _gone(self, error: BaseException) -> BranchKeyError:
        # Backends put the place in their own source before it, and advice behind it.
        said = re.sub(r"^\[[^\]]*\] *", "", str(error).split("\n")[0]).split(". ")[0]
        return BranchKeyError(
            what="process group",
            expected=f"all {self._size} ranks of it",
            found=said or "a rank that does not answer",
            fix="See the log of the rank that ended, and start the job again from its last checkpoint",
        )

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
        with self._talking():
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

        Small tensors travel together. A difference in number, shape or dtype between ranks ends the process in torch:
        compare them with :meth:`agree` first. Needs the memory of the largest tensor once more, at least 4 MB.
        """
        self._check_membership()
        if self._size == 1:
            return
        for bucket in _buckets(tensors):
            # Bytes, because no backend knows every dtype (gloo has no float8); contiguous, because strides may differ.
            values = [tensor.detach().contiguous() for tensor in bucket]
            pieces = [value.reshape(-1).view(torch.uint8) for value in values]
            wire = _packed(pieces) if len(pieces) > 1 else pieces[0]
            if wire.device.type == "cpu" and dist.get_backend() == "nccl":
                wire = wire.cuda()
            with self._talking():
                dist.broadcast(wire, src=0)
            if self.is_main or wire.data_ptr() == bucket[0].data_ptr():
                continue
            start = 0
            for tensor, value in zip(bucket, values):
                size = value.numel() * value.element_size()
                received = wire[start : start + size].to(value.device).view(value.dtype).view(value.shape)
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(received)
                start += _aligned(size)

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


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors of one device that travel together; a large one goes alone, so that it need not be copied."""
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        size = _aligned(tensor.numel() * tensor.element_size())
        if size == 0:
            continue
        if bucket and (filled + size > _BUCKET_BYTES or tensor.device != bucket[0].device):
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += size
    if bucket:
        yield bucket


def _packed(pieces: list[Tensor]) -> Tensor:
    """Lay pieces of bytes one behind the other, each where a value of any type may begin."""
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + _aligned(piece.numel()))
    wire = torch.empty(starts[-1], dtype=torch.uint8, device=pieces[0].device)
    for start, piece in zip(starts, pieces):
        wire[start : start + piece.numel()] = piece
    return wire


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _portable(error: BaseException) -> BaseException:
    """Give ``error`` itself if it surely crosses process boundaries, else one of ours that says the same."""
    if isinstance(error, BranchKeyError):
        return error
    if type(error).__module__ == "builtins" and all(isinstance(argument, _PLAIN) for argument in error.args):
        return type(error)(*error.args) if error.__dict__ else error
    return BranchKeyError(
        what=f"{type(error).__name__} on one rank", found=str(error), fix="See the traceback of the rank it came from"
    )
