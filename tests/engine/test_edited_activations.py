"""What is read of an edited model is read where it says, and token groups keep their own names."""

from __future__ import annotations

import torch

import circuitvit as cv
from circuitvit.engine import capture
from circuitvit.models.edited import StreamEdit


def test_sites_after_an_edit_of_the_stream_are_read_at_their_own_places() -> None:
    model, images = cv.load("catdog-tiny"), torch.randn(3, 3, 48, 48, generator=torch.manual_seed(0))
    edited = model.edit({"resid1": lambda x: 1.5 * x})
    read = edited.activations(images, ["resid1", "m1.hidden", "resid3", "logits"], progress=False)
    run = capture(edited, images)
    place = [stage.nodes.name for stage in edited.stages].index("attn3")
    assert isinstance(edited.stages[3], StreamEdit)
    torch.testing.assert_close(read["resid1"], 1.5 * run.stream(3))
    torch.testing.assert_close(read["resid3"], run.stream(place))
    torch.testing.assert_close(read["logits"], run.logits)
    mlp = edited.stages[place - 3]
    torch.testing.assert_close(read["m1.hidden"], mlp.hidden(mlp.read(run.stream(place - 3))))


def test_a_group_called_like_a_kind_of_token_is_the_group() -> None:
    """Patches that no mask covers are the group "patch", as in the edges of a task with these groups."""
    model, images = cv.load("catdog-tiny"), torch.randn(2, 3, 48, 48, generator=torch.manual_seed(0))
    top = torch.zeros(48, 48, dtype=torch.bool)
    top[:24] = True
    groups = cv.TokenGroups.from_masks(model, {"top": top})
    pattern = model.edit({"a0.h0.pattern@patch->cls": 0}, groups=groups).activations(
        images, "a0.h0.pattern", progress=False
    )["a0.h0.pattern"]
    assert bool((pattern[:, 0, 1:19] > 0).all())
    assert not pattern[:, 0, 19:].any()
