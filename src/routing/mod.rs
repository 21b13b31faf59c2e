//! Which route an event takes, and why. Pure: configuration and event in, decision out.
//!
//! `bridge` → **`routing`** → topic, webhook, retry schedule.
//!
//! # Invariants
//! 1. The first route of `[[environments.NAME.routes]]` whose `when` matches decides; the built-in `default` matches all,
//!    whatever its own `when` says, so that there is always a decision.
//! 2. The topic is the route's template with `{tenant}` filled in; a caller who names a topic gets it only where a
//!    route's topic is that name ([`Refused::Topic`] otherwise), so nobody publishes past the declared topics.
//! 3. The same input gives the same decision and the same reason; `dealscale routes explain` runs this very code.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::config::routes::When;
use crate::config::{EnvironmentConfig, Route};
use crate::ids::{Tenant, Topic, Workflow};

/// What routes look at.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    pub workflow: Option<&'a Workflow>,
    /// A topic that the caller names instead of a workflow.
    pub topic: Option<&'a Topic>,
    pub tenant: &'a Tenant,
    pub bytes: u64,
    pub metadata: &'a BTreeMap<String, String>,
}

/// The route and why it was taken.
#[derive(Clone, Debug)]
pub struct Decision<'a> {
    pub route: &'a Route,
    pub topic: Topic,
    /// Such as `workflow "crm-sync" matches "crm-*"`.
    pub reason: String,
}

/// No route can take it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("no route leads to topic {0}; publish with a workflow, or add a route with this topic")]
    Topic(Topic),
    #[error("the topic of route {route} is not a valid name for tenant {tenant}")]
    Template { route: String, tenant: Tenant },
}

/// The routes of one environment.
#[derive(Clone, Debug)]
pub struct Router {
    config: Arc<EnvironmentConfig>,
}

impl Router {
    pub fn new(config: Arc<EnvironmentConfig>) -> Self {
        Self { config }
    }

    /// All routes in the order in which they are tried.
    pub fn routes(&self) -> impl Iterator<Item = &Route> {
        self.config.routes.iter().chain([&self.config.default_route])
    }

    /// By the name in an envelope; a removed route falls back to the default one.
    pub fn route(&self, name: &str) -> &Route {
        self.config.route(name)
    }

    pub fn decide(&self, input: Input<'_>) -> Result<Decision<'_>, Refused> {
        for route in self.routes() {
            let matched = if route.name == Route::DEFAULT { Some(Vec::new()) } else { matches(&route.when, &input) };
            let Some(mut reasons) = matched else { continue };
            let topic = topic_of(route, input.tenant)?;
            if let Some(wanted) = input.topic {
                if *wanted != topic {
                    continue;
                }
                reasons.push(format!("topic is {topic}"));
            }
            if reasons.is_empty() {
                let what =
                    if route.name == Route::DEFAULT { "no other route matches" } else { "the route has no condition" };
                reasons.push(what.to_owned());
            }
            return Ok(Decision { route, topic, reason: reasons.join(", ") });
        }
        Err(Refused::Topic(input.topic.cloned().expect("the default route refuses only a named topic")))
    }
}

fn topic_of(route: &Route, tenant: &Tenant) -> Result<Topic, Refused> {
    Topic::try_new(&route.topic.replace("{tenant}", tenant.as_str()))
        .map_err(|_| Refused::Template { route: route.name.clone(), tenant: tenant.clone() })
}

/// The reasons why `when` matches, or `None`.
fn matches(when: &When, input: &Input<'_>) -> Option<Vec<String>> {
    let mut reasons = Vec::new();
    if let Some(pattern) = &when.workflow {
        let workflow = input.workflow.filter(|w| pattern.matches(w.as_str()))?;
        reasons.push(format!("workflow {:?} matches {:?}", workflow.as_str(), pattern.as_str()));
    }
    if let Some(pattern) = &when.topic {
        let topic = input.topic.filter(|t| pattern.matches(t.as_str()))?;
        reasons.push(format!("topic {topic} matches {:?}", pattern.as_str()));
    }
    if let Some(pattern) = &when.tenant {
        pattern.matches(input.tenant.as_str()).then_some(())?;
        reasons.push(format!("tenant {} matches {:?}", input.tenant, pattern.as_str()));
    }
    if let Some(min) = when.bytes_min {
        (input.bytes >= min.0).then_some(())?;
        reasons.push(format!("{} bytes are at least {min}", input.bytes));
    }
    if let Some(max) = when.bytes_max {
        (input.bytes <= max.0).then_some(())?;
        reasons.push(format!("{} bytes are at most {max}", input.bytes));
    }
    for (key, pattern) in &when.metadata {
        input.metadata.get(key).filter(|value| pattern.matches(value))?;
        reasons.push(format!("metadata {key:?} matches {:?}", pattern.as_str()));
    }
    Some(reasons)
}

#[cfg(test)]
mod tests;
