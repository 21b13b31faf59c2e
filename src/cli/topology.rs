//! `dealscale topology`: the cluster against the topics file. Talks to Pulsar's REST API itself; no appliance is needed.

use clap::Subcommand;

use super::{Failure, Global, Outcome, environment, load, output};
use crate::broker::Topics;
use crate::broker::topology::{Plan, Severity, Topology};
use crate::config::Broker;
use crate::ids::Tenant;

#[derive(Subcommand, Debug)]
pub enum Command {
    /// What `apply` would change, and what it would leave to you
    Plan,
    /// Make the changes of the plan; nothing is ever deleted
    Apply,
    /// Exit code 3 when something differs, or could make Pulsar drop accepted work
    Check,
}

pub async fn run(global: &Global, command: Command) -> Outcome {
    let config = load(global)?;
    let environment = environment(&config, global)?;
    let Broker::Pulsar(pulsar) = &environment.broker else {
        return Err(Failure::Message(format!(
            "environment {} uses the local broker, which needs no topology; set [environments.{0}.broker] kind = \"pulsar\"",
            environment.name
        )));
    };
    // Tenants declared by their exact name get their topics in advance; those of a pattern at their first event.
    let tenants = environment.tenants.iter().filter_map(|t| Tenant::try_new(t.pattern.as_str()).ok()).collect();
    let topology = Topology::open(pulsar, &Topics::of(environment), tenants)?;
    let plan = topology.plan().await.map_err(|e| e.to_string())?;
    match command {
        Command::Plan => show(global, &plan),
        Command::Check => {
            show(global, &plan)?;
            if plan.clean() { Ok(()) } else { Err(Failure::Attention) }
        }
        Command::Apply => {
            let applied = topology.apply(&plan).await;
            let failed = applied.iter().filter(|a| !a.done).count();
            if global.json {
                output::json(&serde_json::json!({ "applied": applied, "findings": plan.findings }))?;
            } else {
                for change in &applied {
                    match &change.error {
                        None => output::line(format!("done    {}", change.change))?,
                        Some(error) => output::line(format!("FAILED  {}: {error}", change.change))?,
                    }
                }
                findings(&plan)?;
                let left = plan.findings.len();
                output::line(format!(
                    "{} made, {failed} failed, {left} left to you",
                    output::plural(applied.len() - failed, "change")
                ))?;
            }
            let unsafe_left = plan.findings.iter().any(|f| f.severity == Severity::Error);
            if failed == 0 && !unsafe_left { Ok(()) } else { Err(Failure::Attention) }
        }
    }
}

fn show(global: &Global, plan: &Plan) -> Outcome {
    if global.json {
        return output::json(plan);
    }
    for change in &plan.changes {
        output::line(format!("change  {change}"))?;
    }
    findings(plan)?;
    match plan.changes.len() {
        0 => output::line("nothing to change"),
        n => output::line(format!("{} to make: `dealscale topology apply`", output::plural(n, "change"))),
    }
}

fn findings(plan: &Plan) -> Outcome {
    for finding in &plan.findings {
        let word = if finding.severity == Severity::Error { "ERROR " } else { "drift " };
        output::line(format!("{word}  {}: {}", finding.object, finding.text))?;
    }
    Ok(())
}
