#!/bin/sh
# The checks of the CUDA C++ kernels on a GPU, under each tool of compute-sanitizer. Usage: sanitize.sh PYTHON [pytest options]
# TOOLS names those to run. PYTHON needs a torch that sees the GPU, which the pinned CPU build does not.
python=$1
shift
missing=0
# As in `make test-gpu`.
export PYTHONSAFEPATH=1 TRITON_INTERPRET=0

lacks() {
    printf 'missing: %s\n' "$1" >&2
    missing=1
}

command -v compute-sanitizer >/dev/null 2>&1 || lacks "compute-sanitizer: it comes with the CUDA toolkit, whose bin folder must be on the path"
if ! command -v "$python" >/dev/null 2>&1; then
    lacks "Python: there is no '$python'; name one that has torch for CUDA with 'make sanitize PYTHON=/path/to/python'"
else
    # A traceback's last line says what cannot be imported.
    found=$("$python" -c '
import pytest, torch
from fastvit_kernels import _extension
if not torch.cuda.is_available():
    print(f"a GPU: torch {torch.__version__} sees none")
if _extension.parts["cuda"].problem:
    print("the CUDA part:", _extension.parts["cuda"].problem)
' 2>&1) || found=$(printf '%s\n' "$found" | tail -n 1)
    while read -r line; do
        [ -z "$line" ] || lacks "$line"
    done <<END
$found
END
fi
[ $missing = 0 ] || exit 1

# Its own allocator hands out parts of larger blocks, in which nobody sees an access beside a tensor. Graphs need it.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
status=0
for tool in ${TOOLS:-memcheck racecheck synccheck initcheck}; do
    printf 'compute-sanitizer --tool %s\n' "$tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest tests/cuda/test_device.py \
        -k 'test_check and -cuda-forward' "$@" || status=1
done
exit $status
