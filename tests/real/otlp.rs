//! Spans by OTLP, against a real collector (rotel, which prints what it takes).

use std::time::Duration;

use serde_json::json;

use crate::support::{Appliance, eventually, http, variable};

const SOON: Duration = Duration::from_secs(30);

/// A span as the collector prints it.
#[derive(Debug)]
struct Span {
    trace: String,
    parent: String,
    id: String,
    name: String,
    text: String,
}

/// All spans of one trace that the collector took so far.
fn spans(trace: &str) -> Vec<Span> {
    let log = std::fs::read_to_string(variable("OTLP_LOG")).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|l| l.trim_start().starts_with(name)).unwrap_or_default();
        line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
    };
    let all = log.split("\nSpan #").skip(1).map(|text| Span {
        trace: field(text, "Trace ID"),
        parent: field(text, "Parent ID"),
        id: field(text, "ID  "),
        name: field(text, "Name"),
        text: text.to_owned(),
    });
    all.filter(|s| s.trace == trace).collect()
}

fn server(verb: &str) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/real/servers/otlp.sh");
    assert!(std::process::Command::new(script).arg(verb).status().unwrap().success(), "{script} {verb}");
}

fn publish(appliance: &Appliance, trace: &str, parent: &str, flags: &str) -> String {
    let body = json!({ "workflow": "w", "tenant_id": "default", "payload": 1 });
    let header = format!("00-{trace}-{parent}-{flags}");
    let answer = http(&format!("{}/pulsar/publish", appliance.url), &[("traceparent", &header)], Some(&body)).unwrap();
    assert_eq!(answer.status, 202, "{}", answer.text);
    answer.json["execution_id"].as_str().unwrap().to_owned()
}

#[test]
fn one_trace_from_the_caller_to_n8n_and_a_dead_collector_holds_up_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let receiver = runtime.block_on(crate::shared::receiver::Receiver::start());
    let config = format!(
        "[trace]\notlp_endpoint = {:?}\n[environments.production]\nwebhook = {:?}\n",
        variable("OTLP_ENDPOINT"),
        receiver.url("/webhook/x")
    );
    let appliance = Appliance::start(dir.path(), 28_020, &config);
    let trace = |n: u128| format!("{:032x}", (u128::from(std::process::id()) << 64) + n);
    let (first, unsampled, lost, last) = (trace(1), trace(2), trace(3), trace(4));

    let id = publish(&appliance, &first, "b7ad6b7169203331", "01");
    appliance.wait(&id, SOON);
    let seen = eventually("both spans of the trace", SOON, || Some(spans(&first)).filter(|s| s.len() >= 2));
    let span = |name: &str| seen.iter().find(|s| s.name == name).unwrap_or_else(|| panic!("no {name} in {seen:#?}"));
    let (publishing, delivering) = (span("publish"), span("deliver"));
    assert_eq!(publishing.parent, "b7ad6b7169203331");
    assert_eq!(delivering.parent, publishing.id);
    assert!(publishing.text.contains(&id) && delivering.text.contains(&id), "{seen:#?}");
    // What n8n got is the very span that the collector knows.
    let called = runtime.block_on(receiver.wait_for(1, SOON));
    assert_eq!(called[0].header("traceparent"), format!("00-{first}-{}-01", delivering.id));

    // A caller's decision not to sample is kept, and handed on.
    let id = publish(&appliance, &unsampled, "b7ad6b7169203331", "00");
    appliance.wait(&id, SOON);
    let called = runtime.block_on(receiver.wait_for(2, SOON));
    assert!(called[1].header("traceparent").starts_with(&format!("00-{unsampled}-")));
    assert!(called[1].header("traceparent").ends_with("-00"));

    // Work goes on without the collector; what cannot be sent is counted.
    server("kill");
    let id = publish(&appliance, &lost, "b7ad6b7169203331", "01");
    appliance.wait(&id, SOON);
    let metrics = || http("http://127.0.0.1:28021/metrics", &[], None).unwrap().text;
    eventually("dropped spans are counted", SOON, || {
        let text = metrics();
        let line = text.lines().find(|l| l.starts_with("dealscale_trace_spans_dropped_total "))?.to_owned();
        line.rsplit_once(' ')?.1.parse::<u64>().ok().filter(|n| *n > 0)
    });
    server("start");
    let id = publish(&appliance, &last, "b7ad6b7169203331", "01");
    appliance.wait(&id, SOON);
    eventually("spans again", SOON, || Some(spans(&last)).filter(|s| s.len() >= 2));
    assert!(spans(&unsampled).is_empty());
}
