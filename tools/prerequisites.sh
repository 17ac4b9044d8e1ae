#!/bin/sh
# Says what is missing before anything is downloaded or compiled. Usage: prerequisites.sh PYTHON
python=$1
missing=0

lacks() {
    printf 'missing: %s\n' "$1" >&2
    missing=1
}

system=$(uname -s)
machine=$(uname -m)
case "$system $machine" in
    "Linux x86_64" | "Linux aarch64") ;;
    *) lacks "a supported platform: this is $system $machine, the kernels build on Linux x86_64 and aarch64" ;;
esac

if ! command -v "$python" >/dev/null 2>&1; then
    lacks "Python 3.10 or newer: there is no '$python'; install it or name another one with 'make PYTHON=/path/to/python'"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    version=$("$python" -c 'import platform; print(platform.python_version())')
    lacks "Python 3.10 or newer: '$python' is $version; name another one with 'make PYTHON=/path/to/python'"
elif ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    lacks "Python's venv module: on Debian and Ubuntu, 'apt install python3-venv'"
fi

# CXX may hold arguments ("ccache g++"): it is left unquoted.
compiles() {
    printf '#include <atomic>\nint main() { return 0; }\n' | $1 -std=c++17 -x c++ -fsyntax-only - >/dev/null 2>&1
}
hint="on Debian and Ubuntu, 'apt install g++'; or name one with CXX=/path/to/compiler"
if [ -n "$CXX" ]; then
    compiles "$CXX" || lacks "a working C++17 compiler: CXX is '$CXX'; $hint"
else
    compiles c++ || compiles g++ || compiles clang++ || lacks "a C++17 compiler (c++, g++ or clang++): $hint"
fi

exit $missing
