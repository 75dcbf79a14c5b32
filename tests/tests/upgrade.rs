//! Upgrades. The install script of every release is kept as it was (sql/install); from the first one on, updating leads to
//! the same objects as a fresh installation does, and loses nothing.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use common::{Token, code, issue, value};
use tokio_postgres::Client;
use tollgate_tests::{Cluster, DATABASE, Install};

const CURRENT: &str = env!("CARGO_PKG_VERSION");
const FIRST: &str = "0.1.0";

/// Every object of the extension, under a name, with all that can be told of it.
const OBJECTS: &str = "
    with member as (
        select d.classid, d.objid from pg_depend d join pg_extension e on e.oid = d.refobjid
         where e.extname = 'tollgate' and d.deptype = 'e'
    ), relation as (
        select c.* from member m join pg_class c on c.oid = m.objid where m.classid = 'pg_class'::regclass
    ), granted as (
        select 'relation' as kind, c.oid, a.* from relation c, aclexplode(c.relacl) a
        union all
        select 'function', p.oid, a.* from member m join pg_proc p on p.oid = m.objid and m.classid = 'pg_proc'::regclass,
            aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
        union all
        select 'type', t.oid, a.* from member m join pg_type t on t.oid = m.objid and m.classid = 'pg_type'::regclass,
            aclexplode(coalesce(t.typacl, acldefault('T', t.typowner))) a
    )
    select 'member ' || i.type || ' ' || i.identity, coalesce(obj_description(m.objid, m.classid::regclass::text), '')
        from member m, pg_identify_object(m.classid, m.objid, 0) i
    union all
    select 'column ' || c.oid::regclass || '.' || a.attname,
           concat_ws(' ', a.attnum, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated,
                     pg_get_expr(d.adbin, d.adrelid), col_description(c.oid, a.attnum))
        from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
        left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
        where c.relnamespace = 'tollgate'::regnamespace and c.relkind <> 'i'
    union all
    select 'relation ' || c.oid::regclass, concat_ws(' ', c.relkind, c.relpersistence, c.reloptions, am.amname)
        from relation c left join pg_am am on am.oid = c.relam
    union all
    select 'view ' || c.oid::regclass, pg_get_viewdef(c.oid) from relation c where c.relkind = 'v'
    union all
    select 'index ' || x.indexrelid::regclass, pg_get_indexdef(x.indexrelid) from relation c join pg_index x on x.indrelid = c.oid
    union all
    select 'constraint ' || c.oid::regclass || '.' || k.conname, pg_get_constraintdef(k.oid) from relation c join pg_constraint k on k.conrelid = c.oid
    union all
    select 'trigger ' || c.oid::regclass || '.' || t.tgname, t.tgenabled::text || ' ' || pg_get_triggerdef(t.oid)
        from relation c join pg_trigger t on t.tgrelid = c.oid and not t.tgisinternal
    union all
    select 'function ' || p.oid::regprocedure, pg_get_functiondef(p.oid)
        from member m join pg_proc p on p.oid = m.objid and m.classid = 'pg_proc'::regclass
    union all
    select 'privileges ' || g.kind || ' ' || case g.kind when 'relation' then g.oid::regclass::text when 'function' then g.oid::regprocedure::text else g.oid::regtype::text end,
           string_agg(case g.grantee when 0 then 'PUBLIC' else g.grantee::regrole::text end || ' ' || g.privilege_type, ', ' order by g.grantee, g.privilege_type)
        from granted g group by g.kind, g.oid
    union all
    select 'dumped ' || c.id::regclass, c.condition from pg_extension e, unnest(e.extconfig, e.extcondition) c (id, condition) where e.extname = 'tollgate'
    union all
    select 'schema', nspacl::text from pg_namespace where nspname = 'tollgate'";

async fn objects(client: &Client) -> Result<BTreeMap<String, String>> {
    let rows = client.query(OBJECTS, &[]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get::<_, Option<String>>(1).unwrap_or_default())).collect())
}

/// Both as lines, so that a difference is one line of the failure.
fn differences(ours: &BTreeMap<String, String>, theirs: &BTreeMap<String, String>) -> Vec<String> {
    ours.keys()
        .chain(theirs.keys())
        .filter(|name| ours.get(*name) != theirs.get(*name))
        .map(|name| format!("{name}:\n  {:?}\n  {:?}", ours.get(name), theirs.get(name)))
        .collect()
}

async fn update(client: &Client) -> Result<()> {
    Ok(client.batch_execute("alter extension tollgate update").await?)
}

#[tokio::test]
async fn updating_the_first_release_gives_what_a_fresh_installation_has() -> Result<()> {
    let cluster = Arc::new(Cluster::builder().start()?);
    cluster.execute(DATABASE, "create database updated")?;
    cluster.execute("updated", &format!("create extension tollgate version '{FIRST}'"))?;
    let (fresh, updated) =
        (cluster.connect("postgres", DATABASE).await?, cluster.connect("postgres", "updated").await?);
    assert!(!differences(&objects(&fresh).await?, &objects(&updated).await?).is_empty(), "nothing to update");
    update(&updated).await?;
    let version: String =
        value(&updated, "select extversion from pg_extension where extname = 'tollgate'").await?;
    assert_eq!(version, CURRENT);
    let differences = differences(&objects(&fresh).await?, &objects(&updated).await?);
    assert!(differences.is_empty(), "fresh, then updated:\n{}", differences.join("\n"));
    Ok(())
}

#[tokio::test]
async fn an_update_loses_nothing_and_the_library_serves_the_older_schema_until_then() -> Result<()> {
    let cluster = Arc::new(Cluster::builder().extension(false).start()?);
    let owner = cluster.connect("postgres", DATABASE).await?;
    owner.batch_execute(&format!("create extension tollgate version '{FIRST}'")).await?;
    owner
        .batch_execute(
            "create role web login; create role daemon login; create role clerk login;
             grant execute on function tollgate.verify_api_token to web;
             grant execute on function tollgate.create_api_token, tollgate.revoke_api_token to clerk;
             grant execute on function tollgate.drain_usage, tollgate.apply_usage, tollgate.ack_usage, tollgate.event_position,
                 tollgate.read_events, tollgate.open_subscription, tollgate.advance_subscription, tollgate.expire_tokens,
                 tollgate.purge_tokens, tollgate.report_daemon, tollgate.stats to daemon;
             select tollgate.define_scope('posts:read', 'as it was')",
        )
        .await?;
    // As the older library left it.
    let tokens = ["ann", "bob", "cid"].map(|user| (user, format!("{user}'s secret")));
    for (user, secret) in &tokens {
        owner
            .execute(
                "insert into tollgate.api_tokens (id, token_hash, user_id, name, scopes, metadata, hint)
                 values (gen_random_uuid(), sha256($1::text::bytea), $2, 'old', '{posts:read}', '{}', 'tgt_0123')",
                &[secret, user],
            )
            .await?;
    }
    owner
        .batch_execute(
            "insert into tollgate.audit_log (event, user_id) select 'token.created', user_id from tollgate.api_tokens;
             insert into tollgate.token_usage (token_id, use_count, denied_count) select id, 7, 1 from tollgate.api_tokens;
             update tollgate.api_tokens set revoked_at = now() where user_id = 'cid'",
        )
        .await?;
    let daemon = cluster.connect("daemon", DATABASE).await?;
    daemon.execute("select tollgate.open_subscription('log')", &[]).await?;
    owner
        .batch_execute("insert into tollgate.audit_log (event, user_id) values ('token.created', 'later')")
        .await?;

    let web = cluster.connect("web", DATABASE).await?;
    let verdicts = async |web: &Client| -> Result<Vec<String>> {
        let mut codes = Vec::new();
        for (_, secret) in &tokens {
            let sql = "select code from tollgate.verify_api_token_hash(sha256($1::text::bytea))";
            codes.push(web.query_one(sql, &[secret]).await?.get(0));
        }
        Ok(codes)
    };
    owner.batch_execute("grant execute on function tollgate.verify_api_token_hash to web").await?;
    assert_eq!(verdicts(&web).await?, ["VALID", "VALID", "REVOKED"], "by the older schema");
    let clerk = cluster.connect("clerk", DATABASE).await?;
    let between = issue(&clerk, "eve", &["posts:read"]).await?;
    assert_eq!(code(&web, &between.token).await?, "VALID");
    let presented = "select tollgate.revoke_presented_token($1)";
    assert!(owner.query_one(presented, &[&between.token]).await?.get::<_, bool>(0));
    assert_eq!(code(&web, &between.token).await?, "REVOKED");

    update(&owner).await?;
    assert_eq!(verdicts(&web).await?, ["VALID", "VALID", "REVOKED"], "in the same session");
    let kept = value::<i64>(&owner, "select sum(use_count + denied_count)::bigint from tollgate.token_usage")
        .await?;
    assert_eq!(kept, 24);
    let scopes: String =
        value(&owner, "select description from tollgate.scopes where name = 'posts:read'").await?;
    assert_eq!(scopes, "as it was");

    // Grants stay; who was the daemon's role is an operator, and reads on where it stopped.
    let new: Token = issue(&clerk, "dan", &["posts:read"]).await?;
    assert_eq!(code(&web, &new.token).await?, "VALID");
    let state: String = value(&owner, "select string_agg(role || ' ' || capability || ' ' || state, ', ') from tollgate.capability_grants where capability is not null").await?;
    assert_eq!(state, "daemon operator granted");
    let events: String = value(
        &daemon,
        "select (tollgate.read_events(s.epoch, s.horizon, s.delivered)).events #>> '{}' from tollgate.open_subscription('log') s",
    )
    .await?;
    let told: Vec<serde_json::Value> = serde_json::from_str(&events)?;
    let users: Vec<&str> = told.iter().filter_map(|event| event["user_id"].as_str()).collect();
    assert_eq!(users, ["later", "eve", "eve", "dan"]);
    let whole: bool = value(&owner, "select whole from tollgate.verify_audit_log()").await?;
    assert!(whole);
    let sealed: i64 = value(&owner, "select events from tollgate.seal_audit_log()").await?;
    assert!(sealed >= 5, "{sealed}");
    Ok(())
}

/// The generated script without what says where in the sources it is from.
fn statements(script: &str) -> String {
    let mut text = String::new();
    let mut rest = script;
    while let Some((before, after)) = rest.split_once("/*") {
        text.push_str(before);
        rest = after.split_once("*/").map_or("", |(_, after)| after);
    }
    text.push_str(rest);
    text.lines()
        .filter(|line| !line.starts_with("-- extension/"))
        .filter(|line| !line.trim().is_empty())
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn the_install_script_of_this_release_is_frozen() -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../sql/install/tollgate--{CURRENT}.sql"));
    let frozen = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let installed = Install::under_test()?.extension_dir().join(format!("tollgate--{CURRENT}.sql"));
    let generated = std::fs::read_to_string(&installed).with_context(|| installed.display().to_string())?;
    assert!(
        statements(&frozen) == statements(&generated),
        "the schema is not that of {} any more: raise the version and write an upgrade script if {CURRENT} was released, \
         else `make freeze`",
        path.display()
    );
    Ok(())
}
