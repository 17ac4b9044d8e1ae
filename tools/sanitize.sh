#!/bin/sh
# The checks of the CUDA C++ kernels on a GPU, under each tool of compute-sanitizer. Usage: sanitize.sh PYTHON [pytest options]
# TOOLS names those to run. Of PYTHON tools/missing-on-gpu.sh says what it needs.
python=$1
shift
# As in `make test-gpu`.
export PYTHONSAFEPATH=1 TRITON_INTERPRET=0

"$(dirname "$0")/missing-on-gpu.sh" "$python" sanitizer || exit 1

# Its own allocator hands out parts of larger blocks, in which nobody sees an access beside a tensor. Graphs need it.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
status=0
for tool in ${TOOLS:-memcheck racecheck synccheck initcheck}; do
    printf 'compute-sanitizer --tool %s\n' "$tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest tests/cuda/test_device.py \
        -k 'test_check and -cuda-forward' "$@" || status=1
done
exit $status
