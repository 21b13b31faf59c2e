//! sled 0.34, made safe.
//!
//! What sled calls flush is `sync_file_range`, which survives a killed process and not a power cut; its asynchronous flush
//! deadlocks under concurrency. So one thread owns it, flushes in the blocking way, and then syncs the file itself by a handle of
//! its own. Values stay below the size from which sled puts them into files of their own (`blobs/`), which it never syncs.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use super::{Entry, Failure, Kv, Tree, Write, sync_dir};

/// Fixed when a store is made. A quarter of it is where sled begins to use `blobs/`.
const SEGMENT: usize = 2 << 20;
/// Enough for the inner nodes of a million-record backlog; records are read once, in order.
const CACHE: u64 = 24 << 20;

/// Copying this much costs about a tenth of a second.
const COPY_MAX: u64 = 256 << 20;
const COPY: &str = "db.before-open";
pub const FILE: &str = "db";

pub struct Sled {
    db: sled::Db,
    file: File,
    blobs: PathBuf,
}

impl Sled {
    pub fn open(dir: &Path) -> Result<Self, Failure> {
        let fresh = !dir.join(FILE).exists();
        if !fresh {
            probe(&dir.join(FILE))?;
            keep_copy(dir)?;
        }
        let config = sled::Config::new()
            .path(dir)
            .segment_size(SEGMENT)
            .cache_capacity(CACHE)
            // `None` would turn sled's garbage collection off. What counts for durability is our own sync.
            .flush_every_ms(Some(500))
            .mode(sled::Mode::LowSpace);
        forget_caches(dir, |name| name.starts_with("snap.") && name.ends_with(".generating")).map_err(Failure::io)?;
        // On damaged files sled panics as often as it returns an error.
        let mut opened = catch_unwind(AssertUnwindSafe(|| config.open()));
        if let Ok(Err(sled::Error::Corruption { at: None, .. })) = opened {
            // Damage at no place of the log is damage of what sled keeps beside it and makes again from the log and from our settings.
            forget_caches(dir, |name| name.starts_with("snap.") || name == "conf").map_err(Failure::io)?;
            opened = catch_unwind(AssertUnwindSafe(|| config.open()));
        }
        let db = match opened {
            Ok(Ok(db)) => db,
            Ok(Err(sled::Error::Corruption { at, .. })) => {
                return Err(Failure::Corrupt(format!("sled found damage at {at:?}").into()));
            }
            Ok(Err(sled::Error::Io(error))) if error.kind() == std::io::ErrorKind::InvalidData => {
                return Err(Failure::Corrupt(error.to_string().into()));
            }
            Ok(Err(error)) => return Err(Failure::io(error)),
            // The file can be read (or this is an I/O error): what sled stumbled over is its content.
            Err(_) => {
                let readable =
                    File::open(dir.join(FILE)).and_then(|mut db| std::io::copy(&mut db, &mut std::io::sink()));
                return Err(match readable {
                    Ok(_) => Failure::Corrupt("sled panicked on its content".into()),
                    Err(error) => Failure::io(error),
                });
            }
        };
        let file = File::open(dir.join(FILE)).map_err(Failure::io)?;
        if fresh {
            guarded(|| db.flush())?;
            file.sync_all().map_err(Failure::io)?;
            sync_dir(dir).map_err(Failure::io)?;
        }
        Ok(Self { db, file, blobs: dir.join("blobs") })
    }
}

/// Removes files of sled that its log makes superfluous. sled itself takes a snapshot that was being written when the process died, or the
/// disk was full, for a damaged one (its filter knows another name), and would not open.
fn forget_caches(dir: &Path, which: impl Fn(&str) -> bool) -> std::io::Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(&which) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Checks the header of every segment, before sled does: where one is damaged sled takes the rest of its log for unwritten and **reuses
/// it**, so a salvage would come too late. Layout of sled 0.34.7: `crc32 ^ ffffffff | lsn | stable lsn`, little-endian, the checksum over
/// the latter two; a segment that was never used is all zero.
fn probe(file: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::FileExt;
    const HEADER: usize = 20;
    let db = File::open(file).map_err(Failure::io)?;
    let length = db.metadata().map_err(Failure::io)?.len();
    let mut at = 0;
    while at + HEADER as u64 <= length {
        let mut header = [0; HEADER];
        db.read_exact_at(&mut header, at).map_err(Failure::io)?;
        let stored = u32::from_le_bytes(header[..4].try_into().expect("four bytes")) ^ 0xffff_ffff;
        if header != [0; HEADER] && crc32fast::hash(&header[4..]) != stored {
            return Err(Failure::Corrupt(
                format!("the segment at byte {at} of {} has a damaged header", file.display()).into(),
            ));
        }
        at += SEGMENT as u64;
    }
    Ok(())
}

/// sled cuts its log off at the first message that is damaged. So a file of up to [`COPY_MAX`] is copied before sled opens it; whoever finds
/// that records are missing salvages the copy ([`forget_copy`] otherwise). A larger one is not: its loss is found out and reported, and
/// what sled cut off is gone.
fn keep_copy(dir: &Path) -> Result<(), Failure> {
    let length = dir.join(FILE).metadata().map_err(Failure::io)?.len();
    if length <= COPY_MAX {
        let (copy, new) = (dir.join(COPY), dir.join("db.copying"));
        // One that is there is from an open that did not end well: the file may have lost what it has.
        if copy.exists() {
            return Ok(());
        }
        // A full disk must not keep the outbox from opening, and a copy must not fill it: then there is none.
        let stat = nix::sys::statvfs::statvfs(dir).map_err(Failure::io)?;
        if stat.blocks_available() * stat.fragment_size() < 2 * length {
            return Ok(());
        }
        if std::fs::copy(dir.join(FILE), &new).and_then(|_| std::fs::rename(&new, copy)).is_err() {
            let _ = std::fs::remove_file(new);
        }
    }
    Ok(())
}

/// Nothing was missing.
pub fn forget_copy(dir: &Path) {
    let _ = std::fs::remove_file(dir.join(COPY));
}

/// All trees share sled's default one, told apart by their first byte: one batch of one tree is what sled recovers as a whole.
fn full_key(tree: Tree, key: &[u8]) -> Vec<u8> {
    let mut full = Vec::with_capacity(key.len() + 1);
    full.push(tree.code());
    full.extend_from_slice(key);
    full
}

/// Runs a call into sled; a panic inside is damage, as above.
fn guarded<T>(call: impl FnOnce() -> sled::Result<T>) -> Result<T, Failure> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error @ sled::Error::Corruption { .. })) => Err(Failure::Corrupt(error.to_string().into())),
        Ok(Err(error)) => Err(Failure::io(error)),
        Err(_) => Err(Failure::Io("sled panicked".into())),
    }
}

impl Kv for Sled {
    fn commit(&mut self, writes: Vec<Write>) -> Result<(), Failure> {
        if writes.is_empty() {
            return Ok(());
        }
        let mut batch = sled::Batch::default();
        for write in writes {
            let key = full_key(write.tree, &write.key);
            match write.value {
                Some(value) => batch.insert(key, value),
                None => batch.remove(key),
            }
        }
        guarded(|| self.db.apply_batch(batch))?;
        guarded(|| self.db.flush())?;
        self.file.sync_data().map_err(|e| Failure::Sync(e.to_string().into()))?;
        if self.blobs.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
            let text = "sled wrote a file into blobs/, which it never syncs: stop the appliance, `dealscale outbox export`, \
                        move the folder away and `import`";
            return Err(Failure::Io(text.into()));
        }
        Ok(())
    }

    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, Failure> {
        guarded(|| self.db.get(full_key(tree, key))).map(|value| value.map(|v| v.to_vec()))
    }

    fn scan(&self, tree: Tree, after: Option<&[u8]>, limit: usize) -> Result<Vec<Entry>, Failure> {
        use std::ops::Bound;
        let from = match after {
            Some(key) => Bound::Excluded(full_key(tree, key)),
            None => Bound::Included(vec![tree.code()]),
        };
        let to = Bound::Excluded(vec![tree.code() + 1]);
        guarded(|| {
            self.db
                .range::<Vec<u8>, _>((from, to))
                .take(limit)
                .map(|entry| entry.map(|(key, value)| (key[1..].to_vec(), value.to_vec())))
                .collect()
        })
    }

    fn value_max(&self) -> usize {
        30 << 10
    }
}
