"""The way from noise to image as pictures: x_t and the predicted x0 at some of the steps."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm import images

Pixels = NDArray[np.uint8]
_FRAMES, _COLUMNS, _ROWS = 40, 10, 8
"""Frames of the GIF, about; steps and images in the grid, at most."""


class Trajectory:
    """A sampler's `on_step` that keeps images on their way, and writes them as trajectory.gif and trajectory.png.

    The GIF has x_t left and the predicted x0 right. In the grid each image has a row of x_t over a row of x0, with its
    steps from left to right.

    Args:
        active: whether this process draws the first chunk, the one that is shown.
        steps: of the walk.
        count: how many images of the chunk are shown.
    """

    def __init__(self, active: bool, steps: int, count: int = 16) -> None:
        self.active, self.count = active, count
        self.in_gif = set(range((steps - 1) % -(-steps // _FRAMES), steps, -(-steps // _FRAMES)))
        self.in_grid = set(np.linspace(0, steps - 1, min(steps, _COLUMNS)).round().astype(int).tolist())
        self.taken: dict[int, tuple[Pixels, Pixels]] = {}

    def __call__(self, index: int, x: torch.Tensor, x0: torch.Tensor) -> None:
        """Keep x_t and x0 after step `index`, if they are to be shown."""
        if self.active and index in self.in_gif | self.in_grid:
            x_t, predicted = (images.to_uint8(part[: self.count]).cpu().numpy() for part in (x, x0))
            self.taken[index] = (x_t, predicted)

    def close(self, folder: Path, suffix: str = "") -> None:
        """Write trajectory<suffix>.gif and .png once, after the first chunk."""
        if self.active and self.taken:
            frames = [_beside(*pair) for index, pair in self.taken.items() if index in self.in_gif]
            images.save_gif(folder / f"trajectory{suffix}.gif", frames, fps=12)
            steps = np.stack([pair for index, pair in self.taken.items() if index in self.in_grid])
            rows = steps[:, :, :_ROWS].transpose(2, 1, 0, 3, 4, 5)  # image, x_t or x0, step, C, H, W
            grid = images.grid(rows.reshape(-1, *rows.shape[3:]), columns=len(steps))
            images.save_png(folder / f"trajectory{suffix}.png", grid)
        self.active, self.taken = False, {}


def _beside(x_t: Pixels, x0: Pixels) -> Pixels:
    left, right = images.grid(x_t), images.grid(x0)
    return np.concatenate([left, np.full((*left.shape[:2], 8), 255, np.uint8), right], axis=2)
