//! The receiver that stands in for n8n: answers 200 at once and remembers what it has seen.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::event;
use crate::summary::Latencies;

/// What has arrived.
#[derive(Clone, Default)]
pub struct Seen(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    requests: u64,
    /// Events by their number, with the time of their first delivery.
    first: HashMap<u64, Instant>,
    ids: HashSet<Bytes>,
    without_id: u64,
    without_number: u64,
}

impl Seen {
    fn note(&self, id: Option<&[u8]>, body: &[u8]) {
        let mut inner = self.0.lock().expect("nobody panics while holding it");
        inner.requests += 1;
        match id {
            Some(id) if !inner.ids.contains(id) => drop(inner.ids.insert(Bytes::copy_from_slice(id))),
            Some(_) => {}
            None => inner.without_id += 1,
        }
        match event::number(body) {
            Some(number) => drop(inner.first.entry(number).or_insert_with(Instant::now)),
            None => inner.without_number += 1,
        }
    }

    /// Events that have arrived at least once.
    pub fn distinct(&self) -> u64 {
        self.0.lock().expect("nobody panics while holding it").first.len() as u64
    }

    fn json(&self) -> serde_json::Value {
        let inner = self.0.lock().expect("nobody panics while holding it");
        serde_json::json!({
            "requests": inner.requests,
            "distinct": inner.first.len(),
            "distinct_webhook_ids": inner.ids.len(),
            "without_webhook_id": inner.without_id,
            "without_number": inner.without_number,
        })
    }

    /// Adds the way from `begin` to the last distinct delivery, and what went wrong on it, to `result`.
    pub fn report(&self, begin: Instant, sent: &BTreeMap<u64, Instant>, result: &mut serde_json::Value) {
        let mut latencies = Latencies::default();
        {
            let inner = self.0.lock().expect("nobody panics while holding it");
            let last = inner.first.values().max().map_or(0.0, |last| (*last - begin).as_secs_f64());
            result["delivered"] = inner.first.len().into();
            result["delivered_seconds"] = last.into();
            result["delivered_per_second"] = (inner.first.len() as f64 / last.max(1e-9)).into();
            result["duplicates"] = (inner.requests - inner.first.len() as u64 - inner.without_number).into();
            result["lost"] = sent.keys().filter(|n| !inner.first.contains_key(n)).count().into();
            for (number, sent) in sent {
                if let Some(arrived) = inner.first.get(number) {
                    latencies.add(arrived.saturating_duration_since(*sent));
                }
            }
        }
        latencies.write("delivery_", result);
        result["receiver"] = self.json();
    }
}

/// Runs until the process ends.
pub async fn serve(address: SocketAddr, seen: Seen) -> std::io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let seen = seen.clone();
        let service = hyper::service::service_fn(move |request| answer(request, seen.clone()));
        connections.spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        while connections.try_join_next().is_some() {}
    }
}

async fn answer(request: Request<Incoming>, seen: Seen) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.method() == Method::GET {
        return Ok(Response::new(Full::new(Bytes::from(seen.json().to_string()))));
    }
    let (head, body) = request.into_parts();
    // A body that breaks off was not delivered: its sender sees no answer.
    if let Ok(body) = body.collect().await {
        seen.note(head.headers.get("webhook-id").map(http::HeaderValue::as_bytes), &body.to_bytes());
    }
    Ok(Response::new(Full::new(Bytes::from_static(b"{\"message\":\"Workflow was started\"}"))))
}
