//! How an event becomes bytes in the outbox, and back. Pure.
//!
//! ```text
//! record   format u8 = 1 | flags u8 (1: sealed) | rest
//! rest     header length u32 | envelope as JSON | body          (sealed as a whole when encryption at rest is on)
//! message  format u8 = 1 | flags u8 = 0 | header length u32 | forward without claims as JSON | claims
//! ```

use std::collections::BTreeMap;

use bytes::Bytes as Body;
use serde::{Deserialize, Serialize};

use super::Forward;
use crate::clock::Timestamp;
use crate::event::{Envelope, Event};
use crate::ids::{OrderingKey, Tenant, Topic};
use crate::seal::Seal;

const FORMAT: u8 = 1;
const SEALED: u8 = 1;
/// What a seal is bound to: a record of the outbox cannot pass for anything else that is sealed with the same key.
const AAD: &[u8] = b"dealscale outbox record 1";

/// Why bytes are not a record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Bad {
    #[error("the checksum is wrong")]
    Checksum,
    #[error("it is cut short")]
    Short,
    #[error("it has format {0}, this release reads {FORMAT}")]
    Format(u8),
    #[error("its header cannot be read")]
    Header,
    #[error("it is encrypted, and outbox.encryption_key is not set or not the right one")]
    Sealed,
}

fn framed(flags: u8, header: &[u8], body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(6 + header.len() + body.len());
    bytes.extend_from_slice(&[FORMAT, flags]);
    bytes.extend_from_slice(&(header.len() as u32).to_be_bytes());
    bytes.extend_from_slice(header);
    bytes.extend_from_slice(body);
    bytes
}

fn unframed(rest: &[u8]) -> Result<(&[u8], &[u8]), Bad> {
    let (length, rest) = rest.split_at_checked(4).ok_or(Bad::Short)?;
    let length = u32::from_be_bytes(length.try_into().expect("four bytes")) as usize;
    rest.split_at_checked(length).ok_or(Bad::Short)
}

fn opened(bytes: &[u8]) -> Result<(u8, &[u8]), Bad> {
    match bytes {
        [FORMAT, flags, rest @ ..] => Ok((*flags, rest)),
        [format, _, ..] => Err(Bad::Format(*format)),
        _ => Err(Bad::Short),
    }
}

pub fn encode(event: &Event, seal: Option<&Seal>) -> Vec<u8> {
    let header = serde_json::to_vec(&event.envelope).expect("an envelope is plain data");
    let plain = framed(0, &header, &event.body);
    match seal {
        None => plain,
        Some(seal) => {
            let sealed = seal.seal(AAD, &plain[2..]).expect("sealing fails only without random numbers");
            let mut bytes = vec![FORMAT, SEALED];
            bytes.extend_from_slice(&sealed);
            bytes
        }
    }
}

pub fn decode(bytes: &[u8], seal: Option<&Seal>) -> Result<Event, Bad> {
    let (flags, rest) = opened(bytes)?;
    let plain;
    let rest = if flags & SEALED == SEALED {
        plain = seal.ok_or(Bad::Sealed)?.open(AAD, rest).map_err(|_| Bad::Sealed)?;
        &plain
    } else {
        rest
    };
    let (header, body) = unframed(rest)?;
    let envelope: Envelope = serde_json::from_slice(header).map_err(|_| Bad::Header)?;
    Ok(Event { envelope, body: Body::copy_from_slice(body) })
}

/// A message of the local broker without its claims.
#[derive(Serialize, Deserialize)]
struct Head {
    topic: Topic,
    tenant: Tenant,
    at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ordering_key: Option<OrderingKey>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    properties: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    deliver_at: Option<Timestamp>,
}

pub fn encode_message(forward: &Forward, at: Timestamp) -> Vec<u8> {
    let head = Head {
        topic: forward.topic.clone(),
        tenant: forward.tenant.clone(),
        at,
        ordering_key: forward.ordering_key.clone(),
        properties: forward.properties.clone(),
        deliver_at: forward.deliver_at,
    };
    framed(0, &serde_json::to_vec(&head).expect("plain data"), &forward.claims)
}

pub fn decode_message(bytes: &[u8]) -> Result<(Forward, Timestamp), Bad> {
    let (_, rest) = opened(bytes)?;
    let (head, claims) = unframed(rest)?;
    let head: Head = serde_json::from_slice(head).map_err(|_| Bad::Header)?;
    let Head { topic, tenant, at, ordering_key, properties, deliver_at } = head;
    Ok((Forward { topic, ordering_key, tenant, claims: claims.to_vec(), properties, deliver_at }, at))
}
