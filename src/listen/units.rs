//! The socket units: `dealscale.toml` is the source of addresses, systemd opens them.
//!
//! The package's units carry the default addresses. [`apply`] writes a drop-in for each that is configured differently and removes it where the
//! default is back; [`differences`] names what has not been applied. Both read the units as systemd does: the unit from the first
//! folder that has it, then every drop-in in the order of file names, an empty `ListenStream=` forgetting what was before.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use crate::config::{Config, paths};

/// Of all drop-ins: later names win over it, and `apply` says so.
const DROP_IN: &str = "50-dealscale.conf";

/// A socket unit and the address that it should have.
#[derive(Clone, Copy, Debug)]
pub struct Socket {
    pub unit: &'static str,
    pub key: &'static str,
    pub wanted: SocketAddr,
}

/// All of them.
pub fn sockets(config: &Config) -> [Socket; 2] {
    [
        Socket { unit: "dealscale-bridge.socket", key: "bridge.listen", wanted: config.bridge.listen },
        Socket { unit: "dealscale-health.socket", key: "admin.listen", wanted: config.admin.listen },
    ]
}

/// The folders that systemd reads, the strongest first.
pub fn folders() -> Vec<PathBuf> {
    paths::SYSTEMD_DIRS.iter().map(PathBuf::from).collect()
}

/// What `apply` did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Written(PathBuf),
    Removed(PathBuf),
}

/// One text for each socket unit whose address is not the configured one. Nothing where the units are not installed.
pub fn differences(config: &Config, folders: &[PathBuf]) -> Vec<String> {
    let differs = |socket: &Socket| {
        let listens = addresses(folders, socket.unit, None)?;
        (listens != [socket.wanted.to_string()]).then(|| {
            format!(
                "{} is {}, {} listens on {}: run `dealscale config apply` as root",
                socket.key,
                socket.wanted,
                socket.unit,
                if listens.is_empty() { "nothing".to_owned() } else { listens.join(", ") }
            )
        })
    };
    sockets(config).iter().filter_map(differs).collect()
}

/// Writes and removes drop-ins in `into` until every unit has its configured address.
///
/// # Errors
/// The units are not installed, a file cannot be written, or another drop-in wins over ours.
pub fn apply(config: &Config, folders: &[PathBuf], into: &Path) -> Result<BTreeMap<&'static str, Change>, String> {
    let mut changes = BTreeMap::new();
    for socket in sockets(config) {
        let Some(without) = addresses(folders, socket.unit, Some(DROP_IN)) else {
            return Err(format!(
                "{} is not installed: without the package the addresses need no applying",
                socket.unit
            ));
        };
        let wanted = [socket.wanted.to_string()];
        let file = into.join(format!("{}.d", socket.unit)).join(DROP_IN);
        let failed = |error: io::Error| format!("cannot write {}: {error}", file.display());
        if without == wanted {
            match std::fs::remove_file(&file) {
                Ok(()) => drop(changes.insert(socket.unit, Change::Removed(file.clone()))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(error)),
            }
        } else {
            let text = drop_in(&socket);
            if std::fs::read_to_string(&file).is_ok_and(|old| old == text) {
                continue;
            }
            let dir = file.parent().unwrap_or(into);
            std::fs::create_dir_all(dir).map_err(failed)?;
            let new = file.with_extension("conf.new");
            std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &file)).map_err(failed)?;
            changes.insert(socket.unit, Change::Written(file.clone()));
        }
        if addresses(folders, socket.unit, None).as_deref() != Some(&wanted) {
            return Err(format!(
                "another drop-in of {} wins over {}: remove its ListenStream=",
                socket.unit,
                file.display()
            ));
        }
    }
    Ok(changes)
}

fn drop_in(socket: &Socket) -> String {
    format!(
        "# Written by `dealscale config apply` from {} in dealscale.toml; changes here are lost.\n[Socket]\nListenStream=\nListenStream={}\n",
        socket.key, socket.wanted
    )
}

/// The effective `ListenStream=` of a unit; `None` where it is not installed.
fn addresses(folders: &[PathBuf], unit: &str, ignore: Option<&str>) -> Option<Vec<String>> {
    let text = folders.iter().find_map(|dir| std::fs::read_to_string(dir.join(unit)).ok())?;
    // By file name; a stronger folder's file hides a weaker one's of the same name.
    let mut files = BTreeMap::new();
    for dir in folders.iter().rev() {
        for entry in std::fs::read_dir(dir.join(format!("{unit}.d"))).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with(".conf") && Some(name.as_str()) != ignore {
                files.insert(name, entry.path());
            }
        }
    }
    let mut listens = Vec::new();
    read(&text, &mut listens);
    for file in files.values() {
        read(&std::fs::read_to_string(file).unwrap_or_default(), &mut listens);
    }
    Some(listens)
}

fn read(text: &str, listens: &mut Vec<String>) {
    for value in text.lines().filter_map(|line| line.trim().strip_prefix("ListenStream=")) {
        match value.trim() {
            "" => listens.clear(),
            // systemd's short form: a port alone is every address.
            port if port.bytes().all(|b| b.is_ascii_digit()) => listens.push(format!("[::]:{port}")),
            address => listens.push(address.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: [(&str, &str); 2] = [
        ("dealscale-bridge.socket", include_str!("../../systemd/dealscale-bridge.socket")),
        ("dealscale-health.socket", include_str!("../../systemd/dealscale-health.socket")),
    ];

    fn installed(dir: &Path) -> Vec<PathBuf> {
        let (etc, lib) = (dir.join("etc"), dir.join("lib"));
        std::fs::create_dir_all(&etc).unwrap();
        std::fs::create_dir_all(&lib).unwrap();
        for (unit, text) in SHIPPED {
            std::fs::write(lib.join(unit), text).unwrap();
        }
        vec![etc, lib]
    }

    fn config(bridge: &str) -> Config {
        crate::config::parse(&format!("[bridge]\nlisten = \"{bridge}\"\n")).unwrap()
    }

    #[test]
    fn the_shipped_units_have_the_default_addresses() {
        let dir = tempfile::tempdir().unwrap();
        let folders = installed(dir.path());
        let config = crate::config::parse("").unwrap();
        assert_eq!(differences(&config, &folders), Vec::<String>::new());
        assert!(apply(&config, &folders, &folders[0]).unwrap().is_empty());
    }

    #[test]
    fn a_difference_is_named_applied_and_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let folders = installed(dir.path());
        let moved = config("[::1]:9000");
        let named = differences(&moved, &folders);
        assert!(named.len() == 1 && named[0].contains("bridge.listen is [::1]:9000"), "{named:?}");
        assert_eq!(apply(&moved, &folders, &folders[0]).unwrap().len(), 1);
        assert!(differences(&moved, &folders).is_empty());
        assert!(apply(&moved, &folders, &folders[0]).unwrap().is_empty(), "applying twice changes nothing");
        let back = config("127.0.0.1:8000");
        assert!(matches!(apply(&back, &folders, &folders[0]).unwrap().values().next(), Some(Change::Removed(_))));
        assert!(differences(&back, &folders).is_empty());
    }

    #[test]
    fn another_drop_in_that_wins_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let folders = installed(dir.path());
        let theirs = folders[0].join("dealscale-bridge.socket.d");
        std::fs::create_dir_all(&theirs).unwrap();
        std::fs::write(theirs.join("90-mine.conf"), "[Socket]\nListenStream=\nListenStream=7000\n").unwrap();
        assert!(differences(&config("127.0.0.1:8000"), &folders)[0].contains("[::]:7000"));
        assert!(apply(&config("127.0.0.1:8000"), &folders, &folders[0]).unwrap_err().contains("another drop-in"));
    }

    #[test]
    fn without_the_package_nothing_differs() {
        let dir = tempfile::tempdir().unwrap();
        assert!(differences(&config("127.0.0.1:9"), &[dir.path().to_owned()]).is_empty());
        assert!(apply(&config("127.0.0.1:9"), &[dir.path().to_owned()], dir.path()).is_err());
    }
}
