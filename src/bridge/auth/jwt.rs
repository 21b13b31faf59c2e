//! Access tokens of OAuth2 issuers (RFC 9068 in spirit: signed JWTs with issuer, audience and expiry).
//!
//! # Invariants
//! 1. A token is good only if: its issuer is configured, its algorithm is one of that issuer's and the key's own, the
//!    signature is right, the audience is ours, `exp` is there and not past, `nbf` has come; both with `leeway`.
//! 2. Nothing inside the token is believed before its signature is checked, except `iss` and `kid` to find the key.
//! 3. A tenants claim grants exactly the names in it: a `*` in a token is no pattern.

use std::sync::Arc;

use base64::Engine;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde_json::Value;

use super::super::respond::{Kind, Problem};
use super::{Caller, jwks};
use crate::config::Rights;
use crate::config::accounts::{Grant, Issuer};
use crate::config::routes::Pattern;
use crate::ids::{Environment, Tenant};

/// One issuer.
pub struct Verifier {
    pub config: Issuer,
    /// The environment where there is only one.
    pub only: Option<Environment>,
    pub keys: Arc<jwks::Keys>,
}

/// Why a token is not accepted. Callers learn the word, not more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    Malformed,
    UnknownIssuer,
    Algorithm,
    UnknownKey,
    Signature,
    Audience,
    Expired,
    NotYet,
    /// The issuer's keys cannot be fetched.
    IssuerDown,
    /// Authentic, but nothing is granted to this client.
    NoGrant,
}

impl Refused {
    pub fn problem(self) -> (&'static str, Problem) {
        let unauthorized = |detail| Problem::new(Kind::Unauthorized, detail);
        match self {
            Self::Malformed => ("malformed", unauthorized("the token is not a signed JWT")),
            Self::UnknownIssuer => ("unknown_issuer", unauthorized("the token's issuer is not known here")),
            Self::Algorithm => ("algorithm", unauthorized("the token's algorithm is not allowed for its issuer")),
            Self::UnknownKey => ("unknown_key", unauthorized("the token is signed with an unknown key")),
            Self::Signature => ("signature", unauthorized("the token's signature is wrong")),
            Self::Audience => ("audience", unauthorized("the token is for another audience")),
            Self::Expired => ("expired", unauthorized("the token has expired")),
            Self::NotYet => ("not_yet", unauthorized("the token is not valid yet")),
            Self::IssuerDown => (
                "issuer_down",
                Problem::new(Kind::IssuerUnavailable, "the keys of the token's issuer cannot be fetched now"),
            ),
            Self::NoGrant => ("no_grant", Problem::new(Kind::Forbidden, "nothing is granted to this client")),
        }
    }
}

/// The caller, and until when (seconds) the verdict holds.
pub async fn verify(verifiers: &[Arc<Verifier>], token: &str, now: i64) -> Result<(Caller, i64), Refused> {
    let header = jsonwebtoken::decode_header(token).map_err(|error| match error.kind() {
        // `none`, and algorithms that nobody has heard of.
        jsonwebtoken::errors::ErrorKind::InvalidAlgorithmName | jsonwebtoken::errors::ErrorKind::Json(_) => {
            Refused::Algorithm
        }
        _ => Refused::Malformed,
    })?;
    // We know no extension that a token could call critical (RFC 7515, section 4.1.11).
    if header.crit.is_some() {
        return Err(Refused::Malformed);
    }
    let verifier = {
        let claims = unverified(token).ok_or(Refused::Malformed)?;
        let issuer = claims.get("iss").and_then(Value::as_str).ok_or(Refused::UnknownIssuer)?;
        verifiers.iter().find(|v| v.config.issuer == issuer).ok_or(Refused::UnknownIssuer)?
    };
    if !verifier.config.algorithms.iter().any(|a| a.0 == header.alg) {
        return Err(Refused::Algorithm);
    }
    let key = verifier.keys.find(header.kid.as_deref(), header.alg).await?;
    let claims = checked(token, &key, header.alg, &verifier.config, now)?;
    let until = claims.get("exp").and_then(seconds).ok_or(Refused::Expired)?.saturating_add(leeway(&verifier.config));
    Ok((verifier.caller(&claims)?, until))
}

fn unverified(token: &str) -> Option<Value> {
    let payload = token.split('.').nth(1)?;
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(payload).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// The claims, after all checks. Time is the caller's, so the library's own clock is not asked.
fn checked(token: &str, key: &DecodingKey, alg: Algorithm, issuer: &Issuer, now: i64) -> Result<Value, Refused> {
    use jsonwebtoken::errors::ErrorKind as E;
    let mut validation = Validation::new(alg);
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation.set_issuer(&[&issuer.issuer]);
    validation.set_audience(&[&issuer.audience]);
    validation.set_required_spec_claims(&["exp", "iss", "aud"]);
    let claims: Value = jsonwebtoken::decode(token, key, &validation)
        .map_err(|error| match error.kind() {
            E::InvalidAudience => Refused::Audience,
            E::MissingRequiredClaim(claim) if claim == "aud" => Refused::Audience,
            E::MissingRequiredClaim(claim) if claim == "exp" => Refused::Expired,
            E::InvalidIssuer => Refused::UnknownIssuer,
            E::InvalidAlgorithm => Refused::Algorithm,
            E::InvalidSignature => Refused::Signature,
            _ => Refused::Malformed,
        })?
        .claims;
    let leeway = leeway(issuer);
    let exp = claims.get("exp").and_then(seconds).ok_or(Refused::Expired)?;
    if now >= exp.saturating_add(leeway) {
        return Err(Refused::Expired);
    }
    match claims.get("nbf") {
        None => {}
        Some(nbf) if seconds(nbf).is_some_and(|nbf| nbf <= now.saturating_add(leeway)) => {}
        Some(_) => return Err(Refused::NotYet),
    }
    Ok(claims)
}

fn leeway(issuer: &Issuer) -> i64 {
    issuer.leeway.0.as_secs() as i64
}

/// A NumericDate (RFC 7519, section 2), which may have a fraction.
fn seconds(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_f64().filter(|f| f.is_finite()).map(|f| f as i64))
}

impl Verifier {
    /// From the client's own entry or the issuer's default, with the claims over both.
    fn caller(&self, claims: &Value) -> Result<Caller, Refused> {
        let config = &self.config;
        let text = |name: &str| claims.get(name).and_then(Value::as_str);
        let named = ["client_id", "azp", "sub"].into_iter().filter_map(text);
        let client = named.clone().find_map(|name| config.clients.get(name));
        let base = client.or(config.default_grant.as_ref());
        let claimed = |name: &Option<String>| name.as_ref().and_then(|name| claims.get(name)).map(words);

        let tenants = match claimed(&config.tenants_claim) {
            Some(names) => names.iter().filter(|n| Tenant::try_new(n).is_ok()).map(|n| Pattern::new(n)).collect(),
            None => base.map(|g| g.tenants.clone()).unwrap_or_default(),
        };
        let rights = match claimed(&config.rights_claim) {
            Some(words) => Rights::from_words(words.iter().map(String::as_str)),
            None => base.map(|g| g.rights).unwrap_or_default(),
        };
        let environment = match config.environment_claim.as_ref().and_then(|name| claims.get(name)) {
            // Named, but not ours: nothing is granted, least of all another environment.
            Some(name) => Some(name.as_str().and_then(|n| Environment::try_new(n).ok()).ok_or(Refused::NoGrant)?),
            None => base.map(|g| g.environment.clone()).or_else(|| self.only.clone()),
        };
        let environment = environment.ok_or(Refused::NoGrant)?;
        if tenants.is_empty() || rights == Rights::default() {
            return Err(Refused::NoGrant);
        }
        let name = format!("{}/{}", config.name, named.clone().next().unwrap_or("unnamed"));
        Ok(Caller::new(name, Grant { environment, tenants, rights }))
    }
}

/// A claim that is a text of words or a list of texts.
fn words(value: &Value) -> Vec<String> {
    match value {
        Value::String(text) => text.split_whitespace().map(str::to_owned).collect(),
        Value::Array(items) => items.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    }
}
