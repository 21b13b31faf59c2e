//! `dealscale check`: the very code that the start runs.

use super::{Global, Outcome, load, output};

pub fn run(global: &Global) -> Outcome {
    let config = load(global)?;
    if global.json {
        let environments: Vec<_> = config.environments.keys().collect();
        let warnings: Vec<_> = config.warnings.iter().map(ToString::to_string).collect();
        return output::json(&serde_json::json!({ "ok": true, "environments": environments, "warnings": warnings }));
    }
    for warning in &config.warnings {
        output::error(&format!("warning: {warning}"));
    }
    let names = config.environments.keys().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    output::line(format!(
        "the configuration is right ({}: {names})",
        output::plural(config.environments.len(), "environment")
    ))
}
