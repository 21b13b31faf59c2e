//! Which waiting event is taken up next. Pure: no time, no I/O; generic over what waits.
//!
//! # Invariants
//! 1. Never more taken up than the limits allow: in all, per tenant, per route.
//! 2. Tenants that wait share what is taken up by their weights (stride scheduling: each has a pass that grows by
//!    `1 / weight`, the smallest goes next; who comes back from idleness, or could not be taken up because its route was full
//!    or its server down, goes on at the present pass: what was missed is not made up for at the others' cost).
//! 3. Of one tenant's events the smallest priority goes first, then the one that arrived first.
//! 4. Of one ordering key at most one event is out; the others wait behind it in their order of arrival until
//!    [`key_done`](Scheduler::key_done), across retries and while a dead letter holds the key.
//! 5. What was pushed is taken exactly once per push or [`requeue`](Scheduler::requeue).

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::ids::{OrderingKey, Tenant};

/// A route's place in the configuration.
pub type RouteIndex = usize;
/// Events of one tenant with one ordering key.
pub type OrderKey = (Tenant, OrderingKey);

/// What the scheduler looks at.
#[derive(Clone, Debug)]
pub struct Meta {
    pub tenant: Tenant,
    pub weight: u64,
    pub route: RouteIndex,
    pub priority: u8,
    pub order: Option<OrderKey>,
}

#[derive(Clone, Debug)]
pub struct Limits {
    pub all: usize,
    pub tenant: usize,
    pub routes: Vec<usize>,
}

/// By priority, then arrival.
type Line<T> = BTreeMap<(u8, u64), (Meta, T)>;

struct Lane<T> {
    pass: u64,
    /// By route, since one route may be full or its server down while others are not.
    routes: BTreeMap<RouteIndex, Line<T>>,
}

pub struct Scheduler<T> {
    limits: Limits,
    lanes: BTreeMap<Tenant, Lane<T>>,
    /// Passes of tenants that nothing waits for any more and that are ahead of the present one: coming back at once must not
    /// gain a turn.
    ahead: HashMap<Tenant, u64>,
    /// Pass of the latest pick: where a new lane starts.
    pass: u64,
    next: u64,
    waiting: usize,
    waiting_routes: Vec<usize>,
    out: usize,
    out_tenants: HashMap<Tenant, usize>,
    out_routes: Vec<usize>,
    /// Keys with an event in a lane or out, and who waits behind it.
    keys: HashMap<OrderKey, VecDeque<(Meta, T)>>,
    behind: usize,
}

/// One turn of a tenant with weight 1.
const STRIDE: u64 = 1 << 32;
/// Idle tenants remembered before those that are not ahead any more are forgotten.
const AHEAD_MAX: usize = 1_024;

impl<T> Scheduler<T> {
    pub fn new(limits: Limits) -> Self {
        let routes = limits.routes.len();
        Self {
            limits,
            lanes: BTreeMap::new(),
            ahead: HashMap::new(),
            pass: 0,
            next: 0,
            waiting: 0,
            waiting_routes: vec![0; routes],
            out: 0,
            out_tenants: HashMap::new(),
            out_routes: vec![0; routes],
            keys: HashMap::new(),
            behind: 0,
        }
    }

    /// Events that wait for a slot.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    pub fn waiting_for(&self, route: RouteIndex) -> usize {
        self.waiting_routes[route]
    }

    /// Events that wait behind another one of their ordering key.
    pub fn behind(&self) -> usize {
        self.behind
    }

    pub fn is_key_busy(&self, key: &OrderKey) -> bool {
        self.keys.contains_key(key)
    }

    pub fn push(&mut self, meta: Meta, item: T) {
        if let Some(key) = &meta.order {
            if let Some(behind) = self.keys.get_mut(key) {
                behind.push_back((meta, item));
                self.behind += 1;
                return;
            }
            self.keys.insert(key.clone(), VecDeque::new());
        }
        self.requeue(meta, item);
    }

    /// Back into the queue. Its key, if it has one, is still its own.
    pub fn requeue(&mut self, meta: Meta, item: T) {
        self.next += 1;
        self.waiting += 1;
        self.waiting_routes[meta.route] += 1;
        let (pass, ahead) = (self.pass, &mut self.ahead);
        let lane = self.lanes.entry(meta.tenant.clone()).or_insert_with(|| {
            let pass = ahead.remove(&meta.tenant).map_or(pass, |own| own.max(pass));
            Lane { pass, routes: BTreeMap::new() }
        });
        lane.routes.entry(meta.route).or_default().insert((meta.priority, self.next), (meta, item));
    }

    /// The next event among the routes that `allows` names; it is out until [`slot_free`](Self::slot_free).
    pub fn pick(&mut self, allows: impl Fn(RouteIndex) -> bool) -> Option<(Meta, T)> {
        if self.out >= self.limits.all || self.waiting == 0 {
            return None;
        }
        let open: Vec<bool> = (0..self.limits.routes.len())
            .map(|r| self.waiting_routes[r] > 0 && self.out_routes[r] < self.limits.routes[r] && allows(r))
            .collect();
        let mut best: Option<(u64, &Tenant, RouteIndex)> = None;
        for (tenant, lane) in &self.lanes {
            let pass = lane.pass.max(self.pass);
            if best.is_some_and(|(best, ..)| best <= pass)
                || self.out_tenants.get(tenant).is_some_and(|out| *out >= self.limits.tenant)
            {
                continue;
            }
            let first = lane.routes.iter().filter(|(route, _)| open[**route]);
            let first = first.filter_map(|(route, queue)| Some((queue.first_key_value()?.0, *route))).min();
            if let Some((_, route)) = first {
                best = Some((pass, tenant, route));
            }
        }
        let (pass, tenant, route) = best?;
        let tenant = tenant.clone();
        let lane = self.lanes.get_mut(&tenant)?;
        let queue = lane.routes.get_mut(&route)?;
        let (_, (meta, item)) = queue.pop_first()?;
        if queue.is_empty() {
            lane.routes.remove(&route);
        }
        self.pass = self.pass.max(pass);
        lane.pass = pass + STRIDE / meta.weight.max(1);
        if lane.routes.is_empty() {
            self.ahead.insert(tenant.clone(), lane.pass);
            self.lanes.remove(&tenant);
            if self.ahead.len() > AHEAD_MAX {
                self.ahead.retain(|_, ahead| *ahead > self.pass);
            }
        }
        self.waiting -= 1;
        self.waiting_routes[route] -= 1;
        self.out += 1;
        self.out_routes[route] += 1;
        *self.out_tenants.entry(tenant).or_default() += 1;
        Some((meta, item))
    }

    /// Takes out up to `max` of those events whose turn is last, of the one tenant and route that more than half of what waits belongs to,
    /// so that there is room for others. Events with an ordering key stay: others of theirs may wait behind them.
    pub fn thin_out(&mut self, max: usize) -> Vec<T> {
        let half = self.waiting / 2;
        let lines = self.lanes.values_mut().flat_map(|lane| lane.routes.iter_mut());
        let Some((route, line)) = lines.max_by_key(|(_, line)| line.len()).filter(|(_, line)| line.len() > half) else {
            return Vec::new();
        };
        // One stays: a lane without events would be looked at for nothing.
        let max = max.min(line.len() - 1);
        let last = line.iter().rev().filter(|(_, (meta, _))| meta.order.is_none());
        let out: Vec<_> = last.map(|(place, _)| *place).take(max).collect();
        self.waiting -= out.len();
        self.waiting_routes[*route] -= out.len();
        out.iter().filter_map(|place| line.remove(place)).map(|(_, item)| item).collect()
    }

    /// Its call is over: somebody else may have the slot. The key stays taken.
    pub fn slot_free(&mut self, meta: &Meta) {
        self.out -= 1;
        self.out_routes[meta.route] -= 1;
        if let Some(out) = self.out_tenants.get_mut(&meta.tenant) {
            *out -= 1;
            if *out == 0 {
                self.out_tenants.remove(&meta.tenant);
            }
        }
    }

    /// Done with the event that held the key: the next one behind it may go.
    pub fn key_done(&mut self, key: &OrderKey) {
        let Some(behind) = self.keys.get_mut(key) else { return };
        match behind.pop_front() {
            Some((meta, item)) => {
                self.behind -= 1;
                self.requeue(meta, item);
            }
            None => drop(self.keys.remove(key)),
        }
    }

    /// Everything that is not out, for giving back.
    pub fn drain(&mut self) -> Vec<T> {
        let lanes = std::mem::take(&mut self.lanes).into_values();
        let waiting = lanes.flat_map(|lane| lane.routes.into_values()).flat_map(BTreeMap::into_values);
        let behind = std::mem::take(&mut self.keys).into_values().flatten();
        self.waiting = 0;
        self.waiting_routes.fill(0);
        self.behind = 0;
        waiting.chain(behind).map(|(_, item)| item).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(tenant: &str, weight: u64, route: usize, order: Option<&str>) -> Meta {
        let tenant = Tenant::try_new(tenant).unwrap();
        let order = order.map(|key| (tenant.clone(), OrderingKey::try_new(key).unwrap()));
        Meta { tenant, weight, route, priority: 5, order }
    }

    fn limits(all: usize, tenant: usize, route: usize) -> Limits {
        Limits { all, tenant, routes: vec![route; 3] }
    }

    /// 256 seeds of random work; every invariant is checked after every step.
    #[test]
    fn invariants_hold_over_random_work() {
        for seed in 0..256 {
            simulate(seed);
        }
    }

    fn simulate(seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let limits = Limits {
            all: random.usize(1..12),
            tenant: random.usize(1..6),
            routes: (0..3).map(|_| random.usize(1..6)).collect(),
        };
        let mut scheduler = Scheduler::new(limits.clone());
        let mut out: Vec<(Meta, u32, bool)> = Vec::new();
        let (mut pushed, mut done) = (0u32, 0u32);
        let mut last_of_key: HashMap<OrderKey, u32> = HashMap::new();
        let mut down = [false; 3];
        for _ in 0..600 {
            match random.u8(0..10) {
                0..4 => {
                    let tenant = ["a", "b", "c"][random.usize(0..3)];
                    let key = [None, None, Some("k"), Some("l")][random.usize(0..4)];
                    scheduler.push(meta(tenant, random.u64(1..4), random.usize(0..3), key), pushed);
                    pushed += 1;
                }
                4..7 => {
                    if let Some((meta, id)) = scheduler.pick(|r| !down[r]) {
                        assert!(!down[meta.route], "seed {seed}");
                        if let Some(key) = &meta.order {
                            assert!(
                                !out.iter().any(|(m, ..)| m.order.as_ref() == Some(key)),
                                "seed {seed}: two of one key"
                            );
                            let last = last_of_key.insert(key.clone(), id);
                            assert!(last.is_none_or(|last| last <= id), "seed {seed}: {id} after {last:?}");
                        }
                        out.push((meta, id, true));
                    }
                }
                7 => down[random.usize(0..3)] ^= true,
                _ if !out.is_empty() => {
                    let (meta, id, slot) = out.swap_remove(random.usize(0..out.len()));
                    if slot {
                        scheduler.slot_free(&meta);
                    }
                    match random.u8(0..3) {
                        // A retry: the same event again, under its key.
                        0 => scheduler.requeue(meta, id),
                        // Followed: the slot is free, the key is not.
                        1 if slot => out.push((meta, id, false)),
                        _ => {
                            if let Some(key) = &meta.order {
                                scheduler.key_done(key);
                            }
                            done += 1;
                        }
                    }
                }
                _ => {}
            }
            let slots = |filter: &dyn Fn(&Meta) -> bool| out.iter().filter(|(m, _, slot)| *slot && filter(m)).count();
            assert!(slots(&|_| true) <= limits.all, "seed {seed}");
            for tenant in ["a", "b", "c"] {
                assert!(slots(&|m| m.tenant.as_str() == tenant) <= limits.tenant, "seed {seed}");
            }
            for (route, max) in limits.routes.iter().enumerate() {
                assert!(slots(&|m| m.route == route) <= *max, "seed {seed}");
            }
            let known = scheduler.waiting() + scheduler.behind() + out.len() + done as usize;
            assert_eq!(known, pushed as usize, "seed {seed}: lost or doubled");
        }
        let rest = scheduler.drain().len() + out.len() + done as usize;
        assert_eq!(rest, pushed as usize, "seed {seed}");
    }

    #[test]
    fn invariant_2_shares_follow_the_weights() {
        let mut scheduler = Scheduler::new(limits(1, 1, 1));
        for n in 0..1_000 {
            scheduler.push(meta("big", 3, 0, None), n);
            scheduler.push(meta("small", 1, 1, None), n);
        }
        let mut counts = HashMap::new();
        for _ in 0..400 {
            let (meta, _) = scheduler.pick(|_| true).unwrap();
            scheduler.slot_free(&meta);
            *counts.entry(meta.tenant.to_string()).or_insert(0) += 1;
        }
        assert!((295..=305).contains(&counts["big"]), "{counts:?}");
        // Somebody who was idle so far gets a fair turn, not all the turns that were missed.
        for n in 0..100 {
            scheduler.push(meta("late", 1, 2, None), n);
        }
        let late = (0..50)
            .filter(|_| {
                let (meta, _) = scheduler.pick(|_| true).unwrap();
                scheduler.slot_free(&meta);
                meta.tenant.as_str() == "late"
            })
            .count();
        assert!((8..=12).contains(&late), "{late}");
    }

    #[test]
    fn invariant_2_turns_missed_while_a_route_was_closed_are_not_made_up_for() {
        let mut scheduler = Scheduler::new(limits(1, 1, 1));
        for n in 0..1_000 {
            scheduler.push(meta("down", 1, 0, None), n);
            scheduler.push(meta("up", 1, 1, None), n);
        }
        let mut turns = |open: &[usize], count: usize| {
            (0..count)
                .filter(|_| {
                    let (meta, _) = scheduler.pick(|route| open.contains(&route)).unwrap();
                    scheduler.slot_free(&meta);
                    meta.tenant.as_str() == "down"
                })
                .count()
        };
        assert_eq!(turns(&[1], 500), 0);
        let down = turns(&[0, 1], 100);
        assert!((49..=51).contains(&down), "{down} of 100 turns");
    }

    #[test]
    fn the_largest_line_makes_room_and_the_others_stay() {
        let mut scheduler = Scheduler::new(limits(9, 9, 9));
        for n in 0..90 {
            scheduler.push(meta("noisy", 1, 0, None), n);
        }
        scheduler.push(meta("noisy", 1, 0, Some("k")), 90);
        for n in 91..100 {
            scheduler.push(meta("quiet", 1, 0, None), n);
        }
        let mut out = scheduler.thin_out(30);
        out.sort_unstable();
        assert_eq!(out, (60..90).collect::<Vec<_>>());
        assert_eq!((scheduler.waiting(), scheduler.waiting_for(0)), (70, 70));
        assert_eq!(scheduler.thin_out(1_000).len(), 60, "the one with a key stays");
        assert_eq!(scheduler.waiting(), 10);
        let left = std::iter::from_fn(|| scheduler.pick(|_| true)).count();
        assert_eq!(left, 9, "as many as there are slots");
    }

    #[test]
    fn invariant_2_coming_back_at_once_gains_no_turn() {
        let mut scheduler = Scheduler::new(limits(1, 1, 1));
        for n in 0..100 {
            scheduler.push(meta("backlog", 1, 0, None), n);
        }
        scheduler.push(meta("eager", 1, 0, None), 0);
        let mut eager = 0;
        for _ in 0..100 {
            let (picked, n) = scheduler.pick(|_| true).unwrap();
            scheduler.slot_free(&picked);
            if picked.tenant.as_str() == "eager" {
                eager += 1;
                scheduler.push(picked, n);
            }
        }
        assert!((49..=51).contains(&eager), "{eager}");
    }

    #[test]
    fn invariant_3_priority_then_arrival() {
        let mut scheduler = Scheduler::new(limits(9, 9, 9));
        for (n, priority) in [(1, 5), (2, 9), (3, 0), (4, 5)] {
            scheduler.push(Meta { priority, ..meta("a", 1, n % 3, None) }, n);
        }
        let order: Vec<_> = std::iter::from_fn(|| scheduler.pick(|_| true)).map(|(_, n)| n).collect();
        assert_eq!(order, [3, 1, 4, 2]);
    }

    #[test]
    fn a_backlog_delays_only_its_own_tenant() {
        let mut scheduler = Scheduler::new(limits(2, 2, 2));
        for n in 0..10_000 {
            scheduler.push(meta("noisy", 1, 0, None), n);
        }
        scheduler.push(meta("quiet", 1, 0, None), 10_000);
        let first: Vec<_> = (0..2).filter_map(|_| scheduler.pick(|_| true)).map(|(m, _)| m.tenant).collect();
        assert!(first.iter().any(|t| t.as_str() == "quiet"), "{first:?}");
    }
}
