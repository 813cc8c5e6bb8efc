"""Train a language model that learns while it reads: python train.py [--corpus ...] [--help]"""

from mlm.base.errors import run_cli
from mlm.cli.train import main

if __name__ == "__main__":
    run_cli(main)
