"""Draw a run's pictures from its folder: python visualize.py runs/pydocs"""

from mlm.base.errors import run_cli
from mlm.cli.show import main

if __name__ == "__main__":
    run_cli(main)
