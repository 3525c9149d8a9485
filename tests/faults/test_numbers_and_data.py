"""Numbers that are none, and data that is damaged: rows 15 and 16."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.faults.conftest import Run


@pytest.mark.fault(15)
@pytest.mark.parametrize("fault", ["nan", "inf"])
def test_numbers_gone_bad_end_the_run_with_the_step_and_the_last_good_checkpoint(run: Run, fault: str) -> None:
    ended = run.train(2, "train.log_every_steps=100", fault=f"{fault}:step:1:7")
    assert ended.code == 1
    assert re.search("error: rank 0: step 8: .* not finite", ended.output)
    assert run.checkpoints()[-1] == "step-00000006"
    again = run.train(2, "run.resume=auto", "train.log_every_steps=100")
    assert again.code == 0, again.output


@pytest.mark.fault(15)
def test_a_checkpoint_is_never_made_of_numbers_gone_bad(run: Run) -> None:
    ended = run.train(2, "train.log_every_steps=100", fault="nan:step:1:9")
    assert re.search("error: rank 0: step 10: .* not finite", ended.output)
    assert run.checkpoints()[-1] == "step-00000006"


@pytest.mark.fault(15)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_bad_update_is_skipped_on_all_ranks_and_counted(run: Run, rank: int) -> None:
    ended = run.train(2, "run.on_nonfinite=skip", fault=f"nan:step:{rank}:7")
    assert ended.code == 0, ended.output
    assert json.loads((run.folder / "summary.json").read_text())["skipped_updates"] == 1
    assert [record["step"] for record in run.records() if record["loss"] is None] == [8]
    assert all(record["loss"] is not None for record in run.records() if record["step"] != 8)


DAMAGE = {
    "truncated": (lambda content: content[:-5], "truncated"),
    "wrong magic": (lambda content: b"\1\2\3\4" + content[4:], "wrong magic number"),
    "label out of range": (lambda content: content[:-1] + b"\x0a", "names 10 classes, and the labels go to 10"),
    "longer": (lambda content: content + b"\0", "more bytes after the header"),
}


@pytest.mark.fault(16)
@pytest.mark.parametrize(("damage", "said"), list(DAMAGE.values()), ids=list(DAMAGE))
def test_damaged_data_ends_the_run_with_the_file_and_the_reason(run: Run, damage: object, said: str) -> None:
    file = Path(run.data[0].partition("=")[2]) / "train-labels-idx1-ubyte"
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    (file.parent / "classes.txt").write_text("".join(f"{number}\n" for number in range(10)))
    ended = run.train(2)
    assert ended.code == 1
    assert str(file) in ended.output or str(file.parent / "classes.txt") in ended.output
    assert said in ended.output
    assert not (run.folder / "checkpoints").exists()


@pytest.mark.fault(16)
def test_data_of_another_checksum_ends_the_run(run: Run) -> None:
    ended = run.train(1, f"data.sha256.train_labels={'a' * 64}")
    assert ended.code == 2  # seen before a rank starts
    assert "wrong checksum" in ended.output
