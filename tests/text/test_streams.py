"""Lanes of segments: every token once, in order; ragged ends masked; a cursor that continues."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlm.text.streams import LaneStream

TEXTS = [np.arange(1, n + 1) + 100 * k for k, n in enumerate((7, 0, 1, 12, 5, 10))]


@pytest.mark.parametrize("lanes", [1, 2, 3, 9])
@pytest.mark.parametrize("segment", [1, 4, 5, 50])
def test_every_token_is_read_once_and_in_order(lanes: int, segment: int) -> None:
    got: dict[int, list[int]] = {}
    for piece in LaneStream(TEXTS, lanes, segment, eos=0):
        for lane in range(lanes):
            count = int(piece.mask[lane].sum())
            if not count:
                assert not piece.new[lane]
                continue
            article = int(piece.article[lane])
            so_far = got.setdefault(article, [])
            assert bool(piece.new[lane]) == (not so_far)
            assert piece.start[lane] == len(so_far)
            targets = piece.targets[lane, :count].tolist()
            inputs = piece.inputs[lane, :count].tolist()
            assert inputs == [so_far[-1] if so_far else 0, *targets[:-1]]
            assert piece.mask[lane, :count].all()
            assert count == segment or len(so_far) + count == len(TEXTS[article])
            so_far += targets
    assert got == {k: t.tolist() for k, t in enumerate(TEXTS) if len(t)}


def test_training_stream_never_ends_and_shuffles_each_epoch() -> None:
    stream = LaneStream(TEXTS, 1, 50, eos=0, seed=1)
    order = [int(next(stream).article[0]) for _ in range(15)]
    epochs = [order[:5], order[5:10], order[10:]]
    assert all(sorted(e) == [0, 2, 3, 4, 5] for e in epochs)
    assert len({tuple(e) for e in epochs}) > 1


def test_cursor_continues_the_same_segments() -> None:
    whole = LaneStream(TEXTS, 2, 4, eos=0, seed=5)
    pieces = [next(whole) for _ in range(25)]
    half = LaneStream(TEXTS, 2, 4, eos=0, seed=5)
    for _ in range(11):
        next(half)
    again = LaneStream(TEXTS, 2, 4, eos=0, seed=5)
    again.load_state_dict(half.state_dict())
    for want in pieces[11:]:
        got = next(again)
        for a, b in zip(got[:4], want[:4], strict=True):
            assert torch.equal(a, b)


def test_no_token_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no article"):
        LaneStream([np.zeros(0, dtype=int)], 1, 4, eos=0)
