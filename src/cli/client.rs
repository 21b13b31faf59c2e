//! Speaks to the running appliance over its admin socket.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::Value;

use super::{Failure, Global};
use crate::config::{self, Config};

pub struct Client {
    http: reqwest::Client,
    /// What this user can read of it.
    pub config: Result<Config, Vec<config::Problem>>,
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
        let client = Self::for_all(global)?;
        match &client.config {
            // The appliance knows which there are.
            Err(_) => Ok(client),
            Ok(config) if global.environment.is_none() && config.environments.len() == 1 => Ok(client),
            Ok(config) => {
                let environment = Some(super::environment(config, global)?.name.to_string());
                Ok(Self { environment, ..client })
            }
        }
    }

    /// For what concerns all environments.
    pub fn for_all(global: &Global) -> Result<Self, Failure> {
        let overrides = super::overrides(global);
        let config = config::load(&overrides, &config::variable);
        let socket = config.as_ref().map_or_else(|_| config::socket(&overrides), |c| c.admin.socket.clone());
        let environment = global.environment.as_ref().map(ToString::to_string);
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
        self.understood(self.send(method, path, body).await?)
    }

    /// The body of a success; what the appliance says of anything else.
    pub fn understood(&self, answer: Answer) -> Result<Value, Failure> {
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
        self.send_with(method, path, body.map(|b| b.to_string()), &[]).await
    }

    pub async fn send_with(
        &self,
        method: Method,
        path: &str,
        body: Option<String>,
        headers: &[(&str, &str)],
    ) -> Result<Answer, Failure> {
        let mut request = self.http.request(method, format!("http://dealscale{path}"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(environment) = &self.environment {
            request = request.header("x-dealscale-environment", environment);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        let response = request.send().await.map_err(|e| self.unavailable(&e))?;
        let status = response.status();
        let bytes = response.bytes().await.map_err(|e| self.unavailable(&e))?;
        // What is no JSON is n8n's own answer on a short route.
        let text = || Value::String(String::from_utf8_lossy(&bytes).into_owned());
        let body =
            if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes).unwrap_or_else(|_| text()) };
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
