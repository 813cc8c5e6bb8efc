"""Text on its way: corpora, articles, a vocabulary, token files, segments of B lanes."""

from typing import TYPE_CHECKING

from mlm.base.lazy import lazily

if TYPE_CHECKING:
    from mlm.text.articles import Article, Corpus, count_words
    from mlm.text.corpora import open_corpus, results_name
    from mlm.text.streams import LaneStream, MixedLanes, Segment, Text
    from mlm.text.tokens import Prepared, TokenFile, encode_split, prepare
    from mlm.text.vocabulary import Vocabulary, fit_vocabulary, load_vocabulary

__all__ = [
    "Article",
    "Corpus",
    "LaneStream",
    "MixedLanes",
    "Prepared",
    "Segment",
    "Text",
    "TokenFile",
    "Vocabulary",
    "count_words",
    "encode_split",
    "fit_vocabulary",
    "load_vocabulary",
    "open_corpus",
    "prepare",
    "results_name",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "articles": "Article Corpus count_words",
        "corpora": "open_corpus results_name",
        "streams": "LaneStream MixedLanes Segment Text",
        "tokens": "Prepared TokenFile encode_split prepare",
        "vocabulary": "Vocabulary fit_vocabulary load_vocabulary",
    },
)
