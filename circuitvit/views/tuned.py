"""The tuned lens: a logit lens that has learned the language of each layer.

Layers write in bases of their own, which the readout was never trained to read; so the logit lens of an early
layer says little of what is known there. A tuned lens has one affine map for each position of the stream,
trained on the model's own outputs (no labels) so that the readout, after the map, comes as near to the final
output as it can:

    minimise  KL(model's output || readout(x + (x - mean) W' + b)) + strength * |W|^2

Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv:2303.08112.

Maps begin at the identity and are trained on the tokens that the readout reads: the class token of most
models, all tokens of one that pools. A few hundred images are fewer than the numbers of a map, so each
position keeps the strength and the epoch that come nearest to the output on images that it is not fitted
to; and what is reported is of images that nothing was fitted to or chosen by. What a tuned lens reads off a
layer can be told from it. It is not yet what the model uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import memory_budget, progress_bar, refuse_inference_mode
from circuitvit.errors import FileError, OptionError, check_number, check_whole
from circuitvit.export.style import MUTED
from circuitvit.graph.files import COUNT, TEXT, check_version, record, write_bytes
from circuitvit.graph.results import Record, Result, cells
from circuitvit.models import Model
from circuitvit.tasks.images import ImageSpec
from circuitvit.verification.statistics import MIN_PAIRS, Estimate, mean_interval, share_interval
from circuitvit.views.lens import LogitLens, logit_lens, position_index, refuse_without_classes
from circuitvit.views.subjects import images_of
from circuitvit.views.tuned_training import Source, affine, compared, split, trained

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

SCHEMA = "circuitvit.tuned_lens/1"

LensName = Literal["logit", "tuned"]
LENSES: tuple[LensName, ...] = get_args(LensName)

_NAMES = {"type": "array", "items": TEXT}
_FILE = record(
    "schema model weights positions tokens images fitted strengths epochs",
    schema={"const": SCHEMA},
    model=TEXT,
    weights=TEXT,
    positions=_NAMES,
    tokens=_NAMES,
    images=_NAMES,
    fitted=COUNT,
    strengths={"type": "array", "items": {"type": "number"}},
    epochs={"type": "array", "items": COUNT},
)


@dataclass(frozen=True, eq=False, repr=False)
class LensAgreement(Result):
    """How near the logit lens and a tuned lens come to the model's own output, image by image.

    Attributes:
        positions: "embedding", then "layer 0" and so on.
        images: names of the images.
        kl: `(lens, position, image)`: KL divergence of the lens from the output, nats; the logit lens first.
        agrees: `(lens, position, image)`: whether the lens has the output's top class.
    """

    positions: tuple[str, ...]
    images: tuple[str, ...]
    kl: Float[NDArray[np.float64], "2 position image"]
    agrees: Bool[NDArray[np.bool_], "2 position image"]

    along = "positions:position images:image"

    def records(self) -> Iterator[Record]:
        """One row for each `lens` ("logit" or "tuned"), `position` and `image`: the `kl` divergence from the
        output in nats, and whether the lens `agrees` with its top class."""
        axes = {"lens": LENSES, "position": self.positions, "image": self.images}
        return cells(axes, kl=self.kl, agrees=self.agrees)

    def kl_of(self, lens: LensName, position: int | str) -> Estimate:
        """The mean KL divergence from the output at a position, with its interval over images, nats."""
        return mean_interval(self.kl[LENSES.index(lens), position_index(self.positions, position)])

    def agreement_of(self, lens: LensName, position: int | str) -> Estimate:
        """The share of images whose top class is the output's at a position, with its interval."""
        return share_interval(self.agrees[LENSES.index(lens), position_index(self.positions, position)])

    def gain(self, position: int | str) -> Estimate:
        """By how many nats the tuned lens is nearer to the output, with its interval over images."""
        place = position_index(self.positions, position)
        return mean_interval(self.kl[0, place] - self.kl[1, place])

    def table(self) -> list[list[str]]:
        """By position: KL of the logit lens, of the tuned lens, and the shares of images that agree."""
        return [
            [name, *(str(of(lens, name)) for of in (self.kl_of, self.agreement_of) for lens in LENSES)]
            for name in self.positions
        ]

    def figure(self) -> Picture:
        """Both lenses along the layers: KL from the output, and agreement with its top class; intervals as
        bands.
        """
        from circuitvit.views import canvas

        steps = np.arange(len(self.positions))
        names = ["E" if name == "embedding" else name.removeprefix("layer ") for name in self.positions]
        panels = ((self.kl_of, "KL from the model's output (nats)"), (self.agreement_of, "same top class"))
        with canvas.styled():
            figure = canvas.blank(6.6, 2.9, f"Logit lens and tuned lens, {len(self.images)} images")
            for axes, (of, title) in zip(figure.subplots(1, 2), panels, strict=True):
                for lens, colour in zip(LENSES, (MUTED, canvas.PALETTE[0]), strict=True):
                    found = [of(lens, name) for name in self.positions]
                    values = [each.value for each in found]
                    axes.plot(steps, values, color=colour, marker="o", markersize=2.5, linewidth=1.2,
                              label=f"{lens} lens")  # fmt: skip
                    low = [each.value if each.low is None else each.low for each in found]
                    high = [each.value if each.high is None else each.high for each in found]
                    axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
                axes.set_title(title)
                axes.set_xticks(steps, names)
                axes.grid(axis="y", color="#E5E7EB", linewidth=0.5)
                axes.set_ylim(bottom=0)
                axes.set_xlabel("after layer (E: embedding)")
                axes.legend(frameon=False)
        return figure

    def __repr__(self) -> str:
        means = [self.kl[place].mean(axis=1)[:-1] for place in range(len(LENSES))]
        better = int((means[1] < means[0]).sum())
        return (
            f"LensAgreement({len(self.images)} images: the tuned lens is nearer to the output at {better} of "
            f"{len(self.positions) - 1} positions before the last)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class TunedLens(Result):
    """An affine map for each position of a model's stream.

    Attributes:
        model: name of the model.
        weights_hash: of the model, edits included.
        positions: "embedding", then "layer 0" and so on.
        weight: `(position, d_model, d_model)`, from the stream to what the readout is given; of the last
            position the identity.
        bias: `(position, d_model)`.
        tokens: kinds of the tokens that it was trained on.
        fitted: number of images that the maps were fitted to.
        strengths: of the pull to the identity that each position kept.
        epochs: after which each position was nearest to the output; 0 is the identity.
        held_out: both lenses on images that were neither fitted to nor chosen by.
    """

    model: str
    weights_hash: str
    positions: tuple[str, ...]
    weight: Float[Tensor, "position d_model d_model"]
    bias: Float[Tensor, "position d_model"]
    tokens: tuple[str, ...]
    fitted: int
    strengths: tuple[float, ...]
    epochs: tuple[int, ...]
    held_out: LensAgreement

    def records(self) -> Iterator[Record]:
        """What it reached on the held-out images, see `LensAgreement.records`."""
        return self.held_out.records()

    def check(self, model: Model, positions: Sequence[str] | None = None) -> None:
        """Refuse a model that the lens was not trained for. Edits of its model are read as well.

        Raises:
            OptionError: if the weights are others, or there are no maps for some of the positions.
        """
        model.refresh()
        known = {each.weights_hash for each in (model, model.bare) if each is not None}
        if self.weights_hash not in known:
            raise OptionError(
                f"this tuned lens was trained on {self.model} ({self.weights_hash[:12]}), and the model is "
                f"{model.name} ({model.weights_hash[:12]}): train one for it with cv.tuned_lens"
            )
        for name in positions or ():
            if name not in self.positions:
                raise OptionError(f"a tuned lens has no map after {name}: leave detail at 'layer'")

    def mapped(self, position: str, stream: Tensor) -> Float[Tensor, "image token d_model"]:
        """A stream at a position as it would look at the end; of all tokens, whichever it was trained on."""
        place = position_index(self.positions, position)
        if place == len(self.positions) - 1:
            return stream
        return affine(self.weight[place], self.bias[place], stream)

    def apply(self, model: Model, images: ImageSpec, **options: Any) -> LogitLens:
        """The lens on images, with all tables and figures of a logit lens: `logit_lens(..., tuned=self)`."""
        return logit_lens(model, images, tuned=self, **options)

    @running
    def measure(
        self, model: Model, images: ImageSpec, *, batch_size: int | None = None, progress: bool = True
    ) -> LensAgreement:
        """Both lenses on other images.

        Raises:
            OptionError: if the lens was trained for another model, or edits are for single images.
            DataError: for images that cannot be used.
        """
        self.check(model)
        _refuse_single(model)
        found = images_of(model, images)
        source = Source(model, found)
        with progress_bar(len(found), "lenses", progress, unit="image") as bar:
            return _agreement(source, np.arange(len(found)), self.weight, self.bias, batch_size or 32, bar)

    @property
    def caveats(self) -> tuple[str, ...]:
        """What to keep in mind about this lens."""
        found = []
        if len(self.held_out.images) < MIN_PAIRS:
            found.append("too few held-out images for intervals")
        if "patch" not in self.tokens:
            found.append(
                f"the maps were trained on {'+'.join(self.tokens)} alone: of patches they show what the "
                "readout would make of such a token there, outside of what they were trained on"
            )
        gains = {name: self.held_out.gain(name) for name in self.positions[:-1]}
        level = [name for name, gain in gains.items() if (gain.value if gain.low is None else gain.low) <= 0]
        if level:
            found.append(f"not surely nearer to the output than the logit lens: {', '.join(level)}")
        return tuple(found)

    def figure(self) -> Picture:
        """Both lenses on the held-out images, along the layers."""
        return self.held_out.figure()

    # -- a file --------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the lens, and what it reached on the held-out images, as one safetensors file.

        The ending `.csv` writes the table of `records`.

        Raises:
            FileError: if it cannot be written.
        """
        if Path(path).suffix == ".csv":
            return super().save(path)
        said = {
            "schema": SCHEMA,
            "model": self.model,
            "weights": self.weights_hash,
            "positions": self.positions,
            "tokens": self.tokens,
            "images": self.held_out.images,
            "fitted": self.fitted,
            "strengths": self.strengths,
            "epochs": self.epochs,
        }
        measured = {name: torch.from_numpy(getattr(self.held_out, name)) for name in ("kl", "agrees")}
        tensors = {"weight": self.weight, "bias": self.bias, **measured}
        content = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
        return write_bytes(path, save(content, {"tuned_lens": json.dumps(said)}))

    @classmethod
    def load(cls, path: str | Path, model: Model) -> TunedLens:  # type: ignore[override]  # it is the model's
        """Read a lens that `save` has written.

        Raises:
            FileError: if the file is missing, damaged, or no tuned lens.
            OptionError: if it was trained for another model.
        """
        path = Path(path)
        if not path.is_file():
            raise FileError(f"cannot read the tuned lens {path}: there is no such file")
        try:
            with safe_open(path, "pt") as opened:
                said = json.loads((opened.metadata() or {}).get("tuned_lens", "null"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise FileError(f"{path} is no tuned lens, or a damaged one: {error}") from error
        if not isinstance(said, dict):
            raise FileError(f"{path} is no tuned lens that TunedLens.save wrote")
        check_version(path, said, _FILE, SCHEMA)
        _check_tensors(path, said, tensors)
        positions, images = tuple(said["positions"]), tuple(said["images"])
        lens = cls(
            said["model"],
            said["weights"],
            positions,
            tensors["weight"],
            tensors["bias"],
            tuple(said["tokens"]),
            said["fitted"],
            tuple(said["strengths"]),
            tuple(said["epochs"]),
            LensAgreement(positions, images, tensors["kl"].numpy(), tensors["agrees"].numpy()),
        )
        lens.check(model)
        return lens

    def __repr__(self) -> str:
        return (
            f"TunedLens({self.model}: {len(self.positions)} positions, fitted to {self.fitted} images on "
            f"{'+'.join(self.tokens)}, {self.held_out!r})"
        )


@running
def tuned_lens(
    model: Model,
    images: ImageSpec,
    *,
    held_out: float = 0.25,
    epochs: int = 30,
    seed: int = 0,
    batch_size: int = 32,
    memory: int | str | None = None,
    progress: bool = True,
) -> TunedLens:
    """Train a tuned lens on images, without labels, and measure it on some that are held out.

    Args:
        model: from `load` or `wrap`, or an edited one; it stays as it is.
        images: of the kind that the lens will be used on, 33 or more; a few hundred are usual. Files are read
            a batch at a time.
        held_out: the share of images that the lens is measured on, and that nothing is fitted to or chosen
            by. A fifth of the others chooses strengths and epochs.
        epochs: how often the images are gone through.
        seed: of the split and of the order of steps.
        batch_size: images for each step, which run at once; another number gives another lens.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        OptionError: for a model without classes or with one logit, edits that are for single images, and
            settings out of range.
        DataError: for too few images, or some that cannot be used.
        ModelError: if the model gives NaN or infinite logits.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> images = torch.cat([*catdog_pairs(40, seed=0)])
        >>> lens = tuned_lens(cv.load("catdog-tiny"), images, epochs=5, progress=False)
        >>> lens.held_out.kl.shape, lens.held_out.gain("layer 1").value > 0
        ((2, 5, 20), True)
    """
    refuse_inference_mode()
    refuse_without_classes(model)
    if not model.chooses:
        raise OptionError(f"{model.name} has one logit, so that there is no KL divergence between outputs")
    check_whole("the number of epochs", epochs)
    check_number("the share of images that is held out", held_out, 0, 1)
    _refuse_single(model)
    found = images_of(model, images)
    rng = np.random.default_rng(seed)
    measured, choosing, fitted = split(len(found), held_out, rng)
    source = Source(model, found, memory_budget(model, memory))
    kinds = model.token_kinds(model.n_tokens)[: model.leading]
    steps = len(fitted) * (epochs + 1) + len(measured)
    with progress_bar(steps, "tuned lens", progress, unit=model.preprocessing.what) as bar:
        weight, bias, strengths, best = trained(source, fitted, choosing, batch_size, epochs, rng, bar)
        agreement = _agreement(source, measured, weight, bias, batch_size, bar)
    return TunedLens(
        model.name,
        model.weights_hash,
        agreement.positions,
        weight,
        bias,
        tuple(dict.fromkeys(kinds)),
        len(fitted),
        strengths,
        best,
        agreement,
    )


# -- inside --------------------------------------------------------------------------------------


def _refuse_single(model: Model) -> None:
    """Refuse edits that hold for some images, in their order, and no others."""
    for change in model.edits:
        if change.images is not None:
            raise OptionError(
                f"an edit of {model.name} has a value for each of {change.images} images, and a tuned lens "
                "is trained on any: train it on the model without the edit, and apply it to the edited one"
            )


def _agreement(
    source: Source, rows: NDArray[np.int64], weight: Tensor, bias: Tensor, size: int, bar: Any
) -> LensAgreement:
    kl, agrees = compared(source, rows, weight, bias, size, bar)
    return LensAgreement(tuple(source.places.values()), source.named(rows), kl, agrees)


def _check_tensors(path: Path, said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that are not what a file says of itself.

    Raises:
        FileError: naming the file.
    """
    places, images = len(said["positions"]), len(said["images"])
    width = tensors["weight"].shape[-1] if "weight" in tensors else 0
    shapes = {
        "weight": (places, width, width),
        "bias": (places, width),
        "kl": (len(LENSES), places, images),
        "agrees": (len(LENSES), places, images),
    }
    fits = {name: tuple(each.shape) for name, each in tensors.items()} == shapes and images > 0
    if (
        not fits
        or {len(said["strengths"]), len(said["epochs"])} != {places}
        or tensors["agrees"].dtype != torch.bool
    ):
        raise FileError(f"{path} is no tuned lens: its tensors do not fit what it says of itself")
    if not all(each.isfinite().all() for each in tensors.values()):
        raise FileError(f"{path} holds NaN or infinite values")
