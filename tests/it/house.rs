//! The house keeps its own rules: imports point downwards, siblings of layer 5 do not know each other, a foreign crate has its owners.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// As in `src/lib.rs`, from below.
const LAYERS: [&[&str]; 7] = [
    &["units", "ids", "clock", "event"],
    &["config", "seal"],
    &["observe"],
    &["supervise", "finals", "listen"],
    &["routing", "references", "outbox", "broker", "payloads", "postgres", "n8n"],
    &["bridge", "relay", "delivery", "admin"],
    &["main", "lib", "cli", "app"],
];

/// Who may name a crate. What is not here may be named anywhere.
const OWNERS: [(&str, &[&str]); 14] = [
    ("sled", &["outbox"]),
    ("pulsar", &["broker"]),
    // Outbox and payload store each on a file of their own; n8n's own database is only read.
    ("rusqlite", &["outbox", "payloads", "n8n"]),
    ("tokio_postgres", &["postgres", "payloads", "n8n", "config"]),
    ("deadpool_postgres", &["postgres", "payloads"]),
    ("axum", &["bridge", "admin", "app"]),
    ("jsonwebtoken", &["bridge", "n8n", "config"]),
    ("opentelemetry_sdk", &["observe"]),
    ("opentelemetry_otlp", &["observe"]),
    ("prometheus", &["observe"]),
    ("tracing_subscriber", &["observe", "config"]),
    ("systemd", &["observe", "supervise", "listen"]),
    ("clap", &["cli"]),
    ("toml", &["config"]),
];

struct File {
    path: PathBuf,
    module: String,
    /// Without comments and tests.
    code: String,
}

fn files() -> Vec<File> {
    fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, files);
            } else if path.extension().is_some_and(|e| e == "rs") {
                files.push(path);
            }
        }
    }
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    walk(&src, &mut paths);
    let is_test = |p: &Path| ["tests", "conformance", "simulated"].contains(&p.file_stem().unwrap().to_str().unwrap());
    paths.retain(|p| !is_test(p));
    let files = paths.into_iter().map(|path| {
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        let code = text.lines().map(|l| l.split("//").next().unwrap()).collect::<Vec<_>>().join("\n");
        let first = path.strip_prefix(&src).unwrap().iter().next().unwrap().to_str().unwrap();
        File { module: first.trim_end_matches(".rs").to_owned(), path: path.clone(), code }
    });
    files.collect()
}

fn layer(module: &str) -> usize {
    LAYERS
        .iter()
        .position(|l| l.contains(&module))
        .unwrap_or_else(|| panic!("{module} has no layer: add it to lib.rs and here"))
}

/// What stands behind each `before`, as names; `{a, b::c}` is `a` and `b`.
fn named_after(code: &str, before: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (at, _) in code.match_indices(before) {
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = &code[at + before.len()..];
        let name = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
        match rest.strip_prefix('{') {
            None => drop(names.insert(name(rest))),
            Some(list) => {
                let (mut depth, mut word) = (0, String::new());
                for c in list.chars() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => drop(names.insert(name(std::mem::take(&mut word).trim()))),
                        c if depth == 0 => word.push(c),
                        _ => {}
                    }
                }
                names.insert(name(word.trim()));
            }
        }
    }
    names.remove("");
    names
}

#[test]
fn imports_point_downwards_and_duties_do_not_know_each_other() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for file in files().iter().filter(|f| f.module != "main" && f.module != "lib") {
        let own = layer(&file.module);
        for target in named_after(&file.code, "crate::") {
            // Macros stand at the root.
            if target == file.module || !LAYERS.iter().any(|l| l.contains(&&*target)) {
                continue;
            }
            seen += 1;
            let at = layer(&target);
            if at > own || (at == own && own == 5) {
                wrong.push(format!(
                    "{}: {} (layer {own}) names {target} (layer {at})",
                    file.path.display(),
                    file.module
                ));
            }
        }
    }
    assert!(seen > 200, "only {seen} imports were found: the test looks at the wrong thing");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_foreign_crate_has_its_owners() {
    let mut wrong = Vec::new();
    for (krate, owners) in OWNERS {
        let mut seen = false;
        for file in files() {
            let path = format!("{krate}::");
            let named = file
                .code
                .match_indices(&path)
                .any(|(at, _)| !file.code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':'));
            seen |= named;
            if named && !owners.contains(&&*file.module) {
                wrong.push(format!("{} names {krate}, which belongs to {owners:?}", file.path.display()));
            }
        }
        assert!(seen, "nobody names {krate}: take it out of this list");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn what_names_modules_is_found() {
    let code = "use crate::ids::Key;\nuse crate::{app, config::{self, Span}, n8n};\nlet x = $crate::observe::y; crate::units::Z";
    let found: Vec<_> = named_after(code, "crate::").into_iter().collect();
    assert_eq!(found, ["app", "config", "ids", "n8n", "units"]);
}

#[test]
fn every_module_stands_in_the_map() {
    let map = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let architecture = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("ARCHITECTURE.md")).unwrap();
    let drawn = map.lines().filter(|l| l.starts_with("//! ")).collect::<Vec<_>>().join("\n");
    for (n, modules) in LAYERS.iter().enumerate().take(6) {
        let line = drawn.lines().find(|l| l.starts_with(&format!("//! {n}  "))).unwrap_or_else(|| panic!("layer {n}"));
        let row =
            architecture.lines().find(|l| l.starts_with(&format!("| {n} |"))).unwrap_or_else(|| panic!("row {n}"));
        for module in *modules {
            assert!(line.split_whitespace().any(|w| w == *module), "{module} is not in layer {n} of src/lib.rs");
            assert!(row.contains(&format!("`{module}`")), "{module} is not in layer {n} of ARCHITECTURE.md");
            assert!(map.contains(&format!("pub mod {module};")), "{module} is no module");
        }
    }
    let modules = map.lines().filter(|l| l.starts_with("pub mod ")).count();
    assert_eq!(modules, LAYERS.iter().map(|l| l.len()).sum::<usize>() - 2, "main and lib are no modules");
}
