//! `dealscale config show`: each effective value and where it came from; secrets are masked.
//! `dealscale config apply`: the addresses of `dealscale.toml` for systemd's socket units (root).

use clap::Subcommand;

use super::{Failure, Global, Outcome, load, output};
use crate::listen::units;

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Print each effective value and where it came from
    Show,
    /// Write the addresses into systemd's socket units, and restart what listens elsewhere (root)
    Apply {
        /// Only write; the next start of the sockets uses it
        #[arg(long)]
        no_restart: bool,
    },
}

pub fn run(global: &Global, command: Command) -> Outcome {
    let config = load(global)?;
    if let Command::Apply { no_restart } = command {
        return apply(global, &config, no_restart);
    }
    if global.json {
        let values: serde_json::Map<_, _> = config
            .effective
            .iter()
            .map(|e| (e.key.clone(), serde_json::json!({ "value": e.shown, "source": e.source.to_string() })))
            .collect();
        return output::json(&values);
    }
    output::table(
        &["key", "value", "source"],
        config.effective.iter().map(|e| vec![e.key.clone(), e.shown.clone(), e.source.to_string()]),
    )
}

fn apply(global: &Global, config: &crate::config::Config, no_restart: bool) -> Outcome {
    if !nix::unistd::Uid::effective().is_root() {
        return Err("config apply changes systemd's units: run it as root".into());
    }
    let folders = units::folders();
    let changes = units::apply(config, &folders, &folders[0])?;
    if !changes.is_empty() {
        systemctl(&["daemon-reload"])?;
        if !no_restart && is_active()? {
            // A socket cannot be opened anew while the service has it. All of them together: stopping the service closes the others too.
            let units: Vec<_> =
                ["dealscale.service"].into_iter().chain(units::sockets(config).map(|s| s.unit)).collect();
            systemctl(&[&["stop"], units.as_slice()].concat())?;
            systemctl(&["start", "dealscale.service"])?;
        }
    }
    let changed = changes.values().map(|change| match change {
        units::Change::Written(file) => format!("written: {}", file.display()),
        units::Change::Removed(file) => format!("removed: {}", file.display()),
    });
    let changed: Vec<_> = changed.collect();
    if global.json {
        return output::json(
            &serde_json::json!({ "changed": changed, "restarted": !changed.is_empty() && !no_restart }),
        );
    }
    for line in &changed {
        output::line(line)?;
    }
    for socket in units::sockets(config) {
        let open = if socket.wanted.ip().is_loopback() { "" } else { " (beyond loopback: mind the firewall)" };
        output::line(format!("{} listens on {}{open}", socket.unit, socket.wanted))?;
    }
    Ok(())
}

fn is_active() -> Result<bool, Failure> {
    let asked = std::process::Command::new("systemctl").args(["--quiet", "is-active", "dealscale.service"]).status();
    Ok(asked.map_err(|e| format!("cannot run systemctl: {e}"))?.success())
}

fn systemctl(arguments: &[&str]) -> Result<(), Failure> {
    let done = std::process::Command::new("systemctl").args(arguments).status();
    let text = match done {
        Ok(status) if status.success() => return Ok(()),
        Ok(status) => format!("`systemctl {}` ended with {status}", arguments.join(" ")),
        Err(error) => format!("cannot run systemctl: {error}"),
    };
    Err(Failure::Message(text))
}
