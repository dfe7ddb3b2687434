"""Training a dictionary: what is folded, measured and kept; the loop itself is another library's.

Where overcomplete is not installed, a stand-in of a few lines with the same interface takes its place, so
that everything around it is tested all the same.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import circuitvit as cv
from circuitvit.cli.program import app
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.engine import Activations
from circuitvit.errors import DataError, NameNotFoundError, OptionError
from circuitvit.training import sae as training
from tests.models.test_dictionaries import dictionary, drawn

SMALL: dict[str, Any] = {"features": 48, "k": 6, "steps": 60, "vectors": 128, "progress": False}
IMAGES = torch.cat([*catdog_pairs(12, seed=0)])


class TopKSAE(nn.Module):
    """Overcomplete's, as far as it is used, with its names of tensors."""

    def __init__(self, width: int, features: int, top_k: int, device: str) -> None:
        super().__init__()
        self.k = top_k
        self.encoder = nn.Linear(width, features)
        self.dictionary = nn.Module()
        self.dictionary._weights = nn.Parameter(self.encoder.weight.detach().clone())

    def untied(self, bias: bool) -> None:
        assert bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raw = self.encoder(x)
        kept = raw.topk(self.k)
        codes = torch.zeros_like(raw).scatter(-1, kept.indices, kept.values.relu())
        self.dictionary._weights.data /= self.dictionary._weights.data.norm(dim=1, keepdim=True)
        return raw, codes, codes @ self.dictionary._weights

    def eval(self) -> TopKSAE:
        self(torch.zeros(1, self.encoder.in_features))
        return super().eval()


def loop(sae: Any, data: Any, criterion: Any, optimiser: Any, schedule: Any, **settings: Any) -> None:
    assert settings == {"nb_epochs": 1, "monitoring": 0, "device": "cpu"}
    for x in data:
        raw, codes, rebuilt = sae(x)
        optimiser.zero_grad()
        criterion(x, rebuilt, raw, codes, sae.dictionary._weights).backward()
        optimiser.step()
        schedule.step()


STAND_IN = SimpleNamespace(
    TopKSAE=TopKSAE,
    train_sae=loop,
)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overcomplete, or what stands in for it."""
    try:
        training.import_overcomplete()
    except DataError:
        monkeypatch.setattr(training, "import_overcomplete", lambda: STAND_IN)
        monkeypatch.setattr(training, "metadata", SimpleNamespace(version=lambda name: "of a test"))


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return cv.load("catdog-tiny")


# -- what comes of it ----------------------------------------------------------------------------


def test_a_dictionary_learns_to_rebuild_what_it_was_not_trained_on(model: cv.Model) -> None:
    short, long = (cv.train_sae(model, IMAGES, "m2", **{**SMALL, "steps": steps}) for steps in (1, 200))
    before, after = (each.card["held_out"] for each in (short, long))
    assert before["explained_variance"] < after["explained_variance"]
    assert after["explained_variance"] > 0.5
    assert 0 < after["l0"] <= 6
    assert (after["images"], after["vectors"]) == (5, 5 * 37)
    assert set(after["by_token"]) == {"cls", "patch"}
    assert torch.allclose(long.decoder.norm(dim=1), torch.ones(48), atol=1e-4)
    assert repr(long) == "Dictionary(48 features of width 64, top 6, features of m2)"


def test_the_card_says_how_it_was_trained(model: cv.Model, tmp_path: Path) -> None:
    found = cv.load_dictionary(
        cv.train_sae(model, IMAGES, "resid3", tokens="cls", seed=3, **SMALL).save(
            tmp_path / "sae.safetensors"
        )
    )
    card, recipe = found.card, found.card["recipe"]
    assert (card["model"], card["weights"]) == ("catdog-tiny", model.weights_hash)
    assert (card["data"]["images"], card["data"]["tokens"]) == (24, ["cls"])
    assert (recipe["steps"], recipe["steps_done"], recipe["vectors"], recipe["seed"]) == (60, 60, 128, 3)
    assert "overcomplete" in recipe["trained_by"]
    assert (found.site, found.kind, found.k) == ("resid3", "topk", 6)


def test_what_is_held_out_is_measured_and_not_trained_on(model: cv.Model) -> None:
    """Of two images, the mean of one is the decoder's bias, and the other's numbers are on the card."""
    found = cv.train_sae(model, IMAGES[::12], "m2", held_out=0.5, **SMALL)
    read = cv.activations(model, IMAGES[::12], "m2", progress=False)["m2"]
    fitted = int((read.mean(dim=1) - found.bias).abs().sum(dim=1).argmin())
    assert torch.allclose(read[fitted].mean(dim=0), found.bias, atol=1e-5)
    x = read[1 - fitted]
    codes = found.encode(x)
    missed, varied = (found.decode(codes) - x).square().sum(), (x - x.mean(dim=0)).square().sum()
    said = found.card["held_out"]
    assert said["explained_variance"] == pytest.approx(float(1 - missed / varied), abs=1e-4)
    assert said["by_token"]["cls"] is None  # of one class token nothing varies
    assert said["l0"] == pytest.approx(float((codes > 0).sum(dim=1).float().mean()))
    assert said["dead"] == int((codes == 0).all(dim=0).sum())


def test_shares_are_of_each_kind_of_token_around_its_mean() -> None:
    made, x = dictionary(), drawn(3, 2, 4, seed=7)
    error = (made.decode(made.encode(x)) - x).square().sum(dim=(0, 2))
    said = training.reconstruction(made, x, ("cls", "patch"))
    for place, kind in enumerate(("cls", "patch")):
        varied = (x[:, place] - x[:, place].mean(dim=0)).square().sum()
        assert said["by_token"][kind] == pytest.approx(float(1 - error[place] / varied))
    varied = (x - x.mean(dim=(0, 1))).square().sum()
    assert said["explained_variance"] == pytest.approx(float(1 - error.sum() / varied))


def test_features_are_in_units_of_the_activations(model: cv.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library trained on scaled activations is the dictionary on activations as they are."""
    raw: list[cv.Dictionary] = []
    unscaled = training._unscaled

    def kept(found: cv.Dictionary, data: Any) -> cv.Dictionary:
        raw.append(found)
        scale.append(data.scale)
        return unscaled(found, data)

    scale: list[float] = []
    monkeypatch.setattr(training, "_unscaled", kept)
    found = cv.train_sae(model, IMAGES, "m2", **SMALL)
    x = cv.activations(model, IMAGES, "m2", progress=False)["m2"]
    codes = raw[0].encode((x - found.bias) / scale[0])
    assert torch.allclose(found.encode(x), codes * scale[0], atol=1e-4)
    assert torch.allclose(
        found.decode(found.encode(x)), raw[0].decode(codes) * scale[0] + found.bias, atol=1e-4
    )


def test_the_same_seed_gives_the_same_dictionary(model: cv.Model) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (
        cv.train_sae(model, IMAGES, "a2.h1.z", seed=seed, **{**SMALL, "steps": 5}) for seed in (1, 1, 2)
    )
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert not torch.equal(first.encoder, other.encoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.width == 16


def test_activations_can_be_kept_and_are_read_once(model: cv.Model, tmp_path: Path) -> None:
    path = tmp_path / "acts.safetensors"
    first = cv.train_sae(model, IMAGES, "m2", activations_file=path, **SMALL)
    assert Activations.load(path)["m2"].shape == (24, 37, 64)
    written = path.stat().st_mtime_ns
    again = cv.train_sae(model, IMAGES, "m2", activations_file=path, **SMALL)
    assert path.stat().st_mtime_ns == written
    assert torch.equal(first.encoder, again.encoder)


def test_ctrl_c_keeps_what_has_been_learned(model: cv.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = training._Data.batches

    def stopped(data: Any, recipe: Any) -> Iterator[Tensor]:
        for number, batch in enumerate(batches(data, recipe)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(training._Data, "batches", stopped)
    found = cv.train_sae(model, IMAGES, "m2", **SMALL)
    assert (found.card["recipe"]["steps"], found.card["recipe"]["steps_done"]) == (60, 3)
    assert found.card["held_out"]["explained_variance"] < 1


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "settings", "error", "message"),
    [
        ("m9", {}, NameNotFoundError, "unknown site 'm9'"),
        ("m*", {}, OptionError, r"of one activation, such as 'm8', not of 'm\*'"),
        ("m2@cls", {}, OptionError, "say tokens= apart"),
        ("a2.h1", {}, OptionError, r"give a2\.h1\.z"),
        ("input", {}, OptionError, "an MLP"),
        ("a2.h1.pattern", {}, OptionError, r"not of a2\.h1\.pattern"),
        ("m2", {"k": 49}, OptionError, "48 features cannot keep the top 49"),
        ("m2", {"steps": 0}, OptionError, "steps must be at least 1"),
        ("m2", {"held_out": 1}, OptionError, "held out must be a number between 0 and 1"),
        ("m2", {"learning_rate": -1}, OptionError, "the learning rate must be a positive number"),
        ("m2", {"seed": -1}, OptionError, "a seed must be at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(
    model: cv.Model, monkeypatch: pytest.MonkeyPatch, site: str, settings: Any, error: Any, message: str
) -> None:
    monkeypatch.setattr(training, "activations", None)
    with pytest.raises(error, match=message):
        cv.train_sae(model, IMAGES, site, **{**SMALL, **settings})


def test_images_that_teach_nothing_are_refused(model: cv.Model) -> None:
    with pytest.raises(DataError, match="give two or more"):
        cv.train_sae(model, IMAGES[:1], "m2", **SMALL)
    with pytest.raises(DataError, match="resid0 is the same on all images"):
        cv.train_sae(model, IMAGES[:1].repeat(2, 1, 1, 1), "resid0", tokens="cls", **SMALL)


def test_training_that_diverges_ends(model: cv.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training._Data, "batches", lambda *_: iter([torch.full((4, 64), torch.inf)]))
    with pytest.raises(DataError, match=r"the loss is nan at step 0: try a smaller learning_rate"):
        cv.train_sae(model, IMAGES, "m2", **SMALL)


def test_a_library_that_is_missing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the stand-in
    own = importlib.import_module

    def absent(name: str, *more: Any) -> Any:
        if name.startswith("overcomplete"):
            raise ImportError("no such thing")
        return own(name, *more)

    monkeypatch.setattr(importlib, "import_module", absent)
    monkeypatch.delitem(sys.modules, "overcomplete.sae", raising=False)
    with pytest.raises(DataError, match=r"pip install circuitvit\[sae\]"):
        training.import_overcomplete()
    monkeypatch.setitem(sys.modules, "overcomplete.sae", STAND_IN)  # as if only its figures had failed
    assert training.import_overcomplete() is STAND_IN


# -- the command ---------------------------------------------------------------------------------


def test_the_command_trains_and_reports(tmp_path: Path) -> None:
    for number, picture in enumerate(catdog_pairs(4, seed=0, preprocessed=False).clean):
        pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / f"{number}.png")
    out = tmp_path / "out" / "sae.safetensors"
    what = [
        "--model",
        "catdog-tiny",
        "--site",
        "m2",
        "--features",
        "32",
        "-k",
        "4",
        "--steps",
        "5",
        "--quiet",
    ]
    result = CliRunner().invoke(app, ["train", "sae", str(tmp_path), *what, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "m2 of 1 images that were held out" in result.output
    assert "Dictionary(32 features of width 64, top 4, features of m2)" in " ".join(result.output.split())
    assert cv.load_dictionary(out).k == 4
