"""The emulator shows the mistakes it is there for."""

from __future__ import annotations

import pytest
from cuda_emulator import EmulatorError

NONE, BEFORE_READING, BEFORE_OVERWRITING, IN_WARP, NOT_WAITED, COPIED_TOO_EARLY = range(6)
SHARED, RESULT, SOME, PARTIAL, UNALIGNED = range(6, 11)
RIGHT = [float(i) for i in range(64)]


def test_right_without_a_mistake(faults):
    assert faults("fault", NONE) == [RIGHT, RIGHT]


@pytest.mark.parametrize("which", [BEFORE_READING, BEFORE_OVERWRITING, IN_WARP, NOT_WAITED, COPIED_TOO_EARLY])
def test_a_race_gives_a_wrong_result(faults, which):
    """With the first threads ahead or with the last."""
    assert any(found != RIGHT for found in faults("fault", which))


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (SHARED, "heap-buffer-overflow"),
        (RESULT, "heap-buffer-overflow"),
        (SOME, "some threads of a block are missing from a barrier"),
        (PARTIAL, "some lanes of a warp are missing from an instruction of all"),
        (UNALIGNED, "a matrix's row is not aligned"),
    ],
)
def test_a_wrong_access_ends_the_process(faults, which, message):
    with pytest.raises(EmulatorError, match=message):
        faults("fault", which)
    assert faults("fault", NONE) == [RIGHT, RIGHT]
