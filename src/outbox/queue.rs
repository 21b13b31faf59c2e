//! Which sequence is handed out next: in order within a group, weighted round robin between groups, one at a time for each ordering
//! key. Pure and in memory only; it is built again from the index when the store is opened.
//!
//! # Invariants
//! 1. A sequence that was handed out comes again only after [`Queue::again`].
//! 2. Of an ordering key only its holder is handed out; [`Queue::leave`] passes the key on to the next in order.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use super::packs::Packs;
use crate::ids::{OrderingKey, Tenant};

/// Entries of one group in a row, for each unit of its weight: enough that a pack is read once.
const TURN: u64 = 32;

#[derive(Debug, Default)]
struct Group {
    /// Packs with entries that were never handed out; `cursor` counts in the first of them.
    fresh: BTreeSet<u64>,
    cursor: u16,
    again: BTreeSet<u64>,
}

type Order = (Tenant, OrderingKey);

#[derive(Debug, Default)]
struct Line {
    holder: u64,
    behind: VecDeque<u64>,
}

#[derive(Debug, Default)]
pub struct Queue {
    groups: BTreeMap<Arc<str>, Group>,
    turn: Option<Arc<str>>,
    credit: u64,
    lines: HashMap<Order, Line>,
    keyed: HashMap<u64, Order>,
}

impl Queue {
    /// A pack with entries to hand out.
    pub fn pack(&mut self, group: &Arc<str>, first: u64) {
        self.groups.entry(group.clone()).or_default().fresh.insert(first);
    }

    /// Hand it out again.
    pub fn again(&mut self, group: &Arc<str>, sequence: u64) {
        self.groups.entry(group.clone()).or_default().again.insert(sequence);
    }

    /// The next sequence of an allowed group. `skip` says which are not to be handed out (done, held, poisoned).
    pub fn next(
        &mut self,
        packs: &Packs,
        allowed: impl Fn(&str) -> bool,
        weight: impl Fn(&str) -> u64,
        skip: impl Fn(u64) -> bool,
    ) -> Option<u64> {
        loop {
            let group = self.pick(&allowed, &weight)?;
            let state = self.groups.get_mut(&group).expect("it was picked");
            if let Some(sequence) = state.again.pop_first() {
                if !skip(sequence) {
                    return Some(sequence);
                }
            } else if let Some(first) = state.fresh.first().copied() {
                let count = packs.packs.get(&first).map_or(0, |p| p.count);
                let n = state.cursor;
                state.cursor += 1;
                if state.cursor >= count {
                    state.fresh.pop_first();
                    state.cursor = 0;
                }
                let sequence = first + u64::from(n);
                if n < count && packs.packs.get(&first).is_some_and(|p| !p.is_done(n)) && !skip(sequence) {
                    return Some(sequence);
                }
            } else {
                self.groups.remove(&group);
                self.credit = 0;
            }
        }
    }

    fn pick(&mut self, allowed: &impl Fn(&str) -> bool, weight: &impl Fn(&str) -> u64) -> Option<Arc<str>> {
        if self.credit > 0
            && let Some(turn) = self.turn.as_ref().filter(|t| self.groups.contains_key(*t) && allowed(t))
        {
            self.credit -= 1;
            return Some(turn.clone());
        }
        use std::ops::Bound::{Excluded, Unbounded};
        let behind = match &self.turn {
            Some(turn) => self.groups.range::<str, _>((Excluded(turn.as_ref()), Unbounded)).find(|(g, _)| allowed(g)),
            None => None,
        };
        let group = behind.or_else(|| self.groups.iter().find(|(g, _)| allowed(g)))?.0.clone();
        self.turn = Some(group.clone());
        self.credit = TURN * weight(&group).max(1) - 1;
        Some(group)
    }

    /// Whether `sequence` may be worked on now; otherwise it waits behind the holder of its key.
    pub fn enter(&mut self, tenant: &Tenant, key: &OrderingKey, sequence: u64) -> bool {
        let order = (tenant.clone(), key.clone());
        // One that was handed out twice (put back by an operator before its pack's turn came) stands in line once: a second place would
        // be given to it after it is done, and hold the key for ever.
        let stands = self.keyed.insert(sequence, order.clone()).is_some();
        match self.lines.get_mut(&order) {
            None => {
                self.lines.insert(order, Line { holder: sequence, behind: VecDeque::new() });
                true
            }
            Some(line) if line.holder == sequence => true,
            Some(line) => {
                if !stands {
                    line.behind.push_back(sequence);
                }
                false
            }
        }
    }

    /// `sequence` is done for good: its key, if it has one, goes to the next, which is handed out again.
    pub fn leave(&mut self, sequence: u64, group_of: impl Fn(u64) -> Option<Arc<str>>) {
        let Some(order) = self.keyed.remove(&sequence) else { return };
        let Some(line) = self.lines.get_mut(&order) else { return };
        if line.holder != sequence {
            line.behind.retain(|s| *s != sequence);
            return;
        }
        match line.behind.pop_front() {
            Some(next) => {
                line.holder = next;
                if let Some(group) = group_of(next) {
                    self.again(&group, next);
                }
            }
            None => drop(self.lines.remove(&order)),
        }
    }
}
