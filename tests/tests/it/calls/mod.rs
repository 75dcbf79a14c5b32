//! A successful call of each granted function, for tests that try all of them. A function that is missing here fails
//! those tests by its name.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use tokio_postgres::Client;

use crate::common::{Token, value};

/// In the calls, `{token}` is the text of a live token of `clerk` with the scope `posts:read`, `{id}` its id, and
/// `{role}` the name of an ordinary role. In this order each call finds what it needs.
const CALLS: &[(&str, &str)] = &[
    (
        "tollgate.create_api_token(text,text,text[],interval,jsonb,cidr[],integer,interval,text,timestamp with time zone)",
        "create_api_token('clerk', 'n', '{posts:read}', '1 day', '{}', '{10.0.0.0/8}', prefix => 'abc')",
    ),
    (
        "tollgate.verify_api_token(text,text[],inet)",
        "verify_api_token('{token}', '{posts:read}', '10.0.0.1')",
    ),
    (
        "tollgate.verify_tokens(text[],text[],inet[],text[])",
        "verify_tokens(array['{token}', 'junk', null], array['posts:read', null, null])",
    ),
    ("tollgate.verify_api_token_hash(bytea,text[],inet)", "verify_api_token_hash('')"),
    ("tollgate.authenticate(text,text[],inet)", "authenticate('{token}', '{posts:read}', '10.0.0.1')"),
    ("tollgate.token_has_scope(text,text,inet)", "token_has_scope('{token}', 'posts:read', '10.0.0.1')"),
    ("tollgate.last_refusal()", "last_refusal()"),
    ("tollgate.client_ip_from(text,cidr[])", "client_ip_from('203.0.113.7, 10.0.0.1')"),
    ("tollgate.list_api_tokens(text,integer,uuid)", "list_api_tokens('clerk', 10, '{id}')"),
    (
        "tollgate.find_api_tokens(text,text,text,text,integer,uuid)",
        "find_api_tokens(hint => 'tgt_1a2b', status => 'active')",
    ),
    ("tollgate.token_activity(uuid,timestamp with time zone)", "token_activity('{id}', 'yesterday')"),
    ("tollgate.revoke_api_token(uuid,text,text)", "revoke_api_token('{id}', 'clerk', 'over')"),
    (
        "tollgate.revoke_presented_token(text,text,inet)",
        "revoke_presented_token('{token}', 'leaked', '10.0.0.1')",
    ),
    ("tollgate.revoke_all_api_tokens(text,text)", "revoke_all_api_tokens('clerk', 'over')"),
    (
        "tollgate.rotate_api_token(uuid,interval,interval,timestamp with time zone,boolean)",
        "rotate_api_token('{id}', '1 hour', '1 day')",
    ),
    ("tollgate.update_api_token(uuid,jsonb)", "update_api_token('{id}', '{\"name\": \"other\"}')"),
    ("tollgate.set_api_token_enabled(uuid,boolean,text)", "set_api_token_enabled('{id}', false, 'for now')"),
    (
        "tollgate.derive_api_token(text,text,text[],interval,cidr[],inet,timestamp with time zone)",
        "derive_api_token('{token}', 'n', '{posts:read}', '1 day', '{10.0.0.0/8}')",
    ),
    (
        "tollgate.import_api_token(text,text,bytea,text[],interval,jsonb,cidr[],integer,interval,text,\
         timestamp with time zone,timestamp with time zone,timestamp with time zone,timestamp with time zone,\
         timestamp with time zone)",
        "import_api_token('clerk', 'n', pg_catalog.sha256('{id}'))",
    ),
    (
        "tollgate.revoke_own_api_token(uuid,text)",
        "authenticate('{token}') a, lateral tollgate.revoke_own_api_token(a.token_id, 'over')",
    ),
    // For a table that each caller has: see `PREPARATION`.
    (
        "tollgate.attach_users_table(regclass,name,boolean,text,text)",
        "attach_users_table('pg_temp.clerks_users', 'id', false)",
    ),
    ("tollgate.list_users_tables()", "list_users_tables()"),
    ("tollgate.detach_users_table(regclass)", "detach_users_table('pg_temp.clerks_users')"),
    ("tollgate.define_scope(text,text)", "define_scope('clerk:scope', 'of the clerk')"),
    ("tollgate.drop_scope(text)", "drop_scope('clerk:scope')"),
    ("tollgate.list_scopes()", "list_scopes()"),
    ("tollgate.grant_capability(regrole,text)", "grant_capability('{role}', 'verifier')"),
    ("tollgate.list_capability_grants()", "list_capability_grants()"),
    ("tollgate.list_own_capabilities()", "list_own_capabilities()"),
    ("tollgate.revoke_capability(regrole,text)", "revoke_capability('{role}', 'verifier')"),
    ("tollgate.stats()", "stats()"),
    ("tollgate.deployment_health(interval)", "deployment_health()"),
    ("tollgate.drain_findings()", "drain_findings()"),
    ("tollgate.apply_findings(tollgate.finding[])", "apply_findings()"),
    ("tollgate.drain_usage()", "drain_usage()"),
    (
        "tollgate.apply_usage(text,uuid,bigint,tollgate.usage_row[],bytea)",
        "apply_usage('node', '00000000-0000-0000-0000-000000000001', 1, '{}', pg_catalog.decode('{signature}', 'hex'))",
    ),
    (
        "tollgate.usage_applied(text,uuid,bigint)",
        "usage_applied('node', '00000000-0000-0000-0000-000000000001', 1)",
    ),
    ("tollgate.ack_usage(bigint)", "ack_usage(1)"),
    ("tollgate.usage_pressure()", "usage_pressure()"),
    ("tollgate.expire_tokens(integer)", "expire_tokens(10)"),
    ("tollgate.announce_expiries(interval,integer)", "announce_expiries('7 days', 10)"),
    ("tollgate.purge_tokens(interval,integer)", "purge_tokens('30 days', 10)"),
    (
        "tollgate.purge_tokens_after(interval,integer,timestamp with time zone,uuid)",
        "purge_tokens_after('30 days', 10)",
    ),
    ("tollgate.purge_sessions_after(interval,integer,uuid)", "purge_sessions_after('30 days', 10, '{id}')"),
    ("tollgate.purge_usage(interval,integer)", "purge_usage('90 days', 10)"),
    ("tollgate.purge_user_usage_after(interval,integer,uuid)", "purge_user_usage_after('90 days', 10)"),
    ("tollgate.expire_tokens_after(integer,timestamp with time zone,uuid)", "expire_tokens_after(10)"),
    (
        "tollgate.announce_expiries_after(interval,integer,timestamp with time zone,uuid)",
        "announce_expiries_after('7 days', 10)",
    ),
    (
        "tollgate.purge_usage_after(interval,integer,timestamp with time zone,uuid)",
        "purge_usage_after('90 days', 10)",
    ),
    ("tollgate.event_position(bigint)", "event_position(0)"),
    (
        "tollgate.read_events(tollgate.event_cursor,integer)",
        "read_events('(00000000-0000-0000-0000-000000000000,1:1:,,,,,)', 10)",
    ),
    (
        "tollgate.has_events(tollgate.event_cursor)",
        "has_events('(00000000-0000-0000-0000-000000000000,1:1:,,,,,)')",
    ),
    ("tollgate.open_subscription(text)", "open_subscription('clerk')"),
    (
        "tollgate.advance_subscription(text,tollgate.event_cursor,bytea)",
        "advance_subscription('clerk', (select p.next from clerks.page() p), (select p.proof from clerks.page() p))",
    ),
    ("tollgate.admit_event_reader(bytea,inet)", "admit_event_reader('', '10.0.0.1')"),
    ("tollgate.subscription_backlogs(integer)", "subscription_backlogs(10)"),
    ("tollgate.drop_subscription(text)", "drop_subscription('clerk')"),
    (
        "tollgate.define_webhook(text,text,text[])",
        "define_webhook('clerks', 'https://example.com/', '{token.*}')",
    ),
    ("tollgate.rotate_webhook_secret(text,interval)", "rotate_webhook_secret('clerks', '1 hour')"),
    ("tollgate.set_webhook_enabled(text,boolean)", "set_webhook_enabled('clerks', false)"),
    ("tollgate.set_webhook_url(text,text)", "set_webhook_url('clerks', 'https://example.org/')"),
    ("tollgate.pause_webhook(text)", "pause_webhook('clerks')"),
    ("tollgate.resume_webhook(text)", "resume_webhook('clerks')"),
    ("tollgate.replay_webhook(text,bigint)", "replay_webhook('clerks')"),
    ("tollgate.drop_webhook(text)", "drop_webhook('clerks')"),
    ("tollgate.queue_webhook_deliveries(integer)", "queue_webhook_deliveries(10)"),
    ("tollgate.claim_webhook_deliveries(integer,interval)", "claim_webhook_deliveries(1, '1 minute')"),
    (
        "tollgate.finish_webhook_delivery(bigint,uuid,integer,text,interval)",
        "finish_webhook_delivery(1, '00000000-0000-0000-0000-000000000003', 200)",
    ),
    ("tollgate.purge_webhook_deliveries(interval,integer)", "purge_webhook_deliveries('30 days', 10)"),
    ("tollgate.create_signing_key(text,interval)", "create_signing_key('ES256')"),
    ("tollgate.rotate_signing_key(interval)", "rotate_signing_key('1 hour')"),
    (
        "tollgate.import_signing_key(text,interval)",
        "import_signing_key('-----BEGIN PRIVATE KEY----- MC4CAQAwBQYDK2VwBCIEII7UttGH2B5IdnUrssZw/Lsf7N/ZULHCajBWuwAhRsNJ \
         -----END PRIVATE KEY-----')",
    ),
    ("tollgate.rotate_due_signing_key(interval)", "rotate_due_signing_key('90 days')"),
    ("tollgate.reseal_signing_keys()", "reseal_signing_keys()"),
    ("tollgate.list_signing_keys()", "list_signing_keys()"),
    ("tollgate.list_master_keys()", "list_master_keys()"),
    ("tollgate.key_status()", "key_status()"),
    ("tollgate.jwks()", "jwks()"),
    ("tollgate.withdraw_signing_key(text,text)", "withdraw_signing_key('none', 'over')"),
    (
        "tollgate.issue_access_token(text,text[],text[],interval,jsonb)",
        "issue_access_token('clerk', '{posts:read}', '{https://api.test}', '5 minutes', '{\"plan\": \"pro\"}')",
    ),
    (
        "tollgate.verify_access_token(text,text[],inet,text)",
        "verify_access_token('{token}', '{posts:read}', '10.0.0.1', 'https://api.test')",
    ),
    ("tollgate.revoke_access_token(text,text,inet)", "revoke_access_token('{token}', 'leaked', '10.0.0.2')"),
    ("tollgate.revoke_access_token(uuid,text)", "revoke_access_token('{id}'::pg_catalog.uuid, 'over')"),
    (
        "tollgate.exchange_token(text,text,text[],text[],interval,text,text,inet)",
        "exchange_token('{token}', scopes => '{posts:read}', audience => '{https://api.test}', lifetime => '5 minutes', client_ip => '10.0.0.1')",
    ),
    ("tollgate.introspect_token(text,text,inet)", "introspect_token('{token}', 'access_token', '10.0.0.1')"),
    (
        "tollgate.revoke_token(text,text,text,inet)",
        "revoke_token('{token}', 'access_token', 'leaked', '10.0.0.2')",
    ),
    ("tollgate.access_token_usage(text)", "access_token_usage('clerk')"),
    (
        "tollgate.open_session(text,text[],text[],text,interval,interval,text,inet,jsonb)",
        "open_session('clerk', '{posts:read}', '{https://api.test}', 'app', '1 day', '1 hour', 'Firefox', '10.0.0.1', '{}')",
    ),
    (
        "tollgate.refresh_session(text,text,text[],inet)",
        "refresh_session('{token}', 'app', '{posts:read}', '10.0.0.2')",
    ),
    ("tollgate.list_sessions(text)", "list_sessions('clerk')"),
    ("tollgate.revoke_session(uuid,text,text)", "revoke_session('{id}', 'clerk', 'over')"),
    ("tollgate.revoke_all_sessions(text,text)", "revoke_all_sessions('clerk', 'over')"),
    ("tollgate.invalidate_sessions(timestamp with time zone)", "invalidate_sessions('2020-01-01')"),
    ("tollgate.announce_session_expiries(interval,integer)", "announce_session_expiries('7 days', 10)"),
    ("tollgate.purge_sessions(interval,integer)", "purge_sessions('30 days', 10)"),
    ("tollgate.current_session_id()", "current_session_id()"),
    ("tollgate.revoke_user(text,text)", "revoke_user('clerk', 'left')"),
    ("tollgate.purge_denials(integer)", "purge_denials(10)"),
    ("tollgate.store_import_key(text,bytea)", "store_import_key('clerks', 'pepper')"),
    ("tollgate.list_import_keys()", "list_import_keys()"),
    ("tollgate.drop_import_key(text)", "drop_import_key('clerks')"),
    ("tollgate.create_url_key(text)", "create_url_key(pg_catalog.gen_random_uuid()::pg_catalog.text)"),
    ("tollgate.rotate_url_key(text,interval)", "rotate_url_key('clerks', '1 hour')"),
    (
        "tollgate.sign_url(text,interval,timestamp with time zone,text[],text,cidr,boolean,text,timestamp with time zone,jsonb,text)",
        "sign_url('https://example.com/a/b', '1 hour', null, '{GET}', '/a/', '10.0.0.0/8', true, 'clerk', '2020-01-01', \
         '{\"Content-Disposition\": \"attachment\"}', 'clerks')",
    ),
    (
        "tollgate.verify_signed_url(text,text,inet)",
        "verify_signed_url('https://example.com/', 'GET', '10.0.0.1')",
    ),
    ("tollgate.list_url_keys()", "list_url_keys()"),
    ("tollgate.export_url_key(text)", "export_url_key(clerks.url_key())"),
    ("tollgate.withdraw_url_key(text,text)", "withdraw_url_key('none', 'over')"),
    ("tollgate.purge_used_urls(integer)", "purge_used_urls(10)"),
    ("tollgate.current_actor()", "current_actor()"),
    ("tollgate.current_claims()", "current_claims()"),
    ("tollgate.current_issuer()", "current_issuer()"),
    (
        "tollgate.trust_issuer(text,text,text[],jsonb,text,text[],text,text[],text[],text[],jsonb,interval)",
        "trust_issuer('https://issuer.test', 'clerks:', '{https://api.test}', scopes => '{posts:read}', jwks => '{\"keys\": [{\"kty\": \"EC\", \"crv\": \"P-256\", \"kid\": \"1\", \"x\": \"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4\", \
         \"y\": \"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM\"}]}')",
    ),
    ("tollgate.list_trusted_issuers()", "list_trusted_issuers()"),
    ("tollgate.issuers_due()", "issuers_due()"),
    (
        "tollgate.store_issuer_keys(text,text,interval,text)",
        "store_issuer_keys('https://issuer.test', '{\"keys\": []}', '1 hour')",
    ),
    ("tollgate.note_issuer_failure(text,text)", "note_issuer_failure('https://issuer.test', 'it is down')"),
    (
        "tollgate.create_service_account(text,text,text[],text[],interval,text,text)",
        "create_service_account('clerks', 'n', '{posts:read}', '{https://api.test}', '5 minutes', 'of the clerks', 'team clerk')",
    ),
    (
        "tollgate.update_service_account(text,text,text[],text[],interval,text,text)",
        "update_service_account('clerks', 'other', lifetime => '1 minute')",
    ),
    (
        "tollgate.create_service_account_secret(text,text,interval,timestamp with time zone,cidr[])",
        "create_service_account_secret('clerks', 'n', '1 day', allowed_ips => '{10.0.0.0/8}')",
    ),
    (
        "tollgate.set_service_account_keys(text,jsonb,text)",
        "set_service_account_keys('clerks', '{\"keys\": [{\"kty\": \"EC\", \"crv\": \"P-256\", \"kid\": \"1\", \"x\": \"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4\", \
         \"y\": \"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM\"}]}')",
    ),
    (
        "tollgate.trust_workload(text,text,jsonb,text)",
        "trust_workload('clerks', 'https://issuer.test', '{\"repository_id\": \"74\"}', 'https://api.test')",
    ),
    (
        "tollgate.client_credentials(text,text,text,text[],text[],inet)",
        "client_credentials('clerks', '{token}', scopes => '{posts:read}', audience => '{https://api.test}', client_ip => '10.0.0.1')",
    ),
    ("tollgate.list_service_accounts(text,integer,text)", "list_service_accounts('clerks', 10, 'a')"),
    ("tollgate.distrust_workload(uuid,text)", "distrust_workload('{id}', 'over')"),
    ("tollgate.disable_service_account(text,text)", "disable_service_account('clerks', 'for now')"),
    ("tollgate.enable_service_account(text,text)", "enable_service_account('clerks', 'again')"),
    ("tollgate.delete_service_account(text,text)", "delete_service_account('clerks', 'over')"),
    ("tollgate.distrust_issuer(text,text)", "distrust_issuer('https://issuer.test', 'over')"),
    (
        "tollgate.set_quota(uuid,text,bigint,text,text,bigint,text)",
        "set_quota(null, 'clerk', 1000000, 'lifetime', 'UTC', 1000, 'open')",
    ),
    ("tollgate.token_quota(uuid)", "token_quota('{id}')"),
    ("tollgate.user_quota(text)", "user_quota('clerk')"),
    ("tollgate.quota_remaining(uuid)", "quota_remaining('{id}')"),
    ("tollgate.list_quotas(integer,uuid)", "list_quotas(10, '{id}')"),
    ("tollgate.lease_quotas(tollgate.lease_request[])", "lease_quotas()"),
    ("tollgate.drain_lease_requests()", "drain_lease_requests()"),
    ("tollgate.forget_removed_quotas()", "forget_removed_quotas()"),
    ("tollgate.add_credits(uuid,text,bigint)", "add_credits(null, 'clerk', 5)"),
    ("tollgate.remove_quota(uuid,text,text)", "remove_quota(null, 'clerk', 'over')"),
    ("tollgate.acquire_leadership(text)", "acquire_leadership('seal_audit')"),
    ("tollgate.check_leadership(text,bigint)", "check_leadership('purge', 0)"),
    ("tollgate.seal_audit_log(integer)", "seal_audit_log()"),
    ("tollgate.verify_audit_log(bigint,bytea)", "verify_audit_log()"),
    ("tollgate.purge_audit_log(timestamp with time zone,integer)", "purge_audit_log('2020-01-01')"),
    (
        "tollgate.report_daemon(uuid,text,integer,text,timestamp with time zone,jsonb)",
        "report_daemon('00000000-0000-0000-0000-000000000002', 'host', 1, '0', '2020-01-01', '{}')",
    ),
    ("tollgate.token_has_scope(text)", "token_has_scope('posts:read')"),
    ("tollgate.token_has_any_scope(text[])", "token_has_any_scope('{posts:read}')"),
    ("tollgate.token_has_all_scopes(text[])", "token_has_all_scopes('{posts:read}')"),
    (
        "tollgate.require_scope(text)",
        "authenticate('{token}') a, lateral tollgate.require_scope(case when a.valid then 'posts:read' end)",
    ),
    ("tollgate.current_token_id()", "current_token_id()"),
    ("tollgate.current_user_id()", "current_user_id()"),
    ("tollgate.current_scopes()", "current_scopes()"),
    ("tollgate.scope_grants(text[],text)", "scope_grants('{posts:*}', 'posts:read')"),
];

/// What a subscriber has read, for a caller who may only advance, and a key for URLs with its id, for one who may not create or
/// list any.
const PAGE: &str = "
    create schema if not exists clerks;
    grant usage on schema clerks to public;
    create or replace function clerks.page() returns tollgate.event_batch language sql stable security definer
        set search_path = pg_catalog, pg_temp
        begin atomic
            select b.events, b.cursor, b.next, b.caught_up, b.proof
            from tollgate.subscriptions s, tollgate.read_events(s.place, 10) b where s.name = 'clerk';
        end;
    do $$ begin
        if not exists (select from tollgate.url_keys k where k.name = 'clerks') then
            perform tollgate.create_url_key('clerks');
        end if;
    end $$;
    create or replace function clerks.url_key() returns text language sql volatile security definer
        set search_path = pg_catalog, pg_temp
        begin atomic
            select k.key_id from tollgate.url_keys k where k.name = 'clerks' and k.state = 'signing';
        end";

/// Statements that a session runs once before these calls.
pub(crate) const PREPARATION: &str = "create temporary table clerks_users (id int)";

/// Function and call, for each granted function, in the order of the list above.
pub(crate) async fn all(owner: &Client) -> Result<Vec<(&'static str, &'static str)>> {
    let given = "select distinct d.object::regprocedure::text from tollgate.privilege_decisions d
                 where d.object_type = 'FUNCTION' and d.given_to <> 'internal'";
    let given: BTreeSet<String> = owner.query(given, &[]).await?.iter().map(|row| row.get(0)).collect();
    let calls: BTreeMap<&str, &str> = CALLS.iter().copied().collect();
    assert_eq!(
        given.iter().map(String::as_str).collect::<Vec<_>>(),
        calls.keys().copied().collect::<Vec<_>>(),
        "each granted function has a call in tests/tests/it/calls/mod.rs"
    );
    owner.batch_execute(PAGE).await?;
    let signature: String = value(
        owner,
        "select encode(tollgate.signature_of_usage('node', '00000000-0000-0000-0000-000000000001', 1, '{}'), 'hex')",
    )
    .await?;
    let signed = |call: &'static str| match call.contains("{signature}") {
        true => call.replace("{signature}", &signature).leak(),
        false => call,
    };
    Ok(CALLS.iter().map(|&(function, call)| (function, signed(call))).collect())
}

/// A call as a statement.
pub(crate) fn filled(call: &str, token: &Token, role: &str) -> String {
    format!("select * from tollgate.{}", replaced(call, token, role))
}

pub(crate) fn replaced(text: &str, token: &Token, role: &str) -> String {
    text.replace("{token}", &token.token).replace("{id}", &token.id.to_string()).replace("{role}", role)
}
