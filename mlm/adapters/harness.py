"""A model of EleutherAI's evaluation harness: `lm_eval` with `model="mlm"` (extra `harness`).

Every text of the harness is a document of its own, which starts from the static weights (protocol
`article`). Likelihoods are those of whole strings: the plain sum over the model's tokens, in nats,
not corrected for word boundaries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from mlm.base.errors import UserError
from mlm.reader import TrainedModel, load

try:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
except ImportError:
    raise UserError(
        "the evaluation harness (lm_eval) is not installed; install mlm with its extra `harness`"
    ) from None

_NATS = math.log(2)  # nats of a bit
_WORDS = 256  # that a request generates at most, if it does not say how many
_GREEDY = 1e-6  # temperature at which the likeliest token is drawn


@register_model("mlm")
class HarnessLM(LM):
    """A model that learns while it reads, in the form that the harness asks for.

    Args:
        pretrained: what `mlm.load` takes, or what it has given.
        rule: how the weights are rewritten; `static` for not at all.
        form: how the texts are written.
        batch_size: documents read side by side, which changes only the speed; None or `auto` = as
            many as fit (`lanes` of `TrainedModel.score_many`).
        device: where to compute.
    """

    def __init__(
        self,
        pretrained: str | TrainedModel,
        rule: str = "best",
        form: Any = "plain",
        batch_size: int | str | None = None,
        device: Any = "auto",
        **_: Any,
    ) -> None:
        super().__init__()
        known = not isinstance(pretrained, str)
        self.model = pretrained if known else load(pretrained, device=device)
        self.rule, self.form = rule, form
        said = str(batch_size)
        self.lanes = int(said) if said.isdigit() else None

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of every text, in nats. A text without a newline has no line end."""
        texts = [request.args[0] for request in requests]
        table = self.model.score_many(texts, self.rule, lanes=self.lanes, form=self.form)
        found = [0.0] * len(texts)
        for doc, bits in _columns(table, "doc_id", "surprisal_plain"):
            found[doc] -= bits * _NATS
        self._remember("loglikelihood_rolling", requests, found)
        return found

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of a continuation after a context in nats, whether it is the greedy one).

        The context is read and learned from, once for all continuations that follow each other in
        the requests. Where a word lies partly in the context, the likelihood is that of context and
        continuation less that of the context.
        """
        found: list[tuple[float, bool]] = []
        groups = itertools.groupby(requests, key=lambda request: request.args[0])
        for context, group in tqdm(groups, desc="contexts", disable=disable_tqdm):
            reader = self.model.reader(self.rule, form=self.form, stats=("pieces",))
            reader.read(context)
            rest = _bits(reader.copy().finish())
            for request in group:
                own = reader.copy()
                tables = [own.read(request.args[1]), own.finish()]
                nats = (sum(map(_bits, tables)) - rest) * _NATS
                pieces = _pieces_behind(tables, len(context))
                found.append((-nats, all(piece["rank"] == 1 for piece in pieces)))
        self._remember("loglikelihood", requests, found)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text that goes on from every context, up to the first of the strings `until`.

        The model learns from what it writes. It writes the likeliest token, or with `do_sample` or
        a `temperature` draws one; `max_gen_toks` limits the number of words.
        """
        found = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            context, wanted = request.args
            until = wanted.get("until") or []
            until = [until] if isinstance(until, str) else until
            temperature = float(wanted.get("temperature") or 0.0)
            if wanted.get("do_sample") and not temperature:
                temperature = 1.0
            if wanted.get("do_sample") is False:
                temperature = 0.0
            text = self.model.reader(self.rule, form=self.form).generate(
                context,
                words=int(wanted.get("max_gen_toks") or wanted.get("max_new_tokens") or _WORDS),
                temperature=temperature or _GREEDY,
            )
            ends = [at for stop in until if stop and (at := text.find(stop)) >= 0]
            found.append(text[: min(ends, default=len(text))])
        self._remember("generate_until", requests, found)
        return found

    def _remember(self, kind: str, requests: Sequence[Any], found: Sequence[Any]) -> None:
        """Tell the harness's cache."""
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial(kind, request.args, value)


def _columns(table: pa.Table, *names: str) -> Iterable[tuple[Any, ...]]:
    return zip(*(table[name].to_pylist() for name in names), strict=True)


def _bits(table: pa.Table) -> float:
    return sum(table["surprisal_plain"].to_pylist())


def _pieces_behind(tables: Sequence[pa.Table], place: int) -> list[dict[str, Any]]:
    """The pieces of the words that end behind a character of the text."""
    rows = (row for table in tables for row in _columns(table, "char_end", "pieces"))
    return [piece for end, pieces in rows if end > place for piece in pieces]
