//! `[environments.NAME.outbox]`

use std::path::{Path, PathBuf};

use super::{Secret, Section};
use crate::units::{Bytes, Span};

/// The durable local queue.
#[derive(Clone, Debug)]
pub struct Outbox {
    pub dir: PathBuf,
    pub store: OutboxStore,
    /// At this many bytes or records of waiting work a publish is 503. Nothing is evicted.
    pub bytes_max: Bytes,
    pub count_max: u64,
    /// Below this much free disk a publish is 503, so that confirming always has room.
    pub disk_free_min: Bytes,
    /// How long an `Idempotency-Key` is remembered.
    pub key_window: Span,
    /// A record that the relay took and did not settle within this goes back to the queue.
    pub lease: Span,
    /// Encryption at rest, of outbox records and payloads: 32 bytes, hexadecimal.
    pub encryption_key: Option<Secret>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutboxStore {
    Sled,
    Sqlite,
}

impl Outbox {
    pub(super) fn check(s: &mut Section<'_>, environment_dir: &Path) -> Self {
        let dir = environment_dir.join("outbox").display().to_string();
        let outbox = Self {
            dir: PathBuf::from(s.parse("dir", dir)),
            store: s.choice(
                "store",
                OutboxStore::Sled,
                &[("sled", OutboxStore::Sled), ("sqlite", OutboxStore::Sqlite)],
            ),
            bytes_max: s.bytes("bytes_max", Bytes::gib(8), Bytes::mib(1)..=Bytes::gib(4096)),
            count_max: s.count("count_max", 4_000_000, 1..=100_000_000),
            disk_free_min: s.bytes("disk_free_min", Bytes::mib(512), Bytes(0)..=Bytes::gib(1024)),
            key_window: s.span("key_window", Span::hours(24), Span::secs(1)..=Span::days(30)),
            lease: s.span("lease", Span::secs(120), Span::secs(1)..=Span::hours(1)),
            encryption_key: s.secret("encryption_key"),
        };
        if let Some(key) = &outbox.encryption_key
            && (key.expose().len() != 64 || !key.expose().bytes().all(|b| b.is_ascii_hexdigit()))
        {
            s.problem("encryption_key", "expected 64 hexadecimal digits, as `openssl rand -hex 32` prints");
        }
        outbox
    }
}
