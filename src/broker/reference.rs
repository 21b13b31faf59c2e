//! What a reference says, and what may be wrong with one.
//!
//! A reference is all that travels through a broker: whose event it is, where its payload lies, and the payload's hash.
//!
//! # On the wire
//! A compact JWS (RFC 7515): `base64url({"alg":"EdDSA","kid":"…","typ":"JWT"}) . base64url(claims) . base64url(signature)`.
//! The claims are the fields of [`Claims`] as JSON.

use serde::{Deserialize, Serialize};

use crate::ids::{BodyHash, Environment, ExecutionId, Key, Tenant, Topic};

/// What a reference says, and what its signature covers. Names as in RFC 7519 where it has them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    pub execution_id: ExecutionId,
    pub tenant_id: Tenant,
    pub environment: Environment,
    pub topic: Topic,
    /// SHA-256 of the body.
    pub payload_sha256: BodyHash,
    /// Seconds since the epoch.
    pub iat: i64,
    /// Seconds since the epoch. Bounds trust, not work: see [`Verified::expired`].
    pub exp: i64,
}

impl Claims {
    pub fn key(&self) -> Key {
        Key { tenant: self.tenant_id.clone(), execution_id: self.execution_id }
    }
}

/// Why a message is not to be delivered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    #[error("not a signed reference: {0}")]
    Malformed(&'static str),
    #[error("signed with an unknown key")]
    UnknownKey,
    #[error("the signature is wrong")]
    Forged,
    #[error("signed for topic {signed}, found on {found}")]
    Transplanted { signed: Topic, found: Topic },
    #[error("signed for environment {0}")]
    Environment(Environment),
    #[error("topic {topic} is not one of tenant {tenant}")]
    Tenant { topic: Topic, tenant: Tenant },
}

impl Rejection {
    /// A bounded word for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::UnknownKey => "unknown_key",
            Self::Forged => "forged",
            Self::Transplanted { .. } => "transplanted",
            Self::Environment(_) => "environment",
            Self::Tenant { .. } => "tenant",
        }
    }
}

/// A reference whose signature was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    pub claims: Claims,
    /// Authentic, but `exp` is past: deliver only what the ledger knows as open.
    pub expired: bool,
}
