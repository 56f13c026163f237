#!/bin/sh
# All GPU measurements in one command; the options are gpu.py's. PYTHON names another interpreter.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH="$root:$root/tools/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$root/tools/benchmarks/gpu.py" "$@"
