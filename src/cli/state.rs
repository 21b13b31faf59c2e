//! `dealscale state finalize`: the newest on-disk format, and no way back to the release before.
//!
//! A release reads the format before its own and writes that one until this command: upgrades can be taken back by one step.

use clap::Subcommand;

use super::client::Client;
use super::output::cell;
use super::{Global, Outcome, output};

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Write this release's format from now on; the release before cannot read it any more
    Finalize,
}

pub async fn run(global: &Global, Command::Finalize: Command) -> Outcome {
    let done = Client::new(global)?.post("/admin/outbox/finalize", None).await?;
    if global.json {
        return output::json(&done);
    }
    if done["format_before"] == done["format"] {
        output::line(format!("the outbox has format {} already, this release's newest", cell(&done["format"])))
    } else {
        output::line(format!("the outbox has format {} now; releases before this one refuse it", cell(&done["format"])))
    }
}
