//! What can be said of the shipped n8n templates and their guide without n8n. That they import and run is proven in
//! `tests/real/n8n.rs`.

#![allow(clippy::unwrap_used)] // all of it is tests, helpers included

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn templates() -> Vec<(PathBuf, Value)> {
    let dir = root().join("appliance/n8n/templates");
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    let read = |path: PathBuf| {
        let value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        (path, value)
    };
    let all: Vec<_> = files.into_iter().map(read).collect();
    assert!(all.len() >= 11, "only {} templates", all.len());
    all
}

fn nodes(template: &Value) -> &Vec<Value> {
    template["nodes"].as_array().unwrap()
}

#[test]
fn templates_carry_nothing_of_the_n8n_they_came_from() {
    for (path, template) in templates() {
        let keys: BTreeSet<_> = template.as_object().unwrap().keys().map(String::as_str).collect();
        // No ids, versions, pinned data or static data: the last two may hold users' data.
        assert_eq!(keys, ["connections", "name", "nodes", "settings"].into(), "{path:?}");
        for node in nodes(&template) {
            for credential in node["credentials"].as_object().into_iter().flat_map(|c| c.values()) {
                assert_eq!(credential["id"], "", "{path:?}: a credential's id means nothing elsewhere");
                assert!(credential["name"].as_str().unwrap().starts_with("dealscale "), "{path:?}");
            }
        }
    }
}

#[test]
fn templates_do_not_get_in_each_others_way() {
    let (mut names, mut paths, mut ids) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (path, template) in templates() {
        assert!(names.insert(template["name"].to_string()), "{path:?}: two templates of one name");
        for node in nodes(&template) {
            assert!(ids.insert(node["id"].to_string()), "{path:?}: two nodes of one id");
            if node["type"] == "n8n-nodes-base.webhook" {
                assert!(paths.insert(node["parameters"]["path"].to_string()), "{path:?}: two webhooks of one path");
                assert!(node["webhookId"].is_string(), "{path:?}: n8n registers no webhook without an id");
            }
        }
    }
}

#[test]
fn connections_join_nodes_that_exist() {
    for (path, template) in templates() {
        let names: BTreeSet<_> = nodes(&template).iter().map(|n| n["name"].as_str().unwrap()).collect();
        for (from, outputs) in template["connections"].as_object().unwrap() {
            assert!(names.contains(from.as_str()), "{path:?}: {from}");
            for link in outputs["main"].as_array().unwrap().iter().flat_map(|o| o.as_array().unwrap()) {
                assert!(names.contains(link["node"].as_str().unwrap()), "{path:?}: {from} → {link}");
            }
        }
    }
}

#[test]
fn every_publish_carries_an_idempotency_key_and_retries() {
    let mut seen = 0;
    for (path, template) in templates() {
        for node in nodes(&template) {
            let url = node["parameters"]["url"].as_str().unwrap_or_default();
            if !url.ends_with("/pulsar/publish") {
                continue;
            }
            seen += 1;
            assert_eq!(url, "http://127.0.0.1:8000/pulsar/publish", "{path:?}: the set-up replaces this address");
            assert_eq!(node["retryOnFail"], true, "{path:?}");
            let headers = node["parameters"]["headerParameters"]["parameters"].as_array().unwrap();
            assert!(headers.iter().any(|h| h["name"] == "Idempotency-Key"), "{path:?}");
        }
    }
    assert!(seen >= 6);
}

#[test]
fn the_work_is_marked_as_done_last() {
    let mut seen = 0;
    for (path, template) in templates() {
        if nodes(&template).iter().any(|n| n["name"] == "Mark as done") {
            seen += 1;
            assert!(
                template["connections"]["Mark as done"].is_null(),
                "{path:?}: a crash behind the mark would lose work"
            );
        }
    }
    assert_eq!(seen, 2);
}

#[test]
fn the_guide_s_configuration_is_right() {
    let guide = std::fs::read_to_string(root().join("docs/workflow-authors.md")).unwrap();
    let secret = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(secret.path(), "secret").unwrap();
    let blocks: Vec<_> = guide.split("```toml\n").skip(1).map(|b| b.split("```").next().unwrap()).collect();
    assert!(blocks.len() >= 3);
    for block in blocks {
        let text = block.replace("/etc/dealscale/orders-secret", &secret.path().display().to_string());
        let problems = dealscale::config::parse(&text).err().unwrap_or_default();
        assert!(problems.is_empty(), "{problems:#?} in\n{block}");
    }
    for (path, _) in templates() {
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(guide.contains(&format!("`{name}`")), "the guide does not know {name}");
    }
}
