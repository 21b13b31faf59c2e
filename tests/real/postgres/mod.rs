//! What stands on PostgreSQL, against real servers that these tests start and kill themselves ([`cluster`]).

mod appliance;
pub mod cluster;
mod executions;
mod payloads;
