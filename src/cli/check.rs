//! `dealscale check`: the very code that the start runs.

use super::{Global, Outcome, load, output};

pub fn run(global: &Global) -> Outcome {
    let config = load(global)?;
    if global.json {
        return output::json(
            &serde_json::json!({ "ok": true, "environments": config.environments.keys().collect::<Vec<_>>() }),
        );
    }
    let names = config.environments.keys().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    output::line(format!(
        "the configuration is right ({}: {names})",
        output::plural(config.environments.len(), "environment")
    ))
}
