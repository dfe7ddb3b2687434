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
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from circuitvit.engine import capture, progress_bar, refuse_inference_mode
from circuitvit.errors import DataError, FileError, ModelError, OptionError, check_number, check_whole
from circuitvit.export.style import MUTED
from circuitvit.graph.files import COUNT, TEXT, check_version, record, write_bytes
from circuitvit.models import Model, through
from circuitvit.tasks.images import Images, ImageSpec
from circuitvit.verification.statistics import MIN_PAIRS, Estimate, mean_interval, share_interval
from circuitvit.views.lens import LogitLens, logit_lens, position_index, positions_of, refuse_without_classes
from circuitvit.views.subjects import images_of

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

SCHEMA = "circuitvit.tuned_lens/1"

LensName = Literal["logit", "tuned"]
LENSES: tuple[LensName, ...] = get_args(LensName)

STRENGTHS = (0.0, 0.01, 0.1)
"""Of the pull to the identity, in nats for each unit of `|W|^2`; each position keeps the one that serves."""

STEP, SHIFT_STEP = 0.01, 0.1
"""Steps of AdamW for `W`, and for `b` in units of the last stream's spread; both fall to 0 by a cosine."""

CHOOSE = 5
"""Of the images that are not held out every so many-th is not fitted to, but chooses strength and epoch."""

MEMORY = 2**30
"""Bytes of streams that are kept between epochs; others are computed anew."""

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
class LensAgreement:
    """How near the logit lens and a tuned lens come to the model's own output, image by image.

    Attributes:
        positions: "embedding", then "layer 0" and so on.
        images: names of the images.
        kl: `(lens, position, image)`: KL divergence of the lens from the output, nats; the logit lens first.
        agrees: `(lens, position, image)`: whether the lens has the output's top class.
    """

    positions: tuple[str, ...]
    images: tuple[str, ...]
    kl: NDArray[np.float64]
    agrees: NDArray[np.bool_]

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
            figure = canvas.blank(6.6, 2.9, f"Logit lens and tuned lens, {len(self.images)} held-out images")
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
class TunedLens:
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
        return _affine(self.weight[place], self.bias[place], stream)

    def apply(self, model: Model, images: ImageSpec, **options: Any) -> LogitLens:
        """The lens on images, with all tables and figures of a logit lens: `logit_lens(..., tuned=self)`."""
        return logit_lens(model, images, tuned=self, **options)

    def measure(
        self, model: Model, images: ImageSpec, *, batch_size: int = 32, progress: bool = True
    ) -> LensAgreement:
        """Both lenses on other images.

        Raises:
            OptionError: if the lens was trained for another model, or edits are for single images.
            DataError: for images that cannot be used.
        """
        check_whole("the batch size (batch_size)", batch_size)
        self.check(model)
        _refuse_single(model)
        found = images_of(model, images)
        source = _Source(model, found)
        with progress_bar(len(found), "lenses", progress, unit="image") as bar:
            return _measured(source, np.arange(len(found)), self.weight, self.bias, batch_size, bar)

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

    def save(self, path: str | Path) -> None:
        """Write the lens, and what it reached on the held-out images, as one safetensors file.

        Raises:
            FileError: if it cannot be written.
        """
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
        write_bytes(path, save(content, {"tuned_lens": json.dumps(said)}))

    @classmethod
    def load(cls, path: str | Path, model: Model) -> TunedLens:
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


def tuned_lens(
    model: Model,
    images: ImageSpec,
    *,
    held_out: float = 0.25,
    epochs: int = 30,
    batch_size: int = 32,
    memory: int = MEMORY,
    seed: int = 0,
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
        batch_size: images for each step, which run at once; another number gives another lens.
        memory: bytes of streams that are kept; those beyond are computed anew in every epoch.
        seed: of the split and of the order of steps.
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
    for name, number in (("the number of epochs", epochs), ("the batch size (batch_size)", batch_size)):
        check_whole(name, number)
    check_whole("the memory", memory, 0)
    check_whole("a seed", seed, 0)
    check_number("the share of images that is held out", held_out, 0, 1)
    _refuse_single(model)
    found = images_of(model, images)
    rng = np.random.default_rng(seed)
    measured, choosing, fitted = _split(len(found), held_out, rng)
    source = _Source(model, found, memory)
    kinds = model.token_kinds(model.n_tokens)[: model.leading]
    steps = len(fitted) * (epochs + 1) + len(measured)
    with progress_bar(steps, "tuned lens", progress, unit=model.preprocessing.what) as bar:
        weight, bias, strengths, best = _trained(source, fitted, choosing, batch_size, epochs, rng, bar)
        agreement = _measured(source, measured, weight, bias, batch_size, bar)
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


# -- images and streams --------------------------------------------------------------------------


def _refuse_single(model: Model) -> None:
    """Refuse edits that hold for some images, in their order, and no others."""
    for change in model.edits:
        if change.images is not None:
            raise OptionError(
                f"an edit of {model.name} has a value for each of {change.images} images, and a tuned lens "
                "is trained on any: train it on the model without the edit, and apply it to the edited one"
            )


def _split(count: int, held_out: float, rng: np.random.Generator) -> tuple[NDArray[np.int64], ...]:
    """The images to measure on, to choose by and to fit to.

    Raises:
        DataError: if one of them would have too few.
    """
    measured = round(count * held_out)
    choosing = round((count - measured) / CHOOSE)
    if min(measured, choosing) < MIN_PAIRS:
        raise DataError(
            f"{count} images with {measured} held out and {choosing} to choose by are too few for a tuned "
            f"lens: each needs {MIN_PAIRS}, so give 33 or more; a few hundred are usual"
        )
    rows = rng.permutation(count)
    held, choice, fitted = np.split(rows, [measured, measured + choosing])
    return held, choice, fitted


class _Source:
    """Streams and outputs of batches of images; kept as long as there is room, else computed anew.

    Args:
        model: whose.
        images: all of them.
        memory: bytes to keep.
    """

    def __init__(self, model: Model, images: Images, memory: int = 0) -> None:
        self.model, self.images, self.memory = model, images, memory
        self.places = positions_of(model, "layer")
        self._readout = model.essential[model.reading :]
        self._kept: dict[bytes, tuple[list[Tensor], Tensor]] = {}

    def __call__(self, rows: NDArray[np.int64]) -> tuple[list[Tensor], Float[Tensor, "image class"]]:
        """What the readout could read at each position, `(image, token, d_model)`, and log probabilities."""
        kept = self._kept.get(rows.tobytes())
        if kept is not None:
            return kept
        taken = torch.cat([self.images.take(int(row), int(row) + 1) for row in rows])
        run = capture(self.model, taken.to(self.model.device, self.model.dtype), essential=True)
        bad = ~run.logits.isfinite().all(dim=-1)
        if bad.any():
            name = self.images.names[int(rows[int(bad.nonzero()[0])])]
            raise ModelError(f"the logits of {name} are NaN or infinite: check the weights and the image")
        streams = [run.stream(place)[:, : self.model.leading].clone() for place in self.places]
        found = streams, run.logits.float().log_softmax(dim=-1)
        size = sum(each.numel() * each.element_size() for each in (*streams, found[1]))
        if size <= self.memory:
            self.memory -= size
            self._kept[rows.tobytes()] = found
        return found

    def read(self, streams: Float[Tensor, "*map image token d_model"]) -> Float[Tensor, "*map image class"]:
        """Log probabilities of what the model's readout makes of streams."""
        logits = through(self._readout, streams.flatten(0, -3).to(self.model.dtype))
        return logits.float().log_softmax(dim=-1).view(*streams.shape[:-2], -1)


def _batches(rows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _divergence(wanted: Tensor, read: Tensor) -> Float[Tensor, "*map image"]:
    """KL of what is read from what is wanted, both log probabilities `(..., image, class)`, in nats."""
    return F.kl_div(read, wanted.expand_as(read), reduction="none", log_target=True).sum(dim=-1)


def _affine(weight: Tensor, bias: Tensor, stream: Tensor) -> Float[Tensor, "image token d_model"]:
    precise = torch.promote_types(stream.dtype, weight.dtype)
    weight, bias = weight.to(stream.device, precise), bias.to(stream.device, precise)
    return (stream.to(precise) @ weight.T + bias).to(stream.dtype)


@torch.no_grad()
def _measured(
    source: _Source,
    rows: NDArray[np.int64],
    weight: Float[Tensor, "position d_model d_model"],
    bias: Float[Tensor, "position d_model"],
    size: int,
    bar: Any,
) -> LensAgreement:
    """Both lenses on some of the images."""
    positions = tuple(source.places.values())
    parts: list[tuple[Tensor, Tensor]] = []
    for batch in _batches(rows, size):
        streams, wanted = source(batch)
        mapped = [_affine(*each) for each in zip(weight, bias, streams, strict=True)]
        mapped[-1] = streams[-1]
        read = torch.stack([torch.stack([source.read(one) for one in each]) for each in (streams, mapped)])
        agrees = read.argmax(dim=-1) == wanted.argmax(dim=-1)
        parts.append((_divergence(wanted, read).double().cpu(), agrees.cpu()))
        bar.update(len(batch))
    kl, same = (torch.cat(each, dim=-1).numpy() for each in zip(*parts, strict=True))
    return LensAgreement(positions, tuple(source.images.names[row] for row in rows), kl, same)


# -- training ------------------------------------------------------------------------------------


def _trained(
    source: _Source,
    fitted: NDArray[np.int64],
    choosing: NDArray[np.int64],
    size: int,
    epochs: int,
    rng: np.random.Generator,
    bar: Any,
) -> tuple[Tensor, Tensor, tuple[float, ...], tuple[int, ...]]:
    """Weights, biases, strengths and epochs by position; those of the last are the identity.

    All strengths are trained side by side, and each position is a problem of its own.
    """
    batches = _batches(fitted, size)
    centres, spread = _centred(source, batches, bar)
    n_places, width = centres.shape
    shape = len(STRENGTHS), n_places - 1, width
    weights = torch.zeros(*shape, width, device=centres.device, requires_grad=True)
    shifts = torch.zeros(*shape, device=centres.device, requires_grad=True)
    pull = torch.tensor(STRENGTHS, device=centres.device)
    optimizer = torch.optim.AdamW(
        [{"params": [weights], "lr": STEP}, {"params": [shifts], "lr": SHIFT_STEP}], weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))

    def divergences(batch: NDArray[np.int64]) -> Iterator[Float[Tensor, "strength image"]]:
        streams, wanted = source(batch)
        for place, stream in enumerate(streams[:-1]):
            plain = stream.float()
            turned = (plain - centres[place]) @ weights[:, place, None].mT
            yield _divergence(wanted, source.read(plain + turned + spread * shifts[:, place, None, None]))

    best = _Best(weights, shifts)
    for epoch in range(epochs + 1):
        with torch.no_grad():
            found = [torch.stack([*divergences(batch)]).sum(dim=-1) for batch in _batches(choosing, size)]
        best.look(epoch, torch.stack(found).sum(dim=0), weights, shifts)
        if epoch == epochs:
            break
        for number in rng.permutation(len(batches)):
            optimizer.zero_grad()
            with torch.enable_grad():
                for place, divergence in enumerate(divergences(batches[number])):
                    penalty = pull @ weights[:, place].square().sum(dim=(-2, -1))
                    loss = divergence.mean(dim=-1).sum() + penalty
                    loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            bar.update(len(batches[number]))
    eye = torch.eye(width, device=centres.device)
    weight = torch.cat([eye + best.weights, eye[None]])
    bias = spread * best.shifts - torch.einsum("pij,pj->pi", best.weights, centres[:-1])
    bias = torch.cat([bias, torch.zeros_like(centres[-1:])])
    return weight.cpu(), bias.cpu(), (*best.strengths, 0.0), (*best.epochs, 0)


class _Best:
    """For each position the maps that came nearest to the output on the images that choose."""

    def __init__(self, weights: Tensor, shifts: Tensor) -> None:
        self.weights, self.shifts = weights[0].detach().clone(), shifts[0].detach().clone()
        count = len(self.weights)
        self.found, self.strengths, self.epochs = [float("inf")] * count, [0.0] * count, [0] * count

    def look(self, epoch: int, found: Tensor, weights: Tensor, shifts: Tensor) -> None:
        """Take what is nearer than all before; `found` is `(position, strength)`."""
        for place, each in enumerate(found):
            which = int(each.argmin())
            if float(each[which]) < self.found[place]:
                self.found[place], self.epochs[place] = float(each[which]), epoch
                self.strengths[place] = STRENGTHS[which]
                self.weights[place], self.shifts[place] = (
                    weights[which, place].detach(),
                    shifts[which, place].detach(),
                )


@torch.no_grad()
def _centred(
    source: _Source, batches: Sequence[NDArray[np.int64]], bar: Any
) -> tuple[Float[Tensor, "position d_model"], float]:
    """The mean stream at each position, and how far the last one spreads around its mean."""
    sums, squares, count = torch.zeros(()), torch.zeros(()), 0
    for batch in batches:
        streams, _ = source(batch)
        doubled = torch.stack(streams).double().flatten(1, 2)
        sums, squares = (
            sums.to(doubled) + doubled.sum(dim=1),
            squares.to(doubled) + doubled[-1].square().sum(dim=0),
        )
        count += doubled.shape[1]
        bar.update(len(batch))
    centres = sums / count
    variance = (squares / count - centres[-1].square()).clamp_min(0).mean()
    return centres.float(), float(variance.sqrt()) or 1.0


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
