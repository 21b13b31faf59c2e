//! The command line: one file per command. Human tables on a terminal, `--json` anywhere.
//!
//! Commands that operate (`status`, `executions`, `dead-letters`, `outbox`, `publish`, `reload`) speak to the running
//! appliance over its admin socket; `outbox` opens the folder itself when no appliance runs. Commands that only read the
//! configuration (`check`, `config show`, `routes explain`, `topology`) need no appliance. Who operates need not be able to read
//! secrets: where the configuration does not pass the check, the socket's path is still found in it, and the appliance decides.
//!
//! # Exit codes
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | failed; the message says what, where and what to do |
//! | 2 | the command line is wrong |
//! | 3 | done, and what was found needs attention (drift, damaged records, a part that is down, an event that did not end well) |
//! | 69 | the appliance does not run, or does not answer (`EX_UNAVAILABLE`) |
//! | 78 | the configuration cannot work (`EX_CONFIG`); systemd does not restart on it |

mod check;
mod client;
mod config_show;
mod dead_letters;
mod executions;
mod outbox;
mod output;
mod publish;
mod routes;
mod serve;
mod state;
mod status;
mod token;
mod topology;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::config::{self, Config, Overrides};

const EXIT_CODES: &str = "Exit codes: 0 done; 1 failed; 2 wrong command line; 3 done, but something needs attention; \
    69 the appliance does not answer; 78 the configuration cannot work";

/// Makes a self-hosted n8n production-grade: takes long work durably and delivers it to n8n's webhooks.
#[derive(Parser, Debug)]
#[command(name = "dealscale", version, max_term_width = 100, subcommand_required = true, arg_required_else_help = true, after_help = EXIT_CODES)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args, Debug, Clone)]
struct Global {
    /// Configuration file [default: /etc/dealscale/dealscale.toml, embedded defaults where there is none]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder for everything that must survive [default: state_dir of the configuration]
    #[arg(long, global = true, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Print JSON instead of tables
    #[arg(long, global = true)]
    json: bool,
    /// Environment to work on, where there are several
    #[arg(long, global = true, value_name = "NAME")]
    environment: Option<crate::ids::Environment>,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the appliance in the foreground
    Serve,
    /// Check the configuration and print every problem
    Check,
    /// The effective configuration, and its addresses for systemd
    #[command(subcommand)]
    Config(config_show::Command),
    /// State of each part of the running appliance
    Status,
    /// Make the running appliance read its configuration again
    Reload(status::ReloadCommand),
    /// Publish one event, as a workflow would
    Publish(publish::Command),
    /// What became of events
    #[command(subcommand)]
    Executions(executions::Command),
    /// Events that could not be delivered
    #[command(subcommand)]
    DeadLetters(dead_letters::Command),
    /// The durable local queue
    #[command(subcommand)]
    Outbox(outbox::Command),
    /// The format of what is on disk
    #[command(subcommand)]
    State(state::Command),
    /// Pulsar's tenant, namespace, topics and subscriptions, against the topics file
    #[command(subcommand)]
    Topology(topology::Command),
    /// Which route an event would take, and why
    #[command(subcommand)]
    Routes(routes::Command),
    /// Make a token for a service account and the lines of configuration for it
    Token(token::Command),
    /// Shell completions
    Completions { shell: clap_complete::Shell },
    /// The manual page, as roff
    Man,
}

/// Why a command ends with something other than 0.
#[derive(Debug)]
enum Failure {
    /// What, where, what to do.
    Message(String),
    /// Already said; needs attention.
    Attention,
    /// No appliance answers.
    Unavailable(String),
    Config(Vec<config::Problem>),
    /// The running appliance refused the configuration.
    Refused(String),
}

impl From<String> for Failure {
    fn from(text: String) -> Self {
        Self::Message(text)
    }
}
impl From<&str> for Failure {
    fn from(text: &str) -> Self {
        Self::Message(text.to_owned())
    }
}

type Outcome = Result<(), Failure>;

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    // The one crypto provider of the process (aws-lc-rs). A second call can only be ours.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let json = cli.global.json;
    match dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Message(text)) => {
            output::error(&text);
            ExitCode::from(1)
        }
        Err(Failure::Attention) => ExitCode::from(3),
        Err(Failure::Unavailable(text)) => {
            output::error(&text);
            ExitCode::from(69)
        }
        Err(Failure::Refused(text)) => {
            output::error(&text);
            ExitCode::from(78)
        }
        Err(Failure::Config(problems)) => {
            if json {
                // What a program reads; people read standard error.
                let problems = problems
                    .iter()
                    .map(|p| serde_json::json!({ "key": p.key, "problem": p.text, "source": p.source.to_string() }));
                let _ = output::json(&serde_json::json!({ "ok": false, "problems": problems.collect::<Vec<_>>() }));
            }
            for problem in &problems {
                output::error(&problem.to_string());
            }
            output::error(&format!(
                "{} in the configuration; nothing was started",
                output::plural(problems.len(), "problem")
            ));
            ExitCode::from(78)
        }
    }
}

fn dispatch(cli: Cli) -> Outcome {
    let global = &cli.global;
    match cli.command {
        Command::Serve => serve::run(global),
        Command::Check => check::run(global),
        Command::Config(command) => config_show::run(global, command),
        Command::Routes(command) => routes::run(global, command),
        Command::Token(command) => token::run(global, command),
        Command::Completions { shell } => {
            // Into memory first: the generator panics where a reader goes away.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "dealscale", &mut script);
            output::raw(&script)
        }
        Command::Man => man(),
        Command::Status => block_on(status::run(global)),
        Command::Reload(command) => block_on(status::reload(global, &command)),
        Command::Publish(command) => block_on(publish::run(global, command)),
        Command::Executions(command) => block_on(executions::run(global, command)),
        Command::DeadLetters(command) => block_on(dead_letters::run(global, command)),
        Command::Outbox(command) => block_on(outbox::run(global, command)),
        Command::State(command) => block_on(state::run(global, command)),
        Command::Topology(command) => block_on(topology::run(global, command)),
    }
}

/// One page for the whole command line: the main page, then each command.
fn man() -> Outcome {
    fn render(command: &clap::Command, prefix: &str, out: &mut Vec<u8>) -> std::io::Result<()> {
        let name =
            if prefix.is_empty() { command.get_name().to_owned() } else { format!("{prefix} {}", command.get_name()) };
        let page = clap_mangen::Man::new(command.clone().name(name.clone()));
        if prefix.is_empty() {
            page.render(out)?;
        } else {
            page.render_name_section(out)?;
            page.render_synopsis_section(out)?;
            page.render_options_section(out)?;
        }
        command.get_subcommands().filter(|c| c.get_name() != "help").try_for_each(|c| render(c, &name, out))
    }
    let mut page = Vec::new();
    render(&Cli::command(), "", &mut page).map_err(|e| e.to_string())?;
    output::raw(&page)
}

fn overrides(global: &Global) -> Overrides {
    Overrides { file: global.config.clone(), state_dir: global.state_dir.clone() }
}

/// The configuration, or exit code 78.
fn load(global: &Global) -> Result<Config, Failure> {
    let config = config::load(&overrides(global), &config::variable).map_err(Failure::Config)?;
    match crate::app::check(&config) {
        problems if problems.is_empty() => Ok(config),
        problems => Err(Failure::Config(problems)),
    }
}

/// `--environment`, or the only one there is.
fn environment<'c>(config: &'c Config, global: &Global) -> Result<&'c config::EnvironmentConfig, Failure> {
    let names = || config.environments.keys().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match &global.environment {
        Some(name) => {
            config.environments.get(name).ok_or_else(|| format!("no environment {name}; there are: {}", names()).into())
        }
        None if config.environments.len() == 1 => Ok(config.environments.values().next().expect("there is one")),
        None => Err(format!("say which with --environment NAME: {}", names()).into()),
    }
}

/// A small runtime for commands that talk to somebody.
fn block_on(command: impl Future<Output = Outcome>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|e| format!("cannot start: {e}"))?.block_on(command)
}
