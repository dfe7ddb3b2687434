"""An example of every result, made of its type hints alone; no model runs.

Arrays get the sizes that their dimensions name, so that an example fits itself. What hints cannot say stands
in `SPECIAL` and `SHAPED`.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import torch

import circuitvit
from circuitvit.defences.mended import Row
from circuitvit.graph import Circuit, EdgeScores, Graph, NodeScores, Provenance, UnitScores
from circuitvit.graph.eap_ig import transformer_graph
from circuitvit.graph.records import hints_of
from circuitvit.graph.results import Result, ToldResult
from circuitvit.models.zoo import InputSpec
from circuitvit.verification import Claim, CrossEffect, Estimate, GroupAccuracy
from circuitvit.views import Counterfactual, Suppressed
from circuitvit.views.subjects import Subjects

TEXTS = ("a3.h1", 'naïve, "quoted"\n<script>x</script>', "", "犬 🐶", "=1+1")
NUMBERS = (0.1, -0.0, 5e-324, 1e300, -1 / 3, 2.0)


def result_kinds() -> list[type[Result]]:
    """Every result of the library that can be made, in order of its name."""
    for module in pkgutil.walk_packages(circuitvit.__path__, "circuitvit."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

    def below(kind: type) -> Iterator[type]:
        for each in kind.__subclasses__():
            yield from (each, *below(each))

    own = (kind for kind in below(Result) if kind.__module__.startswith("circuitvit."))
    return sorted({*own} - {ToldResult}, key=lambda kind: kind.__name__)


class Maker:
    """Makes values for type hints, the same for the same seed.

    Args:
        seed: of all that is drawn.
        large: whether sizes are those of a model of 12 layers and 12 heads, and not 2 or 3.
    """

    def __init__(self, seed: int, large: bool = False) -> None:
        self.random = np.random.default_rng(seed)
        self.large = large
        fixed = {"height": 2, "width": 2, "token": 5, "key": 5, "query": 5, "_source": 5, "grid": (2, 2)}
        self.sizes: dict[str, Any] = {**fixed, "_unit": 3, "_width": 4, "shape": (3, 2, 2), "change": (2, 3)}

    def size(self, dimension: str) -> Any:
        base, _, more = dimension.lstrip("*").partition("+")
        if base.isdigit():
            return int(base)
        wide = {"head": 144, "image": 40, "edge": 500, "sender": 160, "position": 25}.get(base, 30)
        self.sizes.setdefault(base, wide if self.large else int(self.random.integers(2, 4)))
        return self.sizes[base] + int(more) if more else self.sizes[base]

    def array(self, hint: Any, loose: bool) -> Any:
        shape: tuple[int, ...] = ()
        for name in hint.dim_str.split():
            size = self.size(name)
            shape += size if isinstance(size, tuple) else (size,)
        values = self.random.choice((0.5, -0.25, 2.0) if self.large else NUMBERS, size=shape)
        if loose and values.size:
            values.reshape(-1)[0] = math.nan
        if hint.array_type is torch.Tensor:
            return (
                torch.tensor(values)
                .to((torch.float32, torch.bfloat16)[int(self.random.integers(2))])
                .clamp(-9, 9)
            )
        kind = str(hint.dtypes[-1])
        if kind.startswith(("int", "uint")):
            return self.random.integers(0, 5, size=shape).astype(kind)
        return values > 0 if kind.startswith("bool") else values

    def value(self, hint: Any, count: int | None = None, loose: bool = False) -> Any:
        """Something of a kind; tuples have `count` entries."""
        origin, inner = get_origin(hint), get_args(hint)
        if hasattr(hint, "dim_str"):
            return self.array(hint, loose)
        if origin in (Union, types.UnionType):
            return self.value(inner[int(self.random.integers(len(inner)))], count, loose)
        if origin is Literal:
            return inner[0]
        if hint in SPECIAL:
            return SPECIAL[hint](self)
        if isinstance(hint, type) and is_dataclass(hint):
            return self.example(hint)
        if origin is tuple and not (len(inner) == 2 and inner[1] is Ellipsis):
            return tuple(self.value(each) for each in inner)
        if origin is not None and issubclass(origin, Mapping):
            keys = [self.value(inner[0]) for _ in range(2)]
            return {key: self.value(inner[1], loose=loose) for key in keys}
        if origin is not None and issubclass(origin, Sequence):
            found = [self.value(inner[0]) for _ in range(2 if count is None else count)]
            return found if origin is list else tuple(found)
        return {
            str: lambda: TEXTS[int(self.random.integers(len(TEXTS)))],
            int: lambda: int(self.random.integers(1, 9)),
            float: lambda: math.nan if loose else float(self.random.choice(NUMBERS)),
            bool: lambda: bool(self.random.integers(2)),
            range: lambda: range(2),
            types.NoneType: lambda: None,
            torch.Tensor: lambda: torch.tensor([True, False]),
            Any: lambda: [1, 0.5, "x", None],
        }[hint]()

    def example(self, kind: type, **given: Any) -> Any:
        """A value of a dataclass; its own dimensions have sizes of their own."""
        given = {**SHAPED.get(kind.__name__, lambda maker: {})(self), **given}
        along = dict(pair.split(":") for pair in getattr(kind, "along", "").split())
        loose = getattr(kind, "may_be_nan", "").split()
        before, found = dict(self.sizes), {}
        for each in fields(kind):
            hint, count = (
                hints_of(kind)[each.name],
                self.size(along[each.name]) if each.name in along else None,
            )
            if each.name == "schema":
                assert each.default is not MISSING
                found[each.name] = each.default
            elif each.name not in given:
                found[each.name] = self.value(hint, count, each.name in loose)
        self.sizes = before | {name: self.sizes[name] for name in ("image",) if name in self.sizes}
        return kind(**found, **given)


GRAPH = transformer_graph(2, 2)


def _values(maker: Maker, graph: Graph = GRAPH) -> Any:
    return np.where(graph.edge_mask, maker.random.normal(size=graph.shape), 0.0)


def _circuit(maker: Maker) -> Circuit:
    graph = transformer_graph(12, 12) if maker.large else GRAPH
    kept = maker.random.random(graph.shape) < 0.5  # files keep the scores of these alone
    return Circuit(graph, kept, _values(maker, graph) * kept + 0.0, Provenance("m", task="t"))


def _mask(maker: Maker) -> Any:
    return maker.random.random((transformer_graph(12, 12) if maker.large else GRAPH).shape) < 0.5


def _scores(maker: Maker) -> EdgeScores:
    return EdgeScores(GRAPH, _values(maker), "eap", measured=GRAPH.edge_mask)


def _nodes(maker: Maker) -> NodeScores:
    return NodeScores(GRAPH, maker.random.normal(size=(len(GRAPH.senders), 1)), "exact")


def _units(maker: Maker) -> UnitScores:
    numbers = range(3072 if maker.large else 2)
    names = (*(f"m0.n{number}" for number in numbers), "m0.rest", "a0.h0.f0", "a0.h0.rest", "a0.h0.error")
    return UnitScores(names, ("cls", "patch"), maker.random.normal(size=(len(names), 2)), "eap")


def _subjects(maker: Maker) -> Subjects:
    return maker.example(Subjects, grid=(2, 2), kinds=("cls", *["patch"] * 4))


def _spec(maker: Maker) -> InputSpec:
    from circuitvit.models.zoo import ClipSpec

    return (InputSpec, ClipSpec)[int(maker.random.integers(2))]((3, 2, 2), (0.5,) * 3, (0.25,) * 3)


SPECIAL: dict[Any, Callable[[Maker], Any]] = {
    Graph: lambda maker: GRAPH,
    Circuit: _circuit,
    EdgeScores: _scores,
    NodeScores: _nodes,
    UnitScores: _units,
    Subjects: _subjects,
    InputSpec: _spec,
}
"""What is made in another way than by its hints."""


def _outcomes(maker: Maker, *changes: int) -> Any:
    from circuitvit.views import Outcomes

    maker.sizes["change"] = changes
    return maker.example(Outcomes)


def _ranking(maker: Maker) -> Any:
    from circuitvit.views import Picks, Ranking

    picks = Picks(
        np.array([0, 2]), np.array([1, -1]), np.float32([2.0, 1.0]), np.zeros((2, 2, 2), np.float32)
    )
    return maker.example(Ranking, rows={"top": picks, 0.5: picks}, quantiles={0.0: -1.0, 0.5: 0.0, 1.0: 2.5})


def _versions(maker: Maker) -> tuple[str, ...]:
    maker.sizes["version"] = 3
    return "without", "neutral", "word"


def _defence(maker: Maker) -> dict[str, Any]:
    from circuitvit.defences import TypographicAttack
    from circuitvit.defences.silenced import Step

    attack = maker.example(TypographicAttack)
    return {"before": attack, "after": attack, "steps": (Step("a0.h1", 1.0, 0.5, True),),
            "means": np.ones((1, 4), np.float32)}  # fmt: skip


SHAPED: dict[str, Callable[[Maker], dict[str, Any]]] = {
    "Across": lambda maker: {
        "steps": (0, 10, 40), "names": ("a",) * 3, "weights": ("b",) * 3, "circuit": _circuit(maker),
        "behaviour": (maker.example(Estimate),) * 3, "faithfulness": (None, None, maker.example(Estimate)),
        "edges": GRAPH.edges[:2], "p": np.array([[0.5, 1e-9]] * 2), "p_behaviour": np.array([0.04, 1.0]),
        **dict.fromkeys(("effects", "widths"), np.array([[0.1, -0.0], [1 / 3, 1.0], [0.5, 0.25]])),
    },
    "Agreement": lambda maker: {"circuits": (_circuit(maker),) * 3, "findings": (), "at_least": 0.5},
    "Candidate": lambda maker: {"kept": _mask(maker)},
    "Certificate": lambda maker: {
        "votes": np.where(GRAPH.edge_mask, maker.random.integers(0, 101, GRAPH.shape), 0),
        "subsets": 100, "pairs": 8, "k": 3, "alpha": 0.05,
    },
    "Thinned": lambda maker: {
        "circuits": (_circuit(maker),) * 2, "faithfulness": (0.9, -0.0), "agreement": (1.0, 1 / 3),
    },
    "LearnedMask": lambda maker: {
        "openness": np.where(_circuit(maker).graph.edge_mask, 0.5, -np.inf),
    },
    "Drift": lambda maker: {
        "verdict": "weaker", "tolerance": 0.1, "circuit": _circuit(maker), "n": 7, "largest": 0.3,
        "edges": GRAPH.edges[:3],
        **dict.fromkeys(("old", "new", "low", "high"), np.array([0.1, -0.0, 1 / 3])),
    },
    "Audit": lambda maker: {
        "verdict": "carries", "least": 0.1, "groups": (maker.example(GroupAccuracy),) * 2,
        "specificity": None, "certificate": None, "circuit": _circuit(maker), "ablated": _circuit(maker),
    },
    "Specificity": lambda maker: {
        "names": ("a", "b"), "circuits": (_circuit(maker),) * 2, "p_values": (0.02, None),
        "alpha": 0.05,
        "effects": tuple(
            maker.example(CrossEffect, circuit=circuit, behaviour=behaviour, p=None)
            for circuit in "ab" for behaviour in "ab"
        ),
    },
    "Match": lambda maker: {
        "nodes": ("a0.h0", "a0.h1", "m0"), "others": ("a1.h0", "m1"), "partner": np.array([0, -1, 1]),
        **{name: np.array([0.5, math.nan, -0.25]) for name in ("low", "high", "held", "chance", "p")},
        "similarity": np.array([[0.5, math.nan], [0.1, math.nan], [math.nan, 0.75]]),
    },
    "TokenAblations": lambda maker: {
        "tokens": ("cls", "patch"), "counts": (1.0, 4.0), "ways": ("mean", "zero"),
        "outcomes": _outcomes(maker, 2, 2),
    },
    "KnockOuts": lambda maker: {"pairs": (("cls", "patch"),) * 2, "outcomes": _outcomes(maker, 2, 2)},
    "Decomposition": lambda maker: {
        "kinds": ("head",) * maker.size("head"), "senders": ("a",) * maker.size("head"),
        "layers": (0,) * maker.size("head"),
        "by_sender": np.ones((maker.size("image"), maker.size("head"), maker.size("dim"))),
    },
    "TextSpan": lambda maker: {"chosen": np.zeros((maker.size("head"), maker.size("phrase")), np.int64)},
    "Steering": lambda maker: {
        "scales": (-1.0, 1.0), "outcomes": _outcomes(maker, 2), "controls": _outcomes(maker, 3, 2),
    },
    "Registers": lambda maker: {
        "at": "resid1", "positions": ("resid0", "resid1"), "grid": (2, 2), "of": "outliers",
        "norms": np.ones((maker.size("image"), 2, 5), np.float32), "thresholds": np.array([1.0, math.inf]),
    },
    "Equivariance": lambda maker: {
        "groups": {"a3": range(3)}, "units": ("u", "v", "w"), "transforms": ("mirror", "shift"),
        **{name: np.full((2, 3), 0.25) for name in ("equivariant", "invariant", "pooled", "control")},
        **{name: {"a3": np.full((2, 3, 3), math.nan)} for name in ("matches", "others")},
    },
    "LinearProbes": lambda maker: {
        "sites": ("resid0", "m1"), "weights": {"resid0": np.ones((2, 2, 3)), "m1": np.zeros((2, 2, 4))},
        "places": ("cls", "patch"), "classes": ("cat", "dog"), "grid": (2, 2), "reads": "any",
        "kinds": ("cls", *["patch"] * 4), "biases": np.zeros((2, 2, 2)),
        "majority": np.array([0.5, math.nan]),
        **{name: np.ones((2, 2, maker.size("image"))) for name in ("right", "control")},
        "tokens": np.ones((2, 5), bool),
    },
    "LogitLens": lambda maker: {"labels": {0: "cat", 4: "dog"}},
    "TypographicAttack": lambda maker: {"versions": _versions(maker)},
    "HeadDefence": lambda maker: _defence(maker),
    "TopImages": lambda maker: {
        "images": ("a.png", "b.png", "c.png"), "shown": np.array([0, 2]),
        "subjects": maker.example(
            Subjects, names=("a.png", "c.png"), pictures=np.zeros((2, 2, 2, 3), np.uint8), grid=(2, 2),
            kinds=("cls", *["patch"] * 4),
        ),
        "rankings": {f"m0.hidden[{unit}]": _ranking(maker) for unit in range(144 if maker.large else 2)},
    },
    "Ranking": lambda maker: {
        "rows": {}, "quantiles": {0.0: -1.0, 0.5: 0.0, 1.0: 2.5},
    },
    "Scrubbing": lambda maker: {
        "original": np.full(maker.size("image"), 2.0), "floor": np.zeros(maker.size("image")),
        "scrubbed": np.ones((maker.size("draw"), maker.size("image"))), "n_bootstrap": 100,
        "outside": np.ones((maker.size("draw"), maker.size("image"))), "clusters": None,
        "alone": np.ones((maker.size("claim"), maker.size("draw"), maker.size("image"))),
        "claims": tuple(
            maker.example(Claim, classes=("a", "b"), members=(0, 1) * maker.size("image"))
            for _ in range(maker.size("claim"))
        ),
    },
    "Row": lambda maker: {"removed": ("a0.h1.z",), "kinds": ("head",), "constants": {"a0.h1.z": np.ones(4)}},
    "Behaviour": lambda maker: {
        "counts": "right", "groups": (), "effect": np.ones((2, maker.size("pair"))),
        "answers": np.ones((2, maker.size("pair")), bool),
    },
    "Mended": lambda maker: {
        "method": "circuit",
        "rows": tuple(maker.example(Row, method=name) for name in ("as it is", "circuit")),
    },
    "Why": lambda maker: {
        "nodes": ("a0.h1", "m0"), "looking": ("a0.h1",), "margin": -0.5, "tokens": "cls",
        "alone": np.full((2, 2), 0.25), "maps": np.ones((1, maker.size("image"), 2, 2), np.float32),
        "counterfactuals": (maker.example(Counterfactual, nodes=("m0",)),) * 2,
        "suppressed": (maker.example(Suppressed, nodes=("m0",)),),
        "held_out": ("a.png", "b.png"), "right_before": np.array([True, False]),
        "right_after": np.array([[True, True]]),
    },
    "Point": lambda maker: {"fraction": float(maker.random.random())},
}  # fmt: skip
"""Fields whose values hang together in a way that hints do not say."""


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal in kind and to the last bit, but for what kind of NaN there is."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, np.ndarray):
        signs = one.dtype.kind != "f" or np.array_equal(np.signbit(one), np.signbit(other))
        equal = np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
        return one.dtype == other.dtype and equal and signs
    if isinstance(one, Circuit):
        return one == other and same(one.values, other.values) and one.provenance == other.provenance
    if is_dataclass(one):
        return all(same(getattr(one, each.name), getattr(other, each.name)) for each in fields(one))
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (one != one and other != other)
