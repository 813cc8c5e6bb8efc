"""Short-term memory: language models as functions of explicit weights, one set a lane."""

from typing import TYPE_CHECKING

from mlm.base.lazy import lazily

if TYPE_CHECKING:
    from mlm.models.base import (
        AdaptationBase,
        choose_dynamic,
        fold_low_rank,
        lanes_of,
        reset_lanes,
        unfold_low_rank,
    )
    from mlm.models.extension import (
        Extension,
        Extent,
        LaneValue,
        Making,
        Need,
        Outcome,
        Plan,
        Restart,
        Told,
    )
    from mlm.models.language_model import (
        LanguageModel,
        OutputTerms,
        Read,
        State,
        Tell,
        Weights,
        WithinSegment,
    )
    from mlm.models.module import ModuleModel
    from mlm.models.recurrent import BaseModel, Dropout, RecurrentLM
    from mlm.models.snail import SnailShape, snail_like

__all__ = [
    "AdaptationBase",
    "BaseModel",
    "Dropout",
    "Extension",
    "Extent",
    "LaneValue",
    "LanguageModel",
    "Making",
    "ModuleModel",
    "Need",
    "Outcome",
    "OutputTerms",
    "Plan",
    "Read",
    "RecurrentLM",
    "Restart",
    "SnailShape",
    "State",
    "Tell",
    "Told",
    "Weights",
    "WithinSegment",
    "choose_dynamic",
    "fold_low_rank",
    "lanes_of",
    "reset_lanes",
    "snail_like",
    "unfold_low_rank",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "base": "AdaptationBase choose_dynamic fold_low_rank lanes_of reset_lanes unfold_low_rank",
        "extension": "Extension Extent LaneValue Making Need Outcome Plan Restart Told",
        "language_model": "LanguageModel OutputTerms Read State Tell Weights WithinSegment",
        "module": "ModuleModel",
        "recurrent": "BaseModel Dropout RecurrentLM",
        "snail": "SnailShape snail_like",
    },
)
