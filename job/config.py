"""The configuration: a typed schema, read from YAML, with dotted overrides from the command line.

The order of precedence is default, file, command line. Everything that can be wrong with it is found here, before any
rank starts work, and told in one :class:`~job.errors.UsageError` that lists all problems at once.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, get_args, get_origin  # noqa: UP035  (pydantic evaluates annotations, also on Python 3.9)

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from job.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_FILE = ROOT / "configs" / "fashion_mnist.yaml"
MOST_SECONDS = 1_000_000  # eleven days; the operating system's own calls take no more than twice that


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


class Section(BaseModel):
    """What all sections share: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _an_empty_section_is_all_defaults(cls, values: Any) -> Any:
        return {} if values is None else values

    @field_validator("*", mode="before")
    @classmethod
    def _as_the_user_meant_it(cls, value: Any, info: Any) -> Any:
        """Refuse what pydantic would turn from a boolean into a number or back; take any scalar for a path."""
        kind = cls.model_fields[info.field_name].annotation
        items = value if isinstance(value, list) else [value]
        if _is_text(kind):
            listed = get_origin(kind) is list and isinstance(value, list)
            value = [_as_typed(item) for item in value] if listed else _as_typed(value)
        if kind is not bool and any(isinstance(item, bool) for item in items):
            raise ValueError("input is a boolean (YAML reads yes, no, on and off as booleans)")
        if kind is bool and not isinstance(value, (bool, str)):
            raise ValueError("input should be true or false")
        if kind in (Path, Optional[Path]) and (kind is Path or value is not None):
            return _path(value)
        return value


class _Int(int):
    """A whole number of a YAML file, and how it was typed: a folder may be called 007."""

    text: str


class _Float(float):
    """Likewise."""

    text: str


def _as_typed(value: Any) -> Any:
    return value.text if isinstance(value, (_Int, _Float)) else value


def _is_text(annotation: Any) -> bool:
    """Whether a field holds text, a path, or a list of texts."""
    kinds = get_args(annotation) or (annotation,)
    return get_origin(annotation) is not dict and any(kind in (str, Path) or isinstance(kind, str) for kind in kinds)


def _plain(value: Any) -> Any:
    """``value`` of numbers that have forgotten how they were typed."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, _Int) else float(value) if isinstance(value, _Float) else value


def _path(value: Any) -> Any:
    """Of anything that may name one; a leading ``~`` is the home, which no shell puts in after ``run.dir=``."""
    text = str(value) if isinstance(value, (str, Path, int, float)) else ""
    if not text:
        raise ValueError("input should be a path")
    if "\0" in text:
        raise ValueError("a path cannot hold a zero byte")
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        raise ValueError(f"{text.split('/')[0]} is nobody's home; write ./{text} for a folder of that name")
    return expanded


def _steps(text: str) -> range:
    """The step numbers that a text such as ``100-110`` or ``7`` names."""
    found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    if not found:
        raise ValueError("input should be FIRST-LAST or one step, such as 100-110")
    first, last = int(found[1]), int(found[2] or found[1])
    if first < 1:
        raise ValueError("steps are counted from 1")
    if last < first:
        raise ValueError("the range ends before it begins")
    return range(first, last + 1)


class RunConfig(Section):
    dir: Path = Field(Path("runs/fashion_mnist"), description="folder that receives all that the run writes")
    overwrite: bool = Field(False, description="replace the run that run.dir already holds")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the first weights and of the order of samples")
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto: the local rank's GPU, or the CPU if none")
    deterministic: bool = Field(True, description="have GPUs repeat their bits (not tested)")
    resume: str = Field(
        "never", min_length=1, description="auto: continue the run in run.dir; PATH: from that checkpoint; never"
    )
    resume_ignoring: List[str] = Field([], description="keys in which a resumed run may differ")  # noqa: UP006
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="if loss or gradient is NaN or infinite: end, or skip the update"
    )
    step_timeout_seconds: float = Field(
        300.0, gt=0, le=MOST_SECONDS, description="longest wait for another rank, in seconds"
    )
    profile_steps: Optional[str] = Field(None, description="steps to profile: FIRST-LAST or one; the first is 1")

    @property
    def profiled(self) -> range:
        """The numbers of the steps to profile."""
        return range(0) if self.profile_steps is None else _steps(self.profile_steps)

    @field_validator("resume")
    @classmethod
    def _resume_path(cls, value: str) -> str:
        return str(_path(value))

    @field_validator("profile_steps")
    @classmethod
    def _names_steps(cls, value: Optional[str]) -> Optional[str]:
        if value is not None:
            _steps(value)
        return value

    @field_validator("resume_ignoring")
    @classmethod
    def _known_keys(cls, value: list[str]) -> list[str]:
        known = [name for name, _ in fields()]
        for key in value:
            if key not in known:
                raise ValueError(f"{key!r} is no key of the configuration")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.overwrite and self.resume != "never":
            raise ValueError("overwrite=true would remove the run that resume goes on with; keep one of them")
        return self


class CheckpointConfig(Section):
    every_steps: Optional[int] = Field(
        100, ge=1, description="steps between two checkpoints; null: only at the end of each epoch"
    )
    keep: int = Field(2, ge=1, description="newest checkpoints to keep; the best one is kept too")


class Sha256Config(Section):
    """SHA-256 of each decompressed IDX file, in hexadecimal; ``any`` accepts whatever ``data.dir`` holds."""

    train_images: str = Field(
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888", description="of train-images-idx3-ubyte"
    )
    train_labels: str = Field(
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9", description="of train-labels-idx1-ubyte"
    )
    test_images: str = Field(
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b", description="of t10k-images-idx3-ubyte"
    )
    test_labels: str = Field(
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34", description="of t10k-labels-idx1-ubyte"
    )

    @field_validator("*")
    @classmethod
    def _hexadecimal(cls, value: str) -> str:
        if value != "any" and not re.fullmatch(r"[0-9a-f]{64}", value):
            raise ValueError("input should be 64 hexadecimal digits in lower case, or the word any")
        return value


class AugmentConfig(Section):
    """What becomes of training images, anew in each epoch. Images to evaluate on stay as they are."""

    horizontal_flip: bool = Field(False, description="mirror every other image, chosen at random")
    crop_padding: int = Field(0, ge=0, description="move images at random, by up to so many pixels each way")
    erase_probability: float = Field(0.0, ge=0, le=1, description="of images with a random rectangle full of noise")
    erase_area: float = Field(0.33, gt=0, le=1, description="largest such rectangle, as a fraction of the image")
    colour_jitter: float = Field(
        0.0, ge=0, le=1, description="change of brightness, contrast and saturation, at most; 3 channels"
    )

    @property
    def changes(self) -> bool:
        """Whether anything is changed at all."""
        return bool(self.horizontal_flip or self.crop_padding or self.erase_probability or self.colour_jitter)


PICTURES = {"folder": "train/CLASS/ and test/CLASS/", "record": "train.rec, train.idx, test.rec and test.idx"}


def _format_of(folder: Any) -> str:
    """The format of what a folder holds; ``idx`` where that cannot be seen, whose errors then say what is missing."""
    try:
        held = os.listdir(_path(_as_typed(folder))) if folder is not None else []
    except (ValueError, OSError):
        return "idx"
    signs = {
        "idx": any(re.match(r"(train|t10k)-(images|labels)-idx", name) for name in held),
        "folder": "train" in held,
        "record": "train.rec" in held,
    }
    found = [name for name, there in signs.items() if there]
    if len(found) > 1:
        raise ValueError(
            f"dir={folder} holds data of several formats; say which with format={' or format='.join(found)}"
        )
    if held and not found:
        raise ValueError(
            f"dir={folder} holds no data: no train/ with pictures, no train.rec, no train-images-idx3-ubyte"
        )
    return found[0] if found else "idx"


class DataConfig(Section):
    format: Literal["auto", "idx", "folder", "record"] = Field(
        "auto", description="IDX, train/CLASS/ with pictures, or train.rec"
    )
    image_size: Optional[int] = Field(
        None, ge=1, le=4096, description="side of the square that pictures become; null: all are alike"
    )
    dir: Optional[Path] = Field(None, description="folder that holds the data; null: fetch Fashion-MNIST")
    mean: List[float] = Field(  # noqa: UP006
        [0.0], min_length=1, description="subtracted from pixels in [0, 1], for all channels or for each"
    )
    std: List[float] = Field(  # noqa: UP006
        [1.0], min_length=1, description="by which they are divided then"
    )
    compute_mean_std: bool = Field(False, description="take both from the training images instead; looked at once")
    on_damaged: Literal["stop", "skip"] = Field(
        "stop", description="at a damaged picture: end, or leave all such out from the start"
    )
    decode_threads: Optional[int] = Field(
        None, ge=1, le=1024, description="that decode pictures on each rank; null: its cores"
    )
    cache_dir: Path = Field(
        default_factory=lambda: _cache_home() / "horovod-gluon-job" / "fashion-mnist",
        description="folder for fetched data, shared by all runs",
    )
    global_batch: Optional[int] = Field(256, ge=1, description="samples in one step, over all ranks")
    shards: int = Field(8, ge=1, description="parts that a global batch is computed in; at least as many as ranks")
    batch_per_rank: Optional[int] = Field(None, ge=1, description="samples in one step on each rank, instead")
    test_batch_per_rank: int = Field(500, ge=1, description="most test samples in one forward pass")
    mirrors: List[str] = Field(  # noqa: UP006
        [
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        ],
        description="URLs that hold the four .gz files",
    )
    download_timeout_seconds: float = Field(
        30.0, gt=0, le=MOST_SECONDS, description="longest silence of a mirror, in seconds"
    )
    download_attempts: int = Field(3, ge=1, description="tries for each file and mirror")
    lock_timeout_seconds: float = Field(
        1800.0, gt=0, le=MOST_SECONDS, description="longest wait while another process fetches, in seconds"
    )
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="part of the training set to choose by; tests wait until the end"
    )
    validation_seed: int = Field(0, ge=0, lt=2**31, description="which samples of each class that part holds")
    sha256: Sha256Config = Field(default_factory=Sha256Config)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)

    @field_validator("mean", "std")
    @classmethod
    def _of_pixels_in_0_to_1(cls, value: list[float], info: Any) -> list[float]:
        lowest = 0.0 if info.field_name == "mean" else 1e-6
        if not all(lowest <= number <= 1 for number in value):
            raise ValueError(f"input should be from {lowest:g} to 1, as pixels are brought to [0, 1] before")
        return [float(number) for number in value]

    @field_validator("mirrors")
    @classmethod
    def _urls(cls, value: list[str]) -> list[str]:
        for url in value:
            if not re.match(r"https?://[^/]+", url):
                raise ValueError(f"{url!r} is not an http or https URL")
        return value

    @model_validator(mode="before")
    @classmethod
    def _one_batch_key(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("batch_per_rank") is not None:
            if values.get("global_batch") is not None:
                raise ValueError("global_batch and batch_per_rank are both given; keep one and set the other to null")
            return {**values, "global_batch": None}
        return values

    @model_validator(mode="before")
    @classmethod
    def _settled(cls, values: Any) -> Any:
        """What ``auto`` takes, so that it is known from here on; pictures have no digest that is known before."""
        if not isinstance(values, dict):
            return values
        if values.get("format", "auto") == "auto":
            values = {**values, "format": _format_of(values.get("dir"))}
        if values.get("sha256") == "any" or (values["format"] in PICTURES and not values.get("sha256")):
            values = {**values, "sha256": dict.fromkeys(Sha256Config.model_fields, "any")}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.is_pictures and self.dir is None:
            raise ValueError(f"format={self.format} needs data.dir, the folder that holds {PICTURES[self.format]}")
        if self.is_pictures and {*self.sha256.model_dump().values()} != {"any"}:
            raise ValueError(f"format={self.format} has no checksums; leave data.sha256 out")
        for_pictures = self.image_size is not None or self.on_damaged == "skip"
        if for_pictures and not self.is_pictures and self.dir is not None and not os.path.isdir(self.dir):
            raise ValueError(f"dir={self.dir}: no such folder")  # what it holds could not be seen
        if not self.is_pictures and self.image_size is not None:
            raise ValueError("image_size is for format=folder or record; IDX images are taken as they are")
        if not self.is_pictures and self.on_damaged == "skip":
            raise ValueError("on_damaged=skip is for format=folder or record; of IDX files the checksum is checked")
        if self.compute_mean_std and (self.mean != [0.0] or self.std != [1.0]):
            raise ValueError("compute_mean_std=true contradicts mean and std; keep one of them")
        if self.global_batch is None and self.batch_per_rank is None:
            raise ValueError("global_batch and batch_per_rank are both null; give one of them")
        if self.dir is None and "any" in self.sha256.model_dump().values():
            raise ValueError("sha256.* = any accepts unknown data, so data.dir must say where that data is")
        return self

    @property
    def is_pictures(self) -> bool:
        """Whether the images are files or records to be decoded."""
        return self.format in PICTURES

    def global_batch_of(self, ranks: int) -> int:
        """The samples in one step over ``ranks`` ranks, whichever of the two batch keys was given."""
        return self.global_batch if self.global_batch is not None else (self.batch_per_rank or 0) * ranks


class ModelConfig(Section):
    name: str = Field(
        "tutorial",
        description="tutorial[_without_batch_norm], compact, MXNet's zoo, or FILE.py:FUNCTION",
    )
    options: Dict[str, Any] = Field(  # noqa: UP006
        {}, description="arguments of a network of the zoo or of your own, by name"
    )
    weights: Optional[Path] = Field(None, description="file of trained weights to start from: .params or .safetensors")
    dtype: Literal["float32", "float64", "float16"] = Field(
        "float32", description="of activations; float16: mixed precision for GPUs"
    )
    sync_batch_norm: bool = Field(True, description="BatchNorm statistics over the global batch, not each shard's")
    sync_batch_norm_group: Optional[int] = Field(
        None, ge=1, description="BatchNorm statistics over so many shards; null: over all, the global batch"
    )
    unbiased_variance: bool = Field(False, description="running variance as cuDNN has it, n/(n-1) times the batch's")
    fuse_batch_norm: bool = Field(
        True, description="on a CPU, BatchNorm, ReLU and 2x2 max pooling as one operator: faster"
    )
    direct_convolution: bool = Field(
        True, description="on a CPU, our own convolution where channels are no multiple of 16: faster"
    )
    dense_batch_norm: bool = Field(False, description="BatchNorm on the dense layer too (the tutorial's exercise)")

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.dense_batch_norm and self.name != "tutorial":
            raise ValueError(f"dense_batch_norm=true contradicts name={self.name}; it is for name=tutorial")
        if self.is_tutorial and self.options:
            raise ValueError(f"options are for networks of the zoo or of your own; name={self.name} takes none")
        if self.sync_batch_norm_group is not None and not self.sync_batch_norm:
            raise ValueError("sync_batch_norm_group contradicts sync_batch_norm=false, which is groups of one shard")
        return self

    @field_validator("name")
    @classmethod
    def _names_a_network(cls, value: str) -> str:
        file, colon, function = value.rpartition(":")
        if colon and not (file.endswith(".py") and function.isidentifier()):
            raise ValueError("input should be FILE.py:FUNCTION, such as networks/mine.py:small, or a name")
        return str(_path(file)) + ":" + function if colon else value

    @field_validator("options")
    @classmethod
    def _plain_values(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {str(name): _plain(item) for name, item in value.items()}

    @property
    def weights_dtype(self) -> str:
        """Of weights, inputs and evaluations: mixed precision has its float16 within a step alone."""
        return "float32" if self.dtype == "float16" else self.dtype

    @property
    def shards_of_statistics(self) -> Optional[int]:
        """How many shards share the statistics of BatchNorm; None for all of them."""
        return self.sync_batch_norm_group if self.sync_batch_norm else 1

    @property
    def is_tutorial(self) -> bool:
        """Whether it is a network of this project, about which there is nothing to find out."""
        return self.name in ("tutorial", "tutorial_without_batch_norm")


class OptimizerConfig(Section):
    name: Literal["sgd", "adam"] = Field("sgd", description="update rule")
    learning_rate: float = Field(0.2, gt=0, description="peak learning rate")
    scale_learning_rate: Literal["none", "linear", "sqrt"] = Field(
        "none", description="with the number of ranks; only with data.batch_per_rank"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd's momentum")
    nesterov: bool = Field(False, description="sgd: Nesterov's momentum")
    beta1: float = Field(0.9, ge=0, lt=1, description="adam's decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="adam's decay of the second moment")
    epsilon: float = Field(1e-8, gt=0, description="adam's guard against division by zero")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty; never on BatchNorm or biases")

    @field_validator("*")
    @classmethod
    def _fits_float32(cls, value: Any) -> Any:
        """MXNet's operators take their numbers as float32, and refuse others in the middle of a run."""
        if isinstance(value, float) and value and not 1e-30 <= value <= 1e30:
            raise ValueError("input should be between 1e-30 and 1e30, as MXNet computes with float32")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerConfig:
        if self.name == "adam" and (self.momentum or self.nesterov):
            raise ValueError("momentum and nesterov belong to name=sgd; adam has beta1 and beta2")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=true needs momentum above 0")
        return self


class ScheduleConfig(Section):
    name: Literal["constant", "step", "cosine"] = Field("constant", description="shape of the learning rate")
    warmup_epochs: float = Field(0.0, ge=0, description="linear rise from 0 at the start, in epochs")
    step_epochs: List[float] = Field([], description="step: epochs at which the rate falls")  # noqa: UP006
    step_factor: float = Field(0.1, gt=0, le=1, description="step: factor of the rate each time")
    final_fraction: float = Field(0.0, ge=0, le=1, description="cosine: rate at the end, as a fraction of the peak")

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleConfig:
        if (self.name == "step") != bool(self.step_epochs):
            raise ValueError("step_epochs must be given with name=step, and only then")
        if sorted(set(self.step_epochs)) != self.step_epochs or any(epoch <= 0 for epoch in self.step_epochs):
            raise ValueError("step_epochs must be positive and rising")
        return self


class TrainConfig(Section):
    epochs: int = Field(5, ge=1, description="passes over the training set")
    max_steps: Optional[int] = Field(None, ge=1, description="stop after this many steps; null: after the epochs")
    log_every_steps: int = Field(10, ge=1, description="steps between two lines of train metrics")
    accumulate_steps: int = Field(1, ge=1, description="parts of a global batch, computed one after another")
    clip_gradient_norm: Optional[float] = Field(None, gt=0, description="largest L2 norm of the whole gradient")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="probability mass spread over all classes")
    fp16_allreduce: bool = Field(
        False, description="sum gradients in float16: a quarter of the bytes; bits depend on the ranks"
    )
    average_decay: Optional[float] = Field(
        None, gt=0, lt=1, description="of the moving average of the weights, such as 0.999; null: none is kept"
    )


class ElasticConfig(Section):
    """Of a job that loses and gains ranks: ``launch/local.sh --min-np``."""

    commit_every_steps: int = Field(10, ge=1, description="steps between two commits: checkpoints in memory")
    max_resets: int = Field(100, ge=0, description="most times that ranks are started again after a failure")
    cooldown_seconds: float = Field(
        10.0, ge=0, le=MOST_SECONDS, description="a place that failed twice is left out so long; then twice as long"
    )
    timeout_seconds: float = Field(
        600.0, ge=0, le=MOST_SECONDS, description="longest wait for enough ranks; then a checkpoint and exit 75"
    )


class Config(Section):
    """The whole configuration of a run."""

    run: RunConfig = Field(default_factory=RunConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    elastic: ElasticConfig = Field(default_factory=ElasticConfig)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.optimizer.scale_learning_rate != "none" and self.data.batch_per_rank is None:
            raise ValueError(
                "optimizer.scale_learning_rate is for data.batch_per_rank; with data.global_batch the number of ranks"
                " changes nothing, so there is nothing to scale"
            )
        if self.train.fp16_allreduce and self.model.dtype != "float16":
            raise ValueError(
                "train.fp16_allreduce=true needs model.dtype=float16, whose loss scale keeps small gradients from"
                " becoming 0 in float16"
            )
        if self.schedule.warmup_epochs >= self.train.epochs:
            raise ValueError("schedule.warmup_epochs must be less than train.epochs")
        if self.train.max_steps and self.run.profiled.stop > self.train.max_steps + 1:
            raise ValueError(
                f"run.profile_steps={self.run.profile_steps} goes beyond the last step, train.max_steps="
                f"{self.train.max_steps}"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved configuration, which :func:`load_config` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys in dotted form with their pydantic ``FieldInfo``, in the order of the schema."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def default_of(field: Any) -> Any:
    """The value of a key that nobody sets."""
    return field.get_default(call_default_factory=True)


def written(value: Any) -> str:
    """``value`` as the command line takes it; a list that is not empty is left out."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return "[...]" if isinstance(value, list) and value else str(value)


def choices_of(field: Any) -> Sequence[str]:
    """The words that a key takes, where there are only a few."""
    choices = getattr(field.annotation, "__args__", ())
    return choices if all(isinstance(choice, str) for choice in choices) else ()


def from_home(text: str) -> Path:
    """The path that an option names; a shell expands ``--config ~/x``, and leaves ``--config=~/x`` as it is."""
    return Path(os.path.expanduser(text))


def load_config(file: Optional[Path] = None, overrides: Sequence[str] = ()) -> Config:
    """Read ``file`` (default: the tutorial's recipe), apply ``key.path=value`` overrides, validate.

    Raises:
        UsageError: the file is missing or malformed, or any key or value is wrong. One message lists all problems.
    """
    file = DEFAULT_FILE if file is None else file
    values = _read_yaml(file)
    origins: dict[str, str] = {}
    for override in overrides:
        key, value = _parse_override(override)
        _assign(values, key, value)
        origins[key] = "command line"
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = [_explain(problem, origins, file) for problem in error.errors()]
        raise UsageError("bad configuration\n" + "\n".join(f"  {problem}" for problem in problems)) from None


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, of which plain YAML silently keeps the last.

    Numbers are decimal, and know how they were typed. YAML 1.1 reads 010 as eight, 12:30 as 750, and a date as no text.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  (of PyYAML)
        first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        self.flatten_mapping(node)
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key_node.value in seen:
                message = f"key {key_node.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: Any) -> Any:
        whole = node.tag.endswith(":int")
        number = _Int(node.value) if whole else _Float(self.construct_yaml_float(node))
        number.text = node.value
        return number

    def of_argument(self, text: str) -> Any:
        """What a plain word means, all of it: on a command line, what follows a # is no comment."""
        return self.construct_object(yaml.ScalarNode(self.resolve(yaml.ScalarNode, text, (True, False)), text))


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]{1,300}$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)
for _kind_of_number in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind_of_number}", _Loader.construct_decimal)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UsageError(f"{file}: no such config file; the project's own are in {ROOT / 'configs'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot read the config file: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{file}: a config file holds sections such as 'train:', this one holds a {_kind(values)}")
    return values


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UsageError(f"argument {text!r} is not of the form key.path=value, such as train.epochs=2")
    field = dict(fields()).get(key)
    is_text = field is not None and _is_text(field.annotation) and get_origin(field.annotation) is not list
    if is_text and value == "~":  # here not YAML's null
        return key, value
    try:
        if value.strip()[:1] in (("'", '"') if is_text else ("'", '"', "[", "{")):
            return key, yaml.load(value, Loader=_Loader)
        return key, _Loader("").of_argument(value if is_text else value.strip())
    except yaml.YAMLError:
        return key, value


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for index, name in enumerate(path):
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise UsageError(f"{key}: {'.'.join(path[: index + 1])} is a value, not a section")
    values[last] = value


def _explain(problem: Any, origins: dict[str, str], file: Path) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    related = (
        origin for name, origin in origins.items() if f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.")
    )
    where = next(related, str(file))
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key ({where}){_nearest(key)}"
    message = problem["msg"].replace("Value error, ", "")
    message = message[0].lower() + message[1:]
    if not key or isinstance(problem["input"], (dict, BaseModel)):
        return f"{key + ': ' if key else ''}{message}"
    return f"{key}: {message}; got {problem['input']!r} ({where})"


def _nearest(key: str) -> str:
    known = [name for name, _ in fields()]
    sections = list(Config.model_fields)
    same_leaf = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    close = same_leaf or difflib.get_close_matches(key, known + sections, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else "; --help lists all keys"


def _kind(value: object) -> str:
    return "list" if isinstance(value, list) else type(value).__name__


# --- docs/configuration.md -------------------------------------------------------------------------------------------

_PAGE = """# Configuration

<!-- Made from job/config.py by `make docs`. Do not edit: change the schema, then run it again. -->

Every key has a default. A YAML file changes some of them (`--config FILE`; without it, `configs/fashion_mnist.yaml`).
The command line changes some again: `optimizer.learning_rate=0.1`. The last one wins.

    python job/train.py --config configs/smoke.yaml train.epochs=2 run.dir=runs/two

All keys and values are checked before any rank starts. One message names everything that is wrong, and the exit code
is 2. `python job/train.py --check [arguments]` prints the configuration that a command means, and starts nothing.
"""
_TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}
_LISTS = {str: "list of texts", float: "list of numbers"}
_NAMED = "names and values, such as `{layers: 3}`"
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def page() -> str:
    """All keys as Markdown, a table for each section: key, default, what it takes, meaning."""
    text, section = _PAGE, ""
    for key, field in fields():
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            text += f"\n## {section}\n\n| key | default | takes | meaning |\n|---|---|---|---|\n"
        text += f"| `{key}` | {_default_cell(field)} | {_takes(field)} | {field.description} |\n"
    return text


def _default_cell(field: Any) -> str:
    value = default_of(field)
    if isinstance(value, Path) and _cache_home() in value.parents:
        value = Path("~/.cache") / value.relative_to(_cache_home())
    values = value if isinstance(value, list) and value else [written(value)]
    return "<br>".join(f"`{item}`" for item in values)


def _takes(field: Any) -> str:
    """Type and limits, in words: ``whole number, at least 1, or null``."""
    if choices_of(field):
        return ", ".join(f"`{choice}`" for choice in choices_of(field))
    if get_origin(field.annotation) is dict:
        return _NAMED
    kinds = getattr(field.annotation, "__args__", (field.annotation,))
    is_list = getattr(field.annotation, "__origin__", None) is list
    limits = [
        f"{word} {getattr(limit, name):,}"
        for limit in field.metadata
        for name, word in _LIMITS.items()
        if hasattr(limit, name)
    ]
    words = ", ".join([(_LISTS if is_list else _TYPES)[kinds[0]], *limits])
    return words + (", or `null`" if type(None) in kinds else "")


if __name__ == "__main__":
    print(page(), end="")
