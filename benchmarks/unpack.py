"""A run folder from a released model: what benchmarks that tune or train need to start from it.

    python -m benchmarks.unpack wikipedia-small runs/released --corpus data/wikipedia
    python -m benchmarks.claim runs/released --seeds 1 --forms all --no-fewer --no-ablate

A released model is only read. The folder that this writes is a run of the same language model, the
same adaptation base and the same learned rules, with their weights as they were released, on the
text that it was trained with. Hand-made rules are tuned there again, and others can be trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mlm.base.errors import UserError, run_cli
from mlm.base.names import LEARNED
from mlm.base.terminal import say
from mlm.runs.identity import base_identity, checkpoint_mark, identity
from mlm.runs.run import marks_of, open_run
from mlm.settings.checks import validate
from mlm.settings.flags import replaced
from mlm.store.models import load_base, save_base, save_lm
from mlm.store.released import check_empty, find_model
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import load_tensors, save_tensors
from mlm.text.vocabulary import load_vocabulary
from mlm.training.language_model import shape_of


@dataclass(frozen=True)
class Options:
    """Write a released model as a run folder."""

    model: Annotated[str, tyro.conf.Positional]
    """A released model's name or folder."""
    folder: Annotated[Path, tyro.conf.Positional]
    """The run folder; it must not exist, or be empty."""
    corpus: str
    """The text that the model was trained with: a folder of train and valid in WikiText form."""
    data_dir: Path = Path("data/cache")
    """Where the tokens of the text are kept."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the factors in the lanes' products, for all rules that are read in this folder."""
    threads: int = 0
    """CPU threads; 0 = PyTorch's choice."""


def unpack(options: Options) -> RunFolder:
    """Write the run folder, config.json last.

    Raises:
        UserError: the model is no released one, the text makes another vocabulary, or the folder is
            not empty.
    """
    source, target = RunFolder(find_model(options.model)), RunFolder(options.folder)
    if not source.released:
        raise UserError(f"{options.model} is a run folder already; name a released model")
    check_empty(target.path)
    changes = {
        "corpus": options.corpus,
        "out": target.path,
        "stages": ("meta",),
        "threads": options.threads,
        "text.data_dir": options.data_dir,
        "adapt.precision": options.precision,
    }
    config = validate(replaced(source.load_config(), changes))
    vocabulary = load_vocabulary(source.vocabulary)
    run = open_run(config)
    if run.data.vocabulary.hash != vocabulary.hash:
        raise UserError(
            f"{options.corpus} makes another vocabulary than {options.model} has, so it is not the "
            "text that the model was trained with. Name that text with --corpus"
        )
    vocabulary.save(target.vocabulary)
    base = load_base(source.checkpoint("memory"), vocabulary.hash)
    shape = shape_of(config, vocabulary.size)
    weights = {name: base.weights[name].contiguous() for name in shape.layout()}
    save_lm(target.checkpoint("lm"), weights, shape, vocabulary.hash)
    made_with = [extension.name for extension in config.extensions.of_base()]
    save_base(target.checkpoint("memory"), base, vocabulary.hash, base_identity(run), made_with)
    mark = {"identity": identity(run), "base": checkpoint_mark(target, "memory")}
    for rule in (name for name in LEARNED if source.checkpoint(name).exists()):
        tensors, about = load_tensors(source.checkpoint(rule), "")
        save_tensors(target.checkpoint(rule), tensors, {**about, **mark})
    target.save_config(config, marks_of(run.data))
    return target


def main() -> None:
    """Parse the command line, write the folder."""
    options = tyro.cli(Options, description=__doc__)
    say(f"{unpack(options).path}: a run folder of {options.model}")


if __name__ == "__main__":
    run_cli(main)
