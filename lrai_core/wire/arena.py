"""Memory that other processes share, so that tensors are read where they lie.

Its owner says where it is with numbers, never a path. It is mapped read-only, once, and only where
it is sealed against shrinking, so that reading it cannot fail later.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path
from typing import Final

import numpy as np

from lrai_core.wire.messages import BadFrames, Buffer, Segment

ID_BYTES: Final = 16  # with which it begins


class Arenas:
    """Arenas of other processes, to be read."""

    def __init__(self) -> None:
        self._mapped: dict[Segment, memoryview] = {}

    def open(self, segment: Segment) -> memoryview:
        """Return the memory of a segment, mapped by the first call.

        Raises:
            BadFrames: The numbers are not those of an arena of this user.
        """
        if segment not in self._mapped:
            try:
                self._mapped[segment] = memoryview(_map(segment))
            except (OSError, ValueError, OverflowError) as error:
                raise BadFrames(f"no memory to share: {error}") from None
        return self._mapped[segment]

    def forget(self, segment: Segment) -> None:
        """Unmap a segment, once the last view of it is gone."""
        self._mapped.pop(segment, None)

    def find(self, data: Buffer) -> tuple[Segment, int] | None:
        """Return the segment in which these bytes lie, and where; None if in none."""
        address = _address(data)
        for segment, memory in self._mapped.items():
            if 0 <= (offset := address - _address(memory)) < segment.size:
                return segment, offset
        return None


def _address(data: Buffer) -> int:
    return int(np.frombuffer(data, np.uint8).__array_interface__["data"][0])


def _map(segment: Segment) -> mmap.mmap:
    path = Path(f"/proc/{segment.pid}/fd/{segment.fd}")
    if not path.is_file():  # to open a device or a pipe may do something
        raise ValueError("not a file")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        info, seals = os.fstat(fd), fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        memory = mmap.mmap(fd, segment.size, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    mine = info.st_uid == os.geteuid() and info.st_size == segment.size
    if not (mine and seals & fcntl.F_SEAL_SHRINK and memory[:ID_BYTES] == segment.id):
        raise ValueError("another one has this number")
    return memory
