//! The appliance as a process: started from the built binary, killed, started again.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A running appliance on ports of its own. Killed when dropped.
pub struct Appliance {
    pub bridge: SocketAddr,
    pub admin: SocketAddr,
    pub dir: PathBuf,
    pub config: PathBuf,
    /// For the next launch.
    pub environment: Vec<(&'static str, String)>,
    child: Option<Child>,
    http: reqwest::Client,
    token: Option<String>,
    /// `ulimit -n` of the process, and variables of its environment.
    pub descriptors: Option<u32>,
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").expect("loopback").local_addr().expect("bound").port()
}

impl Appliance {
    /// Starts with `environment` as the text inside `[environments.production]`'s tables (whole tables, with their heads) and
    /// waits until it is ready. No token is needed and tenants `*` are declared, unless `environment` says otherwise.
    pub async fn start(dir: &Path, environment: &str) -> Self {
        // As `cli` does for the process; a second test finds it installed.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let (bridge, admin) = (free_port(), free_port());
        let tenants = if environment.contains(".tenants.") { "" } else { "[environments.production.tenants.\"*\"]\n" };
        let bridge_table = if environment.contains("[bridge]") { "" } else { "[bridge]\ntoken_required = false\n" };
        let text = format!("{bridge_table}{environment}\n{tenants}");
        let text = text.replacen("[bridge]\n", &format!("[bridge]\nlisten = \"127.0.0.1:{bridge}\"\n"), 1);
        let text =
            format!("state_dir = {:?}\n{text}\n[admin]\nlisten = \"127.0.0.1:{admin}\"\n", dir.display().to_string());
        std::fs::create_dir_all(dir).expect("a state folder");
        let config = dir.join("dealscale.toml");
        std::fs::write(&config, text).expect("a configuration file");
        let mut appliance = Self {
            bridge: SocketAddr::from(([127, 0, 0, 1], bridge)),
            admin: SocketAddr::from(([127, 0, 0, 1], admin)),
            dir: dir.to_owned(),
            config,
            environment: Vec::new(),
            child: None,
            http: reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(120)).build().expect("a client"),
            token: None,
            descriptors: None,
        };
        appliance.launch().await;
        appliance
    }

    /// Sends this token with every request from now on.
    pub fn with_token(mut self, token: &str) -> Self {
        self.token = Some(token.to_owned());
        self
    }

    /// Starts the process (again) and waits until it is ready.
    pub async fn launch(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.dir.join("log")).expect("a log file");
        let mut command = Command::new(env!("CARGO_BIN_EXE_dealscale"));
        if let Some(descriptors) = self.descriptors {
            command = Command::new("bash");
            command.args([
                "-c",
                &format!("ulimit -n {descriptors}; exec \"$0\" \"$@\""),
                env!("CARGO_BIN_EXE_dealscale"),
            ]);
        }
        let child = command
            .args(["serve", "--config"])
            .arg(&self.config)
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the built binary");
        self.child = Some(child);
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            if let Ok(answer) = self.http.get(format!("http://{}/readyz", self.admin)).send().await
                && answer.status().is_success()
            {
                return;
            }
            let ended = self.child.as_mut().expect("just started").try_wait().expect("our child");
            assert!(ended.is_none(), "the appliance ended with {ended:?}:\n{}", self.log());
            assert!(Instant::now() < end, "not ready within a minute:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Waits until the log contains `text`.
    pub async fn wait_log(&self, text: &str, limit: Duration) {
        self.wait_logs(text, 1, limit).await;
    }

    /// Waits until the log contains `text` as often as this.
    pub async fn wait_logs(&self, text: &str, count: usize, limit: Duration) {
        let end = Instant::now() + limit;
        while self.log().matches(text).count() < count {
            assert!(Instant::now() < end, "{text:?} is not {count} times in the log:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Whether the process has not ended yet.
    pub fn runs(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// kill -9.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid() as i32), signal).expect("our child");
    }

    /// SIGTERM, and waits for the end. Answers whether it ended with 0.
    pub async fn stop(&mut self) -> bool {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        self.ended().await
    }

    /// Waits for the end. Answers whether it ended with 0.
    pub async fn ended(&mut self) -> bool {
        let mut child = self.child.take().expect("it runs");
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = child.try_wait().expect("our child") {
                return status.success();
            }
            assert!(Instant::now() < end, "did not stop within a minute:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.http.request(method, format!("http://{}{path}", self.bridge));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        read(self.request(reqwest::Method::GET, path)).await
    }
    pub async fn delete(&self, path: &str) -> (u16, Value) {
        read(self.request(reqwest::Method::DELETE, path)).await
    }
    pub async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        read(self.request(reqwest::Method::POST, path).json(&body)).await
    }

    /// Publishes for the tenant `t1` and answers the execution id. Panics when it is not accepted.
    pub async fn publish(&self, workflow: &str, payload: Value) -> String {
        let (status, answer) =
            self.post("/pulsar/publish", json!({ "workflow": workflow, "tenant_id": "t1", "payload": payload })).await;
        assert_eq!(status, 202, "{answer}");
        answer["execution_id"].as_str().expect("an id").to_owned()
    }

    /// Waits until the event is in one of `states`. Panics with its last state when it does not within `limit`.
    pub async fn wait_state(&self, id: &str, states: &[&str], limit: Duration) -> Value {
        let end = Instant::now() + limit;
        loop {
            let (status, event) = self.get(&format!("/executions/{id}?tenant=t1")).await;
            if status == 200 && states.iter().any(|s| event["state"] == *s) {
                return event;
            }
            assert!(Instant::now() < end, "not in {states:?} within {limit:?}: {status} {event}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub async fn admin(&self, path: &str) -> (u16, String) {
        let answer = self.http.get(format!("http://{}{path}", self.admin)).send().await.expect("the admin listener");
        (answer.status().as_u16(), answer.text().await.expect("a text"))
    }

    /// Runs a command of the command line against it: exit code and standard output.
    pub fn cli(&self, arguments: &[&str]) -> (i32, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_dealscale"))
            .arg("--config")
            .arg(&self.config)
            .args(arguments)
            .output()
            .expect("the built binary");
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.code().unwrap_or(-1), text)
    }
}

impl Drop for Appliance {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn read(request: reqwest::RequestBuilder) -> (u16, Value) {
    let answer = request.send().await.expect("the bridge answers");
    let status = answer.status().as_u16();
    let body = answer.bytes().await.expect("a body");
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}
