#!/bin/sh
# Says what `make test-gpu` and `make sanitize` lack; fails when that is anything. Usage: missing-on-gpu.sh PYTHON [sanitizer]
# PYTHON needs a torch that sees the GPU, which the pinned CPU build does not; with `sanitizer` its tool is needed, too.
python=$1
missing=0

lacks() {
    printf 'missing: %s\n' "$1" >&2
    missing=1
}

if [ "$2" = sanitizer ] && ! command -v compute-sanitizer >/dev/null 2>&1; then
    lacks "compute-sanitizer: it comes with the CUDA toolkit, whose bin folder must be on the path"
fi
if ! command -v "$python" >/dev/null 2>&1; then
    lacks "Python: there is no '$python'; name one that has torch for CUDA with PYTHON=/path/to/python"
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
exit $missing
