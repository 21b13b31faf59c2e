//! `dealscale token`: a new token, shown once, and the configuration for its hash.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::{Failure, Global, Outcome, output};
use crate::ids::BodyHash;

#[derive(clap::Args, Debug)]
pub struct Command {
    /// Name of the service account, `[accounts.NAME]`
    name: String,
}

pub fn run(global: &Global, command: Command) -> Outcome {
    let valid = command.name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if command.name.is_empty() || !valid {
        return Err("a service account's name has letters, digits, '-' and '_'".into());
    }
    let mut bytes = [0; 32];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Failure::from("the system's random numbers cannot be read"))?;
    let token = format!("ds_{}", URL_SAFE_NO_PAD.encode(bytes));
    let hash = BodyHash::of(token.as_bytes());
    if global.json {
        return output::json(&serde_json::json!({ "account": command.name, "token": token, "token_sha256": hash }));
    }
    output::line(format!(
        "token (shown only now):\n  {token}\n\nfor the configuration:\n  [accounts.{}]\n  token_sha256 = [\"{hash}\"]\n  \
         tenants = [\"default\"]\n  rights = [\"publish\", \"read\"]\n\nthen: dealscale check && dealscale reload",
        command.name
    ))
}
