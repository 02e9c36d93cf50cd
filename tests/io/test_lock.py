"""The lock beside a file that several processes change."""

import pytest

from ckptavg.io import lock, temporaries


class Clock:
    """Time that passes only in pauses."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(lock, "time", made)
    return made


def test_lock_waits_while_others_take_turns(tmp_path, monkeypatch, clock):
    """Many writers on a slow disk may hold the lock for longer than one writer's patience."""
    path, take = tmp_path / "r.json", temporaries.lock
    turns = iter(range(5))

    def hold(handle, side):
        if next(turns, None) is None:
            return take(handle, side)
        clock.now += 0.9 * lock._PATIENCE
        # The next holder's side file, made while the last one is still open: another inode.
        other = tmp_path / "other"
        other.touch()
        other.rename(side)
        return False

    monkeypatch.setattr(temporaries, "lock", hold)
    with lock.lock_beside(path):
        assert clock.now > 4 * lock._PATIENCE
        assert [entry.name for entry in tmp_path.iterdir()] == [".r.json.ckptavg-lock"]
    assert not list(tmp_path.iterdir())


def test_lock_held_too_long_is_told(tmp_path, clock, caplog):
    path = tmp_path / "r.json"
    with lock.lock_beside(path), lock.lock_beside(path):
        assert lock._PATIENCE <= clock.now < lock._PATIENCE + 1
    assert "going on without waiting" in caplog.text


def test_lock_taken_at_once_is_not_told(tmp_path, clock, caplog):
    with lock.lock_beside(tmp_path / "r.json"):
        assert clock.now == 0
    assert not caplog.text
