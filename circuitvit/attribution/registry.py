"""`attribute`: the one way to score edges, whatever the method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from circuitvit.attribution.atp import atp_qk, atp_star
from circuitvit.attribution.auto import auto
from circuitvit.attribution.budget import Budget
from circuitvit.attribution.ceap import ceap
from circuitvit.attribution.eap import eap
from circuitvit.attribution.eap_ig import eap_ig, eap_ig_gauss, eap_ig_left
from circuitvit.attribution.exact import exact
from circuitvit.attribution.gim import gim
from circuitvit.attribution.hybrid import hybrid
from circuitvit.attribution.ifr import ifr
from circuitvit.attribution.local import local
from circuitvit.attribution.method import Method, Scored, Settings, check_effects
from circuitvit.attribution.null import random
from circuitvit.attribution.relp import relp
from circuitvit.engine import choose_batch_size, own_share, summed
from circuitvit.errors import OptionError, unknown_name
from circuitvit.graph import EdgeScores, Provenance
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask, Task, prepare

_EAP_COST = "2 forwards + 1 backward"
_PER_STEP = "2 forwards + steps x (forward + backward)"

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "eap": Method(eap, "edge attribution patching: first order at the clean run", _EAP_COST),
        "eap-ig": Method(
            eap_ig, "EAP averaged along the input path, midpoint rule", _PER_STEP, uses_steps=True
        ),
        "eap-ig-gauss": Method(eap_ig_gauss, "the same at Gauss-Legendre nodes", _PER_STEP, uses_steps=True),
        "eap-ig-left": Method(
            eap_ig_left,
            "the same by the left Riemann sum of older code, to reproduce its numbers",
            _PER_STEP,
            uses_steps=True,
        ),
        "relp": Method(relp, "EAP with relevance propagation's rules for norms and activations", _EAP_COST),
        "gim": Method(gim, "EAP with a softer softmax, constant norms and shared products", _EAP_COST),
        "atp-qk": Method(
            atp_qk,
            "EAP with attention patterns recomputed for queries and keys",
            "2 forwards + 1 backward + each later attention layer once for each sender",
        ),
        "atp-star": Method(
            atp_star,
            "the same without cancellation between layers (GradDrop)",
            "as atp-qk, for each layer",
            by_pair=False,
        ),
        "ceap": Method(
            ceap,
            "conductance along the input path: complete on every cut",
            "2 forwards + steps x (2 forwards + backward)",
            uses_steps=True,
        ),
        "ifr": Method(ifr, "shares of what receivers read; not causal, without metric", "1 forward"),
        "random": Method(
            random, "normal noise: what a method must beat", "nothing", uses_seed=True, by_pair=False
        ),
        "local": Method(
            local,
            "exact at the receiver, to first order after it",
            "2 forwards + 1 backward + each later stage once for each sender",
        ),
        "hybrid": Method(
            hybrid,
            "exact for the edges whose estimate is least certain, local for the others",
            "within the budget; a quarter of exact by default",
            uses_budget=True,
            by_pair=False,
        ),
        "auto": Method(
            auto,
            "exact where it fits the budget, else hybrid",
            "the budget, 60 s by default",
            uses_budget=True,
            by_pair=False,
        ),
        "exact": Method(
            exact,
            "ablate each edge alone and run: the truth",
            "a part of a forward for each edge",
            resumes=True,
        ),
    }
)


def attribute(
    model: Model,
    task: Task | PreparedTask,
    method: str = "eap",
    *,
    steps: int = 5,
    budget: Budget | str | float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    memory: int | None = None,
    state: str | Path | None = None,
    processes: bool = False,
    progress: bool = True,
) -> EdgeScores:
    """Score every edge of a model for a task.

    The scores are the sum over pairs divided by the number of pairs, so they do not depend on the batch size.

    Args:
        model: from `load` or `wrap`.
        task: images, metric and ablation.
        method: one of `METHODS`, such as "eap", "eap-ig" or "exact".
        steps: nodes on the path of the integrated methods.
        budget: what "hybrid" and "auto" may spend: forward-equivalents for each pair, such as 60, or a
            duration for the whole task, such as "60s". Results under a duration depend on the machine.
        seed: of methods that draw.
        batch_size: pairs at once; chosen from the memory budget by default.
        memory: that budget, in bytes.
        state: a file in which "exact" keeps what it has done: given again after an interruption, with the
            same model and task, the run goes on where it was and gives the same scores. Deleted at the end.
        processes: share the pairs among the processes of `torch.distributed`, which must all make this call;
            each gets the scores over all pairs.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: for an unknown method.
        OptionError: for settings that make no sense, or a metric that the method cannot use.
        DataError: if the images cannot be used, or the metric is flat.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> scores = cv.attribute(model, task, method="eap-ig", steps=10)  # doctest: +SKIP
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if steps < 1 or (batch_size is not None and batch_size < 1):
        raise OptionError(f"steps and batch_size must be at least 1, not {steps} and {batch_size}")
    if seed < 0:
        raise OptionError(f"a seed must not be negative: {seed!r}")
    chosen = METHODS[method]
    if budget is not None and not chosen.uses_budget:
        raise OptionError(f"{method} costs what it costs: a budget belongs to 'hybrid' and 'auto'")
    if state is not None and not chosen.resumes:
        raise OptionError(f"{method} takes no state: only long methods ('exact') can be resumed")
    if processes and (state is not None or not chosen.by_pair):
        raise OptionError(f"{method}{' with a state' * (state is not None)} runs in one process only")
    allowed = None if budget is None else Budget.parse(budget)
    prepared = prepare(model, task, progress)
    own = own_share(prepared) if processes else prepared
    size = batch_size or choose_batch_size(prepared, memory)
    kept_in = None if state is None else Path(state)
    found = chosen.score(own, Settings(size, steps, progress, allowed, seed, kept_in))
    found = found if isinstance(found, Scored) else Scored(found)
    name = found.method or method
    parameters = {**({"steps": steps} if chosen.uses_steps else {}), **found.parameters}
    provenance = provenance_of(prepared, name, seed if chosen.uses_seed else None).with_parameters(
        **parameters
    )
    measured = prepared.graph.edge_mask if name == "exact" else found.measured
    values = summed(found.values, prepared.model.device) if processes else found.values
    if processes:
        check_effects(prepared, values)
    return EdgeScores(prepared.graph, values / len(prepared), name, prepared.direction, provenance, measured)


def provenance_of(prepared: PreparedTask, method: str, seed: int | None = None) -> Provenance:
    """The origin of a result computed on a prepared task; a random ablation's seed stands in for none."""
    model = prepared.model
    seed = getattr(prepared.ablation, "seed", None) if seed is None else seed
    return Provenance(model.name, model.weights_hash, prepared.label, method, seed=seed)
