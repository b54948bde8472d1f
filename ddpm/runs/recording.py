"""A line of evaluations.jsonl: how it is made, read and shown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ddpm
from ddpm import rundir
from ddpm.console import Console
from ddpm.evaluation.metrics import Estimate
from ddpm.evaluation.protocol import Scores, meaning


def record_of(
    *,
    by: str,
    source: str,
    step: int | None,
    recipe: dict[str, Any] | None,
    seed: int | None,
    num_images: int | None,
    extractor: dict[str, Any],
    reference: dict[str, Any],
    scores: Scores,
    notes: Sequence[str],
    seconds: float,
    quantisation: str = "uint8",
) -> dict[str, Any]:
    """A line of evaluations.jsonl: the values with 95 % intervals (null where there is none) and all that decides them."""
    return {
        "date": rundir.now(),
        "by": by,
        "ddpm": ddpm.__version__,
        "source": source,
        "step": step,
        "num_images": num_images,
        "seed": seed,
        "quantisation": quantisation,
        "recipe": recipe,
        "extractor": extractor,
        "reference": reference,
        "settings": scores.settings,
        "values": {name: written(value) for name, value in scores.values.items()},
        "classes": {
            name: {label: written(value) for label, value in by_label.items()}
            for name, by_label in scores.classes.items()
        },
        "notes": [*notes, *scores.notes],
        "seconds": round(seconds, 2),
    }


def show(record: dict[str, Any], say: Console) -> None:
    """Print a line of evaluations.jsonl as a table."""
    reference = record["reference"]
    count = "statistics" if record["num_images"] is None else f"{record['num_images']:,} images"
    against = reference["name"] + (f", {reference['n']:,} images" if reference.get("n") else "")
    rows = [(name, number(value["value"]), interval(value), meaning(name)) for name, value in record["values"].items()]
    title = f"{record['source']}: {count} against {against}, by {record['extractor']['extractor']}"
    say.table(title, ("metric", "value", "95 % interval", "what it means"), rows)
    if record["classes"]:
        labels = dict.fromkeys(label for by_label in record["classes"].values() for label in by_label)
        cells = [
            (
                label,
                *(
                    f"{number(held[label]['value'])} {interval(held[label])}" if label in held else ""
                    for held in record["classes"].values()
                ),
            )
            for label in labels
        ]
        say.table("classes", ("class", *record["classes"]), cells)
    for note in record["notes"]:
        say.info(note)


def number(value: float | None) -> str:
    """Four digits; what is below rounding is 0, what is not there '-'."""
    return "-" if value is None else "0" if abs(value) < 1e-9 else f"{value:.4g}"


def interval(value: dict[str, float | None]) -> str:
    """'[low, high]', or '' where there is none."""
    return "" if value["low"] is None else f"[{number(value['low'])}, {number(value['high'])}]"


def written(estimate: Estimate) -> dict[str, float | None]:
    """An estimate as JSON: what is not there, or is no finite number, is null."""
    return {
        name: value if value is not None and math.isfinite(value) else None for name, value in vars(estimate).items()
    }


def read_estimate(value: Mapping[str, Any]) -> Estimate:
    """The inverse of `written`, without what a metric adds."""
    return Estimate(value["value"], value["low"], value["high"])
