//! A [`Filter`] as SQL, for both databases. Values travel as parameters; only numbers of our own stand in the text.

use super::codec::{self, COLUMNS};
use super::{Error, Filter, rows};
use crate::config::routes::Pattern;
use crate::event::State;

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Dialect {
    Sqlite,
    Postgres,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Int(i64),
    Text(String),
}

pub(super) struct Query {
    pub sql: String,
    pub values: Vec<Value>,
}

/// Pages are for people and for loops over pages: more at once only costs memory.
pub(super) const PAGE_MAX: usize = 1000;

struct Where {
    dialect: Dialect,
    tenant: &'static str,
    parts: Vec<String>,
    values: Vec<Value>,
}

impl Where {
    fn value(&mut self, value: Value) -> String {
        self.values.push(value);
        match self.dialect {
            Dialect::Sqlite => format!("?{}", self.values.len()),
            Dialect::Postgres => format!("${}", self.values.len()),
        }
    }

    fn text(&mut self, column: &str, operator: &str, text: &str) {
        let value = self.value(Value::Text(rows::clean(text.to_owned())));
        self.parts.push(format!("{column} {operator} {value}"));
    }

    fn int(&mut self, column: &str, operator: &str, int: i64) {
        let value = self.value(Value::Int(int));
        self.parts.push(format!("{column} {operator} {value}"));
    }

    fn tenants(&mut self, patterns: &[Pattern]) {
        let mut any = Vec::new();
        for pattern in patterns {
            let (operator, text) = match self.dialect {
                _ if !pattern.as_str().contains('*') => ("=", pattern.as_str().to_owned()),
                Dialect::Sqlite => ("GLOB", glob(pattern.as_str())),
                Dialect::Postgres => ("LIKE", like(pattern.as_str())),
            };
            let value = self.value(Value::Text(text));
            any.push(format!("{} {operator} {value}", self.tenant));
        }
        // Nobody's tenants: nothing, not everything.
        self.parts.push(if any.is_empty() { "1 = 0".to_owned() } else { format!("({})", any.join(" OR ")) });
    }

    fn states(&mut self, states: &[State]) {
        if states.is_empty() {
            return;
        }
        let codes: Vec<_> = states.iter().map(|s| codec::state_code(*s).to_string()).collect();
        self.parts.push(format!("e.state IN ({})", codes.join(", ")));
        // Open and dead rows are few among many: the phase leads to them.
        if states.iter().all(|s| !s.is_final()) {
            self.parts.push(format!("e.phase = {}", codec::OPEN));
        } else if states.iter().all(|s| *s == State::Dead) {
            self.parts.push(format!("e.phase = {}", codec::DEAD));
        }
    }

    fn new(dialect: Dialect, filter: &Filter) -> Self {
        // SQLite keeps no statistics: it would walk all events of a tenant for its few dead letters. The plus takes that way
        // from it, and leaves the phase.
        let dead_only = !filter.states.is_empty() && filter.states.iter().all(|s| *s == State::Dead);
        let tenant = if dialect == Dialect::Sqlite && dead_only { "+e.tenant" } else { "e.tenant" };
        let mut w = Self { dialect, tenant, parts: Vec::new(), values: Vec::new() };
        if let Some(tenant) = &filter.tenant {
            w.text(w.tenant, "=", tenant.as_str());
        }
        if let Some(patterns) = &filter.tenants {
            w.tenants(patterns);
        }
        w.states(&filter.states);
        if let Some(workflow) = &filter.workflow {
            w.text("e.workflow", "=", workflow.as_str());
        }
        if let Some(class) = &filter.error_class {
            w.text("e.error_class", "=", class);
        }
        if let Some(since) = filter.since {
            w.int("e.accepted_at", ">=", since.0);
        }
        if let Some(until) = filter.until {
            w.int("e.accepted_at", "<", until.0);
        }
        w
    }

    fn sql(&self) -> String {
        if self.parts.is_empty() { String::new() } else { format!(" WHERE {}", self.parts.join(" AND ")) }
    }
}

/// One row more than the page, which tells whether there is a next one.
pub(super) fn list(dialect: Dialect, filter: &Filter) -> Result<(Query, usize), Error> {
    let limit = filter.limit.clamp(1, PAGE_MAX);
    let mut w = Where::new(dialect, filter);
    if let Some(cursor) = &filter.cursor {
        let (at, seq) = codec::cursor_out(cursor)?;
        let (at, seq) = (w.value(Value::Int(at)), w.value(Value::Int(seq)));
        w.parts.push(format!("(e.accepted_at, e.seq) < ({at}, {seq})"));
    }
    let sql = format!(
        "SELECT {COLUMNS} FROM events e JOIN contents c ON c.seq = e.seq{} ORDER BY e.accepted_at DESC, e.seq DESC LIMIT {}",
        w.sql(),
        limit + 1
    );
    Ok((Query { sql, values: w.values }, limit))
}

pub(super) fn count(dialect: Dialect, filter: &Filter) -> Query {
    let w = Where::new(dialect, filter);
    Query { sql: format!("SELECT count(*) FROM events e{}", w.sql()), values: w.values }
}

/// SQLite's GLOB knows `*` as we do, and `?`, `[` besides. (Its LIKE ignores case: another tenant's rows would match.)
fn glob(pattern: &str) -> String {
    let mut text = String::with_capacity(pattern.len());
    for c in pattern.chars() {
        match c {
            '?' => text.push_str("[?]"),
            '[' => text.push_str("[[]"),
            c => text.push(c),
        }
    }
    text
}

fn like(pattern: &str) -> String {
    let mut text = String::with_capacity(pattern.len());
    for c in pattern.chars() {
        match c {
            '*' => text.push('%'),
            '%' | '_' | '\\' => text.extend(['\\', c]),
            c => text.push(c),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Tenant;

    #[test]
    fn no_tenants_is_nothing() {
        let filter = Filter { tenants: Some(vec![]), ..Filter::default() };
        assert!(count(Dialect::Sqlite, &filter).sql.contains("1 = 0"));
    }

    #[test]
    fn values_never_stand_in_the_text() {
        let filter = Filter {
            tenant: Some(Tenant::try_new("acme").unwrap()),
            tenants: Some(vec![Pattern::new("a'; DROP TABLE events; --*")]),
            error_class: Some("x' OR 1=1".into()),
            cursor: Some("1-2".into()),
            ..Filter::default()
        };
        for dialect in [Dialect::Sqlite, Dialect::Postgres] {
            let (query, _) = list(dialect, &filter).unwrap();
            assert!(!query.sql.contains('\'') && query.values.len() == 5, "{}", query.sql);
        }
    }

    #[test]
    fn dead_letters_are_found_without_walking_their_tenants_events() {
        let db = rusqlite::Connection::open_in_memory().unwrap();
        db.execute_batch(include_str!("../../appliance/migrations/sqlite/V1__ledger.sql")).unwrap();
        let tenant = Some(Tenant::try_new("acme").unwrap());
        let patterns = Some(vec![Pattern::new("acme"), Pattern::new("beta-*")]);
        for (tenant, tenants) in [(None, None), (tenant.clone(), None), (None, patterns.clone()), (tenant, patterns)] {
            let filter = Filter { tenant, tenants, states: vec![State::Dead], limit: 10, ..Filter::default() };
            for query in [list(Dialect::Sqlite, &filter).unwrap().0, count(Dialect::Sqlite, &filter)] {
                let mut plan = db.prepare(&format!("EXPLAIN QUERY PLAN {}", query.sql)).unwrap();
                let values = query.values.iter().map(|value| match value {
                    Value::Int(int) => int as &dyn rusqlite::ToSql,
                    Value::Text(text) => text as &dyn rusqlite::ToSql,
                });
                let values: Vec<_> = values.collect();
                let steps = plan.query_map(&values[..], |row| row.get::<_, String>(3)).unwrap();
                let steps = steps.map(Result::unwrap).collect::<Vec<_>>().join("; ");
                assert!(steps.contains("SEARCH e USING INDEX events_phase (phase=?)"), "{}: {steps}", query.sql);
            }
        }
    }

    #[test]
    fn a_glob_matches_what_the_pattern_matches() {
        let db = rusqlite::Connection::open_in_memory().unwrap();
        let patterns = ["*", "acme", "acme*", "*-eu", "a*e", "a?me", "[a]cme", "ACME*", "", "a**e", "a_m%*", "a\\*"];
        let tenants = ["acme", "acme-eu", "a", "ae", "a-b-e", "0", "acm3"];
        for pattern in patterns {
            for tenant in tenants {
                let (text, pattern) = (glob(pattern), Pattern::new(pattern));
                let found: bool = db.query_row("SELECT ?1 GLOB ?2", [tenant, &text], |r| r.get(0)).unwrap();
                assert_eq!(found, pattern.matches(tenant), "{pattern:?} {tenant}");
            }
        }
    }
}
