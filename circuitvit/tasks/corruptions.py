"""Counterfactuals made from the image itself, where no photograph of "the same without the dog" exists.

Every function takes one image `(channel, height, width)` or a batch `(image, channel, height, width)` of
floating-point numbers, usually preprocessed, and gives a new tensor of the same shape. Of clips `(clip,
time, channel, height, width)` each frame is an image; `reverse`, `shuffle_frames` and `freeze` change their
time. As a task's `corrupt` a function makes the counterfactuals itself: `Task(clips, reverse)`. A `mask` says
which pixels are corrupted, True for those; it is `(height, width)`, shared by all images, or one for each
image `(image, height, width)`. Without a mask the whole picture is. Pixels outside the mask never change.

None of them is neutral. All leave an outline where the mask ends, and a model may react to that rather than
to what has gone; compare two corruptions, or `complement` the mask, before believing a circuit.

Example:
    >>> image = torch.linspace(0, 1, 3 * 4 * 4).reshape(3, 4, 4)
    >>> left = torch.zeros(4, 4, dtype=torch.bool)
    >>> left[:, :2] = True
    >>> corrupt = mean_colour(image, left)
    >>> torch.equal(corrupt[:, :, 2:], image[:, :, 2:])
    True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from circuitvit.errors import DataError, OptionError
from circuitvit.models.zoo import InputSpec
from circuitvit.tasks.image_files import decode_image, preprocess


def blank(
    images: Float[Tensor, "*image channel height width"],
    mask: Bool[Tensor, "*image height width"] | None = None,
    value: float | Sequence[float] = 0.0,
) -> Float[Tensor, "*image channel height width"]:
    """Paint with one colour.

    Good for a plain, reproducible absence. Bad in that a flat patch is itself unusual: models have opinions
    on grey rectangles, and on silhouettes filled with them.

    Args:
        images: one image or a batch.
        mask: True where to paint; everywhere by default.
        value: one number, or one for each channel, on the scale of `images`. On preprocessed images 0 is the
            mean colour of the training data (mid-grey), not black.

    Raises:
        DataError: if images and mask do not fit each other.
        OptionError: if there is a value too many or too few.
    """
    region = _region(images, mask)
    colour = torch.as_tensor(value, dtype=images.dtype, device=images.device)
    if colour.ndim > 1 or (colour.ndim == 1 and len(colour) != images.shape[-3]):
        raise OptionError(f"value is one number, or one for each of {images.shape[-3]} channels, not {value}")
    return torch.where(region, colour.reshape(-1, 1, 1), images)


def mean_colour(
    images: Float[Tensor, "*image channel height width"],
    mask: Bool[Tensor, "*image height width"] | None = None,
) -> Float[Tensor, "*image channel height width"]:
    """Paint the region with its own mean colour, in each image its own.

    Good for removing shape and texture while brightness and hue stay, so less of the change is about colour
    than with `blank`. Bad where colour is the evidence (an orange blob may still say *tabby*), and the
    silhouette stays.

    Raises:
        DataError: if images and mask do not fit each other.
    """
    region = _region(images, mask)
    total = images.double().where(region, 0.0).sum(dim=(-2, -1), keepdim=True)
    mean = total / region.sum(dim=(-2, -1), keepdim=True)
    return torch.where(region, mean.to(images.dtype), images)


def blur(
    images: Float[Tensor, "*image channel height width"],
    mask: Bool[Tensor, "*image height width"] | None = None,
    sigma: float = 10.0,
) -> Float[Tensor, "*image channel height width"]:
    """Blur with a Gaussian; the picture is mirrored at its borders.

    Good for staying close to natural pictures: colours and layout remain, detail goes. Bad for objects that
    are recognised by their outline alone, and near the mask's edge the object bleeds into its surroundings'
    blur and the other way round.

    Args:
        images: one image or a batch.
        mask: True where the blurred picture is shown; everywhere by default. The blur itself always sees
            the whole picture.
        sigma: standard deviation in pixels; 10 makes objects in 224 x 224 pictures unrecognisable (Fong and
            Vedaldi 2017, arXiv:1704.03296).

    Raises:
        DataError: if images and mask do not fit each other.
        OptionError: if sigma is not above 0.
    """
    region = _region(images, mask)
    if not 0 < sigma < math.inf:
        raise OptionError(f"sigma is a number of pixels above 0, not {sigma}")
    rows, columns = (_blur_matrix(size, sigma).to(images) for size in images.shape[-2:])
    return torch.where(region, rows @ images @ columns.T, images)


def shuffle_patches(
    images: Float[Tensor, "*image channel height width"],
    patch_size: int,
    seed: int,
    mask: Bool[Tensor, "*image height width"] | None = None,
) -> Float[Tensor, "*image channel height width"]:
    """Let square patches change places; every patch that takes part moves.

    Good for keeping all colours and local texture while the arrangement goes: with the model's own patch
    size it keeps the patches' embeddings and changes their positions only. Bad for behaviours that live on
    texture, which survives it; and new edges appear between patches.

    Args:
        images: one image or a batch.
        patch_size: side of a patch in pixels; height and width must be multiples of it.
        seed: the same seed gives the same order, each image of a batch its own, whatever follows it.
        mask: only patches that lie wholly inside take part; all by default.

    Raises:
        DataError: if images and mask do not fit each other, or fewer than two patches of an image take part.
        OptionError: if `patch_size` does not divide height and width.
    """
    region = _region(images, mask)
    height, width = images.shape[-2:]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise OptionError(
            f"patches of {patch_size} x {patch_size} do not divide a {height} x {width} picture"
        )
    generator = torch.Generator().manual_seed(seed)
    shuffled = _patches(images, patch_size).clone()
    inside = _patches(region.to(images.dtype), patch_size).amin(dim=(-3, -2, -1)) > 0
    for number, (patches, movable) in enumerate(zip(shuffled, inside, strict=True)):
        places = movable.nonzero().flatten().cpu()
        if len(places) < 2:
            raise DataError(
                f"image {number} has {len(places)} patches of {patch_size} x {patch_size} that may move "
                "(wholly inside the mask, if there is one): to shuffle takes two"
            )
        places = places.to(images.device)
        patches[places] = patches[places[_cycle(len(places), generator)]]
    rows = height // patch_size
    return rearrange(shuffled, "b (d a) c p q -> b c (d p) (a q)", d=rows).reshape(images.shape)


def gaussian_noise(
    images: Float[Tensor, "*image channel height width"],
    std: float,
    seed: int,
    mask: Bool[Tensor, "*image height width"] | None = None,
) -> Float[Tensor, "*image channel height width"]:
    """Add independent Gaussian noise to every pixel and channel.

    Good for a corruption of adjustable strength, as in causal tracing (Meng et al. 2022, arXiv:2202.05262).
    Bad in that weak noise leaves the object in plain sight and strong noise is unlike any training image;
    what a model makes of it depends on how it was trained. Values are not clipped to those of real pixels.

    Args:
        images: one image or a batch.
        std: standard deviation on the scale of `images`; on images normalised by std 0.5, 1.0 is half of the
            whole range from black to white.
        seed: the same seed gives the same noise, each image of a batch its own, whatever follows it.
        mask: True where noise is added; everywhere by default.

    Raises:
        DataError: if images and mask do not fit each other.
        OptionError: if std is not above 0.
    """
    region = _region(images, mask)
    if not 0 < std < math.inf:
        raise OptionError(f"std is a number above 0, not {std}")
    # Drawn on the CPU one image at a time: the same on every device, and whatever else is in the batch.
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(images.shape[:-3])
    noise = torch.stack([torch.randn(images.shape[-3:], generator=generator) for _ in range(count)])
    return torch.where(region, images + std * noise.reshape(images.shape).to(images), images)


def reverse(
    clips: Float[Tensor, "clip time channel height width"],
) -> Float[Tensor, "clip time channel height width"]:
    """Play the clips backwards.

    Good for keeping every frame: only the direction of time is lost. Bad where nothing moves, or moves to and
    fro: then nothing is corrupted, and a model that takes no notice of order does not tell the two apart.

    Raises:
        DataError: for anything but clips.
    """
    return _clips(clips).flip(1)


def shuffle_frames(
    clips: Float[Tensor, "clip time channel height width"], seed: int = 0, span: int = 1
) -> Float[Tensor, "clip time channel height width"]:
    """Let frames change places; every one moves.

    Good for keeping what is seen while the order goes. Bad in that jumps from frame to frame are like nothing
    that a model was trained on; and where a tubelet covers several frames, the tokens themselves change.

    Args:
        clips: a batch.
        seed: the same seed gives the same order, the same for all clips.
        span: so many frames in a row move together, such as those of a tubelet; frames after the last whole
            span stay where they are.

    Raises:
        DataError: for anything but clips, and for clips of fewer than two spans.
        OptionError: if the span is not at least 1.
    """
    frames = _clips(clips).shape[1]
    if span < 1:
        raise OptionError(f"a span is at least 1 frame, not {span}")
    spans = frames // span
    if spans < 2:
        raise DataError(f"clips of {frames} frames have {spans} spans of {span}: to shuffle takes two")
    order = _cycle(spans, torch.Generator().manual_seed(seed))
    places = torch.arange(frames)
    places[: spans * span] = places[: spans * span].view(spans, span)[order].flatten()
    return clips[:, places.to(clips.device)]


def freeze(
    clips: Float[Tensor, "clip time channel height width"], frame: int = 0
) -> Float[Tensor, "clip time channel height width"]:
    """Show one frame all the time.

    Good for taking away motion alone. Bad in that what comes into view later is gone as well.

    Args:
        clips: a batch.
        frame: which; negative ones count from the last.

    Raises:
        DataError: for anything but clips.
        OptionError: if there is no such frame.
    """
    frames = _clips(clips).shape[1]
    if not -frames <= frame < frames:
        raise OptionError(f"there is no frame {frame}: the clips have {frames}, from 0")
    return clips[:, frame % frames, None].expand_as(clips).clone()


CORRUPTIONS: dict[str, Callable[..., Tensor]] = {
    "reverse": reverse, "shuffle": shuffle_frames, "freeze": freeze, "blur": blur, "mean-colour": mean_colour,
}  # fmt: skip
"""Those that need nothing but the images, by the names that the command line has for them."""


def complement(mask: Bool[Tensor, "*image height width"]) -> Bool[Tensor, "*image height width"]:
    """The mask of everything else: corrupt the background and keep the object.

    Raises:
        DataError: if the mask is not boolean.
    """
    _refuse_no_mask(mask)
    return ~mask


def read_mask(
    path: str | Path, value: int | Collection[int], spec: InputSpec
) -> Bool[Tensor, "height width"]:
    """The pixels with a certain label in a label image, resized and cropped like the picture itself.

    The label image must be of the same size as the picture, or of the same proportions. Resizing takes the
    nearest pixel, so a thin outline may come and go.

    Args:
        path: of a greyscale or palette image whose pixel values are labels, such as 0 background, 1 cat.
        value: the label, or several, to be True in the mask. For a black and white drawing it is 255 (1 in
            files with one bit for each pixel).
        spec: the model's preprocessing.

    Raises:
        DataError: if the file is unreadable or in colour, no pixel has the label (the message lists those
            that there are), or all that have it are cropped away.
    """
    values = sorted(value) if isinstance(value, Collection) else [value]
    labels = decode_image(path)
    pixels = np.asarray(labels)
    if pixels.ndim != 2 or labels.mode == "F":
        raise DataError(f"{path} holds colours ({labels.mode}), where a label for every pixel was expected")
    chosen = np.isin(pixels.astype(np.int64), values)
    if not chosen.any():
        there = np.unique(pixels.astype(np.int64)).tolist()
        shown = ", ".join(map(str, there[:10])) + (", ..." if len(there) > 10 else "")
        raise DataError(f"no pixel of {path} has the value {', '.join(map(str, values))}; there are {shown}")
    mask = mask_as_seen(chosen, spec)
    if not mask.any():
        raise DataError(f"all pixels of {path} with the value {', '.join(map(str, values))} are cropped away")
    return mask


def mask_as_seen(mask: Bool[NDArray[np.bool_], "_ _"], spec: InputSpec) -> Bool[Tensor, "height width"]:
    """A mask of a picture's pixels, resized and cropped like the picture itself, to the nearest pixel."""
    # Black and white through the model's own geometry, as a picture of one channel that is not normalised.
    plain = replace(spec, size=(1, *spec.size[1:]), mean=(0.0,), std=(1.0,), interpolation="nearest")
    return preprocess(Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)), plain)[0] > 0.5


def _region(images: Tensor, mask: Tensor | None) -> Bool[Tensor, "*image channel height width"]:
    """The mask in a shape that broadcasts over `images`; everything is checked here."""
    if images.ndim not in (3, 4, 5) or images.numel() == 0:
        raise DataError(
            "images are (channel, height, width) or a batch of those, or of clips of those, not of shape "
            f"{tuple(images.shape)}"
        )
    if not images.is_floating_point():
        raise DataError(f"images are floating-point numbers, not {str(images.dtype).removeprefix('torch.')}")
    if mask is None:
        return torch.ones_like(images, dtype=torch.bool)
    _refuse_no_mask(mask)
    each = (*images.shape[:-3], *images.shape[-2:])
    if tuple(mask.shape) not in {tuple(images.shape[-2:]), each}:
        raise DataError(
            f"a mask of shape {tuple(mask.shape)} does not fit images of shape {tuple(images.shape)}"
        )
    empty = (~mask.flatten(-2).any(dim=-1)).reshape(-1).nonzero().flatten().tolist()
    if empty:
        which = f" of image {empty[0]}" if mask.ndim == 3 else ""
        raise DataError(f"the mask{which} selects no pixel, so nothing would be corrupted")
    return mask.to(images.device).unsqueeze(-3).expand(images.shape)


def _refuse_no_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        kind = str(mask.dtype).removeprefix("torch.")
        raise DataError(
            f"a mask is boolean, True where pixels are corrupted, not {kind}: write mask > 0 or the like"
        )


def _clips(clips: Tensor) -> Tensor:
    """The clips, once it is certain that they are some: a batch of images has no time."""
    if clips.ndim != 5 or clips.numel() == 0:
        raise DataError(
            f"clips are (clip, time, channel, height, width), not of shape {tuple(clips.shape)}: only clips "
            "have a time to be changed"
        )
    return clips


def _cycle(count: int, generator: torch.Generator) -> Int64[Tensor, " place"]:
    """Where each of so many things comes from: one random cycle, which unlike a plain permutation leaves none
    where it was.
    """
    cycle, comes_from = torch.randperm(count, generator=generator), torch.empty(count, dtype=torch.int64)
    comes_from[cycle] = cycle.roll(1)
    return comes_from


def _blur_matrix(size: int, sigma: float) -> Float[Tensor, "out in"]:
    """Gaussian blur along one side as a matrix; any sigma works, however small the picture."""
    radius = min(math.ceil(4 * sigma), 8 * size)  # so far out, every pixel has been seen many times over
    matrix = gaussian_filter1d(np.eye(size), sigma, axis=0, mode="mirror", radius=radius)
    return torch.from_numpy(matrix)


def _patches(images: Tensor, size: int) -> Float[Tensor, "image patch channel row column"]:
    """Cut images into square patches, row by row; a single image becomes a batch of one."""
    batch = images.reshape(-1, *images.shape[-3:])
    return rearrange(batch, "b c (d p) (a q) -> b (d a) c p q", p=size, q=size)
