#!/bin/bash
# What the build and the tests need of the system, installed only where it is missing.
#
#   packages.sh [GROUP...]     groups: build test n8n postgres pulsar lint   (default: build test)
#
# Debian 12 or 13 with apt-get, root or sudo. The Rust toolchain comes from rustup when `cargo` is missing.
set -euo pipefail
cd "$(dirname "$0")" && . ./lib.sh

RUST_MIN=1.95

declare -A PACKAGES=(
  [build]="ca-certificates curl gcc g++ make cmake pkg-config protobuf-compiler libsystemd-dev"
  [test]="ca-certificates curl python3 procps"
  [n8n]="ca-certificates curl python3 g++ make procps"   # the compiler builds n8n's SQLite driver
  [postgres]="postgresql-15"
  [pulsar]="curl openjdk-17-jre-headless"
  [lint]="python3 python3-venv"
)

missing() {
  local package
  for package in $*; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || printf '%s ' "$package"
  done
}

install_packages() {
  local wanted=() group list
  for group in "$@"; do
    [ -n "${PACKAGES[$group]:-}" ] || die "no such group of packages: $group (known: ${!PACKAGES[*]})"
    list=${PACKAGES[$group]}
    # Debian 13 has the next major version of PostgreSQL and of Java.
    if [ "$(. /etc/os-release && echo "${VERSION_ID:-}")" = 13 ]; then
      list=${list/postgresql-15/postgresql-17}; list=${list/openjdk-17/openjdk-21}
    fi
    # A server from elsewhere (pgdg, another JDK) serves as well.
    [ "$group" = postgres ] && compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null && continue
    [ "$group" = pulsar ] && command -v java >/dev/null && list=curl
    # shellcheck disable=SC2206
    wanted+=($(missing $list))
    # npm: any will do (NodeSource's package is called nodejs and brings it along).
    [ "$group" = n8n ] && ! command -v npm >/dev/null && wanted+=(npm)
  done
  [ ${#wanted[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || die "please install: ${wanted[*]} (there is no apt-get here)"
  say "installing Debian packages: ${wanted[*]}"
  local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 -qq)
  # The lists are old or absent on a fresh machine; a second try follows an update.
  if ! as_root "${apt[@]}" install -y --no-install-recommends "${wanted[@]}" </dev/null >/dev/null 2>&1; then
    as_root "${apt[@]}" update </dev/null
    as_root "${apt[@]}" install -y --no-install-recommends "${wanted[@]}" </dev/null >/dev/null
  fi
}

# Debian 12's own Rust is too old for edition 2024.
install_rust() {
  export PATH="$HOME/.cargo/bin:$PATH"
  local have
  if command -v cargo >/dev/null && have=$(rustc --version 2>/dev/null | cut -d' ' -f2) &&
    [ "$(printf '%s\n' "$RUST_MIN" "$have" | sort -V | head -n1)" = "$RUST_MIN" ]; then
    return 0
  fi
  if command -v rustup >/dev/null; then
    say "Rust $RUST_MIN or newer is needed (found ${have:-none}): rustup gets it"
    rustup toolchain install stable --profile minimal --component clippy,rustfmt
    rustup default stable
    return 0
  fi
  say "no Rust toolchain: getting one with rustup into ~/.cargo and ~/.rustup"
  local installer
  installer=$(mktemp)
  curl --proto '=https' --tlsv1.2 -fsS https://sh.rustup.rs -o "$installer" ||
    { rm -f "$installer"; die "cannot reach rustup; install Rust $RUST_MIN or newer by hand and run this again"; }
  sh "$installer" -y --no-modify-path --profile minimal --component clippy,rustfmt
  rm -f "$installer"
}

groups=("$@")
[ $# -gt 0 ] || groups=(build test)
install_packages "${groups[@]}"
for group in "${groups[@]}"; do
  if [ "$group" = build ]; then install_rust; fi
done
