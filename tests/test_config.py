"""RunConfig: precedence, files, what a resume may change, and messages."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm import config
from ddpm.config import RunConfig, build, differences, duration_s, fields, flatten, merge, nest, read_yaml, to_yaml
from ddpm.errors import ConfigError
from ddpm.presets import PRESETS, preset

CHANGED: dict[str, Any] = {
    "seed": 3,
    "data.dataset": "folder",
    "data.path": "photos",
    "data.size": "28x36",
    "data.channels": 1,
    "data.flip": True,
    "data.augment": "edm:probability=0.3",
    "data.workers": 2,
    "model.channels": 64,
    "model.channel_mults": "1,2",
    "model.attention": "none",
    "model.dropout": 0.25,
    "model.head_channels": 16,
    "diffusion.schedule": "cosine:s=0.01",
    "diffusion.objective": "v",
    "diffusion.label_drop": 0.0,
    "train.steps": 7,
    "train.batch_size": 4,
    "train.micro_batch": 2,
    "train.lr": 1e-8,
    "train.betas": (0.5, 0.75),
    "train.ema": "0.99 warmup:decay=0.9,x=1",
    "train.nan": "skip:5",
    "train.log_every": 3,
    "train.grad_clip": 0,
    "sample.sampler": "ddpm:steps=10",
    "sample.guidance": 2.5,
    "sample.chunk": 5,
    "runtime.device": "cuda:1",
    "runtime.precision": "bf16",
    "runtime.threads": 3,
    "logging.sinks": "tensorboard,wandb",
}
FREE = {
    "data.path",
    "data.workers",
    "train.steps",
    "train.micro_batch",
    "train.nan",
    "train.log_every",
    "sample.sampler",
    "sample.guidance",
    "sample.chunk",
    "runtime.device",
    "runtime.precision",
    "runtime.threads",
    "logging.sinks",
}


def value_of(settings: RunConfig, name: str) -> Any:
    found: Any = settings
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_later_layers_win_leaf_by_leaf() -> None:
    layers = [
        {"train": {"lr": 1.0, "steps": 1, "warmup": 1}, "seed": 1},
        {"train": {"lr": 2.0, "steps": 2}, "seed": 2},
        {"train": {"lr": 3.0}},
    ]
    merged = merge({}, *layers)
    assert merged == {"train": {"lr": 3.0, "steps": 2, "warmup": 1}, "seed": 2}
    assert layers[0] == {"train": {"lr": 1.0, "steps": 1, "warmup": 1}, "seed": 1}
    found = build(merged)
    assert (found.train.lr, found.train.steps, found.train.warmup, found.seed) == (3.0, 2, 1, 2)
    assert found.train.batch_size == RunConfig().train.batch_size


def test_defaults_then_preset_then_file_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  lr: 5e-4\n  warmup: 7\nmodel: {channels: 16}\n")
    flags = nest({"train.lr": 0.25})
    found = build(merge(preset("digits"), read_yaml(file), flags))
    assert found.train.lr == 0.25
    assert found.train.warmup == 7
    assert found.model.channels == 16
    assert found.train.optimizer == "adamw"
    assert found.train.adam_eps == RunConfig().train.adam_eps


def test_a_layer_replaces_lists_whole() -> None:
    assert build(merge(preset("digits"), {"train": {"ema": "none"}})).train.ema == ()
    assert build(merge(preset("digits"), {"model": {"channel_mults": "1"}})).model.channel_mults == (1,)


@pytest.mark.parametrize("name", [None, *PRESETS])
def test_yaml_takes_back_what_it_wrote(tmp_path: Path, name: str | None) -> None:
    for changes in ({}, CHANGED):
        found = build(merge(preset(name) if name else {}, nest(changes)))
        file = tmp_path / "config.yaml"
        file.write_text(to_yaml(found), encoding="utf-8")
        assert build(read_yaml(file)) == found
        assert config.to_json(build(read_yaml(file))) == config.to_json(found)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.floats(1e-12, 1e3),
    st.floats(0, 0.999),
    st.integers(0, 2**63 - 1),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
)
def test_any_numbers_and_texts_survive_yaml(lr: float, dropout: float, seed: int, text: str) -> None:
    changes = {
        "seed": seed,
        "train.lr": lr,
        "model.dropout": dropout,
        "logging.project": text,
        "data.path": text or ".",
    }
    found = build(nest(changes))
    assert build(yaml.safe_load(to_yaml(found))) == found


def test_nest_and_flatten_are_inverse() -> None:
    flat = flatten(RunConfig().model_dump())
    assert set(flat) == set(fields())
    assert flatten(nest(flat)) == flat


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("data.size", "32", (32, 32)),
        ("data.size", "28x36", (28, 36)),
        ("data.size", 28, (28, 28)),
        ("data.size", [28, 36], (28, 36)),
        ("model.channel_mults", "1, 2,2", (1, 2, 2)),
        ("model.channel_mults", 3, (3,)),
        ("model.attention", "none", ()),
        ("model.attention", "", ()),
        ("model.attention", 2, (2,)),
        ("train.ema", "0.999 warmup:decay=0.99,x=1", ("0.999", "warmup:decay=0.99,x=1")),
        ("train.ema", 0.999, ("0.999",)),
        ("train.ema", "none", ()),
        ("logging.sinks", "wandb, tensorboard", ("wandb", "tensorboard")),
        ("train.lr", "2e-4", 2e-4),
        ("data.flip", "yes", True),
        ("model.heads", "4", 4),
        ("data.path", "a/b", Path("a/b")),
    ],
)
def test_values_are_read_as_typed(name: str, given: Any, expected: Any) -> None:
    assert value_of(build(nest({name: given})), name) == expected


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"train.lr": "fast"}, ["config: train.lr='fast' is wrong", "number"]),
        ({"train.lr": -1}, ["train.lr=-1", "greater than 0"]),
        ({"train.lr": float("nan")}, ["train.lr=nan", "finite"]),
        ({"train.lr": float("inf")}, ["train.lr=inf", "finite"]),
        ({"train.steps": 0}, ["train.steps=0", "greater than or equal to 1"]),
        ({"train.steps": 2.5}, ["train.steps=2.5", "integer"]),
        ({"train.steps": 2**53}, ["train.steps="]),
        ({"train.nan": "skip"}, ["train.nan='skip'", "skip"]),
        ({"train.nan": "skip:0"}, ["train.nan='skip:0'"]),
        ({"train.batchsize": 3}, ["train.batchsize is not known", "did you mean 'batch_size'"]),
        ({"trian.lr": 3}, ["trian is not known", "did you mean 'train'"]),
        ({"zzz": 3}, ["zzz is not known."]),
        ({"data.size": "big"}, ["data.size='big'", "28x36"]),
        ({"data.size": "0"}, ["data.size", "greater than or equal to 1"]),
        ({"data.channels": 2}, ["data.channels=2", "1 or 3"]),
        ({"model.channel_mults": ""}, ["model.channel_mults", "at least 1"]),
        ({"model.channel_mults": "1,a"}, ["model.channel_mults.1='a'", "integer"]),
        ({"model.dropout": 1.0}, ["model.dropout=1.0", "less than 1"]),
        ({"diffusion.loss": "l3"}, ["diffusion.loss='l3'", "huber"]),
        ({"runtime.device": "gpu"}, ["runtime.device='gpu'", "cuda"]),
        ({"sample.guidance": -0.5}, ["sample.guidance=-0.5"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"train": 3}, ["train=3", "dictionary"]),
        ({"train.lr": {"a": [1] * 1000}}, ["train.lr=a dict"]),
        ({"logging.project": 3}, ["logging.project=3", "string"]),
        ({"data.dataset": "x" * 500, "train.lr": "y" * 500}, ["train.lr='yyy", "..."]),
    ],
)
def test_mistakes_get_one_sentence(values: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(nest(values))
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments), message
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 250


def test_the_source_of_a_mistake_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^--config my\.yaml: train\.lr"):
        build({"train": {"lr": 0}}, "--config my.yaml")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("a: [1, 2", "is not plain YAML"),
        ("!!python/object/apply:os.system ['true']", "is not plain YAML"),
        ("- 1\n- 2", "found list"),
        ("", "found NoneType"),
        ("just words", "found str"),
        ("1: 2", "expected groups"),
        ("a: &a [*a, *a]\n\tb: 1", "is not plain YAML"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: str, fragment: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        build(read_yaml(file))
    assert fragment in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match="is not plain YAML"):
        read_yaml(tmp_path / "binary.yaml")


def test_a_json_file_is_a_config_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config.to_json(build(nest(CHANGED))))
    assert build(read_yaml(tmp_path / "config.json")) == build(nest(CHANGED))


@pytest.mark.parametrize("name", CHANGED)
def test_a_resume_may_change_only_what_no_step_depends_on(name: str) -> None:
    old, new = RunConfig(), build(nest({name: CHANGED[name]}))
    found = differences(old, new)
    assert set(found) == (set() if name in FREE else {name})
    if found:
        json_of = [flatten(each.model_dump(mode="json"))[name] for each in (old, new)]
        assert list(found[name]) == json_of
    assert differences(new, new) == {}


@pytest.mark.parametrize(("schedule", "free"), [("constant", True), ("cosine", False), ("linear", False)])
def test_the_number_of_steps_is_free_only_where_the_learning_rate_does_not_depend_on_it(
    schedule: str, free: bool
) -> None:
    old, new = (build({"train": {"lr_schedule": schedule, "steps": steps}}) for steps in (10, 20))
    assert differences(old, new) == ({} if free else {"train.steps": (10, 20)})


def test_tables_of_fields_name_real_fields() -> None:
    known = set(fields())
    groups = {name.split(".")[0] for name in known}
    assert config.FREE_FIELDS - known - groups == set()
    assert set(config.SHORT_FLAGS.values()) <= known
    assert all(info.description for info in fields().values())


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("20m", 1200), ("1.5h", 5400), ("1h30m", 5400), (" 2h5m10s ", 7510), ("0.5", 0.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "20x", "-5", "1,5h", "1h 30m", "0", "0s", "nan", "20mm", "1e3", "9" * 400])
def test_wrong_durations_get_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--stop-after .*\.$"):
        duration_s(text)
