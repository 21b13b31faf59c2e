//! Appliances that share a subscription must believe each other's references.
//!
//! Work goes to whoever is free, so an appliance that lacks another one's key would refuse good references. Every
//! consumer therefore tells, in its metadata, which key its appliance signs with and which ones it verifies. An appliance
//! that does not fit to those that are there neither publishes nor delivers, and says so, until it does.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::broker::KeyRing;
use crate::broker::admin::ConsumerStats;

/// The `kid` that signs.
const SIGNS: &str = "dealscale-signs";
/// The `kid`s that verify, with spaces between them.
const VERIFIES: &str = "dealscale-verifies";

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Keys {
    /// Nobody was asked yet.
    #[default]
    Unknown,
    Agree,
    /// Why not.
    Differ(Arc<str>),
}

#[derive(Debug, Default)]
pub struct Fleet(Mutex<Keys>);

impl Fleet {
    pub fn keys(&self) -> Keys {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether it is another answer than before.
    pub fn set(&self, keys: Keys) -> bool {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = *slot != keys;
        *slot = keys;
        changed
    }
}

/// What our consumers tell.
pub fn metadata(keys: &KeyRing) -> BTreeMap<String, String> {
    BTreeMap::from([(SIGNS.to_owned(), keys.active().to_owned()), (VERIFIES.to_owned(), keys.ids().join(" "))])
}

/// How the keys of `consumers` and ours fit. Foreign workers tell nothing and are passed over.
pub fn compare<'c>(own: &KeyRing, own_name: &str, consumers: impl IntoIterator<Item = &'c ConsumerStats>) -> Keys {
    for consumer in consumers {
        let (Some(signs), Some(verifies)) = (consumer.metadata.get(SIGNS), consumer.metadata.get(VERIFIES)) else {
            continue;
        };
        if consumer.consumer_name == own_name {
            continue;
        }
        let at = consumer.address.as_deref().unwrap_or("another host");
        if !own.ids().contains(&signs.as_str()) {
            return Keys::Differ(
                format!(
                    "the appliance at {at} signs with key {signs:?}, which is not in our key ring: a fleet needs the same \
                     [[signing.keys]] on every host"
                )
                .into(),
            );
        }
        if !verifies.split(' ').any(|id| id == own.active()) {
            return Keys::Differ(
                format!(
                    "the appliance at {at} does not know our signing key {:?}: add a key on every host before it signs on one",
                    own.active()
                )
                .into(),
            );
        }
    }
    Keys::Agree
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::signing::{KeyMaterial, SigningKey};
    use crate::config::{Secret, Signing};

    fn ring(active: &str, ids: &[&str]) -> KeyRing {
        let keys = ids.iter().map(|id| SigningKey {
            id: (*id).to_owned(),
            material: KeyMaterial::Hs256(Secret::new(format!("{id}-{}", "x".repeat(32)))),
        });
        let dir = "/nonexistent".into();
        KeyRing::open(&Signing { active: Some(active.to_owned()), keys: keys.collect(), dir }).unwrap()
    }
    fn consumer(name: &str, ring: &KeyRing) -> ConsumerStats {
        ConsumerStats { consumer_name: name.into(), address: None, metadata: metadata(ring) }
    }

    #[test]
    fn keys_fit_when_each_side_believes_the_other() {
        let (old, both_old, both_new, new) =
            (ring("a", &["a"]), ring("a", &["a", "b"]), ring("b", &["a", "b"]), ring("b", &["b"]));
        let fits = |one: &KeyRing, other: &KeyRing| compare(one, "me", [&consumer("other", other)]) == Keys::Agree;
        // The order of a rotation: add everywhere, sign everywhere, remove everywhere.
        for (one, other) in [(&old, &both_old), (&both_old, &both_new), (&both_new, &new)] {
            assert!(fits(one, other) && fits(other, one));
        }
        for (one, other) in [(&old, &both_new), (&both_old, &new), (&old, &new)] {
            assert!(!fits(one, other) && !fits(other, one));
        }
        let stranger = ConsumerStats { consumer_name: "python".into(), ..ConsumerStats::default() };
        assert_eq!(compare(&old, "me", [&stranger, &consumer("me", &new)]), Keys::Agree);
    }
}
