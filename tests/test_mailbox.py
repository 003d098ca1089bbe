"""Arrays through shared memory: equal, larger ones too, and the pipe where there is no room."""

import os

import numpy as np
import pytest

from lingbot_nb.stream.mailbox import SMALL, Letter, Mailbox, folder_in_memory

needs_room = pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no such memory on this system")


def pictures(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 96, 160, 3), dtype=np.uint8)


@pytest.fixture
def ends(tmp_path):
    return Mailbox(tmp_path / "box"), Mailbox(tmp_path / "box")


@needs_room
@pytest.mark.parametrize("counts", [(4, 4), (4, 12), (12, 4)])
def test_arrays_of_any_size_arrive_one_after_the_other(ends, counts):
    sender, receiver = ends
    taken = []
    for seed, count in enumerate(counts):
        letter = sender.put(pictures(count, seed))
        assert isinstance(letter, Letter)
        taken.append(receiver.take(letter))
    # The first is still what it was: the receiver has a copy.
    for seed, count in enumerate(counts):
        assert taken[seed].dtype == np.uint8 and np.array_equal(taken[seed], pictures(count, seed))


@needs_room
def test_arrays_lie_there_together_until_it_is_emptied(ends):
    sender, receiver = ends
    letters = [sender.put(pictures(count, count)) for count in (4, 3, 12)]
    for count, letter in zip((4, 3, 12), letters, strict=True):
        assert np.array_equal(receiver.take(letter), pictures(count, count))
    size = os.path.getsize(sender.path)
    sender.empty()
    assert np.array_equal(receiver.take(sender.put(pictures(4, 9))), pictures(4, 9))
    assert os.path.getsize(sender.path) == size


@needs_room
def test_types_and_slices_survive(ends):
    sender, receiver = ends
    values = np.linspace(0, 1, 60_000, dtype=np.float32).reshape(3, 100, 200)[:, ::-1, ::2]
    big = np.repeat(values, 3, 0)
    got = receiver.take(sender.put(big))
    assert got.dtype == np.float32 and np.array_equal(got, big)


def test_small_arrays_and_other_things_pass_by(ends):
    sender, receiver = ends
    small, error = np.zeros(SMALL, np.uint8), ValueError("no")
    assert sender.put(small) is small and receiver.take(small) is small
    assert sender.put(error) is error and receiver.take(None) is None


def test_without_room_the_array_itself_comes_back(ends, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    array = pictures(4)
    assert ends[0].put(array) is array


def test_the_folder_takes_files():
    folder = folder_in_memory()
    assert folder is None or os.path.isdir(folder)
