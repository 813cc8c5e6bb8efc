"""Switches of a block: no other block, thread or process setting changes them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
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


THREADED = """
import os, torch
from mlm import kernels

def work():
    x = torch.ones(600, 600)
    theta, one = torch.ones(2, 9 * kernels.TILE), torch.ones(9 * kernels.TILE)
    lanes = torch.ones(2)
    arguments = theta, theta, one, one, one, lanes, lanes, theta.clone()
    with kernels.computing(threads=2):
        kernels.share_out(kernels.relax, 9, 1 << 30, *arguments)
        return float((x @ x).exp().log().sum())

torch.set_num_threads(2)
want = work()
child = os.fork()
if not child:
    os._exit(0 if work() == want else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_child_computes_alone() -> None:
    """After a threaded pass in the parent, whose threads it does not have."""
    done = subprocess.run([sys.executable, "-c", THREADED], timeout=120, check=False)
    assert done.returncode == 0
