//! The Unix socket and who is at the other end.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use tokio::net::UnixListener;

/// The user at the other end of the socket.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    pub uid: Option<u32>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self { uid: stream.io().peer_cred().ok().map(|c| c.uid()) }
    }
}

/// Binds the socket with mode 0660, in the group `dealscale-admin` where there is one and we may.
///
/// # Errors
/// Another living process serves it, or the folder cannot be written.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AddrInUse, "another appliance answers on this socket")),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
        Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    if let Ok(Some(group)) = nix::unistd::Group::from_name("dealscale-admin") {
        // As a service without the right to change owners, the folder's set-group-id bit has done it; on a developer's machine the owner's group stays.
        let _ = std::os::unix::fs::chown(path, None, Some(group.gid.as_raw()));
    }
    Ok(listener)
}
