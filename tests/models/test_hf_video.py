"""transformers' models that see clips, and a tubelet ViT by hand, against hooks on the original modules."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.engine import Evaluator
from circuitvit.errors import DataError, UnsupportedModelError
from circuitvit.models import registry
from circuitvit.tasks.images import as_images
from tests.reference.hooked import (
    HookedModule,
    Receiver,
    Sender,
    given,
    gives,
    packed_blocks,
    written_by_head,
)
from tests.rightness import finished, prove
from tests.strategies import assert_close

transformers = pytest.importorskip("transformers")

HEADS, WIDTH = 2, 12
SHARED = {"hidden_size": HEADS * WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_labels": 5}
CLIP = {"image_size": 16, "num_frames": 4, "intermediate_size": 48, **SHARED}
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "video_circuit.py"
example: dict[str, Any] = runpy.run_path(str(EXAMPLE))


def clips(seed: int, count: int = 2) -> Tensor:
    """Clips `(count, 4, 3, 16, 16)`."""
    drawn = torch.randn(count, 4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return drawn.bfloat16().double()


CLEAN, CORRUPT = clips(0), clips(1)


def vivit(kind: str = "VivitForVideoClassification", **options: Any) -> Any:
    config = transformers.VivitConfig(tubelet_size=[2, 8, 8], **{**CLIP, **options})
    return finished(getattr(transformers, kind)(config))


def videomae(kind: str = "VideoMAEForVideoClassification", **options: Any) -> Any:
    config = transformers.VideoMAEConfig(patch_size=8, tubelet_size=2, **{**CLIP, **options})
    return finished(getattr(transformers, kind)(config))


def vjepa2(kind: str = "VJEPA2ForVideoClassification", **options: Any) -> Any:
    config = transformers.VJEPA2Config(
        crop_size=16, patch_size=8, frames_per_clip=4, tubelet_size=2, mlp_ratio=2, num_pooler_layers=1,
        pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1, **{**SHARED, **options},
    )  # fmt: skip
    return finished(getattr(transformers, kind)(config))


def timesformer(kind: str = "TimesformerForVideoClassification", **options: Any) -> Any:
    config = transformers.TimesformerConfig(patch_size=8, **{**CLIP, **options})
    return finished(getattr(transformers, kind)(config))


def tubelet() -> Any:
    return finished(example["TubeletViT"](4, 16, (2, 8, 8), 24, 2, HEADS, 48, 5, act_after=True))


# -- where the modules keep their nodes ------------------------------------------------------------


def apart(
    run: Callable[[Tensor], Tensor], blocks: Any, last: Receiver, parts: Callable[[Any], dict[str, nn.Module]]
) -> HookedModule:
    """Nodes of blocks whose queries, keys and values are linear layers of their own."""
    senders = {"input": Sender(blocks[0], given)}
    receivers = {"logits": last}
    for layer, block in enumerate(blocks):
        own = parts(block)
        senders[f"m{layer}"] = Sender(own["mlp"], gives)
        receivers[f"m{layer}"] = Receiver(own["norm2"], own["norm2"])
        for head in range(HEADS):
            columns = slice(head * WIDTH, (head + 1) * WIDTH)
            senders[f"a{layer}.h{head}"] = Sender(own["out"], written_by_head(head, WIDTH))
            for port in "qkv":
                receivers[f"a{layer}.h{head}<{port}>"] = Receiver(own["norm1"], own[port], columns)
    return HookedModule(run, senders, receivers)


def vivit_parts(block: Any) -> dict[str, nn.Module]:
    own = block.attention
    return {
        "norm1": block.layernorm_before, "norm2": block.layernorm_after, "mlp": block.mlp,
        "q": own.q_proj, "k": own.k_proj, "v": own.v_proj, "out": own.o_proj,
    }  # fmt: skip


def videomae_parts(block: Any) -> dict[str, nn.Module]:
    own = block.attention.attention
    return {
        "norm1": block.layernorm_before, "norm2": block.layernorm_after, "mlp": block.output.dense,
        "q": own.query, "k": own.key, "v": own.value, "out": block.attention.output.dense,
    }  # fmt: skip


def vjepa2_parts(block: Any) -> dict[str, nn.Module]:
    own = block.attention
    return {
        "norm1": block.norm1, "norm2": block.norm2, "mlp": block.mlp,
        "q": own.query, "k": own.key, "v": own.value, "out": own.proj,
    }  # fmt: skip


def hooked_vivit(module: Any) -> HookedModule:
    tower = getattr(module, "vivit", module)

    def run(images: Tensor) -> Tensor:
        given = module(pixel_values=images)
        return given.logits if tower is not module else given.pooler_output

    last = Receiver(tower.layernorm, tower.layernorm)
    return apart(run, tower.layers, last, vivit_parts)


def hooked_videomae(module: Any) -> HookedModule:
    tower = getattr(module, "videomae", module)
    if tower is module:
        last = Receiver(tower.layernorm, tower.layernorm)
        return apart(lambda images: module(images)[0].mean(dim=1), tower.encoder.layer, last, videomae_parts)
    last = Receiver(tower.layernorm, tower.layernorm) if module.fc_norm is None else pooled(module.fc_norm)
    return apart(lambda images: module(images).logits, tower.encoder.layer, last, videomae_parts)


def pooled(norm: nn.Module) -> Receiver:
    """A norm that is given the mean of the stream."""
    return Receiver(norm, norm, pool=lambda stream: stream.mean(dim=1))


def hooked_vjepa2(module: Any) -> HookedModule:
    tower = getattr(module, "vjepa2", module)

    def run(images: Tensor) -> Tensor:
        if tower is not module:
            return module(images).logits
        return module(images, skip_predictor=True).last_hidden_state.mean(dim=1)

    norm = tower.encoder.layernorm
    return apart(run, tower.encoder.layer, Receiver(norm, norm), vjepa2_parts)


PLACES, FRAMES = 4, 4


def by_place(stream: Tensor) -> Tensor:
    """TimeSformer's patches, each place a sequence in time."""
    return stream[:, 1:].reshape(-1, FRAMES, stream.shape[-1])


def by_frame(stream: Tensor) -> Tensor:
    """TimeSformer's class token and patches, each frame a sequence."""
    patches = stream[:, 1:].unflatten(1, (PLACES, FRAMES)).transpose(1, 2)
    return torch.cat([stream[:, None, :1].expand(-1, FRAMES, -1, -1), patches], dim=2).flatten(0, 1)


def written_in_time(head: int, last: Any) -> Callable[..., Tensor]:
    """What a head along time writes to the stream, by way of a second projection."""
    of = written_by_head(head, WIDTH)

    def written(projection: Any, joined: Tensor, output: Tensor) -> Tensor:
        found = of(projection, joined, output) @ last.weight.T
        patches = found.reshape(-1, PLACES * FRAMES, found.shape[-1])
        return torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1)

    return written


def written_in_space(head: int) -> Callable[..., Tensor]:
    """What a head inside of frames writes, the mean over frames to the class token."""
    of = written_by_head(head, WIDTH)

    def written(projection: Any, joined: Tensor, output: Tensor) -> Tensor:
        found = of(projection, joined, output).unflatten(0, (-1, FRAMES))
        patches = found[:, :, 1:].transpose(1, 2).flatten(1, 2)
        return torch.cat([found[:, :, 0].mean(dim=1, keepdim=True), patches], dim=1)

    return written


def hooked_timesformer(module: Any) -> HookedModule:
    tower = getattr(module, "timesformer", module)
    senders = {"input": Sender(tower.encoder.layer[0], given)}
    receivers = {"logits": Receiver(tower.layernorm, tower.layernorm)}
    for layer, block in enumerate(tower.encoder.layer):
        senders[f"m{layer}"] = Sender(block.output, gives)
        receivers[f"m{layer}"] = Receiver(block.layernorm_after, block.layernorm_after)
        time, space = block.temporal_attention, block.attention
        for head in range(HEADS):
            in_time, in_space = written_in_time(head, block.temporal_dense), written_in_space(head)
            senders[f"t{layer}.h{head}"] = Sender(time.output.dense, in_time)
            senders[f"a{layer}.h{head}"] = Sender(space.output.dense, in_space)
            for port, name in enumerate("qkv"):
                first = (port * HEADS + head) * WIDTH
                columns = slice(first, first + WIDTH)
                for letter, norm, own, pool in (
                    ("t", block.temporal_layernorm, time, by_place),
                    ("a", block.layernorm_before, space, by_frame),
                ):
                    place = Receiver(norm, own.attention.qkv, columns, pool=pool)
                    receivers[f"{letter}{layer}.h{head}<{name}>"] = place

    def run(images: Tensor) -> Tensor:
        return module(images).logits if tower is not module else module(images).last_hidden_state[:, 0]

    return HookedModule(run, senders, receivers)


def hooked_tubelet(module: Any) -> HookedModule:
    senders, receivers = packed_blocks(module.blocks, HEADS, WIDTH)
    receivers["logits"] = Receiver(module.norm, module.norm)
    return HookedModule(lambda images: module(images.movedim(1, 2)), senders, receivers)


# -- what is true of them ---------------------------------------------------------------------------

MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], HookedModule]]] = {
    "tubelets": (tubelet, hooked_tubelet),
    "vivit": (vivit, hooked_vivit),
    "vivit-features": (partial(vivit, "VivitModel"), hooked_vivit),
    "vivit-plain": (partial(vivit, qkv_bias=False, hidden_act="quick_gelu"), hooked_vivit),
    "videomae": (videomae, hooked_videomae),
    "videomae-token": (partial(videomae, use_mean_pooling=False, qv_bias=False), hooked_videomae),
    "videomae-features": (partial(videomae, "VideoMAEModel", use_mean_pooling=False), hooked_videomae),
    "vjepa2": (vjepa2, hooked_vjepa2),
    "vjepa2-features": (partial(vjepa2, "VJEPA2Model"), hooked_vjepa2),
    "timesformer": (timesformer, hooked_timesformer),
    "timesformer-features": (partial(timesformer, "TimesformerModel", qkv_bias=False), hooked_timesformer),
}


@pytest.fixture(autouse=True)
def _a_hand_written_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    cv.register(example["TubeletViT"], example["TubeletFamily"]())


@pytest.mark.parametrize("name", MODELS)
def test_edges_are_those_of_hooks_on_the_original(name: str) -> None:
    make, hooked = MODELS[name]
    module = make()
    names = [str(place) for place in range(24)] if "features" in name else None  # features have no metric
    prove(cv.wrap(module, classes=names), hooked(module), CLEAN, CORRUPT)


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("timesformer")])
def test_tokens_form_a_grid_with_time(name: str) -> None:
    module = MODELS[name][0]()
    model = cv.wrap(module)
    assert model.grid == (2, 2, 2)
    assert model.preprocessing.shape == (4, 3, 16, 16)
    assert model.prefix == (("cls",) if name.startswith("vivit") else ())
    assert model.has_classes == ("features" not in name)
    moved = CLEAN.clone()
    moved[:, 2:, :, :8, 8:] += 1.0  # the second tubelet in time, above on the right
    changed = (model.embed(moved) != model.embed(CLEAN)).any(dim=-1)[0].nonzero().flatten().tolist()
    assert changed == [len(model.prefix) + 5]


def test_divided_attention_is_put_together() -> None:
    """The pattern over all tokens gives what the heads write; masked runs and scores know both stages."""
    model = cv.wrap(timesformer())
    assert [stage.nodes.name for stage in model.layers[:3]] == ["time0", "attn0", "mlp0"]
    stream = model.embed(CLEAN)
    for stage in model.layers[:2]:
        reads = stage.read(stream)
        pattern = stage.pattern(reads)
        torch.testing.assert_close(stage.attend(reads, pattern), stage.write(reads))
        sums = torch.ones(17, dtype=torch.float64)
        sums[0] = float(stage.nodes.name == "attn0")  # along time the class token looks nowhere
        torch.testing.assert_close(pattern.sum(dim=-1), sums.expand(2, HEADS, -1))
        with pytest.raises(UnsupportedModelError, match="attend in groups apart"):
            stage.scores(reads)
        parts = stage.expand(stage.write(reads)).sum(dim=0) + stage.constant
        torch.testing.assert_close(parts, stage.total(stage.write(reads)))
    task = cv.Task(CLEAN, CORRUPT, cv.logit_diff(0, 1)).prepare(model)
    whole, exact = cv.Circuit.full(model.graph), cv.attribute(model, task, "exact", progress=False)
    assert_close(cv.run(model, task, whole), model(CLEAN))
    assert_close(cv.run(model, task, cv.Circuit.empty(model.graph)), model(CORRUPT))
    evaluator = Evaluator(task)
    without = evaluator.many([(whole - cv.Circuit.from_edges(model.graph, [edge])).kept for edge in whole])
    for edge, metric in zip(whole, without, strict=True):
        effect = float((metric - evaluator.whole).mean())
        assert abs(effect - exact[edge]) < 1e-9 * np.abs(exact.values).max(), edge
    with pytest.raises(DataError, match="form no grid"):
        cv.TokenGroups.by_frame(model, 17)
    with pytest.raises(UnsupportedModelError, match="knows no backward rules"):
        cv.attribute(model, cv.Task(CLEAN, CORRUPT, cv.logit_diff(0, 1)), "relp", progress=False)


@pytest.mark.parametrize("make", [vivit, videomae, vjepa2, timesformer])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_any_attention_backend_is_the_same_model(make: Callable[..., Any], backend: str) -> None:
    module = make().float()
    plain = cv.wrap(module)
    task = cv.Task(CLEAN.float(), CORRUPT.float(), cv.logit_diff(0, 1))
    expected = cv.attribute(plain, task, "eap", progress=False).values
    module.set_attn_implementation(backend)
    found = cv.attribute(cv.wrap(module), task, "eap", progress=False).values
    assert abs(found - expected).max() <= 1e-5 * abs(expected).max()


@pytest.mark.parametrize(
    ("make", "processor"),
    [(vivit, "VivitVideoProcessor"), (videomae, "VideoMAEVideoProcessor"), (vjepa2, "VJEPA2VideoProcessor")],
)
def test_a_folder_is_loaded_with_its_processor_and_class_names(
    make: Callable[..., Any], processor: str, tmp_path: Path
) -> None:
    module, names = make().float(), {place: f"act {place}" for place in range(5)}
    module.config.id2label, module.config.label2id = names, {name: place for place, name in names.items()}
    module.save_pretrained(tmp_path)
    own = getattr(transformers, processor)(size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16})
    own.save_pretrained(tmp_path)
    model = cv.load(f"hf:{tmp_path}")
    assert model.classes == tuple(names.values())
    assert torch.equal(model(CLEAN.float()), module(CLEAN.float()).logits)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 30, 40, 3), dtype=np.uint8)
    np.save(tmp_path / "clip.npy", pixels)
    (expected,) = own(torch.from_numpy(pixels).permute(0, 3, 1, 2), return_tensors="pt").values()
    found = as_images(tmp_path / "clip.npy", model.preprocessing).take(0, 1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0.0)


def test_class_names_of_a_configuration_are_not_invented() -> None:
    assert cv.wrap(vivit()).classes is None


@pytest.mark.parametrize("place", ["positions", "queries"])
def test_an_edit_between_two_calls_is_seen(place: str) -> None:
    module = videomae()
    model, task = cv.wrap(module), cv.Task(CLEAN, CORRUPT, cv.logit_diff(0, 1))
    cv.attribute(model, task, "eap", progress=False)
    with torch.no_grad():
        if place == "positions":  # neither a parameter nor a buffer
            module.videomae.embeddings.position_embeddings.mul_(3.0)
        else:
            module.videomae.encoder.layer[0].attention.attention.query.weight.mul_(3.0)
    found, expected = (
        cv.attribute(each, task, "eap", progress=False).values for each in (model, cv.wrap(module))
    )
    assert abs(found - expected).max() <= 1e-9 * abs(expected).max()


# -- near misses ------------------------------------------------------------------------------------


def test_what_is_not_known_is_refused_by_name() -> None:
    for kind in ("joint_space_time", "space_only"):
        with pytest.raises(UnsupportedModelError, match=f"attention_type='{kind}'"):
            cv.wrap(timesformer(attention_type=kind))
    with pytest.raises(UnsupportedModelError, match="VideoMAEForPreTraining cannot be decomposed as it is"):
        cv.wrap(transformers.VideoMAEForPreTraining(videomae().config).eval())


class Peeking(nn.Module):
    """An attention that adds something of its own."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, hidden: Tensor, *others: Any, **options: Any) -> Any:
        written, pattern = self.own(hidden, *others, **options)
        return written + 0.01 * hidden.roll(1, dims=1), pattern

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "own" else getattr(super().__getattr__("own"), name)


def test_an_exchanged_attention_is_refused() -> None:
    module = vivit()
    module.vivit.layers[1].attention = Peeking(module.vivit.layers[1].attention).eval()
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1 of VivitForVideoClassification"):
        cv.wrap(module)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (
            torch.zeros(2, 6, 3, 16, 16),
            r"\(6, 3, 16, 16\) \(time, channel, height, width\).*\(4, 3, 16, 16\)",
        ),
        (torch.zeros(2, 3, 4, 16, 16), r"clips of shape \(3, 4, 16, 16\)"),
        (torch.zeros(2, 4, 3, 8, 16), r"clips of shape \(4, 3, 8, 16\)"),
        (torch.zeros(4, 3, 16, 16), r"images of shape \(3, 16, 16\).*a batch of clips is \(clip, time"),
        (torch.zeros(3, 16, 16), r"images of shape \(3, 16, 16\)"),
        (torch.zeros(16, 16), r"clips are \(clip, time, channel, height, width\), not of shape \(16, 16\)"),
    ],
)
def test_other_inputs_than_the_models_clips_are_refused(given: Tensor, complaint: str) -> None:
    model = cv.wrap(videomae())
    with pytest.raises(DataError, match=complaint):
        cv.attribute(model, cv.Task(given, given, cv.logit_diff(0, 1)), "eap", progress=False)


def test_clips_are_refused_by_a_model_that_sees_images() -> None:
    task = cv.Task(torch.zeros(2, 4, 3, 48, 48), torch.zeros(2, 4, 3, 48, 48), cv.logit_diff(0, 1))
    with pytest.raises(DataError, match=r"clips of shape \(4, 3, 48, 48\).*takes images of \(3, 48, 48\)"):
        cv.attribute(cv.load("catdog-tiny"), task, progress=False)
