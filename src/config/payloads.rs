//! `[environments.NAME.payloads]`: the payload store and the ledger, which live in one database.

use std::path::{Path, PathBuf};

use super::{Secret, Section};
use crate::units::Span;

#[derive(Clone, Debug)]
pub struct Payloads {
    pub store: PayloadStore,
    /// A payload is kept this long after its event is complete, a ledger row that long. Payloads outlive the broker's
    /// retention (24 h), ledger rows outlive payloads.
    pub payload_age_max: Span,
    pub ledger_age_max: Span,
}

#[derive(Clone, Debug)]
pub enum PayloadStore {
    Sqlite { file: PathBuf },
    Postgres(Postgres),
}

#[derive(Clone, Debug)]
pub struct Postgres {
    /// `postgresql://user:password@host:5432/database?sslmode=require`
    pub url: Secret,
    pub schema: String,
    pub connections_max: u64,
    /// PEM of a private CA; the system's trust store otherwise.
    pub ca_file: Option<PathBuf>,
    pub connect_timeout: Span,
    /// Every statement and transaction ends within this, or the connection is dropped.
    pub statement_timeout: Span,
}

impl Payloads {
    pub(super) fn check(s: &mut Section<'_>, environment: &str, dir: &Path) -> Self {
        let file = dir.join("payloads.sqlite").display().to_string();
        let postgres = s.choice("store", false, &[("sqlite", false), ("postgres", true)]);
        let file = PathBuf::from(s.parse("file", file));
        let url = s.secret("url");
        let schema = s.parse("schema", format!("dealscale_{environment}"));
        let connections_max = s.count("connections_max", 8, 2..=200);
        let ca_file = s.file("ca_file");
        let connect_timeout = s.span("connect_timeout", Span::secs(5), Span::millis(100)..=Span::secs(60));
        let statement_timeout = s.span("statement_timeout", Span::secs(15), Span::secs(1)..=Span::secs(300));
        let identifier = |t: &str| {
            t.len() <= 63
                && t.starts_with(|c: char| c.is_ascii_lowercase())
                && t.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        };
        if !identifier(&schema) {
            s.problem("schema", "must match [a-z][a-z0-9_]{0,62}");
        }
        let store = match (postgres, url) {
            (false, _) => PayloadStore::Sqlite { file },
            (true, Some(url)) => {
                if url.expose().parse::<tokio_postgres::Config>().is_err() {
                    s.problem(
                        "url",
                        "expected postgresql://user:password@host:5432/database, if need be with ?sslmode=disable|prefer|require \
                         (require verifies chain and host name)",
                    );
                }
                PayloadStore::Postgres(Postgres {
                    url,
                    schema,
                    connections_max,
                    ca_file,
                    connect_timeout,
                    statement_timeout,
                })
            }
            (true, None) => {
                s.problem("url", "store = \"postgres\" needs url or url_file");
                PayloadStore::Sqlite { file }
            }
        };
        let payloads = Self {
            store,
            payload_age_max: s.span("payload_age_max", Span::days(3), Span::hours(24)..=Span::days(3660)),
            ledger_age_max: s.span("ledger_age_max", Span::days(30), Span::days(1)..=Span::days(36600)),
        };
        if payloads.ledger_age_max < payloads.payload_age_max {
            s.problem("ledger_age_max", "must not be shorter than payload_age_max");
        }
        payloads
    }
}
