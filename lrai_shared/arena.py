"""Memory that this process shares with those that read its tensors: one copy in, none on the way.

This process alone allocates in it and writes to it; `lrai_core.wire.arena` is how others read. The
kernel keeps it until its owner and all who map it are gone, however they end.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
from typing import Final

from lrai_core.wire.arena import ID_BYTES
from lrai_core.wire.messages import Buffer, Segment

_ARENA_BYTES: Final = 256 << 20  # of addresses; of memory it takes what was in use at one time
_ALIGNMENT: Final = 64


class Arena:
    """Blocks in memory of this process that others read. Not shared between threads.

    Where there is no such memory, `segment` is None and nothing has room.
    """

    def __init__(self, size: int = _ARENA_BYTES) -> None:
        """Take the addresses; memory is taken as it is needed."""
        self.segment: Segment | None = None
        self._end = _ALIGNMENT  # of what was in use at one time, behind which there is no memory
        self._free: dict[int, list[int]] = {}  # offsets by size
        self.blocks: dict[int, int] = {}  # in use: size by offset
        self.copied_bytes = self.allocations = 0  # the latter of memory, not of a free block
        self._fd = -1
        try:
            self._fd = os.memfd_create("lrai", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self._fd, size)
            os.posix_fallocate(self._fd, 0, _ALIGNMENT)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._memory = mmap.mmap(self._fd, size)
        except OSError:
            self.close()
            return
        identity = secrets.token_bytes(ID_BYTES)  # by which a reader knows the number's next bearer
        self._memory[:ID_BYTES] = identity
        self.segment = Segment(os.getpid(), self._fd, size, identity)

    def put(self, data: Buffer) -> tuple[Segment, int] | None:
        """Copy the bytes of a tensor into a block, and say where; None where there is no room."""
        size = len(data)
        size += -size % max(_ALIGNMENT, 1 << size.bit_length() - 3)  # few sizes, a quarter to spare
        free = self._free.setdefault(size, [])
        if not self.blocks and len(self._free) > 1:  # all of it is there for blocks of any size
            self._free, self._end = {size: (free := [])}, _ALIGNMENT
        if self.segment is None or (not free and self._end + size > self.segment.size):
            return None
        if not free:
            try:  # now: to write to what is not there would be a signal, not an error
                os.posix_fallocate(self._fd, self._end, size)
            except OSError:
                return None
            self.allocations += 1
            free.append(self._end)
            self._end += size
        offset = free.pop()
        self.blocks[offset] = size
        self.copied_bytes += len(data)
        self._memory[offset : offset + len(data)] = data
        return self.segment, offset

    def give_back(self, offset: int) -> None:
        """Let a block be taken again; nobody reads it any more."""
        if (size := self.blocks.pop(offset, None)) is not None:
            self._free[size].append(offset)

    def close(self) -> None:
        """Give it up; it is there for those who map it until they are done."""
        if self.segment is not None:
            self._memory.close()
        if self._fd >= 0:
            os.close(self._fd)
        self.segment, self._fd = None, -1
