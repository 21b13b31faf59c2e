#!/bin/bash
# A real OTLP collector on loopback: PyPI's `rotel`, which prints every span that it takes.
#
#   otlp.sh install | start | stop | kill
#   otlp.sh env                     OTLP_ENDPOINT, OTLP_LOG (the file of printed spans), OTLP_STATE
#
# By environment: OTLP_STATE (default .state/otlp of the checkout), OTLP_PORT (default 24318), OTLP_GRPC_PORT (24317).
set -euo pipefail
cd "$(dirname "$0")" && . ./lib.sh

ROTEL_VERSION=0.0.1a15
VENV=$CACHE/rotel-$ROTEL_VERSION
OTLP_STATE=$(realpath -m "${OTLP_STATE:-${DEALSCALE_TEST_STATE:-../../../.state}/otlp}")
OTLP_PORT=${OTLP_PORT:-24318}
OTLP_GRPC_PORT=${OTLP_GRPC_PORT:-24317}
PIDFILE=$OTLP_STATE/otlp.pid

install() {
  [ -e "$VENV/.complete" ] && return 0
  mkdir -p "$CACHE"
  rm -rf "$VENV"
  python3 -m venv "$VENV"
  with_progress "pip: rotel $ROTEL_VERSION" "$VENV/install.log" \
    "$VENV/bin/pip" install --disable-pip-version-check "rotel==$ROTEL_VERSION"
  touch "$VENV/.complete"
}

start() {
  if running "$PIDFILE"; then say "rotel runs already"; return 0; fi
  [ -e "$VENV/.complete" ] || die "rotel is not installed: run $0 install"
  ! port_taken "$OTLP_PORT" || die "127.0.0.1:$OTLP_PORT is in use: set OTLP_PORT to another one"
  mkdir -p "$OTLP_STATE"
  # The agent itself: the Python module around it would start it in the background.
  local agent
  agent=$(echo "$VENV"/lib/python3.*/site-packages/rotel/rotel-agent)
  setsid "$agent" start --otlp-http-endpoint "127.0.0.1:$OTLP_PORT" --otlp-grpc-endpoint "127.0.0.1:$OTLP_GRPC_PORT" \
    --debug-log traces --debug-log-verbosity detailed --exporter blackhole >>"$OTLP_STATE/otlp.log" 2>&1 </dev/null &
  remember $! "$PIDFILE"
  local until=$((SECONDS + 30))
  until port_taken "$OTLP_PORT"; do
    running "$PIDFILE" && [ "$SECONDS" -lt "$until" ] || die "it did not start; see $OTLP_STATE/otlp.log"
    sleep 0.2
  done
}

case "${1:-}" in
  install) locked otlp install ;;
  start) start ;;
  stop) end "$PIDFILE" TERM 10 ;;
  kill) end "$PIDFILE" KILL ;;
  env)
    echo "OTLP_ENDPOINT=http://127.0.0.1:$OTLP_PORT"
    echo "OTLP_LOG=$OTLP_STATE/otlp.log"
    echo "OTLP_STATE=$OTLP_STATE"
    ;;
  *) die "usage: otlp.sh install|start|stop|kill|env" ;;
esac
