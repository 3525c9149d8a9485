"""A run that loses and gains ranks, beside one that nobody disturbs: ``python -m benchmarks.elastic_curve``, 2 minutes.

Four ranks train, and are killed at some steps: one, and once more at the same place, which is then left out for a while
and taken in again; two at once, of which one is rank 0; and rank 0 again. Prints what happened and the hashes of the
weights of both runs, and draws docs/images/elastic.png: the training loss of both, and how many ranks took which steps.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.recovery import rank_of
from benchmarks.runs import IMAGES, LOCAL, Run, read

RANKS = 4
SETTINGS = ["train.epochs=3", "train.log_every_steps=5", "elastic.commit_every_steps=5", "elastic.cooldown_seconds=6"]
DEATHS = ((80, (2,)), (160, (2,)), (400, (0, 1)), (500, (0,)))  # after which step which ranks


def main() -> None:
    """Train twice, print, and draw."""
    with tempfile.TemporaryDirectory() as scratch:
        alone, killed = Path(scratch, "alone"), Path(scratch, "killed")
        subprocess.run([LOCAL, "-np", "1", *SETTINGS, f"run.dir={alone}"], check=True, stdout=subprocess.DEVNULL)
        _kill(killed)
        runs = [read(alone), read(killed)]
        changes = [json.loads(line) for line in (killed / "changes.jsonl").read_text().splitlines()]
    print("| after step | ranks | why | steps computed again | seconds lost |\n|---|---|---|---|---|")
    for change in changes:
        ranks = f"{change['ranks_before']} to {change['ranks']}"
        print(
            f"| {change['step']} | {ranks} | {change['why']} | {change['replayed_steps']} | {change['lost_seconds']} |"
        )
    hashes = [run.summary["weights_sha256"][:12] for run in runs]
    print(f"\nweights of the run that nobody disturbed: {hashes[0]}; of the other one: {hashes[1]}")
    _draw(runs, hashes, changes)


def _kill(folder: Path) -> None:
    """The run whose ranks die."""
    command = [LOCAL, "-np", str(RANKS), "--min-np", "1", *SETTINGS, f"run.dir={folder}"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    for after, ranks in DEATHS:
        while _steps(folder / "metrics.jsonl") < after:
            if job.poll() is not None:
                raise SystemExit(f"the job has ended with {job.returncode}")
            time.sleep(0.05)
        for victim in [rank_of(job, rank) for rank in ranks]:
            victim.kill()
    if job.wait():
        raise SystemExit(f"the job has ended with {job.returncode}")


def _steps(file: Path) -> int:
    lines = file.read_text().splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _draw(runs: list[Run], hashes: list[str], changes: list[dict[str, Any]]) -> None:
    figure, (loss, ranks) = plt.subplots(
        2, 1, figsize=(10, 5.5), sharex=True, height_ratios=(3, 1), constrained_layout=True
    )
    for run, digest, name, width in zip(runs, hashes, ("one rank, undisturbed", "four ranks, killed"), (5.0, 1.2)):
        label = f"{name}: weights {digest}"
        loss.plot(run.series("train", "step"), run.series("train", "loss"), lw=width, label=label)
    ranks.step(runs[1].series("train", "step"), runs[1].series("train", "ranks"), where="pre", color="tab:orange")
    for change in changes:
        for axis in (loss, ranks):
            axis.axvline(change["step"], color="gray", lw=0.6, ls=":")
    loss.set(ylabel="training loss", yscale="log")
    loss.legend(prop={"family": "monospace", "size": 9})
    ranks.set(xlabel="step", ylabel="ranks", ylim=(0, RANKS + 0.5), yticks=range(RANKS + 1))
    figure.savefig(IMAGES / "elastic.png", dpi=110)


if __name__ == "__main__":
    main()
