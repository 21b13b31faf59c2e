//! The appliance as a process: start, stop, kill, reload, bad configuration, the command line.

use std::time::Duration;

use serde_json::json;

use crate::support::appliance::{Appliance, free_port};
use crate::support::receiver::{Receiver, Reply};

const SOON: Duration = Duration::from_secs(20);

/// Delivery to `receiver`, quick retries.
fn to(receiver: &Receiver) -> String {
    format!(
        "[environments.production]\nwebhook = {:?}\n[environments.production.default_route.retry]\nmin = \"50ms\"\nmax = \"200ms\"\n",
        receiver.url("/webhook/x")
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_goes_all_the_way() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let mut appliance = Appliance::start(dir.path(), &to(&receiver)).await;
    let id = appliance.publish("orders", json!({"order": 4711})).await;
    let event = appliance.wait_state(&id, &["delivered"], SOON).await;
    let seen = receiver.wait_for(1, SOON).await;
    assert_eq!(&seen[0].body[..], br#"{"order":4711}"#);
    assert_eq!(seen[0].header("webhook-id"), id);
    assert!(seen[0].header("traceparent").starts_with("00-"), "{:?}", seen[0].headers);
    assert_eq!(event["execution_id"], id.as_str());
    let (code, text) = appliance.cli(&["executions", "show", &id, "--tenant", "t1"]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("delivered"), "{text}");
    let (status, metrics) = appliance.admin("/metrics").await;
    assert_eq!(status, 200);
    assert!(metrics.contains("dealscale_"), "{metrics}");
    assert!(appliance.stop().await, "{}", appliance.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_accepted_survives_kill_9_and_arrives_with_the_same_webhook_id() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    // n8n answers after the kill: the first attempt's outcome is unknown, so it is delivered again.
    receiver.script([Reply::status(200).after(Duration::from_secs(30))]);
    let mut appliance = Appliance::start(
        dir.path(),
        &format!(
            "{}[environments.production.delivery]\nclaim = \"1s\"\nsweep_after = \"1s\"\nsweep_interval = \"200ms\"\n",
            to(&receiver)
        ),
    )
    .await;
    let id = appliance.publish("orders", json!(1)).await;
    receiver.wait_for(1, SOON).await;
    appliance.kill();
    appliance.launch().await;
    appliance.wait_state(&id, &["delivered"], SOON).await;
    let seen = receiver.wait_for(2, SOON).await;
    assert!(seen.iter().all(|s| s.header("webhook-id") == id), "{seen:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_wait_while_n8n_is_down_and_no_attempt_is_burnt() {
    let dir = tempfile::tempdir().unwrap();
    let addr = std::net::SocketAddr::from(([127, 0, 0, 1], free_port()));
    let text = format!(
        "[environments.production]\nwebhook = \"http://{addr}/webhook/x\"\n[environments.production.delivery]\nbreaker_failures = 2\nbreaker_open = \"200ms\"\n\
         [environments.production.default_route.retry]\nmin = \"50ms\"\nmax = \"200ms\"\nattempts_max = 4\n"
    );
    let appliance = Appliance::start(dir.path(), &text).await;
    let mut ids = Vec::new();
    for n in 0..10 {
        ids.push(appliance.publish("orders", json!(n)).await);
    }
    tokio::time::sleep(Duration::from_secs(4)).await;
    let receiver = Receiver::start_on(addr).await;
    for id in &ids {
        appliance.wait_state(id, &["delivered"], SOON).await;
    }
    assert_eq!(receiver.seen().len(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_is_applied_or_refused_as_a_whole() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let appliance = Appliance::start(dir.path(), &to(&receiver)).await;
    let text = std::fs::read_to_string(&appliance.config).unwrap();
    std::fs::write(&appliance.config, text.replace("[bridge]\n", "[bridge]\nbody_bytes_max = \"oops\"\n")).unwrap();
    let (code, _) = appliance.cli(&["reload"]);
    // The command line reads the same file for the socket's path, and refuses it first.
    assert_eq!(code, 78);
    assert_eq!(
        appliance
            .post("/pulsar/publish", json!({"workflow": "w", "tenant_id": "t1", "payload": "x".repeat(2000)}))
            .await
            .0,
        202
    );
    std::fs::write(
        &appliance.config,
        text.replace("[bridge]\n", "[bridge]\nbody_bytes_max = \"1KiB\"\n").replace("[admin]\n", "[admin]\n#"),
    )
    .unwrap();
    let text = std::fs::read_to_string(&appliance.config).unwrap();
    std::fs::write(&appliance.config, text.replace("[admin]\n#", "[admin]\n")).unwrap();
    let (code, text) = appliance.cli(&["reload"]);
    assert_eq!(code, 0, "{text}");
    assert_eq!(
        appliance
            .post("/pulsar/publish", json!({"workflow": "w", "tenant_id": "t1", "payload": "x".repeat(2000)}))
            .await
            .0,
        413
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reloaded_route_is_known_to_delivery_before_the_bridge_uses_it() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let mut appliance = Appliance::start(dir.path(), &to(&receiver)).await;
    appliance.publish("crm", json!(1)).await;
    receiver.wait_for(1, SOON).await;
    let text = std::fs::read_to_string(&appliance.config).unwrap();
    let route = format!(
        "[[environments.production.routes]]\nname = \"crm\"\nwebhook = {:?}\n[environments.production.routes.when]\nworkflow = \"crm\"\n",
        receiver.url("/webhook/crm")
    );
    std::fs::write(&appliance.config, format!("{text}{route}")).unwrap();
    let (code, text) = appliance.cli(&["--json", "reload"]);
    assert_eq!(code, 0, "{text}");
    let id = appliance.publish("crm", json!(2)).await;
    appliance.wait_state(&id, &["delivered"], SOON).await;
    let seen = receiver.wait_for(2, SOON).await;
    assert_eq!((seen[0].uri.path(), seen[1].uri.path()), ("/webhook/x", "/webhook/crm"));
    assert!(appliance.stop().await);
    assert!(!appliance.log().contains("unasked"), "{}", appliance.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_on_the_same_folder_is_refused() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let appliance = Appliance::start(dir.path(), &to(&receiver)).await;
    let (code, text) = appliance.cli(&["serve"]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("another process holds"), "{text}");
    assert_eq!(appliance.admin("/readyz").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_degrades_that_listener_until_it_is_free() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let mut appliance = Appliance::start(dir.path(), &to(&receiver)).await;
    appliance.kill();
    let taken = std::net::TcpListener::bind(appliance.bridge).unwrap();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let admin = format!("http://{}/readyz", appliance.admin);
    // `launch` waits for readiness, which comes only when the port is free again.
    let watch = tokio::spawn(async move {
        for _ in 0..600 {
            if let Ok(answer) = http.get(&admin).send().await {
                assert_eq!(answer.status(), 503);
                assert!(answer.text().await.unwrap().contains("cannot listen on"));
                drop(taken);
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the admin listener never answered");
    });
    appliance.launch().await;
    watch.await.unwrap();
    appliance.publish("orders", json!(1)).await;
}

#[test]
fn a_bad_configuration_ends_with_78_and_every_problem() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dealscale.toml");
    std::fs::write(&file, "[bridge]\nlisten = \"x\"\n[admin]\nlisten = \"hunter2\"\n").unwrap();
    for command in ["check", "serve"] {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_dealscale"))
            .args([command, "--config"])
            .arg(&file)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(78), "{text}");
        assert!(text.contains("bridge.listen") && text.contains("admin.listen") && !text.contains("hunter2"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn operating_needs_the_socket_not_loopback() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let appliance = Appliance::start(dir.path(), &to(&receiver)).await;
    for path in ["/admin/status", "/admin/outbox/status", "/admin/outbox/records"] {
        assert_eq!(appliance.get(path).await.0, 404, "{path} on the bridge");
        assert_eq!(appliance.admin(path).await.0, 404, "{path} on the admin listener");
    }
    let (code, text) = appliance.cli(&["--json", "status"]);
    assert_eq!(code, 0, "{text}");
    let status: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(status["level"], "ok", "{text}");
}

/// One request on a connection, and the head of its answer.
fn ask(stream: &mut std::net::TcpStream, close: bool) -> String {
    use std::io::{Read, Write};
    let body = r#"{"workflow":"orders","tenant_id":"t1","payload":1}"#;
    let connection = if close { "connection: close\r\n" } else { "" };
    write!(
        stream,
        "POST /pulsar/publish HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{connection}content-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = Vec::new();
    let mut byte = [0; 1];
    let length = |head: &str| -> usize {
        let line = head.lines().find(|l| l.to_ascii_lowercase().starts_with("content-length:"));
        line.and_then(|l| l[15..].trim().parse().ok()).unwrap_or(0)
    };
    while !answer.ends_with(b"\r\n\r\n") {
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "ended before an answer: {}", String::from_utf8_lossy(&answer));
        answer.push(byte[0]);
    }
    let head = String::from_utf8(answer).unwrap();
    let mut rest = vec![0; length(&head)];
    stream.read_exact(&mut rest).unwrap();
    head.to_ascii_lowercase()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_ends_idle_connections_and_takes_events_while_deliveries_finish() {
    use std::io::Read;
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let mut appliance = Appliance::start(dir.path(), &to(&receiver)).await;
    receiver.script([Reply::status(200).after(Duration::from_secs(4))]);
    appliance.publish("orders", json!(1)).await;
    receiver.wait_for(1, SOON).await;
    let connect = || {
        let stream = std::net::TcpStream::connect(appliance.bridge).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    };
    let (mut idle, mut unasked, mut kept) = (connect(), connect(), connect());
    assert!(ask(&mut idle, false).starts_with("http/1.1 202"));
    assert!(ask(&mut kept, false).starts_with("http/1.1 202"));
    let pid = nix::unistd::Pid::from_raw(appliance.pid() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(idle.read(&mut [0; 1]).unwrap(), 0, "an idle connection is closed");
    // The delivery is still under way: what comes now is taken, and its connection ends with the answer.
    for stream in [&mut unasked, &mut connect()] {
        let head = ask(stream, false);
        assert!(head.starts_with("http/1.1 202") && head.contains("connection: close"), "{head}");
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    }
    assert_eq!(kept.read(&mut [0; 1]).unwrap(), 0);
    assert!(appliance.stop().await);
    assert!(!appliance.log().contains("still under way"), "{}", appliance.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_manager_is_told() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let mut appliance = Appliance::start(dir.path(), &to(&receiver)).await;
    assert!(appliance.stop().await);
    let path = dir.path().join("notify");
    let socket = tokio::net::UnixDatagram::bind(&path).unwrap();
    appliance.environment = vec![("NOTIFY_SOCKET", path.display().to_string()), ("WATCHDOG_USEC", "400000".to_owned())];
    appliance.launch().await;
    let mut told = String::new();
    let mut until = async |wanted: &[&str]| {
        let mut found = 0;
        while found < wanted.len() {
            let mut buffer = [0; 4096];
            let read = tokio::time::timeout(SOON, socket.recv(&mut buffer)).await;
            let read = read.unwrap_or_else(|_| panic!("no {} in {told}", wanted[found])).unwrap();
            let text = String::from_utf8_lossy(&buffer[..read]).into_owned();
            told.push_str(&text);
            if text.lines().any(|line| line.starts_with(wanted[found])) {
                found += 1;
            }
        }
    };
    until(&["READY=1", "WATCHDOG=1", "WATCHDOG=1"]).await;
    assert_eq!(appliance.cli(&["reload", "--wait"]).0, 0);
    until(&["RELOADING=1", "READY=1", "WATCHDOG=1"]).await;
    assert!(appliance.stop().await);
    until(&["STOPPING=1"]).await;
    let ready = told.find("READY=1").unwrap();
    assert!(!told[..ready].contains("WATCHDOG=1") && told.contains("STATUS=takes events on"), "{told}");
}
