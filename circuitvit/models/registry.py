"""How a user gets a model: `load` by name, or `wrap` a module at hand. Both check before they return."""

from __future__ import annotations

import copyreg
import importlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from circuitvit.errors import ModelError, NameNotFoundError, OptionError, UnsupportedModelError, unknown_name
from circuitvit.models import checkpoints
from circuitvit.models.decompose import decomposed, frozen_twin
from circuitvit.models.edits import edited
from circuitvit.models.families import Family
from circuitvit.models.families import layout as layouts
from circuitvit.models.families.layout import Layout
from circuitvit.models.families.tokenizers import adapted
from circuitvit.models.heads import Head, with_head
from circuitvit.models.model import Model, Origin
from circuitvit.models.near_names import unknown_model
from circuitvit.models.refined import refined
from circuitvit.models.refusals import look_at_hooks, refuse_unknown, refuse_unsound
from circuitvit.models.rules import BackwardRules
from circuitvit.models.stages import Stage
from circuitvit.models.timm_import import import_timm
from circuitvit.models.words import TextFamily, Words
from circuitvit.models.zoo import Card, InputSpec, load_module, load_zoo_module, zoo_card, zoo_names

IMAGENET = {
    1000: "imagenet-1k", 11221: "imagenet-21k-miil", 11821: "imagenet-12k", 21841: "imagenet-22k",
    21842: "imagenet-22k-ms", 21843: "imagenet-21k-goog",
}  # fmt: skip
"""What a number of logits says about a model without names of classes, and timm's list of the classes."""

TIMM_FILES = (
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "deit",
    "beit",
    "eva",
    "naflexvit",
)
"""Files of timm's whose models have a family, most of them: where names are listed and suggested from."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What weights may be kept in."""

TRANSFORMERS = {
    "beit.modeling_beit": ("hf_vit:BEIT", "BeitForImageClassification BeitModel"),
    "clip.modeling_clip": (
        "hf_vit:CLIP_TOWER",
        "CLIPForImageClassification CLIPModel CLIPVisionModel CLIPVisionModelWithProjection",
    ),
    "deit.modeling_deit": (
        "hf_vit:DEIT",
        "DeiTForImageClassification DeiTForImageClassificationWithTeacher DeiTModel",
    ),
    "dinov2.modeling_dinov2": ("hf_vit:DINOV2", "Dinov2ForImageClassification Dinov2Model"),
    "dinov2_with_registers.modeling_dinov2_with_registers": (
        "hf_vit:DINOV2_REGISTERS",
        "Dinov2WithRegistersForImageClassification Dinov2WithRegistersModel",
    ),
    "dinov3_vit.modeling_dinov3_vit": ("hf_vit:DINOV3", "DINOv3ViTModel"),
    "ijepa.modeling_ijepa": ("hf_vit:I_JEPA", "IJepaForImageClassification IJepaModel"),
    "siglip.modeling_siglip": ("hf_vit:SIGLIP", "SiglipForImageClassification SiglipModel SiglipVisionModel"),
    "siglip2.modeling_siglip2": (
        "hf_vit:SIGLIP2",
        "Siglip2ForImageClassification Siglip2Model Siglip2VisionModel",
    ),
    "vit.modeling_vit": ("hf_vit:VIT", "ViTForImageClassification ViTModel"),
    "vit_mae.modeling_vit_mae": ("hf_vit:MAE_ENCODER", "ViTMAEModel"),
    "vit_msn.modeling_vit_msn": ("hf_vit:VIT", "ViTMSNForImageClassification ViTMSNModel"),
    "timesformer.modeling_timesformer": (
        "hf_video:TIMESFORMER",
        "TimesformerForVideoClassification TimesformerModel",
    ),
    "videomae.modeling_videomae": ("hf_video:VIDEOMAE", "VideoMAEForVideoClassification VideoMAEModel"),
    "vivit.modeling_vivit": ("hf_video:VIVIT", "VivitForVideoClassification VivitModel"),
    "vjepa2.modeling_vjepa2": ("hf_video:VJEPA2", "VJEPA2ForVideoClassification VJEPA2Model"),
}
"""Files of `transformers.models`, our family of the classes in them, and these."""

FAMILIES: dict[str, str | Family | Layout] = {
    "clip.model.VisionTransformer": "circuitvit.models.families.clip_towers:OPENAI",
    "open_clip.timm_model.TimmModel": "circuitvit.models.families.clip_towers:TIMM_TRUNK",
    "open_clip.transformer.VisionTransformer": "circuitvit.models.families.clip_towers:OPEN_CLIP",
    "timm.models.beit.Beit": "circuitvit.models.families.timm_relative:BEIT",
    "timm.models.eva.Eva": "circuitvit.models.families.timm_eva:FAMILY",
    "timm.models.deepseek_vit.DeepseekVitClassifier": "circuitvit.models.families.timm_vlm:FAMILY",
    "timm.models.deepseek_vit.DeepseekVitEncoder": "circuitvit.models.families.timm_vlm:FAMILY",
    "timm.models.naflexvit.NaFlexVit": "circuitvit.models.families.timm_naflex:FAMILY",
    "timm.models.qwen3_vit.Qwen3VitClassifier": "circuitvit.models.families.timm_vlm:FAMILY",
    "timm.models.qwen3_vit.Qwen3VitEncoder": "circuitvit.models.families.timm_vlm:FAMILY",
    "timm.models.vision_transformer.VisionTransformer": "circuitvit.models.families.timm_vit:FAMILY",
    "timm.models.vision_transformer_relpos.VisionTransformerRelPos": (
        "circuitvit.models.families.timm_relative:RELPOS"
    ),
    "torchvision.models.vision_transformer.VisionTransformer": (
        "circuitvit.models.families.torchvision_vit:FAMILY"
    ),
    **{
        f"transformers.models.{file}.{kind}": f"circuitvit.models.families.{family}"
        for file, (family, kinds) in TRANSFORMERS.items()
        for kind in kinds.split()
    },
}
"""The family of each class of modules, by the class's full name; a family's file is imported when it is
needed.
"""

LIBRARIES = tuple(sorted({name.partition(".")[0] for name in FAMILIES}))
"""Whose classes these are; `register` adds classes of its callers, which are nobody else's."""

CLASSIFIERS = ("head", "head_dist")
"""What timm calls classifiers, which stay in the checkpoint where a model is built with `num_classes=0`."""

SOURCES: dict[str, str] = {
    "hf": "circuitvit.models.families.hf_load:load_hf",
    "open_clip": "circuitvit.models.families.open_clip_load:load_open_clip",
    "torchvision": "circuitvit.models.families.torchvision_vit:load_torchvision",
}
"""Who loads names with this word before a colon, such as "hf:google/vit-base-patch16-224": "module:function",
of the rest of the name and of keywords of `load`, to a `Loaded`.
"""

INSIDE = {
    "circuitvit.models.zoo.clip_module.ClipModule": "visual",
    "clip.model.CLIP": "visual",
    "open_clip.coca_model.CoCa": "visual",
    "open_clip.model.CLIP": "visual",
    "open_clip.model.CustomTextCLIP": "visual",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
}
"""Wrappers that change nothing of what a module computes, and models of images and texts; and the attribute
that holds the plain one, or the image tower.
"""

TEXTS: dict[str, str] = {
    "circuitvit.models.zoo.clip_module.ClipModule": "circuitvit.models.families.text_towers:OWN",
    "clip.model.CLIP": "circuitvit.models.families.text_towers:OPENAI",
    "open_clip.model.CLIP": "circuitvit.models.families.text_towers:OPEN_CLIP",
    "open_clip.model.CustomTextCLIP": "circuitvit.models.families.text_towers:OPEN_CLIP",
    "transformers.models.clip.modeling_clip.CLIPModel": "circuitvit.models.families.text_towers:HF_CLIP",
    "transformers.models.siglip.modeling_siglip.SiglipModel": "circuitvit.models.families.text_towers:SIGLIP",
    "transformers.models.siglip2.modeling_siglip2.Siglip2Model": (
        "circuitvit.models.families.text_towers:SIGLIP"
    ),
}
"""Of models of images and texts the family of the text side, by the full names of their classes; its file is
imported when it is needed.
"""


def load(
    name: str | Path,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    classes: Sequence[str] | None = None,
    **architecture: Any,
) -> Model:
    """A model by name: a bundled one, one that `circuitvit train` made, or one of another library.

    Args:
        name: "catdog-tiny", "catdog-shortcut", "clip-tiny" or "digits-tiny"; any name of timm's plain Vision
            Transformers, such as "vit_tiny_patch16_224"; the path of what `circuitvit train` wrote; or, of
            transformers, open_clip and torchvision, "hf:NAME_OR_FOLDER", "open_clip:MODEL/TAG_OR_FILE",
            "torchvision:MODEL".
        checkpoint: weights in the library's own layout, `.safetensors`, or `.pt`/`.pth` holding tensors only;
            for models of timm, torchvision and open_clip.
        pretrained: download timm's own weights; needs a connection the first time.
        device: where the model runs.
        dtype: of the weights; float32 by default.
        classes: names of the logits; taken from the card, or from ImageNet where there are 1000.
        **architecture: passed on to timm, such as `img_size=384` or `num_classes=37`; `num_classes=0` gives
            the features, and leaves a classifier in the checkpoint aside.

    Raises:
        NameNotFoundError: if the name is unknown; the message suggests the nearest.
        FileError: if the checkpoint is missing or unreadable.
        ModelError: if the checkpoint does not fit, holds NaN, or cannot be downloaded.
        UnsupportedModelError: if the model cannot be decomposed; the message says what is in the way.
        OptionError: if the device cannot be used, or options clash.

    Example:
        >>> load("catdog-tiny").classes[:2]
        ('cat', 'dog')
    """
    _refuse_bad_device(device)
    if dtype is not None and dtype not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        raise OptionError(f"the dtype of weights is one of {names}, not {dtype!r}")
    if not isinstance(name, (str, Path)):
        raise OptionError(
            f"a model is loaded by its name or a file, not by {type(name).__name__}: cv.wrap takes modules"
        )
    name = str(name)
    source, colon, rest = name.partition(":")
    if colon and source in SOURCES:
        loaded = _found(SOURCES[source])(rest, checkpoint=checkpoint, dtype=dtype, **architecture)
        module = loaded.module.to(device=device, dtype=dtype).eval()
        said = {"classes": classes or loaded.classes, "preprocessing": loaded.preprocessing}
        model = wrap(module, name=name, tokenizer=loaded.tokenizer, **said)
        return replace(model, wordless=loaded.wordless)
    path = Path(name)
    card: Card | None = None
    if name in zoo_names():
        _refuse_options(name, checkpoint, pretrained, architecture)
        module, card = load_zoo_module(name), zoo_card(name)
    elif path.suffix in {".safetensors", ".json"}:
        _refuse_options(name, checkpoint, pretrained, architecture)
        _refuse_bare_weights(path)
        module, card = load_module(path.with_suffix(".json"))
    else:
        module = _timm_module(name, checkpoint, pretrained, architecture)
    module = module.to(device=device, dtype=dtype) if dtype is not None else module.to(device)
    if card is not None:
        return wrap(
            module.eval(),
            name=card.name,
            classes=classes or card.classes or None,
            preprocessing=card.input,
            card=card,
            tokenizer=card.tokenizer,
        )
    return wrap(module.eval(), name=name, classes=classes)


def register(kind: type[nn.Module], family: Family | Layout) -> None:
    """Teach `wrap` a class of modules: from now on it is taken apart as the family says.

    Args:
        kind: the class; classes derived from it are taken for the same.
        family: where its parts are; a `Layout` will do.

    Raises:
        OptionError: if the family is none.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> cv.register(MyViT, MyFamily())  # doctest: +SKIP
        >>> model = cv.wrap(my_vit.eval())  # doctest: +SKIP
    """
    if not isinstance(family, (Family, Layout)):
        raise OptionError(f"a family is a Layout or an object of a class derived from Family, not {family!r}")
    FAMILIES[_full_name(kind)] = family


def wrap(
    module: nn.Module,
    *,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: InputSpec | None = None,
    card: Card | None = None,
    layout: Layout | None = None,
    tokenizer: Any = None,
) -> Model:
    """A module at hand, seen as stages. The module is not changed, and not run in training mode either.

    Every block is compared with the module's own forward in float64. Weights are shared: an edit of the
    module's weights in place is an edit of the model's. Hooks are not: they do not run here.

    Args:
        module: a Vision Transformer in evaluation mode, of a class that `FAMILIES` has or `register` was
            given; of any other class with a layout.
        name: for files and messages.
        classes: names of the logits, in order.
        preprocessing: how image files become inputs; by default what the module's own configuration says.
        card: how the model was trained, for bundled and own models.
        layout: where the parts of a hand-written model are; images need `preprocessing` then.
        tokenizer: of a model of images and texts, which is taken for its image tower; with it, sentences can
            be classes (`Model.with_prompts`). One of transformers (or a processor) or open_clip,
            `clip.tokenize`, or an object as `circuitvit.models.words.Tokenizer` says.

    Raises:
        UnsupportedModelError: if a part cannot be decomposed; the message names the module and the switch.
        ModelError: if the module is in training mode, or its weights or logits are NaN or infinite.
        OptionError: if the number of class names is not the number of logits.

    Example:
        >>> import circuitvit as cv, timm  # doctest: +SKIP
        >>> model = cv.wrap(timm.create_model("deit3_small_patch16_224").eval())  # doctest: +SKIP
    """
    words = _words(module, tokenizer)
    texts = any(_full_name(kind) in TEXTS for kind in type(module).__mro__)
    module = _unwrapped(module)
    if isinstance(classes, str) or not (classes is None or isinstance(classes, Sequence)):
        raise OptionError(f"the class names are a list of texts, one for each logit, not {classes!r}")
    model = wrapped(module, layout or family_of(module), name, classes, preprocessing, card)
    if texts and classes is None:
        model = replace(model, has_classes=False)  # whatever its image tower calls them: they are features
    return model if words is None else replace(model, words=words)


def _words(module: nn.Module, tokenizer: Any) -> Words | None:
    """The text side of a module, where it has one that is known and there is a tokenizer for it.

    Raises:
        OptionError: if there is a tokenizer and nothing that it is for, or it is none.
        UnsupportedModelError: if the text tower is of a kind that is not known.
    """
    known = [TEXTS[name] for kind in type(module).__mro__ if (name := _full_name(kind)) in TEXTS]
    if not known:
        if tokenizer is not None:
            raise OptionError(
                f"a tokenizer is for models of images and texts, and {_full_name(type(module))} is none that "
                "is known as one"
            )
        return None
    if tokenizer is None:
        return None
    family: TextFamily = _found(known[0])
    refuse_unsound(module)
    family.refuse(module)
    twin = frozen_twin(module)
    return Words(twin, family, adapted(tokenizer, family.context(twin), family.whole(twin)))


def wrapped(
    module: nn.Module,
    said: Family | Layout,
    name: str | None,
    classes: Sequence[str] | None,
    preprocessing: InputSpec | None,
    card: Card | None,
) -> Model:
    """A module of this family as a model, checked."""
    with _in_peace(module):
        refuse_unsound(module)
        twin = frozen_twin(module)
        spec = preprocessing or (None if isinstance(said, Layout) else said.preprocessing(twin))
        if spec is None:
            raise OptionError(
                f"{type(module).__name__} does not say how images become inputs: give preprocessing=, such "
                "as circuitvit.models.zoo.InputSpec((3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)"
            )
        meant = layouts.families(said, twin, spec.shape) if isinstance(said, Layout) else (said,)
        meant[0].settle(twin, spec)
        images = meant[0].sample(twin, spec)
        look_at_hooks(module, meant[0], twin, images)
        family, stages, logits = _first_that_fits(meant, twin, images)
        _refuse_other_tokens(family, twin, images.shape[-2:], stages[0].write((images[:1],)).shape[1])
        classes = classes or family.classes(twin)
        if classes is not None and len(classes) != logits.shape[-1]:
            raise OptionError(f"{len(classes)} class names for a model with {logits.shape[-1]} logits")
        has_classes, synsets = classes is not None or family.classifies(twin), None
        if classes is None and has_classes and logits.shape[-1] in IMAGENET:
            classes, synsets = _imagenet(IMAGENET[logits.shape[-1]])
        model = Model(
            name=name or family.name(twin),
            stages=stages,
            module=twin,
            preprocessing=spec,
            n_logits=logits.shape[-1],
            family=family,
            prefix=family.prefix(twin),
            classes=None if classes is None else tuple(classes),
            synsets=synsets,
            has_classes=has_classes,
            card=card,
            origin=Origin(module),
        )
        model.refresh()  # what the weights look like now, so that edits are noticed
        return model


def _first_that_fits(
    families: Sequence[Family], twin: nn.Module, images: Tensor
) -> tuple[Family, tuple[Stage, ...], Tensor]:
    """The family that a module is of, its stages, and logits for some images.

    Raises:
        UnsupportedModelError: if it is of none; with the reason why it is not of the first.
    """
    refusals = []
    for family in families:
        try:
            return family, *decomposed(family, twin, images)
        except UnsupportedModelError as error:
            refusals.append(error)
    raise refusals[0]


def _refuse_other_tokens(family: Family, twin: nn.Module, size: Sequence[int], tokens: int) -> None:
    """Refuse a module with other tokens than its family counts: groups of tokens would have wrong names.

    Raises:
        UnsupportedModelError: with the numbers.
    """
    before, grid = len(family.prefix(twin)), family.grid(twin, *size)
    if tokens <= before or (grid is not None and tokens != before + math.prod(grid)):
        patches = "any patches" if grid is None else f"{'x'.join(map(str, grid))} patches"
        raise UnsupportedModelError(
            f"{type(twin).__name__} has {tokens} tokens in its blocks, which are not {before} before "
            f"{patches}: say what they are, by prefix and grid of a family for circuitvit.register, "
            "or by `tokens` of a layout"
        )


def _made_again(model: Model) -> tuple[Any, ...]:
    """How a model is pickled, for worker processes, and copied: its module and what was said of it. Where it
    is read, it is wrapped and checked again, as stages and a module that are read apart might not share their
    weights.
    """
    if model.bare is not None:
        return edited, (model.bare, model.edits, model.rules)
    if model.coarse is not None:
        return refined, (model.coarse, model.refinements, model.rules)
    if model.under is not None:
        return _headed, (model.under, model.head, model.rules)
    said = model.name, model.classes, model.preprocessing, model.card
    facts: dict[str, Any] = {"synsets": model.synsets, "has_classes": model.has_classes}
    facts |= {"words": model.words, "wordless": model.wordless}
    return _rewrapped, (_Timm(), model.module, model.family, said, model.rules, facts)


class _Timm:
    """Read before a module of timm's, it sees to timm's import, see `import_timm`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return import_timm, ()


def _rewrapped(
    timm: object,
    module: nn.Module,
    family: Family,
    said: tuple[Any, ...],
    rules: BackwardRules | None,
    facts: dict[str, Any],
) -> Model:
    model = replace(wrapped(module, family, *said), **facts)
    return model if rules is None else model.with_rules(rules)


def _headed(under: Model, head: Head, rules: BackwardRules | None) -> Model:
    model = with_head(under, head)
    return model if rules is None else model.with_rules(rules)


copyreg.pickle(Model, _made_again)


@contextmanager
def _in_peace(module: nn.Module) -> Iterator[None]:
    """Whatever mode the caller is in, what is made here outlives it; parts that are missing are told so."""
    device = next((tensor.device.type for tensor in module.parameters()), "cpu")
    with torch.inference_mode(False), torch.autocast("cpu" if device == "meta" else device, enabled=False):
        try:
            yield
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{type(module).__name__} is not built like the class it derives from ({error}), so its "
                "parts cannot be found: teach the library where they are with circuitvit.register"
            ) from error


def family_of(module: nn.Module) -> Family | Layout:
    """The family of a module, by its class or the nearest class that it derives from.

    Raises:
        UnsupportedModelError: if there is none.
    """
    found = [FAMILIES[name] for kind in type(module).__mro__ if (name := _full_name(kind)) in FAMILIES]
    if found:
        family: Family | Layout = _found(found[0]) if isinstance(found[0], str) else found[0]
        return family
    refuse_unknown(module)
    for place, part in module.named_modules():
        if is_known(type(part)):
            path = "".join(f"[{name}]" if name.isdigit() else f".{name}" for name in place.split("."))
            merge = " after merging its adapters (merge_and_unload)" if "base_model" in place else ""
            raise UnsupportedModelError(
                f"{_full_name(type(module))} cannot be decomposed as it is, as it may do more than the "
                f"{type(part).__name__} that it holds: wrap that, module{path}{merge}"
            )
    raise UnsupportedModelError(
        f"{_full_name(type(module))} cannot be decomposed: known are Vision Transformers of "
        f"{', '.join(LIBRARIES)}, and classes derived from them. If it is one of your own, say where its "
        "parts are: cv.wrap(module, layout=cv.Layout(...)), or teach the library its class with "
        "circuitvit.register"
    )


def libraries() -> dict[str, tuple[str, ...]]:
    """The architectures that have a family, by the library that they are of, in alphabetical order.

    Example:
        >>> libraries()["torchvision"]
        ('VisionTransformer',)
    """
    found: dict[str, set[str]] = {}
    for name in FAMILIES:
        library, kind = name.partition(".")[0], name.rpartition(".")[2]
        if library == "transformers":  # ViTModel, ViTForImageClassification: one architecture
            kind = re.split(r"(?:Vision)?(?:Model|For)", kind)[0]
        found.setdefault(library, set()).add(kind)
    return {library: tuple(sorted(found[library], key=str.lower)) for library in sorted(found)}


def libraries_with_words() -> dict[str, tuple[str, ...]]:
    """The models of images and texts whose texts are known, by library.

    Example:
        >>> libraries_with_words()["open_clip"]
        ('CLIP', 'CustomTextCLIP')
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in sorted(name for name in TEXTS if not name.startswith("circuitvit.")):
        library = name.partition(".")[0]
        found[library] = (*found.get(library, ()), name.rpartition(".")[2])
    return found


def knows_words(kind: type) -> bool:
    """Whether modules of a class are models of images and texts whose text side is known."""
    return any(_full_name(base) in TEXTS for base in kind.__mro__)


def is_known(kind: type) -> bool:
    """Whether modules of a class have a family."""
    return any(_full_name(base) in FAMILIES for base in kind.__mro__)


def _found(place: str) -> Any:
    """What "module:name" says, imported when it is needed."""
    file, _, name = place.partition(":")
    return getattr(importlib.import_module(file), name)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _unwrapped(module: nn.Module) -> nn.Module:
    """What is inside wrappers that change nothing, such as that of `torch.compile`."""
    if not isinstance(module, nn.Module):
        raise UnsupportedModelError(
            f"{type(module).__name__} is no torch module: cv.load takes names and files"
        )
    while (attribute := INSIDE.get(_full_name(type(module)))) is not None:
        module = getattr(module, attribute)
    return module


def _refuse_bad_device(device: str | torch.device) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise OptionError(f"the device {device!r} cannot be used: {reason}") from error


def _refuse_options(name: str, checkpoint: object, pretrained: bool, architecture: dict[str, Any]) -> None:
    given = [*(["checkpoint"] if checkpoint else []), *(["pretrained"] if pretrained else []), *architecture]
    if given:
        raise OptionError(f"{name} comes with its own weights and architecture: leave out {', '.join(given)}")


def _refuse_bare_weights(path: Path) -> None:
    """Refuse weights that have no card beside them, and so are none of `circuitvit train`."""
    if not path.is_file() or path.with_suffix(".json").is_file():
        return
    if (path.parent / "config.json").is_file():
        raise OptionError(f"{path} is part of a folder of transformers: load hf:{path.parent}")
    raise OptionError(
        f"{path} holds weights and does not say of what: name the model, with checkpoint={path}"
    )


def _timm_module(
    name: str, checkpoint: str | Path | None, pretrained: bool, architecture: dict[str, Any]
) -> nn.Module:
    timm = import_timm()
    base = name.partition(".")[0]
    if not timm.is_model(base):
        if (Path(name) / "config.json").is_file():  # what save_pretrained writes
            raise OptionError(f"{name} is a folder of transformers: load hf:{name}")
        plain = [each for file in TIMM_FILES for each in timm.list_models(module=file)]
        prefixes = [f"{source}:{name.partition(':')[2]}" for source in SOURCES if ":" in name]
        unknown = unknown_model(name, [*zoo_names(), *plain, *prefixes])
        raise NameNotFoundError(f"{unknown} One of a hub is hf:{name}") if "/" in base else unknown
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{base}.*")]
    if (tag := name.partition(".")[2]) and tag not in tags:
        raise (
            unknown_name(f"weights of {base}", tag, tags)
            if tags
            else OptionError(
                f"timm has no weights of {base}, so none called {tag}: leave out what follows the dot"
            )
        )
    if checkpoint is None and not pretrained:
        raise OptionError(
            f"{name} has no weights yet: give checkpoint=FILE, or pretrained=True to download timm's"
        )
    if pretrained:
        checkpoints.refuse_offline(name)
    state = (
        None if checkpoint is None else checkpoints.read(checkpoint)
    )  # before the model is built: fail early
    try:
        module: nn.Module = timm.create_model(name, pretrained=pretrained, **architecture)
    except Exception as error:  # timm's constructors raise whatever an odd argument makes them raise
        if pretrained and checkpoints.is_offline(error):
            raise checkpoints.offline_error(name, error) from error
        raise ModelError(f"timm cannot build {name}: {type(error).__name__}: {error}") from error
    family_of(module)
    if state is not None and architecture.get("num_classes") == 0:  # features are asked for
        state = {key: each for key, each in state.items() if key.partition(".")[0] not in CLASSIFIERS}
    if state is not None:
        checkpoints.fill(module, state, checkpoint)
    return module


def _imagenet(subset: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    info = import_timm().data.ImageNetInfo(subset)
    indices = range(info.num_classes())
    return (
        tuple(info.index_to_description(index) for index in indices),
        tuple(info.index_to_label_name(index) for index in indices),
    )
