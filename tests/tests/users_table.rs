//! A table of users that is attached: whoever is not in it any more has no token, however the row went.

mod common;

use anyhow::{Context as _, Result};
use common::{Shared, Token, World, code, derive, history, issue, refused, value};
use serde_json::{Value, json};
use tokio_postgres::error::SqlState;
use tokio_postgres::{AsyncMessage, Client};
use tollgate_tests::DATABASE;

static SHARED: Shared = Shared::new(&[]);

const TRIGGERS: &str = "select count(*) from pg_trigger where tgname like 'tollgate%' and tgrelid = ";

async fn attach(client: &Client, table: &str, key: &str) -> Result<(), tokio_postgres::Error> {
    client.batch_execute(&format!("select tollgate.attach_users_table('{table}', '{key}')")).await
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
    // Nobody is told of a change that is undone, or that concerns no token.
    bulk.batch_execute(
        "begin; delete from users; rollback; insert into users values (0); delete from users where id = 0",
    )
    .await?;
    bulk.batch_execute("delete from users where id <= 1500").await?;
    bulk.batch_execute("truncate users").await?;
    let mut told = Vec::new();
    let next = async {
        while told.len() < 2 {
            let message = messages.recv().await.context("the connection ended")?;
            if let AsyncMessage::Notification(notification) = message {
                told.push(serde_json::from_str::<Value>(notification.payload())?);
            }
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), next)
        .await
        .context("too few notifications")??;
    let of = |count: i32| json!({"event": "token.revoked", "user_id": null, "count": count});
    assert_eq!(told, [of(1500), of(500)]);
    assert_eq!(value::<i64>(&bulk, "select count(*) from tollgate.tokens where status = 'active'").await?, 0);
    drop(owner);
    Ok(())
}

#[tokio::test]
async fn only_who_is_gone_loses_tokens() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    owner
        .batch_execute(
            "create table gone (id text, name text);
             insert into gone values ('g1', 'a'), ('g2', 'a'), ('g2', 'b'), ('g3', 'a'), ('g4', 'a')",
        )
        .await?;
    attach(&owner, "gone", "id").await?;
    let tokens = tokens(&owner, &["g1", "g2", "g3", "g4", "g9"]).await?;
    // Still there in another row; or put back in the same statement.
    owner.batch_execute("delete from gone where name = 'b'").await?;
    owner
        .batch_execute(
            "with d as (delete from gone where id = 'g1' returning *) insert into gone select * from d",
        )
        .await?;
    owner.batch_execute("update gone set name = 'c'; update gone set id = id").await?;
    assert_eq!(live(&owner, &tokens).await?, [true; 5]);
    // Another key is another user; two who change places both stay.
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
async fn only_the_owner_attaches_a_table_and_whoever_deletes_needs_no_right_here() -> Result<()> {
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

    // Nobody makes a trigger of our function, on a table of theirs, to have others' tokens revoked.
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
            "create type mood as enum ('x'); create domain id as text;
             create table typed (mood mood, id id, j jsonb, t timestamptz, a int[])",
        )
        .await?;
    for key in ["mood", "id", "j", "t", "a"] {
        let error = refused(attach(&typer, "typed", key).await, &SqlState::DATATYPE_MISMATCH);
        assert!(error.detail().is_some() && error.hint().is_some(), "{error:?}");
    }
    for (key, state) in [("nothing", SqlState::UNDEFINED_COLUMN), ("ctid", SqlState::UNDEFINED_COLUMN)] {
        refused(attach(&typer, "typed", key).await, &state);
    }
    // Nor is one that was given such a type later; what is deleted then is not deleted.
    typer.batch_execute("create table later (id text); insert into later values ('x')").await?;
    attach(&typer, "later", "id").await?;
    typer
        .batch_execute("drop trigger tollgate_user_changed on later; alter table later alter id type mood using id::mood")
        .await?;
    for change in ["delete from later", "truncate later"] {
        refused(typer.batch_execute(change).await, &SqlState::DATATYPE_MISMATCH);
    }
    typer.batch_execute("alter table later rename id to key").await?;
    refused(typer.batch_execute("delete from later").await, &SqlState::DATATYPE_MISMATCH);
    Ok(())
}

#[tokio::test]
async fn attaching_once_more_does_nothing_and_by_another_column_is_refused() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    owner
        .batch_execute(
            "create table again (id int, other int); create view looking as select * from again;
             create temp table passing (id int)",
        )
        .await?;
    for _ in 0..3 {
        attach(&owner, "again", "id").await?;
        assert_eq!(value::<i64>(&owner, &format!("{TRIGGERS} 'again'::regclass")).await?, 3);
    }
    let error = refused(attach(&owner, "again", "other").await, &SqlState::DUPLICATE_OBJECT);
    assert!(error.detail().is_some() && error.hint().is_some(), "{error:?}");
    refused(attach(&owner, "looking", "id").await, &SqlState::WRONG_OBJECT_TYPE);
    for nulls in ["null, 'id'", "'again', null"] {
        let call = format!("select tollgate.attach_users_table({nulls})");
        assert!(common::error(owner.batch_execute(&call).await).detail().is_some(), "{nulls}");
    }

    // The table is its owner's, and the extension goes without it.
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
async fn a_key_is_stored_and_a_table_shares_no_rows_or_it_is_not_attached() -> Result<()> {
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
            "drop trigger tollgate_user_changed on turned; alter table turned drop column key;
             alter table turned add column key text generated always as ('later ' || n) virtual",
        )
        .await?;
    for statement in ["delete from turned", "truncate turned"] {
        refused(owner.batch_execute(statement).await, &SqlState::WRONG_OBJECT_TYPE);
    }
    assert_eq!(live(&owner, &later).await?, [true]);
    Ok(())
}
