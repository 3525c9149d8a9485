"""Configuration: what is right is read as written, and what is wrong is told with its key and what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from job.config import DEFAULT_FILE, ROOT, Config, fields, from_home, load_config
from job.errors import UsageError

CONTRACT_KEYS = """
    run.dir run.seed run.device train.epochs train.max_steps train.log_every_steps data.dir data.global_batch model.name
    model.sync_batch_norm model.dense_batch_norm optimizer.name optimizer.learning_rate
    checkpoint.every_steps run.resume
""".split()

# id: (text of the file, what the message must hold); the file itself is named "broken.yaml".
BAD_FILES = {
    # keys
    "unknown key": ("train: {epoch: 3}", ["train.epoch", "unknown key", "train.epochs", "broken.yaml"]),
    "unknown section": ("trainer: {epochs: 3}", ["trainer", "unknown key"]),
    "key without its section": ("epochs: 3", ["epochs", "unknown key", "did you mean train.epochs"]),
    "key in the wrong section": ("run: {epochs: 3}", ["run.epochs", "did you mean train.epochs"]),
    "nothing like it": ("run: {zzzzzzzzzzzzzzzz: 3}", ["run.zzzzzzzzzzzzzzzz", "unknown key", "--help"]),
    "number as a key": ("train: {7: 3}", ["train.7", "keys should be strings"]),
    # types
    "text for an integer": ("train: {epochs: many}", ["train.epochs", "integer", "'many'", "broken.yaml"]),
    "fraction for an integer": ("train: {epochs: 2.5}", ["train.epochs", "integer", "2.5"]),
    "text for a float": ("optimizer: {learning_rate: fast}", ["optimizer.learning_rate", "number", "'fast'"]),
    "null where none is allowed": ("train: {epochs: null}", ["train.epochs", "integer", "None"]),
    "list for an integer": ("train: {epochs: [1, 2]}", ["train.epochs", "integer", "[1, 2]"]),
    "mapping for an integer": ("train: {epochs: {at: 2}}", ["train.epochs", "integer"]),
    "yes for an integer": ("train: {epochs: yes}", ["train.epochs", "boolean", "True"]),
    "off for a float": ("train: {label_smoothing: off}", ["train.label_smoothing", "boolean", "False"]),
    "yes for an optional integer": ("train: {max_steps: yes}", ["train.max_steps", "boolean"]),
    "yes for an optional float": ("train: {clip_gradient_norm: yes}", ["train.clip_gradient_norm", "boolean"]),
    "yes for a path": ("run: {dir: yes}", ["run.dir", "boolean"]),
    "yes for a choice": ("run: {device: on}", ["run.device", "boolean"]),
    "number for a boolean": ("run: {overwrite: 1}", ["run.overwrite", "true or false", "got 1"]),
    "zero for a boolean": ("model: {sync_batch_norm: 0}", ["model.sync_batch_norm", "true or false", "got 0"]),
    "fraction for a boolean": ("model: {sync_batch_norm: 1.0}", ["model.sync_batch_norm", "true or false", "1.0"]),
    "text for a boolean": ("run: {overwrite: perhaps}", ["run.overwrite", "boolean", "'perhaps'"]),
    "unknown choice": ("model: {dtype: bfloat16}", ["model.dtype", "'float32'", "'bfloat16'"]),
    "choice of another case": ("run: {device: GPU}", ["run.device", "'gpu'", "'GPU'"]),
    # bounds
    "below >= 0": ("run: {seed: -1}", ["run.seed", "greater than or equal to 0", "-1"]),
    "below >= 1": ("train: {epochs: 0}", ["train.epochs", "greater than or equal to 1", "got 0"]),
    "at > 0": ("optimizer: {learning_rate: 0}", ["optimizer.learning_rate", "greater than 0", "got 0"]),
    "below > 0": ("train: {clip_gradient_norm: -2}", ["train.clip_gradient_norm", "greater than 0", "-2"]),
    "at < 1": ("optimizer: {momentum: 1}", ["optimizer.momentum", "less than 1", "got 1"]),
    "above <= 1": ("schedule: {final_fraction: 1.5}", ["schedule.final_fraction", "less than or equal to 1", "1.5"]),
    "at < 2**31": ("run: {seed: 2147483648}", ["run.seed", "less than 2147483648"]),
    "zero for an optional": ("train: {max_steps: 0}", ["train.max_steps", "greater than or equal to 1"]),
    "seconds beyond any clock": (
        "data: {download_timeout_seconds: 1e300}", ["data.download_timeout_seconds", "less than or equal to 1000000"],
    ),
    "wait beyond any clock": ("run: {step_timeout_seconds: 1e300}", ["run.step_timeout_seconds", "1000000"]),
    "lock beyond any clock": ("data: {lock_timeout_seconds: 1e300}", ["data.lock_timeout_seconds", "1000000"]),
    "more than float32": ("optimizer: {learning_rate: 1e308}", ["optimizer.learning_rate", "float32", "1e+308"]),
    "less than float32": ("optimizer: {learning_rate: 1e-320}", ["optimizer.learning_rate", "float32"]),
    "decay beyond float32": ("optimizer: {weight_decay: 1e308}", ["optimizer.weight_decay", "float32"]),
    "not a number": ("optimizer: {learning_rate: .nan}", ["optimizer.learning_rate", "finite", "nan"]),
    "infinite": ("run: {step_timeout_seconds: .inf}", ["run.step_timeout_seconds", "finite", "inf"]),
    "nan in a list": ("schedule: {name: step, step_epochs: [.nan]}", ["schedule.step_epochs.0", "finite", "nan"]),
    # contradictions
    "both batch keys": ("data: {global_batch: 8, batch_per_rank: 8}", ["global_batch", "batch_per_rank", "null"]),
    "no batch key": ("data: {global_batch: null}", ["global_batch", "batch_per_rank", "give one"]),
    "nesterov alone": ("optimizer: {nesterov: true}", ["optimizer", "nesterov", "momentum above 0"]),
    "adam with momentum": ("optimizer: {name: adam, momentum: 0.9}", ["optimizer", "momentum", "adam", "beta1"]),
    "adam with nesterov": (
        "optimizer: {name: adam, nesterov: true, momentum: 0.9}", ["optimizer", "nesterov", "adam", "beta1"],
    ),
    "dense BatchNorm without BatchNorm": (
        "model: {name: tutorial_without_batch_norm, dense_batch_norm: true}",
        ["model", "dense_batch_norm", "tutorial_without_batch_norm"],
    ),
    "step without epochs": ("schedule: {name: step}", ["schedule", "step_epochs", "name=step"]),
    "epochs without step": ("schedule: {step_epochs: [2]}", ["schedule", "step_epochs", "name=step"]),
    "step epochs that fall": ("schedule: {name: step, step_epochs: [3, 2]}", ["schedule", "step_epochs", "rising"]),
    "step epoch given twice": ("schedule: {name: step, step_epochs: [2, 2]}", ["schedule", "step_epochs", "rising"]),
    "step epoch zero": ("schedule: {name: step, step_epochs: [0, 2]}", ["schedule", "step_epochs", "positive"]),
    "warmup as long as the run": ("{train: {epochs: 2}, schedule: {warmup_epochs: 2}}", ["warmup_epochs", "epochs"]),
    "scaling with a global batch": (
        "optimizer: {scale_learning_rate: linear}", ["optimizer.scale_learning_rate", "data.batch_per_rank"],
    ),
    "sums in float16 without a loss scale": (
        "train: {fp16_allreduce: true}", ["train.fp16_allreduce=true", "needs model.dtype=float16"],
    ),
    "any data from anywhere": ("data: {sha256: {test_labels: any}}", ["sha256", "any", "data.dir"]),
    # texts with a form
    "short checksum": ("data: {sha256: {test_labels: abc}}", ["data.sha256.test_labels", "64 hexadecimal", "'abc'"]),
    "upper-case checksum": ("data: {sha256: {test_labels: " + "A" * 64 + "}}", ["data.sha256.test_labels", "lower"]),
    "URL of another scheme": ("data: {mirrors: ['ftp://x/']}", ["data.mirrors", "'ftp://x/'", "http"]),
    "URL without a host": ("data: {mirrors: ['https:///x']}", ["data.mirrors", "'https:///x'", "http"]),
    "one URL, not a list": ("data: {mirrors: 'https://x/'}", ["data.mirrors", "list"]),
    "steps in words": ("run: {profile_steps: some}", ["run.profile_steps", "FIRST-LAST", "'some'", "broken.yaml"]),
    "steps without their end": ("run: {profile_steps: 100-}", ["run.profile_steps", "FIRST-LAST", "'100-'"]),
    "steps without their beginning": ("run: {profile_steps: '-7'}", ["run.profile_steps", "FIRST-LAST", "'-7'"]),
    "fraction of a step": ("run: {profile_steps: 1.5}", ["run.profile_steps", "FIRST-LAST", "1.5"]),
    "three steps": ("run: {profile_steps: 1-2-3}", ["run.profile_steps", "FIRST-LAST", "'1-2-3'"]),
    "steps apart": ("run: {profile_steps: 1 - 2}", ["run.profile_steps", "FIRST-LAST", "'1 - 2'"]),
    "list of steps": ("run: {profile_steps: [1, 2]}", ["run.profile_steps", "string", "[1, 2]"]),
    "no steps": ("run: {profile_steps: ''}", ["run.profile_steps", "FIRST-LAST", "''"]),
    "yes for steps": ("run: {profile_steps: yes}", ["run.profile_steps", "boolean"]),
    "step zero": ("run: {profile_steps: 0-5}", ["run.profile_steps", "counted from 1", "'0-5'"]),
    "steps that go backward": ("run: {profile_steps: 9-5}", ["run.profile_steps", "ends before it begins", "'9-5'"]),
    "steps beyond the last": (
        "{run: {profile_steps: 35-41}, train: {max_steps: 40}}", ["run.profile_steps=35-41", "train.max_steps=40"],
    ),
    # YAML
    "unclosed bracket": ("run:\n  seed: 1\ntrain: {epochs: 1", ["broken.yaml", "not valid YAML", "line 3"]),
    "tab as indentation": ("train:\n\tepochs: 2", ["broken.yaml", "not valid YAML", "line 2"]),
    "key given twice": ("train:\n  epochs: 1\n  epochs: 2", ["broken.yaml", "'epochs'", "twice", "line 3"]),
    "section given twice": ("run: {seed: 1}\nrun: {seed: 2}", ["broken.yaml", "'run'", "twice", "line 2"]),
    "two documents": ("run: {seed: 1}\n---\nrun: {seed: 2}", ["broken.yaml", "not valid YAML", "line 2"]),
    "an object": ("run: !!python/object:os.system x", ["broken.yaml", "not valid YAML", "line 1"]),
    "a list instead of sections": ("- train\n- data", ["broken.yaml", "sections", "list"]),
    "a text instead of sections": ("train", ["broken.yaml", "sections"]),
    "a number instead of a section": ("train: 3", ["train", "dictionary", "got 3"]),
    "a list instead of a section": ("train: [1, 2]", ["train", "dictionary", "[1, 2]"]),
}  # fmt: skip

BAD_OVERRIDES = {
    "no value": (["train.epochs"], ["'train.epochs'", "key.path=value"]),
    "no key": (["=3"], ["'=3'", "key.path=value"]),
    "no path": (["train..epochs=3"], ["'train..epochs=3'", "key.path=value"]),
    "empty argument": ([""], ["''", "key.path=value"]),
    "empty value": (["train.epochs="], ["train.epochs", "integer", "command line"]),
    "an option": (["--epochs=3"], ["'--epochs=3'", "key.path=value"]),
    "into a scalar": (["run.seed.low=3"], ["run.seed.low", "run.seed is a value", "not a section"]),
    "over a section": (["train=3"], ["train", "dictionary", "got 3", "command line"]),
    "unknown key": (["train.epoch=3"], ["train.epoch", "train.epochs", "command line"]),
    "key without its section": (["learning_rate=3"], ["learning_rate", "did you mean optimizer.learning_rate"]),
    "wrong type": (["train.epochs=x"], ["train.epochs", "integer", "'x'", "command line"]),
    "boolean": (["train.epochs=yes"], ["train.epochs", "boolean", "command line"]),
    "out of range": (["run.seed=-1"], ["run.seed", "greater than or equal to 0", "command line"]),
    "half a list": (["run.seed=[1"], ["run.seed", "integer", "'[1'"]),
    "steps on the command line": (["run.profile_steps=9-5"], ["run.profile_steps", "'9-5'", "command line"]),
    "the last one counts": (["run.seed=1", "run.seed=x"], ["run.seed", "'x'"]),
    "batch per rank beside the default's global batch": (["data.batch_per_rank=8"], ["global_batch", "null"]),
}


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, overrides)


def complaint(file: Path | None, overrides: list[str]) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(file, overrides)
    return str(caught.value)


# A file and overrides together, and the words that the message must hold.
MIXED = {
    "list as a key": ("? [a, b]\n: 3", [], ["broken.yaml", "line 1"]),
    "yes in a list": (
        "schedule: {name: step, step_epochs: [yes]}", [], ["step_epochs", "boolean"],
    ),
    "number for a path": ("run: {dir: {a: b}}", [], ["run.dir", "path"]),
    "section on the command line": (
        "", ["train={epochs: 0}"], ["train.epochs", "command line"],
    ),
    "misspelt section": ("trian: {epochs: 3}", [], ["trian", "did you mean train"]),
    "merge key": (
        "base: &base {epochs: 3}\ntrain: {<<: *base}", [], ["base", "unknown key"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    list(MIXED.values()),
    ids=list(MIXED),
)
def test_what_is_wrong_in_unusual_ways_is_told_as_well(
    tmp_path: Path, text: str, overrides: list[str], words: list[str]
) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text, encoding="utf-8")
    message = complaint(file, overrides)
    assert [word for word in words if word not in message] == [], message
    assert "<class" not in message


@pytest.mark.parametrize("name", ["1", "0.25", "2026-11-23"])
def test_a_folder_may_be_called_by_a_number_or_a_date(tmp_path: Path, name: str) -> None:
    assert load(tmp_path, "", f"run.dir={name}").run.dir == Path(name)


TYPED = ["007", "1.10", "12:30", "exp #2", "2026-11-23", "1_000", "0x10", "1e3", "08", "a: b", "[a]", "{a}", ".5", "-1"]


@pytest.mark.parametrize("name", TYPED)
@pytest.mark.parametrize("key", ["run.dir", "data.dir", "data.cache_dir", "run.resume"])
def test_text_on_the_command_line_stays_as_it_was_typed_and_is_kept_so(tmp_path: Path, key: str, name: str) -> None:
    section, field = key.split(".")
    config = load(tmp_path, "", f"{key}={name}")
    assert str(getattr(getattr(config, section), field)) == name
    assert load(tmp_path, config.to_yaml()) == config


@pytest.mark.parametrize("name", ["007", "1.10", "12:30", "2026-11-23", "1_000", "0x10", "1e3", "08", ".5"])
def test_text_in_a_file_stays_as_it_was_typed(tmp_path: Path, name: str) -> None:
    assert str(load(tmp_path, f"run: {{dir: {name}}}").run.dir) == name


@pytest.mark.parametrize(("text", "number"), [("010", 10), ("08", 8), ("+7", 7), ("1e1", 10), ("10.0", 10)])
def test_a_whole_number_is_decimal(tmp_path: Path, text: str, number: int) -> None:
    assert load(tmp_path, "", f"train.epochs={text}").train.epochs == number
    assert load(tmp_path, f"train: {{epochs: {text}}}").train.epochs == number


@pytest.mark.parametrize(("text", "number"), [("010", 10), ("010.5", 10.5), ("1e-2", 0.01), (".5", 0.5), ("5.", 5)])
def test_a_number_is_decimal(tmp_path: Path, text: str, number: float) -> None:
    assert load(tmp_path, "", f"optimizer.learning_rate={text}").optimizer.learning_rate == number
    assert load(tmp_path, f"optimizer: {{learning_rate: {text}}}").optimizer.learning_rate == number


@pytest.mark.parametrize("text", ["1:30", "0x10", "0b1", "0o10", "2026-11-23", "10 # ten", "9" * 5000])
def test_what_is_no_decimal_number_is_no_number(tmp_path: Path, text: str) -> None:
    assert "train.epochs" in complaint(None, [f"train.epochs={text}"])


def test_the_home_is_put_in_wherever_a_path_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in ("run.dir", "data.dir", "data.cache_dir", "run.resume"):
        section, field = key.split(".")
        for config in (load(tmp_path, "", f"{key}=~/x"), load(tmp_path, f"{section}: {{{field}: ~/x}}")):
            assert str(getattr(getattr(config, section), field)) == f"{tmp_path}/x"
    assert load(tmp_path, "", "run.dir=~").run.dir == tmp_path
    assert from_home("~/x") == tmp_path / "x"


def test_the_home_of_nobody_is_refused(tmp_path: Path) -> None:
    message = complaint(None, ["run.dir=~nobody-of-that-name/x"])
    assert "~nobody-of-that-name is nobody's home; write ./~nobody-of-that-name/x" in message


def test_a_path_with_a_zero_byte_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text('run: {dir: "a\\0b"}')
    assert "run.dir: a path cannot hold a zero byte" in complaint(file, [])


def test_a_section_whose_keys_are_all_comments_means_its_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "train:\n  # epochs: 3\n") == Config()


@pytest.mark.parametrize(("text", "words"), list(BAD_FILES.values()), ids=list(BAD_FILES))
def test_a_bad_file_is_refused_with_its_key_and_the_reason(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text, encoding="utf-8")
    message = complaint(file, [])
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(("overrides", "words"), list(BAD_OVERRIDES.values()), ids=list(BAD_OVERRIDES))
def test_a_bad_override_is_refused_with_its_key_and_the_reason(overrides: list[str], words: list[str]) -> None:
    message = complaint(None, overrides)
    assert [word for word in words if word not in message] == [], message


def test_a_missing_file_is_named_with_where_good_ones_are(tmp_path: Path) -> None:
    message = complaint(tmp_path / "absent.yaml", [])
    assert "absent.yaml" in message
    assert str(ROOT / "configs") in message


def test_a_folder_is_no_config_file(tmp_path: Path) -> None:
    message = complaint(tmp_path, [])
    assert str(tmp_path) in message
    assert "directory" in message


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes("run: {dir: Läufe}".encode("latin-1"))
    message = complaint(file, [])
    assert "latin.yaml" in message
    assert "utf-8" in message


def test_all_problems_are_told_in_one_message(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("train: {epochs: 0, epoch: 1}\nmodel: {name: net.txt:f}\noptimizer: {nesterov: true}")
    message = complaint(file, ["run.seed=-1"])
    for key in ("train.epochs", "train.epoch:", "model.name", "nesterov", "run.seed"):
        assert key in message
    assert len(message.splitlines()) == 1 + 5


def test_no_message_speaks_of_pydantic_or_python_types(tmp_path: Path) -> None:
    for text, _ in BAD_FILES.values():
        file = tmp_path / "broken.yaml"
        file.write_text(text)
        assert not re.search(r"pydantic|<class|errors\.", complaint(file, [])), text


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, "")
    assert config == Config()
    assert (config.train.epochs, config.data.global_batch, config.optimizer.learning_rate) == (5, 256, 0.2)


def test_a_file_of_comments_means_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "# train:\n") == Config()


def test_the_command_line_overrides_the_file_and_the_file_the_default(tmp_path: Path) -> None:
    config = load(tmp_path, "train: {epochs: 7, log_every_steps: 3}", "train.epochs=9", "run.seed=4")
    assert (config.train.epochs, config.train.log_every_steps, config.run.seed) == (9, 3, 4)
    assert config.train.accumulate_steps == 1


def test_the_last_of_two_overrides_counts(tmp_path: Path) -> None:
    assert load(tmp_path, "", "run.seed=1", "run.seed=2").run.seed == 2


def test_no_file_means_the_tutorial_recipe() -> None:
    assert load_config() == load_config(DEFAULT_FILE)
    assert DEFAULT_FILE.name == "fashion_mnist.yaml"


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "1.0e-3"])
def test_a_float_may_be_written_without_a_point(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"optimizer: {{learning_rate: {text}}}").optimizer.learning_rate == 0.001
    assert load(tmp_path, "", f"optimizer.learning_rate={text}").optimizer.learning_rate == 0.001


def test_a_value_may_hold_an_equals_sign(tmp_path: Path) -> None:
    assert load(tmp_path, "", "run.dir=runs/lr=0.1").run.dir == Path("runs/lr=0.1")


def test_a_list_may_be_given_on_the_command_line(tmp_path: Path) -> None:
    config = load(tmp_path, "", "schedule.name=step", "schedule.step_epochs=[1, 2.5]")
    assert config.schedule.step_epochs == [1, 2.5]


def test_a_batch_per_rank_makes_the_global_batch_grow_with_the_ranks(tmp_path: Path) -> None:
    config = load(tmp_path, "data: {batch_per_rank: 64, global_batch: null}")
    assert config.data.global_batch is None
    assert [config.data.global_batch_of(ranks) for ranks in (1, 2, 3)] == [64, 128, 192]


def test_a_batch_per_rank_alone_replaces_the_default_global_batch(tmp_path: Path) -> None:
    assert load(tmp_path, "data: {batch_per_rank: 64}").data.global_batch is None


def test_a_global_batch_is_the_same_for_all_ranks(tmp_path: Path) -> None:
    config = load(tmp_path, "data: {global_batch: 100}")
    assert [config.data.global_batch_of(ranks) for ranks in (1, 2, 3)] == [100, 100, 100]


def test_the_learning_rate_may_be_scaled_with_a_batch_per_rank(tmp_path: Path) -> None:
    config = load(tmp_path, "{data: {batch_per_rank: 64}, optimizer: {scale_learning_rate: linear}}")
    assert config.optimizer.scale_learning_rate == "linear"


@pytest.mark.parametrize(
    ("text", "steps"), [("null", []), ("7", [7]), ("7-7", [7]), ("9-11", [9, 10, 11]), ("39-40", [39, 40])]
)
def test_steps_to_profile_are_named_one_by_one(tmp_path: Path, text: str, steps: list[int]) -> None:
    assert list(load(tmp_path, "train: {max_steps: 40}", f"run.profile_steps={text}").run.profiled) == steps


def test_any_data_is_accepted_from_a_named_folder(tmp_path: Path) -> None:
    config = load(tmp_path, "data: {dir: here, sha256: {test_labels: any}}")
    assert (config.data.dir, config.data.sha256.test_labels) == (Path("here"), "any")


def test_the_cache_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tmp_path in Config().data.cache_dir.parents


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{train: {epochs: 9, max_steps: 7}, run: {dir: 'a: b', overwrite: true}}",
        "data: {batch_per_rank: 64}",
        "{optimizer: {learning_rate: 1e-5, epsilon: 1e-12}, schedule: {name: step, step_epochs: [1, 2.5]}}",
        "data: {dir: here, mirrors: [], sha256: {test_labels: any}}",
    ],
)
def test_the_resolved_yaml_reads_back_to_an_equal_config(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, text)
    assert load(tmp_path, config.to_yaml()) == config
    assert isinstance(yaml.safe_load(config.to_yaml()), dict)  # no tags of Python's


def test_a_config_does_not_change_after_it_was_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().train.epochs = 3


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_config_of_the_project_is_valid(file: Path) -> None:
    load_config(file)


def test_the_recipe_is_that_of_the_tutorial() -> None:
    config = load_config()
    assert (config.train.epochs, config.data.global_batch, config.run.seed) == (5, 256, 0)
    assert (config.optimizer.name, config.optimizer.learning_rate, config.optimizer.momentum) == ("sgd", 0.2, 0)
    assert (config.model.name, config.model.sync_batch_norm, config.model.dense_batch_norm) == ("tutorial", True, False)


def test_the_smoke_config_logs_every_step() -> None:
    assert load_config(ROOT / "configs" / "smoke.yaml").train.log_every_steps == 1


@pytest.mark.parametrize("key", CONTRACT_KEYS)
def test_a_key_that_scripts_rely_on_exists(key: str) -> None:
    assert key in dict(fields())


def test_every_key_has_a_default_and_a_description() -> None:
    for key, field in fields():
        assert field.description, key
        assert not field.is_required(), key
