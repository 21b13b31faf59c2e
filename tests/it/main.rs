//! Integration tests with embedded parts: the built binary, a receiver in n8n's place, no other server.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::disallowed_methods)] // all of it is tests, helpers included

mod bridge;
mod broker;
#[path = "../support/conformance.rs"]
mod conformance;
mod delivery;
mod house;
mod outbox;
mod process;
#[path = "../support/mod.rs"]
mod support;
