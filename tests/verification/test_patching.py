"""Activation patching against hooks on the module itself, and the search for flips."""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import DataError, OptionError
from circuitvit.verification import FlipSearch, PatchingMap, flip_search, patching_map
from tests.verification.cases import images, tiny_model, tiny_task


def hooked(place: str, tokens: list[int], columns: slice | None = None) -> torch.Tensor:
    """The module's own logits with the input of a submodule replaced by that of the corrupt run."""
    model, prepared = tiny_model(), tiny_task(3).prepare(tiny_model())
    batch = prepared.batch(range(3))
    assert batch.reference is not None
    part = model.module.get_submodule(place)
    seen: list[torch.Tensor] = []
    handle = part.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.module(batch.reference)
    handle.remove()

    def swap(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        changed = args[0].clone()
        where = columns or slice(None)
        for token in tokens:
            changed[:, token, where] = seen[0][:, token, where]
        return (changed, *args[1:])

    handle = part.register_forward_pre_hook(swap)
    with torch.no_grad():
        logits: torch.Tensor = model.module(batch.base)
    handle.remove()
    return logits


@pytest.mark.parametrize("tokens", [[0], [1, 3], [0, 1, 2, 3, 4]])
def test_heads_and_the_stream_are_patched_as_with_hooks(tokens: list[int]) -> None:
    task, sets = tiny_task(3), {"these": tokens}
    heads = patching_map(tiny_model(), task, "heads", sets, progress=False)
    for row, name in enumerate(heads.rows):  # a0.h0, a0.h1, a1.h0, a1.h1; heads are 8 wide
        layer, head = int(name[1]), int(name[-1])
        logits = hooked(f"blocks.{layer}.attn.proj", tokens, slice(8 * head, 8 * head + 8))
        wanted = (logits[:, 0] - logits[:, 1]).numpy()
        assert np.allclose(heads.values[row, 0], wanted, atol=1e-9)
    stream = patching_map(tiny_model(), task, "stream", sets, progress=False)
    for layer, row in enumerate(["before attn0", "before attn1"]):
        logits = hooked(f"blocks.{layer}", tokens)
        wanted = (logits[:, 0] - logits[:, 1]).numpy()
        assert np.allclose(stream.values[stream.rows.index(row), 0], wanted, atol=1e-9)


def test_patching_everything_is_the_other_run() -> None:
    found = patching_map(tiny_model(), tiny_task(3), "stream", "all", progress=False)
    assert np.allclose(found.values, found.other)
    assert np.allclose(found.share, 1.0)
    assert (found.tops == found.other_tops).all()


def test_patterns_with_equal_values_are_heads() -> None:
    """Where keys and queries alone differ, patching the pattern is patching the head."""
    model, task = tiny_model(), tiny_task(2)
    patterns = patching_map(model, task, "patterns", "all", progress=False)
    heads = patching_map(model, task, "heads", "all", progress=False)
    assert patterns.values.shape == heads.values.shape
    assert not np.allclose(patterns.values, heads.values)
    same = cv.Task(images(2, 1), images(2, 1) + 0.0, metric=cv.logit_diff(0, 1))
    assert np.allclose(patching_map(model, same, "patterns", "all", progress=False).effect, 0)


def test_batches_do_not_matter_and_each_token_has_its_column() -> None:
    one, all_ = (
        patching_map(tiny_model(), tiny_task(5), "mlps", batch_size=n, progress=False) for n in (2, 5)
    )
    assert np.allclose(one.values, all_.values)
    assert one.columns == ("cls", "patch 0", "patch 1", "patch 2", "patch 3")


def test_the_search_lists_flips_or_says_that_there_is_none(tmp_path: Path) -> None:
    model = cv.load("catdog-tiny")
    task = cv.Task(*catdog_pairs(1, seed=3), metric=cv.logit_diff("cat", "dog"))
    stream = flip_search(model, task, site="stream", tokens="all", progress=False)
    assert stream.flips
    assert all(flip.becomes == ("dog",) and flip.switched == 1 for flip in stream.flips)
    assert all(flip.fewest for flip in stream.flips[:5])
    assert "To what the other image is seen as" in str(stream)
    same = cv.Task(catdog_pairs(1).clean, catdog_pairs(1).clean + 0.0, metric=cv.logit_diff("cat", "dog"))
    none = flip_search(model, same, progress=False)
    assert not none.flips
    assert "None of 16 heads, patched alone, flips the decision (cat) on the pair" in str(none)
    with pytest.raises(DataError, match="do not differ"):
        _ = none.map.share


def test_heat_maps_are_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = patching_map(tiny_model(), tiny_task(2), "heads", progress=False)
    assert found.heat_map(tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OptionError, match="cannot draw"):
        found.heat_map(tmp_path / "heads.circuit")


def test_a_notebook_shows_the_map_lying(monkeypatch: pytest.MonkeyPatch) -> None:
    """36 heads at 3 sets of tokens are a strip, not a tower; without matplotlib there is the table."""
    pytest.importorskip("matplotlib")
    drawn, n = np.random.default_rng(0), 36
    found = PatchingMap(
        "heads", tuple(f"a0.h{head}" for head in range(n)), ("all", "cls", "patch"), ((0, 1), (0,), (1,)),
        drawn.normal(size=(n, 3, 1)), np.zeros((n, 3, 1), np.int64), np.zeros(1), np.zeros(1, np.int64),
        np.ones(1), np.ones(1, np.int64),
    )  # fmt: skip
    page = FlipSearch((), found, 1, ("cat",))._repr_html_()
    ((data,),) = [re.findall(r"data:image/png;base64,([^\"]+)", page)]
    width, height = Image.open(io.BytesIO(base64.b64decode(data))).size
    assert 1200 > width > 2 * height > 400
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "<img" not in found._repr_html_()
    assert "a0.h0" in found._repr_html_()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "neurons"}, "neurons"),
        ({"tokens": "some"}, "some"),
        ({"tokens": {"far": [99]}}, "far"),
        ({"rows": ["a9.h9"]}, "a9.h9"),
    ],
)
def test_what_cannot_be_patched_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        patching_map(tiny_model(), tiny_task(1), progress=False, **options)
    alone = cv.Task(images(2, 1), metric=cv.logit_diff(0, 1), ablation="mean")
    with pytest.raises(DataError, match="corrupt"):
        patching_map(tiny_model(), alone, progress=False)


def test_no_single_head_of_a_real_model_switches_cat_to_dog(shared_data: Path, tmp_path: Path) -> None:
    model = cv.load(
        "vit_tiny_patch16_224", checkpoint=shared_data / "weights" / "vit_tiny_patch16_224.safetensors"
    )
    folder = shared_data / "images" / "catdog"
    task = cv.Task(
        folder / "prisma_crop_dog.jpeg",
        folder / "prisma_crop_cat.png",
        metric=cv.logit_diff("tabby", "Border collie"),
    )
    search = flip_search(model, task, narrow=False, progress=False)
    assert len(search.map.rows) == 36
    assert {flip.node for flip in search.flips} == {"a2.h0", "a4.h2"}
    assert "None makes the model see what it sees in the other image" in str(search)
    assert search.heat_map(tmp_path / "heads.png").stat().st_size > 10_000
