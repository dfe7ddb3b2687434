"""`load` and `wrap`: models by name, checkpoints that fit and files that do not, and what is said offline."""

from __future__ import annotations

import pickle
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.errors import (
    CircuitViTError,
    FileError,
    ModelError,
    NameNotFoundError,
    OptionError,
    UnsupportedModelError,
)
from circuitvit.models import checkpoints, decompose
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo import zoo_names
from tests.strategies import scramble

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 3}


@pytest.fixture(scope="module")
def module() -> Any:
    built = import_timm().create_model(NAME, pretrained=False, **SMALL).eval()
    scramble(built, seed=1, gain=1.0)
    return built


@pytest.fixture(scope="module")
def weights(module: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    safetensors.torch.save_file(module.state_dict(), path)
    return path


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# -- models that load ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo_names())
def test_a_bundled_model_comes_with_weights_classes_and_preprocessing(name: str) -> None:
    model = cv.load(name)
    assert model.name == name
    assert model.has_classes == (model.words is None)  # the outputs of a CLIP are features
    assert len(model.classes or ()) == model.n_logits * model.has_classes
    assert model.card is not None
    assert model.card.input == model.preprocessing
    logits = model(torch.zeros(2, *model.preprocessing.size))
    assert logits.shape == (2, model.n_logits)


def save_plain(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(state, path)
    return path


SAVED: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any]]] = {
    "pt": ("weights.pt", lambda state: state),
    "pth": ("weights.pth", lambda state: state),
    "bin": ("weights.bin", lambda state: state),
    "pt-state-dict": ("weights.pt", lambda state: {"epoch": 3, "state_dict": state}),
    "pt-model": ("weights.pt", lambda state: {"model": state, "best": 0.9}),
    "pt-module": ("weights.pt", lambda state: {"module": state}),
}


@pytest.mark.parametrize(("file", "wrapping"), SAVED.values(), ids=SAVED)
def test_a_torch_checkpoint_is_read(
    file: str, wrapping: Callable[[dict[str, Tensor]], Any], module: Any, images: Tensor, tmp_path: Path
) -> None:
    torch.save(wrapping(module.state_dict()), tmp_path / file)
    model = cv.load(NAME, checkpoint=tmp_path / file, **SMALL)
    with torch.no_grad():
        assert torch.equal(model(images), module(images))


def test_a_safetensors_checkpoint_is_read(weights: Path, module: Any, images: Tensor) -> None:
    model = cv.load(NAME, checkpoint=str(weights), classes=["cat", "dog", "rabbit"], **SMALL)
    with torch.no_grad():
        assert torch.equal(model(images), module(images))
    assert model.name == NAME
    assert model.classes == ("cat", "dog", "rabbit")
    assert model.preprocessing.size == (3, 32, 32)
    assert model.preprocessing.mean == (0.5, 0.5, 0.5)


def test_dtype_and_device_are_as_asked_for(weights: Path, module: Any, images: Tensor) -> None:
    model = cv.load(NAME, checkpoint=weights, dtype=torch.float64, device="cpu", **SMALL)
    assert model.dtype == torch.float64
    assert model.device == torch.device("cpu")
    with torch.no_grad():
        assert torch.allclose(model(images.double()).float(), module(images), atol=1e-5)


def test_imagenet_models_know_their_classes(tmp_path: Path) -> None:
    options = {**SMALL, "num_classes": 1000}
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(import_timm().create_model(NAME, **options).state_dict(), path)
    model = cv.load(NAME, checkpoint=path, **options)
    assert model.classes is not None
    assert model.synsets is not None
    assert model.classes[281].startswith("tabby")
    assert model.synsets[281] == "n02123045"


def test_equal_weights_have_equal_hashes_and_others_do_not(weights: Path) -> None:
    first, second = (cv.load(NAME, checkpoint=weights, **SMALL) for _ in range(2))
    assert first.weights_hash == second.weights_hash
    with torch.no_grad():
        next(second.module.parameters()).view(-1)[0] += 1e-3
    third = cv.wrap(second.module)
    assert third.weights_hash != first.weights_hash


def test_a_model_says_what_it_is(weights: Path) -> None:
    model = cv.load(NAME, checkpoint=weights, **SMALL)
    assert repr(model) == f"Model({NAME}: 2 stages, {model.graph.n_edges} edges, input 3x32x32)"


# -- names and options -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("catdog-tyni", "catdog-tiny"),
        ("vit_tiny_patch16_225", "vit_tiny_patch16_224"),
        ("deit_tiny_patch16", "deit_tiny_patch16_224"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(NameNotFoundError) as caught:
        cv.load(name)
    assert repr(name) in str(caught.value)
    assert repr(nearest) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("openclip:ViT-B-32", "did you mean 'open_clip:ViT-B-32'"),
        ("google/vit-base-patch16-224", "One of a hub is hf:google/vit-base-patch16-224"),
    ],
)
def test_a_name_of_another_library_is_told_how_it_is_written(name: str, hint: str) -> None:
    with pytest.raises(NameNotFoundError, match=hint):
        cv.load(name)


def test_a_folder_of_transformers_and_bare_weights_are_told_how_they_are_loaded(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    with pytest.raises(OptionError, match=r"name the model, with checkpoint=.*model\.safetensors"):
        cv.load(weights)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    for asked in (weights, tmp_path):
        with pytest.raises(OptionError, match=f"load hf:{re.escape(str(tmp_path))}$"):
            cv.load(asked)


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(OptionError, match=r"checkpoint=FILE, or pretrained=True"):
        cv.load(NAME)


@pytest.mark.parametrize(
    "options",
    [{"checkpoint": "weights.safetensors"}, {"pretrained": True}, {"img_size": 64}, {"num_classes": 3}],
    ids=lambda options: next(iter(options)),
)
def test_a_bundled_model_takes_no_weights_and_no_architecture(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"leave out {next(iter(options))}"):
        cv.load("catdog-tiny", **options)


def test_an_option_that_timm_does_not_know_is_refused(weights: Path) -> None:
    with pytest.raises(ModelError, match=f"timm cannot build {NAME}.*number_of_heads"):
        cv.load(NAME, checkpoint=weights, number_of_heads=3)


def test_another_family_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "resnet.safetensors"
    safetensors.torch.save_file(import_timm().create_model("resnet10t", num_classes=2).state_dict(), path)
    with pytest.raises(UnsupportedModelError, match=r"ResNet.*Vision Transformers of .*timm"):
        cv.load("resnet10t", checkpoint=path, num_classes=2)


# -- checkpoints that do not fit ---------------------------------------------------------------------


def test_weights_of_another_shape_are_named(weights: Path) -> None:
    with pytest.raises(ModelError) as caught:
        cv.load(NAME, checkpoint=weights, **{**SMALL, "num_classes": 5})
    message = str(caught.value)
    assert str(weights) in message
    assert "2 have another shape" in message
    assert "head.weight is (3, 12) in the file and (5, 12) in the model" in message
    assert message.endswith("It has 3 classes: give num_classes=3, and their names by classes=[...]")


def test_advice_names_the_classes_only_where_nothing_else_differs(
    weights: Path,
) -> None:
    with pytest.raises(ModelError, match="options such as num_classes=, img_size=") as caught:
        cv.load(NAME, checkpoint=weights, **{**SMALL, "num_classes": 5, "embed_dim": 24})
    assert "give num_classes" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "model.", "module._orig_mod."])
def test_a_prefix_that_all_weights_share_is_dropped(module: Any, tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "wrapped.pth"
    torch.save({"state_dict": {f"{prefix}{name}": each for name, each in module.state_dict().items()}}, path)
    loaded = cv.load(NAME, checkpoint=path, **SMALL).module.state_dict()
    assert all(torch.equal(loaded[name], each) for name, each in module.state_dict().items())


def test_missing_and_left_over_weights_are_named(module: Any, tmp_path: Path) -> None:
    state = module.state_dict()
    state["neck.weight"] = state.pop("norm.weight")
    safetensors.torch.save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ModelError) as caught:
        cv.load(NAME, checkpoint=tmp_path / "other.safetensors", **SMALL)
    assert "missing (norm.weight)" in str(caught.value)
    assert "left over (neck.weight)" in str(caught.value)


def test_a_checkpoint_with_nan_is_refused_by_the_tensors_name(module: Any, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state["blocks.0.norm2.bias"][1] = float("nan")
    safetensors.torch.save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(ModelError, match=r"NaN or infinite values, such as blocks\.0\.norm2\.bias"):
        cv.load(NAME, checkpoint=tmp_path / "nan.safetensors", **SMALL)


# -- files that are no checkpoints -------------------------------------------------------------------


class Attack:
    """Unpickled without care, this writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "executed"))


def raw_pickle(path: Path, content: object) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize(
    "save", [lambda path, content: torch.save(content, path), raw_pickle], ids=["torch", "pickle"]
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_a_malicious_pickle_is_refused_and_never_run(
    suffix: str, save: Callable[[Path, object], None], module: Any, tmp_path: Path
) -> None:
    marker, path = tmp_path / "marker", tmp_path / f"weights{suffix}"
    pickle.loads(pickle.dumps(Attack(marker)))
    assert marker.exists()  # it works where it is let
    marker.unlink()
    save(path, {**module.state_dict(), "extra": Attack(marker)})
    with pytest.raises(FileError, match="not a readable checkpoint"):
        cv.load(NAME, checkpoint=path, **SMALL)
    assert not marker.exists()


def test_a_whole_module_is_refused_with_the_way_to_save_its_weights(module: Any, tmp_path: Path) -> None:
    torch.save(module, tmp_path / "whole.pt")
    with pytest.raises(FileError, match=r"holds timm\..*, which is code.*save_file") as caught:
        cv.load(NAME, checkpoint=tmp_path / "whole.pt", **SMALL)
    assert "torch.load" not in str(caught.value)


def cut(source: Path, target: Path, share: float) -> Path:
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])
    return target


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_truncated_file_is_refused_by_name(
    suffix: str, share: float, module: Any, weights: Path, tmp_path: Path
) -> None:
    source = weights if suffix == ".safetensors" else save_plain(module.state_dict(), tmp_path / "whole.pt")
    path = cut(source, tmp_path / f"cut{suffix}", share)
    with pytest.raises(FileError, match="cut"):
        cv.load(NAME, checkpoint=path, **SMALL)


def test_a_missing_file_is_refused_before_the_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        import_timm(), "create_model", lambda *_args, **_options: pytest.fail("built a model")
    )
    with pytest.raises(FileError, match=r"nowhere\.safetensors: there is no such file"):
        cv.load(NAME, checkpoint=tmp_path / "nowhere.safetensors")


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot read the checkpoint .* it is a folder, give the file"):
        cv.load(NAME, checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("vit_tiny", "vit_tiny_patch16_224"),
        ("vit-b16", "vit_base_patch16_224"),
        ("ViT-B/16", "vit_base_patch16_224"),
        ("ViT-Ti/16", "vit_tiny_patch16_224"),
        ("dinov2", "vit_small_patch14_dinov2"),
        ("facebook/dinov2-base", "vit_base_patch14_dinov2"),
        ("clip", "clip-tiny' or 'vit_base_patch16_clip_224"),
        ("deit", "deit_tiny_patch16_224"),
        ("catdog", "catdog-tiny"),
    ],
)
def test_names_that_people_use_are_answered_with_those_of_a_model(given: str, meant: str) -> None:
    with pytest.raises(NameNotFoundError, match=f"unknown model '{given}': did you mean '{meant}'"):
        cv.load(given)


def test_unknown_weights_of_a_model_are_answered_with_those_that_there_are() -> None:
    with pytest.raises(
        NameNotFoundError, match="'augreg_in1k': did you mean 'augreg_in21k' or 'augreg_in21k_ft_in1k'"
    ):
        cv.load("vit_tiny_patch16_224.augreg_in1k", pretrained=True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, "float32"])
def test_a_dtype_that_weights_cannot_have_is_refused(dtype: Any) -> None:
    with pytest.raises(OptionError, match=r"the dtype of weights is one of torch\.float32"):
        cv.load("catdog-tiny", dtype=dtype)


@pytest.mark.parametrize("options", [{"device": 1.5}, {"classes": "cat"}, {"classes": 3}])
def test_options_of_a_wrong_kind_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        cv.load("catdog-tiny", **options)


@pytest.mark.parametrize("name", [None, 3, nn.Identity()])
def test_what_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises(OptionError, match="a model is loaded by its name or a file"):
        cv.load(name)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(3)], ids=["list", "numbers", "tensor"])
def test_a_torch_file_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(FileError, match=r"odd\.pt"):
        cv.load(NAME, checkpoint=tmp_path / "odd.pt", **SMALL)


# -- downloads ---------------------------------------------------------------------------------------


def test_offline_the_error_comes_at_once_and_says_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_args: object, **_options: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(
        checkpoints.huggingface_hub, "try_to_load_from_cache", lambda *_args, **_options: None
    )
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        cv.load(NAME, pretrained=True)
    assert time.monotonic() - start < 10
    for words in (NAME, "could not be downloaded", "Temporary failure in name resolution", "checkpoint=FILE"):
        assert words in str(caught.value)


def test_a_download_that_fails_later_is_told_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_args: object, **_options: object) -> nn.Module:
        raise ConnectionResetError("connection lost")

    monkeypatch.setattr(checkpoints, "refuse_offline", lambda _name: None)
    monkeypatch.setattr(import_timm(), "create_model", lost)
    with pytest.raises(ModelError, match=r"could not be downloaded: connection lost.*checkpoint=FILE"):
        cv.load(NAME, pretrained=True)


def test_every_error_here_is_one_of_the_librarys() -> None:
    for kind in (FileError, ModelError, NameNotFoundError, OptionError, UnsupportedModelError):
        assert issubclass(kind, CircuitViTError)


def test_the_ends_of_a_model_are_copied_once_as_they_are_and_once_redrawn(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bool] = []
    wide = decompose._wide

    def counted(part: nn.Module, without: Any = (), redrawn: bool = False) -> nn.Module:
        if without:
            made.append(redrawn)
        return wide(part, without, redrawn)

    monkeypatch.setattr(decompose, "_wide", counted)
    cv.wrap(module)
    assert sorted(made) == [False, True]
