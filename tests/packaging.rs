//! What the package puts on a host, as far as it can be checked without one. The rest is `make test-host`.

use std::path::{Path, PathBuf};

fn at(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(at(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn files(dir: &str) -> Vec<String> {
    let entries = std::fs::read_dir(at(dir)).expect("a folder of the checkout");
    let mut names: Vec<_> =
        entries.map(|e| format!("{dir}/{}", e.expect("a readable entry").file_name().to_string_lossy())).collect();
    names.sort();
    names
}

#[test]
fn every_shipped_configuration_passes_the_check() {
    let samples = files("config/samples");
    assert!(samples.len() >= 3);
    for file in samples.iter().map(String::as_str).chain(["config/dealscale.toml"]) {
        if let Err(problems) = dealscale::config::parse(&read(file)) {
            panic!("{file}: {problems:?}");
        }
    }
}

#[test]
fn every_socket_is_closed_opened_and_kept_with_the_others() {
    let (service, script) = (read("systemd/dealscale.service"), read("packaging/close-sockets"));
    for unit in files("systemd").iter().filter_map(|f| f.strip_prefix("systemd/").filter(|f| f.ends_with(".socket"))) {
        let text = read(&format!("systemd/{unit}"));
        let sockets = service.lines().find(|l| l.starts_with("Sockets=")).unwrap();
        assert!(sockets.contains(unit), "{unit} is not in Sockets=");
        assert!(script.contains(unit), "{unit} is not in close-sockets");
        for script in ["postinst", "prerm"] {
            assert!(read(&format!("debian/{script}")).contains(unit), "{unit} is not in {script}");
        }
        // A limit that is hit leaves a socket failed.
        for line in ["TriggerLimitIntervalSec=0", "Backlog=4096", "Service=dealscale.service"] {
            assert!(text.lines().any(|l| l == line), "{unit} has no {line}");
        }
        assert!(!text.contains("FlushPending=yes"), "{unit} would drop what waits at a restart");
    }
    assert!(!read("debian/postinst").contains("restart \"$socket\""), "sockets are never restarted");
}

#[test]
fn the_service_keeps_to_its_adr() {
    let text = read("systemd/dealscale.service");
    for line in [
        "Type=notify",
        "ExecReload=/usr/bin/dealscale reload --wait",
        "RestartPreventExitStatus=78",
        "StartLimitIntervalSec=0",
        "CapabilityBoundingSet=",
        "AmbientCapabilities=",
        "PrivateUsers=no",
        "User=dealscale",
    ] {
        assert!(text.lines().any(|l| l == line), "no line {line}");
    }
    assert!(text.contains("WatchdogSec="));
    // A path of its own would fail the start where the file is missing.
    for line in text.lines().filter(|l| l.starts_with("LoadCredential=")) {
        assert!(!line.contains(':'), "{line} must be looked up in the credential stores");
    }
}

#[test]
fn versions_agree() {
    let first = read("debian/changelog").lines().next().unwrap_or_default().to_owned();
    assert!(first.starts_with(&format!("dealscale ({}) ", env!("CARGO_PKG_VERSION"))), "{first}");
}
