"""`ddpm edit inpaint|img2img|interpolate|invert|denoise`: image files in, image files out, by `runs.editing`."""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm.cli import flags
from ddpm.cli.sample import parse_labels
from ddpm.errors import ConfigError
from ddpm.registry import nearest


@dataclass(frozen=True)
class Action:
    """A sub-verb: its line in `ddpm edit --help`, its own help and examples, and what adds its flags."""

    line: str
    about: str
    examples: tuple[tuple[str, str], ...]
    usage: str
    add: Callable[[flags.Parser], None]


def run(argv: Sequence[str]) -> int:
    """Edit."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(), end="")
        return 0
    asked = parse_edit(argv)
    from ddpm.runs import editing
    from ddpm.runs.loading import trusting

    with trusting() if asked.trust_code else nullcontext():
        getattr(editing, asked.action)(editing.Common(**asked.common), **asked.own)
    return 0


@dataclass(frozen=True)
class Asked:
    """What was typed: the sub-verb, what `runs.editing.Common` takes, and what the function of the sub-verb takes."""

    action: str
    common: dict[str, Any]
    own: dict[str, Any]
    trust_code: bool = False


def parse_edit(argv: Sequence[str]) -> Asked:
    """The words after `ddpm edit`, at least one; raises ConfigError."""
    action = argv[0]
    if action not in ACTIONS:
        raise ConfigError(f"{action!r} is no edit{nearest(action, ACTIONS)}; choose from {', '.join(ACTIONS)}.")
    given = vars(parser(action).parse(argv[1:]))
    fields, trust_code = given.pop("typed"), given.pop("trust_code")
    settings, typed = flags.build([], fields), fields.values
    common = {name: given.pop(name) for name in ("source", "ema", "seed", "out", "gif")}
    common |= {
        "labels": parse_labels(given.pop("labels")),
        "guidance": settings.sample.guidance if "sample.guidance" in typed else None,
        "sampler": settings.sample.sampler if "sample.sampler" in typed else None,
        "thresholding": settings.diffusion.thresholding if "diffusion.thresholding" in typed else None,
        "resize": settings.data.resize,
        "chunk": settings.sample.chunk if "sample.chunk" in typed else None,
        "device": settings.runtime.device,
        "precision": settings.runtime.precision,
    }
    given.pop("debug")
    return Asked(action, common, given, trust_code)


def parser(action: str) -> flags.Parser:
    """Flags of a sub-verb."""
    told = ACTIONS[action]
    made = flags.Parser(f"edit {action}", f"RUN {told.usage} [flags]", told.about, told.examples)
    made.add_argument("source", metavar="RUN", help="a run folder or a checkpoint")
    told.add(made)
    own, kept = made.own, "as the checkpoint has it"
    inverting = action == "invert"
    own.add_argument(
        "--seed",
        type=flags.whole(0, 2**62 - 1),
        default=0,
        metavar="N",
        help="seed of an image's first result, counted up for more (default: 0)",
    )
    own.add_argument("--labels", metavar="A,B,...", help="classes by number or name, in turn by seed (default: none)")
    flags.add_field(made, "sample.guidance", "--guidance", "1" if inverting else f"with labels {kept}, else 1")
    flags.add_field(made, "sample.sampler", "--sampler", "ddim:steps=50" if inverting else kept)
    flags.add_field(made, "diffusion.thresholding", "--thresholding", "none" if inverting else kept)
    own.add_argument("--ema", metavar="NAME|none", help="which average of the weights (default: the first)")
    own.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: in the run's folder)")
    flags.add_field(made, "data.resize", "--resize")
    own.add_argument("--no-gif", dest="gif", action="store_false", help="no pictures of the way from noise to image")
    own.add_argument("--trust-code", action="store_true", help="run the code from outside ddpm that the run names")
    flags.add_field(made, "sample.chunk", "--chunk", "1 on a CPU, else 16")
    flags.add_field(made, "runtime.device", "--device")
    flags.add_field(made, "runtime.precision", "--precision")
    return made


def _inpaint(made: flags.Parser) -> None:
    _image(made)
    made.add_argument("mask", metavar="MASK", type=Path, help="an image file, white where the image is to be made")
    _num_images(made)
    made.own.add_argument(
        "--jump",
        type=flags.whole(1),
        metavar="N",
        help="steps that a resampling goes back (default: a fifth of the sampler's, at most 10)",
    )
    made.own.add_argument(
        "--resamplings",
        type=flags.whole(1),
        default=10,
        metavar="N",
        help="how often each stretch of steps is walked: more fits better and takes longer (default: 10)",
    )


def _img2img(made: flags.Parser) -> None:
    _image(made)
    _num_images(made)
    made.own.add_argument(
        "--strength",
        type=_number(most=1),
        default=0.5,
        metavar="X",
        help="share of the sampler's steps that is walked, to 1 for a new image (default: 0.5)",
    )


def _interpolate(made: flags.Parser) -> None:
    made.add_argument("ends", metavar="FIRST SECOND", nargs="*", type=Path, help="image files")
    own = made.own
    own.add_argument("--frames", type=flags.whole(2, 1000), default=9, metavar="N", help="images (default: 9)")
    own.add_argument(
        "--level",
        type=_number(most=1),
        default=0.5,
        metavar="X",
        help="the level at which they are blended, as a share of the sampler's steps, to 1 (default: 0.5)",
    )
    own.add_argument(
        "--blend",
        choices=("lerp", "slerp"),
        default="lerp",
        help="lerp: both have the same noise; slerp: each has its own, and it turns from one to the other (default: lerp)",
    )
    own.add_argument(
        "--between-seeds",
        type=_two_seeds,
        metavar="A,B",
        help="instead of image files: from the image of seed A to that of seed B, by ddim:steps=50 unless told otherwise",
    )


def _invert(made: flags.Parser) -> None:
    _image(made)
    made.own.add_argument(
        "--steps",
        type=_steps,
        default=(),
        metavar="N,N,...",
        help="numbers of steps to try; the last makes the files (default: the sampler's)",
    )


def _denoise(made: flags.Parser) -> None:
    _image(made)
    _num_images(made)
    made.own.add_argument(
        "--sigma",
        type=_number(),
        metavar="X",
        help="deviation of the noise in grey levels of 255 (default: estimated from the image)",
    )
    made.own.add_argument("--one-step", action="store_true", help="the expected clean image, predicted at once")


def _image(made: flags.Parser) -> None:
    made.add_argument("image", metavar="IMAGE", type=Path, help="an image file, or a folder of them")


def _num_images(made: flags.Parser) -> None:
    made.own.add_argument(
        "--num-images", type=flags.whole(1), default=1, metavar="N", help="results of each image (default: 1)"
    )


def _number(most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number above 0, to `most`."""

    def convert(text: str) -> float:
        bounds = "" if most == math.inf else f" and at most {most:g}"
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= most or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is wrong: write a number above 0{bounds}")
        return value

    return convert


def _two_seeds(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,18}),(\d{1,18})", text, re.ASCII)
    if match is None or int(match[1]) == int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is wrong: write two different seeds, such as 3,8")
    return int(match[1]), int(match[2])


def _steps(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is wrong: write numbers of steps, such as 10,20,50")
    return tuple(int(part) for part in text.split(","))


ACTIONS = {
    "inpaint": Action(
        "fill in a part of an image, around what is kept (RePaint)",
        "Fill in the part of an image that is white in the mask, so that it fits what is kept (RePaint, Lugmayr et al. 2022). A mask "
        "has the size of its image. What is nearer to black than to white is kept bit for bit, as it is once the image was brought "
        "to the model's size.",
        (
            ("ddpm edit inpaint runs/digits three.png hole.png --labels 3", "make what is white in hole.png"),
            (
                "ddpm edit inpaint runs/digits photos/ hole.png --num-images 8",
                "eight fillings of each image of a folder",
            ),
            ("ddpm edit inpaint runs/digits three.png hole.png --resamplings 1", "ten times faster, fits less well"),
        ),
        "IMAGE MASK",
        _inpaint,
    ),
    "img2img": Action(
        "variations of an image: noise it, and walk down again (SDEdit)",
        "Variations of an image (SDEdit, Meng et al. 2022): noise is added up to a level and taken away again. What is finer than the "
        "noise is made anew, what is coarser stays.",
        (
            ("ddpm edit img2img runs/digits sketch.png --labels 7 --num-images 8", "eight sevens after a sketch"),
            ("ddpm edit img2img runs/digits sketch.png --strength 0.3", "keep more of it"),
        ),
        "IMAGE",
        _img2img,
    ),
    "interpolate": Action(
        "the images between two, blended at a noise level",
        "Images between two images, blended at a noise level (Ho et al. 2020, section 4.4), or between the images that `ddpm sample` "
        "draws of two seeds: frames, a grid and a GIF.",
        (
            ("ddpm edit interpolate runs/digits one.png seven.png", "nine images on the way"),
            (
                "ddpm edit interpolate runs/digits one.png seven.png --level 0.8 --frames 30",
                "blend coarser features too",
            ),
            ("ddpm edit interpolate runs/digits --between-seeds 3,8 --labels 5", "between two images of `ddpm sample`"),
        ),
        "FIRST SECOND",
        _interpolate,
    ),
    "invert": Action(
        "the noise that an image is made from, and back: how near it comes",
        "Walk a sampler that draws no noise backwards, from an image to the noise that it is made from (Song et al. 2021, section 4.3), "
        "and forwards again. The more steps, the nearer the result is to the image.",
        (
            ("ddpm edit invert runs/digits three.png", "latents.safetensors, and the image made from it again"),
            ("ddpm edit invert runs/digits photos/ --steps 5,10,20,50,100", "how near it comes, as a table and a plot"),
        ),
        "IMAGE",
        _invert,
    ),
    "denoise": Action(
        "take the noise of an image away",
        "Take white noise away: the image is put at the noise level where it belongs and walked down from there, which gives a likely "
        "clean image; or one is predicted at once (--one-step), the expected one: nearer on average, and blurred.",
        (
            ("ddpm edit denoise runs/digits noisy.png", "find out how much noise there is, and take it away"),
            ("ddpm edit denoise runs/digits noisy.png --sigma 25 --one-step", "the expected image, not a likely one"),
        ),
        "IMAGE",
        _denoise,
    ),
}
"""Sub-verbs by name, in the order shown."""

EXAMPLES = tuple(example for action in ACTIONS.values() for example in action.examples)


def _overview() -> str:
    width = max(map(len, ACTIONS))
    lines = "\n".join(f"  {name:{width}}  {action.line}" for name, action in ACTIONS.items())
    examples = "\n".join(
        f"  # {why}\n  {command}" for action in ACTIONS.values() for command, why in action.examples[:1]
    )
    return f"""\
usage: ddpm edit ACTION RUN IMAGE ... [flags]

Image files in, image files out, by a trained model.

{lines}

examples:
{examples}

`ddpm edit ACTION --help` explains an action.
"""
