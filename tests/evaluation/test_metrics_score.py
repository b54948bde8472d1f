import numpy as np
import pytest
import torch
from torchmetrics.image.inception import InceptionScore

from ddpm.distributed import World
from ddpm.errors import DataError
from ddpm.evaluation.inception_score import ScoreSums, inception_score
from ddpm.randomness import permutation


def _logits(n: int = 500, classes: int = 12) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, classes)) * 2.0


def _usual(logits: np.ndarray, splits: int) -> np.ndarray:
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        scores.append(np.exp(np.mean(np.sum(part * (np.log(part) - np.log(part.mean(0))), axis=1))))
    return np.array(scores)


def test_the_score_is_that_of_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    class Identity(torch.nn.Module):
        def forward(self, logits: torch.Tensor) -> torch.Tensor:
            return logits

    logits = _logits()
    with pytest.warns(UserWarning, match="will save all extracted features"):
        metric = InceptionScore(Identity(), splits=10)
    monkeypatch.setattr(torch, "randperm", torch.arange)
    metric.update(torch.from_numpy(logits))
    mean, deviation = (value.item() for value in metric.compute())
    found = inception_score(logits)
    assert found.value == pytest.approx(mean, rel=1e-9)
    assert found.deviation * np.sqrt(10 / 9) == pytest.approx(deviation, rel=1e-9)


@pytest.mark.parametrize(("n", "splits"), [(500, 10), (503, 10), (7, 7), (50, 1)])
def test_splits_are_cut_as_in_the_usual_formula(n: int, splits: int) -> None:
    scores = _usual(_logits(n), splits)
    found = inception_score(_logits(n), splits)
    assert found.value == pytest.approx(scores.mean(), rel=1e-12)
    assert found.deviation == pytest.approx(scores.std(), rel=1e-9, abs=1e-12)
    assert (found.low is None) == (splits == 1)


def test_a_seed_shuffles_before_the_cut() -> None:
    logits = _logits()
    expected = _usual(logits[permutation(3, 0, 500).numpy()], 10)
    assert inception_score(logits, seed=3).value == pytest.approx(expected.mean(), rel=1e-12)


def test_sure_and_even_predictions_score_the_number_of_classes_and_blind_ones_score_one() -> None:
    sure = np.where(np.eye(10, dtype=bool)[np.arange(200) % 10], 0.0, -np.inf)
    assert inception_score(sure, splits=4).value == pytest.approx(10.0, rel=1e-12)
    assert inception_score(np.zeros((200, 10)), splits=4).value == pytest.approx(1.0, rel=1e-12)


def test_batches_in_any_order_give_the_same_score() -> None:
    logits = _logits(300)
    sums = ScoreSums(300, 12, splits=7, seed=1)
    for first in (200, 0, 100):
        sums.add(torch.from_numpy(logits[first : first + 100]), first)
    assert sums.score().value == pytest.approx(inception_score(logits, 7, seed=1).value, rel=1e-12)


def test_processes_that_share_the_images_give_the_same_score() -> None:
    class Pair(World):
        """Adds what the other process holds, in the order of the calls."""

        def sum(self, value: torch.Tensor) -> torch.Tensor:
            return value + next(others)

    logits = _logits(300)
    ours, theirs = ScoreSums(300, 12, splits=7, seed=1), ScoreSums(300, 12, splits=7, seed=1)
    ours.add(logits[:130], first=0)
    theirs.add(logits[130:], first=130)
    others = map(torch.from_numpy, (theirs.counts, theirs.sums, theirs.negentropies))
    assert ours.over(Pair(0, 2)).score().value == pytest.approx(inception_score(logits, 7, seed=1).value, rel=1e-12)
    assert ours.over(World()).counts.sum() == 130


def test_bad_input_is_refused() -> None:
    with pytest.raises(DataError, match="10 splits"):
        inception_score(_logits(9))
    with pytest.raises(DataError, match="NaN"):
        inception_score(np.full((20, 3), np.nan))
    with pytest.raises(DataError, match="infinite"):
        inception_score(np.full((20, 3), -np.inf))
    sums = ScoreSums(20, 3, splits=2)
    with pytest.raises(DataError, match="announced"):
        sums.add(np.zeros((5, 3)), first=16)
    sums.add(np.zeros((5, 3)), first=0)
    with pytest.raises(DataError, match="15 of 20"):
        sums.score()
