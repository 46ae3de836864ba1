#!/usr/bin/env bash
# Run everything that needs a GPU, in one or two commands, on a bare machine without a network: each kernel once against float64, the row
# kernels, the headline shapes, the GPU tests, other libraries, and a profile, in the order of their worth. Each step has its own time
# limit, reports one line as it ends, and is packed at once, so that whatever stops the run loses one step. Leaves two files in --out:
# summary.txt and gpu-run.tar.gz. The exit status is 0 only if every step passed.
#
# `make gpu-kit` builds what the machine lacks: the extension, the compiled Triton kernels, wheels. Without a kit the machine needs
# Python 3.10 or newer with torch, triton, setuptools, pybind11, ninja, typer, rich, pytest, pytest-xdist and hypothesis, and nvcc.
set -uo pipefail

usage() {
    cat <<'USAGE'
usage: benchmarks/run_gpu.sh [options]
  --kit DIR    what `make gpu-kit` has built: install it, and compile nothing
  --no-build   use the extension that is there
  --part PART  first (200 s: up to the headline shapes), rest (380 s), or all (default)
  --out DIR    folder for summary.txt and gpu-run.tar.gz (default: gpu-run)
  --cpu        the same steps on a machine without a GPU, to try this script: CPU kernels, small shapes
  --dry-run    print the steps with their time limits and run none
USAGE
}

kit="" out="gpu-run" part="all" device="cuda" build="yes" dry=""
while [ $# -gt 0 ]; do
    case "$1" in
        --kit | --part | --out) [ $# -ge 2 ] || { echo "run_gpu.sh: $1 needs a value" >&2; exit 2; } ;;
    esac
    case "$1" in
        --kit) kit="$2"; build=""; shift ;;
        --part) part="$2"; shift ;;
        --out) out="$2"; shift ;;
        --no-build) build="" ;;
        --cpu) device="cpu" ;;
        --dry-run) dry="yes" ;;
        -h | --help) usage; exit 0 ;;
        *) echo "run_gpu.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done
case "$part" in first | rest | all) ;; *) echo "run_gpu.sh: --part $part: it is first, rest or all" >&2; exit 2 ;; esac
[ -z "$kit" ] || [ -d "$kit" ] || { echo "run_gpu.sh: --kit $kit: no such folder. Build it with make gpu-kit" >&2; exit 2; }

[ -z "$kit" ] || kit="$(cd "$kit" && pwd)"
case "$out" in /*) ;; *) out="$PWD/$out" ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python="${PYTHON:-python3}"
failed=() seconds_planned=0
logs=""  # a folder for everything that is packed

say() { printf '%s\n' "$*"; [ -n "$dry" ] || printf '%s\n' "$*" >>"$out/summary.txt"; }

# Replaces the archive with all that there is by now, without what is large and can be made again.
pack() {
    tar -C "$logs" --exclude=packages --exclude=plots -czf "$out/gpu-run.tar.gz.part" . && mv "$out/gpu-run.tar.gz.part" "$out/gpu-run.tar.gz"
}

# step NAME SECONDS COMMAND...: run it with its output in NAME.log; interrupt it after that time, and kill it five seconds later.
step() {
    local name="$1" seconds="$2" start status
    shift 2
    seconds_planned=$((seconds_planned + seconds))
    if [ -n "$dry" ]; then
        printf '%-14s %3s s  ' "$name" "$seconds"
        printf ' %q' "$@"
        printf '\n'
        return 0
    fi
    start=$SECONDS
    [ "$device" = cuda ] || seconds=$((5 * seconds))  # the plan is one of a GPU
    timeout --signal=INT --kill-after=5 "$seconds" "$@" >"$logs/$name.log" 2>&1
    status=$?
    if [ "$status" -eq 0 ]; then
        say "$name: passed in $((SECONDS - start)) s. $(tail -n 1 "$logs/$name.log" | cut -c 1-160)"
    else
        [ "$status" -eq 124 ] && status="124 (time limit)"
        say "$name: exit status $status after $((SECONDS - start)) s; the end of $name.log:"
        tail -n 12 "$logs/$name.log" | cut -c 1-240 | sed 's/^/    /' | tee -a "$out/summary.txt"
        failed+=("$name")
    fi
    pack
}

gpu_state() {
    nvidia-smi --query-gpu=name,driver_version,compute_cap,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu --format=csv
}

if [ -z "$dry" ]; then
    mkdir -p "$out" || exit 1
    logs="$(mktemp -d)" || exit 1
    trap 'rm -rf "$logs"' EXIT
    : >"$out/summary.txt"
    export PYTHONPATH="$logs/packages${PYTHONPATH:+:$PYTHONPATH}" PYTHONNOUSERSITE=1 PYTHONUNBUFFERED=1 TRITON_CACHE_DIR="$logs/packages/triton"
fi

if [ "$device" = cuda ]; then
    backends=(triton cuda)
    if [ -z "$dry" ]; then
        command -v nvidia-smi >/dev/null || { say "no nvidia-smi: no GPU here. --cpu tries the same steps without one"; exit 1; }
        gpu_state >"$logs/gpu-before.csv" || { say "nvidia-smi lists no GPU"; exit 1; }
    fi
else
    backends=(native torch)
fi

# --- what the machine needs

if [ -n "$kit" ]; then
    step unpack 10 "$python" -m benchmarks.gpu_kit install "$kit" --packages "${logs:-LOGS}/packages"
fi
if [ -z "$dry" ]; then
    missing="$("$python" - <<'PYTHON'
from importlib.util import find_spec

print(" ".join(name for name in ("torch", "typer", "rich", "pytest", "hypothesis") if find_spec(name) is None))
PYTHON
    )" || { say "$python does not run"; exit 1; }
    [ -z "$missing" ] || { say "missing Python packages: $missing. make gpu-kit puts their wheels into the kit"; exit 1; }
fi
if [ -n "$build" ]; then
    if [ "$device" = cuda ]; then
        # Machine code for this GPU alone: a fraction of the time of a release build.
        capability=90
        [ -n "$dry" ] || capability="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')"
        [ "$capability" = 90 ] && capability="90a"
        export KDKERNELS_CUDA=1 KDKERNELS_CUDA_ARCHS="${KDKERNELS_CUDA_ARCHS:-$capability}"
    else
        export KDKERNELS_CUDA=0
    fi
    step build 180 "$python" setup.py build_ext --inplace
    seconds_planned=0  # on top of the plan: with a kit there is nothing to build
fi

bench=("$python" -m kdkernels.cli bench --device "$device")
quick=() rows=(--suite rows)
if [ "$device" = cpu ]; then
    quick=(--vocab 777)
    rows=(--shape 64,3001 --dtype bfloat16)
fi

# --- the first part: does it run, is it right, how fast

if [ "$part" != rest ]; then
    step environment 8 "$python" -m kdkernels.cli env
    # Each backend in a process of its own: an illegal access in one must not take the other with it.
    for backend in "${backends[@]}"; do
        step "smoke-$backend" 20 "$python" -m benchmarks.gpu_smoke --backend "$backend" --device "$device" "${quick[@]}"
    done
    list="$(IFS=,; echo "${backends[*]}")"
    step rows 58 "${bench[@]}" "${rows[@]}" --backends "$list" --peers none --budget-minutes 0.9 --out "${logs:-LOGS}/rows"
    step headline 80 "${bench[@]}" --suite headline --backends "$list" --peers none --budget-minutes 1.25 --out "${logs:-LOGS}/headline"
fi

# --- the rest: the tests, other libraries, counters

if [ "$part" != first ]; then
    # The most telling files first; collected with 12 processes, so that what Triton compiles is spread over the cores.
    files=()
    for name in loss gradients numerics semantics primitives primitives_calls sparse draws ensemble chunking; do files+=("tests/fused/test_$name.py"); done
    files+=(tests/backends/test_dispatch.py)
    parallel=()
    if [ -z "$dry" ] && "$python" -c "import xdist" 2>/dev/null; then
        workers="$(nproc 2>/dev/null || echo 1)"
        parallel=(-n "$((workers < 12 ? workers : 12))" --dist load)
    fi
    for backend in "${backends[@]}"; do
        limit=140
        [ "$backend" = "${backends[1]}" ] && limit=105
        marker=gpu
        [ "$device" = cpu ] && marker="not gpu and not slow" && files=(tests/fused/test_chunking.py)
        step "tests-$backend" "$limit" "$python" -m pytest -q -m "$marker" -k "$backend-$device" -p no:cacheprovider \
            --continue-on-collection-errors "${parallel[@]}" "${files[@]}"
    done
    step peers 60 "${bench[@]}" --suite headline --backends "${backends[-1]}" --peers auto --budget-minutes 0.9 --out "${logs:-LOGS}/peers"
    # Counters of the first launches of the loss at a size that fills the chip, and a search for races in shared memory.
    profiled=("$python" -m benchmarks.gpu_smoke --device "$device" --only jsd --only forward_kl)
    if [ -n "$dry" ] || [ "$device" = cuda ]; then
        metrics=dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__inst_executed.avg.per_cycle_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active
        for backend in "${backends[@]}"; do
            if [ -n "$dry" ] || command -v ncu >/dev/null; then
                step "ncu-$backend" 15 ncu --clock-control none --metrics "$metrics" --kernel-name 'regex:rows' --launch-count 4 \
                    "${profiled[@]}" --backend "$backend" --tokens 2048 --vocab 128256
            else
                say "ncu-$backend: left out, no ncu here"
            fi
        done
        if [ -n "$dry" ] || command -v compute-sanitizer >/dev/null; then
            step racecheck 25 compute-sanitizer --tool racecheck --error-exitcode 1 "${profiled[@]}" --backend cuda --vocab 777
        else
            say "racecheck: left out, no compute-sanitizer here"
        fi
    fi
fi

if [ -n "$dry" ]; then
    echo "in all $seconds_planned s at most${build:+, after the build}"
    exit 0
fi
[ "$device" = cuda ] && gpu_state >"$logs/gpu-after.csv"
cp "$out/summary.txt" "$logs/"
pack
if [ ${#failed[@]} -gt 0 ]; then
    say "failed: ${failed[*]}"
    exit 1
fi
say "every step passed, in $SECONDS s"
