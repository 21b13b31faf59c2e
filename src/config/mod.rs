//! The configuration: one file per part, checked newtypes, all problems at once.
//!
//! Layer 1. [`load`] reads `/etc/dealscale/dealscale.toml` (or `--config`), every `conf.d/*.toml` beside it in the order
//! of their names, then the plan's environment variables ([`plan`]), and checks everything. It is the same code for
//! `serve`, `check`, `config show` and a reload. Values are never printed by an error: one may be a secret.
//!
//! # Invariants
//! 1. Either every key is right, or nothing starts: [`load`] returns all [`Problem`]s.
//! 2. A default stands in one place: the `check` function of its part; `config/dealscale.toml` shows it, and a test
//!    compares the two.

pub mod accounts;
pub mod broker;
pub mod delivery;
pub mod environment;
pub mod listen;
pub mod n8n;
pub mod observe;
pub mod outbox;
pub mod paths;
pub mod payloads;
pub mod plan;
pub mod reader;
pub mod routes;
pub mod signing;
#[cfg(test)]
mod tests;
pub mod topics;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use accounts::{Accounts, Rights};
pub use broker::Broker;
pub use delivery::Delivery;
pub use environment::EnvironmentConfig;
pub use listen::{Admin, Bridge};
pub use n8n::N8n;
pub use observe::{Log, Trace};
pub use outbox::Outbox;
pub use payloads::Payloads;
pub use reader::{Effective, Problem, Secret, Section, Sink, Source};
pub use routes::{Class, Route};
pub use signing::Signing;

use crate::ids::Environment;

/// The whole configuration, checked.
#[derive(Clone, Debug)]
pub struct Config {
    pub state_dir: PathBuf,
    /// No configuration file was found: embedded defaults, any tenant, no token, loopback only.
    pub bare: bool,
    pub bridge: Bridge,
    pub admin: Admin,
    pub log: Log,
    pub trace: Trace,
    pub signing: Signing,
    pub accounts: Accounts,
    pub environments: BTreeMap<Environment, EnvironmentConfig>,
    /// What `config show` prints.
    pub effective: Vec<Effective>,
}

/// What the command line says about the configuration.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `--config FILE`. Without it the default path is used if it exists.
    pub file: Option<PathBuf>,
    /// `--state-dir DIR`.
    pub state_dir: Option<PathBuf>,
}

/// Reads and checks everything.
///
/// # Errors
/// All problems that were found, in the order of the file.
pub fn load(overrides: &Overrides, variables: &dyn Fn(&str) -> Option<String>) -> Result<Config, Vec<Problem>> {
    let mut sink = Sink::default();
    let mut root = toml::Table::new();
    let main = overrides.file.clone().unwrap_or_else(|| PathBuf::from(paths::CONFIG_FILE));
    let bare = overrides.file.is_none() && !main.exists();
    if !bare {
        for file in files(&main, &mut sink) {
            read_file(&file, &mut root, &mut sink);
        }
    }
    if let Some(dir) = &overrides.state_dir {
        root.insert("state_dir".into(), toml::Value::String(dir.display().to_string()));
        sink.sources.insert("state_dir".into(), Source::Flag("--state-dir"));
    }
    plan::apply(&mut root, bare, variables, &mut sink);
    let config = check(root, bare, &mut sink);
    if sink.problems.is_empty() { Ok(Config { effective: sink.effective, ..config }) } else { Err(sink.problems) }
}

/// Checks a configuration given as text, as tests and `load` do.
pub fn parse(text: &str) -> Result<Config, Vec<Problem>> {
    let mut sink = Sink::default();
    let root = match text.parse::<toml::Table>() {
        Ok(root) => root,
        Err(error) => return Err(vec![syntax_problem("text", text, &error)]),
    };
    note_sources(&root, String::new(), &Source::File("text".into()), &mut sink);
    let config = check(root, false, &mut sink);
    if sink.problems.is_empty() { Ok(Config { effective: sink.effective, ..config }) } else { Err(sink.problems) }
}

fn check(root: toml::Table, bare: bool, sink: &mut Sink) -> Config {
    let mut top = Section::new("", root, sink);
    let state_dir = PathBuf::from(top.parse("state_dir", paths::STATE_DIR.to_owned()));
    let bridge = top.section("bridge", |s| Bridge::check(s, bare));
    let admin = top.section("admin", |s| Admin::check(s, &state_dir));
    let log = top.section("log", Log::check);
    let trace = top.section("trace", Trace::check);
    let signing = top.section("signing", |s| Signing::check(s, &state_dir));
    let mut environments = BTreeMap::new();
    for (name, environment) in
        top.named("environments", |name, s| (name.to_owned(), EnvironmentConfig::check(name, s, &state_dir, bare)))
    {
        if let Some(environment) = environment {
            environments.insert(environment.name.clone(), environment);
        } else {
            top.problem(&format!("environments.{name}"), "an environment must match [a-z][a-z0-9]{0,19}");
        }
    }
    if environments.is_empty() && !top.has("environments") {
        // `[environments.production]` with every key at its default.
        let production = top.section("environments", |s| {
            s.section("production", |s| EnvironmentConfig::check("production", s, &state_dir, bare))
        });
        environments.extend(production.map(|e| (e.name.clone(), e)));
    }
    let accounts = Accounts::check(&mut top, &environments);
    if !bare && bridge.token_required && accounts.accounts.is_empty() && accounts.issuers.is_empty() {
        // Not an error: the service starts and refuses every publish with 401; `status` says what to do.
    }
    top.finish();
    Config { state_dir, bare, bridge, admin, log, trace, signing, accounts, environments, effective: Vec::new() }
}

/// The main file and `conf.d/*.toml` beside it.
fn files(main: &Path, sink: &mut Sink) -> Vec<PathBuf> {
    let mut files = vec![main.to_owned()];
    let dir = main.parent().unwrap_or(Path::new(".")).join("conf.d");
    match std::fs::read_dir(&dir) {
        Ok(entries) => {
            let mut more: Vec<_> = entries
                .filter_map(|entry| entry.ok().map(|e| e.path()))
                .filter(|path| path.extension().is_some_and(|e| e == "toml"))
                .collect();
            more.sort();
            files.extend(more);
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => sink.problem(&dir.display().to_string(), format!("cannot read the folder: {error}")),
    }
    files
}

fn read_file(path: &Path, root: &mut toml::Table, sink: &mut Sink) {
    let shown = path.display().to_string();
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => return sink.problem(&shown, format!("cannot read the file: {error}")),
    };
    match text.parse::<toml::Table>() {
        Ok(table) => {
            note_sources(&table, String::new(), &Source::File(path.to_owned()), sink);
            merge(root, table);
        }
        Err(error) => sink.problems.push(syntax_problem(&shown, &text, &error)),
    }
}

/// Where a file is not TOML. The parser's own message can quote the line, which may hold a secret: only its position is kept.
fn syntax_problem(file: &str, text: &str, error: &toml::de::Error) -> Problem {
    let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    Problem { key: format!("{file}:{line}"), text: format!("not valid TOML: {}", error.message()) }
}

/// Later files win key by key; lists and lists of tables are replaced as a whole.
fn merge(into: &mut toml::Table, from: toml::Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) => merge(old, new),
            (_, value) => drop(into.insert(key, value)),
        }
    }
}

fn note_sources(table: &toml::Table, path: String, source: &Source, sink: &mut Sink) {
    for (key, value) in table {
        let at = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match value {
            toml::Value::Table(inner) => note_sources(inner, at, source, sink),
            _ => drop(sink.sources.insert(at, source.clone())),
        }
    }
}
