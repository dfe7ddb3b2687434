"""Activations streamed into a file: interrupted, resumed, refused, and as small in memory as they are."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import circuitvit as cv
from circuitvit.engine.kept import Activations
from circuitvit.errors import FileError, ModelError, OptionError
from tests.rightness import images, micro
from tests.strategies import assert_close

module: Any = sys.modules["circuitvit.engine.reading"]  # which has a function of the same name

NAMES = ["resid*", "a1.h0.pattern@cls", "m0.hidden"]


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return cv.wrap(micro())


def streamed(model: cv.Model, out: Path, count: int = 7, **options: Any) -> Activations:
    defaults: dict[str, Any] = {"names": NAMES, "batch_size": 2, "progress": False}
    return model.activations(images(count), out=out, **{**defaults, **options})


def test_a_file_holds_what_memory_would(model: cv.Model, tmp_path: Path) -> None:
    found = streamed(model, tmp_path / "acts.safetensors")
    expected = model.activations(images(7), NAMES, progress=False)
    assert list(found) == list(expected)
    assert (found.images, found.tokens, found.model) == (expected.images, expected.tokens, expected.model)
    for name in found:
        assert found[name].dtype == torch.float64
        assert_close(found[name], expected[name])
    assert repr(found) == repr(expected)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == [
        "acts.safetensors"
    ]


def test_interrupted_and_resumed_it_is_the_same_file(
    model: cv.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed(model, tmp_path / "whole.safetensors")
    own, runs = module.read_sites, 0

    def stopping(*arguments: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 4:  # one for the shapes, two batches
            raise KeyboardInterrupt
        return own(*arguments)

    monkeypatch.setattr(module, "read_sites", stopping)
    with pytest.raises(KeyboardInterrupt):
        streamed(model, tmp_path / "acts.safetensors")
    assert not (tmp_path / "acts.safetensors").exists()
    runs = 10
    streamed(model, tmp_path / "acts.safetensors")
    assert runs == 10 + 1 + 2  # the first two batches are not run again
    whole, resumed = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("whole", "acts"))
    assert resumed == whole
    runs = 20
    streamed(model, tmp_path / "acts.safetensors")
    assert runs <= 21  # recalled


KILLED = """
import sys, time
import torch
import circuitvit as cv
import circuitvit.engine.reading
module = sys.modules["circuitvit.engine.reading"]
own, runs = module.read_sites, 0
def stuck_in_the_fifth(*arguments):
    global runs
    runs += 1
    if runs == 6:  # the first is for the shapes
        print("stuck", flush=True)
        time.sleep(600)
    return own(*arguments)
module.read_sites = stuck_in_the_fifth
images = torch.linspace(-1, 1, 12 * 3 * 48 * 48).reshape(12, 3, 48, 48)
cv.load("catdog-tiny").activations(images, "resid*", out=sys.argv[1], batch_size=1, progress=False)
"""


def test_a_killed_process_leaves_something_to_resume(tmp_path: Path) -> None:
    out = tmp_path / "acts.safetensors"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout as said:
        assert said.readline() == "stuck\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert json.loads((tmp_path / "acts.safetensors.progress.json").read_text())["done"] == 4
    seen = torch.linspace(-1, 1, 12 * 3 * 48 * 48).reshape(12, 3, 48, 48)
    own = cv.load("catdog-tiny")
    for path in (out, tmp_path / "whole.safetensors"):
        own.activations(seen, "resid*", out=path, batch_size=1, progress=False)
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize(
    "change",
    [{"count": 6}, {"names": ["resid1"]}, {"names": [*NAMES[:1], "a1.h0.pattern@patch", NAMES[2]]}],
    ids=["images", "names", "tokens"],
)
def test_a_file_of_something_else_is_refused(model: cv.Model, tmp_path: Path, change: Any) -> None:
    out = tmp_path / "acts.safetensors"
    streamed(model, out)
    before = out.read_bytes()
    with pytest.raises(FileError, match="holds something else"):
        streamed(model, out, **change)
    with pytest.raises(FileError, match="holds something else"):
        streamed(model.edit({"m0": 0}), out)
    assert out.read_bytes() == before


def test_files_of_images_are_named(model: cv.Model, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 9, 9)).save(tmp_path / "photos" / f"{number}.png")
    found = model.activations(tmp_path / "photos", "resid2@cls", out=tmp_path / "acts.st", progress=False)
    assert [Path(name).name for name in found.images] == ["0.png", "1.png", "2.png"]
    assert found["resid2@cls"].shape == (3, 1, 24)


def test_what_memory_holds_can_be_saved(model: cv.Model, tmp_path: Path) -> None:
    held = model.activations(images(3), NAMES, progress=False)
    found = Activations.load(held.save(tmp_path / "acts.safetensors"))
    assert (list(found), found.images, found.tokens) == (list(held), held.images, held.tokens)
    assert all(torch.equal(found[name], held[name]) for name in held)


# -- files that are none ---------------------------------------------------------------------------


def test_hostile_files_are_refused(model: cv.Model, tmp_path: Path) -> None:
    out = tmp_path / "acts.safetensors"
    found = streamed(model, out, count=2)
    whole, tensors = out.read_bytes(), {name: found[name].clone() for name in found}
    said = {
        "model": "m",
        "images": ["a", "b"],
        "names": list(tensors),
        "tokens": {name: ["x"] for name in tensors},
    }
    bad = tmp_path / "bad.safetensors"
    for size in (0, 4, 8, 100, len(whole) - 1):
        bad.write_bytes(whole[:size])
        with pytest.raises(FileError, match="no file of activations"):
            Activations.load(bad)
    others: list[Any] = [
        None, 3, [], "x", {}, {**said, "images": 3}, {**said, "names": ["resid0"]}, {**said, "tokens": {}},
        {**said, "model": None}, {**said, "tokens": dict.fromkeys(tensors, "x")}, {**said, "images": [1, 2]},
        {**said, "names": [["x"]]}, {**said, "images": ["a"]}, {**said, "tokens": []},
    ]  # fmt: skip
    for other in others:
        save_file(tensors, bad, {"format": module.FORMAT, "identity": "x", "said": json.dumps(other)})
        with pytest.raises(FileError, match="no file of activations"):
            Activations.load(bad)
    for metadata in ({}, {"format": "x"}, {"format": module.FORMAT}, {"format": module.FORMAT, "said": "{"}):
        save_file(tensors, bad, metadata)
        with pytest.raises(FileError, match="no file of activations"):
            Activations.load(bad)
    with pytest.raises(FileError, match="there is no file"):
        Activations.load(tmp_path / "none")


def test_what_is_left_of_another_run_is_begun_anew(model: cv.Model, tmp_path: Path) -> None:
    out = tmp_path / "acts.safetensors"
    streamed(model, tmp_path / "whole.safetensors")
    for left in ("{", "[]", '{"identity": "x", "done": 3}', '{"identity": 1}', ""):
        out.unlink(missing_ok=True)
        out.with_name("acts.safetensors.part").write_bytes(b"xyz")
        out.with_name("acts.safetensors.progress.json").write_text(left)
        streamed(model, out)
        assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize("options", [{"names": []}, {"batch_size": 0}, {"grad": True}])
def test_settings_that_make_no_sense_are_refused(model: cv.Model, tmp_path: Path, options: Any) -> None:
    with pytest.raises(OptionError):
        streamed(model, tmp_path / "acts.safetensors", **options)


def test_values_that_are_not_finite_are_named(model: cv.Model, tmp_path: Path) -> None:
    far = torch.full((model.d_model,), 1e38)
    edited = model.edit({"m1": cv.add(far, scale=1e300)})
    with pytest.raises(ModelError, match="m1 is NaN or infinite on image 0"):
        edited.activations(images(2), "m1", progress=False)


@pytest.mark.parametrize("what", ["cut", "too far", "before the first"])
def test_what_an_interrupted_run_left_broken_is_not_gone_on_from(tmp_path: Path, what: str) -> None:
    model, out = cv.load("catdog-tiny"), tmp_path / "acts.safetensors"
    images = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    whole = model.activations(images, "resid1", out=out, progress=False)["resid1"].clone()
    with safe_open(str(out), "pt") as file:
        identity = file.metadata()["identity"]
    part, sidecar = (tmp_path / f"acts.safetensors.{end}" for end in ("part", "progress.json"))
    out.unlink()
    part.write_bytes(bytes(100 if what == "cut" else 10**5))
    done = {"cut": 2, "too far": 99, "before the first": -3}[what]
    sidecar.write_text(json.dumps({"identity": identity, "done": done}))
    again = model.activations(images, "resid1", out=out, progress=False)["resid1"]
    assert torch.equal(again, whole)


def test_a_folder_is_no_file_to_write_to(tmp_path: Path) -> None:
    model = cv.load("catdog-tiny")
    with pytest.raises(FileError, match="is a folder: name a file in it"):
        model.activations(torch.zeros(1, 3, 48, 48), "resid1", out=tmp_path, progress=False)


def test_a_file_that_is_gone_is_named_when_it_is_looked_at(tmp_path: Path) -> None:
    model, out = cv.load("catdog-tiny"), tmp_path / "acts.safetensors"
    found = model.activations(torch.zeros(1, 3, 48, 48), "resid1", out=out, progress=False)
    out.unlink()
    with pytest.raises(FileError, match="cannot read the activations"):
        found["resid1"]
