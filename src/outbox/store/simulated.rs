//! A store in memory that fails when it is told to, and forgets on a crash what was not committed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::{Entry, Failure, Kv, Tree, Write};

/// The disk: outlives the handle.
#[derive(Clone, Default)]
pub struct Disk(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    entries: BTreeMap<(Tree, Vec<u8>), Vec<u8>>,
    /// What the next commits do.
    plan: Vec<Fault>,
    /// Reads find damage.
    damaged: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Nothing was written.
    Lost,
    /// It was written, but the sync failed: the outcome is unknown to the caller.
    Written,
}

impl Disk {
    /// The next commit fails like this.
    pub fn fail_next(&self, fault: Fault) {
        self.0.lock().unwrap().plan.push(fault);
    }
    /// From now on every read of a pack finds damage.
    pub fn damage(&self) {
        self.0.lock().unwrap().damaged = true;
    }
    /// No more faults.
    pub fn heal(&self) {
        let mut inner = self.0.lock().unwrap();
        inner.plan.clear();
        inner.damaged = false;
    }
    /// Changes one byte of a value.
    pub fn flip(&self, tree: Tree, at: usize) {
        let mut inner = self.0.lock().unwrap();
        let (_, value) = inner.entries.iter_mut().find(|((t, _), _)| *t == tree).unwrap();
        value[at] ^= 1;
    }
    /// What a crash at this moment leaves.
    pub fn copy(&self) -> Self {
        let entries = self.0.lock().unwrap().entries.clone();
        Self(Arc::new(Mutex::new(Inner { entries, ..Inner::default() })))
    }
    pub fn open(&self) -> Box<dyn Kv> {
        Box::new(self.clone())
    }
}

impl Kv for Disk {
    fn commit(&mut self, writes: Vec<Write>) -> Result<(), Failure> {
        let mut inner = self.0.lock().unwrap();
        let fault = inner.plan.pop();
        if fault != Some(Fault::Lost) {
            for write in writes {
                match write.value {
                    Some(value) => drop(inner.entries.insert((write.tree, write.key), value)),
                    None => drop(inner.entries.remove(&(write.tree, write.key))),
                }
            }
        }
        match fault {
            Some(_) => Err(Failure::Io("simulated".into())),
            None => Ok(()),
        }
    }
    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, Failure> {
        let inner = self.0.lock().unwrap();
        match inner.damaged && tree == Tree::Packs {
            true => Err(Failure::Corrupt("simulated".into())),
            false => Ok(inner.entries.get(&(tree, key.to_vec())).cloned()),
        }
    }
    fn scan(&self, tree: Tree, after: Option<&[u8]>, limit: usize) -> Result<Vec<Entry>, Failure> {
        let inner = self.0.lock().unwrap();
        let from = (tree, after.unwrap_or_default().to_vec());
        Ok(inner
            .entries
            .range(from..)
            .take_while(|((t, _), _)| *t == tree)
            .filter(|((_, key), _)| after.is_none_or(|a| key.as_slice() > a))
            .take(limit)
            .map(|((_, key), value)| (key.clone(), value.clone()))
            .collect())
    }
    fn value_max(&self) -> usize {
        // Small, so that every test meets packs that are full and records in chunks.
        2 << 10
    }
}
