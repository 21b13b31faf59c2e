use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::config;

const ROUTES: &str = r#"
    [[environments.production.routes]]
    name = "crm"
    class = "short"
    when.workflow = "crm-*"
    when.bytes_max = "1KiB"

    [[environments.production.routes]]
    name = "per-tenant"
    topic = "dealscale.workflow.long.{tenant}"
    when.tenant = "big-*"

    [[environments.production.routes]]
    name = "models"
    class = "ai"
    when.metadata.kind = "inference*"

    [[environments.production.routes]]
    name = "heavy"
    topic = "dealscale.heavy"
    when.bytes_min = "1MiB"

    [[environments.production.routes]]
    name = "jobs"
    topic = "jobs"
    when.topic = "jobs"
"#;

fn router(text: &str) -> Router {
    let config = config::parse(text).unwrap();
    Router::new(Arc::new(config.environments.into_values().next().unwrap()))
}

#[derive(Clone, Debug, Default)]
struct Asked {
    workflow: Option<&'static str>,
    topic: Option<&'static str>,
    tenant: &'static str,
    bytes: u64,
    metadata: Vec<(&'static str, &'static str)>,
}

fn decide(router: &Router, asked: &Asked) -> Result<(String, String, String), Refused> {
    let workflow = asked.workflow.map(|w| Workflow::try_new(w).unwrap());
    let topic = asked.topic.map(|t| Topic::try_new(t).unwrap());
    let metadata: BTreeMap<_, _> = asked.metadata.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
    let tenant = Tenant::try_new(asked.tenant).unwrap();
    let input = Input {
        workflow: workflow.as_ref(),
        topic: topic.as_ref(),
        tenant: &tenant,
        bytes: asked.bytes,
        metadata: &metadata,
    };
    router.decide(input).map(|d| (d.route.name.clone(), d.topic.to_string(), d.reason))
}

#[test]
fn invariant_1_the_first_route_that_matches_decides_and_says_why() {
    let router = router(ROUTES);
    let asked = |workflow, tenant, bytes| Asked { workflow: Some(workflow), tenant, bytes, ..Asked::default() };
    let cases = [
        (
            asked("crm-sync", "a", 10),
            "crm",
            "dealscale.workflow.short",
            "workflow \"crm-sync\" matches \"crm-*\", 10 bytes are at most 1KiB",
        ),
        // Too large for the first route: the next that fits.
        (
            asked("crm-sync", "big-1", 2_000),
            "per-tenant",
            "dealscale.workflow.long.big-1",
            "tenant big-1 matches \"big-*\"",
        ),
        (asked("crm-sync", "a", 2 << 20), "heavy", "dealscale.heavy", "2097152 bytes are at least 1MiB"),
        (asked("other", "a", 10), "default", "dealscale.workflow.long", "no other route matches"),
        (
            Asked { metadata: vec![("kind", "inference-7b")], ..asked("other", "a", 10) },
            "models",
            "dealscale.ai.inference",
            "metadata \"kind\" matches \"inference*\"",
        ),
    ];
    for (asked, route, topic, reason) in cases {
        let decided = decide(&router, &asked).unwrap();
        assert_eq!(decided, (route.into(), topic.into(), reason.into()), "{asked:?}");
        // Invariant 3.
        assert_eq!(decide(&router, &asked).unwrap(), decided);
    }
}

#[test]
fn invariant_1_the_default_route_takes_all_that_is_left() {
    let router = router("[environments.production.default_route]\nwhen.workflow = \"never\"");
    let asked = Asked { workflow: Some("w"), tenant: "a", ..Asked::default() };
    assert_eq!(decide(&router, &asked).unwrap().0, "default");
}

#[test]
fn invariant_2_a_named_topic_needs_a_route_to_it() {
    let router = router(ROUTES);
    let named = |topic, tenant| Asked { topic: Some(topic), tenant, ..Asked::default() };
    let (route, topic, reason) = decide(&router, &named("jobs", "a")).unwrap();
    assert_eq!((route.as_str(), topic.as_str()), ("jobs", "jobs"));
    assert_eq!(reason, "topic jobs matches \"jobs\", topic is jobs");
    assert_eq!(decide(&router, &named("dealscale.workflow.long", "a")).unwrap().0, "default");
    // Another tenant's topic is nobody else's.
    assert_eq!(decide(&router, &named("dealscale.workflow.long.big-1", "big-1")).unwrap().0, "per-tenant");
    for (topic, tenant) in
        [("dealscale.workflow.long.big-1", "big-2"), ("dealscale.workflow.long.big-1", "a"), ("x", "a")]
    {
        assert_eq!(decide(&router, &named(topic, tenant)), Err(Refused::Topic(Topic::try_new(topic).unwrap())));
    }
}

#[test]
fn a_topic_that_a_tenants_name_makes_too_long_is_refused() {
    let long = "t".repeat(190);
    let router = router(&format!(
        "[[environments.production.routes]]\nname = \"r\"\ntopic = \"{long}.{{tenant}}\"\nwhen.workflow = \"*\""
    ));
    let asked = Asked { workflow: Some("w"), tenant: "a-tenant-of-more-than-ten", ..Asked::default() };
    assert!(matches!(decide(&router, &asked), Err(Refused::Template { .. })));
}

/// A route from small parts, so that overlaps are common.
fn any_route() -> impl Strategy<Value = (String, Option<&'static str>, Option<&'static str>, Option<u64>)> {
    let topic = prop_oneof!["[ab]", Just("t.{tenant}".to_owned())];
    let pattern = || proptest::option::of(prop_oneof![Just("*"), Just("a*"), Just("*b"), Just("ab")]);
    (topic, pattern(), pattern(), proptest::option::of(0u64..4))
}

proptest! {
    /// Whatever the routes: without a named topic there is a decision, it is the first that matches, and its topic is that
    /// route's own; with a named topic nothing but that topic comes out.
    #[test]
    fn decisions_keep_the_invariants(
        routes in proptest::collection::vec(any_route(), 0..6),
        workflow in prop_oneof![Just("a"), Just("ab"), Just("bb")],
        tenant in prop_oneof![Just("a"), Just("ab"), Just("b")],
        topic in proptest::option::of(prop_oneof![Just("a"), Just("b"), Just("t.a"), Just("t.b"), Just("dealscale.workflow.long")]),
        bytes in 0u64..4,
    ) {
        let mut text = String::from("[environments.production]\n");
        for (n, (topic, workflow, tenant, bytes)) in routes.iter().enumerate() {
            text += &format!("[[environments.production.routes]]\nname = \"r{n}\"\ntopic = \"{topic}\"\n");
            for (key, value) in [("workflow", workflow), ("tenant", tenant)] {
                if let Some(value) = value {
                    text += &format!("when.{key} = \"{value}\"\n");
                }
            }
            if let Some(bytes) = bytes {
                text += &format!("when.bytes_min = \"{bytes}\"\n");
            }
        }
        let router = router(&text);
        let asked = Asked { workflow: Some(workflow), topic, tenant, bytes, ..Asked::default() };
        let fits = |n: &usize| {
            let (own, w, t, min) = &routes[*n];
            let like = |p: &Option<&str>, text| p.is_none_or(|p| config::routes::Pattern::new(p).matches(text));
            like(w, workflow) && like(t, tenant) && min.is_none_or(|min| bytes >= min)
                && topic.is_none_or(|wanted| own.replace("{tenant}", tenant) == wanted)
        };
        let first = (0..routes.len()).find(fits);
        match (decide(&router, &asked), first) {
            (Ok((route, on, reason)), Some(n)) => {
                prop_assert_eq!(route, format!("r{n}"));
                prop_assert_eq!(on, routes[n].0.replace("{tenant}", tenant));
                prop_assert!(!reason.is_empty());
            }
            (Ok((route, on, _)), None) => {
                prop_assert_eq!(route, "default");
                prop_assert_eq!(on, "dealscale.workflow.long");
            }
            (Err(refused), first) => {
                prop_assert!(first.is_none() && topic.is_some(), "{refused}");
            }
        }
    }
}
