from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from lrai_core.wire.arena import Arenas
from lrai_core.wire.messages import BadFrames, Packer, Segment, unpack, view
from lrai_shared.arena import Arena

LARGE = 64 << 10
SIZE = 8 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(SIZE)
    yield made
    made.close()


def segment_of(arena: Arena) -> Segment:
    assert arena.segment is not None
    return arena.segment


def descriptors(*files: Path) -> int:
    """Return how many descriptors lead to arenas and these files; others are other threads'."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # it has been closed
            file = link.readlink()
            found += file in files or "memfd:lrai" in file.name
    return found


def test_what_the_owner_puts_in_others_read_without_a_copy(arena: Arena) -> None:
    array = np.arange(LARGE, dtype=np.float32)
    packer, readers = Packer(arena.put), Arenas()
    (place,) = packer.pack([array])
    assert place.frame == -1
    assert packer.frames() == [b""]
    memory = readers.open(segment_of(arena))
    found = unpack(place, packer.frames(), [memory])
    np.testing.assert_array_equal(found, array)
    assert np.shares_memory(found, np.frombuffer(memory, np.uint8))
    assert found.flags.aligned
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1
    assert arena.copied_bytes == array.nbytes


def test_what_lies_in_an_arena_is_passed_on_by_its_place(arena: Arena) -> None:
    sender, readers = Packer(arena.put), Arenas()
    first, second = np.ones(LARGE, np.float32), np.zeros(LARGE, np.int8)
    memory = readers.open(segment_of(arena))
    there = [unpack(p, [b""], [memory]) for p in sender.pack([first, second])]
    own = np.ones(LARGE, np.int8)
    packer = Packer(readers.find)
    places = packer.pack([*there, own])
    assert [place.frame for place in places] == [-1, -1, 1]
    assert packer.segments == (arena.segment,)
    for place, array in zip(places, [first, second, own], strict=True):
        np.testing.assert_array_equal(unpack(place, packer.frames(), [memory]), array)
    readers.forget(segment_of(arena))
    assert Packer(readers.find).pack(there)[0].frame == 1


def test_small_tensors_stay_in_the_message(arena: Arena) -> None:
    packer = Packer(arena.put)
    assert packer.pack([np.zeros(LARGE - 1, np.int8)])[0].frame == 0
    assert not arena.blocks


@given(st.lists(st.tuples(st.integers(LARGE, 4 * LARGE), st.booleans()), max_size=60))
def test_blocks_never_overlap_and_are_used_again(steps: list[tuple[int, bool]]) -> None:
    arena = Arena(16 * LARGE)
    segment = segment_of(arena)
    memory = Arenas().open(segment)
    held: dict[int, bytes] = {}
    for number, (size, free) in enumerate(steps):
        if free and held:
            arena.give_back(offset := min(held))
            del held[offset]
        data = bytes([number]) * size
        if (found := arena.put(data)) is not None:
            assert found[0] == segment
            held[found[1]] = data
        for offset, content in held.items():
            assert memory[offset : offset + len(content)] == content
    assert set(arena.blocks) == set(held)
    arena.close()


def test_a_full_arena_says_so_and_has_room_again(arena: Arena) -> None:
    data = bytes(1 << 20)
    taken = []
    while (found := arena.put(data)) is not None:
        taken.append(found[1])
    assert len(taken) == 7  # the first bytes are its own
    packer = Packer(arena.put)
    assert packer.place(data) == (1, 0, len(data))  # inline
    arena.give_back(taken[3])
    arena.give_back(taken[3])  # told twice, or never taken: no harm
    arena.give_back(12345)
    assert arena.put(data) == (arena.segment, taken[3])
    assert arena.put(data) is None


def test_an_arena_in_which_nothing_is_left_has_room_for_any_size(arena: Arena) -> None:
    small = bytes(SIZE // 16)
    placed = [place[1] for _ in range(20) if (place := arena.put(small))]
    assert arena.put(bytes(SIZE // 2)) is None
    for offset in placed[1:]:
        arena.give_back(offset)
    assert arena.put(bytes(SIZE // 2)) is None, "one is still read"
    arena.give_back(placed[0])
    assert arena.put(bytes(SIZE // 2)) is not None


def test_memory_is_asked_for_once_for_what_comes_again_in_the_same_size(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, allocate = list[int](), os.posix_fallocate

    def counted(fd: int, offset: int, size: int) -> None:
        asked.append(offset)
        allocate(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", counted)
    for _ in range(3):
        placed = [place[1] for _ in range(7) if (place := arena.put(bytes(1 << 20)))]
        assert len(placed) == 7
        for offset in placed:
            arena.give_back(offset)
    assert len(asked) == 7
    assert arena.put(bytes(SIZE // 2)) is not None, "of another size there was none before"


def test_without_such_memory_everything_is_inline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(12, "Cannot allocate memory")

    gc.collect()  # of earlier tests: it would close files
    for name in ("memfd_create", "ftruncate", "posix_fallocate"):
        before = descriptors()
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            arena = Arena()
        assert arena.segment is None
        assert Packer(arena.put).place(bytes(LARGE))[0] == 1
        arena.close()
        assert descriptors() == before


def test_memory_that_runs_out_later_is_no_signal(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    assert arena.put(bytes(LARGE)) is not None
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert arena.put(bytes(LARGE)) is None


def test_a_limit_on_files_means_inline() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        assert Arena().segment is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_it_is_there_until_its_last_reader_is_gone(arena: Arena) -> None:
    gc.collect()
    own, readers, before = segment_of(arena), Arenas(), descriptors()
    found = arena.put(bytes([7]) * LARGE)
    assert found is not None
    part = readers.open(own)[found[1] : found[1] + LARGE]
    readers.forget(own)
    arena.close()
    arena.close()
    assert bytes(part) == bytes([7]) * LARGE
    with pytest.raises(BadFrames):
        readers.open(own)
    del part
    assert descriptors() == before - 2  # the file, and the owner's mapping of it


def test_nobody_can_pull_the_memory_away(arena: Arena) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(segment_of(arena).fd, 0)


def test_numbers_that_are_no_arena_are_refused(arena: Arena, tmp_path: Path) -> None:
    gc.collect()
    good = segment_of(arena)
    # Each is an arena but for one thing.
    plain = (tmp_path / "plain").open("w+b", buffering=0)
    unsealed = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    given_away = os.memfd_create("others", os.MFD_ALLOW_SEALING)
    for fd in (plain.fileno(), unsealed, given_away):
        os.write(fd, good.id)
        os.ftruncate(fd, SIZE)
    fcntl.fcntl(unsealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    fcntl.fcntl(given_away, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    if not os.geteuid():  # only root can
        os.fchown(given_away, 12345, -1)
    else:
        os.pwrite(given_away, bytes(16), 0)
    empty = os.memfd_create("empty", os.MFD_ALLOW_SEALING)
    readable, writable = os.pipe()
    end, other = socket.socketpair()
    others = [plain.fileno(), unsealed, given_away, empty, readable, writable, end.fileno()]
    others.append(os.open("/", 0))
    files = [Path(f"/proc/self/fd/{fd}").readlink() for fd in others]
    readers, opened = Arenas(), descriptors(*files)
    for wrong in (
        *(replace(good, fd=fd) for fd in others),
        *(replace(good, fd=fd, size=0) for fd in others),
        *(replace(good, fd=fd) for fd in (-1, 999_999, 1 << 70)),
        *(replace(good, pid=pid) for pid in (-1, 0, 1, 1 << 40, -(1 << 70))),
        *(replace(good, size=size) for size in (-1, 0, SIZE - 1, SIZE + 1, 1 << 62, 1 << 70)),
        *(replace(good, id=identity) for identity in (b"", bytes(16), good.id[:15], good.id * 2)),
    ):
        with pytest.raises(BadFrames):
            readers.open(wrong)
    assert descriptors(*files) == opened
    for fd in (unsealed, given_away, empty, readable, writable, others[-1]):
        os.close(fd)
    for opened_file in (plain, end, other):
        opened_file.close()
    assert descriptors(*files) == opened - len(others)


def test_the_next_bearer_of_a_number_is_not_taken_for_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    create = os.memfd_create

    def far_from_others(*how: Any) -> int:
        """Return a number that no other thread takes meanwhile, as the lowest one may be."""
        low = create(*how)
        high = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 900)
        os.close(low)
        return high

    monkeypatch.setattr(os, "memfd_create", far_from_others)
    arena = Arena(SIZE)
    old = segment_of(arena)
    arena.close()
    successor = Arena(SIZE)
    assert segment_of(successor).fd == old.fd
    with pytest.raises(BadFrames):
        Arenas().open(old)
    successor.close()


NUMBERS = st.integers(-(1 << 70), 1 << 70) | st.integers(-2, 1 << 20)


@given(st.builds(Segment, NUMBERS, NUMBERS, NUMBERS, st.binary(max_size=20)))
def test_any_numbers_are_refused_or_an_arena_and_nothing_else(segment: Segment) -> None:
    with pytest.raises(BadFrames):
        Arenas().open(segment)


@given(st.tuples(st.integers(-3, 2), NUMBERS, NUMBERS))
def test_any_place_lies_inside_or_is_refused(place: tuple[int, int, int]) -> None:
    memory = memoryview(bytes(100))
    try:
        found = view(place, [bytes(50)], [memory, memory])
    except BadFrames:
        return
    index, offset, size = place
    assert -2 <= index <= 0
    assert len(found) == size
    assert 0 <= offset <= offset + size <= (100 if index < 0 else 50)
