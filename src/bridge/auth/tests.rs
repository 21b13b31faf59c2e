use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use axum::routing::get;
use axum::{Json, Router};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as B64;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

use super::*;
use crate::clock::Timestamp;

const NOW: Timestamp = Timestamp(1_795_478_400_000);

/// An Ed25519 key of the issuer.
struct Signer {
    id: &'static str,
    key: EncodingKey,
    public: Vec<u8>,
}

impl Signer {
    fn new(id: &'static str) -> Self {
        use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
        let pair = Ed25519KeyPair::generate().unwrap();
        let der = pair.to_pkcs8v1().unwrap();
        Self { id, key: EncodingKey::from_ed_der(der.as_ref()), public: pair.public_key().as_ref().to_vec() }
    }

    fn jwk(&self) -> Value {
        json!({"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": self.id, "x": B64.encode(&self.public)})
    }

    fn sign(&self, claims: &Value) -> String {
        let header = Header { kid: Some(self.id.into()), ..Header::new(Algorithm::EdDSA) };
        jsonwebtoken::encode(&header, claims, &self.key).unwrap()
    }
}

/// An issuer on loopback that can be changed and stopped.
struct Issuer {
    url: String,
    keys: Arc<Mutex<Vec<Value>>>,
    fetches: Arc<AtomicUsize>,
    up: Arc<AtomicBool>,
    _server: tokio::task::JoinSet<()>,
}

impl Issuer {
    async fn start(keys: Vec<Value>) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (keys, fetches) = (Arc::new(Mutex::new(keys)), Arc::new(AtomicUsize::new(0)));
        let up = Arc::new(AtomicBool::new(true));
        let discovery = json!({"issuer": url, "jwks_uri": format!("{url}/keys")});
        let (served, counted, is_up) = (keys.clone(), fetches.clone(), up.clone());
        let router =
            Router::new().route("/.well-known/openid-configuration", get(|| async move { Json(discovery) })).route(
                "/keys",
                get(|| async move {
                    counted.fetch_add(1, Ordering::SeqCst);
                    let keys = served.lock().unwrap().clone();
                    if is_up.load(Ordering::SeqCst) { Ok(Json(json!({ "keys": keys }))) } else { Err("down") }
                        .map_err(|e| (axum::http::StatusCode::BAD_GATEWAY, e))
                }),
            );
        let mut server = tokio::task::JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, keys, fetches, up, _server: server }
    }

    fn claims(&self) -> Value {
        let now = NOW.as_secs();
        json!({"iss": self.url, "aud": "dealscale", "exp": now + 300, "iat": now, "sub": "n8n", "client_id": "n8n"})
    }

    fn config(&self, more: &str) -> config::Config {
        config::parse(&format!(
            "[environments.production]\n[environments.staging]\n\
             [accounts.static]\ntoken_sha256 = [\"{}\"]\nenvironment = \"production\"\ntenants = [\"acme\"]\n\
             [oauth2.company]\nissuer = \"{}\"\naudience = \"dealscale\"\nalgorithms = [\"EdDSA\", \"RS256\"]\n{more}\n\
             [oauth2.company.clients.n8n]\nenvironment = \"staging\"\ntenants = [\"acme\", \"b-*\"]\nrights = [\"publish\"]\n",
            BodyHash::of(b"dst_right"),
            self.url
        ))
        .unwrap()
    }
}

struct Door {
    auth: Auth,
    accounts: Accounts,
}

impl Door {
    fn new(config: &config::Config) -> Self {
        let auth = Auth::new(Clock::manual(NOW), TaskTracker::new());
        let accounts = Accounts::new(config, &auth, None).unwrap();
        Self { auth, accounts }
    }

    async fn knock(&self, authorization: &str, from: [u8; 4]) -> Result<Arc<Caller>, Problem> {
        let mut headers = HeaderMap::new();
        if !authorization.is_empty() {
            headers.insert(header::AUTHORIZATION, authorization.parse().unwrap());
        }
        self.auth.caller(&self.accounts, &headers, Some(IpAddr::from(from))).await
    }

    async fn jwt(&self, token: &str) -> Result<Arc<Caller>, Problem> {
        self.knock(&format!("Bearer {token}"), [127, 0, 0, 1]).await
    }

    async fn refused(&self, token: &str) -> (Kind, String) {
        let problem = self.jwt(token).await.unwrap_err();
        (problem.kind, problem.detail.into_owned())
    }
}

#[tokio::test]
async fn a_static_token_is_its_account() {
    let issuer = Issuer::start(vec![]).await;
    let door = Door::new(&issuer.config(""));
    let caller = door.knock("Bearer dst_right", [10, 0, 0, 1]).await.unwrap();
    assert_eq!(caller.name, "static");
    assert!(caller.may_use(&Tenant::try_new("acme").unwrap()) && !caller.may_use(&Tenant::try_new("other").unwrap()));
    assert_eq!(door.knock("bearer  dst_right", [10, 0, 0, 1]).await.unwrap().name, "static");
    for bad in ["", "Bearer dst_wrong", "Bearer", "Bearer ", "Basic dst_right", "Bearer dst right", "dst_right"] {
        assert_eq!(door.knock(bad, [127, 0, 0, 1]).await.unwrap_err().kind, Kind::Unauthorized, "{bad:?}");
    }
}

#[tokio::test]
async fn without_tokens_only_where_the_configuration_says_so() {
    let config = |required: bool| config::parse(&format!("[bridge]\ntoken_required = {required}")).unwrap();
    assert_eq!(Door::new(&config(false)).knock("", [127, 0, 0, 1]).await.unwrap().name, "anonymous");
    // A wrong token is wrong there too: its owner should know.
    assert!(Door::new(&config(false)).knock("Bearer x", [127, 0, 0, 1]).await.is_err());
    assert!(Door::new(&config(true)).knock("", [127, 0, 0, 1]).await.is_err());
}

#[tokio::test]
async fn failures_are_limited_by_address_and_a_right_token_still_works() {
    let issuer = Issuer::start(vec![]).await;
    let door = Door::new(&issuer.config(""));
    for _ in 0..FAILURES_MAX {
        assert_eq!(door.knock("Bearer wrong", [10, 0, 0, 1]).await.unwrap_err().kind, Kind::Unauthorized);
    }
    assert_eq!(door.knock("Bearer wrong", [10, 0, 0, 1]).await.unwrap_err().kind, Kind::TooManyFailures);
    assert_eq!(door.knock("Bearer a.b.c", [10, 0, 0, 1]).await.unwrap_err().kind, Kind::TooManyFailures);
    assert!(door.knock("Bearer dst_right", [10, 0, 0, 1]).await.is_ok());
    assert_eq!(door.knock("Bearer wrong", [10, 0, 0, 2]).await.unwrap_err().kind, Kind::Unauthorized);
    for _ in 0..FAILURES_MAX * 2 {
        assert_eq!(door.knock("Bearer wrong", [127, 0, 0, 1]).await.unwrap_err().kind, Kind::Unauthorized);
    }
}

#[tokio::test]
async fn a_jwt_of_the_issuer_is_its_client() {
    let signer = Signer::new("k1");
    let issuer = Issuer::start(vec![signer.jwk()]).await;
    let door = Door::new(&issuer.config(""));
    let token = signer.sign(&issuer.claims());
    let caller = door.jwt(&token).await.unwrap();
    assert_eq!((caller.name.as_str(), caller.grant.environment.as_str()), ("company/n8n", "staging"));
    assert!(caller.grant.rights.publish && !caller.grant.rights.read);
    assert!(caller.may_use(&Tenant::try_new("b-1").unwrap()));
    // Verified once, then remembered; the keys were fetched once.
    assert!(Arc::ptr_eq(&caller, &door.jwt(&token).await.unwrap()));
    assert!(door.jwt(&signer.sign(&issuer.claims())).await.is_ok());
    assert_eq!(issuer.fetches.load(Ordering::SeqCst), 1);
    // Until it expires, leeway (30 s) included.
    door.auth.clock.step(329_000);
    assert!(door.jwt(&token).await.is_ok());
    door.auth.clock.step(2_000);
    assert!(door.refused(&token).await.1.contains("expired"));
}

#[tokio::test]
async fn invariant_1_every_other_token_is_refused_with_its_reason() {
    let (signer, stranger) = (Signer::new("k1"), Signer::new("k1"));
    let issuer = Issuer::start(vec![signer.jwk()]).await;
    let door = Door::new(&issuer.config(""));
    let with = |name: &str, value: Value| {
        let mut claims = issuer.claims();
        claims[name] = value;
        signer.sign(&claims)
    };
    let without = |name: &str| {
        let mut claims = issuer.claims();
        claims.as_object_mut().unwrap().remove(name);
        signer.sign(&claims)
    };
    let raw = |header: Value, claims: Value| {
        format!("{}.{}.", B64.encode(header.to_string()), B64.encode(claims.to_string()))
    };
    let now = NOW.as_secs();
    // HS256 with the public key as the secret, in each of its spellings.
    let hmac = |secret: &[u8]| {
        let header = Header { kid: Some("k1".into()), ..Header::new(Algorithm::HS256) };
        jsonwebtoken::encode(&header, &issuer.claims(), &EncodingKey::from_secret(secret)).unwrap()
    };
    let mut altered = signer.sign(&issuer.claims());
    altered.pop();
    altered.push(if signer.sign(&issuer.claims()).ends_with('A') { 'Q' } else { 'A' });
    let critical = {
        let header = json!({"alg": "EdDSA", "kid": "k1", "crit": ["b64"], "b64": false});
        format!("{}sig", raw(header, issuer.claims()))
    };
    let cases = [
        ("another signer", stranger.sign(&issuer.claims()), "signature"),
        ("altered", altered, ""),
        ("expired", with("exp", json!(now - 31)), "expired"),
        ("without expiry", without("exp"), "expired"),
        ("expiry as text", with("exp", json!("never")), ""),
        ("not yet", with("nbf", json!(now + 31)), "not valid yet"),
        ("another audience", with("aud", json!("another")), "audience"),
        ("no audience", without("aud"), "audience"),
        ("another issuer", with("iss", json!("http://127.0.0.1:1")), "issuer"),
        ("no issuer", without("iss"), "issuer"),
        ("none", raw(json!({"alg": "none", "kid": "k1"}), issuer.claims()), "algorithm"),
        ("None", raw(json!({"alg": "None"}), issuer.claims()), "algorithm"),
        ("no algorithm", raw(json!({"kid": "k1"}), issuer.claims()), ""),
        ("hmac of the public key", hmac(&signer.public), "algorithm"),
        ("hmac of the jwk", hmac(signer.jwk().to_string().as_bytes()), "algorithm"),
        ("critical extension", critical, "not a signed JWT"),
        ("garbage", "a.b.c".into(), ""),
    ];
    for (name, token, expected) in cases {
        let (kind, detail) = door.refused(&token).await;
        assert_eq!(kind, Kind::Unauthorized, "{name}: {detail}");
        assert!(detail.contains(expected), "{name}: {detail}");
    }
    // One of several audiences is enough (RFC 7519, section 4.1.3).
    assert!(door.jwt(&with("aud", json!(["x", "dealscale"]))).await.is_ok());
    assert!(door.jwt(&with("exp", json!(now - 29))).await.is_ok());
    assert!(door.jwt(&with("nbf", json!(now + 29))).await.is_ok());
}

#[tokio::test]
async fn a_new_key_is_fetched_once_and_a_flood_of_unknown_ids_is_not() {
    let (old, new, stranger) = (Signer::new("old"), Signer::new("new"), Signer::new("stranger"));
    let issuer = Issuer::start(vec![old.jwk()]).await;
    let door = Door::new(&issuer.config(""));
    assert!(door.jwt(&old.sign(&issuer.claims())).await.is_ok());
    issuer.keys.lock().unwrap().push(new.jwk());
    // Within the pause after the first fetch the new key is unknown …
    assert!(door.refused(&new.sign(&issuer.claims())).await.1.contains("unknown key"));
    for _ in 0..50 {
        assert!(door.jwt(&stranger.sign(&issuer.claims())).await.is_err());
    }
    assert_eq!(issuer.fetches.load(Ordering::SeqCst), 1);
    // … and behind it, it is found.
    door.accounts.verifiers[0].keys.age_fetch(std::time::Duration::from_secs(11)).await;
    let token = new.sign(&issuer.claims());
    let (a, b) = tokio::join!(door.jwt(&token), door.jwt(&token));
    assert!(a.is_ok() && b.is_ok());
    assert_eq!(issuer.fetches.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn an_issuer_that_is_down_costs_only_those_who_need_it() {
    let (known, unknown) = (Signer::new("known"), Signer::new("unknown"));
    let issuer = Issuer::start(vec![known.jwk()]).await;
    let door = Door::new(&issuer.config(""));
    issuer.up.store(false, Ordering::SeqCst);
    assert_eq!(door.refused(&known.sign(&issuer.claims())).await.0, Kind::IssuerUnavailable);
    assert_eq!(door.refused(&known.sign(&issuer.claims())).await.0, Kind::IssuerUnavailable);
    issuer.up.store(true, Ordering::SeqCst);
    door.accounts.verifiers[0].keys.age_fetch(std::time::Duration::from_secs(11)).await;
    assert!(door.jwt(&known.sign(&issuer.claims())).await.is_ok());
    issuer.up.store(false, Ordering::SeqCst);
    door.accounts.verifiers[0].keys.age_fetch(std::time::Duration::from_secs(11)).await;
    assert_eq!(door.refused(&unknown.sign(&issuer.claims())).await.0, Kind::IssuerUnavailable);
    let mut claims = issuer.claims();
    claims["jti"] = json!("a token that was not seen before");
    assert!(door.jwt(&known.sign(&claims)).await.is_ok());
}

#[tokio::test]
async fn keys_that_are_not_for_signatures_are_left_out() {
    let signer = Signer::new("k1");
    let mut encryption = signer.jwk();
    encryption["use"] = json!("enc");
    let symmetric = json!({"kty": "oct", "kid": "k1", "alg": "HS256", "k": B64.encode([7; 32])});
    let foreign = json!({"kty": "FUTURE", "kid": "k1", "x": 1});
    let issuer = Issuer::start(vec![encryption, symmetric, foreign, signer.jwk()]).await;
    let door = Door::new(&issuer.config(""));
    assert!(door.jwt(&signer.sign(&issuer.claims())).await.is_ok());
    let mut other = signer.jwk();
    other["alg"] = json!("ES256");
    *issuer.keys.lock().unwrap() = vec![other];
    let door = Door::new(&issuer.config(""));
    assert!(door.jwt(&signer.sign(&issuer.claims())).await.is_err());
}

#[tokio::test]
async fn claims_stand_over_the_clients_entry() {
    let signer = Signer::new("k1");
    let issuer = Issuer::start(vec![signer.jwk()]).await;
    let names = "tenants_claim = \"tenants\"\nrights_claim = \"scope\"\nenvironment_claim = \"env\"\n";
    let door = Door::new(&issuer.config(names));
    let with = |more: &[(&str, Value)]| {
        let mut claims = issuer.claims();
        for (name, value) in more {
            claims[*name] = value.clone();
        }
        signer.sign(&claims)
    };
    let token = with(&[
        ("tenants", json!(["x", "*", "Bad"])),
        ("scope", json!("openid read operate")),
        ("env", json!("production")),
    ]);
    let caller = door.jwt(&token).await.unwrap();
    assert_eq!(caller.grant.environment.as_str(), "production");
    let rights = caller.grant.rights;
    assert!(rights.read && rights.operate && !rights.publish);
    // Invariant 3: a star in a token is no pattern.
    assert!(caller.may_use(&Tenant::try_new("x").unwrap()) && !caller.may_use(&Tenant::try_new("y").unwrap()));
    assert_eq!(caller.only_tenant().unwrap().as_str(), "x");

    for (name, more) in [
        ("no tenants", vec![("tenants", json!([]))]),
        ("no rights", vec![("scope", json!("openid"))]),
        ("another appliance's environment", vec![("env", json!(7))]),
        ("an unknown client without a default", vec![("client_id", json!("x")), ("sub", json!("x"))]),
    ] {
        assert_eq!(door.refused(&with(&more)).await.0, Kind::Forbidden, "{name}");
    }
}
