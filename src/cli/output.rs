//! Everything that the command line prints.

use std::io::Write;

use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use serde::Serialize;

use super::{Failure, Outcome};

/// To standard error, with our name in front.
pub fn error(text: &str) {
    // Under systemd standard error is the journal, which takes the priority from the front of the line (sd-daemon(3)).
    let priority = if std::env::var_os("JOURNAL_STREAM").is_some() { "<3>" } else { "" };
    let _ = writeln!(std::io::stderr(), "{priority}dealscale: {text}");
}

/// A reader that went away (`| head`) is no failure.
fn write(text: &[u8]) -> Outcome {
    match std::io::stdout().write_all(text) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::Message(format!("cannot write: {e}"))),
        _ => Ok(()),
    }
}

pub fn raw(bytes: &[u8]) -> Outcome {
    write(bytes)
}

pub fn line(text: impl AsRef<str>) -> Outcome {
    write(format!("{}\n", text.as_ref()).as_bytes())
}

pub fn json(value: &impl Serialize) -> Outcome {
    let text = serde_json::to_string_pretty(value).map_err(|e| e.to_string())?;
    line(text)
}

/// Columns under a head.
pub fn table(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> Outcome {
    let mut table = Table::new();
    table
        .load_style(NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(head.iter().map(|h| h.to_uppercase()));
    for row in rows {
        table.add_row(row);
    }
    let text: Vec<_> = table.lines().map(|l| l.trim_end().to_owned()).collect();
    line(text.join("\n"))
}

pub fn plural(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// A JSON value as one cell: text without quotes, nothing for null.
pub fn cell(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::Null => String::new(),
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
