//! Publishes over N connections: each sends its next event as soon as it is answered, or all share a timetable.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::task::LocalSet;

use crate::Publish;
use crate::client::Connection;
use crate::event::Template;
use crate::summary::Latencies;

/// What came of a run.
#[derive(Default)]
pub struct Outcome {
    /// Answered 202, the warm-up included.
    pub accepted: u64,
    /// When each accepted event was sent, by its number.
    pub sent: BTreeMap<u64, Instant>,
    statuses: BTreeMap<u16, u64>,
    errors: u64,
    first_error: Option<String>,
    latencies: Latencies,
    measured: Duration,
    measured_accepted: u64,
}

impl Outcome {
    pub fn json(&self) -> serde_json::Value {
        let mut json = serde_json::json!({
            "accepted": self.accepted,
            "statuses": self.statuses,
            "errors": self.errors,
            "first_error": self.first_error,
            "seconds": self.measured.as_secs_f64(),
            "per_second": self.measured_accepted as f64 / self.measured.as_secs_f64().max(1e-9),
        });
        self.latencies.write("", &mut json);
        json
    }
}

/// How long a connection waits after an error before it connects again.
const PAUSE: Duration = Duration::from_millis(50);
/// An answer that takes longer is an error.
const PATIENCE: Duration = Duration::from_secs(30);

pub async fn run(arguments: &Publish) -> Result<Outcome, String> {
    let rest = arguments.url.strip_prefix("http://").ok_or("the URL begins with http://")?;
    let (authority, path) = rest.split_once('/').ok_or("the URL has a path")?;
    if arguments.count.is_none() && arguments.seconds.is_none() {
        return Err("give --count or --seconds".to_owned());
    }
    let template = Template::new(authority, &format!("/{path}"), arguments.token.as_deref(), &arguments.run);
    let begin = Instant::now();
    let shared = Rc::new(Shared {
        template,
        begin,
        measure_from: begin + Duration::from_secs(arguments.warmup),
        end: arguments.seconds.map(|s| begin + Duration::from_secs(arguments.warmup + s)),
        count: arguments.count.unwrap_or(u64::MAX),
        interval: arguments.rate.map(|r| Duration::from_secs_f64(1.0 / r)),
        keep_sent: arguments.count.is_some(),
        next: RefCell::new(0),
        outcome: RefCell::default(),
    });
    let tasks = LocalSet::new();
    for _ in 0..arguments.connections {
        tasks.spawn_local(connection(authority.to_owned(), shared.clone()));
    }
    tasks.await;
    let mut outcome = shared.outcome.take();
    outcome.measured = Instant::now().saturating_duration_since(shared.measure_from);
    Ok(outcome)
}

struct Shared {
    template: Template,
    begin: Instant,
    measure_from: Instant,
    end: Option<Instant>,
    count: u64,
    /// Between two requests of the timetable.
    interval: Option<Duration>,
    keep_sent: bool,
    next: RefCell<u64>,
    outcome: RefCell<Outcome>,
}

impl Shared {
    /// The next number, unless the run is over.
    fn take(&self) -> Option<u64> {
        let mut next = self.next.borrow_mut();
        let number = *next;
        let due = self.due(number);
        if number >= self.count || self.end.is_some_and(|end| due.max(Instant::now()) >= end) {
            return None;
        }
        *next += 1;
        Some(number)
    }

    /// When the timetable wants request `number` to leave.
    fn due(&self, number: u64) -> Instant {
        self.begin + self.interval.map_or(Duration::ZERO, |i| i.mul_f64(number as f64))
    }
}

async fn connection(authority: String, shared: Rc<Shared>) {
    let (mut connection, mut request) = (Connection::new(&authority), Vec::with_capacity(2_048));
    while let Some(number) = shared.take() {
        let due = shared.due(number);
        let late = Instant::now() >= due;
        if shared.interval.is_some() && !late {
            tokio::time::sleep_until(due.into()).await;
        }
        shared.template.write(number, &mut request);
        let now = Instant::now();
        // A request that had to wait for a free connection waited for the server: that counts. The timer's own
        // millisecond does not.
        let start = if shared.interval.is_some() && late { due } else { now };
        let answer = tokio::time::timeout(PATIENCE, connection.call(&request)).await;
        let answer = answer.unwrap_or_else(|_| {
            // Half an answer may still come: never on the next request.
            connection = Connection::new(&authority);
            Err(std::io::ErrorKind::TimedOut.into())
        });
        let measured = start >= shared.measure_from;
        let failed = {
            let mut outcome = shared.outcome.borrow_mut();
            match answer {
                Ok(status) => {
                    *outcome.statuses.entry(status).or_default() += 1;
                    if status == 202 {
                        outcome.accepted += 1;
                        outcome.measured_accepted += u64::from(measured);
                        if shared.keep_sent {
                            outcome.sent.insert(number, now);
                        }
                    } else if outcome.first_error.is_none() {
                        outcome.first_error =
                            Some(String::from_utf8_lossy(connection.body()).chars().take(300).collect());
                    }
                    if measured {
                        outcome.latencies.add(start.elapsed());
                    }
                    // A server that refuses is not hammered in a closed loop.
                    status >= 500 && shared.interval.is_none()
                }
                Err(error) => {
                    outcome.errors += 1;
                    outcome.first_error.get_or_insert_with(|| error.to_string());
                    true
                }
            }
        };
        if failed {
            tokio::time::sleep(PAUSE).await;
        }
    }
}
