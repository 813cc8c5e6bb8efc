"""Score a trained run: python evaluate.py runs/pydocs [--split test] [--corpus TEXT] [--help]"""

from mlm.base.errors import run_cli
from mlm.cli.evaluate import main

if __name__ == "__main__":
    run_cli(main)
