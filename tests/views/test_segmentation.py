"""Emergent segmentation: the figures of merit, and how well a real ViT outlines pets it was never shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, jaccard_score

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import DataError, NameNotFoundError, OptionError
from circuitvit.groundtruth.edges import average_precision
from circuitvit.views import PatchEvidence, Subjects, logit_lens, patch_evidence
from circuitvit.views.segmentation import best_iou, iou


@st.composite
def maps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n = draw(st.integers(2, 30))
    values = np.array(draw(st.lists(st.integers(-4, 4), min_size=n, max_size=n)), dtype=float)
    mask = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    mask[0], mask[1] = True, False
    return values, mask


@given(maps())
def test_figures_of_merit_agree_with_scikit_learn(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    values, mask = drawn
    assert average_precision(values, mask) == pytest.approx(average_precision_score(mask, values))
    assert iou(values >= 1, mask) == pytest.approx(jaccard_score(mask, values >= 1, zero_division=0))
    best, at = best_iou(values, mask)
    assert best == pytest.approx(max(iou(values >= level, mask) for level in np.unique(values)))
    assert iou(values >= at, mask) == pytest.approx(best)


def evidence(values: np.ndarray, side: int = 8) -> PatchEvidence:
    n, rows, columns = values.shape
    pictures = np.zeros((n, side, side, 3), dtype=np.uint8)
    kinds = ("cls", *("patch",) * (rows * columns))
    subjects = Subjects(tuple(f"image {row}" for row in range(n)), pictures, (rows, columns), kinds)
    return PatchEvidence(subjects, "test", values.astype(float))


def test_a_map_that_is_the_mask_is_perfect() -> None:
    mask = np.zeros((1, 8, 8), dtype=bool)
    mask[:, :, 4:] = True
    (score,) = evidence(np.where(np.indices((1, 8, 8))[2] >= 4, 1.0, -1.0)).score(mask)
    assert (score.iou_best, score.iou_fixed, score.average_precision, score.prevalence) == (1, 1, 1, 0.5)
    (opposite,) = evidence(np.where(np.indices((1, 8, 8))[2] >= 4, -1.0, 1.0)).score(mask, "mean")
    assert (opposite.iou_fixed, opposite.iou_best) == (0, 0.5)


def test_ignored_pixels_do_not_count() -> None:
    mask = np.zeros((1, 8, 8), dtype=bool)
    mask[:, :4] = True
    wrong = np.where(mask, 1.0, -1.0)
    wrong[:, 4] = 1.0
    ignore = np.zeros_like(mask)
    ignore[:, 4] = True
    assert evidence(wrong).score(mask)[0].iou_fixed == pytest.approx(32 / 40)
    assert evidence(wrong).score(mask, ignore=ignore)[0].iou_fixed == 1


def test_masks_that_say_nothing_are_refused() -> None:
    view = evidence(np.zeros((1, 2, 2)))
    with pytest.raises(DataError, match="the mask of image 0 is empty"):
        view.score(np.zeros((1, 8, 8)))
    with pytest.raises(DataError, match="is full"):
        view.score(np.ones((1, 8, 8)))
    with pytest.raises(DataError, match="one \\(height, width\\) for each"):
        view.score(np.ones((2, 8, 8)))


def test_evidence_is_the_log_odds_of_the_lens() -> None:
    model, pairs = cv.load("catdog-tiny"), catdog_pairs(3, seed=2)
    lens = logit_lens(model, pairs.clean)
    against = patch_evidence(model, pairs.clean, "cat", "dog", position="layer 1")
    expected = lens.of_class(0)[2] - lens.of_class(1)[2]
    np.testing.assert_allclose(against.values, lens.subjects.on_grid(expected), atol=1e-5)
    odds = patch_evidence(model, pairs.clean, ["cat", "dog"], batch_size=1)
    whole = lens.logits[-1].astype(np.float64)
    share = np.exp(whole[..., :2]).sum(-1) / np.exp(whole[..., 2:]).sum(-1)
    np.testing.assert_allclose(odds.values, lens.subjects.on_grid(np.log(share)), atol=1e-4)
    assert odds.upsampled().shape == (3, 48, 48)


def test_what_makes_no_sense_is_refused() -> None:
    model, clean = cv.load("catdog-tiny"), catdog_pairs(1, seed=2).clean
    with pytest.raises(OptionError, match="share dog"):
        patch_evidence(model, clean, ["cat", "dog"], "dog")
    with pytest.raises(NameNotFoundError, match="unknown kind of evidence"):
        patch_evidence(model, clean, "cat", by="lense")  # type: ignore[arg-type]
    with pytest.raises(NameNotFoundError, match="unknown position"):
        patch_evidence(model, clean, "cat", position="layer 9")
    with pytest.raises(OptionError, match="empty set"):
        patch_evidence(model, clean, [])


def test_a_real_vit_outlines_pets(shared_data: Path) -> None:
    """Its evidence for cats finds the cats of 10 photographs far better than chance (see the prevalence)."""
    from circuitvit.tasks.corruptions import read_mask

    name = "vit_tiny_patch16_224"
    model = cv.load(name, checkpoint=shared_data / "weights" / f"{name}.safetensors")
    folder = shared_data / "images" / "pets_masks"
    photos = sorted((folder / "images").iterdir())
    paths = [folder / "masks" / f"{photo.stem}.png" for photo in photos]
    spec = model.preprocessing
    masks = np.stack([np.asarray(read_mask(path, (1, 2), spec)) for path in paths])
    ignore = np.stack([np.asarray(read_mask(path, 255, spec)) for path in paths])
    shares = patch_evidence(model, photos, "tabby", by="attribution").score(masks, "mean", ignore)
    lens = patch_evidence(model, photos, [*range(281, 286)], position="layer 10").score(masks, "mean", ignore)
    for scores, precision, best in ((shares, 0.93, 0.8), (lens, 0.78, 0.68)):
        assert np.mean([score.average_precision for score in scores]) > precision
        assert np.mean([score.iou_best for score in scores]) > best
        assert np.mean([score.prevalence for score in scores]) < 0.5
