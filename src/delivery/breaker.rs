//! One breaker per server that webhooks live on. Pure: time is an argument.
//!
//! ```text
//!            failures_max in a row                    open_for has passed
//! Closed ───────────────────────────▶ Open ◀────────────────┐ ──────────▶ Probing
//!    ▲                                  ▲                   │                │ readiness (n8n) or a connection
//!    │                                  │ it failed         └── not there ───┤
//!    └── it went well ── HalfOpen ──────┘ ◀───────────── there ─────────────┘
//!                        (one delivery)
//! ```
//!
//! Calls without any answer (timeouts, broken connections) do not say that the server is down: a workflow may be slow. So many
//! of them in a row raise a doubt: nothing is taken up until the server was probed, at once. There: closed again. Not there: open.
//!
//! # Invariants
//! 1. While it is not closed, at most one delivery is under way that was begun since it opened: a dead n8n burns the attempts
//!    of those that were running when it died, and then none, since probing asks for readiness and not with an event.
//! 2. An answer of any kind that is not "down" or "less, please" closes it.

use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Closed {
        failures: u64,
    },
    /// Too many calls without an answer: probed at once.
    Doubt {
        probing: bool,
    },
    Open {
        until: Instant,
    },
    Probing,
    HalfOpen {
        trial: bool,
    },
}

#[derive(Clone, Debug)]
pub struct Breaker {
    state: State,
    failures_max: u64,
    /// Calls in a row that got no answer.
    silent: u64,
    open_for: Duration,
    /// Counts half-open phases, so that a slow trial of an earlier one decides nothing in this one.
    phase: u64,
}

/// The one delivery of a half-open phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trial(u64);

impl Breaker {
    pub fn new(failures_max: u64, open_for: Duration) -> Self {
        Self { state: State::Closed { failures: 0 }, failures_max, silent: 0, open_for, phase: 0 }
    }

    pub fn state(&self) -> State {
        self.state
    }

    pub fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed { .. })
    }

    /// Whether the server counts as down. A doubt lasts as long as one probe and is none yet.
    pub fn is_down(&self) -> bool {
        !matches!(self.state, State::Closed { .. } | State::Doubt { .. })
    }

    /// Whether a delivery may be taken up now.
    pub fn allows(&self) -> bool {
        matches!(self.state, State::Closed { .. } | State::HalfOpen { trial: false })
    }

    /// A delivery was taken up. A trial must be reported by [`answered`](Self::answered) or [`abandoned`](Self::abandoned).
    pub fn taken(&mut self) -> Option<Trial> {
        if self.state != (State::HalfOpen { trial: false }) {
            return None;
        }
        self.state = State::HalfOpen { trial: true };
        Some(Trial(self.phase))
    }

    fn is_current(&self, trial: Option<Trial>) -> bool {
        trial == Some(Trial(self.phase)) && matches!(self.state, State::HalfOpen { trial: true })
    }

    /// The trial ended without a call.
    pub fn abandoned(&mut self, trial: Trial) {
        if self.is_current(Some(trial)) {
            self.state = State::HalfOpen { trial: false };
        }
    }

    /// A call ended. `healthy` as in [`Judged`](super::verdict::Judged). Returns whether it opened or closed.
    pub fn answered(&mut self, now: Instant, healthy: Option<bool>, trial: Option<Trial>) -> Option<bool> {
        let current = self.is_current(trial);
        self.silent = if healthy.is_none() { self.silent + 1 } else { 0 };
        match (self.state, healthy) {
            (State::Closed { .. } | State::Doubt { .. }, Some(true)) => self.state = State::Closed { failures: 0 },
            (State::Closed { .. }, None) if self.silent >= self.failures_max => {
                self.state = State::Doubt { probing: false };
            }
            (_, Some(true)) => {
                self.state = State::Closed { failures: 0 };
                return Some(true);
            }
            (State::Closed { failures }, Some(false)) if failures + 1 < self.failures_max => {
                self.state = State::Closed { failures: failures + 1 };
            }
            (State::Closed { .. } | State::Doubt { .. }, Some(false)) => {
                self.state = State::Open { until: now + self.open_for };
                return Some(false);
            }
            (State::HalfOpen { .. }, Some(false)) if current => self.state = State::Open { until: now + self.open_for },
            (State::HalfOpen { .. }, None) if current => self.state = State::HalfOpen { trial: false },
            _ => {}
        }
        None
    }

    /// Whether it is time to look if the server is there. Answers `true` once; tell the result to [`probed`](Self::probed).
    pub fn probe(&mut self, now: Instant) -> bool {
        match self.state {
            State::Open { until } if now >= until => {
                self.state = State::Probing;
                true
            }
            State::Doubt { probing: false } => {
                self.state = State::Doubt { probing: true };
                true
            }
            _ => false,
        }
    }

    /// Returns whether it opened.
    pub fn probed(&mut self, now: Instant, there: bool) -> bool {
        self.silent = 0;
        match self.state {
            State::Probing => {
                self.phase += 1;
                self.state =
                    if there { State::HalfOpen { trial: false } } else { State::Open { until: now + self.open_for } };
                false
            }
            State::Doubt { .. } if there => {
                self.state = State::Closed { failures: 0 };
                false
            }
            State::Doubt { .. } => {
                self.state = State::Open { until: now + self.open_for };
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN_FOR: Duration = Duration::from_secs(5);

    #[test]
    fn failures_in_a_row_open_it_and_an_answer_between_them_does_not_count() {
        let now = Instant::now();
        let mut breaker = Breaker::new(3, OPEN_FOR);
        for healthy in [false, false, true, false, false] {
            breaker.answered(now, Some(healthy), None);
            assert!(breaker.allows());
        }
        assert_eq!(breaker.answered(now, None, None), None);
        assert_eq!(breaker.answered(now, Some(false), None), Some(false));
        assert!(!breaker.allows() && breaker.is_down());
    }

    #[test]
    fn silence_is_looked_into_before_it_counts() {
        let now = Instant::now();
        let mut breaker = Breaker::new(3, OPEN_FOR);
        let silence = |breaker: &mut Breaker| {
            for _ in 0..3 {
                assert!(breaker.allows());
                assert_eq!(breaker.answered(now, None, None), None);
            }
            assert!(!breaker.allows() && !breaker.is_down());
            assert!(breaker.probe(now) && !breaker.probe(now));
        };
        // A slow workflow.
        silence(&mut breaker);
        assert!(!breaker.probed(now, true) && breaker.is_closed());
        // A call of before is answered while the probe is under way.
        silence(&mut breaker);
        assert_eq!(breaker.answered(now, Some(true), None), None);
        assert!(breaker.is_closed() && !breaker.probed(now, false) && breaker.is_closed());
        // A server that hangs.
        silence(&mut breaker);
        assert!(breaker.probed(now, false) && breaker.is_down());
        // An answer between them ends a row.
        let mut breaker = Breaker::new(3, OPEN_FOR);
        for healthy in [None, None, Some(true), None, None, Some(false), None, None] {
            breaker.answered(now, healthy, None);
            assert!(breaker.is_closed(), "{healthy:?}");
        }
    }

    /// Invariant 1, over random histories: count deliveries that begin while it is not closed.
    #[test]
    fn invariant_1_one_delivery_at_a_time_while_not_closed() {
        for seed in 0..256 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut now = Instant::now();
            let mut breaker = Breaker::new(random.u64(1..5), OPEN_FOR);
            let mut running: Vec<Option<Trial>> = Vec::new();
            for _ in 0..500 {
                now += Duration::from_millis(random.u64(0..2_000));
                match random.u8(0..5) {
                    0 if breaker.allows() => {
                        let trial = breaker.taken();
                        assert!(trial.is_some() || breaker.is_closed(), "seed {seed}");
                        running.push(trial);
                    }
                    1 if !running.is_empty() => {
                        let trial = running.swap_remove(random.usize(0..running.len()));
                        if let Some(trial) = trial.filter(|_| random.bool()) {
                            breaker.abandoned(trial);
                        } else {
                            let healthy = [None, Some(true), Some(false)][random.usize(0..3)];
                            breaker.answered(now, healthy, trial);
                        }
                    }
                    2 if breaker.probe(now) => drop(breaker.probed(now, random.bool())),
                    _ => {}
                }
                if !breaker.is_closed() {
                    assert!(
                        running.iter().filter(|trial| trial.is_some_and(|t| t == Trial(breaker.phase))).count() <= 1,
                        "seed {seed}"
                    );
                }
            }
        }
    }

    #[test]
    fn it_closes_again_after_probe_and_trial() {
        let now = Instant::now();
        let mut breaker = Breaker::new(1, OPEN_FOR);
        breaker.answered(now, Some(false), None);
        assert!(!breaker.probe(now));
        let later = now + OPEN_FOR;
        assert!(breaker.probe(later) && !breaker.probe(later));
        breaker.probed(later, false);
        assert!(!breaker.allows());
        let later = later + OPEN_FOR;
        assert!(breaker.probe(later));
        breaker.probed(later, true);
        assert!(breaker.allows());
        let trial = breaker.taken();
        assert!(trial.is_some() && !breaker.allows());
        assert_eq!(breaker.answered(later, Some(true), trial), Some(true));
        assert!(breaker.is_closed());
    }
}
