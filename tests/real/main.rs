//! The promises against real servers: one module per server. `make test-real` installs and starts them, sets the
//! variables that say where they are, and runs this; without its server a test fails.
//!
//! Run one module with `tests/real/run.sh n8n`.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::disallowed_methods)] // all of it is tests, helpers included

#[path = "../support/conformance.rs"]
mod conformance;
mod fuzz;
mod n8n;
mod oidc;
mod postgres;
mod powercut;
mod pulsar;
mod pulsar_fleet;
#[path = "../support/mod.rs"]
mod shared;
mod support;
mod way;
