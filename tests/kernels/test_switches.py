"""Switches of a block: no other block, thread or process setting changes them."""

from __future__ import annotations

import threading

import torch

from mlm.kernels import computing, switches, usable, use


def test_a_block_has_switches_of_its_own() -> None:
    x = torch.ones(2)
    before = usable(x)
    with computing(kernels=False):
        assert not usable(x)
        use(kernels=True)
        assert not usable(x)
        with computing(bfloat16=True):
            assert switches().bfloat16
            assert not switches().kernels
        assert not switches().bfloat16
    assert usable(x) == before


def test_another_thread_sees_the_process_not_the_block() -> None:
    seen = []
    with computing(kernels=False):
        other = threading.Thread(target=lambda: seen.append(switches().kernels))
        other.start()
        other.join()
    assert seen == [True]


def test_threads_are_set_for_the_block_and_back() -> None:
    before = torch.get_num_threads()
    with computing(threads=before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
