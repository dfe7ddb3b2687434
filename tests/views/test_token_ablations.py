"""Token ablations: against raw weights on fewer, averaged and exchanged tokens; and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import DataError, NameNotFoundError, OptionError
from circuitvit.models import through
from circuitvit.views.tokens import derangement
from tests.views.literal_vit import literal, micro

LOST = torch.tensor([False, False, True, False, True])


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.manual_seed(3))


@pytest.mark.parametrize("layer", [0, 1])
def test_each_way_is_what_it_says(layer: int) -> None:
    """Removed tokens are not there; means, other images' tokens and zeros stand in the stream."""
    model, module = micro()
    found = cv.token_ablations(
        model, images(), LOST, site=f"resid{layer}", metric=cv.logit(1), batch_size=4, seed=5, progress=False
    )
    assert found.ways == ("remove", "mean", "shuffle", "zero")
    others = torch.from_numpy(derangement(6, seed=5))

    def instead(way: str, x: Tensor) -> Tensor:
        if way == "remove":
            return x[:, ~LOST]
        value = {"mean": x.mean(dim=0, keepdim=True), "shuffle": x[others], "zero": torch.zeros_like(x)}[way]
        return torch.where(LOST[:, None], value, x)

    for place, way in enumerate(found.ways):
        logits = literal(
            module, images(), change=lambda at, x, way=way: instead(way, x) if at == layer else x
        )
        np.testing.assert_allclose(found.outcomes.after[0, place], logits[:, 1], atol=1e-4)


@pytest.mark.parametrize("options", [{"reg_tokens": 2}, {"global_pool": "map"}])
def test_removing_is_a_run_on_fewer_tokens(options: dict[str, object]) -> None:
    """Also of registers, and in front of an attention pool, which no longer sees them either."""
    model, _ = micro(**options)
    tokens = "reg" if "reg_tokens" in options else "patch(0,1)+patch(1,1)"
    found = cv.token_ablations(model, images(), tokens, ways=["remove"], metric=cv.logit(2), progress=False)
    kinds = model.token_kinds(model.n_tokens)
    kept = [place for place, kind in enumerate(kinds) if kind != "reg"]
    if "reg_tokens" not in options:
        first = kinds.index("patch")
        kept = [place for place in kept if place not in (first + 1, first + 3)]
    with torch.no_grad():
        logits = through(model.stages[1:], model.embed(images())[:, kept])
    np.testing.assert_allclose(found.outcomes.after[0, 0], logits[:, 2], atol=1e-4)
    assert found.counts == (2.0,)


def test_what_the_readout_reads_itself_cannot_be_removed() -> None:
    model, _ = micro()
    with pytest.raises(OptionError, match="the readout of micro reads cls: it cannot be removed"):
        cv.token_ablations(model, images(), "cls", ways=["remove"], progress=False)
    found = cv.token_ablations(model, images(), "cls", progress=False)
    assert found.ways == ("mean", "shuffle", "zero")
    assert any("reads cls itself" in caveat for caveat in found.caveats)
    pooled, _ = micro(global_pool="avg", class_token=False)
    assert "remove" not in cv.token_ablations(pooled, images(), 0.5, progress=False).ways


def test_the_mean_of_one_image_many_times_is_no_loss_and_zero_is_one() -> None:
    model, _ = micro()
    same = images()[:1].expand(6, -1, -1, -1)
    found = cv.token_ablations(model, same, "patch", ways=["mean", "shuffle", "zero"], progress=False)
    mean, shuffle, zero = np.abs(found.outcomes.values()[0]).max(axis=-1)
    assert mean < 1e-4
    assert shuffle < 1e-4
    assert zero > 0.1
    assert any("zeroing alone overstates" in caveat for caveat in found.caveats)


def test_a_share_of_the_patches_is_drawn_for_each_image_by_seed() -> None:
    model, pairs = cv.load("catdog-tiny"), catdog_pairs(6, seed=0)
    sets = {"a quarter": 0.25, "all patches": "patch", "one": "patch(2,3)"}
    one, again, other, single = (
        cv.token_ablations(model, pairs.clean, sets, seed=seed, batch_size=size, progress=False)
        for seed, size in ((0, None), (0, None), (1, None), (0, 1))
    )
    assert one.counts == (9.0, 36.0, 1.0)
    np.testing.assert_array_equal(one.outcomes.after, again.outcomes.after)
    np.testing.assert_allclose(one.outcomes.after, single.outcomes.after, atol=1e-4)
    assert np.abs(one.outcomes.after[0, 0] - other.outcomes.after[0, 0]).max() > 1e-4


def test_groups_edited_models_and_figures(tmp_path: Path) -> None:
    model, pairs = cv.load("catdog-tiny"), catdog_pairs(5, seed=0)
    top = torch.zeros(48, 48, dtype=torch.bool)
    top[:24] = True
    groups = cv.TokenGroups.from_masks(model, {"top": top})
    edited = model.edit({"resid1": lambda x: 1.1 * x})
    found = cv.token_ablations(edited, pairs.clean, "top", site="resid2", groups=groups, progress=False)
    streams = edited.activations(pairs.clean, "resid2", progress=False)["resid2"]
    means = streams.mean(dim=0)
    by_hand = edited.edit({"resid2@top": means}, groups=groups)(pairs.clean)[:, 0]
    np.testing.assert_allclose(found.outcomes.after[0, 1], by_hand, atol=1e-4)
    figure = found.figure()
    text = figure.save(tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert all(word in text for word in ("top (18)", *found.ways, "resid2"))
    bars = sorted(bar.get_width() for bar in figure.axes[2].patches)
    assert bars == pytest.approx(sorted(found.estimate("top", way).value for way in found.ways))
    assert "top (18) at resid2" in repr(found)
    assert found.estimate("top", "zero", of="kl").value > 0
    with pytest.raises(NameNotFoundError, match="unknown way"):
        found.estimate("top", "noise")


def test_shuffling_never_gives_an_image_its_own_tokens() -> None:
    for count in (2, 3, 10):
        others = derangement(count, seed=1)
        assert sorted(others.tolist()) == list(range(count))
        assert (others != np.arange(count)).all()


def test_what_makes_no_sense_is_refused() -> None:
    model, clean = cv.load("catdog-tiny"), catdog_pairs(3, seed=0).clean
    for error, match, tokens, options in [
        (OptionError, "no tokens are called 'reg'", "reg", {}),
        (OptionError, "between 0 and 1, not 1.5", 1.5, {}),
        (OptionError, "'all' is all tokens", "all", {}),
        (OptionError, "no tokens are named", {}, {}),
        (OptionError, "from the stream", "cls", {"site": "m1"}),
        (NameNotFoundError, "unknown site", "cls", {"site": "resid9"}),
        (NameNotFoundError, "unknown way of losing", "cls", {"ways": ["noise"]}),
        (DataError, "for 2 images, and there are 3", torch.ones(2, 37, dtype=torch.bool), {}),
        (OptionError, "nobody attends", "patch", {"site": "resid4", "ways": ["remove"]}),
    ]:
        with pytest.raises(error, match=match):
            cv.token_ablations(model, clean, tokens, progress=False, **options)
    with pytest.raises(DataError, match="at least 2"):
        cv.token_ablations(model, clean[:1], "cls", progress=False)
