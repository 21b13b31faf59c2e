//! Opening the folder: lock, store, and the salvage of one that is damaged.
//!
//! # Salvage
//! Killed at any step, it goes on at the next open: what it does is written in `salvage` first.
//! ```text
//! salvage {moved: false} ─▶ files move to DIR.corrupt-TIME ─▶ salvage {moved: true} ─▶ a new store is filled ─▶ salvage is deleted
//! ```
//! Until the last step nobody is served from the new store, so a half-filled one is thrown away and filled again.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::engine::{Engine, Prepared, fingerprint};
use super::packs::{Raw, scan_raw};
use super::record::Bad;
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
    let failed = |e: std::io::Error| Error::Open(format!("{}: {e}", dir.display()).into());
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
    let dir = &settings.dir;
    store::check_kind(settings.store, dir)?;
    let mut kv = store::open(settings.store, dir)?;
    match kv.get(Tree::Meta, b"format")?.as_deref() {
        Some(&[format]) if (FORMAT_BEFORE..=FORMAT).contains(&format) => {}
        Some(other) => {
            let other = other.first().copied().unwrap_or(0);
            let text = format!(
                "it has format {other}, this release reads {FORMAT_BEFORE} to {FORMAT}: install the release that wrote it"
            );
            return Err(Failure::Io(text.into()));
        }
        // The witness is there before the first record is: without it this is a first start that was cut short.
        None => {
            let mut empty = !dir.join(Witness::NAME).exists();
            for tree in Tree::ALL {
                empty = empty && kv.scan(tree, None, 1)?.is_empty();
            }
            if !empty {
                return Err(Failure::Corrupt("the store has lost its format".into()));
            }
            kv.commit(vec![Write { tree: Tree::Meta, key: b"format".to_vec(), value: Some(vec![FORMAT_BEFORE]) }])?;
            Witness::create(dir).map_err(Failure::io)?;
        }
    }
    let kept = kv.get(Tree::Meta, b"seal")?.map(|id| String::from_utf8_lossy(&id).into_owned());
    let mut engine = Engine::open(kv, settings.clone(), seal.clone(), limits.clone())?;
    if let Some(seen) = Witness::read(dir)
        && engine.next < seen
    {
        let text = format!("it ends before record {}, and record {} was acknowledged", engine.next, seen - 1);
        return Err(Failure::Corrupt(text.into()));
    }
    store::forget_copy(dir);
    let ours = seal.as_ref().map(|seal| seal.id().to_string());
    if let Some(kept) = &kept
        && ours.as_ref() != Some(kept)
        && engine.status.records > 0
    {
        // Each of them would be poisoned for what is a mistake in the configuration.
        let records = engine.status.records;
        return Err(Failure::Io(format!("{records} records {}", wrong_key(kept, ours.as_deref())).into()));
    }
    if kept != ours {
        let value = ours.map(String::into_bytes);
        engine.writes.push(Write { tree: Tree::Meta, key: b"seal".to_vec(), value });
        engine.commit()?;
    }
    Ok(engine)
}

fn wrong_key(kept: &str, ours: Option<&str>) -> String {
    let ours = ours.map_or("is not set".to_owned(), |ours| format!("has the key id {ours}"));
    format!(
        "were encrypted with the key of id {kept}, and outbox.encryption_key {ours}: set the key that they were written with \
         until the outbox is empty"
    )
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

    fn create(dir: &Path) -> std::io::Result<()> {
        let mut witness = Self::open(dir)?;
        witness.saw(1);
        witness.file.sync_all()?;
        sync_dir(dir)
    }

    pub fn open(dir: &Path) -> std::io::Result<Self> {
        let file = File::options().create(true).truncate(false).write(true).open(dir.join(Self::NAME))?;
        Ok(Self { file, last: 0 })
    }

    /// A witness that cannot be written bears none; the store itself will say that the disk is bad.
    pub fn saw(&mut self, next: u64) {
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
    Ok(seal.map_err(|e| Error::Open(format!("outbox.encryption_key: {e}").into()))?.map(Arc::new))
}

pub fn failed(dir: &Path, failure: &Failure) -> Error {
    Error::Open(format!("{}: {failure}", dir.display()).into())
}

/// Opens the store as it is: a damaged one is an error, and nothing is set aside.
pub fn engine_without_salvage(
    settings: &Arc<config::Outbox>,
    seal: &Option<Arc<Seal>>,
    limits: &TenantLimits,
) -> Result<Engine, Failure> {
    if let Some(plan) = Plan::read(&settings.dir)? {
        let text =
            format!("a salvage into {} was interrupted; starting the appliance finishes it", plan.aside.display());
        return Err(Failure::Io(text.into()));
    }
    open_store(settings, seal, limits).map_err(|failure| match failure {
        Failure::Corrupt(cause) => Failure::Corrupt(
            format!("{cause}; starting the appliance sets the folder aside and salvages every record that can be read")
                .into(),
        ),
        other => other,
    })
}

/// Opens the store; a damaged one is set aside and salvaged.
pub fn engine(
    settings: &Arc<config::Outbox>,
    seal: &Option<Arc<Seal>>,
    limits: &TenantLimits,
    clock: &Clock,
) -> Result<Engine, Failure> {
    if let Some(plan) = Plan::read(&settings.dir)? {
        return salvage(settings, seal, limits, clock, plan);
    }
    match open_store(settings, seal, limits) {
        Err(Failure::Corrupt(cause)) => begin_salvage(settings, seal, limits, clock, &cause),
        other => other,
    }
}

/// Opens the store after it failed in use.
pub fn again(
    settings: &Arc<config::Outbox>,
    seal: &Option<Arc<Seal>>,
    limits: &TenantLimits,
    clock: &Clock,
    failure: &Failure,
) -> Result<Engine, Failure> {
    match failure {
        // What was read proved it: opening it once more would only find it out once more.
        Failure::Corrupt(cause) if Plan::read(&settings.dir)?.is_none() => {
            return begin_salvage(settings, seal, limits, clock, cause);
        }
        Failure::Sync(_) => store::write_again(&settings.dir).map_err(|e| Failure::Sync(e.to_string().into()))?,
        _ => {}
    }
    engine(settings, seal, limits, clock)
}

/// What a salvage is at.
#[derive(Serialize, Deserialize)]
struct Plan {
    aside: PathBuf,
    cause: String,
    /// The new store's sequences begin above everything that was acknowledged.
    next: u64,
    moved: bool,
}

impl Plan {
    const NAME: &str = "salvage";

    fn read(dir: &Path) -> Result<Option<Self>, Failure> {
        let path = dir.join(Self::NAME);
        match std::fs::read(&path) {
            Ok(text) => {
                let plan =
                    serde_json::from_slice(&text).map_err(|e| Failure::io(format!("{}: {e}", path.display())))?;
                Ok(Some(plan))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Failure::io(format!("{}: {error}", path.display()))),
        }
    }

    fn write(&self, dir: &Path) -> std::io::Result<()> {
        let (path, new) = (dir.join(Self::NAME), dir.join("salvage.new"));
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        std::fs::rename(new, path)?;
        sync_dir(dir)
    }

    /// What the salvage itself keeps in the folder.
    fn is_ours(name: &std::ffi::OsStr) -> bool {
        // The lock stays where it is: we hold it.
        ["lock", Self::NAME, "salvage.new"].iter().any(|ours| name == *ours)
    }
}

fn begin_salvage(
    settings: &Arc<config::Outbox>,
    seal: &Option<Arc<Seal>>,
    limits: &TenantLimits,
    clock: &Clock,
    cause: &str,
) -> Result<Engine, Failure> {
    let dir = &settings.dir;
    // With the wrong key nothing could be salvaged, so nothing is touched.
    if let Some(bad) = Finds::of(dir, seal.as_deref(), true)?.only_sealed {
        return Err(Failure::Corrupt(format!("{cause}; and {bad}: set the right key, then it can be salvaged").into()));
    }
    let aside = PathBuf::from(format!("{}.corrupt-{}", dir.display(), clock.now().0));
    let next = Witness::read(dir).unwrap_or(1);
    let plan = Plan { aside, cause: cause.to_owned(), next, moved: false };
    plan.write(dir).map_err(Failure::io)?;
    salvage(settings, seal, limits, clock, plan)
}

fn salvage(
    settings: &Arc<config::Outbox>,
    seal: &Option<Arc<Seal>>,
    limits: &TenantLimits,
    clock: &Clock,
    mut plan: Plan,
) -> Result<Engine, Failure> {
    let (dir, aside) = (&settings.dir, plan.aside.clone());
    if plan.moved {
        clear(dir).map_err(Failure::io)?;
    } else {
        move_all(dir, &aside).map_err(Failure::io)?;
        plan.moved = true;
        plan.write(dir).map_err(Failure::io)?;
    }
    let finds = Finds::of(&aside, seal.as_deref(), false)?;
    // Limits do not apply to what was accepted already.
    let unlimited = config::Outbox { bytes_max: Bytes(u64::MAX), count_max: u64::MAX, ..(**settings).clone() };
    let no_quota: TenantLimits = Arc::new(|_| (1, Bytes(u64::MAX)));
    let mut engine = open_store(&Arc::new(unlimited), seal, &no_quota)?;
    engine.skip_to(plan.next.max(finds.highest.saturating_add(1)), finds.highest.saturating_add(1));
    let now = clock.now();
    let (mut records, mut unreadable) = (0u64, finds.unreadable);
    let mut bytes_in_batch = 0;
    for place in &finds.places {
        let Some(bytes) = finds.read(place).map_err(Failure::io)? else {
            unreadable += 1;
            continue;
        };
        let Ok(event) = record::decode(&bytes, seal.as_deref()) else {
            // A message of the local broker: the ledger has its event, and the sweeper publishes it again.
            unreadable += u64::from(record::decode_message(&bytes).is_err());
            continue;
        };
        bytes_in_batch += bytes.len();
        let envelope = event.envelope;
        let item = Prepared {
            tenant: envelope.tenant,
            execution_id: envelope.execution_id,
            body_hash: envelope.body_hash,
            bytes,
            key: None,
        };
        match engine.append(vec![item], now, Bytes(u64::MAX)).pop() {
            Some(Ok(taken)) => records += u64::from(!taken.duplicate),
            // Two bodies under one id.
            _ => unreadable += 1,
        }
        if engine.writes.len() > 512 || bytes_in_batch > 8 << 20 {
            engine.commit()?;
            bytes_in_batch = 0;
        }
    }
    let cause = &plan.cause;
    // What is missing altogether shows in the number that had been reached.
    let reached = plan.next.saturating_sub(1);
    let text = format!(
        "{now}: the store was damaged ({cause}); {records} records were salvaged, {unreadable} could not be read, and {reached} had been \
         accepted since the outbox was made; the old folder is {}",
        aside.display()
    );
    engine.writes.push(Write { tree: Tree::Meta, key: b"loss".to_vec(), value: Some(text.into_bytes()) });
    engine.commit()?;
    drop(engine);
    std::fs::remove_file(dir.join(Plan::NAME)).and_then(|()| sync_dir(dir)).map_err(Failure::io)?;
    events::Salvaged { dir, aside: &aside, records, unreadable }.emit();
    open_store(settings, seal, limits)
}

fn move_all(dir: &Path, aside: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(aside)?;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if !Plan::is_ours(&entry.file_name()) {
            std::fs::rename(entry.path(), aside.join(entry.file_name()))?;
        }
    }
    sync_dir(aside)?;
    sync_dir(dir)?;
    match aside.parent().filter(|p| !p.as_os_str().is_empty()) {
        Some(parent) => sync_dir(parent),
        None => Ok(()),
    }
}

/// Throws a half-filled store away.
fn clear(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if Plan::is_ours(&entry.file_name()) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    sync_dir(dir)
}

/// Where a record lies in raw files.
struct Place {
    sequence: u64,
    at: At,
}

enum At {
    Whole { file: usize, offset: u64, length: usize },
    Chunks { crc: u32, size: u64 },
}

/// What raw files hold. Only places are kept: a chunk of a record may lie anywhere, also in another file.
struct Finds {
    files: Vec<File>,
    /// In the order of their sequences; one event once.
    places: Vec<Place>,
    chunks: BTreeMap<(u64, u16), (usize, u64, usize)>,
    highest: u64,
    unreadable: u64,
    /// There are encrypted records and none that our key opens.
    only_sealed: Option<Bad>,
}

impl Finds {
    /// Searches all files below a folder; with `probe` only until one record could be read.
    fn of(dir: &Path, seal: Option<&Seal>, probe: bool) -> Result<Self, Failure> {
        let mut finds = Self {
            files: Vec::new(),
            places: Vec::new(),
            chunks: BTreeMap::new(),
            highest: 0,
            unreadable: 0,
            only_sealed: None,
        };
        let (mut seen, mut wanted, mut damaged): (HashSet<u64>, HashSet<(u64, u32)>, HashSet<u64>) = Default::default();
        let mut readable = false;
        for path in files(dir).map_err(Failure::io)? {
            let mut source = File::open(&path).map_err(Failure::io)?;
            let file = finds.files.len();
            finds.files.push(source.try_clone().map_err(Failure::io)?);
            let (mut window, mut tail, mut base): (Vec<u8>, usize, u64) = (Vec::new(), 0, 0);
            loop {
                let gone = window.len() - tail;
                window.drain(..gone);
                base += gone as u64;
                let read =
                    Read::by_ref(&mut source).take(WINDOW as u64).read_to_end(&mut window).map_err(Failure::io)?;
                scan_raw(&window, |raw| match raw {
                    Raw::Entry { sequence, at, length } => {
                        finds.highest = finds.highest.max(sequence);
                        let bytes = &window[at..at + length];
                        match record::decode(bytes, seal) {
                            Ok(event) => {
                                readable = true;
                                if seen.insert(fingerprint(&event.envelope.tenant, &event.envelope.execution_id)) {
                                    let at = At::Whole { file, offset: base + at as u64, length };
                                    finds.places.push(Place { sequence, at });
                                }
                            }
                            Err(bad) => {
                                if bad == Bad::Sealed {
                                    finds.only_sealed = Some(bad);
                                }
                                if record::decode_message(bytes).is_err() && damaged.insert(sequence) {
                                    finds.unreadable += 1;
                                }
                            }
                        }
                    }
                    Raw::Large { sequence, crc, size } => {
                        finds.highest = finds.highest.max(sequence);
                        if wanted.insert((sequence, crc)) {
                            finds.places.push(Place { sequence, at: At::Chunks { crc, size } });
                        }
                    }
                    Raw::Chunk { sequence, part, at, length } => {
                        finds.chunks.insert((sequence, part), (file, base + at as u64, length));
                    }
                });
                if read == 0 || (probe && readable) {
                    break;
                }
                tail = window.len().min(OVERLAP);
            }
        }
        if readable {
            finds.only_sealed = None;
        }
        finds.places.sort_by_key(|place| place.sequence);
        Ok(finds)
    }

    /// The bytes of a record, or `None` where a chunk of it is missing.
    fn read(&self, place: &Place) -> std::io::Result<Option<Vec<u8>>> {
        let piece = |(file, offset, length): (usize, u64, usize)| {
            let mut bytes = vec![0; length];
            self.files[file].read_exact_at(&mut bytes, offset).map(|()| bytes)
        };
        match place.at {
            At::Whole { file, offset, length } => piece((file, offset, length)).map(Some),
            At::Chunks { crc, size } => {
                let mut bytes = Vec::new();
                for chunk in self.chunks.range((place.sequence, 0)..=(place.sequence, u16::MAX)) {
                    bytes.extend(piece(*chunk.1)?);
                }
                bytes.truncate(size as usize);
                Ok((bytes.len() as u64 == size && crc32c::crc32c(&bytes) == crc).then_some(bytes))
            }
        }
    }
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
