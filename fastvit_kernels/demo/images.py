"""Photographs in, normalised tensors out."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastvit_kernels.demo.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# The shorter side is resized to 256 for a crop of 224.
RESIZE_RATIO = 256 / 224


@dataclass(frozen=True)
class Photo:
    """A photograph in RGB and the name it is shown under."""

    name: str
    image: Image.Image


def sample_photos() -> list[Photo]:
    """The two photographs that scikit-learn carries.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    # Only its files are needed: importing scikit-learn would take longer than reading them.
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    folder = Path(spec.origin).parent / "datasets" / "images"
    return [read_photo(folder / name) for name in ("china.jpg", "flower.jpg")]


def read_photo(path: Path) -> Photo:
    """Read an image file.

    Raises:
        UserError: there is no such file, or it is not an image that Pillow can read.
    """
    if not path.is_file():
        raise UserError(f"image {path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"image {path}: not a readable image ({error})") from error
    return Photo(path.name, image)


def views(photos: Sequence[Photo], size: int, count: int) -> list[Image.Image]:
    """`count` square crops, the photographs in turn: first the centre of each, then other places of it.

    Args:
        photos: at least one.
        size: side of the crops.
        count: how many.

    Returns:
        RGB images of `size` x `size`; the same ones at every call.
    """
    generator = random.Random(0)
    crops = []
    for index in range(count):
        image = _resized(photos[index % len(photos)].image, round(size * RESIZE_RATIO))
        room = image.width - size, image.height - size
        centred = index < len(photos)
        left, top = (r // 2 if centred else generator.randint(0, r) for r in room)
        crops.append(image.crop((left, top, left + size, top + size)))
    return crops


def _resized(image: Image.Image, shorter: int) -> Image.Image:
    scale = shorter / min(image.size)
    width, height = (max(shorter, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def to_batch(images: Sequence[Image.Image]) -> Tensor:
    """`[B, 3, H, W]` fp32 in `torch.channels_last`, normalised with ImageNet's mean and standard deviation."""
    pixels = torch.from_numpy(numpy.stack([numpy.asarray(image) for image in images]))
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    batch = (pixels.float() / 255 - mean) / std
    # Rows of pixels with their channels together are channels_last memory already.
    return batch.permute(0, 3, 1, 2)
