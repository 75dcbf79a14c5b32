//! Capabilities: which role may do what, what granting and revoking one changes, and what happens to it when roles
//! change and when the database is upgraded, dumped and restored.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::{self, Shared, World, error, refused, value};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tokio_postgres::error::{DbError, SqlState};
use tokio_postgres::{AsyncMessage, Client};
use tollgate_tests::{Cluster, DATABASE, Tollgated};

static SHARED: Shared = Shared::new(&[]);

const CAPABILITIES: [&str; 6] = ["verifier", "issuer", "admin", "operator", "key_fetcher", "gateway"];

/// What everyone may call: it discloses nothing but the caller's own context.
pub(crate) const PUBLIC: [&str; 14] = [
    "tollgate.client_ip_from(text,cidr[])",
    "tollgate.current_actor()",
    "tollgate.current_claims()",
    "tollgate.current_issuer()",
    "tollgate.current_scopes()",
    "tollgate.current_session_id()",
    "tollgate.current_token_id()",
    "tollgate.current_user_id()",
    "tollgate.list_own_capabilities()",
    "tollgate.require_scope(text)",
    "tollgate.scope_grants(text[],text)",
    "tollgate.token_has_all_scopes(text[])",
    "tollgate.token_has_any_scope(text[])",
    "tollgate.token_has_scope(text)",
];

/// Functions that the roles of applications may call, and so an attacker who breaks into one.
const VERIFIER: [&str; 14] = [
    "tollgate.authenticate(text,text[],inet)",
    "tollgate.introspect_token(text,text,inet)",
    "tollgate.jwks()",
    "tollgate.last_refusal()",
    "tollgate.revoke_access_token(text,text,inet)",
    "tollgate.revoke_own_api_token(uuid,text)",
    "tollgate.revoke_presented_token(text,text,inet)",
    "tollgate.revoke_token(text,text,text,inet)",
    "tollgate.token_has_scope(text,text,inet)",
    "tollgate.verify_access_token(text,text[],inet,text)",
    "tollgate.verify_api_token(text,text[],inet)",
    "tollgate.verify_api_token_hash(bytea,text[],inet)",
    "tollgate.verify_signed_url(text,text,inet)",
    "tollgate.verify_tokens(text[],text[],inet[],text[])",
];

async fn names(client: &Client, query: &str) -> Result<BTreeSet<String>> {
    let rows = client.query(query, &[]).await.with_context(|| format!("in: {query}"))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Roles that log in, each with its grants in this database.
async fn roles(owner: &Client, granted: &[(&str, &str)]) -> Result<()> {
    for (role, capability) in granted {
        owner.batch_execute(&format!("create role {role} login")).await?;
        grant(owner, role, capability).await?;
    }
    Ok(())
}

async fn grant(client: &Client, role: &str, capability: &str) -> Result<(), tokio_postgres::Error> {
    client
        .execute("select tollgate.grant_capability($1::text::regrole, $2)", &[&role, &capability])
        .await
        .map(drop)
}

async fn revoke(client: &Client, role: &str, capability: &str) -> Result<(), tokio_postgres::Error> {
    client
        .execute("select tollgate.revoke_capability($1::text::regrole, $2)", &[&role, &capability])
        .await
        .map(drop)
}

/// Each function, view or type that a role may use by its own privileges.
async fn own_privileges(owner: &Client, role: &str) -> Result<BTreeSet<String>> {
    names(
        owner,
        &format!("select distinct object from tollgate.object_privileges where grantee = '{role}'::regrole"),
    )
    .await
}

async fn given_by(owner: &Client, capability: &str) -> Result<BTreeSet<String>> {
    names(owner, &format!("select object from tollgate.capability_objects('{capability}')")).await
}

/// State and objects that the view shows for a role, by capability; "" for grants by hand.
async fn shown(client: &Client, role: &str) -> Result<BTreeMap<String, (String, Vec<String>)>> {
    let rows = client
        .query(
            "select coalesce(capability, ''), state, objects from tollgate.capability_grants where role = $1",
            &[&role],
        )
        .await?;
    Ok(rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect())
}

fn granted_alone(capability: &str) -> BTreeMap<String, (String, Vec<String>)> {
    BTreeMap::from([(capability.to_owned(), ("granted".to_owned(), Vec::new()))])
}

/// Event and detail of a role's capability events in the log, in order.
async fn events(owner: &Client, role: &str) -> Result<Vec<(String, String, Value)>> {
    let rows = owner
        .query(
            "select event, actor, detail from tollgate.audit_log
             where event like 'capability.%' and detail ->> 'role' = $1 order by id",
            &[&role],
        )
        .await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect())
}

fn denied(error: &DbError) -> bool {
    error.code() == &SqlState::INSUFFICIENT_PRIVILEGE && error.message().starts_with("permission denied for")
}

/// Whether a statement is refused for lack of a privilege; any other error means that it passed the check.
async fn is_denied(client: &Client, statement: &str) -> Result<bool> {
    let attempt = client.batch_execute(&format!("begin; {statement}")).await;
    client.batch_execute("rollback").await?;
    Ok(attempt.is_err_and(|error| error.as_db_error().is_some_and(denied)))
}

// ---- The decisions

#[tokio::test]
async fn every_function_view_and_type_has_a_privilege_decision() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    let there = names(
        &owner,
        "select 'function ' || p.oid::regprocedure from pg_proc p where p.pronamespace = 'tollgate'::regnamespace
         union all
         select 'view ' || c.oid::regclass from pg_class c where c.relnamespace = 'tollgate'::regnamespace and c.relkind in ('v', 'm')
         union all
         select 'type ' || t.oid::regtype from pg_type t left join pg_class c on c.oid = t.typrelid
         where t.typnamespace = 'tollgate'::regnamespace and t.typcategory <> 'A' and coalesce(c.relkind, 'c') = 'c'",
    )
    .await?;
    let decided = names(
        &owner,
        "select lower(d.object_type) || ' ' || case d.object_type when 'FUNCTION' then d.object::regprocedure::text
                    when 'TYPE' then d.object::regtype::text else d.object::regclass::text end
         from tollgate.privilege_decisions d",
    )
    .await?;
    let undecided: Vec<_> = there.difference(&decided).collect();
    assert!(undecided.is_empty(), "not in sql/schema/base/privilege_decisions.sql: {undecided:#?}");
    assert_eq!(decided, there, "a decision about a missing object");

    let unclear = "
        select d.object || ': ' || d.given_to from tollgate.privilege_decisions d
        where d.given_to not in ('public', 'verifier', 'issuer', 'admin', 'operator', 'key_fetcher', 'gateway', 'internal')
           or d.object_type not in ('FUNCTION', 'VIEW', 'TYPE')
           or d.given_to = 'internal' and exists (select from tollgate.privilege_decisions o where o.object = d.object and o.given_to <> 'internal')
           or d.object_type = 'FUNCTION'
              and (d.given_to = 'internal') <> (obj_description(d.object::regprocedure, 'pg_proc') like '%Internal%')";
    let unclear = names(&owner, unclear).await?;
    assert!(
        unclear.is_empty(),
        "exactly the comments of objects that are not granted say Internal: {unclear:#?}"
    );
    Ok(())
}

#[tokio::test]
async fn each_capability_grants_what_was_decided_and_nothing_else() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    owner.batch_execute("create role m_nothing login").await?;
    roles(&owner, &CAPABILITIES.map(|c| (["m_", c].concat(), c)).each_ref().map(|(r, c)| (r.as_str(), *c)))
        .await?;

    // Function: a call with NULLs, from sub-selects, since the planner would fold a strict function of constants before
    // its privilege is checked.
    let attempts = owner
        .query(
            "select 'FUNCTION', p.oid, p.oid::regprocedure::text, format('select %s(%s)', p.oid::regproc,
                    (select string_agg(format('(select null::%s)', format_type(t, null)), ', ' order by n)
                     from unnest(p.proargtypes) with ordinality a (t, n)))
             from pg_proc p where p.pronamespace = 'tollgate'::regnamespace
             union all
             -- In FROM, where verification is not called as other functions are.
             select 'FUNCTION', p.oid, p.oid::regprocedure::text, format('select * from %s(%s)', p.oid::regproc,
                    (select string_agg(format('null::%s', format_type(t, null)), ', ' order by n)
                     from unnest(p.proargtypes) with ordinality a (t, n)))
             from pg_proc p
             where p.pronamespace = 'tollgate'::regnamespace and not p.proisstrict and p.prorettype <> 'trigger'::regtype
             union all
             select case c.relkind when 'S' then 'SEQUENCE' when 'v' then 'VIEW' else 'TABLE' end, c.oid, c.oid::regclass::text,
                    format('select * from %s', c.oid::regclass)
             from pg_class c where c.relnamespace = 'tollgate'::regnamespace and c.relkind not in ('i', 'I', 'c', 't')
             union all
             select 'TYPE', t.oid, t.oid::regtype::text, format('create temporary table t (c %s)', t.oid::regtype)
             from pg_type t left join pg_class c on c.oid = t.typrelid
             where t.typnamespace = 'tollgate'::regnamespace and t.typcategory <> 'A' and coalesce(c.relkind, 'c') = 'c'",
            &[],
        )
        .await?;
    assert!(attempts.len() > 150, "these are not all: {}", attempts.len());

    let public: BTreeSet<String> = PUBLIC.map(str::to_owned).into();
    let mut wrong = Vec::new();
    for holder in ["nothing"].into_iter().chain(CAPABILITIES) {
        let role = format!("m_{holder}");
        let client = cluster.connect(&role, DATABASE).await?;
        let mut expected = public.clone();
        if holder != "nothing" {
            expected.extend(given_by(&owner, holder).await?);
        }
        for attempt in &attempts {
            let (kind, oid, object, statement): (&str, u32, &str, &str) =
                (attempt.get(0), attempt.get(1), attempt.get(2), attempt.get(3));
            let asked = match kind {
                "FUNCTION" => "select has_function_privilege($1::text::regrole, $2::oid, 'execute')",
                "TYPE" => "select has_type_privilege($1::text::regrole, $2::oid, 'usage')",
                "SEQUENCE" => {
                    "select has_sequence_privilege($1::text::regrole, $2::oid, 'select, usage, update')"
                }
                _ => "select has_table_privilege($1::text::regrole, $2::oid, 'select')",
            };
            let may: bool = owner.query_one(asked, &[&role, &oid]).await?.get(0);
            let was_let = !is_denied(&client, statement).await?;
            if (may, was_let) != (expected.contains(object), expected.contains(object)) {
                wrong.push(format!("{holder}, {object}: has the privilege {may}, was let in {was_let}"));
            }
            if matches!(kind, "TABLE" | "VIEW") {
                let writes = "select has_table_privilege($1::text::regrole, $2::oid, 'insert, update, delete, truncate, references, trigger')
                                  or has_any_column_privilege($1::text::regrole, $2::oid, 'insert, update, references')";
                if owner.query_one(writes, &[&role, &oid]).await?.get(0) {
                    wrong.push(format!("{holder}, {object}: may write"));
                }
            }
        }
        let more = "select has_schema_privilege($1::text::regrole, 'tollgate', 'create')
                        or exists (select from pg_proc p where p.pronamespace = 'tollgate'::regnamespace
                                   and has_function_privilege($1::text::regrole, p.oid, 'execute with grant option'))";
        if owner.query_one(more, &[&role]).await?.get(0) {
            wrong.push(format!("{holder}: may create or grant"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}

#[tokio::test]
async fn the_privileges_of_everyone_and_of_verifiers_do_not_grow_by_accident() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    let functions = "select d.object::regprocedure::text from tollgate.privilege_decisions d
                     where d.object_type = 'FUNCTION' and d.given_to = ";
    assert_eq!(names(&owner, &format!("{functions} 'public'")).await?, PUBLIC.map(str::to_owned).into());
    assert_eq!(names(&owner, &format!("{functions} 'verifier'")).await?, VERIFIER.map(str::to_owned).into());
    // Each includes the previous one; the daemon's is separate.
    let [verifier, issuer, admin, operator, key_fetcher] = [
        given_by(&owner, "verifier").await?,
        given_by(&owner, "issuer").await?,
        given_by(&owner, "admin").await?,
        given_by(&owner, "operator").await?,
        given_by(&owner, "key_fetcher").await?,
    ];
    assert!(verifier.is_subset(&issuer) && issuer.is_subset(&admin), "each includes the one before");
    assert!(operator.is_disjoint(&issuer), "the daemon handles no tokens");
    assert!(
        key_fetcher.is_disjoint(&operator) && key_fetcher.is_disjoint(&admin),
        "who stores keys can sign"
    );
    Ok(())
}

#[tokio::test]
async fn the_operator_may_do_what_the_daemon_does_and_nothing_else() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    roles(&owner, &[("a_daemon", "operator")]).await?;
    let output = Tollgated::run(&cluster.url("a_daemon", DATABASE), &["check", "--json"])?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let report = report.to_string();
    assert!(report.contains("may do all that the daemon does"), "{report}");

    // What the daemon's statements name, in its own source, is what the database gives.
    let functions = names(
        &owner,
        "select distinct p.proname::text from pg_proc p where p.pronamespace = 'tollgate'::regnamespace",
    )
    .await?;
    let source = contract()?;
    let called: BTreeSet<String> = functions
        .into_iter()
        .filter(|name| {
            source.contains(&format!("tollgate.{name}(")) || source.contains(&format!("\"{name}\""))
        })
        .collect();
    assert!(called.len() > 50, "{called:?}");
    let given = |to: &str| {
        format!(
            "select p.proname::text from tollgate.privilege_decisions d join pg_proc p on p.oid = d.object::regprocedure
             where d.object_type = 'FUNCTION' and d.given_to {to}"
        )
    };
    let unused: BTreeSet<String> =
        names(&owner, &given("= 'operator'")).await?.difference(&called).cloned().collect();
    assert_eq!(unused, WITHOUT_A_DAEMON.map(str::to_owned).into(), "given to the operator, and not called");
    let refused: BTreeSet<String> =
        called.difference(&names(&owner, &given("<> 'internal'")).await?).cloned().collect();
    assert_eq!(refused, BTreeSet::new(), "called, and given to no capability");
    Ok(())
}

/// Steps of housekeeping as whole statements, for a scheduler in the database that does without the daemon.
const WITHOUT_A_DAEMON: [&str; 5] =
    ["announce_expiries", "expire_tokens", "purge_sessions", "purge_tokens", "purge_usage"];

/// The statements of the daemon and its command line.
fn contract() -> Result<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../daemon/src/contract");
    let mut text = String::new();
    for file in std::fs::read_dir(folder)? {
        let file = std::fs::read_to_string(file?.path())?;
        text.push_str(file.split("#[cfg(test)]").next().unwrap_or_default());
    }
    Ok(text)
}

#[tokio::test]
async fn everyone_may_ask_what_they_hold_of_each_capability() -> Result<()> {
    // A database of its own: plain GRANTs of two sessions on one function fail with "tuple concurrently updated".
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "held")?;
    let owner = cluster.connect("postgres", "held").await?;
    let held = async |role: &str| -> Result<String> {
        let client = cluster.connect(role, "held").await?;
        value(&client, "select string_agg(held, ' ') from tollgate.list_own_capabilities()").await
    };
    // What the last of them, gateway, shares with an issuer, that one has too.
    for (role, expected) in [
        ("verifier", "whole not not not not"),
        ("issuer", "whole whole not not not"),
        ("admin", "whole whole whole not not"),
        ("operator", "not not not whole not not"),
        ("key_fetcher", "not not not not whole not"),
        ("gateway", "not not not not not whole"),
    ] {
        roles(&owner, &[(&format!("holds_{role}"), role)]).await?;
        let all = held(&format!("holds_{role}")).await?;
        assert!(all.starts_with(expected), "{role}: {all}");
    }
    // As a member, and after SET ROLE; a superuser holds all.
    owner
        .batch_execute(
            "create role holds_by_membership login in role holds_issuer; create role holds_none login",
        )
        .await?;
    assert!(held("holds_by_membership").await?.starts_with("whole whole not not not"));
    assert_eq!(held("holds_none").await?, "not not not not not not");
    assert_eq!(held("postgres").await?, "whole whole whole whole whole whole");
    owner.batch_execute("begin; set local role holds_verifier").await?;
    let own = "select string_agg(held, ' ') from tollgate.list_own_capabilities()";
    assert_eq!(value::<String>(&owner, own).await?, "whole not not not not not");
    owner.batch_execute("rollback").await?;

    // One function less, or only one.
    owner.batch_execute("revoke execute on function tollgate.create_api_token from holds_issuer").await?;
    assert!(held("holds_issuer").await?.starts_with("whole partly not not not"));
    let missing = "select array_to_string(missing, '; ') from tollgate.list_own_capabilities() where capability = 'issuer'";
    let issuer = cluster.connect("holds_issuer", "held").await?;
    let missing: String = value(&issuer, missing).await?;
    assert!(missing.starts_with("tollgate.create_api_token(") && !missing.contains(';'), "{missing}");
    owner.batch_execute("grant execute on function tollgate.list_scopes to holds_none").await?;
    assert_eq!(held("holds_none").await?, "not partly not not not not");
    Ok(())
}

// ---- Granting and revoking

#[tokio::test]
async fn a_capability_is_granted_once_logged_once_and_revoked_once() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    roles(&owner, &[("giver", "admin")]).await?;
    owner.batch_execute("create role taker login").await?;
    let giver = cluster.connect("giver", DATABASE).await?;
    let logged = |event: &str| {
        (event.to_owned(), "giver".to_owned(), json!({"role": "taker", "capability": "issuer"}))
    };

    for _ in 0..2 {
        grant(&giver, "taker", "issuer").await?;
        assert_eq!(own_privileges(&owner, "taker").await?, given_by(&owner, "issuer").await?);
        assert_eq!(shown(&giver, "taker").await?, granted_alone("issuer"));
        assert_eq!(events(&owner, "taker").await?, [logged("capability.granted")]);
    }
    let taker = cluster.connect("taker", DATABASE).await?;
    common::issue(&taker, "of taker", &["posts:read"]).await?;
    for _ in 0..2 {
        revoke(&giver, "taker", "issuer").await?;
        assert_eq!(own_privileges(&owner, "taker").await?, BTreeSet::new());
        assert_eq!(shown(&giver, "taker").await?, BTreeMap::new());
        assert_eq!(
            events(&owner, "taker").await?,
            [logged("capability.granted"), logged("capability.revoked")]
        );
    }
    // Also in the session that had it.
    let refusal =
        error(common::issue(&taker, "of taker", &[]).await.map_err(|e| e.downcast().expect("the server's")));
    assert!(denied(&refusal), "{refusal:?}");
    Ok(())
}

#[tokio::test]
async fn privileges_of_another_capability_stay_when_one_is_revoked() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    owner.batch_execute("create role several login").await?;
    for capability in CAPABILITIES {
        grant(&owner, "several", capability).await?;
    }
    // In whichever order they are revoked, what remains is what the others include.
    let mut left: BTreeSet<&str> = CAPABILITIES.into();
    for gone in ["issuer", "admin", "operator", "key_fetcher", "gateway", "verifier"] {
        revoke(&owner, "several", gone).await?;
        left.remove(gone);
        let mut expected = BTreeSet::new();
        for capability in &left {
            expected.extend(given_by(&owner, capability).await?);
        }
        assert_eq!(own_privileges(&owner, "several").await?, expected, "without {gone}");
        let states: BTreeSet<String> =
            shown(&owner, "several").await?.into_values().map(|(state, _)| state).collect();
        assert!(states.iter().all(|state| state == "granted"), "{states:?}");
    }

    // A capability that is only part of another one cannot be revoked from the role.
    grant(&owner, "several", "admin").await?;
    revoke(&owner, "several", "verifier").await?;
    assert_eq!(own_privileges(&owner, "several").await?, given_by(&owner, "admin").await?);
    Ok(())
}

#[tokio::test]
async fn privileges_that_were_granted_by_hand_are_shown_and_go_with_the_capability() -> Result<()> {
    // PostgreSQL does not queue concurrent changes of one object's privileges, as our functions do.
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "by_hand")?;
    let owner = cluster.connect("postgres", "by_hand").await?;
    owner
        .batch_execute(
            "create role handy login; create role friend login;
             grant execute on function tollgate.create_api_token to handy with grant option;
             grant select on tollgate.tokens to handy;
             set role handy; grant execute on function tollgate.create_api_token to friend; reset role",
        )
        .await?;
    let by_hand = |objects: &[&str]| {
        BTreeMap::from([(
            String::new(),
            ("by hand".to_owned(), objects.iter().map(|&o| o.to_owned()).collect::<Vec<_>>()),
        )])
    };
    let create = "tollgate.create_api_token(text,text,text[],interval,jsonb,cidr[],integer,interval,text,timestamp with time zone)";
    assert_eq!(shown(&owner, "handy").await?, by_hand(&[create, "tollgate.tokens"]));
    assert_eq!(shown(&owner, "friend").await?, by_hand(&[create]));
    revoke(&owner, "handy", "issuer").await?;
    assert_eq!(
        shown(&owner, "handy").await?,
        by_hand(&["tollgate.tokens"]),
        "what is not of the capability stays"
    );
    assert_eq!(shown(&owner, "friend").await?, BTreeMap::new(), "what was passed on goes with it");
    assert_eq!(events(&owner, "handy").await?.len(), 1);
    Ok(())
}

#[tokio::test]
async fn nothing_is_granted_to_a_missing_role_or_for_an_unknown_capability() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "refusing")?;
    let owner = cluster.connect("postgres", "refusing").await?;
    roles(&owner, &[("careful", "admin")]).await?;
    owner.batch_execute("create role mighty login superuser").await?;
    let careful = cluster.connect("careful", "refusing").await?;
    let state = "select md5(coalesce(string_agg(o::text, ',' order by o::text), '')) from (
                     select p::text from tollgate.object_privileges p union all select c::text from tollgate.capabilities c
                     union all select s::text from pg_db_role_setting s join pg_database d on d.oid = s.setdatabase
                     where d.datname = 'refusing' union all select a::text from tollgate.audit_log a) o";
    let before: String = value(&owner, state).await?;
    let hex = "a1b2c3d4e5f60718".repeat(5);
    for (call, code, detail) in [
        ("grant_capability('careful', 'root')", SqlState::INVALID_PARAMETER_VALUE, "Argument: capability."),
        (
            &format!("grant_capability('careful', 'tgt_{hex}')"),
            SqlState::INVALID_PARAMETER_VALUE,
            "Argument: capability.",
        ),
        (
            "grant_capability('careful', 'Verifier')",
            SqlState::INVALID_PARAMETER_VALUE,
            "Argument: capability.",
        ),
        ("grant_capability('careful', null)", SqlState::INVALID_PARAMETER_VALUE, "Argument: capability."),
        (
            "grant_capability(null, 'verifier')",
            SqlState::INVALID_PARAMETER_VALUE,
            "Argument: role, which is NULL or PUBLIC.",
        ),
        (
            "grant_capability('-', 'verifier')",
            SqlState::INVALID_PARAMETER_VALUE,
            "Argument: role, which is NULL or PUBLIC.",
        ),
        (
            "grant_capability(4000000000, 'verifier')",
            SqlState::UNDEFINED_OBJECT,
            "Argument: role, of 4000000000.",
        ),
        ("grant_capability('mighty', 'verifier')", SqlState::INVALID_PARAMETER_VALUE, "Argument: role."),
        ("grant_capability('postgres', 'verifier')", SqlState::INVALID_PARAMETER_VALUE, "Argument: role."),
        ("grant_capability('pg_monitor', 'verifier')", SqlState::INVALID_PARAMETER_VALUE, "Argument: role."),
        ("revoke_capability('careful', 'root')", SqlState::INVALID_PARAMETER_VALUE, "Argument: capability."),
        (
            "revoke_capability(null, 'verifier')",
            SqlState::INVALID_PARAMETER_VALUE,
            "Argument: role, which is NULL or PUBLIC.",
        ),
        (
            "revoke_capability('-', 'verifier')",
            SqlState::INVALID_PARAMETER_VALUE,
            "Argument: role, which is NULL or PUBLIC.",
        ),
        (
            "revoke_capability(4000000000, 'verifier')",
            SqlState::UNDEFINED_OBJECT,
            "Argument: role, of 4000000000.",
        ),
        ("revoke_capability('postgres', 'admin')", SqlState::INVALID_PARAMETER_VALUE, "Argument: role."),
    ] {
        let refusal = refused(careful.batch_execute(&format!("select tollgate.{call}")).await, &code);
        assert_eq!(refusal.detail(), Some(detail), "{call}");
        assert!(refusal.hint().is_some(), "{call}: no hint");
        assert!(!common::text_of(&refusal).contains(&hex[..16]), "{call}: {refusal:?}");
    }
    for role in ["public", "no_role_of_that_name"] {
        refused(grant(&careful, role, "verifier").await, &SqlState::UNDEFINED_OBJECT);
    }
    for isolation in ["repeatable read", "serializable"] {
        careful.batch_execute(&format!("begin isolation level {isolation}")).await?;
        refused(grant(&careful, "careful", "operator").await, &SqlState::INVALID_TRANSACTION_STATE);
        careful.batch_execute("rollback").await?;
    }
    assert_eq!(value::<String>(&owner, state).await?, before, "something has changed");
    Ok(())
}

#[tokio::test]
async fn a_role_may_have_any_name() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    for (role, quoted) in [
        ("o'neill", r#""o'neill""#),
        ("Some One", r#""Some One""#),
        (r#"a"b\c"#, r#""a""b\c""#),
        ("x to public; --", r#""x to public; --""#),
        ("%s %I $1", r#""%s %I $1""#),
        ("user", r#""user""#),
    ] {
        owner.batch_execute(&format!("create role {quoted} login")).await?;
        grant(&owner, quoted, "operator").await?;
        assert_eq!(shown(&owner, role).await?, granted_alone("operator"));
        assert_eq!(events(&owner, role).await?.len(), 1);
        revoke(&owner, quoted, "operator").await?;
        assert_eq!(shown(&owner, role).await?, BTreeMap::new());
        owner.batch_execute(&format!("drop role {quoted}")).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_transaction_that_takes_it_back_or_rolls_back_leaves_nothing() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "brief")?;
    let owner = cluster.connect("postgres", "brief").await?;
    owner.batch_execute("create role brief login").await?;
    for end in [
        "select tollgate.revoke_capability('brief', 'admin'); commit",
        "rollback",
        "drop extension tollgate; rollback",
    ] {
        owner
            .batch_execute(&format!("begin; select tollgate.grant_capability('brief', 'admin'); {end}"))
            .await?;
        assert_eq!(own_privileges(&owner, "brief").await?, BTreeSet::new(), "{end}");
        assert_eq!(shown(&owner, "brief").await?, BTreeMap::new(), "{end}");
    }
    Ok(())
}

#[tokio::test]
async fn capabilities_are_granted_and_revoked_by_many_at_once() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    let mut tasks = Vec::new();
    for n in 0..6 {
        owner.batch_execute(&format!("create role crowd_{n} login")).await?;
        let client = cluster.connect("postgres", DATABASE).await?;
        tasks.push(tokio::spawn(async move {
            let role = format!("crowd_{n}");
            for _ in 0..5 {
                grant(&client, &role, "admin").await?;
                grant(&client, &role, "operator").await?;
                revoke(&client, &role, "admin").await?;
            }
            Ok::<_, tokio_postgres::Error>(())
        }));
    }
    for task in tasks {
        task.await??;
    }
    for n in 0..6 {
        assert_eq!(shown(&owner, &format!("crowd_{n}")).await?, granted_alone("operator"));
    }
    Ok(())
}

#[tokio::test]
async fn revoking_a_capability_reports_other_grants_of_its_privileges() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    owner
        .batch_execute("create role team_of_two nologin; create role one_of_two login in role team_of_two")
        .await?;
    let (client, mut messages) = cluster.listen("postgres", DATABASE).await?;
    let mut notices = async || -> Result<Vec<DbError>> {
        // What was sent before this answer has arrived when it has.
        client.batch_execute("select").await?;
        Ok(std::iter::from_fn(|| messages.try_recv().ok())
            .filter_map(
                |message| if let AsyncMessage::Notice(notice) = message { Some(notice) } else { None },
            )
            .collect())
    };
    grant(&client, "team_of_two", "issuer").await?;
    let reported = notices().await?;
    assert!(
        reported.len() == 1 && reported[0].message().contains("bind values"),
        "a role that does not log in: {reported:?}"
    );
    grant(&client, "one_of_two", "verifier").await?;
    assert!(notices().await?.is_empty());
    let members: Vec<String> =
        value(&client, "select members from tollgate.capability_grants where role = 'team_of_two'").await?;
    assert_eq!(members, ["one_of_two"]);

    revoke(&client, "one_of_two", "verifier").await?;
    let reported = notices().await?;
    assert!(
        reported.len() == 1 && reported[0].detail().is_some_and(|d| d.contains("team_of_two")),
        "{reported:?}"
    );
    let member = cluster.connect("one_of_two", DATABASE).await?;
    assert!(!is_denied(&member, "select tollgate.verify_api_token('x')").await?);
    revoke(&client, "team_of_two", "issuer").await?;
    assert!(notices().await?.is_empty());
    assert!(is_denied(&member, "select tollgate.verify_api_token('x')").await?);
    Ok(())
}

// ---- Bind values in the log

const LOGGED: &str = "select array[current_setting('log_parameter_max_length'), current_setting('log_parameter_max_length_on_error')]";

#[tokio::test]
async fn bind_values_of_a_role_with_a_capability_are_kept_out_of_the_log() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    owner.batch_execute("create database aside").await?;
    let hidden = ["0", "0"].map(str::to_owned).to_vec();
    for (n, capability) in CAPABILITIES.into_iter().enumerate() {
        let role = format!("quiet_{n}");
        // Overrides what was set for it before.
        owner
            .batch_execute(&format!(
                "create role {role} login;
                 alter role {role} set log_parameter_max_length = 77;
                 alter role {role} in database {DATABASE} set log_parameter_max_length = 88;
                 alter role {role} set log_parameter_max_length_on_error = 99"
            ))
            .await?;
        grant(&owner, &role, capability).await?;
        let seen: Vec<String> = value(&cluster.connect(&role, DATABASE).await?, LOGGED).await?;
        assert_eq!(seen, hidden, "{capability}");
        let elsewhere: Vec<String> = value(&cluster.connect(&role, "aside").await?, LOGGED).await?;
        assert_eq!(elsewhere, ["77B", "99B"], "{capability} is of one database");
        // It may go on handling tokens, with its remaining privileges.
        revoke(&owner, &role, capability).await?;
        let seen: Vec<String> = value(&cluster.connect(&role, DATABASE).await?, LOGGED).await?;
        assert_eq!(seen, hidden, "{capability}, revoked");
    }
    Ok(())
}

#[tokio::test]
async fn an_owner_without_superuser_still_grants_and_says_what_it_cannot_set() -> Result<()> {
    let cluster = SHARED.cluster()?;
    cluster.execute(DATABASE, "create role lessor login superuser; create role lessee login")?;
    cluster.execute(DATABASE, "create database leased owner lessor")?;
    let (lessor, mut messages) = cluster.listen("lessor", "leased").await?;
    lessor.batch_execute("create extension tollgate").await?;
    cluster.execute(DATABASE, "alter role lessor nosuperuser")?;
    grant(&lessor, "lessee", "verifier").await?;
    lessor.batch_execute("select").await?;
    let details: BTreeSet<String> =
        std::iter::from_fn(|| messages.try_recv().ok())
            .filter_map(|message| {
                if let AsyncMessage::Notice(n) = message { n.detail().map(str::to_owned) } else { None }
            })
            .collect();
    for setting in ["log_parameter_max_length", "log_parameter_max_length_on_error"] {
        assert!(
            details.iter().any(|detail| detail.contains(&format!(" {setting} "))),
            "{setting}: {details:?}"
        );
    }
    let lessee = cluster.connect("lessee", "leased").await?;
    assert_eq!(common::code(&lessee, "junk").await?, "MALFORMED");
    revoke(&lessor, "lessee", "verifier").await?;
    assert!(is_denied(&lessee, "select tollgate.verify_api_token('junk')").await?);
    refused(revoke(&lessor, "lessor", "admin").await, &SqlState::INVALID_PARAMETER_VALUE);
    assert_eq!(common::code(&lessor, "junk").await?, "MALFORMED");
    Ok(())
}

// ---- Roles that change, upgrades, dumps

#[tokio::test]
async fn a_capability_follows_a_role_to_its_new_name_and_does_not_stay_with_the_old_one() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    common::database(&cluster, "renaming")?;
    let client = cluster.connect("postgres", "renaming").await?;
    roles(&client, &[("old_name", "issuer"), ("bystander", "verifier")]).await?;
    client.batch_execute("alter role old_name rename to new_name; create role old_name login").await?;
    assert_eq!(shown(&client, "new_name").await?, granted_alone("issuer"));
    assert_eq!(shown(&client, "old_name").await?, BTreeMap::new());
    // As an upgrade does.
    client.batch_execute("select tollgate.settle_privileges()").await?;
    assert_eq!(
        own_privileges(&client, "old_name").await?,
        BTreeSet::new(),
        "the name now belongs to another role"
    );
    grant(&client, "bystander", "operator").await?;
    let name: String =
        value(&client, "select role from tollgate.capabilities where capability = 'issuer'").await?;
    assert_eq!(name, "new_name");

    client.batch_execute("drop owned by new_name; drop role new_name").await?;
    assert_eq!(shown(&client, "new_name").await?["issuer"].0, "no such role");
    grant(&client, "bystander", "issuer").await?;
    assert_eq!(shown(&client, "new_name").await?, BTreeMap::new());
    let last = events(&client, "new_name").await?.pop().context("an event")?;
    assert_eq!((last.0.as_str(), &last.2["capability"]), ("capability.revoked", &json!("issuer")));
    assert!(last.2["reason"].as_str().is_some_and(|reason| reason.contains("no longer exists")), "{last:?}");
    drop(owner);
    Ok(())
}

#[tokio::test]
async fn an_upgrade_grants_new_privileges_and_does_not_touch_grants_by_hand() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "upgraded")?;
    let owner = cluster.connect("postgres", "upgraded").await?;
    roles(&owner, &[("settled", "issuer")]).await?;
    owner
        .batch_execute(
            "create role crafty login;
             grant execute on function tollgate.define_scope to crafty; grant select on tollgate.tokens to crafty;
             -- As if an upgrade had added this one, and that one had been granted by hand.
             revoke execute on function tollgate.create_api_token from settled;
             grant execute on function tollgate.drain_usage to public",
        )
        .await?;
    let create =
        "tollgate.create_api_token(text,text,text[],interval,jsonb,cidr[],integer,interval,text,timestamp with time zone)".to_owned();
    assert_eq!(shown(&owner, "settled").await?["issuer"], ("incomplete".to_owned(), vec![create]));

    owner.batch_execute("begin; select tollgate.settle_privileges(); commit").await?;
    assert_eq!(shown(&owner, "settled").await?, granted_alone("issuer"));
    let kept = &shown(&owner, "crafty").await?[""].1;
    assert_eq!(kept, &["tollgate.define_scope(text,text)", "tollgate.tokens"]);
    let public = names(
        &owner,
        "select object from tollgate.object_privileges where grantee = 0 and object_type <> 'SCHEMA'",
    )
    .await?;
    assert_eq!(public, PUBLIC.map(str::to_owned).into());
    // Otherwise a dump would leave these out, and in PostgreSQL 17 and later the role could not be dropped.
    let first: i64 = value(
        &owner,
        "select count(*) from pg_init_privs i, aclexplode(i.initprivs) a where a.grantee in ('settled'::regrole, 'crafty'::regrole)",
    )
    .await?;
    assert_eq!(first, 0);
    revoke(&owner, "settled", "issuer").await?;
    owner.batch_execute("drop role settled").await?;
    Ok(())
}

/// `pg_dump | psql`, from one database to another, possibly of another cluster.
fn copy(from: (&Cluster, &str), to: (&Cluster, &str)) -> Result<()> {
    let connected = |(cluster, database): (&Cluster, &str), program: &str| -> Command {
        let mut command = cluster.program(program);
        command.env("PGDATABASE", database);
        command
    };
    let mut dump = connected(from, "pg_dump").stdout(Stdio::piped()).spawn()?;
    let output = dump.stdout.take().context("a pipe was asked for")?;
    let restored = connected(to, "psql")
        .args(["--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1"])
        .stdin(output)
        .output()?;
    ensure!(dump.wait()?.success(), "pg_dump failed");
    ensure!(restored.status.success(), "{}", String::from_utf8_lossy(&restored.stderr));
    Ok(())
}

#[tokio::test]
async fn a_dump_carries_the_capabilities_of_the_roles_that_are_there() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "dumped")?;
    cluster.execute(DATABASE, "create database restored")?;
    let owner = cluster.connect("postgres", "dumped").await?;
    roles(&owner, &[("carried", "admin"), ("daemon_too", "operator"), ("renamed_meanwhile", "verifier")])
        .await?;
    owner
        .batch_execute(
            "alter role renamed_meanwhile rename to called_otherwise; create role renamed_meanwhile login",
        )
        .await?;
    copy((&cluster, "dumped"), (&cluster, "restored"))?;

    let restored = cluster.connect("postgres", "restored").await?;
    for (role, capability) in [("carried", "admin"), ("daemon_too", "operator")] {
        assert_eq!(shown(&restored, role).await?, granted_alone(capability));
        assert_eq!(events(&restored, role).await?.len(), 1, "restoring is not granting");
        let seen: Vec<String> = value(&cluster.connect(role, "restored").await?, LOGGED).await?;
        assert_eq!(seen, ["0", "0"]);
    }
    assert_eq!(own_privileges(&restored, "renamed_meanwhile").await?, BTreeSet::new());
    assert_eq!(own_privileges(&restored, "called_otherwise").await?, given_by(&restored, "verifier").await?);
    Ok(())
}

#[tokio::test]
async fn a_dump_is_restored_where_its_roles_are_not() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "departing")?;
    let owner = cluster.connect("postgres", "departing").await?;
    roles(&owner, &[("left_behind", "admin")]).await?;
    owner.batch_execute("revoke all on all functions in schema tollgate from left_behind").await?;
    let elsewhere = Cluster::builder().extension(false).start()?;
    // Without --no-privileges, psql would stop at the first GRANT to a missing role, whichever role granted it.
    let mut dump = cluster.program("pg_dump");
    let dumped = dump.env("PGDATABASE", "departing").arg("--no-privileges").output()?;
    ensure!(dumped.status.success(), "{}", String::from_utf8_lossy(&dumped.stderr));
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), &dumped.stdout)?;
    let restored = elsewhere
        .program("psql")
        .args(["--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1"])
        .stdin(std::fs::File::open(file.path())?)
        .output()?;
    ensure!(restored.status.success(), "{}", String::from_utf8_lossy(&restored.stderr));

    let owner = elsewhere.connect("postgres", DATABASE).await?;
    assert_eq!(shown(&owner, "left_behind").await?["admin"].0, "no such role");
    owner.batch_execute("create role left_behind login; select tollgate.settle_privileges()").await?;
    assert_eq!(
        own_privileges(&owner, "left_behind").await?,
        BTreeSet::new(),
        "the name belongs to another role here"
    );
    grant(&owner, "left_behind", "verifier").await?;
    assert_eq!(shown(&owner, "left_behind").await?, granted_alone("verifier"));
    Ok(())
}

#[tokio::test]
async fn a_verifier_revokes_presented_tokens_and_nothing_else() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    owner.batch_execute("create role shown login").await?;
    grant(&owner, "shown", "verifier").await?;
    let verifier = cluster.connect("shown", DATABASE).await?;
    let issue = async |user: &str| common::issue(&owner, user, &["posts:read"]).await;
    let (leaked, own, other, foreign) =
        (issue("ann").await?, issue("ann").await?, issue("ann").await?, issue("ben").await?);
    let presented = "select tollgate.revoke_presented_token($1, 'found in a log')";
    assert!(verifier.query_one(presented, &[&leaked.token]).await?.get::<_, bool>(0));
    verifier.batch_execute("begin").await?;
    common::authenticate(&verifier, &own.token).await?;
    for (id, expected) in [(other.id, true), (foreign.id, false), (own.id, true)] {
        let done = verifier.query_one("select tollgate.revoke_own_api_token($1, 'mine')", &[&id]).await?;
        assert_eq!(done.get::<_, bool>(0), expected);
    }
    verifier.batch_execute("commit").await?;
    for (token, expected) in
        [(&leaked, "REVOKED"), (&own, "REVOKED"), (&other, "REVOKED"), (&foreign, "VALID")]
    {
        assert_eq!(common::code(&owner, &token.token).await?, expected);
    }
    for denied in ["revoke_api_token(null)", "revoke_all_api_tokens('ben')", "list_api_tokens('ben')"] {
        assert!(is_denied(&verifier, &format!("select tollgate.{denied}")).await?, "{denied}");
    }
    Ok(())
}
