"""Dictionaries: what encode and decode compute, and what cannot be one."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuitvit.errors import ModelError, NameNotFoundError, OptionError
from circuitvit.models.dictionaries import Dictionary
from circuitvit.models.dictionary_files import load_dictionary

FEATURES, WIDTH = 7, 4
KINDS: dict[str, dict[str, Any]] = {
    "relu": {},
    "jumprelu": {"threshold": torch.linspace(-0.5, 1.0, FEATURES, dtype=torch.float64)},
    "topk": {"k": 3},
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dictionary(kind: str = "relu", **changed: Any) -> Dictionary:
    parts = {
        "encoder": drawn(FEATURES, WIDTH),
        "offset": drawn(FEATURES, seed=1),
        "decoder": drawn(FEATURES, WIDTH, seed=2),
        "bias": drawn(WIDTH, seed=3),
        "kind": kind,
        **KINDS.get(kind, {}),
    }
    return Dictionary(**{**parts, **changed})


def literal(made: Dictionary, x: list[float]) -> tuple[list[float], list[float]]:
    """Features and rebuilt activation of one token, number by number."""
    encoder, decoder = made.encoder.tolist(), made.decoder.tolist()
    raw = [
        sum(weight * value for weight, value in zip(row, x, strict=True)) + offset
        for row, offset in zip(encoder, made.offset.tolist(), strict=True)
    ]
    kept = sorted(range(len(raw)), key=lambda place: -raw[place])[: made.k]
    features = []
    for place, value in enumerate(raw):
        if made.threshold is not None:
            features.append(value if value > float(made.threshold[place]) else 0.0)
        else:
            features.append(max(value, 0.0) if place in kept else 0.0)
    rebuilt = [
        sum(strength * row[place] for strength, row in zip(features, decoder, strict=True)) + bias
        for place, bias in enumerate(made.bias.tolist())
    ]
    return features, rebuilt


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_computes_its_formula(kind: str) -> None:
    made, x = dictionary(kind), drawn(3, 5, WIDTH, seed=4)
    features = made.encode(x)
    rebuilt = made.decode(features)
    assert (made.n_features, made.width) == (FEATURES, WIDTH)
    for image in range(3):
        for token in range(5):
            expected = literal(made, x[image, token].tolist())
            assert features[image, token].tolist() == pytest.approx(expected[0], abs=1e-12)
            assert rebuilt[image, token].tolist() == pytest.approx(expected[1], abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_features_that_are_there(kind: str) -> None:
    made, x = dictionary(kind), drawn(2, WIDTH, seed=5).requires_grad_()
    features = made.encode(x)
    (gradient,) = torch.autograd.grad(features.sum(), x)
    assert torch.allclose(gradient, (features != 0).double() @ made.encoder)


def test_of_features_that_are_too_few_negative_ones_stay_out() -> None:
    made = Dictionary(torch.eye(3), torch.tensor([1.0, -1, -2]), torch.eye(3), torch.zeros(3), "topk", k=2)
    assert made.encode(torch.zeros(3)).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"kind": "gated"}, NameNotFoundError, "unknown kind of dictionary 'gated': choose from relu"),
        ({"reads": "stream"}, NameNotFoundError, "'stream'"),
        (
            {"encoder": drawn(WIDTH)},
            OptionError,
            r"encoder of a dictionary is \(feature, width\), not \(4,\)",
        ),
        ({"encoder": drawn(0, WIDTH)}, OptionError, r"not \(0, 4\)"),
        ({"decoder": drawn(WIDTH, FEATURES)}, OptionError, r"decoder .* 7 features of width 4 is \(7, 4\)"),
        ({"offset": drawn(WIDTH)}, OptionError, r"the offset .* is \(7,\), not \(4,\)"),
        ({"bias": [0.0] * WIDTH}, OptionError, "bias of a dictionary is a tensor of real numbers, not list"),
        ({"bias": torch.zeros(WIDTH, dtype=torch.int64)}, OptionError, "not torch.int64"),
        ({"bias": torch.zeros(WIDTH)}, OptionError, "the bias is torch.float32 on cpu"),
        ({"offset": drawn(FEATURES) / 0}, ModelError, "the offset of the dictionary holds NaN or infinite"),
        ({"threshold": drawn(FEATURES)}, OptionError, "jumprelu dictionary has a threshold"),
        ({"kind": "jumprelu", "threshold": None}, OptionError, "jumprelu dictionary has a threshold"),
        ({"k": 2}, OptionError, "a topk dictionary says its k"),
        ({"kind": "topk", "k": None}, OptionError, "a topk dictionary says its k"),
        ({"kind": "topk", "k": 8}, OptionError, "7 features cannot keep the top 8"),
        ({"kind": "topk", "k": 0}, OptionError, "at least 1"),
        ({"site": ""}, OptionError, "the site of a dictionary is a name such as 'm8'"),
        ({"site": 5}, OptionError, "a name such as 'm8', or None, not 5"),
        ({"labels": "feature"}, OptionError, "texts, one for each feature"),
        ({"labels": tuple(range(FEATURES))}, OptionError, "texts, one for each feature"),
        ({"card": ["l0"]}, OptionError, "a mapping, or None, not list"),
        ({"bias": drawn(WIDTH).to("meta")}, OptionError, "the bias .* meta or sparse"),
        ({"labels": ("fur",)}, OptionError, "1 labels for a dictionary of 7 features"),
    ],
)
def test_what_fits_no_dictionary_is_refused(changed: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        dictionary(**changed)


def test_activations_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OptionError, match=r"shape \(2, 5\) for a dictionary of width 4"):
        dictionary().encode(torch.zeros(2, 5, dtype=torch.float64))
    with pytest.raises(OptionError, match=r"use dictionary.to\(dtype=torch.float32\)"):
        dictionary().encode(torch.zeros(2, WIDTH))
    for features in (torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, FEATURES)):
        with pytest.raises(OptionError, match=r"for a dictionary of 7 features in torch\.float64"):
            dictionary().decode(features)


def test_numbers_of_numpy_are_saved(tmp_path: Path) -> None:
    made = dictionary("topk", k=np.int64(2), labels=list("abcdefg"))
    assert load_dictionary(made.save(tmp_path / "made.safetensors")).k == 2


def test_a_dictionary_can_be_moved_and_copied() -> None:
    made = dictionary("jumprelu", encoder=drawn(FEATURES, WIDTH).requires_grad_(), site="m8", card={"l0": 3})
    moved = made.to("cpu", torch.float32)
    assert {each.dtype for each in moved.tensors.values()} == {torch.float32}
    assert not moved.encoder.requires_grad
    assert (moved.kind, moved.site, moved.card) == ("jumprelu", "m8", {"l0": 3})
    x = drawn(2, WIDTH)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(copied.encode(x), made.encode(x))


def test_a_dictionary_says_what_it_is() -> None:
    assert repr(dictionary("topk", site="m8")) == "Dictionary(7 features of width 4, top 3, features of m8)"
    assert repr(dictionary(site="m8", reads="input")).endswith("relu, transcoder of m8)")
