//! `make run N8N=none`: the main job with the echo receiver, as a new user meets it. With a real n8n it is run by hand.

#![allow(clippy::unwrap_used)] // all of it is tests, helpers included

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Ports that are free now, a folder for the state, and the script with both.
struct Run {
    ports: [u16; 3],
    dir: tempfile::TempDir,
}

impl Run {
    fn new() -> Self {
        let held = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        Self { ports: held.map(|l| l.local_addr().unwrap().port()), dir: tempfile::tempdir().unwrap() }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/real/main-job.sh"));
        let [bridge, admin, n8n] = self.ports.map(|p| p.to_string());
        command
            .args(arguments)
            .env("N8N", "none")
            .env_remove("N8N_URL")
            .env_remove("N8N_API_KEY")
            .env_remove("N8N_BROKER_PORT")
            .env("N8N_PORT", n8n)
            .env("FASTAPI_BRIDGE_PORT", bridge)
            .env("DEALSCALE_ADMIN_PORT", admin)
            .env("DEALSCALE_STATE", self.dir.path().join("state"))
            .env("DEALSCALE_BIN", env!("CARGO_BIN_EXE_dealscale"))
            // Groups get their signals: this test's own must not.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    fn nothing_is_left(&self) {
        for port in self.ports {
            assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "something listens on {port}");
        }
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Reads what it says until a line holds `wanted`.
fn read_until(child: &mut Child, wanted: &str) -> BufReader<std::process::ChildStderr> {
    let mut reader = BufReader::new(child.stderr.take().unwrap());
    let mut seen = String::new();
    loop {
        let begin = seen.len();
        assert!(reader.read_line(&mut seen).unwrap() > 0, "it ended without {wanted:?}:\n{seen}");
        if seen[begin..].contains(wanted) {
            return reader;
        }
    }
}

#[test]
fn one_event_goes_through_and_nothing_is_left_running() {
    let run = Run::new();
    let output = run.command(&["--once"]).output().unwrap();
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    for wanted in
        ["echo receiver stands in for n8n", r#""state": "delivered""#, "echo: POST /webhook/pulsar-trigger", "stopped"]
    {
        assert!(said.contains(wanted), "no {wanted:?} in\n{said}");
    }
    run.nothing_is_left();
    // And once more over the same state.
    let again = run.command(&["--once"]).output().unwrap();
    assert!(again.status.success(), "{}", text(&again));
    run.nothing_is_left();
}

#[test]
fn ctrl_c_stops_all_of_it_at_any_moment_however_often_it_is_pressed() {
    for moment in ["stands in for n8n", "starting the appliance", "waiting for its end", "Try next"] {
        let run = Run::new();
        let mut child = run.command(&[]).spawn().unwrap();
        let said = read_until(&mut child, moment);
        let group = Pid::from_raw(child.id() as i32);
        // The reader goes first, as `make run | tee` does, and the user is impatient.
        drop(said);
        for _ in 0..3 {
            let _ = killpg(group, Signal::SIGINT);
        }
        assert!(!child.wait().unwrap().success(), "{moment}");
        run.nothing_is_left();
    }
}

#[test]
fn what_a_killed_run_left_behind_is_stopped_by_the_next_and_a_second_one_is_refused() {
    let run = Run::new();
    let mut first = run.command(&[]).spawn().unwrap();
    let _said = read_until(&mut first, "Try next");
    let refused = run.command(&["--once"]).output().unwrap();
    assert!(!refused.status.success() && text(&refused).contains("at work here already"), "{}", text(&refused));
    assert!(TcpStream::connect(("127.0.0.1", run.ports[0])).is_ok(), "the refused one stopped the first");

    first.kill().unwrap();
    first.wait().unwrap();
    let next = run.command(&["--once"]).output().unwrap();
    assert!(next.status.success(), "{}", text(&next));
    run.nothing_is_left();
}

#[test]
fn what_cannot_work_is_said_before_anything_starts() {
    let run = Run::new();
    let taken = TcpListener::bind(("127.0.0.1", run.ports[1])).unwrap();
    let bridge = run.ports[0].to_string();
    for (variables, wanted) in [
        (&[][..], "choose another one:  make run DEALSCALE_ADMIN_PORT=PORT"),
        (&[("DEALSCALE_ADMIN_PORT", &*bridge)], "needs a port of its own"),
        (&[("N8N_PORT", "a-port")], "N8N_PORT=a-port is no port"),
        (&[("N8N_PORT", "65535")], "N8N_BROKER_PORT=65536 is no port"),
        (&[("N8N", "nothing")], "N8N=nothing is not known"),
        (
            &[("N8N", ""), ("N8N_URL", "http://127.0.0.1:9"), ("DEALSCALE_ADMIN_PORT", "9")],
            "N8N_API_KEY must be as well",
        ),
        (
            &[("N8N", ""), ("N8N_URL", "http://127.0.0.1:9"), ("DEALSCALE_ADMIN_PORT", "9"), ("N8N_API_KEY", "k")],
            "cannot reach the n8n at N8N_URL=http://127.0.0.1:9",
        ),
    ] {
        let output = run.command(&["--once"]).envs(variables.iter().copied()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{variables:?}");
        assert!(text(&output).contains(wanted), "{variables:?}: {}", text(&output));
    }
    drop(taken);
    run.nothing_is_left();
}
