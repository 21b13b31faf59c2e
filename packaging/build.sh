#!/bin/bash
# `make deb`: builds the packages of this checkout into target/deb, checks them, and prints where they are.
#
#   build.sh              build (release), lint, size
#   build.sh --again      packages once more from the same binary and compares the bytes
#   build.sh --twice      compiles twice from nothing and compares the bytes (about 20 minutes on two cores)
#   DEALSCALE_BINARY, DEALSCALE_VERSION as in debian/rules; OUT another folder
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/real/servers/lib.sh
export PATH="$HOME/.cargo/bin:$PATH"
OUT=$(realpath -m "${OUT:-target/deb}")
# The promise of the project: small enough for the smallest machine's link.
BYTES_MAX=$((15 << 20))

build() {
  mkdir -p "$1"
  rm -rf "$1"/*.deb "$1/next" "$1/again"
  # In a terminal's locale and umask nothing of the caller's shows in the package.
  (umask 022; LC_ALL=C.UTF-8 DEALSCALE_OUT=$1 debian/rules clean >"$1/build.log" 2>&1 &&
    LC_ALL=C.UTF-8 DEALSCALE_OUT=$1 debian/rules binary >>"$1/build.log" 2>&1) ||
    { tail -n 40 "$1/build.log" >&2; die "the package was not built; the whole log: $1/build.log"; }
  LC_ALL=C.UTF-8 debian/rules clean >/dev/null 2>&1
}

same() {
  local file
  for file in "$1"/*.deb; do
    cmp "$file" "$2/$(basename "$file")" || die "not reproducible: $(basename "$file") differs between $1 and $2"
  done
  say "reproducible: the same bytes twice ($(cd "$1" && sha256sum *.deb | cut -c1-16 | paste -sd' '))"
}

check() {
  local deb bytes
  for deb in "$OUT"/dealscale_*.deb; do
    bytes=$(stat -c %s "$deb")
    [ "$bytes" -le $BYTES_MAX ] || [ -n "${DEALSCALE_BINARY:-}" ] || die "$deb has $bytes bytes, $BYTES_MAX are allowed"
    say "$deb: $((bytes / 1024)) KiB"
  done
  lintian --fail-on error,warning "$OUT"/dealscale_*.deb >&2 || die "lintian is not content"
}

tests/real/servers/packages.sh build deb
case ${1:-} in
  '') build "$OUT"; check ;;
  --again)
    [ -n "$(ls "$OUT"/dealscale_*.deb 2>/dev/null)" ] || { build "$OUT"; check; }
    build "$OUT/again"
    same "$OUT" "$OUT/again"
    rm -r "$OUT/again"
    ;;
  --twice)
    rm -rf target/package
    build "$OUT"
    check
    rm -rf target/package
    build "$OUT/again"
    same "$OUT" "$OUT/again"
    ;;
  *) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
