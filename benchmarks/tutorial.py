"""Reproduce the tutorial's result: ``python -m benchmarks.tutorial``, about 15 minutes on two cores.

The default configuration with three seeds on one rank, the first of them on 2, 3 and 4 ranks too, which must end with
the same weights.
Prints the table of docs/results.md.
"""

from __future__ import annotations

from benchmarks.runs import run

RANKS = {0: (1, 2, 3, 4), 1: (1,), 2: (1,)}  # by seed
COLUMNS = {"train_loss": "train loss", "train_accuracy": "train accuracy", "accuracy": "test accuracy"}


def main() -> None:
    """Run what is missing, print the table."""
    rows = [_row(seed, ranks) for seed, of_seed in RANKS.items() for ranks in of_seed]
    print(f"\n| seed | ranks | {' | '.join(COLUMNS.values())} | weights |\n{'|---' * (len(COLUMNS) + 3)}|")
    print("\n".join(rows))


def _row(seed: int, ranks: int) -> str:
    done = run(f"tutorial-{ranks}-ranks-seed-{seed}", ranks, [f"run.seed={seed}"])
    values = [f"{done.records[-1][key]:.4f}" for key in COLUMNS]
    return " | ".join(["", str(seed), str(ranks), *values, f"`{done.summary['weights_sha256'][:12]}`", ""]).strip()


if __name__ == "__main__":
    main()
