//! What a Pulsar cluster must look like for accepted work to be safe in it, and how to bring it there.
//!
//! cli, pulsar → **`topology`** → admin. [`Topology::plan`] compares the topics file with the cluster, [`Topology::apply`] does
//! what the plan says. `check` is a plan that must be [`clean`](Plan::clean).
//!
//! # Invariants
//! 1. Applied twice, the second time changes nothing.
//! 2. Nothing is deleted, no partition is taken away, no topic that the file does not name is touched: those are [`Finding`]s.
//! 3. A dead-letter topic and its subscription are made before the topic whose messages end there, and a topic counts as made
//!    only after its subscriptions were seen.
//! 4. Everything that would let Pulsar drop accepted work is an error: message TTL, expiry of subscriptions, deletion of
//!    inactive topics, quota policies that evict. It is set right where it is ours to set (the namespace), and reported where
//!    somebody set it on one topic.

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;
use serde_json::{Value, json};

use crate::config::broker::Pulsar;
use crate::config::topics::{TopicConfig, TopicsFile};
use crate::ids::{Tenant, Topic};

use super::admin::{Admin, Error};
use super::auth::Auth;
use super::topics::{TENANT, Topics, tenant_in};

/// The name of every dead-letter topic begins so ([`Topic::dead_letter`]).
const DEAD: &str = "dealscale.deadletter.";
/// Producers wait; the outbox holds the events meanwhile. The other policies refuse or evict.
const HOLD: &str = "producer_request_hold";
const RETENTION: &str = "retention of acknowledged messages";
/// Keeps the namespace's quota type apart from `message_age`, which we do not set.
const STORAGE: &str = "destination_storage";

/// A cluster, and what we want of it.
#[derive(Clone)]
pub struct Topology {
    admin: Admin,
    subscription: String,
    file: TopicsFile,
    /// Templates of routes that the file may not name: a topic of theirs is wanted with the file's defaults.
    routes: Vec<String>,
    tenants: Vec<Tenant>,
}

/// One difference that [`Topology::apply`] removes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// `namespace dealscale/production`, `topic dealscale.workflow.long`, …
    pub object: String,
    /// `retention`, `partitions`, `subscription dealscale`, …
    pub what: String,
    pub is: String,
    pub should: String,
    #[serde(skip)]
    action: Action,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} is {}, should be {}", self.object, self.what, self.is, self.should)
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Action {
    Tenant,
    Namespace,
    Policy(&'static str, Value),
    Topic { topic: String, partitions: u32 },
    Grow { topic: String, partitions: u32 },
    Subscription { topic: String, subscription: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Pulsar may drop accepted work.
    Error,
    /// Differs from the file, and we do not change it.
    Drift,
}

/// Something that `apply` leaves to a person.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    pub severity: Severity,
    pub object: String,
    pub text: String,
}

/// What is between the cluster and the file.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Plan {
    /// In the order in which they are applied.
    pub changes: Vec<Change>,
    pub findings: Vec<Finding>,
}

impl Plan {
    /// Whether `check` is content: nothing to change, and nothing that could lose work.
    pub fn clean(&self) -> bool {
        self.changes.is_empty() && !self.findings.iter().any(|f| f.severity == Severity::Error)
    }
}

/// A change and what became of it.
#[derive(Clone, Debug, Serialize)]
pub struct Applied {
    #[serde(flatten)]
    pub change: Change,
    pub done: bool,
    pub error: Option<String>,
}

/// What we want of one topic.
struct Wanted {
    topic: Topic,
    partitions: u32,
    subscriptions: Vec<String>,
    dead_letter: bool,
}

impl Topology {
    /// `topics` are those of the routes, wanted beside the file's. `tenants` are those whose topics are made in advance
    /// (declared by exact name); others get theirs at their first event.
    ///
    /// # Errors
    /// A file of the configuration that cannot be read or is wrong.
    pub fn open(config: &Pulsar, topics: &Topics, tenants: Vec<Tenant>) -> Result<Self, String> {
        let auth = Auth::new(&config.auth, config.ca_file.as_deref(), config.operation_timeout.0)?;
        Self::with(config, Admin::new(config, auth)?, topics, tenants)
    }

    pub(super) fn with(config: &Pulsar, admin: Admin, topics: &Topics, tenants: Vec<Tenant>) -> Result<Self, String> {
        let file = TopicsFile::read(config.topics_file.as_deref()).map_err(|problems| {
            let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
            format!("the topics file is wrong: {}", problems.join("; "))
        })?;
        let routes = topics.all().map(str::to_owned).collect();
        Ok(Self { admin, subscription: config.subscription.clone(), file, routes, tenants })
    }

    /// # Errors
    /// When the cluster cannot be asked.
    pub async fn plan(&self) -> Result<Plan, Error> {
        let mut plan = Plan::default();
        let exists = self.plan_namespace(&mut plan).await?;
        let (plain, partitioned) = if exists {
            let (plain, partitioned) = (self.admin.topics().await?, self.admin.partitioned_topics().await?);
            (
                plain.into_iter().filter(|name| base(name) == name).collect::<BTreeSet<_>>(),
                partitioned.into_iter().collect(),
            )
        } else {
            (BTreeSet::new(), BTreeSet::new())
        };
        let found: BTreeSet<String> = plain.union(&partitioned).cloned().collect();
        let mut topics: BTreeSet<Topic> = BTreeSet::new();
        for template in self.file.topics.iter().map(|config| &config.name).chain(&self.routes) {
            if template.contains(TENANT) {
                let declared = self.tenants.iter().map(|tenant| template.replace(TENANT, tenant.as_str()));
                let existing =
                    found.iter().filter(|n| Topic::try_new(n).is_ok_and(|t| tenant_in(template, &t).is_some()));
                topics.extend(declared.chain(existing.cloned()).filter_map(|name| Topic::try_new(&name).ok()));
            } else {
                topics.extend(Topic::try_new(template));
            }
        }
        let mut seen = BTreeSet::new();
        for topic in topics {
            let wanted = self.wanted(&topic);
            if wanted.dead_letter {
                let letters = self.wanted(&topic.dead_letter());
                if seen.insert(letters.topic.clone()) {
                    self.plan_topic(&mut plan, &letters, exists, &plain, &partitioned).await?;
                }
            }
            if seen.insert(topic) {
                self.plan_topic(&mut plan, &wanted, exists, &plain, &partitioned).await?;
            }
        }
        for name in found {
            let known = Topic::try_new(&name).is_ok_and(|topic| seen.contains(&topic));
            if !known && !name.starts_with("__") {
                plan.findings.push(Finding {
                    severity: Severity::Drift,
                    object: format!("topic {name}"),
                    text: "is neither in the topics file nor a route's; it is left alone".into(),
                });
            }
        }
        Ok(plan)
    }

    /// Makes the changes of `plan` in their order, and goes on after one that failed.
    pub async fn apply(&self, plan: &Plan) -> Vec<Applied> {
        let mut applied = Vec::with_capacity(plan.changes.len());
        for change in &plan.changes {
            let result = self.act(&change.action).await;
            applied.push(Applied {
                change: change.clone(),
                done: result.is_ok(),
                error: result.err().map(|e| e.to_string()),
            });
        }
        applied
    }

    /// Whether `topic` can be published to: it and its subscriptions exist. With `create` they are made if they do not.
    ///
    /// # Errors
    /// Why not; `Ok(false)` when something is missing and `create` is not set.
    pub(super) async fn ensure(&self, topic: &Topic, create: bool) -> Result<bool, Error> {
        let wanted = self.wanted(topic);
        if self.is_there(&wanted).await? {
            return Ok(true);
        }
        if !create {
            return Ok(false);
        }
        let mut plan = Plan::default();
        let exists = self.plan_namespace(&mut plan).await?;
        let mut order = vec![wanted];
        if order[0].dead_letter {
            order.insert(0, self.wanted(&topic.dead_letter()));
        }
        for wanted in &order {
            let (mut plain, mut partitioned) = (BTreeSet::new(), BTreeSet::new());
            if exists && self.admin.partitions(wanted.topic.as_str()).await? > 0 {
                partitioned.insert(wanted.topic.to_string());
            } else if exists && self.admin.subscriptions(wanted.topic.as_str()).await?.is_some() {
                plain.insert(wanted.topic.to_string());
            }
            self.plan_topic(&mut plan, wanted, exists, &plain, &partitioned).await?;
        }
        // Only what is missing: a namespace that an operator has set otherwise is the business of `topology apply`.
        let fresh = plan.changes.iter().any(|change| change.action == Action::Namespace);
        for change in &plan.changes {
            match &change.action {
                Action::Policy(..) if !fresh => {}
                Action::Grow { .. } => {}
                action => self.act(action).await?,
            }
        }
        for wanted in &order {
            if !self.is_there(wanted).await? {
                return Ok(false);
            }
        }
        crate::observe::broker::TopicMade { topic }.emit();
        Ok(true)
    }

    async fn is_there(&self, wanted: &Wanted) -> Result<bool, Error> {
        let found = self.admin.subscriptions(wanted.topic.as_str()).await?.unwrap_or_default();
        Ok(wanted.subscriptions.iter().all(|subscription| found.contains(subscription)))
    }

    fn wanted(&self, topic: &Topic) -> Wanted {
        let own = |more: &[String]| {
            let mut names = vec![self.subscription.clone()];
            names.extend(more.iter().filter(|name| **name != self.subscription).cloned());
            names
        };
        if topic.as_str().starts_with(DEAD) {
            return Wanted { topic: topic.clone(), partitions: 0, subscriptions: own(&[]), dead_letter: false };
        }
        let named = |config: &&TopicConfig| config.name == topic.as_str();
        let of_tenant = |config: &&TopicConfig| tenant_in(&config.name, topic).is_some();
        let topics = &self.file.topics;
        let config = topics
            .iter()
            .find(named)
            .or_else(|| topics.iter().filter(of_tenant).max_by_key(|config| config.name.len()))
            .cloned()
            .unwrap_or_else(|| TopicConfig::unnamed(topic.as_str()));
        Wanted {
            topic: topic.clone(),
            partitions: config.partitions,
            subscriptions: own(&config.subscriptions),
            dead_letter: config.dead_letter,
        }
    }

    /// Whether the namespace exists; what it and its policies lack goes into the plan.
    async fn plan_namespace(&self, plan: &mut Plan) -> Result<bool, Error> {
        let object = format!("namespace {}", self.admin.namespace());
        let policies = self.admin.policies().await?;
        if policies.is_none() {
            if !self.admin.tenant_exists().await? {
                plan.changes.push(missing("tenant of ".to_owned() + &object, "tenant", Action::Tenant));
            }
            plan.changes.push(missing(object.clone(), "namespace", Action::Namespace));
        }
        let exists = policies.is_some();
        let policies = policies.unwrap_or(Value::Null);
        let wanted = &self.file.namespace;
        let set = [
            Policy {
                what: RETENTION,
                is: &policies["retention_policies"],
                should: self.retention(),
                path: "retention",
            },
            Policy {
                what: "backlog quota",
                is: &policies["backlog_quota_map"][STORAGE],
                should: json!({ "limitSize": wanted.backlog_bytes_max.0, "limitTime": -1, "policy": HOLD }),
                path: "backlogQuota?backlogQuotaType=destination_storage",
            },
            // Zero, not absent: absent is whatever the broker's own default says, today or after its next upgrade.
            Policy {
                what: "message TTL",
                is: &policies["message_ttl_in_seconds"],
                should: json!(0),
                path: "messageTTL",
            },
            Policy {
                what: "expiry of subscriptions",
                is: &policies["subscription_expiration_time_minutes"],
                should: json!(0),
                path: "subscriptionExpirationTime",
            },
            Policy {
                what: "deletion of inactive topics",
                is: &policies["inactive_topic_policies"],
                should: json!({
                    "inactiveTopicDeleteMode": "delete_when_no_subscriptions",
                    "maxInactiveDurationSeconds": 3600,
                    "deleteWhileInactive": false,
                }),
                path: "inactiveTopicPolicies",
            },
            Policy {
                what: "unacknowledged messages of a consumer",
                is: &policies["max_unacked_messages_per_consumer"],
                should: json!(wanted.unacknowledged_max),
                path: "maxUnackedMessagesPerConsumer",
            },
        ];
        for policy in set {
            if !contains(policy.is, &policy.should) {
                plan.changes.push(Change {
                    object: object.clone(),
                    what: policy.what.into(),
                    is: shown(policy.is),
                    should: shown(&policy.should),
                    action: Action::Policy(policy.path, policy.should),
                });
            }
        }
        if exists {
            for (object, text) in dangers(&object, &policies) {
                plan.findings.push(Finding { severity: Severity::Error, object, text });
            }
        }
        Ok(exists)
    }

    fn retention(&self) -> Value {
        let wanted = &self.file.namespace;
        json!({
            "retentionTimeInMinutes": wanted.retention.0.as_secs().div_ceil(60),
            "retentionSizeInMB": wanted.retention_bytes_max.0 >> 20,
        })
    }

    async fn plan_topic(
        &self,
        plan: &mut Plan,
        wanted: &Wanted,
        exists: bool,
        plain: &BTreeSet<String>,
        partitioned: &BTreeSet<String>,
    ) -> Result<(), Error> {
        let name = wanted.topic.as_str();
        let object = format!("topic {name}");
        let there = exists && (plain.contains(name) || partitioned.contains(name));
        if !there {
            let action = Action::Topic { topic: name.into(), partitions: wanted.partitions };
            plan.changes.push(missing(object.clone(), "topic", action));
        } else if partitioned.contains(name) {
            let partitions = self.admin.partitions(name).await?;
            if partitions < wanted.partitions {
                plan.changes.push(Change {
                    object: object.clone(),
                    what: "partitions".into(),
                    is: partitions.to_string(),
                    should: wanted.partitions.to_string(),
                    action: Action::Grow { topic: name.into(), partitions: wanted.partitions },
                });
            } else if partitions > wanted.partitions {
                plan.findings.push(drift(
                    &object,
                    format!(
                        "has {partitions} partitions, the file says {}: Pulsar cannot take partitions away",
                        wanted.partitions
                    ),
                ));
            }
        } else if wanted.partitions > 0 {
            plan.findings.push(drift(
                &object,
                format!(
                    "has no partitions, the file says {}: such a topic would have to be made anew",
                    wanted.partitions
                ),
            ));
        }
        let found = if there { self.admin.subscriptions(name).await?.unwrap_or_default() } else { Vec::new() };
        for subscription in &wanted.subscriptions {
            if !found.contains(subscription) {
                let what = format!("subscription {subscription}");
                let action = Action::Subscription { topic: name.into(), subscription: subscription.clone() };
                plan.changes.push(missing(object.clone(), &what, action));
            }
        }
        if there {
            self.find_overrides(plan, &object, name).await?;
        }
        Ok(())
    }

    /// What somebody set on this one topic wins over the namespace.
    async fn find_overrides(&self, plan: &mut Plan, object: &str, topic: &str) -> Result<(), Error> {
        let mut policies = json!({});
        for (policy, key) in [
            ("messageTTL", "message_ttl_in_seconds"),
            ("backlogQuotaMap", "backlog_quota_map"),
            ("inactiveTopicPolicies", "inactive_topic_policies"),
        ] {
            match self.admin.applied(topic, policy).await {
                Ok(value) => policies[key] = value.unwrap_or(Value::Null),
                // A cluster without policies of topics (405, 412) has no overrides either.
                Err(Error::Refused { status: 405 | 412, .. }) => {}
                Err(error) => return Err(error),
            }
        }
        // Another retention of one topic loses no work, only what `pulsar-admin` can look back at.
        if let Ok(Some(retention)) = self.admin.applied(topic, "retention").await {
            let repaired = plan.changes.iter().any(|change| change.what == RETENTION);
            if !repaired && !contains(&retention, &self.retention()) {
                plan.findings.push(drift(
                    object,
                    format!("keeps acknowledged messages otherwise than the file says: {}", shown(&retention)),
                ));
            }
        }
        for (_, text) in dangers(object, &policies) {
            // What the namespace's own change repairs is reported there, once.
            let repaired = plan.changes.iter().any(|change| text.starts_with(&change.what));
            if !repaired {
                plan.findings.push(Finding {
                    severity: Severity::Error,
                    object: object.to_owned(),
                    text: format!("{text}; remove the policy from the topic"),
                });
            }
        }
        Ok(())
    }

    async fn act(&self, action: &Action) -> Result<(), Error> {
        match action {
            Action::Tenant => {
                let clusters = self.admin.clusters().await?;
                self.admin.create_tenant(&clusters).await
            }
            Action::Namespace => self.admin.create_namespace().await,
            Action::Policy(path, body) => self.admin.set_policy(path, body.clone()).await,
            Action::Topic { topic, partitions } => self.admin.create_topic(topic, *partitions).await,
            Action::Grow { topic, partitions } => self.admin.grow(topic, *partitions).await,
            Action::Subscription { topic, subscription } => self.admin.create_subscription(topic, subscription).await,
        }
    }
}

struct Policy<'p> {
    what: &'static str,
    is: &'p Value,
    should: Value,
    path: &'static str,
}

/// Policies that let Pulsar drop messages nobody has acknowledged. Absent ones are not listed: the plan sets them.
fn dangers(object: &str, policies: &Value) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut add = |text: String| found.push((object.to_owned(), text));
    if let Some(seconds) = policies["message_ttl_in_seconds"].as_i64().filter(|n| *n > 0) {
        add(format!("message TTL of {seconds} s: Pulsar drops work that waits longer"));
    }
    if let Some(minutes) = policies["subscription_expiration_time_minutes"].as_i64().filter(|n| *n > 0) {
        add(format!("expiry of subscriptions after {minutes} min: Pulsar drops what waits for a consumer"));
    }
    if policies["inactive_topic_policies"]["deleteWhileInactive"] == true
        && policies["inactive_topic_policies"]["inactiveTopicDeleteMode"] == "delete_when_subscriptions_caught_up"
    {
        add("deletion of inactive topics with their subscriptions: an event published in between is lost".into());
    }
    if let Some(quotas) = policies["backlog_quota_map"].as_object() {
        for (kind, quota) in quotas {
            if quota["policy"] == "consumer_backlog_eviction" {
                add(format!("backlog quota ({kind}) evicts: Pulsar drops the oldest work when it is reached"));
            }
        }
    }
    found
}

fn missing(object: String, what: &str, action: Action) -> Change {
    let should = match &action {
        Action::Topic { partitions: 0, .. } => "there, without partitions".to_owned(),
        Action::Topic { partitions, .. } => format!("there, partitions: {partitions}"),
        _ => "there".to_owned(),
    };
    Change { object, what: what.to_owned(), is: "missing".into(), should, action }
}

fn drift(object: &str, text: String) -> Finding {
    Finding { severity: Severity::Drift, object: object.to_owned(), text }
}

/// Whether `is` has everything of `should`; Pulsar adds members of its own (`limit`).
fn contains(is: &Value, should: &Value) -> bool {
    match should {
        Value::Object(members) => members.iter().all(|(key, value)| contains(&is[key], value)),
        value => is == value,
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "not set".into(),
        Value::String(text) => text.clone(),
        Value::Object(members) => {
            let members: Vec<_> = members.iter().map(|(key, value)| format!("{key}: {}", shown(value))).collect();
            members.join(", ")
        }
        value => value.to_string(),
    }
}

/// The topic of a partition (`x-partition-3` → `x`), or the name itself.
pub(super) fn base(name: &str) -> &str {
    match name.rsplit_once("-partition-") {
        Some((base, number)) if !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) => base,
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invariant_4_what_drops_work_is_an_error() {
        let bad = json!({
            "message_ttl_in_seconds": 60,
            "subscription_expiration_time_minutes": 5,
            "inactive_topic_policies": {
                "inactiveTopicDeleteMode": "delete_when_subscriptions_caught_up", "deleteWhileInactive": true,
            },
            "backlog_quota_map": { "message_age": { "policy": "consumer_backlog_eviction" } },
        });
        assert_eq!(dangers("x", &bad).len(), 4);
        let good = json!({
            "message_ttl_in_seconds": 0,
            "inactive_topic_policies": { "deleteWhileInactive": false },
            "backlog_quota_map": { "destination_storage": { "policy": HOLD } },
        });
        assert_eq!(dangers("x", &good), []);
        assert_eq!(dangers("x", &Value::Null), []);
    }

    #[test]
    fn partitions_belong_to_their_topic() {
        assert_eq!(base("a.b-partition-12"), "a.b");
        assert_eq!(base("a.b"), "a.b");
        assert_eq!(base("a-partition-x"), "a-partition-x");
        assert_eq!(base("a-partition-"), "a-partition-");
    }

    #[test]
    fn more_than_was_asked_for_is_no_difference() {
        let quota = json!({ "limit": 5, "limitSize": 5, "limitTime": -1, "policy": HOLD });
        assert!(contains(&quota, &json!({ "limitSize": 5, "policy": HOLD })));
        assert!(!contains(&quota, &json!({ "limitSize": 6 })));
        assert!(!contains(&Value::Null, &json!(0)));
    }
}
