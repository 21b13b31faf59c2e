use super::*;

const SHIPPED: &str = include_str!("../../config/dealscale.toml");

fn texts(problems: Result<Config, Vec<Problem>>) -> Vec<String> {
    problems.err().unwrap_or_default().iter().map(ToString::to_string).collect()
}

fn shown(config: &Config) -> BTreeMap<String, String> {
    config.effective.iter().map(|e| (e.key.clone(), e.shown.clone())).collect()
}

fn bare(variables: &[(&str, &str)]) -> Result<Config, Vec<Problem>> {
    let dir = tempfile::tempdir().unwrap();
    // A file that does not exist would be an error; no file at all is the bare start.
    let overrides = Overrides { file: None, state_dir: Some(dir.path().to_owned()) };
    load(&overrides, &|name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
}

#[test]
fn the_shipped_file_is_right_and_shows_every_default() {
    let as_shipped = parse(SHIPPED).expect("the shipped file passes the check");
    let defaults = shown(&as_shipped);
    for (key, value) in shown(&parse("").unwrap()) {
        assert_eq!(defaults.get(&key), Some(&value), "{key}: the shipped file changes a default");
    }
    // Uncommented, each line still reads, and says what the default is.
    let dir = tempfile::tempdir().unwrap();
    let secret = dir.path().join("secret");
    std::fs::write(&secret, "0".repeat(64)).unwrap();
    let mut text = String::new();
    for line in SHIPPED.lines() {
        let line = line
            .strip_prefix('#')
            .filter(|l| l.starts_with(|c: char| c == '[' || c.is_ascii_lowercase()))
            .unwrap_or(line);
        let file =
            line.split_once("_file = ").map(|(key, _)| format!("{key}_file = {:?}", secret.display().to_string()));
        text.push_str(
            &file
                .filter(|_| !line.starts_with("topics") && !line.starts_with("ca") && !line.starts_with("database_f"))
                .unwrap_or(line.into()),
        );
        text.push('\n');
    }
    // These are read by the check.
    let topics = concat!(env!("CARGO_MANIFEST_DIR"), "/config/topics.toml");
    let text = text.replace("/etc/dealscale/topics.toml", topics);
    let text = ["/etc/dealscale/ca.pem", "/etc/dealscale/pulsar-ca.pem"]
        .iter()
        .fold(text, |text, ca| text.replace(ca, "/etc/ssl/certs/ca-certificates.crt"));
    // Not a URL: it is the stand-in secret.
    let text = text
        .replace(&format!("url_file = {:?}", secret.display().to_string()), "url = \"postgresql://u:p@127.0.0.1/d\"");
    let text = text.replace("database_url = ", "#database_url = ");
    let uncommented = parse(&text).unwrap_or_else(|p| panic!("{p:#?}"));
    let uncommented = shown(&uncommented);
    for (key, value) in &defaults {
        if value != "(not set)" && !value.starts_with('{') {
            assert_eq!(uncommented.get(key), Some(value), "{key}: the shipped file does not show the default");
        }
    }
    // Every key that the code asks for stands in the file.
    for key in defaults.keys() {
        let name = key.rsplit('.').next().unwrap();
        let there = SHIPPED.lines().any(|l| {
            let l = l.trim_start_matches('#');
            l.strip_prefix(name).is_some_and(|rest| rest.starts_with(" = ") || rest.starts_with("_file = "))
        });
        assert!(there, "{key} is missing in config/dealscale.toml");
    }
}

#[test]
fn all_problems_are_reported_at_once_and_no_value_is_printed() {
    let problems = texts(parse(
        r#"
        [bridge]
        listen = "hunter2:x"
        body_bytes_mx = "16MiB"
        [environments.production.outbox]
        bytes_max = "hunter2"
        store = "hunter2"
        encryption_key = "hunter2"
        [environments.production.n8n]
        url = "hunter2"
        [environments.Nope]
        "#,
    ));
    let has = |text: &str| assert!(problems.iter().any(|p| p.starts_with(text)), "{text} is missing in {problems:#?}");
    has("bridge.listen: ");
    has("bridge.body_bytes_mx: unknown key; did you mean \"body_bytes_max\"?");
    has("environments.production.outbox.bytes_max: expected a size");
    has("environments.production.outbox.store: expected one of \"sled\", \"sqlite\"");
    has("environments.production.outbox.encryption_key: expected 64 hexadecimal digits");
    has("environments.production.n8n.url: expected a URL");
    has("environments.Nope: ");
    assert!(!problems.iter().any(|p| p.contains("hunter2")), "{problems:#?}");
}

#[test]
fn a_syntax_error_names_the_line_and_not_its_text() {
    let problems = texts(parse("[bridge]\nlisten = \"hunter2\" oops"));
    assert!(problems[0].starts_with("text:2: not valid TOML"), "{problems:?}");
    assert!(!problems[0].contains("hunter2"));
}

#[test]
fn secrets_are_never_shown() {
    let config = parse("[environments.production.n8n]\napi_key = \"hunter2\"").unwrap();
    assert!(!format!("{config:?}").contains("hunter2"));
    assert_eq!(shown(&config)["environments.production.n8n.api_key"], "••••");
}

#[test]
fn a_secret_comes_from_the_value_or_the_file_never_both() {
    let problems = texts(parse("[environments.production.n8n]\napi_key = \"a\"\napi_key_file = \"/b\""));
    assert_eq!(
        problems,
        ["environments.production.n8n.api_key: set either api_key or api_key_file, not both (text:2)"]
    );
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("secret");
    let with = |content: &str| {
        std::fs::write(&file, content).unwrap();
        parse(&format!("[environments.production.n8n]\napi_key_file = {:?}", file.display().to_string()))
    };
    for (content, expected) in [("hunter2\n", "hunter2"), ("hunter2\r\n", "hunter2"), (" hunter2", " hunter2")] {
        let config = with(content).unwrap();
        assert_eq!(config.environments.values().next().unwrap().n8n.api_key.as_ref().unwrap().expose(), expected);
        let shown = config.effective.iter().find(|e| e.key == "environments.production.n8n.api_key").unwrap();
        assert_eq!((&*shown.shown, shown.source.to_string()), ("••••", "text:2".to_owned()));
    }
    for (content, expected) in [("", "is empty"), ("\n", "is empty"), ("hunter2\nhunter3\n", "must be one line")] {
        let problems = texts(with(content));
        let wanted = format!("environments.production.n8n.api_key_file: {expected}");
        assert!(
            problems.len() == 1 && problems[0].starts_with(&wanted) && !problems[0].contains("hunter"),
            "{problems:?}"
        );
    }
    let unreadable = parse("[environments.production.n8n]\napi_key_file = \"/nonexistent/hunter2\"");
    let problems = texts(unreadable);
    assert!(
        problems[0].contains("api_key_file: cannot read the file") && !problems[0].contains("hunter2"),
        "{problems:?}"
    );
}

#[test]
fn a_token_and_an_issuer_have_one_owner() {
    let hash = "0".repeat(64);
    let account = |name: &str| format!("[accounts.{name}]\ntoken_sha256 = [\"{hash}\"]\n");
    let issuer = |name: &str, url: &str| format!("[oauth2.{name}]\nissuer = \"{url}\"\naudience = \"d\"\n");
    let problems =
        texts(parse(&(account("one") + &account("two") + &issuer("x", "https://i") + &issuer("y", "https://i"))));
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[0].starts_with("accounts.two.token_sha256: has a token of account \"one\""), "{problems:?}");
    assert!(problems[1].starts_with("oauth2.y.issuer: is the issuer of [oauth2.x] already"), "{problems:?}");
    assert!(parse(&(account("one") + &issuer("x", "https://i") + &issuer("y", "https://j"))).is_ok());
}

#[test]
fn without_a_token_only_loopback() {
    let problems = texts(parse("[bridge]\nlisten = \"0.0.0.0:8000\"\ntoken_required = false"));
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].starts_with("bridge.token_required"));
    assert!(texts(parse("[admin]\nlisten = \"0.0.0.0:1\""))[0].starts_with("admin.listen"));
}

#[test]
fn without_a_file_any_tenant_may_publish_without_a_token() {
    let config = bare(&[]).unwrap();
    assert!(config.bare && !config.bridge.token_required && config.bridge.listen.ip().is_loopback());
    let production = config.environments.values().next().unwrap();
    assert!(production.tenant(&"anybody".parse().unwrap()).is_some());
    assert!(matches!(production.broker, Broker::Local { .. }));
    // With a file, only declared tenants.
    let config = parse("").unwrap();
    assert!(config.bridge.token_required);
    assert!(config.environments.values().next().unwrap().tenant(&"anybody".parse().unwrap()).is_none());
}

#[test]
fn the_plans_variables_steer_a_bare_start() {
    let config = bare(&[
        ("FASTAPI_BRIDGE_PORT", "9000"),
        ("FASTAPI_BRIDGE_WEBHOOK_URL", "http://n8n:5678/webhook/pulsar-trigger"),
        ("PULSAR_SERVICE_URL", "pulsar://pulsar:6650"),
        ("PULSAR_HTTP_URL", "http://pulsar:8080"),
        ("PULSAR_TENANT", "acme"),
        ("PULSAR_NAMESPACE", "workflows"),
        ("PULSAR_OAUTH2_ISSUER_URL", "http://issuer"),
        ("PULSAR_OAUTH2_AUDIENCE", "urn:pulsar"),
        ("PULSAR_OAUTH2_CLIENT_ID", "gw"),
        ("PULSAR_OAUTH2_CLIENT_SECRET", "hunter2"),
        ("PULSAR_OAUTH2_SCOPE", "publish"),
        ("DEALSCALE_PULSAR_QUEUE_ENABLED", "true"),
    ])
    .unwrap();
    assert_eq!(config.bridge.listen.port(), 9000);
    let production = config.environments.values().next().unwrap();
    assert_eq!(production.default_route.webhook, "http://n8n:5678/webhook/pulsar-trigger");
    assert_eq!(production.n8n.url, "http://n8n:5678");
    let Broker::Pulsar(pulsar) = &production.broker else { panic!("not pulsar") };
    assert_eq!(
        (&*pulsar.service_url, &*pulsar.http_url, &*pulsar.tenant, &*pulsar.namespace),
        ("pulsar://pulsar:6650", "http://pulsar:8080", "acme", "workflows")
    );
    let broker::PulsarAuth::OAuth2 { issuer_url, audience, client_id, scope, .. } = &pulsar.auth else {
        panic!("not OAuth2")
    };
    assert_eq!(
        (&**issuer_url, &**audience, &**client_id, scope.as_deref()),
        ("http://issuer", "urn:pulsar", "gw", Some("publish"))
    );
}

#[test]
fn the_queue_variable_decides_the_broker() {
    let kind = |variables: &[(&str, &str)]| {
        let config = bare(variables).unwrap();
        matches!(config.environments.values().next().unwrap().broker, Broker::Pulsar(_))
    };
    let url = ("PULSAR_SERVICE_URL", "pulsar://127.0.0.1:6650");
    assert!(kind(&[url]));
    assert!(!kind(&[url, ("DEALSCALE_PULSAR_QUEUE_ENABLED", "false")]));
    assert!(kind(&[("DEALSCALE_PULSAR_QUEUE_ENABLED", "true")]));
    assert!(!kind(&[url, ("DEALSCALE_PULSAR_QUEUE_ENABLED", "FALSE")]));
    assert!(!kind(&[("PULSAR_SERVICE_URL", "")]));
    for yes in ["true", "True", "1", "yes", "on", "ON", "y", "t", " true\n"] {
        assert!(kind(&[("DEALSCALE_PULSAR_QUEUE_ENABLED", yes)]), "{yes:?}");
    }
    for no in ["false", "0", "no", "off", "n", "F"] {
        assert!(!kind(&[url, ("DEALSCALE_PULSAR_QUEUE_ENABLED", no)]), "{no:?}");
    }
    assert_eq!(
        texts(bare(&[("DEALSCALE_PULSAR_QUEUE_ENABLED", "hunter2")])),
        ["DEALSCALE_PULSAR_QUEUE_ENABLED: must be true or false"]
    );
    for (name, value) in [
        ("FASTAPI_BRIDGE_PORT", "0"),
        ("FASTAPI_BRIDGE_PORT", "65536"),
        ("FASTAPI_BRIDGE_PORT", "-1"),
        ("FASTAPI_BRIDGE_PORT", "9000 # bridge"),
        ("FASTAPI_BRIDGE_WEBHOOK_URL", "n8n:5678/webhook/x"),
        ("PULSAR_SERVICE_URL", "localhost:6650"),
        ("PULSAR_NAMESPACE", "acme/production"),
    ] {
        let problems = texts(bare(&[url, (name, value)].into_iter().rev().collect::<Vec<_>>()));
        assert!(problems.len() == 1 && problems[0].contains(&format!("environment variable {name}")), "{problems:?}");
    }
    // A variable wins over the file's secret, wherever that stands.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dealscale.toml");
    std::fs::write(&file, "[environments.production.broker]\nkind = \"pulsar\"\ntoken_file = \"/nonexistent\"\n")
        .unwrap();
    let overrides = Overrides { file: Some(file), state_dir: None };
    load(&overrides, &|name| (name == "PULSAR_AUTH_TOKEN").then(|| "t".into())).unwrap();
    let config = bare(&[url, ("PULSAR_AUTH_TOKEN", "t")]).unwrap();
    let Broker::Pulsar(pulsar) = &config.environments.values().next().unwrap().broker else { panic!("not pulsar") };
    assert!(matches!(&pulsar.auth, broker::PulsarAuth::Token(t) if t.expose() == "t"));
}

#[test]
fn show_tells_where_a_value_came_from() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dealscale.toml");
    std::fs::write(&file, "[bridge]\nbody_bytes_max = \"1MiB\"\nwait_max = \"5s\"\n").unwrap();
    std::fs::create_dir(dir.path().join("conf.d")).unwrap();
    std::fs::write(dir.path().join("conf.d/10.toml"), "[bridge]\nwait_max = \"7s\"\n").unwrap();
    let overrides = Overrides { file: Some(file.clone()), state_dir: Some("/tmp/x".into()) };
    let config = load(&overrides, &|name| (name == "FASTAPI_BRIDGE_PORT").then(|| "9".into())).unwrap();
    let find = |key: &str| config.effective.iter().find(|e| e.key == key).unwrap().clone();
    assert_eq!(find("bridge.body_bytes_max").source, Source::File(file, 2));
    assert_eq!(find("bridge.wait_max").shown, "7s");
    assert_eq!(find("bridge.listen").source, Source::Variable("FASTAPI_BRIDGE_PORT"));
    assert_eq!(find("state_dir").source, Source::Flag("--state-dir"));
    assert_eq!(find("bridge.delay_max").source, Source::Default);
}

#[test]
fn a_problem_names_the_file_and_the_line_or_the_variable() {
    let dir = tempfile::tempdir().unwrap();
    let (file, more) = (dir.path().join("dealscale.toml"), dir.path().join("conf.d/10.toml"));
    std::fs::create_dir(dir.path().join("conf.d")).unwrap();
    std::fs::write(&file, "[bridge]\n# why\nwait_max = \"1s\"\n[[environments.production.routes]]\nname = \"a\"\n")
        .unwrap();
    std::fs::write(&more, "[bridge]\nwait_max = 0\n[environments.production]\nroutes = [{ name = \"a\", clas = 1 }]\n")
        .unwrap();
    std::fs::write(dir.path().join("conf.d/.10.toml"), "an editor's leavings").unwrap();
    let overrides = Overrides { file: Some(file.clone()), state_dir: None };
    let load = |variables: &[(&str, &str)]| {
        texts(load(&overrides, &|name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned())))
    };
    let problems = load(&[("FASTAPI_BRIDGE_PORT", "hunter2"), ("DEALSCALE_PULSAR_QUEUE_ENABLED", "hunter2")]);
    let more = more.display();
    let wanted = [
        "DEALSCALE_PULSAR_QUEUE_ENABLED: must be true or false".to_owned(),
        "bridge.listen: expected an IP address and a port from 1 to 65535, such as \"127.0.0.1:8000\" (environment variable FASTAPI_BRIDGE_PORT)".to_owned(),
        format!("bridge.wait_max: expected a time span such as \"250ms\", \"30s\", \"5m\", \"24h\" or \"7d\" ({more}:2)"),
        format!("environments.production.routes[0].clas: unknown key; did you mean \"class\"? ({more}:4)"),
    ];
    assert_eq!(problems, wanted);
    std::fs::write(&file, "a = [1\nb = 2\n[c\n").unwrap();
    let problems = load(&[]);
    assert!(problems.len() > 1 && problems.iter().all(|p| p.starts_with(&file.display().to_string())), "{problems:?}");
}

#[test]
fn a_file_that_is_there_and_cannot_be_read_is_no_start_without_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let usual = dir.path().join("dealscale.toml");
    let found = || {
        let mut sink = Sink::default();
        let files = files(None, &usual, &mut sink);
        (files, sink.problems.len())
    };
    assert_eq!(found(), (vec![], 0));
    // Only a piece beside it: that is a configuration.
    std::fs::create_dir(dir.path().join("conf.d")).unwrap();
    assert_eq!(found(), (vec![], 0));
    std::fs::write(dir.path().join("conf.d/1.toml"), "").unwrap();
    assert_eq!(found(), (vec![dir.path().join("conf.d/1.toml")], 0));
    std::fs::remove_dir_all(dir.path().join("conf.d")).unwrap();
    // A link to nowhere.
    std::os::unix::fs::symlink(dir.path().join("gone"), &usual).unwrap();
    assert_eq!(found(), (vec![usual.clone()], 0));
    // A folder that cannot be looked into.
    std::fs::write(dir.path().join("conf.d"), "").unwrap();
    assert_eq!(found(), (vec![usual.clone()], 1));
}

#[test]
fn listeners_and_environments_do_not_collide() {
    assert_eq!(bare(&[("FASTAPI_BRIDGE_PORT", "8081")]).unwrap().admin.listen.port(), 8082);
    let problems = texts(parse("[bridge]\nlisten = \"127.0.0.1:9\"\n[admin]\nlisten = \"127.0.0.1:9\""));
    assert!(problems[0].starts_with("admin.listen: is the address of bridge.listen"), "{problems:?}");
    let pulsar = "kind = \"pulsar\"\nnamespace = \"one\"\n";
    let problems = texts(parse(&format!(
        "[environments.a]\n[environments.a.outbox]\ndir = \"/x\"\n[environments.a.broker]\n{pulsar}\
         [environments.b]\n[environments.b.outbox]\ndir = \"/x\"\n[environments.b.broker]\n{pulsar}"
    )));
    assert!(problems[0].starts_with("environments.b.outbox.dir: is also that of environment a"), "{problems:?}");
    assert!(problems[1].starts_with("environments.b.broker.namespace: is also that"), "{problems:?}");
}

#[test]
fn passwords_in_urls_are_not_shown_and_files_must_be_there() {
    let config = parse("[environments.production]\nwebhook = \"http://me:hunter2@h/x?a=b@c\"").unwrap();
    assert_eq!(shown(&config)["environments.production.webhook"], "http://••••@h/x?a=b@c");
    assert!(!config.effective.iter().any(|e| e.shown.contains("hunter2")));
    let problems = texts(parse(
        "[environments.production.broker]\nca_file = \"/nonexistent\"\ntopics_file = \"/nonexistent\"\n\
         [environments.production.payloads]\nca_file = \"/\"",
    ));
    assert_eq!(problems.len(), 3, "{problems:?}");
}

#[test]
fn what_works_but_ought_to_be_looked_at_is_a_warning() {
    let warnings = |text: &str| parse(text).unwrap().warnings.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert!(warnings("")[0].starts_with("accounts: there is none"));
    assert!(warnings("[bridge]\ntoken_required = false").is_empty());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("key");
    std::fs::write(&file, "hunter2").unwrap();
    let text = format!(
        "[bridge]\ntoken_required = false\n[environments.production.n8n]\napi_key_file = {:?}",
        file.display().to_string()
    );
    for (mode, count) in [(0o640, 0), (0o644, 1)] {
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        assert_eq!(warnings(&text).len(), count, "{mode:o}");
    }
}

#[test]
fn a_print_tells_secrets_apart() {
    let print = |key: &str| {
        let config = parse(&format!("[environments.production.n8n]\napi_key = \"{key}\"")).unwrap();
        config.effective.iter().find(|e| e.key == "environments.production.n8n.api_key").unwrap().print
    };
    assert_eq!(print("hunter2"), print("hunter2"));
    assert_ne!(print("hunter2"), print("hunter3"));
}

#[test]
fn an_exact_tenant_wins_over_a_pattern() {
    let config = parse(
        "[environments.production.tenants.\"*\"]\nweight = 1\n[environments.production.tenants.\"acme-*\"]\nweight = 2\n[environments.production.tenants.acme-1]\nweight = 3\n",
    )
    .unwrap();
    let production = config.environments.values().next().unwrap();
    let weight = |t: &str| production.tenant(&t.parse().unwrap()).unwrap().weight;
    assert_eq!((weight("other"), weight("acme-2"), weight("acme-1")), (1, 2, 3));
}

#[test]
fn shared_secrets_cannot_be_an_issuers_algorithm() {
    let problems = texts(parse(
        "[oauth2.x]\nissuer = \"http://i\"\naudience = \"a\"\nalgorithms = [\"HS256\", \"none\"]\n[oauth2.x.clients.c]\n",
    ));
    assert!(problems.iter().any(|p| p.starts_with("oauth2.x.algorithms[0]")), "{problems:?}");
    assert!(problems.iter().any(|p| p.starts_with("oauth2.x.algorithms[1]")), "{problems:?}");
}

#[test]
fn a_foreign_worker_has_its_topics_to_itself() {
    let with = |routes: &str| {
        let text = format!("[environments.production.broker]\nkind = \"pulsar\"\n{routes}");
        parse(&text).map(|_| ()).map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    let route = |name: &str, more: &str| format!("[[environments.production.routes]]\nname = \"{name}\"\n{more}\n");
    let external = route("gpu", "class = \"ai\"\nconsumer = \"external\"");
    assert_eq!(with(&external), Ok(()));
    for other in ["class = \"ai\"", "topic = \"dealscale.ai.{tenant}\""] {
        let problems = with(&format!("{external}{}", route("n8n", other))).unwrap_err();
        assert!(problems[0].starts_with("environments.production.routes.gpu.topic: "), "{problems:?}");
        assert!(problems[0].contains("n8n"), "{problems:?}");
    }
    let apart = route("n8n", "class = \"ai\"\ntopic = \"dealscale.ai.n8n\"");
    assert_eq!(with(&format!("{external}{apart}")), Ok(()));
    // Without Pulsar there is nobody to take it, by any route.
    let all = "[environments.production.default_route]\nconsumer = \"external\"";
    assert!(texts(parse(all))[0].contains("an external consumer takes references from Pulsar"));
}

#[test]
fn pulsars_addresses_and_names_are_checked() {
    let with = |line: &str| texts(parse(&format!("[environments.production.broker]\nkind = \"pulsar\"\n{line}")));
    for good in ["pulsar://p", "pulsar://p:6650", "pulsar+ssl://a.b-c:6651/", "pulsar://[::1]:6650"] {
        assert!(
            parse(&format!("[environments.production.broker]\nkind = \"pulsar\"\nservice_url = \"{good}\"")).is_ok(),
            "{good}"
        );
    }
    for bad in [
        "http://p:6650",
        "pulsar://",
        "pulsar://:6650",
        "pulsar://p:0",
        "pulsar://p:x",
        "pulsar://a:1,b:2",
        "pulsar://p:1/x",
        "pulsar://u@p",
    ] {
        let problems = with(&format!("service_url = \"{bad}\""));
        assert!(problems[0].starts_with("environments.production.broker.service_url"), "{bad}: {problems:?}");
    }
    assert!(parse("[environments.production.broker]\nkind = \"pulsar\"\ntenant = \"my_company\"").is_ok());
    for bad in ["..", ".", "", "a/b", "a b"] {
        assert!(
            with(&format!("namespace = \"{bad}\""))[0].starts_with("environments.production.broker.namespace"),
            "{bad}"
        );
    }
    let problems = with("topics_file = \"/nonexistent/topics.toml\"");
    assert!(problems[0].starts_with("environments.production.broker.topics_file"), "{problems:?}");
}
