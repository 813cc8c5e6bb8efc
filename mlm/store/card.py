"""The model card of a released model: README.md in the form of the Hugging Face hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPLATE = "model_card.md.jinja"


@dataclass(frozen=True)
class Card:
    """What only a person can say of a model."""

    title: str
    """Heading."""
    attribution: str = ""
    """Where the training text comes from, and whom its licence asks to name."""
    licence: str = "unknown"
    """Of the weights, as the hub writes it, such as apache-2.0 or cc-by-sa-4.0."""
    language: str = "en"
    """Of the text, as the hub writes it."""


def card_text(card: Card, **facts: Any) -> str:
    """The text of README.md: the template, filled with these facts and what a person says."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["yaml"] = lambda text: json.dumps(text, ensure_ascii=False)
    return environment.get_template(TEMPLATE).render(card=card, **facts)
