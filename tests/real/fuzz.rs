//! The running bridge against the OpenAPI document that it serves, by schemathesis (see `schemathesis.sh`).

use std::process::Command;

use crate::support::{Appliance, variable};

#[test]
fn schemathesis_finds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let port = variable("DEALSCALE_TEST_BRIDGE_PORT").parse().unwrap();
    // SHA-256 of "dst_fuzz". Nothing listens at n8n's address: the fuzzer's events wait, and nobody runs them.
    let config = "[accounts.fuzz]\ntoken_sha256 = [\"61ac6750df27570c30880cdbbdab47c7a7e3cca7295cc03c9adad6a8056081ab\"]\ntenants = [\"*\"]\nrights = [\"publish\", \"read\", \"operate\"]\n\
         [environments.production.tenants.default]\n[environments.production.tenants.acme]\n\
         [environments.production.n8n]\nurl = \"http://127.0.0.1:9\"\n";
    let appliance = Appliance::start_with(dir.path(), port, "wait_max = \"3s\"", config);
    let status = Command::new("tests/real/schemathesis.sh").args(["run", &appliance.url, "dst_fuzz"]).status().unwrap();
    assert!(status.success(), "schemathesis found something; its report is above");
}
