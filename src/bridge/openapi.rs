//! The OpenAPI 3.1 document, generated from the handlers and their types.
//!
//! What every operation shares (problem documents, `Retry-After`, the bearer token) is added in one place, so that no
//! handler can forget it. `make test-real` fuzzes the running server against this document.

use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{self, ContentBuilder, HeaderBuilder, Ref, RefOr, ResponseBuilder};
use utoipa::{OpenApi, ToSchema};

use super::respond::{Document, Kind};
use super::routes::json;
use super::{Bridge, batch, dead_letters, executions, external, publish, request};

/// An event to publish.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Publish, example = json!({"workflow": "crm-sync", "tenant_id": "default", "payload": {"customer": 4711}}))]
pub struct PublishRequest {
    /// The workflow that the event is for; routes look at it. This or `topic` is needed.
    #[schema(min_length = 1, max_length = 200, pattern = r"^[^\u0000-\u001f\u007f-\u009f]+$")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workflow: Option<String>,
    /// A topic instead of a workflow; a route must lead to it.
    #[schema(min_length = 1, max_length = 200, pattern = "^[a-z0-9][a-z0-9._-]*$")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topic: Option<String>,
    /// Whose event it is. Declared in the configuration and granted to the account, else 403.
    #[schema(pattern = "^[a-z0-9][a-z0-9-]{0,62}$", example = "default")]
    pub tenant_id: String,
    /// Any JSON value. Delivered byte for byte.
    pub payload: serde_json::Value,
    /// A UUID of the caller's own. The same id with the same payload is a duplicate, with another one 409.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub execution_id: Option<uuid::Uuid>,
    /// Events with the same key are delivered one after the other.
    #[schema(min_length = 1, max_length = 200, pattern = r"^[^\u0000-\u001f\u007f-\u009f]+$")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ordering_key: Option<String>,
    /// Not before this time (RFC 3339), at most `bridge.delay_max` ahead.
    #[schema(format = DateTime, example = "2026-11-24T08:00:00Z")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deliver_at: Option<String>,
    /// 0 (first) to 9 (last); 5 when not given.
    #[schema(minimum = 0, maximum = 9)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u8>,
    /// Texts that travel with the event; routes can look at them. At most 32.
    #[schema(schema_with = metadata_schema)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<std::collections::BTreeMap<String, String>>,
}

fn metadata_schema() -> openapi::Object {
    let value = openapi::ObjectBuilder::new()
        .schema_type(openapi::Type::String)
        .max_length(Some(request::METADATA_VALUE_MAX / 4));
    openapi::ObjectBuilder::new()
        .schema_type(openapi::Type::Object)
        .additional_properties(Some(openapi::Schema::Object(value.build())))
        .max_properties(Some(request::METADATA_MAX))
        .build()
}

/// The route that took an event, and why.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RouteTaken {
    pub name: String,
    /// `short`, `long`, `ai` or `analytics`.
    pub class: String,
    #[schema(example = "workflow \"crm-sync\" matches \"crm-*\"")]
    pub reason: String,
}

/// The event is durable.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Accepted {
    pub execution_id: uuid::Uuid,
    pub topic: String,
    pub route: RouteTaken,
    /// `disk`: in the outbox of this host. `broker`: the broker has it as well.
    pub durability: String,
    /// The event was accepted before; this request added nothing.
    pub duplicate: bool,
}

/// What became of one item: `accepted` or `problem`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ItemResult {
    /// 202, or the status that the item alone would have got.
    pub status: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted: Option<Accepted>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Document>,
}

/// What became of a batch, item by item in its order.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct BatchResult {
    pub accepted: u64,
    pub refused: u64,
    pub results: Vec<ItemResult>,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "dealscale bridge",
        description = "Hands events to n8n, durably. 202 means: it is on disk and will run.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    paths(
        publish::publish,
        batch::publish_batch,
        executions::list,
        executions::show,
        executions::cancel,
        executions::wait,
        dead_letters::list,
        dead_letters::rejected,
        dead_letters::show,
        dead_letters::replay,
        dead_letters::replay_many,
        dead_letters::replay_status,
        dead_letters::discard,
        external::keys,
        external::payload,
        external::result,
    ),
    components(schemas(Document)),
    security(("token" = []))
)]
struct Api;

/// The document.
pub fn document() -> openapi::OpenApi {
    let mut api = Api::openapi();
    let components = api.components.get_or_insert_with(Default::default);
    let bearer = |what: &str| {
        SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some(what)).build())
    };
    components.add_security_scheme("token", bearer("A service account's token, or a JWT of a configured issuer"));
    components.add_security_scheme("reference", bearer("The signed reference that came through Pulsar"));
    for (path, item) in &mut api.paths.paths {
        let methods = [(&mut item.get, false), (&mut item.post, true), (&mut item.delete, false)];
        for (operation, post) in methods {
            if let Some(operation) = operation {
                share(path, post, operation);
            }
        }
    }
    api
}

/// What every operation may answer, and what only some do.
fn share(path: &str, post: bool, operation: &mut openapi::path::Operation) {
    let open = operation.security.as_ref().is_some_and(|s| s.contains(&SecurityRequirement::default()));
    let publishes = path.starts_with("/pulsar/");
    let with_body = post && operation.request_body.is_some();
    let shared = Kind::ALL.into_iter().filter(|kind| match kind {
        Kind::MethodNotAllowed | Kind::GatewayTimeout | Kind::BadGateway if !publishes => false,
        Kind::MethodNotAllowed | Kind::Conflict | Kind::KeyReused => false,
        Kind::Internal => true,
        Kind::GatewayTimeout | Kind::BadGateway => path == "/pulsar/publish",
        Kind::RequestTimeout | Kind::TooLarge | Kind::UnsupportedMediaType => with_body,
        Kind::NotFound => path.contains('{'),
        _ => !open,
    });
    let mut by_status: std::collections::BTreeMap<u16, Vec<Kind>> = Default::default();
    for kind in shared {
        by_status.entry(kind.status().as_u16()).or_default().push(kind);
    }
    for (status, kinds) in by_status {
        let titles: Vec<_> = kinds.iter().map(|k| k.title()).collect();
        let responses = &mut operation.responses.responses;
        responses
            .entry(status.to_string())
            .or_insert_with(|| RefOr::T(ResponseBuilder::new().description(titles.join("; or ")).build()));
    }
    for (status, response) in &mut operation.responses.responses {
        let RefOr::T(response) = response else { continue };
        if status.as_str() < "400" {
            continue;
        }
        response
            .content
            .entry("application/problem+json".into())
            .or_insert_with(|| ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).build().into());
        if matches!(status.as_str(), "429" | "503") {
            let seconds = openapi::ObjectBuilder::new().schema_type(openapi::Type::Integer).build();
            let header = HeaderBuilder::new().schema(Some(seconds)).description(Some("Seconds to wait")).build();
            response.headers.entry("Retry-After".into()).or_insert(header.into());
        }
    }
}

/// `GET /openapi.json`
pub async fn show(State(_): State<Bridge>) -> axum::response::Response {
    static DOCUMENT: std::sync::LazyLock<openapi::OpenApi> = std::sync::LazyLock::new(document);
    json(StatusCode::OK, &*DOCUMENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_says_what_every_operation_may_refuse() {
        let api = serde_json::to_value(document()).unwrap();
        assert!(api["openapi"].as_str().unwrap().starts_with("3.1"));
        let publish = &api["paths"]["/pulsar/publish"]["post"]["responses"];
        for status in ["202", "400", "401", "403", "409", "413", "415", "422", "429", "500", "503", "504"] {
            assert!(publish[status].is_object(), "{status}");
        }
        assert!(publish["503"]["headers"]["Retry-After"].is_object());
        assert_eq!(
            publish["400"]["content"]["application/problem+json"]["schema"]["$ref"],
            "#/components/schemas/Problem"
        );
        let max = request::METADATA_MAX as u64;
        assert_eq!(api["components"]["schemas"]["Publish"]["properties"]["metadata"]["maxProperties"], max);
    }
}
