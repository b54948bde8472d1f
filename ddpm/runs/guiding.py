"""Guidance at hand: its second models read from run folders, files and modules, checked, and on the device."""

import dataclasses
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ddpm import files
from ddpm.errors import ConfigError, DataError
from ddpm.evaluation.tiny_cnn import load_classifier
from ddpm.guidance import Drawable, Guidance, NoisyClassifier
from ddpm.models import GaussianDiffusion
from ddpm.registry import import_object
from ddpm.runs.loading import load
from ddpm.runtime import Runtime


@dataclass(eq=False)
class Guide:
    """A guidance, ready to be put around a model, and around any copy of it: guide(model) is the guided one.

    guidance: the component; classes: names of the classes that the guided model draws, () where it draws none;
    sha256: checksums of the second models' weights, by their written names (None: a class without weights).
    """

    guidance: Guidance
    machine: Runtime
    classes: tuple[str, ...]
    sha256: dict[str, str | None] = field(default_factory=dict)
    _diffusions: dict[tuple[str, str | None], GaussianDiffusion] = field(default_factory=dict)
    _classifiers: dict[str, NoisyClassifier] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        guidance: str | float | Guidance,
        model: GaussianDiffusion,
        classes: tuple[str, ...],
        machine: Runtime,
    ) -> "Guide":
        """Read the second models and see that they fit.

        Args:
            guidance: a component, its written form, or the weight of classifier-free guidance.
            model: what will be guided.
            classes: names of the classes that it was trained with; () without.
            machine: second models are placed on its device.

        Raises ConfigError, CheckpointError, DataError.
        """
        guide = cls(Guidance.parse(guidance), machine, classes if model.num_classes else ())
        guide(model)
        return guide

    def __call__(self, model: GaussianDiffusion) -> Drawable:
        """The guided model."""
        return self.guidance.wrap(model, self)

    @property
    def written(self) -> dict[str, Any]:
        """What recipe.json holds of it: the checksums only where there is a second model."""
        return {"guidance": self.guidance.written} | ({"guidance_sha256": self.sha256} if self.sha256 else {})

    @property
    def device(self) -> torch.device:
        """Where the second models are."""
        return self.machine.device

    @property
    def networks(self) -> list[nn.Module]:
        """Of the second models that denoise: what a prediction evaluates beside the model's own network."""
        return [model.network for model in self._diffusions.values()]

    def diffusion(self, source: str, ema: str | None) -> GaussianDiffusion:
        """The model of a run or checkpoint folder, kept."""
        if (source, ema) not in self._diffusions:
            found = load(Path(source).expanduser(), ema)
            if found.diffusion.num_classes:
                self._check_classes(source, found.classes)
            self.sha256[source] = found.weights_sha256
            self.machine.place(found.diffusion)
            self._diffusions[source, ema] = found.diffusion
        return self._diffusions[source, ema]

    def classifier(self, source: str) -> NoisyClassifier:
        """The classifier of a file, or an instance of `package.module:Class`, kept."""
        if source not in self._classifiers:
            self._classifiers[source] = self._imported(source) if is_code(source) else self._read(source)
        return self._classifiers[source]

    def _read(self, source: str) -> NoisyClassifier:
        path = Path(source).expanduser()
        if not path.is_file():
            raise DataError(
                f"--guidance classifier: {source} is no file; make one with `ddpm features train DATASET --noisy`, or name "
                "package.module:Class."
            )
        found = load_classifier(path)
        if not found.network.noisy:
            raise ConfigError(
                f"--guidance classifier: {source} knows no noise levels; train one with `ddpm features train DATASET --noisy`."
            )
        self._check_classes(source, found.classes)
        self.sha256[source] = files.sha256(path)
        self.machine.place(found.network)
        return found

    def _imported(self, source: str) -> NoisyClassifier:
        made = import_object(source, "--guidance classifier")
        try:
            found = made()
            count = int(found.num_classes)
        except Exception as error:  # whatever outside code raises
            raise ConfigError(
                f"--guidance classifier: {source} cannot be made ({type(error).__name__}: {error}); it needs a class that is made "
                "without arguments and has num_classes and noisy_logits(x_t, level)."
            ) from error
        self.classes = self.classes or tuple(map(str, range(count)))
        self.sha256[source] = None
        if isinstance(found, nn.Module):
            self.machine.place(found.eval().requires_grad_(False))
            self.sha256[source] = _checksum(found)
        return cast(NoisyClassifier, found)

    def _check_classes(self, source: str, classes: tuple[str, ...]) -> None:
        """A model without classes takes those of its guide; otherwise they must be the same, in their order."""
        self.classes = self.classes or classes
        if self.classes != classes:
            raise ConfigError(
                f"--guidance: {source} was trained with the classes {_some(classes)}, the guided model with "
                f"{_some(self.classes)}; they must be the same."
            )


def is_code(source: str) -> bool:
    """Whether this is `package.module:Class`, not a path."""
    return re.fullmatch(r"[\w.]+:[A-Za-z_]\w*", source) is not None


def absolute(guidance: Guidance) -> Guidance:
    """The same, with paths that hold in every working folder."""
    changes: dict[str, Any] = {}
    for option in dataclasses.fields(cast(Any, guidance)):
        value = getattr(guidance, option.name)
        if isinstance(value, Guidance):
            changes[option.name] = absolute(value)
        elif option.name == "model" and not is_code(value):
            changes["model"] = str(Path(value).expanduser().absolute())
    return cast(Guidance, dataclasses.replace(cast(Any, guidance), **changes))


def _checksum(module: nn.Module) -> str | None:
    """SHA-256 of the names and bits of its weights; None without weights."""
    digest, tensors = hashlib.sha256(), module.state_dict()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if tensors else None


def _some(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:3]) + (f", ... ({len(classes)})" if len(classes) > 3 else "")
