"""Lanes of segments: every token once, in order; ragged ends masked; a cursor that continues."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlm.text.streams import LaneStream, with_noise

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


def test_noise_is_read_as_it_is_predicted_and_the_rest_stays() -> None:
    texts, pool = [np.arange(1, 6000), np.arange(1, 4000)], np.array([7001, 7002, 7003])
    overwritten, runs, tokens = 0, 0, 0
    for step, piece in enumerate(LaneStream(texts, 2, 64, eos=0)):
        one, again = (
            with_noise(piece, pool, 0.1, np.random.default_rng([3, step])) for _ in range(2)
        )
        assert torch.equal(one.targets, again.targets)
        noise = torch.isin(one.targets, torch.from_numpy(pool))
        assert torch.equal(one.targets[~noise], piece.targets[~noise])
        assert torch.equal(one.inputs[:, 0], piece.inputs[:, 0])
        assert torch.equal(
            one.inputs[:, 1:][piece.mask[:, 1:]], one.targets[:, :-1][piece.mask[:, 1:]]
        )
        assert not noise[~piece.mask].any()
        overwritten += int(noise.sum())
        runs += int((noise[:, 1:] & ~noise[:, :-1]).sum())
        tokens += int(piece.mask.sum())
    assert 0.05 < overwritten / tokens < 0.12
    assert overwritten > 5 * runs, "they come in runs"
