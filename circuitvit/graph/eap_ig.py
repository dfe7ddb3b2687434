"""The JSON layout of EAP-IG and MIB: `cfg`, `nodes` and `edges`, so that circuits move between tools.

The layout knows one kind of model: an input, `n_layers` blocks of `n_heads` heads and one MLP, logits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from circuitvit.errors import FileError, OptionError
from circuitvit.graph.names import parse_edge
from circuitvit.graph.topology import MAX_ENTRIES, EdgeMask, Graph, StageNodes


def transformer_graph(n_layers: int, n_heads: int, d_model: int = 0, parallel: bool = False) -> Graph:
    """The graph of a plain transformer, with the names and order of EAP-IG.

    Args:
        n_layers: number of blocks.
        n_heads: heads in each block.
        d_model: width of the residual stream.
        parallel: whether a block's attention and MLP read the same stream.

    Example:
        >>> transformer_graph(12, 3).n_edges
        2845
    """
    stages = [StageNodes("input", "input", 0, senders=("input",))]
    for layer in range(n_layers):
        heads = tuple(f"a{layer}.h{head}" for head in range(n_heads))
        ports = tuple(f"{head}<{port}>" for port in "qkv" for head in heads)
        mixes = tuple(port != "q" for port in "qkv" for _ in heads)
        mlp = (f"m{layer}",)
        if parallel:
            mixes = (*mixes, False)
            stages.append(StageNodes(f"block{layer}", "block", layer, heads + mlp, ports + mlp, mixes=mixes))
        else:
            stages.append(StageNodes(f"attn{layer}", "attention", layer, heads, ports, mixes=mixes))
            stages.append(StageNodes(f"mlp{layer}", "mlp", layer, mlp, mlp, mixes=(False,)))
    stages.append(StageNodes("readout", "readout", n_layers, receivers=("logits",)))
    return Graph(tuple(stages), d_model=d_model)


def to_layout(
    graph: Graph, kept: EdgeMask, values: NDArray[np.float64] | None, nodes: Collection[str]
) -> dict[str, Any]:
    """A circuit in the layout of EAP-IG; edges without a score are written with score 0.

    Args:
        graph: of the circuit.
        kept: `(sender, receiver, group)`, its edges.
        values: `(sender, receiver, group)`, their scores.
        nodes: that its edges touch.

    Raises:
        OptionError: if the graph is not that of a plain transformer with one token group.
    """
    layers = {stage.layer for stage in graph.stages if stage.kind != "readout"}
    heads = [name for name in graph.senders if name.startswith("a0.h")]
    parallel = any(stage.kind == "block" for stage in graph.stages)
    if graph != transformer_graph(len(layers), len(heads), parallel=parallel):
        raise OptionError(
            "the EAP-IG layout holds plain transformers with one token group; save as 'circuitvit' instead"
        )
    scores = np.zeros(graph.shape) if values is None else values
    columns = (graph.edges, scores[graph.edge_mask].tolist(), kept[graph.edge_mask].tolist())
    sizes = {"n_layers": len(layers), "n_heads": len(heads)}
    return {
        "cfg": {**sizes, "parallel_attn_mlp": parallel, "d_model": graph.d_model},
        "nodes": {node: {"in_graph": node in nodes or node == "logits"} for node in graph.nodes},
        "edges": {
            name: {"score": score, "in_graph": inside} for name, score, inside in zip(*columns, strict=True)
        },
    }


def from_layout(content: Mapping[str, Any]) -> tuple[Graph, EdgeMask, NDArray[np.float64]]:
    """Graph, kept edges and scores from the layout of EAP-IG; files of MIB leave out `score`.

    Raises:
        FileError: if something is missing or of the wrong type.
    """
    graph = _graph_of(content.get("cfg"))
    edges = content.get("edges")
    if not isinstance(edges, dict):
        raise FileError("the EAP-IG layout needs an object 'edges'")
    kept, values = np.zeros(graph.shape, dtype=bool), np.zeros(graph.shape)
    for name, entry in edges.items():
        index = graph.edge_index(str(parse_edge(name)))
        known = entry if isinstance(entry, dict) else {"in_graph": entry}
        inside, score = known.get("in_graph"), known.get("score", 0.0)
        if not isinstance(inside, bool) or isinstance(score, bool) or not isinstance(score, (int, float)):
            raise FileError(f"edge {name!r}: expected in_graph true or false and a number as score")
        kept[index], values[index] = inside, score
    return graph, kept, values


def _size(config: Any, name: str) -> int:
    size = config.get(name) if isinstance(config, dict) else None
    if isinstance(size, bool) or not isinstance(size, int):
        raise FileError(f"the EAP-IG layout needs 'cfg' with an integer {name}")
    return size


def _graph_of(config: Any) -> Graph:
    n_layers, n_heads = _size(config, "n_layers"), _size(config, "n_heads")
    if n_layers < 1 or n_heads < 1 or 3 * (n_layers * (n_heads + 1)) ** 2 > MAX_ENTRIES:
        raise FileError(f"cfg: {n_layers} layers of {n_heads} heads is no model we know")
    d_model = config.get("d_model")
    known_width = isinstance(d_model, int) and d_model >= 0
    return transformer_graph(
        n_layers, n_heads, d_model if known_width else 0, bool(config.get("parallel_attn_mlp"))
    )
