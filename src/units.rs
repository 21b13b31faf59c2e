//! Quantities with their units: bytes and spans of time, as people write them in the configuration.
//!
//! Layer 0: knows nobody. Every limit of the appliance is one of these types, so that a number without a unit cannot
//! travel through the code.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A number of bytes. Written `512`, `64KiB`, `16MiB`, `2GiB` (powers of 1024; `kB`, `MB`, `GB` are powers of 1000).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

impl Bytes {
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }
    /// As a size in memory. The appliance runs on 64-bit machines only.
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
            let one = 1u64 << shift;
            if self.0 >= one {
                return if self.0.is_multiple_of(one) {
                    write!(f, "{}{unit}", self.0 >> shift)
                } else {
                    write!(f, "{:.1}{unit}", self.0 as f64 / one as f64)
                };
            }
        }
        write!(f, "{}B", self.0)
    }
}

/// Why a quantity was not understood. The value itself is never part of the message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {0}")]
pub struct ParseError(pub &'static str);

/// Splits `16MiB` into `16` and `MiB`.
fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    (&text[..at], text[at..].trim())
}

impl FromStr for Bytes {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        const WANT: ParseError = ParseError("a size such as \"64KiB\", \"16MiB\" or \"2GiB\"");
        let (number, unit) = split_unit(text);
        let number: u64 = number.parse().map_err(|_| WANT)?;
        let scale: u64 = match unit {
            "" | "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "TiB" => 1 << 40,
            "kB" | "KB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            _ => return Err(WANT),
        };
        number.checked_mul(scale).map(Bytes).ok_or(WANT)
    }
}

/// A span of time. Written `250ms`, `30s`, `5m`, `24h`, `7d`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span(pub Duration);

impl Span {
    pub const fn millis(n: u64) -> Self {
        Self(Duration::from_millis(n))
    }
    pub const fn secs(n: u64) -> Self {
        Self(Duration::from_secs(n))
    }
    pub const fn hours(n: u64) -> Self {
        Self(Duration::from_secs(n * 3600))
    }
    pub const fn days(n: u64) -> Self {
        Self(Duration::from_secs(n * 86_400))
    }
    /// Whole milliseconds, as [`crate::clock::Timestamp`] counts.
    pub const fn as_millis(self) -> i64 {
        self.0.as_millis() as i64
    }
}

impl From<Span> for Duration {
    fn from(span: Span) -> Duration {
        span.0
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        for (scale, unit) in [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1_000, "s")] {
            if ms >= scale && ms.is_multiple_of(scale) {
                return write!(f, "{}{unit}", ms / scale);
            }
        }
        write!(f, "{ms}ms")
    }
}

impl FromStr for Span {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        const WANT: ParseError = ParseError("a time span such as \"250ms\", \"30s\", \"5m\", \"24h\" or \"7d\"");
        let (number, unit) = split_unit(text);
        let number: u64 = number.parse().map_err(|_| WANT)?;
        let scale: u64 = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" | "min" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(WANT),
        };
        // A century is a misprint, and keeps every later sum of timestamps in range.
        let ms = number.checked_mul(scale).filter(|ms| *ms <= 100 * 366 * 86_400_000).ok_or(WANT)?;
        Ok(Span::millis(ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_read_what_they_print() {
        for bytes in [Bytes(0), Bytes(17), Bytes::kib(64), Bytes::mib(16), Bytes::gib(2)] {
            assert_eq!(bytes.to_string().parse::<Bytes>(), Ok(bytes));
        }
        for bad in ["", "MiB", "12 parsecs", "1.5MiB", "-1", "99999999999999GiB"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn spans_read_what_they_print() {
        for span in [Span::millis(1), Span::secs(90), Span::hours(24), Span::days(7)] {
            assert_eq!(span.to_string().parse::<Span>(), Ok(span));
        }
        for bad in ["", "5", "s", "1.5h", "-3s", "1000000d"] {
            assert!(bad.parse::<Span>().is_err(), "{bad:?} was accepted");
        }
    }
}
