"""How much does the answer depend on what is taken as corrupt? `python -m bench corruptions`

The same images, the same metric, the same model; only the corruption or the ablation changes. Two settings:

    drawn    `catdog-tiny`, where every cat has its exact counterfactual, the same scene with a dog
    photos   ViT-Ti/16 and photographs of cats with their masks; nobody knows the truth there

For each way: what there is to explain, how far its scores agree with those of the reference way (the exact
counterfactual; the photograph of a dog), and for some of them the smallest circuit that a search of one fixed
plan finds at a faithfulness of 0.9, judged under every other way. Intervals are bootstraps over images.

Results go to out/bench/corruptions, one file for each setting, and into docs/corruptions.md, and its figure
into docs/images. Some minutes on one core; `--only drawn` takes the first setting alone, and `--page`
writes the page from the files that are there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.linalg import spsolve
from scipy.stats import rankdata
from torch import Tensor

import circuitvit as cv
from bench._photographs import CATS, DOGS, draw_pairs, load_model, shared_data
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.pruning.refine import noising_evaluator
from circuitvit.tasks import corruptions
from circuitvit.tasks.ablations import Ablation
from circuitvit.tasks.images import as_images, list_images
from circuitvit.views import canvas

DOCS = Path(__file__).resolve().parents[1] / "docs"
OUT = Path("out/bench/corruptions")
DRAWS = 500
FAITHFULNESS = 0.9


@dataclass(frozen=True, eq=False)
class Way:
    """What clean images are held against: corrupt images, or an ablation that needs none."""

    corrupt: Tensor | None = None
    ablation: Ablation = field(default_factory=cv.Patch)


@dataclass(frozen=True, eq=False)
class Setting:
    """One model and its images under many ways; the first way is the one that others are compared with.

    Attributes:
        draws: sets of images; circuits are searched once on each.
        judge: images that circuits are judged on.
        method: of the scores.
        top: how many of the strongest edges are compared.
        searched: the ways that a circuit is searched under.
    """

    name: str
    model: cv.Model
    metric: Any
    draws: Sequence[tuple[Tensor, dict[str, Way]]]
    judge: tuple[Tensor, dict[str, Way]]
    method: str
    top: int
    plan: cv.Plan
    searched: Sequence[str]

    def task(self, clean: Tensor, way: Way, rows: slice = slice(None)) -> cv.Task:
        corrupt = None if way.corrupt is None else way.corrupt[rows]
        return cv.Task(clean[rows], corrupt, metric=self.metric, ablation=way.ablation)


@dataclass
class Result:
    """What was measured; `scores` are about the first draw.

    Attributes:
        effect: the metric with every edge minus that with none, mean over the images of the judge, by way.
        spearman: with the first way, over magnitudes of edges that matter: value, low, high.
        jaccard: of the top edges, likewise.
        halves: both for the first way alone, from one half of the images and from the other.
        sizes: edges of the circuit found under each way, for each draw.
        cross: found under, judged under: faithfulness for each draw.
    """

    name: str
    images: int
    judged: int
    edges: int
    method: str
    top: int
    seconds: float = 0.0
    effect: dict[str, float] = field(default_factory=dict)
    spearman: dict[str, list[float]] = field(default_factory=dict)
    jaccard: dict[str, list[float]] = field(default_factory=dict)
    halves: list[float] = field(default_factory=list)
    sizes: dict[str, list[int]] = field(default_factory=dict)
    cross: dict[str, dict[str, list[float]]] = field(default_factory=dict)


# -- the settings ----------------------------------------------------------------------------------------


def drawn() -> Setting:
    """The bundled model: three draws of 32 scenes to search on, 64 others to judge on."""

    def ways(n: int, seed: int) -> tuple[Tensor, dict[str, Way]]:
        clean, dogs = catdog_pairs(n, seed=seed)
        return clean, {
            "the same scene with a dog": Way(dogs),
            "another scene with a dog": Way(dogs.roll(1, 0)),
            **_of_the_whole(clean, sigma=4.0, patch=8),
            **_ablations(torch.cat([clean, dogs])),
        }

    draws = [ways(32, seed) for seed in (0, 1, 2)]
    asked = [
        "the same scene with a dog", "another scene with a dog", "blank", "blurred", "patches shuffled",
        "mean ablation", "zero ablation",
    ]  # fmt: skip
    model, metric = cv.load("catdog-tiny"), cv.logit_diff("cat", "dog")
    return Setting("drawn", model, metric, draws, ways(64, 9), "exact", 40, cv.Plan(20, 300, 8), asked)


def photos() -> Setting:
    """ViT-Ti: six photographs of cats, whose log-odds of a cat against a dog are asked for."""
    model, folder = load_model(), shared_data() / "images" / "pets_masks"
    spec, files = model.preprocessing, list_images(folder / "images")[:6]
    clean = torch.cat([as_images(path, spec).take(0, 1) for path in files])
    masks = torch.stack(
        [corruptions.read_mask(folder / "masks" / f"{path.stem}.png", [1, 255], spec) for path in files]
    )
    pairs = draw_pairs(model, 2 * len(files), seed=0)
    dogs = torch.cat([as_images(dog, spec).take(0, 1) for _, dog in pairs])
    first, second = dogs.chunk(2)
    ways = {
        "photograph of a dog": Way(first),
        "photographs of other dogs": Way(second),
        "cat filled in": Way(torch.stack([filled(*each) for each in zip(clean, masks, strict=True)])),
        "cat in its mean colour": Way(corruptions.mean_colour(clean, masks)),
        "cat blurred": Way(corruptions.blur(clean, masks, sigma=16.0)),
        **_of_the_whole(clean, sigma=10.0, patch=16),
        **_ablations(torch.cat([clean, first])),
    }
    asked = ["photograph of a dog", "cat filled in"]  # a search takes minutes; add names for more rows
    metric = cv.logit_diff(tuple(CATS), tuple(DOGS))
    return Setting(
        "photos", model, metric, [(clean, ways)], (clean, ways), "eap", 100, cv.Plan(20, 100, 2), asked
    )


def _of_the_whole(clean: Tensor, sigma: float, patch: int) -> dict[str, Way]:
    """Corruptions that need neither masks nor other photographs."""
    return {
        "blank": Way(corruptions.blank(clean)),
        "blurred": Way(corruptions.blur(clean, sigma=sigma)),
        "noise of std 1": Way(corruptions.gaussian_noise(clean, 1.0, seed=0)),
        "patches shuffled": Way(corruptions.shuffle_patches(clean, patch, seed=0)),
    }


def _ablations(images: Tensor) -> dict[str, Way]:
    """Ablations that look at no pair; the means are over all images of the setting."""
    return {
        "mean ablation": Way(None, cv.Mean(images)),
        "mean over tokens too": Way(None, cv.Mean(images, per_token=False)),
        "noise ablation": Way(None, cv.Noise()),
        "zero ablation": Way(None, cv.Zero()),
    }


def filled(image: Tensor, mask: Tensor) -> Tensor:
    """The image with its masked part as smooth as can be, given what surrounds it (Laplace's equation)."""
    height, width = mask.shape
    inside = mask.numpy().ravel()
    places = np.flatnonzero(inside)
    number = np.full(inside.size, -1)
    number[places] = np.arange(len(places))
    rows, columns = np.divmod(places, width)
    values = image.reshape(len(image), -1).double().numpy()
    known, degree, links = np.zeros((len(places), len(values))), np.zeros(len(places)), []
    for down, right in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        there = (rows + down >= 0) & (rows + down < height) & (columns + right >= 0)
        there &= columns + right < width
        mine, other = np.flatnonzero(there), (places + down * width + right)[there]
        degree[mine] += 1
        outer = ~inside[other]
        np.add.at(known, mine[outer], values[:, other[outer]].T)
        links.append(np.stack([mine[~outer], number[other[~outer]]]))
    one, two = np.concatenate(links, axis=1)
    diagonal = np.arange(len(places))
    cells = (
        np.concatenate([degree, -np.ones(len(one))]),
        (np.append(diagonal, one), np.append(diagonal, two)),
    )
    found = spsolve(csr_array(coo_array(cells, shape=(len(places), len(places)))).tocsc(), known)
    values = values.copy()
    values[:, places] = found.reshape(len(places), -1).T
    return torch.from_numpy(values).reshape(image.shape).to(image.dtype)


# -- what is measured ------------------------------------------------------------------------------------


def measure(setting: Setting) -> Result:
    """Scores of the first draw image by image, then circuits of every draw."""
    begin = time.process_time()
    images, judged = len(setting.draws[0][0]), len(setting.judge[0])
    n_edges = setting.model.graph.n_edges
    result = Result(setting.name, images, judged, n_edges, setting.method, setting.top)
    compare_scores(setting, result)
    keep(result, begin)
    for name in setting.searched:
        search_circuits(setting, result, name)
        keep(result, begin)
    return result


def keep(result: Result, begin: float) -> None:
    """Write what is there, as each step takes a while."""
    result.seconds = time.process_time() - begin
    (OUT / f"{result.name}.json").write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")
    print(f"{result.name}, {result.seconds:.0f} s: {result.sizes or 'scores'}", flush=True)


def compare_scores(setting: Setting, result: Result) -> None:
    """The scores of every way against those of the first."""
    clean, ways = setting.draws[0]
    scores = {name: image_scores(setting, clean, way) for name, way in ways.items()}
    truth = next(iter(scores.values()))
    images, others = setting.judge
    for name, way in others.items():
        judge = noising_evaluator(setting.task(images, way).prepare(setting.model))
        result.effect[name] = float(judge.effect.mean())
    odd, even = truth[::2].mean(axis=0), truth[1::2].mean(axis=0)
    result.halves = [spearman(odd, even), jaccard(odd, even, setting.top)]
    for name, found in scores.items():
        result.spearman[name] = interval(truth, found, spearman)
        result.jaccard[name] = interval(truth, found, lambda a, b: jaccard(a, b, setting.top))


def search_circuits(setting: Setting, result: Result, name: str) -> None:
    """The circuits found under one way, one for each draw, judged under all ways."""
    images, others = setting.judge
    found = [
        cv.find(
            setting.model, setting.task(pictures, own[name]), faithfulness=FAITHFULNESS, plan=setting.plan,
            start="thin", progress=False,
        ).circuit
        for pictures, own in setting.draws
    ]  # fmt: skip
    result.sizes[name] = [len(circuit) for circuit in found]
    result.cross[name] = {}
    for other, way in others.items():
        judge = noising_evaluator(setting.task(images, way).prepare(setting.model))
        result.cross[name][other] = [judge.faithfulness(circuit) for circuit in found]


def image_scores(setting: Setting, clean: Tensor, way: Way) -> NDArray[np.float64]:
    """Scores of all edges for each image alone, `(image, edge)`."""
    mask = setting.model.graph.edge_mask
    tasks = [setting.task(clean, way, slice(row, row + 1)) for row in range(len(clean))]
    return np.stack(
        [cv.attribute(setting.model, each, setting.method, progress=False).values[mask] for each in tasks]
    )


def spearman(one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
    """Rank correlation of magnitudes, over edges of at least a hundredth of the largest under either.

    Below that, silent heads leave nothing but rounding, which is alike for the same image.
    """
    first, second = np.abs(one), np.abs(two)
    matter = (first > first.max() / 100) | (second > second.max() / 100)
    return float(np.corrcoef(rankdata(first[matter]), rankdata(second[matter]))[0, 1])


def jaccard(one: NDArray[np.float64], two: NDArray[np.float64], top: int) -> float:
    """The share that the strongest edges of both have in common, of all that are among either."""
    first, second = (set(np.argsort(-np.abs(each), kind="stable")[:top].tolist()) for each in (one, two))
    return len(first & second) / len(first | second)


def interval(one: NDArray[np.float64], two: NDArray[np.float64], compare: Any) -> list[float]:
    """Of the means over images: the value, and the ends of its 95 % bootstrap interval over images."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(one), (DRAWS, len(one)))
    found = [compare(one[each].mean(axis=0), two[each].mean(axis=0)) for each in rows]
    low, high = np.quantile(found, [0.025, 0.975])
    return [compare(one.mean(axis=0), two.mean(axis=0)), float(low), float(high)]


# -- the page --------------------------------------------------------------------------------------------


def tables(result: Result) -> str:
    """Both tables in Markdown."""
    truth = next(iter(result.effect))
    lines = [
        f"| corrupt, or ablated by | to explain | Spearman | Jaccard, top {result.top} | edges | f there "
        f"| f by *{truth}* |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, effect in result.effect.items():
        alike = [_with_interval(found[name]) for found in (result.spearman, result.jaccard)]
        alike = ["1", "1"] if name == truth else alike
        found = ["", "", ""]
        if name in result.sizes:
            cross = result.cross[name]
            found = [_range(result.sizes[name], 0), _range(cross[name], 2), _range(cross[truth], 2)]
        lines.append(f"| {' | '.join([name, f'{effect:.1f}', *alike, *found])} |")
    return "\n".join(lines) + "\n"


def _with_interval(found: Sequence[float]) -> str:
    value, low, high = found
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def _range(values: Sequence[float], digits: int) -> str:
    """The one value, or the mean and both ends."""
    mean, low, high = np.mean(values), min(values), max(values)
    return f"{mean:.{digits}f}" + (f" ({low:.{digits}f} to {high:.{digits}f})" if len(values) > 1 else "")


def figure(results: Mapping[str, Result]) -> canvas.Picture:
    """The cross tables of both settings as heat maps."""
    titles = {"drawn": "catdog-tiny, drawn scenes (mean of three draws)", "photos": "ViT-Ti, six photographs"}
    with canvas.styled():
        rows = [len(result.cross) for result in results.values()]
        made = canvas.blank(7.2, 1.9 * len(rows) + 0.27 * sum(rows))
        axes = made.subplots(len(rows), 1, height_ratios=rows, squeeze=False)[:, 0]
        for panel, (name, result) in zip(axes, results.items(), strict=True):
            table = np.array([[np.mean(cell) for cell in row.values()] for row in result.cross.values()])
            panel.imshow(
                np.clip(table, -0.2, 1.2), cmap=canvas.rising_colours(), vmin=-0.2, vmax=1.2, aspect="auto"
            )
            for (row, column), value in np.ndenumerate(table):
                colour = "white" if value > 0.75 else "#1F2933"
                panel.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=colour)
            panel.set_yticks(range(len(result.cross)), [*result.cross], fontsize=6.5)
            panel.set_xticks(
                range(len(result.effect)), [*result.effect], fontsize=6.5, rotation=35, ha="right"
            )
            panel.set_ylabel("found under", fontsize=7)
            panel.set_xlabel("judged under", fontsize=7)
            panel.set_title(f"Faithfulness: {titles[name]}", fontsize=8)
    return made


def write_page(results: Mapping[str, Result]) -> None:
    """Put each table between its marks, and the figure beside the page."""
    page = DOCS / "corruptions.md"
    text = page.read_text(encoding="utf-8")
    for name, result in results.items():
        begin, end = (f"<!-- corruptions, {name}: {side} -->" for side in ("begin", "end"))
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{tables(result)}\n{end}{rest.split(end)[1]}"
    page.write_text(text, encoding="utf-8")
    figure(results).save(DOCS / "images" / "corruptions.svg")


def main() -> None:
    """Measure what is asked for, and write the page from what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("drawn", "photos"), help="one of the settings")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    for make in () if options.page else (drawn, photos):
        if options.only in (None, make.__name__):
            result = measure(make())
            print(f"two halves of the images: {result.halves}\n{tables(result)}")
    files = {name: OUT / f"{name}.json" for name in ("drawn", "photos")}
    write_page(
        {name: Result(**json.loads(path.read_text())) for name, path in files.items() if path.is_file()}
    )


if __name__ == "__main__":
    main()
