#!/usr/bin/env bash
# All that a machine with an NVIDIA GPU can say of the CUDA kernels, in one command of at most 9 minutes:
#
#   bash benchmarks/gpu.sh
#
# It builds for that GPU, runs the tests marked `cuda`, records what the wrapped instructions do, times the layers
# beside what torch offers, runs compute-sanitizer on a small set, and prints a summary. It needs CUDA's toolkit and a
# python3 with torch, setuptools, pybind11, ninja, pytest, hypothesis and rich; no network. It changes no setting of
# the GPU.
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

stage_conformance() {
  if [[ -n $DRY_RUN ]]; then
    echo "no GPU to record"
    return
  fi
  local nvcc scratch status
  nvcc=$(command -v nvcc || command -v /usr/local/cuda/bin/nvcc) || return
  scratch=$(mktemp -d)
  "$nvcc" -std=c++17 -O2 -arch=native -Icsrc -o "$scratch/conformance" tests/emulation/conformance.cu &&
    "$scratch/conformance" record >"$scratch/recorded" && mv "$scratch/recorded" "$OUT/conformance.txt" &&
    echo "$(wc -l <"$OUT/conformance.txt") lines"
  status=$?
  rm -rf "$scratch"
  return "$status"
}

stage_nm24_linear() { layers nm24_linear; }
stage_nm24_linear_i8() { layers nm24_linear_i8; }
stage_nm24_conv() { layers nm24_conv; }
layers() {
  "$PYTHON" -m benchmarks.gpu_run "$1" --out "$OUT" --until $((DEADLINE - 3)) "${dry[@]}"
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
rm -f "$OUT"/{environment.json,{stages,tests,layers}.csv,conformance.txt,log.txt,summary.txt}
part=$(mktemp)
trap 'rm -f "$part"' EXIT
echo "stage,status,seconds,note" >"$OUT/stages.csv"
failures=0

record() { # record STAGE STATUS SECONDS NOTE
  local note
  note=$(printf '%s' "$4" | tr -d '\000-\037' | tr '"' "'" | cut -c 1-160)
  printf '%s,%s,%d,"%s"\n' "$1" "$2" "$3" "$note" >>"$OUT/stages.csv"
  printf '%-14s %-8s %4d s  %s\n' "$1" "$2" "$3" "$note"
  [[ $2 == ok ]] || failures=$((failures + 1))
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
  if [[ $name == tests ]]; then said=$("$PYTHON" -m benchmarks.gpu_tests "$part" "$OUT" 2>&1 | tail -n 1); fi
  case $status in
    0) ;;
    124 | 137) word="cut" ;;
    *) word=failed ;;
  esac
  record "$name" "$word" $((SECONDS - start)) "$said"
  if [[ $word == failed ]]; then tail -n 12 "$part" | cut -c 1-200 | sed 's/^/    /'; fi
  [[ $word == ok ]]
}

stage environment 60
if stage build 180; then
  stage tests 270 100
  stage conformance 290 30
  stage nm24_linear 365
  stage nm24_linear_i8 385 25
  stage nm24_conv 445
  stage memcheck 490
  stage racecheck 530
else
  stage conformance 290 30
  for name in tests nm24_linear nm24_linear_i8 nm24_conv memcheck racecheck; do
    record "$name" "not run" 0 "there is no build"
  done
fi
stage summary 540 >/dev/null
echo
cat "$OUT/summary.txt"
[[ $failures -eq 0 ]]
