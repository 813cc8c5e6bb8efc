"""Multi-query associative recall: what is asked can be answered, and is scored where it stands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Command

from benchmarks.recall import (
    COLUMNS,
    Answers,
    Found,
    Scored,
    distance_table,
    old_values,
    pairs_table,
    score_query,
    segments_table,
)
from benchmarks.recall_data import (
    BLANK,
    HEAD_TOKENS,
    SIZES,
    Query,
    Recall,
    Size,
    recall_sequence,
    recall_sequences,
)
from mlm.base.errors import UserError
from mlm.text.articles import split_articles
from mlm.text.vocabulary import WordVocabulary

WORDS = 512


def _sequences(size: Size, number: int = 20) -> list[Recall]:
    rng = np.random.default_rng(1)
    return [recall_sequence(size, WORDS, rng) for _ in range(number)]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s.task}-{s.length}-{s.pairs}")
def test_every_query_asks_for_the_last_value_bound_to_its_key(size: Size) -> None:
    for one in _sequences(size):
        assert len(one.words) == size.length
        context = 2 * (size.pairs + size.again)
        bound: dict[str, list[int]] = {}
        for at in range(0, context, 2):
            bound.setdefault(one.words[at], []).append(at + 1)
        assert len(bound) == size.pairs
        asked = [one.words[query.answer - 1] for query in one.queries]
        assert sorted(asked) == sorted(bound), "every key is asked for once"
        for query in one.queries:
            places = bound[one.words[query.answer - 1]]
            assert query.answer >= context + 1
            assert (query.old, query.value) == (places[0], places[-1])
            assert query.bound_again == (len(places) == 2)
            assert one.words[query.answer] == one.words[query.value]
        assert sum(query.bound_again for query in one.queries) == size.again


def test_keys_values_and_blanks_are_different_words() -> None:
    for one in _sequences(Size(64, 9, 4)):
        values = {one.words[at] for at in range(1, 26, 2)}
        assert len(values) == 13, "no value is bound twice, so an old one is never right"
        rest = [w for at, w in enumerate(one.words) if at >= 26 and w[0] not in "kv"]
        assert set(rest) == {BLANK}
        assert len(rest) == 64 - 26 - 18
        assert all(word[0] == "k" for word in one.words[:26:2])
        assert all(word[0] == "v" for word in one.words[1:26:2])


def test_queries_favour_the_first_slots_and_reach_the_last() -> None:
    first = [min(q.answer for q in one.queries) for one in _sequences(Size(64, 4), 200)]
    last = [max(q.answer for q in one.queries) for one in _sequences(Size(64, 4), 200)]
    assert np.mean(np.array(first) == 9) > 0.5
    assert max(last) == 63


def test_a_size_that_cannot_be_made_is_refused() -> None:
    rng = np.random.default_rng(0)
    for size, words in ((Size(64, 17), 512), (Size(63, 4), 512), (Size(64, 4, 5), 512)):
        with pytest.raises(UserError, match="bound again"):
            recall_sequence(size, words, rng)
    assert recall_sequence(Size(64, 16), 32, rng).queries
    with pytest.raises(UserError, match="32 words: use at least 40"):
        recall_sequence(Size(128, 16, 4), 32, rng)


def test_sequences_follow_from_seed_and_split() -> None:
    made = [recall_sequences(SIZES, 200, WORDS, *of) for of in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert made[0] == made[1]
    assert made[0] != made[2]
    assert made[0] != made[3]
    assert {one.size for one in made[0]} == set(SIZES)


def test_an_article_holds_the_sequence_behind_its_head() -> None:
    one = _sequences(Size(64, 9, 4), 1)[0]
    (article,) = split_articles(one.article.splitlines(True))
    assert article.text == one.article
    vocabulary = WordVocabulary(["<eos>", "<unk>", "=", "recall", *sorted(set(one.words))])
    tokens = vocabulary.encode_article(one.article)
    known = [vocabulary.words([token])[0] for token in tokens]
    assert known[HEAD_TOKENS : HEAD_TOKENS + 64] == one.words


def test_an_answer_is_scored_where_it_stands() -> None:
    # key 7 is bound to 20 and later to 21; its answer stands at place 6
    size, words = Size(8, 2, 1), [7, 20, 8, 22, 7, 21, 7, 21]
    tokens = np.array([0] * HEAD_TOKENS + words)
    query = Query(answer=7, value=5, bound_again=True, old=1)
    nll = np.arange(len(tokens)) / 10
    for guess, right, old in ((21, True, False), (20, False, True), (22, False, False)):
        guesses = np.full(len(tokens), 21)
        guesses[HEAD_TOKENS + 7] = guess
        scored = score_query(size, query, tokens, Answers(guesses, nll), segment=4)
        # tokens 13 and 11 of the article, in its segments 3 and 2
        assert scored == Scored(size, 2, 1, True, right, old, nll[13])
    same = score_query(size, query, tokens, Answers(tokens, nll), segment=20)
    assert same.segments == 0
    once = query._replace(bound_again=False, old=5)
    assert not score_query(size, once, tokens, Answers(tokens, nll), segment=4).old


def _found() -> Found:
    plain, again = Size(32, 2), Size(32, 2, 1)
    one = Scored(plain, 4, 1, False, True, False, 0.5)
    wrong = one._replace(right=False, distance=40, segments=2, nats=1.5)
    old = Scored(again, 10, 0, True, False, True, 4.0)
    return {
        ("rms", 8, 0): [one, wrong, old],
        ("rms", 8, 1): [one, one, old._replace(right=True, old=False)],
        ("static", 0, 0): [wrong, wrong, old],
    }


def test_tables_are_means_over_seeds_with_least_and_largest() -> None:
    found = _found()
    # no key that was bound once was asked for in the variant: it has no row of those
    plain, again = pairs_table(found, (Size(32, 2), Size(32, 2, 1)), 8)
    assert (plain["task"], plain["pairs"], plain["chance"]) == ("MQAR", 2, 0.5)
    assert (plain["rms"], plain["rms interval"]) == (0.75, [0.5, 1.0])
    assert plain["static"] == 0.0
    assert (again["task"], again["bound"], again["rms"]) == ("forgetting", "again", 0.5)
    near, middle, far = distance_table(found, 8)
    assert (near["distance"], near["rms"]) == ("1 to 7", 1.0)
    assert (middle["from"], middle["to"], middle["rms"]) == (8, 16, 0.5)
    assert (far["distance"], far["rms"]) == ("32 to 63", 0.0)
    new, old = old_values(found, 8)
    assert (new["rms"], old["rms"], old["static"]) == (0.5, 0.5, 1.0)


def test_segments_are_those_of_each_m() -> None:
    rows = segments_table(_found(), (8,))
    assert [row["segments"] for row in rows] == ["0", "1", "2 and more", "all"]
    assert [row.get("rms") for row in rows[:3]] == [0.5, 1.0, 0.0]
    assert rows[3]["rms"] == pytest.approx((2.0 + 5 / 3) / 2)
    assert "static" not in rows[0], "it has no segments"


@pytest.mark.slow
def test_the_quick_run_scores_every_rule(tmp_path: Path, command: Command) -> None:
    done = command("benchmarks.recall", "--quick", "--out", tmp_path / "recall")
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "recall/recall_pairs.json").read_text("utf-8"))["rows"]
    assert len(rows) == 3
    for row in rows:
        for column in COLUMNS.values():
            assert 0 <= row[column] <= 1
    for ending in ("png", "svg", "csv"):
        assert (tmp_path / f"recall/recall.{ending}").exists()
    again = command("benchmarks.recall", "--quick", "--out", tmp_path / "recall")
    assert again.code == 0, again.err
    assert "stage 1" not in again.err, "the language model is made again"
