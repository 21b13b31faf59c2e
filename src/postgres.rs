//! Connections to PostgreSQL: pool, TLS, timeouts, and the check that a commit there means what it says.
//!
//! Layer 4: `payloads` uses it, and whoever else talks to a PostgreSQL.
//!
//! # Invariants
//! 1. With [`Options::durable`] no connection is handed out whose commits could be lost by a crash of the server
//!    (`fsync`, `synchronous_commit`), or by the failover that it is set up for. What was found is pinned for the session: a
//!    later change of the server's configuration does not reach a connection that was checked.
//! 2. `sslmode=require` means encrypted **and** verified: chain and host name, against the system's trust store or
//!    `ca_file`. `prefer` (the default) encrypts when the server can, and verifies only with a `ca_file`, as libpq does.
//!    `disable` never encrypts.
//! 3. Nothing waits for ever: connecting, every statement and every idle transaction have limits, on the server and here.
//!
//! # Failure
//! A connection that broke is dropped from the pool and the next call makes a new one; so is one whose user went away in the
//! middle of a statement ([`Lease`]): the next user would have to wait for that statement's end. PgBouncer in transaction mode is not
//! supported: session settings and prepared statements do not survive there.

use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::{
    Client, Hook, HookError, Manager, ManagerConfig, Pool as Connections, PoolError, RecyclingMethod, Runtime,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio_postgres::config::SslMode;
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::config::Secret;
use crate::units::Span;

/// How to connect.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    pub url: &'a Secret,
    pub ca_file: Option<&'a Path>,
    /// The only schema on the search path. Checked by the configuration: `[a-z][a-z0-9_]{0,62}`.
    pub schema: Option<&'a str>,
    pub connections_max: usize,
    pub connect_timeout: Span,
    pub statement_timeout: Span,
    /// Refuse a server whose commits are not durable.
    pub durable: bool,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// Only the operator can change it.
    #[error("{0}")]
    Refused(String),
    /// Later it may work.
    #[error("{0}")]
    Unreachable(String),
}

/// A pool that makes its connections when they are needed.
#[derive(Clone)]
pub struct Pool {
    connections: Connections,
    connect_timeout: Duration,
}

impl Pool {
    /// Reads certificates; connects to nothing.
    ///
    /// # Errors
    /// [`Error::Refused`] for a URL or `ca_file` that cannot be used.
    pub fn new(options: &Options<'_>) -> Result<Self, Error> {
        let mut config: tokio_postgres::Config =
            options.url.expose().parse().map_err(|_| Error::Refused("the url is not one of PostgreSQL".into()))?;
        let connect_timeout = Duration::from(options.connect_timeout);
        let statement_timeout = Duration::from(options.statement_timeout);
        if config.get_application_name().is_none() {
            config.application_name("dealscale");
        }
        // A server that vanished without a word is noticed before the second statement timeout.
        config
            .connect_timeout(connect_timeout)
            .keepalives_idle(Duration::from_secs(15))
            .tcp_user_timeout(statement_timeout * 2);
        let tls = MakeRustlsConnect::new(tls(config.get_ssl_mode(), options.ca_file)?);
        let manager = Manager::from_config(config, tls, ManagerConfig { recycling_method: RecyclingMethod::Fast });
        let session = session(options);
        let durable = options.durable;
        let connections = Connections::builder(manager)
            .max_size(options.connections_max)
            .runtime(Runtime::Tokio1)
            .create_timeout(Some(connect_timeout))
            .wait_timeout(Some(statement_timeout + connect_timeout))
            .post_create(Hook::async_fn(move |client, _| {
                let session = session.clone();
                Box::pin(async move {
                    client.batch_execute(&session).await.map_err(HookError::Backend)?;
                    if durable {
                        let row = client.query_one(DURABILITY, &[]).await.map_err(HookError::Backend)?;
                        let [commit, fsync, standbys] = [0, 1, 2].map(|n| row.get::<_, String>(n));
                        not_durable(&commit, &fsync, &standbys)
                            .map_or(Ok(()), |cause| Err(HookError::message(cause)))?;
                    }
                    Ok(())
                })
            }))
            .build()
            .map_err(|error| Error::Refused(format!("cannot make a pool of connections: {error}")))?;
        Ok(Self { connections, connect_timeout })
    }

    /// A connection that was working a moment ago.
    pub async fn get(&self) -> Result<Client, Error> {
        // The hook's statements are outside of the pool's own timeouts.
        let patience = self.connect_timeout * 2 + self.connections.timeouts().wait.unwrap_or_default();
        match tokio::time::timeout(patience, self.connections.get()).await {
            Ok(Ok(client)) => Ok(client),
            Ok(Err(PoolError::PostCreateHook(HookError::Message(text)))) => Err(Error::Refused(text.into_owned())),
            Ok(Err(PoolError::Backend(error) | PoolError::PostCreateHook(HookError::Backend(error)))) => {
                Err(Error::Unreachable(explain(&error)))
            }
            Ok(Err(PoolError::Timeout(_))) | Err(_) => {
                Err(Error::Unreachable("no connection within the connect timeout".to_owned()))
            }
            Ok(Err(error)) => Err(Error::Unreachable(error.to_string())),
        }
    }

    /// Drops a connection whose state is not known.
    pub fn discard(client: Client) {
        drop(Client::take(client));
    }

    pub fn close(&self) {
        self.connections.close();
    }
}

/// A connection under a statement. Dropped before [`end`](Self::end), it is closed, not given back.
pub struct Lease(Option<Client>);

impl Lease {
    pub fn new(client: Client) -> Self {
        Self(Some(client))
    }

    /// The statement is over: back to the pool.
    pub fn end(mut self) {
        self.0.take();
    }
}

impl Deref for Lease {
    type Target = Client;
    fn deref(&self) -> &Client {
        self.0.as_ref().expect("taken only at its end")
    }
}
impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut Client {
        self.0.as_mut().expect("taken only at its end")
    }
}
impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(client) = self.0.take() {
            Pool::discard(client);
        }
    }
}

const DURABILITY: &str = "SELECT set_config('synchronous_commit', current_setting('synchronous_commit'), false), \
    current_setting('fsync'), current_setting('synchronous_standby_names')";

/// Why a commit on such a server can be lost, and what to do.
fn not_durable(commit: &str, fsync: &str, standbys: &str) -> Option<String> {
    if fsync != "on" {
        return Some(
            "PostgreSQL runs with fsync = off: a crash of its host destroys the database. Set fsync = on in postgresql.conf \
             and reload"
                .into(),
        );
    }
    match commit {
        "off" => Some(
            "synchronous_commit is off for this user: PostgreSQL would confirm commits that a crash takes back. \
             ALTER ROLE … SET synchronous_commit = on (or ALTER DATABASE, or postgresql.conf)"
                .into(),
        ),
        "local" | "remote_write" if !standbys.is_empty() => Some(format!(
            "synchronous_commit is {commit} although synchronous standbys are set up: a failover would take back confirmed \
             commits. ALTER ROLE … SET synchronous_commit = on (or ALTER DATABASE, or postgresql.conf)"
        )),
        _ => None,
    }
}

fn session(options: &Options<'_>) -> String {
    let ms = options.statement_timeout.as_millis();
    // Batches meet their rows by index, whatever the planner thinks of a table that was small when it planned; and planning
    // a statement over arrays anew each time costs more than running it.
    let mut sql = format!(
        "SET statement_timeout = {ms}; SET lock_timeout = {ms}; SET idle_in_transaction_session_timeout = {ms}; SET jit = off; \
         SET work_mem = '32MB'; SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; \
         SET client_min_messages = warning"
    );
    if let Some(schema) = options.schema {
        sql.push_str(&format!("; SET search_path = \"{schema}\""));
    }
    sql
}

/// The server's words, and where it has none, the reason under the error. Never the URL.
pub fn explain(error: &tokio_postgres::Error) -> String {
    if let Some(db) = error.as_db_error() {
        let hint = db.hint().map(|hint| format!(" ({hint})")).unwrap_or_default();
        return format!("{}: {}{hint}", db.code().code(), db.message());
    }
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    text
}

fn tls(mode: SslMode, ca_file: Option<&Path>) -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::Refused(format!("cannot set up TLS: {error}")))?;
    if mode != SslMode::Require && ca_file.is_none() {
        let verifier = Arc::new(Unverified(provider));
        return Ok(builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth());
    }
    let mut roots = RootCertStore::empty();
    match ca_file {
        Some(file) => {
            let refused = |cause: String| Error::Refused(format!("ca_file {}: {cause}", file.display()));
            for certificate in CertificateDer::pem_file_iter(file).map_err(|e| refused(e.to_string()))? {
                roots.add(certificate.map_err(|e| refused(e.to_string()))?).map_err(|e| refused(e.to_string()))?;
            }
            if roots.is_empty() {
                return Err(refused("there is no certificate in it".into()));
            }
        }
        None => {
            // Some may be broken; what matters is that there are any.
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err(Error::Refused(
                    "the system has no trusted certificates: install ca-certificates, or set ca_file".into(),
                ));
            }
        }
    }
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// `sslmode=prefer`: encryption against those who only listen. Whoever can answer in the server's place could as well
/// answer that it has no TLS.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invariant_1_commits_that_can_be_lost_are_refused() {
        assert_eq!(not_durable("on", "on", ""), None);
        assert_eq!(not_durable("remote_apply", "on", "s1"), None);
        // Without standbys there is no difference to `on`.
        assert_eq!(not_durable("local", "on", ""), None);
        for (commit, fsync, standbys) in [("off", "on", ""), ("on", "off", ""), ("local", "on", "s1")] {
            let cause = not_durable(commit, fsync, standbys).unwrap();
            assert!(cause.contains("Set fsync = on") || cause.contains("SET synchronous_commit = on"), "{cause}");
        }
    }

    #[test]
    fn invariant_2_require_without_certificates_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ca.pem");
        assert!(matches!(tls(SslMode::Require, Some(&file)), Err(Error::Refused(_))));
        std::fs::write(&file, "not a certificate").unwrap();
        assert!(matches!(tls(SslMode::Prefer, Some(&file)), Err(Error::Refused(_))));
        assert!(tls(SslMode::Prefer, None).is_ok());
    }
}
