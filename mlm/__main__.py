"""`python -m mlm` is the command `mlm`."""

from mlm.cli import main

if __name__ == "__main__":
    main()
