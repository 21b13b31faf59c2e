//! What every module needs: where the servers are, HTTP without ceremony, and the appliance as a process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

/// A variable that `tests/real/run.sh` sets.
pub fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run `make test-real`, which starts the servers"))
}

/// An answer with its body as text and, where it is JSON, as a value.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: http::HeaderMap,
    pub text: String,
    pub json: Value,
}

/// One request; `body` makes it a POST with JSON.
pub fn http(url: &str, headers: &[(&str, &str)], body: Option<&Value>) -> Result<Answer, String> {
    static CLIENT: OnceLock<(tokio::runtime::Runtime, reqwest::Client)> = OnceLock::new();
    let (runtime, client) = CLIENT.get_or_init(|| {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        (runtime, reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(120)).build().unwrap())
    });
    let mut request = match body {
        Some(body) => client.post(url).json(body),
        None => client.get(url),
    };
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    runtime.block_on(async {
        let response = request.send().await.map_err(|e| e.to_string())?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.map_err(|e| e.to_string())?;
        let json = serde_json::from_str(&text).unwrap_or(Value::Null);
        Ok(Answer { status, headers, text, json })
    })
}

/// Asks until there is an answer, for at most `patience`.
pub fn eventually<T>(what: &str, patience: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = ask() {
            return found;
        }
        assert!(begin.elapsed() < patience, "{what}: not within {patience:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Whether nothing listens on this port of the loopback address.
pub fn is_free(port: u16) -> bool {
    std::net::TcpListener::bind(("127.0.0.1", port)).is_ok()
}

/// A running `dealscale serve`. Dropping it stops it.
pub struct Appliance {
    child: Child,
    pub url: String,
    log: PathBuf,
}

impl Appliance {
    /// Starts it with `config` in `dir` and waits until it is ready. The listeners are added here.
    pub fn start(dir: &Path, port: u16, config: &str) -> Self {
        Self::start_with(dir, port, "token_required = false", config)
    }

    /// As [`start`](Self::start), with other keys of `[bridge]`.
    pub fn start_with(dir: &Path, port: u16, bridge: &str, config: &str) -> Self {
        assert!(is_free(port) && is_free(port + 1), "127.0.0.1:{port} or the one behind it is in use");
        let file = dir.join("dealscale.toml");
        let text = format!(
            "[bridge]\nlisten = \"127.0.0.1:{port}\"\n{bridge}\n\
             [admin]\nlisten = \"127.0.0.1:{}\"\n{config}",
            port + 1
        );
        std::fs::write(&file, text).unwrap();
        let log = dir.join("dealscale.log");
        let out = std::fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_dealscale"))
            .args(["serve", "--state-dir"])
            .arg(dir.join("state"))
            .arg("--config")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .spawn()
            .unwrap();
        let mut appliance = Self { child, url: format!("http://127.0.0.1:{port}"), log };
        let ready = format!("http://127.0.0.1:{}/readyz", port + 1);
        eventually("the appliance is ready", Duration::from_secs(60), || {
            if let Some(status) = appliance.child.try_wait().unwrap() {
                panic!("the appliance ended with {status}");
            }
            http(&ready, &[], None).ok().filter(|a| a.status == 200)
        });
        appliance
    }

    /// Publishes for tenant `default` and returns the id of the accepted event.
    pub fn publish(&self, workflow: &str, payload: Value) -> String {
        let body = serde_json::json!({ "workflow": workflow, "tenant_id": "default", "payload": payload });
        let answer = http(&format!("{}/pulsar/publish", self.url), &[], Some(&body)).unwrap();
        assert_eq!(answer.status, 202, "{}", answer.text);
        answer.json["execution_id"].as_str().expect("202 says the execution's id").to_owned()
    }

    /// The event once it is final.
    pub fn wait(&self, id: &str, patience: Duration) -> Value {
        eventually(&format!("{id} is final"), patience, || {
            let url = format!("{}/executions/{id}/wait?timeout=20s&tenant=default", self.url);
            let event = http(&url, &[], None).unwrap();
            assert_eq!(event.status, 200, "{}", event.text);
            let state = event.json["state"].as_str().expect("an event has a state");
            (!["accepted", "relayed", "delivering"].contains(&state)).then_some(event.json)
        })
    }
}

impl Appliance {
    /// kill -9.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Appliance {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let begin = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && begin.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            eprintln!("the appliance's log ends:\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
        }
    }
}

/// The attempts of an event as `GET /executions/{id}` tells them.
pub fn attempts(event: &Value) -> Vec<Value> {
    let list = event["history"].as_array().or_else(|| event["attempts"].as_array());
    list.cloned().unwrap_or_else(|| panic!("no attempts in {event}"))
}
