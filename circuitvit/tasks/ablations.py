"""Ablations: what replaces a sender's output on an ablated edge.

These are descriptions only; `circuitvit.engine.references` computes the outputs they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from circuitvit._keywords import check_seed
from circuitvit.errors import FileError, OptionError, check_number, unknown_name

CONSTANTS_SCHEMA = "circuitvit.constants/1"


@dataclass(frozen=True)
class Patch:
    """The sender's output on the paired corrupt image: the field's default."""

    name: str = "patch"


@dataclass(frozen=True, eq=False)
class Mean:
    """The sender's mean output over a data set.

    Attributes:
        images: to average over (a folder, paths, or a tensor); by default all images of the task.
        per_token: one mean for each token (positions keep their meaning), or one over all tokens.
    """

    images: Tensor | str | Path | Sequence[str | Path] | None = None
    per_token: bool = True

    @property
    def name(self) -> str:
        return "mean" if self.per_token else "mean-tokens"


@dataclass(frozen=True)
class Zero:
    """Nothing: the edge adds zero. Far from what the model has seen, so effects tend to be exaggerated."""

    name: str = "zero"


@dataclass(frozen=True)
class Noise:
    """The sender's own output plus Gaussian noise.

    Attributes:
        scale: of the noise, in standard deviations of the sender's output on the image (over tokens and
            features).
        seed: the noise of an image depends on this and on the image's place in the task, not on the batch.
    """

    scale: float = 1.0
    seed: int = 0
    name: str = "noise"

    def __post_init__(self) -> None:
        check_number("the scale of noise", self.scale)
        check_seed(self.seed)


@dataclass(frozen=True)
class Resample:
    """The sender's output on another image of the task, drawn so that no image meets itself.

    Attributes:
        seed: of the draw.
    """

    seed: int = 0
    name: str = "resample"

    def __post_init__(self) -> None:
        check_seed(self.seed)


@dataclass(frozen=True, eq=False)
class Constants:
    """Given constants, such as those of `learn_constants` (optimal ablation).

    Attributes:
        values: `(sender, token, d_model)`, or `(sender, 1, d_model)` for the same at every token.
    """

    values: Tensor
    name: str = "constants"

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or not self.values.isfinite().all():
            raise OptionError(
                "constants are finite numbers of shape (sender, token or 1, d_model), "
                f"not {tuple(self.values.shape)}"
            )

    def save(self, path: str | Path) -> Path:
        """Write the constants as safetensors.

        Raises:
            FileError: if the file cannot be written.
        """
        try:
            save_file({"constants": self.values.contiguous()}, path, {"schema": CONSTANTS_SCHEMA})
        except (OSError, SafetensorError) as error:
            raise FileError(f"cannot write {path}: {error}") from error
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Constants:
        """Read constants that `save` has written.

        Raises:
            FileError: if the file is missing, damaged, or holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                schema = (file.metadata() or {}).get("schema")
                if schema != CONSTANTS_SCHEMA:
                    raise FileError(f"{path}: expected {CONSTANTS_SCHEMA!r}, found {schema!r}")
                return cls(file.get_tensor("constants"))
        except (OSError, SafetensorError, OptionError) as error:
            raise FileError(f"cannot read {path}: {error}") from error


Ablation = Patch | Mean | Zero | Noise | Resample | Constants

_BY_NAME: dict[str, Callable[[], Ablation]] = {
    "patch": Patch,
    "mean": Mean,
    "mean-tokens": lambda: Mean(per_token=False),
    "zero": Zero,
    "noise": Noise,
    "resample": Resample,
}


def same_ablation(one: object, other: object) -> bool:
    """Whether two ablations, or sources of images, are known to be the same: one object, or said alike."""
    if one is other:
        return True
    if isinstance(one, Mean) and isinstance(other, Mean):
        return one.per_token == other.per_token and same_ablation(one.images, other.images)
    return isinstance(one, (str, Path, Patch, Zero, Noise, Resample)) and one == other


def ablation_names() -> tuple[str, ...]:
    """Names of the ablations that can be asked for by name."""
    return tuple(_BY_NAME)


def as_ablation(spec: Ablation | str) -> Ablation:
    """An ablation from an ablation or its name.

    Raises:
        NameNotFoundError: for an unknown name.

    Example:
        >>> as_ablation("mean-tokens").per_token
        False
    """
    if isinstance(spec, Ablation):
        return spec
    if str(spec) not in _BY_NAME:
        raise unknown_name("ablation", spec, _BY_NAME)
    return _BY_NAME[spec]()
