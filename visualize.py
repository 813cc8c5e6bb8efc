"""Draw a run's pictures from its folder: python visualize.py runs/pydocs"""

from mlm.cli.show import main
from mlm.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
