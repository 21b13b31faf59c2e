//! The whole way under fire: n8n → bridge → Pulsar and PostgreSQL → n8n, 1,000 events, while everything dies in turn.
//!
//! Takes minutes, so it is asked for: `DEALSCALE_TEST_ARGS=--ignored tests/real/run.sh way`; its recorded run is in
//! docs/recorded-run.md.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::n8n::{bridge_port, config, n8n_sh, set_up};
use crate::postgres::cluster::Cluster;
use crate::support::{Appliance, http, variable};

const EVENTS: usize = 1_000;
/// n8n runs 10 to 15 webhook workflows a second, and each event is two.
const PATIENCE: Duration = Duration::from_secs(1_200);

fn pulsar_sh(verb: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/real/servers/pulsar.sh");
    let output = Command::new(script).arg(verb).output().unwrap();
    assert!(output.status.success(), "pulsar.sh {verb}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
#[ignore = "minutes; its recorded run is in docs/recorded-run.md"]
fn a_thousand_events_survive_the_death_of_everything() {
    let begin = Instant::now();
    let say = |text: String| println!("{:6.1} s  {text}", begin.elapsed().as_secs_f64());
    let state = set_up();
    let n8n = format!("http://127.0.0.1:{}", variable("N8N_PORT"));
    let postgres = Cluster::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    // One namespace for each run: the broker may hold the topics of former ones.
    let namespace = format!("way{}", std::process::id());
    let mut text = config(&n8n, state);
    text.push_str(&format!(
        "[environments.production.payloads]\nstore = \"postgres\"\nurl = {:?}\n[environments.production.broker]\nkind = \"pulsar\"\n\
         service_url = {:?}\nhttp_url = {:?}\ntenant = \"dealscale\"\nnamespace = {namespace:?}\n",
        postgres.url(),
        variable("DEALSCALE_TEST_PULSAR_URL"),
        variable("DEALSCALE_TEST_PULSAR_HTTP_URL"),
    ));
    let text = text.replacen(
        "[environments.production.default_route]\n",
        "[environments.production.default_route]\nredeliver_crashed = true\n",
        1,
    );
    let text = text.replacen(
        "[environments.production.delivery]\n",
        "[environments.production.delivery]\nclaim = \"10s\"\nsweep_after = \"20s\"\nsweep_interval = \"5s\"\n",
        1,
    );
    let appliance = Arc::new(Mutex::new(Some(Appliance::start(dir.path(), bridge_port(), &text))));
    let url = appliance.lock().unwrap().as_ref().unwrap().url.clone();
    let kill_appliance = |n: usize| {
        let mut appliance = appliance.lock().unwrap();
        appliance.take().unwrap().kill();
        *appliance = Some(Appliance::start(dir.path(), bridge_port(), &text));
        say(format!("appliance killed (-9) and started again, {n} of 3"));
    };

    // Publishing, by n8n itself: its HTTP Request node tries again while the bridge is away, with the same Idempotency-Key.
    let published: Arc<Mutex<BTreeMap<usize, String>>> = Arc::default();
    let next = Arc::new(AtomicUsize::new(0));
    let publishers: Vec<_> = (0..6)
        .map(|_| {
            let (published, next, n8n) = (published.clone(), next.clone(), n8n.clone());
            std::thread::spawn(move || {
                loop {
                    let n = next.fetch_add(1, Ordering::SeqCst);
                    if n >= EVENTS {
                        return;
                    }
                    let answer = http(
                        &format!("{n8n}/webhook/dealscale-publish"),
                        &[],
                        Some(&json!({ "workflow": "demo", "n": n })),
                    )
                    .unwrap();
                    let id = answer.json["execution_id"]
                        .as_str()
                        .unwrap_or_else(|| panic!("event {n}: {} {}", answer.status, answer.text));
                    published.lock().unwrap().insert(n, id.to_owned());
                }
            })
        })
        .collect();
    let until = |n: usize| {
        while published.lock().unwrap().len() < n {
            assert!(
                publishers.iter().any(|p| !p.is_finished()) || published.lock().unwrap().len() >= n,
                "a publisher failed"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        say(format!("{} events accepted", published.lock().unwrap().len()));
    };
    until(150);
    kill_appliance(1);
    until(300);
    pulsar_sh("kill");
    say("Pulsar killed (-9), 1 of 2".into());
    until(400);
    pulsar_sh("start");
    say("Pulsar started again".into());
    until(500);
    kill_appliance(2);
    until(600);
    postgres.kill();
    say("PostgreSQL killed (-9)".into());
    until(680);
    postgres.resume();
    say("PostgreSQL started again".into());
    until(800);
    pulsar_sh("kill");
    say("Pulsar killed (-9), 2 of 2".into());
    until(900);
    kill_appliance(3);
    until(EVENTS);
    for publisher in publishers {
        publisher.join().unwrap();
    }
    pulsar_sh("start");
    say("Pulsar started again".into());

    // The backlog runs; n8n dies in the middle of it.
    let succeeded = || -> usize {
        let mut count = 0;
        let mut cursor: Option<String> = None;
        loop {
            let mut path =
                reqwest::Url::parse(&format!("{url}/executions?tenant=default&state=succeeded&limit=500")).unwrap();
            if let Some(cursor) = &cursor {
                path.query_pairs_mut().append_pair("cursor", cursor);
            }
            let Ok(page) = http(path.as_str(), &[], None) else { return count };
            assert_eq!(page.status, 200, "{}", page.text);
            count += page.json["executions"].as_array().map_or(0, Vec::len);
            match page.json["next_cursor"].as_str() {
                Some(next) => cursor = Some(next.to_owned()),
                None => return count,
            }
        }
    };
    let before = succeeded();
    say(format!("{before} executions succeeded so far"));
    while succeeded() < (before + EVENTS) / 2 {
        assert!(begin.elapsed() < PATIENCE, "the backlog does not move");
        std::thread::sleep(Duration::from_millis(500));
    }
    n8n_sh(&["kill"]);
    say("n8n killed (-9)".into());
    std::thread::sleep(Duration::from_secs(5));
    n8n_sh(&["start"]);
    say("n8n started again".into());

    loop {
        let count = succeeded();
        if count >= EVENTS {
            break;
        }
        assert!(begin.elapsed() < PATIENCE, "{count} of {EVENTS} executions succeeded");
        std::thread::sleep(Duration::from_secs(2));
    }
    let ids = published.lock().unwrap().clone();
    let mut distinct: Vec<_> = ids.values().collect();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), EVENTS, "each event has an id of its own");
    // Repeated calls: every attempt of an event carries its execution id as webhook-id.
    let (mut calls, mut repeated) = (0, 0);
    for id in ids.values() {
        let event = http(&format!("{url}/executions/{id}?tenant=default"), &[], None).unwrap().json;
        assert_eq!(event["state"], "succeeded", "{event}");
        let answered = event["history"].as_array().unwrap().iter().filter(|a| a["status"] == 200).count();
        calls += answered;
        repeated += usize::from(answered > 1);
    }
    let database = rusqlite::Connection::open_with_flags(
        state.join("home/.n8n/database.sqlite"),
        rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY,
    )
    .unwrap();
    let workflows: Value =
        serde_json::from_str(&std::fs::read_to_string(state.join("workflows.json")).unwrap()).unwrap();
    let receive = workflows["dealscale: receive"].as_str().unwrap();
    let runs = |status: &str| -> i64 {
        let sql = "SELECT count(*) FROM execution_entity WHERE workflowId = ?1 AND status = ?2";
        database.query_row(sql, [receive, status], |row| row.get(0)).unwrap()
    };
    say(format!(
        "{EVENTS} events accepted, {EVENTS} executions succeeded; n8n's own count: {} success, {} crashed; {calls} calls answered 200, \
         {repeated} events called more than once, each with the same webhook-id; 0 lost",
        runs("success"),
        runs("crashed")
    ));
    assert!(runs("success") >= EVENTS as i64);
}
