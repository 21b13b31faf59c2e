//! Numbered byte strings, many to a value: the form in which the outbox keeps records and the local broker keeps messages. Pure: it
//! reads through [`Kv`] and returns the writes to commit.
//!
//! # Invariants
//! 1. A pack holds consecutive sequences of one group (a tenant; a tenant and a topic). Its value never changes but to drop entries that are done.
//! 2. Which entries are done is a bitmap beside it. Setting any bit never changes another; a pack, its index entry and its bitmap go in
//!    one batch when all bits are set.
//! 3. Sequences are never used twice, not even after everything was deleted or a commit failed.
//! 4. Opening reads index and bitmaps, not the packs.
//!
//! # On disk, format 1 (big-endian, so that keys sort)
//! ```text
//! packs   first sequence u64 -> "DSP1" | first u64 | count u16 | (length u32 | crc32c u32 | bytes)*
//!         length u32::MAX: the entry lies in chunks, and bytes is its length u64
//! chunks  sequence u64 | part u16 -> "DSC1" | sequence u64 | part u16 | parts u16 | crc32c u32 | bytes
//! index   first sequence u64 -> count u16 | at i64 | group length u16 | group | (size u32 | id [u8; 16])* | crc32c u32
//! done    first sequence u64 -> bitmap, least significant bit first | crc32c u32
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use super::record::Bad;
use super::store::{Failure, Kv, Tree, Write};
use crate::clock::Timestamp;

pub const MAGIC: &[u8; 4] = b"DSP1";
pub const CHUNK_MAGIC: &[u8; 4] = b"DSC1";
const CHUNKED: u32 = u32::MAX;
const PACK_HEAD: usize = 4 + 8 + 2;
const ENTRY_HEAD: usize = 8;
const CHUNK_HEAD: usize = 4 + 8 + 2 + 2 + 4;
/// Entries of one pack: bounds what one bitmap and one index entry can grow to.
const COUNT_MAX: usize = 512;

/// The four trees of one log.
#[derive(Clone, Copy, Debug)]
pub struct Trees {
    pub packs: Tree,
    pub index: Tree,
    pub done: Tree,
    pub chunks: Tree,
}

/// An entry to append.
pub struct New {
    pub id: [u8; 16],
    pub bytes: Vec<u8>,
}

/// What is kept in memory of a pack: about a hundred bytes for up to 512 entries.
#[derive(Debug)]
pub struct Pack {
    pub group: Arc<str>,
    pub at: Timestamp,
    pub count: u16,
    pub left: u16,
    done: Box<[u8]>,
    /// Entries dropped from the value so far.
    dropped: u16,
}

impl Pack {
    pub fn is_done(&self, n: u16) -> bool {
        self.done[usize::from(n) / 8] & (1 << (n % 8)) != 0
    }
}

/// What opening tells of an entry that is not done.
pub struct Open {
    pub sequence: u64,
    pub size: u32,
    pub id: [u8; 16],
}

/// Size and id of an entry, as the index has them.
type Indexed = (u32, [u8; 16]);

/// A log of packs.
pub struct Packs {
    trees: Trees,
    pub packs: BTreeMap<u64, Pack>,
    groups: BTreeMap<Arc<str>, ()>,
    /// The pack that was read last: records are read in order.
    cache: Option<(u64, Vec<u8>)>,
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// A value with its checksum behind it: SQLite has none of its own, and a bit of `done` that flips would lose a record.
fn summed(mut value: Vec<u8>) -> Vec<u8> {
    let crc = crc32c::crc32c(&value);
    value.extend_from_slice(&crc.to_be_bytes());
    value
}

fn checked(value: &[u8]) -> Option<&[u8]> {
    let (value, crc) = value.split_at_checked(value.len().checked_sub(4)?)?;
    (crc32c::crc32c(value).to_be_bytes() == crc).then_some(value)
}

fn chunk_key(sequence: u64, part: u16) -> Vec<u8> {
    let mut key = sequence.to_be_bytes().to_vec();
    key.extend_from_slice(&part.to_be_bytes());
    key
}

impl Packs {
    /// Reads index and bitmaps; `each` hears of every entry that is not done, in order, with its pack's group.
    pub fn open(trees: Trees, kv: &dyn Kv, mut each: impl FnMut(&Arc<str>, Timestamp, Open)) -> Result<Self, Failure> {
        let mut log = Self { trees, packs: BTreeMap::new(), groups: BTreeMap::new(), cache: None };
        let mut after: Option<Vec<u8>> = None;
        loop {
            let entries = kv.scan(trees.index, after.as_deref(), 256)?;
            let Some((last, _)) = entries.last() else { return Ok(log) };
            after = Some(last.clone());
            for (key, value) in entries {
                let damaged = || Failure::Corrupt("an index entry of the outbox cannot be read".into());
                let first = u64::from_be_bytes(key.as_slice().try_into().map_err(|_| damaged())?);
                let bits = kv.get(trees.done, &key)?;
                let (pack, entries) = log.parse_index(&value, bits).ok_or_else(damaged)?;
                for (n, (size, id)) in entries.into_iter().enumerate() {
                    if !pack.is_done(n as u16) {
                        each(&pack.group, pack.at, Open { sequence: first + n as u64, size, id });
                    }
                }
                log.packs.insert(first, pack);
            }
        }
    }

    fn parse_index(&mut self, value: &[u8], bits: Option<Vec<u8>>) -> Option<(Pack, Vec<Indexed>)> {
        let value = checked(value)?;
        let count = u16::from_be_bytes(number(value, 0)?);
        let at = Timestamp(i64::from_be_bytes(number(value, 2)?));
        let group_length = usize::from(u16::from_be_bytes(number(value, 10)?));
        let group = std::str::from_utf8(value.get(12..12 + group_length)?).ok()?;
        let rest = &value[12 + group_length..];
        if rest.len() != usize::from(count) * 20 || count == 0 {
            return None;
        }
        let bytes = usize::from(count).div_ceil(8);
        let done: Box<[u8]> = match bits {
            Some(bits) => checked(&bits)?.into(),
            None => vec![0; bytes].into(),
        };
        if done.len() != bytes {
            return None;
        }
        let entries: Vec<_> = rest
            .chunks(20)
            .map(|e| {
                let size = u32::from_be_bytes(e[..4].try_into().expect("four bytes"));
                (size, e[4..].try_into().expect("sixteen bytes"))
            })
            .collect();
        let set = (0..count).filter(|n| done[usize::from(*n) / 8] & (1 << (n % 8)) != 0).count() as u16;
        let group = self.group(group);
        Some((Pack { group, at, count, left: count - set, done, dropped: 0 }, entries))
    }

    /// One `Arc` for each group name.
    fn group(&mut self, name: &str) -> Arc<str> {
        if let Some((group, ())) = self.groups.get_key_value(name) {
            return group.clone();
        }
        let group: Arc<str> = name.into();
        self.groups.insert(group.clone(), ());
        group
    }

    /// Writes for `entries` of one group, from sequence `first` on.
    pub fn append(
        &mut self,
        first: u64,
        group: &str,
        at: Timestamp,
        entries: Vec<New>,
        value_max: usize,
        writes: &mut Vec<Write>,
    ) {
        let group = self.group(group);
        let mut sequence = first;
        let mut entries = entries.into_iter().peekable();
        while entries.peek().is_some() {
            let start = sequence;
            let mut value = Vec::with_capacity(value_max.min(4096));
            value.extend_from_slice(MAGIC);
            value.extend_from_slice(&start.to_be_bytes());
            value.extend_from_slice(&[0, 0]);
            let mut index = Vec::new();
            let mut count = 0;
            while let Some(entry) = entries.peek() {
                let fits = entry.bytes.len() + ENTRY_HEAD + PACK_HEAD <= value_max;
                let size = ENTRY_HEAD + if fits { entry.bytes.len() } else { 8 };
                if count > 0 && (value.len() + size > value_max || count == COUNT_MAX) {
                    break;
                }
                let entry = entries.next().expect("it was peeked");
                let crc = crc32c::crc32c(&entry.bytes);
                if fits {
                    value.extend_from_slice(&(entry.bytes.len() as u32).to_be_bytes());
                    value.extend_from_slice(&crc.to_be_bytes());
                    value.extend_from_slice(&entry.bytes);
                } else {
                    value.extend_from_slice(&CHUNKED.to_be_bytes());
                    value.extend_from_slice(&crc.to_be_bytes());
                    value.extend_from_slice(&(entry.bytes.len() as u64).to_be_bytes());
                    self.chunk(sequence, &entry.bytes, value_max, writes);
                }
                index.extend_from_slice(&(entry.bytes.len() as u32).to_be_bytes());
                index.extend_from_slice(&entry.id);
                count += 1;
                sequence += 1;
            }
            value[PACK_HEAD - 2..PACK_HEAD].copy_from_slice(&(count as u16).to_be_bytes());
            let mut index_value = (count as u16).to_be_bytes().to_vec();
            index_value.extend_from_slice(&at.0.to_be_bytes());
            index_value.extend_from_slice(&(group.len() as u16).to_be_bytes());
            index_value.extend_from_slice(group.as_bytes());
            index_value.extend_from_slice(&index);
            let key = start.to_be_bytes().to_vec();
            writes.push(Write { tree: self.trees.packs, key: key.clone(), value: Some(value) });
            writes.push(Write { tree: self.trees.index, key, value: Some(summed(index_value)) });
            let pack = Pack {
                group: group.clone(),
                at,
                count: count as u16,
                left: count as u16,
                done: vec![0; count.div_ceil(8)].into(),
                dropped: 0,
            };
            self.packs.insert(start, pack);
        }
    }

    fn chunk(&self, sequence: u64, bytes: &[u8], value_max: usize, writes: &mut Vec<Write>) {
        let size = value_max - CHUNK_HEAD;
        let parts = bytes.len().div_ceil(size) as u16;
        for (part, piece) in bytes.chunks(size).enumerate() {
            let mut value = Vec::with_capacity(CHUNK_HEAD + piece.len());
            value.extend_from_slice(CHUNK_MAGIC);
            value.extend_from_slice(&sequence.to_be_bytes());
            value.extend_from_slice(&(part as u16).to_be_bytes());
            value.extend_from_slice(&parts.to_be_bytes());
            value.extend_from_slice(&crc32c::crc32c(piece).to_be_bytes());
            value.extend_from_slice(piece);
            writes.push(Write { tree: self.trees.chunks, key: chunk_key(sequence, part as u16), value: Some(value) });
        }
    }

    /// The pack of a sequence and its place in it.
    pub fn locate(&self, sequence: u64) -> Option<(u64, u16)> {
        let (first, pack) = self.packs.range(..=sequence).next_back()?;
        let n = sequence - first;
        (n < u64::from(pack.count)).then_some((*first, n as u16))
    }

    pub fn is_open(&self, sequence: u64) -> bool {
        self.locate(sequence).is_some_and(|(first, n)| !self.packs[&first].is_done(n))
    }

    /// Marks entries done; `keep` says whether a pack that is all done stays (it holds poisoned records, or is retained). Answers which packs
    /// are all done now.
    pub fn finish(
        &mut self,
        sequences: &[u64],
        keep: impl Fn(u64, u16) -> bool,
        kv: &dyn Kv,
        writes: &mut Vec<Write>,
    ) -> Result<Vec<u64>, Failure> {
        let mut touched = Vec::new();
        for sequence in sequences {
            let Some((first, n)) = self.locate(*sequence) else { continue };
            let pack = self.packs.get_mut(&first).expect("it was located");
            let byte = &mut pack.done[usize::from(n) / 8];
            if *byte & (1 << (n % 8)) == 0 {
                *byte |= 1 << (n % 8);
                pack.left -= 1;
                touched.push(first);
            }
        }
        touched.sort_unstable();
        touched.dedup();
        let mut complete = Vec::new();
        for first in touched {
            let (left, count) = (self.packs[&first].left, self.packs[&first].count);
            if left == 0 {
                complete.push(first);
                if !keep(first, count) {
                    self.remove(first, kv, writes)?;
                    continue;
                }
            }
            let pack = self.packs.get_mut(&first).expect("it was touched");
            let key = first.to_be_bytes().to_vec();
            writes.push(Write { tree: self.trees.done, key, value: Some(summed(pack.done.to_vec())) });
        }
        Ok(complete)
    }

    /// Deletes a pack with everything of it.
    pub fn remove(&mut self, first: u64, kv: &dyn Kv, writes: &mut Vec<Write>) -> Result<(), Failure> {
        let Some(pack) = self.packs.remove(&first) else { return Ok(()) };
        let key = first.to_be_bytes().to_vec();
        for tree in [self.trees.packs, self.trees.index, self.trees.done] {
            writes.push(Write { tree, key: key.clone(), value: None });
        }
        self.delete_chunks(first, first + u64::from(pack.count), kv, writes)
    }

    /// Deletes the chunks of sequences `from..to`.
    fn delete_chunks(&self, from: u64, to: u64, kv: &dyn Kv, writes: &mut Vec<Write>) -> Result<(), Failure> {
        let Some(before) = from.checked_sub(1) else { return Ok(()) };
        let mut after = chunk_key(before, u16::MAX);
        loop {
            let entries = kv.scan(self.trees.chunks, Some(&after), 16)?;
            let Some((last, _)) = entries.last() else { return Ok(()) };
            after.clone_from(last);
            for (key, _) in entries {
                match number::<8>(&key, 0).map(u64::from_be_bytes) {
                    Some(sequence) if sequence < to => writes.push(Write { tree: self.trees.chunks, key, value: None }),
                    _ => return Ok(()),
                }
            }
        }
    }

    /// Rewrites a pack whose entries are mostly done, so that they free their room: done entries become empty.
    pub fn compact(&mut self, first: u64, kv: &dyn Kv, writes: &mut Vec<Write>) -> Result<bool, Failure> {
        let Some(pack) = self.packs.get(&first) else { return Ok(false) };
        let finished = pack.count - pack.left;
        if pack.left == 0 || finished - pack.dropped < pack.count.div_ceil(2).max(2) {
            return Ok(false);
        }
        let Some(value) = kv.get(self.trees.packs, &first.to_be_bytes())? else { return Ok(false) };
        let mut smaller = value[..PACK_HEAD.min(value.len())].to_vec();
        let mut at = PACK_HEAD;
        for n in 0..pack.count {
            let Some(end) = entry_end(&value, at) else { return Ok(false) };
            if pack.is_done(n) {
                smaller.extend_from_slice(&[0; ENTRY_HEAD]);
            } else {
                smaller.extend_from_slice(&value[at..end]);
            }
            at = end;
        }
        for n in (0..pack.count).filter(|n| pack.is_done(*n)) {
            self.delete_chunks(first + u64::from(n), first + u64::from(n) + 1, kv, writes)?;
        }
        writes.push(Write { tree: self.trees.packs, key: first.to_be_bytes().to_vec(), value: Some(smaller) });
        self.packs.get_mut(&first).expect("it was found").dropped = finished;
        if self.cache.as_ref().is_some_and(|(cached, _)| *cached == first) {
            self.cache = None;
        }
        Ok(true)
    }

    /// The bytes of an entry. The inner error is damage of this one entry.
    pub fn read(&mut self, sequence: u64, kv: &dyn Kv) -> Result<Result<Vec<u8>, Bad>, Failure> {
        let Some((first, n)) = self.locate(sequence) else { return Ok(Err(Bad::Short)) };
        if self.cache.as_ref().is_none_or(|(cached, _)| *cached != first) {
            match kv.get(self.trees.packs, &first.to_be_bytes())? {
                Some(value) => self.cache = Some((first, value)),
                None => return Ok(Err(Bad::Short)),
            }
        }
        let value = &self.cache.as_ref().expect("it was just filled").1;
        entry(value, n, |length| read_chunks(kv, self.trees.chunks, sequence, length))
    }

    /// Forgets what was read when the batch changes it.
    pub fn forget_cache_if_written(&mut self, writes: &[Write]) {
        if let Some((first, _)) = &self.cache {
            let key = first.to_be_bytes();
            if writes.iter().any(|w| w.tree == self.trees.packs && w.key == key) {
                self.cache = None;
            }
        }
    }
}

fn entry_end(value: &[u8], at: usize) -> Option<usize> {
    let length = u32::from_be_bytes(number(value, at)?);
    let end = at + ENTRY_HEAD + if length == CHUNKED { 8 } else { length as usize };
    (end <= value.len()).then_some(end)
}

/// Entry `n` of a pack's value, its checksum checked.
pub fn entry(
    value: &[u8],
    n: u16,
    chunks: impl FnOnce(u64) -> Result<Option<Vec<u8>>, Failure>,
) -> Result<Result<Vec<u8>, Bad>, Failure> {
    let mut at = PACK_HEAD;
    for _ in 0..n {
        match entry_end(value, at) {
            Some(end) => at = end,
            None => return Ok(Err(Bad::Short)),
        }
    }
    let Some(end) = entry_end(value, at) else { return Ok(Err(Bad::Short)) };
    let length = u32::from_be_bytes(number(value, at).expect("checked above"));
    let crc = u32::from_be_bytes(number(value, at + 4).expect("checked above"));
    let bytes = if length == CHUNKED {
        let length = u64::from_be_bytes(number(value, at + ENTRY_HEAD).expect("checked above"));
        match chunks(length)? {
            Some(bytes) => bytes,
            None => return Ok(Err(Bad::Short)),
        }
    } else {
        value[at + ENTRY_HEAD..end].to_vec()
    };
    Ok(if crc32c::crc32c(&bytes) == crc { Ok(bytes) } else { Err(Bad::Checksum) })
}

fn read_chunks(kv: &dyn Kv, tree: Tree, sequence: u64, length: u64) -> Result<Option<Vec<u8>>, Failure> {
    let mut bytes = Vec::new();
    for part in 0..=u16::MAX {
        let Some(value) = kv.get(tree, &chunk_key(sequence, part))? else { return Ok(None) };
        let Some(piece) = value.get(CHUNK_HEAD..) else { return Ok(None) };
        bytes.extend_from_slice(piece);
        if bytes.len() as u64 >= length {
            bytes.truncate(length as usize);
            return Ok(Some(bytes));
        }
    }
    Ok(None)
}

/// What a salvage finds in raw bytes: `at` is the place of the bytes themselves.
pub enum Raw {
    /// An entry whose checksum is right.
    Entry { sequence: u64, at: usize, length: usize },
    /// An entry that lies in chunks.
    Large { sequence: u64, crc: u32, size: u64 },
    /// A chunk whose checksum is right.
    Chunk { sequence: u64, part: u16, at: usize, length: usize },
}

/// Finds packs and chunks, wherever they lie.
pub fn scan_raw(raw: &[u8], mut found: impl FnMut(Raw)) {
    for at in 0..raw.len().saturating_sub(PACK_HEAD) {
        let magic = &raw[at..at + 4];
        if magic == CHUNK_MAGIC {
            if let Some((sequence, part, length)) = raw_chunk(&raw[at..]) {
                found(Raw::Chunk { sequence, part, at: at + CHUNK_HEAD, length });
            }
        } else if magic == MAGIC
            && let (Some(first), Some(count)) = (number(raw, at + 4), number(raw, at + 12))
        {
            let (first, count) = (u64::from_be_bytes(first), u16::from_be_bytes(count));
            let mut place = at + PACK_HEAD;
            for n in 0..count.min(COUNT_MAX as u16) {
                let Some(end) = entry_end(raw, place) else { break };
                let length = u32::from_be_bytes(number(raw, place).expect("checked above"));
                let crc = u32::from_be_bytes(number(raw, place + 4).expect("checked above"));
                let Some(sequence) = first.checked_add(u64::from(n)) else { break };
                let bytes = place + ENTRY_HEAD;
                if length == CHUNKED {
                    let size = u64::from_be_bytes(number(raw, bytes).expect("checked above"));
                    found(Raw::Large { sequence, crc, size });
                } else if length > 0 && crc32c::crc32c(&raw[bytes..end]) == crc {
                    found(Raw::Entry { sequence, at: bytes, length: end - bytes });
                }
                place = end;
            }
        }
    }
}

/// A chunk with its checksum right. Its length is not stored: it is the longest prefix for which the checksum holds at the sizes that
/// stores use, so the known sizes are tried.
fn raw_chunk(raw: &[u8]) -> Option<(u64, u16, usize)> {
    let sequence = u64::from_be_bytes(number(raw, 4)?);
    let (part, parts) = (u16::from_be_bytes(number(raw, 12)?), u16::from_be_bytes(number(raw, 14)?));
    let crc = u32::from_be_bytes(number(raw, 16)?);
    if part >= parts {
        return None;
    }
    let rest = raw.get(CHUNK_HEAD..)?;
    let whole = [30 << 10, 14 << 10, 2 << 10].map(|max: usize| max - CHUNK_HEAD);
    if let Some(size) = whole.into_iter().find(|s| rest.get(..*s).is_some_and(|p| crc32c::crc32c(p) == crc)) {
        return Some((sequence, part, size));
    }
    // The last part is shorter: one pass over every length.
    let mut sum = 0;
    for (n, byte) in rest.iter().take(30 << 10).enumerate() {
        sum = crc32c::crc32c_append(sum, &[*byte]);
        if sum == crc {
            return Some((sequence, part, n + 1));
        }
    }
    None
}
