"""`load("hf:...")`: folders that `save_pretrained` wrote, with their own preprocessing and class names."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import circuitvit as cv
from circuitvit.errors import CircuitViTError, FileError, ModelError, OptionError, UnsupportedModelError
from circuitvit.models.families.hf_load import input_spec
from circuitvit.models.processor import ProcessorSpec
from circuitvit.tasks.image_files import preprocess
from tests.hf_models import MODELS, SMALL, hf, own_output
from tests.rightness import finished

SQUARE = {"height": 32, "width": 32}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def saved(module: Any, folder: Path, processor: Any = None) -> Path:
    module.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def micro(name: str) -> Any:
    torch.manual_seed(1)
    return finished(MODELS[name](), torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of cats, dogs and owls."""
    config = hf.ViTConfig(**SMALL, id2label={0: "cat", 1: "dog", 2: "owl"})
    module = finished(hf.ViTForImageClassification(config), torch.float32)
    return saved(module, tmp_path_factory.mktemp("hf") / "owls", hf.ViTImageProcessor(size=SQUARE))


# -- models that load ------------------------------------------------------------------------------


def test_a_folder_is_loaded_with_its_classes_and_preprocessing(folder: Path) -> None:
    model = cv.load(f"hf:{folder}")
    module = hf.ViTForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), module(IMAGES).logits)
    assert model.classes == ("cat", "dog", "owl")
    assert model.name == f"hf:{folder}"
    assert model.dtype == torch.float32
    assert model.preprocessing == ProcessorSpec(
        (3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", resize=(32, 32)
    )
    assert cv.wrap(module).preprocessing == model.preprocessing  # found beside its weights
    assert cv.load(f"hf:{folder}", classes=["a", "b", "c"]).classes == ("a", "b", "c")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_are_read_in_the_dtype_asked_for(folder: Path, dtype: torch.dtype) -> None:
    assert cv.load(f"hf:{folder}", dtype=dtype).dtype == dtype


@pytest.mark.parametrize("name", ["dinov3", "beit, classes", "dinov2, classes", "deit, teacher", "msn"])
def test_other_architectures_load_as_what_their_configuration_names(name: str, tmp_path: Path) -> None:
    module = micro(name)
    model = cv.load(f"hf:{saved(module, tmp_path, hf.ViTImageProcessor(size=SQUARE))}")
    assert type(model.module) is type(module)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), own_output(module, IMAGES))


def test_of_images_and_texts_the_image_tower_alone_is_loaded(tmp_path: Path) -> None:
    whole = micro("clip, both towers")
    processor = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)
    model = cv.load(f"hf:{saved(whole, tmp_path, processor)}")
    with torch.no_grad():
        assert torch.equal(model(IMAGES), whole.get_image_features(IMAGES).pooler_output)
    assert not [name for name, _ in model.module.named_parameters() if "text" in name]


def test_the_encoder_of_mae_is_loaded_with_its_masking_off(tmp_path: Path) -> None:
    sizes = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
    module = finished(hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**SMALL, **sizes, decoder_num_hidden_layers=1)))
    model = cv.load(f"hf:{saved(module.float(), tmp_path, hf.ViTImageProcessor(size=SQUARE))}")
    module.config.mask_ratio = 0.0
    with torch.no_grad():
        assert torch.allclose(model(IMAGES), own_output(module.vit, IMAGES), atol=1e-4)


def test_a_checkpoint_without_a_pooler_gives_its_class_token(tmp_path: Path) -> None:
    """DINO's checkpoints name a class whose pooler they have no weights for: it would be drawn at random."""
    module = micro("vit, no pooler")
    model = cv.load(f"hf:{saved(module, tmp_path, hf.ViTImageProcessor(size=SQUARE))}")
    with torch.no_grad():
        assert torch.equal(model(IMAGES), module(IMAGES).last_hidden_state[:, 0])


def test_without_an_image_processor_the_usual_one_is_taken_and_told(tmp_path: Path) -> None:
    saved(micro("clip"), tmp_path)
    with pytest.warns(UserWarning, match="comes without an image processor"):
        spec = cv.load(f"hf:{tmp_path}").preprocessing
    assert spec.size == (3, 32, 32)
    assert spec.mean[0] == pytest.approx(0.4815, abs=1e-4)


def test_a_model_is_found_by_name_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from circuitvit.cli.program import app

    rng = np.random.default_rng(0)
    for name in ("clean", "corrupt"):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    pair = ["--clean", str(tmp_path / "clean.png"), "--corrupt", str(tmp_path / "corrupt.png")]
    out = ["--method", "eap", "--edges", "10", "--random", "0", "--out", str(tmp_path / "out"), "--quiet"]
    classes = ["--target", "cat", "--foil", "owl"]
    found = CliRunner().invoke(app, ["discover", "--model", f"hf:{folder}", *pair, *classes, *out])
    assert found.exit_code == 0, found.output
    assert (tmp_path / "out" / "circuit.json").is_file()


# -- preprocessing ---------------------------------------------------------------------------------

PROCESSORS: dict[str, Callable[[], Any]] = {
    "squeezed": lambda: hf.ViTImageProcessor(size=SQUARE),
    "bicubic": lambda: hf.ViTImageProcessor(size={"height": 32, "width": 48}, resample=3),
    "nearest": lambda: hf.ViTImageProcessor(size=SQUARE, resample=0),
    "squeezed and cropped": lambda: hf.DeiTImageProcessor(size={"height": 37, "width": 37}, crop_size=SQUARE),
    "cropped": lambda: hf.CLIPImageProcessor(size={"shortest_edge": 33}, crop_size=SQUARE),
    "cropped, odd": lambda: hf.BitImageProcessor(size={"shortest_edge": 35}, crop_size=SQUARE),
    "padded": lambda: hf.CLIPImageProcessor(size={"shortest_edge": 29}, crop_size=SQUARE),
    "siglip": lambda: hf.SiglipImageProcessor(size=SQUARE),
    "not rounded": lambda: hf.DINOv3ViTImageProcessor(size=SQUARE),
    "not normalised": lambda: hf.ViTImageProcessor(size=SQUARE, do_normalize=False),
    "not rescaled": lambda: hf.ViTImageProcessor(
        size=SQUARE, do_rescale=False, image_mean=[120.0] * 3, image_std=[60.0] * 3
    ),
    "rescaled otherwise": lambda: hf.ViTImageProcessor(size=SQUARE, rescale_factor=1 / 127.5),
}
SIZES = [(32, 32), (50, 41), (41, 50), (133, 57), (57, 133), (20, 21)]


@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_become_the_processor_s_own_numbers(name: str) -> None:
    processor, rng = PROCESSORS[name](), np.random.default_rng(0)
    spec = input_spec(processor)
    # Versions of transformers before 5.21 show the colours under what is transparent, and not white.
    shown = hf.image_transforms.convert_to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0))
    for width, height in SIZES:
        for mode in ("RGB", "RGBA") if shown == (255, 255, 255) else ("RGB",):
            pixels = rng.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
            picture = Image.fromarray(pixels, mode)
            told = processor(picture, return_tensors="pt", do_convert_rgb=True).pixel_values[0]
            found = preprocess(picture, spec)
            assert found.shape == told.shape == spec.size
            assert (found - told).abs().max() <= 1e-7 * told.abs().max()


def test_siglip2_squeezes_pictures_to_a_square_which_square_ones_are() -> None:
    processor = hf.Siglip2ImageProcessor(patch_size=16, max_num_patches=4)
    spec = input_spec(processor)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    told = processor(picture, return_tensors="pt")
    assert told.spatial_shapes.tolist() == [[2, 2]]
    found = preprocess(picture, spec).unfold(1, 16, 16).unfold(2, 16, 16)  # (colour, row, column, y, x)
    assert torch.equal(found.permute(1, 2, 3, 4, 0).reshape(4, -1), told.pixel_values[0])


@pytest.mark.parametrize(
    "processor",
    [
        lambda: hf.ViTImageProcessor(size={"shortest_edge": 32}),
        lambda: hf.ViTImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}),
        lambda: hf.ViTImageProcessor(do_resize=False),
        lambda: hf.ViTImageProcessor(resample=4),
    ],
    ids=["any long side", "longest side", "any size", "box"],
)
def test_inputs_of_no_fixed_size_are_refused(processor: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"ViTImageProcessor.*give tensors"):
        input_spec(processor())


def test_masks_go_the_way_of_their_pictures(tmp_path: Path) -> None:
    spec = input_spec(PROCESSORS["cropped"]())
    labels = np.zeros((50, 80), dtype=np.uint8)
    labels[:, 40:] = 1
    Image.fromarray(labels).save(tmp_path / "labels.png")
    mask = cv.tasks.corruptions.read_mask(tmp_path / "labels.png", 1, spec)
    assert mask.shape == (32, 32)
    assert mask[:, 16:].all()
    assert not mask[:, :15].any()


# -- what cannot be loaded -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("", "there is no folder"),
        ("{empty}", "holds no config.json"),
        ("{folder}/config.json", "is a file, where a folder"),
    ],
)
def test_a_missing_folder_is_told(name: str, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=message):
        cv.load("hf:" + name.format(empty=tmp_path, folder=folder))


def test_offline_a_name_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    with pytest.raises(
        ModelError, match=r"hf:google/vit-base-patch16-224 could not be downloaded.*give a folder"
    ):
        cv.load("hf:google/vit-base-patch16-224")


def test_options_that_mean_nothing_here_are_refused(folder: Path) -> None:
    for options in ({"img_size": 384}, {"trust_remote_code": True}):
        with pytest.raises(OptionError, match="unknown option of hf:"):
            cv.load(f"hf:{folder}", **options)
    with pytest.raises(OptionError, match="its own weights: leave out checkpoint"):
        cv.load(f"hf:{folder}", checkpoint="vit.safetensors")


def damaged(folder: Path, to: Path, **changes: Any) -> str:
    """A copy with another configuration."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return f"hf:{to}"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"hidden_size": "big"},
        {"architectures": [7]},
        {"architectures": ["CLIPModel"]},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense_is_told(
    changes: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        cv.load(damaged(folder, tmp_path, **changes))


def test_files_that_are_cut_off_or_hold_code_are_told(folder: Path, tmp_path: Path) -> None:
    cut, code = (damaged(folder, tmp_path / name) for name in ("cut", "code"))
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        cv.load(cut)
    processor = {"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "mine.Mine"}}
    (tmp_path / "code" / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ModelError, match="custom code"):
        cv.load(code)
    with pytest.raises(ModelError, match="cannot be loaded"):
        cv.load("hf:no name")


def test_what_does_not_fit_is_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="is a SwinModel, whose parts are not known"):
        cv.load(damaged(folder, tmp_path / "a", architectures=["SwinModel"]))
    with pytest.raises(ModelError, match=r"is .*24.* in the file and .*36.* in the model"):
        cv.load(damaged(folder, tmp_path / "b", hidden_size=36))
    with pytest.raises(ModelError, match=r"has no weights for vit.layers.2"):
        cv.load(damaged(folder, tmp_path / "c", num_hidden_layers=3))
    with pytest.raises(
        ModelError, match=r"has weights for vit.layers.1.* of which its configuration has fewer"
    ):
        cv.load(damaged(folder, tmp_path / "e", num_hidden_layers=1))
    name = damaged(folder, tmp_path / "d")
    (tmp_path / "d" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not a valid JSON file"):
        cv.load(name)


def test_weights_that_could_run_code_are_not_read(folder: Path, tmp_path: Path) -> None:
    name = damaged(folder, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(
        hf.ViTForImageClassification.from_pretrained(folder).state_dict(), tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(ModelError, match=r"no file named model\.safetensors"):
        cv.load(name)


def test_code_beside_the_weights_never_runs(folder: Path, tmp_path: Path) -> None:
    name = damaged(folder, tmp_path, auto_map={"AutoConfig": "evil.Config"}, model_type="evil")
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CircuitViTError):
        cv.load(name)


def test_without_transformers_it_is_said_how_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'circuitvit\[transformers\]'"):
        cv.load(f"hf:{folder}")


# -- the same model by another library ---------------------------------------------------------------


def converted(timm_vit: nn.Module, classes: dict[int, str]) -> Any:
    """timm's ViT-Ti as transformers keeps it."""
    config = hf.ViTConfig(
        hidden_size=192, num_attention_heads=3, intermediate_size=768, layer_norm_eps=1e-6, id2label=classes
    )
    module, state = hf.ViTForImageClassification(config), {}
    places = {
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "head": "classifier",
        "norm": "vit.layernorm",
    }
    inside = {
        "norm1": "layernorm_before",
        "attn.proj": "attention.o_proj",
        "norm2": "layernorm_after",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for name, tensor in timm_vit.state_dict().items():
        whole, kind = name.removesuffix(".weight").removesuffix(".bias"), name.rpartition(".")[2]
        if not whole.startswith("blocks."):
            state[places[whole] if whole == name else f"{places[whole]}.{kind}"] = tensor
            continue
        _, layer, part = whole.split(".", 2)
        if part == "attn.qkv":
            for port, piece in zip("qkv", tensor.chunk(3), strict=True):
                state[f"vit.layers.{layer}.attention.{port}_proj.{kind}"] = piece.contiguous()
        else:
            state[f"vit.layers.{layer}.{inside[part]}.{kind}"] = tensor
    module.load_state_dict(state)
    return module.eval()


@pytest.fixture(scope="module")
def both(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[cv.Model, cv.Model]:
    """A real ViT-Ti through timm, and the same through transformers."""
    weights = shared_data / "weights" / "vit_tiny_patch16_224.safetensors"
    through_timm = cv.load("vit_tiny_patch16_224", checkpoint=weights)
    assert through_timm.classes is not None
    processor = hf.BitImageProcessor(
        size={"shortest_edge": 248}, crop_size={"height": 224, "width": 224},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    module = converted(through_timm.module, dict(enumerate(through_timm.classes)))
    return through_timm, cv.load(f"hf:{saved(module, tmp_path_factory.mktemp('vit') / 'tiny', processor)}")


@pytest.fixture(scope="module")
def photographs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two photographs of a size that neither library resizes."""
    folder, paths = tmp_path_factory.mktemp("photographs"), []
    for name in ("prisma_crop_dog.jpeg", "prisma_crop_cat.png"):
        picture = Image.open(shared_data / "images" / "catdog" / name).convert("RGB").resize((248, 248))
        picture.save(folder / f"{Path(name).stem}.png")
        paths.append(folder / f"{Path(name).stem}.png")
    return paths[0], paths[1]


def test_a_real_model_has_the_same_scores_through_both_libraries(
    both: tuple[cv.Model, cv.Model], photographs: tuple[Path, Path]
) -> None:
    tasks = cv.Task(*photographs, cv.logit_diff("tabby", "Border collie"))
    first, second = (cv.attribute(model, tasks, "eap", progress=False).values for model in both)
    assert np.abs(first - second).max() <= 1e-4 * np.abs(first).max()
    assert both[0].graph == both[1].graph


def test_a_real_model_has_the_same_circuit_through_both_libraries(
    both: tuple[cv.Model, cv.Model], photographs: tuple[Path, Path], tmp_path: Path, shared_data: Path
) -> None:
    from typer.testing import CliRunner

    from circuitvit.cli.program import app

    weights = shared_data / "weights" / "vit_tiny_patch16_224.safetensors"
    models = [["--model", "vit_tiny_patch16_224", "--checkpoint", weights], ["--model", both[1].name]]
    task = [
        "--clean",
        photographs[0],
        "--corrupt",
        photographs[1],
        "--target",
        "tabby",
        "--foil",
        "Border collie",
    ]
    options = ["--method", "eap", "--edges", 300, "--random", 0, "--calibrate", 0, "--quiet", "--out"]
    for number, model in enumerate(models):
        arguments = ["discover", *model, *task, *options, tmp_path / str(number)]
        found = CliRunner().invoke(app, [str(each) for each in arguments])
        assert found.exit_code == 0, found.output
    circuits = [cv.Circuit.load(tmp_path / str(number) / "circuit.json") for number in range(2)]
    assert set(circuits[0]) == set(circuits[1])

    picture = cv.Task(*photographs, cv.logit_diff("tabby", "Border collie"))
    runs = [cv.run(model, picture, circuits[1 - number]) for number, model in enumerate(both)]
    assert torch.allclose(*runs, rtol=1e-3, atol=1e-3)  # each library's circuit on the other's model
