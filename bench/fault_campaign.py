"""Hundreds of kill -9 at random and at every line of a registry's operations (a row in results/faults.jsonl).

python bench/fault_campaign.py [--rounds 150] [--every 1] [--seed 0]

What is done and what must hold is in tests/store/campaign.py; `make test` runs a short one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from workers import append, identity

HERE = Path(__file__).resolve().parent
CAMPAIGN = HERE.parent / "tests" / "store" / "campaign.py"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=150, help="of three processes that are killed")
    p.add_argument("--every", type=int, default=1, help="kill each operation at each such line (0: not at all)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=HERE / "results" / "faults.jsonl")
    args = p.parse_args()
    settings = {"rounds": args.rounds, "every": args.every, "seed": args.seed}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    done = subprocess.run([sys.executable, CAMPAIGN, *words], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    append(args.out, {**identity("faults"), "settings": settings, **found})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
