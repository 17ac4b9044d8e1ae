"""What was measured on GPUs, as data: launch configurations of Triton kernels, and how fast each backend is.

The package has a file of its own beside this one; entries of the user's file, named by `FASTVIT_TUNING`, go before its.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from fastvit_kernels.ops.triton_configs import Config

VARIABLE = "FASTVIT_TUNING"
PACKAGE_FILE = Path(__file__).with_name("tuning.json")
FORWARD, TRAINING = "forward", "training"
# Times hold for so many times as many channels, and as few: the stages of a model are twice as wide as those before.
_FARTHEST = 2.0


@dataclass(frozen=True)
class Launch:
    """The fastest configuration of a kernel for one pair of widths.

    Attributes:
        kernel, architecture, kind: as in `triton_configs`, where widths that no vector load reads have one kind for all
            products; here it is one for each, such as `"unaligned half"`.
        width, depth: columns of the result (of attention, of a head), and channels of the rows it is made from, 0 where
            that is all there is.
        config: tiles, warps and stages.
        device: it was measured on.
        milliseconds, usual_milliseconds: of the operator with it, and with what `triton_configs` has; both are 0 where
            that failed: then `config` is the usual one, no other was tried, and the entry decides nothing.
    """

    kernel: str
    architecture: str
    kind: str
    width: int
    depth: int
    config: Config
    device: str
    milliseconds: float
    usual_milliseconds: float

    @property
    def failed(self) -> bool:
        return self.usual_milliseconds == 0

    @property
    def place(self) -> tuple[str, str, str, int, int]:
        return self.kernel, self.architecture, self.kind, self.width, self.depth


@dataclass(frozen=True)
class Preference:
    """How long the backends of an operator take on one device.

    Attributes:
        operator: its name.
        device, capability: the name and the compute capability of what it was measured on.
        dtype: that the products were in.
        mode: `"forward"`, or `"training"` for forward and backward.
        channels: of the operator's first tensor.
        milliseconds: by backend, the geometric mean over the measured sizes.
        results: the file of the rows behind it.
    """

    operator: str
    device: str
    capability: str
    dtype: str
    mode: str
    channels: int
    milliseconds: dict[str, float]
    results: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.operator, self.capability, self.dtype, self.mode

    @cached_property
    def order(self) -> tuple[str, ...]:
        """The measured backends, fastest first."""
        return tuple(sorted(self.milliseconds, key=lambda name: (self.milliseconds[name], name)))

    # Both are read at every call of an operator.
    @cached_property
    def text(self) -> str:
        """The times and where they are from, for people."""
        times = ", ".join(f"{name} {self.milliseconds[name]:.4g} ms" for name in self.order)
        return f"{times} ({self.device}, {self.dtype}, {self.channels} channels, {self.mode}; {self.results})"


Entry = TypeVar("Entry", Launch, Preference)


@dataclass(frozen=True)
class Tuning:
    """All entries; of several for the same place the first holds."""

    launches: tuple[Launch, ...] = ()
    preferences: tuple[Preference, ...] = ()

    def __add__(self, other: Tuning) -> Tuning:
        return Tuning(self.launches + other.launches, self.preferences + other.preferences)

    @cached_property
    def _configs(self) -> dict[tuple[str, str, str, int, int], Config]:
        found: dict[tuple[str, str, str, int, int], Config] = {}
        for entry in self.launches:
            if not entry.failed:
                found.setdefault(entry.place, entry.config)
        return found

    @cached_property
    def _preferences(self) -> dict[tuple[str, str, str, str], dict[int, Preference]]:
        found: dict[tuple[str, str, str, str], dict[int, Preference]] = {}
        for entry in self.preferences:
            found.setdefault(entry.key, {}).setdefault(entry.channels, entry)
        return found

    def config(self, kernel: str, architecture: str, kind: str, width: int, depth: int) -> Config | None:
        """What was measured for exactly these widths; None where nothing was."""
        return self._configs.get((kernel, architecture, kind, width, depth))

    def preference(self, operator: str, capability: str, dtype: str, mode: str, channels: int) -> Preference | None:
        """What was measured at the nearest channel count, between half and twice as many; None where nothing was."""
        entries = self._preferences.get((operator, capability, dtype, mode), {})
        distances = [(max(n, channels) / max(min(n, channels), 1), n) for n in entries]
        distance, nearest = min(distances, default=(math.inf, 0))
        return entries[nearest] if distance <= _FARTHEST else None


_chosen: Tuning | None = None


def current() -> Tuning:
    """The entries in force: those of the user's file, then the package's; read when first asked for.

    Raises:
        ValueError: a file cannot be read or holds something else.
    """
    global _chosen
    if _chosen is None:
        user = os.environ.get(VARIABLE)
        of_package = read(PACKAGE_FILE)
        _chosen = read(Path(user), VARIABLE) + of_package if user else of_package
    return _chosen


@contextmanager
def using(tuning: Tuning) -> Iterator[None]:
    """These entries are in force inside, for all threads."""
    global _chosen
    previous, _chosen = _chosen, tuning
    try:
        yield
    finally:
        _chosen = previous


def read(path: Path, source: str = "tuning") -> Tuning:
    """The entries of a file.

    Raises:
        ValueError: it cannot be read, or holds something else; the message says where.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: {path}: expected a file of tuning entries: {error}") from error
    if not isinstance(content, dict) or not {"launches", "preferences"} >= content.keys():
        raise ValueError(f'{source}: {path}: expected an object with "launches" and "preferences"')
    return Tuning(
        tuple(_entries(Launch, content.get("launches", []), f"{source}: {path}: launches")),
        tuple(_entries(Preference, content.get("preferences", []), f"{source}: {path}: preferences")),
    )


def write(path: Path, tuning: Tuning) -> None:
    """Write a file that `read` gives back, one entry a line."""
    sections: dict[str, Sequence[Launch | Preference]] = {
        "launches": tuning.launches,
        "preferences": tuning.preferences,
    }
    lines = []
    for name, entries in sections.items():
        written = ",\n".join(f"    {json.dumps(_as_json(entry))}" for entry in entries)
        lines.append(f'  "{name}": [\n{written}\n  ]' if entries else f'  "{name}": []')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _as_json(entry: Launch | Preference) -> dict[str, Any]:
    values = {field.name: getattr(entry, field.name) for field in fields(entry)}
    return {name: value._asdict() if isinstance(value, Config) else value for name, value in values.items()}


_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}


def _entries(kind: type[Entry], listed: Any, where: str) -> Iterable[Entry]:
    if not isinstance(listed, list):
        raise ValueError(f"{where}: expected a list, got {type(listed).__name__}")
    for index, content in enumerate(listed):
        place = f"{where}[{index}]"
        names = {field.name: str(field.type) for field in fields(kind)}
        _check_names(content, names, place)
        yield kind(**{name: _value(names[name], content[name], f"{place}.{name}") for name in names})


def _check_names(content: Any, names: Iterable[str], place: str) -> None:
    if not isinstance(content, dict) or content.keys() != set(names):
        raise ValueError(f"{place}: expected the fields {', '.join(names)}")


def _value(kind: str, value: Any, place: str) -> Any:
    if kind == "Config":
        _check_names(value, Config._fields, place)
        config = Config(**{name: _value("int", value[name], f"{place}.{name}") for name in Config._fields})
        if any(n < 0 or n & (n - 1) for n in config[:4]) or config.num_warps < 1 or config.num_stages < 1:
            raise ValueError(f"{place}: expected powers of two, got {value}")
        return config
    if kind.startswith("dict"):
        if not isinstance(value, Mapping) or not value:
            raise ValueError(f"{place}: expected times by backend, got {value!r}")
        return {str(name): _value("float", item, f"{place}.{name}") for name, item in value.items()}
    of_kind = isinstance(value, _KINDS[kind]) and not isinstance(value, bool)
    if not of_kind or (isinstance(value, (int, float)) and value < 0):
        raise ValueError(f"{place}: expected {'a text' if kind == 'str' else 'a number'}, got {value!r}")
    return value
