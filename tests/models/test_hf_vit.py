"""Vision Transformers of transformers: every class opens as it is, or is refused by name."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import circuitvit as cv
from circuitvit.errors import ModelError, UnsupportedModelError
from tests.hf_models import MODELS, SMALL, TEXT, hf, hooked, own_output, siglip
from tests.reference.hooked import Receiver
from tests.rightness import CLEAN, CORRUPT, finished, prove, scored, task_of
from tests.strategies import assert_close

ORDER = torch.arange(4.0).expand(2, 4)
BEFORE_AFTER = "layernorm_before", "layernorm_after"


def micro(name: str, seed: int = 1) -> Any:
    """A micro-model in float64 with weights of order 1."""
    torch.manual_seed(seed)
    return finished(MODELS[name](), seed=seed)


def wrapped(module: Any) -> cv.Model:
    """The model, with names for its outputs, so that metrics of classes can be taken of features too."""
    outputs = cv.wrap(module).n_logits
    return cv.wrap(module, classes=[f"output {number}" for number in range(outputs)])


# -- all classes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_class_is_taken_apart_into_what_it_computes(name: str) -> None:
    module = micro(name)
    model = wrapped(module)
    with torch.no_grad():
        expected, other = own_output(module, CLEAN), own_output(module, CORRUPT)
    tolerance = 1e-5 * float(expected.abs().max())
    task = task_of()
    for found, told in (
        (model(CLEAN), expected),
        (cv.run(model, task, cv.Circuit.full(model.graph)), expected),
        (cv.run(model, task, cv.Circuit.empty(model.graph)), other),
    ):
        assert (found - told).abs().max() <= tolerance
    assert cv.wrap(module).has_classes == (
        (hasattr(module, "classifier") and "no classes" not in name) or "teacher" in name
    )
    assert model.grid == (2, 2)
    assert model.stages[-1].parts is not None  # so that direct attribution and backward rules know it
    scored(model, "relp")


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("vit", ("cls",)),
        ("deit", ("cls", "dist")),
        ("ijepa", ()),
        ("dinov2, registers", ("cls", "reg", "reg")),
        ("dinov3", ("cls", "reg", "reg")),
        ("clip", ("cls",)),
    ],
)
def test_tokens_before_the_patches_have_their_kinds(name: str, prefix: tuple[str, ...]) -> None:
    assert cv.wrap(micro(name)).prefix == prefix


PROOFS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit, classes": ("vit.layernorm", {"blocks": "vit.layers", "norms": BEFORE_AFTER}),
    "vit": ("layernorm", {"blocks": "layers", "norms": BEFORE_AFTER}),
    "deit, teacher": ("deit.layernorm", {"blocks": "deit.layers", "norms": BEFORE_AFTER}),
    "mae": ("layernorm", {"blocks": "layers", "norms": BEFORE_AFTER}),
    "ijepa": ("layernorm", {"blocks": "layers", "norms": BEFORE_AFTER}),
    "dinov2, swiglu": (
        "layernorm",
        {"blocks": "encoder.layer", "norms": ("norm1", "norm2"), "scales": "layer_scale#.lambda1"},
    ),
    "dinov2, registers and classes": (
        "dinov2_with_registers.layernorm",
        {
            "blocks": "dinov2_with_registers.encoder.layer",
            "norms": ("norm1", "norm2"),
            "scales": "layer_scale#.lambda1",
        },
    ),
    "dinov3": (
        "norm",
        {"blocks": "model.layer", "norms": ("norm1", "norm2"), "scales": "layer_scale#.lambda1"},
    ),
    "beit, shared": ("layernorm", {"blocks": "layers", "norms": BEFORE_AFTER, "scales": "lambda_#"}),
    "clip, projected": (
        "vision_model.post_layernorm",
        {
            "blocks": "vision_model.encoder.layers",
            "norms": ("layer_norm1", "layer_norm2"),
            "attention": "self_attn",
            "out": "out_proj",
        },
    ),
}


@pytest.mark.parametrize("name", PROOFS)
def test_edges_are_those_of_hooks_on_the_original(name: str) -> None:
    module = micro(name)
    last, places = PROOFS[name]
    norm = module.get_submodule(last)
    reads = Receiver(norm, norm, pool=lambda stream: stream[:, 0] if "clip" in name else stream)
    nodes = hooked(module, **{"attention": "attention", "out": "o_proj", **places}, last=reads)
    if name == "mae":  # which shuffles its patches, others in every run
        nodes = replace(nodes, run=lambda images: module(images, noise=ORDER).last_hidden_state[:, 0])
    prove(wrapped(module), nodes, CLEAN, CORRUPT)


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_edges_into_and_out_of_siglip_s_pool_are_those_of_hooks(name: str) -> None:
    module = micro(name)
    model = wrapped(module)
    assert {"m1->pool.h0<k>", "pool.h1->pool.mlp", "pool.mlp->logits"} <= set(model.graph.edges)
    prove(model, siglip(module), CLEAN, CORRUPT)


# -- what transformers does around -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit, classes", "dinov3", "beit, shared", "clip, projected"])
def test_results_do_not_depend_on_the_backend_of_attention(name: str) -> None:
    scores = []
    for backend in ("sdpa", "eager", "flex_attention" if "beit" not in name else "eager"):
        module = micro(name)
        module.set_attn_implementation(backend)
        scores.append(scored(wrapped(module), "eap"))
    assert scores[0] == scores[1] == scores[2]


def test_the_backend_may_be_switched_and_states_asked_for_after_wrapping() -> None:
    module = micro("clip, projected")
    model = wrapped(module)
    before = scored(model, "eap")
    module.set_attn_implementation("eager")
    module.config.output_attentions = True
    module(CLEAN, output_hidden_states=True)
    assert scored(model, "eap") == before
    assert module.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["vit, classes", "clip, both towers"])
def test_a_configuration_that_asks_for_states_or_tuples_changes_nothing(name: str) -> None:
    plain, module = micro(name), micro(name)
    for config in (module.config, getattr(module.config, "vision_config", module.config)):
        config._attn_implementation = "eager"
        config.output_attentions = config.output_hidden_states = True
        config.return_dict = False
    assert scored(wrapped(module), "eap") == scored(wrapped(plain), "eap")
    assert module.config.output_attentions  # of the user's own module


def test_hooks_by_which_transformers_records_states_are_nothing_to_warn_of() -> None:
    module = micro("dinov2")
    module(CLEAN, output_hidden_states=True)
    assert any(part._forward_hooks for part in module.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cv.wrap(module)
    module.layernorm.register_forward_hook(lambda part, inputs, output: None)
    with pytest.warns(UserWarning, match="forward hooks of layernorm are not carried over"):
        cv.wrap(module)


def test_dropout_and_stochastic_depth_of_a_configuration_do_not_matter() -> None:
    options = {
        **SMALL,
        "drop_path_rate": 0.5,
        "hidden_dropout_prob": 0.5,
        "attention_probs_dropout_prob": 0.5,
    }
    plain, module = (finished(hf.Dinov2Model(hf.Dinov2Config(**each))) for each in (SMALL, options))
    assert scored(wrapped(module), "eap") == scored(wrapped(plain), "eap")
    module.encoder.layer[1].drop_path.train()
    with pytest.raises(ModelError, match=r"encoder.layer.1.drop_path is in training mode"):
        cv.wrap(module)


def test_gradient_checkpointing_changes_nothing() -> None:
    module = micro("vit")
    module.activation_checkpointing_enable()
    assert scored(wrapped(module), "eap") == scored(wrapped(micro("vit")), "eap")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("beit, shared", "shared_position_bias.relative_position_bias_table"),
        ("beit", "layers.1.relative_position_bias.relative_position_bias_table"),
        ("dinov3", "rope_embeddings.inv_freq"),
        ("dinov2", "encoder.layer.0.layer_scale1.lambda1"),
        ("siglip", "head.probe"),
    ],
)
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
def test_weights_edited_after_wrapping_are_seen(name: str, place: str, copied: bool) -> None:
    module = micro(name)
    model = wrapped(module)
    before = scored(model, "eap")
    model = copy.deepcopy(model) if copied else model
    assert scored(model, "eap") == before
    for edited in {id(each): each for each in (module, model.module)}.values():
        if copied or edited is module:
            tensors = dict([*edited.named_parameters(), *edited.named_buffers()])
            with torch.no_grad():
                tensors[place].mul_(1.5)
    anew = scored(wrapped(copy.deepcopy(module)), "eap")
    assert anew != before
    assert scored(model, "eap") == anew


def test_half_precision_is_no_obstacle() -> None:
    for name in ("vit, classes", "dinov3", "beit, shared", "clip, projected"):
        module = finished(MODELS[name](), torch.bfloat16)
        model = cv.wrap(module)
        assert model.dtype == torch.bfloat16
        with torch.no_grad():
            images = CLEAN.bfloat16()
            expected, stream = own_output(module, images), model.embed(images)
            for stage in model.layers:
                stream = stage.add(stream, stage.write(stage.read(stream)))
            readout = model.stages[-1]
            assert (readout.write(readout.read(stream)) - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("name", ["dinov2", "dinov3", "beit", "beit, shared"])
def test_models_that_interpolate_positions_are_taken_at_the_size_of_their_preprocessing(name: str) -> None:
    module = micro(name)
    spec = cv.models.zoo.InputSpec((3, 48, 64), (0.5,) * 3, (0.5,) * 3)
    model = cv.wrap(module, preprocessing=spec, classes=[f"output {number}" for number in range(24)])
    assert model.grid == (3, 4)
    images = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        assert_close(model(images), own_output(module, images))
        full = cv.run(
            model, cv.Task(images, images.flip(0), cv.logit_diff(0, 1)), cv.Circuit.full(model.graph)
        )
        assert_close(full, own_output(module, images.float().double()))
    assert module.config.image_size == 32
    with pytest.raises(cv.errors.DataError, match=r"the model takes images of \(3, 48, 64\)"):
        cv.attribute(model, task_of())


def test_names_of_classes_are_those_of_the_configuration() -> None:
    named = hf.ViTForImageClassification(
        hf.ViTConfig(**SMALL, id2label={0: "cat", 1: "dog", 2: "owl"})
    ).eval()
    assert cv.wrap(named).classes == ("cat", "dog", "owl")
    assert cv.wrap(named, classes=["a", "b", "c"]).classes == ("a", "b", "c")
    assert cv.wrap(micro("vit, classes")).classes is None
    features = hf.ViTModel(hf.ViTConfig(**SMALL, id2label={0: "cat", 1: "dog", 2: "owl"})).eval()
    assert cv.wrap(features).classes is None


def test_a_text_tower_is_not_copied_to_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    module, copied = micro("clip, both towers"), list[type]()
    plain = nn.Module.to

    def noting(part: nn.Module, *args: Any, **options: Any) -> nn.Module:
        copied.extend(type(each) for each in part.modules())
        return plain(part, *args, **options)

    monkeypatch.setattr(nn.Module, "to", noting)
    cv.wrap(module)
    assert hf.CLIPVisionModel in copied
    assert hf.CLIPTextModel not in copied


# -- refusals --------------------------------------------------------------------------------------


def test_masking_of_mae_is_refused_with_the_way_out() -> None:
    module = hf.ViTMAEModel(hf.ViTMAEConfig(**SMALL)).eval()
    with pytest.raises(UnsupportedModelError, match=r"hides 75% of the patches.*mask_ratio = 0\.0"):
        cv.wrap(module)
    module.config.mask_ratio = 0.0
    cv.wrap(module)


def test_of_a_model_that_holds_a_vision_tower_the_attribute_is_named() -> None:
    config = hf.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **SMALL},
        text_config={"model_type": "llama", **TEXT, "num_key_value_heads": 2},
        image_token_index=3,
    )
    llava = finished(hf.LlavaForConditionalGeneration(config))
    with pytest.raises(UnsupportedModelError, match=r"wrap that, module\.model\.vision_tower"):
        cv.wrap(llava)
    tower = llava.model.vision_tower
    model = cv.wrap(tower)
    assert_close(model(CLEAN), tower(CLEAN).pooler_output)


@pytest.mark.parametrize(
    ("build", "attribute"),
    [
        (lambda: hf.ViTForMaskedImageModeling(hf.ViTConfig(**SMALL)), "module.vit"),
        (lambda: hf.BeitForMaskedImageModeling(hf.BeitConfig(**SMALL)), "module.beit"),
        (lambda: hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**SMALL)), "module.vit"),
    ],
)
def test_of_a_model_that_gives_no_vector_the_part_that_does_is_named(build: Any, attribute: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"wrap that, {attribute}"):
        cv.wrap(build().eval())


def test_other_kinds_of_transformers_are_refused() -> None:
    swin = hf.SwinModel(hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1], num_heads=[2]))
    with pytest.raises(UnsupportedModelError, match="SwinModel cannot be decomposed"):
        cv.wrap(swin.eval())


class LoraLinear(nn.Linear):
    """As PEFT's layers are: a linear layer that adds a product of two narrow matrices."""

    __module__ = "peft.tuners.lora.layer"


class Linear8bit(nn.Linear):
    """As quantized layers are: weights of whole numbers."""


def test_adapters_quantized_layers_and_hooks_of_accelerate_are_refused_by_name() -> None:
    adapted = micro("vit")
    adapted.layers[0].attention.q_proj = LoraLinear(24, 24)
    with pytest.raises(UnsupportedModelError, match=r"layers.0.attention.q_proj.*PEFT.*merge_and_unload"):
        cv.wrap(adapted)

    quantized = micro("vit")
    layer = Linear8bit(24, 24).double()
    layer.weight = nn.Parameter(torch.zeros(24, 24, dtype=torch.int8), requires_grad=False)
    quantized.layers[1].mlp.fc1 = layer
    with pytest.raises(UnsupportedModelError, match=r"layers.1.mlp.fc1 is a quantized Linear8bit"):
        cv.wrap(quantized)

    dispatched = micro("vit")
    dispatched.layers[1]._hf_hook = object()
    dispatched.layers[1].forward = dispatched.layers[1].forward
    with pytest.raises(UnsupportedModelError, match=r"layers.1 has a hook of accelerate \(device_map\)"):
        cv.wrap(dispatched)

    other = micro("vit")
    other.layers[0].attention.v_proj = nn.Sequential(other.layers[0].attention.v_proj)
    with pytest.raises(UnsupportedModelError, match=r"blocks.0.attention.v_proj is a Sequential"):
        cv.wrap(other)


class PostNorm(hf.ViTModel):
    """A subclass that does something of its own between its blocks and the last norm."""

    def forward(self, pixel_values: Any = None, **options: Any) -> Any:
        found = super().forward(pixel_values, **options)
        found.pooler_output = (
            found.pooler_output + found.last_hidden_state[:, 1, : found.pooler_output.shape[1]]
        )
        return found


class Renamed(hf.ViTModel):
    """A subclass that computes the same."""


class Gated(nn.Module):
    """An attention that does more than its parts say."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        for name, value in (*own.named_children(), ("config", own.config)):
            setattr(self, name, value)
        self.num_attention_heads, self.own = own.num_attention_heads, own

    def forward(self, *args: Any, **options: Any) -> Any:
        written, pattern = self.own(*args, **options)
        return written * 1.001, pattern


def test_a_subclass_is_the_same_or_is_told() -> None:
    config = hf.ViTConfig(**SMALL)
    module = finished(Renamed(config))
    assert_close(cv.wrap(module)(CLEAN), module(CLEAN).pooler_output)
    with pytest.raises(UnsupportedModelError, match="after the last block"):
        cv.wrap(finished(PostNorm(config)))
    odd = finished(hf.ViTModel(config))
    odd.layers[1].attention = Gated(odd.layers[1].attention).eval()
    with pytest.raises(UnsupportedModelError, match=r"blocks.1 of ViTModel"):
        cv.wrap(odd)
