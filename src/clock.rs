//! The only source of the current time.
//!
//! Layer 0. Wall time ([`Timestamp`]) is for what is stored or shown and may jump; waits and deadlines use
//! [`std::time::Instant`] (`tokio::time`), which does not. Pure code takes `now` as an argument.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::openapi::{KnownFormat, ObjectBuilder, RefOr, Schema, SchemaFormat, Type};
use utoipa::{PartialSchema, ToSchema};

/// Milliseconds since the Unix epoch, UTC. Shown as RFC 3339.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub i64);

impl Timestamp {
    pub const fn plus(self, span: Duration) -> Self {
        Self(self.0.saturating_add(span.as_millis() as i64))
    }
    pub const fn minus(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(span.as_millis() as i64))
    }
    /// How long after `earlier` this is; zero when the clock went back.
    pub fn since(self, earlier: Timestamp) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0).max(0) as u64)
    }
    /// Whole seconds since the epoch, as JWT and Standard Webhooks count.
    pub const fn as_secs(self) -> i64 {
        self.0.div_euclid(1000)
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_millisecond(self.0) {
            Ok(time) => write!(f, "{time:.3}"),
            // RFC 3339's last two days are beyond what the library calls an instant.
            Err(_) => {
                let (days, ms) = (self.0.div_euclid(86_400_000), self.0.rem_euclid(86_400_000));
                let date = jiff::Span::new().try_days(days).and_then(|d| jiff::civil::date(1970, 1, 1).checked_add(d));
                let Ok(date) = date else { return write!(f, "{}ms", self.0) };
                let (s, ms) = (ms / 1_000, ms % 1_000);
                write!(f, "{date}T{:02}:{:02}:{:02}.{ms:03}Z", s / 3_600, s / 60 % 60, s % 60)
            }
        }
    }
}

/// Not an RFC 3339 time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected a time as in RFC 3339, such as \"2026-11-24T08:00:00Z\"")]
pub struct ParseError;

impl FromStr for Timestamp {
    type Err = ParseError;
    /// Reads `date-time` of RFC 3339, section 5.6, and nothing else (the library also reads other forms of ISO 8601, names
    /// of zones and years of six digits). What lies behind the milliseconds is cut off; a leap second is the next second.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        rfc3339(text).ok_or(ParseError)
    }
}

fn rfc3339(text: &str) -> Option<Timestamp> {
    fn number(digits: &[u8]) -> Option<i64> {
        digits.iter().try_fold(0, |n, b| b.is_ascii_digit().then(|| n * 10 + i64::from(b - b'0')))
    }
    let (head, mut rest) = text.as_bytes().split_at_checked(19)?;
    if [4, 7, 13, 16].map(|at| head[at]) != *b"--::" || !matches!(head[10], b'T' | b't') {
        return None;
    }
    let field = |from: usize, to: usize| number(&head[from..to]);
    let (hour, minute, second) = (field(11, 13)?, field(14, 16)?, field(17, 19)?);
    let date = jiff::civil::Date::new(field(0, 4)? as i16, field(5, 7)? as i8, field(8, 10)? as i8).ok()?;
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let mut millis = 0;
    if let Some(fraction) = rest.strip_prefix(b".") {
        let digits = fraction.iter().take_while(|b| b.is_ascii_digit()).count();
        let shown = &fraction[..digits.min(3)];
        millis = number(shown).filter(|_| digits > 0)? * 10i64.pow(3 - shown.len() as u32);
        rest = &fraction[digits..];
    }
    let offset = match rest {
        b"Z" | b"z" => 0,
        [sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] => {
            let (hours, minutes) = (number(&[*h1, *h2])?, number(&[*m1, *m2])?);
            let offset = (hours <= 23 && minutes <= 59).then_some(hours * 60 + minutes)?;
            if *sign == b'-' { -offset } else { offset }
        }
        _ => return None,
    };
    let days = i64::from((date - jiff::civil::date(1970, 1, 1)).get_days());
    let minutes = (days * 24 + hour) * 60 + minute - offset;
    // UTC has leap seconds only at the end of a day.
    if second == 60 && minutes.rem_euclid(24 * 60) != 24 * 60 - 1 {
        return None;
    }
    Some(Timestamp((minutes * 60 + second) * 1_000 + millis))
}

impl PartialSchema for Timestamp {
    fn schema() -> RefOr<Schema> {
        let time = SchemaFormat::KnownFormat(KnownFormat::DateTime);
        ObjectBuilder::new().schema_type(Type::String).format(Some(time)).into()
    }
}
impl ToSchema for Timestamp {}

impl Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Wall time: the machine's, or one that a test moves.
#[derive(Clone, Debug, Default)]
pub enum Clock {
    #[default]
    System,
    Manual(Arc<AtomicI64>),
}

impl Clock {
    /// A clock that stands at `now` until it is moved.
    pub fn manual(now: Timestamp) -> Self {
        Self::Manual(Arc::new(AtomicI64::new(now.0)))
    }

    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    pub fn now(&self) -> Timestamp {
        match self {
            Self::System => {
                let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                Timestamp(since.map_or(0, |d| d.as_millis() as i64))
            }
            Self::Manual(ms) => Timestamp(ms.load(Ordering::SeqCst)),
        }
    }

    /// Moves a manual clock by `ms`, which may be negative. A system clock cannot be moved.
    pub fn step(&self, ms: i64) {
        if let Self::Manual(now) = self {
            now.fetch_add(ms, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_reads_what_it_prints() {
        let time = Timestamp(1_795_478_400_123);
        assert_eq!(time.to_string(), "2026-11-24T00:00:00.123Z");
        for time in [time, Timestamp(0), Timestamp(-1), Timestamp(253_402_300_799_999), Timestamp(-62_167_219_200_000)]
        {
            assert_eq!(time.to_string().parse(), Ok(time));
        }
        assert!("yesterday".parse::<Timestamp>().is_err());
    }

    #[test]
    fn a_time_is_rfc_3339_and_nothing_else() {
        let ms = |text: &str| text.parse::<Timestamp>().map(|t| t.0).ok();
        const NOON: i64 = 1_795_521_600_000;
        for (text, expected) in [
            ("2026-11-24T12:00:00Z", NOON),
            ("2026-11-24t12:00:00z", NOON),
            ("2026-11-24T13:30:00+01:30", NOON),
            ("2026-11-24T00:01:00-11:59", NOON),
            ("2026-11-25T11:59:00+23:59", NOON),
            ("2026-11-24T12:00:00-00:00", NOON),
            ("2026-11-24T12:00:00.5Z", NOON + 500),
            ("2026-11-24T12:00:00.123456789012345Z", NOON + 123),
            ("1970-01-01T00:00:00Z", 0),
            ("1969-12-31T23:59:59.999Z", -1),
            ("2024-02-29T00:00:00Z", 1_709_164_800_000),
            ("2016-12-31T23:59:60Z", 1_483_228_800_000),
            ("2017-01-01T00:59:60+01:00", 1_483_228_800_000),
            ("0000-01-01T00:00:00Z", -62_167_219_200_000),
            ("9999-12-31T23:59:59Z", 253_402_300_799_000),
        ] {
            assert_eq!(ms(text), Some(expected), "{text}");
        }
        for bad in [
            "",
            "2026-11-24",
            "2026-11-24T12:00:00",
            "2026-11-24T12:00Z",
            "2026-11-24 12:00:00Z",
            "20261124T120000Z",
            "2026-11-24T12:00:00+01",
            "2026-11-24T12:00:00+0100",
            "2026-11-24T12:00:00+24:00",
            "2026-11-24T12:00:00+01:60",
            "2026-11-24T12:00:00Z[Europe/Berlin]",
            "2026-11-24T12:00:00.Z",
            "2026-11-24T12:00:00,5Z",
            "+002026-11-24T12:00:00Z",
            "2026-02-30T12:00:00Z",
            "2026-13-01T12:00:00Z",
            "2026-11-24T24:00:00Z",
            "2026-11-24T12:60:00Z",
            "2026-11-24T12:00:60Z",
            "2026-11-24T12:00:61Z",
            "2026-11-24T1\u{e4}:00:00Z",
            "2026-11-24T12:00:0\u{e4}Z",
            " 2026-11-24T12:00:00Z",
            "2026-11-24T12:00:00Z ",
            "-026-11-24T12:00:00Z",
            "2026-11-24T12:00:00\u{2212}01:00",
        ] {
            assert_eq!(ms(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_clock_that_went_back_gives_no_negative_age() {
        assert_eq!(Timestamp(5).since(Timestamp(9)), Duration::ZERO);
    }
}
