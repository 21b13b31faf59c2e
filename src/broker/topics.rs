//! Which topics an environment consumes, and whose they are.

use crate::ids::{Tenant, Topic};

/// What stands for the tenant's name in a topic template.
pub const TENANT: &str = "{tenant}";

/// The topics that this environment consumes: literal names and `{tenant}` templates of its routes.
#[derive(Clone, Debug, Default)]
pub struct Topics {
    pub templates: Vec<String>,
}

impl Topics {
    /// Whether `topic` is one of them, and which tenant its name belongs to where it has one. A literal name wins over a
    /// template, a template with more fixed text over one with less.
    pub fn tenant_of(&self, topic: &Topic) -> Option<Option<Tenant>> {
        if self.templates.iter().any(|t| t == topic.as_str()) {
            return Some(None);
        }
        self.templates
            .iter()
            .filter_map(|template| Some((template.len(), tenant_in(template, topic)?)))
            .max_by_key(|(fixed, _)| *fixed)
            .map(|(_, tenant)| Some(tenant))
    }

    /// Whether events of `tenant` may be found on `topic`. Exact even where two templates could give one name.
    pub fn allow(&self, topic: &Topic, tenant: &Tenant) -> bool {
        self.templates.iter().any(|template| template.replace(TENANT, tenant.as_str()) == topic.as_str())
    }

    /// The literal names, which exist whether or not a tenant has published yet.
    pub fn literal(&self) -> impl Iterator<Item = Topic> {
        self.templates.iter().filter(|t| !t.contains(TENANT)).filter_map(|t| Topic::try_new(t).ok())
    }
}

/// The tenant that makes `topic` of `template`.
pub fn tenant_in(template: &str, topic: &Topic) -> Option<Tenant> {
    let (prefix, rest) = template.split_once(TENANT)?;
    let tail = topic.as_str().strip_prefix(prefix)?;
    // With one placeholder the suffix is literal. With several, the first one ends where the text up to the next begins.
    let suffix = rest.split(TENANT).next().unwrap_or_default();
    let ends: Vec<usize> = if rest.contains(TENANT) {
        tail.match_indices(suffix).map(|(at, _)| at).collect()
    } else {
        tail.len().checked_sub(suffix.len()).into_iter().collect()
    };
    ends.into_iter()
        .filter_map(|end| Tenant::try_new(tail.get(..end)?).ok())
        .find(|tenant| template.replace(TENANT, tenant.as_str()) == topic.as_str())
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
        Topics { templates: templates.iter().map(|t| (*t).to_owned()).collect() }
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
}
