//! Where log lines go: journald under systemd, text on a terminal, JSON elsewhere, and rotating files when asked.
//!
//! The filter and the outputs are set once at the start; a reload changes the filter only.

use std::io::{BufWriter, IsTerminal, Write};
use std::str::FromStr;
use std::time::Duration;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::Registry;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, reload};

use crate::config::Log;
use crate::config::observe::LogFormat;

/// Keeps the file writer alive and lets a reload change the filter.
pub struct Logs {
    filter: reload::Handle<Targets, Registry>,
    /// Write out what is queued when they are dropped.
    _writers: Vec<tracing_appender::non_blocking::WorkerGuard>,
}

impl Logs {
    /// Applies a new `log.filter`.
    pub fn refilter(&self, config: &Log) {
        if let Ok(filter) = targets(config) {
            let _ = self.filter.reload(filter);
        }
    }
}

/// `log.filter`, with libraries that tell too much at `info` kept at `warn` unless the filter names them.
fn targets(config: &Log) -> Result<Targets, tracing_subscriber::filter::ParseError> {
    let mut targets = Targets::from_str(&config.filter)?;
    // The client of Pulsar warns at each reconnection; the broker's own events say it better.
    for (library, level) in [("refinery_core", Level::WARN), ("sled", Level::WARN), ("pulsar", Level::ERROR)] {
        if !config.filter.contains(library) {
            targets = targets.with_target(library, level);
        }
    }
    Ok(targets)
}

/// Starts logging for the whole process.
///
/// # Errors
/// The log folder cannot be written, or logging was started before.
pub fn init(config: &Log) -> Result<Logs, String> {
    let targets = targets(config).map_err(|e| format!("log.filter: {e}"))?;
    let (filter, handle) = reload::Layer::new(targets);
    let journal = config.format == LogFormat::Auto && stderr_is_journal();
    let terminal = std::io::stderr().is_terminal();
    // https://no-color.org
    let colour = terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let text = config.format == LogFormat::Text || (config.format == LogFormat::Auto && terminal);
    // Lines are written by a thread of their own, so that a slow reader of standard error holds up no request. At 16,384 queued lines
    // whoever logs waits: no line is dropped.
    let (stderr, writer) = tracing_appender::non_blocking::NonBlockingBuilder::default()
        .lossy(false)
        .buffered_lines_limit(16_384)
        .finish(Bursts(BufWriter::new(std::io::stderr())));
    let mut writers = vec![writer];
    let output: Box<dyn Layer<_> + Send + Sync> = if journal {
        Box::new(Journal)
    } else if text {
        Box::new(tracing_subscriber::fmt::layer().with_ansi(colour).with_writer(stderr))
    } else {
        Box::new(tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(stderr))
    };
    let file = match &config.dir {
        None => None,
        Some(dir) => {
            let appender = tracing_appender::rolling::Builder::new()
                .rotation(tracing_appender::rolling::Rotation::DAILY)
                .filename_prefix("dealscale")
                .filename_suffix("log")
                .max_log_files(config.files_max as usize)
                .build(dir)
                .map_err(|e| format!("cannot write log files in {}: {e}", dir.display()))?;
            let (writer, guard) = tracing_appender::non_blocking(Bursts(BufWriter::new(appender)));
            writers.push(guard);
            Some(tracing_subscriber::fmt::layer().json().flatten_event(true).with_ansi(false).with_writer(writer))
        }
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(output)
        .with(file)
        .try_init()
        .map_err(|e| format!("cannot start logging: {e}"))?;
    Ok(Logs { filter: handle, _writers: writers })
}

/// The lines of a burst in one write. Its thread flushes when no line waits, and then rests for a moment: lines that come meanwhile
/// need not wake it one by one. A lone line is written at once.
struct Bursts<W: Write>(BufWriter<W>);

/// Far below what a reader of logs notices.
const REST: Duration = Duration::from_millis(2);

impl<W: Write> Write for Bursts<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()?;
        std::thread::sleep(REST);
        Ok(())
    }
}

/// systemd sets JOURNAL_STREAM to the device and inode of a service's standard error where that is the journal (systemd.exec(5)). A shell
/// that a service started hands the variable on, with another standard error: only the comparison tells.
fn stderr_is_journal() -> bool {
    let Ok(stat) = nix::sys::stat::fstat(std::io::stderr()) else { return false };
    std::env::var("JOURNAL_STREAM").is_ok_and(|stream| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Sends each event to journald with its fields as journal fields (`DEALSCALE_TENANT=…`).
struct Journal;

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let meta = event.metadata();
        let priority = match *meta.level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        };
        let mut fields = Fields { message: String::new(), fields: Vec::new() };
        event.record(&mut fields);
        let mut lines = vec![
            format!("PRIORITY={priority}"),
            "SYSLOG_IDENTIFIER=dealscale".into(),
            format!("TARGET={}", meta.target()),
        ];
        // The message carries the fields as well: `journalctl` shows only it.
        let mut message = fields.message;
        for (name, value) in &fields.fields {
            message.push_str(&format!(" {name}={value}"));
            let name: String =
                name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect();
            lines.push(format!("DEALSCALE_{name}={value}"));
        }
        lines.push(format!("MESSAGE={message}"));
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        // Nowhere to report it: this is the log.
        let _ = systemd::journal::send(&lines);
    }
}

struct Fields {
    message: String,
    fields: Vec<(&'static str, String)>,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else {
            self.fields.push((field.name(), format!("{value:?}")));
        }
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message = value.to_owned();
        } else {
            self.fields.push((field.name(), value.to_owned()));
        }
    }
}
