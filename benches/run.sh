#!/usr/bin/env bash
# Measures the figures of docs/benchmarks.md: the appliance, the plan's own design and the floor, alternating in one run.
#
#   benches/run.sh [accept|cpu|e2e|outage|open|idle|all] [--quick] [--rounds N] [--out DIR]
#
# Environment: DEALSCALE_BENCH_PORT (first of 100 ports, 21600), DEALSCALE_CACHE (~/.cache/dealscale), DEALSCALE_BENCH_BIN
# (a folder with ready programs instead of `cargo build --release`).
# Wants Rust, Python 3.11, PostgreSQL 15 and Java 17; the rest it fetches. Everything it starts, it stops.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$HOME/.cargo/bin:$PATH
case " $* " in *' --help '* | *' -h '*) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;; esac

cache=${DEALSCALE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dealscale}
venv=$cache/bench-venv
want=$(sha256sum benches/plan/requirements.txt | cut -c1-64)
if [ "$(cat "$venv/.complete" 2>/dev/null)" != "$want" ]; then
  echo "== the plan's own design: Python packages into $venv" >&2
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check -r benches/plan/requirements.txt
  printf '%s\n' "$want" >"$venv/.complete"
fi

bin=${DEALSCALE_BENCH_BIN:-}
if [ -z "$bin" ]; then
  echo "== release build (a first one takes minutes)" >&2
  bin=$PWD/target/bench/bin
  mkdir -p "$bin"
  # Programs under [[bench]] get a hash in their name: cargo says where they are.
  cargo build --release --locked --message-format=json-render-diagnostics \
    --bin dealscale --bench bench-load --bench bench-floor --bench bench-fill |
    python3 -c '
import json, os, shutil, sys
for line in sys.stdin:
    message = json.loads(line)
    if message["reason"] == "compiler-artifact" and message.get("executable"):
        target = os.path.join(sys.argv[1], message["target"]["name"])
        shutil.copy2(message["executable"], target + ".new")
        os.replace(target + ".new", target)
' "$bin"
fi
export DEALSCALE_CACHE=$cache
exec python3 benches/harness/main.py --bin "$bin" --venv "$venv" "$@"
