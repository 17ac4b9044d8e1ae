"""From rows of operators to what dispatch goes by: how long each backend takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from fastvit_kernels.bench.gpu.jobs import GRAPH, OPERATORS
from fastvit_kernels.bench.gpu.measure import UNCAPTURED
from fastvit_kernels.bench.gpu.peers import OURS
from fastvit_kernels.bench.gpu.rows import Conditions, Row
from fastvit_kernels.bench.results import OK
from fastvit_kernels.bench.roofline import DTYPES
from fastvit_kernels.ops import tuning
from fastvit_kernels.ops.arguments import short
from fastvit_kernels.ops.tuning import Preference, Tuning

# The stock modules of the suites, by what they stand for. With PyTorch's attention in them they are not our backend of
# this name, which keeps less for its gradients.
_OTHERS = {"eager": "reference"}
_DTYPES = {name: short(dtype) for name, dtype in DTYPES.items()}

Call = tuple[str, str, int]
Place = tuple[str, str, str, int]


def preferences(records: Sequence[tuple[Row, Conditions]], results: str) -> list[Preference]:
    """One entry per operator, dtype, mode and channel count, from the rows of the last record's conditions.

    A backend enters it that has a time for every call of that kind; a time is the geometric mean over them.

    Args:
        records: rows of one device.
        results: the name of their file.
    """
    if not records:
        return []
    conditions = records[-1][1]
    calls: dict[Place, dict[Call, dict[str, float]]] = {}
    for place, group in _by_place([row for row, other in records if other.repeats(conditions)]).items():
        for row in group:
            backend = row.backends.split(":")[1] if row.peer in OURS else _OTHERS[row.peer]
            assert row.p50_ms is not None
            calls.setdefault(place, {}).setdefault((row.suite, row.case, row.batch), {})[backend] = row.p50_ms
    found = []
    for (operator, dtype, mode, channels), times in sorted(calls.items()):
        common = set.intersection(*(set(backends) for backends in times.values()))
        means = {name: math.exp(sum(math.log(t[name]) for t in times.values()) / len(times)) for name in sorted(common)}
        if len(means) > 1:
            where = conditions.device, conditions.capability
            found.append(Preference(operator, *where, _DTYPES[dtype], mode, channels, means, results))
    return found


def _by_place(rows: Sequence[Row]) -> dict[Place, list[Row]]:
    """The timed replays of graphs, by what dispatch knows of them; that is known where a row of ours is."""
    places: dict[tuple[Call, str, str], Place] = {}
    for row in rows:
        if row.suite in OPERATORS and row.peer in OURS and row.status == OK and len(row.backends.split()) == 1:
            operator, _, channels = row.backends.split(":")
            places[(row.suite, row.case, row.batch), row.mode, row.dtype] = operator, row.dtype, row.mode, int(channels)
    found: dict[Place, list[Row]] = {}
    for row in rows:
        place = places.get(((row.suite, row.case, row.batch), row.mode, row.dtype))
        replayed = row.status == OK and row.launch == GRAPH and not row.variant.endswith(UNCAPTURED)
        if place is not None and replayed and (row.peer in OURS or row.peer in _OTHERS):
            found.setdefault(place, []).append(row)
    return found


def write(records: Sequence[tuple[Row, Conditions]], results: str, path: Path) -> Path:
    """Put the entries into a tuning file, which keeps its others.

    Raises:
        ValueError: the file holds something else.
    """
    before = tuning.read(path) if path.exists() else Tuning()
    found = preferences(records, results)
    places = {(entry.key, entry.channels) for entry in found}
    kept = [entry for entry in before.preferences if (entry.key, entry.channels) not in places]
    tuning.write(path, Tuning(before.launches, (*found, *kept)))
    return path
