#!/usr/bin/env bash
# All that a machine with an NVIDIA GPU can say of the CUDA kernels, in one command of at most 9 minutes:
#
#   bash benchmarks/gpu.sh
#
# It builds for that GPU, runs the tests marked `cuda` and as many as it can of those of the kernels in Triton, records
# what the wrapped instructions do, times the layers beside what torch offers (those with pruned channels too), runs
# compute-sanitizer on a small set, and prints a summary. On a GPU of compute capability 9.0 it also times the
# instructions of its kernels alone (ceiling), tries all of their tiles at some layers (sweep), logs clock and power of
# the largest (power) and times layers of e4m3. It needs CUDA's toolkit and a python3 with torch, setuptools, pybind11,
# ninja, pytest, hypothesis and rich; no network. It changes no setting of the GPU.
#
# What has most worth comes first, and each stage is saved as it goes: a run that is cut off still counts. A stage that
# does not fit is cut, and the table of stages says so. To keep a run: python -m benchmarks.gpu_table --keep FOLDER.
#
#   OUT      where the results go (benchmarks/results/gpu-run); emptied first of what an earlier run left
#   COMMIT   the commit, for a copy without its history: git describe --always --abbrev=10 --dirty
#   LIMIT    how many seconds all of it may take (540)
#   PYTHON   the Python to use (python3)
#   DRY_RUN  1 goes through the stages on the CPU, with tiny layers and without a build: to try the script itself
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

export OUT=${OUT:-benchmarks/results/gpu-run}
export PYTHON=${PYTHON:-python3}
export DRY_RUN=${DRY_RUN:-}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
dry=()
[[ -z $DRY_RUN ]] || dry=(--dry-run)

# ---- the stages. DEADLINE: when a stage is cut, in seconds since 1970

stage_environment() {
  "$PYTHON" -m benchmarks.gpu_machine --out "$OUT" "${dry[@]}"
}

stage_build() {
  if [[ -n $DRY_RUN ]]; then
    "$PYTHON" -c 'from sparseops import _native; print("built:", _native.require("gpu.sh").build_info())'
    return
  fi
  local archs
  archs=$("$PYTHON" -m benchmarks.gpu_machine --arch) || return
  SPARSEOPS_CUDA=1 TORCH_CUDA_ARCH_LIST=$archs "$PYTHON" setup.py --quiet build_ext --inplace || return
  stage_environment # once more: now it knows what was built
}

stage_tests() {
  local chosen=(-m cuda --continue-on-collection-errors tests)
  [[ -z $DRY_RUN ]] || chosen=(-k names_its_architecture tests/test_gpu_reports.py)
  "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider "${chosen[@]}"
}

# Each compiles several kernels, so one dtype is enough, and those of whole layers come first.
stage_triton_tests() {
  local chosen=(-k "not f32 and not bf16" tests/test_triton_channels.py tests/test_triton_ops.py)
  [[ -z $DRY_RUN ]] || chosen=(-k names_its_architecture tests/test_gpu_reports.py)
  SPARSEOPS_IMPL=triton "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider "${chosen[@]}"
}

stage_conformance() {
  if [[ -n $DRY_RUN ]]; then
    echo "no GPU to record"
    return
  fi
  local nvcc scratch status arch
  nvcc=$(command -v nvcc || command -v /usr/local/cuda/bin/nvcc) || return
  arch=$("$PYTHON" -m benchmarks.gpu_machine --arch | tr -d .) || return
  scratch=$(mktemp -d)
  "$nvcc" -std=c++17 -O2 -gencode "arch=compute_$arch,code=sm_$arch" -Icsrc \
    -o "$scratch/conformance" tests/emulation/conformance.cu &&
    "$scratch/conformance" record >"$scratch/recorded" && mv "$scratch/recorded" "$OUT/conformance.txt" &&
    echo "$(wc -l <"$OUT/conformance.txt") lines"
  status=$?
  rm -rf "$scratch"
  return "$status"
}

stage_ceiling() {
  "$PYTHON" -m benchmarks.gpu_ceiling --out "$OUT" --until $((DEADLINE - 3)) "${dry[@]}"
}
stage_power() {
  "$PYTHON" -m benchmarks.gpu_power --out "$OUT" --until $((DEADLINE - 3)) "${dry[@]}"
}

stage_sweep() { layers nm24_linear --sweep; }
stage_nm24_linear() { layers nm24_linear; }
stage_nm24_linear_i8() { layers nm24_linear_i8; }
stage_nm24_linear_f8() { layers nm24_linear_f8; }
stage_nm24_conv() { layers nm24_conv; }
stage_channel_conv() { layers channel_conv; }
stage_channel_linear() { layers channel_linear; }
layers() {
  "$PYTHON" -m benchmarks.gpu_run "$@" --out "$OUT" --until $((DEADLINE - 3)) "${dry[@]}"
}

stage_memcheck() { sanitizer memcheck --padding 64 --report-api-errors no; }
stage_racecheck() { sanitizer racecheck; }
sanitizer() { # sanitizer TOOL OPTIONS...
  local program small_set=(-m benchmarks.gpu_small_set --until $((DEADLINE - 8)) "${dry[@]}")
  program=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer) || {
    echo "no compute-sanitizer on this machine"
    return 3
  }
  # without torch's cache every tensor is an allocation of its own, with nothing of ours behind it
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$@" --kernel-name kns=nm24 --print-limit 20 \
    --error-exitcode 9 "$PYTHON" "${small_set[@]}"
}

stage_summary() {
  "$PYTHON" -m benchmarks.gpu_summary "$OUT" >"$OUT/summary.txt"
}

if [[ ${1:-} == --stage ]]; then
  "stage_$2"
  exit
fi

# ---- the run

total=${LIMIT:-540}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
log=$OUT/log.txt
rm -f "$OUT"/{environment.json,{stages,tests,layers,ceilings,power,power_log}.csv,conformance.txt,log.txt,summary.txt}
part=$(mktemp)
tests=$(mktemp)
trap 'rm -f "$part" "$tests"' EXIT
echo "stage,status,seconds,note" >"$OUT/stages.csv"
failures=0
elsewhere="not for this GPU"

record() { # record STAGE STATUS SECONDS NOTE
  local note
  note=$(printf '%s' "$4" | tr -d '\000-\037' | tr '"' "'" | cut -c 1-160)
  printf '%s,%s,%d,"%s"\n' "$1" "$2" "$3" "$note" >>"$OUT/stages.csv"
  printf '%-14s %-8s %4d s  %s\n' "$1" "$2" "$3" "$note"
  [[ $2 == ok || $4 == "$elsewhere" ]] || failures=$((failures + 1))
}

# stage NAME UNTIL [SECONDS]: runs stage_NAME, not past UNTIL (of 540, from the start) and not longer than SECONDS
stage() {
  local name=$1 left=$(($2 * total / 540 - SECONDS)) most=$((${3:-540} * total / 540)) start=$SECONDS before status=0
  [[ $left -le $most ]] || left=$most
  if [[ $left -lt 5 ]]; then
    record "$name" "not run" 0 "no time was left"
    return 1
  fi
  printf '\n==== %s\n' "$name" >>"$log"
  before=$(stat -c %s "$log")
  DEADLINE=$(($(date +%s) + left)) timeout --signal=INT --kill-after=5 "$left" \
    bash benchmarks/gpu.sh --stage "$name" >>"$log" 2>&1 </dev/null || status=$?
  tail -c +$((before + 1)) "$log" >"$part"
  local said word=ok
  said=$(grep -v '^[[:space:]]*$' "$part" | tail -n 1)
  if [[ $name == *tests ]]; then
    cat "$part" >>"$tests"
    said=$("$PYTHON" -m benchmarks.gpu_tests "$tests" "$OUT" 2>&1 | tail -n 1)
  fi
  case $status in
    0) ;;
    124 | 137) word="cut" ;;
    *) word=failed ;;
  esac
  record "$name" "$word" $((SECONDS - start)) "$said"
  if [[ $word == failed ]]; then tail -n 12 "$part" | cut -c 1-200 | sed 's/^/    /'; fi
  [[ $word == ok ]]
}

# stage_sm90 NAME UNTIL [SECONDS]: a stage for compute capability 9.0 alone
stage_sm90() {
  if [[ -n $DRY_RUN ]] || grep -q '"capability": "9.0"' "$OUT/environment.json" 2>/dev/null; then
    stage "$@"
  else
    record "$1" "not run" 0 "$elsewhere"
  fi
}

stage environment 60
if stage build 180; then
  stage tests 265 90
  stage conformance 285 30
  stage_sm90 ceiling 305 20
  stage_sm90 sweep 355 65
  stage_sm90 power 380 30
  stage nm24_linear 395 75
  stage nm24_linear_i8 412 25
  stage_sm90 nm24_linear_f8 425 20
  stage nm24_conv 440
  stage channel_conv 460
  stage channel_linear 475
  stage triton_tests 497
  stage memcheck 515
  stage racecheck 532
else
  stage conformance 285 30
  stage_sm90 ceiling 305 20
  for name in tests sweep power nm24_linear nm24_linear_i8 nm24_linear_f8 nm24_conv channel_conv channel_linear \
    triton_tests memcheck racecheck; do
    record "$name" "not run" 0 "there is no build"
  done
fi
stage summary 540 >/dev/null
echo
cat "$OUT/summary.txt"
[[ $failures -eq 0 ]]
