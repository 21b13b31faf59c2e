#!/bin/bash
# `make test-host`: the package on clean Debian hosts without a network (tests/host/host.sh), as an operator meets it.
#
#   run.sh [SUITE...]        bookworm and trixie unless named
#   DEALSCALE_DEBS=DIR       packages that were built before (DIR/*.deb and DIR/next/*.deb, the next version)
#   KEEP=1                   leaves the host up, with the package installed
#
# Each check is a line; the first line of a failed one's output follows it. Bounded: every wait has an end.
set -uo pipefail
cd "$(dirname "$0")"
. ../real/servers/lib.sh
export PATH="$HOME/.cargo/bin:$PATH"

SUITES=("$@")
[ $# -gt 0 ] || SUITES=(bookworm trixie)
PASSED=0 FAILED=0 BEGIN=$SECONDS
WORK=$(mktemp -d "${TMPDIR:-/tmp}/dealscale-host.XXXXXX")
RECEIVER=
finish() {
  local code=$?
  trap - EXIT INT TERM
  [ -z "$RECEIVER" ] || kill "$RECEIVER" 2>/dev/null
  for suite in "${SUITES[@]}"; do
    if [ -n "${KEEP:-}" ]; then say "left up: SUITE=$suite tests/host/host.sh run bash"; else SUITE=$suite ./host.sh down || true; fi
  done
  [ "$FAILED" != 0 ] || rm -rf "$WORK"
  exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

../real/servers/packages.sh build deb host || exit 1
if [ -z "${DEALSCALE_DEBS:-}" ]; then
  DEALSCALE_DEBS=$(realpath -m ../../target/deb)
  [ -n "$(ls "$DEALSCALE_DEBS"/dealscale_*.deb 2>/dev/null)" ] || ../../packaging/build.sh || exit 1
fi
# The next version: a build for tests (no release build, so that it is quick) whose on-disk format is one higher.
if [ -z "$(ls "$DEALSCALE_DEBS"/next/dealscale_*.deb 2>/dev/null)" ]; then
  # In the folder of everyday builds, whose dependencies it shares; moved away, so that nobody takes it for one of them.
  (cd ../.. && cargo build --locked --features next-format --bin dealscale) || exit 1
  mv ../../target/debug/dealscale "$WORK/next"
  DEB_BUILD_OPTIONS=noautodbgsym DEALSCALE_BINARY=$WORK/next DEALSCALE_VERSION=0.1.1 OUT=$DEALSCALE_DEBS/next ../../packaging/build.sh || exit 1
fi

h() { ./host.sh run "$1"; }

# check NAME LINE: a line for bash inside the host
check() {
  local out code=0 begin=$SECONDS
  out=$(timeout 120 ./host.sh run "set -e; $PRELUDE
$2" 2>&1) || code=$?
  verdict "$1" "$code" "$out" $((SECONDS - begin))
}

verdict() {
  if [ "$2" = 0 ]; then
    PASSED=$((PASSED + 1))
    printf 'ok    %s%s\n' "$1" "$([ "${4:-0}" -lt 5 ] || echo " ($4 s)")"
  else
    FAILED=$((FAILED + 1))
    printf 'FAIL  %s (%s)\n' "$1" "$2"
    sed 's/^/      | /' <<<"$3" | tail -n 25
  fi
}

# Helpers inside the host. `set -e` sees neither `! command` nor all but the last of `a && b`: hence `fails`, and one command a line.
PRELUDE='
fails() { if "$@" >/tmp/fails 2>&1; then cat /tmp/fails; echo "should have failed: $*"; return 1; fi; }
none() { if eval "$1"; then echo "should have failed: $1"; return 1; fi; }
active() { for unit; do systemctl -q is-active "$unit" || { echo "$unit is not active"; return 1; }; done; }
inactive() { for unit; do systemctl -q is-active "$unit" || continue; echo "$unit is active"; return 1; done; }
pid() { systemctl show -P MainPID dealscale; }
until_true() { for _ in $(seq "$1"); do ! eval "$2" || return 0; sleep 0.2; done; echo "not within $1 tries: $2"; return 1; }
publish() { curl -sS -m 20 -o /tmp/answer -w "%{http_code}" http://127.0.0.1:${PORT:-8000}/pulsar/publish -H "authorization: Bearer $(cat /root/token)" \
  -H "content-type: application/json" -d "{\"workflow\":\"w\",\"tenant_id\":\"default\",\"payload\":{\"mark\":\"$1\"}}"; }
accepts() { code=$(publish "$1"); [ "$code" = 202 ] || { echo "publish: $code"; cat /tmp/answer; return 1; }; }
errors() { journalctl -b -q -p err --no-pager --after-cursor="$(cat /root/cursor)" | grep -v -E "^-- " || true; }
mark() { journalctl -n 0 --show-cursor -q | sed -n "s/^-- cursor: //p" >/root/cursor; }
listeners() { ss -Hltn | tr -s " " | cut -d" " -f4 | sort; }
'

load() { # load NAME SECONDS RATE: in the background; its JSON is in $WORK/NAME.json
  ./host.sh net python3 "$PWD/load.py" 8000 "$(h 'cat /root/token')" "$2" "$3" "$WORK/$1.json" >"$WORK/$1.log" 2>&1 &
  LOAD=$!
}

judge() { # judge NAME: nothing failed, nothing lost, the gap
  local code=0 out
  wait "$LOAD" || { verdict "$1: the load ran" 1 "$(cat "$WORK/$1.log")"; return; }
  out=$(python3 - "$WORK/$1.json" "$WORK/marks-$SUITE" <<'PY'
import json, sys, time
told = json.load(open(sys.argv[1]))
for _ in range(150):
    missing = set(told["marks"]) - set(open(sys.argv[2]).read().split())
    if not missing:
        break
    time.sleep(0.2)
print(f"{told['accepted']} accepted of {told['sent']}, {told['failed']} failed, {len(missing)} lost, accept gap {told['gap']} s, "
      f"slowest {told['latency_max']:.3f} s, {told['kept_reopened']} kept connections reopened, {told['idle_closed']} idle ones closed, {told['polls']} polls answered")
for text in told["failures"]:
    print("  ", text)
enough = told["accepted"] >= 0.95 * told["sent"] and told["sent"] > 0
sys.exit(0 if enough and not told["failed"] and not missing and told["gap"] <= float(1.5) and told["polls"] > 0 else 1)
PY
) || code=$?
  verdict "$1: nothing failed, nothing lost, accept gap at most 1.5 s: $(head -n 1 <<<"$out")" "$code" "$out"
}

serve_repository() {
  rm -rf "$WORK/keys" "$WORK/repo"
  ../../packaging/repository/repository.sh key "$WORK/keys" 'dealscale test' >/dev/null 2>&1 &&
    ../../packaging/repository/repository.sh publish "$WORK/keys" "$WORK/repo" "$DEALSCALE_DEBS"/dealscale_*.deb >/dev/null || return 1
  tar -C "$WORK" -c repo | ./host.sh run 'tar -C /srv -x' &&
    ./host.sh put "$WORK/keys/dealscale.gpg" /usr/share/keyrings/dealscale.gpg &&
    h 'printf "Types: deb\nURIs: file:/srv/repo\nSuites: stable\nComponents: main\nSigned-By: /usr/share/keyrings/dealscale.gpg\n" >/etc/apt/sources.list.d/dealscale.sources'
}

host() {
  export SUITE=$1
  printf '\n==== Debian %s (after %d s)\n' "$SUITE" $((SECONDS - BEGIN))
  ./host.sh up || { verdict "the host boots" 1 ""; return; }
  : >"$WORK/marks-$SUITE"
  ./host.sh net python3 "$PWD/receiver.py" 5678 "$WORK/marks-$SUITE" >"$WORK/receiver.log" 2>&1 &
  RECEIVER=$!
  ./host.sh put "$DEALSCALE_DEBS"/dealscale_*.deb /root/now.deb
  ./host.sh put "$DEALSCALE_DEBS"/next/dealscale_*.deb /root/next.deb
  h "$PRELUDE mark"

  fresh || return
  hardening
  refusals
  addresses
  changing_over
  [ -n "${KEEP:-}" ] || leaving
  [ -n "${KEEP:-}" ] || ./host.sh down
  kill "$RECEIVER" 2>/dev/null
  RECEIVER=
}

fresh() {
  # A second address shows what is open beyond loopback.
  h 'ip link add out0 type veth peer name out1 && ip address add 192.0.2.1/24 dev out0 && ip link set out0 up && ip link set out1 up' || true
  serve_repository; verdict "a signed repository is made" $? ""
  check "apt refuses the repository with another key" '
    cp /usr/share/keyrings/debian-archive-keyring.gpg /usr/share/keyrings/dealscale.gpg.wrong
    sed "s/dealscale.gpg/dealscale.gpg.wrong/" /etc/apt/sources.list.d/dealscale.sources >/tmp/wrong.sources
    fails apt-get update -o APT::Get::List-Cleanup=0 -o Dir::Etc::sourcelist=/tmp/wrong.sources -o Dir::Etc::sourceparts=- -o APT::Update::Error-Mode=any'
  check "apt update && apt install dealscale, from the signed repository" '
    apt-get update -o APT::Get::List-Cleanup=0 -o Dir::Etc::sourcelist=/etc/apt/sources.list.d/dealscale.sources -o Dir::Etc::sourceparts=- -o APT::Update::Error-Mode=any
    apt-get install -y dealscale'
  h 'test -x /usr/bin/dealscale' || { say "not installed: the rest would only repeat it"; return 1; }
  check "the service runs, enabled, with both sockets" '
    active dealscale.service dealscale-bridge.socket dealscale-health.socket
    for unit in dealscale.service dealscale-bridge.socket dealscale-health.socket; do systemctl is-enabled $unit; done'
  check "nothing is open beyond loopback" '
    listeners
    [ "$(listeners | grep -c -E "^127\.0\.0\.1:(8000|8081)$")" = 2 ]
    none "listeners | grep -v -E \"^(127\.0\.0\.1|\[::1\]):\""
    fails curl -sS -m 3 http://192.0.2.1:8000/
    fails curl -sS -m 3 http://192.0.2.1:8081/healthz
    curl -sS -m 5 -o /dev/null http://127.0.0.1:8000/'
  check "no credential: a publish without or with any token is 401" '
    for token in "" "Bearer admin" "Bearer dealscale"; do
      code=$(curl -sS -o /dev/null -w "%{http_code}" http://127.0.0.1:8000/pulsar/publish -H "authorization: $token" -H "content-type: application/json" -d "{\"workflow\":\"w\",\"payload\":1}")
      [ "$code" = 401 ] || { echo "$code for $token"; exit 1; }
    done'
  check "journal, systemctl status and dealscale status say what to do next" '
    journalctl -u dealscale --no-pager | grep "dealscale token"
    until_true 75 "systemctl status dealscale --no-pager | grep -q \"Status:.*dealscale token\""
    dealscale status | grep "dealscale token"'
  check "owners and modes are as docs/adr/0010 says" '
    while read -r path want; do [ "$(stat -c "%U:%G:%a" "$path")" = "$want" ] || { echo "$path $(stat -c "%U:%G:%a" "$path"), not $want"; bad=1; }; done <<END
/etc/dealscale root:dealscale:750
/etc/dealscale/dealscale.toml root:dealscale:640
/etc/dealscale/conf.d root:dealscale:750
/etc/dealscale/secrets root:dealscale:750
/var/lib/dealscale dealscale:dealscale:750
/var/log/dealscale dealscale:dealscale:750
/run/dealscale dealscale:dealscale-admin:2755
/run/dealscale/admin.sock dealscale:dealscale-admin:660
END
    [ -z "${bad:-}" ]'
  check "man page, completions, templates and licences are there" '
    for file in /usr/share/bash-completion/completions/dealscale /usr/share/zsh/vendor-completions/_dealscale /usr/share/fish/vendor_completions.d/dealscale.fish \
      /usr/share/dealscale/migrations/sqlite /usr/share/dealscale/n8n/templates/receive.json; do test -s $file || { echo no $file; exit 1; }; done
    dpkg -L dealscale | grep -q man1/dealscale.1.gz
    dpkg -L dealscale | grep -q third-party-licences.txt'
  check "an account, n8n by name (DNS under the sandbox), then an event reaches it" '
    dealscale token workflows >/tmp/token
    sed -n "s/^ *\(ds_.*\)/\1/p" /tmp/token >/root/token
    { sed -n "/^ *\[accounts/,/^ *rights/p" /tmp/token; printf "[environments.production.n8n]\nurl = \"http://receiver.test:5678\"\n"; } >/etc/dealscale/conf.d/10-host.toml
    chown root:dealscale /etc/dealscale/conf.d/10-host.toml
    chmod 0640 /etc/dealscale/conf.d/10-host.toml
    systemctl restart dealscale
    accepts first
    id=$(sed -n "s/.*\"execution_id\":\"\([^\"]*\)\".*/\1/p" /tmp/answer); echo $id >/root/first
    until_true 100 "dealscale --json executions show $id --tenant default | grep -q delivered"'
  grep -qx first "$WORK/marks-$SUITE"; verdict "the receiver has it" $? ""
  check "an operator of the group dealscale-admin operates; others do not" '
    useradd -G dealscale-admin ola; useradd bob
    runuser -u ola -- dealscale --json executions show $(cat /root/first) --tenant default | grep -q delivered
    fails runuser -u bob -- dealscale status
    fails runuser -u bob -- cat /etc/dealscale/dealscale.toml
    fails runuser -u ola -- cat /etc/dealscale/dealscale.toml'
  check "it logs nothing worse than a warning, and nothing failed" '
    [ -z "$(errors)" ] || { errors; exit 1; }
    [ -z "$(systemctl --failed --no-legend)" ] || { systemctl --failed; exit 1; }'
  return 0
}

hardening() {
  check "systemd-analyze security: the service at most 1.5" '
    systemd-analyze security --no-pager dealscale.service | tail -n 1
    systemd-analyze security --threshold=15 dealscale.service >/dev/null'
  check "no capability, no new privileges, seccomp, a read-only root" '
    [ "$(grep -c -E "^(CapPrm|CapEff|CapBnd|CapAmb):\s0+$" /proc/$(pid)/status)" = 4 ]
    grep -qE "^NoNewPrivs:\s1" /proc/$(pid)/status
    grep -qE "^Seccomp:\s2" /proc/$(pid)/status
    [ "$(stat -c %U /proc/$(pid))" = dealscale ]
    grep -E " / / ro," /proc/$(pid)/mountinfo'
  check "limits are in force" '
    # Descriptors: 65536, or what this machine allows at most.
    most=$(sed -n "s/^Max open files *[0-9]* *\([0-9]*\) .*/\1/p" /proc/1/limits)
    [ "$most" -le 65536 ] || most=65536
    grep -E "^Max open files +$most +$most" /proc/$(pid)/limits
    cat /sys/fs/cgroup/pids/system.slice/dealscale.service/pids.max /sys/fs/cgroup/system.slice/dealscale.service/pids.max 2>/dev/null | grep -x 512'
  check "a memory limit in force kills the process and it is started again" '
    mkdir -p /run/systemd/system/dealscale.service.d
    printf "[Service]\nMemoryMax=4M\nMemorySwapMax=0\n" >/run/systemd/system/dealscale.service.d/limit.conf
    systemctl daemon-reload
    systemctl restart dealscale || true
    until_true 50 "[ \$(systemctl show -P NRestarts dealscale) -ge 2 ]"
    rm -r /run/systemd/system/dealscale.service.d
    systemctl daemon-reload
    until_true 50 "systemctl -q is-active dealscale"
    accepts after-the-limit'
  check "units are well-formed" '
    # A minimal host has no man.
    systemd-analyze verify /lib/systemd/system/dealscale* >/tmp/verify 2>&1 || true
    none "grep -i dealscale /tmp/verify | grep -v \"man dealscale\""'
  check "polkit: the service user starts and stops n8n's units and nothing else" '
    printf "[Service]\nExecStart=/bin/sleep 1000\n" | tee /etc/systemd/system/dealscale-n8n@.service >/etc/systemd/system/dealscale-n8n-worker@.service
    printf "[Service]\nExecStart=/bin/sleep 1000\n" >/etc/systemd/system/other.service
    systemctl daemon-reload
    as() { runuser -u dealscale -- "$@" </dev/null; }
    as systemctl start dealscale-n8n@production.service dealscale-n8n-worker@production-1.service
    active dealscale-n8n@production.service dealscale-n8n-worker@production-1.service
    as systemctl stop dealscale-n8n@production.service dealscale-n8n-worker@production-1.service
    inactive dealscale-n8n@production.service dealscale-n8n-worker@production-1.service
    refused() { fails as "$@"; }
    refused systemctl start other.service
    refused systemctl restart systemd-journald.service
    refused systemctl stop dbus.service
    refused systemctl stop dealscale.service
    refused systemctl enable dealscale-n8n@production.service
    refused systemctl set-property dealscale-n8n@production.service CPUQuota=1%
    refused systemctl kill dealscale-n8n@production.service
    refused systemd-run /bin/true
    refused systemd-run --unit=dealscale-n8n@evil.service /bin/true
    refused systemctl start "dealscale-n8n@../evil.service"
    refused systemctl daemon-reload
    refused systemctl reboot'
  check "polkit: openssh is refused as well" '
    apt-get install -y openssh-server >/dev/null
    active ssh.service
    fails runuser -u dealscale -- systemctl stop ssh.service </dev/null
    active ssh.service'
  check "a credential of /etc/credstore reaches the configuration; without it the start did not fail" '
    mkdir -p -m 0700 /etc/credstore
    head -c 32 /dev/urandom | od -An -tx1 | tr -d " \n" >/etc/credstore/dealscale.state-key
    systemctl restart dealscale
    nsenter -t $(pid) -m -- test -s /run/credentials/dealscale.service/dealscale.state-key
    rm /etc/credstore/dealscale.state-key
    systemctl restart dealscale
    active dealscale'
}

refusals() {
  check "a reload that is refused fails with its reasons; the old configuration goes on" '
    before=$(pid)
    printf "[bridge]\nbody_bytes_max = \"oops\"\n" >/etc/dealscale/conf.d/90-bad.toml
    fails systemctl reload dealscale
    journalctl -u dealscale --no-pager -n 20 | grep "bridge.body_bytes_max"
    [ "$(pid)" = "$before" ]
    active dealscale
    accepts after-a-refused-reload'
  check "bad configuration: exit 78, the reason in the journal, no restart" '
    fails systemctl restart dealscale
    [ "$(systemctl show -P ExecMainStatus dealscale)" = 78 ]
    journalctl -u dealscale --no-pager -n 20 -p err | grep "bridge.body_bytes_max"
    systemctl status dealscale --no-pager | grep "Status:.*dealscale check"
    sleep 3
    [ "$(systemctl show -P NRestarts dealscale)" = 0 ]
    [ "$(systemctl show -P ActiveState dealscale)" = failed ]'
  # Alone among a thousand connections: the sockets are open, the service is not running yet.
  h 'systemctl reset-failed dealscale; systemctl start dealscale-bridge.socket dealscale-health.socket; journalctl -n 0 --show-cursor -q | sed -n "s/^-- cursor: //p" >/root/bad'
  timeout 60 ./host.sh net python3 "$PWD/knock.py" 8000 1000 >"$WORK/refused"; verdict "a thousand connections to it end ($(cat "$WORK/refused") refused)" $? ""
  check "they started it once, not a thousand times" '
    sleep 2
    starts=$(journalctl -q --no-pager --after-cursor="$(cat /root/bad)" _PID=1 | grep -c "Starting dealscale.service") || true
    echo "$starts starts"
    [ "$starts" -ge 1 ]
    [ "$starts" -le 2 ]
    inactive dealscale.service dealscale-bridge.socket dealscale-health.socket
    fails systemctl is-failed dealscale-bridge.socket dealscale-health.socket'
  check "corrected and started: all sockets answer, nothing failed" '
    rm /etc/dealscale/conf.d/90-bad.toml
    systemctl start dealscale
    accepts corrected
    curl -sSf -m 5 http://127.0.0.1:8081/readyz >/dev/null
    active dealscale-bridge.socket dealscale-health.socket
    [ -z "$(systemctl --failed --no-legend)" ] || { systemctl --failed; exit 1; }'
  check "systemctl stop is a stop: a connection does not start it again" '
    systemctl stop dealscale
    until_true 25 "! systemctl -q is-active dealscale-bridge.socket"
    fails curl -sS -m 3 http://127.0.0.1:8000/
    sleep 0.5
    inactive dealscale
    systemctl start dealscale
    accepts started-again'
  check "a failed start waits longer each time, and starts by itself when the cause is gone" '
    mv /var/lib/dealscale/production /var/lib/dealscale/aside; touch /var/lib/dealscale/production
    systemctl restart dealscale || true
    until_true 60 "[ \"\$(cat /run/dealscale/failed-starts 2>/dev/null)\" -ge 3 ]"
    systemctl show -P StatusText dealscale | grep "the start failed"
    [ "$(systemctl show -P NRestarts dealscale)" -le 5 ]
    rm /var/lib/dealscale/production; mv /var/lib/dealscale/aside /var/lib/dealscale/production
    until_true 100 "systemctl -q is-active dealscale"
    accepts after-failed-starts
    fails test -e /run/dealscale/failed-starts'
  check "a taken port degrades one listener and fails nothing" '
    systemctl stop dealscale; until_true 25 "! systemctl -q is-active dealscale-health.socket"
    cat >/tmp/taken.socket <<END
[Socket]
ListenStream=127.0.0.1:8081
Accept=yes
END
    cp /tmp/taken.socket /etc/systemd/system/taken.socket; printf "[Service]\nExecStart=/bin/true\n" >/etc/systemd/system/taken@.service
    systemctl daemon-reload; systemctl start taken.socket
    systemctl start dealscale
    accepts port-taken
    dealscale status >/tmp/status || true
    grep "cannot listen on 127.0.0.1:8081" /tmp/status
    systemctl stop taken.socket
    until_true 50 "curl -sf -m 2 http://127.0.0.1:8081/healthz >/dev/null"
    rm /etc/systemd/system/taken*; systemctl daemon-reload; systemctl restart dealscale; systemctl reset-failed'
  check "the watchdog starts a stopped process again (WatchdogSec=30s)" '
    before=$(systemctl show -P NRestarts dealscale); kill -STOP $(pid)
    until_true 300 "[ \$(systemctl show -P NRestarts dealscale) -gt $before ] && systemctl -q is-active dealscale"
    journalctl -u dealscale --no-pager -n 50 | grep -i "watchdog timeout"
    accepts after-the-watchdog'
}

addresses() {
  h "$PRELUDE mark"
  check "check names an address that systemd does not have; config apply brings it" '
    printf "[bridge]\nlisten = \"127.0.0.1:9000\"\n" >/etc/dealscale/conf.d/20-address.toml
    dealscale check 2>&1 | grep "config apply"
    systemctl restart dealscale
    dealscale status >/tmp/status || true
    grep "the configuration says 127.0.0.1:9000" /tmp/status
    accepts old-address
    dealscale config apply
    PORT=9000 accepts new-address
    listeners | grep -x 127.0.0.1:9000
    none "listeners | grep -x 127.0.0.1:8000"
    none "dealscale check 2>&1 | grep \"config apply\""
    fails runuser -u dealscale -- dealscale config apply'
  check "and takes it back" '
    rm /etc/dealscale/conf.d/20-address.toml
    dealscale config apply
    accepts address-back
    fails test -e /etc/systemd/system/dealscale-bridge.socket.d/50-dealscale.conf
    none "listeners | grep -x 127.0.0.1:9000"'
  ./host.sh reboot; verdict "the host boots again" $? ""
  kill "$RECEIVER" 2>/dev/null
  ./host.sh net python3 "$PWD/receiver.py" 5678 "$WORK/marks-$SUITE" >"$WORK/receiver.log" 2>&1 &
  RECEIVER=$!
  check "after a reboot it serves, with all that it knew" '
    until_true 50 "systemctl -q is-active dealscale"
    dealscale --json executions show $(cat /root/first) --tenant default | grep -q delivered
    accepts after-reboot
    [ -z "$(systemctl --failed --no-legend)" ] || { systemctl --failed; exit 1; }'
}

changing_over() {
  h "$PRELUDE mark"
  load "restart-$SUITE" 8 300
  sleep 2
  check "systemctl restart under load" 'systemctl restart dealscale'
  judge "restart-$SUITE"
  h 'echo "# edited by an operator" >>/etc/dealscale/dealscale.toml'
  load "upgrade-$SUITE" 25 300
  sleep 2
  check "upgrade under 300 publishes a second" '
    old=$(pid)
    apt-get install -y -o Dpkg::Options::=--force-confold /root/next.deb
    [ "$(dpkg-query -W -f "\${Version}" dealscale)" = 0.1.1 ]
    [ "$(pid)" != "$old" ]
    active dealscale'
  judge "upgrade-$SUITE"
  check "the upgrade kept the edited configuration, the state and the sockets" '
    tail -n 1 /etc/dealscale/dealscale.toml | grep -x "# edited by an operator"
    [ "$(stat -c "%U:%G:%a" /etc/dealscale/dealscale.toml)" = root:dealscale:640 ]
    dealscale --json executions show $(cat /root/first) --tenant default | grep -q delivered'
  check "no error in the journal through restart and upgrade" '[ -z "$(errors)" ] || { errors; exit 1; }'
  check "downgrade by one step works, with all that was known" '
    apt-get install -y --allow-downgrades -o Dpkg::Options::=--force-confold /root/now.deb
    [ "$(dpkg-query -W -f "\${Version}" dealscale)" = 0.1.0 ]
    active dealscale
    dealscale --json executions show $(cat /root/first) --tenant default | grep -q delivered
    accepts downgraded'
  check "an upgrade onto a bad configuration: apt says why, the old process goes on" '
    old=$(pid)
    printf "[bridge]\nbody_bytes_max = \"oops\"\n" >/etc/dealscale/conf.d/90-bad.toml
    apt-get install -y -o Dpkg::Options::=--force-confold /root/next.deb >/tmp/apt 2>&1 || { cat /tmp/apt; exit 1; }
    grep "bridge.body_bytes_max" /tmp/apt
    grep "NOT restarted" /tmp/apt
    [ "$(pid)" = "$old" ]
    accepts old-process
    rm /etc/dealscale/conf.d/90-bad.toml
    systemctl restart dealscale
    accepts new-process'
  check "after state finalize the version before refuses the state, untouched, and says why" '
    dealscale state finalize | grep "format 2 now"
    accepts finalized
    apt-get install -y --allow-downgrades -o Dpkg::Options::=--force-confold /root/now.deb >/tmp/apt 2>&1 || { cat /tmp/apt; exit 1; }
    until_true 50 "systemctl show -P StatusText dealscale | grep \"has format 2, this release reads 1 to 1\""
    inactive dealscale
    none "ls -d /var/lib/dealscale/production/outbox.corrupt*"'
  check "the version that wrote it goes on with it" '
    apt-get install -y -o Dpkg::Options::=--force-confold /root/next.deb >/tmp/apt 2>&1 || { cat /tmp/apt; exit 1; }
    until_true 50 "systemctl -q is-active dealscale"
    accepts with-the-new-format
    dealscale --json executions show $(cat /root/first) --tenant default | grep -q delivered'
}

leaving() {
  check "remove stops it, closes the sockets and keeps configuration and state" '
    apt-get remove -y dealscale >/tmp/apt 2>&1 || { cat /tmp/apt; exit 1; }
    inactive dealscale.service dealscale-bridge.socket dealscale-health.socket
    none "listeners | grep -E \":(8000|8081)\$\""
    test -s /etc/dealscale/dealscale.toml
    test -d /var/lib/dealscale/production/outbox
    grep "are kept" /tmp/apt'
  check "installed again it goes on with them" '
    apt-get install -y /root/next.deb >/tmp/apt 2>&1 || { cat /tmp/apt; exit 1; }
    active dealscale
    dealscale --json executions show $(cat /root/first) --tenant default | grep -q delivered'
  check "purge deletes everything and says so" '
    apt-get purge -y dealscale >/tmp/apt 2>&1 || { cat /tmp/apt; exit 1; }
    grep "purging deletes" /tmp/apt
    for path in /etc/dealscale /var/lib/dealscale /var/log/dealscale /run/dealscale /usr/bin/dealscale; do fails test -e $path; done
    [ -z "$(find /etc/systemd /lib/systemd/system /var/lib/systemd -name "dealscale*" ! -name "dealscale-n8n*")" ] || { find /etc/systemd /lib/systemd /var/lib/systemd -name "dealscale*"; exit 1; }
    [ -z "$(systemctl --failed --no-legend)" ] || { systemctl --failed; exit 1; }'
  check "a fresh installation does not fail because its port is taken, and takes it when it is free" '
    printf "[Socket]\nListenStream=127.0.0.1:8000\nAccept=yes\n" >/run/systemd/system/taken.socket
    printf "[Service]\nExecStart=/bin/true\n" >/run/systemd/system/taken@.service
    systemctl daemon-reload
    systemctl start taken.socket
    apt-get install -y /root/now.deb >/tmp/apt 2>&1 || { cat /tmp/apt; exit 1; }
    grep "is its port in use" /tmp/apt
    active dealscale.service dealscale-health.socket
    until_true 75 "systemctl show -P StatusText dealscale | grep -q \"cannot listen on 127.0.0.1:8000\""
    systemctl stop taken.socket
    until_true 50 "curl -s -m 2 -o /dev/null http://127.0.0.1:8000/"
    systemctl restart dealscale
    active dealscale.service dealscale-bridge.socket dealscale-health.socket
    [ -z "$(systemctl --failed --no-legend)" ] || { systemctl --failed; exit 1; }'
}

for suite in "${SUITES[@]}"; do host "$suite"; done
printf '\n==== hosts: %d passed, %d failed, after %d s\n' "$PASSED" "$FAILED" $((SECONDS - BEGIN))
[ "$FAILED" = 0 ]
