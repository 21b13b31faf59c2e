//! What the test binaries share: the appliance as a real process, and a receiver in n8n's place.
#![allow(dead_code)] // each test binary uses its own part

pub mod appliance;
pub mod receiver;
