#!/usr/bin/env bash
# Everything a GPU machine can tell, in one command and under nine minutes:
#
#   bash benchmarks/gpu.sh [OUT] [WHEELS] [UPSTREAM]
#
# OUT (default gpu-results) receives at most eight files: environment.txt, tests.txt, sanitizer.txt,
# rows.jsonl (a line as soon as it is measured), benchmark.txt, performance.md and plots.zip.
# WHEELS is a folder of wheels for packages the machine lacks (tomli-w, kornia; no network is used).
# UPSTREAM is a checkout of the authors' code.  Whatever does not work there is recorded as
# unavailable and the rest goes on; what is finished when the command is cut short stays.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${1:-gpu-results}"); WHEELS=${2:-}; UPSTREAM=${3:-}
mkdir -p "$OUT"
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
began=$SECONDS
left() { echo $(( ${BUDGET:-480} - (SECONDS - began) )); }  # of nine minutes, with some to spare

if [[ -n $WHEELS ]]; then
  extra=$(mktemp -d)
  "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$extra" "$WHEELS"/*.whl \
    >"$OUT/environment.txt" 2>&1 || echo "unavailable: wheels in $WHEELS" >>"$OUT/environment.txt"
  export PYTHONPATH=$PYTHONPATH:$extra
fi

{ date -u; uname -a; nvidia-smi || echo "unavailable: nvidia-smi"
  "$PYTHON" - <<'PYTHON'
import importlib.metadata as m, torch
for name in ("torch", "triton", "torchvision", "numpy", "kornia", "nvidia-dali-cuda130", "tomli-w",
             "pytest", "pytest-benchmark", "hypothesis", "matplotlib"):
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        print("unavailable:", name)
print(torch.cuda.get_device_properties(0) if torch.cuda.is_available() else "unavailable: CUDA")
PYTHON
} >>"$OUT/environment.txt" 2>&1

# part NAME SECONDS COMMAND…: at most so long, and never past the end; its output in OUT/NAME.txt.
part() {
  local name=$1 most=$2; shift 2
  (( most > $(left) )) && most=$(left)
  if (( most < 5 )); then echo "not run: the time was used up" >>"$OUT/$name.txt"; return; fi
  timeout --kill-after=5 "$most" "$@" >>"$OUT/$name.txt" 2>&1
  local code=$?
  case $code in
    0) echo "ended well after $((SECONDS - began)) s" ;;
    124|137) echo "cut short after $most s; the above is complete" ;;
    *) echo "ended with exit code $code" ;;
  esac >>"$OUT/$name.txt"
  [[ $(stat -c %s "$OUT/$name.txt") -gt 15000000 ]] && truncate -s 15000000 "$OUT/$name.txt"
}

SELECTED="test_kernel_against_twin and (power or 43) and float32"
sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "unavailable: compute-sanitizer" >>"$OUT/sanitizer.txt"; return
  fi
  for tool in memcheck racecheck; do
    echo "== $tool" >>"$OUT/sanitizer.txt"
    part sanitizer 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m pytest tests/kernels -k "$SELECTED" -p no:cacheprovider -x --tb=short
  done
  grep -q "Device not supported" "$OUT/sanitizer.txt" &&
    echo "unavailable: compute-sanitizer knows no such device or runtime" >>"$OUT/sanitizer.txt"
}

bench() {  # bench SECONDS SELECTION OPTIONS…
  local most=$1 select=$2; shift 2
  part benchmark "$most" "$PYTHON" -m pytest benchmarks --benchmark-only --scale paper \
    --rows "$OUT/rows.jsonl" -p no:cacheprovider --tb=short -q -k "$select" \
    ${UPSTREAM:+--upstream "$UPSTREAM"} "$@"
}

report() {
  [[ -s $OUT/rows.jsonl ]] || return
  local pages; pages=$(mktemp -d)
  timeout 40 "$PYTHON" benchmarks/report.py "$OUT/rows.jsonl" --out "$pages/performance.md" \
    >>"$OUT/benchmark.txt" 2>&1 || return
  cp "$pages/performance.md" "$OUT/"
  (cd "$pages" && "$PYTHON" -m zipfile -c "$OUT/plots.zip" images) >>"$OUT/benchmark.txt" 2>&1
}

# Tests, not times, share the machine among several processes: most of theirs is compiling.
tested() {  # tested SECONDS PROCESSES OPTIONS…
  local most=$1 processes=$2; shift 2
  "$PYTHON" -c "import xdist" 2>/dev/null && set -- -n "$processes" --dist worksteal "$@"
  part tests "$most" "$PYTHON" -m pytest -p no:cacheprovider -rs --tb=short --maxfail=30 \
    --continue-on-collection-errors "$@"
}

# What was asked for first comes first, and torch.compile, which takes minutes to begin with, last;
# a report is written as soon as there is something to say.
cores=$(nproc)
tested 90 $((cores < 12 ? cores : 12)) tests/kernels -k "test_kernel_ or graph_replay"
tested 45 $((cores < 4 ? cores : 4)) tests --ignore=tests/kernels -m gpu
own="--engines=reference,fast,upstream"
bench 100 "synthesis_step and B-4096" $own
bench 60 "test_prompt_step" $own
bench 75 "test_kernel" $own
report
bench 50 "epoch or data_path" $own
bench 60 "synthesis_step and not B-4096" $own
bench 75 "synthesis_step and B-4096 or test_prompt_step" --engines=tuned
bench 90 "synthesis_step and B-4096 or test_prompt_step" --engines=compile
report
sanitize
bench 60 "test_kernel" --engines=compile
bench 40 "prediction or loading or demo"
bench 60 "scaling" --sweep
report
echo "done after $((SECONDS - began)) s: $OUT"
