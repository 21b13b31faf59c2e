//! `dealscale outbox`: the durable local queue. Speaks to the appliance when it runs, and opens the folder itself when it does not.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use serde_json::{Value, json};

use super::client::{Client, query};
use super::output::cell;
use super::{Failure, Global, Outcome, environment, output};
use crate::ids::Tenant;
use crate::outbox::{Unreadable, tools};

/// Records of one request; where they are large the answer has fewer.
const PAGE: usize = 100;
/// Bodies of one request of an import.
const IMPORT_BYTES: u64 = 8 << 20;

#[derive(Subcommand, Debug)]
pub enum Command {
    /// How much waits, for whom, since when
    Status,
    /// List records
    Ls {
        #[arg(long)]
        tenant: Option<Tenant>,
        /// Records that can never be relayed
        #[arg(long)]
        poisoned: bool,
        /// Start behind this sequence
        #[arg(long)]
        after: Option<u64>,
        #[arg(long, default_value_t = 50)]
        limit: usize,
    },
    /// One record with its body
    Show { sequence: u64 },
    /// Read every record and check it (the appliance must be stopped)
    Verify,
    /// Write every waiting record to plain files
    Export { dir: PathBuf },
    /// Take exported records; ids are kept, what is there already is a duplicate
    Import { dir: PathBuf },
    /// Put a poisoned record back, discard it, or acknowledge a possible loss after corruption
    Repair {
        /// Back into the queue
        #[arg(long, value_name = "SEQUENCE", conflicts_with_all = ["discard", "acknowledge_loss"])]
        requeue: Option<u64>,
        /// Remove for good
        #[arg(long, value_name = "SEQUENCE", conflicts_with = "acknowledge_loss")]
        discard: Option<u64>,
        /// The salvage after a corruption was looked into
        #[arg(long)]
        acknowledge_loss: bool,
    },
    /// Wait until the outbox is empty
    Drain {
        /// Give up after this
        #[arg(long, default_value = "10m")]
        timeout: crate::units::Span,
    },
}

pub async fn run(global: &Global, command: Command) -> Outcome {
    let client = Client::new(global)?;
    if client.is_up().await { live(global, &client, command).await } else { offline(global, &client, command).await }
}

async fn live(global: &Global, client: &Client, command: Command) -> Outcome {
    match command {
        Command::Status => status(global, &client.get("/admin/outbox/status").await?),
        Command::Ls { tenant, poisoned, after, limit } => {
            let mut records = page(client, tenant.as_ref(), poisoned, after, limit, false).await?;
            if poisoned {
                let answer = client.get("/admin/outbox/unreadable").await?;
                let unreadable: Vec<Unreadable> = serde_json::from_value(answer["records"].clone())
                    .map_err(|e| format!("an answer that is not understood: {e}"))?;
                add_unreadable(&mut records, unreadable, tenant.as_ref(), after, limit);
            }
            list(global, &records)
        }
        Command::Show { sequence } => show(global, &client.get(&format!("/admin/outbox/records/{sequence}")).await?),
        Command::Verify => Err(Failure::from(
            "the appliance is running and checks each record as it reads it; stop it to verify the whole folder",
        )),
        Command::Export { dir } => {
            let mut export = tools::Export::create(&dir).map_err(|e| e.to_string())?;
            for poisoned in [false, true] {
                let mut after = None;
                loop {
                    let records = page(client, None, poisoned, after, PAGE, true).await?;
                    let Some(last) = records.last() else { break };
                    after = last["sequence"].as_u64();
                    for record in &records {
                        let view: crate::admin::RecordView = serde_json::from_value(record.clone())
                            .map_err(|e| format!("an answer that is not understood: {e}"))?;
                        let reason = view.poisoned.clone();
                        export.write(&view.into_event()?, reason.as_deref()).map_err(|e| e.to_string())?;
                    }
                }
            }
            let answer = client.get("/admin/outbox/unreadable").await?;
            let unreadable: Vec<Unreadable> = serde_json::from_value(answer["records"].clone())
                .map_err(|e| format!("an answer that is not understood: {e}"))?;
            exported(global, export, &dir, &unreadable)
        }
        Command::Import { dir } => {
            let (mut imported, mut duplicates, mut refused) = (0, 0, Vec::new());
            let (mut batch, mut bytes) = (Vec::new(), 0);
            let mut entries = tools::read_export(&dir).map_err(|e| e.to_string())?.peekable();
            while let Some(entry) = entries.next() {
                match entry {
                    Ok(entry) => {
                        bytes += entry.event.body.len() as u64;
                        batch.push(crate::admin::RecordView::of(&entry.event));
                    }
                    // One damaged file keeps nothing else out.
                    Err(error) => refused.push(error.to_string()),
                }
                let last = entries.peek().is_none();
                if !batch.is_empty() && (batch.len() == PAGE || bytes >= IMPORT_BYTES || last) {
                    bytes = 0;
                    let body = serde_json::to_value(std::mem::take(&mut batch)).map_err(|e| e.to_string())?;
                    let answer = client.post("/admin/outbox/records", Some(body)).await?;
                    imported += answer["imported"].as_u64().unwrap_or(0);
                    duplicates += answer["duplicates"].as_u64().unwrap_or(0);
                    refused.extend(answer["refused"].as_array().into_iter().flatten().map(cell));
                }
            }
            imported_report(global, imported, duplicates, &refused)
        }
        Command::Repair { requeue, discard, acknowledge_loss } => {
            let answer = match (requeue, discard, acknowledge_loss) {
                (Some(sequence), ..) => client.post(&format!("/admin/outbox/records/{sequence}/requeue"), None).await?,
                (_, Some(sequence), _) => client.delete(&format!("/admin/outbox/records/{sequence}")).await?,
                (_, _, true) => client.post("/admin/outbox/acknowledge-loss", None).await?,
                _ => return Err(Failure::from("say --requeue SEQUENCE, --discard SEQUENCE or --acknowledge-loss")),
            };
            done(global, answer, "done".into())
        }
        Command::Drain { timeout } => drain(global, client, timeout.0).await,
    }
}

async fn offline(global: &Global, client: &Client, command: Command) -> Outcome {
    let config = client.config.as_ref().map_err(|problems| Failure::Config(problems.clone()))?;
    let environment = environment(config, global)?;
    let settings = &environment.outbox;
    let reads = matches!(
        command,
        Command::Status | Command::Ls { .. } | Command::Show { .. } | Command::Export { .. } | Command::Verify
    );
    let makes = matches!(command, Command::Import { .. });
    if !matches!(command, Command::Drain { .. }) {
        is_ours(&settings.dir, makes)?;
    }
    match command {
        Command::Verify => {
            let report = tools::verify(settings).map_err(|e| e.to_string())?;
            verified(global, &settings.dir, &report)
        }
        Command::Drain { .. } => {
            Err(Failure::Unavailable("only a running appliance drains its outbox: start it first".into()))
        }
        command => {
            // The same code as in the appliance, on the folder itself.
            let outbox = tools::open_alone(settings, &environment.name, !reads).map_err(|e| e.to_string())?;
            let outcome = alone(global, &outbox, command).await;
            outbox.close().await.map_err(|e| e.to_string())?;
            outcome
        }
    }
}

async fn alone(global: &Global, outbox: &crate::outbox::Outbox, command: Command) -> Outcome {
    use crate::outbox::{Append, Sequence};
    let failed = |e: crate::outbox::Error| Failure::Message(e.to_string());
    match command {
        Command::Status => {
            let mut figures = serde_json::to_value(outbox.status()).map_err(|e| e.to_string())?;
            // Limits are the running appliance's.
            for key in ["bytes_max", "count_max", "disk_free"] {
                figures[key] = Value::Null;
            }
            status(global, &figures)
        }
        Command::Ls { tenant, poisoned, after, limit } => {
            let found = outbox.list(tenant.clone(), poisoned, after.map(Sequence), limit).await.map_err(failed)?;
            let views: Result<Vec<_>, _> =
                found.iter().map(|f| serde_json::to_value(crate::admin::RecordView::new(f, false))).collect();
            let mut views = views.map_err(|e| e.to_string())?;
            if poisoned {
                let unreadable = outbox.unreadable(false).await.map_err(failed)?;
                add_unreadable(&mut views, unreadable, tenant.as_ref(), after, limit);
            }
            list(global, &views)
        }
        Command::Show { sequence } => match outbox.record(Sequence(sequence)).await.map_err(failed)? {
            Some(found) => {
                let view = serde_json::to_value(crate::admin::RecordView::new(&found, true));
                show(global, &view.map_err(|e| e.to_string())?)
            }
            None => Err(Failure::Message(crate::admin::absent(outbox, sequence).await.map_err(failed)?)),
        },
        Command::Export { dir } => {
            let mut export = tools::Export::create(&dir).map_err(|e| e.to_string())?;
            for poisoned in [false, true] {
                let mut after = None;
                loop {
                    let found = outbox.list_with_bodies(poisoned, after, PAGE).await.map_err(failed)?;
                    let Some(last) = found.last() else { break };
                    after = Some(last.sequence);
                    for record in &found {
                        export.write(&record.event, record.poisoned.as_deref()).map_err(|e| e.to_string())?;
                    }
                }
            }
            exported(global, export, &dir, &outbox.unreadable(true).await.map_err(failed)?)
        }
        Command::Import { dir } => {
            let (mut imported, mut duplicates, mut refused) = (0, 0, Vec::new());
            for entry in tools::read_export(&dir).map_err(|e| e.to_string())? {
                let event = match entry {
                    Ok(entry) => entry.event,
                    // One damaged file keeps nothing else out.
                    Err(error) => {
                        refused.push(error.to_string());
                        continue;
                    }
                };
                let id = event.envelope.execution_id;
                match outbox.append(Append { event, idempotency_key: None, answer: Default::default() }).await {
                    Ok(appended) if appended.duplicate => duplicates += 1,
                    Ok(_) => imported += 1,
                    Err(error) => refused.push(format!("{id}: {error}")),
                }
            }
            imported_report(global, imported, duplicates, &refused)
        }
        Command::Repair { requeue, discard, acknowledge_loss } => {
            let found = match (requeue, discard, acknowledge_loss) {
                (Some(sequence), ..) => outbox.repair_poisoned(Sequence(sequence), false).await.map_err(failed)?,
                (_, Some(sequence), _) => outbox.repair_poisoned(Sequence(sequence), true).await.map_err(failed)?,
                (_, _, true) => {
                    outbox.acknowledge_data_loss().await.map_err(failed)?;
                    true
                }
                _ => return Err(Failure::from("say --requeue SEQUENCE, --discard SEQUENCE or --acknowledge-loss")),
            };
            if found {
                done(global, json!({ "done": true }), "done".into())
            } else {
                Err(Failure::from("no such poisoned record: see `dealscale outbox ls --poisoned`"))
            }
        }
        Command::Verify | Command::Drain { .. } => Err(Failure::from("not on a folder that is open")),
    }
}

async fn page(
    client: &Client,
    tenant: Option<&Tenant>,
    poisoned: bool,
    after: Option<u64>,
    limit: usize,
    body: bool,
) -> Result<Vec<Value>, Failure> {
    let path = query(
        "/admin/outbox/records",
        &[
            ("tenant", tenant.map(|t| t.to_string())),
            ("poisoned", Some(poisoned.to_string())),
            ("after", after.map(|a| a.to_string())),
            ("limit", Some(limit.to_string())),
            ("body", Some(body.to_string())),
        ],
    );
    Ok(client.get(&path).await?["records"].as_array().cloned().unwrap_or_default())
}

/// A folder that is there, and whose files stay its owner's.
fn is_ours(dir: &Path, make: bool) -> Outcome {
    use std::os::unix::fs::MetadataExt;
    let there = match std::fs::metadata(dir) {
        Ok(there) => there,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            if !make {
                return Err(Failure::Message(format!(
                    "there is no outbox at {}: is it the right --config, --state-dir and --environment?",
                    dir.display()
                )));
            }
            let above = dir.ancestors().find_map(|above| std::fs::metadata(above).ok());
            match above.filter(|_| nix::unistd::geteuid().is_root()) {
                Some(above) => above,
                None => return Ok(()),
            }
        }
        Err(error) => return Err(Failure::Message(format!("cannot look into {}: {error}", dir.display()))),
    };
    let (owner, we) = (nix::unistd::Uid::from_raw(there.uid()), nix::unistd::geteuid());
    if owner == we {
        return Ok(());
    }
    let name = nix::unistd::User::from_uid(owner).ok().flatten().map_or_else(|| owner.to_string(), |user| user.name);
    Err(Failure::Message(format!(
        "{} belongs to {name}: run this as that user (`runuser -u {name} -- dealscale outbox …`); files of somebody else would \
         keep the appliance from opening it",
        dir.display()
    )))
}

/// Records of which only the place is known stand among the others.
fn add_unreadable(
    records: &mut Vec<Value>,
    unreadable: Vec<Unreadable>,
    tenant: Option<&Tenant>,
    after: Option<u64>,
    limit: usize,
) {
    for one in unreadable {
        if tenant.is_none_or(|t| t.as_str() == one.tenant) && after.is_none_or(|a| one.sequence.0 > a) {
            let envelope = json!({ "tenant": one.tenant });
            records.push(json!({
                "sequence": one.sequence, "unreadable": true, "leased": false, "poisoned": one.why, "envelope": envelope
            }));
        }
    }
    records.sort_by_key(|record| record["sequence"].as_u64());
    records.truncate(limit);
}

fn exported(global: &Global, export: tools::Export, dir: &Path, unreadable: &[Unreadable]) -> Outcome {
    let count = export.finish().map_err(|e| e.to_string())?;
    let value = json!({ "exported": count, "dir": dir, "unreadable": unreadable });
    done(global, value, format!("{} in {}", output::plural(count as usize, "record"), dir.display()))?;
    for one in unreadable {
        output::error(&format!(
            "record {} of tenant {} cannot be read ({}) and is not in the export",
            one.sequence.0, one.tenant, one.why
        ));
    }
    if unreadable.is_empty() { Ok(()) } else { Err(Failure::Attention) }
}

fn verified(global: &Global, dir: &Path, report: &tools::Report) -> Outcome {
    let damaged = report.damaged.len();
    if global.json {
        output::json(report)?;
    } else {
        let head = format!("{}: {} read", dir.display(), output::plural(report.records as usize, "record"));
        output::line(format!("{head}, {damaged} damaged, {} poisoned", report.poisoned))?;
        for (sequence, why) in &report.damaged {
            output::line(format!("record {sequence}: {why}"))?;
        }
        if let Some(loss) = &report.data_loss_possible {
            output::line(format!("data_loss_possible: {loss}"))?;
            output::line("when you have looked into it: `dealscale outbox repair --acknowledge-loss`")?;
        }
    }
    if report.is_sound() { Ok(()) } else { Err(Failure::Attention) }
}

fn status(global: &Global, status: &Value) -> Outcome {
    if global.json {
        return output::json(status);
    }
    let rows = status.as_object().into_iter().flatten().filter(|(_, v)| !v.is_null());
    output::table(&["figure", "value"], rows.map(|(k, v)| vec![k.clone(), cell(v)]))
}

fn list(global: &Global, records: &[Value]) -> Outcome {
    if global.json {
        return output::json(&records);
    }
    output::table(
        &["sequence", "execution", "tenant", "topic", "bytes", "accepted", "leased", "poisoned"],
        records.iter().map(|r| {
            let e = &r["envelope"];
            let (id, tenant, topic, at) = (&e["execution_id"], &e["tenant"], &e["topic"], &e["accepted_at"]);
            [&r["sequence"], id, tenant, topic, &r["bytes"], at, &r["leased"], &r["poisoned"]].map(cell).to_vec()
        }),
    )
}

fn show(global: &Global, record: &Value) -> Outcome {
    if global.json {
        return output::json(record);
    }
    let envelope = record["envelope"].as_object().into_iter().flatten();
    output::table(&["field", "value"], envelope.map(|(k, v)| vec![k.clone(), cell(v)]))?;
    use base64::Engine;
    let body = base64::engine::general_purpose::STANDARD.decode(cell(&record["body"])).unwrap_or_default();
    output::line("")?;
    output::raw(&body)?;
    output::line("")
}

fn done(global: &Global, value: Value, text: String) -> Outcome {
    if global.json { output::json(&value) } else { output::line(text) }
}

fn imported_report(global: &Global, imported: u64, duplicates: u64, refused: &[String]) -> Outcome {
    let value = json!({ "imported": imported, "duplicates": duplicates, "refused": refused });
    done(global, value, format!("{imported} imported, {duplicates} duplicates, {} refused", refused.len()))?;
    for reason in refused {
        output::error(reason);
    }
    if refused.is_empty() { Ok(()) } else { Err(Failure::Attention) }
}

async fn drain(global: &Global, client: &Client, timeout: Duration) -> Outcome {
    let begin = client.get("/admin/outbox/status").await?["records"].as_u64().unwrap_or(0);
    let bar = if global.json { indicatif::ProgressBar::hidden() } else { indicatif::ProgressBar::new(begin) };
    let end = tokio::time::Instant::now() + timeout;
    loop {
        let left = client.get("/admin/outbox/status").await?["records"].as_u64().unwrap_or(0);
        bar.set_position(begin.saturating_sub(left));
        if left == 0 {
            bar.finish_and_clear();
            return done(global, json!({ "records": 0 }), "the outbox is empty".into());
        }
        if tokio::time::Instant::now() >= end {
            return Err(Failure::Message(format!("{left} records still wait; `dealscale status` says what for")));
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
