//! Paths to handlers, and what all of them share: reading bodies, paths and queries, who is asking.

use std::net::IpAddr;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Query, Request};
use axum::http::request::Parts as Head;
use axum::http::{HeaderValue, Method, Response, StatusCode, Uri, header};
use axum::response::IntoResponse;
use axum::routing::{delete, get, post};
use axum::{Extension, Json, Router};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tower_http::catch_panic::CatchPanicLayer;

use super::auth::Caller;
use super::respond::{Kind, Problem};
use super::serve::Peer;
use super::{Bridge, Live, Room, batch, dead_letters, executions, external, openapi, publish};
use crate::ids::{Environment, ExecutionId};
use crate::units::Bytes as Size;

/// The right to everything, on the operators' socket.
#[derive(Clone, Copy, Debug)]
struct Operator;

/// The API for callers with credentials.
pub fn public(bridge: Bridge) -> Router {
    api().layer(CatchPanicLayer::custom(panicked)).with_state(bridge)
}

/// The same API with all rights and without credentials, for a socket whose file mode decides who may. The header
/// `X-Dealscale-Environment` names the environment where there are several.
///
/// Has no answer of its own for unknown paths, so that other routers can be merged with it.
pub fn operator(bridge: Bridge) -> Router {
    paths().layer(Extension(Operator)).layer(CatchPanicLayer::custom(panicked)).with_state(bridge)
}

fn api() -> Router<Bridge> {
    paths()
        .route("/", get(hint))
        .route("/openapi.json", get(openapi::show))
        .route("/.well-known/jwks.json", get(external::keys))
        .fallback(unknown_path)
        .method_not_allowed_fallback(unknown_method)
}

fn paths() -> Router<Bridge> {
    Router::new()
        .route("/pulsar/publish", post(publish::publish))
        .route("/pulsar/publish/batch", post(batch::publish_batch))
        .route("/executions", get(executions::list))
        .route("/executions/{id}", get(executions::show).delete(executions::cancel))
        .route("/executions/{id}/wait", get(executions::wait))
        .route("/executions/{id}/payload", get(external::payload))
        .route("/executions/{id}/result", post(external::result))
        .route("/dead-letters", get(dead_letters::list))
        .route("/dead-letters/rejected", get(dead_letters::rejected))
        .route("/dead-letters/replay", post(dead_letters::replay_many))
        .route("/dead-letters/replays/{job}", get(dead_letters::replay_status))
        .route("/dead-letters/{id}", delete(dead_letters::discard).get(dead_letters::show))
        .route("/dead-letters/{id}/replay", post(dead_letters::replay))
}

async fn hint() -> impl IntoResponse {
    Json(serde_json::json!({
        "service": "dealscale bridge",
        "publish": "POST /pulsar/publish",
        "openapi": "/openapi.json",
    }))
}

async fn unknown_path(uri: Uri) -> Response<Body> {
    Problem::new(Kind::NotFound, "no such path; /openapi.json lists them").answer(uri.path())
}

/// axum adds `Allow` with the methods that the path knows.
async fn unknown_method(method: Method, uri: Uri) -> Response<Body> {
    if method == Method::OPTIONS {
        return StatusCode::NO_CONTENT.into_response();
    }
    Problem::new(Kind::MethodNotAllowed, "see the header Allow").answer(uri.path())
}

fn panicked(_cause: Box<dyn std::any::Any + Send>) -> Response<Body> {
    // The panic hook has logged where and why.
    let mut response = Problem::new(Kind::Internal, "the request hit a defect; it was logged").answer("");
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// What a handler needs of a request before it reads the body.
pub(super) struct Asked {
    pub live: Arc<Live>,
    pub caller: Arc<Caller>,
    pub room: Room,
}

/// A right, as handlers ask for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Right {
    Publish,
    Read,
    Operate,
}

impl Bridge {
    /// Who is asking, and for which environment.
    pub(super) async fn asked(&self, head: &Head, right: Right) -> Result<Asked, Problem> {
        let live = self.live();
        if head.headers.get_all(header::HOST).iter().nth(1).is_some() {
            return Err(Problem::malformed("Host is given twice"));
        }
        let caller = if head.extensions.get::<Operator>().is_some() {
            self.operator_of(&live, head)?
        } else {
            self.0.auth.caller(&live.accounts, &head.headers, address(head)).await?
        };
        let granted = caller.grant.rights;
        let (has, word) = match right {
            Right::Publish => (granted.publish, "publish"),
            Right::Read => (granted.read || granted.operate, "read"),
            Right::Operate => (granted.operate, "operate"),
        };
        if !has {
            return Err(Problem::new(Kind::Forbidden, format!("the account lacks the right {word:?}")));
        }
        let room = self.room(&live, &caller.grant.environment)?;
        Ok(Asked { live, caller, room })
    }

    fn operator_of(&self, live: &Live, head: &Head) -> Result<Arc<Caller>, Problem> {
        let named = head.headers.get("x-dealscale-environment").and_then(|v| v.to_str().ok());
        let environment = match named {
            Some(name) => Environment::try_new(name).ok().filter(|e| live.environments.contains_key(e)),
            None if live.environments.len() == 1 => live.environments.keys().next().cloned(),
            None => None,
        };
        let environment = environment
            .ok_or_else(|| Problem::new(Kind::NotFound, "say which environment in X-Dealscale-Environment"))?;
        Ok(Arc::new(Caller::operator(environment)))
    }
}

/// The caller's address, `None` on the operators' socket.
pub(super) fn address(head: &Head) -> Option<IpAddr> {
    head.extensions.get::<Peer>().map(|p| p.0.ip().to_canonical())
}

/// Reads a whole body.
///
/// # Errors
/// 413 over `max` bytes, 408 when it does not arrive within `timeout`, 400 when the connection breaks.
pub(super) async fn body(request: Body, head: &Head, max: Size, live: &Live) -> Result<Bytes, Problem> {
    let large = || Problem::new(Kind::TooLarge, format!("the body is larger than {max}"));
    // What is announced too large is refused before it is sent.
    let announced = head.headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|n| n > max.0) {
        return Err(large());
    }
    let read = Limited::new(request, max.as_usize()).collect();
    match tokio::time::timeout(live.bridge.body_timeout.0, read).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(large()),
        Ok(Err(_)) => Err(Problem::malformed("the body broke off")),
        Err(_) => {
            let detail = format!("the body did not arrive within {}", live.bridge.body_timeout);
            Err(Problem::new(Kind::RequestTimeout, detail))
        }
    }
}

/// A small JSON body (commands, results).
pub(super) const SMALL: Size = Size::kib(64);

/// The media type of a request with a body, without parameters, in lower case.
pub(super) fn media_type(head: &Head) -> Option<String> {
    let value = head.headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
}

/// # Errors
/// 415 for anything but JSON, and for compressed bodies.
pub(super) fn expect_json(head: &Head) -> Result<(), Problem> {
    expect_plain(head)?;
    match media_type(head) {
        Some(kind) if kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json")) => {
            Ok(())
        }
        _ => Err(Problem::new(Kind::UnsupportedMediaType, "expected content-type: application/json")),
    }
}

/// # Errors
/// 415 for compressed bodies: their real size is unknown until it is too late.
pub(super) fn expect_plain(head: &Head) -> Result<(), Problem> {
    match head.headers.get(header::CONTENT_ENCODING).map(HeaderValue::as_bytes) {
        None | Some(b"identity" | b"") => Ok(()),
        Some(_) => Err(Problem::new(Kind::UnsupportedMediaType, "compressed bodies are not taken")),
    }
}

/// The `{id}` of a path. What is no UUID is no execution either.
pub(super) async fn id(head: &mut Head) -> Result<ExecutionId, Problem> {
    segment(head).await.and_then(|text| text.parse().ok()).ok_or_else(Problem::no_execution)
}

/// The one variable part of a path.
pub(super) async fn segment(head: &mut Head) -> Option<String> {
    use axum::extract::FromRequestParts;
    Path::<String>::from_request_parts(head, &()).await.ok().map(|path| path.0)
}

/// The query of a request, strictly: known names once each.
pub(super) struct Asking(Vec<(String, String)>);

impl Asking {
    /// # Errors
    /// 400 for a name that is not one of `known`, or that comes twice.
    pub fn read(uri: &Uri, known: &[&str]) -> Result<Self, Problem> {
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(uri)
            .map_err(|_| Problem::malformed("the query cannot be read"))?;
        for (n, (name, _)) in pairs.iter().enumerate() {
            if !known.contains(&name.as_str()) {
                let shown: String = name.chars().filter(|c| !c.is_control()).take(64).collect();
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                return Err(Problem::malformed(format!("unknown query parameter {shown:?}; known are {known}")));
            }
            if pairs[..n].iter().any(|(other, _)| other == name) {
                return Err(Problem::malformed(format!("query parameter {name} is given twice")));
            }
        }
        Ok(Self(pairs))
    }

    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// # Errors
    /// 400 with the parameter's name and rule.
    pub fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(&self, name: &str) -> Result<Option<T>, Problem> {
        self.text(name)
            .map(|text| text.parse::<T>().map_err(|e| Problem::malformed(format!("query parameter {name}: {e}"))))
            .transpose()
    }
}

/// Runs a handler's body and turns its refusal into the answer for the request's own path.
pub(super) async fn answer<F>(request: Request, run: impl FnOnce(Head, Body) -> F) -> Response<Body>
where
    F: Future<Output = Result<Response<Body>, Problem>>,
{
    let (head, body) = request.into_parts();
    let uri = head.uri.clone();
    match run(head, body).await {
        Ok(response) => response,
        Err(problem) => problem.answer(uri.path()),
    }
}

/// A JSON answer.
pub(super) fn json<T: serde::Serialize>(status: StatusCode, value: &T) -> Response<Body> {
    (status, Json(value)).into_response()
}
