//! What a caller sends, read strictly: unknown and repeated fields, deep nesting, wrong types and names are refused with
//! the field's name, and the payload stays the very bytes that came in.
//!
//! # Invariants
//! 1. The payload is never parsed into values and never written anew: its hash covers exactly the caller's bytes.
//! 2. One pass without recursion finds bodies nested deeper than `json_depth_max`, before anything else looks at them.
//! 3. A refusal names the field and the rule. It repeats nothing of the body but the name of an unknown field.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use axum::http::HeaderMap;
use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::respond::Problem;
use crate::clock::Timestamp;
use crate::config;
use crate::ids::{ExecutionId, OrderingKey, Tenant, Topic, Workflow};

/// Entries of `metadata`, and the lengths of a key and a value in bytes. They travel as message properties and headers,
/// which brokers and servers bound as well.
pub const METADATA_MAX: usize = 32;
pub const METADATA_KEY_MAX: usize = 100;
pub const METADATA_VALUE_MAX: usize = 1_000;
/// Bytes of an `Idempotency-Key`.
pub const KEY_MAX: usize = 255;
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
        let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
        let source = |name| text(name).filter(|v| !v.is_empty() && v.len() <= SOURCE_MAX).map(str::to_owned);
        let mut keys = headers.get_all("idempotency-key").iter();
        let idempotency_key = match (keys.next(), keys.next()) {
            (None, _) => None,
            (Some(key), None) => {
                let good = key.to_str().ok().filter(|k| !k.is_empty() && k.len() <= KEY_MAX);
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
        let raw: Raw<'_> = serde_json::from_str(text).map_err(syntax)?;
        raw.check(body, limits, now)
    }
}

/// The JSON objects of a batch, each as the bytes it came in.
///
/// # Errors
/// 400: not an array (or, as NDJSON, not lines) of JSON values, or nested too deeply. 413: too many items.
pub fn split_batch(body: &Bytes, ndjson: bool, limits: &config::Bridge) -> Result<Vec<Bytes>, Problem> {
    // One level for the array around the items.
    depth(body, limits.json_depth_max + 1)?;
    let text = std::str::from_utf8(body).map_err(|_| Problem::malformed("the body is not UTF-8"))?;
    let max = limits.batch_items_max as usize;
    let items: Vec<Bytes> = if ndjson {
        text.lines()
            .filter(|line| !line.trim().is_empty())
            .take(max + 1)
            .map(|l| body.slice_ref(l.as_bytes()))
            .collect()
    } else {
        let raw: Vec<&RawValue> = serde_json::from_str(text).map_err(syntax)?;
        raw.into_iter().take(max + 1).map(|item| body.slice_ref(item.get().as_bytes())).collect()
    };
    if items.len() > max {
        return Err(Problem::new(super::respond::Kind::TooLarge, format!("a batch has at most {max} items")));
    }
    if items.is_empty() {
        return Err(Problem::malformed("the batch is empty"));
    }
    Ok(items)
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
fn syntax(error: serde_json::Error) -> Problem {
    let place = format!("line {} column {}", error.line(), error.column());
    match error.classify() {
        serde_json::error::Category::Data => {
            let text = error.to_string();
            let ours = text.strip_prefix(OURS).map(|t| t.rsplit_once(" at line ").map_or(t, |(t, _)| t).to_owned());
            Problem::malformed(ours.unwrap_or_else(|| format!("the body must be a JSON object ({place})")))
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
    priority: Option<u64>,
    metadata: Option<BTreeMap<String, String>>,
    payload: Option<&'a RawValue>,
}

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

/// A value of the wrong type; broken JSON inside the value stays what it is (its message has no mark of ours, and the
/// caller sees its place either way).
fn wrong<E: serde::de::Error>(_error: E, field: &str, expected: &str) -> E {
    ours(format_args!("{field} must be {expected}"))
}

const FIELDS: [&str; 9] =
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
            Some(n @ 0..=9) => Some(n as u8),
            Some(_) => return Err(Problem::malformed("priority must be a whole number from 0 to 9")),
        };
        let metadata = self.metadata.unwrap_or_default();
        if metadata.len() > METADATA_MAX {
            return Err(Problem::malformed(format!("metadata has at most {METADATA_MAX} entries")));
        }
        for (key, value) in &metadata {
            let clean = |t: &str| !t.chars().any(char::is_control);
            if key.is_empty() || key.len() > METADATA_KEY_MAX || !clean(key) {
                return Err(Problem::malformed(format!(
                    "metadata keys have 1 to {METADATA_KEY_MAX} bytes without control characters"
                )));
            }
            if value.len() > METADATA_VALUE_MAX || !clean(value) {
                return Err(Problem::malformed(format!(
                    "metadata values have at most {METADATA_VALUE_MAX} bytes without control characters"
                )));
            }
        }
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
            metadata,
            payload: body.slice_ref(payload.get().as_bytes()),
        })
    }
}

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
            return syntax(error);
        }
        let text = error.to_string();
        let named = ["unknown field", "missing field", "duplicate field"].iter().any(|p| text.starts_with(p));
        Problem::malformed(if named {
            text
        } else {
            format!("a value is wrong at line {} column {}", error.line(), error.column())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Bytes as Size, Span};

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
        assert!(hints(&[&"k".repeat(256)]).is_err());
        assert!(limits().body_bytes_max == Size::mib(16));
    }
}
