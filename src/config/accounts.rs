//! `[accounts.NAME]` and `[oauth2.NAME]`: who may call the bridge, for which tenants, with which rights.

use std::collections::BTreeMap;

use super::environment::EnvironmentConfig;
use super::routes::Pattern;
use super::{Section, n8n::is_http_url};
use crate::ids::Environment;
use crate::units::Span;

#[derive(Clone, Debug, Default)]
pub struct Accounts {
    pub accounts: Vec<Account>,
    pub issuers: Vec<Issuer>,
    /// What a caller without credentials gets where `bridge.token_required = false`.
    pub anonymous: Option<Grant>,
}

/// What a caller may do.
#[derive(Clone, Debug)]
pub struct Grant {
    pub environment: Environment,
    pub tenants: Vec<Pattern>,
    pub rights: Rights,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rights {
    pub publish: bool,
    pub read: bool,
    pub operate: bool,
}

impl Rights {
    pub const ALL: Rights = Rights { publish: true, read: true, operate: true };

    /// From the words `publish`, `read`, `operate`; anything else is ignored (a claim may hold foreign scopes).
    pub fn from_words<'a>(words: impl IntoIterator<Item = &'a str>) -> Self {
        let mut rights = Self::default();
        for word in words {
            match word {
                "publish" => rights.publish = true,
                "read" => rights.read = true,
                "operate" => rights.operate = true,
                _ => {}
            }
        }
        rights
    }
}

/// A service account with a static token. Only the token's SHA-256 is stored (`dealscale token` makes both).
#[derive(Clone, Debug)]
pub struct Account {
    pub name: String,
    /// Several, so that a token can be rotated without a gap.
    pub token_sha256: Vec<crate::ids::BodyHash>,
    pub grant: Grant,
}

/// An OAuth2 / OpenID Connect issuer whose JWTs are accepted.
#[derive(Clone, Debug)]
pub struct Issuer {
    pub name: String,
    /// `iss`; keys are discovered at `ISSUER/.well-known/openid-configuration` (or RFC 8414's place).
    pub issuer: String,
    pub audience: String,
    /// Pinned; of RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA. Never `none`, never an HMAC.
    pub algorithms: Vec<Algorithm>,
    pub leeway: Span,
    /// Names of claims: tenants (a text or a list), rights (a text of words or a list), environment.
    pub tenants_claim: Option<String>,
    pub rights_claim: Option<String>,
    pub environment_claim: Option<String>,
    /// What a token of this issuer gets where no claim says otherwise; `[[oauth2.NAME.clients]]` by `client_id`/`sub`.
    pub default_grant: Option<Grant>,
    pub clients: BTreeMap<String, Grant>,
}

/// A signature algorithm with a public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Algorithm(pub jsonwebtoken::Algorithm);

impl std::str::FromStr for Algorithm {
    type Err = crate::ids::Invalid;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        use jsonwebtoken::Algorithm as A;
        Ok(Self(match text {
            "RS256" => A::RS256,
            "RS384" => A::RS384,
            "RS512" => A::RS512,
            "PS256" => A::PS256,
            "PS384" => A::PS384,
            "PS512" => A::PS512,
            "ES256" => A::ES256,
            "ES384" => A::ES384,
            "EdDSA" => A::EdDSA,
            _ => {
                return Err(crate::ids::Invalid {
                    what: "an algorithm",
                    rule: "RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384 or EdDSA (shared secrets and \"none\" are refused)",
                });
            }
        }))
    }
}

impl Accounts {
    pub(super) fn check(top: &mut Section<'_>, environments: &BTreeMap<Environment, EnvironmentConfig>) -> Self {
        let fallback = environments.keys().next().cloned();
        let grant = |s: &mut Section<'_>, rights: &[&str], tenants: &[&str]| -> Option<Grant> {
            let environment = s.parse_opt::<Environment>("environment").or_else(|| {
                if environments.len() > 1 {
                    s.problem("environment", "say which environment, there are several");
                }
                fallback.clone()
            });
            if environment.as_ref().is_some_and(|e| !environments.contains_key(e)) {
                s.problem("environment", "is not one of [environments.NAME]");
            }
            let words: Vec<String> = s.list("rights", rights);
            if let Some(n) = words.iter().position(|w| !["publish", "read", "operate"].contains(&w.as_str())) {
                s.problem(&format!("rights[{n}]"), "expected \"publish\", \"read\" or \"operate\"");
            }
            Some(Grant {
                environment: environment?,
                tenants: s.list("tenants", tenants),
                rights: Rights::from_words(words.iter().map(String::as_str)),
            })
        };
        let accounts = top.named("accounts", |name, s| {
            let token_sha256: Vec<crate::ids::BodyHash> = s.list("token_sha256", &[]);
            if token_sha256.is_empty() {
                s.problem("token_sha256", "needs at least one hash; `dealscale token` makes a token and its hash");
            }
            grant(s, &["publish", "read"], &["*"]).map(|grant| Account { name: name.to_owned(), token_sha256, grant })
        });
        let issuers = top.named("oauth2", |name, s| {
            let issuer = s.parse_opt::<String>("issuer");
            let audience = s.parse_opt::<String>("audience");
            let algorithms: Vec<Algorithm> = s.list("algorithms", &["RS256", "ES256", "EdDSA"]);
            let leeway = s.span("leeway", Span::secs(30), Span::secs(0)..=Span::secs(300));
            let tenants_claim = s.parse_opt("tenants_claim");
            let rights_claim = s.parse_opt("rights_claim");
            let environment_claim = s.parse_opt("environment_claim");
            let default_grant =
                s.has("default").then(|| s.section("default", |s| grant(s, &["publish", "read"], &[]))).flatten();
            let clients = s
                .named("clients", |client, s| (client.to_owned(), grant(s, &["publish", "read"], &["*"])))
                .into_iter()
                .filter_map(|(client, grant)| Some((client, grant?)))
                .collect();
            if !issuer.as_deref().is_some_and(is_http_url) {
                s.problem("issuer", "needs the issuer's URL, as in the `iss` claim");
            }
            if audience.is_none() {
                s.problem("audience", "needs the audience that tokens for this appliance carry");
            }
            if algorithms.is_empty() {
                s.problem("algorithms", "needs at least one algorithm");
            }
            Some(Issuer {
                name: name.to_owned(),
                issuer: issuer?,
                audience: audience?,
                algorithms,
                leeway,
                tenants_claim,
                rights_claim,
                environment_claim,
                default_grant,
                clients,
            })
        });
        let accounts: Vec<Account> = accounts.into_iter().flatten().collect();
        let issuers: Vec<Issuer> = issuers.into_iter().flatten().collect();
        // One of the two would silently decide for the other.
        for (n, account) in accounts.iter().enumerate() {
            let taken = |hash| accounts[..n].iter().find(|other| other.token_sha256.contains(hash));
            if let Some(other) = account.token_sha256.iter().find_map(taken) {
                let at = format!("accounts.{}.token_sha256", account.name);
                top.problem(&at, format!("has a token of account {:?}: each token belongs to one account", other.name));
            }
        }
        for (n, issuer) in issuers.iter().enumerate() {
            if let Some(other) = issuers[..n].iter().find(|other| other.issuer == issuer.issuer) {
                let at = format!("oauth2.{}.issuer", issuer.name);
                top.problem(&at, format!("is the issuer of [oauth2.{}] already: put the clients there", other.name));
            }
        }
        let anonymous =
            fallback.map(|environment| Grant { environment, tenants: vec![Pattern::new("*")], rights: Rights::ALL });
        Self { accounts, issuers, anonymous }
    }
}
