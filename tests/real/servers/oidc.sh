#!/bin/bash
# A real OAuth2 / OpenID Connect server on loopback: npm's `oidc-provider`, client credentials only.
#
#   oidc.sh install | start | stop | kill
#   oidc.sh env                      OIDC_ISSUER, OIDC_CLIENT_ID, OIDC_CLIENT_SECRET, OIDC_AUDIENCE
#   oidc.sh token [SCOPE] [AUDIENCE] an access token (RS256 JWT, RFC 9068), printed
#   OIDC_TTL=SECONDS oidc.sh start   its access tokens live that long (600)
#   oidc.sh rotate                   the server again with a new signing key (the old one stays in the key set)
#
# By environment: OIDC_STATE (default .state/oidc of the checkout), OIDC_PORT (default 21380).
set -euo pipefail
cd "$(dirname "$0")" && . ./lib.sh

OIDC_VERSION=9.13.3
OIDC_DIR=$CACHE/oidc-provider-$OIDC_VERSION
OIDC_STATE=$(realpath -m "${OIDC_STATE:-${DEALSCALE_TEST_STATE:-../../../.state}/oidc}")
OIDC_PORT=${OIDC_PORT:-21380}
OIDC_ISSUER=http://127.0.0.1:$OIDC_PORT
OIDC_AUDIENCE=${OIDC_AUDIENCE:-dealscale}
PIDFILE=$OIDC_STATE/oidc.pid

install() {
  ./node.sh install >/dev/null
  [ -e "$OIDC_DIR/.complete" ] && return 0
  say "oidc-provider $OIDC_VERSION (once; kept in $OIDC_DIR)"
  mkdir -p "$OIDC_DIR"
  echo '{"name":"oidc","private":true}' >"$OIDC_DIR/package.json"
  with_progress "npm: oidc-provider@$OIDC_VERSION" "$OIDC_DIR/install.log" \
    npm --prefix "$OIDC_DIR" install "oidc-provider@$OIDC_VERSION" --no-audit --no-fund --ignore-scripts
  touch "$OIDC_DIR/.complete"
}

start() {
  if running "$PIDFILE"; then say "the OAuth2 server runs already"; return 0; fi
  [ -e "$OIDC_DIR/.complete" ] || die "oidc-provider is not installed: run $0 install"
  ! port_taken "$OIDC_PORT" || die "127.0.0.1:$OIDC_PORT is in use: set OIDC_PORT to another one"
  mkdir -p "$OIDC_STATE"
  # Holds the client's secret and the signing keys.
  chmod 700 "$OIDC_STATE"
  [ -s "$OIDC_STATE/secret" ] || head -c 24 /dev/urandom | base64 | tr '+/' '-_' >"$OIDC_STATE/secret"
  # The module's folder has its dependencies beside it, wherever this checkout lies.
  cp oidc.mjs "$OIDC_DIR/server.mjs"
  PORT=$OIDC_PORT STATE=$OIDC_STATE AUDIENCE=$OIDC_AUDIENCE ROTATE=${ROTATE:-} TTL=${OIDC_TTL:-600} \
    CLIENT_SECRET=$(cat "$OIDC_STATE/secret") launch "$PIDFILE" "$OIDC_STATE/oidc.log" "$NODE_BIN/node" "$OIDC_DIR/server.mjs"
  wait_http "$OIDC_ISSUER/.well-known/openid-configuration" 30 "$PIDFILE" || die "it did not start; see $OIDC_STATE/oidc.log"
}

token() {
  curl -fsS -u "n8n:$(cat "$OIDC_STATE/secret")" "$OIDC_ISSUER/token" \
    -d grant_type=client_credentials -d "scope=${1:-publish read operate}" -d "resource=urn:${2:-$OIDC_AUDIENCE}" \
    | sed 's/.*"access_token":"\([^"]*\)".*/\1/'
}

case "${1:-}" in
  install) locked oidc install ;;
  start) start ;;
  stop) end "$PIDFILE" TERM 10 ;;
  kill) end "$PIDFILE" KILL ;;
  rotate) end "$PIDFILE" TERM 10; ROTATE=1 start ;;
  token) token "${2:-}" "${3:-}" ;;
  env)
    echo "OIDC_ISSUER=$OIDC_ISSUER"
    echo "OIDC_AUDIENCE=$OIDC_AUDIENCE"
    echo "OIDC_CLIENT_ID=n8n"
    echo "OIDC_CLIENT_SECRET=$(cat "$OIDC_STATE/secret")"
    echo "OIDC_STATE=$OIDC_STATE"
    echo "OIDC_PORT=$OIDC_PORT"
    ;;
  *) die "usage: oidc.sh install|start|stop|kill|rotate|env|token [SCOPE] [AUDIENCE]" ;;
esac
