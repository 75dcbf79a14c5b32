//! An attached users table: a user who is no longer in it has no token, however the row was removed.

use crate::common::{self, Shared, Token, World, code, derive, history, issue, refused, value};
use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio_postgres::error::SqlState;
use tokio_postgres::{AsyncMessage, Client};
use tollgate_tests::DATABASE;

static SHARED: Shared = Shared::new(&[]);

const TRIGGERS: &str = "select count(*) from pg_trigger where tgname like 'tollgate%' and tgrelid = ";

/// Without requiring users: what happens to the tokens of removed users is the same.
async fn attach(client: &Client, table: &str, key: &str) -> Result<(), tokio_postgres::Error> {
    client.batch_execute(&format!("select tollgate.attach_users_table('{table}', '{key}', false)")).await
}

/// With further arguments in SQL, such as `, active => 'not banned'`.
async fn attach_with(
    client: &Client,
    table: &str,
    key: &str,
    more: &str,
) -> Result<(), tokio_postgres::Error> {
    client.batch_execute(&format!("select tollgate.attach_users_table('{table}', '{key}'{more})")).await
}

/// A token of each of these users.
async fn tokens(owner: &Client, users: &[&str]) -> Result<Vec<Token>> {
    let mut tokens = Vec::new();
    for user in users {
        tokens.push(issue(owner, user, &["posts:*"]).await?);
    }
    Ok(tokens)
}

async fn live(owner: &Client, tokens: &[Token]) -> Result<Vec<bool>> {
    let mut live = Vec::new();
    for token in tokens {
        live.push(code(owner, &token.token).await? == "VALID");
    }
    Ok(live)
}

#[tokio::test]
async fn deleting_a_user_revokes_their_tokens_whatever_the_key_is() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    for (n, (key_type, keys)) in [
        ("uuid", ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "b0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"]),
        ("integer", ["-11", "12"]),
        ("bigint", ["9223372036854775807", "21"]),
        ("smallint", ["31", "32"]),
        ("text", ["Ann \"the\" 'first'", "ben"]),
        ("varchar(20)", ["carl", "dora"]),
    ]
    .into_iter()
    .enumerate()
    {
        owner
            .batch_execute(&format!(
                "create table keys_{n} (\"the key\" {key_type}, name text);
                 insert into keys_{n} values ($${}$$), ($${}$$), (null)",
                keys[0], keys[1]
            ))
            .await?;
        attach(&owner, &format!("keys_{n}"), "the key").await?;
        let tokens = tokens(&owner, &keys).await?;
        let child = derive(&owner, &tokens[0], &["posts:read"]).await?;
        owner
            .batch_execute(&format!(
                "delete from keys_{n} where \"the key\" is null; delete from keys_{n} where \"the key\" = $${}$$",
                keys[0]
            ))
            .await?;
        assert_eq!(live(&owner, &tokens).await?, [false, true], "{key_type}");
        assert_eq!(code(&owner, &child.token).await?, "REVOKED");
        assert_eq!(
            history(&owner, tokens[0].id).await?[1..],
            [(
                "token.revoked".to_owned(),
                json!({"reason": "the user was deleted", "users_table": format!("public.keys_{n}")})
            )]
        );
        owner.batch_execute(&format!("truncate keys_{n}")).await?;
        assert_eq!(live(&owner, &tokens).await?, [false, false], "{key_type}");
    }
    Ok(())
}

#[tokio::test]
async fn many_users_at_once_are_one_notification() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    common::database(&cluster, "bulk")?;
    let bulk = cluster.connect("postgres", "bulk").await?;
    bulk.batch_execute(
        "create table users as select id from generate_series(1, 2000) id;
         select count(tollgate.create_api_token(id::text, 'n')) from users",
    )
    .await?;
    attach(&bulk, "users", "id").await?;
    let (listener, mut messages) = cluster.listen("web", "bulk").await?;
    listener.batch_execute("listen tollgate_events").await?;
    // A change that is rolled back, or that affects no token, is not notified.
    bulk.batch_execute(
        "begin; delete from users; rollback; insert into users values (0); delete from users where id = 0",
    )
    .await?;
    bulk.batch_execute("delete from users where id <= 1500").await?;
    bulk.batch_execute("truncate users").await?;
    let mut notified = Vec::new();
    let next = async {
        while notified.len() < 2 {
            let message = messages.recv().await.context("the connection ended")?;
            if let AsyncMessage::Notification(notification) = message {
                notified.push(serde_json::from_str::<Value>(notification.payload())?);
            }
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), next)
        .await
        .context("too few notifications")??;
    let of = |count: i32| json!({"event": "token.revoked", "user_id": null, "count": count});
    assert_eq!(notified, [of(1500), of(500)]);
    assert_eq!(value::<i64>(&bulk, "select count(*) from tollgate.tokens where status = 'active'").await?, 0);
    drop(owner);
    Ok(())
}

#[tokio::test]
async fn only_removed_users_lose_tokens() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    owner
        .batch_execute(
            "create table gone (id text, name text);
             insert into gone values ('g1', 'a'), ('g2', 'a'), ('g2', 'b'), ('g3', 'a'), ('g4', 'a')",
        )
        .await?;
    attach(&owner, "gone", "id").await?;
    let tokens = tokens(&owner, &["g1", "g2", "g3", "g4", "g9"]).await?;
    // Still there in another row, or put back in the same statement.
    owner.batch_execute("delete from gone where name = 'b'").await?;
    owner
        .batch_execute(
            "with d as (delete from gone where id = 'g1' returning *) insert into gone select * from d",
        )
        .await?;
    owner.batch_execute("update gone set name = 'c'; update gone set id = id").await?;
    assert_eq!(live(&owner, &tokens).await?, [true; 5]);
    // Another key is another user; two who swap keys both stay.
    owner
        .batch_execute(
            "update gone set id = case id when 'g3' then 'g4' else 'g3' end where id in ('g3', 'g4')",
        )
        .await?;
    assert_eq!(live(&owner, &tokens).await?, [true; 5]);
    owner.batch_execute("update gone set id = 'g5' where id = 'g1'").await?;
    assert_eq!(live(&owner, &tokens).await?, [false, true, true, true, true]);
    assert_eq!(history(&owner, tokens[0].id).await?[1].1["reason"], "the user has another key");
    owner.batch_execute("update gone set id = null where id = 'g2'").await?;
    assert_eq!(live(&owner, &tokens).await?, [false, false, true, true, true]);
    // Exactly those who were in it.
    owner.batch_execute("truncate gone").await?;
    assert_eq!(live(&owner, &tokens).await?, [false, false, false, false, true]);
    Ok(())
}

#[tokio::test]
async fn tokens_end_with_users_also_where_ordinary_triggers_do_not_fire() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    owner
        .batch_execute(
            "create table quiet (id text primary key, banned boolean not null default false);
             create table quiet_parts (id text primary key) partition by list (id);
             create table quiet_part partition of quiet_parts default;
             insert into quiet values ('q1'), ('q2'), ('q3'), ('q4');
             insert into quiet_parts values ('p1'), ('p2')",
        )
        .await?;
    attach_with(&owner, "quiet", "id", ", false, active => 'not banned'").await?;
    attach(&owner, "quiet_parts", "id").await?;
    let tokens = tokens(&owner, &["q1", "q2", "q3", "q4", "q5", "p1", "p2"]).await?;
    let codes = async || -> Result<String> {
        let mut codes = Vec::new();
        for token in &tokens {
            codes.push(code(&owner, &token.token).await?);
        }
        Ok(codes.join(" "))
    };
    owner
        .batch_execute(
            "set session_replication_role = replica;
             delete from quiet where id = 'q1'; delete from quiet_parts where id = 'p1';
             update quiet set banned = true where id = 'q2'; update quiet set id = 'other' where id = 'q3';
             insert into quiet values ('q5', true)",
        )
        .await?;
    assert_eq!(codes().await?, "REVOKED DISABLED REVOKED VALID DISABLED REVOKED VALID");
    owner.batch_execute("truncate quiet, quiet_parts; reset session_replication_role").await?;
    assert_eq!(codes().await?, "REVOKED REVOKED REVOKED REVOKED REVOKED REVOKED REVOKED");
    // Neither of the two triggers for deleted rows fires in the other's place.
    let revoked: i64 = value(
        &owner,
        "select count(*) from tollgate.audit_log where event = 'token.revoked' and user_id ~ '^[qp][0-9]$'",
    )
    .await?;
    assert_eq!(revoked, 7);
    Ok(())
}

#[tokio::test]
async fn a_partitioned_table_is_watched_in_every_partition() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    owner
        .batch_execute(
            "create table parts (id int, region text, primary key (id, region)) partition by list (region);
             create table parts_a partition of parts for values in ('a');
             create table parts_b partition of parts for values in ('b') partition by list (id);
             create table parts_b_rest partition of parts_b default",
        )
        .await?;
    attach(&owner, "parts", "id").await?;
    owner.batch_execute("create table parts_c partition of parts for values in ('c')").await?;
    let users = ["101", "102", "103", "104", "105", "106"];
    let tokens = tokens(&owner, &users).await?;
    owner
        .batch_execute(
            "insert into parts values (101, 'a'), (102, 'a'), (103, 'b'), (104, 'b'), (105, 'c'), (106, 'c');
             -- Moved, which is a delete and an insert of partitions, but not of a user.
             update parts set region = 'b' where id = 102",
        )
        .await?;
    assert_eq!(live(&owner, &tokens).await?, [true; 6]);
    owner.batch_execute("delete from parts where id = 101; delete from parts_b_rest where id = 102").await?;
    assert_eq!(live(&owner, &tokens).await?, [false, false, true, true, true, true]);
    owner
        .batch_execute(
            "update parts set id = 201, region = 'a' where id = 103; delete from parts_c where id = 105",
        )
        .await?;
    assert_eq!(live(&owner, &tokens).await?, [false, false, false, true, false, true]);
    owner.batch_execute("truncate parts_b").await?;
    assert_eq!(live(&owner, &tokens).await?, [false, false, false, false, false, true]);
    // A partition that came later is truncated with the whole, or by itself once it is attached too.
    attach(&owner, "parts", "id").await?;
    assert_eq!(value::<i64>(&owner, &format!("{TRIGGERS} 'parts_c'::regclass")).await?, 3);
    owner.batch_execute("truncate parts_c").await?;
    assert_eq!(live(&owner, &tokens).await?, [false; 6]);

    owner.batch_execute("create table parts_d partition of parts for values in ('d')").await?;
    let last = issue(&owner, "107", &[]).await?;
    owner.batch_execute("insert into parts values (107, 'd'); truncate parts").await?;
    assert_eq!(code(&owner, &last.token).await?, "REVOKED");
    let error = refused(attach(&owner, "parts_a", "id").await, &SqlState::WRONG_OBJECT_TYPE);
    assert!(error.detail().is_some() && error.hint().is_some(), "{error:?}");
    Ok(())
}

#[tokio::test]
async fn only_the_owner_attaches_a_table_and_deleting_needs_no_privilege_here() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    owner
        .batch_execute(
            "create role app_owner login; create role team; create role clerk login;
             grant team to app_owner;
             grant create on schema public to app_owner, team;
             grant execute on function tollgate.attach_users_table to app_owner;
             create table foreign_users (id int)",
        )
        .await?;
    let app = cluster.connect("app_owner", DATABASE).await?;
    let error = refused(attach(&app, "foreign_users", "id").await, &SqlState::INSUFFICIENT_PRIVILEGE);
    assert!(error.detail().is_some() && error.hint().is_some(), "{error:?}");
    refused(attach(&app, "tollgate.api_tokens", "user_id").await, &SqlState::INSUFFICIENT_PRIVILEGE);
    refused(attach(&app, "pg_catalog.pg_class", "oid").await, &SqlState::INSUFFICIENT_PRIVILEGE);
    assert_eq!(value::<i64>(&owner, &format!("{TRIGGERS} 'foreign_users'::regclass")).await?, 0);

    app.batch_execute(
        "create table own_users (id int, secret text);
         set role team; create table team_users (id int); reset role;
         alter table own_users enable row level security;
         grant delete, truncate on own_users to clerk; grant select (id) on own_users to clerk;
         create policy see on own_users to clerk using (id = 301);
         insert into own_users values (301), (302), (303)",
    )
    .await?;
    attach(&app, "own_users", "id").await?;
    attach(&app, "team_users", "id").await?;
    let tokens = tokens(&owner, &["301", "302", "303", "304"]).await?;
    let clerk = cluster.connect("clerk", DATABASE).await?;
    clerk.batch_execute("delete from own_users where id = 302").await?;
    assert_eq!(live(&owner, &tokens).await?, [true; 4], "row security kept it");
    clerk.batch_execute("delete from own_users where id = 301").await?;
    assert_eq!(live(&owner, &tokens).await?, [false, true, true, true]);
    clerk.batch_execute("truncate own_users").await?;
    assert_eq!(live(&owner, &tokens).await?, [false, false, false, true]);
    let actor: String = value(
        &owner,
        &format!(
            "select actor from tollgate.audit_log where token_id = '{}' and event = 'token.revoked'",
            tokens[2].id
        ),
    )
    .await?;
    assert_eq!(actor, "clerk");

    // A role cannot create a trigger with our function, on its own table, to have others' tokens revoked.
    app.batch_execute("create table bait (id text)").await?;
    for event in ["after delete on bait referencing old table as departed", "before truncate on bait"] {
        let trigger = format!(
            "create trigger t {event} for each statement execute function tollgate.revoke_departed_users('id')"
        );
        refused(app.batch_execute(&trigger).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    }
    Ok(())
}

#[tokio::test]
async fn a_key_whose_type_could_run_code_of_its_owner_is_never_read() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    owner
        .batch_execute(
            "create role typist login superuser; create role typer login;
             grant create on schema public to typer;
             grant execute on function tollgate.attach_users_table to typer",
        )
        .await?;
    let typer = cluster.connect("typer", DATABASE).await?;
    typer
        .batch_execute(
            "create type mood as enum ('x'); create domain id as mood;
             create table typed (mood mood, id id, j jsonb, a int[], n numeric, f float8, t timestamptz, d date,
                                 i interval, b bytea, c \"char\", x name)",
        )
        .await?;
    for (key, why) in [
        ("mood", "of type public.mood: its texts"),
        ("id", "of type public.id: its texts"),
        ("j", "jsonb"),
        ("a", "integer[]"),
        ("n", "of type numeric: equal numbers have several texts"),
        ("f", "depends on settings"),
        ("t", "depends on settings"),
        ("d", "depends on settings"),
        ("i", "depends on settings"),
        ("b", "depends on settings"),
        ("c", "char"),
        ("x", "name"),
    ] {
        let error = refused(attach(&typer, "typed", key).await, &SqlState::DATATYPE_MISMATCH);
        assert!(error.detail().is_some_and(|detail| detail.contains(why)), "{error:?}");
        assert!(error.hint().is_some_and(|hint| hint.contains("STORED")), "{error:?}");
    }
    for (key, state) in [("nothing", SqlState::UNDEFINED_COLUMN), ("ctid", SqlState::UNDEFINED_COLUMN)] {
        refused(attach(&typer, "typed", key).await, &state);
    }
    // Nor is one that was given such a type later; then the delete fails.
    typer.batch_execute("create table later (id text); insert into later values ('x')").await?;
    attach(&typer, "later", "id").await?;
    typer.batch_execute("alter table later alter id type mood using id::mood").await?;
    for change in ["delete from later", "truncate later"] {
        refused(typer.batch_execute(change).await, &SqlState::DATATYPE_MISMATCH);
    }
    typer.batch_execute("alter table later rename id to key").await?;
    refused(typer.batch_execute("delete from later").await, &SqlState::DATATYPE_MISMATCH);
    Ok(())
}

#[tokio::test]
async fn attaching_again_does_nothing_and_by_another_column_is_refused() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    owner
        .batch_execute(
            "create table again (id int, other int); create view looking as select * from again;
             create temp table passing (id int)",
        )
        .await?;
    for _ in 0..3 {
        attach(&owner, "again", "id").await?;
        assert_eq!(value::<i64>(&owner, &format!("{TRIGGERS} 'again'::regclass")).await?, 4);
    }
    let error = refused(attach(&owner, "again", "other").await, &SqlState::DUPLICATE_OBJECT);
    assert!(error.detail().is_some() && error.hint().is_some(), "{error:?}");
    refused(attach(&owner, "looking", "id").await, &SqlState::WRONG_OBJECT_TYPE);
    for nulls in ["null, 'id'", "'again', null"] {
        let call = format!("select tollgate.attach_users_table({nulls})");
        assert!(common::error(owner.batch_execute(&call).await).detail().is_some(), "{nulls}");
    }

    // The table is its owner's, and remains when the extension is dropped.
    common::database(&cluster, "dropped")?;
    let dropped = cluster.connect("postgres", "dropped").await?;
    dropped.batch_execute("create table users (id int); insert into users values (1)").await?;
    attach(&dropped, "users", "id").await?;
    dropped.batch_execute("drop extension tollgate; delete from users; truncate users").await?;
    assert_eq!(value::<i64>(&dropped, &format!("{TRIGGERS} 'users'::regclass")).await?, 0);
    Ok(())
}

#[tokio::test]
async fn no_token_is_overlooked_in_an_old_snapshot() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    owner.batch_execute("create table aged (id text); insert into aged values ('aged')").await?;
    attach(&owner, "aged", "id").await?;
    let old = cluster.connect("postgres", DATABASE).await?;
    old.batch_execute("begin isolation level repeatable read; select from aged").await?;
    let token = issue(&owner, "aged", &[]).await?;
    for (change, state) in [
        ("delete from aged", SqlState::T_R_SERIALIZATION_FAILURE),
        ("update aged set id = 'young'", SqlState::T_R_SERIALIZATION_FAILURE),
        ("truncate aged", SqlState::INVALID_TRANSACTION_STATE),
    ] {
        old.batch_execute("savepoint s").await?;
        refused(old.batch_execute(change).await, &state);
        old.batch_execute("rollback to s").await?;
    }
    old.batch_execute("rollback; begin isolation level repeatable read; delete from aged; commit").await?;
    assert_eq!(code(&owner, &token.token).await?, "REVOKED");
    Ok(())
}

#[tokio::test]
async fn a_table_with_a_virtual_key_or_shared_rows_is_not_attached() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    owner
        .batch_execute(
            "create table stored (n int, key text generated always as ('stored ' || n) stored);
             insert into stored values (1), (2);
             create table above (id int); create table below () inherits (above);
             create foreign data wrapper nowhere; create server elsewhere foreign data wrapper nowhere;
             create foreign table far (id int) server elsewhere;
             create table far_parts (id int) partition by range (id);
             create foreign table far_part partition of far_parts for values from (0) to (9) server elsewhere;
             create view seen as select 1 as id;
             create materialized view kept as select 1 as id",
        )
        .await?;
    for table in ["above", "below", "far", "far_parts", "seen", "kept"] {
        let error = refused(attach(&owner, table, "id").await, &SqlState::WRONG_OBJECT_TYPE);
        assert!(error.hint().is_some(), "{error:?}");
        assert_eq!(value::<i64>(&owner, &format!("{TRIGGERS} '{table}'::regclass")).await?, 0, "{table}");
    }
    attach(&owner, "stored", "key").await?;
    let stored = tokens(&owner, &["stored 1", "stored 2", "stored 3"]).await?;
    owner.batch_execute("delete from stored where n = 1").await?;
    assert_eq!(live(&owner, &stored).await?, [false, true, true]);
    owner.batch_execute("update stored set n = 3 where n = 2").await?;
    assert_eq!(live(&owner, &stored).await?, [false, false, true]);
    owner.batch_execute("truncate stored").await?;
    assert_eq!(live(&owner, &stored).await?, [false, false, false]);

    if value::<i32>(&owner, "select current_setting('server_version_num')::int").await? < 180_000 {
        return Ok(());
    }
    owner
        .batch_execute(
            "create table virtual (n int, key text generated always as ('virtual ' || n) virtual);
             insert into virtual values (1)",
        )
        .await?;
    let error = refused(attach(&owner, "virtual", "key").await, &SqlState::WRONG_OBJECT_TYPE);
    assert!(error.detail().is_some_and(|detail| detail.contains("virtual generated column")), "{error:?}");
    assert!(error.hint().is_some_and(|hint| hint.contains("STORED")), "{error:?}");
    // Nor does it become one behind our back.
    owner
        .batch_execute("create table turned (n int, key text); insert into turned values (1, 'later 1')")
        .await?;
    attach(&owner, "turned", "key").await?;
    let later = tokens(&owner, &["later 1"]).await?;
    owner
        .batch_execute(
            "alter table turned drop column key;
             alter table turned add column key text generated always as ('later ' || n) virtual",
        )
        .await?;
    for statement in ["delete from turned", "truncate turned"] {
        let error = refused(owner.batch_execute(statement).await, &SqlState::UNDEFINED_COLUMN);
        assert!(error.hint().is_some_and(|hint| hint.contains("Attach it again")), "{error:?}");
    }
    assert_eq!(live(&owner, &later).await?, [true]);
    Ok(())
}

// ---- As strong as a foreign key

/// Each way to issue a token for a user; `live` already has one.
fn issuing(user: &str, live: &Token) -> [String; 4] {
    [
        format!("select tollgate.create_api_token('{user}', 'n')"),
        format!("select tollgate.import_api_token('{user}', 'n', sha256(random()::text::bytea))"),
        format!("select tollgate.rotate_api_token('{}', '1 hour')", live.id),
        format!("select tollgate.derive_api_token('{}', 'n', '{{}}', null)", live.token),
    ]
}

async fn count(owner: &Client) -> Result<i64> {
    value(
        owner,
        "select (select count(*) from tollgate.api_tokens) + (select count(*) from tollgate.audit_log)",
    )
    .await
}

#[tokio::test]
async fn a_token_is_issued_for_an_existing_user_and_for_no_other() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "required")?;
    let owner = cluster.connect("postgres", "required").await?;
    let early = issue(&owner, "early", &[]).await?;
    owner
        .batch_execute(
            "create schema app; create table app.users (id text primary key); insert into app.users values ('ann')",
        )
        .await?;
    attach_with(&owner, "app.users", "id", "").await?;
    // An existing token does not change, but no other can come from it.
    assert_eq!(code(&owner, &early.token).await?, "VALID");
    let before = count(&owner).await?;
    for call in issuing("early", &early) {
        let error = refused(owner.batch_execute(&call).await, &SqlState::FOREIGN_KEY_VIOLATION);
        assert_eq!(error.detail(), Some("Argument: user_id, which is no key in app.users (id)."), "{call}");
        assert!(error.hint().is_some_and(|hint| hint.contains("require_user")), "{error:?}");
    }
    assert_eq!(count(&owner).await?, before, "nothing is half done");
    let ann = issue(&owner, "ann", &[]).await?;
    for call in issuing("ann", &ann) {
        owner.batch_execute(&call).await.with_context(|| call)?;
    }
    owner
        .batch_execute("begin; insert into app.users values ('new'); select tollgate.create_api_token('new', 'n'); commit")
        .await?;

    // With several tables, a user must be in one of them.
    owner
        .batch_execute("create table robots (\"the id\" int primary key); insert into robots values (7)")
        .await?;
    attach_with(&owner, "robots", "the id", "").await?;
    for user in ["ann", "7"] {
        issue(&owner, user, &[]).await?;
    }
    for user in ["8", "07", "+7", " 7", "7 ", "99999999999999999999", "Ann"] {
        let call = format!("select tollgate.create_api_token('{user}', 'n')");
        let error = refused(owner.batch_execute(&call).await, &SqlState::FOREIGN_KEY_VIOLATION);
        assert_eq!(
            error.detail(),
            Some("Argument: user_id, which is no key in app.users (id), nor in public.robots (\"the id\").")
        );
    }
    assert_eq!(
        value::<String>(
            &owner,
            "select string_agg(concat_ws(' ', l.\"table\", l.key_column, l.require_user), '|') from tollgate.list_users_tables() l"
        )
        .await?,
        "app.users id t|robots \"the id\" t"
    );
    // A table that does not require users is also checked while another does, and no longer after that.
    attach_with(&owner, "robots", "the id", ", require_user => false").await?;
    issue(&owner, "7", &[]).await?;
    refused(
        owner.batch_execute("select tollgate.create_api_token('8', 'n')").await,
        &SqlState::FOREIGN_KEY_VIOLATION,
    );
    assert!(value::<bool>(&owner, "select tollgate.detach_users_table('app.users')").await?);
    assert!(!value::<bool>(&owner, "select tollgate.detach_users_table('app.users')").await?);
    issue(&owner, "8", &[]).await?;
    // Attaching again leaves arguments that are not given unchanged.
    attach_with(&owner, "robots", "the id", "").await?;
    issue(&owner, "9", &[]).await?;
    owner.batch_execute("drop table robots, app.users").await?;
    issue(&owner, "10", &[]).await?;
    Ok(())
}

#[tokio::test]
async fn no_token_outlives_a_user_who_is_deleted_while_it_is_issued() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "leaving")?;
    let owner = cluster.connect("postgres", "leaving").await?;
    let other = cluster.connect("postgres", "leaving").await?;
    for (n, (table, leave)) in [
        ("create table users (id text primary key)", "delete from users"),
        ("create table users (id text primary key)", "update users set id = 'other'"),
        ("create table users (id text)", "update users set id = 'other'"),
        ("create table users (id text primary key)", "truncate users"),
        (
            "create table users (id text primary key) partition by hash (id);
             create table part partition of users for values with (modulus 1, remainder 0)",
            "delete from part",
        ),
        (
            "create table users (id text primary key) partition by hash (id);
             create table part partition of users for values with (modulus 1, remainder 0)",
            "update users set id = 'other'",
        ),
        (
            "create table users (id text primary key) partition by hash (id);
             create table part partition of users for values with (modulus 1, remainder 0)",
            "truncate part",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        for way in 0..4 {
            let what = format!("{table}, {leave}, {way}");
            owner.batch_execute(&format!("{table}; insert into users values ('ann')")).await?;
            attach_with(&owner, "users", "id", "").await?;
            let live = issue(&owner, "ann", &[]).await?;
            let call = &issuing("ann", &live)[way];
            owner.batch_execute(&format!("begin; {call}")).await?;
            let (left, committed) = tokio::join!(other.batch_execute(leave), async {
                common::wait_until_blocked(&owner).await?;
                owner.batch_execute("commit").await?;
                anyhow::Ok(())
            });
            left.with_context(|| what.clone())?;
            committed.with_context(|| what.clone())?;
            let alive = "select count(*) from tollgate.api_tokens where revoked_at is null";
            assert_eq!(value::<i64>(&owner, alive).await?, 0, "{what}");

            // The other way round: the deletion comes first.
            if n < 2 && way < 2 {
                other.batch_execute("truncate users; insert into users values ('ann')").await?;
                for (level, refusal) in [
                    ("read committed", SqlState::FOREIGN_KEY_VIOLATION),
                    ("repeatable read", SqlState::T_R_SERIALIZATION_FAILURE),
                    ("serializable", SqlState::T_R_SERIALIZATION_FAILURE),
                ] {
                    other.batch_execute("begin").await?;
                    other.batch_execute(leave).await?;
                    owner.batch_execute(&format!("begin isolation level {level}; select")).await?;
                    let (issued, committed) = tokio::join!(owner.batch_execute(call), async {
                        common::wait_until_blocked(&other).await?;
                        other
                            .batch_execute("commit; truncate users; insert into users values ('ann')")
                            .await?;
                        anyhow::Ok(())
                    });
                    refused(issued, &refusal);
                    committed?;
                    owner.batch_execute("rollback").await?;
                }
            }
            owner.batch_execute("drop table users").await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_table_is_attached_before_a_token_is_issued_or_after_it_is_committed() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "attaching")?;
    let owner = cluster.connect("postgres", "attaching").await?;
    let other = cluster.connect("postgres", "attaching").await?;
    owner.batch_execute("create table users (id text primary key); insert into users values ('ann')").await?;
    owner.batch_execute("begin; select tollgate.create_api_token('ann', 'n')").await?;
    let (attached, committed) = tokio::join!(attach_with(&other, "users", "id", ""), async {
        common::wait_until_blocked(&owner).await?;
        anyhow::Ok(owner.batch_execute("commit").await?)
    });
    attached?;
    committed?;
    other.batch_execute("delete from users").await?;
    let live = "select count(*) from tollgate.api_tokens where revoked_at is null";
    assert_eq!(value::<i64>(&owner, live).await?, 0);

    // A session that issues meanwhile waits, and then follows the attached table.
    other
        .batch_execute("select tollgate.detach_users_table('users'); begin; select tollgate.attach_users_table('users', 'id')")
        .await?;
    let (issued, committed) =
        tokio::join!(owner.batch_execute("select tollgate.create_api_token('ben', 'n')"), async {
            common::wait_until_blocked(&other).await?;
            anyhow::Ok(other.batch_execute("commit").await?)
        });
    refused(issued, &SqlState::FOREIGN_KEY_VIOLATION);
    committed?;
    Ok(())
}

#[tokio::test]
async fn issuing_does_not_wait_for_changes_that_do_not_concern_it() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "aside")?;
    let owner = cluster.connect("postgres", "aside").await?;
    let other = cluster.connect("postgres", "aside").await?;
    owner
        .batch_execute("create table users (id int primary key, seen int); insert into users values (1), (2)")
        .await?;
    attach_with(&owner, "users", "id", "").await?;
    other
        .batch_execute("begin; update users set seen = 1 where id = 1; delete from users where id = 2")
        .await?;
    owner.batch_execute("set lock_timeout = '5s'; select tollgate.create_api_token('1', 'n')").await?;
    other.batch_execute("commit").await?;
    // A snapshot that is older than the user does not show them, as for a foreign key.
    owner.batch_execute("begin isolation level repeatable read; select").await?;
    other.batch_execute("insert into users values (3)").await?;
    refused(
        owner.batch_execute("select tollgate.create_api_token('3', 'n')").await,
        &SqlState::FOREIGN_KEY_VIOLATION,
    );
    owner.batch_execute("rollback; begin isolation level serializable; select tollgate.create_api_token('3', 'n'); commit").await?;
    Ok(())
}

#[tokio::test]
async fn a_key_is_compared_byte_for_byte_whatever_its_collation_says() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "bytes")?;
    let owner = cluster.connect("postgres", "bytes").await?;
    // Not every PostgreSQL is built with ICU.
    let collation = "create collation ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false)";
    let key_type = if owner.batch_execute(collation).await.is_ok() { "text collate ci" } else { "text" };
    owner
        .batch_execute(&format!(
            "create table users (login {key_type} primary key); insert into users values ('Ann'), ('Ben'), ('Cid')"
        ))
        .await?;
    attach_with(&owner, "users", "login", "").await?;
    let tokens = tokens(&owner, &["Ann", "Ben", "Cid"]).await?;
    refused(
        owner.batch_execute("select tollgate.create_api_token('ann', 'n')").await,
        &SqlState::FOREIGN_KEY_VIOLATION,
    );
    owner.batch_execute("update users set login = login").await?;
    assert_eq!(live(&owner, &tokens).await?, [true; 3]);
    owner.batch_execute("update users set login = 'ann' where login = 'Ann'").await?;
    assert_eq!(live(&owner, &tokens).await?, [false, true, true], "another key");
    owner.batch_execute("delete from users where lower(login) = 'ben'").await?;
    assert_eq!(live(&owner, &tokens).await?, [false, false, true]);
    owner.batch_execute("truncate users").await?;
    assert_eq!(live(&owner, &tokens).await?, [false; 3]);

    // Padding is not part of the text; a domain counts as its base type, and its checks are not evaluated.
    owner
        .batch_execute(
            "create domain id as int check (value < 100); create domain person as id;
             create table padded (k char(9) primary key); insert into padded values ('dan'), ('eve');
             create table people (k person primary key, v varchar(9) collate \"C\" unique);
             insert into people values (1, 'x'), (2, 'y')",
        )
        .await?;
    owner.batch_execute("select tollgate.detach_users_table('users')").await?;
    attach_with(&owner, "padded", "k", "").await?;
    attach_with(&owner, "people", "k", "").await?;
    let tokens = self::tokens(&owner, &["dan", "eve", "1", "2"]).await?;
    for user in ["dan ", "dan      ", "01"] {
        let call = format!("select tollgate.create_api_token('{user}', 'n')");
        refused(owner.batch_execute(&call).await, &SqlState::FOREIGN_KEY_VIOLATION);
    }
    owner.batch_execute("delete from padded where k = 'dan'; delete from people where k = 1").await?;
    assert_eq!(live(&owner, &tokens).await?, [false, true, false, true]);
    owner.batch_execute("update padded set k = 'eva'; update people set k = 3").await?;
    assert_eq!(live(&owner, &tokens).await?, [false; 4]);
    Ok(())
}

#[tokio::test]
async fn an_attached_table_goes_through_its_migrations() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "migrated")?;
    let owner = cluster.connect("postgres", "migrated").await?;
    for (n, (kind, parts)) in [
        ("", ""),
        (
            "partition by hash (id)",
            "create table part_1 (x text, id int not null); alter table part_1 drop column x;
            alter table users_1 attach partition part_1 for values with (modulus 1, remainder 0);",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let table = format!("users_{n}");
        owner
            .batch_execute(&format!(
                "create table {table} (old text, id int not null) {kind}; alter table {table} drop column old; {parts}
                 insert into {table} select generate_series(1, 6)"
            ))
            .await?;
        attach_with(&owner, &table, "id", "").await?;
        let tokens = tokens(&owner, &["1", "2", "3", "4", "5", "6"]).await?;
        if n == 0 {
            owner.batch_execute("alter table users_0 alter column id type bigint").await?;
        }
        owner.batch_execute(&format!("delete from {table} where id = 1")).await?;
        assert_eq!(live(&owner, &tokens).await?, [false, true, true, true, true, true]);
        // The trigger follows the column, whatever it is called, and whatever has its old name.
        owner
            .batch_execute(&format!(
                "alter table {table} rename id to uid; alter table {table} add column id text;
                 update {table} set id = 'x'; delete from {table} where uid = 2; update {table} set uid = 20 where uid = 3"
            ))
            .await?;
        assert_eq!(live(&owner, &tokens).await?, [false, false, false, true, true, true]);
        issue(&owner, "20", &[]).await?;
        refused(
            owner.batch_execute("select tollgate.create_api_token('x', 'n')").await,
            &SqlState::FOREIGN_KEY_VIOLATION,
        );
        let error = refused(attach_with(&owner, &table, "id", "").await, &SqlState::DUPLICATE_OBJECT);
        assert!(error.detail().is_some_and(|detail| detail.contains("uid")), "{error:?}");
        // Attaching again records the column's current name, which a dump includes.
        attach_with(&owner, &table, "uid", "").await?;
        let named = format!(
            "select count(*) from pg_trigger where tgrelid = '{table}'::regclass and tgargs::text not like '%\\x756964%'"
        );
        assert_eq!(value::<i64>(&owner, &named).await?, 0);
        owner.batch_execute(&format!("delete from {table} where uid = 4")).await?;
        assert_eq!(live(&owner, &tokens[3..4]).await?, [false]);
        if n == 0 {
            owner
                .batch_execute("alter table users_0 alter uid type text; delete from users_0 where uid = '5'")
                .await?;
            assert_eq!(live(&owner, &tokens[4..5]).await?, [false]);
        }
        // Without its column nothing is known about a user: that is refused, with a hint.
        if n == 0 {
            owner.batch_execute("alter table users_0 drop column uid").await?;
            for statement in [
                "delete from users_0",
                "update users_0 set id = 'y'",
                "select tollgate.create_api_token('6', 'n')",
            ] {
                let error = refused(owner.batch_execute(statement).await, &SqlState::UNDEFINED_COLUMN);
                assert!(error.hint().is_some_and(|hint| hint.contains("Attach it again")), "{error:?}");
            }
            owner
                .batch_execute("select tollgate.detach_users_table('users_0'); update users_0 set id = '6'")
                .await?;
            attach_with(&owner, "users_0", "id", "").await?;
            owner.batch_execute("delete from users_0 where id = '6'").await?;
            assert_eq!(live(&owner, &tokens[5..]).await?, [false]);
        }
        owner.batch_execute(&format!("drop table {table}")).await?;
    }

    // As restored from a dump of another cluster: numbers have no meaning there.
    owner
        .batch_execute(
            "create table restored (other text, id int); insert into restored values ('ann', 1);
             create trigger tollgate_user_changed after insert or update on restored for each row
                 execute function tollgate.users_row_changed('id', 'true', 'refuse', 'other is not null', '1 1 1 1')",
        )
        .await?;
    let token = issue(&owner, "1", &[]).await?;
    owner.batch_execute("update restored set other = null").await?;
    assert_eq!(code(&owner, &token.token).await?, "DISABLED");
    owner.batch_execute("update restored set other = 'x'").await?;
    assert_eq!(code(&owner, &token.token).await?, "VALID");
    owner.batch_execute("update restored set id = 2").await?;
    assert_eq!(code(&owner, &token.token).await?, "REVOKED");
    Ok(())
}

// ---- Inactive users

#[tokio::test]
async fn users_whose_deleted_at_is_set_are_inactive_unless_a_condition_says_otherwise() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "soft_delete")?;
    let owner = cluster.connect("postgres", "soft_delete").await?;
    owner
        .batch_execute(
            "create table users (id text primary key, deleted_at timestamptz); insert into users values ('ann')",
        )
        .await?;
    attach(&owner, "users", "id").await?;
    let token = issue(&owner, "ann", &[]).await?.token;
    owner.batch_execute("update users set deleted_at = now()").await?;
    assert_eq!(code(&owner, &token).await?, "DISABLED");
    attach(&owner, "users", "id").await?;
    assert_eq!(code(&owner, &token).await?, "DISABLED", "attached again");
    attach_with(&owner, "users", "id", ", active => 'true'").await?;
    assert_eq!(code(&owner, &token).await?, "VALID");
    attach(&owner, "users", "id").await?;
    assert_eq!(code(&owner, &token).await?, "VALID", "what was said stays");
    Ok(())
}

#[tokio::test]
async fn the_tokens_of_a_deactivated_user_are_refused_until_the_user_is_active_again() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "switched")?;
    let owner = cluster.connect("postgres", "switched").await?;
    owner
        .batch_execute(
            "create table users (id text primary key, deleted_at timestamptz, seen int);
             insert into users values ('ann', null), ('ben', now())",
        )
        .await?;
    let ben = issue(&owner, "ben", &[]).await?;
    attach_with(&owner, "users", "id", ", active => 'deleted_at IS NULL'").await?;
    assert_eq!(code(&owner, &ben.token).await?, "DISABLED", "switched off before");
    let ann = issue(&owner, "ann", &["posts:*"]).await?;
    let child = derive(&owner, &ann, &["posts:read"]).await?;
    let blocked = issue(&owner, "ann", &[]).await?;
    common::enable(&owner, blocked.id, false).await?;
    let all = [ann.clone(), child.clone(), blocked.clone()];
    let codes = async || {
        let mut codes = Vec::new();
        for token in &all {
            codes.push(code(&owner, &token.token).await?);
        }
        anyhow::Ok(codes)
    };
    owner.batch_execute("update users set seen = 1").await?;
    assert_eq!(codes().await?, ["VALID", "VALID", "DISABLED"]);
    owner.batch_execute("update users set deleted_at = now() where id = 'ann'").await?;
    assert_eq!(codes().await?, ["DISABLED"; 3]);
    let reason = json!({"reason": "the user is not active", "users_table": "public.users"});
    assert_eq!(history(&owner, child.id).await?[1..], [("token.disabled".to_owned(), reason)]);

    // Nothing enables a token of such a user.
    let before = count(&owner).await?;
    let [create, import, rotate, derived] = issuing("ann", &ann);
    for (call, state) in [
        (create, SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE),
        (rotate, SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE),
        (derived, SqlState::INVALID_AUTHORIZATION_SPECIFICATION),
        (
            format!("select tollgate.set_api_token_enabled('{}', true)", ann.id),
            SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
        ),
        (
            format!("select tollgate.set_api_token_enabled('{}', true)", blocked.id),
            SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
        ),
    ] {
        let error = refused(owner.batch_execute(&call).await, &state);
        assert!(error.detail().is_some() && error.hint().is_some(), "{call}: {error:?}");
    }
    assert_eq!(count(&owner).await?, before);
    owner.batch_execute(&import).await?;
    let imported = "select status from tollgate.tokens where hint = 'imported'";
    assert_eq!(value::<String>(&owner, imported).await?, "disabled");

    // A token that an operator disables meanwhile, or disabled before, stays disabled.
    assert!(common::enable(&owner, child.id, false).await?);
    assert!(!common::enable(&owner, child.id, false).await?);
    owner.batch_execute("update users set deleted_at = null").await?;
    assert_eq!(codes().await?, ["VALID", "DISABLED", "DISABLED"]);
    assert_eq!(value::<String>(&owner, imported).await?, "active");
    assert_eq!(code(&owner, &ben.token).await?, "VALID");
    let reason = json!({"reason": "the user is active again", "users_table": "public.users"});
    assert_eq!(history(&owner, ann.id).await?.last(), Some(&("token.enabled".to_owned(), reason)));
    assert!(common::enable(&owner, child.id, true).await? && common::enable(&owner, blocked.id, true).await?);
    // Disabled through a parent while the user was inactive.
    owner.batch_execute("update users set deleted_at = now()").await?;
    assert!(common::enable(&owner, ann.id, false).await?);
    owner.batch_execute("update users set deleted_at = null").await?;
    assert_eq!(codes().await?, ["DISABLED", "DISABLED", "VALID"]);
    assert!(common::enable(&owner, ann.id, true).await?);
    assert_eq!(codes().await?, ["VALID"; 3]);

    // In two tables: a user who is inactive in one is inactive.
    owner
        .batch_execute(
            "create table bans (id text primary key, banned boolean); insert into bans values ('ann', true)",
        )
        .await?;
    attach_with(&owner, "bans", "id", ", active => 'banned is not true'").await?;
    assert_eq!(codes().await?, ["DISABLED"; 3]);
    owner.batch_execute("update users set deleted_at = now(); update users set deleted_at = null").await?;
    assert_eq!(codes().await?, ["DISABLED"; 3]);
    owner.batch_execute("update bans set banned = false").await?;
    assert_eq!(codes().await?, ["VALID"; 3]);
    // A token that was disabled with its user can be enabled once no table says so any more.
    owner.batch_execute("update bans set banned = true; select tollgate.detach_users_table('bans')").await?;
    assert_eq!(codes().await?, ["DISABLED"; 3]);
    assert!(common::enable(&owner, ann.id, true).await?);
    assert_eq!(codes().await?, ["VALID", "VALID", "DISABLED"]);
    Ok(())
}

#[tokio::test]
async fn the_tokens_of_a_deactivated_user_are_revoked_where_that_is_configured() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "revoking")?;
    let owner = cluster.connect("postgres", "revoking").await?;
    owner
        .batch_execute(
            "create table users (id int not null, active boolean, region text, primary key (id, region)) partition by list (region);
             create table users_a partition of users for values in ('a');
             create table users_b partition of users for values in ('b');
             insert into users values (1, true, 'a'), (2, true, 'a'), (3, true, 'b'), (4, true, 'a')",
        )
        .await?;
    attach_with(&owner, "users", "id", ", active => 'active', on_inactive => 'revoke'").await?;
    let tokens = tokens(&owner, &["1", "2", "3", "4"]).await?;
    owner
        .batch_execute("update users_a set active = false where id = 1; update users set active = null, region = 'b' where id = 2")
        .await?;
    assert_eq!(live(&owner, &tokens).await?, [false, false, true, true]);
    assert_eq!(history(&owner, tokens[0].id).await?[1].1["reason"], "the user is not active");
    owner.batch_execute("update users set active = true").await?;
    assert_eq!(live(&owner, &tokens).await?, [false, false, true, true]);
    // Another row with the same key keeps a user active, and a new one makes them active.
    attach_with(&owner, "users", "id", ", on_inactive => 'refuse'").await?;
    owner.batch_execute("insert into users values (3, true, 'a'); update users_b set active = false").await?;
    assert_eq!(live(&owner, &tokens[2..]).await?, [true, true]);
    owner.batch_execute("delete from users_a where id = 3").await?;
    assert_eq!(live(&owner, &tokens[2..]).await?, [false, true]);
    owner.batch_execute("insert into users values (3, true, 'a')").await?;
    assert_eq!(live(&owner, &tokens[2..]).await?, [true, true]);
    Ok(())
}

#[tokio::test]
async fn a_condition_is_one_immutable_expression_over_the_row() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "conditions")?;
    let owner = cluster.connect("postgres", "conditions").await?;
    owner
        .batch_execute(
            "create table users (id int primary key, until timestamptz, banned boolean, \"group\" text)",
        )
        .await?;
    for (condition, state) in [
        ("until > now()", SqlState::INVALID_PARAMETER_VALUE),
        ("random() < 0.5", SqlState::INVALID_PARAMETER_VALUE),
        ("exists (select 1)", SqlState::INVALID_PARAMETER_VALUE),
        ("count(*) > 0", SqlState::INVALID_PARAMETER_VALUE),
        ("true) from users where (true", SqlState::SYNTAX_ERROR),
        ("true), (true", SqlState::INVALID_PARAMETER_VALUE),
        ("true); drop table users; select (true", SqlState::INVALID_PARAMETER_VALUE),
        ("id", SqlState::INVALID_PARAMETER_VALUE),
        ("xmax = 0", SqlState::INVALID_PARAMETER_VALUE),
        ("nothing", SqlState::UNDEFINED_COLUMN),
        ("", SqlState::INVALID_PARAMETER_VALUE),
        ("  ", SqlState::INVALID_PARAMETER_VALUE),
    ] {
        let call = format!("select tollgate.attach_users_table('users', 'id', active => $${condition}$$)");
        let error = common::error(owner.batch_execute(&call).await);
        assert_eq!(error.code(), &state, "{condition}: {error:?}");
    }
    assert_eq!(value::<i64>(&owner, &format!("{TRIGGERS} 'users'::regclass")).await?, 0);
    for wrong in [", on_inactive => 'refuse'", ", active => 'true', on_inactive => 'x'"] {
        refused(attach_with(&owner, "users", "id", wrong).await, &SqlState::INVALID_PARAMETER_VALUE);
    }
    owner.batch_execute("insert into users values (1)").await?;
    let token = issue(&owner, "1", &[]).await?;
    for (condition, off, on) in [
        ("banned is not true -- by hand", "banned = true", "banned = false"),
        ("users.until is null", "until = now()", "until = null"),
        ("\"group\" is distinct from 'off'", "\"group\" = 'off'", "\"group\" = 'on'"),
        (
            "users.* is distinct from row(1, null, true, null)::public.users",
            "banned = true, until = null, \"group\" = null",
            "banned = false",
        ),
    ] {
        let call = format!("select tollgate.attach_users_table('users', 'id', active => $${condition}$$)");
        owner.batch_execute(&call).await.with_context(|| condition)?;
        assert_eq!(code(&owner, &token.token).await?, "VALID", "{condition}");
        owner.batch_execute(&format!("update users set {off}")).await?;
        assert_eq!(code(&owner, &token.token).await?, "DISABLED", "{condition}");
        owner.batch_execute(&format!("update users set {on}")).await?;
        assert_eq!(code(&owner, &token.token).await?, "VALID", "{condition}");
    }
    Ok(())
}

/// Revoking locks tokens and then changes them. One that got in between with a lock of the table would wait for the first
/// while it keeps the second from going on.
#[tokio::test]
async fn attaching_waits_for_those_who_have_locked_tokens_and_are_about_to_change_them() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "about_to")?;
    let owner = cluster.connect("postgres", "about_to").await?;
    let other = cluster.connect("postgres", "about_to").await?;
    owner
        .batch_execute("create table users (id text primary key, gone boolean not null default false); insert into users values ('ann')")
        .await?;
    issue(&owner, "ann", &[]).await?;
    owner.batch_execute("begin; select from tollgate.api_tokens for update").await?;
    let (attached, changed) =
        tokio::join!(attach_with(&other, "users", "id", ", active => 'not gone'"), async {
            common::wait_until_blocked(&owner).await?;
            anyhow::Ok(owner.batch_execute("update tollgate.api_tokens set name = 'other'; commit").await?)
        });
    changed?;
    attached?;
    Ok(())
}

#[tokio::test]
async fn attaching_a_table_names_a_column_that_seems_to_deactivate_users() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "advised")?;
    let (owner, mut messages) = cluster.listen("postgres", "advised").await?;
    for (column, condition) in [
        ("is_active boolean", "is_active"),
        ("banned boolean", "NOT banned"),
        ("\"disabled_at\" date", "disabled_at IS NULL"),
        ("deleted text", ""),
        ("activity boolean", ""),
    ] {
        owner
            .batch_execute(&format!(
                "create table users (id int primary key, {column}); select tollgate.attach_users_table('users', 'id');
                 drop table users; do $$ begin raise notice 'done'; end $$"
            ))
            .await?;
        let mut hints = Vec::new();
        while let Some(message) = messages.recv().await {
            let AsyncMessage::Notice(notice) = message else { continue };
            if notice.message() == "done" {
                break;
            }
            hints.push(notice.hint().unwrap_or_default().to_owned());
        }
        let expected = format!("Attach it again with active => '{condition}'.");
        assert_eq!(hints, if condition.is_empty() { vec![] } else { vec![expected] }, "{column}");
    }
    Ok(())
}
