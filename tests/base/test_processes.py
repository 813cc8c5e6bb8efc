"""Who takes which part of what several processes do together."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mlm.base.errors import UserError
from mlm.base.processes import Ranks, alone, ranks, refuse_several, several_processes


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("number", [0, 1, 5, 16])
def test_every_lane_is_read_by_one_process(world: int, number: int) -> None:
    """In a row, and none has two more than another."""
    shares = [list(Ranks(rank, world).share(number)) for rank in range(world)]
    assert [lane for own in shares for lane in own] == list(range(number))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [list(Ranks(0, world).share(number, rank)) for rank in range(world)] == shares


def test_every_article_is_read_by_one_process_the_longest_first() -> None:
    """Nothing is padded; the loads differ by no more than the last article dealt."""
    sizes = [5, 100, 7, 60, 0, 41, 3, 9]
    dealt = [Ranks(rank, 3).mine(sizes) for rank in range(3)]
    assert sorted(k for own in dealt for k in own) == list(range(len(sizes)))
    assert [sum(sizes[k] for k in own) for own in dealt] == [100, 63, 62]
    assert Ranks(0, 1).mine(sizes) == list(range(len(sizes)))


def test_one_process_meets_nobody() -> None:
    """All that several do together is nothing, or the work itself."""
    here, tensor = ranks(), torch.ones(3)
    here.sum_([tensor])
    assert (here.rank, here.world, tensor.tolist()) == (0, 1, [1.0, 1.0, 1.0])
    assert here.gather("x") == here.parts(lambda: "x") == ["x"]
    assert here.on_first(lambda: "x") == "x"
    assert here.agree(True)
    assert not here.agree(False)


def test_only_the_first_process_writes_where_it_works_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that nothing is written twice while each reads a part."""
    monkeypatch.setattr("mlm.base.processes._here", {"now": Ranks(1, 2)})
    with alone():
        assert (ranks().rank, ranks().world) == (1, 1)
        assert ranks().on_first(lambda: "written") is None
    assert ranks().world == 2


def test_more_processes_than_lanes_are_refused() -> None:
    """Before anything is trained."""
    with pytest.raises(UserError, match=r"3 processes cannot share 2 lanes \(--meta\.lanes"):
        Ranks(0, 3).share_lanes(2, "meta")


def test_an_environment_of_half_the_names_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """WORLD_SIZE alone, as a scheduler may set it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(UserError, match=r"cannot meet.*torchrun.*unset WORLD_SIZE"),
        several_processes("cpu"),
    ):
        pass
    with pytest.raises(UserError, match="mlm score works in one process"):
        refuse_several("mlm score")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE='two' in the environment is no number"):
        refuse_several("mlm score")


def test_one_process_never_imports_what_several_need() -> None:
    """`python train.py` is as it was."""
    code = "import sys; import mlm.base.processes as r; r.ranks().gather(1); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout.split()
