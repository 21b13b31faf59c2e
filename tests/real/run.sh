#!/bin/bash
# `make test-real`: installs and starts the real servers, runs the tests of tests/real against them, stops the servers.
#
#   DEALSCALE_TEST_ARGS     further arguments of the test program (--ignored: the long run of module `way`)
#   run.sh [NAME...]       only the modules (or module::test) of these names (n8n, postgres, pulsar, oidc, …), with the servers they need
#
# A server is `servers/NAME.sh install|start|stop`; where it has settings to tell, `servers/NAME.sh env` prints lines
# `VARIABLE=value` for the tests. State is in a temporary folder (DEALSCALE_TEST_STATE keeps it), ports are the ones below.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/real/servers/lib.sh
export PATH="$HOME/.cargo/bin:$PATH"

WANTED=("$@")
SERVERS=()
for server in postgres pulsar oidc otlp n8n; do
  [ -x "tests/real/servers/$server.sh" ] || continue
  # Where only some modules are asked for, a server that none of them is named after stays off. Pulsar's modules log in by
  # OAuth2 and share a PostgreSQL; n8n publishes as an OAuth2 service account as well.
  case $server in
    oidc) users=(-e oidc -e way -e pulsar -e n8n) ;;
    postgres) users=(-e postgres -e way -e pulsar) ;;
    *) users=(-e "$server" -e way) ;;
  esac
  if [ ${#WANTED[@]} -eq 0 ] || printf '%s
' "${WANTED[@]%%[:_]*}" | grep -qx "${users[@]}"; then SERVERS+=("$server"); fi
done

if [ -n "${DEALSCALE_TEST_STATE:-}" ]; then STATE=$(realpath -m "$DEALSCALE_TEST_STATE"); KEEP=1
else STATE=$(mktemp -d "${TMPDIR:-/tmp}/dealscale-real.XXXXXX"); KEEP=
fi
mkdir -p "$STATE"
export DEALSCALE_TEST_STATE=$STATE
# n8n's templates name the bridge, so the tests that use them share one port, one after the other.
export DEALSCALE_TEST_BRIDGE_PORT=${DEALSCALE_TEST_BRIDGE_PORT:-28000}
export N8N_PORT=${N8N_PORT:-25678} N8N_BROKER_PORT=${N8N_BROKER_PORT:-25679} N8N_STATE=$STATE/n8n

STARTED=()
stop_all() {
  local code=$? server
  trap - EXIT INT TERM
  for server in ${STARTED[@]+"${STARTED[@]}"}; do "tests/real/servers/$server.sh" stop >&2 || true; done
  if [ -z "$KEEP" ] && [ "$code" = 0 ]; then rm -rf "$STATE"; else say "the servers' state and logs: $STATE"; fi
  exit "$code"
}
trap stop_all EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say "packages"
tests/real/servers/packages.sh build test
for server in ${SERVERS[@]+"${SERVERS[@]}"}; do
  case $server in n8n | postgres | pulsar | otlp) tests/real/servers/packages.sh "$server" ;; oidc) tests/real/servers/packages.sh n8n ;; esac
  "tests/real/servers/$server.sh" install
done
say "building"
cargo build --locked --bin dealscale
cargo test --locked --test real --no-run
for server in ${SERVERS[@]+"${SERVERS[@]}"}; do
  STARTED+=("$server")
  say "starting $server"
  "tests/real/servers/$server.sh" start
  # `env` is part of the convention, but not every server has something to tell.
  if grep -q '^  env)' "tests/real/servers/$server.sh"; then
    while IFS= read -r line; do export "${line?}"; done < <("tests/real/servers/$server.sh" env)
  fi
done
say "tests against ${SERVERS[*]}"
# One after the other: they share the servers, and some of them kill one.
# shellcheck disable=SC2086
cargo test --locked --test real -- --test-threads=1 ${DEALSCALE_TEST_ARGS:-} ${WANTED[@]+"${WANTED[@]}"}
