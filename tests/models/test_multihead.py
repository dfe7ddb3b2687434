"""Models built on torch's `nn.MultiheadAttention`, against hooks on the originals: torchvision, open_clip,
clip.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.errors import CircuitViTError, ModelError, UnsupportedModelError
from circuitvit.models.families.torch_layers import multihead
from circuitvit.models.timm_import import import_timm
from tests.reference.hooked import (
    HookedModule,
    Receiver,
    Sender,
    exchanged_in_multihead,
    given,
    gives,
    one_head,
    written_by_multihead,
)
from tests.rightness import CLEAN, CORRUPT, finished, prove
from tests.strategies import assert_close

import_timm()  # after which torchvision can be imported

from torchvision.models.vision_transformer import ConvStemConfig  # noqa: E402
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT  # noqa: E402

CLASSES = 5
NAMES = [str(number) for number in range(CLASSES)]
"""With which features are taken for logits."""


def torchvision_vit(**options: Any) -> Any:
    shape = {
        "image_size": 32,
        "patch_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 24,
        "mlp_dim": 48,
    }
    return finished(TorchvisionViT(**shape, num_classes=CLASSES, **options))


def open_clip_tower(**options: Any) -> Any:
    transformer = pytest.importorskip("open_clip.transformer")
    shape = {"image_size": 32, "patch_size": 16, "width": 24, "layers": 2, "heads": 2, "mlp_ratio": 2.0}
    return finished(transformer.VisionTransformer(**{**shape, "output_dim": CLASSES, **options}))


def token_first_tower() -> Any:
    """As open_clip built them before version 2.27."""
    module = open_clip_tower()
    module.transformer.batch_first = False
    for block in module.transformer.resblocks:
        block.attn.batch_first = False
    return module


@pytest.fixture
def openai(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file of OpenAI's models, whose LayerNorms compute in the dtype that they are given: float64 can be
    proved.
    """
    pytest.importorskip("pkg_resources", exc_type=ImportError)
    model = pytest.importorskip("clip.model")
    monkeypatch.setattr(model.LayerNorm, "forward", nn.LayerNorm.forward)
    return model


def openai_tower(model: Any) -> Any:
    return finished(model.VisionTransformer(32, 16, 24, 2, 2, CLASSES))


def hooked(
    module: Any, blocks: Any, attention: str, last: nn.Module, pool: Callable[[Tensor], Tensor] = Tensor.clone
) -> HookedModule:
    """Where models with torch's attention keep their nodes; `pool` is what the last norm is given of a
    stream.
    """
    senders = {"input": Sender(blocks[0], given)}
    receivers = {"logits": Receiver(last, last, pool=pool)}
    for layer, block in enumerate(blocks):
        senders[f"m{layer}"] = Sender(getattr(block, "ls_2", block.mlp), gives)
        receivers[f"m{layer}"] = Receiver(block.ln_2, block.ln_2)
        attn, gamma = getattr(block, attention), getattr(getattr(block, "ls_1", None), "gamma", None)
        for head in range(2):
            senders[f"a{layer}.h{head}"] = Sender(attn, written_by_multihead(head, gamma))
            for port, name in enumerate("qkv"):
                exchanged = exchanged_in_multihead(head, port)
                receivers[f"a{layer}.h{head}<{name}>"] = Receiver(block.ln_1, attn, exchanged=exchanged)
    return HookedModule(lambda images: _first(module(images)), senders, receivers)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


# -- proofs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv_stem_configs": [ConvStemConfig(8, 3, 4), ConvStemConfig(8, 3, 4)]},
        {"representation_size": 7},
    ],
    ids=["plain", "conv-stem", "tanh-head"],
)
def test_edges_of_torchvision_are_those_of_hooks(options: dict[str, Any]) -> None:
    module = torchvision_vit(**options)
    model = cv.wrap(module)
    assert (model.grid, model.leading, model.prefix) == ((2, 2), 1, ("cls",))
    prove(model, hooked(module, module.encoder.layers, "self_attention", module.encoder.ln), CLEAN, CORRUPT)


@pytest.mark.parametrize(
    ("build", "pool"),
    [
        (open_clip_tower, Tensor.clone),
        (lambda: open_clip_tower(ls_init_value=0.3, no_ln_pre=True, output_tokens=True), Tensor.clone),
        (
            lambda: open_clip_tower(pool_type="avg", final_ln_after_pool=True),
            lambda stream: stream[:, 1:].mean(dim=1),
        ),
        (token_first_tower, lambda stream: stream.transpose(0, 1)),
    ],
    ids=["plain", "layer-scale", "average", "token-first"],
)
def test_edges_of_open_clip_are_those_of_hooks(
    build: Callable[[], Any], pool: Callable[[Tensor], Tensor]
) -> None:
    module = build()
    model = cv.wrap(module, classes=NAMES)
    assert model.grid == (2, 2)
    prove(model, hooked(module, module.transformer.resblocks, "attn", module.ln_post, pool), CLEAN, CORRUPT)


def test_edges_of_openai_clip_are_those_of_hooks(openai: Any) -> None:
    module = openai_tower(openai)
    model = cv.wrap(module, classes=NAMES)
    class_token = lambda stream: stream[0]  # noqa: E731 - tokens come first
    prove(
        model,
        hooked(module, module.transformer.resblocks, "attn", module.ln_post, class_token),
        CLEAN,
        CORRUPT,
    )


def written_through(head: int) -> Callable[..., Tensor]:
    """What a head of CoCa's pool writes: the pool with one head alone."""

    def of(pool: Any, stream: Tensor, _: Tensor) -> Tensor:
        alone = copy.deepcopy(pool)
        for part in alone.modules():
            part._forward_hooks.clear()
        alone.attn = one_head(alone.attn, head)
        return alone(stream)  # type: ignore[no-any-return]

    return of


@pytest.mark.parametrize(
    "options",
    [{}, {"pool_type": "avg", "attn_pooler_queries": 4, "final_ln_after_pool": True}, {"output_dim": 24}],
    ids=["first-latent", "mean-of-latents", "packed"],
)
def test_edges_of_cocas_pool_are_those_of_hooks(options: dict[str, Any]) -> None:
    """Whose latents are narrower than the stream, or as wide."""
    module = open_clip_tower(
        **{"output_dim": 6, "attn_pooler_heads": 2, "attn_pooler_queries": 3, **options},
        attentional_pool=True,
        output_tokens=True,
    )
    names = [str(number) for number in range(module.output_dim)]
    model = cv.wrap(module, classes=names)
    assert "pool.h1<v>->logits" not in model.graph.edges
    assert "m1->pool.h1<v>" in model.graph.edges
    plain, pool = hooked(module, module.transformer.resblocks, "attn", module.ln_post), module.attn_pool
    senders, receivers = dict(plain.senders), dict(plain.receivers)
    for head in range(2):
        senders[f"pool.h{head}"] = Sender(pool, written_through(head))
        for port, name in ((1, "k"), (2, "v")):
            exchanged = exchanged_in_multihead(head, port)
            receivers[f"pool.h{head}<{name}>"] = Receiver(pool.ln_k, pool.attn, exchanged=exchanged)
    prove(model, HookedModule(plain.run, senders, receivers), CLEAN, CORRUPT)


# -- whole models, trunks, precision ---------------------------------------------------------------


def clip_model(kind: str, **options: Any) -> Any:
    """A whole CLIP of open_clip's."""
    library = pytest.importorskip("open_clip")
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "patch_size": 16, "width": 24, "layers": 2, "head_width": 12, **options}
    return finished(getattr(library, kind)(CLASSES, vision, text))


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_a_model_of_images_and_texts_is_taken_for_its_image_tower(kind: str) -> None:
    whole = clip_model(kind)
    model = cv.wrap(whole)
    assert not model.has_classes
    assert_close(model(CLEAN), whole.encode_image(CLEAN))
    direction = torch.randn(CLASSES, dtype=torch.float64)
    scores = cv.attribute(model, cv.Task(CLEAN, CORRUPT, lambda features: features @ direction), "exact")
    assert abs(scores.values).max() > 1e-3


def test_a_captioner_is_taken_for_its_image_tower() -> None:
    library = pytest.importorskip("open_clip")
    text = {"context_length": 8, "vocab_size": 50, "width": 24, "heads": 2, "layers": 1}
    pool = {"attentional_pool": True, "attn_pooler_heads": 1, "attn_pooler_queries": 3, "output_tokens": True}
    vision = {"image_size": 32, "patch_size": 16, "width": 24, "layers": 2, "head_width": 12, **pool}
    whole = finished(library.CoCa(CLASSES, text, text, vision))
    model = cv.wrap(whole)
    assert_close(model(CLEAN), whole.visual(CLEAN)[0])


def test_a_subclass_of_such_a_model_is_told_which_part_to_wrap() -> None:
    whole = clip_model("CLIP")
    whole.__class__ = type("Finer", (type(whole),), {})
    with pytest.raises(UnsupportedModelError, match=r"wrap that, module\.visual"):
        cv.wrap(whole)


@pytest.mark.parametrize(("pool", "proj"), [("token", "linear"), ("avg", "linear"), ("token", "none")])
def test_a_trunk_of_timm_opens_with_its_projection(pool: str, proj: str) -> None:
    timm_model = pytest.importorskip("open_clip.timm_model")
    module = finished(timm_model.TimmModel("test_vit", CLASSES, 160, pool=pool, proj=proj))
    model = cv.wrap(module)
    images = torch.randn(2, 3, 160, 160, dtype=torch.float64)
    assert_close(model(images), module(images))
    stream = model.embed(images)
    for stage in model.layers:
        stream = stage.add(stream, stage.write(stage.read(stream)))
    assert_close(model.stages[-1].write((stream,)), module(images))
    readout: Any = model.stages[-1]
    assert readout.parts is not None
    assert model.n_logits == (CLASSES if proj == "linear" else module.trunk.num_features)


def test_a_trunk_that_does_not_open_says_why() -> None:
    timm_model = pytest.importorskip("open_clip.timm_model")
    with pytest.raises(UnsupportedModelError, match=r"module\.trunk|cannot be decomposed"):
        cv.wrap(timm_model.TimmModel("resnet10t", CLASSES, 64, pool="avg").eval())


def test_norms_that_compute_in_float32_are_checked_without_that_rounding() -> None:
    model = pytest.importorskip("clip.model")
    module = openai_tower(model).float()
    wrapped = cv.wrap(module)
    assert_close(wrapped(CLEAN.float()), module(CLEAN.float()))
    with pytest.raises(ModelError, match=r"ln_\w+ is a LayerNorm that cannot be run in the dtype"):
        cv.wrap(openai_tower(model))  # OpenAI's own norm does not run in float64


@pytest.mark.parametrize("factor", [1.001, 1 + 3e-5])
def test_norms_that_only_seem_to_are_refused(factor: float) -> None:
    model = pytest.importorskip("clip.model")

    class Louder(model.LayerNorm):  # type: ignore[misc, name-defined]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * factor  # type: ignore[no-any-return]

    module = openai_tower(model).float()
    module.transformer.resblocks[1].ln_2.__class__ = Louder
    with pytest.raises(UnsupportedModelError, match=r"ln_2"):
        cv.wrap(module)


def test_weights_of_two_dtypes_are_refused_with_the_way_out() -> None:
    model = pytest.importorskip("clip.model")
    module = openai_tower(model).float()
    model.convert_weights(module)
    with pytest.raises(UnsupportedModelError, match=r"float16 and float32 together.*module\.float\(\)"):
        cv.wrap(module)
    assert cv.wrap(module.float()).dtype == torch.float32


# -- switches that are refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "switch"),
    [
        ({"pool_type": "none"}, "pool_type='none'"),
        ({"scale_attn": True}, "scale_attn=True"),
        ({"scale_heads": True}, "scale_heads=True"),
        ({"scaled_cosine_attn": True}, "scaled_cosine=True|the model fails"),
        ({"attentional_pool": "parallel", "attn_pooler_heads": 1}, "attentional_pool='parallel'|the model"),
    ],
)
def test_switches_of_open_clip_that_are_not_known_are_refused(options: dict[str, Any], switch: str) -> None:
    with pytest.raises(ModelError, match=switch):
        cv.wrap(open_clip_tower(**options))


@pytest.mark.parametrize(
    ("options", "switch"),
    [
        ({"kdim": 6}, "q_proj_weight.*kdim=6"),
        ({"add_bias_kv": True}, "add_bias_kv=True"),
        ({"add_zero_attn": True}, "add_zero_attn=True"),
    ],
)
def test_switches_of_torchs_attention_that_are_not_known_are_refused(
    options: dict[str, Any], switch: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"blocks\.0\.attn.*{switch}"):
        multihead(nn.MultiheadAttention(8, 2, **options), "blocks.0.attn")


@pytest.mark.parametrize("bias", [True, False])
def test_torchs_attention_opens_with_and_without_biases(bias: bool) -> None:
    module = torchvision_vit()
    for block in module.encoder.layers:
        block.self_attention = nn.MultiheadAttention(24, 2, bias=bias, batch_first=True)
    model = cv.wrap(finished(module))
    stream = model.embed(CLEAN)
    for stage in model.layers:
        stream = stage.add(stream, stage.write(stage.read(stream)))
    assert_close(model.stages[-1].write((stream,)), module(CLEAN))


def edits(module: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    block = module.encoder.layers[0]
    yield "hook", lambda: block.self_attention.register_forward_hook(lambda *given: (given[2][0] * 2, None))
    yield "forward", lambda: setattr(block.self_attention, "forward", block.self_attention.forward)
    yield "training mode", lambda: block.self_attention.train()
    yield "plain EncoderBlock|unknown", lambda: module.encoder.layers.__setitem__(0, nn.Identity())


@pytest.mark.parametrize("place", range(4))
def test_what_a_module_hides_is_refused(place: int) -> None:
    module = torchvision_vit()
    word, edit = list(edits(module))[place]
    edit()
    with pytest.raises(ModelError, match=word):
        cv.wrap(module)


def test_wrappers_that_change_nothing_are_taken_off() -> None:
    module = torchvision_vit()
    assert cv.wrap(nn.DataParallel(module)).graph == cv.wrap(module).graph


# -- torchvision by name -----------------------------------------------------------------------------


def test_torchvision_by_name(tmp_path: Path) -> None:
    from torchvision.models import get_model

    shape = {"image_size": 32, "num_classes": 3}
    module = get_model("vit_b_32", weights=None, **shape).eval()
    older = {
        name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): tensor
        for name, tensor in module.state_dict().items()
    }
    torch.save(older, tmp_path / "vit.pth")  # as torchvision's own files still call them
    model = cv.load("torchvision:vit_b_32", checkpoint=tmp_path / "vit.pth", **shape)
    images = torch.randn(2, 3, 32, 32)
    assert_close(model(images), module(images), 1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_b_31", {}, "unknown model of torchvision 'vit_b_31': did you mean"),
        ("vit_b_16", {}, "has no weights yet"),
        ("vit_b_16", {"checkpoint": "no.pth"}, "there is no such file"),
    ],
)
def test_names_of_torchvision_that_lead_nowhere(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CircuitViTError, match=message):
        cv.load(f"torchvision:{name}", **options)


@pytest.mark.parametrize("options", [{}, {"output_dim": 6, "attentional_pool": True, "attn_pooler_heads": 2}])
def test_a_copied_model_sees_edits_of_its_own_weights(options: dict[str, Any]) -> None:
    model = copy.deepcopy(cv.wrap(open_clip_tower(**options)))
    with torch.no_grad():
        for name, tensor in model.module.named_parameters():
            tensor.mul_(1.2).add_(0.01 * ("bias" in name))
    model.refresh()
    stream = model.embed(CLEAN)
    for stage in model.layers:
        stream = stage.add(stream, stage.write(stage.read(stream)))
    readout: Any = model.stages[-1]
    assert_close(readout.write((stream,)), model(CLEAN))
    assert_close(readout.parts(stream), model(CLEAN))
