//! A throw-away PostgreSQL on the loopback address, in a folder of its own. Dropping it stops the server and deletes the folder.

use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

/// Debian's folder, the newest first; `DEALSCALE_POSTGRES_BIN` names another one.
fn programs() -> PathBuf {
    if let Some(dir) = std::env::var_os("DEALSCALE_POSTGRES_BIN") {
        return dir.into();
    }
    let mut found: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok().map(|e| e.path().join("bin")))
        .filter(|dir| dir.join("postgres").exists())
        .collect();
    found.sort();
    found.pop().expect("there is no PostgreSQL on this machine: apt-get install postgresql")
}

/// PostgreSQL does not run as root.
fn command(program: &Path) -> Command {
    if !nix::unistd::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]).arg(program);
    command
}

pub struct Cluster {
    dir: tempfile::TempDir,
    port: u16,
    server: Mutex<Option<Child>>,
    settings: Vec<String>,
}

impl Cluster {
    /// One that all tests share that do not harm it, as long as any of them runs.
    pub fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(cluster) = shared.upgrade() {
            return cluster;
        }
        let cluster = Arc::new(Self::start(&[]));
        *shared = Arc::downgrade(&cluster);
        cluster
    }

    /// `settings` as in postgresql.conf: `fsync=off`.
    pub fn start(settings: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix("dealscale-postgres.").tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        if nix::unistd::geteuid().is_root() {
            let user = nix::unistd::User::from_name("postgres").unwrap().expect("the package makes the user postgres");
            chown(dir.path(), Some(user.uid.as_raw()), Some(user.gid.as_raw())).unwrap();
        }
        let made = command(&programs().join("initdb"))
            .args(["--username=dealscale", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync", "-D"])
            .arg(dir.path().join("data"))
            .current_dir("/")
            .output()
            .unwrap();
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let settings = settings.iter().map(|s| (*s).to_owned()).collect();
        let cluster = Self { dir, port, server: Mutex::new(None), settings };
        cluster.resume();
        cluster
    }

    pub fn url(&self) -> String {
        format!("postgresql://dealscale@127.0.0.1:{}/postgres", self.port)
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn server(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.server.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Starts the server again, and waits until it answers.
    pub fn resume(&self) {
        let log = self.dir.path().join("log");
        let out = std::fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let mut command = command(&programs().join("postgres"));
        command.arg("-D").arg(self.data()).args([
            "-p",
            &self.port.to_string(),
            "-k",
            "",
            "-c",
            "listen_addresses=127.0.0.1",
        ]);
        for setting in &self.settings {
            command.args(["-c", setting]);
        }
        let out_too = out.try_clone().unwrap();
        let child = command.current_dir("/").stdin(Stdio::null()).stdout(out).stderr(out_too).spawn().unwrap();
        *self.server() = Some(child);
        let begin = Instant::now();
        while !self.psql("SELECT 1").0 {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            assert!(begin.elapsed() < Duration::from_secs(60), "PostgreSQL does not answer:\n{text}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// kill -9 of the postmaster; its children notice and end.
    pub fn kill(&self) {
        if let Some(mut child) = self.server().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        // The children hold the shared memory until they have noticed.
        std::thread::sleep(Duration::from_millis(300));
        let _ = std::fs::remove_file(self.data().join("postmaster.pid"));
    }

    /// Whether it worked, and what came out.
    pub fn psql(&self, sql: &str) -> (bool, String) {
        let done = Command::new(programs().join("psql"))
            .args(["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-d", &self.url(), "-c", sql])
            .current_dir("/")
            .output()
            .unwrap();
        let text = [done.stdout, done.stderr].concat();
        (done.status.success(), String::from_utf8_lossy(&text).trim().to_owned())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(mut child) = self.server().take() {
            // Immediate shutdown: nothing of it is kept.
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(child.id() as i32),
                nix::sys::signal::Signal::SIGQUIT,
            );
            let _ = child.wait();
        }
    }
}
