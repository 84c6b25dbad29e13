"""`deltaw train`, one optimizer step at a time, as a worker that a bench drives (workers.py).

The run of a recipe; between steps it waits for its turn. A step's seconds hold all that the run does from one turn to
the next, checkpoints too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import deltaw
from workers import serve


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("recipe", type=Path)
    p.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    events = deltaw.train(args.recipe, args.out, overrides=args.settings)
    start = next(event for event in events if event.kind == "start").plain()

    def step() -> dict[str, Any]:
        found = next((event.plain() for event in events if event.kind == "step"), None)
        if found is None:
            raise SystemExit(f"the run is over after its {start['n_steps']} steps")
        return {"tokens": found["tokens"], "padding": 0, "loss": found["loss"]}

    serve(step, tokens_per_epoch=start["tokens_per_epoch"], steps=start["n_steps"])


if __name__ == "__main__":
    main()
