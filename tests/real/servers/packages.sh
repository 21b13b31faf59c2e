#!/bin/bash
# What the build and the tests need of the system, installed only where it is missing.
#
#   packages.sh [GROUP...]     groups: build test n8n postgres pulsar otlp lint deb host   (default: build test)
#
# Debian 12 or 13 with apt-get, root or sudo. The Rust toolchain comes from rustup when `cargo` is missing.
set -euo pipefail
cd "$(dirname "$0")" && . ./lib.sh

# The oldest that builds it, and the one that is fetched where there is none: lints differ between versions.
RUST_MIN=1.95.0

declare -A PACKAGES=(
  [build]="ca-certificates curl gcc g++ make cmake pkg-config protobuf-compiler libsystemd-dev"
  [test]="ca-certificates curl python3 procps"
  [n8n]="ca-certificates curl python3 g++ make procps"   # the compiler builds n8n's SQLite driver
  [postgres]="postgresql-15"
  [pulsar]="curl openssl maven openjdk-17-jre-headless python3-venv"
  [otlp]="curl python3 python3-venv"
  [lint]="python3 python3-venv"
  [deb]="dpkg-dev debhelper fakeroot lintian apt-utils gnupg"
  [host]="mmdebstrap python3 iproute2 util-linux"
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
      list=${list/postgresql-15/postgresql-17}
      command -v java >/dev/null || list=${list/openjdk-17/openjdk-21}
    fi
    # A server from elsewhere (pgdg, another JDK) serves as well.
    [ "$group" = postgres ] && compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null && continue
    [ "$group" = pulsar ] && command -v java >/dev/null && list=${list/ openjdk-17-jre-headless/}
    [ "$group" = pulsar ] && command -v mvn >/dev/null && list=${list/ maven/}
    # shellcheck disable=SC2206
    wanted+=($(missing $list))
    # npm: any will do (NodeSource's package is called nodejs and brings it along).
    [ "$group" = n8n ] && ! command -v npm >/dev/null && wanted+=(npm)
  done
  [ ${#wanted[@]} -gt 0 ] || return 0
  mapfile -t wanted < <(printf '%s\n' "${wanted[@]}" | sort -u)
  command -v apt-get >/dev/null || die "please install: ${wanted[*]} (there is no apt-get here)"
  if [ "$(id -u)" != 0 ] && ! { command -v sudo >/dev/null && sudo -v; }; then
    die "these Debian packages are missing, and installing them needs root (there is no sudo, or it refused). As root run:
  apt-get update && apt-get install -y --no-install-recommends ${wanted[*]}
and then the same command again"
  fi
  say "installing Debian packages: ${wanted[*]}"
  local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
  # The lists are absent on a fresh machine, or too old: a second try follows an update.
  if ! compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null; then as_root "${apt[@]}" -qq update </dev/null; fi
  install_wanted && return 0
  say "once more, with new package lists"
  as_root "${apt[@]}" -qq update </dev/null
  install_wanted || die "apt-get could not install: ${wanted[*]}"
}

# One line per package that is fetched or set up; errors as they are. Of `install_packages`.
install_wanted() {
  as_root "${apt[@]}" -q install -y --no-install-recommends "${wanted[@]}" </dev/null |
    { grep --line-buffered -E '^(Get:|Setting up|E:)' || true; } | cut -c1-100 | sed -u 's/^/   /' >&2
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
    rustup toolchain install "$RUST_MIN" --profile minimal --component clippy,rustfmt
    # For this checkout only.
    (cd ../../.. && rustup override set "$RUST_MIN")
    return 0
  fi
  say "no Rust toolchain: getting one with rustup into ~/.cargo and ~/.rustup"
  local dir from
  dir=$(mktemp -d)
  # Where https://sh.rustup.rs would get it from.
  from=https://static.rust-lang.org/rustup/dist/$(uname -m)-unknown-linux-gnu
  curl --proto '=https' --tlsv1.2 -fsS "$from/rustup-init" -o "$dir/rustup-init" &&
    curl --proto '=https' --tlsv1.2 -fsS "$from/rustup-init.sha256" -o "$dir/sum" ||
    { rm -rf "$dir"; die "cannot reach rustup at $from; install Rust $RUST_MIN or newer by hand and run this again"; }
  [ "$(sha256sum <"$dir/rustup-init" | cut -d' ' -f1)" = "$(cut -d' ' -f1 "$dir/sum")" ] || die "rustup-init came damaged; try again"
  chmod +x "$dir/rustup-init"
  "$dir/rustup-init" -y -q --no-modify-path --profile minimal --component clippy,rustfmt --default-toolchain "$RUST_MIN"
  rm -rf "$dir"
}

groups=("$@")
[ $# -gt 0 ] || groups=(build test)
install_packages "${groups[@]}"
for group in "${groups[@]}"; do
  if [ "$group" = build ]; then install_rust; fi
done
