//! Service accounts of a real OAuth2 server (npm's `oidc-provider`, see `servers/oidc.sh`).

use std::process::Command;

use serde_json::json;

use crate::support::{Appliance, http, variable};

/// Runs the server's script; its standard output.
fn oidc(arguments: &[&str]) -> String {
    let output = Command::new("tests/real/servers/oidc.sh").args(arguments).output().expect("the script");
    assert!(output.status.success(), "oidc.sh {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

#[test]
fn tokens_of_a_real_issuer_work_and_its_rotation_and_its_death_cost_nothing() {
    let (issuer, audience) = (variable("OIDC_ISSUER"), variable("OIDC_AUDIENCE"));
    let dir = tempfile::tempdir().unwrap();
    let port = variable("DEALSCALE_TEST_BRIDGE_PORT").parse().unwrap();
    let config = format!(
        "[oauth2.real]\nissuer = {issuer:?}\naudience = {audience:?}\nalgorithms = [\"RS256\"]\n\
         tenants_claim = \"tenants\"\nrights_claim = \"scope\"\n\
         [environments.production.tenants.default]\n[environments.production.tenants.acme]\n[environments.production.tenants.other]\n"
    );
    let appliance = Appliance::start_with(dir.path(), port, "", &config);
    let publish = |token: &str, tenant: &str| {
        let event = json!({"workflow": "w", "tenant_id": tenant, "payload": 1});
        let authorization = format!("Bearer {token}");
        let url = format!("{}/pulsar/publish", appliance.url);
        http(&url, &[("authorization", &authorization)], Some(&event)).unwrap()
    };
    let statuses = |token: &str| ["acme", "default", "other", "undeclared"].map(|t| publish(token, t).status);

    // The token's own claims grant acme and default, and the scope the rights.
    let token = oidc(&["token", "publish read"]);
    assert_eq!(statuses(&token), [202, 202, 403, 403]);
    assert_eq!(statuses(&oidc(&["token", "read"])), [403; 4]);
    let elsewhere = publish(&oidc(&["token", "publish", "elsewhere"]), "acme");
    assert_eq!(elsewhere.status, 401);
    assert!(elsewhere.text.contains("audience"), "{}", elsewhere.text);
    let mut altered = token.clone().into_bytes();
    let middle = altered.len() / 2;
    altered[middle] = if altered[middle] == b'A' { b'B' } else { b'A' };
    assert_eq!(publish(&String::from_utf8(altered).unwrap(), "acme").status, 401);
    assert_eq!(publish("", "acme").status, 401);

    // The issuer signs with a new key: fetched when the first token names it (fetches are ten seconds apart).
    oidc(&["rotate"]);
    let rotated = oidc(&["token", "publish"]);
    crate::support::eventually("the new key is known", std::time::Duration::from_secs(30), || {
        (publish(&rotated, "acme").status == 202).then_some(())
    });
    assert_eq!(publish(&token, "acme").status, 202);

    // The issuer is dead: keys that are known go on, also for tokens that were never seen.
    let unseen = oidc(&["token", "publish read operate"]);
    oidc(&["kill"]);
    assert_eq!(publish(&unseen, "acme").status, 202);
    assert_eq!(publish(&token, "acme").status, 202);
    oidc(&["start"]);
}
