//! `[[environments.NAME.routes]]`: which events go where and how. The first route that matches decides; behind all of
//! them stands the built-in route `default`.

use super::delivery::Retry;
use super::{Secret, Section};
use crate::units::{Bytes, Span};

#[derive(Clone, Debug)]
pub struct Route {
    pub name: String,
    pub when: When,
    pub class: Class,
    /// Topic, with `{tenant}` replaced: `dealscale.workflow.long.{tenant}`.
    pub topic: String,
    /// Absolute URL, or a path below n8n's URL (`/webhook/orders`), with `{workflow}` and `{tenant}` replaced
    /// (percent-encoded).
    pub webhook: String,
    pub timeout: Span,
    pub retry: Retry,
    /// Attempts of this route under way at once.
    pub concurrency: u64,
    pub on_dead: OnDead,
    pub ack: Ack,
    pub follow: bool,
    /// Deliver a crashed execution again, up to `crashes_max` times.
    pub redeliver_crashed: bool,
    pub crashes_max: u64,
    /// Deliver an execution that ended in an error again, by the retry schedule.
    pub redeliver_failed: bool,
    pub webhook_auth: WebhookAuth,
    /// For `short`: what happens when n8n is down.
    pub fallback: Fallback,
    pub consumer: ConsumerKind,
    /// References older than this are trusted no longer without a look into the ledger.
    pub age_max: Span,
}

/// All that are given must match.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct When {
    /// Patterns with `*`.
    pub workflow: Option<Pattern>,
    pub topic: Option<Pattern>,
    pub tenant: Option<Pattern>,
    pub bytes_min: Option<Bytes>,
    pub bytes_max: Option<Bytes>,
    /// Metadata keys with patterns for their values.
    pub metadata: Vec<(String, Pattern)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    Short,
    Long,
    Ai,
    Analytics,
}

impl Class {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::Long => "long",
            Self::Ai => "ai",
            Self::Analytics => "analytics",
        }
    }
    /// The plan's own topic for this class.
    pub fn topic(self) -> &'static str {
        match self {
            Self::Short => "dealscale.workflow.short",
            Self::Long => "dealscale.workflow.long",
            Self::Ai => "dealscale.ai.inference",
            Self::Analytics => "dealscale.analytics.events",
        }
    }
}

/// What a dead letter does to later events of its ordering key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDead {
    Hold,
    Skip,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ack {
    Disk,
    Broker,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    Refuse,
    Queue,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConsumerKind {
    Appliance,
    /// A foreign worker takes the references from Pulsar itself.
    External,
}

/// As n8n's Webhook node knows them.
#[derive(Clone, Debug)]
pub enum WebhookAuth {
    None,
    Header {
        name: String,
        value: Secret,
    },
    Basic {
        user: String,
        password: Secret,
    },
    /// HS256 with a shared passphrase: a fresh token of one minute per call.
    Jwt {
        secret: Secret,
    },
}

/// Text with `*` for any run of characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    pub fn new(text: &str) -> Self {
        Self(text.to_owned())
    }
    pub fn matches(&self, text: &str) -> bool {
        let mut parts = self.0.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = text.strip_prefix(first) else { return false };
        let mut last = None;
        for part in parts {
            if let Some(previous) = last.replace(part) {
                match rest.find(previous) {
                    Some(at) => rest = &rest[at + previous.len()..],
                    None => return false,
                }
            }
        }
        match last {
            Some(last) => rest.len() >= last.len() && rest.ends_with(last),
            None => rest.is_empty(),
        }
    }
    pub fn as_str(&self) -> &str {
        &self.0
    }
}
impl std::str::FromStr for Pattern {
    type Err = crate::ids::Invalid;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() || text.len() > 200 {
            return Err(crate::ids::Invalid {
                what: "a pattern",
                rule: "1 to 200 characters, `*` for any run of them",
            });
        }
        Ok(Self(text.to_owned()))
    }
}
impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl Route {
    /// The name of the route behind all configured ones.
    pub const DEFAULT: &'static str = "default";
    /// The plan's own webhook.
    pub const DEFAULT_WEBHOOK: &'static str = "/webhook/pulsar-trigger";

    pub(super) fn check(s: &mut Section<'_>, name: Option<&str>, default_webhook: &str) -> Self {
        let class = s.choice(
            "class",
            Class::Long,
            &[("short", Class::Short), ("long", Class::Long), ("ai", Class::Ai), ("analytics", Class::Analytics)],
        );
        let given = s.parse_opt::<String>("name");
        let name = match (name, given) {
            (Some(name), _) => name.to_owned(),
            (None, Some(name)) if name != Self::DEFAULT => name,
            (None, Some(_)) => {
                s.problem("name", "\"default\" is the built-in route: change it in [environments.NAME.default_route]");
                String::new()
            }
            (None, None) => {
                s.problem("name", "every route needs a name");
                String::new()
            }
        };
        let when = s.section("when", |s| When {
            workflow: s.parse_opt("workflow"),
            topic: s.parse_opt("topic"),
            tenant: s.parse_opt("tenant"),
            bytes_min: s.parse_opt("bytes_min"),
            bytes_max: s.parse_opt("bytes_max"),
            metadata: s.map("metadata").into_iter().map(|(k, v)| (k, Pattern::new(&v))).collect(),
        });
        let route = Self {
            name,
            when,
            class,
            topic: s.parse("topic", class.topic().to_owned()),
            webhook: s.parse("webhook", default_webhook.to_owned()),
            timeout: s.span("timeout", Span::secs(30), Span::millis(10)..=Span::hours(24)),
            retry: s.section("retry", Retry::check),
            concurrency: s.count("concurrency", 10, 1..=10_000),
            on_dead: s.choice("on_dead", OnDead::Hold, &[("hold", OnDead::Hold), ("skip", OnDead::Skip)]),
            ack: s.choice("ack", Ack::Disk, &[("disk", Ack::Disk), ("broker", Ack::Broker)]),
            follow: s.flag("follow", true),
            redeliver_crashed: s.flag("redeliver_crashed", false),
            crashes_max: s.count("crashes_max", 3, 1..=100),
            redeliver_failed: s.flag("redeliver_failed", false),
            webhook_auth: s.section("webhook_auth", WebhookAuth::check),
            fallback: s.choice(
                "fallback",
                Fallback::Refuse,
                &[("refuse", Fallback::Refuse), ("queue", Fallback::Queue)],
            ),
            consumer: s.choice(
                "consumer",
                ConsumerKind::Appliance,
                &[("appliance", ConsumerKind::Appliance), ("external", ConsumerKind::External)],
            ),
            age_max: s.span("age_max", Span::days(7), Span::secs(1)..=Span::days(366)),
        };
        let shown = route.topic.replace("{tenant}", "t");
        if crate::ids::Topic::try_new(&shown).is_err() {
            s.problem("topic", "must match [a-z0-9][a-z0-9._-]{0,199}, with {tenant} for the tenant's name");
        }
        // The environment's own was checked there.
        if route.webhook != default_webhook
            && !route.webhook.starts_with('/')
            && !super::n8n::is_http_url(&route.webhook)
        {
            s.problem("webhook", "expected a path such as \"/webhook/orders\" or a whole URL");
        } else if authority(&route.webhook).contains("{workflow}") {
            s.problem("webhook", "{workflow} is the caller's text: it must not decide which server is called");
        }
        if class == Class::Short && route.consumer == ConsumerKind::External {
            s.problem("consumer", "a short route calls n8n directly: an external consumer would never see its events");
        }
        route
    }
}

/// Of a whole URL what stands before its path: scheme, user, host and port.
fn authority(webhook: &str) -> &str {
    let after = webhook.find("://").map_or(0, |at| at + 3);
    let end = webhook[after..].find(['/', '\\', '?', '#']).map_or(webhook.len(), |at| after + at);
    &webhook[..end]
}

/// Whether a header is made by HTTP or by delivery itself, and so is no place for a secret.
fn is_own(header: &str) -> bool {
    const OWN: [&str; 15] = [
        "connection",
        "content-length",
        "content-type",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "traceparent",
        "x-dealscale-attempt",
        "x-dealscale-execution-id",
        "x-dealscale-tenant",
        "x-dealscale-workflow",
    ];
    let header = header.to_ascii_lowercase();
    OWN.contains(&header.as_str()) || header.starts_with("webhook-")
}

impl WebhookAuth {
    fn check(s: &mut Section<'_>) -> Self {
        #[derive(Clone, Copy, PartialEq)]
        enum Kind {
            None,
            Header,
            Basic,
            Jwt,
        }
        let kind = s.choice(
            "kind",
            Kind::None,
            &[("none", Kind::None), ("header", Kind::Header), ("basic", Kind::Basic), ("jwt", Kind::Jwt)],
        );
        let (name, user) = (s.parse_opt::<String>("name"), s.parse_opt::<String>("user"));
        let secret = s.secret("secret");
        match (kind, secret) {
            (Kind::None, _) => Self::None,
            (_, None) => {
                s.problem("secret", "webhook_auth needs secret or secret_file");
                Self::None
            }
            (Kind::Header, Some(value)) => match name {
                Some(name) if is_own(&name) => {
                    s.problem("name", "this header is made by HTTP or by the delivery itself: choose another one");
                    Self::None
                }
                Some(name)
                    if http::HeaderName::try_from(name.as_str()).is_ok()
                        && http::HeaderValue::try_from(value.expose()).is_ok() =>
                {
                    Self::Header { name, value }
                }
                _ => {
                    s.problem("name", "kind = \"header\" needs the header's name, and a secret of visible characters");
                    Self::None
                }
            },
            (Kind::Basic, Some(password)) => match user {
                Some(user) if !user.contains(':') => Self::Basic { user, password },
                _ => {
                    s.problem("user", "kind = \"basic\" needs user, without ':'");
                    Self::None
                }
            },
            (Kind::Jwt, Some(secret)) => Self::Jwt { secret },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(route: &str) -> Vec<String> {
        let text = format!("state_dir = \"/nowhere\"\n[[environments.test.routes]]\nname = \"r\"\n{route}");
        crate::config::parse(&text).map_or_else(|p| p.iter().map(ToString::to_string).collect(), |_| Vec::new())
    }

    #[test]
    fn a_caller_never_decides_which_server_is_called() {
        for refused in [
            "https://{workflow}/hook",
            "https://{workflow}.example.com/hook",
            "https://n8n.example.com{workflow}/hook",
            "https://n8n.example.com:{workflow}",
            "https://{workflow}@n8n.example.com/hook",
            "https://{workflow}\\\\hook",
        ] {
            let found = problems(&format!("webhook = \"{refused}\""));
            assert!(found.iter().any(|p| p.contains("webhook")), "{refused}: {found:?}");
        }
        for fine in
            ["/webhook/{workflow}", "https://n8n.example.com/{workflow}?w={workflow}", "https://{tenant}.example.com/x"]
        {
            assert_eq!(problems(&format!("webhook = \"{fine}\"")), Vec::<String>::new(), "{fine}");
        }
    }

    #[test]
    fn a_secret_does_not_go_into_a_header_that_has_a_meaning_of_its_own() {
        for (name, fine) in [
            ("X-Key", true),
            ("Authorization", true),
            ("X-Dealscale-Secret", true),
            ("X-Dealscale-Tenant", false),
            ("content-length", false),
            ("Webhook-Id", false),
        ] {
            let auth = format!("webhook_auth = {{ kind = \"header\", name = \"{name}\", secret = \"s\" }}");
            assert_eq!(problems(&auth).is_empty(), fine, "{name}: {:?}", problems(&auth));
        }
    }

    #[test]
    fn patterns_match_whole_texts() {
        let cases = [
            ("order", "order", true),
            ("order", "orders", false),
            ("order*", "orders", true),
            ("*", "", true),
            ("*-sync", "crm-sync", true),
            ("*-sync", "crm-sync-2", false),
            ("a*b*c", "a1b2c", true),
            ("a*b*c", "acb", false),
            ("a*a", "a", false),
            ("ab*ba", "aba", false),
        ];
        for (pattern, text, expected) in cases {
            assert_eq!(Pattern::new(pattern).matches(text), expected, "{pattern} on {text}");
        }
    }
}
