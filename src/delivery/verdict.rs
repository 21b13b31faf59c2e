//! What an attempt's outcome means. Pure.
//!
//! | outcome | verdict | why |
//! |---|---|---|
//! | 2xx | delivered | |
//! | 404 | retry | n8n answers it while it is still registering webhooks after its start, and while a workflow is switched off to be changed |
//! | 408, 409, 423, 425 | retry | the answer itself says "later" |
//! | 429 | retry, slows down | `Retry-After` is kept |
//! | 410 and every other 4xx | dead at once | the same request gets the same answer until a person changes something; a wrong credential (401, 403) is better seen now than after hours of retries |
//! | 3xx | dead at once | redirects are not followed: the route's URL is wrong |
//! | 502, 503, 504 | retry, slows down | n8n, or the proxy before it, is down |
//! | other 5xx | retry, outcome unknown | n8n answers 500 also when the workflow ran and failed |
//! | no connection | retry, slows down | n8n has seen nothing |
//! | timeout, reset | retry, outcome unknown | n8n may be working on it |
//!
//! "Slows down" counts for the breaker. "Outcome unknown" means that the attempt's span is looked up in n8n before the
//! event is sent again.

use std::time::Duration;

use http::StatusCode;

use crate::clock::Timestamp;
use crate::config::delivery::Retry;
use crate::n8n::{Answer, CallError};

/// What becomes of an event after an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Delivered,
    /// `after`: what the answer's `Retry-After` wants.
    Retry {
        after: Option<Duration>,
    },
    Dead,
}

/// An outcome with everything that is kept of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    pub verdict: Verdict,
    /// Bounded, for metrics and filters: `connect`, `timeout`, `reset`, `http_3xx`, `http_4xx`, `http_5xx`.
    pub class: Option<&'static str>,
    /// For people.
    pub text: Option<String>,
    pub status: Option<u16>,
    /// `Some(false)`: the server is down or wants less. `Some(true)`: it is there. `None`: says nothing.
    pub healthy: Option<bool>,
}

/// A server that wants more than this gets another attempt nevertheless: a wrong clock must not park work for years.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(24 * 3600);
/// Characters of an answer that go into the ledger.
const TEXT_MAX: usize = 300;

/// Whether n8n may have run an attempt that ended with this class.
pub fn is_ambiguous(class: &str) -> bool {
    matches!(class, "timeout" | "reset" | "http_5xx")
}

/// Judges the outcome of a call.
pub fn judge(outcome: &Result<Answer, CallError>, now: Timestamp) -> Judged {
    let answer = match outcome {
        Ok(answer) => answer,
        Err(error) => {
            let (class, healthy) = match error {
                CallError::Connect(_) => ("connect", Some(false)),
                CallError::Timeout => ("timeout", None),
                CallError::Reset(_) => ("reset", None),
            };
            return Judged {
                verdict: Verdict::Retry { after: None },
                class: Some(class),
                text: Some(error.to_string()),
                status: None,
                healthy,
            };
        }
    };
    let status = answer.status.as_u16();
    let after =
        || answer.headers.get(http::header::RETRY_AFTER).and_then(|value| retry_after(value.to_str().ok()?, now));
    let (verdict, class, healthy) = match status {
        200..=299 => (Verdict::Delivered, None, true),
        404 | 408 | 409 | 423 | 425 => (Verdict::Retry { after: after() }, Some("http_4xx"), true),
        429 => (Verdict::Retry { after: after() }, Some("http_4xx"), false),
        400..=499 => (Verdict::Dead, Some("http_4xx"), true),
        502..=504 => (Verdict::Retry { after: after() }, Some("http_5xx"), false),
        500..=599 => (Verdict::Retry { after: after() }, Some("http_5xx"), true),
        _ => (Verdict::Dead, Some("http_3xx"), true),
    };
    let text = class.map(|_| describe(answer.status, &answer.body));
    Judged { verdict, class, text, status: Some(status), healthy: Some(healthy) }
}

fn describe(status: StatusCode, body: &[u8]) -> String {
    let body = String::from_utf8_lossy(body);
    let body: String = body.chars().filter(|c| !c.is_control()).take(TEXT_MAX).collect();
    if body.is_empty() { format!("HTTP {status}") } else { format!("HTTP {status}: {body}") }
}

/// `Retry-After` (RFC 9110 section 10.2.3): seconds, however many digits they have, or a date in one of the three forms of
/// section 5.6.7.
fn retry_after(value: &str, now: Timestamp) -> Option<Duration> {
    let value = value.trim();
    let wait = if !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit()) {
        value.parse().map_or(RETRY_AFTER_MAX, Duration::from_secs)
    } else {
        let at = httpdate::parse_http_date(value).ok()?;
        let at = at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Timestamp(i64::try_from(at.as_millis()).unwrap_or(i64::MAX)).since(now)
    };
    Some(wait.min(RETRY_AFTER_MAX))
}

/// How long to wait before attempt `next` (2 is the first retry): exponential with jitter, and never less than the server
/// asked for. `random` is in `0.0..1.0`.
pub fn wait(retry: &Retry, next: u64, after: Option<Duration>, random: f64) -> Duration {
    let top = retry.wait_max(next).0;
    // Full jitter spreads best, but from zero it could call again at once: half of the shortest wait is the least.
    let low = (retry.min.0 / 2).min(top / 2);
    let wait = low + (top - low).mul_f64(random.clamp(0.0, 1.0));
    wait.max(after.unwrap_or_default())
}

/// n8n's execution id in an answer: `executionId` or `execution_id` of a JSON object (or of the first element of an array),
/// or the header `x-n8n-execution-id`. n8n's ids are numbers: anything else (our own id echoed, say) is not one.
pub fn execution_id(answer: &Answer) -> Option<String> {
    let is_id = |text: &str| !text.is_empty() && text.len() <= 18 && text.bytes().all(|b| b.is_ascii_digit());
    if let Some(id) = answer.headers.get("x-n8n-execution-id").and_then(|v| v.to_str().ok())
        && is_id(id)
    {
        return Some(id.to_owned());
    }
    // Nearly all answers have no id: do not parse what cannot contain one.
    let mentions = |name: &str| answer.body.windows(name.len()).any(|w| w == name.as_bytes());
    if !mentions("executionId") && !mentions("execution_id") {
        return None;
    }
    let json: serde_json::Value = serde_json::from_slice(&answer.body).ok()?;
    let object = json.as_object().or_else(|| json.as_array()?.first()?.as_object())?;
    let id = ["executionId", "execution_id"].into_iter().find_map(|name| match object.get(name)? {
        serde_json::Value::String(text) => Some(text.clone()),
        serde_json::Value::Number(number) => Some(number.to_string()),
        _ => None,
    })?;
    is_id(&id).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Span;

    const NOW: Timestamp = Timestamp(1_795_478_400_000);

    fn answer(status: u16, headers: &[(&'static str, &str)], body: &str) -> Answer {
        let mut map = http::HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, value.parse().unwrap());
        }
        Answer { status: StatusCode::from_u16(status).unwrap(), headers: map, body: body.to_owned().into() }
    }

    #[test]
    fn every_status_has_the_verdict_of_the_table() {
        for status in 200..600 {
            let judged = judge(&Ok(answer(status, &[], "")), NOW);
            let expected = match status {
                200..=299 => Verdict::Delivered,
                404 | 408 | 409 | 423 | 425 | 429 | 500..=599 => Verdict::Retry { after: None },
                _ => Verdict::Dead,
            };
            assert_eq!(judged.verdict, expected, "{status}");
            assert_eq!(judged.healthy == Some(false), matches!(status, 429 | 502..=504), "{status}");
            assert_eq!(judged.class.is_none(), judged.verdict == Verdict::Delivered, "{status}");
        }
        for (error, class, healthy) in [
            (CallError::Connect("refused".into()), "connect", Some(false)),
            (CallError::Timeout, "timeout", None),
            (CallError::Reset("gone".into()), "reset", None),
        ] {
            let judged = judge(&Err(error), NOW);
            assert_eq!((judged.class, judged.healthy), (Some(class), healthy));
            assert_eq!(is_ambiguous(class), class != "connect");
        }
    }

    #[test]
    fn retry_after_is_kept_within_a_day() {
        let after = |value| match judge(&Ok(answer(503, &[("retry-after", value)], "")), NOW).verdict {
            Verdict::Retry { after } => after.map(|d| d.as_secs()),
            _ => None,
        };
        assert_eq!(after("7"), Some(7));
        assert_eq!(after("Tue, 24 Nov 2026 00:01:00 GMT"), Some(60));
        assert_eq!(after("Tue, 24 Nov 2020 00:01:00 GMT"), Some(0));
        assert_eq!(after("99999999"), Some(86_400));
        assert_eq!(after("99999999999999999999999999"), Some(86_400));
        assert_eq!(after("Fri, 31 Dec 9999 23:59:59 GMT"), Some(86_400));
        // The obsolete forms, which a recipient must accept too.
        assert_eq!(after("Tuesday, 24-Nov-26 00:01:00 GMT"), Some(60));
        assert_eq!(after("Tue Nov 24 00:01:00 2026"), Some(60));
        for nonsense in ["soon", "", "-5", "1.5", "1e9", "Tue, 99 Nov 2026 00:01:00 GMT", "\u{e9}"] {
            assert_eq!(after(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn waits_keep_between_half_the_shortest_and_the_schedule() {
        let retry = Retry { attempts_max: 9, min: Span::secs(1), max: Span::secs(60), factor: 2.0 };
        for next in 2..20 {
            for random in [0.0, 0.3, 0.999] {
                let wait = wait(&retry, next, None, random);
                assert!(
                    wait >= Duration::from_millis(500) && wait <= retry.wait_max(next).0,
                    "{next} {random} {wait:?}"
                );
            }
        }
        assert_eq!(wait(&retry, 2, Some(Duration::from_secs(90)), 0.5), Duration::from_secs(90));
    }

    #[test]
    fn only_n8ns_own_ids_are_taken_from_an_answer() {
        for (body, expected) in [
            (r#"{"executionId":"42"}"#, Some("42")),
            (r#"{"execution_id":42}"#, Some("42")),
            (r#"[{"executionId":"7"}]"#, Some("7")),
            (r#"{"execution_id":"01940000-0000-7000-8000-000000000000"}"#, None),
            (r#"{"message":"Workflow was started"}"#, None),
            (r#"executionId"#, None),
        ] {
            assert_eq!(execution_id(&answer(200, &[], body)).as_deref(), expected, "{body}");
        }
        assert_eq!(execution_id(&answer(200, &[("x-n8n-execution-id", "9")], "")).as_deref(), Some("9"));
    }

    #[test]
    fn an_answers_text_cannot_break_a_log_line() {
        let judged = judge(&Ok(answer(422, &[], &format!("no\nsuch{}", "x".repeat(1_000)))), NOW);
        let text = judged.text.unwrap();
        assert!(text.starts_with("HTTP 422 Unprocessable Entity: nosuchxxx") && text.len() < 400, "{text}");
    }
}
