"""Sparse autoencoders of a model's activations, trained by overcomplete's top-k autoencoder and its loop.

Activations are streamed into a file, centred, and scaled to a variance of 1; what was done to them is folded
into the dictionary, whose directions are of length 1 and whose features are in units of the activations. What
it is worth is measured on images that it was not trained on.

Gao et al. 2024, "Scaling and evaluating sparse autoencoders", arXiv:2406.04093; Fel et al. 2025, "Archetypal
SAE", arXiv:2502.12892 (overcomplete).
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit._keywords import running
from circuitvit._version import __version__
from circuitvit.engine import Activations, activations, progress_bar, refuse_inference_mode
from circuitvit.errors import DataError, OptionError, check_number, check_whole, counted, unknown_name
from circuitvit.models import Dictionary, Model
from circuitvit.models.dictionary_formats import dictionary_of
from circuitvit.models.timm_import import import_timm
from circuitvit.models.tokens import TokenSpec
from circuitvit.tasks.images import ImageSpec
from circuitvit.training.loop import Recipe

FEW = 50
"""Held-out images, below which what was measured on them says little."""

CHUNK = 64
"""Images whose activations are in memory at once, but for those of a training step."""


@running
def train_sae(
    model: Model,
    images: ImageSpec,
    site: str,
    *,
    features: int | None = None,
    k: int = 32,
    tokens: TokenSpec = None,
    steps: int = 3000,
    vectors: int = 512,
    learning_rate: float = 4e-3,
    held_out: float = 0.2,
    activations_file: str | Path | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Dictionary:
    """Train a top-k sparse autoencoder on a model's activations, and measure it on images that are held out.

    The same images, settings, machine and number of threads give the same dictionary. Ctrl-C stops training
    and keeps what has been learned. The dictionary's card says how it was trained and what it is worth:
    `card["held_out"]` has `explained_variance` (and `by_token`, for each kind of token), `l0` (features of a
    token that are not 0, in the mean) and `dead` (features that are 0 everywhere).

    Args:
        model: from `load` or `wrap`; it stays as it is.
        images: of the kind that the model is used on, the more the better; files are read a batch at a time.
        site: the activation: an MLP ("m8"), the stream ("resid6") or what a head mixed ("a9.h2.z").
        features: of the dictionary; eight times the width of the activation by default.
        k: features of a token that are kept.
        tokens: that are trained on, such as "cls" or "patch"; all by default.
        steps: of training.
        vectors: activations of single tokens in each step.
        learning_rate: at its peak.
        held_out: the share of images that the dictionary is measured on, and not trained on.
        activations_file: where activations are streamed to, and kept: interrupted there, a run goes on. By
            default a temporary file.
        seed: of the split, of the first weights and of the order of steps.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        DataError: if overcomplete is missing, images cannot be used or are fewer than two, activations do not
            vary, or training diverges.
        OptionError: for a site that no dictionary is of, and settings out of range.
        FileError: if the file of activations cannot be written.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> images = torch.cat([*catdog_pairs(40, seed=0)])
        >>> sae = cv.train_sae(cv.load("catdog-tiny"), images, "m2", steps=400)  # doctest: +SKIP
        >>> sae, sae.card["held_out"]["explained_variance"] > 0.8  # doctest: +SKIP
        (Dictionary(512 features of width 64, top 32, features of m2), True)
    """
    refuse_inference_mode()
    width = _width_at(model, site)
    features = 8 * width if features is None else features
    for name, value in (("features", features), ("k", k), ("steps", steps), ("vectors", vectors)):
        check_whole(name, value)
    check_number("the learning rate", learning_rate)
    check_number("the share of images that is held out", held_out, 0, 1)
    if k > features:
        raise OptionError(f"a dictionary of {features} features cannot keep the top {k}")
    library = import_overcomplete()
    folder = nullcontext() if activations_file else TemporaryDirectory(prefix="circuitvit-")
    with folder as place:
        path = Path(activations_file or Path(str(place)) / "activations.safetensors")
        read = activations(
            model, images, site, tokens=tokens, out=path, batch_size=batch_size, progress=progress
        )
        data = _Data.of(read, site, held_out, seed)
        recipe = Recipe(steps, vectors, learning_rate, warmup=0.05, seed=seed)
        found, done = _trained(library, data, features, k, recipe, model.device, progress)
        measured = reconstruction(found, data.values, data.kinds, data.held_out)
    card = {
        "model": model.name,
        "weights": model.weights_hash,
        "data": {"images": len(read.images), **_named(read.images), "tokens": sorted(set(data.kinds))},
        "held_out": measured,
        "recipe": {
            "trained_by": f"overcomplete {metadata.version('overcomplete')}",
            "steps": steps,
            "steps_done": done,
            "vectors": vectors,
            "learning_rate": learning_rate,
            "seed": seed,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__.split("+")[0],
            "circuitvit": __version__,
        },
    }
    return replace(found, site=site, card=card)


def import_overcomplete() -> Any:
    """Overcomplete's autoencoders, `overcomplete.sae`.

    Its figures are imported after them, and need more than they: version 0.3.0 asks matplotlib for a function
    that 3.9 dropped, and OpenCV asks for libraries of a desktop. Where only these fail, the autoencoders are
    there.

    Raises:
        DataError: if it is not installed.
    """
    import_timm()  # which makes torchvision importable beside any torch
    name = "overcomplete.sae"
    try:
        return importlib.import_module(name)
    except Exception as error:  # an import runs other people's code, which may raise anything
        if name in sys.modules:
            return sys.modules[name]
        raise DataError(
            f"dictionaries are trained by overcomplete, which cannot be imported ({error}): "
            "pip install circuitvit[sae]"
        ) from error


def reconstruction(
    dictionary: Dictionary,
    values: Float[Tensor, "image token width"],
    kinds: Sequence[str],
    rows: Sequence[int] | None = None,
) -> dict[str, Any]:
    """What a dictionary is worth on activations.

    Args:
        dictionary: of this width.
        values: the activations.
        kinds: of the tokens, such as "cls".
        rows: numbers of the images that are measured; all by default.

    Returns:
        `explained_variance`: 1 - |x - rebuilt|^2 / |x - mean|^2, summed over tokens; `by_token`: the same of
        each kind of token, around the mean of that kind; `l0`: features of a token that are not 0, in the
        mean; `dead`: features that are 0 on all of them; and how many `images` and `vectors` there were.
    """
    rows = range(len(values)) if rows is None else rows
    places = {kind: [at for at, each in enumerate(kinds) if each == kind] for kind in dict.fromkeys(kinds)}
    own = dictionary.to("cpu", torch.float64)
    sums = {kind: torch.zeros(own.width, dtype=torch.float64) for kind in places}
    for x in _chunks(values, rows):
        for kind, columns in places.items():
            sums[kind] += x[:, columns].sum(dim=(0, 1))
    means = {kind: total / (len(rows) * len(places[kind])) for kind, total in sums.items()}
    mean = sum(sums.values()) / (len(rows) * len(kinds))
    missed, varied = dict.fromkeys(places, 0.0), dict.fromkeys((*places, ""), 0.0)
    fires, active = torch.zeros(own.n_features, dtype=torch.bool), 0
    for x in _chunks(values, rows):
        codes = own.encode(x)
        fires |= (codes != 0).flatten(0, -2).any(dim=0)
        active += int((codes != 0).sum())
        error = own.decode(codes) - x
        varied[""] += _squared(x - mean)
        for kind, columns in places.items():
            missed[kind] += _squared(error[:, columns])
            varied[kind] += _squared(x[:, columns] - means[kind])
    return {
        "images": len(rows),
        "vectors": len(rows) * len(kinds),
        "explained_variance": _explained(sum(missed.values()), varied[""]),
        "by_token": {kind: _explained(missed[kind], varied[kind]) for kind in places},
        "l0": active / (len(rows) * len(kinds)),
        "dead": int((~fires).sum()),
    }


def caveats(dictionary: Dictionary) -> tuple[str, ...]:
    """What to keep in mind about a dictionary that `train_sae` made."""
    said = (dictionary.card or {}).get("held_out", {})
    found = [
        f"of the {kind} tokens {share:.0%} is explained: the rest of what they hold is in the error"
        for kind, share in said.get("by_token", {}).items()
        if share is not None and share < 0.5
    ]
    if said.get("dead", 0) > 0.2 * dictionary.n_features:
        found.append(
            f"{said['dead']} of {dictionary.n_features} features were seen on none of the held-out images: "
            "take fewer features, more images or more steps"
        )
    if said.get("images", 0) < FEW:
        found.append(f"{counted(said.get('images', 0), 'image')} held out: few to judge it by")
    return tuple(found)


# -- inside --------------------------------------------------------------------------------------


def _chunks(values: Tensor, rows: Sequence[int]) -> Iterator[Float[Tensor, "image token width"]]:
    """The activations of some images, a few at a time, in float64."""
    for first in range(0, len(rows), CHUNK):
        yield values[list(rows[first : first + CHUNK])].double()


def _squared(x: Tensor) -> float:
    return float(x.square().sum())


def _explained(missed: float, varied: float) -> float | None:
    """The share that is explained; None of what does not vary, such as one image's only class token."""
    return None if varied == 0 else 1 - missed / varied


def _width_at(model: Model, site: str) -> int:
    """The width of an activation that dictionaries are of.

    Raises:
        OptionError: for another one.
        NameNotFoundError: if there is none of this name.
    """
    known = {each.name: each for each in model.all_sites}
    if site not in known:
        if set(site) & set("*@["):
            raise OptionError(
                f"a dictionary is of one activation, such as 'm8', not of {site!r}; say tokens= apart"
            )
        raise unknown_name("site", site, tuple(known))
    if f"{site}.z" in known:
        raise OptionError(f"features of the head {site} are directions of what it mixed: give {site}.z")
    found = known[site]
    if found.kind not in ("stream", "output", "z") or site == "input":
        raise OptionError(f"a dictionary is of an MLP (m8), the stream (resid6) or a head's z, not of {site}")
    return found.shape[-1]


@dataclass(frozen=True, eq=False)
class _Data:
    """Activations, and which of them are trained on.

    Attributes:
        values: `(image, token, width)`, in a file that is mapped into memory.
        kinds: of the tokens.
        fitted: numbers of the images that are trained on.
        held_out: of those that are not.
        mean: of the fitted.
        scale: by how much they vary around it, root-mean-square of a coordinate.
    """

    values: Float[Tensor, "image token width"]
    kinds: tuple[str, ...]
    fitted: Tensor
    held_out: list[int]
    mean: Float[Tensor, " width"]
    scale: float

    @classmethod
    def of(cls, read: Activations, site: str, held_out: float, seed: int) -> _Data:
        values = read[site]
        if len(values) < 2:
            raise DataError("a dictionary is measured on images that it was not trained on: give two or more")
        order = np.random.default_rng(seed).permutation(len(values))
        count = min(max(round(held_out * len(order)), 1), len(order) - 1)
        fitted = sorted(order[count:].tolist())
        tokens = len(fitted) * values.shape[1]
        mean = torch.stack([x.sum(dim=(0, 1)) for x in _chunks(values, fitted)]).sum(dim=0) / tokens
        squares = sum(_squared(x - mean) for x in _chunks(values, fitted))
        scale = (squares / (tokens * values.shape[2])) ** 0.5
        if scale == 0:
            raise DataError(f"{site} is the same on all images: there is nothing to be explained")
        kinds = tuple(name.split(" ")[0] for name in read.tokens[site])
        return cls(values, kinds, torch.tensor(fitted), sorted(order[:count].tolist()), mean.float(), scale)

    def batches(self, recipe: Recipe) -> Iterator[Float[Tensor, "vector width"]]:
        """Activations of single tokens, centred and scaled: each once, in an order of its own, then again."""
        tokens = self.values.shape[1]
        flat = self.values.flatten(0, 1)
        generator = torch.Generator().manual_seed(recipe.seed)
        left = torch.empty(0, dtype=torch.int64)
        for _ in range(recipe.steps):
            while len(left) < recipe.batch_size:
                left = torch.cat([left, torch.randperm(len(self.fitted) * tokens, generator=generator)])
            taken, left = left[: recipe.batch_size], left[recipe.batch_size :]
            places = self.fitted[taken // tokens] * tokens + taken % tokens
            yield (flat[places].float() - self.mean) / self.scale


def _trained(
    library: Any, data: _Data, features: int, k: int, recipe: Recipe, device: torch.device, progress: bool
) -> tuple[Dictionary, int]:
    """The dictionary that the library's own loop trains, and the number of steps done when it ended.

    Raises:
        DataError: if the loss is no longer finite.
    """
    done = 0
    with torch.random.fork_rng(), progress_bar(recipe.steps, "training", progress, unit="step") as bar:
        torch.manual_seed(recipe.seed)
        sae = library.TopKSAE(data.values.shape[2], features, top_k=k, device=str(device)).train()
        sae.untied(bias=True)  # the encoder begins as the decoder, turned round

        def criterion(x: Tensor, rebuilt: Tensor, *others: Tensor) -> Tensor:
            """What is missed. The library's loss for top-k sorts half of all features: most of a step."""
            nonlocal done
            loss = (x - rebuilt).square().mean()
            if not loss.isfinite():
                raise DataError(f"the loss is {loss.item()} at step {done}: try a smaller learning_rate")
            done += 1
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
            return loss

        optimiser = torch.optim.Adam(sae.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, recipe.rate)
        with suppress(KeyboardInterrupt):
            library.train_sae(
                sae, data.batches(recipe), criterion, optimiser, schedule,
                nb_epochs=1, monitoring=0, device=str(device),
            )  # fmt: skip
    found = dictionary_of({name: each.cpu() for name, each in sae.eval().state_dict().items()}, {"k": k})
    return _unscaled(found, data), done


def _unscaled(found: Dictionary, data: _Data) -> Dictionary:
    """The dictionary of activations as they are; features are in their units, directions of length 1.

    A top-k of positive parts scales with what it is given, so that features of (x - mean) / scale, times the
    scale, are those of x - mean with the offset times the scale.
    """
    offset = found.offset * data.scale - found.encoder @ data.mean
    return replace(found, offset=offset, bias=data.mean)


def _named(images: Sequence[str]) -> dict[str, str]:
    """Which images there were: the first, and a hash of all names."""
    return {"first": images[0], "names": hashlib.sha256("\n".join(images).encode()).hexdigest()}
