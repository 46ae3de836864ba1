#!/usr/bin/env bash
# Everything that needs a GPU, in one command, on a bare machine without network: builds the extension in place, runs the GPU tests, then
# the benchmark suite (row kernels against copy bandwidth first), within a limit of time. Leaves one folder: logs, results.json, plots,
# report.html and summary.txt. What fails is noted there, and the rest still runs; the exit status is 0 only if all of it went well.
#
# The machine brings Python 3.10 or newer with torch (and triton), nvcc and a C++ compiler. What else is missing (pip wheels of typer, rich,
# pybind11, ninja, pytest, hypothesis, matplotlib; other libraries to compare with) comes in a folder, and is installed into --out alone.
set -uo pipefail

usage() {
    cat <<'USAGE'
usage: benchmarks/run_gpu.sh [options]
  --wheels DIR       install every wheel in it first, into OUT/packages, without dependencies
  --out DIR          where everything goes (default: gpu-run)
  --minutes M        limit for all of it (default: 28)
  --test-minutes M   limit for the tests (default: 8)
  --suite NAME       smoke, standard (default) or full
  --peers LIST       as of kdkernels bench (default: auto)
  --cpu              the same steps on a machine without a GPU, to try this script: CPU kernels, smoke suite
  --dry-run          print the commands and run none
USAGE
}

wheels="" out="gpu-run" minutes=28 test_minutes=8 suite="" peers="auto" device="cuda" dry=""
while [ $# -gt 0 ]; do
    case "$1" in
        --wheels | --out | --minutes | --test-minutes | --suite | --peers)
            [ $# -ge 2 ] || { echo "run_gpu.sh: $1 needs a value" >&2; exit 2; } ;;
    esac
    case "$1" in
        --wheels) wheels="$2"; shift ;;
        --out) out="$2"; shift ;;
        --minutes) minutes="$2"; shift ;;
        --test-minutes) test_minutes="$2"; shift ;;
        --suite) suite="$2"; shift ;;
        --peers) peers="$2"; shift ;;
        --cpu) device="cpu" ;;
        --dry-run) dry="yes" ;;
        -h | --help) usage; exit 0 ;;
        *) echo "run_gpu.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done
case "$minutes$test_minutes" in *[!0-9]*) echo "run_gpu.sh: minutes are whole numbers" >&2; exit 2 ;; esac
[ -z "$wheels" ] || [ -d "$wheels" ] || { echo "run_gpu.sh: --wheels $wheels: no such folder" >&2; exit 2; }
[ -n "$suite" ] || { [ "$device" = cpu ] && suite="smoke" || suite="standard"; }

[ -z "$wheels" ] || wheels="$(cd "$wheels" && pwd)"
case "$out" in /*) ;; *) out="$PWD/$out" ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python="${PYTHON:-python3}"
failed=()

say() { printf '%s\n' "$*"; [ -n "$dry" ] || printf '%s\n' "$*" >>"$out/summary.txt"; }

# step NAME SECONDS COMMAND...: runs it with its output in NAME.log, interrupted after that time (and killed a minute later).
step() {
    local name="$1" seconds="$2" start status
    shift 2
    if [ -n "$dry" ]; then
        printf '%s (at most %s s):' "$name" "$seconds"
        printf ' %q' "$@"
        printf '\n'
        return 0
    fi
    if [ "$seconds" -le 0 ]; then
        say "$name: no time left"
        failed+=("$name")
        return 1
    fi
    start=$SECONDS
    timeout --signal=INT --kill-after=60 "$seconds" "$@" >"$out/$name.log" 2>&1
    status=$?
    if [ "$status" -eq 0 ]; then
        say "$name: done in $((SECONDS - start)) s"
    else
        say "$name: exit status $status after $((SECONDS - start)) s; the end of $name.log:"
        tail -n 15 "$out/$name.log" | sed 's/^/    /' | tee -a "$out/summary.txt"
        failed+=("$name")
    fi
    return "$status"
}

left() { echo $((60 * minutes - SECONDS)); }

gpu_state() {
    nvidia-smi --query-gpu=name,driver_version,compute_cap,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu --format=csv
}

if [ -z "$dry" ]; then
    mkdir -p "$out" || exit 1
    : >"$out/summary.txt"
fi

# The build's and the run's packages: the machine's own, and before them what came as wheels.
packages="$out/packages"
export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}" PYTHONNOUSERSITE=1
if [ -n "$wheels" ]; then
    for wheel in "$wheels"/*.whl; do
        # One by one: a wheel for another Python must not keep the others out.
        name="$(basename "$wheel")"
        step "install-${name%%-*}" 300 "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$packages" "$wheel" || true
    done
fi

if [ -z "$dry" ]; then
    missing="$("$python" - <<'PYTHON'
from importlib.util import find_spec

print(" ".join(name for name in ("torch", "setuptools", "pybind11", "ninja", "typer", "rich", "pytest", "hypothesis") if find_spec(name) is None))
PYTHON
    )" || { say "$python does not run"; exit 1; }
    [ -z "$missing" ] || { say "missing Python packages: $missing. Put their wheels into a folder and give it with --wheels"; exit 1; }
fi

if [ "$device" = cuda ]; then
    if [ -z "$dry" ]; then
        command -v nvidia-smi >/dev/null || { say "no nvidia-smi: no GPU here. --cpu tries the same steps without one"; exit 1; }
        gpu_state >"$out/gpu-before.csv" || { say "nvidia-smi lists no GPU"; exit 1; }
        capability="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')"
    else
        capability=90
    fi
    # Machine code for this GPU alone: a fraction of the time of a release build.
    [ "$capability" = 90 ] && capability="90a"
    export KDKERNELS_CUDA=1 KDKERNELS_CUDA_ARCHS="${KDKERNELS_CUDA_ARCHS:-$capability}"
else
    export KDKERNELS_CUDA=0
fi

step build 900 "$python" setup.py build_ext --inplace
[ -n "$dry" ] || find build -name '*.o.log' -exec cp {} "$out" \; 2>/dev/null || true
step environment 120 "$python" -m kdkernels.cli env
# Side by side where there is pytest-xdist: most of the time goes into what Triton compiles, and a process whose CUDA context is lost is
# then replaced by another.
parallel=()
if [ -z "$dry" ] && "$python" -c "import xdist" 2>/dev/null; then
    workers="$(nproc 2>/dev/null || echo 1)"
    parallel=(-n "$((workers < 12 ? workers : 12))")
fi
# What cannot be imported without some extra has no GPU tests: it must not keep the others from running.
step tests $((60 * test_minutes)) "$python" -m pytest -q -m gpu -p no:cacheprovider --continue-on-collection-errors "${parallel[@]}" tests

# A minute is kept for the plots and the report.
remaining="$(left)"
budget=$((remaining > 120 ? remaining / 60 - 1 : 1))
resume=()
[ -f "$out/bench/results.json" ] && grep -q '"status": "\(running\|interrupted\|out of time\)"' "$out/bench/results.json" && resume=(--resume)
step bench "$remaining" "$python" -m kdkernels.cli bench --suite "$suite" --device "$device" --peers "$peers" --out "$out/bench" \
    --budget-minutes "$budget" "${resume[@]}"

if [ -z "$dry" ]; then
    [ "$device" = cuda ] && gpu_state >"$out/gpu-after.csv"
    rm -rf "$packages"
    if [ ${#failed[@]} -gt 0 ]; then
        say "failed: ${failed[*]}"
        exit 1
    fi
    say "all steps went well, in $SECONDS s"
fi
