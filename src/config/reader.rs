//! Reads a TOML table key by key, so that **all** problems are found in one pass and no value is ever printed.
//!
//! Each part's `check` asks a [`Section`] for its keys; what nobody asked for is an unknown key, reported with the
//! nearest known one. Every key asked for is remembered with its effective value and where that came from, which is
//! what `dealscale config show` prints.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use crate::units::{Bytes, Span};

/// Something wrong with the configuration: where, what, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The key, written as a path: `environments.production.outbox.bytes_max`.
    pub key: String,
    pub text: String,
    /// Where the key, or the nearest table around it, is set.
    pub source: Source,
}

impl Problem {
    pub fn new(key: impl Into<String>, text: impl Into<String>) -> Self {
        Self { key: key.into(), text: text.into(), source: Source::Default }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::Default => write!(f, "{}: {}", self.key, self.text),
            source => write!(f, "{}: {} ({source})", self.key, self.text),
        }
    }
}

/// Where an effective value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Default,
    /// With the line, counted from 1.
    File(PathBuf, usize),
    Variable(&'static str),
    Flag(&'static str),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) => write!(f, "environment variable {name}"),
            Self::Flag(name) => write!(f, "command line {name}"),
        }
    }
}

/// A value as `config show` prints it. Secrets are masked before they get here.
#[derive(Clone, Debug)]
pub struct Effective {
    pub key: String,
    pub shown: String,
    pub source: Source,
    /// Tells two values apart within this process, secrets as well; says nothing about either.
    pub print: u64,
}

/// Collects what reading finds.
#[derive(Debug, Default)]
pub struct Sink {
    pub problems: Vec<Problem>,
    /// What works, but ought to be looked at.
    pub warnings: Vec<Problem>,
    pub effective: Vec<Effective>,
    /// Key path → source, for keys that are set somewhere. Missing means [`Source::Default`].
    pub sources: BTreeMap<String, Source>,
}

impl Sink {
    pub fn problem(&mut self, key: &str, text: impl Into<String>) {
        let source = self.nearest(key);
        self.problems.push(Problem { key: key.to_owned(), text: text.into(), source });
    }

    pub fn warning(&mut self, key: &str, text: impl Into<String>) {
        let source = self.nearest(key);
        self.warnings.push(Problem { key: key.to_owned(), text: text.into(), source });
    }

    /// Where `key` is set, or the table around it.
    fn nearest(&self, key: &str) -> Source {
        let mut at = key;
        loop {
            if let Some(source) = self.sources.get(at) {
                return source.clone();
            }
            match at.rfind(['.', '[']) {
                Some(cut) => at = &at[..cut],
                None => return Source::Default,
            }
        }
    }
}

/// A secret: never printed, not even by `{:?}`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
    /// The value itself, for the one place that uses it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}
impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

/// One table of the configuration.
pub struct Section<'s> {
    path: String,
    table: toml::Table,
    known: Vec<String>,
    sink: &'s mut Sink,
}

impl<'s> Section<'s> {
    pub fn new(path: impl Into<String>, table: toml::Table, sink: &'s mut Sink) -> Self {
        Self { path: path.into(), table, known: Vec::new(), sink }
    }

    /// The path of `key` in this section.
    pub fn at(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    pub fn problem(&mut self, key: &str, text: impl Into<String>) {
        let at = self.at(key);
        self.sink.problem(&at, text);
    }

    pub fn warning(&mut self, key: &str, text: impl Into<String>) {
        let at = self.at(key);
        self.sink.warning(&at, text);
    }

    /// Takes over what another reader found; its keys stand below `key`.
    pub fn problems(&mut self, key: &str, problems: Vec<Problem>) {
        for problem in problems {
            self.problem(key, format!("{}: {}", problem.key, problem.text));
        }
    }

    /// Whether `key` is set, without reading it.
    pub fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    fn take(&mut self, key: &str) -> Option<toml::Value> {
        self.known.push(key.to_owned());
        self.table.remove(key)
    }

    fn show(&mut self, key: &str, shown: String) {
        let print = print(&shown);
        self.show_as(key, key, shown, print);
    }

    /// `set_by` is the key that was really written: `KEY_file`, say.
    fn show_as(&mut self, key: &str, set_by: &str, shown: String, print: u64) {
        let source = self.sink.sources.get(&self.at(set_by)).cloned().unwrap_or(Source::Default);
        self.sink.effective.push(Effective { key: self.at(key), shown, source, print });
    }

    /// A value that is written as text and parsed (sizes, spans, names, URLs, addresses).
    pub fn parse<T>(&mut self, key: &str, default: T) -> T
    where
        T: FromStr + fmt::Display,
        T::Err: fmt::Display,
    {
        match self.parse_opt(key) {
            Some(value) => value,
            None => {
                // parse_opt recorded `(not set)` or a problem; the default is what is effective.
                if let Some(last) = self.sink.effective.last_mut().filter(|e| e.shown == UNSET) {
                    last.shown = masked(&default.to_string());
                    last.print = print(&default.to_string());
                }
                default
            }
        }
    }

    /// As [`parse`](Self::parse), without a default.
    pub fn parse_opt<T>(&mut self, key: &str) -> Option<T>
    where
        T: FromStr + fmt::Display,
        T::Err: fmt::Display,
    {
        let value = self.take(key);
        let Some(value) = value else {
            self.show(key, UNSET.to_owned());
            return None;
        };
        let text = match value {
            toml::Value::String(text) => text,
            toml::Value::Integer(n) => n.to_string(),
            toml::Value::Float(n) => n.to_string(),
            toml::Value::Boolean(b) => b.to_string(),
            other => {
                self.problem(key, format!("expected text, found {}", other.type_str()));
                return None;
            }
        };
        match text.parse::<T>() {
            Ok(value) => {
                let text = value.to_string();
                self.show_as(key, key, masked(&text), print(&text));
                Some(value)
            }
            Err(error) => {
                self.problem(key, error.to_string());
                None
            }
        }
    }

    /// An address to listen on.
    pub fn address(&mut self, key: &str, default: SocketAddr) -> SocketAddr {
        self.parse(key, Address(default)).0
    }

    /// A file that must be there and readable; the appliance reads it again where it uses it.
    pub fn file(&mut self, key: &str) -> Option<PathBuf> {
        let path = self.parse_opt::<String>(key).map(PathBuf::from)?;
        if let Err(error) = std::fs::File::open(&path).and_then(|mut f| std::io::Read::read(&mut f, &mut [0])) {
            self.problem(key, format!("cannot read the file: {error}"));
        }
        Some(path)
    }

    pub fn bytes(&mut self, key: &str, default: Bytes, range: std::ops::RangeInclusive<Bytes>) -> Bytes {
        let value = self.parse(key, default);
        if range.contains(&value) {
            return value;
        }
        self.problem(key, format!("must be between {} and {}", range.start(), range.end()));
        default
    }

    pub fn span(&mut self, key: &str, default: Span, range: std::ops::RangeInclusive<Span>) -> Span {
        let value = self.parse(key, default);
        if range.contains(&value) {
            return value;
        }
        self.problem(key, format!("must be between {} and {}", range.start(), range.end()));
        default
    }

    pub fn count(&mut self, key: &str, default: u64, range: std::ops::RangeInclusive<u64>) -> u64 {
        let value = match self.take(key) {
            None => default,
            Some(toml::Value::Integer(n)) if n >= 0 => n as u64,
            Some(other) => {
                self.problem(key, format!("expected a whole number, found {}", other.type_str()));
                return default;
            }
        };
        if !range.contains(&value) {
            self.problem(key, format!("must be between {} and {}", range.start(), range.end()));
            return default;
        }
        self.show(key, value.to_string());
        value
    }

    pub fn number(&mut self, key: &str, default: f64, range: std::ops::RangeInclusive<f64>) -> f64 {
        let value = match self.take(key) {
            None => default,
            Some(toml::Value::Integer(n)) => n as f64,
            Some(toml::Value::Float(n)) => n,
            Some(other) => {
                self.problem(key, format!("expected a number, found {}", other.type_str()));
                return default;
            }
        };
        if !range.contains(&value) {
            self.problem(key, format!("must be between {} and {}", range.start(), range.end()));
            return default;
        }
        self.show(key, value.to_string());
        value
    }

    pub fn flag(&mut self, key: &str, default: bool) -> bool {
        let value = match self.take(key) {
            None => default,
            Some(toml::Value::Boolean(b)) => b,
            Some(other) => {
                self.problem(key, format!("expected true or false, found {}", other.type_str()));
                return default;
            }
        };
        self.show(key, value.to_string());
        value
    }

    /// One of a few words.
    pub fn choice<T: Copy + PartialEq>(&mut self, key: &str, default: T, choices: &[(&str, T)]) -> T {
        let words = || choices.iter().map(|(w, _)| format!("{w:?}")).collect::<Vec<_>>().join(", ");
        let value = match self.take(key) {
            None => default,
            Some(toml::Value::String(word)) => match choices.iter().find(|(w, _)| *w == word) {
                Some((_, value)) => *value,
                None => {
                    self.problem(key, format!("expected one of {}", words()));
                    return default;
                }
            },
            Some(_) => {
                self.problem(key, format!("expected one of {}", words()));
                return default;
            }
        };
        let shown = choices.iter().find(|(_, v)| *v == value).map_or("", |(w, _)| w).to_owned();
        self.show(key, shown);
        value
    }

    /// A list of texts, each parsed.
    pub fn list<T>(&mut self, key: &str, default: &[&str]) -> Vec<T>
    where
        T: FromStr,
        T::Err: fmt::Display,
    {
        let texts = match self.take(key) {
            None => default.iter().map(|t| (*t).to_owned()).collect(),
            Some(toml::Value::Array(items)) => {
                let mut texts = Vec::with_capacity(items.len());
                for (n, item) in items.into_iter().enumerate() {
                    match item {
                        toml::Value::String(text) => texts.push(text),
                        other => {
                            self.problem(&format!("{key}[{n}]"), format!("expected text, found {}", other.type_str()))
                        }
                    }
                }
                texts
            }
            Some(other) => {
                self.problem(key, format!("expected a list of texts, found {}", other.type_str()));
                return Vec::new();
            }
        };
        self.show(key, format!("{texts:?}"));
        let mut values = Vec::with_capacity(texts.len());
        for (n, text) in texts.iter().enumerate() {
            match text.parse() {
                Ok(value) => values.push(value),
                Err(error) => self.problem(&format!("{key}[{n}]"), format!("{error}")),
            }
        }
        values
    }

    /// A table of texts.
    pub fn map(&mut self, key: &str) -> BTreeMap<String, String> {
        let mut map = BTreeMap::new();
        match self.take(key) {
            None => {}
            Some(toml::Value::Table(table)) => {
                for (name, value) in table {
                    match value {
                        toml::Value::String(text) => drop(map.insert(name, text)),
                        other => {
                            self.problem(
                                &format!("{key}.{name}"),
                                format!("expected text, found {}", other.type_str()),
                            );
                        }
                    }
                }
            }
            Some(other) => self.problem(key, format!("expected a table of texts, found {}", other.type_str())),
        }
        self.show(key, format!("{map:?}"));
        map
    }

    /// A secret of one line: `KEY = "…"` or `KEY_file = "/path"`, never both. Files are read now, one trailing newline removed.
    pub fn secret(&mut self, key: &str) -> Option<Secret> {
        let secret = self.secret_text(key)?;
        if secret.expose().contains(char::is_control) {
            let set_by =
                if self.sink.sources.contains_key(&self.at(key)) { key.to_owned() } else { format!("{key}_file") };
            self.problem(&set_by, "must be one line, without control characters");
            return None;
        }
        Some(secret)
    }

    /// As [`secret`](Self::secret), of any number of lines (PEM).
    pub fn secret_text(&mut self, key: &str) -> Option<Secret> {
        let file_key = format!("{key}_file");
        let (value, file) = (self.take(key), self.take(&file_key));
        let set_by = if file.is_some() { file_key.clone() } else { key.to_owned() };
        let secret = match (value, file) {
            (None, None) => None,
            (Some(_), Some(_)) => {
                self.problem(key, format!("set either {key} or {file_key}, not both"));
                return None;
            }
            (Some(toml::Value::String(text)), None) => Some(text),
            (None, Some(toml::Value::String(path))) => match std::fs::read_to_string(&path) {
                Ok(text) => {
                    if std::fs::metadata(&path)
                        .is_ok_and(|m| std::os::unix::fs::PermissionsExt::mode(&m.permissions()) & 0o004 != 0)
                    {
                        self.warning(&file_key, "everybody on this host can read the file: chmod 640");
                    }
                    Some(text.strip_suffix('\n').map(|t| t.strip_suffix('\r').unwrap_or(t).to_owned()).unwrap_or(text))
                }
                Err(error) => {
                    self.problem(&file_key, format!("cannot read the file: {error}"));
                    return None;
                }
            },
            _ => {
                self.problem(&set_by, "expected text");
                return None;
            }
        };
        if secret.as_deref() == Some("") {
            self.problem(&set_by, "is empty");
            return None;
        }
        let shown = if secret.is_some() { MASK } else { UNSET };
        let print = print(secret.as_deref().unwrap_or_default());
        self.show_as(key, &set_by, shown.to_owned(), print);
        secret.map(Secret)
    }

    /// A table below this one; empty when it is not set.
    pub fn section<R>(&mut self, key: &str, read: impl FnOnce(&mut Section<'_>) -> R) -> R {
        let table = match self.take(key) {
            None => toml::Table::new(),
            Some(toml::Value::Table(table)) => table,
            Some(other) => {
                self.problem(key, format!("expected a table, found {}", other.type_str()));
                toml::Table::new()
            }
        };
        let path = self.at(key);
        let mut inner = Section::new(path, table, self.sink);
        let result = read(&mut inner);
        inner.finish();
        result
    }

    /// Every table below `[KEY.NAME]`, in the order of the names.
    pub fn named<R>(&mut self, key: &str, mut read: impl FnMut(&str, &mut Section<'_>) -> R) -> Vec<R> {
        let table = match self.take(key) {
            None => return Vec::new(),
            Some(toml::Value::Table(table)) => table,
            Some(other) => {
                self.problem(
                    key,
                    format!("expected tables such as [{}.NAME], found {}", self.at(key), other.type_str()),
                );
                return Vec::new();
            }
        };
        let mut results = Vec::new();
        for (name, value) in table {
            let path = self.at(&format!("{key}.{name}"));
            match value {
                toml::Value::Table(table) => {
                    let mut inner = Section::new(path, table, self.sink);
                    results.push(read(&name, &mut inner));
                    inner.finish();
                }
                other => self.sink.problem(&path, format!("expected a table, found {}", other.type_str())),
            }
        }
        results
    }

    /// Every table of `[[KEY]]`, in the order of the file.
    pub fn tables<R>(&mut self, key: &str, mut read: impl FnMut(usize, &mut Section<'_>) -> R) -> Vec<R> {
        let items = match self.take(key) {
            None => return Vec::new(),
            Some(toml::Value::Array(items)) => items,
            Some(other) => {
                self.problem(key, format!("expected tables such as [[{}]], found {}", self.at(key), other.type_str()));
                return Vec::new();
            }
        };
        let mut results = Vec::new();
        for (n, value) in items.into_iter().enumerate() {
            let path = self.at(&format!("{key}[{n}]"));
            match value {
                toml::Value::Table(table) => {
                    let mut inner = Section::new(path, table, self.sink);
                    results.push(read(n, &mut inner));
                    inner.finish();
                }
                other => self.sink.problem(&path, format!("expected a table, found {}", other.type_str())),
            }
        }
        results
    }

    /// Reports every key that nobody asked for.
    pub fn finish(self) {
        for key in self.table.keys() {
            let at = if self.path.is_empty() { key.clone() } else { format!("{}.{key}", self.path) };
            let near = self
                .known
                .iter()
                .map(|known| (strsim::damerau_levenshtein(known, key), known))
                .filter(|(distance, known)| *distance <= 2.max(known.len() / 3))
                .min();
            let text = match near {
                Some((_, near)) => format!("unknown key; did you mean {near:?}?"),
                None => format!("unknown key; known here: {}", self.known.join(", ")),
            };
            self.sink.problem(&at, text);
        }
    }
}

const UNSET: &str = "(not set)";
const MASK: &str = "••••";

/// The same text has the same print in one process, and another one in the next: nothing of it can be learnt.
fn print(text: &str) -> u64 {
    use std::hash::{BuildHasher, RandomState};
    static STATE: std::sync::LazyLock<RandomState> = std::sync::LazyLock::new(RandomState::new);
    STATE.hash_one(text)
}

/// A URL without the password (or token) in front of its host.
pub fn masked(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_owned() };
    let authority = &rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())];
    match authority.rfind('@') {
        Some(at) => format!("{scheme}://{MASK}{}", &rest[at..]),
        None => text.to_owned(),
    }
}

/// As `IP:PORT`, with an error that says so.
struct Address(SocketAddr);

impl FromStr for Address {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse::<SocketAddr>() {
            Ok(address) if address.port() > 0 => Ok(Self(address)),
            _ => Err("expected an IP address and a port from 1 to 65535, such as \"127.0.0.1:8000\""),
        }
    }
}
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
