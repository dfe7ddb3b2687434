"""The table of scoring methods. Reading it loads neither torch nor any method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

from circuitvit.errors import NameNotFoundError, OptionError, unknown_name

_EAP_COST = "2 forwards + 1 backward"


@dataclass(frozen=True)
class Method:
    """A scoring method, as `circuitvit attribute --help` and the documentation list it.

    Attributes:
        place: where its function is, "file:function" inside `circuitvit.attribution`.
        summary: one line.
        cost: in passes of the plain model over a pair.
        by_pair: whether the scores of a task are sums over its pairs, whatever the others are.
        by_edge: whether the method itself divides its edges among processes, so that pairs need not be.
        shares_of: what its scores are shares of, where they are no effects and have no sign.
    """

    place: str
    summary: str
    cost: str
    by_pair: bool = True
    by_edge: bool = False
    shares_of: str = ""

    @property
    def score(self) -> Callable[..., Any]:
        """The function: a prepared task, how to run, and its own keywords to scores summed over pairs."""
        file, name = self.place.split(":")
        function: Callable[..., Any] = getattr(import_module(f"circuitvit.attribution.{file}"), name)
        return function

    @property
    def keywords(self) -> Mapping[str, inspect.Parameter]:
        """What the method takes besides the task, in order; types as objects."""
        parameters = inspect.signature(self.score, eval_str=True).parameters
        return {name: each for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY}


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "eap": Method("eap:eap", "edge attribution patching: first order at the clean run", _EAP_COST),
        "eap-ig": Method(
            "paths:eap_ig",
            "EAP averaged along the input path; rule= places the steps",
            "2 forwards + steps x (forward + backward)",
        ),
        "relp": Method(
            "eap:relp", "EAP with relevance propagation's rules for norms and activations", _EAP_COST
        ),
        "gim": Method("eap:gim", "EAP with a softer softmax, constant norms and shared products", _EAP_COST),
        "atp-qk": Method(
            "atp:atp_qk",
            "EAP with attention patterns recomputed for queries and keys",
            "2 forwards + 1 backward + each later attention layer once for each sender",
        ),
        "atp-star": Method(
            "atp:atp_star",
            "the same without cancellation between layers (GradDrop)",
            "as atp-qk, for each layer",
            by_pair=False,
        ),
        "ceap": Method(
            "paths:ceap",
            "conductance along the input path: complete on every cut",
            "2 forwards + steps x (2 forwards + backward)",
        ),
        "ifr": Method(
            "baselines:ifr",
            "shares of what receivers read; not causal, without metric",
            "1 forward",
            shares_of="what is read",
        ),
        "random": Method(
            "baselines:random", "normal noise: what a method must beat", "nothing", by_pair=False
        ),
        "local": Method(
            "local:local",
            "exact at the receiver, to first order after it",
            "2 forwards + 1 backward + each later stage once for each sender",
        ),
        "hybrid": Method(
            "budget:hybrid",
            "exact for the edges whose estimate is least certain, local for the others",
            "within the budget; a quarter of exact by default",
            by_pair=False,
            by_edge=True,
        ),
        "auto": Method(
            "budget:auto",
            "exact where it fits the budget, else hybrid",
            "the budget, 60 s by default",
            by_pair=False,
            by_edge=True,
        ),
        "exact": Method(
            "exact:exact",
            "ablate each edge alone and run: the truth",
            "a part of a forward for each edge",
            by_edge=True,
        ),
    }
)
"""All scoring methods, by name."""

DEFAULT = "local"
"""The best of those that are cheap."""

FORMER = {"eap-ig-gauss": "gauss-legendre", "eap-ig-left": "left"}
"""Names that have become a rule of `eap-ig`."""


def find_method(name: str, others: Iterable[str] = ()) -> Method:
    """The method of a name.

    Args:
        name: one of `METHODS`.
        others: further names that a wrong one is compared with, for the message alone.

    Raises:
        NameNotFoundError: for an unknown name, with the nearest; for a former one, with what it is now.
    """
    if not isinstance(name, str):
        raise unknown_name("method", name, (*METHODS, *others))
    if name in FORMER:
        raise NameNotFoundError(f"{name!r} is method='eap-ig' with rule={FORMER[name]!r} now")
    if name not in METHODS:
        raise unknown_name("method", name, (*METHODS, *others))
    return METHODS[name]


def check_keywords(method: str, names: Iterable[str]) -> None:
    """Refuse keywords that a method does not take.

    Raises:
        OptionError: naming the methods that do take such a keyword, or the keywords that this one takes.
    """
    own = METHODS[method].keywords
    for name in names:
        if name not in own:
            takers = [repr(other) for other, each in METHODS.items() if name in each.keywords]
            whose = f"it belongs to {' and '.join(takers)}" if takers else "no method does"
            rest = f"; {method} takes {', '.join(own)}" if own else ""
            raise OptionError(f"{method} takes no {name!r}: {whose}{rest}")
