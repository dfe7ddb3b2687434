"""Testing a hypothesis about one head: ablate edges by hand and see what becomes of the behaviour.

    python examples/verify_hypothesis.py

In `catdog-tiny` the last MLP has nearly the last word, and heads of the last layer feed it. A story about the
strongest of them suggests itself: it finds the animal's features by what the patches hold (its keys), and
moves what they hold (its values) to the class token; what the asking token holds (its query) does not matter.
A story can be wrong, so here is what it predicts, as sets of edges to ablate.
"""

from __future__ import annotations

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.graph import node_of, parse_edge


def main(pairs: int = 64) -> dict[str, float]:
    """Ablate sets of edges and give the share of the behaviour that is left after each."""
    model = cv.load("catdog-tiny")
    task = cv.Task(*catdog_pairs(pairs, seed=2), metric=cv.logit_diff("cat", "dog"), groups="kind")
    graph = task.prepare(model).graph  # with an edge for class token and patches each, such as m0->m1@cls

    head, bystander = heads_to_test(model)
    print(f"the head under test is {head}; {bystander} is the head that seems to do least\n")

    def edges(into: str, at: str = "") -> cv.Circuit:
        """The edges into a receiver (`a1.h0<q>`) or a node (`a1.h0`), at all tokens or at a group of them."""
        chosen = []
        for name in graph.edges:
            edge = parse_edge(name)
            if into in (edge.receiver, node_of(edge.receiver)) and at in ("", edge.group):
                chosen.append(name)
        return cv.Circuit.from_edges(graph, chosen)

    experiments = {
        "nothing": cv.Circuit.empty(graph),
        "all that the head hears": edges(head),
        "its query": edges(f"{head}<q>"),
        "its keys": edges(f"{head}<k>"),
        "its values": edges(f"{head}<v>"),
        "its values at patches": edges(f"{head}<v>", at="patch"),
        "its values at the class token": edges(f"{head}<v>", at="cls"),
        "all that the bystander hears": edges(bystander),
    }

    whole = mean_metric(model, task, cv.Circuit.empty(graph))
    nothing = mean_metric(model, task, cv.Circuit.full(graph))
    left = {}
    print(f"{'ablated':32}{'edges':>7}{'left of the behaviour':>24}")
    for name, ablated in experiments.items():
        left[name] = (mean_metric(model, task, ablated) - nothing) / (whole - nothing)
        print(f"{name:32}{len(ablated):7}{left[name]:24.1%}")
    return left


def heads_to_test(model: cv.Model) -> tuple[str, str]:
    """The head with the strongest edge into the last MLP, and the head whose edges are weakest.

    They are chosen on other pictures than those that the hypothesis is tested on.
    """
    task = cv.Task(*catdog_pairs(16, seed=1), metric=cv.logit_diff("cat", "dog"))
    scores = cv.attribute(model, task, "exact", progress=False)
    last_mlp = [node for node in model.graph.nodes if node.startswith("m")][-1]
    heads = [node for node in model.graph.senders if node.startswith("a")]
    into_last_mlp = {head: scores[f"{head}->{last_mlp}"] for head in heads}
    strongest_of = dict.fromkeys(heads, 0.0)
    for name, effect in scores.to_dict().items():
        sender = parse_edge(name).sender
        if sender in strongest_of:
            strongest_of[sender] = max(strongest_of[sender], abs(effect))
    return min(heads, key=into_last_mlp.__getitem__), min(heads, key=strongest_of.__getitem__)


def mean_metric(model: cv.Model, task: cv.Task, ablated: cv.Circuit) -> float:
    """The mean logit difference between cat and dog with these edges ablated."""
    logits = cv.run(model, task, ablate=ablated)
    return float((logits[:, 0] - logits[:, 1]).mean())


if __name__ == "__main__":
    main()
