#!/bin/bash
# Fuzzes a running bridge against the OpenAPI document that it serves.
#
#   schemathesis.sh install
#   schemathesis.sh run URL TOKEN KNOWN [OPTION...]   KNOWN: a file with more of schemathesis' settings (ids that exist), or
#                                                     /dev/null; options go to schemathesis (--max-examples 500, --seed N)
#
# schemathesis comes from PyPI into a venv of its own in the cache. Fails on the first kind of answer that the document does
# not know, on a wrong content type or schema, on 5xx, on rubbish that was accepted, and on a request without a right token
# that was answered.
set -euo pipefail
cd "$(dirname "$0")" && . servers/lib.sh

SCHEMATHESIS_VERSION=4.32.5
VENV=$CACHE/schemathesis-$SCHEMATHESIS_VERSION

install() {
  [ -e "$VENV/.complete" ] && return 0
  python3 -m venv "$VENV"
  with_progress "pip: schemathesis $SCHEMATHESIS_VERSION" "$VENV/install.log" \
    "$VENV/bin/pip" install --disable-pip-version-check "schemathesis==$SCHEMATHESIS_VERSION"
  touch "$VENV/.complete"
}

case "${1:-}" in
  install) locked schemathesis install ;;
  run)
    locked schemathesis install
    url=$2 token=$3 known=$(realpath "$4")
    shift 4
    # One worker: two threads of Python before 3.12 disturb each other's parser ("AST constructor recursion depth mismatch").
    # A 403 for a tenant that is not declared, a 404 for an id that is made up, and the like are right answers to
    # requests that fit the schema.
    cd "$(mktemp -d)"
    cat - "$known" >schemathesis.toml <<TOML
[headers]
Authorization = "Bearer $token"
[checks]
positive_data_acceptance.expected-statuses = ["2xx", "400", "401", "403", "404", "409", "422"]
# A batch is refused item by item; a long poll may last bridge.wait_max.
negative_data_rejection.expected-statuses = ["207", "400", "401", "403", "404", "405", "406", "408", "409", "413", "415", "422", "429", "5xx"]
max_response_time = 70.0
# Only so many replays run at once; the others are told to come again (503 with Retry-After).
[[operations]]
include-path = "/dead-letters/replay"
checks.not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "503"]
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "401", "403", "503"]
TOML
    "$VENV/bin/schemathesis" --config-file schemathesis.toml run "$url/openapi.json" \
      --checks all --max-examples 60 --workers 1 --request-timeout 90 "$@"
    ;;
  *) die "usage: schemathesis.sh install | run URL TOKEN KNOWN [OPTION...]" ;;
esac
