//! n8n's executions in PostgreSQL, by id and by the traceparent of the attempt that started them.

use std::time::Duration;

use dealscale::clock::Timestamp;
use dealscale::n8n::{Error, N8n, Run};

use super::cluster::Cluster;

const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

fn n8n(url: &str) -> N8n {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let text = format!("state_dir = \"/nowhere\"\n[environments.test.n8n]\ndatabase_url = {url:?}\n");
    let config = dealscale::config::parse(&text).unwrap().environments.into_values().next().unwrap();
    N8n::new(&config.n8n).unwrap()
}

#[tokio::test]
async fn postgres_executions_are_found_by_id_and_by_traceparent() {
    let cluster = Cluster::shared();
    let url = cluster.url();
    let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
    #[allow(clippy::disallowed_methods)]
    tokio::spawn(connection);
    // The columns as n8n 2.41 makes them on PostgreSQL, in a schema of this test.
    client
        .batch_execute(
            r#"DROP SCHEMA IF EXISTS executions_test CASCADE; CREATE SCHEMA executions_test; SET search_path = executions_test;
            CREATE TABLE execution_entity (id SERIAL PRIMARY KEY, status VARCHAR NOT NULL,
            "createdAt" TIMESTAMPTZ(3) NOT NULL, "startedAt" TIMESTAMPTZ(3), "tracingContext" JSON);
            INSERT INTO execution_entity (status, "createdAt") VALUES ('crashed', '2026-11-24 02:59:00Z');"#,
        )
        .await
        .unwrap();
    let context = format!(r#"{{"traceparent":"{TRACE}"}}"#);
    client
        .batch_execute(&format!(
            r#"INSERT INTO execution_entity (status, "createdAt", "startedAt", "tracingContext")
            VALUES ('success', '2026-11-24 03:00:00Z', '2026-11-24 03:00:00.123Z', '{context}');
            INSERT INTO execution_entity (status, "createdAt") SELECT 'running', '2026-11-24 03:00:01Z' FROM generate_series(1, 1200);"#
        ))
        .await
        .unwrap();
    let separator = if url.contains('?') { '&' } else { '?' };
    let n8n = n8n(&format!("{url}{separator}options=-csearch_path%3Dexecutions_test"));
    let since: Timestamp = "2026-11-24T03:00:00Z".parse().unwrap();
    let found = n8n.execution_by_traceparent(TRACE, since).await.unwrap().unwrap();
    assert_eq!((found.id.as_str(), found.run), ("2", Run::Succeeded));
    assert_eq!(found.started_at.unwrap().to_string(), "2026-11-24T03:00:00.123Z");
    assert_eq!(n8n.execution("1").await.unwrap().unwrap().run, Run::Crashed);
    assert_eq!(n8n.execution("9").await.unwrap().unwrap().run, Run::Open);
    assert_eq!(n8n.execution("99999").await.unwrap(), None);
    let later = since.plus(Duration::from_secs(3600));
    assert_eq!(n8n.execution_by_traceparent(TRACE, later).await.unwrap(), None);
    client.batch_execute("DROP SCHEMA executions_test CASCADE").await.unwrap();
    assert!(matches!(n8n.execution("1").await, Err(Error::Unreachable(_))));
}
