"""Files that SAELens and overcomplete write themselves compute what these libraries compute."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import circuitvit as cv
from circuitvit.errors import FileError
from circuitvit.models.timm_import import import_timm
from tests.models.test_dictionaries import drawn

FEATURES, WIDTH = 24, 8
X = drawn(50, WIDTH).float()


def library_of(name: str) -> Any:
    """A part of a library, or a skip.

    Both import torchvision, which `import_timm` makes possible beside any torch; and overcomplete 0.3.0 fails
    beside matplotlib 3.9 once all but its figures are imported.
    """
    import_timm()
    with suppress(AttributeError):
        return pytest.importorskip(name)
    return sys.modules[name]


def shaken(module: Any) -> Any:
    """A module with every parameter drawn anew, so that nothing is zero or tied."""
    with torch.no_grad():
        for number, each in enumerate(module.parameters()):
            each.copy_(drawn(max(each.numel(), 1), seed=number).view_as(each) * 0.7)
    return module


def assert_same(found: cv.Dictionary, features: torch.Tensor, rebuilt: torch.Tensor) -> None:
    assert ((features > 0).float().mean(dim=1) > 0).any()
    assert torch.allclose(found.encode(X), features, atol=1e-5)
    assert torch.allclose(found.decode(features), rebuilt, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("standard", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("jumprelu", {}),
        ("gated", {}),
        ("topk", {"k": 4}),
        ("topk", {"k": 4, "rescale_acts_by_decoder_norm": True}),
        ("transcoder", {"apply_b_dec_to_input": False, "d_out": WIDTH}),
        ("jumprelu_transcoder", {"apply_b_dec_to_input": False, "d_out": WIDTH}),
    ],
)
def test_saelens(tmp_path: Path, architecture: str, settings: dict[str, Any]) -> None:
    registry = library_of("sae_lens.registry")
    kind, configuration = registry.get_sae_class(architecture)
    sae = shaken(kind(configuration(d_in=WIDTH, d_sae=FEATURES, **settings)))
    sae.save_model(tmp_path)
    with torch.no_grad():
        features = sae.encode(X)
        assert_same(cv.load_dictionary(tmp_path), features, sae.decode(features))


def test_a_skip_transcoder_of_saelens_is_refused(tmp_path: Path) -> None:
    registry = library_of("sae_lens.registry")
    kind, configuration = registry.get_sae_class("skip_transcoder")
    said = configuration(d_in=WIDTH, d_sae=FEATURES, d_out=WIDTH, apply_b_dec_to_input=False)
    shaken(kind(said)).save_model(tmp_path)
    with pytest.raises(FileError, match="W_skip"):
        cv.load_dictionary(tmp_path)


@pytest.mark.parametrize(
    ("kind", "settings", "keywords"),
    [
        ("SAE", {}, {"kind": "relu"}),
        ("TopKSAE", {"top_k": 4}, {"k": 4}),
        ("TopKSAE", {"top_k": 4, "dictionary_params": {"normalization": "max_l2"}}, {"k": 4}),
        ("TopKSAE", {"top_k": 4, "dictionary_params": {"use_multiplier": True}}, {"k": 4}),
        ("JumpSAE", {}, {}),
    ],
)
def test_overcomplete(tmp_path: Path, kind: str, settings: dict[str, Any], keywords: dict[str, Any]) -> None:
    library = library_of("overcomplete.sae")
    sae = shaken(getattr(library, kind)(WIDTH, FEATURES, **settings)).eval()
    save_file(sae.state_dict(), tmp_path / "sae.safetensors")
    with torch.no_grad():
        _, features = sae.encode(X)
        found = cv.load_dictionary(tmp_path / "sae.safetensors", **keywords)
        assert_same(found, features, sae.decode(features))


@pytest.mark.parametrize("tied", [True, False])
def test_an_encoder_of_overcomplete_may_be_tied(tmp_path: Path, tied: bool) -> None:
    library = library_of("overcomplete.sae")
    sae = library.TopKSAE(WIDTH, FEATURES, top_k=4)
    sae = shaken(sae.tied(bias=True) if tied else sae.untied(bias=True)).eval()
    state = {name: each for name, each in sae.state_dict().items() if "tied_to" not in name}
    save_file({name: each.clone() for name, each in state.items()}, tmp_path / "sae.safetensors")
    with torch.no_grad():
        _, features = sae.encode(X)
        assert_same(cv.load_dictionary(tmp_path / "sae.safetensors", k=4), features, sae.decode(features))
