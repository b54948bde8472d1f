"""`ddpm demo`: train on the embedded digits, draw ten of each, and judge them by their nearest neighbours."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from ddpm import config, images, presets, rundir
from ddpm.console import Console, human_duration
from ddpm.data import ImageSet, load_dataset
from ddpm.evaluation.neighbours import judge
from ddpm.runs.drawing import sample
from ddpm.runs.training import train

PER_CLASS = 10
DIVERSITY = (0.8, 1.1)
WANTED: dict[str, Any] = {"judged_as_asked": 0.95, "copies": 5, "diversity": DIVERSITY}
"""At least so many as asked, at most so many copies, diversity between these."""


def demo(run_dir: Path = Path("runs/demo"), *, seed: int = 0, steps: int | None = None) -> dict[str, Any]:
    """The whole way in a few minutes on a CPU; returns and writes demo.json.

    The model is trained on the training part of the digits alone. A nearest-neighbour classifier on that part scores
    the held-out real digits and the generated ones; see `ddpm.evaluation.neighbours.judge`.
    """
    say, layers = Console(), [presets.preset("digits"), {"seed": seed}]
    if steps is not None:
        layers.append({"train": {"steps": steps}})
    settings = config.build(config.merge({}, *layers))
    start = time.perf_counter()
    result = train(settings, Path(run_dir))
    train_seconds = time.perf_counter() - start
    if result.stopped:
        say.warn("stopped and saved: `ddpm demo` again goes on.")
        return {"stopped": True}
    drawn = sample(run_dir, num_images=10 * PER_CLASS, out=Path(run_dir) / "samples" / f"demo-{result.step:08d}")
    generated = np.stack([images.read_image(drawn.out / f"{k:06d}.png") for k in range(10 * PER_CLASS)])
    train_set, held_out = (load_dataset(settings.data.model_copy(update={"split": part})) for part in ("train", "test"))
    verdict = judge(generated, np.arange(10 * PER_CLASS) % 10, train_set, held_out)
    report = {
        **dataclasses.asdict(verdict),
        "train_seconds": round(train_seconds, 2),
        "sample_seconds": round(drawn.seconds, 2),
        "steps": result.step,
        "seed": seed,
        "sampler": drawn.recipe["sampler"],
        "recipe": drawn.recipe,
        "thresholds": {**WANTED, "copy_distance": verdict.copy_distance},
        "grid": str(drawn.out / "grid.png"),
        "trajectory": str(drawn.out / "trajectory.gif"),
        "real": str(Path(run_dir) / "samples" / "real.png"),
    }
    images.save_png(Path(report["real"]), _real(held_out))
    rundir.write_json(Path(run_dir) / "demo.json", report)
    _show(say, report, run_dir)
    return report


def _real(held_out: ImageSet) -> images.Pixels:
    """Held-out digits in the order of the generated grid, a column a class."""
    assert held_out.labels is not None
    columns = [np.flatnonzero(held_out.labels == label)[:PER_CLASS] for label in range(10)]
    return images.grid(held_out.images[np.stack(columns, axis=1).ravel()], 10)


def _show(say: Console, report: dict[str, Any], run_dir: Path) -> None:
    low, high = DIVERSITY
    rows = [
        ("judged as the digit asked for", f"{report['judged_as_asked']:.1%}", f">= {WANTED['judged_as_asked']:.0%}"),
        ("the same judge on real held-out digits", f"{report['real_held_out']:.1%}", ""),
        ("copies of training digits", f"{report['copies']} of {report['num_samples']}", f"<= {WANTED['copies']}"),
        ("diversity within a digit (real = 1)", f"{report['diversity']:.2f}", f"{low} to {high}"),
        ("training", human_duration(report["train_seconds"]), ""),
        ("drawing 100 digits", human_duration(report["sample_seconds"]), ""),
    ]
    say.table("demo", ("what", "found", "wanted"), rows)
    say.info(f"the digits, a column each: {report['grid']}")
    say.info(f"from noise to digits:      {report['trajectory']}")
    say.info(f"real ones to compare:      {report['real']}")
    say.info("next:")
    say.info(f"  ddpm sample {run_dir} --labels 3,7 --guidance 2 --out samples/threes-and-sevens")
    say.info("  ddpm train folder --data.path YOUR_IMAGES --dry-run")
    say.info("  ddpm train fashion-mnist --stop-after 20m")
