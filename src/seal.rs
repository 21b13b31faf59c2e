//! Encryption at rest: AES-256-GCM over what outbox and payload store write to disk, when `outbox.encryption_key` is set.
//!
//! Layer 1: knows `config`'s [`Secret`] only. `outbox` and `payloads` use it.
//!
//! # Invariants
//! 1. What was sealed opens only with the same key and the same context (`aad`: whose record it is), so a sealed body that
//!    is copied behind another event's name does not open.
//! 2. A wrong key is told apart from a damaged record: a key has an id, and the id is in front of every sealed value.
//! 3. No key is used near GCM's limit for random nonces (2³² values under one key, NIST SP 800-38D 8.3, reached in ten
//!    days at 5,000 events a second): every value has a key of its own, derived from the root key and 16 random bytes.
//!
//! # On disk, format 1
//! ```text
//! 1 | key id [4] | salt [16] | nonce [12] | ciphertext | tag [16]
//! value key = HMAC-SHA256(root key, "dealscale seal 1\0" | salt)
//! key id    = first 4 bytes of HMAC-SHA256(root key, "dealscale seal id\0")
//! ```
//! The format byte, the key id and the salt are part of what the tag covers, because they decide the key.

use std::fmt;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::{hmac, rand};

use crate::config::Secret;

const FORMAT: u8 = 1;
const ID: usize = 4;
const SALT: usize = 16;
const NONCE: usize = 12;
const TAG: usize = 16;
const HEAD: usize = 1 + ID + SALT + NONCE;

/// Bytes that [`Seal::seal`] adds.
pub const OVERHEAD: usize = HEAD + TAG;

/// Why a sealed value could not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the encryption key must be 64 hexadecimal digits, as `openssl rand -hex 32` prints")]
    Key,
    #[error(
        "it was sealed with another encryption key (key id {sealed}, ours is {ours}): set the key it was written with"
    )]
    OtherKey { sealed: KeyId, ours: KeyId },
    #[error("the sealed value is damaged, or belongs to another record")]
    Damaged,
    #[error("the sealed value has format {0}, which this release cannot read")]
    Format(u8),
    #[error("the system has no randomness")]
    Random,
}

/// Tells keys apart without telling anything about them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct KeyId([u8; ID]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}
impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Seals and opens values with one root key.
pub struct Seal {
    root: hmac::Key,
    id: KeyId,
}

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Seal({})", self.id)
    }
}

impl Seal {
    /// `key`: 32 bytes in hexadecimal.
    pub fn new(key: &Secret) -> Result<Self, Error> {
        let hex = key.expose().as_bytes();
        if hex.len() != 64 {
            return Err(Error::Key);
        }
        let mut bytes = [0u8; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        let root = hmac::Key::new(hmac::HMAC_SHA256, &bytes);
        let mut id = [0; ID];
        id.copy_from_slice(&hmac::sign(&root, b"dealscale seal id\0").as_ref()[..ID]);
        Ok(Self { root, id: KeyId(id) })
    }

    pub fn id(&self) -> KeyId {
        self.id
    }

    /// `plain` sealed under `aad`, [`OVERHEAD`] bytes longer.
    pub fn seal(&self, aad: &[u8], plain: &[u8]) -> Result<Vec<u8>, Error> {
        let mut sealed = Vec::with_capacity(plain.len() + OVERHEAD);
        sealed.push(FORMAT);
        sealed.extend_from_slice(&self.id.0);
        sealed.resize(HEAD, 0);
        rand::fill(&mut sealed[1 + ID..HEAD]).map_err(|_| Error::Random)?;
        sealed.extend_from_slice(plain);
        let (head, body) = sealed.split_at_mut(HEAD);
        let tag = self
            .value_key(head)?
            .seal_in_place_separate_tag(nonce(head), Aad::from(context(head, aad)), body)
            .map_err(|_| Error::Damaged)?;
        sealed.extend_from_slice(tag.as_ref());
        Ok(sealed)
    }

    /// What [`seal`](Self::seal) was given, if `aad` is the same.
    pub fn open(&self, aad: &[u8], sealed: &[u8]) -> Result<Vec<u8>, Error> {
        match sealed.first() {
            Some(&FORMAT) if sealed.len() >= OVERHEAD => {}
            Some(&FORMAT) | None => return Err(Error::Damaged),
            Some(&other) => return Err(Error::Format(other)),
        }
        let (head, body) = sealed.split_at(HEAD);
        if head[1..1 + ID] != self.id.0 {
            let mut id = [0; ID];
            id.copy_from_slice(&head[1..1 + ID]);
            return Err(Error::OtherKey { sealed: KeyId(id), ours: self.id });
        }
        let mut body = body.to_vec();
        let plain = self
            .value_key(head)?
            .open_in_place(nonce(head), Aad::from(context(head, aad)), &mut body)
            .map_err(|_| Error::Damaged)?
            .len();
        body.truncate(plain);
        Ok(body)
    }

    fn value_key(&self, head: &[u8]) -> Result<LessSafeKey, Error> {
        let mut derive = hmac::Context::with_key(&self.root);
        derive.update(b"dealscale seal 1\0");
        derive.update(&head[1 + ID..1 + ID + SALT]);
        UnboundKey::new(&AES_256_GCM, derive.sign().as_ref()).map(LessSafeKey::new).map_err(|_| Error::Key)
    }
}

fn digit(hex: u8) -> Result<u8, Error> {
    (hex as char).to_digit(16).map(|d| d as u8).ok_or(Error::Key)
}

fn nonce(head: &[u8]) -> Nonce {
    Nonce::try_assume_unique_for_key(&head[1 + ID + SALT..HEAD]).expect("a nonce has 12 bytes")
}

/// The head has a fixed length, so the two parts cannot run into each other.
fn context(head: &[u8], aad: &[u8]) -> Vec<u8> {
    [&head[..1 + ID + SALT], aad].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seal(fill: &str) -> Seal {
        Seal::new(&Secret::new(fill.repeat(32))).unwrap()
    }

    #[test]
    fn invariant_1_a_value_opens_only_in_its_own_context() {
        let seal = seal("a1");
        for plain in [&b""[..], b"x", &[7; 100_000]] {
            let sealed = seal.seal(b"acme/1", plain).unwrap();
            assert_eq!(sealed.len(), plain.len() + OVERHEAD);
            assert_eq!(seal.open(b"acme/1", &sealed).unwrap(), plain);
            assert_eq!(seal.open(b"acme/2", &sealed), Err(Error::Damaged));
            for at in [5, HEAD - 1, sealed.len() - 1] {
                let mut flipped = sealed.clone();
                flipped[at] ^= 1;
                assert_eq!(seal.open(b"acme/1", &flipped), Err(Error::Damaged), "byte {at}");
            }
            assert_eq!(seal.open(b"acme/1", &sealed[..sealed.len() - 1]), Err(Error::Damaged));
        }
    }

    #[test]
    fn invariant_2_a_wrong_key_is_told_apart_from_damage() {
        let (one, other) = (seal("a1"), seal("a2"));
        let sealed = one.seal(b"", b"secret").unwrap();
        assert_eq!(other.open(b"", &sealed), Err(Error::OtherKey { sealed: one.id(), ours: other.id() }));
        assert_eq!(one.open(b"", b"{\"plain\":1}"), Err(Error::Format(b'{')));
        assert_eq!(one.open(b"", b""), Err(Error::Damaged));
    }

    #[test]
    fn invariant_3_no_two_values_look_alike() {
        let seal = seal("a1");
        let (a, b) = (seal.seal(b"", b"same").unwrap(), seal.seal(b"", b"same").unwrap());
        assert_ne!(a[1 + ID..HEAD], b[1 + ID..HEAD]);
        assert_ne!(a[HEAD..], b[HEAD..]);
    }

    #[test]
    fn a_key_is_64_hexadecimal_digits() {
        for bad in ["", "zz", &"g".repeat(64), &"a".repeat(63), &"ä".repeat(32)] {
            assert!(matches!(Seal::new(&Secret::new(bad)), Err(Error::Key)), "{bad}");
        }
        assert!(!format!("{:?}", seal("a1")).contains("a1a1"));
    }
}
