"""The variational bound, term by term, and progressive decoding, which the same terms describe."""

import csv
import io
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ddpm import files, plots
from ddpm.evaluation.likelihood import Likelihood, Rows, ends
from ddpm.losses import bound_terms, prior_term
from ddpm.models.diffusion import Predictor
from ddpm.objectives import eps_from_x0
from ddpm.randomness import Stream
from ddpm.registry import register
from ddpm.samplers import Thresholding
from ddpm.schedules import DiscreteSchedule, Level, Schedule, posterior_variance

Float64 = NDArray[np.float64]
CONTINUOUS_STEPS = 1000
"""Steps of the reverse process where the schedule has no table."""


@register("vlb")
class VariationalBound(Likelihood):
    """Upper bound by the reverse process: L_T + ... + L_{t-1} + ... + L_0 (Ho et al. 2020, equation 5).

    Options: timesteps, how many an image is measured at (none: all); steps, of the reverse process, evenly spaced in
    log-SNR (none: the schedule's table; 1000 on a continuous schedule).

    The steps are cut into as many bands as there are timesteps, wider towards the noise, where terms are small and alike.
    In each band an image is measured at one step, drawn uniformly, times the band's width: unbiased, image by image.
    The last band is the decoder alone.
    """

    parts: ClassVar[dict[str, str]] = {
        "prior": "L_T: how far the noisiest level is from pure noise",
        "steps": "L_1 ... L_{T-1}: the reverse steps; with L_T the rate of progressive coding",
        "decoder": "L_0: the last step, to 8-bit values",
    }
    thresholds = True
    timesteps: Annotated[int, Field(ge=2)] | None = 50
    steps: Annotated[int, Field(ge=2)] | None = None

    def path(self, schedule: Schedule) -> Level:
        """The levels of the reverse process, falling to the clean image: tensors (steps + 1,). Raises ConfigError."""
        if self.steps is None and isinstance(schedule, DiscreteSchedule):
            t = torch.arange(schedule.timesteps - 1, -1, -1, dtype=torch.float64)
        else:
            noisiest, cleanest = (float(level.log_snr) for level in ends(schedule))
            t = schedule.t_of(torch.linspace(noisiest, cleanest, self.steps or CONTINUOUS_STEPS, dtype=torch.float64))
        return schedule.at(torch.cat([t, -torch.ones(1, dtype=torch.float64)]))

    def bands(self, schedule: Schedule) -> list[range]:
        """Places on the path, from the noisiest: a band for each timestep that is measured."""
        steps = len(self.path(schedule).t) - 1
        count = min(self.timesteps or steps, steps)
        edges = [0, 1]  # counted from the clean image: the decoder, then cubes, so that a band's terms are alike in sum
        for k in range(1, count):
            edges.append(max(edges[-1] + 1, 1 + round((steps - 1) * (k / (count - 1)) ** 3)))
        return [range(steps - stop, steps - start) for start, stop in pairwise(edges)][::-1]

    def groups(self, schedule: Schedule) -> dict[str, slice]:
        """L_T, the sum of the L_{t-1}, and L_0."""
        count = len(self.bands(schedule))
        return {"prior": slice(0, 1), "steps": slice(1, count), "decoder": slice(count, count + 1)}

    def shapes(self, schedule: Schedule) -> dict[str, tuple[int, ...]]:
        """Beside bits (1 + bands,), the mean squared errors of the predicted eps and x0, (bands,)."""
        count = len(self.bands(schedule))
        return {"bits": (count + 1,), "mse_eps": (count,), "mse_x0": (count,)}

    def facts(self, schedule: Schedule, rows: Rows) -> dict[str, Any]:
        """Steps of the reverse process, how many of them an image is measured at; no dequantisation."""
        steps, count = len(self.path(schedule).t) - 1, rows["mse_x0"].shape[1]
        rmse = 127.5 * float(rows["mse_x0"][:, -1].mean()) ** 0.5
        return {"reverse_steps": steps, "evaluations": count, "dequantisation": "none", "distortion_rmse": rmse}

    @torch.inference_mode()
    def measure(
        self, predictor: Predictor, x0: Tensor, condition: Tensor | None, stream: Stream, thresholding: Thresholding
    ) -> dict[str, Tensor]:
        path = self.path(predictor.schedule)
        noisiest, last = _pick(path, 0), len(path.t) - 2
        floor = posterior_variance(_pick(path, last - 1), _pick(path, last))
        terms, errors = [_prior(x0.double(), noisiest, predictor.schedule.start_std(noisiest))], []
        for k, band in enumerate(self.bands(predictor.schedule)):
            place = band.start + (stream.at("timestep", k).uniform() * len(band)).long().cpu()
            eps = stream.at("bound-noise", k).normal(*x0.shape[1:]).to(x0)
            level = _pick(path, place)
            x_t = level.like(x0).alpha * x0 + level.like(x0).sigma * eps
            found = predictor.predict(x_t, level, condition)
            found = replace(found, x0=thresholding.apply(found.x0).double())
            terms.append(len(band) * bound_terms(x0.double(), level, _pick(path, place + 1), found, floor))
            guess = eps_from_x0(found.x0, x_t.double(), level)
            errors.append([(a - b).square().flatten(1).mean(1) for a, b in ((guess, eps), (found.x0, x0))])
        mse_eps, mse_x0 = (torch.stack(column, dim=1) for column in zip(*errors, strict=True))
        return {"bits": torch.stack(terms, dim=1), "mse_eps": mse_eps, "mse_x0": mse_x0}

    def write(self, folder: Path, schedule: Schedule, rows: Rows) -> list[Path]:
        """terms.csv, progressive.csv, and a picture of each."""
        path, bands = self.path(schedule), self.bands(schedule)
        terms, decoding = term_table(path, bands, rows), progressive_table(path, bands, rows)
        _write_csv(folder / "terms.csv", terms)
        _write_csv(folder / "progressive.csv", decoding)
        t, a_step, error = (terms[name][1:].tolist() for name in ("t_first", "bits_per_step", "mse_eps"))
        plots.graphs(
            folder / "terms.png",
            [
                plots.Graph("terms of the bound", "t", "bits/dim a step", t, a_step, logy=True),
                plots.Graph("error of eps", "t", "mean square", t, error, logy=True),
            ],
        )
        done, rate, distortion = (decoding[name].tolist() for name in ("reverse_step", "rate", "distortion"))
        plots.graphs(
            folder / "progressive.png",
            [
                plots.Graph("rate", "reverse steps", "bits/dim", done, rate),
                plots.Graph("distortion", "reverse steps", "RMSE of 255", done, distortion),
                plots.Graph("distortion against rate", "bits/dim", "RMSE of 255", rate, distortion),
            ],
        )
        return [folder / f"{name}.{kind}" for name in ("terms", "progressive") for kind in ("csv", "png")]


def term_table(path: Level, bands: list[range], rows: Rows) -> dict[str, Float64]:
    """Columns of terms.csv: a row for L_T, then one for each band of steps from the noisiest; bits sum to the total.

    t_first, t_last and log_snr (the mean) say where a band stands; bits are the sum over its steps, with the standard error.
    """
    bits, t, log_snr = rows["bits"], path.t.numpy(), path.log_snr.numpy()
    width = np.array([1, *map(len, bands)])
    mean = bits.mean(axis=0)
    nothing = np.full(1, np.nan)
    return {
        "t_first": np.array([t[0], *(t[band[0]] for band in bands)]),
        "t_last": np.array([t[0], *(t[band[-1]] for band in bands)]),
        "log_snr": np.array([log_snr[0], *(log_snr[band.start : band.stop].mean() for band in bands)]),
        "steps": width,
        "bits": mean,
        "standard_error": bits.std(axis=0, ddof=1) / len(bits) ** 0.5 if len(bits) > 1 else np.full(len(mean), np.nan),
        "bits_per_step": mean / width,
        "mse_eps": np.concatenate([nothing, rows["mse_eps"].mean(axis=0)]),
        "mse_x0": np.concatenate([nothing, rows["mse_x0"].mean(axis=0)]),
    }


def progressive_table(path: Level, bands: list[range], rows: Rows) -> dict[str, Float64]:
    """Columns of progressive.csv: what is known of the image after some reverse steps (Ho et al. 2020, section 4.3).

    rate: bits/dim received by then, the terms so far; rest: those still to come, total: both; distortion: root mean square
    error of the predicted x0, on the scale 0 to 255 (table 4). A band of several steps stands in its middle.
    """
    mean, width = rows["bits"].mean(axis=0), np.array(list(map(len, bands)))
    before = np.cumsum(mean)[:-1]  # L_T and the bands that are done
    rate = before + mean[1:] * (width - 1) / (2 * width)
    return {
        "reverse_step": np.array([(band[0] + band[-1]) / 2 for band in bands]),
        "t": np.array([float(path.t[band.start : band.stop].mean()) for band in bands]),
        "rate": rate,
        "rest": mean.sum() - rate,
        "total": np.full(len(bands), mean.sum()),
        "distortion": 127.5 * np.sqrt(rows["mse_x0"].mean(axis=0)),
    }


def _prior(x0: Tensor, level: Level, std: Tensor) -> Tensor:
    """L_T against N(0, std^2): the divergence does not change when both are divided by std."""
    return prior_term(x0, replace(level, alpha=level.alpha / std, sigma=level.sigma / std))


def _pick(path: Level, place: Tensor | int) -> Level:
    return Level(*(value[place] for value in vars(path).values()))


def _write_csv(path: Path, columns: Mapping[str, Float64]) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow("" if np.isnan(value) else f"{value:.10g}" for value in row)
    files.write_text(path, table.getvalue())
