//! The invariants of the payload store, against SQLite. `conformance.rs` is the part that PostgreSQL has to pass as well
//! (`tests/real/payloads.rs`).

use crate as dealscale;

#[macro_use]
#[path = "conformance.rs"]
mod conformance;

use std::path::Path;

use self::conformance::{LEDGER_AGE, PAYLOAD_AGE, START, World};
use super::*;
use crate::config::outbox::OutboxStore;
use crate::config::payloads::PayloadStore;
use crate::config::{self, Secret};
use crate::units::Bytes;

fn outbox(dir: &Path, key: Option<&str>) -> config::Outbox {
    config::Outbox {
        dir: dir.join("outbox"),
        store: OutboxStore::Sled,
        bytes_max: Bytes::gib(1),
        count_max: 1000,
        disk_free_min: Bytes(0),
        key_window: Span::hours(24),
        lease: Span::secs(120),
        encryption_key: key.map(|key| Secret::new(key.repeat(32))),
    }
}

async fn open(dir: &Path, key: Option<&str>, clock: Clock) -> Result<Store, Error> {
    let config = config::Payloads {
        store: PayloadStore::Sqlite { file: dir.join("state/payloads.sqlite") },
        payload_age_max: PAYLOAD_AGE,
        ledger_age_max: LEDGER_AGE,
    };
    Store::open(&config, &outbox(dir, key), &Environment::try_new("production").unwrap(), clock).await
}

async fn world_with(key: Option<&str>) -> (World, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let clock = Clock::manual(START);
    let store = open(&path, key, clock.clone()).await.unwrap();
    (World { store, clock, keep: Box::new(dir) }, path)
}

async fn plain(_case: &str) -> World {
    world_with(None).await.0
}

async fn sealed(_case: &str) -> World {
    world_with(Some("a1")).await.0
}

mod sqlite {
    use super::*;
    conformance_tests!(plain);
}

mod sqlite_sealed {
    use super::*;
    conformance_tests!(sealed);
}
