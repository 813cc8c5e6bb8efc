"""Score a trained run: python evaluate.py runs/pydocs [--split test] [--corpus TEXT] [--help]"""

from mlm.cli.evaluate import main
from mlm.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
