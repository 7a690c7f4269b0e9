#!/bin/sh
# On a machine with a GPU: build for it, test on it, measure, ask a server. One report, in nine minutes.
#
#   benchmarks/gpu.sh [--dry-run] [--backend cuda|vulkan] [REPORT]
#
# REPORT is gpu-report.txt by default. Each step has a limit of seconds; a step that fails is written
# down, and the next one runs. The exit code says how many failed. The environment (.venv-gpu) and the
# build folder (build/gpu) are its own. With ccache, what is compiled lies in build/gpu/ccache: carry
# build/gpu to a machine whose build would take longer. With --dry-run the steps are printed alone.

set -u
cd "$(dirname "$0")/.." || exit 1
backend=cuda
is_dry=
report=gpu-report.txt
while [ $# -gt 0 ]; do
    case $1 in
    --dry-run) is_dry=yes ;;
    --backend) shift; backend=${1:?"--backend is cuda or vulkan"} ;;
    -*) echo "Option $1 is not known; expected --dry-run or --backend." >&2; exit 2 ;;
    *) report=$1 ;;
    esac
    shift
done

case $backend in
cuda) device=CUDA; args="-DGGML_CUDA=on -DGGML_CUDA_FA=off -DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCH:-native}" ;;
vulkan) device=Vulkan; args=-DGGML_VULKAN=on ;;
*) echo "--backend is $backend, expected cuda or vulkan." >&2; exit 2 ;;
esac
export CCACHE_DIR="${CCACHE_DIR:-$PWD/build/gpu/ccache}" QAFLORA_TEST_DEVICE="$device"
export GGML_VK_VISIBLE_DEVICES="${GGML_VK_VISIBLE_DEVICES:-0}"
bin=.venv-gpu/bin
n_failed=0

say() { echo "$@" | tee -a "$report"; }

# step NAME SECONDS COMMAND...
step() {
    name=$1
    limit=$2
    shift 2
    say ""
    say "== $name (at most $limit s): $*"
    [ -n "$is_dry" ] && return
    begun=$(date +%s)
    timeout "$limit" "$@" >"$report.step" 2>&1
    code=$?
    tail -n 60 "$report.step" | tee -a "$report"
    rm -f "$report.step"
    say "-- exit code $code after $(($(date +%s) - begun)) s"
    [ "$code" -eq 0 ] || n_failed=$((n_failed + 1))
}

: >"$report"
say "GPU report, $(date -u +%Y-%m-%dT%H:%MZ), $(git rev-parse --short HEAD), $backend"
[ "$backend" = cuda ] && step "the device" 20 nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
step "build" 270 make VENV=.venv-gpu BUILD=build/gpu "CMAKE_ARGS=${CMAKE_ARGS:-} $args" .venv-gpu/.done/package .venv-gpu/.done/pytest
step "what it is built for" 20 $bin/qaflora doctor
step "tests on the device" 60 $bin/pytest -q tests/test_device.py
step "the model" 40 $bin/qaflora pull qwen2.5-coder-0.5b-instruct
step "an answer" 20 $bin/qaflora run models/demo-small "How many legs do three dogs have?" --gpu-layers 99
step "speed" 70 $bin/qaflora bench models/demo-small --gpu-layers 99 --only decode,ttft --k 3 --repeat 5
step "a server" 40 sh -c '
    '"$bin"'/qaflora serve models/demo-small --port 18431 --gpu-layers 99 >/dev/null 2>&1 &
    server=$!
    trap "kill $server" EXIT
    until curl -sf http://127.0.0.1:18431/health >/dev/null; do sleep 1; done
    curl -sf http://127.0.0.1:18431/v1/chat/completions -H "content-type: application/json" -d "
        {\"messages\": [{\"role\": \"user\", \"content\": \"How many legs do three dogs have?\"}], \"max_tokens\": 32}"
'
say ""
say "$n_failed steps failed."
exit "$n_failed"
