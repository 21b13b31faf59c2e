//! `[environments.NAME]`: everything that one environment owns.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::payloads::PayloadStore;
use super::routes::{ConsumerKind, Pattern};
use super::{Broker, Delivery, N8n, Outbox, Payloads, Route, Section};
use crate::ids::{Environment, TENANT, Tenant, Topic, tenant_in};
use crate::units::Bytes;

#[derive(Clone, Debug)]
pub struct EnvironmentConfig {
    pub name: Environment,
    pub dir: PathBuf,
    pub tenants: Vec<TenantConfig>,
    pub n8n: N8n,
    pub outbox: Outbox,
    pub payloads: Payloads,
    pub broker: Broker,
    pub delivery: Delivery,
    pub routes: Vec<Route>,
    pub default_route: Route,
}

/// `[environments.NAME.tenants.PATTERN]`: who may be worked for, and how much of the appliance is theirs.
#[derive(Clone, Debug)]
pub struct TenantConfig {
    pub pattern: Pattern,
    /// Share of relay and delivery among tenants that wait.
    pub weight: u64,
    /// Waiting work in the outbox beyond this is 429.
    pub outbox_bytes_max: Bytes,
    /// Publishes per second beyond this (with a burst of the same number) are 429. 0 means no limit.
    pub publish_rate_max: u64,
}

/// Two environments never work on one folder, database or namespace: each would take the other's work for its own, or refuse it.
pub(super) fn nothing_is_shared(environments: &BTreeMap<Environment, EnvironmentConfig>, top: &mut Section<'_>) {
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    for (name, environment) in environments {
        let mut owned = vec![("outbox.dir", format!("folder {}", environment.outbox.dir.display()))];
        owned.push(match &environment.payloads.store {
            PayloadStore::Sqlite { file } => ("payloads.file", format!("file {}", file.display())),
            PayloadStore::Postgres(p) => ("payloads.schema", format!("schema {} {}", p.schema, p.url.expose())),
        });
        if let Broker::Pulsar(p) = &environment.broker {
            owned.push(("broker.namespace", format!("namespace {} {} {}", p.service_url, p.tenant, p.namespace)));
        }
        for (key, what) in owned {
            if let Some(other) = seen.insert(what, name.to_string()) {
                top.problem(&format!("environments.{name}.{key}"), format!("is also that of environment {other}"));
            }
        }
    }
}

impl EnvironmentConfig {
    pub(super) fn check(name: &str, s: &mut Section<'_>, state_dir: &Path, bare: bool) -> Option<Self> {
        let dir = PathBuf::from(s.parse("dir", state_dir.join(name).display().to_string()));
        let mut tenants: Vec<_> = s.named("tenants", |pattern, s| {
            let config = TenantConfig {
                pattern: Pattern::new(pattern),
                weight: s.count("weight", 1, 1..=1_000),
                outbox_bytes_max: s.bytes("outbox_bytes_max", Bytes::gib(4), Bytes::kib(1)..=Bytes::gib(4096)),
                publish_rate_max: s.count("publish_rate_max", 0, 0..=10_000_000),
            };
            // A pattern is a tenant's name with stars in it.
            if pattern != "*" && Tenant::try_new(&pattern.replace('*', "x")).is_err() {
                s.problem("", "a tenant (or pattern) must match [a-z0-9][a-z0-9-]{0,62}, `*` for any run");
            }
            config
        });
        if tenants.is_empty() && (bare || !s.has("tenants")) {
            // Only without a configuration file is any tenant welcome; with one, `default` is the one declared tenant.
            let pattern = Pattern::new(if bare { "*" } else { "default" });
            tenants.push(TenantConfig { pattern, weight: 1, outbox_bytes_max: Bytes::gib(4), publish_rate_max: 0 });
        }
        let webhook = s.parse("webhook", Route::DEFAULT_WEBHOOK.to_owned());
        if !webhook.starts_with('/') && !super::n8n::is_http_url(&webhook) {
            s.problem("webhook", "expected a path such as \"/webhook/orders\" or a whole URL");
        }
        let routes = s.tables("routes", |_, s| Route::check(s, None, &webhook));
        for (n, route) in routes.iter().enumerate() {
            if routes[..n].iter().any(|r| r.name == route.name) {
                s.problem(&format!("routes[{n}].name"), "is used twice");
            }
        }
        let default_route = s.section("default_route", |s| Route::check(s, Some(Route::DEFAULT), &webhook));
        let n8n = s.section("n8n", N8n::check);
        let outbox = s.section("outbox", |s| Outbox::check(s, &dir));
        let payloads = s.section("payloads", |s| Payloads::check(s, name, &dir));
        let broker = s.section("broker", |s| Broker::check(s, name));
        let delivery = s.section("delivery", Delivery::check);
        let name = Environment::from_str(name).ok()?;
        if matches!(broker, Broker::Local { .. })
            && let Some(route) = routes.iter().chain([&default_route]).find(|r| r.consumer == ConsumerKind::External)
        {
            let at = format!("routes.{}.consumer", route.name);
            s.problem(
                &at,
                "an external consumer takes references from Pulsar: set [environments.NAME.broker] kind = \"pulsar\"",
            );
        }
        let all = || routes.iter().chain([&default_route]);
        for theirs in all().filter(|r| r.consumer == ConsumerKind::External) {
            // One topic has one subscription: each consumer would take what only the other one can end.
            if let Some(ours) =
                all().find(|r| r.consumer == ConsumerKind::Appliance && overlap(&r.topic, &theirs.topic))
            {
                s.problem(
                    &format!("routes.{}.topic", theirs.name),
                    format!(
                        "an external consumer needs a topic of its own, and route {} of the appliance leads to {} too: set \
                         topic of one of them",
                        ours.name, theirs.topic
                    ),
                );
            }
        }
        Some(Self { name, dir, tenants, n8n, outbox, payloads, broker, delivery, routes, default_route })
    }

    /// The settings of a declared tenant: an exact name wins over a pattern, a longer pattern over a shorter one.
    pub fn tenant(&self, tenant: &Tenant) -> Option<&TenantConfig> {
        self.tenants
            .iter()
            .filter(|t| t.pattern.matches(tenant.as_str()))
            .max_by_key(|t| (t.pattern.as_str() == tenant.as_str(), t.pattern.as_str().len()))
    }

    /// A route by the name that an envelope carries. A route that was removed from the configuration falls back to the
    /// default route, so that accepted work still arrives.
    pub fn route(&self, name: &str) -> &Route {
        self.routes.iter().find(|r| r.name == name).unwrap_or(&self.default_route)
    }
}

/// Whether two topic templates can give one name.
fn overlap(one: &str, other: &str) -> bool {
    let gives = |template: &str, name: &str| {
        template == name || Topic::try_new(name).is_ok_and(|topic| tenant_in(template, &topic).is_some())
    };
    one == other || gives(one, &other.replace(TENANT, "t")) || gives(other, &one.replace(TENANT, "t"))
}
