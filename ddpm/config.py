"""RunConfig: everything that decides what a run computes, as frozen pydantic models.

Order of precedence: the defaults here < a preset (`ddpm.presets`) < `--config FILE` < flags. A flag is a field,
`--group.field`; the short forms stand in `SHORT_FLAGS`. Components (schedules, samplers, ...) are held in their
written form (see `ddpm.registry`); `ddpm.runs` builds them all before any work starts.
"""

import difflib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from ddpm.errors import ConfigError


def _parse_size(value: Any) -> Any:
    """'32' -> (32, 32); '28x36' -> (28, 36), height first."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value)
    if isinstance(value, str):
        if match := re.fullmatch(r"(\d+)(?:x(\d+))?", value.strip()):
            return (int(match[1]), int(match[2] or match[1]))
        raise ValueError("write a size as 32, or as 28x36 (height x width)")
    return value


def _parse_list(value: Any) -> Any:
    """'1,2,2' -> ('1', '2', '2'); one value -> a tuple of one; '' and 'none' -> ()."""
    if isinstance(value, str):
        return () if value.strip() in ("", "none") else tuple(part.strip() for part in value.split(",") if part.strip())
    return (value,) if isinstance(value, int | float) else value


def _parse_pair(value: Any) -> Any:
    """'0.9,0.999' -> two values."""
    value = _parse_list(value)
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError("write two numbers, such as 0.9,0.999")
    return value


def _parse_specs(value: Any) -> Any:
    """One spec, or several separated by spaces (a spec may hold commas)."""
    if isinstance(value, str):
        return () if value.strip() in ("", "none") else tuple(value.split())
    return (str(value),) if isinstance(value, float) else value


def _parse_guidance(value: Any) -> float | str:
    """A weight, also as text, is a number; anything else a spec."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        if isinstance(value, str) and value.strip():
            return value.strip()
        raise ValueError("write a number, or a spec such as cfg:weight=2,rescale=0.7") from None
    if isinstance(value, bool) or not 0 <= number < math.inf:
        raise ValueError("it must be a finite number of at least 0, or a spec such as cfg:weight=2,rescale=0.7")
    return number


Size = Annotated[
    tuple[Annotated[int, Field(ge=1, le=4096)], Annotated[int, Field(ge=1, le=4096)]], BeforeValidator(_parse_size)
]
Integers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_parse_list)]
Mults = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), BeforeValidator(_parse_list)]
Names = Annotated[tuple[str, ...], BeforeValidator(_parse_list)]
Specs = Annotated[tuple[str, ...], BeforeValidator(_parse_specs)]
Guidance = Annotated[float | str, PlainValidator(_parse_guidance)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1, lt=2**53)]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class Config(BaseModel):
    """Base of every config: frozen, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class DataConfig(Config):
    """Which images, and what is done to them on the way in."""

    dataset: str = Field(
        "digits", description="digits, fashion-mnist, mnist, cifar10, folder, npz, shapes, or package.module:Class"
    )
    path: Path | None = Field(
        None, description="folder or file that the data set reads (folder and npz need one; others look there first)"
    )
    split: Literal["train", "test", "all"] = Field(
        "train",
        description="part of the data set that is used; a folder is all train unless it holds train/ and test/",
    )
    size: Size | None = Field(
        None, description="height and width: 32, or 28x36; default: the images' own (see docs/data.md)"
    )
    channels: Literal[1, 3] | None = Field(
        None, description="1 grey, 3 RGB; default: grey if every image is grey, else RGB"
    )
    resize: Literal["crop", "fit", "stretch"] = Field(
        "crop",
        description="images of another size: cover the target and crop the centre, fit inside it on white, or stretch",
    )
    labels: Path | None = Field(
        None, description="label file for a folder: CSV lines 'path,label', or JSON {path: label}"
    )
    flip: bool = Field(False, description="mirror each image left to right with probability 1/2")
    augment: str = Field(
        "none",
        description="augmentation that the network is told of, so that samples do not show it: edm:probability=0.12, or none",
    )
    workers: Count = Field(0, description="threads that gather batches ahead; changes speed only, never the batches")


class ModelConfig(Config):
    """The network. Most fields are those of `unet`, the DDPM family; what a network lacks is refused."""

    network: str = Field("unet", description="network: unet, song-unet, or package.module:Class")
    channels: Positive = Field(128, description="channels of the first level")
    channel_mults: Mults = Field(
        (1, 2, 2, 2), description="channels per level, as multiples: 1,2,2,2; each level halves the image"
    )
    blocks: Positive = Field(2, description="residual blocks per level (one more on the way up)")
    attention: Integers = Field((1,), description="levels with self-attention, 0 is full size; 'none' for no level")
    heads: Positive = Field(1, description="attention heads")
    head_channels: Positive | None = Field(None, description="channels per attention head; overrides --model.heads")
    dropout: Probability = Field(0.1, description="dropout in the residual blocks")
    conditioning: Literal["auto", "none", "global", "block"] = Field(
        "none",
        description="classes: none; global: added to the time embedding; block: a bias per residual block; auto: global where there are classes",
    )
    time_dim: Positive | None = Field(None, description="width of the time embedding; default: 4 x channels")
    time_embedding: Literal["sin-cos", "cos-sin", "interleaved"] = Field(
        "sin-cos", description="layout of the sinusoids"
    )
    time_exponent: Literal["half", "half-1"] = Field(
        "half", description="frequencies 10000^(-i/half) or 10000^(-i/(half-1))"
    )
    activation: Literal["silu", "relu", "mish", "gelu"] = Field("silu", description="activation function")
    norm: Literal["group", "instance", "batch", "none"] = Field("group", description="normalisation layer")
    norm_groups: Positive = Field(
        32, description="groups of group normalisation (fewer where the channels do not divide)"
    )
    norm_groups_exact: bool = Field(
        False,
        description="keep norm_groups even on levels of no more channels, whose second norm then loses the embeddings (imported networks)",
    )
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the normalisation")
    scale_shift: bool = Field(
        False, description="the time embedding scales and shifts the second norm instead of being added before it"
    )
    resample: Literal["conv", "pool", "block"] = Field(
        "conv",
        description="down and up: strided convolution / nearest + convolution; average pool / nearest; a residual block that resamples",
    )
    down_padding: Literal["symmetric", "asymmetric"] = Field(
        "symmetric", description="padding of the strided convolution; asymmetric: bottom and right"
    )
    initialisation: Literal["ddpm", "xavier", "torch", "zero"] = Field(
        "ddpm",
        description="ddpm: fan-avg uniform, last layers of each block near zero (Ho et al.); xavier: everywhere; torch: PyTorch's defaults; zero: the same with the last layers zero (Nichol & Dhariwal)",
    )
    fourier: bool = Field(
        False,
        description="song-unet: the noise level as random Fourier features of twice the channels, not sinusoids (NCSN++)",
    )
    encoder: Literal["standard", "residual", "skip"] = Field(
        "standard",
        description="song-unet: what the way down hears of the smaller image itself: nothing, a residual (NCSN++), or a 1x1 convolution of it",
    )
    decoder: Literal["standard", "skip"] = Field(
        "standard",
        description="song-unet: the output comes from the last level, or is the sum of an image from each level",
    )
    resample_filter: Mults = Field(
        (1, 1), description="song-unet: filter of down- and upsampling, an even number of taps; NCSN++: 1,3,3,1"
    )
    resolution: Positive | None = Field(
        None, description="song-unet: the size its levels are named by, as in EDM's files; default: the images' height"
    )
    augment_labels: Count = Field(
        0, description="numbers that tell the network of an image's augmentation; --data.augment sets it"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, about a third more time"
    )


class DiffusionConfig(Config):
    """The forward process and what the network learns."""

    schedule: str = Field(
        "linear",
        description="noise schedule spec, e.g. linear:timesteps=500,beta_end=0.02; tables: linear, cosine, sigmoid, quadratic, "
        "scaled-linear, sigmoid-beta, constant, warmup, jsd, zero-snr (another one rescaled: zero-snr:table=cosine); "
        "continuous: vp, ve, edm, laplace",
    )
    objective: str = Field("eps", description="what the network predicts: eps, x0, v, xprev, edm")
    variance: str = Field(
        "fixed-large",
        description="variance of the reverse process: fixed-large, fixed-small, learned, learned-range (both take a criterion that trains it), analytic (estimated after the last step)",
    )
    loss: Literal["l2", "l1", "huber"] = Field("l2", description="error between the network's output and its target")
    criterion: str = Field(
        "simple",
        description="what is minimised: simple (the error), vlb (the variational bound), hybrid:weight=0.001 (the error for the mean, the bound for a learned variance)",
    )
    weighting: str = Field(
        "uniform",
        description="weight of each noise level in the error: uniform, snr, truncated-snr, min-snr:gamma=5, soft-min-snr, p2, edm; the same for every objective",
    )
    times: str = Field(
        "uniform",
        description="how training times are drawn: uniform, stratified, logit-normal, log-normal:mean=-1.2,std=1.2, loss-second-moment",
    )
    label_drop: Probability = Field(0.1, description="probability of training without the label (needed for guidance)")
    thresholding: str = Field(
        "clip", description="what samplers do to the predicted x0 unless told otherwise: clip, dynamic, none"
    )


class TrainConfig(Config):
    """Optimisation, and how often things are written."""

    steps: Positive = Field(100_000, description="optimizer steps of the whole run")
    batch_size: Positive = Field(128, description="global batch: images per optimizer step over all processes")
    micro_batch: Positive | None = Field(
        None, description="images per forward pass and process; default: all, halved when memory runs out"
    )
    optimizer: Literal["adam", "adamw"] = Field("adam", description="optimizer")
    lr: float = Field(2e-4, gt=0, description="learning rate after warm-up")
    betas: Annotated[tuple[Probability, Probability], BeforeValidator(_parse_pair)] = Field(
        (0.9, 0.999), description="Adam's decay rates"
    )
    adam_eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="weight decay (L2 for adam, decoupled for adamw)")
    warmup: Count = Field(5000, description="steps over which the learning rate rises linearly from zero")
    lr_schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="learning rate after warm-up: constant, or falling to zero at the last step"
    )
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0 turns clipping off")
    ema: Specs = Field(
        ("0.9999",),
        description="moving averages of the weights, first is the default for sampling: decays, or specs such as warmup:decay=0.999 and half-life:images=500000; 'none'",
    )
    nan: str = Field(
        "stop",
        pattern=r"^(stop|skip:[1-9]\d*)$",
        description="a NaN or infinite loss or gradient: stop, or skip:N to leave out up to N steps",
    )
    log_every: Positive = Field(50, description="steps between lines of metrics.jsonl")
    checkpoint_every: Positive = Field(1000, description="steps between checkpoints (the last step is always saved)")
    keep_last: Positive = Field(2, description="newest checkpoints that are kept")
    keep_every: Count = Field(0, description="also keep every checkpoint whose step this divides; 0: none")
    preview_every: Count = Field(1000, description="steps between preview grids; 0: none")
    preview_images: Positive = Field(64, description="images in a preview grid")


class SampleConfig(Config):
    """How images are drawn."""

    sampler: str = Field(
        "ddim:steps=50",
        description="sampler spec: ddim:steps=50,eta=0, dpm++2m:steps=20, ddpm:steps=1000, ... (docs/sampling.md)",
    )
    guidance: Guidance = Field(
        1.0,
        description="weight of classifier-free guidance: 1 is plain conditional sampling, 0 unconditional; or a spec: cfg, autoguidance, classifier",
    )
    chunk: Positive = Field(
        16, description="images drawn together; part of the recipe, since another size changes float rounding"
    )


class EvaluateConfig(Config):
    """Scoring while training: the first moving average, by images drawn as [sample] says."""

    every: Count = Field(0, description="steps between evaluations (and at the last step); 0: none")
    num_images: Positive = Field(1000, description="images that are drawn for an evaluation")
    metric: Literal["fd", "kid", "is"] = Field(
        "fd", description="metric by which the best checkpoint is chosen and kept: lowest fd or kid, highest is"
    )
    extractor: str = Field(
        "auto", description="feature extractor spec; auto: tiny-cnn where its weights are shipped, else inception-tf"
    )


class RuntimeConfig(Config):
    """The machine. Nothing here changes what is computed, beyond float rounding."""

    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto, cpu, cuda or cuda:N (Apple's mps lacks float64, which the noise needs)",
    )
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto", description="bf16: autocast; auto: bf16 where the machine has units for it"
    )
    layout: Literal["auto", "nchw", "channels-last"] = Field(
        "auto", description="memory layout of images; auto: channels-last on a GPU"
    )
    threads: Positive | None = Field(
        None, description="CPU threads per process; default: OMP_NUM_THREADS, or cores / processes"
    )


class LoggingConfig(Config):
    """Where metrics go besides metrics.jsonl."""

    sinks: Names = Field(
        (),
        description="any of tensorboard, wandb, trackio, comma-separated; a sink that fails is left out, training goes on",
    )
    project: str = Field("ddpm", description="project name in W&B and trackio")


class RunConfig(Config):
    """A whole run: with the step number it determines every weight and image."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="seed of everything random")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    logging: LoggingConfig = LoggingConfig()


SHORT_FLAGS = {
    "--steps": "train.steps",
    "--batch-size": "train.batch_size",
    "--lr": "train.lr",
    "--nan": "train.nan",
    "--precision": "runtime.precision",
    "--device": "runtime.device",
}
"""Short forms of the flags most often typed -> the field they set."""

FREE_FIELDS = {
    "data.path", "data.labels", "data.workers", "train.steps", "train.nan", "train.log_every", "train.checkpoint_every", "train.keep_last",
    "train.keep_every", "train.preview_every", "train.preview_images", "train.micro_batch", "sample", "evaluate", "runtime", "logging",
}  # fmt: skip
"""Fields (or whole groups) that may differ when a run is resumed: they do not change what a step computes."""


def build(values: Mapping[str, Any], source: str = "config") -> RunConfig:
    """Validate a nested mapping; raises ConfigError with the path of the first wrong field, in one sentence."""
    try:
        return RunConfig.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{source}: {_first_problem(error)}") from None


def _first_problem(error: pydantic.ValidationError) -> str:
    problem = error.errors()[0]
    path = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        known = fields()
        group = ".".join(path[:-1])
        siblings = [name.removeprefix(f"{group}.") for name in known if not group or name.startswith(f"{group}.")]
        siblings += list(RunConfig.model_fields) if not group else []
        close = difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.5)
        return f"{'.'.join(path)} is not known" + (f" (did you mean {close[0]!r}?)." if close else ".")
    message = problem["msg"].removeprefix("Value error, ")
    return f"{'.'.join(path)}={_short(problem['input'])} is wrong: {message[0].lower()}{message[1:]}."


def _short(value: Any) -> str:
    """A value for a message; long ones are cut, and containers (which may nest without end) only named."""
    if isinstance(value, str | int | float | bool | None):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    return f"a {type(value).__name__}"


def fields(model: type[Config] = RunConfig, prefix: str = "") -> dict[str, pydantic.fields.FieldInfo]:
    """Every leaf field by its dotted name, in order."""
    found: dict[str, pydantic.fields.FieldInfo] = {}
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Config):
            found |= fields(info.annotation, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = info
    return found


def merge(base: Mapping[str, Any], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries laid over each other; later ones win, leaf by leaf."""
    merged = dict(base)
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = merge(merged[key], value) if both else value
    return merged


def nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """{'train.lr': 1} -> {'train': {'lr': 1}}."""
    nested: dict[str, Any] = {}
    for name, value in dotted.items():
        *groups, leaf = name.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = value
    return nested


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nest`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def to_yaml(config: Config) -> str:
    """The config as YAML that `read_yaml` and `--config` take back."""
    values = config.model_dump(mode="json")
    breaks = re.search("[\x85\u2028\u2029]", json.dumps(values, ensure_ascii=False))  # YAML folds these unless escaped
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, allow_unicode=not breaks)


def read_yaml(path: Path) -> dict[str, Any]:
    """A config file as a nested dictionary (YAML or JSON, plain values only); raises ConfigError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror or error}).") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path}: is not plain YAML ({' '.join(str(error).split())[:160]}).") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(
            f"--config {path}: expected groups such as 'train:' with fields, found {type(values).__name__}."
        )
    return values


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that differ and change what a step computes: {dotted name: (old, new)}. Empty: `new` may resume `old`."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    changed = {
        name: (before.get(name), after.get(name)) for name in {**before, **after} if before.get(name) != after.get(name)
    }
    return {name: pair for name, pair in changed.items() if not _is_free(name, new)}


def _is_free(name: str, config: RunConfig) -> bool:
    if name == "train.steps":
        return config.train.lr_schedule == "constant"
    return name in FREE_FIELDS or name.split(".")[0] in FREE_FIELDS


def duration_s(text: str) -> float:
    """'90', '90s', '20m', '1.5h', '1h30m' -> seconds; raises ConfigError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)(h|m|s|)", text.strip())
    if not parts or "".join(number + unit for number, unit in parts) != text.strip():
        raise ConfigError(f"--stop-after {text!r} is not a duration; write 90s, 20m or 1.5h.")
    seconds = sum(float(number) * {"h": 3600, "m": 60, "s": 1, "": 1}[unit] for number, unit in parts)
    if not (0 < seconds < math.inf):
        raise ConfigError(f"--stop-after {text!r} must be more than zero.")
    return seconds


def to_json(config: Config) -> str:
    """Canonical one-line JSON, for hashing."""
    return json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
