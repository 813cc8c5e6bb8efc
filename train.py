"""Train a language model that learns while it reads: python train.py [--corpus ...] [--help]"""

from mlm.cli.train import main
from mlm.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
