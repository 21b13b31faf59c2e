//! `dealscale`: a single-node appliance that makes a self-hosted n8n production-grade. This file is the map.
//!
//! ```text
//! caller ─▶ bridge ─▶ outbox ─▶ relay ─▶ payloads, broker ─▶ delivery ─▶ n8n
//!              │      (202)                   │                 │
//!              └────── ledger (in payloads) ◀─┴─────────────────┘
//! ```
//!
//! Layers; imports point downwards only:
//!
//! ```text
//! 6  main cli app                          app.rs alone wires parts together
//! 5  bridge relay delivery admin           what the appliance does
//! 4  routing references outbox broker payloads postgres n8n     one outside system each
//! 3  supervise finals listen               tasks, readiness, watchdog, drain; who waits for what; sockets
//! 2  observe                               events = log + metric, traces, health
//! 1  config seal                           one file per part, checked newtypes; encryption at rest
//! 0  units ids clock event                 words
//! ```

// 0
pub mod clock;
pub mod event;
pub mod ids;
pub mod units;
// 1
pub mod config;
pub mod seal;
// 2
pub mod observe;
// 3
pub mod finals;
pub mod listen;
pub mod supervise;
// 4
pub mod broker;
pub mod n8n;
pub mod outbox;
pub mod payloads;
pub mod postgres;
pub mod references;
pub mod routing;
// 5
pub mod admin;
pub mod bridge;
pub mod delivery;
pub mod relay;
// 6
pub mod app;
pub mod cli;
