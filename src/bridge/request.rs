//! What a caller sends, read strictly: unknown and repeated fields, deep nesting, wrong types and names are refused with
//! the field's name, and the payload stays the very bytes that came in.
//!
//! # Invariants
//! 1. The payload is never parsed into values and never written anew: its hash covers exactly the caller's bytes.
//! 2. One pass without recursion finds bodies nested deeper than `json_depth_max`, before anything else looks at them.
//! 3. A refusal names the field and the rule. It repeats nothing of the body but the name of an unknown field.
//! 4. What a field may hold is said by its type alone, which both reads it and describes it in the OpenAPI document.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use axum::http::HeaderMap;
use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

use super::respond::Problem;
use crate::clock::Timestamp;
use crate::config;
use crate::ids::{ExecutionId, OrderingKey, Tenant, Topic, Workflow};
use crate::units::Span;

/// Entries of `metadata`, and the lengths of a key and a value in characters.
pub const METADATA_MAX: usize = 32;
pub const METADATA_KEY_MAX: usize = 100;
pub const METADATA_VALUE_MAX: usize = 1_000;
/// Bytes of an `Idempotency-Key`.
pub const KEY_MAX: usize = 255;
/// The last `priority`.
pub const PRIORITY_MAX: u64 = 9;
/// Bytes of `X-N8N-Execution-Id` and `X-N8N-Workflow-Id`; n8n's own ids have at most 36.
const SOURCE_MAX: usize = 100;

/// A checked publish. The payload lies inside the request's body.
#[derive(Debug)]
pub struct Publish {
    pub tenant: Tenant,
    pub workflow: Option<Workflow>,
    pub topic: Option<Topic>,
    pub execution_id: Option<ExecutionId>,
    pub ordering_key: Option<OrderingKey>,
    pub deliver_at: Option<Timestamp>,
    pub priority: Option<u8>,
    pub metadata: BTreeMap<String, String>,
    pub payload: Bytes,
}

/// What the headers of a publish say beside its body.
#[derive(Debug, Default)]
pub struct Hints {
    pub idempotency_key: Option<String>,
    pub traceparent: Option<String>,
    pub source_execution: Option<String>,
    pub source_workflow: Option<String>,
}

impl Hints {
    /// # Errors
    /// An `Idempotency-Key` that is empty, too long, repeated or not visible ASCII. The other headers are hints for people
    /// and traces: a bad one is left out.
    pub fn read(headers: &HeaderMap) -> Result<Self, Problem> {
        // Given twice is as good as malformed (for `traceparent`: W3C Trace Context, section 3.2).
        let text = |name: &str| {
            let mut values = headers.get_all(name).iter();
            values.next().filter(|_| values.next().is_none()).and_then(|v| v.to_str().ok())
        };
        let source = |name| text(name).filter(|v| !v.is_empty() && v.len() <= SOURCE_MAX).map(str::to_owned);
        let mut keys = headers.get_all("idempotency-key").iter();
        let idempotency_key = match (keys.next(), keys.next()) {
            (None, _) => None,
            (Some(key), None) => {
                let visible = |k: &&str| k.bytes().all(|b| b.is_ascii_graphic());
                let good = key.to_str().ok().filter(visible).filter(|k| !k.is_empty() && k.len() <= KEY_MAX);
                Some(good.ok_or_else(|| Problem::malformed(BAD_KEY))?.to_owned())
            }
            (Some(_), Some(_)) => return Err(Problem::malformed("Idempotency-Key is given twice")),
        };
        Ok(Self {
            idempotency_key,
            traceparent: text("traceparent").map(str::to_owned),
            source_execution: source("x-n8n-execution-id"),
            source_workflow: source("x-n8n-workflow-id"),
        })
    }
}

pub const BAD_KEY: &str = "Idempotency-Key must have 1 to 255 visible ASCII characters";

impl Publish {
    /// Reads one publish from `body`, which is all of the JSON text.
    ///
    /// # Errors
    /// 400 with the field and the rule.
    pub fn read(body: &Bytes, limits: &config::Bridge, now: Timestamp) -> Result<Self, Problem> {
        depth(body, limits.json_depth_max)?;
        let text = std::str::from_utf8(body).map_err(|_| Problem::malformed("the body is not UTF-8"))?;
        let raw: Raw<'_> = serde_json::from_str(text).map_err(|error| syntax(error, "a JSON object"))?;
        raw.check(body, limits, now)
    }
}

/// The JSON objects of a batch, each as the bytes it came in.
///
/// # Errors
/// 400: not an array (or, as NDJSON, not lines) of JSON values, or nested too deeply. 413: too many items.
pub fn split_batch(body: &Bytes, ndjson: bool, limits: &config::Bridge) -> Result<Vec<Bytes>, Problem> {
    let text = std::str::from_utf8(body).map_err(|_| Problem::malformed("the body is not UTF-8"))?;
    let max = limits.batch_items_max as usize;
    let items: Vec<Bytes> = if ndjson {
        // Each line is measured as an item: an open bracket or quote in one of them says nothing about the others.
        text.lines()
            .filter(|line| !line.trim().is_empty())
            .take(max + 1)
            .map(|l| body.slice_ref(l.as_bytes()))
            .collect()
    } else {
        // One level for the array around the items.
        depth(body, limits.json_depth_max + 1)?;
        let mut reader = serde_json::Deserializer::from_str(text);
        let raw = reader.deserialize_seq(Items { max });
        let raw = raw.and_then(|raw| if raw.len() > max { Ok(raw) } else { reader.end().map(|()| raw) });
        let raw = raw.map_err(|error| syntax(error, "a JSON array"))?;
        raw.into_iter().map(|item| body.slice_ref(item.get().as_bytes())).collect()
    };
    if items.len() > max {
        return Err(Problem::new(super::respond::Kind::TooLarge, format!("a batch has at most {max} items")));
    }
    if items.is_empty() {
        return Err(Problem::malformed("the batch is empty"));
    }
    Ok(items)
}

/// The items of an array, as they stand there; one more than `max` at most, whatever follows.
struct Items {
    max: usize,
}

impl<'de> Visitor<'de> for Items {
    type Value = Vec<&'de RawValue>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
            if items.len() > self.max {
                // Reading on could only cost memory. The rest is skipped, so that the parser ends well.
                while seq.next_element::<IgnoredAny>()?.is_some() {}
            }
        }
        Ok(items)
    }
}

/// Refuses text whose brackets nest deeper than `max`. Whether it is JSON at all is for the parser to say.
fn depth(body: &[u8], max: u64) -> Result<(), Problem> {
    let (mut depth, mut at) = (0u64, 0);
    while let Some(byte) = body.get(at) {
        match byte {
            b'"' => {
                at += 1;
                loop {
                    match body.get(at) {
                        Some(b'\\') => at += 2,
                        Some(b'"') | None => break,
                        Some(_) => at += 1,
                    }
                }
            }
            b'{' | b'[' => {
                depth += 1;
                if depth > max {
                    return Err(Problem::malformed(format!("the JSON is nested deeper than {max} levels")));
                }
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    Ok(())
}

/// The parser's own words are kept where they are ours or name a place, and dropped where they would quote the body.
fn syntax(error: serde_json::Error, expected: &str) -> Problem {
    let place = format!("line {} column {}", error.line(), error.column());
    match error.classify() {
        serde_json::error::Category::Data => {
            let text = error.to_string();
            let ours = text.strip_prefix(OURS).map(|t| t.rsplit_once(" at line ").map_or(t, |(t, _)| t).to_owned());
            Problem::malformed(ours.unwrap_or_else(|| format!("the body must be {expected} ({place})")))
        }
        _ => Problem::malformed(format!("the body is not valid JSON ({place})")),
    }
}

/// Marks the messages that are made here.
const OURS: &str = "\u{1}";

fn ours<E: serde::de::Error>(text: impl fmt::Display) -> E {
    E::custom(format_args!("{OURS}{text}"))
}

/// The body's fields, found but not yet checked.
#[derive(Default)]
struct Raw<'a> {
    workflow: Option<Cow<'a, str>>,
    topic: Option<Cow<'a, str>>,
    tenant_id: Option<Cow<'a, str>>,
    execution_id: Option<Cow<'a, str>>,
    ordering_key: Option<Cow<'a, str>>,
    deliver_at: Option<Cow<'a, str>>,
    priority: Option<Whole>,
    metadata: Option<Metadata>,
    payload: Option<&'a RawValue>,
}

/// A whole number from 0, also where it is written `5.0` or `5e0`: JSON has one kind of numbers, and a schema's `integer`
/// is any without a fraction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whole(pub u64);

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl Visitor<'_> for V {
            type Value = Whole;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number from 0")
            }
            fn visit_u64<E>(self, n: u64) -> Result<Whole, E> {
                Ok(Whole(n))
            }
            fn visit_f64<E: serde::de::Error>(self, n: f64) -> Result<Whole, E> {
                // What is larger than u64 becomes its largest value, which every limit here refuses.
                let whole = n >= 0.0 && n.fract() == 0.0;
                whole.then_some(Whole(n as u64)).ok_or_else(|| E::custom("expected a whole number from 0"))
            }
        }
        d.deserialize_u64(V)
    }
}
impl serde::Serialize for Whole {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(self.0)
    }
}

/// Texts that travel with an event.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(transparent)]
pub struct Metadata(pub BTreeMap<String, String>);

impl Metadata {
    /// Of texts without control characters, in keys and values.
    const PATTERN: &'static str = r"^[^\u0000-\u001f\u007f-\u009f]*$";

    fn add(&mut self, key: String, value: String) -> Result<(), String> {
        let fits = |t: &str, max: usize| t.chars().take(max + 1).count() <= max && !t.chars().any(char::is_control);
        if key.is_empty() || !fits(&key, METADATA_KEY_MAX) {
            return Err(format!(
                "metadata keys have 1 to {METADATA_KEY_MAX} characters, none of them a control character"
            ));
        }
        if !fits(&value, METADATA_VALUE_MAX) {
            let max = METADATA_VALUE_MAX;
            return Err(format!("metadata values have at most {max} characters, none of them a control character"));
        }
        if self.0.insert(key, value).is_some() {
            return Err("a key of metadata is given twice".into());
        }
        if self.0.len() > METADATA_MAX {
            return Err(format!("metadata has at most {METADATA_MAX} entries"));
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Metadata;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                const TEXTS: &str = "metadata must be an object whose values are texts";
                let mut metadata = Metadata::default();
                while let Some(key) = map.next_key::<String>()? {
                    let value = map.next_value::<String>().map_err(|_| ours(TEXTS))?;
                    metadata.add(key, value).map_err(ours)?;
                }
                Ok(metadata)
            }
        }
        d.deserialize_map(V)
    }
}

impl PartialSchema for Metadata {
    fn schema() -> RefOr<Schema> {
        let text = |min, max| {
            let text = ObjectBuilder::new().schema_type(Type::String).pattern(Some(Self::PATTERN));
            Schema::from(text.min_length(min).max_length(Some(max)))
        };
        ObjectBuilder::new()
            .schema_type(Type::Object)
            .property_names(Some(text(Some(1), METADATA_KEY_MAX)))
            .additional_properties(Some(text(None, METADATA_VALUE_MAX)))
            .max_properties(Some(METADATA_MAX))
            .into()
    }
}
impl ToSchema for Metadata {}

/// Text that borrows from the body where it has no escapes.
struct Text<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Text<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }
            fn visit_str<E>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        d.deserialize_str(V)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Raw<'a> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Raw<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw<'de>, A::Error> {
                let mut raw = Raw::default();
                let mut seen = 0u16;
                while let Some(Text(field)) = map.next_key::<Text<'de>>()? {
                    let Some(n) = FIELDS.iter().position(|f| *f == field) else {
                        let shown: String = field.chars().filter(|c| !c.is_control()).take(64).collect();
                        return Err(ours(format_args!("unknown field {shown:?}; known are {}", FIELDS.join(", "))));
                    };
                    if seen & (1 << n) != 0 {
                        return Err(ours(format_args!("{field} is given twice")));
                    }
                    seen |= 1 << n;
                    let text = |map: &mut A| -> Result<Option<Cow<'de, str>>, A::Error> {
                        match map.next_value::<Option<Text<'de>>>() {
                            Ok(text) => Ok(text.map(|t| t.0)),
                            Err(error) => Err(wrong(error, &field, "a text")),
                        }
                    };
                    match n {
                        0 => raw.workflow = text(&mut map)?,
                        1 => raw.topic = text(&mut map)?,
                        2 => raw.tenant_id = text(&mut map)?,
                        3 => raw.payload = Some(map.next_value()?),
                        4 => raw.execution_id = text(&mut map)?,
                        5 => raw.ordering_key = text(&mut map)?,
                        6 => raw.deliver_at = text(&mut map)?,
                        7 => {
                            raw.priority =
                                map.next_value().map_err(|e| wrong(e, &field, "a whole number from 0 to 9"))?
                        }
                        _ => {
                            raw.metadata =
                                map.next_value().map_err(|e| wrong(e, &field, "an object whose values are texts"))?;
                        }
                    }
                }
                Ok(raw)
            }
        }
        d.deserialize_map(V)
    }
}

/// A value of the wrong type, unless the value's own type has said more. (For broken JSON inside the value the parser
/// keeps its own message, and the caller sees the place.)
fn wrong<E: serde::de::Error>(error: E, field: &str, expected: &str) -> E {
    if error.to_string().starts_with(OURS) { error } else { ours(format_args!("{field} must be {expected}")) }
}

pub(super) const FIELDS: [&str; 9] =
    ["workflow", "topic", "tenant_id", "payload", "execution_id", "ordering_key", "deliver_at", "priority", "metadata"];

impl Raw<'_> {
    fn check(self, body: &Bytes, limits: &config::Bridge, now: Timestamp) -> Result<Publish, Problem> {
        let bad = |field: &str, rule: &dyn fmt::Display| Problem::malformed(format!("{field}: {rule}"));
        let tenant = self.tenant_id.ok_or_else(|| Problem::malformed("tenant_id is missing"))?;
        let payload = self.payload.ok_or_else(|| Problem::malformed("payload is missing"))?;
        if self.workflow.is_none() && self.topic.is_none() {
            return Err(Problem::malformed("workflow or topic is missing"));
        }
        let execution_id = match self.execution_id.map(|id| id.parse::<ExecutionId>()) {
            None => None,
            Some(Ok(id)) => Some(id),
            Some(Err(_)) => {
                return Err(Problem::malformed(
                    "execution_id must be a UUID; n8n's own execution id belongs into the header X-N8N-Execution-Id",
                ));
            }
        };
        let deliver_at = match self.deliver_at {
            None => None,
            Some(text) => {
                let at = text.parse::<Timestamp>().map_err(|e| bad("deliver_at", &e))?;
                if at > now.plus(limits.delay_max.0) {
                    return Err(bad("deliver_at", &format_args!("is more than {} ahead", limits.delay_max)));
                }
                // What is due already is delivered now.
                Some(at).filter(|at| *at > now)
            }
        };
        let priority = match self.priority {
            None => None,
            Some(Whole(n @ 0..=PRIORITY_MAX)) => Some(n as u8),
            Some(_) => return Err(Problem::malformed("priority must be a whole number from 0 to 9")),
        };
        Ok(Publish {
            tenant: Tenant::try_new(&tenant).map_err(|e| bad("tenant_id", &e))?,
            workflow: self.workflow.map(|w| Workflow::try_new(&w)).transpose().map_err(|e| bad("workflow", &e))?,
            topic: self.topic.map(|t| Topic::try_new(&t)).transpose().map_err(|e| bad("topic", &e))?,
            execution_id,
            ordering_key: self
                .ordering_key
                .map(|k| OrderingKey::try_new(&k))
                .transpose()
                .map_err(|e| bad("ordering_key", &e))?,
            deliver_at,
            priority,
            metadata: self.metadata.unwrap_or_default().0,
            payload: body.slice_ref(payload.get().as_bytes()),
        })
    }
}

/// `?limit=`: events in a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit(pub usize);

impl Limit {
    pub const DEFAULT: Limit = Limit(50);
    const MAX: usize = 500;
}

impl std::str::FromStr for Limit {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let number = digits(text).and_then(|d| d.parse().ok());
        number.filter(|n| (1..=Self::MAX).contains(n)).map(Self).ok_or_else(|| format!("1 to {}", Self::MAX))
    }
}

impl PartialSchema for Limit {
    fn schema() -> RefOr<Schema> {
        let number = ObjectBuilder::new().schema_type(Type::Integer);
        number.minimum(Some(1)).maximum(Some(Self::MAX)).into()
    }
}
impl ToSchema for Limit {}

/// `?timeout=`: seconds as a bare number, or a span with its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait(pub Span);

impl std::str::FromStr for Wait {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, &'static str> {
        let number = text.bytes().take_while(u8::is_ascii_digit).count();
        let known = (1..=6).contains(&number) && ["", "ms", "s", "m", "min", "h", "d"].contains(&&text[number..]);
        let seconds = if number == text.len() { "s" } else { "" };
        let span = if known { format!("{text}{seconds}").parse().ok() } else { None };
        span.map(Self).ok_or("a number of seconds, or a span such as 500ms, 30s or 1m")
    }
}

/// `text`, if it has nothing but digits (the library's numbers may have a sign).
fn digits(text: &str) -> Option<&str> {
    (!text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())).then_some(text)
}

impl PartialSchema for Wait {
    fn schema() -> RefOr<Schema> {
        let text = ObjectBuilder::new().schema_type(Type::String);
        text.pattern(Some("^[0-9]{1,6}(ms|s|m|min|h|d)?$")).into()
    }
}
impl ToSchema for Wait {}

/// A small JSON body of another request, read with the same strictness through `serde`.
///
/// # Errors
/// 400 with serde's text for the caller's own fields, without their values.
pub fn small<T: serde::de::DeserializeOwned>(body: &[u8], limits: &config::Bridge) -> Result<T, Problem> {
    depth(body, limits.json_depth_max)?;
    // serde reads a list as the fields in their order: `[]` would be a command with every default.
    if body.trim_ascii_start().first().is_some_and(|b| *b != b'{') {
        return Err(Problem::malformed("the body must be a JSON object"));
    }
    serde_json::from_slice::<T>(body).map_err(|error| {
        // Tells wrong JSON from wrong fields; what a field's value was is not repeated.
        if serde_json::from_slice::<IgnoredAny>(body).is_err() {
            return syntax(error, "a JSON object");
        }
        let text = error.to_string();
        // These words of serde's repeat the value; the others are ours, or name a field.
        let quotes = ["invalid type", "invalid value", "invalid length", "unknown variant"];
        Problem::malformed(if quotes.iter().any(|p| text.starts_with(p)) {
            format!("a value is wrong at line {} column {}", error.line(), error.column())
        } else {
            text
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes as Size;

    pub fn limits() -> config::Bridge {
        config::parse("").unwrap().bridge
    }

    const NOW: Timestamp = Timestamp(1_795_478_400_000);

    fn read(text: &str) -> Result<Publish, String> {
        Publish::read(&Bytes::copy_from_slice(text.as_bytes()), &limits(), NOW).map_err(|p| {
            assert_eq!(p.kind, super::super::respond::Kind::Malformed);
            p.detail.into_owned()
        })
    }

    #[test]
    fn invariant_1_the_payload_keeps_its_bytes() {
        for payload in [r#"{ "b" : 1.0e2,"a":[ 1 ,2 ], "a":"\u00e4" }"#, "null", r#""x""#, " [ ] ", "12.50"] {
            let publish = read(&format!(r#"{{"workflow":"w","payload":{payload},"tenant_id":"acme"}}"#)).unwrap();
            assert_eq!(publish.payload, payload.trim().as_bytes());
        }
    }

    #[test]
    fn invariant_2_depth_is_bounded_before_parsing() {
        let nested =
            |n: usize| format!(r#"{{"workflow":"w","tenant_id":"a","payload":{}{}}}"#, "[".repeat(n), "]".repeat(n));
        assert!(read(&nested(63)).is_ok());
        assert!(read(&nested(64)).unwrap_err().contains("deeper than 64"));
        assert!(read(&nested(1_000_000)).unwrap_err().contains("deeper"));
        // Brackets inside of texts do not count, behind escapes neither.
        let text = format!(r#"{{"workflow":"w","tenant_id":"a","payload":"\"{}\\"}}"#, "[".repeat(100));
        assert!(read(&text).is_ok());
    }

    #[test]
    fn invariant_3_a_refusal_names_the_field_and_not_the_value() {
        let cases = [
            (r#"{"tenant_id":"a","payload":1}"#, "workflow or topic is missing"),
            (r#"{"workflow":"w","payload":1}"#, "tenant_id is missing"),
            (r#"{"workflow":"w","tenant_id":"a"}"#, "payload is missing"),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"colour":"x"}"#, "unknown field \"colour\""),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"payload":2}"#, "payload is given twice"),
            (r#"{"workflow":7,"tenant_id":"a","payload":1}"#, "workflow must be a text"),
            (r#"{"workflow":"w","tenant_id":"A_secret","payload":1}"#, "tenant_id: a tenant must match"),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"execution_id":"4711"}"#, "X-N8N-Execution-Id"),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"priority":10}"#, "priority must be a whole number"),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"priority":"5"}"#, "priority must be a whole number"),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"deliver_at":"soon"}"#, "deliver_at: expected a time"),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"deliver_at":"2030-01-01T00:00:00Z"}"#, "30d ahead"),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"metadata":{"k":1}}"#, "metadata must be an object"),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"metadata":{"":"v"}}"#, "metadata keys"),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"metadata":{"k\n":"v"}}"#, "metadata keys"),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"metadata":{"k":"\u0000"}}"#, "metadata values"),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"metadata":{"k":"1","k":"1"}}"#, "metadata is given twice"),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"metadata":{"k":null}}"#, "metadata must be an object"),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"metadata":[]}"#, "metadata must be an object"),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"priority":5.5}"#, "priority must be a whole number"),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"priority":-1}"#, "priority must be a whole number"),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"priority":1e30}"#, "priority must be a whole number"),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"priority":1e999}"#, "priority must be a whole number"),
            (r#"{"workflow":"","tenant_id":"a","payload":1}"#, "workflow: "),
            (r#"{"workflow":"a\u0085b","tenant_id":"a","payload":1}"#, "workflow: "),
            (r#"{"workflow":null,"topic":null,"tenant_id":"a","payload":1}"#, "workflow or topic is missing"),
            (r#"{"workflow":"w","tenant_id":null,"payload":1}"#, "tenant_id is missing"),
            (
                r#"{"workflow":"w","tenant_id":"a","payload":1,"deliver_at":"2026-11-24 12:00Z"}"#,
                "deliver_at: expected",
            ),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"deliver_at":1795478400}"#, "deliver_at must be a text"),
            ("\u{feff}{}", "not valid JSON"),
            (r#"{"workflow":"w","tenant_id":"a","payload":1,"ordering_key":""}"#, "ordering_key: "),
            ("[]", "must be a JSON object"),
            (r#"{"workflow":"w""#, "not valid JSON"),
            (r#"{"workflow":"w","tenant_id":"a","payload":01}"#, "not valid JSON"),
            ("", "not valid JSON"),
        ];
        for (text, expected) in cases {
            let detail = read(text).unwrap_err();
            assert!(detail.contains(expected), "{text}: {detail}");
            assert!(!detail.contains("secret"), "{detail}");
        }
    }

    #[test]
    fn absent_and_null_are_the_same_for_optional_fields() {
        let publish = read(
            r#"{"workflow":"w","topic":null,"tenant_id":"a","payload":null,"priority":null,"deliver_at":null,"metadata":null,"execution_id":null,"ordering_key":null}"#,
        )
        .unwrap();
        assert!(publish.topic.is_none() && publish.priority.is_none() && publish.metadata.is_empty());
        assert_eq!(publish.payload, "null");
    }

    #[test]
    fn a_time_that_has_come_is_now() {
        let at = |t: &str| {
            read(&format!(r#"{{"workflow":"w","tenant_id":"a","payload":1,"deliver_at":"{t}"}}"#)).unwrap().deliver_at
        };
        assert_eq!(at("2020-01-01T00:00:00Z"), None);
        assert_eq!(at("2026-11-24T01:00:00+01:00"), None);
        assert_eq!(at("2026-11-25T00:00:00Z"), Some(NOW.plus(Span::days(1).0)));
    }

    #[test]
    fn limits_count_characters_and_whole_numbers_may_have_a_point() {
        let with = |name: &str, value: serde_json::Value| {
            let mut event = serde_json::json!({"workflow": "w", "tenant_id": "a", "payload": 1});
            event[name] = value;
            read(&event.to_string())
        };
        let wide = |n: usize| "\u{1f600}".repeat(n);
        assert!(with("workflow", wide(200).into()).is_ok() && with("workflow", wide(201).into()).is_err());
        let metadata = |key: String, value: String| with("metadata", serde_json::json!({ key: value }));
        assert!(metadata(wide(100), wide(1_000)).is_ok());
        assert!(metadata(wide(101), String::new()).is_err() && metadata("k".into(), wide(1_001)).is_err());
        let many = |n: usize| (0..n).map(|n| (n.to_string(), "".into())).collect::<serde_json::Map<_, _>>();
        assert!(with("metadata", many(32).into()).is_ok());
        assert!(with("metadata", many(33).into()).unwrap_err().contains("at most 32"));
        assert_eq!(with("priority", 5.0.into()).unwrap().priority, Some(5));
        assert_eq!(with("priority", 0.into()).unwrap().priority, Some(0));
    }

    #[test]
    fn invariant_4_every_field_that_is_read_is_described() {
        let api = serde_json::to_value(super::super::openapi::document()).unwrap();
        let described = api["components"]["schemas"]["Publish"]["allOf"][0]["properties"].as_object().unwrap();
        let mut fields = FIELDS.to_vec();
        fields.sort_unstable();
        assert_eq!(described.keys().map(String::as_str).collect::<Vec<_>>(), fields);
    }

    #[test]
    fn numbers_of_a_query_are_digits() {
        assert_eq!("500".parse(), Ok(Limit(500)));
        for bad in ["", "0", "501", "+5", "-5", "5.0", "0x5", "99999999999999999999"] {
            assert!(bad.parse::<Limit>().is_err(), "{bad}");
        }
        for (text, span) in [
            ("0", Span::secs(0)),
            ("30", Span::secs(30)),
            ("30s", Span::secs(30)),
            ("500ms", Span::millis(500)),
            ("1m", Span::secs(60)),
        ] {
            assert_eq!(text.parse(), Ok(Wait(span)), "{text}");
        }
        for bad in ["", "s", "+5", "+5s", "-1", "1.5", "1.5s", "5 s", "\u{e4}", "5\u{e4}", "5x", "1000000"] {
            assert!(bad.parse::<Wait>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_list_is_no_command() {
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields, default)]
        struct Command {
            #[allow(dead_code)]
            dry_run: bool,
        }
        impl Default for Command {
            fn default() -> Self {
                Self { dry_run: true }
            }
        }
        let read = |text: &str| small::<Command>(text.as_bytes(), &limits()).map_err(|p| p.detail.into_owned());
        assert!(read(" {}").is_ok());
        assert!(read("[false]").unwrap_err().contains("object"));
        assert!(read(r#"{"dry_run":"secret"}"#).unwrap_err().starts_with("a value is wrong"));
        assert!(read(r#"{"dryrun":true}"#).unwrap_err().starts_with("unknown field"));
        assert!(read("{").unwrap_err().contains("not valid JSON"));
    }

    #[test]
    fn a_batch_is_split_without_reading_its_items() {
        let split = |text: &str, ndjson| split_batch(&Bytes::copy_from_slice(text.as_bytes()), ndjson, &limits());
        assert_eq!(split(r#"[ {"a":1} , 2 ]"#, false).unwrap(), [&br#"{"a":1}"#[..], b"2"]);
        assert_eq!(split("{\"a\":1}\n\n  \r\n2\n", true).unwrap(), [&br#"{"a":1}"#[..], b"2"]);
        assert_eq!(split("{\"a\":1}\r\n2", true).unwrap(), [&br#"{"a":1}"#[..], b"2"]);
        // What is open in some lines is no depth of the others.
        assert_eq!(split(&"{\"a\":[\n".repeat(500), true).unwrap().len(), 500);
        assert!(split("[1,2", false).unwrap_err().detail.contains("not valid JSON"));
        assert!(split("[1] x", false).unwrap_err().detail.contains("not valid JSON"));
        assert!(split("7", false).unwrap_err().detail.contains("must be a JSON array"));
        assert!(split("[]", false).unwrap_err().detail.contains("empty"));
        assert!(split("{}", false).is_err());
        let many = format!("[{}1]", "1,".repeat(1_000));
        assert_eq!(split(&many, false).unwrap_err().kind, super::super::respond::Kind::TooLarge);
    }

    #[test]
    fn an_idempotency_key_has_its_limits() {
        let hints = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append("idempotency-key", value.parse().unwrap());
            }
            Hints::read(&headers)
        };
        assert_eq!(hints(&["k"]).unwrap().idempotency_key.as_deref(), Some("k"));
        assert!(hints(&[]).unwrap().idempotency_key.is_none());
        assert!(hints(&["a", "b"]).is_err());
        assert!(hints(&[""]).is_err());
        assert!(hints(&["a b"]).is_err() && hints(&["a\tb"]).is_err());
        assert!(hints(&["\"5b0c\""]).is_ok());
        assert!(hints(&[&"k".repeat(256)]).is_err());
        assert!(limits().body_bytes_max == Size::mib(16));
    }
}
