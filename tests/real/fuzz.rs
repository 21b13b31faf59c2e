//! The running bridge against the OpenAPI document that it serves, by schemathesis (see `schemathesis.sh`).
//!
//! A fuzzer finds no execution by guessing ids. So there are some of every kind before it begins: dead letters (the server in
//! n8n's place is gone for good, 410), events that wait for their time, and one that belongs to a foreign worker.

use std::io::{Read, Write};
use std::process::Command;
use std::time::Duration;

use dealscale::broker::{Claims, KeyRing};
use dealscale::ids::BodyHash;
use serde_json::{Value, json};

use crate::support::{Appliance, eventually, http, variable};

/// Answers 410 to everything.
fn gone() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || {
                let mut stream = stream.unwrap();
                // One read is enough to answer, and closing says that nothing else is read.
                let _ = stream.read(&mut [0; 64 << 10]);
                let _ = stream.write_all(b"HTTP/1.1 410 Gone\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            });
        }
    });
    url
}

#[test]
fn schemathesis_finds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let port = variable("DEALSCALE_TEST_BRIDGE_PORT").parse().unwrap();
    // SHA-256 of "dst_fuzz" and "dst_external". No Pulsar runs for the external route: its events stop in the ledger, and
    // the references are signed here.
    let n8n = gone();
    let config = format!(
        "[accounts.fuzz]\ntoken_sha256 = [\"61ac6750df27570c30880cdbbdab47c7a7e3cca7295cc03c9adad6a8056081ab\"]\nenvironment = \"production\"\n\
         tenants = [\"*\"]\nrights = [\"publish\", \"read\", \"operate\"]\n\
         [accounts.external]\ntoken_sha256 = [\"{external}\"]\nenvironment = \"staging\"\ntenants = [\"*\"]\n\
         [environments.production.tenants.default]\n[environments.production.tenants.acme]\n\
         [environments.production.n8n]\nurl = {n8n:?}\n\
         [environments.production.delivery]\nreplay_rate = 10000\n\
         [environments.staging.tenants.default]\n[environments.staging.n8n]\nurl = {n8n:?}\n\
         [environments.staging.broker]\nkind = \"pulsar\"\nservice_url = \"pulsar://127.0.0.1:9\"\n\
         [[environments.staging.routes]]\nname = \"external\"\nclass = \"ai\"\nconsumer = \"external\"\nwhen.workflow = \"*\"\n",
        external = BodyHash::of(b"dst_external"),
    );
    let appliance = Appliance::start_with(dir.path(), port, "wait_max = \"1s\"", &config);
    let ask = |token: &str, path: &str, body: Option<&Value>| {
        http(&format!("{}{path}", appliance.url), &[("authorization", &format!("Bearer {token}"))], body).unwrap()
    };
    let publish = |token: &str, event: &Value| {
        let answer = ask(token, "/pulsar/publish", Some(event));
        assert_eq!(answer.status, 202, "{}", answer.text);
        answer.json
    };
    let id = |answer: Value| answer["execution_id"].as_str().unwrap().to_owned();

    let event = json!({"workflow": "w", "tenant_id": "default", "payload": {"n": 1}});
    let dead: Vec<String> = (0..100).map(|_| id(publish("dst_fuzz", &event))).collect();
    let mut later = event.clone();
    later["deliver_at"] = json!((jiff::Timestamp::now() + Duration::from_secs(86_400)).to_string());
    let waiting: Vec<String> = (0..100).map(|_| id(publish("dst_fuzz", &later))).collect();
    let external = publish("dst_external", &event);
    for id in &dead {
        eventually("the event is dead", Duration::from_secs(60), || {
            (ask("dst_fuzz", &format!("/executions/{id}"), None).json["state"] == "dead").then_some(())
        });
    }
    let external_id = external["execution_id"].as_str().unwrap();
    eventually("the event is in the ledger", Duration::from_secs(60), || {
        (ask("dst_external", &format!("/executions/{external_id}"), None).json["state"] == "relayed").then_some(())
    });
    let state = dir.path().join("state");
    let signing = dealscale::config::parse(&format!("state_dir = {:?}", state.display().to_string())).unwrap().signing;
    let now = jiff::Timestamp::now().as_second();
    let reference = KeyRing::open(&signing).unwrap().sign(&Claims {
        execution_id: external_id.parse().unwrap(),
        tenant_id: "default".parse().unwrap(),
        environment: "staging".parse().unwrap(),
        topic: external["topic"].as_str().unwrap().parse().unwrap(),
        payload_sha256: BodyHash::of(event["payload"].to_string().as_bytes()),
        iat: now,
        exp: now + 86_400,
    });

    let known = dir.path().join("known.toml");
    let text = format!(
        "[dictionaries]\ndead = {{ values = {dead:?} }}\nwaiting = {{ values = {waiting:?} }}\nexternal = {{ values = [{external_id:?}] }}\n\
         [[operations]]\ninclude-path = [\"/dead-letters/{{id}}\", \"/dead-letters/{{id}}/replay\", \"/executions/{{id}}/wait\"]\n\
         parameters = {{ \"path.id\" = {{ dictionary = \"dead\", probability = 0.7 }} }}\n\
         [[operations]]\ninclude-path = \"/executions/{{id}}\"\n\
         parameters = {{ \"path.id\" = {{ dictionary = \"waiting\", probability = 0.7 }} }}\n\
         [[operations]]\ninclude-path = [\"/executions/{{id}}/payload\", \"/executions/{{id}}/result\"]\n\
         parameters = {{ \"path.id\" = {{ dictionary = \"external\", probability = 0.8 }} }}\n\
         headers = {{ Authorization = \"Bearer {reference}\" }}\n"
    );
    std::fs::write(&known, text).unwrap();
    let more = std::env::var("DEALSCALE_FUZZ_ARGS").unwrap_or_default();
    let status = Command::new("tests/real/schemathesis.sh")
        .args(["run", &appliance.url, "dst_fuzz"])
        .arg(&known)
        .args(more.split_whitespace())
        .status()
        .unwrap();
    assert!(status.success(), "schemathesis found something; its report is above");
}
