#!/bin/bash
# A real Apache Pulsar on loopback: broker, bookie (journal synced) and metadata in one process.
#
#   pulsar.sh install         from Maven Central into the cache: 245 MB, about two minutes, once
#   pulsar.sh start           starts it and waits until it is healthy (10 to 30 s)
#   pulsar.sh stop | kill     by the pid that `start` wrote down; `kill` is KILL, as a crash
#   pulsar.sh wipe            removes its data; only while it is stopped
#   pulsar.sh token SUBJECT   a JWT for that role, which does not expire
#   pulsar.sh env             where it is, for the tests
#
# By environment:
#   PULSAR_STATE                        folder of everything that changes   (default .state/pulsar of the checkout)
#   PULSAR_PORT, PULSAR_HTTP_PORT, PULSAR_TLS_PORT, PULSAR_BOOKIE_PORT      (default 26650 to 26653)
#   PULSAR_CONF                         a file with further settings of the broker
#
# One broker serves every kind of authentication: a client without credentials is the role `anonymous`, which may do
# everything here, and so may `admin`; a client with a token is the token's subject, and a token with a wrong signature is
# refused. Tokens are RS256, checked with `token.pub`: what a broker is given of an OAuth2 issuer. In PULSAR_STATE: `ca.pem` (private CA of the TLS port),
# `token.key` and `token.pub` (PEM), `pulsar.log`, `pulsar.pid`, `data/`.
set -euo pipefail
cd "$(dirname "$0")" && . ./lib.sh

PULSAR_VERSION=4.0.8
DIST=$CACHE/pulsar/$PULSAR_VERSION
WORKER=$CACHE/pulsar/worker-venv
BASE=${DEALSCALE_TEST_STATE:-../../../.state}
PULSAR_STATE=$(realpath -m "${PULSAR_STATE:-$BASE/pulsar}")
PULSAR_PORT=${PULSAR_PORT:-26650}
PULSAR_HTTP_PORT=${PULSAR_HTTP_PORT:-26651}
PULSAR_TLS_PORT=${PULSAR_TLS_PORT:-26652}
PULSAR_BOOKIE_PORT=${PULSAR_BOOKIE_PORT:-26653}
PIDFILE=$PULSAR_STATE/pulsar.pid
LOG=$PULSAR_STATE/pulsar.log
# Heap and Netty's memory: with less, 10,000 messages a second end in garbage collection.
HEAP=512m

# What appliance/workers needs, for the test that runs it.
install_worker() {
  local requirements=../../../appliance/workers/requirements.txt
  cmp -s "$requirements" "$WORKER/.installed" && return 0
  rm -rf "$WORKER"
  with_progress "python: pulsar-client" "$CACHE/pulsar/worker.log" bash -c \
    'python3 -m venv "$1" && "$1/bin/pip" install --quiet --disable-pip-version-check -r "$2"' - "$WORKER" "$requirements"
  cp "$requirements" "$WORKER/.installed"
}

install() {
  mkdir -p "$CACHE/pulsar"
  install_worker
  [ -e "$DIST/.complete" ] && return 0
  command -v mvn >/dev/null || die "Maven is needed to fetch Pulsar: servers/packages.sh pulsar"
  say "Apache Pulsar $PULSAR_VERSION (245 MB, once; kept in $DIST)"
  local maven=$CACHE/pulsar/maven archive
  archive=$maven/org/apache/pulsar/pulsar-server-distribution/$PULSAR_VERSION/pulsar-server-distribution-$PULSAR_VERSION-bin.tar.gz
  mkdir -p "$maven"
  # The plugin's version is named: which one a Maven takes by itself depends on its own version. Maven checks the checksums.
  PROGRESS_OF=$maven with_progress "maven: pulsar-server-distribution" "$CACHE/pulsar/install.log" \
    mvn -B -C "-Dmaven.repo.local=$maven" org.apache.maven.plugins:maven-dependency-plugin:3.6.1:get \
    "-Dartifact=org.apache.pulsar:pulsar-server-distribution:$PULSAR_VERSION:tar.gz:bin" -Dtransitive=false
  [ -f "$archive" ] || die "Maven left no $archive; see $CACHE/pulsar/install.log"
  rm -rf "$DIST"
  mkdir -p "$DIST"
  with_progress "unpacking" "$CACHE/pulsar/unpack.log" tar xzf "$archive" -C "$DIST" --strip-components=1
  rm -rf "$maven" "$DIST/examples" "$DIST/instances"
  touch "$DIST/.complete"
}

java_program() {
  local home
  for home in "${JAVA_HOME:-}" /usr/lib/jvm/*21* /usr/lib/jvm/*17*; do
    if [ -n "$home" ] && [ -x "$home/bin/java" ]; then printf '%s\n' "$home/bin/java"; return; fi
  done
  command -v java || die "Pulsar needs Java 17 or 21: servers/packages.sh pulsar"
}

# Keys and certificates of this run: they are worth nothing elsewhere, and are made anew with the folder.
make_keys() {
  local d=$PULSAR_STATE
  [ -e "$d/.keys" ] && return 0
  openssl genpkey -quiet -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out "$d/token.key" 2>/dev/null \
    || openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out "$d/token.key" 2>/dev/null
  openssl pkey -in "$d/token.key" -pubout -out "$d/token.pub"
  openssl pkey -in "$d/token.key" -pubout -outform DER -out "$d/token.pub.der"
  openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj "/CN=test CA" -keyout "$d/ca.key" -out "$d/ca.pem" 2>/dev/null
  openssl req -newkey rsa:2048 -nodes -subj "/CN=localhost" -keyout "$d/tls.raw" -out "$d/tls.csr" 2>/dev/null
  printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\nbasicConstraints=CA:FALSE\n' >"$d/tls.ext"
  openssl x509 -req -in "$d/tls.csr" -CA "$d/ca.pem" -CAkey "$d/ca.key" -CAcreateserial -days 3650 -extfile "$d/tls.ext" \
    -out "$d/tls.pem" 2>/dev/null
  openssl pkcs8 -topk8 -nocrypt -in "$d/tls.raw" -out "$d/tls.key"
  chmod 600 "$d"/*.key "$d/tls.raw"
  touch "$d/.keys"
}

token() {
  base64url() { openssl base64 -A | tr '+/' '-_' | tr -d '='; }
  local signed
  signed=$(printf '{"alg":"RS256","typ":"JWT"}' | base64url).$(printf '{"sub":"%s"}' "$1" | base64url)
  printf '%s.%s\n' "$signed" "$(printf '%s' "$signed" | openssl dgst -sha256 -sign "$PULSAR_STATE/token.key" -binary | base64url)"
}

healthy() {
  curl -fsS --noproxy '*' -o /dev/null --max-time 5 -H "Authorization: Bearer $(token admin)" \
    "http://127.0.0.1:$PULSAR_HTTP_PORT/admin/v2/brokers/health" 2>/dev/null
}

configure() {
  local d=$PULSAR_STATE
  cat >"$d/standalone.conf" <<CONF
clusterName=standalone
bindAddress=127.0.0.1
advertisedAddress=127.0.0.1
brokerServicePort=$PULSAR_PORT
webServicePort=$PULSAR_HTTP_PORT
brokerServicePortTls=$PULSAR_TLS_PORT
tlsCertificateFilePath=$d/tls.pem
tlsKeyFilePath=$d/tls.key
tlsTrustCertsFilePath=$d/ca.pem
brokerClientTrustCertsFilePath=$d/ca.pem

authenticationEnabled=true
authenticationProviders=org.apache.pulsar.broker.authentication.AuthenticationProviderToken
tokenPublicKey=file://$d/token.pub.der
anonymousUserRole=anonymous
authorizationEnabled=true
superUserRoles=admin,anonymous
brokerClientAuthenticationPlugin=org.apache.pulsar.client.impl.auth.AuthenticationToken
brokerClientAuthenticationParameters={"token":"$(token admin)"}

# One bookie on one disk, every entry synced before its receipt: receipts mean what they mean in production.
journalSyncData=true
journalMaxSizeMB=64
journalPreAllocSizeMB=4
managedLedgerDefaultEnsembleSize=1
managedLedgerDefaultWriteQuorum=1
managedLedgerDefaultAckQuorum=1
listeningInterface=lo
allowLoopback=true
ledgerStorageClass=org.apache.bookkeeper.bookie.storage.ldb.DbLedgerStorage
dbStorage_writeCacheMaxSizeMb=32
dbStorage_readAheadCacheMaxSizeMb=16
dbStorage_rocksDB_blockCacheSize=8388608
diskUsageThreshold=0.99
diskUsageWarnThreshold=0.98
diskUsageLwmThreshold=0.97
minUsableSizeForIndexFileCreation=1
minUsableSizeForEntryLogCreation=1

# Few threads, no balancing: a machine with two cores runs the tests beside it.
numIOThreads=2
numHttpServerThreads=8
numExecutorThreadPoolSize=2
numCacheExecutorThreadPoolSize=2
numOrderedExecutorThreads=2
topicOrderedExecutorThreadNum=2
bookkeeperClientNumWorkerThreads=2
bookkeeperClientNumIoThreads=2
managedLedgerCacheSizeMB=32
managedLedgerNumSchedulerThreads=2
loadBalancerEnabled=false
defaultNumberOfNamespaceBundles=1
transactionCoordinatorEnabled=false
brokerShutdownTimeoutMs=5000
exposePreciseBacklogInPrometheus=true
exposeTopicLevelMetricsInPrometheus=true
authenticateMetricsEndpoint=false
# A topic that nobody made is a mistake that a test has to see.
allowAutoTopicCreation=false
CONF
  [ -z "${PULSAR_CONF:-}" ] || cat "$PULSAR_CONF" >>"$d/standalone.conf"
  cat >"$d/log4j2.properties" <<'CONF'
status = error
appender.out.type = Console
appender.out.name = OUT
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{HH:mm:ss.SSS} %-5p %c{1.} %m%n
rootLogger.level = info
rootLogger.appenderRef.out.ref = OUT
CONF
}

start() {
  if running "$PIDFILE"; then say "Pulsar runs already"; return 0; fi
  [ -e "$DIST/.complete" ] || die "Pulsar is not installed: run $0 install"
  local port java begin=$SECONDS
  for port in "$PULSAR_PORT" "$PULSAR_HTTP_PORT" "$PULSAR_TLS_PORT" "$PULSAR_BOOKIE_PORT"; do
    ! port_taken "$port" || die "127.0.0.1:$port is in use, and Pulsar needs it: set PULSAR_PORT, PULSAR_HTTP_PORT, PULSAR_TLS_PORT and PULSAR_BOOKIE_PORT"
  done
  java=$(java_program)
  mkdir -p "$PULSAR_STATE/data" "$PULSAR_STATE/tmp"
  chmod 700 "$PULSAR_STATE"
  make_keys
  configure
  local options=(-Xms128m "-Xmx$HEAP" "-XX:MaxDirectMemorySize=$HEAP" -XX:+UseSerialGC -XX:+ExitOnOutOfMemoryError
    "-XX:TieredStopAtLevel=${PULSAR_JIT:-1}"
    --add-opens=java.base/java.nio=ALL-UNNAMED --add-opens=java.base/jdk.internal.misc=ALL-UNNAMED
    --add-opens=java.base/java.io=ALL-UNNAMED --add-opens=java.base/java.util.zip=ALL-UNNAMED
    --add-opens=java.base/jdk.internal.platform=ALL-UNNAMED --add-opens=java.management/sun.management=ALL-UNNAMED
    --add-opens=jdk.management/com.sun.management.internal=ALL-UNNAMED
    -Dio.netty.tryReflectionSetAccessible=true -Djava.net.preferIPv4Stack=true
    "-Djava.io.tmpdir=$PULSAR_STATE/tmp" "-Dlog4j2.configurationFile=$PULSAR_STATE/log4j2.properties")
  (
    cd "$PULSAR_STATE"
    exec setsid "$java" "${options[@]}" -cp "$DIST/lib/*" org.apache.pulsar.PulsarStandaloneStarter \
      --config standalone.conf --advertised-address 127.0.0.1 --bookkeeper-port "$PULSAR_BOOKIE_PORT" \
      --bookkeeper-dir data/bookkeeper --metadata-dir data/metadata --no-functions-worker --no-stream-storage \
      >>"$LOG" 2>&1 </dev/null
  ) &
  remember $! "$PIDFILE"
  # Its port is open long before it works.
  local deadline=$((SECONDS + ${PULSAR_PATIENCE:-150})) shown=$SECONDS
  until healthy; do
    if ! running "$PIDFILE" || [ "$SECONDS" -ge "$deadline" ]; then
      tail -n 30 "$LOG" >&2
      end "$PIDFILE" KILL
      die "Pulsar did not become healthy; the whole log: $LOG"
    fi
    if [ $((SECONDS - shown)) -ge 10 ]; then shown=$SECONDS; say "Pulsar is starting … $((SECONDS - begin)) s"; fi
    sleep 0.5
  done
  say "Pulsar is ready after $((SECONDS - begin)) s: pulsar://127.0.0.1:$PULSAR_PORT, http://127.0.0.1:$PULSAR_HTTP_PORT"
}

case "${1:-}" in
  install) locked pulsar install ;;
  start) start ;;
  stop) end "$PIDFILE" TERM 20 ;;
  kill) end "$PIDFILE" KILL ;;
  wipe) ! running "$PIDFILE" || die "Pulsar runs: stop it first"; rm -rf "$PULSAR_STATE/data" ;;
  token) token "${2:?a subject}" ;;
  env)
    cat <<ENV
DEALSCALE_TEST_PULSAR_STATE=$PULSAR_STATE
DEALSCALE_TEST_PULSAR_URL=pulsar://127.0.0.1:$PULSAR_PORT
DEALSCALE_TEST_PULSAR_TLS_URL=pulsar+ssl://127.0.0.1:$PULSAR_TLS_PORT
DEALSCALE_TEST_PULSAR_HTTP_URL=http://127.0.0.1:$PULSAR_HTTP_PORT
DEALSCALE_TEST_WORKER_PYTHON=$WORKER/bin/python
PULSAR_STATE=$PULSAR_STATE
PULSAR_PORT=$PULSAR_PORT
PULSAR_HTTP_PORT=$PULSAR_HTTP_PORT
PULSAR_TLS_PORT=$PULSAR_TLS_PORT
PULSAR_BOOKIE_PORT=$PULSAR_BOOKIE_PORT
ENV
    ;;
  *) die "usage: pulsar.sh install | start | stop | kill | wipe | token SUBJECT | env" ;;
esac
