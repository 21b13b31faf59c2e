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
    assert_eq!(code, 78);
    // The file is wrong, and the appliance can still be operated.
    assert_eq!(appliance.cli(&["status"]).0, 0);
    assert_eq!(appliance.cli(&["executions", "ls"]).0, 0);
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

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_goes_on_when_who_asked_for_it_leaves() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let gate = Duration::from_secs(3);
    receiver.script([Reply::status(200).after(gate)]);
    let appliance = Appliance::start(dir.path(), &to(&receiver)).await;
    // Delivery cannot end before this attempt is over: the reload waits for it.
    appliance.publish("orders", json!(1)).await;
    receiver.wait_for(1, SOON).await;
    let text = std::fs::read_to_string(&appliance.config).unwrap();
    std::fs::write(&appliance.config, text.replace("max = \"200ms\"", "max = \"300ms\"")).unwrap();
    for _ in 0..3 {
        let mut asked = std::os::unix::net::UnixStream::connect(dir.path().join("admin.sock")).unwrap();
        use std::io::Write;
        asked.write_all(b"POST /admin/reload HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n").unwrap();
        appliance.wait_log("delivery ends to start again", SOON).await;
        drop(asked);
    }
    let id = appliance.publish("orders", json!(2)).await;
    appliance.wait_state(&id, &["delivered"], SOON).await;
    assert_eq!(receiver.seen().len(), 2, "each event once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_says_what_needs_a_restart_as_long_as_it_does() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let secret = dir.path().join("api-key");
    std::fs::write(&secret, "one").unwrap();
    let n8n = format!("[environments.production.n8n]\napi_key_file = {:?}\n", secret.display().to_string());
    let mut appliance = Appliance::start(dir.path(), &format!("{}{n8n}", to(&receiver))).await;
    let reload = || {
        let (code, text) = appliance.cli(&["--json", "reload"]);
        assert_eq!(code, 0, "{text}");
        let text = text.split("\ndealscale: ").next().unwrap();
        serde_json::from_str::<serde_json::Value>(text).unwrap()["needs_restart"].clone()
    };
    assert_eq!(reload(), json!([]));
    let text = std::fs::read_to_string(&appliance.config).unwrap();
    std::fs::write(&secret, "two").unwrap();
    let staging = "[environments.staging]\nwebhook = \"/x\"\n";
    let more = text.replace("[bridge]\n", "[bridge]\nconnections_max = 99\n");
    std::fs::write(&appliance.config, format!("{more}{staging}")).unwrap();
    let wanted = json!(["bridge.connections_max", "environments.production.n8n.api_key", "environments.staging"]);
    assert_eq!(reload(), wanted);
    // Nothing of it was applied, so it is said again.
    assert_eq!(reload(), wanted);
    std::fs::write(&appliance.config, text).unwrap();
    std::fs::write(&secret, "one").unwrap();
    assert_eq!(reload(), json!([]));
    // What the parts refuse, a reload refuses as a whole, whoever asks.
    let text = std::fs::read_to_string(&appliance.config).unwrap();
    let bad = text.replace("[bridge]\n", "[bridge]\nbody_bytes_max = \"1KiB\"\n");
    std::fs::write(
        &appliance.config,
        format!("{bad}[environments.production.delivery]\nwebhook_secret = \"hunter2\"\n"),
    )
    .unwrap();
    appliance.signal(nix::sys::signal::Signal::SIGHUP);
    appliance.wait_log("the old one goes on", SOON).await;
    assert!(!appliance.log().contains("hunter2"));
    let large = json!({"workflow": "w", "tenant_id": "t1", "payload": "x".repeat(2000)});
    assert_eq!(appliance.post("/pulsar/publish", large).await.0, 202);
    assert!(appliance.stop().await, "{}", appliance.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_takes_publishes_while_deliveries_finish_and_a_second_signal_ends_it() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    receiver.script([Reply::status(200).after(Duration::from_secs(2)), Reply::status(200)]);
    let mut appliance = Appliance::start(dir.path(), &to(&receiver)).await;
    let first = appliance.publish("orders", json!(1)).await;
    receiver.wait_for(1, SOON).await;
    appliance.signal(nix::sys::signal::Signal::SIGTERM);
    appliance.wait_log("stopping: no new deliveries", SOON).await;
    let late = appliance.publish("orders", json!(2)).await;
    assert!(appliance.ended().await, "{}", appliance.log());
    // The first one was finished, not cut; the late one waited for the next start.
    assert_eq!(receiver.seen().len(), 1);
    appliance.launch().await;
    appliance.wait_state(&late, &["delivered"], SOON).await;
    let event = appliance.wait_state(&first, &["delivered"], SOON).await;
    assert_eq!((event["attempts"].as_u64(), receiver.seen().len()), (Some(1), 2), "{event}");

    receiver.script([Reply::status(200).after(Duration::from_secs(600))]);
    let cut = appliance.publish("orders", json!(3)).await;
    receiver.wait_for(3, SOON).await;
    appliance.signal(nix::sys::signal::Signal::SIGTERM);
    appliance.wait_logs("stopping: no new deliveries", 2, SOON).await;
    // One that comes within a second is taken for the first one's echo.
    while appliance.runs() {
        appliance.signal(nix::sys::signal::Signal::SIGTERM);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(!appliance.ended().await);
    assert!(appliance.log().contains("a second signal"), "{}", appliance.log());
    appliance.launch().await;
    assert_ne!(appliance.get(&format!("/executions/{cut}?tenant=t1")).await.1["state"], "dead");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_descriptors_the_accept_loop_waits_and_goes_on() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let mut appliance = Appliance::start(dir.path(), &to(&receiver)).await;
    assert!(appliance.stop().await);
    appliance.descriptors = Some(64);
    appliance.launch().await;
    assert!(appliance.log().contains("few file descriptors"), "{}", appliance.log());
    let idle: Vec<_> = (0..100).map(|_| std::net::TcpStream::connect(appliance.bridge).unwrap()).collect();
    appliance.wait_log("Too many open files", SOON).await;
    drop(idle);
    let id = appliance.publish("orders", json!(1)).await;
    appliance.wait_state(&id, &["delivered"], SOON).await;
    assert!(appliance.stop().await, "{}", appliance.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_have_help_and_units_and_callers_cannot_make_more_of_them() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let appliance = Appliance::start(dir.path(), &to(&receiver)).await;
    let publish = async |n: usize| {
        for body in [
            json!({"workflow": format!("w{n}\"}} 1\nforged"), "tenant_id": format!("t{n}"), "payload": n}),
            json!({"workflow": format!("w{n}"), "tenant_id": format!("t{n}"), "payload": n, "metadata": {format!("k{n}"): "v"}}),
            json!({"topic": format!("dealscale.x{n}"), "tenant_id": "t1", "payload": n}),
            json!({"workflow": format!("w{n}"), "tenant_id": format!("NOT A TENANT {n}"), "payload": n}),
        ] {
            appliance.post("/pulsar/publish", body).await;
        }
        appliance.get(&format!("/nowhere/{n}")).await;
        let method = reqwest::Method::from_bytes(format!("M{n}").as_bytes()).unwrap();
        appliance.request(method, "/pulsar/publish").send().await.unwrap();
        let (code, _) = appliance.cli(&["outbox", "drain"]);
        assert_eq!(code, 0);
    };
    let series = async || -> std::collections::BTreeSet<String> {
        let (_, text) = appliance.admin("/metrics").await;
        let names = text.lines().filter(|l| !l.starts_with('#'));
        names.map(|l| l.rsplit_once(' ').unwrap().0.to_owned()).collect()
    };
    for n in 0..10 {
        publish(n).await;
    }
    let before = series().await;
    for n in 10..40 {
        publish(n).await;
    }
    let after = series().await;
    // Names of the appliance's own steps may still come; none that came from a caller.
    let new: Vec<_> = after.difference(&before).filter(|s| !s.contains("doing=")).collect();
    assert!(new.is_empty(), "{new:#?}");
    assert!(!after.iter().any(|s| s.contains("forged") || s.contains("w1") || s.contains("t1")), "{after:#?}");

    let (_, text) = appliance.admin("/metrics").await;
    for line in text.lines().filter(|l| l.starts_with("# TYPE ")) {
        let mut words = line.split(' ').skip(2);
        let (name, kind) = (words.next().unwrap(), words.next().unwrap());
        assert!(text.contains(&format!("# HELP {name} ")), "{name} has no help");
        assert!(name.starts_with("dealscale_"), "{name}");
        assert_eq!(kind == "counter", name.ends_with("_total"), "{name} is a {kind}");
        assert!(
            kind != "histogram" || name.ends_with("_seconds") || name.ends_with("_bytes") || name.ends_with("_events"),
            "{name}"
        );
    }
    for part in
        ["bridge", "admin", "production/outbox", "production/payloads", "production/broker", "production/delivery"]
    {
        assert!(text.contains(&format!("dealscale_part_level{{part=\"{part}\"}} 0")), "{part}: {text}");
    }
    assert!(text.contains("dealscale_build_info{version="));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_speaks_json_and_takes_a_closed_pipe() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let mut appliance = Appliance::start(dir.path(), &to(&receiver)).await;
    receiver.script([Reply::status(200), Reply::status(410)]);
    let payload = dir.path().join("payload.json");
    std::fs::write(&payload, r#"{"z": 12345678901234567890123.10, "a": 1}"#).unwrap();
    let from = format!("@{}", payload.display());
    let publish = ["publish", "--workflow", "w", "--tenant", "t1", "--payload"];
    let run = |arguments: &[&str]| -> (i32, serde_json::Value) {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_dealscale"))
            .arg("--json")
            .arg("--config")
            .arg(&appliance.config)
            .args(arguments)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let json = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {text} {output:?}"));
        (output.status.code().unwrap(), json)
    };
    let (code, event) =
        run(&[&publish[..], &[&from, "--wait", "--idempotency-key", "k", "--metadata", "a=b"]].concat());
    assert_eq!((code, event["state"].as_str()), (0, Some("delivered")), "{event}");
    assert_eq!(event["metadata"]["a"], "b", "{event}");
    assert_eq!(&receiver.wait_for(1, SOON).await[0].body[..], br#"{"z": 12345678901234567890123.10, "a": 1}"#);
    let id = event["execution_id"].as_str().unwrap().to_owned();
    let (_, again) = run(&[&publish[..], &[&from, "--idempotency-key", "k", "--metadata", "a=b"]].concat());
    assert_eq!((&again["duplicate"], &again["execution_id"]), (&json!(true), &event["execution_id"]));
    // 410 cannot get better: dead at once, and the exit code says so.
    let (code, dead) = run(&[&publish[..], &["1", "--wait"]].concat());
    assert_eq!((code, dead["state"].as_str()), (3, Some("dead")), "{dead}");
    let dead = dead["execution_id"].as_str().unwrap().to_owned();
    let export = dir.path().join("export").display().to_string();
    let commands: Vec<(i32, Vec<&str>)> = vec![
        (0, vec!["status"]),
        (0, vec!["check"]),
        (0, vec!["config", "show"]),
        (0, vec!["reload"]),
        (0, vec!["executions", "ls", "--tenant", "t1", "--state", "dead"]),
        (0, vec!["executions", "show", &id, "--tenant", "t1"]),
        (0, vec!["executions", "wait", &id, "--tenant", "t1"]),
        (3, vec!["executions", "wait", &dead, "--tenant", "t1"]),
        (0, vec!["dead-letters", "ls"]),
        (0, vec!["dead-letters", "show", &dead, "--tenant", "t1"]),
        (0, vec!["dead-letters", "replay"]),
        (0, vec!["outbox", "status"]),
        (0, vec!["outbox", "ls"]),
        (0, vec!["outbox", "drain"]),
        (0, vec!["outbox", "export", &export]),
        (0, vec!["outbox", "import", &export]),
        (0, vec!["routes", "ls"]),
        (0, vec!["routes", "explain", "--workflow", "w", "--tenant", "t1"]),
        (0, vec!["token", "orders"]),
    ];
    for (wanted, arguments) in &commands {
        let (code, value) = run(arguments);
        assert_eq!(code, *wanted, "{arguments:?}: {value}");
        // The same for people, into a pipe that nobody reads.
        let output = std::process::Command::new("bash")
            .args(["-c", "\"$0\" \"$@\" | true; exit ${PIPESTATUS[0]}", env!("CARGO_BIN_EXE_dealscale"), "--config"])
            .arg(&appliance.config)
            .args(arguments.iter().map(|a| if *a == export { "/nonexistent/export" } else { a }))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!text.contains("panicked") && output.status.code().unwrap() <= 3, "{arguments:?}: {text}");
    }
    for arguments in [&["completions", "bash"][..], &["completions", "zsh"], &["completions", "fish"], &["man"]] {
        let script = "\"$0\" \"$@\" | true; exit ${PIPESTATUS[0]}";
        let output = std::process::Command::new("bash")
            .args(["-c", script, env!("CARGO_BIN_EXE_dealscale")])
            .args(arguments)
            .output();
        let output = output.unwrap();
        assert_eq!((output.status.code(), &*output.stderr), (Some(0), &b""[..]), "{arguments:?}");
    }
    let (code, text) = appliance.cli(&["dead-letters", "replay", &dead, "--workflow", "w"]);
    assert_eq!(code, 2, "{text}");

    // With nobody to talk to.
    std::fs::remove_dir_all(&export).unwrap();
    assert!(appliance.stop().await, "{}", appliance.log());
    for (_, arguments) in &commands {
        let local = ["check", "config", "routes", "token"].contains(&arguments[0]);
        let folder = arguments[0] == "outbox" && arguments[1] != "drain";
        let (code, text) = appliance.cli(arguments);
        assert_eq!(code, if local || folder { 0 } else { 69 }, "{arguments:?}: {text}");
    }
    let elsewhere = dir.path().join("elsewhere");
    for command in ["status", "ls", "verify"] {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_dealscale"))
            .args(["outbox", command, "--state-dir"])
            .arg(&elsewhere)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && text.contains("there is no outbox at"), "{text}");
        assert!(!elsewhere.exists(), "`outbox {command}` made a folder");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_plans_variables_alone_make_a_working_appliance() {
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let port = free_port();
    let command = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_dealscale"));
        command.args(arguments).arg("--state-dir").arg(dir.path()).env("FASTAPI_BRIDGE_PORT", port.to_string());
        command.env("FASTAPI_BRIDGE_WEBHOOK_URL", receiver.url("/webhook/plan"));
        // Pulsar's address is there, and the switch says no.
        command.env("PULSAR_SERVICE_URL", "pulsar://127.0.0.1:1").env("DEALSCALE_PULSAR_QUEUE_ENABLED", "off");
        command
    };
    let log = std::fs::File::create(dir.path().join("log")).unwrap();
    let mut child = command(&["serve"]).stderr(log).spawn().unwrap();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let body = json!({"workflow": "w", "tenant_id": "anybody", "payload": {"n": 1}});
    let mut status = None;
    for _ in 0..400 {
        let sent = http.post(format!("http://127.0.0.1:{port}/pulsar/publish")).json(&body).send().await;
        status = sent.ok().map(|a| a.status().as_u16());
        if status.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(status, Some(202));
    let seen = receiver.wait_for(1, SOON).await;
    assert_eq!((seen[0].uri.path(), &seen[0].body[..]), ("/webhook/plan", &br#"{"n":1}"#[..]));
    let output = command(&["--json", "status"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains(&format!("listens on 127.0.0.1:{port}")) && text.contains("\"kind\": \"local\""), "{text}");
    let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
    assert!(
        log.contains("no configuration file: embedded defaults, any tenant, and publishing without a token"),
        "{log}"
    );
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(tokio::task::spawn_blocking(move || child.wait().unwrap().success()).await.unwrap());
}

#[test]
fn a_configuration_that_only_a_part_can_refuse_is_78_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dealscale.toml");
    let text = "[[signing.keys]]\nid = \"a\"\nkey = \"hunter2\"\n";
    std::fs::write(&file, text).unwrap();
    for arguments in [&["check"][..], &["serve"], &["--json", "check"]] {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_dealscale"))
            .args(arguments)
            .arg("--config")
            .arg(&file)
            .output();
        let output = output.unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(78), "{text}");
        assert!(text.contains("signing key \"a\"") && !text.contains("hunter2"), "{text}");
        if arguments.len() == 2 {
            let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!((&json["ok"], json["problems"].as_array().unwrap().len()), (&json!(false), 1), "{json}");
        }
    }
}
