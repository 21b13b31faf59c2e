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

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_counted_replayed_and_discarded_within_a_tenant() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    receiver.default_reply(Reply::status(410));
    let config = accounts().replace("url = \"http://127.0.0.1:9\"\n", &format!("url = {:?}\n", receiver.url("")))
        + "[environments.production.default_route]\nwebhook = \"/webhook/x\"\n";
    let config = config.replace("publish_rate_max = 2\n", "");
    let appliance = Appliance::start(dir.path(), &config).await.with_token("dst_all");
    let before = jiff::Timestamp::now().to_string();
    let mut ids = Vec::new();
    for (tenant, workflow) in [("a", "x"), ("a", "x"), ("a", "\u{d5}"), ("b", "x")] {
        let event = json!({"workflow": workflow, "tenant_id": tenant, "payload": 1});
        let (status, body) = appliance.post("/pulsar/publish", event).await;
        assert_eq!(status, 202, "{body}");
        ids.push((body["execution_id"].as_str().unwrap().to_owned(), tenant));
    }
    let state = async |n: usize, wanted: &str| {
        let (id, tenant) = &ids[n];
        let end = Instant::now() + SOON;
        loop {
            let (_, event) = appliance.get(&format!("/executions/{id}?tenant={tenant}")).await;
            if event["state"] == wanted {
                return event;
            }
            assert!(Instant::now() < end, "{event}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    for n in 0..4 {
        assert_eq!(state(n, "dead").await["history"][0]["status"], 410);
    }
    let after = jiff::Timestamp::now().to_string();

    // Every filter of a mass replay, as a dry run; what is filled with null does not filter.
    let class = state(0, "dead").await["error_class"].as_str().unwrap().to_owned();
    for (filter, count) in [
        (json!({}), 4),
        (json!({"tenant": null, "workflow": null, "error_class": null, "since": null, "until": null}), 4),
        (json!({"tenant": "a"}), 3),
        (json!({"tenant": "a", "workflow": "x"}), 2),
        (json!({"workflow": "\u{d5}"}), 1),
        (json!({"workflow": "nobody's"}), 0),
        (json!({"error_class": class}), 4),
        (json!({"error_class": "timeout"}), 0),
        (json!({"since": before, "until": after}), 4),
        (json!({"until": before}), 0),
        (json!({"since": after}), 0),
        (json!({"since": "0000-01-01T00:00:00Z", "until": "9999-12-31T23:59:59Z"}), 4),
    ] {
        let mut dry = filter.clone();
        dry["dry_run"] = json!(true);
        let (status, body) = appliance.post("/dead-letters/replay", dry).await;
        assert_eq!((status, &body["count"]), (200, &json!(count)), "{filter} {body}");
        assert!(body["rate"].as_u64().unwrap() > 0);
    }
    // What the document refuses, the code refuses.
    for bad in [
        json!({"workflow": ""}),
        json!({"workflow": "a\u{7f}"}),
        json!({"workflow": "x".repeat(201)}),
        json!({"tenant": "A"}),
        json!({"error_class": ""}),
        json!({"error_class": "a\u{0}"}),
        json!({"since": "2026-11-24"}),
        json!({"until": "2026-11-24T12:00:00Z[UTC]"}),
        json!({"since": 0}),
        json!({"dry_run": null}),
        json!({"dry_run": "true"}),
        json!({"dryrun": true}),
    ] {
        let (status, body) = appliance.post("/dead-letters/replay", bad.clone()).await;
        assert_eq!(status, 400, "{bad} {body}");
    }
    assert_eq!(receiver.seen().len(), 4, "dry runs and refusals call nobody");

    // Reading is not operating, and a tenant is not another one.
    let (_, page) = appliance.get("/dead-letters?limit=500").await;
    assert_eq!(page["dead_letters"].as_array().unwrap().len(), 4, "{page}");
    let (status, page) = appliance.get("/dead-letters?error_class=%00").await;
    assert_eq!(status, 400, "{page}");

    // One by one …
    receiver.default_reply(Reply::status(200));
    let (id, _) = &ids[3];
    let (status, body) = appliance.post(&format!("/dead-letters/{id}/replay?tenant=a"), Value::Null).await;
    assert_eq!(status, 404, "{body}");
    let (status, body) = appliance.post(&format!("/dead-letters/{id}/replay?tenant=b"), Value::Null).await;
    assert_eq!((status, &body["state"]), (202, &json!("relayed")), "{body}");
    let event = state(3, "delivered").await;
    assert_eq!((&event["replays"], &event["attempts"]), (&json!(1), &json!(1)), "{event}");
    let (status, _) = appliance.post(&format!("/dead-letters/{id}/replay?tenant=b"), Value::Null).await;
    assert_eq!(status, 404, "it is no dead letter any more");
    // … by a filter …
    let request =
        appliance.request(Method::POST, "/dead-letters/replay").json(&json!({"tenant": "a", "workflow": "x"}));
    let (status, headers, job) = send(request).await;
    assert_eq!((status, &job["count"]), (202, &json!(2)), "{job}");
    let place = headers["location"].to_str().unwrap();
    let end = Instant::now() + SOON;
    let job = loop {
        let (status, job) = appliance.get(place).await;
        assert_eq!(status, 200, "{job}");
        if job["state"] != "running" {
            break job;
        }
        assert!(Instant::now() < end, "{job}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!((&job["state"], &job["replayed"], &job["skipped"]), (&json!("done"), &json!(2), &json!(0)), "{job}");
    state(0, "delivered").await;
    state(1, "delivered").await;
    assert_eq!(state(2, "dead").await["replays"], 0, "the filter did not fit");
    // … or not at all.
    let (id, _) = &ids[2];
    let (status, body) = appliance.delete(&format!("/dead-letters/{id}?tenant=a")).await;
    assert_eq!((status, &body["state"]), (200, &json!("cancelled")), "{body}");
    state(2, "cancelled").await;
    assert_eq!(appliance.delete(&format!("/dead-letters/{id}?tenant=a")).await.0, 404);
    let seen: Vec<String> = receiver.seen().iter().map(|s| s.header("webhook-id").to_owned()).collect();
    assert_eq!(seen.iter().filter(|s| **s == seen[0]).count(), 2, "a replay keeps its webhook-id: {seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_is_found_without_its_tenant_where_a_pattern_admits_many() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let config = format!(
        "[bridge]\ntoken_required = false\n[environments.production.n8n]\nurl = {:?}\n\
         [environments.production.default_route]\nwebhook = \"/webhook/x\"\n",
        receiver.url("")
    );
    let appliance = Appliance::start(dir.path(), &config).await;
    let id = appliance.publish("w", json!(1)).await;
    appliance.wait_state(&id, &["delivered"], SOON).await;
    let (status, event) = appliance.get(&format!("/executions/{id}")).await;
    assert_eq!((status, &event["tenant_id"]), (200, &json!("t1")), "{event}");
    // Two tenants with one id: which one is a question, not a guess.
    let event = json!({"workflow": "w", "tenant_id": "t2", "payload": 2, "execution_id": id});
    let (status, body) = appliance.post("/pulsar/publish", event).await;
    assert_eq!((status, &body["duplicate"]), (202, &json!(false)), "{body}");
    let (status, body) = appliance.get(&format!("/executions/{id}")).await;
    assert_eq!(status, 400, "{body}");
    assert!(body["detail"].as_str().unwrap().contains("?tenant="), "{body}");
    assert_eq!(appliance.get(&format!("/executions/{id}?tenant=t2")).await.1["tenant_id"], "t2");
    assert_eq!(appliance.get("/executions/0190b4a4-0000-7000-8000-00000000dead").await.0, 404);
}

/// Writes these bytes on a connection of its own, and reads until the other side closes it.
async fn raw(appliance: &Appliance, bytes: &[u8]) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(appliance.bridge).await.unwrap();
    let (mut reader, mut writer) = stream.split();
    let mut answer = Vec::new();
    // The bridge may answer and close before it has read everything.
    let (_, read) = tokio::join!(writer.write_all(bytes), tokio::time::timeout(SOON, reader.read_to_end(&mut answer)));
    let _ = read.expect("the connection is closed");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_and_hostile_requests_are_refused_and_cost_nothing_else() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let config = format!(
        "[bridge]\ntoken_required = false\nheader_timeout = \"1s\"\nbody_timeout = \"1s\"\n\
         [environments.production.n8n]\nurl = {:?}\n[environments.production.default_route]\nwebhook = \"/webhook/x\"\n",
        receiver.url("")
    );
    let appliance = Appliance::start(dir.path(), &config).await;
    let head = "POST /pulsar/publish HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
    let post = |body: &[u8]| {
        let mut text = format!("{head}connection: close\r\ncontent-length: {}\r\n\r\n", body.len()).into_bytes();
        text.extend_from_slice(body);
        text
    };
    let good = br#"{"workflow":"w","tenant_id":"t1","payload":1}"#;
    let many: String = (0..101).map(|n| format!("x-{n}: 1\r\n")).collect();
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("a byte order mark", post(b"\xef\xbb\xbf{}"), "400"),
        ("no UTF-8", post(b"{\"workflow\":\"\xff\",\"tenant_id\":\"t1\",\"payload\":1}"), "400"),
        ("no UTF-8 in the payload", post(b"{\"workflow\":\"w\",\"tenant_id\":\"t1\",\"payload\":\"\xc3\"}"), "400"),
        ("a field twice", post(br#"{"workflow":"w","workflow":"w","tenant_id":"t1","payload":1}"#), "400"),
        ("half a surrogate", post(br#"{"workflow":"\ud800","tenant_id":"t1","payload":1}"#), "400"),
        ("two values", post(br#"{"workflow":"w","tenant_id":"t1","payload":1} {}"#), "400"),
        ("nested deeply", post("[".repeat(1_000_000).as_bytes()), "400"),
        ("no body", post(b""), "400"),
        ("a short body", format!("{head}content-length: 90\r\n\r\n{{").into_bytes(), "408"),
        ("a length that is none", format!("{head}content-length: -1\r\n\r\n").into_bytes(), "400"),
        ("two lengths", format!("{head}content-length: 2\r\ncontent-length: 3\r\n\r\n{{}}").into_bytes(), "400"),
        ("a broken chunk", format!("{head}transfer-encoding: chunked\r\n\r\nzz\r\n").into_bytes(), "400"),
        ("an unknown coding", format!("{head}transfer-encoding: gzip\r\n\r\n").into_bytes(), "400"),
        ("two hosts", b"GET /executions HTTP/1.1\r\nhost: a\r\nhost: b\r\nconnection: close\r\n\r\n".to_vec(), "400"),
        ("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n".to_vec(), "400"),
        ("large headers", format!("{head}x: {}\r\n\r\n", "a".repeat(40 << 10)).into_bytes(), "431"),
        ("many headers", format!("{head}{many}\r\n").into_bytes(), "431"),
        (
            "compressed",
            format!("{head}connection: close\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\n{{}}").into_bytes(),
            "415",
        ),
        (
            "no type",
            b"POST /pulsar/publish HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}".to_vec(),
            "415",
        ),
        (
            "a path that is no text",
            b"GET /executions/%ff HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".to_vec(),
            "404",
        ),
        (
            "a query that is no text",
            b"GET /executions?tenant=%ff HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".to_vec(),
            "400",
        ),
        ("a good one", post(good), "202"),
    ];
    for (name, bytes, status) in cases {
        let answer = raw(&appliance, &bytes).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{name}: {answer}");
        if !["431", "202"].contains(&status) && answer.contains("content-type") {
            assert!(answer.contains("application/problem+json"), "{name}: {answer}");
        }
    }
    // Two requests at once on one connection: two answers in order. A HEAD has the head alone.
    let mut two = format!("{head}content-length: {}\r\n\r\n", good.len()).into_bytes();
    two.extend_from_slice(good);
    two.extend_from_slice(b"HEAD /executions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    let answer = raw(&appliance, &two).await;
    let (first, second) = answer.split_once("\"duplicate\":false}").expect("the whole first answer");
    assert!(first.starts_with("HTTP/1.1 202 ") && second.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(second.ends_with("\r\n\r\n"), "{answer}");

    // What is taken is delivered as it was written: numbers, order, spaces and escapes.
    let payload = r#"{ "big":123456789012345678901234567890.000, "e":1E400,"a":"\ud800\u0000", "a": [ ] }"#;
    let body = format!(r#"{{"workflow":"exact","tenant_id":"t1","payload": {payload} }}"#);
    let request = appliance.request(Method::POST, "/pulsar/publish").header("content-type", "application/json");
    let (status, _, answer) = send(request.body(body)).await;
    assert_eq!(status, 202, "{answer}");
    appliance.wait_state(answer["execution_id"].as_str().unwrap(), &["delivered"], SOON).await;
    assert_eq!(receiver.seen().iter().filter(|seen| seen.body == payload).count(), 1);
    assert_eq!(receiver.seen().len(), 3, "the refused ones have not come");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_answer_is_streamed_and_a_caller_who_leaves_is_written_down() {
    use axum::response::IntoResponse;
    use futures_util::StreamExt;
    let dir = tempfile::tempdir().unwrap();
    let (release, held) = tokio::sync::watch::channel(false);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let n8n = format!("http://{}", listener.local_addr().unwrap());
    let calls = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = calls.clone();
    let handler = axum::routing::post(move || {
        counted.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let mut held = held.clone();
        async move {
            // The second half comes when the test says so.
            let first = futures_util::stream::once(async { Ok::<_, std::io::Error>("first,") });
            let second = futures_util::stream::once(async move {
                let _ = held.wait_for(|go| *go).await;
                Ok("second")
            });
            let body = axum::body::Body::from_stream(first.chain(second));
            ([("set-cookie", "a=1"), ("x-n8n", "yes"), ("keep-alive", "timeout=5")], body).into_response()
        }
    });
    let mut server = tokio::task::JoinSet::new();
    server.spawn(async move { axum::serve(listener, axum::Router::new().fallback_service(handler)).await.unwrap() });
    let config = format!(
        "[bridge]\ntoken_required = false\n[environments.production.n8n]\nurl = {n8n:?}\n\
         [environments.production.default_route]\nclass = \"short\"\nwebhook = \"/webhook/s\"\ntimeout = \"30s\"\n"
    );
    let appliance = Appliance::start(dir.path(), &config).await;
    let call = || {
        let event = json!({"workflow": "s", "tenant_id": "t1", "payload": 1});
        appliance.request(Method::POST, "/pulsar/publish").json(&event).send()
    };
    let id = |headers: &reqwest::header::HeaderMap| headers["x-dealscale-execution-id"].to_str().unwrap().to_owned();
    let mut answer = call().await.unwrap();
    assert_eq!(
        (&answer.headers()["set-cookie"], &answer.headers()["x-n8n"]),
        (&"a=1".parse().unwrap(), &"yes".parse().unwrap())
    );
    assert!(!answer.headers().contains_key("keep-alive"), "a header of n8n's connection: {:?}", answer.headers());
    let streamed = id(answer.headers());
    assert_eq!(answer.chunk().await.unwrap().unwrap(), "first,", "the first half comes before the second is there");
    // Somebody else has no patience.
    let mut left = call().await.unwrap();
    let abandoned = id(left.headers());
    assert_eq!(left.chunk().await.unwrap().unwrap(), "first,");
    drop(left);
    let event = appliance.wait_state(&abandoned, &["unknown"], SOON).await;
    assert_eq!(event["history"][0]["status"], 200, "{event}");
    release.send(true).unwrap();
    assert_eq!(answer.chunk().await.unwrap().unwrap(), "second");
    assert_eq!(answer.chunk().await.unwrap(), None);
    appliance.wait_state(&streamed, &["delivered"], SOON).await;
    assert_eq!(calls.load(std::sync::atomic::Ordering::SeqCst), 2, "nothing is called again");

    let later = (jiff::Timestamp::now() + Duration::from_secs(3600)).to_string();
    let event = json!({"workflow": "s", "tenant_id": "t1", "payload": 1, "deliver_at": later});
    let (status, body) = appliance.post("/pulsar/publish", event).await;
    assert_eq!(status, 400, "a direct call cannot wait: {body}");
}
