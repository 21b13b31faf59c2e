#!/bin/bash
# PostgreSQL for tests/real/postgres: install|start|stop. The tests start clusters of their own, on free ports and in
# temporary folders, because they kill them (tests/real/postgres/cluster.rs): here is only the check that they can.
set -euo pipefail
cd "$(dirname "$0")/../../.."
. tests/real/servers/lib.sh

case ${1:-} in
  install)
    compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || [ -n "${DEALSCALE_POSTGRES_BIN:-}" ] \
      || die "there is no PostgreSQL: apt-get install postgresql, or set DEALSCALE_POSTGRES_BIN"
    # Certificates for the TLS test.
    command -v openssl >/dev/null || die "there is no openssl: apt-get install openssl"
    ;;
  start | stop) ;;
  *) die "usage: $0 install|start|stop" ;;
esac
