"""What linear probes found: how right they are, their directions, and what they say of other images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import progress_bar
from circuitvit.errors import DataError, FileError, OptionError, unknown_name
from circuitvit.export.sheet import Sheet
from circuitvit.export.style import MUTED
from circuitvit.graph.files import TEXT, check_version, record, write_bytes
from circuitvit.graph.results import Record, Result, cells
from circuitvit.models import Model
from circuitvit.models.tokens import TokenSpec, chosen
from circuitvit.tasks.task import batches_of
from circuitvit.verification.statistics import Estimate, mean_interval, share_interval
from circuitvit.views.probe_scores import ProbeScores, number_of, site_panels, spread
from circuitvit.views.subjects import ImageSpec, images_of, subjects_of

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

Reads = Literal["mean", "any", "each"]
"""What a probe reads: the mean of a place's tokens, any single one of them, or one token that is its own."""

SCHEMA = "circuitvit.probes/1"
MOST_LINES = 8

_NAMES = {"type": "array", "items": TEXT, "minItems": 1}
_FILE = record(
    "schema model sites places classes images reads kinds grid",
    schema={"const": SCHEMA},
    model=TEXT,
    sites=_NAMES,
    places=_NAMES,
    classes={**_NAMES, "minItems": 2},
    images=_NAMES,
    reads={"enum": list(get_args(Reads))},
    kinds=_NAMES,
    grid={"type": "array", "items": {"type": "integer", "minimum": 1}, "maxItems": 3},
)
_TENSORS = ("right", "control", "fold", "clusters", "majority", "biases", "tokens")


@dataclass(frozen=True, eq=False, repr=False)
class LinearProbes(Result):
    """Linear probes of a model, and how right they are on images that they were not fitted to.

    Numbers are NaN where there is no probe, as a class is at that place in too few images.

    Attributes:
        model: its name.
        sites: names of what is probed.
        places: what each probe reads: "cls", "patch", or single tokens such as "patch (2, 3)".
        classes: that are told apart.
        images: their names.
        reads: see `Reads`.
        right: `(site, place, image)`: the share of the image's samples (one but for "any") that the probe
            which did not see the image classifies rightly, 0 to 1.
        control: the same of probes fitted to other images' labels and judged by those.
        fold: `(image,)`, in which each was judged; -1 where it has no label.
        clusters: `(image,)`: images of one number are not independent, and in one fold.
        majority: `(place,)`: how often the most frequent class is there, which it takes no probe to reach.
        weights: for each site `(place, class, width)`, logits per unit of the activation, of all images.
        biases: `(site, place, class)`.
        tokens: `(place, token)`: which tokens a place has, in any image.
        kinds: of all tokens.
        grid: rows and columns of patches, with time first; empty where they form none.
    """

    model: str
    sites: tuple[str, ...]
    places: tuple[str, ...]
    classes: tuple[str, ...]
    images: tuple[str, ...]
    reads: Reads
    right: Float[NDArray[np.float64], "site place image"]
    control: Float[NDArray[np.float64], "site place image"]
    fold: Int64[NDArray[np.int64], " image"]
    clusters: Int64[NDArray[np.int64], " image"]
    majority: Float[NDArray[np.float64], " place"]
    weights: Mapping[str, Float[NDArray[np.float64], "place class _width"]]
    biases: Float[NDArray[np.float64], "site place class"]
    tokens: Bool[NDArray[np.bool_], "place token"]
    kinds: tuple[str, ...]
    grid: tuple[int, ...]

    along = "sites:site places:place classes:class images:image kinds:token"
    may_be_nan = "right control majority weights biases"
    kind = "probes"

    def records(self) -> Iterator[Record]:
        """One row for each `site`, `place` and `image`: `right`, the share of its samples that the probe
        gets right, `control`, that of the control's probe, and the `fold` that the image was judged in (-1:
        none)."""
        fold = np.broadcast_to(self.fold, self.right.shape)
        axes = {"site": self.sites, "place": self.places, "image": self.images}
        return cells(axes, right=self.right, control=self.control, fold=fold)

    @property
    def accuracy(self) -> Float[NDArray[np.float64], "site place fold"]:
        """How right the probes are in each fold."""
        folds = [self.right[:, :, self.fold == number] for number in range(int(self.fold.max()) + 1)]
        return np.stack([_mean(each) for each in folds], axis=-1)

    @property
    def selectivity(self) -> Float[NDArray[np.float64], "site place"]:
        """Accuracy beyond that of the control."""
        return _mean(self.right) - _mean(self.control)

    @property
    def chance(self) -> float:
        """How right a guess is."""
        return 1 / len(self.classes)

    def mean(self, site: str, place: int | str = 0) -> Estimate:
        """The accuracy of a probe with its 95 % interval over images: exact, or of means by bootstrap.

        Raises:
            NameNotFoundError, OptionError: if there is no such site or place.
        """
        return _estimate(self.right[self._site(site), self._place(place)], self.clusters)

    def mean_control(self, site: str, place: int | str = 0) -> Estimate:
        """The same of its control."""
        return _estimate(self.control[self._site(site), self._place(place)], self.clusters)

    def on_grid(self, site: str) -> NDArray[np.float64]:
        """The accuracy of the probes of single patches, `(row, column)`; with time first of clips.

        Raises:
            OptionError: if the probes are not of single patches on a grid.
        """
        if self.reads != "each" or not self.grid:
            raise OptionError("there is no map: probe every patch, with tokens='patch' and reads='each'")
        found = np.full(len(self.kinds), np.nan)
        found[self.tokens.argmax(axis=1)] = _mean(self.right[self._site(site)])
        return found[-int(np.prod(self.grid)) :].reshape(self.grid)

    def direction(self, site: str, of: int | str = -1, place: int | str = 0) -> Float[Tensor, " width"]:
        """The normal of a probe, in the units of the activation: for `cv.add` and `cv.clamp`.

        Added once, to each token that the probe reads, it raises the logit of the class over the mean of the
        others by 1; with two classes, its log-odds.

        Args:
            site: of the probe.
            of: the class, by name or number.
            place: of the probe.

        Raises:
            NameNotFoundError, OptionError: if there is no such site, class or place.
            DataError: if the probe says the same whatever is there, so that it has no normal.
        """
        weight = self.weights[self.sites[self._site(site)]][self._place(place)]
        number = self._class(of)
        normal = weight[number] - np.delete(weight, number, axis=0).mean(axis=0)
        length = float(normal @ normal)
        if not length > 0:
            raise DataError(f"the probe of {site} at {self.places[self._place(place)]} has no direction")
        return torch.from_numpy((normal / length).astype(np.float32))

    @running
    def apply(
        self,
        model: Model,
        images: ImageSpec,
        *,
        place: int | str = 0,
        tokens: TokenSpec = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> ProbeScores:
        """Ask the probes of single tokens of other images: how much of a class does each patch know?

        A probe of a mean, asked so, says shares: its logits are the mean of those of the tokens.

        Args:
            model: the one that was probed, or an edit of it.
            images: what is looked at; a few.
            place: whose probe is asked, unless every token has its own.
            tokens: that are asked; by default all those of the place.
            batch_size: images at once; 32 by default.
            progress: whether to show a bar.

        Raises:
            NameNotFoundError: if the model has no such site.
            OptionError: if there is no such place, or the model has other tokens or widths.
            DataError: if the images cannot be used, or have no grid of patches.
        """
        pictures = images_of(model, images)
        subjects = subjects_of(model, pictures)
        number, count = self._place(place), len(subjects.kinds)
        if tokens is not None:
            mask = chosen(tokens, subjects.kinds, lambda: subjects.grid).of(subjects.kinds)
            asked = np.ones((1, count), bool) if mask is None else np.atleast_2d(mask.numpy())
        else:
            asked = self.tokens if self.reads == "each" else self.tokens[[number]]
        asked = np.asarray(asked.any(axis=0))
        if len(asked) != count or (self.reads == "each" and count != len(self.kinds)):
            raise OptionError(f"the probes are of {len(self.kinds)} tokens, and these images have {count}")
        whose = np.full(count, number)
        if self.reads == "each":
            whose = np.full(count, -1)
            whose[self.tokens.argmax(axis=1)] = np.arange(len(self.places))
            asked = asked & (whose >= 0)
        at = np.flatnonzero(asked)
        logits = np.full((len(self.sites), len(pictures), count, len(self.classes)), np.nan, np.float32)
        done = 0
        with progress_bar(len(pictures), "probes", progress, unit=model.preprocessing.what) as bar:
            for batch in batches_of(model, pictures, batch_size):
                seen = model.activations(
                    batch, self.sites, tokens=torch.from_numpy(asked), batch_size=len(batch), progress=False
                )
                for row, site in enumerate(self.sites):
                    weight, values = self.weights[site][whose[at]], seen[site].double().numpy()
                    if values.shape[-1] != weight.shape[-1]:
                        raise OptionError(
                            f"{site} of {model.name} is {values.shape[-1]} wide, and the probes "
                            f"{weight.shape[-1]}: give the model that was probed"
                        )
                    said = np.einsum("itw,tcw->itc", values, weight) + self.biases[row, whose[at]]
                    logits[row, done : done + len(batch), at] = said.transpose(1, 0, 2)
                done += len(batch)
                bar.update(len(batch))
        return ProbeScores(subjects, self.sites, self.classes, logits)

    @property
    def notes(self) -> tuple[str, ...]:
        """What to bear in mind of these figures."""
        found = ["what a probe can read need not be used by the model: steer along its direction to see"]
        if (often := float(np.nanmax(self.majority))) > 1.5 * self.chance:
            found.append(f"the most frequent class alone is right {often:.0%} of the time: compare with that")
        if (beyond := float(np.nanmean(_mean(self.control) - self.majority))) > 0.05:
            found.append(
                f"other images' labels are read too, {beyond:.0%} above the most frequent class: the place "
                "alone tells some of it, so look at selectivity, not at accuracy"
            )
        if (few := int((self.fold >= 0).sum())) < 20 * len(self.classes):
            found.append(f"{few} images are few for {len(self.classes)} classes: intervals are wide")
        return tuple(found)

    # -- figures -------------------------------------------------------------------------------------

    def figure(self, *, sites: Sequence[str] | None = None) -> Picture:
        """Maps of accuracy over the grid where every patch has a probe; else accuracy by site as lines.

        Lines have intervals; dashed ones are the control; dotted is the most frequent class.

        Args:
            sites: which; by default all, and of maps at most 16.

        Raises:
            NameNotFoundError: if there is no such site.
        """
        mapped = self.reads == "each" and self.grid and len(self.places) > MOST_LINES
        return self._maps(sites) if mapped else self._lines(sites)

    def _lines(self, sites: Sequence[str] | None) -> Picture:
        from circuitvit.views import canvas

        shown = list(self.sites) if sites is None else [self.sites[self._site(each)] for each in sites]
        steps = np.arange(len(shown))
        with canvas.styled():
            figure = canvas.blank(max(4.6, 0.3 * len(shown) + 1.6), 3.0, self._title)
            axes = figure.subplots()
            for place, name in enumerate(self.places[:MOST_LINES]):
                colour, aside = canvas.PALETTE[place], 0.08 * (place - (len(self.places) - 1) / 2)
                found = [self.mean(site, place) for site in shown]
                value = np.array([each.value for each in found])
                ends = np.array([(each.low, each.high) for each in found], dtype=np.float64).T
                look: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 2.8, "elinewidth": 0.7}
                reach = np.nan_to_num(np.abs(ends - value))
                axes.errorbar(steps + aside, value, reach, label=canvas.label(name), linewidth=1.2, **look)
                control = [self.mean_control(site, place).value for site in shown]
                axes.plot(steps + aside, control, "--", color=colour, linewidth=0.9)
                axes.axhline(self.majority[place], color=colour, linewidth=0.6, linestyle=":")
            axes.plot([], [], "--", color=MUTED, linewidth=0.9, label="control")
            axes.plot([], [], ":", color=MUTED, linewidth=0.6, label="most frequent class")
            turned = len(shown) > 8 or max(map(len, shown)) > 7
            axes.set_xticks(steps, shown, rotation=60 if turned else 0)
            axes.set_ylabel("accuracy on held-out images")
            axes.set_ylim(max(0.0, min(axes.get_ylim()[0], self.chance - 0.05)), 1.02)
            figure.legend(loc="outside lower center", ncols=4, frameon=False)
        return figure

    def _maps(self, sites: Sequence[str] | None) -> Picture:
        from circuitvit.views import canvas

        shown = spread(self.sites) if sites is None else [self.sites[self._site(each)] for each in sites]
        sheet = Sheet(self.grid)
        with canvas.styled():
            figure, panels = site_panels(len(shown), sheet, self._title)
            scale = canvas.scale(np.array([self.chance, 1.0]))
            look: dict[str, Any] = {"norm": scale, "cmap": canvas.rising_colours()}
            for axes, site in zip(panels, shown, strict=True):
                drawn = canvas.overlay(axes, sheet.lay(self.on_grid(site)), None, sheet=sheet, **look)
                axes.set_title(canvas.label(site), loc="left", fontweight="bold")
                own = _mean(self.right[self._site(site)])
                before = [
                    f"{name} {own[place]:.0%}"
                    for place, name in enumerate(self.places)
                    if self.tokens[place].argmax() < len(self.kinds) - np.prod(self.grid)
                ]
                axes.set_xlabel(canvas.label(", ".join(before)), color=MUTED)
            figure.colorbar(drawn, ax=panels, shrink=0.7, label="accuracy, from chance to 1")
        return figure

    @property
    def _title(self) -> str:
        return f"What a linear probe can read: {' or '.join(self.classes[:6])}"

    # -- files ---------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the probes as one safetensors file, with names as JSON in the header.

        The endings `.json` and `.csv` write JSON, and the table of `records`.

        Raises:
            FileError: if it cannot be written.
        """
        if Path(path).suffix in (".json", ".csv"):
            return super().save(path)
        said = {"schema": SCHEMA, **{name: getattr(self, name) for name in _FILE["required"][1:]}}
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _TENSORS}
        tensors |= {f"weights.{site}": np.ascontiguousarray(each) for site, each in self.weights.items()}
        return write_bytes(path, save(tensors, {"probes": json.dumps(said)}))

    @classmethod
    def load(cls, path: str | Path) -> LinearProbes:
        """Read what `save` wrote.

        Raises:
            FileError: if the file is missing, damaged, or holds no probes.
        """
        path = Path(path)
        if path.suffix == ".json":
            return super().load(path)
        if not path.is_file():
            raise FileError(f"cannot read the probes {path}: there is no such file")
        try:
            with safe_open(path, "numpy") as opened:
                said: Any = json.loads((opened.metadata() or {}).get("probes", "null"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise FileError(f"{path} holds no probes, or is damaged: {error}") from error
        if not isinstance(said, dict):
            raise FileError(f"{path} holds no probes that LinearProbes.save wrote")
        check_version(path, said, _FILE, SCHEMA)
        _check_tensors(path, said, tensors)
        weights = {site: tensors[f"weights.{site}"] for site in said["sites"]}
        names: dict[str, Any] = {
            name: tuple(said[name]) if isinstance(said[name], list) else said[name]
            for name in _FILE["required"][1:]
        }
        names |= {name: tensors[name] for name in _TENSORS}
        return cls(**names, weights=weights)

    # -- names ---------------------------------------------------------------------------------------

    def _site(self, wanted: str) -> int:
        if wanted not in self.sites:
            raise unknown_name("site of a probe", wanted, self.sites)
        return self.sites.index(wanted)

    def _place(self, wanted: int | str) -> int:
        return number_of("place", wanted, self.places)

    def _class(self, wanted: int | str) -> int:
        return number_of("class", wanted, self.classes)

    def __repr__(self) -> str:
        where = f"place {self.places[0]}" if len(self.places) == 1 else f"{len(self.places)} places"
        sites = f"{len(self.sites)} sites" if len(self.sites) > 1 else f"site {self.sites[0]}"
        return (
            f"LinearProbes({self.model}: {len(self.classes)} classes, {sites}, {where}, "
            f"{len(self.images)} images)"
        )


# -- inside --------------------------------------------------------------------------------------


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over images, of those that have a value; NaN where none has."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0.0).sum(axis=-1) / known.sum(axis=-1))


def _estimate(
    shares: Float[NDArray[np.float64], " image"], clusters: Int64[NDArray[np.int64], " image"]
) -> Estimate:
    """The mean over images: with the exact interval of a share where it is one of independent images."""
    known = np.isfinite(shares)
    shares, clusters = shares[known], clusters[known]
    if not shares.size:
        return Estimate(float("nan"))
    if np.isin(shares, (0, 1)).all() and len(np.unique(clusters)) == len(clusters):
        return share_interval((shares == 1).tolist())
    return mean_interval(shares, clusters=clusters)


def _check_tensors(path: Path, said: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> None:
    """Refuse a file whose tensors do not fit its names.

    Raises:
        FileError: naming the tensor.
    """
    sites, places, images, classes = (len(said[name]) for name in ("sites", "places", "images", "classes"))
    shapes: dict[str, tuple[int | None, ...]] = {
        "right": (sites, places, images),
        "control": (sites, places, images),
        "fold": (images,),
        "clusters": (images,),
        "majority": (places,),
        "biases": (sites, places, classes),
        "tokens": (places, len(said["kinds"])),
        **{f"weights.{site}": (places, classes, None) for site in said["sites"]},
    }
    if set(tensors) != set(shapes):
        wrong = sorted(set(tensors) ^ set(shapes))[0]
        raise FileError(f"{path}: the tensor {wrong!r} is missing, or one too many")
    kinds = {"fold": "i", "clusters": "i", "tokens": "b"}
    for name, shape in shapes.items():
        found = tensors[name]
        alike = len(found.shape) == len(shape) and all(
            wanted in (None, size) for wanted, size in zip(shape, found.shape, strict=True)
        )
        if not alike or found.dtype.kind != kinds.get(name, "f") or 0 in found.shape:
            raise FileError(f"{path}: the tensor {name!r} is {found.dtype} of shape {found.shape}")
        if found.dtype.kind == "f" and np.isinf(found).any():
            raise FileError(f"{path}: the tensor {name!r} holds infinite values")
    if np.prod(said["grid"] or [0]) > len(said["kinds"]):
        raise FileError(f"{path}: a grid of {said['grid']} has more patches than there are tokens")
