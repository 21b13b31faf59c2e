//! `[environments.NAME.delivery]` and the retry schedule that routes share.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::{Secret, Section};
use crate::units::Span;

#[derive(Clone, Debug)]
pub struct Delivery {
    /// Attempts under way at once, over all routes. n8n gains nothing from more than about ten.
    pub concurrency: u64,
    pub tenant_concurrency: u64,
    /// Executions being followed at once.
    pub follow_max: u64,
    pub follow_interval: Span,
    /// A followed execution that is not seen for so long is `unknown`.
    pub follow_lost_after: Span,
    /// Consecutive failures to reach n8n after which the breaker opens, and how long it stays open.
    pub breaker_failures: u64,
    pub breaker_open: Span,
    /// How long a claim is valid without being renewed.
    pub claim: Span,
    /// A reference that stays open without the broker showing anything of it is published again after this.
    pub sweep_after: Span,
    pub sweep_interval: Span,
    /// Waits up to this keep the message; longer ones are ledger rows that the timer publishes again.
    pub hold_max: Span,
    /// Standard-Webhooks secret (`whsec_` and base64): signs every delivery.
    pub webhook_secret: Option<Secret>,
    /// Former secrets that receivers still accept: their signatures are sent as well.
    pub webhook_secret_previous: Option<Secret>,
    /// Dead letters replayed per second by a mass replay.
    pub replay_rate: u64,
}

/// The key in a Standard-Webhooks secret: `whsec_` and base64 of 24 to 64 bytes (specification 1.0.0, "Signature scheme").
pub fn webhook_key(secret: &Secret) -> Option<Vec<u8>> {
    let text = secret.expose().trim();
    let bytes = STANDARD.decode(text.strip_prefix("whsec_").unwrap_or(text)).ok()?;
    (24..=64).contains(&bytes.len()).then_some(bytes)
}

impl Delivery {
    pub(super) fn check(s: &mut Section<'_>) -> Self {
        let mut secret = |name: &str| {
            let secret = s.secret(name);
            if secret.as_ref().is_some_and(|secret| webhook_key(secret).is_none()) {
                s.problem(name, "expected \"whsec_\" and 24 to 64 bytes in base64");
            }
            secret
        };
        let (webhook_secret, webhook_secret_previous) = (secret("webhook_secret"), secret("webhook_secret_previous"));
        Self {
            concurrency: s.count("concurrency", 32, 1..=10_000),
            tenant_concurrency: s.count("tenant_concurrency", 32, 1..=10_000),
            follow_max: s.count("follow_max", 1_000, 1..=100_000),
            follow_interval: s.span("follow_interval", Span::secs(2), Span::millis(50)..=Span::secs(600)),
            follow_lost_after: s.span("follow_lost_after", Span::secs(120), Span::secs(1)..=Span::hours(24)),
            breaker_failures: s.count("breaker_failures", 5, 1..=1_000),
            breaker_open: s.span("breaker_open", Span::secs(5), Span::millis(50)..=Span::secs(600)),
            claim: s.span("claim", Span::secs(60), Span::secs(1)..=Span::hours(1)),
            sweep_after: s.span("sweep_after", Span::secs(300), Span::secs(1)..=Span::hours(24)),
            sweep_interval: s.span("sweep_interval", Span::secs(30), Span::millis(100)..=Span::hours(1)),
            hold_max: s.span("hold_max", Span::secs(2), Span::millis(0)..=Span::secs(60)),
            webhook_secret,
            webhook_secret_previous,
            replay_rate: s.count("replay_rate", 100, 1..=100_000),
        }
    }
}

/// Exponential backoff with full jitter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Retry {
    /// Attempts in all, the first included.
    pub attempts_max: u64,
    pub min: Span,
    pub max: Span,
    pub factor: f64,
}

impl Retry {
    pub(super) fn check(s: &mut Section<'_>) -> Self {
        let retry = Self {
            attempts_max: s.count("attempts_max", 12, 1..=1_000),
            min: s.span("min", Span::secs(1), Span::millis(1)..=Span::hours(24)),
            max: s.span("max", Span::hours(1), Span::millis(1)..=Span::days(7)),
            factor: s.number("factor", 2.0, 1.0..=10.0),
        };
        if retry.max < retry.min {
            s.problem("max", "must not be shorter than min");
        }
        retry
    }

    /// The longest wait before attempt `next` (2 is the first retry); the caller applies jitter.
    pub fn wait_max(&self, next: u64) -> Span {
        let exponent = next.saturating_sub(2).min(1_000) as i32;
        let ms = self.min.as_millis() as f64 * self.factor.powi(exponent);
        Span::millis((ms.min(self.max.as_millis() as f64)) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_that_cannot_sign_is_a_problem() {
        let problems = |secret: &str| {
            let text =
                format!("state_dir = \"/nowhere\"\n[environments.test.delivery]\nwebhook_secret = \"{secret}\"\n");
            crate::config::parse(&text).map_or_else(|p| p.iter().map(ToString::to_string).collect(), |_| Vec::new())
        };
        assert_eq!(problems("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"), Vec::<String>::new());
        for bad in ["whsec_AAAA", "whsec_", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaS!", "hunter2"] {
            let found = problems(bad).join("\n");
            assert!(found.starts_with("environments.test.delivery.webhook_secret: "), "{found}");
            assert!(bad == "whsec_" || !found.contains(bad), "{found}");
        }
    }

    #[test]
    fn waits_grow_to_their_limit() {
        let retry = Retry { attempts_max: 9, min: Span::secs(1), max: Span::secs(10), factor: 2.0 };
        let waits: Vec<_> = [2, 3, 4, 5, 6, 1_000_000].map(|n| retry.wait_max(n).as_millis()).into();
        assert_eq!(waits, [1_000, 2_000, 4_000, 8_000, 10_000, 10_000]);
    }
}
