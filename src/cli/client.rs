//! Speaks to the running appliance over its admin socket.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::Value;

use super::{Failure, Global, load};
use crate::config::Config;

pub struct Client {
    http: reqwest::Client,
    pub config: Config,
    socket: String,
    environment: Option<String>,
}

/// An answer that was understood.
pub struct Answer {
    pub status: StatusCode,
    pub body: Value,
}

impl Client {
    /// Reads the configuration for the socket's path; connects with the first request.
    pub fn new(global: &Global) -> Result<Self, Failure> {
        // Members of dealscale-admin may operate and not read the configuration, which can hold secrets: the package's socket serves them.
        let readable = super::is_readable(global);
        let config = if readable { load(global)? } else { crate::config::parse("").map_err(Failure::Config)? };
        let environment = match &global.environment {
            Some(name) if !readable => Some(name.to_string()),
            None if !readable || config.environments.len() == 1 => None,
            _ => Some(super::environment(&config, global)?.name.to_string()),
        };
        let socket = config.admin.socket.clone();
        let http = reqwest::Client::builder()
            .unix_socket(socket.as_path())
            .no_proxy()
            .timeout(Duration::from_secs(3_700))
            .build()
            .map_err(|e| format!("cannot make a client: {e}"))?;
        Ok(Self { http, config, socket: socket.display().to_string(), environment })
    }

    /// Whether an appliance answers.
    pub async fn is_up(&self) -> bool {
        matches!(self.send(Method::GET, "/admin/status", None).await, Ok(answer) if answer.status.is_success())
    }

    pub async fn get(&self, path: &str) -> Result<Value, Failure> {
        self.ok(Method::GET, path, None).await
    }
    pub async fn post(&self, path: &str, body: Option<Value>) -> Result<Value, Failure> {
        self.ok(Method::POST, path, body).await
    }
    pub async fn delete(&self, path: &str) -> Result<Value, Failure> {
        self.ok(Method::DELETE, path, None).await
    }

    async fn ok(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value, Failure> {
        let answer = self.send(method, path, body).await?;
        if answer.status.is_success() {
            return Ok(answer.body);
        }
        // A problem document (RFC 9457).
        let text = |key: &str| answer.body.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (title, detail) = (text("title"), text("detail"));
        Err(Failure::Message(if detail.is_empty() {
            format!("{} {title}", answer.status)
        } else {
            format!("{title}: {detail}")
        }))
    }

    pub async fn send(&self, method: Method, path: &str, body: Option<Value>) -> Result<Answer, Failure> {
        let mut request = self.http.request(method, format!("http://dealscale{path}"));
        if let Some(environment) = &self.environment {
            request = request.header("x-dealscale-environment", environment);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.map_err(|e| self.unavailable(&e))?;
        let status = response.status();
        let bytes = response.bytes().await.map_err(|e| self.unavailable(&e))?;
        let body = if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes).unwrap_or(Value::Null) };
        Ok(Answer { status, body })
    }

    fn unavailable(&self, error: &reqwest::Error) -> Failure {
        let mut cause: &dyn std::error::Error = error;
        while let Some(next) = cause.source() {
            cause = next;
        }
        let hint = if cause.to_string().contains("ermission") {
            "you need to be root or in the group of the socket"
        } else {
            "is it running? (`systemctl status dealscale`, or `dealscale serve`)"
        };
        Failure::Unavailable(format!("no answer from the appliance at {}: {cause}; {hint}", self.socket))
    }
}

/// Query parameters that are set, percent-encoded.
pub fn query(path: &str, parameters: &[(&str, Option<String>)]) -> String {
    let mut url = reqwest::Url::parse("http://x").expect("a literal URL");
    url.set_path(path);
    for (key, value) in parameters {
        if let Some(value) = value {
            url.query_pairs_mut().append_pair(key, value);
        }
    }
    match url.query() {
        Some(query) => format!("{}?{query}", url.path()),
        None => url.path().to_owned(),
    }
}
