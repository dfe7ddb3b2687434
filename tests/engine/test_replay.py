"""Replays: runs in which the edges into one receiver vary, against plain masked runs of the same masks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from circuitvit.engine import BatchRun, Replay, batch_runs, masked_run, new_workspace
from circuitvit.engine.masked import Workspace
from circuitvit.graph import EdgeMask
from circuitvit.graph.liveness import live_receivers
from tests.strategies import Case, assert_close, cases

DENSITIES = st.sampled_from((0.3, 0.7, 1.0))


@given(cases(), st.data(), st.integers(0, 2**16), DENSITIES)
def test_candidates_are_the_runs_of_their_masks_one_commit_after_the_other(
    case: Case, data: st.DataObject, seed: int, density: float
) -> None:
    """As in a search: all into earlier receivers is kept, and each round starts from the last one's."""
    (run,) = batch_runs(case.task().prepare(case.model), case.n_pairs)
    graph, random = run.sources.graph, np.random.default_rng(seed)
    numbers = st.integers(0, len(graph.receivers) - 1)
    visited = sorted(data.draw(st.lists(numbers, min_size=1, max_size=3, unique=True)), reverse=True)
    kept, room = graph.edge_mask.copy(), new_workspace(run.sources)
    kept[:, visited[0] + 1 :] &= random.random(kept[:, visited[0] + 1 :].shape) < density
    masked_run(run.sources, kept, workspace=room)
    for receiver in visited:
        if live_receivers(graph, kept)[receiver].any():
            visit(run, kept, receiver, room, random)


def visit(run: BatchRun, kept: EdgeMask, receiver: int, room: Workspace, random: np.random.Generator) -> None:
    """Three rounds of candidates for what the receiver hears; `kept` ends as the last one."""
    replay = Replay(run.sources, kept, receiver, room)
    upstream = run.sources.graph.sender_slices[run.sources.graph.receiver_stages[receiver]].start
    for count in (1, 3, 2):
        heard = np.repeat(kept[:upstream, [receiver]], count, axis=1)
        heard &= random.random(heard.shape) < 0.7
        found = replay(heard)
        for candidate in range(count):
            kept[:upstream, receiver] = heard[:, candidate]
            assert_close(found[candidate], masked_run(run.sources, kept), 1e-9)
        replay.commit(count - 1)
