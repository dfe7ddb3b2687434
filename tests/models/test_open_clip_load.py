"""`cv.load("open_clip:MODEL/…")`: names, files, preprocessing, and what it says where something is
missing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import circuitvit as cv
from circuitvit.errors import FileError, ModelError, NameNotFoundError, OptionError
from circuitvit.models.timm_import import import_timm
from circuitvit.tasks.image_files import preprocess
from tests.strategies import assert_close

import_timm()
open_clip = pytest.importorskip("open_clip")

VISION = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 16}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the whole weights of two models that open_clip knows for the time of a test."""
    factory = sys.modules["open_clip.factory"]
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    (tmp_path / "configs").mkdir()
    for name, vision in (("Micro-16", VISION), ("Micro-timm", TIMM)):
        config = {"embed_dim": 5, "vision_cfg": vision, "text_cfg": TEXT}
        (tmp_path / "configs" / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    for name in ("Micro-16", "Micro-timm"):
        save_file(state_of(whole(name)), tmp_path / f"{name}.safetensors")
    return tmp_path


def whole(name: str) -> Any:
    torch.manual_seed(0)
    config = open_clip.get_model_config(name)
    return open_clip.CLIP(**config).eval()


def state_of(module: Any) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", ["Micro-16", "Micro-timm"])
@pytest.mark.parametrize("way", ["in the name", "apart", "torch file", "of several GPUs"])
def test_the_image_tower_of_a_file(name: str, way: str, folder: Path) -> None:
    file = folder / f"{name}.safetensors"
    if way == "in the name":
        model = cv.load(f"open_clip:{name}/{file}")
    elif way == "apart":
        model = cv.load(f"open_clip:{name}", checkpoint=file)
    else:
        prefix = "module." if way == "of several GPUs" else ""
        state = {prefix + key: tensor for key, tensor in state_of(whole(name)).items()}
        torch.save({"state_dict": state, "epoch": 3} if prefix else state, folder / "weights.pt")
        if prefix:
            torch.save({"state_dict": state}, folder / "weights.pt")
        model = cv.load(f"open_clip:{name}", checkpoint=folder / "weights.pt", dtype=torch.float64)
    images = torch.randn(2, *model.preprocessing.size)
    assert_close(model(images.to(model.dtype)).float(), whole(name).encode_image(images), 1e-4)
    assert not model.has_classes
    assert model.name.startswith(f"open_clip:{name}")


def test_names_are_written_with_slashes_too(folder: Path) -> None:
    assert cv.load(f"open_clip:Micro/16/{folder / 'Micro-16.safetensors'}").n_logits == 5


def test_entries_of_the_configuration_can_be_replaced(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"does not fit.*positional_embedding is"):
        cv.load("open_clip:Micro-16", checkpoint=folder / "Micro-16.safetensors", image_size=48)
    with pytest.raises(ModelError, match="open_clip cannot build Micro-16"):
        cv.load("open_clip:Micro-16", checkpoint=folder / "Micro-16.safetensors", colour="blue")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "ViT-B-31/openai",
            NameNotFoundError,
            "unknown model of open_clip 'ViT-B-31': did you mean 'ViT-B-32'",
        ),
        ("ViT-B-32/opena", NameNotFoundError, "unknown weights of ViT-B-32 'opena': did you mean 'openai'"),
        (
            "ViT-B-32",
            OptionError,
            r"has no weights yet: give open_clip:ViT-B-32/TAG, such as \w+, or checkpoint=",
        ),
        ("ViT-B-32/no.safetensors", FileError, "there is no such file"),
    ],
)
def test_names_that_lead_nowhere(name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        cv.load(f"open_clip:{name}")


def test_weights_are_said_once(folder: Path) -> None:
    with pytest.raises(OptionError, match="leave out checkpoint"):
        cv.load("open_clip:ViT-B-32/openai", checkpoint=folder / "Micro-16.safetensors")


def test_without_a_connection_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", nowhere)
    with pytest.raises(ModelError, match=r"open_clip:ViT-B-32/openai could not be downloaded.*MODEL/FILE"):
        cv.load("open_clip:ViT-B-32/openai")


def test_where_open_clip_is_not_installed_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ModelError, match=r"pip install circuitvit\[open-clip\]"):
        cv.load("open_clip:ViT-B-32/openai")


def test_files_that_are_none_of_its_models_are_refused(folder: Path) -> None:
    save_file({"head.weight": torch.zeros(2)}, folder / "other.safetensors")
    with pytest.raises(FileError, match="holds no image tower"):
        cv.load(f"open_clip:Micro-16/{folder / 'other.safetensors'}")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "openai.pt")
    with pytest.raises(FileError, match="TorchScript archive"):
        cv.load(f"open_clip:Micro-16/{folder / 'openai.pt'}")


# -- preprocessing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("mode", "size"), [("shortest", 32), ("squash", 32), ("squash", (32, 48))])
def test_images_are_prepared_as_open_clip_does(mode: str, interpolation: str, size: Any) -> None:
    transform = sys.modules["open_clip.transform"]
    module = whole_tower(size)
    config = transform.PreprocessCfg(
        size, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation=interpolation, resize_mode=mode
    )
    sys.modules["open_clip.model"].set_model_preprocess_cfg(module, vars(config))
    spec = cv.wrap(module).preprocessing
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    own = transform.image_transform_v2(config, is_train=False)(Image.fromarray(pixels))
    assert_close(preprocess(Image.fromarray(pixels), spec), own, 1e-5)


def whole_tower(size: Any) -> Any:
    torch.manual_seed(0)
    return open_clip.CLIP(5, {**VISION, "image_size": size}, TEXT).eval().visual


@pytest.mark.parametrize(("mode", "size"), [("longest", 32), ("shortest", (32, 48))])
def test_a_way_to_resize_that_is_not_known_is_not_guessed(mode: str, size: Any) -> None:
    module = whole_tower(size)
    module.preprocess_cfg = {"resize_mode": mode}
    with pytest.raises(OptionError, match="give preprocessing="):
        cv.wrap(module)


def test_without_a_configuration_images_are_openais() -> None:
    spec = cv.wrap(whole_tower(32)).preprocessing
    assert spec.size == (3, 32, 32)
    assert spec.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
