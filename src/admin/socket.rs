//! The Unix socket and who is at the other end.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
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
    // A file that is no socket answers a connect as a stale socket does, and is not ours to remove.
    if std::fs::symlink_metadata(path).is_ok_and(|m| !m.file_type().is_socket()) {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "there is something that is not a socket; admin.socket must be a path of its own",
        ));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_a_living_one_and_a_foreign_file_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/admin.sock");
        let living = bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert_eq!(bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        // A killed process leaves its file.
        drop(living);
        drop(bind(&path).unwrap());
        let precious = dir.path().join("precious");
        std::fs::write(&precious, "data").unwrap();
        assert_eq!(bind(&precious).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&precious, &link).unwrap();
        assert_eq!(bind(&link).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&precious).unwrap(), b"data");
    }
}
