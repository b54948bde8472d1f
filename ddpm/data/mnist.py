"""MNIST: handwritten digits, 60,000 + 10,000 grey 28x28 images."""

from ddpm.config import DataConfig
from ddpm.data.base import Dataset, ImageSet
from ddpm.data.idx import IdxFiles
from ddpm.files import Progress
from ddpm.registry import register

FILES = IdxFiles(
    name="mnist",
    alias="MNIST",
    url="https://ossci-datasets.s3.amazonaws.com/mnist",
    sha256={
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    classes=tuple("0123456789"),
)


@register("mnist")
class Mnist(Dataset):
    """Handwritten digits (LeCun, Bottou, Bengio and Haffner, 1998), from four IDX files."""

    reads = ("path",)

    def load(self, config: DataConfig) -> ImageSet:
        return self.prepare(config)

    def prepare(self, config: DataConfig, progress: Progress | None = None) -> ImageSet:
        return FILES.load(config, progress)
