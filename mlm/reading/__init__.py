"""Reading: predict, score, update, carry; the guard, the cache and the meta-gradients."""

from typing import TYPE_CHECKING

from mlm.base.lazy import lazily

if TYPE_CHECKING:
    from mlm.reading.cache import Cache, CacheSetting
    from mlm.reading.meta_gradient import MetaGradient
    from mlm.reading.pes import Evolution
    from mlm.reading.scoring import (
        Scores,
        score_articles,
        score_protocol,
        score_stream,
        word_losses,
    )
    from mlm.reading.static import StaticReader, static_loss
    from mlm.reading.step import Reader, Scored, Step, begin, prepared, read, score_segment

__all__ = [
    "Cache",
    "CacheSetting",
    "Evolution",
    "MetaGradient",
    "Reader",
    "Scored",
    "Scores",
    "StaticReader",
    "Step",
    "begin",
    "prepared",
    "read",
    "score_articles",
    "score_protocol",
    "score_segment",
    "score_stream",
    "static_loss",
    "word_losses",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "cache": "Cache CacheSetting",
        "meta_gradient": "MetaGradient",
        "pes": "Evolution",
        "scoring": "Scores score_articles score_protocol score_stream word_losses",
        "static": "StaticReader static_loss",
        "step": "Reader Scored Step begin prepared read score_segment",
    },
)
