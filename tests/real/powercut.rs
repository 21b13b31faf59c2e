//! Simulated power cuts: the block image is copied while the appliance works, mounted and read.
//!
//! The appliance's state lies on an ext4 image behind a loop device, so that only what was really handed to the device is in the image: not
//! what the kernel still has in its page cache. It is stopped (SIGSTOP) at a random moment, the image is copied, and it goes on. Each
//! copy must hold, after the file system's own recovery, every event that was acknowledged before the cut: in the outbox, or in the ledger
//! (and then, while it is open, its payload). Over many cuts the moments fall behind every step: append, store, broker, confirm, ledger, ack.
//! Needs root and loop devices.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dealscale::clock::Clock;
use dealscale::ids::{Environment, Key, Tenant};
use dealscale::outbox::Outbox;
use dealscale::payloads::Store;
use dealscale::units::Bytes;
use serde_json::json;

use crate::shared::appliance::Appliance;
use crate::shared::receiver::Receiver;

const CUTS: usize = 12;

fn run(program: &str, arguments: &[&dyn AsRef<std::ffi::OsStr>]) {
    let mut command = Command::new(program);
    for argument in arguments {
        command.arg(argument.as_ref());
    }
    let output = command.output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A mounted image; unmounted when dropped.
struct Mount(PathBuf);

impl Mount {
    fn new(image: &Path, at: &Path, options: &str) -> Self {
        std::fs::create_dir_all(at).unwrap();
        run("mount", &[&"-o", &format!("loop,{options}"), &image, &at]);
        Self(at.to_owned())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // A command that another test starts holds our files until it is executed: busy for a moment.
        for _ in 0..100 {
            if Command::new("umount").arg(&self.0).status().is_ok_and(|status| status.success()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Everything acknowledged is in the copy.
async fn check(image: &Path, at: &Path, config: &str, acknowledged: &BTreeSet<String>, cut: usize) -> (usize, usize) {
    // The journal is replayed by the mount, as after a real cut.
    let _mount = Mount::new(image, at, "defaults");
    let config = config.replace(&format!("{:?}", "STATE"), &format!("{:?}", at.join("state").display().to_string()));
    let config = dealscale::config::parse(&config).unwrap_or_else(|p| panic!("{p:?}"));
    let environment = config.environments.values().next().unwrap();
    let name = Environment::try_new("production").unwrap();
    let settings = environment.outbox.clone();
    let outbox = tokio::task::spawn_blocking(move || {
        Outbox::open(&settings, &name, Arc::new(|_| (1, Bytes(u64::MAX))), Clock::System)
    });
    let outbox = outbox.await.unwrap().unwrap_or_else(|e| panic!("cut {cut}: the outbox does not open: {e}"));
    assert_eq!(outbox.status().data_loss_possible, None, "cut {cut}");
    let store =
        Store::open(&environment.payloads, &environment.outbox, &environment.name, Clock::System).await.unwrap();
    let (mut waiting, mut moved) = (0, 0);
    for id in acknowledged {
        let key = Key { tenant: Tenant::try_new("t1").unwrap(), execution_id: id.parse().unwrap() };
        if outbox.find(&key).await.unwrap().is_some() {
            waiting += 1;
            continue;
        }
        let row = store.get(&key, false).await.unwrap();
        let row = row.unwrap_or_else(|| panic!("cut {cut}: {id} was acknowledged and is nowhere"));
        if !row.state.is_final() {
            let payload = store.load(vec![key]).await.unwrap();
            assert!(payload[0].is_some(), "cut {cut}: the payload of {id} is gone");
        }
        moved += 1;
    }
    outbox.close().await.unwrap();
    store.close().await;
    (waiting, moved)
}

async fn cuts(store: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (image, copy) = (dir.path().join("disk.img"), dir.path().join("cut.img"));
    run("truncate", &[&"-s", &"192M", &image]);
    run("mkfs.ext4", &[&"-q", &"-E", &"lazy_itable_init=0,lazy_journal_init=0", &image]);
    // Nothing is committed by the clock: only what we sync ourselves.
    let mount = Mount::new(&image, &dir.path().join("disk"), "commit=600");
    let receiver = Receiver::start().await;
    let environment = format!(
        "[environments.production]\nwebhook = {:?}\n[environments.production.outbox]\nstore = {store:?}\ndisk_free_min = \"1MiB\"\n",
        receiver.url("/webhook/x")
    );
    let appliance = Arc::new(Appliance::start(&mount.0.join("state"), &environment).await);
    let config = std::fs::read_to_string(&appliance.config).unwrap();
    let config = config.replace(&appliance.dir.display().to_string(), "STATE");

    let acknowledged: Arc<std::sync::Mutex<BTreeSet<String>>> = Arc::default();
    let stop = Arc::new(AtomicBool::new(false));
    let publishers: Vec<_> = (0..4)
        .map(|n| {
            let (appliance, acknowledged, stop) = (appliance.clone(), acknowledged.clone(), stop.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let body =
                        json!({ "workflow": "w", "tenant_id": "t1", "payload": { "n": n, "fill": "x".repeat(500) } });
                    let (status, answer) = appliance.post("/pulsar/publish", body).await;
                    if status == 202 {
                        acknowledged.lock().unwrap().insert(answer["execution_id"].as_str().unwrap().to_owned());
                    }
                    tokio::time::sleep(Duration::from_millis(fastrand::u64(0..20))).await;
                }
            })
        })
        .collect();
    let pid = nix::unistd::Pid::from_raw(appliance.pid() as i32);
    let (mut waited, mut moved) = (0, 0);
    for cut in 0..CUTS {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(20..200))).await;
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
        // What was acknowledged before this moment; answers may still be on their way, and do not count.
        let before = acknowledged.lock().unwrap().clone();
        run("cp", &[&"--sparse=always", &image, &copy]);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();
        let (w, m) = check(&copy, &dir.path().join("cut"), &config, &before, cut).await;
        (waited, moved) = (waited + w, moved + m);
    }
    stop.store(true, Ordering::Relaxed);
    for publisher in publishers {
        publisher.await.unwrap();
    }
    let total = acknowledged.lock().unwrap().len();
    assert!(total > CUTS && moved > 0, "{total} acknowledged, {moved} relayed: this proves nothing");
    println!(
        "{store}: {CUTS} cuts, {total} acknowledged; found {waited} in the outbox and {moved} in the ledger, none lost"
    );
    drop(appliance);
    drop(mount);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_was_acknowledged_is_lost_when_the_power_goes_with_sled() {
    cuts("sled").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_was_acknowledged_is_lost_when_the_power_goes_with_sqlite() {
    cuts("sqlite").await;
}
