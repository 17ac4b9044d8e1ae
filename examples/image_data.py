"""What the trainer learns from: scikit-learn's digits, or the images in a folder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler, TensorDataset

from fastvit_kernels.demo.digits import enlarged, read_digits

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DataError(Exception):
    """A data set that cannot be used."""


class Data(NamedTuple):
    """Two data sets of `(image [C, H, W], class)` and the names of the classes."""

    train: Dataset
    held_out: Dataset
    classes: list[str]
    channels: int


def digits(size: int) -> Data:
    """scikit-learn's handwritten digits, enlarged to `size` pixels; the held-out part is always the same."""
    train, held_out = (TensorDataset(enlarged(part.images, size), part.labels) for part in read_digits())
    return Data(train, held_out, [str(digit) for digit in range(10)], 1)


@dataclass
class ImageFiles(Dataset):
    """RGB images `[3, size, size]`: the shorter side resized, the centre cropped, normalised as for ImageNet."""

    files: list[tuple[Path, int]]
    size: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        try:
            with Image.open(path) as opened:
                image = ImageOps.fit(ImageOps.exif_transpose(opened).convert("RGB"), (self.size, self.size))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path}: not a readable image ({error})") from error
        pixels = torch.from_numpy(numpy.array(image)).float() / 255
        return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1), label


def image_folder(folder: Path, size: int, held_out: float, seed: int) -> Data:
    """The images of a folder with one subfolder per class; a share of every class is held out, chosen by `seed`.

    Raises:
        DataError: no such folder, fewer than two classes, or a class with fewer than two images.
    """
    if not folder.is_dir():
        raise DataError(f"--data {folder}: no such folder; expected 'digits' or a folder with one subfolder per class")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise DataError(f"--data {folder}: expected at least two subfolders, one per class, found {len(classes)}")
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label, name in enumerate(classes):
        files = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        if len(files) < 2:
            raise DataError(f"--data {folder}: class {name!r} has {len(files)} images, expected at least two")
        order = torch.randperm(len(files), generator=generator).tolist()
        count = min(max(1, round(held_out * len(files))), len(files) - 1)
        test += [(files[index], label) for index in order[:count]]
        train += [(files[index], label) for index in order[count:]]
    return Data(ImageFiles(train, size), ImageFiles(test, size), classes, 3)


class Remaining(Sampler):
    """The full batches of an epoch, from one on: where an interrupted epoch goes on."""

    def __init__(self, sampler: Sampler, batch: int, count: int) -> None:
        self.sampler, self.batch, self.count, self.start = sampler, batch, count, 0

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for index in range(self.start, self.count):
            yield order[index * self.batch : (index + 1) * self.batch]

    def __len__(self) -> int:
        return self.count - self.start


def augmented(images: Tensor, strength: float, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image of a batch turned, scaled and shifted at random, and mirrored if that leaves its class as it is.

    Args:
        images: `[B, C, H, W]`.
        strength: 1 for up to 15 degrees, a scale of 0.85 to 1.15, and shifts of a tenth; 0 for none.
        flip: mirror half of the images.
        generator: on the CPU.
    """
    uniform = (2 * torch.rand(4, len(images), generator=generator) - 1) * strength
    angle, scale, shift = uniform[0] * math.radians(15), 1 + 0.15 * uniform[1], 0.2 * uniform[2:]
    sign = torch.where(torch.rand(len(images), generator=generator) < 0.5, -1.0, 1.0) if flip else 1.0
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([sign * cos, -sin, shift[0], sign * sin, cos, shift[1]], dim=1).to(images)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
