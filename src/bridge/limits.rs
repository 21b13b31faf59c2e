//! How much may be under way, and how fast tenants may publish.
//!
//! # Invariants
//! 1. A slot is given back when its guard is dropped, by whatever way the request ends.
//! 2. A tenant's rate is counted after everything that could refuse the request for its own sake, so that a tenant is not
//!    throttled by requests that were never accepted.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};

use super::respond::{Kind, Problem};
use crate::config::environment::TenantConfig;
use crate::ids::Tenant;

/// Requests that wait for the outbox, over all environments.
#[derive(Clone, Debug, Default)]
pub struct InFlight(Arc<AtomicU64>);

/// One request's slot.
#[derive(Debug)]
pub struct Slot(Arc<AtomicU64>);

impl InFlight {
    /// # Errors
    /// 503 when `max` are under way.
    pub fn enter(&self, max: u64) -> Result<Slot, Problem> {
        if self.0.fetch_add(1, Ordering::AcqRel) >= max {
            self.0.fetch_sub(1, Ordering::AcqRel);
            return Err(Problem::new(Kind::Busy, "too many requests wait for the outbox; retry in a moment"));
        }
        Ok(Slot(self.0.clone()))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Keys beyond this are looked through for tenants that have not published lately (a pattern admits any number of names).
const TENANTS_REMEMBERED: usize = 10_000;

/// `publish_rate_max` of the declared tenants of one environment.
pub struct Rates {
    /// By pattern; patterns without a limit are left out.
    limiters: Vec<(String, DefaultKeyedRateLimiter<Tenant>)>,
    clock: DefaultClock,
}

impl Rates {
    pub fn new(tenants: &[TenantConfig]) -> Self {
        let limiters = tenants
            .iter()
            .filter_map(|t| {
                let rate = NonZeroU32::new(u32::try_from(t.publish_rate_max).unwrap_or(u32::MAX))?;
                Some((t.pattern.as_str().to_owned(), RateLimiter::keyed(Quota::per_second(rate))))
            })
            .collect();
        Self { limiters, clock: DefaultClock::default() }
    }

    /// Counts one publish of `tenant`, whose settings are `config`.
    ///
    /// # Errors
    /// 429 with the time after which one more fits.
    pub fn take(&self, config: &TenantConfig, tenant: &Tenant) -> Result<(), Problem> {
        let Some((_, limiter)) = self.limiters.iter().find(|(p, _)| p == config.pattern.as_str()) else {
            return Ok(());
        };
        if limiter.len() > TENANTS_REMEMBERED {
            limiter.retain_recent();
        }
        limiter.check_key(tenant).map_err(|until| {
            let wait = until.wait_time_from(self.clock.now());
            let detail = format!("the tenant may publish {} events a second", config.publish_rate_max);
            Problem::new(Kind::TooMany, detail).retry_after(wait.as_secs() + u64::from(wait.subsec_nanos() > 0))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::routes::Pattern;
    use crate::units::Bytes;

    fn config(rate: u64) -> TenantConfig {
        TenantConfig { pattern: Pattern::new("a*"), weight: 1, outbox_bytes_max: Bytes(1), publish_rate_max: rate }
    }

    #[test]
    fn invariant_1_slots_come_back() {
        let in_flight = InFlight::default();
        let (one, _two) = (in_flight.enter(2).unwrap(), in_flight.enter(2).unwrap());
        assert_eq!(in_flight.enter(2).unwrap_err().kind, Kind::Busy);
        drop(one);
        assert!(in_flight.enter(2).is_ok());
    }

    #[test]
    fn each_tenant_has_a_rate_of_its_own() {
        let (a, b) = (Tenant::try_new("a").unwrap(), Tenant::try_new("ab").unwrap());
        let rates = Rates::new(&[config(2)]);
        assert!(rates.take(&config(2), &a).is_ok() && rates.take(&config(2), &a).is_ok());
        assert_eq!(rates.take(&config(2), &a).unwrap_err().kind, Kind::TooMany);
        assert!(rates.take(&config(2), &b).is_ok());
        let free = Rates::new(&[config(0)]);
        assert!((0..1_000).all(|_| free.take(&config(0), &a).is_ok()));
    }
}
