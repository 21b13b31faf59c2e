//! The small interface behind which the outbox keeps everything, and the stores that have it.
//!
//! # Contract
//! 1. [`Kv::commit`] applies all writes or none, and they are **durable** when it returns `Ok`: power may go at once.
//! 2. After an error of `commit` the outcome is unknown and the handle is not used again; the owner opens the store anew.
//! 3. Keys of a tree sort as bytes. Values are at most [`Kv::value_max`] long.

#[cfg(test)]
pub mod simulated;
mod sled;
mod sqlite;

use std::path::Path;
use std::sync::Arc;

pub use self::sled::forget_copy;

use crate::config::outbox::OutboxStore;

/// A named part of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tree {
    Meta,
    Packs,
    Index,
    Done,
    Chunks,
    Poison,
    Keys,
    Expiry,
    LocalPacks,
    LocalIndex,
    LocalDone,
    LocalChunks,
}

impl Tree {
    pub const ALL: [Tree; 12] = [
        Tree::Meta,
        Tree::Packs,
        Tree::Index,
        Tree::Done,
        Tree::Chunks,
        Tree::Poison,
        Tree::Keys,
        Tree::Expiry,
        Tree::LocalPacks,
        Tree::LocalIndex,
        Tree::LocalDone,
        Tree::LocalChunks,
    ];

    /// The first byte of its keys in sled: never changes.
    pub fn code(self) -> u8 {
        Self::ALL.iter().position(|t| *t == self).expect("it is one of all") as u8 + 1
    }

    /// The name on disk: never changes.
    pub fn name(self) -> &'static str {
        match self {
            Tree::Meta => "meta",
            Tree::Packs => "packs",
            Tree::Index => "index",
            Tree::Done => "done",
            Tree::Chunks => "chunks",
            Tree::Poison => "poison",
            Tree::Keys => "keys",
            Tree::Expiry => "expiry",
            Tree::LocalPacks => "local.packs",
            Tree::LocalIndex => "local.index",
            Tree::LocalDone => "local.done",
            Tree::LocalChunks => "local.chunks",
        }
    }
}

/// One change; `None` deletes.
#[derive(Clone, Debug)]
pub struct Write {
    pub tree: Tree,
    pub key: Vec<u8>,
    pub value: Option<Vec<u8>>,
}

/// Why a store failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// Proven damage of the files: the folder may be set aside and salvaged.
    #[error("the files are damaged: {0}")]
    Corrupt(Arc<str>),
    /// A sync failed. The kernel may hold pages for clean that the disk never got, so that reading them back proves nothing; [`write_again`].
    #[error("the disk did not take it: {0}")]
    Sync(Arc<str>),
    /// Anything else: nothing is set aside.
    #[error("{0}")]
    Io(Arc<str>),
}

impl Failure {
    pub fn io(error: impl std::fmt::Display) -> Self {
        Self::Io(error.to_string().into())
    }
}

/// Key and value.
pub type Entry = (Vec<u8>, Vec<u8>);

/// What the outbox needs of a store.
pub trait Kv: Send {
    fn commit(&mut self, writes: Vec<Write>) -> Result<(), Failure>;
    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, Failure>;
    /// Entries with keys greater than `after`, at most `limit`.
    fn scan(&self, tree: Tree, after: Option<&[u8]>, limit: usize) -> Result<Vec<Entry>, Failure>;
    /// The longest value that the store keeps safe.
    fn value_max(&self) -> usize;
}

const FILES: [(OutboxStore, &str, &str); 2] =
    [(OutboxStore::Sled, "sled", self::sled::FILE), (OutboxStore::Sqlite, "sqlite", self::sqlite::FILE)];

/// A folder that holds the other kind of store is not opened: its records would wait there for ever.
pub fn check_kind(kind: OutboxStore, dir: &Path) -> Result<(), Failure> {
    for (_, name, file) in FILES.into_iter().filter(|(other, ..)| *other != kind) {
        if dir.join(file).exists() {
            let ours = FILES.iter().find(|(k, ..)| *k == kind).map_or("", |(_, name, _)| name);
            let text = format!(
                "{} is a store of outbox.store = \"{name}\", and the configuration says \"{ours}\": set it back; to change \
                 it, `dealscale outbox export` with the old setting, move the folder away, and `import` with the new one",
                dir.join(file).display()
            );
            return Err(Failure::Io(text.into()));
        }
    }
    Ok(())
}

/// Writes every file once more with what it shows: its pages are dirty again, and the sync that follows tells the truth. The owner
/// does this, with the store closed, after a sync that failed.
pub fn write_again(dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;
    for name in [self::sled::FILE, self::sqlite::FILE, "outbox.sqlite-wal"] {
        let file = match std::fs::File::options().read(true).write(true).open(dir.join(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let (mut buffer, mut at) = (vec![0; 1 << 20], 0);
        loop {
            let read = file.read_at(&mut buffer, at)?;
            if read == 0 {
                break;
            }
            file.write_all_at(&buffer[..read], at)?;
            at += read as u64;
        }
        file.sync_all()?;
    }
    sync_dir(dir)
}

/// Opens (or makes) the store in `dir`.
pub fn open(kind: OutboxStore, dir: &Path) -> Result<Box<dyn Kv>, Failure> {
    Ok(match kind {
        OutboxStore::Sled => Box::new(sled::Sled::open(dir)?),
        OutboxStore::Sqlite => Box::new(sqlite::Sqlite::open(dir)?),
    })
}

/// Syncs a folder's entries (a new file is only as durable as its name).
pub fn sync_dir(dir: &Path) -> std::io::Result<()> {
    std::fs::File::open(dir)?.sync_all()
}
