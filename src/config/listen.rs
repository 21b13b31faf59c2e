//! `[bridge]` and `[admin]`: where the appliance listens, and the limits of what it reads there.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::{Section, paths};
use crate::units::{Bytes, Span};

/// `[bridge]`: the listener that takes events.
#[derive(Clone, Debug)]
pub struct Bridge {
    pub listen: SocketAddr,
    /// Without a token or a JWT every request is 401. Only a start without any configuration file is tokenless.
    pub token_required: bool,
    /// Larger bodies are 413. 16 MiB is n8n's own `N8N_PAYLOAD_SIZE_MAX`: a larger event could never be delivered.
    pub body_bytes_max: Bytes,
    pub batch_items_max: u64,
    pub batch_bytes_max: Bytes,
    pub json_depth_max: u64,
    pub header_bytes_max: Bytes,
    pub connections_max: u64,
    /// Requests that may wait for the outbox at once; more are 503.
    pub in_flight_max: u64,
    pub header_timeout: Span,
    pub body_timeout: Span,
    /// The longest `?timeout=` of a long poll.
    pub wait_max: Span,
    /// How long SIGTERM waits for what is under way.
    pub drain_timeout: Span,
    /// How long `ack = "broker"` waits for the receipt before it answers with durability `disk`.
    pub receipt_timeout: Span,
    /// `deliver_at` further ahead than this is refused.
    pub delay_max: Span,
}

impl Bridge {
    pub(super) fn check(s: &mut Section<'_>, bare: bool) -> Self {
        let bridge = Self {
            listen: s.address("listen", SocketAddr::from(([127, 0, 0, 1], 8000))),
            token_required: s.flag("token_required", !bare),
            body_bytes_max: s.bytes("body_bytes_max", Bytes::mib(16), Bytes::kib(1)..=Bytes::mib(256)),
            batch_items_max: s.count("batch_items_max", 1_000, 1..=100_000),
            batch_bytes_max: s.bytes("batch_bytes_max", Bytes::mib(32), Bytes::kib(1)..=Bytes::gib(1)),
            json_depth_max: s.count("json_depth_max", 64, 4..=120),
            header_bytes_max: s.bytes("header_bytes_max", Bytes::kib(32), Bytes::kib(8)..=Bytes::kib(256)),
            connections_max: s.count("connections_max", 4_096, 16..=1_000_000),
            in_flight_max: s.count("in_flight_max", 1_024, 16..=100_000),
            header_timeout: s.span("header_timeout", Span::secs(10), Span::millis(100)..=Span::secs(300)),
            body_timeout: s.span("body_timeout", Span::secs(60), Span::millis(100)..=Span::secs(3600)),
            wait_max: s.span("wait_max", Span::secs(60), Span::secs(1)..=Span::secs(3600)),
            drain_timeout: s.span("drain_timeout", Span::secs(25), Span::secs(1)..=Span::secs(600)),
            receipt_timeout: s.span("receipt_timeout", Span::secs(5), Span::millis(100)..=Span::secs(60)),
            delay_max: s.span("delay_max", Span::days(30), Span::secs(1)..=Span::days(366)),
        };
        if !bridge.token_required && !bridge.listen.ip().is_loopback() {
            s.problem("token_required", "may only be false on a loopback address: anybody could publish");
        }
        bridge
    }
}

/// `[admin]`: metrics and health on loopback, operating over a Unix socket.
#[derive(Clone, Debug)]
pub struct Admin {
    pub listen: SocketAddr,
    /// Where the command line reaches the running appliance. Default `/run/dealscale/admin.sock`; with another state
    /// folder than the package's, `STATE_DIR/admin.sock`.
    pub socket: PathBuf,
}

pub(super) fn default_socket(state_dir: &Path) -> PathBuf {
    if state_dir == Path::new(paths::STATE_DIR) {
        PathBuf::from(paths::ADMIN_SOCKET)
    } else {
        state_dir.join("admin.sock")
    }
}

impl Admin {
    pub(super) fn check(s: &mut Section<'_>, state_dir: &Path, bridge: SocketAddr) -> Self {
        // The plan's FASTAPI_BRIDGE_PORT may be ours: without a file nobody could move the one or the other out of the way.
        let port = if bridge.port() == 8081 { 8082 } else { 8081 };
        let socket = default_socket(state_dir).display().to_string();
        let admin = Self {
            listen: s.address("listen", SocketAddr::from(([127, 0, 0, 1], port))),
            socket: PathBuf::from(s.parse("socket", socket)),
        };
        if !admin.listen.ip().is_loopback() {
            s.problem("listen", "must be a loopback address: metrics and health are not authenticated");
        }
        if admin.listen.port() == bridge.port() && (admin.listen.ip() == bridge.ip() || bridge.ip().is_unspecified()) {
            s.problem("listen", "is the address of bridge.listen");
        }
        admin
    }
}
