//! The listening sockets: handed over by systemd, or bound by ourselves.
//!
//! `systemd` (socket units) → **`listen`** → `bridge`, `admin`.
//!
//! # Invariants
//! 1. A socket that systemd handed over is served, whatever the configuration says: connections wait in it, and nobody else would ever take
//!    them. Where its address is not the configured one, that listener says so until `dealscale config apply` ([`units`]).
//! 2. Without systemd (a terminal, a container) the same addresses are bound here, with the same backlog.
//! 3. A port that is taken degrades its listener and nothing else; the caller tries again.
//!
//! # Failure
//! A descriptor that is not a listening TCP socket, or has a name that no listener knows, is reported and closed.

pub mod units;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};

use systemd::daemon;
use tokio::net::{TcpListener, TcpSocket};

/// Connections that wait while nobody accepts, as in the socket units: 300 a second for more than ten seconds. The kernel caps
/// it at net.core.somaxconn, 4096 by default.
const BACKLOG: u32 = 4_096;

/// The two listeners, by the names that their socket units give (`FileDescriptorName=`).
pub const BRIDGE: &str = "bridge";
pub const HEALTH: &str = "health";

/// What systemd handed over and no listener has taken yet.
#[derive(Debug, Default)]
pub struct Sockets(Mutex<BTreeMap<String, std::net::TcpListener>>);

/// A listener to serve.
#[derive(Debug)]
pub struct Open {
    pub listener: TcpListener,
    pub addr: SocketAddr,
    /// It is systemd's socket.
    pub handed_over: bool,
}

impl Sockets {
    /// Takes the process's sockets, if systemd handed over any. Call once, at the start.
    ///
    /// # Errors
    /// What is unusable, one text each; the rest is taken nevertheless.
    pub fn take() -> (Self, Vec<String>) {
        let (mut sockets, mut problems) = (BTreeMap::new(), Vec::new());
        match daemon::listen_fds_with_names() {
            Ok(descriptors) => {
                for (descriptor, name) in descriptors.iter() {
                    let name = name.to_string_lossy().into_owned();
                    match daemon::tcp_listener(descriptor) {
                        Ok(_) if name != BRIDGE && name != HEALTH => {
                            problems.push(format!("systemd handed over a socket {name:?}, which no listener knows"));
                        }
                        Ok(listener) if !sockets.contains_key(&name) => drop(sockets.insert(name, listener)),
                        Ok(_) => problems.push(format!("systemd handed over two sockets {name:?}; one address each")),
                        Err(error) => problems.push(format!("systemd's socket {name:?} cannot be used: {error}")),
                    }
                }
            }
            Err(error) => problems.push(format!("systemd's sockets cannot be taken: {error}")),
        }
        (Self(Mutex::new(sockets)), problems)
    }

    /// The socket of this name, or a new one on `addr`.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub fn open(&self, name: &str, addr: SocketAddr) -> io::Result<Open> {
        let handed_over = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        if let Some(listener) = handed_over {
            listener.set_nonblocking(true)?;
            let addr = listener.local_addr()?;
            return Ok(Open { listener: TcpListener::from_std(listener)?, addr, handed_over: true });
        }
        let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // What a former process left in TIME_WAIT must not keep us from the port.
        socket.set_reuseaddr(true)?;
        socket.bind(addr)?;
        let listener = socket.listen(BACKLOG)?;
        Ok(Open { addr: listener.local_addr()?, listener, handed_over: false })
    }
}

impl Open {
    /// Where it listens, and what to do when that is not what the configuration says.
    pub fn describe(&self, wanted: SocketAddr) -> Result<String, String> {
        let whose = if self.handed_over { " (systemd's socket)" } else { "" };
        if self.addr == wanted || wanted.port() == 0 {
            Ok(format!("listens on {}{whose}", self.addr))
        } else {
            Err(format!(
                "listens on {}{whose}, the configuration says {wanted}: run `dealscale config apply` as root",
                self.addr
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn invariant_1_a_socket_that_was_handed_over_wins_and_says_so() {
        let handed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = handed.local_addr().unwrap();
        let sockets = Sockets(Mutex::new(BTreeMap::from([(BRIDGE.to_owned(), handed)])));
        let wanted = SocketAddr::from(([127, 0, 0, 1], 1));
        let open = sockets.open(BRIDGE, wanted).unwrap();
        assert_eq!((open.addr, open.handed_over), (addr, true));
        assert!(open.describe(wanted).unwrap_err().contains("config apply"));
        assert!(open.describe(addr).unwrap().contains("systemd"));
    }

    #[tokio::test]
    async fn invariant_3_a_taken_port_is_an_error_of_that_listener() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let sockets = Sockets::default();
        assert_eq!(sockets.open(BRIDGE, taken.local_addr().unwrap()).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert!(sockets.open(HEALTH, SocketAddr::from(([127, 0, 0, 1], 0))).is_ok());
    }
}
