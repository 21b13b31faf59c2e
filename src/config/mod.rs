//! The configuration: one file per part, checked newtypes, all problems at once.
//!
//! Layer 1. [`load`] reads `/etc/dealscale/dealscale.toml` (or `--config`), every `conf.d/*.toml` beside it in the order
//! of their names, then the plan's environment variables ([`plan`]), and checks everything. It is the same code for
//! `serve`, `check`, `config show` and a reload. Values are never printed by an error: one may be a secret.
//!
//! # Invariants
//! 1. Either every key is right, or nothing starts: [`load`] returns all [`Problem`]s, each with the file and line (or the variable) to look at.
//!    A file that is there and cannot be read is one of them, never a start without a file.
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
pub use reader::{Effective, Problem, Secret, Section, Sink, Source, masked};
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
    /// What works, but ought to be looked at.
    pub warnings: Vec<Problem>,
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
    let files = files(overrides.file.as_deref(), Path::new(paths::CONFIG_FILE), &mut sink);
    let bare = files.is_empty() && sink.problems.is_empty();
    for file in files {
        read_file(&file, &mut root, &mut sink);
    }
    if !sink.problems.is_empty() {
        // Half a configuration would only show problems that it does not have.
        return Err(sink.problems);
    }
    if let Some(dir) = &overrides.state_dir {
        root.insert("state_dir".into(), toml::Value::String(dir.display().to_string()));
        sink.sources.insert("state_dir".into(), Source::Flag("--state-dir"));
    }
    plan::apply(&mut root, variables, &mut sink);
    finish(check(root, bare, &mut sink), sink)
}

/// A variable of this process. One that is not Unicode is not taken for an unset one: the check will not like what is left of it.
pub fn variable(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

/// Checks a configuration given as text.
pub fn parse(text: &str) -> Result<Config, Vec<Problem>> {
    let (mut sink, mut root) = (Sink::default(), toml::Table::new());
    read_text(Path::new("text"), text, &mut root, &mut sink);
    if !sink.problems.is_empty() {
        return Err(sink.problems);
    }
    finish(check(root, false, &mut sink), sink)
}

/// Where the running appliance is reached, from a configuration that need not pass the check: an operator may be unable to read its secrets, or
/// just be editing it.
pub fn socket(overrides: &Overrides) -> PathBuf {
    let (mut sink, mut root) = (Sink::default(), toml::Table::new());
    for file in files(overrides.file.as_deref(), Path::new(paths::CONFIG_FILE), &mut sink) {
        read_file(&file, &mut root, &mut sink);
    }
    let text = |value: Option<&toml::Value>| value.and_then(|v| v.as_str()).map(PathBuf::from);
    let state_dir = overrides.state_dir.clone().or_else(|| text(root.get("state_dir")));
    let state_dir = state_dir.unwrap_or_else(|| PathBuf::from(paths::STATE_DIR));
    text(root.get("admin").and_then(|a| a.get("socket"))).unwrap_or_else(|| listen::default_socket(&state_dir))
}

fn finish(config: Config, sink: Sink) -> Result<Config, Vec<Problem>> {
    if !sink.problems.is_empty() {
        return Err(sink.problems);
    }
    Ok(Config { effective: sink.effective, warnings: sink.warnings, ..config })
}

fn check(root: toml::Table, bare: bool, sink: &mut Sink) -> Config {
    let mut top = Section::new("", root, sink);
    let state_dir = PathBuf::from(top.parse("state_dir", paths::STATE_DIR.to_owned()));
    let bridge = top.section("bridge", |s| Bridge::check(s, bare));
    let admin = top.section("admin", |s| Admin::check(s, &state_dir, bridge.listen));
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
    if bridge.token_required && accounts.accounts.is_empty() && accounts.issuers.is_empty() {
        top.warning("accounts", "there is none, and no issuer: every request to the bridge is refused with 401 (`dealscale token NAME` makes one)");
    }
    environment::nothing_is_shared(&environments, &mut top);
    top.finish();
    let (effective, warnings) = (Vec::new(), Vec::new());
    Config { state_dir, bare, bridge, admin, log, trace, signing, accounts, environments, effective, warnings }
}

/// The main file and `conf.d/*.toml` beside it. None at all only where there is neither: a file that is there and cannot be read must not
/// end in a start without any.
fn files(given: Option<&Path>, usual: &Path, sink: &mut Sink) -> Vec<PathBuf> {
    let main = given.unwrap_or(usual);
    let mut files = Vec::new();
    match std::fs::symlink_metadata(main) {
        Err(error) if given.is_none() && error.kind() == std::io::ErrorKind::NotFound => {}
        // What else is wrong with it, reading it says.
        _ => files.push(main.to_owned()),
    }
    let dir = main.parent().unwrap_or(Path::new(".")).join("conf.d");
    match std::fs::read_dir(&dir) {
        Ok(entries) => {
            let mut more: Vec<_> = entries
                .filter_map(|entry| entry.ok().map(|e| e.path()))
                .filter(|path| path.extension().is_some_and(|e| e == "toml"))
                // Editors keep such files beside the one that they work on.
                .filter(|path| !path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b".")))
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
    match std::fs::read_to_string(path) {
        Ok(text) => read_text(path, &text, root, sink),
        Err(error) => sink.problem(&path.display().to_string(), format!("cannot read the file: {error}")),
    }
}

fn read_text(path: &Path, text: &str, root: &mut toml::Table, sink: &mut Sink) {
    let (positions, mut errors) = toml::de::DeTable::parse_recoverable(text);
    match text.parse::<toml::Table>() {
        Ok(table) => {
            note_sources(positions.get_ref(), "", &|at| Source::File(path.to_owned(), line(text, at)), sink);
            merge(root, table);
        }
        Err(error) if errors.is_empty() => errors.push(error),
        Err(_) => {}
    }
    for error in errors {
        // The parser's whole message quotes the line, which may hold a secret: only the position and the cause are kept.
        let line = line(text, error.span().unwrap_or_default().start);
        let key = format!("{}:{line}", path.display());
        sink.problems.push(Problem::new(key, format!("not valid TOML: {}", error.message())));
    }
}

/// The line of a position in `text`, counted from 1.
fn line(text: &str, at: usize) -> usize {
    text.as_bytes()[..at.min(text.len())].iter().filter(|b| **b == b'\n').count() + 1
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

/// Remembers where each key is set, and each table.
fn note_sources(table: &toml::de::DeTable<'_>, path: &str, source: &dyn Fn(usize) -> Source, sink: &mut Sink) {
    for (key, value) in table.iter() {
        let at = if path.is_empty() { key.get_ref().to_string() } else { format!("{path}.{}", key.get_ref()) };
        sink.sources.insert(at.clone(), source(key.span().start));
        match value.get_ref() {
            toml::de::DeValue::Table(inner) => note_sources(inner, &at, source, sink),
            toml::de::DeValue::Array(items) => {
                // A list replaces the one of an earlier file as a whole.
                let inside = format!("{at}[");
                sink.sources.retain(|key, _| !key.starts_with(&inside));
                for (n, item) in items.iter().enumerate() {
                    let at = format!("{at}[{n}]");
                    sink.sources.insert(at.clone(), source(item.span().start));
                    if let toml::de::DeValue::Table(inner) = item.get_ref() {
                        note_sources(inner, &at, source, sink);
                    }
                }
            }
            _ => {}
        }
    }
}
