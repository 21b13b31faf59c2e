//! `dealscale config show`: each effective value and where it came from; secrets are masked.

use clap::Subcommand;

use super::{Global, Outcome, load, output};

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Print each effective value and where it came from
    Show,
}

pub fn run(global: &Global, Command::Show: Command) -> Outcome {
    let config = load(global)?;
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
