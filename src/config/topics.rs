//! The topics file (`config/topics.toml`): what `dealscale topology` wants to find in a Pulsar cluster.
//!
//! The shipped file is the built-in default, so the two cannot differ.

use std::path::Path;

use super::{Problem, Section, Sink};
use crate::ids::Topic;
use crate::units::{Bytes, Span};

/// Built in, and shipped as `/etc/dealscale/topics.toml`.
pub const DEFAULT: &str = include_str!("../../config/topics.toml");

/// Pulsar accepts more, but a single appliance has no use for them.
const PARTITIONS_MAX: u64 = 1_000;

#[derive(Clone, Debug, PartialEq)]
pub struct TopicsFile {
    pub namespace: Namespace,
    pub topics: Vec<TopicConfig>,
}

/// Policies of the environment's namespace.
#[derive(Clone, Debug, PartialEq)]
pub struct Namespace {
    /// Of acknowledged messages.
    pub retention: Span,
    pub retention_bytes_max: Bytes,
    /// Per topic; producers wait at the limit.
    pub backlog_bytes_max: Bytes,
    /// Per consumer.
    pub unacknowledged_max: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct TopicConfig {
    /// A literal name, or a template with `{tenant}`.
    pub name: String,
    /// 0 is a topic without partitions.
    pub partitions: u32,
    /// Beside the appliance's own.
    pub subscriptions: Vec<String>,
    pub dead_letter: bool,
}

impl TopicConfig {
    /// What a topic gets that the file does not name.
    pub fn unnamed(topic: &str) -> Self {
        Self { name: topic.to_owned(), partitions: 1, subscriptions: Vec::new(), dead_letter: true }
    }
}

impl Default for TopicsFile {
    fn default() -> Self {
        Self::parse(DEFAULT).expect("the built-in file is right")
    }
}

impl TopicsFile {
    /// Reads `file`, or takes the built-in one.
    ///
    /// # Errors
    /// All problems that were found.
    pub fn read(file: Option<&Path>) -> Result<Self, Vec<Problem>> {
        let Some(file) = file else { return Ok(Self::default()) };
        let text = std::fs::read_to_string(file).map_err(|error| {
            vec![Problem::new(file.display().to_string(), format!("cannot read the topics file: {error}"))]
        })?;
        Self::parse(&text)
    }

    /// # Errors
    /// All problems that were found.
    pub fn parse(text: &str) -> Result<Self, Vec<Problem>> {
        let table: toml::Table =
            text.parse().map_err(|error: toml::de::Error| vec![Problem::new("topics file", error.message())])?;
        let mut sink = Sink::default();
        let mut root = Section::new("", table, &mut sink);
        let namespace = root.section("namespace", |s| {
            let namespace = Namespace {
                retention: s.span("retention", Span::hours(24), Span::secs(60)..=Span::days(366)),
                retention_bytes_max: s.bytes(
                    "retention_bytes_max",
                    Bytes::gib(20),
                    Bytes::mib(1)..=Bytes::gib(1 << 20),
                ),
                backlog_bytes_max: s.bytes("backlog_bytes_max", Bytes::gib(10), Bytes::mib(1)..=Bytes::gib(1 << 20)),
                unacknowledged_max: s.count("unacknowledged_max", 10_000, 100..=50_000),
            };
            if namespace.backlog_bytes_max >= namespace.retention_bytes_max {
                s.problem("backlog_bytes_max", "must be less than retention_bytes_max: Pulsar refuses it otherwise");
            }
            namespace
        });
        let topics = root.tables("topics", |_, s| {
            let name = s.parse_opt::<String>("name").unwrap_or_default();
            if Topic::try_new(&name.replace("{tenant}", "t")).is_err() {
                s.problem("name", "must match [a-z0-9][a-z0-9._-]{0,199}, with {tenant} for the tenant's name");
            }
            let topic = TopicConfig {
                name,
                partitions: s.count("partitions", 1, 0..=PARTITIONS_MAX) as u32,
                subscriptions: s.list("subscriptions", &[]),
                dead_letter: s.flag("dead_letter", true),
            };
            if topic.subscriptions.iter().any(|name| name.is_empty() || name.contains(['/', '?', '#', '%'])) {
                s.problem("subscriptions", "a subscription's name has none of / ? # %");
            }
            topic
        });
        for (n, topic) in topics.iter().enumerate() {
            if topics[..n].iter().any(|t| t.name == topic.name) {
                root.problem(&format!("topics[{n}].name"), "is used twice");
            }
        }
        root.finish();
        if sink.problems.is_empty() { Ok(Self { namespace, topics }) } else { Err(sink.problems) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_file_shows_the_defaults() {
        let shipped = TopicsFile::default();
        assert_eq!(shipped.namespace, TopicsFile::parse("").unwrap().namespace);
        for topic in &shipped.topics {
            assert_eq!(*topic, TopicConfig::unnamed(&topic.name));
        }
        // Every class of route finds its topic.
        for name in [
            "dealscale.workflow.short",
            "dealscale.workflow.long",
            "dealscale.ai.inference",
            "dealscale.analytics.events",
        ] {
            assert!(shipped.topics.iter().any(|t| t.name == name), "{name}");
        }
    }

    #[test]
    fn every_problem_is_found_at_once() {
        let text = "[namespace]\nretention = \"soon\"\nttl = 1\nbacklog_bytes_max = \"20GiB\"\n[[topics]]\nname = \"A\"\npartitions = 9999\n[[topics]]\nname=\"x\"\n[[topics]]\nname=\"x\"";
        let problems = TopicsFile::parse(text).unwrap_err();
        let keys: Vec<_> = problems.iter().map(|p| p.key.as_str()).collect();
        for key in [
            "namespace.retention",
            "namespace.backlog_bytes_max",
            "namespace.ttl",
            "topics[0].name",
            "topics[0].partitions",
            "topics[2].name",
        ] {
            assert!(keys.contains(&key), "{key} is missing in {keys:?}");
        }
    }
}
