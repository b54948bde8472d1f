"""Flags made from the config: each field has one, and what is typed arrives or is refused by its name."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm import config
from ddpm.cli import flags
from ddpm.errors import ConfigError


def parser() -> flags.Parser:
    made = flags.Parser("train", "[flags]", "About.", [("ddpm train", "why")])
    flags.add_field(made, "seed", "--seed")
    flags.add_fields(made)
    return made


def typed(*words: str) -> dict[str, object]:
    return parser().parse(words).typed.values


def built(*words: str) -> dict[str, object]:
    return config.flatten(flags.build([], parser().parse(words).typed).model_dump())


def test_every_field_is_in_the_help_with_its_description():
    text = " ".join(parser().format_help().split())
    for name, info in config.fields().items():
        assert f"--{name.replace('_', '-')} " in text
        assert info.description
        assert " ".join(info.description.split()) in text


def test_every_group_and_short_form_is_in_the_help():
    text = parser().format_help()
    for name in config.RunConfig.model_fields:
        assert name == "seed" or f"\n{name}:\n" in text
    for short, dotted in config.SHORT_FLAGS.items():
        assert f"{short}, --{dotted.replace('_', '-')}" in text


def test_help_shows_the_default_of_every_field():
    text = " ".join(parser().format_help().split())
    for name, value in (
        ("train.lr", "0.0002"),
        ("train.betas", "0.9,0.999"),
        ("data.flip", "false"),
        ("logging.sinks", "none"),
    ):
        after = text.split(f"--{name.replace('_', '-')} ")[1]
        assert re.match(rf"(?:(?! --).)*\(default: {re.escape(value)}\)", after)


SAMPLES = {
    "seed": ("7", 7),
    "data.size": ("28x36", (28, 36)),
    "data.channels": ("3", 3),
    "data.flip": ("true", True),
    "data.labels": ("a.csv", "a.csv"),
    "model.channel_mults": ("1,2,4", (1, 2, 4)),
    "model.attention": ("none", ()),
    "model.head_channels": ("none", None),
    "model.conditioning": ("none", "none"),
    "train.betas": ("0.5,0.9", (0.5, 0.9)),
    "train.ema": ("0.9 warmup:decay=0.9,power=0.6", ("0.9", "warmup:decay=0.9,power=0.6")),
    "train.nan": ("skip:3", "skip:3"),
    "logging.sinks": ("wandb,tensorboard", ("wandb", "tensorboard")),
    "runtime.device": ("cuda:1", "cuda:1"),
}


@pytest.mark.parametrize(("name", "sample"), SAMPLES.items())
@pytest.mark.parametrize("style", ["-", "_", "="])
def test_values_arrive_converted(name, sample, style):
    text, value = sample
    flag = "--" + (name if style == "_" else name.replace("_", "-"))
    words = [f"{flag}={text}"] if style == "=" else [flag, text]
    found = built(*words)[name]
    assert (str(found) if name == "data.labels" else found) == value


def test_every_default_can_be_typed():
    """Each field takes its own default back, as --help writes it."""
    for name, value in config.flatten(config.RunConfig().model_dump()).items():
        text = (
            "none"
            if value in (None, ())
            else ",".join(map(str, value))
            if isinstance(value, tuple)
            else str(value).lower()
        )
        assert built(f"--{name}={text}")[name] == value


def test_only_what_was_typed_is_returned():
    assert typed() == {}
    assert typed("--lr", "1e-3", "--data.flip", "--seed=4") == {"train.lr": "1e-3", "data.flip": "true", "seed": "4"}


@pytest.mark.parametrize("field", list(config.fields()))
def test_every_field_refuses_nonsense_by_its_flag(field):
    plain_text = {
        "data.augment",
        "data.dataset",
        "data.path",
        "data.labels",
        "model.network",
        "diffusion.schedule",
        "diffusion.objective",
        "diffusion.thresholding",
        "diffusion.variance",
        "diffusion.criterion",
        "diffusion.weighting",
        "diffusion.times",
    }
    plain_text |= {
        "train.ema",
        "sample.sampler",
        "sample.guidance",
        "evaluate.extractor",
        "logging.sinks",
        "logging.project",
    }
    if field in plain_text:
        return
    flag = f"--{field.replace('_', '-')}"
    with pytest.raises(ConfigError, match=rf"^{re.escape(flag)}=.* is wrong: \S"):
        built(f"{flag}=~nonsense~")


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--data.flip"], True),
        (["--data.flip", "false"], False),
        (["--data.flip=false"], False),
        (["--data.flip", "off"], False),
        (["--no-data.flip"], False),
        (["--data.flip", "--no-data.flip"], False),
        (["--no_data.flip", "--data.flip", "--lr", "1"], True),
    ],
)
def test_switches(words, value):
    assert built(*words)["data.flip"] is value


def test_averages_are_one_word_a_flag_and_add_up():
    assert built("--train.ema", "0.9", "--train.ema=warmup:decay=0.99")["train.ema"] == ("0.9", "warmup:decay=0.99")
    assert built("--train.ema", "0.9 0.99", "--train.ema", "0.999")["train.ema"] == ("0.9", "0.99", "0.999")
    with pytest.raises(ConfigError, match=r"'0\.99' is not expected here"):
        built("--train.ema", "0.9", "0.99")


def test_the_last_one_wins_and_is_the_one_named():
    assert typed("--lr", "1", "--train.lr", "2") == {"train.lr": "2"}
    with pytest.raises(ConfigError, match=r"^--lr='x' is wrong"):
        built("--train.lr", "2", "--lr", "x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.lrr", "1"], "'--train.lrr' is not a flag (did you mean '--train.lr'?); see --help."),
        (["--batch-sise", "1"], "'--batch-sise' is not a flag (did you mean '--batch-size'?); see --help."),
        (["--flip"], "'--flip' is not a flag (did you mean '--data.flip'?); see --help."),
        (["--model.batch_size=3"], "(did you mean '--batch-size'?)"),
        (["--train.batch", "4"], "'--train.batch' is not a flag"),
        (["--zzzzzzzzzzzzzzz"], "'--zzzzzzzzzzzzzzz' is not a flag; see --help."),
        (["--no-train.lr"], "'--no-train.lr' is not a flag"),
        (["--no-data.flip=true"], "--no-data.flip takes no value."),
        (["--lr"], "--lr/--train.lr needs a value."),
        (["--train.ema"], "--train.ema needs a value."),
        (["word"], "'word' is not expected here; see --help."),
        (["-z"], "'-z' is not expected here; see --help."),
        (["--model.attention", "1,x"], "--model.attention='x' is wrong: "),
        (["--train.betas", "0.5,7"], "--train.betas='7' is wrong: "),
        (["--data.channels", "2"], "--data.channels='2' is wrong: input should be 1 or 3."),
    ],
)
def test_mistakes_name_the_flag(words, message):
    with pytest.raises(ConfigError) as caught:
        built(*words)
    assert message in str(caught.value)


def test_layers_are_laid_over_each_other_and_blamed_by_name():
    words = parser().parse(["--lr", "3"]).typed
    result = flags.build([("a", {"train": {"lr": 1.0, "warmup": 1}}), ("b", {"train": {"lr": 2.0, "steps": 9}})], words)
    assert (result.train.lr, result.train.warmup, result.train.steps) == (3.0, 1, 9)
    with pytest.raises(ConfigError, match=r"^b: train\.stepz is not known \(did you mean 'steps'\?\)"):
        flags.build([("a", {}), ("b", {"train": {"stepz": 9}})], words)


@pytest.mark.parametrize("text", ["", "x", "1.5", "１", "0", "5", "9" * 5000, "-1", "1_0"])
def test_whole_numbers(text):
    if text == "5":
        assert flags.whole(1, 9)(text) == 5
    else:
        with pytest.raises(Exception, match="is wrong: write a whole number from 1 to 9"):
            flags.whole(1, 9)(text)


def test_without_removes_flags_and_their_values():
    words = ["train", "digits", "--processes", "4", "--lr", "1", "--restarts=2", "--processes=3"]
    assert flags.without(words, "--processes", "--restarts") == ["train", "digits", "--lr", "1"]


FLAGS = st.sampled_from(
    [f"--{name}" for name in config.fields()] + list(config.SHORT_FLAGS) + ["--no-data.flip", "--seed"]
)
WORDS = st.text(max_size=12) | st.sampled_from(
    ["1", "-1", "1e999", "nan", "true", "none", "1,2", "32x32", "9" * 400, "\0", "a=b", "--", "-"]
)


@settings(deadline=None)
@given(st.lists(FLAGS | WORDS | st.tuples(FLAGS, WORDS).map("=".join), max_size=6))
def test_any_words_build_a_config_or_raise_one_sentence(words):
    if {"-h", "--help"} & set(words):
        return
    try:
        assert isinstance(flags.build([], parser().parse(words).typed), config.RunConfig)
    except ConfigError as error:
        assert str(error)
