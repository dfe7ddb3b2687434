"""Reference outputs: what every kind of ablation writes, whatever the batch size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import circuitvit as cv
from circuitvit.engine import batch_runs
from circuitvit.errors import DataError, ModelError
from tests.reference.literal_scores import mean_reference
from tests.reference.literal_vit import by_sender
from tests.strategies import Case, Recipe, assert_close, cases

EVERY_ABLATION = ("patch", "mean", "mean-tokens", "zero", "noise", "resample")


def references(case: Case, task: cv.Task | None = None, batch_size: int | None = None) -> Tensor:
    """The reference outputs of all pairs, `(sender, pair, token, d_model)`."""
    prepared = (task or case.task()).prepare(case.model)
    runs = batch_runs(prepared, batch_size or case.n_pairs)
    return torch.cat([run.sources.reference_outputs() for run in runs], dim=1)


@given(cases())
def test_reference_outputs_are_those_of_the_definition(case: Case) -> None:
    found = by_sender(case.model.graph.senders, references(case))
    for sender, expected in case.reference.items():
        assert_close(found[sender], expected)


@given(cases(max_depth=1), st.sampled_from(EVERY_ABLATION))
def test_reference_outputs_do_not_depend_on_the_batch_size(case: Case, ablation: str) -> None:
    case = Case(case.recipe, n_pairs=5, seed=case.seed)
    task = case.task(ablation=ablation)
    together = references(case, task, 5)
    for size in (1, 2, 3):
        assert_close(references(case, task, size), together, 1e-12)


@pytest.mark.parametrize("per_token", [True, False], ids=["per-token", "all-tokens"])
def test_the_mean_may_be_over_other_images(per_token: bool) -> None:
    case = Case(Recipe(depth=2, registers=1))
    others = case.recipe.images(7, seed=99)
    found = references(case, case.task(ablation=cv.Mean(others, per_token=per_token)), batch_size=1)
    expected = mean_reference(case.literal, case.base, others, per_token)
    for sender, output in by_sender(case.model.graph.senders, found).items():
        assert_close(output, expected[sender])


def test_the_mean_needs_no_corrupt_images() -> None:
    case = Case(Recipe(depth=1), n_pairs=3)
    task = cv.Task(case.clean, metric=cv.logit(0), ablation="mean")
    found = by_sender(case.model.graph.senders, references(case, task))
    for sender, expected in mean_reference(case.literal, case.clean, case.clean).items():
        assert_close(found[sender], expected)


def test_images_to_average_must_be_like_those_of_the_task() -> None:
    case = Case(Recipe(depth=1, dynamic=True))
    with pytest.raises(DataError, match="images to average"):
        references(case, case.task(ablation=cv.Mean(torch.zeros(2, 2, 6, 6))))


def test_noise_has_the_asked_spread_around_the_senders_own_output() -> None:
    """Over many tokens the noise of a sender has `scale` times the standard deviation of its output."""
    case = Case(Recipe(depth=1, grid=(16, 16), width=12), n_pairs=2)
    (run,) = batch_runs(case.task(ablation=cv.Noise(scale=0.5)).prepare(case.model), 2)
    noise, own = run.sources.deltas(), run.sources.reference_outputs() - run.sources.deltas()
    for sender in range(len(own)):
        for image in range(2):
            spread = own[sender, image].std()
            assert noise[sender, image].std() / spread == pytest.approx(0.5, rel=0.1)
            assert abs(float(noise[sender, image].mean() / spread)) < 0.1


def test_noise_depends_on_its_seed_on_the_image_and_on_the_sender() -> None:
    case = Case(Recipe(depth=1), n_pairs=3)
    first, again, other = (references(case, case.task(ablation=cv.Noise(seed=seed))) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    (run,) = batch_runs(case.task(ablation="noise").prepare(case.model), 3)
    own = run.sources.reference_outputs() - run.sources.deltas()
    standard = run.sources.deltas() / own.flatten(2).std(dim=2)[..., None, None]
    drawn = standard.flatten(0, 1)
    for index in range(len(drawn)):
        for later in range(index + 1, len(drawn)):
            assert not torch.allclose(drawn[index], drawn[later])


@given(st.integers(2, 7), st.integers(0, 50))
def test_resampling_gives_every_image_the_outputs_of_another_clean_one(n: int, seed: int) -> None:
    case = Case(Recipe(depth=1), n_pairs=n)
    found = references(case, case.task(ablation=cv.Resample(seed)))
    outputs = torch.stack(list(case.literal.run(case.base).outputs.values()))
    partners = []
    for image in range(n):
        distances = (outputs - found[:, image : image + 1]).flatten(2).abs().amax(dim=(0, 2))
        assert distances.min() < 1e-10
        partners.append(int(distances.argmin()))
    assert sorted(partners) == list(range(n))
    assert all(partner != image for image, partner in enumerate(partners))


def test_resampling_depends_on_its_seed() -> None:
    case = Case(Recipe(depth=1), n_pairs=6)
    first, again, other = (references(case, case.task(ablation=cv.Resample(seed))) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_resampling_one_image_is_refused() -> None:
    case = Case(Recipe(depth=1), n_pairs=1)
    with pytest.raises(DataError, match="at least two images"):
        references(case, case.task(ablation="resample"))


@pytest.mark.parametrize("ablation", EVERY_ABLATION)
def test_images_that_give_nan_are_refused(ablation: str) -> None:
    case = Case(Recipe(depth=1), n_pairs=3)
    extreme = case.clean.clone()
    extreme[1] = 3e38
    model = cv.wrap(case.recipe.build(torch.float32))
    circuit = cv.Circuit.empty(model.graph)
    words = "NaN or infinite" if ablation.startswith("mean") else r"NaN or infinite logits for pair 1.*image"
    with pytest.raises(ModelError, match=words):
        cv.run(model, cv.Task(extreme, case.corrupt, cv.logit(0), ablation), circuit)
    with pytest.raises(ModelError, match="NaN or infinite"):
        cv.attribute(model, cv.Task(extreme, case.corrupt, cv.logit(0), ablation), progress=False)


@pytest.mark.parametrize("ablation", ["patch", "mean"])
def test_corrupt_images_that_give_nan_are_refused(ablation: str) -> None:
    """Their NaN would reach every logit through the reference outputs, even with every edge kept."""
    case = Case(Recipe(depth=1), n_pairs=3)
    extreme = case.clean.clone()
    extreme[2] = 3e38
    model = cv.wrap(case.recipe.build(torch.float32))
    task = cv.Task(case.clean, extreme, cv.logit(0), ablation)
    for attempt in (
        lambda: cv.run(model, task, cv.Circuit.full(model.graph)),
        lambda: cv.attribute(model, task),
    ):
        with pytest.raises(ModelError, match="NaN or infinite"):
            attempt()


def test_a_clean_image_that_gives_nan_is_refused_in_the_denoising_direction_too() -> None:
    case = Case(Recipe(depth=1), n_pairs=2)
    extreme = case.clean.clone()
    extreme[0] = 3e38
    model = cv.wrap(case.recipe.build(torch.float32))
    task = cv.Task(extreme, case.corrupt, cv.logit(0), direction="denoising")
    with pytest.raises(ModelError, match="NaN or infinite logits for pair 0"):
        cv.run(model, task, cv.Circuit.full(model.graph))
