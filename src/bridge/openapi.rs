//! The OpenAPI 3.1 document, generated from the handlers and their types.
//!
//! What every operation shares (problem documents, `Retry-After`, the bearer token) is added in one place, so that no
//! handler can forget it. `make test-real` fuzzes the running server against this document.

use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::openapi::schema::{Schema, SchemaType};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{self, ContentBuilder, HeaderBuilder, Ref, RefOr, ResponseBuilder};
use utoipa::{OpenApi, ToSchema};

use super::respond::{Document, Kind};
use super::routes::json;
use super::{Bridge, batch, dead_letters, executions, external, publish, request};
use crate::clock::Timestamp;
use crate::ids::{ErrorClass, ExecutionId, OrderingKey, Tenant, Topic, Workflow};

/// An event to publish.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Publish, example = json!({"workflow": "crm-sync", "tenant_id": "default", "payload": {"customer": 4711}}))]
pub struct PublishRequest {
    /// The workflow that the event is for; routes look at it. This or `topic` is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workflow: Option<Workflow>,
    /// A topic instead of a workflow; a route must lead to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topic: Option<Topic>,
    /// Whose event it is. Declared in the configuration and granted to the account, else 403.
    pub tenant_id: Tenant,
    /// Any JSON value. Delivered byte for byte.
    pub payload: serde_json::Value,
    /// A UUID of the caller's own. The same id with the same payload is a duplicate, with another one 409.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub execution_id: Option<ExecutionId>,
    /// Events with the same key are delivered one after the other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ordering_key: Option<OrderingKey>,
    /// Not before this time (RFC 3339), at most `bridge.delay_max` ahead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deliver_at: Option<Timestamp>,
    /// 0 (first) to 9 (last); 5 when not given.
    #[schema(value_type = Option<u8>, minimum = 0, maximum = 9)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<request::Whole>,
    /// Texts that travel with the event; routes can look at them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<request::Metadata>,
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
    components(schemas(Document, ErrorClass, Topic, OrderingKey, request::Limit, request::Wait)),
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
    needs_workflow_or_topic(components);
    no_empty_batch(&mut api.paths);
    for (path, item) in &mut api.paths.paths {
        let methods = [(&mut item.get, false), (&mut item.post, true), (&mut item.delete, false)];
        for (operation, post) in methods {
            if let Some(operation) = operation {
                for parameter in operation.parameters.iter_mut().flatten() {
                    never_null(parameter);
                }
                share(path, post, operation);
            }
        }
    }
    api
}

/// A header or a part of a query is left out or a text; there is no null to send.
fn never_null(parameter: &mut RefOr<openapi::path::Parameter>) {
    if let RefOr::T(parameter) = parameter
        && let Some(RefOr::T(Schema::Object(object))) = &mut parameter.schema
        && let SchemaType::Array(types) = &mut object.schema_type
    {
        types.retain(|t| *t != openapi::Type::Null);
        if let [only] = types.as_slice() {
            object.schema_type = SchemaType::Type(only.clone());
        }
    }
}

/// A batch has at least one item.
fn no_empty_batch(paths: &mut openapi::Paths) {
    let batch = paths.paths.get_mut("/pulsar/publish/batch").and_then(|item| item.post.as_mut());
    if let Some(RefOr::T(body)) = batch.and_then(|operation| operation.request_body.as_mut())
        && let Some(RefOr::T(content)) = body.content.get_mut("application/json")
        && let Some(RefOr::T(Schema::Array(array))) = &mut content.schema
    {
        array.min_items = Some(1);
    }
}

/// Of its two optional fields a publish needs one, and `null` is none.
fn needs_workflow_or_topic(components: &mut openapi::Components) {
    let Some(RefOr::T(publish)) = components.schemas.remove("Publish") else { return };
    let either = ["workflow", "topic"].map(|name| {
        let text = openapi::ObjectBuilder::new().schema_type(openapi::Type::String);
        openapi::ObjectBuilder::new().property(name, text).required(name)
    });
    let either = either.into_iter().fold(openapi::schema::AnyOfBuilder::new(), |any, one| any.item(one));
    let both = openapi::schema::AllOfBuilder::new().item(publish).item(Schema::AnyOf(either.build()));
    components.schemas.insert("Publish".into(), RefOr::T(both.build().into()));
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
        let schemas = &api["components"]["schemas"];
        assert_eq!(schemas["Metadata"]["maxProperties"], request::METADATA_MAX as u64);
        let event = &schemas["Publish"]["allOf"][0]["properties"];
        assert_eq!(event["priority"]["maximum"], request::PRIORITY_MAX);
        let key = &api["paths"]["/pulsar/publish"]["post"]["parameters"][0]["schema"];
        assert_eq!((&key["type"], &key["maxLength"]), (&"string".into(), &request::KEY_MAX.into()));
        let batch = &api["paths"]["/pulsar/publish/batch"]["post"]["requestBody"]["content"]["application/json"];
        assert_eq!(batch["schema"]["minItems"], 1);
        let took = &schemas["ResultRequest"]["properties"]["duration_ms"]["maximum"];
        assert_eq!(*took, external::DURATION_MAX_MS);
    }

    /// Whatever the document points to is there.
    #[test]
    fn every_reference_leads_somewhere() {
        fn walk(value: &serde_json::Value, found: &mut Vec<String>) {
            match value {
                serde_json::Value::Object(map) => {
                    found.extend(map.get("$ref").and_then(|r| r.as_str()).map(str::to_owned));
                    map.values().for_each(|v| walk(v, found));
                }
                serde_json::Value::Array(items) => items.iter().for_each(|v| walk(v, found)),
                _ => {}
            }
        }
        let api = serde_json::to_value(document()).unwrap();
        let mut found = Vec::new();
        walk(&api, &mut found);
        assert!(!found.is_empty());
        for reference in found {
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(api.pointer(pointer).is_some(), "{reference}");
        }
    }
}
