//! Between the ledger's words and the columns of both databases: state numbers, sealed text, attempts, rows, cursors.
//!
//! Pure: no database here.
//!
//! # On disk
//! - `envelope`, `error`: `0 | bytes`, or sealed ([`crate::seal`], whose first byte is its format, 1 or more).
//! - `current`, `history`: frames `number u32 | length u32 | item`, item as above around an [`Attempt`] in JSON.
//! - `body`: as it is, or sealed; the column `sealed` tells.
//!
//! With an encryption key everything that can quote a payload is sealed: body, envelope (metadata, headers), error texts
//! and attempts. Tenant, ids, workflow, times, states and error classes stay readable, because they are searched.
//! Each sealed value is bound to what it is, its tenant and its execution id.

use std::borrow::Cow;

use bytes::Bytes as Body;
use uuid::Uuid;

use super::{Attempt, Claim, Error, Row};
use crate::clock::Timestamp;
use crate::event::{Envelope, State};
use crate::ids::Key;
use crate::seal::{self, Seal};

/// Rows by what is still to come of them; first part of the index behind sweeper, listings and collection.
pub(super) const OPEN: i16 = 0;
pub(super) const COMPLETE: i16 = 1;
pub(super) const COLLECTED: i16 = 2;
pub(super) const DEAD: i16 = 3;

pub(super) fn state_code(state: State) -> i16 {
    match state {
        State::Accepted => 0,
        State::Relayed => 1,
        State::Delivering => 2,
        State::Delivered => 3,
        State::Succeeded => 4,
        State::Failed => 5,
        State::Unknown => 6,
        State::Dead => 7,
        State::Cancelled => 8,
    }
}

pub(super) fn state_of(code: i16) -> Result<State, Unreadable> {
    State::ALL.into_iter().find(|s| state_code(*s) == code).ok_or(Unreadable::Damaged("its state is unknown"))
}

/// Phase and the time that orders rows inside it.
pub(super) fn phase_of(state: State, accepted_at: i64, now: i64) -> (i16, i64) {
    match state {
        State::Dead => (DEAD, accepted_at),
        state if state.is_final() => (COMPLETE, now),
        _ => (OPEN, now),
    }
}

/// Why a row or a payload cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// The configuration's fault: nothing of the store can be used until it is right.
    Key(String),
    /// This row's fault only.
    Damaged(&'static str),
}

impl From<seal::Error> for Unreadable {
    fn from(error: seal::Error) -> Self {
        match error {
            seal::Error::Damaged | seal::Error::Format(_) => Self::Damaged("it fails its authentication tag"),
            other => Self::Key(other.to_string()),
        }
    }
}

impl From<Unreadable> for Error {
    fn from(unreadable: Unreadable) -> Self {
        match unreadable {
            Unreadable::Key(text) => Error::Unusable(format!("cannot read the payload store: {text}")),
            Unreadable::Damaged(text) => Error::Refused(format!("a row of the payload store is damaged: {text}")),
        }
    }
}

/// Columns of a ledger row, as both databases give them.
#[derive(Clone, Debug, Default)]
pub(super) struct Columns {
    pub seq: i64,
    pub id: Uuid,
    pub tenant: String,
    pub body_hash: Vec<u8>,
    pub body_bytes: i64,
    pub relayed_at: i64,
    pub updated_at: i64,
    pub finished_at: Option<i64>,
    pub state: i16,
    pub next_at: Option<i64>,
    pub attempts: i32,
    pub crashes: i32,
    pub replays: i32,
    pub token: i64,
    pub claim_owner: Option<String>,
    pub claim_until: Option<i64>,
    pub error_class: Option<String>,
    pub error: Option<Vec<u8>>,
    pub n8n_execution_id: Option<String>,
    pub message_id: Option<String>,
    pub current: Option<Vec<u8>>,
    pub history: Option<Vec<u8>>,
    pub accepted_at: i64,
    pub envelope: Vec<u8>,
}

/// The columns above, in their order. `e` is `events`, `c` is `contents`.
pub(super) const COLUMNS: &str = "e.seq, e.id, e.tenant, e.body_hash, e.body_bytes, e.relayed_at, e.updated_at, \
    e.finished_at, e.state, e.next_at, e.attempts, e.crashes, e.replays, e.token, e.claim_owner, e.claim_until, \
    e.error_class, e.error, e.n8n_execution_id, e.message_id, e.current, e.history, e.accepted_at, c.envelope";

/// How many columns that is: what a query adds comes behind.
pub(super) const COLUMNS_COUNT: usize = 24;

/// Which text a sealed value is.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Body,
    Envelope,
    Error,
    Attempt,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Body => "body",
            Self::Envelope => "envelope",
            Self::Error => "error",
            Self::Attempt => "attempt",
        }
    }
}

/// Error texts are for people; n8n can answer with a page of megabytes.
const ERROR_BYTES_MAX: usize = 4096;

#[derive(Debug)]
pub(super) struct Codec {
    seal: Option<Seal>,
}

const NO_KEY: &str = "it holds sealed payloads, but outbox.encryption_key is not set";

impl Codec {
    pub fn new(seal: Option<Seal>) -> Self {
        Self { seal }
    }

    fn context(kind: Kind, tenant: &str, id: Uuid) -> Vec<u8> {
        // None of the parts can contain a slash.
        format!("payloads/{}/{tenant}/{id}", kind.as_str()).into_bytes()
    }

    fn wrap(&self, kind: Kind, tenant: &str, id: Uuid, plain: &[u8]) -> Result<Vec<u8>, Error> {
        match &self.seal {
            None => {
                let mut bytes = Vec::with_capacity(plain.len() + 1);
                bytes.push(0);
                bytes.extend_from_slice(plain);
                Ok(bytes)
            }
            Some(seal) => seal.seal(&Self::context(kind, tenant, id), plain).map_err(cannot_seal),
        }
    }

    fn unwrap<'b>(&self, kind: Kind, tenant: &str, id: Uuid, bytes: &'b [u8]) -> Result<Cow<'b, [u8]>, Unreadable> {
        match (bytes.first(), &self.seal) {
            (None, _) => Err(Unreadable::Damaged("it is empty")),
            (Some(0), _) => Ok(Cow::Borrowed(&bytes[1..])),
            (Some(_), None) => Err(Unreadable::Key(NO_KEY.into())),
            (Some(_), Some(seal)) => Ok(Cow::Owned(seal.open(&Self::context(kind, tenant, id), bytes)?)),
        }
    }

    /// The body for the column, and whether it is sealed.
    pub fn body_in(&self, key: &Key, body: &Body) -> Result<(Body, i16), Error> {
        match &self.seal {
            None => Ok((body.clone(), 0)),
            Some(seal) => {
                let context = Self::context(Kind::Body, key.tenant.as_str(), key.execution_id.0);
                Ok((seal.seal(&context, body).map_err(cannot_seal)?.into(), 1))
            }
        }
    }

    pub fn body_out(&self, key: &Key, body: Vec<u8>, sealed: i16) -> Result<Body, Unreadable> {
        match (sealed, &self.seal) {
            (0, _) => Ok(body.into()),
            (_, None) => Err(Unreadable::Key(NO_KEY.into())),
            (_, Some(seal)) => {
                let context = Self::context(Kind::Body, key.tenant.as_str(), key.execution_id.0);
                Ok(seal.open(&context, &body)?.into())
            }
        }
    }

    pub fn envelope_in(&self, envelope: &Envelope) -> Result<Vec<u8>, Error> {
        let json =
            serde_json::to_vec(envelope).map_err(|e| Error::Refused(format!("cannot write an envelope: {e}")))?;
        self.wrap(Kind::Envelope, envelope.tenant.as_str(), envelope.execution_id.0, &json)
    }

    pub fn envelope_out(&self, tenant: &str, id: Uuid, bytes: &[u8]) -> Result<Envelope, Unreadable> {
        let json = self.unwrap(Kind::Envelope, tenant, id, bytes)?;
        let envelope: Envelope =
            serde_json::from_slice(&json).map_err(|_| Unreadable::Damaged("its envelope is not readable"))?;
        if envelope.tenant.as_str() != tenant || envelope.execution_id.0 != id {
            return Err(Unreadable::Damaged("its envelope belongs to another event"));
        }
        Ok(envelope)
    }

    /// Whether our key is the one that an envelope was sealed with. A damaged one says nothing about that.
    pub fn check_key(&self, tenant: &str, id: Uuid, envelope: &[u8]) -> Result<(), Error> {
        match self.unwrap(Kind::Envelope, tenant, id, envelope) {
            Err(key @ Unreadable::Key(_)) => Err(key.into()),
            Ok(_) | Err(Unreadable::Damaged(_)) => Ok(()),
        }
    }

    pub fn error_in(&self, key: &Key, error: Option<&str>) -> Result<Option<Vec<u8>>, Error> {
        let wrap = |text: &str| self.wrap(Kind::Error, key.tenant.as_str(), key.execution_id.0, short(text).as_bytes());
        error.map(wrap).transpose()
    }

    /// A frame without its number, which PostgreSQL counts itself.
    pub fn attempt_in(&self, key: &Key, attempt: &Attempt) -> Result<Vec<u8>, Error> {
        let mut attempt = attempt.clone();
        if let Some(error) = &attempt.error {
            attempt.error = Some(short(error).to_owned());
        }
        let json = serde_json::to_vec(&attempt).map_err(|e| Error::Refused(format!("cannot write an attempt: {e}")))?;
        let item = self.wrap(Kind::Attempt, key.tenant.as_str(), key.execution_id.0, &json)?;
        let mut tail = (item.len() as u32).to_be_bytes().to_vec();
        tail.extend_from_slice(&item);
        Ok(tail)
    }

    fn attempts_out(&self, columns: &Columns) -> Result<Vec<Attempt>, Unreadable> {
        const TORN: Unreadable = Unreadable::Damaged("its attempts are torn");
        let mut attempts = Vec::new();
        for frames in [&columns.history, &columns.current].into_iter().flatten() {
            let mut rest = frames.as_slice();
            while !rest.is_empty() {
                let (number, tail) = rest.split_first_chunk::<4>().ok_or(TORN)?;
                let (length, tail) = tail.split_first_chunk::<4>().ok_or(TORN)?;
                let (item, tail) = tail.split_at_checked(u32::from_be_bytes(*length) as usize).ok_or(TORN)?;
                let json = self.unwrap(Kind::Attempt, &columns.tenant, columns.id, item)?;
                let mut attempt: Attempt = serde_json::from_slice(&json).map_err(|_| TORN)?;
                attempt.number = u32::from_be_bytes(*number);
                attempts.push(attempt);
                rest = tail;
            }
        }
        Ok(attempts)
    }

    /// `history`: all attempts; otherwise only the last one when it has not ended.
    pub fn row(&self, mut columns: Columns, history: bool) -> Result<Row, Unreadable> {
        let envelope = self.envelope_out(&columns.tenant, columns.id, &columns.envelope)?;
        if columns.body_hash != envelope.body_hash.0 {
            return Err(Unreadable::Damaged("its hashes disagree"));
        }
        if !history {
            columns.history = None;
        }
        let error = match &columns.error {
            None => None,
            Some(bytes) => {
                let text = self.unwrap(Kind::Error, &columns.tenant, columns.id, bytes)?;
                Some(String::from_utf8_lossy(&text).into_owned())
            }
        };
        let claim = columns.claim_until.map(|until| Claim {
            owner: columns.claim_owner.clone().unwrap_or_default(),
            token: columns.token,
            until: Timestamp(until),
        });
        Ok(Row {
            history: self.attempts_out(&columns)?,
            envelope,
            state: state_of(columns.state)?,
            attempts: columns.attempts.max(0) as u32,
            crashes: columns.crashes.max(0) as u32,
            next_at: columns.next_at.map(Timestamp),
            relayed_at: Timestamp(columns.relayed_at),
            updated_at: Timestamp(columns.updated_at),
            finished_at: columns.finished_at.map(Timestamp),
            error_class: columns.error_class,
            error,
            n8n_execution_id: columns.n8n_execution_id,
            message_id: columns.message_id,
            claim,
            replays: columns.replays.max(0) as u32,
            body_bytes: columns.body_bytes.max(0) as u64,
        })
    }
}

fn cannot_seal(error: seal::Error) -> Error {
    Error::Store { doing: "seal a payload", cause: error.to_string().into() }
}

fn short(text: &str) -> &str {
    let mut end = text.len().min(ERROR_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// `number` in front of a frame's tail.
pub(super) fn frame(number: u32, tail: &[u8]) -> Vec<u8> {
    [&number.to_be_bytes()[..], tail].concat()
}

/// Where a page ended: accepted_at and seq of its last row.
pub(super) fn cursor_in(accepted_at: i64, seq: i64) -> String {
    format!("{accepted_at:x}-{seq:x}")
}

pub(super) fn cursor_out(text: &str) -> Result<(i64, i64), Error> {
    text.split_once('-')
        .and_then(|(at, seq)| Some((i64::from_str_radix(at, 16).ok()?, i64::from_str_radix(seq, 16).ok()?)))
        .ok_or_else(|| Error::Refused("the cursor is not one of this list".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_keep_their_numbers() {
        // They are on disk: a change is a migration.
        let codes: Vec<_> = State::ALL.into_iter().map(state_code).collect();
        assert_eq!(codes, [0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert!(state_of(99).is_err());
    }

    #[test]
    fn a_cursor_reads_what_it_prints() {
        assert_eq!(cursor_out(&cursor_in(1_795_478_400_123, 7)).unwrap(), (1_795_478_400_123, 7));
        for bad in ["", "x", "1-", "zz-1", "1-2-3"] {
            assert!(cursor_out(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn long_errors_are_cut_between_characters() {
        assert!(short(&"ä".repeat(5000)).len() <= ERROR_BYTES_MAX);
        assert_eq!(short("short"), "short");
    }
}
