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
    assert_eq!(problems, ["environments.production.n8n.api_key: set either api_key or api_key_file, not both"]);
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
    assert!(
        texts(bare(&[("DEALSCALE_PULSAR_QUEUE_ENABLED", "hunter2")]))[0]
            .starts_with("environments.production.broker.kind")
    );
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
    assert_eq!(find("bridge.body_bytes_max").source, Source::File(file));
    assert_eq!(find("bridge.wait_max").shown, "7s");
    assert_eq!(find("bridge.listen").source, Source::Variable("FASTAPI_BRIDGE_PORT"));
    assert_eq!(find("state_dir").source, Source::Flag("--state-dir"));
    assert_eq!(find("bridge.delay_max").source, Source::Default);
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
