//! The connection to the cluster, and what is known of its health.
//!
//! The crate's own recovery is kept short (it may go silent, see FACTS in `docs/topology.md`): whoever finds that a client
//! does not work [`drops`](Link::drop_client) it, and the next one who needs a client makes a new one.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ::pulsar::{ConnectionRetryOptions, OperationRetryOptions, TokioExecutor};

use crate::broker::admin::Admin;
use crate::broker::auth::Auth;
use crate::broker::{Error, Status};
use crate::clock::Clock;
use crate::config::broker::Pulsar as Config;
use crate::observe::broker as events;

pub type Client = ::pulsar::Pulsar<TokioExecutor>;

/// Pings on an idle connection: half of what a firewall or a dead peer may go unnoticed.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// Requests that one connection may have queued. Sends wait for room, under their deadline.
const OUTBOUND: usize = 2_000;

pub struct Link {
    config: Config,
    certificate: Option<Vec<u8>>,
    auth: Auth,
    admin: Admin,
    client: tokio::sync::Mutex<(u64, Option<Client>)>,
    health: Mutex<Status>,
    clock: Clock,
}

impl Link {
    pub fn new(config: &Config, auth: Auth, admin: Admin, clock: Clock) -> Result<Self, String> {
        let certificate = match &config.ca_file {
            Some(path) => {
                Some(std::fs::read(path).map_err(|e| format!("cannot use the CA file {}: {e}", path.display()))?)
            }
            None => None,
        };
        let health = Status { kind: "pulsar", ..Status::default() };
        Ok(Self {
            config: config.clone(),
            certificate,
            auth,
            admin,
            client: tokio::sync::Mutex::default(),
            health: Mutex::new(health),
            clock,
        })
    }

    pub fn timeout(&self) -> Duration {
        self.config.operation_timeout.0
    }

    /// A client, and its number for [`drop_client`](Self::drop_client).
    pub async fn client(&self) -> Result<(u64, Client), Arc<str>> {
        let mut slot = self.client.lock().await;
        if let Some(client) = &slot.1 {
            return Ok((slot.0, client.clone()));
        }
        let built = match tokio::time::timeout(self.timeout(), self.builder().build()).await {
            Ok(Ok(client)) => client,
            Ok(Err(error)) => return Err(self.explain(error.to_string()).await),
            Err(_) => return Err(self.explain("no connection within the operation timeout".into()).await),
        };
        slot.0 += 1;
        slot.1 = Some(built.clone());
        Ok((slot.0, built))
    }

    fn builder(&self) -> ::pulsar::PulsarBuilder<TokioExecutor> {
        let retry = ConnectionRetryOptions {
            min_backoff: Duration::from_millis(50),
            max_backoff: Duration::from_secs(1),
            max_retries: 3,
            connection_timeout: self.timeout(),
            keep_alive: KEEP_ALIVE,
            ..ConnectionRetryOptions::default()
        };
        let operations = OperationRetryOptions {
            operation_timeout: self.timeout(),
            retry_delay: Duration::from_millis(200),
            max_retries: Some(5),
        };
        let mut builder = ::pulsar::Pulsar::builder(self.config.service_url.clone(), TokioExecutor)
            .with_connection_retry_options(retry)
            .with_operation_retry_options(operations)
            .with_outbound_channel_size(OUTBOUND);
        if !self.auth.is_none() {
            builder = builder.with_auth_provider(Box::new(self.auth.clone()));
        }
        if let Some(pem) = &self.certificate {
            builder = builder.with_certificate_chain(pem.clone());
        }
        builder
    }

    /// Makes the next caller build a new client, unless somebody already has.
    pub async fn drop_client(&self, number: u64) {
        let mut slot = self.client.lock().await;
        if slot.0 == number {
            slot.1 = None;
        }
    }

    /// The crate tells a refused token as an I/O error: the REST API says it in words.
    async fn explain(&self, cause: String) -> Arc<str> {
        if let Err(cause) = self.auth.token().await {
            return cause.into();
        }
        match self.admin.refusal().await {
            Some(refusal) => refusal.into(),
            None => cause.into(),
        }
    }

    pub fn up(&self) {
        let mut health = self.lock();
        if !health.connected {
            health.connected = true;
            health.since = Some(self.clock.now());
            events::Connection { up: true, cause: None }.emit();
        }
    }

    pub fn down(&self, cause: &str) {
        let mut health = self.lock();
        if health.connected || health.last_error.as_deref() != Some(cause) {
            events::Connection { up: false, cause: Some(cause) }.emit();
        }
        if health.connected || health.since.is_none() {
            health.since = Some(self.clock.now());
        }
        health.connected = false;
        health.last_error = Some(cause.to_owned());
    }

    /// A producer or consumer was dropped, to be made again.
    pub fn rebuilt(&self, what: &'static str, topic: &str, cause: &str) {
        events::Rebuilt { what, topic, cause }.emit();
        let mut health = self.lock();
        health.rebuilt += 1;
        health.last_error = Some(cause.to_owned());
    }

    pub fn failed(&self, error: &Error) {
        self.note(&error.to_string());
    }

    pub fn note(&self, cause: &str) {
        self.lock().last_error = Some(cause.to_owned());
    }

    pub fn status(&self) -> Status {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Status> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long to wait before the `n`th try in a row (from 1): doubling from 100 ms to 2 s, with a fifth of jitter.
pub fn backoff(n: u32) -> Duration {
    let base = 100u64 << n.saturating_sub(1).min(5);
    Duration::from_millis(base.min(2_000) * (90 + fastrand::u64(0..20)) / 100)
}
