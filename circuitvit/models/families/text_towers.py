"""The text towers of CLIP and SigLIP, as OpenAI's `clip`, `open_clip`, `transformers` and this library have
them.

A sentence is read at one token: the end of the text, behind which padding is not seen by anything under a
causal mask, so that sentences are trimmed to it; or, in SigLIP, whose tokens all see each other, at the last
of a fixed number, and padding is a part of the sentence.

Radford et al. 2021, "CLIP", arXiv:2103.00020; Zhai et al. 2023, "Sigmoid loss for language image
pre-training", arXiv:2303.15343.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from circuitvit.errors import DataError, ModelError, UnsupportedModelError, counted
from circuitvit.models.stages import Stage
from circuitvit.models.words import TextFamily

Tokens = Int64[Tensor, "sentence token"]


class TextTower(TextFamily):
    """What they have in common: where a sentence is read, and what cosines are multiplied with."""

    # -- sentences to features -----------------------------------------------------------------------

    def run(self, module: Any, images: Float[Tensor, "batch 1 1 token"]) -> Float[Tensor, "batch width"]:
        tokens, context = images[:, 0, 0].long(), self.context(module)
        count = tokens.shape[1]
        if count > context or (self.whole(module) and count < context):
            most = "" if self.whole(module) else "at most "
            raise DataError(
                f"{counted(count, 'token')} in a sentence, and {type(module).__name__} takes {most}{context}"
            )
        known = self.table(module).num_embeddings
        if count and int(tokens.max()) >= known:
            raise DataError(
                f"there is no token {int(tokens.max())}: {type(module).__name__} has {known}, so that the "
                "tokenizer is that of another model"
            )
        if not self.whole(module):
            places = self.read_at(module, tokens)
            for place in places[places != count - 1].tolist():
                raise DataError(
                    f"{type(module).__name__} reads a sentence of {counted(count, 'token')} at its token "
                    f"{place + 1}, not at the last: it has to end where the text ends, and nowhere else"
                )
        padding = max(0, self.length(module, count) - count)
        return self.features(module, F.pad(tokens, (0, padding), value=self.padding))

    padding = 0
    """The number of a token that is put behind the end, where the module needs as many as its context."""

    @abstractmethod
    def table(self, module: Any) -> nn.Embedding:
        """What each token is for the model."""

    @abstractmethod
    def features(self, module: Any, tokens: Tokens) -> Float[Tensor, "sentence width"]:
        """What the module itself gives for sentences."""

    @abstractmethod
    def read_at(self, module: Any, tokens: Tokens) -> Int64[Tensor, " sentence"]:
        """The place at which each sentence is read, in a tower that does not read padding."""

    def length(self, module: Any, count: int) -> int:
        """How many tokens the module's own forward has to be given for this many."""
        return count

    # -- similarity ----------------------------------------------------------------------------------

    def scale(self, module: Any) -> Float[Tensor, ""]:
        return _number(module, "logit_scale").exp()

    def bias(self, module: Any) -> Float[Tensor, ""] | None:
        return None if getattr(module, "logit_bias", None) is None else _number(module, "logit_bias")

    # -- as a model ----------------------------------------------------------------------------------

    def embed(self, module: Any, images: Tensor) -> Tensor:
        raise _unopened(module)

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        raise _unopened(module)

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        raise _unopened(module)

    def readout(self, module: Any, stream: Tensor) -> Tensor:
        raise _unopened(module)

    def classifies(self, module: Any) -> bool:
        return False


class OpenAIText(TextTower):
    """The text side of OpenAI's `clip.model.CLIP`, whose parts are the module's own."""

    def table(self, module: Any) -> nn.Embedding:
        return module.token_embedding  # type: ignore[no-any-return]

    def context(self, module: Any) -> int:
        return int(module.positional_embedding.shape[0])

    def features(self, module: Any, tokens: Tokens) -> Tensor:
        return module.encode_text(tokens)  # type: ignore[no-any-return]

    def read_at(self, module: Any, tokens: Tokens) -> Tensor:
        return tokens.argmax(dim=1)  # the end is the highest number


class OpenClipText(TextTower):
    """The text side of `open_clip.model.CLIP`: the module itself, or `.text` of a `CustomTextCLIP`."""

    def tower(self, module: Any) -> Any:
        """What holds the parts of the text tower."""
        return getattr(module, "text", module)

    def pooling(self, module: Any) -> str:
        """How the tokens become one vector: "argmax", "eos", "last", "first"."""
        tower = self.tower(module)
        return str(tower.text_pool_type if tower is module else tower.pool_type)

    def refuse(self, module: Any) -> None:
        tower = self.tower(module)
        if tower is not module and type(tower).__name__ != "TextTransformer":
            raise UnsupportedModelError(
                f"text of {type(module).__name__} is a {type(tower).__name__}: prompts are known of "
                "open_clip's own TextTransformer"
            )
        for switch in ("cls_emb", "use_pad_mask"):
            if getattr(tower, switch, None) not in (None, False):
                raise UnsupportedModelError(f"the text tower has {switch}, which is not supported")
        if getattr(tower, "output_tokens", False) or self.pooling(module) == "none":
            raise UnsupportedModelError("the text tower gives more than one vector for a sentence")

    def table(self, module: Any) -> nn.Embedding:
        return self.tower(module).token_embedding  # type: ignore[no-any-return]

    def context(self, module: Any) -> int:
        return int(self.tower(module).positional_embedding.shape[0])

    def whole(self, module: Any) -> bool:
        return self.tower(module).attn_mask is None or self.pooling(module) not in ("argmax", "eos")

    def features(self, module: Any, tokens: Tokens) -> Tensor:
        return module.encode_text(tokens)  # type: ignore[no-any-return]

    def read_at(self, module: Any, tokens: Tokens) -> Tensor:
        if self.pooling(module) == "argmax":
            return tokens.argmax(dim=1)
        tower = self.tower(module)
        return _first(tokens, tower.text_eos_id if tower is module else tower.eos_id)

    def length(self, module: Any, count: int) -> int:
        return self.context(module)  # its positions and its mask are not cut


class HFClipText(TextTower):
    """The text side of transformers' `CLIPModel`."""

    def table(self, module: Any) -> nn.Embedding:
        return module.text_model.embeddings.token_embedding  # type: ignore[no-any-return]

    def context(self, module: Any) -> int:
        return int(module.text_model.embeddings.position_embedding.num_embeddings)

    def features(self, module: Any, tokens: Tokens) -> Tensor:
        given = module.get_text_features(input_ids=tokens)
        return given if isinstance(given, Tensor) else given.pooler_output

    def read_at(self, module: Any, tokens: Tokens) -> Tensor:
        end = getattr(module.text_model, "eos_token_id", 2)
        return (
            tokens.argmax(dim=1) if end == 2 else _first(tokens, end)
        )  # 2: as OpenAI's own, whatever the end


class SiglipText(HFClipText):
    """The text side of transformers' `SiglipModel` and `Siglip2Model`, without a causal mask."""

    def whole(self, module: Any) -> bool:
        return True

    def read_at(self, module: Any, tokens: Tokens) -> Tensor:
        return tokens.new_full((len(tokens),), tokens.shape[1] - 1)


class OwnText(TextTower):
    """The text side of `clip-tiny`: a `ClipModule`, whose text tower is its `text`."""

    def table(self, module: Any) -> nn.Embedding:
        return module.text.token_embedding  # type: ignore[no-any-return]

    def context(self, module: Any) -> int:
        return int(module.text.context)

    def features(self, module: Any, tokens: Tokens) -> Tensor:
        return module.text(tokens)  # type: ignore[no-any-return]

    def read_at(self, module: Any, tokens: Tokens) -> Tensor:
        return _first(tokens, module.text.end)


OPENAI, OPEN_CLIP, HF_CLIP, SIGLIP, OWN = (
    OpenAIText(), OpenClipText(), HFClipText(), SiglipText(), OwnText()
)  # fmt: skip


def _first(tokens: Tokens, number: int) -> Int64[Tensor, " sentence"]:
    """Where a number is first in each sentence; 0 where it is not."""
    return (tokens == number).int().argmax(dim=1)


def _number(module: Any, name: str) -> Float[Tensor, ""]:
    found: Tensor = getattr(module, name)
    if found.numel() != 1:
        raise ModelError(f"{name} of {type(module).__name__} is {tuple(found.shape)}, not one number")
    return found.reshape(())


def _unopened(module: Any) -> UnsupportedModelError:
    return UnsupportedModelError(f"the text tower of {type(module).__name__} is no model yet")
