//! Names and identities. Each is checked once, where it enters; afterwards its type is the proof.
//!
//! A name's rule is written down once for people, once for schemas and once as code, side by side; a test holds the three
//! together. What the API's document says about a field of such a type is therefore what the code does.
//!
//! Layer 0: knows nobody.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::openapi::{KnownFormat, ObjectBuilder, RefOr, Schema, SchemaFormat, Type};
use utoipa::{PartialSchema, ToSchema};
use uuid::Uuid;

/// Why a name was refused. Says the rule, not the value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} must match {rule}")]
pub struct Invalid {
    pub what: &'static str,
    pub rule: &'static str,
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal, $rule:literal, $max:literal, $pattern:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(Arc<str>);

        impl $type {
            /// The rule as a schema says it (ECMA-262), beside 1 to [`MAX`](Self::MAX) characters.
            pub const PATTERN: &'static str = $pattern;
            pub const MAX: usize = $max;

            /// Checks `text` against the rule of this name.
            pub fn try_new(text: &str) -> Result<Self, Invalid> {
                let valid: fn(&str) -> bool = $valid;
                if valid(text) { Ok(Self(text.into())) } else { Err(Invalid { what: $what, rule: $rule }) }
            }
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }
        impl FromStr for $type {
            type Err = Invalid;
            fn from_str(text: &str) -> Result<Self, Invalid> {
                Self::try_new(text)
            }
        }
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(&self.0)
            }
        }
        impl PartialSchema for $type {
            fn schema() -> RefOr<Schema> {
                let text = ObjectBuilder::new().schema_type(Type::String).pattern(Some($pattern));
                text.min_length(Some(1)).max_length(Some($max)).into()
            }
        }
        impl ToSchema for $type {}
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<str>::deserialize(d)?;
                Self::try_new(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}

/// `first` then up to `max - 1` bytes of `rest`.
fn shaped(text: &str, max: usize, first: fn(u8) -> bool, rest: fn(u8) -> bool) -> bool {
    let bytes = text.as_bytes();
    bytes.len() <= max && bytes.first().is_some_and(|b| first(*b)) && bytes[1..].iter().all(|b| rest(*b))
}

/// 1 to `max` characters, none of them a control character. (No text of `max` characters has more than four times as many
/// bytes, so that a long one is not counted through.)
fn printable(text: &str, max: usize) -> bool {
    !text.is_empty() && text.len() <= 4 * max && text.chars().count() <= max && !text.chars().any(char::is_control)
}

fn lower_or_digit(b: u8) -> bool {
    b.is_ascii_lowercase() || b.is_ascii_digit()
}

name! {
    /// One isolated set of outbox, store, broker namespace and n8n (`production`, `staging`). Decided by the caller's
    /// account or listener, never by a request's body.
    Environment, "an environment", "[a-z][a-z0-9]{0,19}", 20, "^[a-z][a-z0-9]*$",
    |text| shaped(text, 20, |b| b.is_ascii_lowercase(), lower_or_digit)
}

name! {
    /// Whose work it is. Part of topic names, hence the narrow alphabet.
    Tenant, "a tenant", "[a-z0-9][a-z0-9-]{0,62}", 63, "^[a-z0-9][a-z0-9-]*$",
    |text| shaped(text, 63, lower_or_digit, |b| lower_or_digit(b) || b == b'-')
}

name! {
    /// A topic's own name, without Pulsar's tenant and namespace: `dealscale.workflow.long`, `dealscale.workflow.long.acme`.
    Topic, "a topic", "[a-z0-9][a-z0-9._-]{0,199}", 200, "^[a-z0-9][a-z0-9._-]*$",
    |text| shaped(text, 200, lower_or_digit, |b| lower_or_digit(b) || matches!(b, b'.' | b'-' | b'_'))
}

name! {
    /// The workflow that an event is for, as routes name it. Any printable text without control characters.
    Workflow, "a workflow", "1 to 200 characters without control characters", 200, r"^[^\u0000-\u001f\u007f-\u009f]+$",
    |text| printable(text, 200)
}

name! {
    /// Events with the same key, accepted by one appliance, are delivered one after the other.
    OrderingKey, "an ordering key", "1 to 200 characters without control characters", 200, r"^[^\u0000-\u001f\u007f-\u009f]+$",
    |text| printable(text, 200)
}

name! {
    /// What kind of failure ended an event (`http_4xx`, `timeout`, `poisoned`, …), as callers ask for it.
    ErrorClass, "an error class", "1 to 100 characters without control characters", 100, r"^[^\u0000-\u001f\u007f-\u009f]+$",
    |text| printable(text, 100)
}

impl Topic {
    /// Where events of this topic end that cannot be delivered: `dealscale.deadletter.workflow.long` for
    /// `dealscale.workflow.long`, `dealscale.deadletter.NAME` for a name that does not start with `dealscale.`.
    pub fn dead_letter(&self) -> Topic {
        let rest = self.0.strip_prefix("dealscale.").unwrap_or(&self.0);
        Topic(format!("dealscale.deadletter.{rest}").into())
    }
}

/// What stands for the tenant's name in a topic template.
pub const TENANT: &str = "{tenant}";

/// The tenant that makes `topic` of `template`.
pub fn tenant_in(template: &str, topic: &Topic) -> Option<Tenant> {
    let (prefix, rest) = template.split_once(TENANT)?;
    let tail = topic.as_str().strip_prefix(prefix)?;
    // With one placeholder the suffix is literal. With several, the first one ends where the text up to the next begins.
    let suffix = rest.split(TENANT).next().unwrap_or_default();
    let ends: Vec<usize> = if rest.contains(TENANT) {
        tail.match_indices(suffix).map(|(at, _)| at).collect()
    } else {
        tail.len().checked_sub(suffix.len()).into_iter().collect()
    };
    ends.into_iter()
        .filter_map(|end| Tenant::try_new(tail.get(..end)?).ok())
        .find(|tenant| template.replace(TENANT, tenant.as_str()) == topic.as_str())
}

/// The id of one event, a UUID: version 7 when we make it, any version when the caller does, version 5 when it is
/// derived from an `Idempotency-Key`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct ExecutionId(pub Uuid);

impl ExecutionId {
    /// A new id; later ones sort behind earlier ones.
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }

    /// The id that every appliance derives from the same idempotency key of the same environment and tenant
    /// (UUID version 5, RFC 9562 section 5.5; the name space is our own constant).
    pub fn from_idempotency_key(environment: &Environment, tenant: &Tenant, key: &str) -> Self {
        const SPACE: Uuid = Uuid::from_u128(0x6f1d_2c1e_0d5b_4a55_9d5c_0b1f_5ea1_cafe);
        // None of the first two can contain a newline, so the parts cannot run into each other.
        Self(Uuid::new_v5(&SPACE, format!("{environment}\n{tenant}\n{key}").as_bytes()))
    }
}

impl Default for ExecutionId {
    fn default() -> Self {
        Self::new()
    }
}
impl fmt::Display for ExecutionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}
impl fmt::Debug for ExecutionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}
impl FromStr for ExecutionId {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        // Only the form of RFC 9562, section 4: the library reads braces, URNs and bare digits as well, and one id must
        // not have four spellings.
        let id = if text.len() == 36 { Uuid::parse_str(text).ok() } else { None };
        id.map(Self).ok_or(Invalid { what: "an execution_id", rule: "a UUID of 36 characters (8-4-4-4-12)" })
    }
}
impl<'de> Deserialize<'de> for ExecutionId {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}
impl PartialSchema for ExecutionId {
    fn schema() -> RefOr<Schema> {
        let uuid = SchemaFormat::KnownFormat(KnownFormat::Uuid);
        ObjectBuilder::new().schema_type(Type::String).format(Some(uuid)).into()
    }
}
impl ToSchema for ExecutionId {}

/// The identity of an event inside one environment. Two tenants with one id are two events.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Key {
    pub tenant: Tenant,
    pub execution_id: ExecutionId,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tenant, self.execution_id)
    }
}

/// SHA-256 of an event's body.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BodyHash(pub [u8; 32]);

impl BodyHash {
    pub fn of(body: &[u8]) -> Self {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, body);
        Self(digest.as_ref().try_into().expect("SHA-256 has 32 bytes"))
    }
}
impl fmt::Display for BodyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}
impl fmt::Debug for BodyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl FromStr for BodyHash {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        const BAD: Invalid = Invalid { what: "a body hash", rule: "64 hexadecimal digits" };
        if text.len() != 64 || !text.is_ascii() {
            return Err(BAD);
        }
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(text.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| BAD)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| BAD)?;
        }
        Ok(Self(hash))
    }
}
impl Serialize for BodyHash {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}
impl<'de> Deserialize<'de> for BodyHash {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_to_their_rules() {
        for good in ["acme", "a", "0-9", &"a".repeat(63)] {
            assert!(Tenant::try_new(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "Acme", "a_b", "a.b", "a/b", "ä", &"a".repeat(64)] {
            assert!(Tenant::try_new(bad).is_err(), "{bad}");
        }
        assert!(Environment::try_new("production").is_ok());
        assert!(Environment::try_new("1st").is_err());
        assert!(Environment::try_new(&"a".repeat(21)).is_err());
    }

    #[test]
    fn a_schema_says_what_the_code_does() {
        let mut samples: Vec<String> =
            ["", " ", "a", "A", "-", ".", "_", "a-", "a_b", "a.b", "0", "\u{d5}", "\u{1f600}", "a b", "a/b"]
                .map(str::to_owned)
                .into();
        samples.extend((0u32..0x120).filter_map(char::from_u32).flat_map(|c| [format!("{c}"), format!("a{c}a")]));
        for n in [19, 20, 21, 62, 63, 64, 99, 100, 101, 199, 200, 201, 800, 801] {
            samples.extend(["a", "\u{1f600}"].map(|c| c.repeat(n)));
        }
        fn agree(what: &str, pattern: &str, max: usize, samples: &[String], valid: fn(&str) -> bool) {
            let pattern = regex::Regex::new(pattern).unwrap();
            for text in samples {
                let described = (1..=max).contains(&text.chars().count()) && pattern.is_match(text);
                assert_eq!(described, valid(text), "{what}: {text:?}");
            }
        }
        macro_rules! check {
            ($($type:ident),*) => {$(
                agree(stringify!($type), $type::PATTERN, $type::MAX, &samples, |t| $type::try_new(t).is_ok());
                let schema = serde_json::to_value($type::schema()).unwrap();
                assert_eq!((&schema["pattern"], &schema["maxLength"]), (&$type::PATTERN.into(), &$type::MAX.into()));
            )*};
        }
        check!(Environment, Tenant, Topic, Workflow, OrderingKey, ErrorClass);
    }

    #[test]
    fn an_execution_id_has_one_spelling_but_for_case() {
        let id: ExecutionId = "0190B4a4-0000-7000-8000-000000000001".parse().unwrap();
        assert_eq!(id.to_string(), "0190b4a4-0000-7000-8000-000000000001");
        assert_eq!(serde_json::from_str::<ExecutionId>(&format!("\"{id}\"")).unwrap(), id);
        for bad in [
            "0190b4a4000070008000000000000001",
            "{0190b4a4-0000-7000-8000-000000000001}",
            "urn:uuid:0190b4a4-0000-7000-8000-000000000001",
            "0190b4a4-00007000-8000-0000-00000001",
            " 190b4a4-0000-7000-8000-000000000001",
            "",
        ] {
            assert!(bad.parse::<ExecutionId>().is_err(), "{bad}");
            assert!(serde_json::from_str::<ExecutionId>(&format!("\"{bad}\"")).is_err(), "{bad}");
        }
    }

    #[test]
    fn dead_letters_have_a_topic_of_their_own() {
        let topic = |t: &str| Topic::try_new(t).unwrap();
        assert_eq!(topic("dealscale.workflow.long").dead_letter(), topic("dealscale.deadletter.workflow.long"));
        assert_eq!(topic("jobs").dead_letter(), topic("dealscale.deadletter.jobs"));
    }

    #[test]
    fn an_idempotency_key_gives_one_id_per_tenant_and_environment() {
        let (p, s) = (Environment::try_new("production").unwrap(), Environment::try_new("staging").unwrap());
        let (a, b) = (Tenant::try_new("a").unwrap(), Tenant::try_new("b").unwrap());
        let id = ExecutionId::from_idempotency_key(&p, &a, "k");
        assert_eq!(id, ExecutionId::from_idempotency_key(&p, &a, "k"));
        assert_ne!(id, ExecutionId::from_idempotency_key(&p, &b, "k"));
        assert_ne!(id, ExecutionId::from_idempotency_key(&s, &a, "k"));
    }

    #[test]
    fn a_body_hash_reads_what_it_prints() {
        let hash = BodyHash::of(b"x");
        assert_eq!(hash.to_string().parse(), Ok(hash));
        assert!("zz".parse::<BodyHash>().is_err());
    }
}
