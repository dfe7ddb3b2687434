"""Replays: runs in which the edges into one receiver vary, against plain masked runs of the same masks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from circuitvit.engine import Replay, batch_runs, masked_run, new_workspace
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
    receiver = data.draw(st.integers(0, len(graph.receivers) - 1), label="receiver")
    kept = graph.edge_mask.copy()
    kept[:, receiver + 1 :] &= random.random(kept[:, receiver + 1 :].shape) < density
    if not live_receivers(graph, kept)[receiver].any():
        return
    room = new_workspace(run.sources)
    masked_run(run.sources, kept, workspace=room)
    replay = Replay(run.sources, kept, receiver, room)
    upstream = graph.sender_slices[graph.receiver_stages[receiver]].start
    for count in (1, 3, 2):
        heard = np.repeat(kept[:upstream, [receiver]], count, axis=1)
        heard &= random.random(heard.shape) < 0.7
        found = replay(heard)
        for candidate in range(count):
            kept[:upstream, receiver] = heard[:, candidate]
            assert_close(found[candidate], masked_run(run.sources, kept), 1e-9)
        replay.commit(count - 1)
