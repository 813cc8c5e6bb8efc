"""What the numbers of a file depend on besides its settings: its format, and constants of the code.

Every file that results depend on says which of both it was written with. One that was written with
others is refused, with the way to make it again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from mlm.extensions import Extensions
from mlm.models import output_layer, recurrent
from mlm.models.extension import numbers_of
from mlm.reading import cache
from mlm.rules import family, fast_gates, gates, moments, networks

FORMAT = 2
"""Of checkpoints and run folders; another number, another meaning of what they hold."""
OF_MODELS = (recurrent,)
OF_RULES = (output_layer, cache, family, fast_gates, gates, moments, networks)
"""Modules whose constants move the losses of a language model, and of a rule besides."""
SPEED = ("LOGITS", "BLOCK", "EMPTY", "TILE")
"""Constants of these modules that move nothing but time and last bits."""


def constants(of_model: bool, tensors: Collection[str] = ()) -> dict[str, Any]:
    """Those of the core and of the extensions that move a loss, by module and name.

    Args:
        of_model: only what a language model's own losses depend on.
        tensors: names of the file's tensors, which say what extensions the model has.
    """
    modules = OF_MODELS if of_model else (*OF_MODELS, *OF_RULES)
    parts = {m.__name__.removeprefix("mlm."): numbers_of(m) for m in modules}
    for extension in Extensions():
        if not of_model or any(name.startswith(extension.key("")) for name in tensors):
            parts[extension.name] = extension.constants()
    found = {
        f"{part}.{name}": value
        for part, values in parts.items()
        for name, value in values.items()
        if name not in SPEED
    }
    return json.loads(json.dumps(found))


def written_now(of_model: bool, tensors: Collection[str]) -> dict[str, Any]:
    """What a file of these tensors that is written now says of its version."""
    return {"format": FORMAT, "of_model": of_model, "constants": constants(of_model, tensors)}


def differences(about: Mapping[str, Any], tensors: Collection[str]) -> str:
    """How a file of these tensors differs from one written now; empty = not at all."""
    if about.get("format") != FORMAT:
        return f"format {about.get('format', 'of an earlier version')}, now {FORMAT}"
    then, now = about["constants"], constants(about["of_model"], tensors)
    names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    return "; ".join(f"{name} was {then.get(name)}, now {now.get(name)}" for name in names)
