#!/bin/bash
# `make run`: the main job on a real n8n, from nothing.
#
#   main-job.sh            installs what is missing, builds, starts everything, sends one event through, stays up
#   main-job.sh --once     the same, then stops everything; its exit code says whether the event's execution succeeded
#
# By environment:
#   N8N=none               no n8n: a small echo receiver takes its place (and says so)
#   N8N_URL, N8N_API_KEY   an n8n that runs already; it must reach the bridge under BRIDGE_URL (default: this one, on loopback)
#   FASTAPI_BRIDGE_PORT    the bridge, default 8000          DEALSCALE_ADMIN_PORT   health and metrics, default 8081
#   N8N_PORT               default 5678                      N8N_BROKER_PORT        default N8N_PORT + 1
#   DEALSCALE_STATE        default .state of the checkout    DEALSCALE_BIN          a binary that is built already
#
# Everything listens on loopback. Ctrl-C stops what was started here, and only that; `.state` stays for the next time.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/real/servers/lib.sh

ONCE=; [ "${1:-}" = --once ] && ONCE=1
BRIDGE_PORT=${FASTAPI_BRIDGE_PORT:-8000}
ADMIN_PORT=${DEALSCALE_ADMIN_PORT:-8081}
export N8N_PORT=${N8N_PORT:-5678}
is_port() { [[ $2 =~ ^[1-9][0-9]{0,4}$ ]] && [ "$2" -le 65535 ] || die "$1=$2 is no port"; }
is_port N8N_PORT "$N8N_PORT"
export N8N_BROKER_PORT=${N8N_BROKER_PORT:-$((N8N_PORT + 1))}
is_port N8N_BROKER_PORT "$N8N_BROKER_PORT"
is_port FASTAPI_BRIDGE_PORT "$BRIDGE_PORT"
is_port DEALSCALE_ADMIN_PORT "$ADMIN_PORT"
STATE=$(realpath -m "${DEALSCALE_STATE:-.state}")
# Beside the appliance's own files: those of this script.
RUN=$STATE/run
BRIDGE_URL=${BRIDGE_URL:-http://127.0.0.1:$BRIDGE_PORT}
BIN=${DEALSCALE_BIN:-}

# n8n's files. What is known of somebody's own n8n does not mix with what is known of the one that is started here.
export N8N_STATE=$STATE/n8n
case ${N8N:-} in
  none) MODE=echo ;;
  '')
    if [ -z "${N8N_URL:-}" ]; then MODE=own; N8N_URL=http://127.0.0.1:$N8N_PORT
    else MODE=given; N8N_STATE=$STATE/n8n-given
    fi
    ;;
  *) die "N8N=$N8N is not known: leave it away for a real n8n, N8N=none for an echo receiver; N8N_URL=http://… uses an n8n that runs already" ;;
esac
N8N_URL=${N8N_URL:-}; N8N_URL=${N8N_URL%/}

# ---- stopping ----------------------------------------------------------------------------------------------------------

APPLIANCE=$RUN/dealscale.pid
ECHO=$RUN/echo.pid
SELF=$RUN/make-run.pid
TAIL=
# Nothing cuts this short: neither a second Ctrl-C, nor a terminal or a `| tee` that is gone already.
stop_all() {
  local code=$? file
  trap '' INT TERM HUP PIPE
  trap - EXIT
  set +e
  [ -z "$TAIL" ] || kill "$TAIL" 2>/dev/null
  local any=; for file in "$APPLIANCE" "$ECHO" "$N8N_STATE/n8n.pid"; do ! running "$file" || any=1; done
  [ -z "$any" ] || say "stopping (half a minute at the most)"
  end "$APPLIANCE" TERM 35
  [ "$MODE" != own ] || tests/real/servers/n8n.sh stop
  [ "$MODE" != echo ] || end "$ECHO"
  rm -f "$SELF"
  [ -z "$any" ] || say "stopped; the state stays in $STATE"
  exit "$code"
}

# ---- preparing ---------------------------------------------------------------------------------------------------------

ports() {
  local use=("$BRIDGE_PORT FASTAPI_BRIDGE_PORT bridge" "$ADMIN_PORT DEALSCALE_ADMIN_PORT admin listener")
  [ "$MODE" != own ] || use+=("$N8N_PORT N8N_PORT n8n" "$N8N_BROKER_PORT N8N_BROKER_PORT task broker of n8n")
  [ "$MODE" != echo ] || use+=("$N8N_PORT N8N_PORT echo receiver")
  local taken='' seen=' ' line port variable what
  for line in "${use[@]}"; do
    read -r port variable what <<<"$line"
    [[ $seen != *" $port "* ]] || die "the $what needs a port of its own, $port is given twice; choose another one:  make run $variable=PORT"
    seen+="$port "
    ! port_taken "$port" || taken+="
  127.0.0.1:$port (for the $what) is in use; choose another one:  make run $variable=PORT"
  done
  [ -z "$taken" ] || die "some ports are taken:$taken"
}

# Somebody's own n8n: what is wrong with its address or its key is said before anything is built.
reachable() {
  [ -n "${N8N_API_KEY:-}" ] ||
    die "N8N_URL is set: N8N_API_KEY must be as well, to import the templates (in n8n: Settings > n8n API > Create an API key)"
  local status
  status=$(curl -sS -o /dev/null -w '%{http_code}' --max-time 20 -K - "$N8N_URL/api/v1/workflows?limit=1" <<<"header = \"X-N8N-API-KEY: $N8N_API_KEY\"") ||
    die "cannot reach the n8n at N8N_URL=$N8N_URL"
  case $status in
    200) ;;
    401 | 403) die "the n8n at $N8N_URL refuses N8N_API_KEY ($status): make one with all scopes under Settings > n8n API" ;;
    *) die "$N8N_URL does not answer as an n8n does ($status to GET /api/v1/workflows)" ;;
  esac
}

build() {
  export PATH="$HOME/.cargo/bin:$PATH"
  [ -z "$BIN" ] || return 0
  say "building (a first time takes some minutes)"
  cargo build --locked --bin dealscale
  BIN=${CARGO_TARGET_DIR:-target}/debug/dealscale
}

# A secret that is made once.
secret() { [ -s "$1" ] || (umask 077; python3 -c 'import secrets; print(secrets.token_urlsafe(32))' >"$1"); }

# n8n publishes with a token, as it has to against an installed appliance. On loopback, for trying out, curl may do without.
write_config() {
  local hash database=
  hash=$(python3 -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1]).read().strip().encode()).hexdigest())' "$RUN/bridge-token")
  [ "$MODE" != own ] || database="database_file = \"$N8N_STATE/home/.n8n/database.sqlite\""
  cat >"$RUN/dealscale.toml" <<TOML
# Written by \`make run\`, again at each run.
state_dir = "$STATE"

[bridge]
listen = "127.0.0.1:$BRIDGE_PORT"
token_required = false

[admin]
listen = "127.0.0.1:$ADMIN_PORT"

# n8n's credential "dealscale bridge token".
[accounts.n8n]
token_sha256 = ["$hash"]
rights = ["publish", "read", "operate"]

[environments.production.n8n]
url = "$N8N_URL"
api_key_file = "$N8N_STATE/api-key"
$database

[environments.production.tenants.default]
[environments.production.tenants.acme]
[environments.production.tenants.globex]

[[environments.production.routes]]
name = "short"
when = { workflow = "example-short" }
class = "short"
webhook = "/webhook/example-short-work"

[[environments.production.routes]]
name = "long"
when = { workflow = "example-long" }
webhook = "/webhook/example-long-work"
redeliver_crashed = true

[[environments.production.routes]]
name = "per-tenant"
when = { workflow = "example-tenant" }
topic = "dealscale.workflow.long.{tenant}"
webhook = "/webhook/example-tenant-work"

[[environments.production.routes]]
name = "authenticated"
when = { workflow = "authenticated" }
webhook = "/webhook/dealscale-receive-auth"
webhook_auth = { kind = "header", name = "X-Dealscale-Secret", secret_file = "$RUN/webhook-secret" }

[[environments.production.routes]]
name = "errors"
when = { workflow = "workflow-error" }
class = "analytics"
webhook = "/webhook/dealscale-errors"
TOML
}

start_receiver() {
  case $MODE in
    own)
      tests/real/servers/n8n.sh install
      say "starting n8n"
      tests/real/servers/n8n.sh start
      ;;
    echo)
      say "N8N=none: a small echo receiver stands in for n8n. It runs no workflow, it only shows that events arrive."
      launch "$ECHO" "$RUN/echo.log" python3 tests/real/servers/echo.py "$N8N_PORT"
      wait_http "http://127.0.0.1:$N8N_PORT/" 20 "$ECHO" || die "the echo receiver does not answer; see $RUN/echo.log"
      ;;
    given) say "using the n8n at $N8N_URL" ;;
  esac
}

set_up_n8n() {
  [ "$MODE" != echo ] || return 0
  say "n8n: owner, API key, credentials, templates"
  local arguments=(--url "$N8N_URL" --state "$N8N_STATE" --bridge "$BRIDGE_URL"
    --bridge-token-file "$RUN/bridge-token" --webhook-secret-file "$RUN/webhook-secret")
  python3 tests/real/servers/n8n_setup.py "${arguments[@]}"
}

start_appliance() {
  say "starting the appliance (log: $RUN/dealscale.log)"
  : >"$RUN/dealscale.log"
  if [ "$MODE" = echo ]; then
    # No configuration but the plan's environment variables, as far as they reach: the admin port has none.
    local config=()
    if [ "$ADMIN_PORT" != 8081 ] || [ -e /etc/dealscale/dealscale.toml ]; then
      printf '[bridge]\ntoken_required = false\n[admin]\nlisten = "127.0.0.1:%s"\n' "$ADMIN_PORT" >"$RUN/dealscale.toml"
      config=(--config "$RUN/dealscale.toml")
    fi
    launch "$APPLIANCE" "$RUN/dealscale.log" env FASTAPI_BRIDGE_PORT="$BRIDGE_PORT" \
      FASTAPI_BRIDGE_WEBHOOK_URL="http://127.0.0.1:$N8N_PORT/webhook/pulsar-trigger" \
      "$BIN" serve --state-dir "$STATE" ${config[@]+"${config[@]}"}
  else
    write_config
    "$BIN" check --state-dir "$STATE" --config "$RUN/dealscale.toml" >/dev/null ||
      die "the configuration of this run does not pass \`dealscale check\`: $RUN/dealscale.toml"
    launch "$APPLIANCE" "$RUN/dealscale.log" "$BIN" serve --state-dir "$STATE" --config "$RUN/dealscale.toml"
  fi
  wait_http "http://127.0.0.1:$ADMIN_PORT/readyz" 60 "$APPLIANCE" ||
    { tail -n 20 "$RUN/dealscale.log" >&2; die "the appliance did not become ready; its log: $RUN/dealscale.log"; }
}

# ---- the main job ------------------------------------------------------------------------------------------------------

field() { python3 -c 'import json, sys; value = json.load(sys.stdin).get(sys.argv[1]); print("" if value is None else value)' "$1"; }
bridge() { curl -sS --max-time 90 ${AUTH:+-H "$AUTH"} "$@"; }

main_job() {
  local answer id final state until body='{"workflow":"demo","message":"hello from the first event"}'
  if [ "$MODE" = echo ]; then
    say "publishing one event:  POST $BRIDGE_URL/pulsar/publish"
    answer=$(bridge -H 'content-type: application/json' "$BRIDGE_URL/pulsar/publish" \
      -d '{"workflow":"demo","tenant_id":"default","payload":{"message":"hello from the first event"}}')
  else
    say "n8n publishes one event through the bridge:  POST $N8N_URL/webhook/dealscale-publish"
    answer=$(curl -sS --max-time 90 -H 'content-type: application/json' "$N8N_URL/webhook/dealscale-publish" -d "$body") ||
      die "n8n did not answer at $N8N_URL/webhook/dealscale-publish"
  fi
  printf '   answer: %s\n' "$answer" >&2
  id=$(field execution_id <<<"$answer" 2>/dev/null) && [ -n "$id" ] || die "the event was not accepted; see $RUN/dealscale.log$(
    [ "$MODE" != given ] || printf ', and in n8n the last execution of "dealscale: publish": it has to reach the bridge under %s.\n%s' "$BRIDGE_URL" \
      "The bridge listens on the loopback of this host, so that an n8n in a container or on another host needs a way to it: set BRIDGE_URL")"
  say "waiting for its end:  GET /executions/$id/wait"
  until=$((SECONDS + 180))
  while :; do
    final=$(bridge "http://127.0.0.1:$BRIDGE_PORT/executions/$id/wait?timeout=60s") || die "the bridge did not answer; see $RUN/dealscale.log"
    state=$(field state <<<"$final")
    case $state in accepted | relayed | delivering) [ "$SECONDS" -ge "$until" ] || continue ;; esac
    break
  done
  python3 -m json.tool <<<"$final" >&2 || printf '%s\n' "$final" >&2
  if [ "$MODE" = echo ]; then
    grep -F "$id" "$RUN/echo.log" | tail -n 1 >&2 || tail -n 1 "$RUN/echo.log" >&2
    [ "$state" = delivered ] || die "the event ended as '$state', not 'delivered'"
    say "the event arrived at the echo receiver and is '$state' (only a real n8n has executions that can be seen to succeed)"
  else
    say "what n8n says of its last executions:"
    show_executions || say "(n8n's list of executions cannot be read)"
    [ "$state" = succeeded ] || die "the event ended as '$state', not 'succeeded'"
    say "n8n -> bridge -> n8n: the execution was followed to its end: $state"
  fi
}

show_executions() {
  N8N_URL=$N8N_URL python3 - "$N8N_STATE" >&2 <<'PYTHON'
import json, os, pathlib, sys, urllib.request
state = pathlib.Path(sys.argv[1])
names = {id: name for name, id in json.loads((state / "workflows.json").read_text()).items()}
request = urllib.request.Request(os.environ["N8N_URL"] + "/api/v1/executions?limit=4",
                                 headers={"X-N8N-API-KEY": (state / "api-key").read_text()})
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
for execution in json.load(opener.open(request, timeout=30))["data"]:
    print(f"   execution {execution['id']:>4}  {execution['status']:<9} {names.get(execution['workflowId'], execution['workflowId'])}")
PYTHON
}

what_next() {
  if [ "$MODE" = echo ]; then cat >&2 <<TEXT

Everything runs. Try next (Ctrl-C stops it all):

  curl -H 'content-type: application/json' http://127.0.0.1:$BRIDGE_PORT/pulsar/publish \\
       -d '{"workflow":"demo","tenant_id":"default","payload":{"n":2}}'
  curl 'http://127.0.0.1:$BRIDGE_PORT/executions?tenant=default'
  curl http://127.0.0.1:$ADMIN_PORT/readyz            # and /metrics
  tail -f $RUN/echo.log                             # what the receiver gets
  $BIN status --state-dir $STATE
  make run                                            # the same with a real n8n

TEXT
  else cat >&2 <<TEXT

Everything runs. Try next (Ctrl-C stops it all):

  the editor:      $N8N_URL$([ "$MODE" != own ] || printf '   e-mail and password: %s' "$N8N_STATE/owner.json")
  a long job:      curl -H 'content-type: application/json' $N8N_URL/webhook/example-long -d '{"seconds":5}'
  a short one:     curl -H 'content-type: application/json' $N8N_URL/webhook/example-short -d '{"numbers":[1,2,3]}'
  a tenant's:      curl -H 'content-type: application/json' $N8N_URL/webhook/example-tenant -d '{"tenant":"acme"}'
  the bridge:      curl 'http://127.0.0.1:$BRIDGE_PORT/executions?tenant=default'
  its state:       curl http://127.0.0.1:$ADMIN_PORT/readyz    (and /metrics)
                   $BIN status --state-dir $STATE
  promise 1:       stop n8n ($([ "$MODE" = own ] && printf 'N8N_PORT=%s N8N_STATE=%s tests/real/servers/n8n.sh stop' "$N8N_PORT" "$N8N_STATE" || printf 'yours')),
                   publish with curl, start n8n again: the event arrives
  how to use it:   docs/workflow-authors.md

TEXT
  fi
}

# ------------------------------------------------------------------------------------------------------------------------

mkdir -p "$RUN"
chmod 700 "$STATE" "$RUN"
if running "$SELF"; then
  die "\`make run\` is at work here already (process $(cut -d' ' -f1 "$SELF")); stop it with Ctrl-C there, or use another DEALSCALE_STATE and other ports"
fi
remember $$ "$SELF"
trap stop_all EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
trap 'exit 141' PIPE
# What a run that was killed has left behind is ours: it is stopped, not complained about.
end "$APPLIANCE" TERM 35
N8N_STATE=$STATE/n8n tests/real/servers/n8n.sh stop
end "$ECHO"
ports
case $MODE in own) tests/real/servers/packages.sh build test n8n ;; *) tests/real/servers/packages.sh build test ;; esac
[ "$MODE" != given ] || reachable
build
secret "$RUN/bridge-token"
secret "$RUN/webhook-secret"
AUTH=; [ "$MODE" = echo ] || AUTH="Authorization: Bearer $(cat "$RUN/bridge-token")"
start_receiver
set_up_n8n
start_appliance
main_job
[ -z "$ONCE" ] || exit 0
what_next
tail -n 0 --pid=$$ -f "$RUN/dealscale.log" & TAIL=$!
# Ends with the appliance, or with Ctrl-C.
read -r pid _ <"$APPLIANCE"
wait "$pid" || die "the appliance ended with code $?; its log: $RUN/dealscale.log"
