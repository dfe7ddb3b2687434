"""A stranger's video model on real clips: what tells it that a clip runs backwards, where it takes notice."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import circuitvit as cv
from circuitvit.engine import Evaluator
from circuitvit.errors import DataError
from circuitvit.models import Model, registry
from circuitvit.tasks.corruptions import reverse

pytest.importorskip("av")
example: dict[str, Any] = runpy.run_path(
    str(Path(__file__).resolve().parents[2] / "examples" / "video_circuit.py")
)
HEEDED = ("mmaction2_demo", "mmaction2_part_0")
"""The clips of which the model takes another view when they run backwards."""


@pytest.fixture(scope="module")
def model(shared_data: Path) -> Iterator[Model]:
    folder = shared_data / "models" / "vivit_tubelet_binary"
    said = json.loads((folder / "config.json").read_text())
    module = example["TubeletViT"](
        said["frames"], said["img"], tuple(said["tubelet"]), said["dim"], said["depth"], said["heads"],
        said["mlp"], said["classes"], act_after=True,
    )  # fmt: skip
    module.load_state_dict(load_file(folder / "model.safetensors"))
    family = example["TubeletFamily"]()
    before = dict(registry.FAMILIES)
    cv.register(example["TubeletViT"], family)
    spec = replace(family.preprocessing(module), repeat=True)  # 16 frames are stretched to 42
    yield cv.wrap(module.eval(), classes=["0", "1"], preprocessing=spec)
    registry.FAMILIES.clear()
    registry.FAMILIES.update(before)


@pytest.fixture(scope="module")
def clips(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each clip of the shared data in a file of its own, by name."""
    folder, paths = tmp_path_factory.mktemp("clips"), {}
    with np.load(shared_data / "video" / "clips_16x112.npz") as found:
        for name in found.files:
            paths[name] = folder / f"{name}.npz"
            np.savez(paths[name], frames=found[name])
    return paths


@pytest.mark.slow
def test_a_circuit_tells_a_clip_from_its_reverse(model: Model, clips: dict[str, Path]) -> None:
    assert model.grid == (5, 16, 16)
    assert model.graph.n_edges == 46
    task = cv.Task([clips[name] for name in HEEDED], reverse).prepare(model)
    evaluator = Evaluator(task)
    assert (evaluator.whole - evaluator.nothing > 1.0).all()  # each is taken for another class backwards
    circuit = cv.attribute(model, task, "exact", progress=False).connected(10)
    kept, lost = evaluator.many([circuit.kept, (~circuit).kept])
    assert float((kept - evaluator.nothing).mean() / evaluator.effect.mean()) > 0.9
    assert float((evaluator.whole - lost).mean() / evaluator.effect.mean()) > 0.9
    assert {"input->a0.h1<k>", "input->a0.h1<v>", "a0.h1->m0"} <= set(circuit)


@pytest.mark.slow
def test_where_it_takes_no_notice_it_is_said(model: Model, clips: dict[str, Path]) -> None:
    others = [path for name, path in clips.items() if name not in HEEDED]
    for paths in (others, list(clips.values())):
        task = cv.Task(paths, reverse, cv.logit_diff("0", "1"))
        with pytest.raises(DataError, match=r"not distinguishable from 0.*nothing for a circuit to explain"):
            Evaluator(task.prepare(model)).check_effect()


def test_videos_are_read_as_their_frames_are(shared_data: Path, model: Model) -> None:
    found = cv.tasks.images.as_images(shared_data / "video" / "mmaction2_part_0.mp4", model.preprocessing)
    clip = found.take(0, 1)
    assert clip.shape == (1, 42, 3, 128, 128)
    assert 0.0 <= float(clip.min()) < float(clip.max()) <= 1.0
