"""Write the golden numbers anew: `python -m tests.golden.make --overwrite`.

Only when numbers are meant to move; say in the commit which, and why.
"""

from __future__ import annotations

import argparse

from .stored import FILE, differences, entries, load, write
from .world import CASES, LIKELY, compute, log_odds_at_line_ends


def main() -> None:
    """Compute every case twice, and write what it gives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--overwrite", action="store_true", help="replace the file that is there")
    if FILE.exists() and not parser.parse_args().overwrite:
        parser.error(f"{FILE} is there; --overwrite replaces it")
    odds = log_odds_at_line_ends()
    assert bool((odds > LIKELY).any()), "no border is believed in"
    assert bool((odds < LIKELY).any()), "every line end is a border"
    before = load()["cases"] if FILE.exists() else {}
    found = {}
    for name in CASES:
        found[name] = entries(compute(name))
        again = differences(entries(compute(name)), found[name], bits=True)
        assert not again, f"{name} is not the same twice: {'; '.join(again)}"
        for line in differences(found[name], before.get(name, {}), bits=True) if before else ():
            print(f"{name}, {line}")
    write(found)
    print(f"{FILE}: {sum(map(len, found.values()))} tensors, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
