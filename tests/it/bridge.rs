//! The bridge over HTTP: what it answers, to whom, and when.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use base64::Engine as _;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::appliance::Appliance;
use crate::support::receiver::{Receiver, Reply};

const SOON: Duration = Duration::from_secs(20);

/// Two accounts (`one`: tenant a, no operating; `all`: everything) and nobody in n8n's place.
fn accounts() -> String {
    // SHA-256 of "dst_one" and "dst_all".
    let one = "c0f692b49789eadfbab3d2c51dedc0876de01d1ccaa0d091e85d08e456066de0";
    let all = "6411efab0655a0db13c53fb314c527b94a72dda2637b09378b95b97b9c871523";
    format!(
        "[bridge]\nbody_bytes_max = \"64KiB\"\nbatch_items_max = 3\nwait_max = \"5s\"\n\
         [accounts.one]\ntoken_sha256 = [\"{one}\"]\ntenants = [\"a\"]\nrights = [\"publish\", \"read\"]\n\
         [accounts.all]\ntoken_sha256 = [\"{all}\"]\ntenants = [\"*\"]\nrights = [\"publish\", \"read\", \"operate\"]\n\
         [environments.production.tenants.a]\n[environments.production.tenants.b]\npublish_rate_max = 2\n\
         [environments.production.n8n]\nurl = \"http://127.0.0.1:9\"\n"
    )
}

async fn send(request: reqwest::RequestBuilder) -> (u16, reqwest::header::HeaderMap, Value) {
    let answer = request.send().await.expect("the bridge answers");
    let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
    let body = answer.bytes().await.expect("a body");
    (status, headers, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

fn event(tenant: &str) -> Value {
    json!({"workflow": "w", "tenant_id": tenant, "payload": {"n": 1}})
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_is_a_problem_document_with_its_status() {
    let dir = tempfile::tempdir().unwrap();
    let appliance = Appliance::start(dir.path(), &accounts()).await.with_token("dst_all");
    let post = |body: Value| appliance.request(Method::POST, "/pulsar/publish").json(&body);
    let text = |kind: &str, body: String| {
        appliance.request(Method::POST, "/pulsar/publish").header("content-type", kind).body(body)
    };
    let with = |name: &str, value: Value| {
        let mut event = event("a");
        event[name] = value;
        post(event)
    };
    let big = format!(r#"{{"workflow":"w","tenant_id":"a","payload":"{}"}}"#, "x".repeat(70_000));
    let plain = reqwest::Client::builder().no_proxy().build().unwrap();
    let bridge = format!("http://{}", appliance.bridge);
    let cases = [
        (text("application/json", "{".into()), 400, "malformed"),
        (with("colour", json!(1)), 400, "malformed"),
        (with("execution_id", json!("4711")), 400, "malformed"),
        (with("topic", json!("nowhere")), 400, "malformed"),
        (post(event("a")).header("idempotency-key", "\u{e4}"), 400, "malformed"),
        (plain.post(format!("{bridge}/pulsar/publish")).json(&event("a")), 401, "unauthorized"),
        (plain.get(format!("{bridge}/executions")).bearer_auth("wrong"), 401, "unauthorized"),
        (post(event("undeclared")), 403, "forbidden"),
        (appliance.request(Method::GET, "/nowhere"), 404, "not-found"),
        (appliance.request(Method::GET, "/executions/no-uuid"), 404, "not-found"),
        (appliance.request(Method::PUT, "/pulsar/publish"), 405, "method-not-allowed"),
        (text("application/json", big.clone()), 413, "too-large"),
        (text("text/plain", event("a").to_string()), 415, "unsupported-media-type"),
        (text("application/json", "{}".into()).header("content-encoding", "gzip"), 415, "unsupported-media-type"),
        (appliance.request(Method::GET, "/executions?color=x"), 400, "malformed"),
        (appliance.request(Method::POST, "/dead-letters/replay").json(&json!([null])), 400, "malformed"),
    ];
    for (request, expected, word) in cases {
        let (status, headers, body) = send(request).await;
        assert_eq!((status, &body["type"]), (expected, &json!(format!("urn:dealscale:problem:{word}"))), "{body}");
        assert_eq!(headers["content-type"], "application/problem+json");
        assert_eq!(body["status"], expected);
        assert!(body["instance"].as_str().unwrap().starts_with('/'), "{body}");
    }
    // The same limit where the length is not announced.
    let chunks = futures_util::stream::iter(
        big.into_bytes().chunks(9_999).map(|c| Ok::<_, std::io::Error>(c.to_vec())).collect::<Vec<_>>(),
    );
    let streamed = appliance
        .request(Method::POST, "/pulsar/publish")
        .header("content-type", "application/json")
        .body(reqwest::Body::wrap_stream(chunks));
    assert_eq!(send(streamed).await.0, 413);
    // The tenant's rate: two at once, the third waits.
    let statuses = [send(post(event("b"))).await, send(post(event("b"))).await, send(post(event("b"))).await];
    assert_eq!(statuses.each_ref().map(|s| s.0), [202, 202, 429]);
    assert_eq!(statuses[2].1["retry-after"], "1");
    let (status, headers, _) = send(appliance.request(Method::OPTIONS, "/executions/x")).await;
    assert_eq!(status, 204);
    assert!(headers["allow"].to_str().unwrap().contains("DELETE"), "{headers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_tenants_event_answers_exactly_like_an_unknown_one() {
    let dir = tempfile::tempdir().unwrap();
    let appliance = Appliance::start(dir.path(), &accounts()).await.with_token("dst_all");
    let (status, body) = appliance.post("/pulsar/publish", event("b")).await;
    assert_eq!(status, 202, "{body}");
    let id = body["execution_id"].as_str().unwrap().to_owned();
    let unknown = "0190b4a4-0000-7000-8000-000000000000";
    assert_eq!(appliance.get(&format!("/executions/{id}?tenant=b")).await.0, 200);
    assert_eq!(appliance.get(&format!("/executions/{id}")).await.0, 200);
    let one = appliance.with_token("dst_one");
    for (method, path) in [
        (Method::GET, "/executions/ID"),
        (Method::GET, "/executions/ID?tenant=b"),
        (Method::GET, "/executions/ID/wait?timeout=1"),
        (Method::DELETE, "/executions/ID"),
        (Method::DELETE, "/executions/ID?tenant=b"),
        (Method::GET, "/dead-letters/ID?tenant=b"),
    ] {
        let ask = |id: &str| send(one.request(method.clone(), &path.replace("ID", id)));
        let ((a, _, mut theirs), (b, _, mut nobodys)) = (ask(&id).await, ask(unknown).await);
        for body in [&mut theirs, &mut nobodys] {
            body["instance"].take();
        }
        assert_eq!((a, theirs), (b, nobodys), "{method} {path}");
        assert_eq!(a, 404, "{method} {path}");
    }
    // A tenant that exists and one that does not: the same.
    let (a, theirs) = one.post("/pulsar/publish", event("b")).await;
    let (b, nobodys) = one.post("/pulsar/publish", event("undeclared")).await;
    assert_eq!((a, &theirs), (403, &nobodys));
    assert_eq!(b, 403);
    let (status, page) = one.get("/executions").await;
    assert_eq!((status, &page["executions"]), (200, &json!([])));
    assert_eq!(one.post("/dead-letters/replay", json!({"dry_run": true})).await.0, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_is_one_event_however_often_it_comes() {
    let dir = tempfile::tempdir().unwrap();
    let appliance = Appliance::start(dir.path(), &accounts()).await.with_token("dst_all");
    let keyed =
        |event: Value| appliance.request(Method::POST, "/pulsar/publish").header("idempotency-key", "k").json(&event);
    let requests = (0..20).map(|_| send(keyed(event("a"))));
    let answers = futures_util::future::join_all(requests).await;
    let ids: BTreeSet<_> = answers.iter().map(|(_, _, body)| body["execution_id"].to_string()).collect();
    assert!(answers.iter().all(|(status, ..)| *status == 202), "{answers:?}");
    assert_eq!(ids.len(), 1, "{ids:?}");
    assert_eq!(answers.iter().filter(|(_, _, body)| body["duplicate"] == false).count(), 1);
    // What a retry computes anew is no other request …
    let mut later = event("a");
    later["priority"] = json!(1);
    assert_eq!(send(keyed(later)).await.2["duplicate"], true);
    // … another payload, workflow or ordering key is.
    for (name, value) in [("payload", json!(2)), ("workflow", json!("other")), ("ordering_key", json!("o"))] {
        let mut other = event("a");
        other[name] = value;
        let (status, _, body) = send(keyed(other)).await;
        assert_eq!(status, 422, "{name}: {body}");
    }
    // An id of the caller's own with another body: a conflict while the first one is in the outbox, a poisoned record when
    // it is found later. Never a second event.
    let mut named = event("a");
    let id = "0190b4a4-0000-7000-8000-000000000001";
    named["execution_id"] = json!(id);
    for _ in 0..2 {
        let (status, body) = appliance.post("/pulsar/publish", named.clone()).await;
        assert_eq!((status, &body["execution_id"]), (202, &json!(id)), "{body}");
    }
    named["payload"] = json!("other");
    let (status, body) = appliance.post("/pulsar/publish", named).await;
    assert!(status == 409 || status == 202, "{status} {body}");
    if status == 202 {
        let end = Instant::now() + SOON;
        loop {
            let (_, page) = appliance.get("/dead-letters?tenant=a&error_class=poisoned").await;
            if page["dead_letters"][0]["execution_id"] == id {
                break;
            }
            assert!(Instant::now() < end, "{page}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_answers_item_by_item() {
    let dir = tempfile::tempdir().unwrap();
    let appliance = Appliance::start(dir.path(), &accounts()).await.with_token("dst_all");
    let (status, body) = appliance.post("/pulsar/publish/batch", json!([event("a"), event("a")])).await;
    assert_eq!((status, &body["accepted"], &body["refused"]), (202, &json!(2), &json!(0)), "{body}");
    let lines = format!("{}\nnot json\n{}\n", event("a"), event("undeclared"));
    let request =
        appliance.request(Method::POST, "/pulsar/publish/batch").header("content-type", "application/x-ndjson");
    let (status, _, body) = send(request.body(lines)).await;
    assert_eq!(status, 207, "{body}");
    let statuses: Vec<_> = body["results"].as_array().unwrap().iter().map(|r| r["status"].clone()).collect();
    assert_eq!(statuses, [202, 400, 403]);
    assert_eq!(body["results"][0]["accepted"]["durability"], "disk");
    let four = json!([event("a"), event("a"), event("a"), event("a")]);
    assert_eq!(appliance.post("/pulsar/publish/batch", four).await.0, 413);
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_ends_with_the_event_and_cancelling_comes_before_it() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    receiver.default_reply(Reply::status(200).after(Duration::from_millis(600)));
    let config = format!(
        "[bridge]\ntoken_required = false\nwait_max = \"10s\"\n[environments.production]\nwebhook = {:?}\n",
        receiver.url("/webhook/x")
    );
    let appliance = Appliance::start(dir.path(), &config).await;
    let id = appliance.publish("w", json!(1)).await;
    let begun = Instant::now();
    let (status, body) = appliance.get(&format!("/executions/{id}/wait?tenant=t1&timeout=10s")).await;
    assert_eq!((status, &body["state"], &body["final"]), (200, &json!("delivered"), &json!(true)), "{body}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(body["history"].as_array().unwrap().len(), 1, "{body}");

    let far = (jiff::Timestamp::now() + Duration::from_secs(3600)).to_string();
    let delayed = json!({"workflow": "w", "tenant_id": "t1", "payload": 1, "deliver_at": far});
    let (_, body) = appliance.post("/pulsar/publish", delayed).await;
    let id = body["execution_id"].as_str().unwrap().to_owned();
    let (status, body) = appliance.get(&format!("/executions/{id}/wait?tenant=t1&timeout=300ms")).await;
    assert_eq!((status, &body["final"]), (202, &json!(false)), "{body}");
    for _ in 0..2 {
        let (status, body) = appliance.delete(&format!("/executions/{id}?tenant=t1")).await;
        assert_eq!((status, &body["state"]), (200, &json!("cancelled")), "{body}");
    }
    assert_eq!(appliance.get(&format!("/executions/{id}/wait?tenant=t1&timeout=11s")).await.0, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_route_answers_with_n8ns_own_answer_and_calls_once() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let config = format!(
        "[bridge]\ntoken_required = false\n[environments.production.n8n]\nurl = {:?}\n\
         [environments.production.delivery]\nwebhook_secret = \"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\"\n\
         [[environments.production.routes]]\nname = \"short\"\nclass = \"short\"\nwhen.workflow = \"s\"\nwebhook = \"/webhook/s\"\ntimeout = \"1s\"\n\
         [[environments.production.routes]]\nname = \"fallback\"\nclass = \"short\"\nwhen.workflow = \"f\"\nfallback = \"queue\"\nwebhook = \"http://127.0.0.1:9/f\"\n\
         [[environments.production.routes]]\nname = \"refuse\"\nclass = \"short\"\nwhen.workflow = \"r\"\nwebhook = \"http://127.0.0.1:9/r\"\n",
        receiver.url("")
    );
    let appliance = Appliance::start(dir.path(), &config).await;
    let call = |workflow: &str| {
        let event = json!({"workflow": workflow, "tenant_id": "t1", "payload": {"q": 1}});
        appliance.request(Method::POST, "/pulsar/publish").json(&event)
    };
    receiver.script([Reply::status(418).header("x-own", "yes").body(r#"{"tea":true}"#)]);
    let (status, headers, body) = send(call("s").header("idempotency-key", "once")).await;
    assert_eq!((status, &headers["x-own"], &body["tea"]), (418, &"yes".parse().unwrap(), &json!(true)));
    let id = headers["x-dealscale-execution-id"].to_str().unwrap().to_owned();
    let event = appliance.wait_state(&id, &["failed"], SOON).await;
    assert_eq!(event["history"][0]["status"], 418, "{event}");
    let seen = &receiver.seen()[0];
    assert_eq!(seen.header("webhook-id"), id);
    let key = base64::engine::general_purpose::STANDARD.decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
    let signed = [format!("{id}.{}.", seen.header("webhook-timestamp")).as_bytes(), &seen.body].concat();
    let tag = aws_lc_rs::hmac::sign(&aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &key), &signed);
    let expected = format!("v1,{}", base64::engine::general_purpose::STANDARD.encode(tag));
    assert_eq!(seen.header("webhook-signature"), expected);
    // The same call again does not reach n8n.
    assert_eq!(send(call("s").header("idempotency-key", "once")).await.0, 409);
    assert_eq!(receiver.seen().len(), 1);

    receiver.script([Reply::status(200).after(Duration::from_secs(5))]);
    let (status, _, body) = send(call("s")).await;
    assert_eq!(status, 504, "{body}");
    assert_eq!(receiver.seen().len(), 2);

    let (status, headers, _) = send(call("r")).await;
    assert_eq!(status, 503);
    assert!(headers.contains_key("retry-after"));
    let (status, _, body) = send(call("f")).await;
    assert_eq!((status, &body["topic"]), (202, &json!("dealscale.workflow.short")), "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_headers_are_cut_and_a_stop_ends_long_polls_without_an_error() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let dir = tempfile::tempdir().unwrap();
    let config = "[bridge]\ntoken_required = false\nheader_timeout = \"500ms\"\nbody_timeout = \"500ms\"\n[environments.production.n8n]\nurl = \"http://127.0.0.1:9\"\n";
    let mut appliance = Appliance::start(dir.path(), config).await;
    let mut drip = tokio::net::TcpStream::connect(appliance.bridge).await.unwrap();
    drip.write_all(b"POST /pulsar/publish HTTP/1.1\r\nHost: x\r\n").await.unwrap();
    let mut rest = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(5), drip.read_to_end(&mut rest)).await;
    assert!(read.is_ok(), "the connection with half a header is still open");
    let mut half = tokio::net::TcpStream::connect(appliance.bridge).await.unwrap();
    half.write_all(
        b"POST /pulsar/publish HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
    )
    .await
    .unwrap();
    let mut rest = Vec::new();
    tokio::time::timeout(Duration::from_secs(5), half.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert!(rest.starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&rest));

    let id = appliance.publish("w", json!(1)).await;
    let poll = send(appliance.request(Method::GET, &format!("/executions/{id}/wait?tenant=t1&timeout=30s")));
    let poll = tokio::task::JoinSet::from_iter([poll]);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let begun = Instant::now();
    assert!(appliance.stop().await, "{}", appliance.log());
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    let polled = poll.join_all().await;
    assert_eq!(polled[0].0, 202, "{:?}", polled[0]);
}
