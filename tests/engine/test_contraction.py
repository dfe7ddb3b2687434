"""The contraction of senders' changes with receivers' gradients, against one sum written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from circuitvit.engine import add_products, contraction, differences, gradients
from circuitvit.engine.runs import capture, outputs
from circuitvit.models import Factored
from circuitvit.models.factored import products
from tests.strategies import Case, assert_close, cases

ROWS = st.sampled_from((1, 100, contraction.ROW))


@given(cases(smooth=True), ROWS)
def test_it_is_the_sum_over_images_and_tokens_however_many_are_taken_at_once(case: Case, row: int) -> None:
    prepared = case.task().prepare(case.model)
    graph, model = prepared.graph, case.model
    (batch,) = prepared.batches(case.n_pairs)
    found = gradients(model, capture(model, case.base).compacts[0], case.formula)
    other = capture(model, case.paired, essential=True)
    changes = differences(model.stages, other.compacts, found.capture.compacts)
    total = torch.zeros(graph.shape, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contraction, "ROW", row)
        add_products(total, graph, changes, found.by_stage(), batch.members)
    written = outputs(model.stages, other.compacts) - outputs(model.stages, found.capture.compacts)
    for index, slopes in enumerate(found.by_stage(), 1):
        upstream, receivers = graph.sender_slices[index].start, graph.receiver_slices[index]
        expected = _summed(written[:upstream], slopes.expand(), batch.members, len(graph.groups))
        assert_close(total[:upstream, receivers], expected, 1e-10)


def _summed(written: Tensor, slopes: Tensor, members: Tensor | None, count: int) -> Tensor:
    """`(sender, receiver, group)`."""
    each = torch.einsum("sbtd,rbtd->srbt", written[:, :, : slopes.shape[2]], slopes)
    if members is None:
        return each.sum(dim=(2, 3))[..., None]
    inside = [members[..., : slopes.shape[2]] == group for group in range(count)]
    return torch.stack([(each * chosen).sum(dim=(2, 3)) for chosen in inside], dim=-1)


# -- narrow factors ----------------------------------------------------------------------------------------


def a_tensor(seed: int = 0) -> Factored:
    """Three rows, two images of four tokens, a norm's term at two points."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    along, x_hat = (noise(3, 2, 4, 1), noise(3, 2, 4, 1)), (noise(2, 4, 6), noise(2, 4, 6))
    return Factored(noise(3, 2, 4, 5), noise(3, 5, 6), along, x_hat)


def test_factors_expand_to_what_they_say() -> None:
    each = a_tensor()
    assert each.weight is not None
    product = torch.einsum("rbtk,rkd->rbtd", each.narrow, each.weight)
    bent = product - sum(along * x_hat for along, x_hat in zip(each.along, each.x_hat, strict=True))
    assert each.shape == tuple(bent.shape)
    assert_close(each.expand(), bent, 1e-12)


@pytest.mark.parametrize("made", [a_tensor(), Factored(a_tensor().expand())], ids=["product", "itself"])
def test_room_is_filled_wherever_it_lies(made: Factored) -> None:
    whole = made.expand().clone()
    room = torch.zeros(3, 2, 9, 6, dtype=torch.float64)
    assert made.expand(room[:, :, 2:6]).data_ptr() == room[:, :, 2:6].data_ptr()
    assert_close(room[:, :, 2:6], whole, 1e-12)
    assert room[:, :, :2].abs().max() == room[:, :, 6:].abs().max() == 0
    assert_close(made.expand(torch.empty(3, 2, 4, 6, dtype=torch.float64)), whole, 1e-12)
    assert_close(made.expand(), whole, 1e-12)


@pytest.mark.parametrize("made", [a_tensor(), Factored(a_tensor().expand())], ids=["product", "itself"])
def test_places_are_listed_image_after_image(made: Factored) -> None:
    listed = made.expand()[:, :, :3].reshape(3, 6, 6)
    assert_close(made.at(3).expand(), listed, 1e-12)
    assert_close(made.at(3).between(2, 5).expand(), listed[:, 2:5], 1e-12)
    chosen = torch.tensor([0, 4])
    assert_close(made.at(3, chosen).expand(), listed[:, chosen], 1e-12)


@pytest.mark.parametrize("cores", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_products_are_the_same_however_they_are_shared_among_cores(
    cores: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(count, 5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    right = torch.randn(count, 3, 4, generator=generator, dtype=torch.float64)
    expected = torch.einsum("rpi,riw->rpw", left, right)
    assert_close(products(left, right).detach(), expected.detach(), 1e-12)
    room = torch.empty(count, 5, 4, dtype=torch.float64)
    assert products(left.detach(), right, room) is room
    assert_close(room, expected.detach(), 1e-12)
    slopes = [torch.autograd.grad(made.sum(), left)[0] for made in (products(left, right), expected)]
    assert_close(slopes[0], slopes[1], 1e-12)
