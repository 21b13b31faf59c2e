//! The part of Pulsar's admin REST API (version 2, Pulsar 4.0) that this room uses.
//!
//! topology, pulsar → **`admin`**. All requests end within the operation timeout. Names come from checked types, so they
//! need no escaping except in subscriptions, which [`crate::config::broker`] and the topics file keep plain.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use futures_util::StreamExt;
use reqwest::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::clock::Timestamp;
use crate::config::broker::Pulsar;

use super::auth::Auth;

/// Partitions that are asked at once.
const PARTITIONS: usize = 8;

/// Why the cluster did not do what it was asked for.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// No answer, or no token to ask with. Trying again may help.
    #[error("Pulsar's REST API at {url} does not answer: {cause}")]
    Unreachable { url: String, cause: String },
    #[error("Pulsar does not accept our token (401 while asked to {doing}): check broker.token or oauth2_*")]
    Unauthenticated { doing: String },
    #[error("Pulsar does not let our role {doing}: {text}")]
    Forbidden { doing: String, text: String },
    #[error("Pulsar answered {status} when asked to {doing}: {text}")]
    Refused { status: u16, doing: String, text: String },
}

impl Error {
    pub fn is_unreachable(&self) -> bool {
        // 5xx and 429 pass: a broker that starts answers 500 and 503 for a while.
        matches!(self, Self::Unreachable { .. })
            || matches!(self, Self::Refused { status, .. } if *status >= 500 || *status == 429)
    }
}

/// Client for one tenant and namespace. Cheap to clone.
#[derive(Clone)]
pub struct Admin {
    http: reqwest::Client,
    auth: Auth,
    base: String,
    tenant: String,
    namespace: String,
}

/// What we read of a topic's statistics.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Stats {
    pub subscriptions: BTreeMap<String, SubscriptionStats>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SubscriptionStats {
    pub msg_backlog: i64,
    pub unacked_messages: i64,
    /// Milliseconds since the epoch; 0 or less when there is none.
    pub earliest_msg_publish_time_in_backlog: i64,
    pub consumers: Vec<ConsumerStats>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ConsumerStats {
    pub consumer_name: String,
    pub address: Option<String>,
    pub metadata: BTreeMap<String, String>,
}

impl SubscriptionStats {
    pub fn oldest(&self) -> Option<Timestamp> {
        (self.earliest_msg_publish_time_in_backlog > 0).then_some(Timestamp(self.earliest_msg_publish_time_in_backlog))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
struct InternalStats {
    number_of_entries: u64,
}

#[derive(Deserialize)]
struct Partitions {
    partitions: u32,
}

/// `MessageId.earliest`: a subscription that was deleted starts with what is still retained. The ledger tells what is done.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Earliest {
    ledger_id: i64,
    entry_id: i64,
    partition_index: i32,
}

const EARLIEST: Earliest = Earliest { ledger_id: -1, entry_id: -1, partition_index: -1 };

/// An HTTP client with our limits. `direct` ignores proxies of the process's environment.
pub(super) fn client(ca_file: Option<&Path>, timeout: Duration, direct: bool) -> Result<reqwest::Client, String> {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // Somebody else was faster: just as well.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    }
    let mut builder = reqwest::Client::builder()
        .timeout(timeout)
        .connect_timeout(timeout)
        .redirect(reqwest::redirect::Policy::limited(3))
        .user_agent(concat!("dealscale/", env!("CARGO_PKG_VERSION")));
    if direct {
        builder = builder.no_proxy();
    }
    if let Some(path) = ca_file {
        let fail = |cause: String| format!("cannot use the CA file {}: {cause}", path.display());
        let pem = std::fs::read(path).map_err(|e| fail(e.to_string()))?;
        let certificates = reqwest::Certificate::from_pem_bundle(&pem).map_err(|e| fail(cause(&e)))?;
        if certificates.is_empty() {
            return Err(fail("it has no certificate".into()));
        }
        for certificate in certificates {
            builder = builder.add_root_certificate(certificate);
        }
    }
    builder.build().map_err(|e| cause(&e))
}

/// The innermost cause: what reqwest shows itself is only "error sending request".
pub(super) fn cause(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "timed out".into();
    }
    let mut at: &dyn std::error::Error = error;
    while let Some(source) = at.source() {
        at = source;
    }
    at.to_string()
}

impl Admin {
    /// # Errors
    /// When the HTTP client cannot be made (the CA file).
    pub fn new(config: &Pulsar, auth: Auth) -> Result<Self, String> {
        // Brokers and proxies redirect to the owner of a topic, and a new namespace is loaded first: more than one round.
        let http = client(config.ca_file.as_deref(), config.operation_timeout.0, true)?;
        Ok(Self {
            http,
            auth,
            base: format!("{}/admin/v2", config.http_url.trim_end_matches('/')),
            tenant: config.tenant.clone(),
            namespace: config.namespace.clone(),
        })
    }

    pub fn namespace(&self) -> String {
        format!("{}/{}", self.tenant, self.namespace)
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
        doing: &str,
    ) -> Result<(StatusCode, Vec<u8>), Error> {
        let unreachable = |cause: String| Error::Unreachable { url: self.base.clone(), cause };
        let mut request = self.http.request(method, format!("{}{path}", self.base));
        if let Some(token) = self.auth.token().await.map_err(unreachable)? {
            request = request.bearer_auth(token.expose());
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.map_err(|e| unreachable(cause(&e)))?;
        let status = response.status();
        let body = response.bytes().await.map_err(|e| unreachable(cause(&e)))?;
        // Pulsar says 401 also to a role that it knows but does not let: then with a reason of its own.
        match (status, Self::reason(&body)) {
            (StatusCode::UNAUTHORIZED, None) => Err(Error::Unauthenticated { doing: doing.to_owned() }),
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, text) => {
                Err(Error::Forbidden { doing: doing.to_owned(), text: text.unwrap_or_else(|| status.to_string()) })
            }
            _ => Ok((status, body.to_vec())),
        }
    }

    /// `{"reason":"…"}`, shortened.
    fn reason(body: &[u8]) -> Option<String> {
        let value: Value = serde_json::from_slice(body).ok()?;
        Some(Self::first_line(value.get("reason")?.as_str()?))
    }

    fn first_line(text: &str) -> String {
        text.lines().next().unwrap_or_default().chars().take(300).collect()
    }

    fn refused(status: StatusCode, body: &[u8], doing: &str) -> Error {
        // Without a reason it is a page of Jetty's.
        let text = Self::reason(body).unwrap_or_else(|| Self::first_line(&String::from_utf8_lossy(body)));
        Error::Refused { status: status.as_u16(), doing: doing.to_owned(), text }
    }

    /// `None` when it does not exist.
    async fn read(&self, path: &str, doing: &str) -> Result<Option<Value>, Error> {
        let (status, body) = self.send(Method::GET, path, None, doing).await?;
        match status {
            StatusCode::NOT_FOUND => Ok(None),
            status if status.is_success() => {
                if body.is_empty() {
                    return Ok(Some(Value::Null));
                }
                serde_json::from_slice(&body).map(Some).map_err(|_| Self::refused(status, b"not JSON", doing))
            }
            status => Err(Self::refused(status, &body, doing)),
        }
    }

    /// A conflict (409) counts as done: somebody else made it at the same time.
    async fn write(&self, method: Method, path: &str, body: Option<Value>, doing: &str) -> Result<(), Error> {
        let (status, body) = self.send(method, path, body, doing).await?;
        match status {
            StatusCode::CONFLICT => Ok(()),
            status if status.is_success() => Ok(()),
            status => Err(Self::refused(status, &body, doing)),
        }
    }

    fn names(value: Option<Value>) -> Option<Vec<String>> {
        serde_json::from_value(value?).ok()
    }

    /// What the cluster says to our credentials: `None` when it is content or cannot be reached.
    pub async fn refusal(&self) -> Option<String> {
        match self.read(&format!("/namespaces/{}", self.tenant), "list the namespaces").await {
            Err(error @ Error::Unauthenticated { .. }) => Some(error.to_string()),
            _ => None,
        }
    }

    pub async fn clusters(&self) -> Result<Vec<String>, Error> {
        let names = Self::names(self.read("/clusters", "list the clusters").await?).unwrap_or_default();
        // `global` is the configuration store's own name in old clusters, not a place for data.
        Ok(names.into_iter().filter(|name| name != "global").collect())
    }

    /// Whether the tenant exists. A role that may not list tenants, but administers this one, sees its namespaces.
    pub async fn tenant_exists(&self) -> Result<bool, Error> {
        Ok(self.read(&format!("/namespaces/{}", self.tenant), "look for the tenant").await?.is_some())
    }

    pub async fn create_tenant(&self, clusters: &[String]) -> Result<(), Error> {
        let body = serde_json::json!({ "adminRoles": [], "allowedClusters": clusters });
        self.write(Method::PUT, &format!("/tenants/{}", self.tenant), Some(body), "make the tenant").await
    }

    /// The namespace's policies as Pulsar keeps them; what is not set is null or missing.
    pub async fn policies(&self) -> Result<Option<Value>, Error> {
        self.read(&format!("/namespaces/{}", self.namespace()), "read the namespace's policies").await
    }

    pub async fn create_namespace(&self) -> Result<(), Error> {
        self.write(Method::PUT, &format!("/namespaces/{}", self.namespace()), None, "make the namespace").await
    }

    /// Sets a policy of the namespace: `POST …/NAME`.
    pub async fn set_policy(&self, name: &str, body: Value) -> Result<(), Error> {
        let path = format!("/namespaces/{}/{name}", self.namespace());
        self.write(Method::POST, &path, Some(body), "set a policy of the namespace").await
    }

    fn topic(&self, topic: &str) -> String {
        format!("/persistent/{}/{topic}", self.namespace())
    }

    /// Names without `persistent://tenant/namespace/`: topics, and partitions (`…-partition-0`).
    pub async fn topics(&self) -> Result<Vec<String>, Error> {
        let path = format!("/persistent/{}", self.namespace());
        self.short(self.read(&path, "list the topics").await?)
    }

    pub async fn partitioned_topics(&self) -> Result<Vec<String>, Error> {
        let path = format!("/persistent/{}/partitioned", self.namespace());
        self.short(self.read(&path, "list the partitioned topics").await?)
    }

    fn short(&self, names: Option<Value>) -> Result<Vec<String>, Error> {
        let prefix = format!("persistent://{}/", self.namespace());
        let names = Self::names(names).unwrap_or_default();
        Ok(names.iter().filter_map(|name| name.strip_prefix(&prefix)).map(str::to_owned).collect())
    }

    /// 0 for a topic without partitions, and for one that does not exist.
    pub async fn partitions(&self, topic: &str) -> Result<u32, Error> {
        let value = self.read(&format!("{}/partitions", self.topic(topic)), "read the partitions").await?;
        Ok(value.and_then(|v| serde_json::from_value::<Partitions>(v).ok()).map_or(0, |p| p.partitions))
    }

    pub async fn create_topic(&self, topic: &str, partitions: u32) -> Result<(), Error> {
        let doing = format!("make topic {topic}");
        if partitions == 0 {
            return self.write(Method::PUT, &self.topic(topic), None, &doing).await;
        }
        let path = format!("{}/partitions", self.topic(topic));
        self.write(Method::PUT, &path, Some(partitions.into()), &doing).await
    }

    pub async fn grow(&self, topic: &str, partitions: u32) -> Result<(), Error> {
        let path = format!("{}/partitions", self.topic(topic));
        self.write(Method::POST, &path, Some(partitions.into()), &format!("add partitions to {topic}")).await
    }

    /// Those that a topic has in each of its partitions: Pulsar's own list names one that any partition has, and stores
    /// nothing in the others. `None` when the topic, or one of its partitions, does not exist.
    pub async fn subscriptions(&self, topic: &str) -> Result<Option<Vec<String>>, Error> {
        let partitions = self.partitions(topic).await?;
        if partitions == 0 {
            return self.subscriptions_of(topic).await;
        }
        let names =
            (0..partitions).map(|n| async move { self.subscriptions_of(&format!("{topic}-partition-{n}")).await });
        let mut each = futures_util::stream::iter(names).buffered(PARTITIONS);
        let mut all: Option<Vec<String>> = None;
        while let Some(found) = each.next().await {
            let Some(found) = found? else { return Ok(None) };
            match &mut all {
                None => all = Some(found),
                Some(all) => all.retain(|name| found.contains(name)),
            }
        }
        Ok(all)
    }

    async fn subscriptions_of(&self, topic: &str) -> Result<Option<Vec<String>>, Error> {
        let path = format!("{}/subscriptions", self.topic(topic));
        let value = self.read(&path, &format!("list the subscriptions of {topic}")).await?;
        Ok(value.map(|value| Self::names(Some(value)).unwrap_or_default()))
    }

    /// In every partition; where it is already, nothing changes.
    pub async fn create_subscription(&self, topic: &str, subscription: &str) -> Result<(), Error> {
        let path = format!("{}/subscription/{subscription}", self.topic(topic));
        let body = serde_json::to_value(EARLIEST).expect("plain data");
        self.write(Method::PUT, &path, Some(body), &format!("make a subscription of {topic}")).await
    }

    /// Of a topic without partitions, or of one partition.
    pub async fn stats(&self, topic: &str) -> Result<Option<Stats>, Error> {
        let path = format!("{}/stats?getPreciseBacklog=true&getEarliestTimeInBacklog=true", self.topic(topic));
        let value = self.read(&path, &format!("read the statistics of {topic}")).await?;
        Ok(value.and_then(|value| serde_json::from_value(value).ok()))
    }

    /// Entries that Pulsar stores for a topic or partition, acknowledged ones included. A batch is one entry.
    pub async fn entries(&self, topic: &str) -> Result<u64, Error> {
        let path = format!("{}/internalStats", self.topic(topic));
        let value = self.read(&path, &format!("read the statistics of {topic}")).await?;
        Ok(value.and_then(|v| serde_json::from_value::<InternalStats>(v).ok()).unwrap_or_default().number_of_entries)
    }

    /// A policy as it applies to a topic, whoever set it (topic, namespace or broker).
    pub async fn applied(&self, topic: &str, policy: &str) -> Result<Option<Value>, Error> {
        self.read(&format!("{}/{policy}?applied=true", self.topic(topic)), &format!("read {policy} of {topic}")).await
    }

    /// A setting of the answering broker, where our role may see it.
    pub async fn broker_setting(&self, name: &str) -> Option<String> {
        let settings = self.read("/brokers/configuration/runtime", "read the broker's settings").await.ok()??;
        settings.get(name)?.as_str().map(str::to_owned)
    }
}
