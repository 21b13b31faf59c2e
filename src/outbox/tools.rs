//! The outbox for operators: verify a closed folder, export records to plain files, read them back.
//!
//! # Export, format 1
//! A folder with `dealscale-outbox-export` (the format's number) and one file a record, `<execution id>.<tenant>.record`: a JSON line
//! `{"format":1,"envelope":{…},"poisoned":null}`, then the body as it is. Bodies are plain even when the outbox is encrypted: guard the folder.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::store::sync_dir;
use super::{Error, Outbox, TenantLimits, engine, open};
use crate::clock::Clock;
use crate::config;
use crate::event::{Envelope, Event};
use crate::ids::{BodyHash, Environment};
use crate::units::Bytes;

const MARKER: &str = "dealscale-outbox-export";

/// What `verify` found.
#[derive(Debug, Serialize)]
pub struct Report {
    pub records: u64,
    pub poisoned: u64,
    /// Sequence and what is wrong with the record.
    pub damaged: Vec<(u64, String)>,
    pub data_loss_possible: Option<String>,
}

impl Report {
    pub fn is_sound(&self) -> bool {
        self.damaged.is_empty() && self.data_loss_possible.is_none()
    }
}

/// Reads and checks every record of a folder that no appliance has open.
///
/// # Errors
/// It is open elsewhere, or cannot be opened (a damaged store is not salvaged here: starting the appliance does that).
pub fn verify(settings: &config::Outbox) -> Result<Report, Error> {
    let lock = open::lock(&settings.dir)?;
    let limits: TenantLimits = Arc::new(|_| (1, Bytes(u64::MAX)));
    let engine = open::engine_without_salvage(&Arc::new(settings.clone()), &open::seal(settings)?, &limits);
    let mut engine = engine.map_err(|failure| open::failed(&settings.dir, &failure))?;
    let (records, damaged) = engine.check_all().map_err(|e| engine::failed("read the records", &e))?;
    let status = engine.snapshot();
    drop((engine, lock));
    Ok(Report {
        records: records + damaged.len() as u64,
        poisoned: status.poisoned,
        damaged: damaged.into_iter().map(|(sequence, bad)| (sequence, bad.to_string())).collect(),
        data_loss_possible: status.data_loss_possible,
    })
}

/// Opens a folder that no appliance has open, without limits. Who only reads does not `salvage`.
///
/// # Errors
/// As [`Outbox::open`]; without `salvage` also that the folder is damaged.
pub fn open_alone(settings: &config::Outbox, environment: &Environment, salvage: bool) -> Result<Outbox, Error> {
    let settings = config::Outbox { bytes_max: Bytes(u64::MAX), count_max: u64::MAX, ..settings.clone() };
    Outbox::open_with(&settings, environment, Arc::new(|_| (1, Bytes(u64::MAX))), Clock::System, salvage)
}

#[derive(Serialize, Deserialize)]
struct Head {
    format: u8,
    envelope: Envelope,
    poisoned: Option<String>,
}

/// Writes records to a folder.
pub struct Export {
    dir: PathBuf,
    count: u64,
}

impl Export {
    /// # Errors
    /// The folder is there already and is not empty, or cannot be made.
    pub fn create(dir: &Path) -> io::Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        if std::fs::read_dir(dir)?.next().is_some() {
            let text = format!("{} is not empty; export into a new folder", dir.display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        std::fs::write(dir.join(MARKER), "1\n")?;
        Ok(Self { dir: dir.to_owned(), count: 0 })
    }

    /// # Errors
    /// The disk is full, or the like.
    pub fn write(&mut self, event: &Event, poisoned: Option<&str>) -> io::Result<()> {
        let envelope = &event.envelope;
        let path = self.dir.join(format!("{}.{}.record", envelope.execution_id, envelope.tenant));
        let head = Head { format: 1, envelope: envelope.clone(), poisoned: poisoned.map(str::to_owned) };
        let mut file = File::options().create_new(true).write(true).mode(0o600).open(path)?;
        file.write_all(&serde_json::to_vec(&head)?)?;
        file.write_all(b"\n")?;
        file.write_all(&event.body)?;
        file.sync_all()?;
        self.count += 1;
        Ok(())
    }

    /// # Errors
    /// The folder cannot be synced.
    pub fn finish(self) -> io::Result<u64> {
        sync_dir(&self.dir)?;
        Ok(self.count)
    }
}

/// An exported record.
#[derive(Debug)]
pub struct Entry {
    pub event: Event,
    pub poisoned: Option<String>,
}

/// Reads what [`Export`] wrote, file by file. Each body is checked against its hash.
///
/// # Errors
/// It is not such a folder.
pub fn read_export(dir: &Path) -> io::Result<impl Iterator<Item = io::Result<Entry>>> {
    let bad = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    match std::fs::read_to_string(dir.join(MARKER)) {
        Ok(format) if format.trim() == "1" => {}
        Ok(_) => return Err(bad(format!("{} was written by a newer release", dir.display()))),
        Err(_) => return Err(bad(format!("{} is not an export: {MARKER} is missing", dir.display()))),
    }
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "record") {
            paths.push(path);
        }
    }
    // Ids of version 7 sort by time: the order in which they were accepted, where the appliance made them.
    paths.sort();
    Ok(paths.into_iter().map(move |path| {
        let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {what}", path.display()));
        let mut reader = BufReader::new(File::open(&path)?);
        let mut line = Vec::new();
        reader.read_until(b'\n', &mut line)?;
        let head: Head = serde_json::from_slice(&line).map_err(|_| bad("its first line cannot be read"))?;
        if head.format != 1 {
            return Err(bad("it was written by a newer release"));
        }
        let mut body = Vec::new();
        reader.read_to_end(&mut body)?;
        if BodyHash::of(&body) != head.envelope.body_hash {
            return Err(bad("its body is damaged: the hash differs"));
        }
        Ok(Entry { event: Event { envelope: head.envelope, body: body.into() }, poisoned: head.poisoned })
    }))
}
