//! How we prove to a Pulsar cluster who we are: nothing, a token, or OAuth2 client credentials.
//!
//! One [`Auth`] serves the binary protocol and the REST API. Over OAuth2 it discovers the token endpoint at the issuer
//! (OpenID Connect Discovery 1.0, or RFC 8414), gets an access token (RFC 6749 section 4.4) and renews it before it expires.
//!
//! # Invariants
//! 1. Secrets and tokens are never part of an error or a log line.
//! 2. An issuer that says it is somebody else is refused (RFC 8414 section 3.3), and so is a token endpoint in the clear
//!    behind an `https` issuer.
//!
//! # Failure
//! While the issuer is down, a token that is still valid is used on. Without one, connecting fails with the issuer's error,
//! and the caller tries again.

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::pulsar::authentication::Authentication;
use ::pulsar::error::AuthenticationError;
use reqwest::Url;
use serde::Deserialize;
use tokio::sync::Mutex;

use crate::config::Secret;
use crate::config::broker::PulsarAuth;

/// A token is renewed when this share of its life is over.
const RENEW_AT: f64 = 0.8;
/// For tokens whose issuer does not say how long they live (RFC 6749 leaves it open): short enough to notice a revocation.
const LIFE_UNKNOWN: Duration = Duration::from_secs(300);
/// After a failed renewal the token in hand is used on; the issuer is not asked again before this.
const RETRY: Duration = Duration::from_secs(5);

/// Cheap to clone; all clones share one token.
#[derive(Clone)]
pub struct Auth(Kind);

#[derive(Clone)]
enum Kind {
    None,
    Token(Secret),
    OAuth2(Arc<OAuth2>),
}

struct OAuth2 {
    issuer: String,
    audience: String,
    client_id: String,
    client_secret: Secret,
    scope: Option<String>,
    http: reqwest::Client,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    endpoint: Option<Endpoint>,
    token: Option<Token>,
}

#[derive(Clone)]
struct Endpoint {
    url: Url,
    /// `client_secret_post` (in the body) instead of `client_secret_basic`.
    post: bool,
}

struct Token {
    secret: Secret,
    renew_at: Instant,
    expires_at: Instant,
}

#[derive(Deserialize)]
struct Metadata {
    issuer: String,
    token_endpoint: String,
    #[serde(default)]
    token_endpoint_auth_methods_supported: Vec<String>,
}

#[derive(Deserialize)]
struct Granted {
    access_token: String,
    expires_in: Option<u64>,
}

#[derive(Deserialize)]
struct Refused {
    error: String,
}

impl Auth {
    /// # Errors
    /// When the HTTP client cannot be made (the CA file).
    pub fn new(config: &PulsarAuth, ca_file: Option<&Path>, timeout: Duration) -> Result<Self, String> {
        Ok(Self(match config {
            PulsarAuth::None => Kind::None,
            PulsarAuth::Token(token) => Kind::Token(token.clone()),
            PulsarAuth::OAuth2 { issuer_url, audience, client_id, client_secret, scope } => {
                Kind::OAuth2(Arc::new(OAuth2 {
                    issuer: issuer_url.trim_end_matches('/').to_owned(),
                    audience: audience.clone(),
                    client_id: client_id.clone(),
                    client_secret: client_secret.clone(),
                    scope: scope.clone(),
                    http: super::admin::client(ca_file, timeout, is_loopback(issuer_url))?,
                    state: Mutex::default(),
                }))
            }
        }))
    }

    pub fn is_none(&self) -> bool {
        matches!(self.0, Kind::None)
    }

    /// The token for `Authorization: Bearer`, or none.
    ///
    /// # Errors
    /// Why the issuer gave none.
    pub async fn token(&self) -> Result<Option<Secret>, String> {
        match &self.0 {
            Kind::None => Ok(None),
            Kind::Token(token) => Ok(Some(token.clone())),
            Kind::OAuth2(oauth2) => oauth2.token().await.map(Some),
        }
    }
}

impl OAuth2 {
    async fn token(&self) -> Result<Secret, String> {
        let mut state = self.state.lock().await;
        let now = Instant::now();
        if let Some(token) = &state.token
            && now < token.renew_at
        {
            return Ok(token.secret.clone());
        }
        match self.request(&mut state).await {
            Ok(token) => {
                let secret = token.secret.clone();
                state.token = Some(token);
                Ok(secret)
            }
            Err(cause) => {
                // The endpoint may have moved.
                state.endpoint = None;
                match &mut state.token {
                    Some(token) if now < token.expires_at => {
                        tracing::warn!(%cause, "cannot renew the OAuth2 token, the old one is still valid");
                        token.renew_at = now + RETRY;
                        Ok(token.secret.clone())
                    }
                    _ => Err(cause),
                }
            }
        }
    }

    async fn request(&self, state: &mut State) -> Result<Token, String> {
        let endpoint = match &state.endpoint {
            Some(endpoint) => endpoint.clone(),
            None => state.endpoint.insert(self.discover().await?).clone(),
        };
        let mut form = vec![("grant_type", "client_credentials")];
        if !self.audience.is_empty() {
            form.push(("audience", &self.audience));
        }
        if let Some(scope) = &self.scope {
            form.push(("scope", scope));
        }
        let mut request = self.http.post(endpoint.url.clone());
        if endpoint.post {
            form.push(("client_id", &self.client_id));
            form.push(("client_secret", self.client_secret.expose()));
        } else {
            // RFC 6749 section 2.3.1: both are form-encoded first.
            request = request.basic_auth(encoded(&self.client_id), Some(encoded(self.client_secret.expose())));
        }
        let asked = Instant::now();
        let fail = |cause: String| format!("no token from OAuth2 issuer {}: {cause}", self.issuer);
        let response = request.form(&form).send().await.map_err(|e| fail(super::admin::cause(&e)))?;
        let status = response.status();
        let body = response.bytes().await.map_err(|e| fail(super::admin::cause(&e)))?;
        if !status.is_success() {
            // RFC 6749 section 5.2: a word such as invalid_client. The description may quote what we sent.
            let word = serde_json::from_slice::<Refused>(&body).map(|r| r.error).unwrap_or_default();
            let word: String = word.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '_').take(60).collect();
            return Err(fail(format!("{status} {word}")));
        }
        let granted: Granted =
            serde_json::from_slice(&body).map_err(|_| fail("the answer has no access_token".into()))?;
        let life = granted.expires_in.map_or(LIFE_UNKNOWN, Duration::from_secs);
        Ok(Token {
            secret: Secret::new(granted.access_token),
            renew_at: asked + life.mul_f64(RENEW_AT),
            expires_at: asked + life,
        })
    }

    async fn discover(&self) -> Result<Endpoint, String> {
        let issuer = Url::parse(&self.issuer).map_err(|_| "oauth2_issuer_url is not a URL".to_owned())?;
        let path = issuer.path().trim_end_matches('/');
        let origin = issuer.origin().ascii_serialization();
        let mut last = String::new();
        for url in [
            format!("{}/.well-known/openid-configuration", self.issuer),
            format!("{origin}/.well-known/oauth-authorization-server{path}"),
        ] {
            let answer = async {
                let response = self.http.get(&url).send().await.map_err(|e| super::admin::cause(&e))?;
                let response = response.error_for_status().map_err(|e| super::admin::cause(&e))?;
                response.json::<Metadata>().await.map_err(|e| super::admin::cause(&e))
            };
            match answer.await {
                Ok(metadata) => return self.endpoint(&metadata),
                Err(cause) => last = cause,
            }
        }
        Err(format!("cannot discover the token endpoint of OAuth2 issuer {}: {last}", self.issuer))
    }

    fn endpoint(&self, metadata: &Metadata) -> Result<Endpoint, String> {
        if metadata.issuer.trim_end_matches('/') != self.issuer {
            return Err(format!("OAuth2 issuer {} says that it is another one: check oauth2_issuer_url", self.issuer));
        }
        let url = Url::parse(&metadata.token_endpoint)
            .map_err(|_| format!("OAuth2 issuer {} names no valid token endpoint", self.issuer))?;
        if self.issuer.starts_with("https://") && url.scheme() != "https" {
            return Err(format!("OAuth2 issuer {} names a token endpoint without TLS", self.issuer));
        }
        let post = metadata.token_endpoint_auth_methods_supported.iter().any(|m| m == "client_secret_post");
        Ok(Endpoint { url, post })
    }
}

/// `application/x-www-form-urlencoded`.
fn encoded(text: &str) -> String {
    let mut url = Url::parse("x:/").expect("a URL");
    url.query_pairs_mut().append_key_only(text);
    url.query().unwrap_or_default().to_owned()
}

fn is_loopback(url: &str) -> bool {
    Url::parse(url)
        .ok()
        .and_then(|url| url.host_str().map(|h| h == "localhost" || h.starts_with("127.") || h == "[::1]"))
        == Some(true)
}

/// As the crate wants it. Pulsar calls every bearer "token".
impl Authentication for Auth {
    fn auth_method_name(&self) -> String {
        "token".to_owned()
    }

    fn initialize<'life0, 'async_trait>(
        &'life0 mut self,
    ) -> Pin<Box<dyn Future<Output = Result<(), AuthenticationError>> + Send + 'async_trait>>
    where
        'life0: 'async_trait,
        Self: 'async_trait,
    {
        Box::pin(std::future::ready(Ok(())))
    }

    fn auth_data<'life0, 'async_trait>(
        &'life0 mut self,
    ) -> Pin<Box<dyn Future<Output = Result<Vec<u8>, AuthenticationError>> + Send + 'async_trait>>
    where
        'life0: 'async_trait,
        Self: 'async_trait,
    {
        Box::pin(async {
            let token = self.token().await.map_err(AuthenticationError::Custom)?;
            Ok(token.map(|token| token.expose().as_bytes().to_vec()).unwrap_or_default())
        })
    }
}
