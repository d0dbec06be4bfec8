"""Data that is too large for a message: a sealed memfd (memfd_create(2)) as its second descriptor.

The seals are what makes it safe to believe the size and to read without a copy changing half way: nobody, its sender
included, can write, shorten or lengthen the file any more. The descriptor's offset belongs to the sender, so it is
read by position. The caller closes it.
"""

from __future__ import annotations

import fcntl
import os

from .envelope import Parcel
from .handoff import HandoffError

_NEEDED = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK


class PayloadTooLargeError(HandoffError):
    """The client sent more than ``listen.max_payload``."""

    status = 413


def data_of(parcel: Parcel, fds: list[int], most: int) -> bytes | str:
    """The application's data: of the message, or of a payload of at most ``most`` bytes. ``fds`` are the descriptors
    behind the client's. Raises HandoffError."""
    if parcel.request is not None:
        _check(fds, 0 if parcel.payload is None else 1)
    return parcel.data if parcel.payload is None else _read_memfd(fds[0], parcel.payload, most)


def _check(fds: list[int], expected: int) -> None:
    if len(fds) > 1:
        raise HandoffError("descriptors", f"{len(fds) + 1}", "the client and at most one payload")
    if len(fds) < expected:
        raise HandoffError("payload", "announced, but no descriptor came with it", "a sealed memfd")
    if len(fds) > expected:
        raise HandoffError("payload", "missing beside a second descriptor", "one that describes it")


def _read_memfd(fd: int, length: int, most: int) -> bytes:
    if length > most:
        raise PayloadTooLargeError("the handoff data", f"{length} bytes long", f"at most {most}")
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        size = os.fstat(fd).st_size
        if seals & _NEEDED != _NEEDED:
            raise HandoffError("payload", "not sealed", "a memfd sealed against writing, growing and shrinking")
        if size != length:
            raise HandoffError("payload.length", "another length than the memfd's", "the memfd's length")
        return _read(fd, length)
    except OSError as error:
        # EINVAL: no memfd at all.
        raise HandoffError("payload", "no memfd", "a sealed memfd") from error


def _read(fd: int, length: int) -> bytes:
    data = os.pread(fd, length, 0)
    if len(data) == length:
        return data
    pieces = [data]
    done = len(data)
    while done < length:
        pieces.append(os.pread(fd, length - done, done))
        if not pieces[-1]:
            raise HandoffError("payload", "shorter than its length", "a sealed memfd")
        done += len(pieces[-1])
    return b"".join(pieces)
