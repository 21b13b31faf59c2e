//! The state of each part, as `/readyz`, `dealscale status` and metrics tell it.

use std::sync::LazyLock;

use prometheus::IntGaugeVec;
use serde::{Deserialize, Serialize};

/// How a part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Works.
    Ok,
    /// Work waits, nothing is lost: an outside system is down, a breaker is open, an operator is needed.
    Degraded,
    /// The appliance cannot do its job: publishes are refused.
    Down,
}

/// One part of the appliance.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Part {
    /// `production/outbox`, `production/broker`, `bridge` …
    pub name: String,
    pub level: Level,
    /// What it does or lacks, for people; no secrets.
    pub detail: String,
}

impl Part {
    pub fn new(name: impl Into<String>, level: Level, detail: impl Into<String>) -> Self {
        Self { name: name.into(), level, detail: detail.into() }
    }
}

static LEVELS: LazyLock<IntGaugeVec> = LazyLock::new(|| {
    super::gauges("dealscale_part_level", "State of each part: 0 works, 1 degraded, 2 down.", &["part"])
});

/// All parts together.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    pub level: Level,
    pub parts: Vec<Part>,
}

impl Report {
    pub fn new(parts: Vec<Part>) -> Self {
        let level = parts.iter().map(|p| p.level).max().unwrap_or(Level::Ok);
        Self { level, parts }
    }
    /// For the metrics: the parts are those of the configuration, a handful.
    pub fn gauges(&self) {
        for part in &self.parts {
            LEVELS.with_label_values(&[&part.name]).set(part.level as i64);
        }
    }

    /// Ready means: publishes are taken. A broker or n8n that is down does not change that.
    pub fn is_ready(&self) -> bool {
        self.level < Level::Down
    }
}
