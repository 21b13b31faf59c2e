//! A real n8n: the shipped templates, imported through its API, and what the appliance knows about their executions.
//!
//! The templates name one bridge, so all tests share its port and run one after the other.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::support::{Answer, Appliance, attempts, eventually, http, variable};

const MINUTE: Duration = Duration::from_secs(60);

/// n8n with the templates, and an appliance in front of it; alone until it is dropped.
struct World {
    appliance: Appliance,
    n8n: String,
    key: String,
    workflows: Value,
    _dir: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl World {
    fn new() -> Self {
        Self::with("")
    }

    /// The same with more configuration.
    fn with(more: &str) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        // A failed test must not fail the others.
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let state = set_up();
        let n8n = format!("http://127.0.0.1:{}", variable("N8N_PORT"));
        let dir = tempfile::tempdir().unwrap();
        let appliance = Appliance::start(dir.path(), bridge_port(), &(config(&n8n, state) + more));
        let read = |name: &str| std::fs::read_to_string(state.join(name)).unwrap();
        Self {
            appliance,
            n8n,
            key: read("api-key"),
            workflows: serde_json::from_str(&read("workflows.json")).unwrap(),
            _dir: dir,
            _alone: alone,
        }
    }

    /// Calls a webhook of n8n as its users do.
    fn webhook(&self, path: &str, headers: &[(&str, &str)], body: &Value) -> Answer {
        http(&format!("{}/webhook/{path}", self.n8n), headers, Some(body)).unwrap()
    }

    fn api(&self, path: &str) -> Value {
        let answer = http(&format!("{}/api/v1{path}", self.n8n), &[("X-N8N-API-KEY", &self.key)], None).unwrap();
        assert_eq!(answer.status, 200, "{path}: {}", answer.text);
        answer.json
    }

    /// n8n's execution with everything that went through it.
    fn execution(&self, id: &str) -> Value {
        self.api(&format!("/executions/{id}?includeData=true"))
    }

    /// n8n's executions of a workflow with this status, newest first.
    fn executions(&self, workflow: &str, status: &str) -> Vec<Value> {
        let id = self.workflows[workflow].as_str().unwrap_or_else(|| panic!("{workflow} is not imported"));
        let page = self.api(&format!("/executions?workflowId={id}&status={status}&limit=100"));
        page["data"].as_array().unwrap().clone()
    }
}

pub fn bridge_port() -> u16 {
    variable("DEALSCALE_TEST_BRIDGE_PORT").parse().unwrap()
}

/// The servers' scripts know how n8n is started, stopped and set up.
pub fn n8n_sh(arguments: &[&str]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/real/servers/n8n.sh");
    let output = Command::new(script).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "n8n.sh {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The script of the OAuth2 server; what it prints.
fn oidc(arguments: &[&str], environment: &[(&str, &str)]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/real/servers/oidc.sh");
    let output = Command::new(script).args(arguments).envs(environment.iter().copied()).output().unwrap();
    assert!(output.status.success(), "oidc.sh {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Imports the templates and the workflows of these tests, once. Returns n8n's state folder.
pub fn set_up() -> &'static PathBuf {
    static STATE: OnceLock<PathBuf> = OnceLock::new();
    STATE.get_or_init(|| {
        let state = PathBuf::from(variable("N8N_STATE"));
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let text = |path: &Path| path.display().to_string();
        let file = |name: &str, content: &str| {
            let path = state.join(name);
            std::fs::write(&path, content).unwrap();
            text(&path)
        };
        let credentials = json!([
            { "name": "test basic", "type": "httpBasicAuth", "data": { "user": "dealscale", "password": SECRET } },
            { "name": "test jwt", "type": "jwtAuth",
              "data": { "keyType": "passphrase", "secret": SECRET, "algorithm": "HS256" } },
        ]);
        n8n_sh(&[
            "setup",
            "--bridge",
            &format!("http://127.0.0.1:{}", bridge_port()),
            "--bridge-token-file",
            &file("bridge-token", "a-token-that-only-these-tests-know"),
            "--webhook-secret-file",
            &file("webhook-secret", SECRET),
            "--credentials-file",
            &file("credentials.json", &credentials.to_string()),
            "--oauth-token-url",
            &format!("{}/token", variable("OIDC_ISSUER")),
            "--oauth-client-id",
            &variable("OIDC_CLIENT_ID"),
            "--oauth-client-secret-file",
            &file("oauth-secret", &variable("OIDC_CLIENT_SECRET")),
            "--oauth-scope",
            "publish",
            "--templates",
            &text(&root.join("appliance/n8n/templates")),
            "--templates",
            &text(&root.join("tests/real/n8n")),
        ]);
        state
    })
}

const SECRET: &str = "known-to-n8n-and-to-the-route";
/// Of the token that `set_up` gives to n8n.
const TOKEN_SHA256: &str = "7aa61efd5424e6d50e97d5ca98faf61eb241bda7f1785039b841b02ac4a752bb";

pub fn config(n8n: &str, state: &Path) -> String {
    format!(
        r#"
[accounts.n8n]
token_sha256 = ["{TOKEN_SHA256}"]

[environments.production.n8n]
url = "{n8n}"
api_key_file = "{state}/api-key"
database_file = "{state}/home/.n8n/database.sqlite"

[environments.production.delivery]
follow_interval = "200ms"
breaker_open = "1s"

[environments.production.tenants.default]
[environments.production.tenants.acme]

[environments.production.default_route]
retry = {{ min = "500ms", max = "2s", attempts_max = 60 }}

[[environments.production.routes]]
name = "short"
when = {{ workflow = "test-short" }}
class = "short"
webhook = "/webhook/test-short"

[[environments.production.routes]]
name = "example short"
when = {{ workflow = "example-short" }}
class = "short"
webhook = "/webhook/example-short-work"

[[environments.production.routes]]
name = "example long"
when = {{ workflow = "example-long" }}
webhook = "/webhook/example-long-work"

[[environments.production.routes]]
name = "per tenant"
when = {{ workflow = "example-tenant" }}
topic = "dealscale.workflow.long.{{tenant}}"
webhook = "/webhook/example-tenant-work"

[[environments.production.routes]]
name = "slow"
when = {{ workflow = "test-slow" }}
webhook = "/webhook/test-slow"
redeliver_crashed = true
retry = {{ min = "500ms", max = "2s", attempts_max = 60 }}

[[environments.production.routes]]
name = "failing"
when = {{ workflow = "test-failing" }}
webhook = "/webhook/test-failing"

[[environments.production.routes]]
name = "authenticated"
when = {{ workflow = "authenticated" }}
webhook = "/webhook/dealscale-receive-auth"
webhook_auth = {{ kind = "header", name = "X-Dealscale-Secret", secret = "{SECRET}" }}

[[environments.production.routes]]
name = "basic"
when = {{ workflow = "test-basic" }}
webhook = "/webhook/test-basic"
webhook_auth = {{ kind = "basic", user = "dealscale", secret = "{SECRET}" }}

[[environments.production.routes]]
name = "jwt"
when = {{ workflow = "test-jwt" }}
webhook = "/webhook/test-jwt"
webhook_auth = {{ kind = "jwt", secret = "{SECRET}" }}

[[environments.production.routes]]
name = "errors"
when = {{ workflow = "workflow-error" }}
class = "analytics"
webhook = "/webhook/dealscale-errors"
"#,
        state = state.display()
    )
}

#[test]
fn an_event_from_one_workflow_reaches_another_and_is_seen_to_succeed() {
    let world = World::new();
    let accepted = world.webhook("dealscale-publish", &[], &json!({ "workflow": "demo", "order": 4711 }));
    assert_eq!(accepted.status, 200, "{}", accepted.text);
    let id = accepted.json["execution_id"].as_str().expect("the publish template answers what the bridge said");

    let event = world.appliance.wait(id, MINUTE);
    assert_eq!(event["state"], "succeeded", "{event}");
    let attempts = attempts(&event);
    assert_eq!(attempts.len(), 1, "{event}");
    let run = attempts[0]["n8n_execution_id"].as_str().expect("the receiving execution is known");
    let run = world.execution(run);
    assert_eq!(run["status"], "success");
    assert_eq!(run["workflowId"], world.workflows["dealscale: receive"]);
    assert!(run["data"].to_string().contains("4711"), "the payload arrived");
    // Who published it travels along, for people and traces.
    assert!(event["source_execution"].is_string(), "{event}");
}

#[test]
fn each_example_does_what_its_note_says() {
    let world = World::new();
    let short = world.webhook("example-short", &[], &json!({ "numbers": [1, 2, 39] }));
    assert_eq!((short.status, &short.json["sum"]), (200, &json!(42)), "{}", short.text);

    let long = world.webhook("example-long", &[], &json!({ "seconds": 2 }));
    let event = world.appliance.wait(long.json["execution_id"].as_str().unwrap(), MINUTE);
    assert_eq!(event["state"], "succeeded", "{event}");

    let answer = world.webhook("example-tenant", &[], &json!({ "tenant": "acme" }));
    assert_eq!(answer.json["topic"], "dealscale.workflow.long.acme", "{}", answer.text);
    let id = answer.json["execution_id"].as_str().unwrap().to_owned();
    eventually("the tenant's event succeeds", MINUTE, || {
        let event = http(&format!("{}/executions/{id}?tenant=acme", world.appliance.url), &[], None).unwrap();
        (event.json["state"] == "succeeded").then_some(())
    });
}

#[test]
fn a_short_route_answers_with_n8n_s_own_answer() {
    let world = World::new();
    let body = json!({ "workflow": "test-short", "tenant_id": "default", "payload": { "question": "6 × 7" } });
    let answer = http(&format!("{}/pulsar/publish", world.appliance.url), &[], Some(&body)).unwrap();
    assert_eq!(answer.status, 201, "{}", answer.text);
    assert_eq!(answer.headers["x-from-n8n"], "yes");
    assert_eq!(answer.json["echo"]["question"], "6 × 7");
}

#[test]
fn a_duplicate_of_finished_work_is_not_done_again() {
    let world = World::new();
    let id = world.appliance.publish("demo", json!({ "once": true }));
    let event = world.appliance.wait(&id, MINUTE);
    assert_eq!(event["state"], "succeeded", "{event}");
    let first = attempts(&event)[0]["n8n_execution_id"].as_str().unwrap().to_owned();
    let data = world.execution(&first)["data"].clone();
    let webhook_id = data["resultData"]["runData"]["Webhook"][0]["data"]["main"][0][0]["json"]["headers"]["webhook-id"]
        .as_str()
        .expect("deliveries carry webhook-id")
        .to_owned();

    // The same delivery once more, as after an answer that got lost.
    let again = world.webhook(
        "pulsar-trigger",
        &[("webhook-id", &webhook_id), ("x-dealscale-tenant", "default")],
        &json!({ "once": true }),
    );
    assert_eq!((again.status, &again.json["duplicate"]), (200, &json!(true)), "{}", again.text);
    assert_eq!(again.json["doneBy"], first.as_str());
    let run = eventually("the second execution ends", MINUTE, || {
        let run = world.execution(again.json["executionId"].as_str().unwrap());
        (run["status"] == "success").then_some(run)
    });
    assert!(run["data"]["resultData"]["runData"]["Your work"].is_null(), "the work was done twice");
    // Another event is not one, and neither is the same id of another tenant.
    for headers in [
        [("webhook-id", "another"), ("x-dealscale-tenant", "default")],
        [("webhook-id", &*webhook_id), ("x-dealscale-tenant", "acme")],
    ] {
        let other = world.webhook("pulsar-trigger", &headers, &json!({}));
        assert_eq!(other.json["duplicate"], false, "{}", other.text);
    }
}

#[test]
fn a_forged_call_is_refused_by_n8n_and_the_appliance_s_is_not() {
    let world = World::new();
    for headers in [&[][..], &[("X-Dealscale-Secret", "a guess")][..]] {
        let forged = world.webhook("dealscale-receive-auth", headers, &json!({ "forged": true }));
        assert_eq!(forged.status, 403, "{}", forged.text);
    }
    let id = world.appliance.publish("authenticated", json!({ "forged": false }));
    let event = world.appliance.wait(&id, MINUTE);
    assert_eq!(event["state"], "succeeded", "{event}");
    for run in world.executions("dealscale: receive (authenticated)", "success") {
        let run = world.execution(run["id"].as_str().unwrap());
        assert!(!run["data"].to_string().contains(r#""forged":true"#), "a forged call ran");
    }
}

#[test]
fn basic_and_jwt_are_what_n8n_s_webhook_node_verifies() {
    let world = World::new();
    let basic = |pair: &str| format!("Basic {}", STANDARD.encode(pair));
    let jwt = |key: &str, age: i64| {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs() as i64;
        let claims = json!({ "iss": "dealscale", "iat": now - age, "exp": now - age + 60 });
        let key = jsonwebtoken::EncodingKey::from_secret(key.as_bytes());
        format!("Bearer {}", jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap())
    };
    // {"alg":"none","typ":"JWT"} . {"iss":"dealscale"} . nothing
    let unsigned = "Bearer eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.eyJpc3MiOiJkZWFsc2NhbGUifQ.".to_owned();
    for (kind, forged) in [
        ("basic", [None, Some(basic("dealscale:a guess")), Some(basic(&format!("another:{SECRET}")))].to_vec()),
        ("jwt", [None, Some(jwt("a guess", 0)), Some(jwt(SECRET, 3600)), Some(unsigned)].to_vec()),
    ] {
        for authorization in forged {
            let headers: Vec<_> = authorization.iter().map(|value| ("authorization", value.as_str())).collect();
            let answer = world.webhook(&format!("test-{kind}"), &headers, &json!({ "forged": true }));
            assert!(matches!(answer.status, 401 | 403), "{kind}: {authorization:?}: {} {}", answer.status, answer.text);
        }
        let id = world.appliance.publish(&format!("test-{kind}"), json!({ "forged": false }));
        let event = world.appliance.wait(&id, MINUTE);
        assert_eq!(event["state"], "succeeded", "{kind}: {event}");
        let ran = world.executions(&format!("test: receive ({kind})"), "success");
        assert_eq!(ran.len(), 1, "{kind}: only the appliance's call ran");
    }
}

#[test]
fn an_oauth2_service_account_publishes_and_its_expired_token_is_renewed() {
    /// The issuer with tokens that live some seconds; as before when it is dropped.
    struct ShortLived;
    impl Drop for ShortLived {
        fn drop(&mut self) {
            oidc(&["stop"], &[]);
            oidc(&["start"], &[]);
        }
    }
    let _short_lived = ShortLived;
    oidc(&["stop"], &[]);
    oidc(&["start"], &[("OIDC_TTL", "5")]);
    let world = World::with(&format!(
        "[oauth2.real]\nissuer = {:?}\naudience = {:?}\nalgorithms = [\"RS256\"]\ntenants_claim = \"tenants\"\n\
         rights_claim = \"scope\"\nleeway = \"0s\"\n",
        variable("OIDC_ISSUER"),
        variable("OIDC_AUDIENCE")
    ));
    let publish = |n: u32| {
        let answer = world.webhook("dealscale-publish-oauth2", &[], &json!({ "workflow": "demo", "n": n }));
        assert_eq!(answer.status, 200, "{}", answer.text);
        let id = answer.json["execution_id"].as_str().expect("the bridge's answer").to_owned();
        assert_eq!(world.appliance.wait(&id, MINUTE)["state"], "succeeded");
    };
    publish(1);
    // A token that was issued later than n8n's is refused as expired: so is n8n's, and it has to get another one.
    let witness = format!("Bearer {}", oidc(&["token", "publish"], &[]));
    let event = json!({ "workflow": "demo", "tenant_id": "default", "payload": {} });
    eventually("the token expires", MINUTE, || {
        let url = format!("{}/pulsar/publish", world.appliance.url);
        (http(&url, &[("authorization", &witness)], Some(&event)).unwrap().status == 401).then_some(())
    });
    publish(2);
}

#[test]
fn a_set_up_again_keeps_what_was_changed_in_n8n() {
    let world = World::new();
    let id = world.workflows["test: failing"].as_str().unwrap();
    let message = || {
        let nodes = world.api(&format!("/workflows/{id}"))["nodes"].clone();
        let node = nodes.as_array().unwrap().iter().find(|n| n["name"] == "Boom").unwrap().clone();
        node["parameters"]["errorMessage"].as_str().unwrap().to_owned()
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let again = |more: &[&str]| {
        let folder = root.join("tests/real/n8n").display().to_string();
        let bridge = format!("http://127.0.0.1:{}", bridge_port());
        n8n_sh(&[&["setup", "--bridge", &bridge, "--templates", &folder][..], more].concat());
        // Others need the list of all workflows.
        let list = Path::new(&variable("N8N_STATE")).join("workflows.json");
        std::fs::write(list, world.workflows.to_string()).unwrap();
    };
    let mut changed: Value =
        serde_json::from_str(&std::fs::read_to_string(root.join("tests/real/n8n/failing.json")).unwrap()).unwrap();
    let nodes = changed["nodes"].as_array_mut().unwrap();
    nodes.iter_mut().find(|n| n["name"] == "Boom").unwrap()["parameters"]["errorMessage"] =
        json!("the author's own words");
    let put = Command::new("curl")
        .args(["-fsS", "-o", "/dev/null", "-X", "PUT", "-H", "content-type: application/json", "-H"])
        .args([&format!("X-N8N-API-KEY: {}", world.key), "-d", &changed.to_string()])
        .arg(format!("{}/api/v1/workflows/{id}", world.n8n))
        .status();
    assert!(put.unwrap().success());

    again(&[]);
    assert_eq!(message(), "the author's own words");
    again(&["--overwrite"]);
    assert_eq!(message(), "boom on purpose");
    // What nobody changed is brought up to date without being asked for.
    again(&[]);
    assert_eq!(message(), "boom on purpose");
}

/// Answers each of `statuses` in turn, then the last one for ever. Returns its URL and when it was called.
fn flaky(statuses: &'static [u16]) -> (String, std::sync::Arc<Mutex<Vec<Instant>>>) {
    answering(statuses, String::new)
}

/// The same with a further header line, made at each answer.
fn answering(
    statuses: &'static [u16],
    header: impl Fn() -> String + Send + 'static,
) -> (String, std::sync::Arc<Mutex<Vec<Instant>>>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let calls = std::sync::Arc::new(Mutex::new(Vec::new()));
    let seen = calls.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            let (mut line, mut length) = (String::new(), 0);
            while stream.read_line(&mut line).unwrap() > 2 {
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
                line.clear();
            }
            stream.read_exact(&mut vec![0; length]).unwrap();
            let mut calls = seen.lock().unwrap();
            let status = statuses[calls.len().min(statuses.len() - 1)];
            calls.push(Instant::now());
            let answer =
                format!("HTTP/1.1 {status} X\r\n{}connection: close\r\ncontent-length: 2\r\n\r\n{{}}", header());
            stream.get_mut().write_all(answer.as_bytes()).unwrap();
        }
    });
    (url, calls)
}

#[test]
fn the_retry_template_backs_off_and_logs_each_attempt() {
    let world = World::new();
    let (url, calls) = flaky(&[503, 500, 200]);
    let request = json!({ "url": url, "attempts_max": 5, "wait_seconds": 1, "factor": 2 });
    let result = world.webhook("dealscale-retry", &[], &request).json;
    assert_eq!((&result["ok"], &result["status"]), (&json!(true), &json!(200)), "{result}");
    let logged = result["attempts"].as_array().unwrap();
    assert_eq!(logged.iter().map(|a| a["status"].as_u64().unwrap()).collect::<Vec<_>>(), [503, 500, 200]);
    let calls = calls.lock().unwrap();
    let waits: Vec<_> = calls.windows(2).map(|w| (w[1] - w[0]).as_secs_f64()).collect();
    // Half of each wait is random: 0.5 to 1 s, then 1 to 2 s; the nodes around it take their time as well.
    assert!(waits[0] >= 0.5 && waits[1] >= 1.0, "{waits:?}");

    // The attempts are rows of a data table, too.
    let tables = world.api("/data-tables");
    let table = tables["data"].as_array().unwrap().iter().find(|t| t["name"] == "dealscale_attempts").unwrap();
    let rows = world.api(&format!("/data-tables/{}/rows?limit=250", table["id"].as_str().unwrap()));
    let ours = rows["data"].as_array().unwrap().iter().filter(|r| r["url"] == url.as_str()).count();
    assert_eq!(ours, 3, "{rows}");
}

#[test]
fn the_retry_template_ends_in_its_final_failure_branch() {
    let world = World::new();
    let (url, calls) = flaky(&[503]);
    let request = json!({ "url": url, "attempts_max": 3, "wait_seconds": 0.1 });
    let result = world.webhook("dealscale-retry", &[], &request).json;
    assert_eq!((&result["ok"], &result["error"]), (&json!(false), &json!("status 503")), "{result}");
    assert_eq!((result["attempts"].as_array().unwrap().len(), calls.lock().unwrap().len()), (3, 3));
    // What cannot get better is not tried again.
    let (url, calls) = flaky(&[422]);
    let result = world.webhook("dealscale-retry", &[], &json!({ "url": url })).json;
    assert_eq!((&result["ok"], calls.lock().unwrap().len()), (&json!(false), 1), "{result}");
    // `Retry-After` as a date, in seconds that are cut off: four seconds ahead, where the schedule alone would wait 0.1 s.
    let (url, calls) = answering(&[503, 200], || {
        let then = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(4);
        format!("retry-after: {}\r\n", then.strftime("%a, %d %b %Y %H:%M:%S GMT"))
    });
    let request = json!({ "url": url, "attempts_max": 2, "wait_seconds": 0.1 });
    let result = world.webhook("dealscale-retry", &[], &request).json;
    assert!(result["attempts"][0]["wait_seconds"].as_f64().unwrap() > 1.0, "{result}");
    assert_eq!(calls.lock().unwrap().len(), 2);
    // Two requests at once would be one that is forgotten.
    let (url, calls) = flaky(&[200]);
    let both = world.webhook("test-retry-two", &[], &json!({ "url": url }));
    assert_eq!((both.status, calls.lock().unwrap().len()), (500, 0), "{}", both.text);
    // As an error it fails the calling execution.
    let (url, _) = flaky(&[503]);
    let request = json!({ "url": url, "attempts_max": 2, "wait_seconds": 0.1, "on_give_up": "error" });
    assert_eq!(world.webhook("dealscale-retry", &[], &request).status, 500);
    assert!(!world.executions("dealscale: retry example", "error").is_empty());
}

#[test]
fn a_failed_execution_is_known_as_failed_and_reported_by_the_error_workflow() {
    let world = World::new();
    let id = world.appliance.publish("test-failing", json!({}));
    let event = world.appliance.wait(&id, MINUTE);
    assert_eq!(event["state"], "failed", "{event}");
    let failed = attempts(&event)[0]["n8n_execution_id"].as_str().unwrap().to_owned();
    // The report is an event of its own, followed to its end as any other.
    let report = eventually("the report succeeds", MINUTE, || {
        let list = http(&format!("{}/executions?tenant=default&limit=50", world.appliance.url), &[], None).unwrap();
        let list = list.json["executions"].as_array().expect("a list of executions").clone();
        list.into_iter().find(|e| e["workflow"] == "workflow-error" && e["state"] == "succeeded")
    });
    let run = eventually("the report is received", MINUTE, || {
        let runs = world.executions("dealscale: receive errors", "success");
        runs.iter().map(|r| world.execution(r["id"].as_str().unwrap())).find(|r| {
            let body = &r["data"]["resultData"]["runData"]["Webhook"][0]["data"]["main"][0][0]["json"]["body"];
            body["execution"]["id"] == failed.as_str()
        })
    });
    assert!(run["data"].to_string().contains("boom on purpose"), "{report}");
}

#[test]
fn a_crashed_execution_is_delivered_again_and_work_waits_while_n8n_is_down() {
    let world = World::new();
    let before = world.executions("test: slow", "success").len();
    let id = world.appliance.publish("test-slow", json!({ "seconds": 6 }));
    eventually("the slow execution runs", MINUTE, || world.executions("test: slow", "running").pop());

    n8n_sh(&["kill"]);
    let waiting: Vec<_> = (0..3).map(|n| world.appliance.publish("demo", json!({ "n": n }))).collect();
    std::thread::sleep(Duration::from_secs(2));
    n8n_sh(&["start"]);

    let event = world.appliance.wait(&id, 3 * MINUTE);
    assert_eq!(event["state"], "succeeded", "{event}");
    let attempts = attempts(&event);
    assert!(attempts.len() >= 2, "{event}");
    assert_eq!(attempts[0]["error_class"], "crashed", "{event}");
    assert_eq!(world.executions("test: slow", "success").len(), before + 1, "it ran to its end exactly once");
    for id in waiting {
        let event = world.appliance.wait(&id, 2 * MINUTE);
        assert_eq!(event["state"], "succeeded", "{event}");
    }
}
