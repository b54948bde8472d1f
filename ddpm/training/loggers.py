"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio.

A sink may fail at any time (not installed, no network, full disk): it is warned of once and left out, training goes on.
Sinks are given the config and the metrics alone, never the environment.
"""

import netrc
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import ConfigError
from ddpm.registry import nearest

Pixels = NDArray[np.uint8]


class Sink(Protocol):
    """Receives what is logged; every method may raise."""

    def log(self, step: int, record: Mapping[str, float]) -> None:
        """Numbers of one step."""

    def image(self, step: int, name: str, image: Pixels) -> None:
        """A picture, uint8 (C, H, W)."""

    def close(self) -> None:
        """Write out what is pending."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run_dir: Path, project: str, run_name: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, record: Mapping[str, float]) -> None:
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Pixels) -> None:
        self._writer.add_image(name, image, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases, files in RUN/wandb: online with a key, else offline (`wandb sync` sends it later). A resumed run goes on there too."""

    def __init__(self, run_dir: Path, project: str, run_name: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._wandb: Any = wandb
        settings = self._wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            x_disable_meta=True,
            init_timeout=30,
            login_timeout=1,
        )
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        place = {
            "dir": str(run_dir),
            "id": _kept_id(run_dir / "wandb" / "id.txt"),
            "resume": "allow" if mode == "online" else None,
        }
        self._run: Any = self._wandb.init(
            project=project, name=run_name, config=dict(config), mode=mode, settings=settings, **place
        )

    def log(self, step: int, record: Mapping[str, float]) -> None:
        self._run.log(dict(record), step=step)

    def image(self, step: int, name: str, image: Pixels) -> None:
        self._run.log({name: self._wandb.Image(_channels_last(image))}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """trackio's local database; a resumed run goes on under its name."""

    def __init__(self, run_dir: Path, project: str, run_name: str, config: Mapping[str, Any]) -> None:
        import trackio

        self._trackio: Any = trackio
        self._run: Any = self._trackio.init(
            project=project,
            name=run_name,
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, record: Mapping[str, float]) -> None:
        self._run.log(dict(record), step=step)

    def image(self, step: int, name: str, image: Pixels) -> None:
        self._run.log({name: self._trackio.Image(_channels_last(image))}, step=step)

    def close(self) -> None:
        self._run.finish()


SINKS: dict[str, Callable[[Path, str, str, Mapping[str, Any]], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
"""Name in --logging.sinks -> opener(run_dir, project, run_name, config)."""


class SinkGroup:
    """Several sinks as one that never raises."""

    def __init__(self, sinks: Mapping[str, Sink], warn: Callable[[str], None]) -> None:
        self._sinks = dict(sinks)
        self._warn = warn

    @property
    def names(self) -> list[str]:
        """Sinks that still work."""
        return list(self._sinks)

    def log(self, step: int, record: Mapping[str, float]) -> None:
        """Numbers of one step, to every sink that still works."""
        self._each(lambda sink: sink.log(step, record))

    def image(self, step: int, name: str, image: Pixels) -> None:
        """A picture, uint8 (C, H, W), to every sink that still works."""
        self._each(lambda sink: sink.image(step, name, image))

    def close(self) -> None:
        """Close every sink; the group stays usable and empty."""
        self._each(lambda sink: sink.close())
        self._sinks = {}

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                call(sink)
            except Exception as error:
                del self._sinks[name]
                self._warn(_dropped(name, error))


def check_names(names: Sequence[str]) -> None:
    """Raise ConfigError for a name that is no sink."""
    for name in names:
        if name not in SINKS:
            raise ConfigError(
                f"--logging.sinks: {name!r} is not known{nearest(name, SINKS)}; choose from {', '.join(SINKS)}."
            )


def open_sinks(
    names: Sequence[str],
    run_dir: Path,
    project: str,
    run_name: str,
    config: Mapping[str, Any],
    warn: Callable[[str], None],
) -> SinkGroup:
    """Open each named sink; one that cannot be opened is told to `warn` and left out. Raises ConfigError for an unknown name."""
    check_names(names)
    opened: dict[str, Sink] = {}
    for name in dict.fromkeys(names):
        try:
            opened[name] = SINKS[name](run_dir, project, run_name, config)
        except Exception as error:
            warn(_dropped(name, error))
    return SinkGroup(opened, warn)


def _dropped(name: str, error: Exception) -> str:
    why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    install = f"; pip install {name}" if isinstance(error, ImportError) else ""
    return f"the sink {name!r} is left out from here on ({why}{install}); metrics.jsonl has everything."


def _channels_last(image: Pixels) -> Pixels:
    """(C, H, W) -> (H, W, 3); grey is repeated."""
    return np.ascontiguousarray(np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0))


def _has_wandb_key() -> bool:
    """Whether W&B could log in without asking (the key itself is not looked at)."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _kept_id(path: Path) -> str:
    """An id made once per run folder."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12], encoding="ascii")
    return path.read_text(encoding="ascii").strip()
