//! `dealscale check`: the very code that the start runs.

use super::{Global, Outcome, load, output};
use crate::listen::units;

pub fn run(global: &Global) -> Outcome {
    let config = load(global)?;
    // Not wrong, but not in force: only root can apply them.
    let differences = units::differences(&config, &units::folders());
    if global.json {
        let environments: Vec<_> = config.environments.keys().collect();
        let warnings: Vec<_> = config.warnings.iter().map(ToString::to_string).collect();
        return output::json(&serde_json::json!({
            "ok": true, "environments": environments, "warnings": warnings, "differences": differences
        }));
    }
    for warning in &config.warnings {
        output::error(&format!("warning: {warning}"));
    }
    for difference in &differences {
        output::error(difference);
    }
    let names = config.environments.keys().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    output::line(format!(
        "the configuration is right ({}: {names})",
        output::plural(config.environments.len(), "environment")
    ))
}
