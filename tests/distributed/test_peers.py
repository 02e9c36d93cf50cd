"""Finding the processes that share the work."""

import pytest

from ckptavg.distributed.peers import SingleProcess, find_peers, share_work


def test_peers_are_this_process_alone_by_default():
    assert isinstance(find_peers(), SingleProcess)


def test_peers_are_those_of_the_innermost_context():
    outer, inner = SingleProcess(), SingleProcess()
    with share_work(outer):
        with share_work(inner):
            assert find_peers() is inner
        assert find_peers() is outer
    assert find_peers() not in (outer, inner)


def test_peers_are_forgotten_after_an_error():
    peers = SingleProcess()
    with pytest.raises(RuntimeError), share_work(peers):
        raise RuntimeError
    assert find_peers() is not peers
