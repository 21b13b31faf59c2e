//! The accept loop: connections in, requests through, and an end without a lost answer.
//!
//! # Invariants
//! 1. An error of `accept` never ends the loop: EMFILE, ENFILE, ECONNABORTED and their like are counted, and tried again
//!    after a short wait. (Ending it is how one server of this kind earned a CVE.)
//! 2. At most `connections_max` connections are open; the others wait in the kernel's backlog, they are not refused.
//! 3. Stopping has two steps: [`Stop::draining`] ends long polls and idle connections and makes every later answer the last of its connection,
//!    while accepting goes on; [`Stop::last`] stops accepting, answers what is under way and ends at the deadline.
//!    A connection that has not asked anything yet is not idle: its first request is answered, also when it arrives a moment after `last`. Of an idle
//!    one, bytes that have arrived are read before it is closed.
//! 4. Headers that drip, or an idle connection, are cut after `header_timeout`; headers over `header_bytes_max` are 431.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::socket::{MsgFlags, recv};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service;

use super::Bridge;
use crate::config;
use crate::observe::bridge as events;

/// How the bridge is told to end.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    /// Long polls end now; everything else goes on.
    pub draining: CancellationToken,
    /// No more connections, then the end.
    pub last: CancellationToken,
}

/// Where a request came from; `None` on the operators' socket.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

/// Headers of one request; hyper's own default, written down because it is a limit.
const HEADERS_MAX: usize = 100;

/// How long the loop waits after a failed `accept`: long enough for descriptors to come back, short against a client's
/// patience.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// After [`Stop::last`] a connection that was just taken may take this long to ask: a round trip or two.
const FIRST_REQUEST_MAX: Duration = Duration::from_millis(500);

/// Serves until [`Stop::last`], then finishes what is under way, `drain_timeout` at most.
pub async fn serve(listener: TcpListener, bridge: Bridge, stop: Stop) {
    let limits = bridge.live().bridge.clone();
    let router = super::public(bridge.clone());
    let slots = Arc::new(Semaphore::new(limits.connections_max as usize));
    let (connections, http) = (TaskTracker::new(), http(&limits));
    loop {
        let slot = tokio::select! {
            biased;
            () = stop.last.cancelled() => break,
            () = stop.draining.cancelled(), if !bridge.0.draining.is_cancelled() => {
                bridge.drain();
                continue;
            }
            slot = slots.clone().acquire_owned() => slot.expect("the semaphore is never closed"),
        };
        let accepted = tokio::select! {
            biased;
            () = stop.last.cancelled() => break,
            () = stop.draining.cancelled(), if !bridge.0.draining.is_cancelled() => {
                bridge.drain();
                continue;
            }
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let connection = connection(stream, peer, http.clone(), router.clone(), stop.clone());
                connections.spawn(async move {
                    let _slot = slot;
                    let _counted = events::Connection::opened();
                    connection.await;
                });
            }
            Err(error) => {
                events::AcceptFailed { error: &error }.emit();
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    bridge.drain();
    connections.close();
    let deadline = tokio::time::Instant::now() + limits.drain_timeout.0;
    if tokio::time::timeout_at(deadline, connections.wait()).await.is_err() {
        tracing::warn!(open = connections.len(), "the deadline ends connections that are still busy");
    }
    let _ = tokio::time::timeout_at(deadline + Duration::from_secs(1), bridge.finish()).await;
}

fn http(limits: &config::Bridge) -> http1::Builder {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout.0)
        .max_header_size(limits.header_bytes_max.as_usize())
        .max_headers(HEADERS_MAX)
        // Reads beyond the headers go through the same buffer.
        .max_buf_size(limits.header_bytes_max.as_usize().max(64 << 10));
    http
}

async fn connection(stream: TcpStream, peer: SocketAddr, http: http1::Builder, router: axum::Router, stop: Stop) {
    // Answers are small; waiting for more to send only costs the caller time.
    let _ = stream.set_nodelay(true);
    let descriptor = stream.as_raw_fd();
    let asked = CancellationToken::new();
    let service = {
        let asked = asked.clone();
        hyper::service::service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
            asked.cancel();
            request.extensions_mut().insert(Peer(peer));
            let mut router = router.clone();
            async move {
                let answer: Result<_, Infallible> = Service::call(&mut router, request).await;
                answer
            }
        })
    };
    let connection = http.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let result = tokio::select! {
        biased;
        result = &mut connection => result,
        () = may_close(&stop, &asked, descriptor) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        // Callers go away all the time.
        tracing::debug!(%error, "a connection ended early");
    }
}

/// Waits until the connection may end after what is under way; see invariant 3.
async fn may_close(stop: &Stop, asked: &CancellationToken, descriptor: RawFd) {
    stop.draining.cancelled().await;
    tokio::select! {
        () = asked.cancelled() => {}
        () = async {
            stop.last.cancelled().await;
            tokio::time::sleep(FIRST_REQUEST_MAX).await;
        } => {}
    }
    // The descriptor is the connection's own, which is polled beside this and closed after it.
    for _ in 0..10 {
        let peek = recv(descriptor, &mut [0; 1], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT);
        if !matches!(peek, Ok(1..)) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
