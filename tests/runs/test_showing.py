"""`ddpm info` and `ddpm data`: what is there, in numbers that are counted elsewhere."""

import numpy as np
import pytest

from ddpm import images, runs
from ddpm.config import DataConfig
from ddpm.data import ImageSet
from ddpm.errors import CheckpointError


def table(out: str) -> dict[str, str]:
    return {name.strip(): value.strip() for name, _, value in (line.partition("  ") for line in out.splitlines())}


def test_info_of_a_run(trained, capsys):
    runs.info(trained)
    out = capsys.readouterr().out
    rows = table(out)
    parameters = sum(p.numel() for p in runs.load(trained).diffusion.parameters())
    assert rows["parameters"] == f"{parameters:,}"
    assert rows["step"] == "6 of 6"
    assert rows["images seen"] == "48"
    assert rows["image"] == "1 x 8 x 8"
    assert rows["classes"] == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert rows["moving averages"] == "0.9, 0.5"
    assert rows["data"] == "digits, 1,442 images"
    assert rows["checkpoints"] == "step-00000003, step-00000006"
    assert rows["last loss"].endswith(" at step 6")
    assert rows["train.batch_size"] == "8"


def test_info_of_a_named_checkpoint_and_of_nothing(trained, tmp_path, capsys):
    runs.info(trained / "checkpoints/step-00000003")
    assert table(capsys.readouterr().out)["step"] == "3 of 6"
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        runs.info(tmp_path)


def test_data_info_counts_every_class(digits, tmp_path, capsys):
    found = runs.data_info(DataConfig(dataset="digits", split="all"), tmp_path / "sheet.png")
    assert len(found) == len(digits) == 1797
    out = capsys.readouterr().out
    counts = np.bincount(digits.labels)
    assert [line.split() for line in out.splitlines() if line[:1].isdigit()] == [
        [str(k), str(k), str(counts[k])] for k in range(10)
    ]
    np.testing.assert_array_equal(images.read_image(tmp_path / "sheet.png"), runs.contact_sheet(digits))


def test_data_prepare_gives_the_same(capsys):
    assert len(runs.data_prepare(DataConfig(dataset="digits", split="test"))) == 355


def test_the_contact_sheet_has_a_row_a_class_with_blanks_where_images_end(digits):
    labels = np.array([0, 0, 2])
    few = ImageSet("few", digits.images[:3], labels, ("a", "b", "c"))
    blank = np.full((1, 8, 8), 255, np.uint8)
    rows = [few.images[0], few.images[1], *[blank] * 8, *[blank] * 10, few.images[2], *[blank] * 9]
    np.testing.assert_array_equal(runs.contact_sheet(few), images.grid(np.stack(rows), 10))
    plain = ImageSet("plain", digits.images[:120])
    np.testing.assert_array_equal(runs.contact_sheet(plain), images.grid(digits.images[:100], 10))
