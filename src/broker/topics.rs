//! Which topics an environment consumes, and whose they are.

use crate::config::EnvironmentConfig;
use crate::config::routes::ConsumerKind;
pub use crate::ids::{TENANT, tenant_in};
use crate::ids::{Tenant, Topic};

/// The topics of an environment's routes: literal names and `{tenant}` templates.
#[derive(Clone, Debug, Default)]
pub struct Topics {
    /// Those that the appliance consumes.
    pub templates: Vec<String>,
    /// Those of foreign workers (`consumer = "external"`). They are made here and never consumed: on the one subscription
    /// an appliance would take messages that only a worker can end.
    pub external: Vec<String>,
}

impl Topics {
    pub fn of(config: &EnvironmentConfig) -> Self {
        let mut topics = Self::default();
        for route in config.routes.iter().chain([&config.default_route]) {
            let list = match route.consumer {
                ConsumerKind::Appliance => &mut topics.templates,
                ConsumerKind::External => &mut topics.external,
            };
            if !list.contains(&route.topic) {
                list.push(route.topic.clone());
            }
        }
        topics
    }

    /// Every template, whoever consumes it.
    pub fn all(&self) -> impl Iterator<Item = &str> {
        self.templates.iter().chain(&self.external).map(String::as_str)
    }

    /// Whether `topic` is to be consumed here, and which tenant its name belongs to where it has one. A literal name wins
    /// over a template, a template with more fixed text over one with less.
    pub fn tenant_of(&self, topic: &Topic) -> Option<Option<Tenant>> {
        let literal = |list: &[String]| list.iter().any(|t| t == topic.as_str());
        if literal(&self.templates) {
            return Some(None);
        }
        if literal(&self.external) {
            return None;
        }
        let ours = self.templates.iter().map(|template| (true, template));
        let theirs = self.external.iter().map(|template| (false, template));
        let (_, ours, tenant) = ours
            .chain(theirs)
            .filter_map(|(ours, template)| Some((template.len(), ours, tenant_in(template, topic)?)))
            .max_by_key(|(fixed, ..)| *fixed)?;
        ours.then_some(Some(tenant))
    }

    /// Whether events of `tenant` may be found on `topic`. Exact even where two templates could give one name.
    pub fn allow(&self, topic: &Topic, tenant: &Tenant) -> bool {
        self.templates.iter().any(|template| template.replace(TENANT, tenant.as_str()) == topic.as_str())
    }

    /// The literal names, which exist whether or not a tenant has published yet.
    pub fn literal(&self) -> impl Iterator<Item = Topic> {
        self.all().filter(|t| !t.contains(TENANT)).filter_map(|t| Topic::try_new(t).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topic(text: &str) -> Topic {
        Topic::try_new(text).unwrap()
    }
    fn tenant(text: &str) -> Tenant {
        Tenant::try_new(text).unwrap()
    }
    fn topics(templates: &[&str]) -> Topics {
        Topics { templates: templates.iter().map(|t| (*t).to_owned()).collect(), ..Topics::default() }
    }

    #[test]
    fn a_topic_says_whose_it_is() {
        let topics = topics(&["w.long", "w.long.{tenant}", "w.long.vip", "{tenant}.a.{tenant}"]);
        assert_eq!(topics.tenant_of(&topic("w.long")), Some(None));
        assert_eq!(topics.tenant_of(&topic("w.long.acme")), Some(Some(tenant("acme"))));
        assert_eq!(topics.tenant_of(&topic("w.long.vip")), Some(None));
        assert_eq!(topics.tenant_of(&topic("x.a.x")), Some(Some(tenant("x"))));
        for other in ["w.short", "w.long.a.b", "w.long.a_b", "w.long.-a", "x.a.y", "dealscale.deadletter.w.long"] {
            assert_eq!(topics.tenant_of(&topic(other)), None, "{other}");
        }
        assert_eq!(topics.literal().collect::<Vec<_>>(), [topic("w.long"), topic("w.long.vip")]);
    }

    #[test]
    fn a_topic_belongs_to_the_tenants_that_publish_there() {
        let topics = topics(&["w", "w.{tenant}", "w.{tenant}-eu"]);
        assert!(topics.allow(&topic("w"), &tenant("any")));
        assert!(topics.allow(&topic("w.acme"), &tenant("acme")));
        assert!(!topics.allow(&topic("w.acme"), &tenant("other")));
        // Two templates give one name: both of its tenants publish there.
        assert!(topics.allow(&topic("w.acme-eu"), &tenant("acme")));
        assert!(topics.allow(&topic("w.acme-eu"), &tenant("acme-eu")));
        assert!(!topics.allow(&topic("w.acme-eu"), &tenant("eu")));
    }

    #[test]
    fn a_foreign_workers_topic_is_made_and_not_consumed() {
        let external = ["w.ai", "w.gpu.{tenant}", "w.long.vip"].map(str::to_owned).to_vec();
        let topics = Topics { external, ..topics(&["w.long", "w.long.{tenant}"]) };
        for theirs in ["w.ai", "w.gpu.acme", "w.long.vip"] {
            assert_eq!(topics.tenant_of(&topic(theirs)), None, "{theirs}");
        }
        assert_eq!(topics.tenant_of(&topic("w.long.acme")), Some(Some(tenant("acme"))));
        assert_eq!(topics.literal().collect::<Vec<_>>(), [topic("w.long"), topic("w.ai"), topic("w.long.vip")]);
    }
}
