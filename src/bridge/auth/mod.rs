//! Who calls: a service account with a static token, or a client of an OAuth2 issuer.
//!
//! # Known attacks and our answer
//! - *Guessing tokens*: only SHA-256 hashes are stored and looked up; tokens are made with 256 bits. Failures are counted per
//!   address, and beyond [`FAILURES_MAX`] in a minute an address gets 429 instead of 401 and no signature is checked for it.
//!   A right token still works from there, so nobody can be locked out by a neighbour; loopback is never limited.
//! - *`alg: none`, HMAC with the public key, another key's algorithm*: the algorithms of an issuer are pinned in the
//!   configuration, whose type has no HMAC and no `none`; symmetric keys of a key set are left out; a key is used only
//!   with the algorithm that it names, and only for signatures.
//! - *A token for somebody else*: issuer and audience must be ours; ID tokens carry the client as audience and fail there.
//! - *Unknown key ids to make us fetch*: fetches are single-flight and at least ten seconds apart for each issuer.
//! - *Timing*: the found hash is compared in constant time; an unknown hash tells nothing about a known one.
//!
//! # Failure
//! An issuer that is down: tokens signed with keys that are cached go on working; others are 503.

mod jwks;
mod jwt;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, header};
use tokio_util::task::TaskTracker;

use super::respond::{Kind, Problem};
use crate::clock::Clock;
use crate::config::accounts::Grant;
use crate::config::routes::Pattern;
use crate::config::{self, Rights};
use crate::ids::{BodyHash, Environment, Tenant};
use crate::observe::bridge as events;

/// An authenticated caller.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The account's name, or `ISSUER/CLIENT`. For logs and for what belongs to the caller (replay jobs).
    pub name: String,
    pub grant: Grant,
    /// Every tenant is granted.
    all: bool,
}

impl Caller {
    fn new(name: String, grant: Grant) -> Self {
        let all = grant.tenants.iter().any(|p| p.as_str() == "*");
        Self { name, grant, all }
    }

    /// Who may open the operators' socket may do everything.
    pub fn operator(environment: Environment) -> Self {
        let tenants = vec![Pattern::new("*")];
        Self::new("operator".into(), Grant { environment, tenants, rights: Rights::ALL })
    }

    pub fn may_use(&self, tenant: &Tenant) -> bool {
        self.all || self.grant.tenants.iter().any(|p| p.matches(tenant.as_str()))
    }

    /// The granted patterns, `None` when all tenants are granted.
    pub fn tenants(&self) -> Option<&[Pattern]> {
        (!self.all).then_some(&self.grant.tenants)
    }

    /// The one tenant of a caller that has only one.
    pub fn only_tenant(&self) -> Option<Tenant> {
        match self.grant.tenants.as_slice() {
            [one] => Tenant::try_new(one.as_str()).ok(),
            _ => None,
        }
    }
}

/// Accounts and issuers, as configured now.
pub struct Accounts {
    tokens: HashMap<BodyHash, Arc<Caller>>,
    verifiers: Vec<Arc<jwt::Verifier>>,
    anonymous: Option<Arc<Caller>>,
}

impl Accounts {
    /// Issuers whose settings did not change keep their keys.
    ///
    /// # Errors
    /// The HTTP client for issuers cannot be made.
    pub fn new(config: &config::Config, auth: &Auth, former: Option<&Accounts>) -> Result<Self, String> {
        let accounts = &config.accounts;
        let mut tokens = HashMap::new();
        for account in &accounts.accounts {
            let caller = Arc::new(Caller::new(account.name.clone(), account.grant.clone()));
            tokens.extend(account.token_sha256.iter().map(|hash| (*hash, caller.clone())));
        }
        let only = config.environments.keys().next().filter(|_| config.environments.len() == 1);
        let verifiers = accounts
            .issuers
            .iter()
            .map(|issuer| {
                let same = former.and_then(|f| f.verifiers.iter().find(|v| v.keys.issuer == issuer.issuer));
                let keys = match same {
                    Some(verifier) => verifier.keys.clone(),
                    None => Arc::new(jwks::Keys::new(&issuer.name, &issuer.issuer, auth.tasks.clone())?),
                };
                Ok(Arc::new(jwt::Verifier { config: issuer.clone(), only: only.cloned(), keys }))
            })
            .collect::<Result<_, String>>()?;
        let anonymous = accounts.anonymous.clone().filter(|_| !config.bridge.token_required);
        Ok(Self { tokens, verifiers, anonymous: anonymous.map(|g| Arc::new(Caller::new("anonymous".into(), g))) })
    }
}

/// Failed logins of one address within a minute, beyond which it gets 429.
pub const FAILURES_MAX: u32 = 20;
const FAILURES_WINDOW: Duration = Duration::from_secs(60);
/// Addresses and verified tokens that are remembered. Beyond it the oldest knowledge is dropped, never the service.
const REMEMBERED_MAX: usize = 10_000;

/// What is remembered between requests.
pub struct Auth {
    clock: Clock,
    tasks: TaskTracker,
    /// Verified JWTs by the hash of the whole token, until they expire (seconds).
    verified: Mutex<HashMap<BodyHash, (Arc<Caller>, i64)>>,
    failures: Failures,
}

impl Auth {
    pub fn new(clock: Clock, tasks: TaskTracker) -> Self {
        Self { clock, tasks, verified: Mutex::default(), failures: Failures::default() }
    }

    /// After a reload no token is good because it was good before.
    pub fn forget(&self) {
        self.verified().clear();
    }

    fn verified(&self) -> MutexGuard<'_, HashMap<BodyHash, (Arc<Caller>, i64)>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// 401, 403 (a right token without any grant), 429 (too many failures), 503 (issuer down).
    pub async fn caller(
        &self,
        accounts: &Accounts,
        headers: &HeaderMap,
        address: Option<IpAddr>,
    ) -> Result<Arc<Caller>, Problem> {
        let token = match bearer(headers) {
            Ok(Some(token)) => token,
            Ok(None) => {
                if let Some(anonymous) = &accounts.anonymous {
                    return Ok(anonymous.clone());
                }
                // Not a guess: nothing to count against the address.
                return Err(Problem::new(Kind::Unauthorized, "send a token: Authorization: Bearer TOKEN"));
            }
            Err(problem) => return Err(self.failed(address, "malformed", problem)),
        };
        let hash = BodyHash::of(token.as_bytes());
        if let Some((known, caller)) = accounts.tokens.get_key_value(&hash)
            && aws_lc_rs::constant_time::verify_slices_are_equal(&known.0, &hash.0).is_ok()
        {
            return Ok(caller.clone());
        }
        let now = self.clock.now().as_secs();
        if let Some((caller, until)) = self.verified().get(&hash)
            && now < *until
        {
            return Ok(caller.clone());
        }
        let looks_like_jwt = token.bytes().filter(|b| *b == b'.').count() == 2;
        if !looks_like_jwt || accounts.verifiers.is_empty() {
            let problem = Problem::new(Kind::Unauthorized, "the token is not known");
            return Err(self.failed(address, "unknown_token", problem));
        }
        if let Some(seconds) = self.failures.blocked(address) {
            return Err(blocked(seconds));
        }
        match jwt::verify(&accounts.verifiers, token, now).await {
            Ok((caller, until)) => {
                let caller = Arc::new(caller);
                let mut verified = self.verified();
                if verified.len() >= REMEMBERED_MAX {
                    verified.retain(|_, (_, until)| now < *until);
                }
                if verified.len() >= REMEMBERED_MAX {
                    verified.clear();
                }
                verified.insert(hash, (caller.clone(), until));
                Ok(caller)
            }
            Err(refused) => {
                let (reason, problem) = refused.problem();
                match problem.kind {
                    Kind::Unauthorized => Err(self.failed(address, reason, problem)),
                    _ => Err(problem),
                }
            }
        }
    }

    /// Counts a failure; the answer is 401 or, after too many, 429.
    pub fn failed(&self, address: Option<IpAddr>, reason: &'static str, problem: Problem) -> Problem {
        events::LoginFailed { reason, address }.emit();
        match self.failures.count(address) {
            Some(seconds) => blocked(seconds),
            None => problem,
        }
    }
}

fn blocked(seconds: u64) -> Problem {
    Problem::new(Kind::TooManyFailures, "too many failed logins from this address").retry_after(seconds)
}

/// The token of `Authorization: Bearer`, `None` without the header.
///
/// # Errors
/// 401 for another scheme, several headers, or text that is no token (RFC 6750, section 2.1).
pub fn bearer(headers: &HeaderMap) -> Result<Option<&str>, Problem> {
    const BAD: &str = "expected Authorization: Bearer TOKEN";
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let value = match (values.next(), values.next()) {
        (None, _) => return Ok(None),
        (Some(value), None) => value,
        (Some(_), Some(_)) => return Err(Problem::new(Kind::Unauthorized, BAD)),
    };
    let token = value.to_str().ok().and_then(|text| {
        let (scheme, token) = text.split_once(' ')?;
        let token = token.trim_matches(' ');
        let b68 = |b: u8| b.is_ascii_alphanumeric() || b"-._~+/=".contains(&b);
        (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() && token.bytes().all(b68)).then_some(token)
    });
    token.map(Some).ok_or_else(|| Problem::new(Kind::Unauthorized, BAD))
}

/// Failed logins by address.
#[derive(Default)]
struct Failures {
    /// Length of the map, readable without the lock: nearly always zero.
    known: AtomicUsize,
    by_address: Mutex<HashMap<IpAddr, (u32, Instant)>>,
}

impl Failures {
    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, (u32, Instant)>> {
        self.by_address.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An address that can be limited. IPv6 counts by /64, the smallest network that one host gets.
    fn bucket(address: Option<IpAddr>) -> Option<IpAddr> {
        match address? {
            ip if ip.is_loopback() => None,
            IpAddr::V6(ip) => Some(IpAddr::V6((u128::from(ip) >> 64 << 64).into())),
            ip => Some(ip),
        }
    }

    /// Seconds until the address may try again.
    fn blocked(&self, address: Option<IpAddr>) -> Option<u64> {
        if self.known.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let bucket = Self::bucket(address)?;
        let (count, since) = *self.lock().get(&bucket)?;
        let left = FAILURES_WINDOW.saturating_sub(since.elapsed());
        (count > FAILURES_MAX && !left.is_zero()).then_some(left.as_secs() + 1)
    }

    fn count(&self, address: Option<IpAddr>) -> Option<u64> {
        let bucket = Self::bucket(address)?;
        let mut known = self.lock();
        if known.len() >= REMEMBERED_MAX {
            known.retain(|_, (_, since)| since.elapsed() < FAILURES_WINDOW);
        }
        if known.len() >= REMEMBERED_MAX {
            known.clear();
        }
        let entry = known.entry(bucket).or_insert((0, Instant::now()));
        if entry.1.elapsed() >= FAILURES_WINDOW {
            *entry = (0, Instant::now());
        }
        entry.0 = entry.0.saturating_add(1);
        let (count, since) = *entry;
        self.known.store(known.len(), Ordering::Relaxed);
        let left = FAILURES_WINDOW.saturating_sub(since.elapsed());
        (count > FAILURES_MAX).then_some(left.as_secs() + 1)
    }
}

#[cfg(test)]
mod tests;
