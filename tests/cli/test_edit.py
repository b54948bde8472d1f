"""`ddpm edit`: what its words become, and what its help teaches."""

import shlex
from pathlib import Path

import pytest

from ddpm.cli import edit, main
from ddpm.cli.edit import parse_edit
from ddpm.errors import ConfigError

COMMON = {
    "source": "runs/x", "labels": None, "guidance": None, "sampler": None, "thresholding": None, "ema": None, "seed": 0, "out": None,
    "resize": "crop", "chunk": None, "gif": True, "device": "auto", "precision": "auto",
}  # fmt: skip
OWN = {
    "inpaint a.png m.png": {"image": Path("a.png"), "mask": Path("m.png"), "num_images": 1, "jump": None, "resamplings": 10},
    "img2img a.png": {"image": Path("a.png"), "num_images": 1, "strength": 0.5},
    "interpolate a.png b.png": {
        "ends": [Path("a.png"), Path("b.png")], "frames": 9, "level": 0.5, "blend": "lerp", "between_seeds": None,
    },
    "invert a.png": {"image": Path("a.png"), "steps": ()},
    "denoise a.png": {"image": Path("a.png"), "num_images": 1, "sigma": None, "one_step": False},
}  # fmt: skip


@pytest.mark.parametrize("words", OWN)
def test_what_is_not_typed_is_left_to_the_edit_and_the_checkpoint(words):
    action, *rest = words.split()
    asked = parse_edit([action, "runs/x", *rest])
    assert (asked.action, asked.common, asked.own, asked.trust_code) == (action, COMMON, OWN[words], False)


def test_every_flag_that_edits_share():
    words = (
        "img2img --labels 3,cat --guidance 2.5 --sampler ddim:steps=5 --thresholding none --ema 0.9 --seed 7 --out there --resize fit"
        " --chunk 4 --no-gif --device cpu --precision bf16 --trust-code runs/x a.png"
    )
    asked = parse_edit(words.split())
    assert asked.trust_code
    assert asked.common == {
        "source": "runs/x", "labels": ["3", "cat"], "guidance": asked.common["guidance"], "sampler": "ddim:steps=5",
        "thresholding": "none", "ema": "0.9", "seed": 7, "out": Path("there"), "resize": "fit", "chunk": 4, "gif": False,
        "device": "cpu", "precision": "bf16",
    }  # fmt: skip
    assert float(asked.common["guidance"]) == 2.5


@pytest.mark.parametrize(
    ("words", "own"),
    [
        ("inpaint r a m --num-images 3 --jump 2 --resamplings 1", {"num_images": 3, "jump": 2, "resamplings": 1}),
        ("img2img r a --strength 1", {"strength": 1.0}),
        ("interpolate r --between-seeds 3,8 --frames 2", {"ends": [], "between_seeds": (3, 8), "frames": 2}),
        ("interpolate r a b --level .25 --blend slerp", {"level": 0.25, "blend": "slerp"}),
        ("invert r a --steps 5,10", {"steps": (5, 10)}),
        ("denoise r a --sigma 25 --one-step", {"sigma": 25.0, "one_step": True}),
    ],
)
def test_flags_of_each_edit(words, own):
    asked = parse_edit(words.split())
    assert {name: asked.own[name] for name in own} == own


@pytest.mark.parametrize("command", [command for command, _ in edit.EXAMPLES])
def test_the_examples_are_understood(command):
    assert parse_edit(shlex.split(command)[2:]).common["source"] == "runs/digits"


@pytest.mark.parametrize("action", edit.ACTIONS)
def test_help_teaches(action, capsys):
    assert main(["edit", action, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: ddpm edit {action} RUN ")
    assert all(command in shown and why in shown for command, why in edit.ACTIONS[action].examples)


def test_the_overview_names_every_edit(capsys):
    for words in (["edit"], ["edit", "--help"]):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown and action.line in shown for name, action in edit.ACTIONS.items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("inpant r a m", "'inpant' is no edit (did you mean 'inpaint'?); choose from inpaint, img2img, interpolate, invert, denoise."),
        ("inpaint r a", "MASK is missing; see --help."),
        ("img2img r", "IMAGE is missing; see --help."),
        ("img2img r a --strength 0", "--strength: '0' is wrong: write a number above 0 and at most 1."),
        ("img2img r a --strength 1.5", "--strength: '1.5' is wrong: write a number above 0 and at most 1."),
        ("img2img r a --strength much", "--strength: 'much' is wrong"),
        ("interpolate r a b --level nan", "--level: 'nan' is wrong"),
        ("interpolate r a b --frames 1", "--frames: '1' is wrong: write a whole number from 2 to 1000."),
        ("interpolate r --between-seeds 3", "--between-seeds: '3' is wrong: write two different seeds, such as 3,8."),
        ("interpolate r --between-seeds 3,3", "--between-seeds: '3,3' is wrong"),
        ("interpolate r a b --blend cubic", "--blend: "),
        ("invert r a --steps 5,x", "--steps: '5,x' is wrong: write numbers of steps, such as 10,20,50."),
        ("invert r a --steps 0", "--steps: '0' is wrong"),
        ("denoise r a --sigma -3", "--sigma: '-3' is wrong: write a number above 0."),
        ("denoise r a --sigma inf", "--sigma: 'inf' is wrong: write a number above 0."),
        ("denoise r a --strength 0.5", "'--strength' is not a flag"),
        ("inpaint r a m --jump 0", "--jump: '0' is wrong: write a whole number of at least 1."),
        ("inpaint r a m --seed -1", "--seed: '-1' is wrong"),
        ("inpaint r a m --resize shrink", "--resize='shrink' is wrong"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(words, said):
    with pytest.raises(ConfigError) as caught:
        parse_edit(words.split())
    assert said in str(caught.value)
