//! `dealscale check`: the very code that the start runs.

use super::{Global, Outcome, load, output};
use crate::listen::units;

pub fn run(global: &Global) -> Outcome {
    let config = load(global)?;
    // Not wrong, but not in force: only root can apply them.
    let differences = units::differences(&config, &units::folders());
    if global.json {
        return output::json(
            &serde_json::json!({ "ok": true, "environments": config.environments.keys().collect::<Vec<_>>(), "differences": differences }),
        );
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
