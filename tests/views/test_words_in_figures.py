"""Figures of sentences: every word can be read, whatever lies over it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import circuitvit as cv
from circuitvit.datasets import signs
from circuitvit.errors import OptionError
from circuitvit.export.written import CELL

SENTENCE = "a photo of a brown cat"


@pytest.fixture(scope="module")
def text() -> cv.Model:
    return cv.load("clip-tiny").text(images=signs.animal_pairs(2, seed=0).clean)


def test_words_are_above_the_map_in_cells_of_their_own_shape(text: cv.Model) -> None:
    for figure in (
        cv.views.logit_lens(text, SENTENCE).figure(),
        cv.views.attention_patterns(text, SENTENCE).figure(),
    ):
        axes = figure.axes[0]
        assert axes.get_aspect() == CELL[1] / CELL[0]
        words = np.asarray(axes.images[-1].get_array())
        assert words.shape == (8 * CELL[1], CELL[0], 4)
        ink, opacity = words[..., 0], words[..., 3]
        assert set(np.unique(ink)) <= {0.1, 1.0}
        assert opacity.max() > 0.8
    assert not cv.views.logit_lens(text, SENTENCE).figure().axes[0].texts  # no name over a word


def test_attention_is_shown_from_where_the_sentence_is_read(text: cv.Model) -> None:
    found = cv.views.attention_patterns(text, SENTENCE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read, start = found.figure(), found.figure(query=0)
    assert "query end" in read.get_suptitle()
    assert "query start" in start.get_suptitle()
    assert not any("inf" in axes.get_xlabel() for axes in start.axes)


def test_the_page_of_the_lens_says_classes_beside_the_words(text: cv.Model) -> None:
    assert "padding-left: 50%" in cv.views.logit_lens(text, SENTENCE).to_html()
    model = cv.load("catdog-tiny")
    assert (
        "padding-left" not in cv.views.logit_lens(model, cv.datasets.catdog.catdog_pairs(1).clean).to_html()
    )


def test_a_model_with_words_is_to_be_given_sentences() -> None:
    with pytest.raises(OptionError, match="with_prompts"):
        cv.views.logit_lens(cv.load("clip-tiny"), signs.animal_pairs(1, seed=0).clean)
