//! `dealscale dead-letters`: list, show, replay, discard.

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::client::{Client, query};
use super::output::cell;
use super::{Failure, Global, Outcome, executions, output};
use crate::clock::Timestamp;
use crate::ids::{ExecutionId, Tenant};

#[derive(Args, Debug)]
pub struct Filter {
    #[arg(long)]
    tenant: Option<Tenant>,
    #[arg(long)]
    workflow: Option<String>,
    /// Class of the error, as `ls` shows it
    #[arg(long)]
    error_class: Option<String>,
    /// Accepted at or after this time (RFC 3339)
    #[arg(long)]
    since: Option<Timestamp>,
    /// Accepted before this time (RFC 3339)
    #[arg(long)]
    until: Option<Timestamp>,
}

impl Filter {
    fn pairs(&self) -> Vec<(&'static str, Option<String>)> {
        vec![
            ("tenant", self.tenant.as_ref().map(ToString::to_string)),
            ("workflow", self.workflow.clone()),
            ("error_class", self.error_class.clone()),
            ("since", self.since.map(|t| t.to_string())),
            ("until", self.until.map(|t| t.to_string())),
        ]
    }
    fn json(&self, dry_run: bool) -> Value {
        let set = self.pairs().into_iter().filter_map(|(k, v)| Some((k.to_owned(), Value::String(v?))));
        let mut body: Map<_, _> = set.collect();
        body.insert("dry_run".into(), dry_run.into());
        Value::Object(body)
    }
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// List dead letters, newest first
    Ls {
        #[command(flatten)]
        filter: Filter,
        #[arg(long)]
        cursor: Option<String>,
        #[arg(long, default_value_t = 50)]
        limit: usize,
    },
    /// One dead letter with every attempt
    Show {
        id: ExecutionId,
        #[arg(long)]
        tenant: Option<Tenant>,
    },
    /// Deliver again: one by its id, or all that a filter finds (counted first; --yes does it)
    Replay {
        #[arg(conflicts_with_all = ["workflow", "error_class", "since", "until"])]
        id: Option<ExecutionId>,
        #[command(flatten)]
        filter: Filter,
        /// Replay what the filter found
        #[arg(long)]
        yes: bool,
    },
    /// Give up a dead letter for good
    Discard {
        id: ExecutionId,
        #[arg(long)]
        tenant: Option<Tenant>,
    },
}

pub async fn run(global: &Global, command: Command) -> Outcome {
    let client = Client::new(global)?;
    let tenant_of = |tenant: Option<Tenant>| [("tenant", tenant.map(|t| t.to_string()))];
    match command {
        Command::Ls { filter, cursor, limit } => {
            let mut pairs = filter.pairs();
            pairs.extend([("cursor", cursor), ("limit", Some(limit.to_string()))]);
            executions::list(global, &client.get(&query("/dead-letters", &pairs)).await?)
        }
        Command::Show { id, tenant } => {
            executions::show(global, &client.get(&query(&format!("/dead-letters/{id}"), &tenant_of(tenant))).await?)
        }
        Command::Replay { id: Some(id), filter, .. } => {
            let path = query(&format!("/dead-letters/{id}/replay"), &tenant_of(filter.tenant));
            let answer = client.post(&path, None).await?;
            if global.json {
                output::json(&answer)
            } else {
                output::line(format!("{id} is {}", cell(&answer["state"])))
            }
        }
        Command::Replay { id: None, filter, yes } => {
            let answer = client.post("/dead-letters/replay", Some(filter.json(!yes))).await?;
            if global.json {
                return output::json(&answer);
            }
            let count = cell(&answer["count"]);
            if yes {
                output::line(format!("{count} dead letters are being replayed"))
            } else {
                output::line(format!("{count} dead letters match; nothing was replayed, --yes does it"))
            }
        }
        Command::Discard { id, tenant } => {
            let answer = client.delete(&query(&format!("/dead-letters/{id}"), &tenant_of(tenant))).await?;
            if global.json {
                return output::json(&answer);
            }
            match &answer {
                Value::Object(o) if o.contains_key("state") => {
                    output::line(format!("{id} is {}", cell(&answer["state"])))
                }
                Value::Null => output::line(format!("{id} is discarded")),
                other => Err(Failure::Message(format!("an answer that is not understood: {}", json!(other)))),
            }
        }
    }
}
