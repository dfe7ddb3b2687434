"""The text tower of `clip-tiny`, against a real one of the same make, and its tokenizer."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from circuitvit.errors import DataError
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo.text_tower import TextTower, WordTokenizer, padded

START, END = 2, 3  # of the real tower, whose tokens are bytes


def tower(causal: bool = True) -> TextTower:
    torch.manual_seed(0)
    built = TextTower(vocabulary=9, context=8, width=16, depth=2, heads=2, features=4, causal=causal)
    return built.double().eval()


@torch.no_grad()
def test_a_real_clip_answers_as_its_maker_measured(shared_data: Path) -> None:
    folder = shared_data / "models" / "clip_fashion_tiny"
    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")

    def part(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}

    kwargs = {key: value for key, value in config["visual"]["kwargs"].items() if key != "final_norm"}
    visual = import_timm().models.VisionTransformer(
        **kwargs, norm_layer=partial(nn.LayerNorm, eps=config["visual"]["ln_eps"])
    )
    visual.norm = nn.Identity()
    visual.load_state_dict(part("visual."))
    said = config["text"]
    text = TextTower(
        256, said["context"], said["width"], said["depth"], said["heads"], kwargs["num_classes"],
        causal=False, final_norm=False, end=END,
    )  # fmt: skip
    weights = part("text.")
    weights["projection.weight"] = weights.pop("text_projection").T
    text.load_state_dict(weights)
    ids = padded([[START, *caption.encode(), END] for caption in config["captions"]])
    with np.load(folder / "fashion_900.npz") as tiles:
        images, labels = torch.from_numpy(tiles["x"]).float()[:, None] / 255, torch.from_numpy(tiles["y"])
    answers = visual.eval()(images) @ F.normalize(text.eval()(ids), dim=-1).T
    assert float((answers.argmax(dim=1) == labels).double().mean()) == pytest.approx(0.8811, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_what_follows_the_end_changes_nothing(causal: bool) -> None:
    ids = torch.tensor([[1, 5, 4, 2, 0, 0], [1, 5, 4, 2, 7, 2]])
    alone, *others = *tower(causal)(ids[:1, :4]), *tower(causal)(ids)
    for other in others:
        torch.testing.assert_close(other, alone)


@torch.no_grad()
def test_causal_means_that_no_token_sees_a_later_one() -> None:
    for causal in (True, False):
        seen: list[Tensor] = []
        text = tower(causal)
        text.blocks[-1].register_forward_hook(lambda module, given, stream: seen.append(stream[0, :3]))
        for last in (5, 6):
            text(torch.tensor([[1, 3, 4, last, 2]]))
        assert torch.equal(seen[0], seen[1]) == causal


def test_sentences_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(DataError, match="9 tokens.*8 at most"):
        tower()(torch.full((1, 9), 2))
    with pytest.raises(DataError, match="no end token"):
        tower()(torch.tensor([[1, 2], [1, 3]]))


def test_words_there_and_back() -> None:
    tokenizer = WordTokenizer(("a", "cat", "dog"), context=5)
    ids = tokenizer.encode("A cat, a.")
    assert tokenizer.words(ids) == ["[start]", "a", "cat", "a", "[end]"]
    assert len(tokenizer) == 6
    with pytest.raises(DataError, match="'cta'.*nearest is 'cat'"):
        tokenizer.encode("a cta")
    with pytest.raises(DataError, match="4 words.*5 tokens"):
        tokenizer.encode("a a a a")
