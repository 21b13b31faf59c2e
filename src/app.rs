//! The composition root: builds each part from its configuration and connects them. The whole arrow is visible here.
//!
//! ```text
//! bridge ─▶ outbox ─▶ relay ─▶ store, broker ─▶ delivery ─▶ n8n
//!    ▲                  │ receipts                 │ finals
//!    └──────────────────┴──────────────────────────┘
//! ```
//!
//! # Invariants
//! 1. Start: take the sockets → open state → ready. A part that is merely away (Pulsar, PostgreSQL, n8n) never stops the start; state that cannot be
//!    read does. A port in use degrades that listener only, and is tried again.
//! 2. Stop, in reverse of the arrow, under one deadline (`bridge.drain_timeout`): no new deliveries, no long polls and no idle connections, while
//!    publishes go on being taken; when deliveries are done, or only [`answers`] of the time is left, the listeners stop accepting and finish
//!    their requests; then the relay, then the stores. Killed instead, nothing is lost.
//! 3. Environments share nothing but listeners, accounts and the key ring.
//! 4. One reload at a time, carried out to its end by a task of its own: whoever asked for it may go away in the middle.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::admin::{self, Admin};
use crate::bridge::{self, Bridge};
use crate::broker::{Broker, KeyRing, Topics};
use crate::clock::Clock;
use crate::config::{self, Config, EnvironmentConfig, Overrides, Problem};
use crate::delivery::{self, Delivery};
use crate::finals::{Finals, Receipts};
use crate::ids::Environment;
use crate::listen::{self, Sockets};
use crate::n8n::N8n;
use crate::observe;
use crate::observe::health::{Level, Part, Report};
use crate::observe::logs::Logs;
use crate::observe::trace;
use crate::outbox::Outbox;
use crate::payloads::Store;
use crate::relay::{self, Relay};
use crate::supervise::{Failures, Supervisor, notify};
use crate::units::Bytes;

/// A listener whose port is taken is tried again this often.
const BIND_AGAIN: Duration = Duration::from_secs(2);
/// The watchdog does not wait longer for what parts tell of outside systems.
const REPORT_MAX: Duration = Duration::from_secs(2);
/// What the relay and the stores may take at the end: one batch and one sync, with room for a slow disk.
const CLOSE_MAX: Duration = Duration::from_secs(10);
/// Reloads that may wait for the one under way.
const RELOADS_MAX: usize = 8;

type Reloaded = Result<Value, Vec<String>>;

/// What only the parts themselves can tell about a checked configuration; opens nothing. The start, `dealscale check` and a reload ask.
pub fn check(config: &Config) -> Vec<Problem> {
    KeyRing::check(&config.signing).map_err(|e| Problem::new("signing.keys", e)).err().into_iter().collect()
}

/// A running appliance.
pub struct App {
    inner: Arc<Inner>,
    stop: bridge::Stop,
    /// Listeners: end when deliveries are done.
    front: Supervisor,
    /// Brokers and exporters: end last.
    back: Supervisor,
    /// The task that reloads: ends first.
    reload: Supervisor,
}

struct Inner {
    overrides: Overrides,
    config: Mutex<Config>,
    logs: Logs,
    bridge: Bridge,
    rooms: BTreeMap<Environment, Room>,
    listeners: Mutex<BTreeMap<&'static str, Part>>,
    /// systemd's, until their listeners take them.
    sockets: Sockets,
    reloads: mpsc::Sender<oneshot::Sender<Reloaded>>,
    /// Of the keys that a reload does not apply, those that are at work.
    fixed: BTreeMap<String, u64>,
}

/// One environment at work.
struct Room {
    outbox: Outbox,
    store: Store,
    broker: Broker,
    n8n: N8n,
    finals: Finals,
    receipts: Receipts,
    /// Shared by relay and delivery over their restarts.
    alarm: delivery::Alarm,
    clock: Clock,
    running: Mutex<Running>,
}

/// What a reload starts anew.
struct Running {
    relay: Relay,
    delivery: Delivery,
    /// Delivery's tasks: end first.
    work: Supervisor,
    /// The relay's: end last.
    back: Supervisor,
}

impl App {
    /// Builds and starts everything.
    ///
    /// # Errors
    /// State that cannot be opened, with what to do about it.
    pub async fn start(
        config: Config,
        overrides: Overrides,
        logs: Logs,
        sockets: Sockets,
    ) -> Result<(Self, Failures), String> {
        let (supervisor, failures) = Supervisor::new();
        let (front, reload, back) = (supervisor.sibling(), supervisor.sibling(), supervisor);
        let clock = Clock::System;
        if config.bare {
            tracing::warn!("no configuration file: embedded defaults, any tenant, and publishing without a token");
        }
        warn(&config);
        make_dir(&config.state_dir)?;
        if let Some(exporter) = trace::exporter(&config.trace, back.shutdown())? {
            back.spawn("trace.export", exporter);
        }
        let keys = Arc::new(KeyRing::open(&config.signing)?);
        let (mut rooms, mut bridge_parts) = (BTreeMap::new(), BTreeMap::new());
        for environment in config.environments.values() {
            let (room, parts) = open_room(environment, &keys, &clock, &back).await?;
            rooms.insert(environment.name.clone(), room);
            bridge_parts.insert(environment.name.clone(), parts);
        }
        let bridge = Bridge::new(&config, bridge_parts, clock)?;
        let (listen, admin_listen) = (config.bridge.listen, config.admin.listen);
        let socket = config.admin.socket.clone();
        let (reloads, requests) = mpsc::channel(RELOADS_MAX);
        let inner = Arc::new(Inner {
            overrides,
            fixed: fixed(&config),
            config: Mutex::new(config),
            logs,
            bridge: bridge.clone(),
            rooms,
            listeners: Mutex::default(),
            sockets,
            reloads,
        });
        reload.spawn("reload", inner.clone().reloads(requests, reload.shutdown()));

        let stop = bridge::Stop::default();
        let admin = inner.clone().admin();
        // Tried once before anybody is told that it runs.
        let bridge_listener = inner.open("bridge", listen);
        let admin_listener = inner.open("admin", admin_listen);
        let operators = inner.open_socket(&socket);
        front.spawn("bridge", {
            let (inner, stop, bridge) = (inner.clone(), stop.clone(), bridge.clone());
            async move {
                if let Some(listener) = inner.listen(bridge_listener, "bridge", listen, &stop.last).await {
                    bridge::serve(listener, bridge, stop).await;
                }
            }
        });
        front.spawn("admin", {
            let (inner, last, router) = (inner.clone(), stop.last.clone(), admin.public());
            async move {
                if let Some(listener) = inner.listen(admin_listener, "admin", admin_listen, &last).await {
                    let served = axum::serve(listener, router).with_graceful_shutdown(last.cancelled_owned()).await;
                    if let Err(error) = served {
                        tracing::error!(%error, "the admin listener ended");
                    }
                }
            }
        });
        front.spawn("admin.socket", {
            let last = stop.last.clone();
            let router = admin.operator().merge(bridge::operator(bridge));
            async move {
                let Some(listener) = operators else { return last.cancelled().await };
                let service = router.into_make_service_with_connect_info::<admin::Peer>();
                let served = axum::serve(listener, service).with_graceful_shutdown(last.cancelled_owned()).await;
                if let Err(error) = served {
                    tracing::error!(%error, "the admin socket ended");
                }
                let _ = std::fs::remove_file(&socket);
            }
        });
        tracing::info!(version = env!("CARGO_PKG_VERSION"), bridge = %listen, admin = %admin_listen, "started");
        if let Some(next) = inner.next_step() {
            tracing::warn!("{next}");
        }
        Ok((Self { inner, stop, front, back, reload }, failures))
    }

    /// Reads the configuration again; see [`Inner::reload`].
    pub fn reload(&self) -> impl Future<Output = Reloaded> + Send + 'static {
        self.inner.clone().ask_reload()
    }

    /// Tells the service manager that all is open, once every outbox has answered, and feeds its watchdog from then on.
    pub async fn ready(&self) {
        notify::ready(&self.inner.clone().progress().await);
        let (inner, shutdown) = (self.inner.clone(), self.back.shutdown());
        self.back.spawn("watchdog", notify::watch(Arc::new(move || Box::pin(inner.clone().progress())), shutdown));
    }

    /// Drains and ends; see invariant 2.
    pub async fn stop(self) {
        let whole = self.inner.config().bridge.drain_timeout.0;
        let end = tokio::time::Instant::now() + whole;
        tracing::info!(deadline_seconds = whole.as_secs(), "stopping: no new deliveries");
        // Requests, relay and stores each have their own end behind the deadline.
        notify::stopping("finishes what is under way", whole + 4 * CLOSE_MAX);
        self.stop.draining.cancel();
        self.inner.bridge.drain();
        // Nothing may start relay and delivery again behind our back.
        self.reload.drain(CLOSE_MAX).await;
        let drained = self.inner.rooms.values().map(|room| room.supervisors().0.clone());
        let drained: Vec<_> = drained.collect();
        let deliveries = left(end - answers(whole));
        let drained = futures_util::future::join_all(drained.iter().map(|work| work.drain(deliveries))).await;
        if drained.contains(&false) {
            tracing::warn!("deliveries were still under way at the deadline; they go on after the next start");
        }
        // Before `last`, so that listeners that end now are not taken for tasks that died.
        self.front.shutdown().cancel();
        self.stop.last.cancel();
        // Deliveries left [`answers`] of the time.
        if !self.front.drain(left(end).max(answers(whole))).await {
            tracing::warn!("requests were still under way at the deadline");
        }
        if tokio::time::timeout(CLOSE_MAX, self.inner.bridge.finish()).await.is_err() {
            tracing::warn!("records of direct calls were still being written at the deadline");
        }
        for room in self.inner.rooms.values() {
            let relay = room.supervisors().1;
            relay.drain(CLOSE_MAX).await;
        }
        self.back.drain(CLOSE_MAX).await;
        for (name, room) in &self.inner.rooms {
            room.broker.close().await;
            if let Err(error) = room.outbox.close().await {
                tracing::error!(environment = %name, %error, "the outbox did not close in order");
            }
            room.store.close().await;
        }
        tracing::info!("stopped");
    }
}

fn left(until: tokio::time::Instant) -> Duration {
    until.saturating_duration_since(tokio::time::Instant::now())
}

/// What answers and the last sync keep of the time for a stop.
fn answers(whole: Duration) -> Duration {
    (whole / 4).min(Duration::from_secs(5))
}

/// Opens one environment's state and starts its part of the arrow.
async fn open_room(
    config: &EnvironmentConfig,
    keys: &Arc<KeyRing>,
    clock: &Clock,
    supervisor: &Supervisor,
) -> Result<(Room, bridge::Parts), String> {
    let name = &config.name;
    let at = |what: &str, error: String| format!("environment {name}: {what}: {error}");
    make_dir(&config.dir)?;
    let shared = Arc::new(config.clone());

    let limits = {
        let config = shared.clone();
        move |tenant: &crate::ids::Tenant| match config.tenant(tenant) {
            Some(tenant) => (tenant.weight, tenant.outbox_bytes_max),
            // Its declaration was removed while its work waited: it keeps the smallest share.
            None => (1, Bytes(0)),
        }
    };
    let outbox = {
        let (settings, name, clock) = (config.outbox.clone(), name.clone(), clock.clone());
        let opened = tokio::task::spawn_blocking(move || Outbox::open(&settings, &name, Arc::new(limits), clock)).await;
        opened.map_err(|e| at("outbox", e.to_string()))?.map_err(|e| at("outbox", e.to_string()))?
    };
    let store = Store::open(&config.payloads, &config.outbox, name, clock.clone()).await;
    let store = store.map_err(|e| at("payloads", e.to_string()))?;
    let broker = Broker::open(&config.broker, name, keys.clone(), Topics::of(config), &outbox, clock.clone());
    let broker = broker.map_err(|e| at("broker", e.to_string()))?;
    let n8n = N8n::new(&config.n8n).map_err(|e| at("n8n", e))?;
    let (finals, receipts) = (Finals::default(), Receipts::default());
    let alarm = delivery::Alarm::default();
    let parts = bridge::Parts {
        outbox: outbox.clone(),
        store: store.clone(),
        broker: broker.clone(),
        n8n: n8n.clone(),
        keys: keys.clone(),
        finals: finals.clone(),
        receipts: receipts.clone(),
    };
    supervisor.spawn("broker", {
        let (broker, shutdown) = (broker.clone(), supervisor.shutdown());
        async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                task = broker.failed() => tracing::error!(task, "a task of the broker ended unasked"),
            }
        }
    });
    let clock = clock.clone();
    let (work, back) = (supervisor.sibling(), supervisor.sibling());
    let running =
        Mutex::new(run(&outbox, &store, &broker, &n8n, &finals, &receipts, &alarm, &clock, shared, work, back)?);
    let room = Room { outbox, store, broker, n8n, finals, receipts, alarm, clock, running };
    Ok((room, parts))
}

/// Starts relay and delivery.
#[expect(clippy::too_many_arguments, reason = "the arrow: each part once, in its order")]
fn run(
    outbox: &Outbox,
    store: &Store,
    broker: &Broker,
    n8n: &N8n,
    finals: &Finals,
    receipts: &Receipts,
    alarm: &delivery::Alarm,
    clock: &Clock,
    config: Arc<EnvironmentConfig>,
    work: Supervisor,
    back: Supervisor,
) -> Result<Running, String> {
    let on_final = {
        let finals = finals.clone();
        Arc::new(move |key: &crate::ids::Key, state| finals.notify(key, state))
    };
    let parts = delivery::Parts {
        config: config.clone(),
        store: store.clone(),
        broker: broker.clone(),
        n8n: n8n.clone(),
        clock: clock.clone(),
        on_final: on_final.clone(),
        alarm: alarm.clone(),
    };
    let delivery = Delivery::start(parts, &work).map_err(|e| format!("environment {}: delivery: {e}", config.name))?;
    let (receipts, alarm) = (receipts.clone(), alarm.clone());
    let parts = relay::Parts {
        config,
        outbox: outbox.clone(),
        store: store.clone(),
        broker: broker.clone(),
        clock: clock.clone(),
        on_final,
        on_receipt: Arc::new(move |key, message_id| receipts.notify(key, message_id)),
        on_delayed: Arc::new(move |at| alarm.at(at)),
    };
    let relay = Relay::start(parts, &back);
    Ok(Running { relay, delivery, work, back })
}

impl Inner {
    fn config(&self) -> Config {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn listener(&self, name: &'static str, level: Level, detail: String) {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.insert(name, Part::new(name, level, detail));
    }

    /// Takes systemd's socket or binds one; says how that went.
    fn open(&self, name: &'static str, addr: SocketAddr) -> Option<TcpListener> {
        let socket = if name == "bridge" { listen::BRIDGE } else { listen::HEALTH };
        match self.sockets.open(socket, addr) {
            Ok(open) => {
                match open.describe(addr) {
                    Ok(detail) => self.listener(name, Level::Ok, detail),
                    Err(detail) => {
                        tracing::warn!(listener = name, "{detail}");
                        self.listener(name, Level::Degraded, detail);
                    }
                }
                Some(open.listener)
            }
            Err(error) => {
                let level = if name == "bridge" { Level::Down } else { Level::Degraded };
                let detail = format!("cannot listen on {addr}: {error}; it is tried again");
                tracing::error!(listener = name, %addr, %error, "cannot listen; it is tried again");
                self.listener(name, level, detail);
                None
            }
        }
    }

    /// Tries again while the port is taken. `None` when the end came first.
    async fn listen(
        &self,
        mut open: Option<TcpListener>,
        name: &'static str,
        addr: SocketAddr,
        last: &CancellationToken,
    ) -> Option<TcpListener> {
        while open.is_none() {
            tokio::select! {
                () = last.cancelled() => return None,
                () = tokio::time::sleep(BIND_AGAIN) => open = self.open(name, addr),
            }
        }
        open
    }

    fn open_socket(&self, path: &std::path::Path) -> Option<tokio::net::UnixListener> {
        match admin::bind_socket(path) {
            Ok(listener) => {
                self.listener("admin.socket", Level::Ok, path.display().to_string());
                Some(listener)
            }
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "the admin socket cannot be served; the command line cannot operate");
                self.listener("admin.socket", Level::Degraded, format!("{}: {error}", path.display()));
                None
            }
        }
    }

    /// What an operator has to do before anything can be published.
    fn next_step(&self) -> Option<String> {
        let config = self.config();
        let accounts = &config.accounts;
        (config.bridge.token_required && accounts.accounts.is_empty() && accounts.issuers.is_empty()).then(|| {
            "no account yet, every publish is 401: run `dealscale token NAME`, put its lines into dealscale.toml, then `dealscale reload`".into()
        })
    }

    /// Ends when every outbox's thread has answered, with one line on the whole: what feeds the watchdog.
    async fn progress(self: Arc<Self>) -> String {
        for room in self.rooms.values() {
            // Whatever it answers: an outbox that is being opened again says so itself.
            let _ = room.outbox.list(None, true, None, 1).await;
        }
        let at = self.config().bridge.listen;
        // A database that hangs is not our hanging.
        let Ok(report) = tokio::time::timeout(REPORT_MAX, self.clone().report()).await else {
            return format!("takes events on {at}; a part does not tell its state");
        };
        match (report.parts.iter().find(|p| p.level == report.level), self.next_step()) {
            (Some(part), _) if report.level > Level::Ok => {
                format!("{}: {}: {}", if report.is_ready() { "degraded" } else { "down" }, part.name, part.detail)
            }
            (_, Some(next)) => next,
            _ => format!("takes events on {at}"),
        }
    }

    fn admin(self: Arc<Self>) -> Admin {
        let (report, details, ask) = (self.clone(), self.clone(), self.clone());
        Admin {
            report: Arc::new(move || Box::pin(report.clone().report())),
            details: Arc::new(move || Box::pin(details.clone().details())),
            reload: Arc::new(move || Box::pin(ask.clone().ask_reload())),
            outboxes: self.rooms.iter().map(|(name, room)| (name.clone(), room.outbox.clone())).collect(),
        }
    }

    /// State of each part.
    async fn report(self: Arc<Self>) -> Report {
        let mut parts: Vec<_> =
            self.listeners.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        for (name, room) in &self.rooms {
            parts.extend(room.report(name).await);
        }
        if let Some(next) = self.next_step() {
            parts.push(Part::new("accounts", Level::Ok, next));
        }
        let report = Report::new(parts);
        report.gauges();
        report
    }

    async fn details(self: Arc<Self>) -> Value {
        let mut all = serde_json::Map::new();
        for (name, room) in &self.rooms {
            let details = json!({
                "outbox": room.outbox.status(),
                "payloads": room.store.status().await,
                "broker": room.broker.status(),
                "relay": room.relay().status(),
                "delivery": room.delivery().status(),
            });
            all.insert(name.to_string(), details);
        }
        Value::Object(all)
    }

    async fn ask_reload(self: Arc<Self>) -> Reloaded {
        let stopping = || vec!["the appliance is stopping".to_owned()];
        let (answer, answered) = oneshot::channel();
        self.reloads.send(answer).await.map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())?
    }

    async fn reloads(self: Arc<Self>, mut requests: mpsc::Receiver<oneshot::Sender<Reloaded>>, end: CancellationToken) {
        loop {
            let answer = tokio::select! {
                () = end.cancelled() => return,
                // Never `None`: we hold a sender ourselves.
                Some(answer) = requests.recv() => answer,
            };
            let reloaded = tokio::select! {
                // Relay and delivery may be half ended: they are about to end anyway.
                () = end.cancelled() => return,
                reloaded = self.reload() => reloaded,
            };
            // Who asked may be gone.
            let _ = answer.send(reloaded);
        }
    }

    /// Reads the configuration again. What can change does, for the next request; what cannot is named and stays. A configuration
    /// with a problem is refused as a whole.
    async fn reload(self: &Arc<Self>) -> Reloaded {
        notify::reloading();
        let reloaded = self.apply().await;
        notify::ready(&self.clone().progress().await);
        reloaded
    }

    async fn apply(&self) -> Reloaded {
        let loaded = config::load(&self.overrides, &config::variable).and_then(|new| match check(&new) {
            problems if problems.is_empty() => Ok(new),
            problems => Err(problems),
        });
        let new = loaded.map_err(|problems| {
            let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
            tracing::error!(problems = problems.join("; "), "the configuration was refused; the old one goes on");
            problems
        })?;
        let old = self.config();
        // Before the bridge knows a new route delivery must: no event may meet a delivery that takes its route for a removed one.
        let mut starting = Vec::new();
        for (name, room) in &self.rooms {
            let Some(environment) = new.environments.get(name) else { continue };
            if works_differently(&old, &new, name) {
                let (work, relay) = room.supervisors();
                tracing::info!(environment = %name, "delivery ends to start again with the new configuration");
                work.drain(old.bridge.drain_timeout.0).await;
                relay.drain(CLOSE_MAX).await;
                starting.push((room, Arc::new(environment.clone())));
            }
        }
        let reloaded = self.bridge.reload(&new);
        for (room, environment) in starting {
            room.restart(environment, &old).map_err(|e| vec![e])?;
        }
        reloaded.map_err(|e| vec![e])?;
        self.logs.refilter(&new.log);
        warn(&new);
        let needs_restart = needs_restart(&self.fixed, &fixed(&new));
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = new;
        tracing::info!(needs_restart = needs_restart.join(", "), "the configuration was read again");
        Ok(json!({ "needs_restart": needs_restart }))
    }
}

fn warn(config: &Config) {
    for warning in &config.warnings {
        tracing::warn!(key = warning.key, source = %warning.source, "{}", warning.text);
    }
}

/// Whether relay and delivery have to start again.
fn works_differently(old: &Config, new: &Config, environment: &Environment) -> bool {
    let prints = |config: &Config| -> BTreeMap<String, u64> {
        let inside = format!("environments.{environment}.");
        let matters = |key: &str| {
            key.strip_prefix(&inside).is_some_and(|key| {
                key == "webhook"
                    || ["routes", "default_route.", "delivery.", "tenants."].iter().any(|p| key.starts_with(p))
            })
        };
        let effective = config.effective.iter().filter(|e| matters(&e.key));
        effective.map(|e| (e.key.clone(), e.print)).collect()
    };
    prints(old) != prints(new)
}

/// Keys that a reload does not apply, with a print of each value.
fn fixed(config: &Config) -> BTreeMap<String, u64> {
    let is_fixed = |key: &str| {
        let inside = key.strip_prefix("environments.").and_then(|rest| rest.split_once('.')).map(|(_, inside)| inside);
        match inside {
            Some(inside) if inside.ends_with(".topic") => true,
            Some(inside) => {
                inside == "dir" || ["n8n.", "outbox.", "payloads.", "broker."].iter().any(|p| inside.starts_with(p))
            }
            None => {
                ["state_dir", "admin.", "trace.otlp_endpoint", "signing.", "log.dir", "log.format", "log.files_max"]
                    .iter()
                    .any(|p| key.starts_with(p))
                    || ["bridge.listen", "bridge.connections_max", "bridge.header_bytes_max", "bridge.header_timeout"]
                        .contains(&key)
            }
        }
    };
    config.effective.iter().filter(|e| is_fixed(&e.key)).map(|e| (e.key.clone(), e.print)).collect()
}

/// Where `new` differs from what is at work. An environment that came or went is one entry.
fn needs_restart(at_work: &BTreeMap<String, u64>, new: &BTreeMap<String, u64>) -> Vec<String> {
    let environment = |key: &str| -> Option<String> {
        let (name, _) = key.strip_prefix("environments.")?.split_once('.')?;
        Some(format!("environments.{name}"))
    };
    let environments =
        |keys: &BTreeMap<String, u64>| -> BTreeSet<String> { keys.keys().filter_map(|k| environment(k)).collect() };
    let (old_environments, new_environments) = (environments(at_work), environments(new));
    let keys: BTreeSet<_> = at_work.keys().chain(new.keys()).collect();
    let differ = keys.into_iter().filter(|key| at_work.get(*key) != new.get(*key));
    let named = differ.map(|key| match environment(key) {
        Some(name) if old_environments.contains(&name) != new_environments.contains(&name) => name,
        _ => key.clone(),
    });
    named.collect::<BTreeSet<_>>().into_iter().collect()
}

impl Room {
    fn running(&self) -> std::sync::MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn relay(&self) -> Relay {
        self.running().relay.clone()
    }
    fn delivery(&self) -> Delivery {
        self.running().delivery.clone()
    }
    /// Of delivery and of the relay.
    fn supervisors(&self) -> (Supervisor, Supervisor) {
        let running = self.running();
        (running.work.clone(), running.back.clone())
    }

    /// Starts relay and delivery with `config`; where it cannot be used, with the old one.
    fn restart(&self, config: Arc<EnvironmentConfig>, old: &Config) -> Result<(), String> {
        let Self { outbox, store, broker, n8n, finals, receipts, alarm, clock, .. } = self;
        let start = |config: Arc<EnvironmentConfig>| {
            let (work, back) = self.supervisors();
            let (work, back) = (work.sibling(), back.sibling());
            run(outbox, store, broker, n8n, finals, receipts, alarm, clock, config, work, back)
        };
        match start(config.clone()) {
            Ok(running) => *self.running() = running,
            Err(error) => {
                if let Some(old) = old.environments.get(&config.name) {
                    *self.running() = start(Arc::new(old.clone()))?;
                }
                return Err(error);
            }
        }
        Ok(())
    }

    async fn report(&self, name: &Environment) -> Vec<Part> {
        let part = |what: &str, level: Level, detail: String| Part::new(format!("{name}/{what}"), level, detail);
        let outbox = self.outbox.status();
        observe::outbox::Figures {
            environment: name.as_str(),
            records: outbox.records,
            bytes: outbox.bytes,
            leased: outbox.leased,
            poisoned: outbox.poisoned,
            disk_free: outbox.disk_free,
            oldest_seconds: outbox.oldest.map_or(0, |t| t.as_secs()),
        }
        .set();
        let full = outbox.bytes >= outbox.bytes_max || outbox.records >= outbox.count_max;
        let held = format!("{} records, {} of {}", outbox.records, Bytes(outbox.bytes), Bytes(outbox.bytes_max));
        let outbox = match (&outbox.data_loss_possible, &outbox.last_error) {
            _ if full => part("outbox", Level::Down, format!("full: {held}")),
            (Some(loss), _) => part("outbox", Level::Degraded, format!("data_loss_possible: {loss}")),
            (None, Some(error)) => part("outbox", Level::Degraded, format!("{held}; last error: {error}")),
            (None, None) if outbox.poisoned > 0 => part(
                "outbox",
                Level::Degraded,
                format!("{held}; {} poisoned: `dealscale outbox ls --poisoned`", outbox.poisoned),
            ),
            (None, None) => part("outbox", Level::Ok, held),
        };
        let store = self.store.status().await;
        let store = match (store.reachable, store.last_error) {
            (true, _) => part("payloads", Level::Ok, store.kind.to_owned()),
            (false, error) => {
                part("payloads", Level::Degraded, format!("{} is away: {}", store.kind, error.unwrap_or_default()))
            }
        };
        let broker = self.broker.status();
        let broker = if broker.connected {
            part("broker", Level::Ok, broker.kind.to_owned())
        } else {
            part(
                "broker",
                Level::Degraded,
                format!("{} is away: {}", broker.kind, broker.last_error.unwrap_or_default()),
            )
        };
        let relay = self.relay().status();
        let relay = if relay.failing {
            part("relay", Level::Degraded, relay.last_error.unwrap_or_default())
        } else {
            part("relay", Level::Ok, format!("{} relayed", relay.relayed_total))
        };
        let delivery = self.delivery().status();
        let delivery = if !delivery.breakers_open.is_empty() {
            let text = format!("not called at present: {}; events wait", delivery.breakers_open.join(", "));
            part("delivery", Level::Degraded, text)
        } else if delivery.keys_held > 0 {
            let text =
                format!("{} ordering keys wait for a dead letter: `dealscale dead-letters ls`", delivery.keys_held);
            part("delivery", Level::Degraded, text)
        } else if let Some(error) = delivery.last_error.filter(|_| delivery.paused) {
            part("delivery", Level::Degraded, error)
        } else {
            part("delivery", Level::Ok, format!("{} under way, {} followed", delivery.working, delivery.following))
        };
        vec![outbox, store, broker, relay, delivery]
    }
}

/// Makes a state folder that only we can read.
fn make_dir(dir: &std::path::Path) -> Result<(), String> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o750).create(dir).map_err(|e| {
        format!("cannot make the folder {}: {e}; make it, or choose another with --state-dir", dir.display())
    })
}
