//! The HTTP API through which events come in and are looked after.
//!
//! caller → **`bridge`** → `routing` → `outbox` (202) · `payloads` (what became of it) · `n8n` (short calls)
//!
//! # Invariants
//! 1. 202 is answered after [`Outbox::append`](crate::outbox::Outbox::append) returned `Ok`, and on nothing else. What is
//!    wrong with a request is found before: account, tenant, rights, size, JSON, route, limits.
//! 2. The environment comes from the caller's account, never from the request's body. Another tenant's id answers exactly
//!    like an unknown one, and an undeclared tenant exactly like one that is not granted.
//! 3. Every refusal is a problem document made in [`respond`].
//! 4. Nothing of the bridge is unbounded: connections, requests under way, headers, bodies, JSON depth, batch items, long
//!    polls, replay jobs, remembered failures and verified tokens all have limits, most of them keys of `[bridge]`.
//! 5. A direct call (`class = "short"`) reaches n8n at most once, whatever happens to its answer.
//!
//! # What can change while it runs
//! Accounts, issuers, limits, tenants and routes stand in one [`Live`] that [`Bridge::reload`] replaces as a whole; a
//! request sees one of them from its beginning to its end. New environments and addresses need a restart.
//!
//! # Failure
//! The outbox full or failing is 503 (a tenant's quota 429), the ledger's database down is 503 on what reads it and changes
//! nothing for publishing. A panic in one request is 500 for that request.

mod auth;
mod batch;
mod dead_letters;
mod executions;
mod external;
mod limits;
mod openapi;
mod publish;
mod replay;
pub mod request;
pub mod respond;
mod routes;
mod serve;
mod short;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use executions::{Execution, ExecutionPage};
pub use openapi::document as openapi;
pub use routes::{operator, public};
pub use serve::{Stop, serve};

use crate::broker::{Broker, KeyRing};
use crate::clock::Clock;
use crate::config::{self, EnvironmentConfig};
use crate::finals::{Finals, Receipts};
use crate::ids::{Environment, Tenant};
use crate::n8n::{N8n, Signer};
use crate::outbox::Outbox;
use crate::payloads::Store;
use crate::routing::Router;
use respond::{Kind, Problem};

/// What one environment hands to the bridge. Lives as long as the process.
#[derive(Clone)]
pub struct Parts {
    pub outbox: Outbox,
    pub store: Store,
    pub broker: Broker,
    pub n8n: N8n,
    pub keys: Arc<KeyRing>,
    pub finals: Finals,
    pub receipts: Receipts,
}

/// The bridge of all environments. Cheap to clone.
#[derive(Clone)]
pub struct Bridge(Arc<Inner>);

struct Inner {
    live: ArcSwap<Live>,
    parts: BTreeMap<Environment, Parts>,
    clock: Clock,
    auth: auth::Auth,
    in_flight: limits::InFlight,
    replays: replay::Jobs,
    short_calls: short::UnderWay,
    /// Work that outlives its request: records of direct calls, replay jobs, refreshes of issuers' keys.
    tasks: TaskTracker,
    /// Ends long polls and replay jobs.
    draining: CancellationToken,
}

/// What a reload replaces.
struct Live {
    bridge: config::Bridge,
    accounts: auth::Accounts,
    environments: BTreeMap<Environment, Arc<Env>>,
    trace_sample: f64,
}

/// The settings of one environment.
struct Env {
    config: Arc<EnvironmentConfig>,
    router: Router,
    rates: limits::Rates,
    /// For direct calls.
    signer: Signer,
}

/// An environment as a request sees it.
#[derive(Clone)]
struct Room {
    env: Arc<Env>,
    parts: Parts,
}

impl Bridge {
    /// # Errors
    /// An issuer's HTTP client cannot be made.
    pub fn new(config: &config::Config, parts: BTreeMap<Environment, Parts>, clock: Clock) -> Result<Self, String> {
        let tasks = TaskTracker::new();
        let auth = auth::Auth::new(clock.clone(), tasks.clone());
        let live = Live::new(config, &auth, None)?;
        Ok(Self(Arc::new(Inner {
            live: ArcSwap::from_pointee(live),
            parts,
            clock,
            auth,
            in_flight: limits::InFlight::default(),
            replays: replay::Jobs::default(),
            short_calls: short::UnderWay::default(),
            tasks,
            draining: CancellationToken::new(),
        })))
    }

    /// Takes over accounts, issuers, limits, tenants and routes. Requests under way keep the former ones.
    ///
    /// # Errors
    /// An issuer's HTTP client cannot be made; nothing was changed.
    pub fn reload(&self, config: &config::Config) -> Result<(), String> {
        let live = Live::new(config, &self.0.auth, Some(&self.0.live.load()))?;
        self.0.live.store(Arc::new(live));
        self.0.auth.forget();
        Ok(())
    }

    /// Ends long polls and replay jobs; publishing goes on.
    pub fn drain(&self) {
        self.0.draining.cancel();
    }

    /// Waits for work that outlived its request (records of direct calls).
    pub async fn finish(&self) {
        self.drain();
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }

    fn live(&self) -> Arc<Live> {
        self.0.live.load_full()
    }

    /// The caller's environment.
    fn room(&self, live: &Live, environment: &Environment) -> Result<Room, Problem> {
        match (live.environments.get(environment), self.0.parts.get(environment)) {
            (Some(env), Some(parts)) => Ok(Room { env: env.clone(), parts: parts.clone() }),
            _ => Err(Problem::new(Kind::Forbidden, "the account's environment is not served here")),
        }
    }
}

impl Live {
    fn new(config: &config::Config, auth: &auth::Auth, former: Option<&Live>) -> Result<Self, String> {
        let environments = config
            .environments
            .values()
            .map(|e| {
                let env = Env {
                    signer: Signer::new(&e.delivery)?,
                    router: Router::new(Arc::new(e.clone())),
                    rates: limits::Rates::new(&e.tenants),
                    config: Arc::new(e.clone()),
                };
                Ok((e.name.clone(), Arc::new(env)))
            })
            .collect::<Result<_, String>>()?;
        Ok(Self {
            bridge: config.bridge.clone(),
            accounts: auth::Accounts::new(config, auth, former.map(|l| &l.accounts))?,
            environments,
            trace_sample: config.trace.sample,
        })
    }
}

impl Env {
    /// A tenant that is declared, and granted to the caller. Both failures are one answer.
    fn tenant(&self, caller: &auth::Caller, tenant: &Tenant) -> Result<(), Problem> {
        if self.config.tenant(tenant).is_some() && caller.may_use(tenant) { Ok(()) } else { Err(Problem::no_tenant()) }
    }
}
