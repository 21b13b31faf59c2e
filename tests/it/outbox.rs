//! `dealscale outbox` by hand: beside the appliance, on its folder when it is stopped, and on folders that are wrong or damaged.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::appliance::Appliance;

/// Exit code of a command that did its work and found something to look at.
const ATTENTION: i32 = 3;

/// A broker that nobody has: everything that is accepted waits.
fn waiting(store: &str) -> String {
    format!(
        "[environments.production]\nwebhook = \"http://127.0.0.1:9/x\"\n[environments.production.outbox]\nstore = {store:?}\n\
         [environments.production.broker]\nkind = \"pulsar\"\nservice_url = \"pulsar://127.0.0.1:9\"\nhttp_url = \"http://127.0.0.1:9\"\n"
    )
}

fn json_of(appliance: &Appliance, arguments: &[&str]) -> (i32, Value) {
    let (code, text) = appliance.cli(&[&["--json"], arguments].concat());
    (code, serde_json::from_str(&text).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {text}")))
}

fn count(folder: &Path) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

async fn commands(store: &str) {
    let dir = tempfile::tempdir().unwrap();
    let mut appliance = Appliance::start(dir.path(), &waiting(store)).await;
    let mut ids = Vec::new();
    for n in 0..5 {
        ids.push(appliance.publish("w", json!({ "n": n })).await);
    }
    // Larger than what a request usually may be, all of them together.
    for n in 0..3 {
        ids.push(appliance.publish("w", json!({ "n": n, "large": "x".repeat(4 << 20) })).await);
    }
    let (there, elsewhere) = (dir.path().join("live"), dir.path().join("stopped"));
    let (live, stopped) = (there.display().to_string(), elsewhere.display().to_string());

    // Running, then stopped: the same answers.
    for (up, target) in [(true, &live), (false, &stopped)] {
        if !up {
            assert!(appliance.stop().await, "{}", appliance.log());
        }
        let (code, status) = json_of(&appliance, &["outbox", "status"]);
        assert_eq!((code, &status["records"]), (0, &json!(8)), "{status}");
        let (code, records) = json_of(&appliance, &["outbox", "ls", "--limit", "3"]);
        assert_eq!((code, records.as_array().unwrap().len()), (0, 3), "{records}");
        assert_eq!(records[0]["envelope"]["execution_id"], ids[0].as_str());
        let after = records[2]["sequence"].to_string();
        let (_, rest) = json_of(&appliance, &["outbox", "ls", "--after", &after]);
        assert_eq!(rest.as_array().unwrap().len(), 5, "{rest}");
        assert!(rest[4]["bytes"].as_u64().unwrap() > 4 << 20, "its size, without its body");
        assert_eq!(json_of(&appliance, &["outbox", "ls", "--tenant", "nobody"]).1, json!([]));
        let sequence = records[1]["sequence"].to_string();
        let (code, text) = appliance.cli(&["outbox", "show", &sequence]);
        assert!(code == 0 && text.contains(&ids[1]) && text.contains(r#"{"n":1}"#), "{text}");
        let (code, text) = appliance.cli(&["outbox", "show", "4711"]);
        assert!(code == 1 && text.contains("record 4711"), "{text}");
        let (code, text) = appliance.cli(&["outbox", "repair", "--requeue", "1"]);
        assert!(code == 1 && text.contains("ls --poisoned"), "{text}");
        let (code, exported) = json_of(&appliance, &["outbox", "export", target]);
        assert_eq!((code, &exported["exported"], &exported["unreadable"]), (0, &json!(8), &json!([])), "{exported}");
        let (code, text) = appliance.cli(&["outbox", "export", target]);
        assert!(code == 1 && text.contains("not empty"), "{text}");
        // What is there already is no second event.
        let (code, imported) = json_of(&appliance, &["outbox", "import", target]);
        assert_eq!((code, imported), (0, json!({ "imported": 0, "duplicates": 8, "refused": [] })));
        let (code, text) = appliance.cli(&["outbox", "verify"]);
        match up {
            true => assert!(code != 0 && text.contains("stop it"), "{text}"),
            false => assert!(code == 0 && text.contains("8 records read, 0 damaged"), "{text}"),
        }
    }
    assert_eq!(count(&there), count(&elsewhere));
    let (code, text) = appliance.cli(&["outbox", "drain"]);
    assert!(code != 0 && text.contains("start it"), "{text}");

    // Elsewhere, with one file damaged and one that is no record: everything else arrives.
    let other = tempfile::tempdir().unwrap();
    let mut second = Appliance::start(other.path(), &waiting(store)).await;
    let mut files: Vec<_> = std::fs::read_dir(&there).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let record = files.iter().find(|f| f.to_str().unwrap().contains(&ids[4])).unwrap();
    let mut raw = std::fs::read(record).unwrap();
    *raw.last_mut().unwrap() ^= 1;
    std::fs::write(record, raw).unwrap();
    std::fs::write(there.join("zzz.record"), "no record\n").unwrap();
    for up in [true, false] {
        if !up {
            assert!(second.stop().await, "{}", second.log());
        }
        let (code, text) = second.cli(&["outbox", "import", &live]);
        let (new, known) = if up { (7, 0) } else { (0, 7) };
        assert_eq!(code, ATTENTION, "{text}");
        assert!(text.contains(&format!("{new} imported, {known} duplicates, 2 refused")), "{text}");
        assert!(text.contains(&ids[4]) && text.contains("zzz.record"), "it says which: {text}");
    }
    let (code, text) = second.cli(&["outbox", "import", &other.path().display().to_string()]);
    assert!(code == 1 && text.contains("not an export"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_outbox_is_operated_running_and_stopped_with_sled() {
    commands("sled").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_outbox_is_operated_running_and_stopped_with_sqlite() {
    commands("sqlite").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_is_not_there_is_not_made_by_looking_at_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut appliance = Appliance::start(dir.path(), &waiting("sled")).await;
    assert!(appliance.stop().await, "{}", appliance.log());
    let nowhere = dir.path().join("nowhere");
    let config = std::fs::read_to_string(&appliance.config).unwrap();
    let moved =
        config.replace("store = \"sled\"", &format!("store = \"sled\"\ndir = {:?}", nowhere.display().to_string()));
    assert_ne!(config, moved);
    std::fs::write(&appliance.config, moved).unwrap();
    let export = dir.path().join("export").display().to_string();
    for command in
        [&["status"][..], &["ls"], &["show", "1"], &["verify"], &["repair", "--acknowledge-loss"], &["export", &export]]
    {
        let (code, text) = appliance.cli(&[&["outbox"], command].concat());
        assert!(code == 1 && text.contains("no outbox at") && text.contains("nowhere"), "{command:?}: {text}");
    }
    assert!(!nowhere.exists());
}

/// What a damaged folder says, what it looks like afterwards, and the way out.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_folder_is_told_of_salvaged_and_acknowledged() {
    for store in ["sled", "sqlite"] {
        let dir = tempfile::tempdir().unwrap();
        let mut appliance = Appliance::start(dir.path(), &waiting(store)).await;
        for n in 0..5 {
            appliance.publish("w", json!({ "n": n })).await;
        }
        // In order, so that SQLite's log is in its file.
        assert!(appliance.stop().await, "{}", appliance.log());
        let (_, shown) = json_of(&appliance, &["config", "show"]);
        let folder = shown.to_string();
        let at = folder.find("/outbox\"").expect("the folder of the outbox") + "/outbox".len();
        let folder = std::path::PathBuf::from(&folder[folder[..at].rfind('"').unwrap() + 1..at]);
        let file = folder.join(if store == "sled" { "db" } else { "outbox.sqlite" });
        let mut raw = std::fs::read(&file).unwrap();
        raw[..64].fill(0xa5);
        std::fs::write(&file, raw).unwrap();
        for command in ["verify", "ls", "status"] {
            let (code, text) = appliance.cli(&["outbox", command]);
            assert!(
                code == 1 && text.contains("damaged") && text.contains("starting the appliance"),
                "{store}: {text}"
            );
        }
        appliance.launch().await;
        let aside = std::fs::read_dir(folder.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name());
        assert_eq!(
            aside.filter(|name| name.to_string_lossy().contains("corrupt")).count(),
            1,
            "the old one is beside it"
        );
        let (_, status) = json_of(&appliance, &["outbox", "status"]);
        assert!(status["data_loss_possible"].as_str().unwrap().contains(" records were salvaged"), "{store}: {status}");
        assert_eq!(status["records"], 5, "{store}: {status}");
        let (code, text) = appliance.cli(&["status"]);
        assert!(text.contains("data_loss_possible"), "{store}: {code} {text}");
        assert!(appliance.stop().await, "{}", appliance.log());
        let (code, text) = appliance.cli(&["outbox", "verify"]);
        assert!(code == ATTENTION && text.contains("repair --acknowledge-loss"), "{store}: {text}");
        let (code, text) = appliance.cli(&["outbox", "repair", "--acknowledge-loss"]);
        assert_eq!(code, 0, "{store}: {text}");
        let (code, report) = json_of(&appliance, &["outbox", "verify"]);
        assert_eq!((code, &report["records"], &report["data_loss_possible"]), (0, &json!(5), &Value::Null), "{report}");
    }
}

/// Cancelled while the broker is down: an end that can be asked for, before and after a crash.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_cancelled_in_the_outbox_stays_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let mut appliance = Appliance::start(dir.path(), &waiting("sled")).await;
    let id = appliance.publish("w", json!(1)).await;
    let path = format!("/executions/{id}?tenant=t1");
    let (status, body) = appliance.delete(&path).await;
    assert_eq!((status, &body["state"]), (200, &json!("cancelled")), "{body}");
    for _ in 0..2 {
        appliance.wait_state(&id, &["cancelled"], Duration::from_secs(20)).await;
        let again = json!({ "workflow": "w", "tenant_id": "t1", "payload": 1, "execution_id": id });
        let (status, body) = appliance.post("/pulsar/publish", again).await;
        assert!(status == 202, "{body}");
        appliance.kill();
        appliance.launch().await;
    }
}
