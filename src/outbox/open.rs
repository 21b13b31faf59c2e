//! Opening the folder: lock, store, and the salvage of one that is damaged.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write as _};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{Flock, FlockArg};

use super::engine::{Engine, Prepared};
use super::packs::scan_raw;
use super::store::{self, Failure, Tree, Write, sync_dir};
use super::{Error, TenantLimits, record};
use crate::clock::Clock;
use crate::config;
use crate::observe::outbox as events;
use crate::seal::Seal;
use crate::units::Bytes;

/// The newest on-disk format that this release reads. It writes it once an operator has said `dealscale state finalize`.
pub const FORMAT: u8 = if cfg!(feature = "next-format") { 2 } else { 1 };
/// What it writes until then, so that the release before can still read it: one step back works. Format 1 is the first.
pub const FORMAT_BEFORE: u8 = if FORMAT > 1 { FORMAT - 1 } else { 1 };
/// Raw files are searched in windows of this size, overlapping by the largest pack.
const WINDOW: usize = 8 << 20;
const OVERLAP: usize = 128 << 10;

/// Makes the folder and takes its lock.
pub fn lock(dir: &Path) -> Result<Flock<File>, Error> {
    let failed = |e: std::io::Error| Error::Store {
        doing: "make the outbox's folder",
        cause: format!("{}: {e}", dir.display()).into(),
    };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    if let Some(parent) = dir.parent().filter(|p| !p.as_os_str().is_empty()) {
        sync_dir(parent).map_err(failed)?;
    }
    let file =
        File::options().create(true).truncate(false).read(true).write(true).open(dir.join("lock")).map_err(failed)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            // For people: whose it is.
            let _ = lock.set_len(0).and_then(|()| lock.seek(SeekFrom::Start(0)).map(drop));
            let _ = writeln!(lock, "{}", std::process::id());
            Ok(lock)
        }
        Err((mut file, _)) => {
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            let pid = pid.trim();
            let whose = if pid.is_empty() { String::new() } else { format!(" (process {pid})") };
            Err(Error::Locked(format!("{}{whose}", dir.display())))
        }
    }
}

fn open_store(
    settings: &Arc<config::Outbox>,
    seal: &Option<Arc<Seal>>,
    limits: &TenantLimits,
) -> Result<Engine, Failure> {
    // A store that is there and says nothing of its format has lost it.
    let fresh =
        !files(&settings.dir).map_err(Failure::io)?.iter().any(|f| !f.ends_with("lock") && !f.ends_with(Witness::NAME));
    let mut kv = store::open(settings.store, &settings.dir)?;
    match kv.get(Tree::Meta, b"format")?.as_deref() {
        Some(&[format]) if (FORMAT_BEFORE..=FORMAT).contains(&format) => {}
        Some(other) => {
            let other = other.first().copied().unwrap_or(0);
            let text = format!(
                "{} has format {other}, this release reads {FORMAT_BEFORE} to {FORMAT}: install the release that wrote it",
                settings.dir.display()
            );
            return Err(Failure::Io(text.into()));
        }
        None if !fresh => return Err(Failure::Corrupt("the store has lost its format".into())),
        None => {
            kv.commit(vec![Write { tree: Tree::Meta, key: b"format".to_vec(), value: Some(vec![FORMAT_BEFORE]) }])?
        }
    }
    let engine = Engine::open(kv, settings.clone(), seal.clone(), limits.clone())?;
    if let Some(seen) = Witness::read(&settings.dir)
        && engine.next < seen
    {
        let text = format!("it ends before record {}, and record {} was acknowledged", engine.next, seen - 1);
        return Err(Failure::Corrupt(text.into()));
    }
    store::forget_copy(&settings.dir);
    Ok(engine)
}

/// Remembers, outside of the store, how far its sequences have come: a store that drops the end of its log without a word (sled does, behind
/// damage) is found out. Written after each commit and not synced, so it is never ahead of the store: after a power cut it may be
/// behind, which says nothing.
pub struct Witness {
    file: File,
    last: u64,
}

impl Witness {
    const NAME: &str = "witness";

    pub fn open(dir: &Path) -> std::io::Result<Self> {
        let file = File::options().create(true).truncate(false).write(true).open(dir.join(Self::NAME))?;
        Ok(Self { file, last: 0 })
    }

    /// A witness that cannot be written bears none; the store itself will say that the disk is bad.
    pub fn saw(&mut self, next: u64) {
        use std::os::unix::fs::FileExt;
        if next != self.last {
            let mut bytes = next.to_be_bytes().to_vec();
            bytes.extend_from_slice(&crc32c::crc32c(&next.to_be_bytes()).to_be_bytes());
            if self.file.write_all_at(&bytes, 0).is_ok() {
                self.last = next;
            }
        }
    }

    fn read(dir: &Path) -> Option<u64> {
        let bytes = std::fs::read(dir.join(Self::NAME)).ok()?;
        let (next, crc) = bytes.split_at_checked(8)?;
        let whole = crc.try_into().is_ok_and(|crc| crc32c::crc32c(next) == u32::from_be_bytes(crc));
        whole.then(|| u64::from_be_bytes(next.try_into().expect("eight bytes")))
    }
}

/// The key of encryption at rest.
pub fn seal(settings: &config::Outbox) -> Result<Option<Arc<Seal>>, Error> {
    let seal = settings.encryption_key.as_ref().map(Seal::new).transpose();
    let seal = seal.map_err(|e| Error::Store { doing: "read outbox.encryption_key", cause: e.to_string().into() })?;
    Ok(seal.map(Arc::new))
}

/// Opens the store as it is, for `verify`.
pub fn engine_without_salvage(settings: &config::Outbox) -> Result<Engine, Error> {
    let limits: TenantLimits = Arc::new(|_| (1, Bytes(u64::MAX)));
    Ok(open_store(&Arc::new(settings.clone()), &seal(settings)?, &limits)?)
}

/// Opens the store; a damaged one is set aside and salvaged.
pub fn engine(
    settings: &Arc<config::Outbox>,
    seal: &Option<Arc<Seal>>,
    limits: &TenantLimits,
    clock: &Clock,
) -> Result<Engine, Failure> {
    match open_store(settings, seal, limits) {
        Err(Failure::Corrupt(cause)) => salvage(settings, seal, limits, clock, &cause),
        other => other,
    }
}

fn salvage(
    settings: &Arc<config::Outbox>,
    seal: &Option<Arc<Seal>>,
    limits: &TenantLimits,
    clock: &Clock,
    cause: &str,
) -> Result<Engine, Failure> {
    let now = clock.now();
    let aside = PathBuf::from(format!("{}.corrupt-{}", settings.dir.display(), now.0));
    std::fs::create_dir(&aside).map_err(Failure::io)?;
    for entry in std::fs::read_dir(&settings.dir).map_err(Failure::io)? {
        let entry = entry.map_err(Failure::io)?;
        // The lock stays where it is: we hold it.
        if entry.file_name() != "lock" {
            std::fs::rename(entry.path(), aside.join(entry.file_name())).map_err(Failure::io)?;
        }
    }
    sync_dir(&settings.dir).map_err(Failure::io)?;
    sync_dir(&aside).map_err(Failure::io)?;
    let mut engine = open_store(settings, seal, limits)?;
    let mut seen = std::collections::BTreeSet::new();
    let (mut highest, mut records, mut unreadable) = (0, 0u64, 0u64);
    for path in files(&aside).map_err(Failure::io)? {
        let mut file = File::open(&path).map_err(Failure::io)?;
        let (mut window, mut tail): (Vec<u8>, usize) = (Vec::new(), 0);
        loop {
            window.drain(..window.len() - tail);
            let read = Read::by_ref(&mut file).take(WINDOW as u64).read_to_end(&mut window).map_err(Failure::io)?;
            let mut batch = Vec::new();
            scan_raw(&window, |sequence, bytes| {
                if let Ok(event) = record::decode(&bytes, seal.as_deref()) {
                    if seen.insert((event.envelope.tenant.clone(), event.envelope.execution_id)) {
                        batch.push((sequence, bytes, event.envelope));
                    }
                } else if record::decode_message(&bytes).is_err() {
                    unreadable += 1;
                }
                highest = highest.max(sequence);
            });
            batch.sort_by_key(|(sequence, _, _)| *sequence);
            // Above everything that was ever handed out, so that nothing is taken for something else.
            engine.next = engine.next.max(highest + 1);
            for (_, bytes, envelope) in batch {
                let item = Prepared {
                    tenant: envelope.tenant,
                    execution_id: envelope.execution_id,
                    body_hash: envelope.body_hash,
                    bytes,
                    key: None,
                };
                // Limits do not apply to what was accepted already: its own room is free now.
                if engine.append(vec![item], now, Bytes(u64::MAX)).iter().all(Result::is_ok) {
                    records += 1;
                }
                if engine.writes.len() > 512 {
                    engine.commit()?;
                }
            }
            engine.commit()?;
            if read == 0 {
                break;
            }
            tail = window.len().min(OVERLAP);
        }
    }
    let text = format!(
        "{now}: the store was damaged ({cause}); {records} records were salvaged, {unreadable} could not be read; the old folder is {}",
        aside.display()
    );
    engine.writes.push(Write { tree: Tree::Meta, key: b"loss".to_vec(), value: Some(text.clone().into_bytes()) });
    engine.status.data_loss_possible = Some(text);
    engine.commit()?;
    events::Salvaged { dir: &settings.dir, aside: &aside, records, unreadable }.emit();
    Ok(engine)
}

/// All files below a folder.
fn files(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { found.extend(files(&path)?) } else { found.push(path) }
    }
    Ok(found)
}
