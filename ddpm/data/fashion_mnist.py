"""Fashion-MNIST: articles of clothing, 60,000 + 10,000 grey 28x28 images."""

from pathlib import Path

from ddpm.config import DataConfig
from ddpm.data.base import Dataset, ImageSet
from ddpm.data.idx import IdxFiles
from ddpm.files import Progress
from ddpm.registry import register

FILES = IdxFiles(
    name="fashion-mnist",
    alias="FashionMNIST",
    url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    sha256={
        "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
    classes=("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    folders=(Path("/usr/share/datasets/fashion-mnist"),),  # Debian's package dataset-fashion-mnist
)


@register("fashion-mnist")
class FashionMnist(Dataset):
    """Articles of clothing (Xiao, Rasul and Vollgraf, 2017; MIT licence), from four IDX files."""

    reads = ("path",)

    def load(self, config: DataConfig) -> ImageSet:
        return self.prepare(config)

    def prepare(self, config: DataConfig, progress: Progress | None = None) -> ImageSet:
        return FILES.load(config, progress)
