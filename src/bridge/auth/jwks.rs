//! The public keys of an issuer: discovered, cached, fetched again when a token names a key that is not there.
//!
//! # Invariants
//! 1. At most one fetch is under way per issuer, and two are at least [`PAUSE`] apart: unknown key ids cannot make us ask
//!    faster.
//! 2. A failed fetch changes nothing: the keys of the last good one go on.
//! 3. Keys older than [`AGE`] are fetched again beside the requests, so that a withdrawn key goes within that time.
//! 4. No redirect is followed and no answer over [`ANSWER_MAX`] is read; the document must name this issuer, and an `https`
//!    issuer cannot send us to plain `http`.
//! 5. Symmetric keys, encryption keys and keys for algorithms that we do not know are left out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use jsonwebtoken::jwk::{AlgorithmParameters, Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use tokio_util::task::TaskTracker;

use super::jwt::Refused;
use crate::observe::bridge as events;

/// Between two fetches.
const PAUSE: Duration = Duration::from_secs(10);
/// After which keys are fetched again. OpenID providers commonly say an hour.
const AGE: Duration = Duration::from_secs(3600);
/// Of one request to the issuer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Discovery documents and key sets have a few KiB.
const ANSWER_MAX: usize = 1 << 20;

pub struct Keys {
    /// The issuer's name in the configuration.
    name: String,
    /// `iss`.
    pub issuer: String,
    http: reqwest::Client,
    known: ArcSwapOption<Known>,
    /// Held while fetching; the time of the last try.
    fetching: tokio::sync::Mutex<Option<Instant>>,
    refreshing: AtomicBool,
    tasks: TaskTracker,
    last_error: Mutex<Option<String>>,
}

struct Known {
    keys: Vec<Key>,
    at: Instant,
}

struct Key {
    id: Option<String>,
    /// The key's own `alg`, or none if it does not say.
    algorithm: Option<Algorithm>,
    family: Family,
    key: Arc<DecodingKey>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    Rsa,
    P256,
    P384,
    Ed25519,
}

impl Key {
    fn read(jwk: &Jwk) -> Option<Self> {
        use jsonwebtoken::jwk::EllipticCurve as C;
        if matches!(&jwk.common.public_key_use, Some(u) if *u != PublicKeyUse::Signature) {
            return None;
        }
        let family = match &jwk.algorithm {
            AlgorithmParameters::RSA(_) => Family::Rsa,
            AlgorithmParameters::EllipticCurve(p) if p.curve == C::P256 => Family::P256,
            AlgorithmParameters::EllipticCurve(p) if p.curve == C::P384 => Family::P384,
            AlgorithmParameters::OctetKeyPair(p) if p.curve == C::Ed25519 => Family::Ed25519,
            _ => return None,
        };
        let algorithm = match jwk.common.key_algorithm {
            // What the library knows but signs nothing with (key wrapping) has no algorithm of this name.
            Some(alg) => Some(alg.to_string().parse().ok()?),
            None => None,
        };
        let key = DecodingKey::from_jwk(jwk).ok()?;
        Some(Self { id: jwk.common.key_id.clone(), algorithm, family, key: Arc::new(key) })
    }

    fn fits(&self, id: Option<&str>, alg: Algorithm) -> bool {
        let family = match alg {
            Algorithm::RS256
            | Algorithm::RS384
            | Algorithm::RS512
            | Algorithm::PS256
            | Algorithm::PS384
            | Algorithm::PS512 => Family::Rsa,
            Algorithm::ES256 => Family::P256,
            Algorithm::ES384 => Family::P384,
            Algorithm::EdDSA => Family::Ed25519,
            _ => return false,
        };
        // A token without `kid` is taken where the set has one key that fits.
        (id.is_none() || self.id.as_deref() == id)
            && self.family == family
            && self.algorithm.is_none_or(|own| own == alg)
    }
}

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

impl Keys {
    pub fn new(name: &str, issuer: &str, tasks: TaskTracker) -> Result<Self, String> {
        let http = reqwest::Client::builder()
            .timeout(TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|e| format!("cannot make an HTTP client for issuer {name}: {e}"))?;
        Ok(Self {
            name: name.to_owned(),
            issuer: issuer.to_owned(),
            http,
            known: ArcSwapOption::empty(),
            fetching: tokio::sync::Mutex::new(None),
            refreshing: AtomicBool::new(false),
            tasks,
            last_error: Mutex::default(),
        })
    }

    /// The key for a token's header.
    pub async fn find(self: &Arc<Self>, id: Option<&str>, alg: Algorithm) -> Result<Arc<DecodingKey>, Refused> {
        let before = self.known.load_full();
        if let Some(known) = &before {
            if known.at.elapsed() > AGE {
                self.refresh_beside();
            }
            if let Some(key) = known.find(id, alg) {
                return Ok(key);
            }
        }
        let mut last = self.fetching.lock().await;
        // Somebody else fetched while this request waited.
        let now = self.known.load_full();
        let fetched = match (&before, &now) {
            (None, Some(_)) => true,
            (Some(a), Some(b)) => !Arc::ptr_eq(a, b),
            _ => false,
        };
        if !fetched {
            if last.is_some_and(|at| at.elapsed() < PAUSE) {
                // Asked a moment ago: without success we do not know, with success the key does not exist.
                let failed = self.last_error.lock().unwrap_or_else(PoisonError::into_inner).is_some();
                return Err(if failed || now.is_none() { Refused::IssuerDown } else { Refused::UnknownKey });
            }
            *last = Some(Instant::now());
            if self.fetch().await.is_err() {
                return Err(Refused::IssuerDown);
            }
        }
        self.known.load().as_ref().and_then(|known| known.find(id, alg)).ok_or(Refused::UnknownKey)
    }

    /// As if the last fetch had been `by` earlier.
    #[cfg(test)]
    pub(super) async fn age_fetch(&self, by: Duration) {
        let mut last = self.fetching.lock().await;
        *last = last.and_then(|at| at.checked_sub(by));
    }

    fn refresh_beside(self: &Arc<Self>) {
        if self.refreshing.swap(true, Ordering::AcqRel) {
            return;
        }
        let keys = self.clone();
        self.tasks.spawn(async move {
            let mut last = keys.fetching.lock().await;
            if last.is_none_or(|at| at.elapsed() >= PAUSE) {
                *last = Some(Instant::now());
                // Reported by `fetch`; the old keys go on.
                let _ = keys.fetch().await;
            }
            keys.refreshing.store(false, Ordering::Release);
        });
    }

    async fn fetch(&self) -> Result<(), ()> {
        let result = self.try_fetch().await;
        let shown = result.as_ref().map(|known| known.keys.len()).map_err(String::as_str);
        events::KeysFetched { issuer: &self.name, result: shown }.emit();
        let mut last_error = self.last_error.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(known) => {
                *last_error = None;
                self.known.store(Some(Arc::new(known)));
                Ok(())
            }
            Err(error) => {
                *last_error = Some(error);
                Err(())
            }
        }
    }

    async fn try_fetch(&self) -> Result<Known, String> {
        let mut errors = Vec::new();
        for url in places(&self.issuer)? {
            match self.get::<Discovery>(url).await {
                Ok(found) if found.issuer != self.issuer => {
                    errors.push("the document names another issuer".to_owned());
                }
                Ok(found) => {
                    let url = found.jwks_uri.parse::<reqwest::Url>().map_err(|e| format!("jwks_uri: {e}"))?;
                    if !matches!(url.scheme(), "https" | "http")
                        || (self.issuer.starts_with("https:") && url.scheme() != "https")
                    {
                        return Err("jwks_uri must be https".into());
                    }
                    // Lenient on purpose: one key of a kind that we do not know must not cost the others.
                    #[derive(Deserialize)]
                    struct Set {
                        keys: Vec<serde_json::Value>,
                    }
                    let set = self.get::<Set>(url).await?;
                    let jwks = set.keys.into_iter().filter_map(|v| serde_json::from_value::<Jwk>(v).ok());
                    let keys: Vec<_> = jwks.filter_map(|jwk| Key::read(&jwk)).collect();
                    if keys.is_empty() {
                        return Err("the key set has no key that can be used".into());
                    }
                    return Ok(Known { keys, at: Instant::now() });
                }
                Err(error) => errors.push(error),
            }
        }
        Err(errors.join("; "))
    }

    async fn get<T: serde::de::DeserializeOwned>(&self, url: reqwest::Url) -> Result<T, String> {
        let at = url.path().to_owned();
        let fail = |error: reqwest::Error| format!("{at}: {}", error.without_url());
        let mut response = self.http.get(url).send().await.map_err(&fail)?;
        if !response.status().is_success() {
            return Err(format!("{at}: {}", response.status()));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(&fail)? {
            if body.len() + chunk.len() > ANSWER_MAX {
                return Err(format!("{at}: the answer is too long"));
            }
            body.extend_from_slice(&chunk);
        }
        serde_json::from_slice(&body).map_err(|_| format!("{at}: not the expected JSON"))
    }
}

impl Known {
    fn find(&self, id: Option<&str>, alg: Algorithm) -> Option<Arc<DecodingKey>> {
        let mut fitting = self.keys.iter().filter(|k| k.fits(id, alg));
        let key = fitting.next()?;
        // Without `kid`, two keys that fit are one too many to guess.
        (id.is_some() || fitting.next().is_none()).then(|| key.key.clone())
    }
}

/// OpenID Connect Discovery 1.0 appends to the issuer's path, RFC 8414 puts its part in front of it.
fn places(issuer: &str) -> Result<Vec<reqwest::Url>, String> {
    let base = issuer.parse::<reqwest::Url>().map_err(|e| format!("the issuer is no URL: {e}"))?;
    let path = base.path().trim_end_matches('/').to_owned();
    let at = |path: String| {
        let mut url = base.clone();
        url.set_path(&path);
        url
    };
    Ok(vec![
        at(format!("{path}/.well-known/openid-configuration")),
        at(format!("/.well-known/oauth-authorization-server{path}")),
    ])
}
