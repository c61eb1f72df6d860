#!/usr/bin/env bash
# Builds the extension, checks it and measures it on a GPU: what `make gpu` runs. Needs a driver, nvcc with
# compute-sanitizer, and a Python with torch, pybind11, ninja, setuptools and pytest; no network, and it installs
# nothing. A stage that fails does not stop the later ones.
#
#   PYTHON=python3.12 RESULTS_DIR=/tmp/results bash bench/gpu_check.sh
# shellcheck disable=SC2329  # functions are called through bash -c
set -u -o pipefail

PYTHON=${PYTHON:-python3}
RESULTS_DIR=${RESULTS_DIR:-bench/results}
TESTS=${TESTS:-tests -q -k cuda}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-480}
BENCH_SECONDS=${BENCH_SECONDS:-80}
BENCH_LIMIT=200

cd "$(dirname "$0")/.." || exit 1
mkdir -p "$RESULTS_DIR" || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

summary=()
failed=0
reserved=$BENCH_LIMIT # for the benchmark, which comes last

# stage NAME LIMIT COMMAND: runs the command for at most LIMIT seconds, and no longer than the time left in all;
# its output goes to the terminal and to NAME.log.
stage() {
  local name=$1 limit=$2 log="$RESULTS_DIR/$1.log" start=$SECONDS status verdict
  local left=$((SECONDS_IN_ALL - SECONDS - reserved))
  ((limit < left)) || limit=$left
  printf '\n== %s (at most %s s): %s\n' "$name" "$limit" "$3"
  if ((limit <= 0)); then
    echo "no time left" | tee "$log"
    status=124
  else
    timeout --kill-after=10 "$limit" bash -c "$3" 2>&1 | tee "$log"
    status=$?
  fi
  case $status in
    0) verdict=passed ;;
    124 | 137) verdict="out of time" ;;
    *) verdict="failed ($status)" ;;
  esac
  ((status == 0)) || failed=1
  summary+=("$(printf '%-12s %-14s %5s s  %s' "$name" "$verdict" "$((SECONDS - start))" "$log")")
}

machine() {
  nvidia-smi && nvcc --version
}

build() {
  CTLD_CUDA=require CTLD_WERROR=1 "$PYTHON" setup.py build_ext --inplace
}

backends() {
  "$PYTHON" - <<'END'
import sys

from ctld_cuda import backend_info

for name, info in backend_info().items():
    print(name, info)
sys.exit(not backend_info().get("cuda", {}).get("usable"))
END
}

run_tests() {
  # shellcheck disable=SC2086  # several arguments
  "$PYTHON" -m pytest $TESTS
}

# The sanitizer on PATH, or the one next to nvcc.
find_sanitizer() {
  command -v compute-sanitizer && return
  local toolkit candidate
  toolkit=$(dirname "$(readlink -f "$(command -v nvcc)")")/..
  for toolkit in "${CUDA_HOME:-}" "${CUDA_PATH:-}" "$toolkit" /usr/local/cuda; do
    for candidate in "$toolkit"/{bin,compute-sanitizer}/compute-sanitizer; do
      [[ -x $candidate ]] && echo "$candidate" && return
    done
  done
  echo "no compute-sanitizer on PATH or in the CUDA toolkit" >&2
  return 1
}

sanitize() {
  local sanitizer
  sanitizer=$(find_sanitizer) || return
  # one allocation per tensor, or an access beyond one would hit its neighbour in torch's cache
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$@" --error-exitcode 3 --report-api-errors no \
    --show-backtrace device --print-limit 20 "$PYTHON" bench/sanitizer_run.py
}

measure() {
  "$PYTHON" bench/step.py --device cuda --check --seconds "$BENCH_SECONDS" --results "$RESULTS_DIR"
}

# timeout runs programs, not functions
export PYTHON RESULTS_DIR TESTS BENCH_SECONDS
export -f machine build backends run_tests find_sanitizer sanitize measure

stage machine 20 machine
stage build 150 build
stage backends 30 backends
stage tests 120 run_tests
stage memcheck 60 'sanitize memcheck --padding 64'
stage racecheck 60 'sanitize racecheck'
stage initcheck 60 'sanitize initcheck'
stage synccheck 60 'sanitize synccheck'
reserved=0
stage benchmark "$BENCH_LIMIT" measure

printf '\n== summary\n'
printf '%s\n' "${summary[@]}" | tee "$RESULTS_DIR/summary.log"
exit "$failed"
