//! The alternatives: the query that one writes by hand, the same in a function, and the design that records each use in
//! the token's row. All take the arguments of a verification, and return the same columns.

use anyhow::Result;
use tollgate_tests::{Cluster, DATABASE};

use crate::clients::{Statement, Takes};
use crate::service::WEB;

/// The ceiling: a round trip that does nothing.
pub(crate) const NOTHING: Statement = Statement { sql: "select 1", takes: Takes::Nothing, expected: b"1" };

/// The cost of any answer with a verification's eleven columns: values of the same types and about the same sizes,
/// without reading a table.
pub(crate) const CONSTANTS: Statement = Statement {
    sql: "select true as valid, 'VALID'::text as code, '01920000-0000-7000-8000-000000000000'::uuid as token_id,
                 'user-12345'::text as user_id, 'key'::text as name, '{posts:read,posts:write}'::text[] as scopes,
                 '2100-01-01'::timestamptz as expires_at, '{}'::jsonb as metadata, 1000000::integer as rate_limit,
                 999999::integer as rate_remaining, null::interval as retry_after",
    takes: Takes::Nothing,
    expected: b"t",
};

/// The query in its cheapest form, without any of the checks that a verification makes.
pub(crate) const LOOKUP: Statement = Statement {
    sql: "select true as valid, 'VALID' as code, id as token_id, user_id, name, scopes, expires_at, metadata, rate_limit,
                 null::integer as rate_remaining, null::interval as retry_after
          from tollgate.api_tokens where token_hash = sha256($1)",
    takes: Takes::Token,
    expected: b"t",
};

/// The same with the checks that a single statement can make.
pub(crate) const CHECKED: Statement = Statement {
    sql: "select true as valid, 'VALID' as code, id as token_id, user_id, name, scopes, expires_at, metadata, rate_limit,
                 null::integer as rate_remaining, null::interval as retry_after
          from tollgate.api_tokens
          where token_hash = sha256($1) and revoked_at is null and disabled_at is null
            and (expires_at is null or expires_at > now())
            and (allowed_ips is null or $3::inet <<= any (allowed_ips)) and scopes @> $2",
    takes: Takes::TokenAndChecks,
    expected: b"t",
};

/// The same in a function.
pub(crate) const FUNCTION: Statement =
    Statement { sql: "select * from bench.verify($1, $2, $3)", takes: Takes::TokenAndChecks, expected: b"t" };

/// The same, with the use recorded in the row.
pub(crate) const WRITE: Statement = Statement {
    sql: "update bench.written set last_used_at = now()
          where token_hash = sha256($1) and revoked_at is null and disabled_at is null
            and (expires_at is null or expires_at > now())
            and (allowed_ips is null or $3::inet <<= any (allowed_ips)) and scopes @> $2
          returning true as valid, 'VALID' as code, id as token_id, user_id, name, scopes, expires_at, metadata, rate_limit,
                    null::integer as rate_remaining, null::interval as retry_after",
    takes: Takes::TokenAndChecks,
    expected: b"t",
};

/// The function, which says what is wrong with a token, as such functions do. It runs with its caller's rights: most
/// would make it SECURITY DEFINER, so that callers cannot read the table, which is slower.
pub(crate) fn create_function(cluster: &Cluster) -> Result<()> {
    cluster.execute(
        DATABASE,
        "create function bench.verify(token text, required_scopes text[], client_ip inet) returns tollgate.verification
             language plpgsql as $$
         declare
             found tollgate.api_tokens;
             answer tollgate.verification;
         begin
             select * into found from tollgate.api_tokens where token_hash = sha256(convert_to(token, 'UTF8'));
             answer.code := case
                 when found.id is null then 'NOT_FOUND'
                 when found.revoked_at is not null then 'REVOKED'
                 when found.disabled_at is not null then 'DISABLED'
                 when found.expires_at <= now() then 'EXPIRED'
                 when found.allowed_ips is not null and not client_ip <<= any (found.allowed_ips) then 'IP_NOT_ALLOWED'
                 when not found.scopes @> required_scopes then 'INSUFFICIENT_SCOPE'
                 else 'VALID'
             end;
             answer.valid := answer.code = 'VALID';
             if answer.valid then
                 answer.token_id := found.id;
                 answer.user_id := found.user_id;
                 answer.name := found.name;
                 answer.scopes := found.scopes;
                 answer.expires_at := found.expires_at;
                 answer.metadata := found.metadata;
                 answer.rate_limit := found.rate_limit;
             end if;
             return answer;
         end $$",
    )
}

/// A separate table for the design that writes, with the indexes that it needs and room for HOT updates, which is more
/// than most would give it.
pub(crate) fn create_written(cluster: &Cluster) -> Result<()> {
    cluster.execute(
        DATABASE,
        &format!(
            "create table bench.written (like tollgate.api_tokens, last_used_at timestamptz) with (fillfactor = 80);
             insert into bench.written select * from tollgate.api_tokens;
             alter table bench.written add primary key (id);
             create unique index on bench.written (token_hash);
             create index on bench.written (user_id);
             grant select, update on bench.written to {WEB}"
        ),
    )?;
    cluster.execute(DATABASE, "vacuum (freeze, analyze) bench.written")?;
    cluster.execute(DATABASE, "checkpoint")
}
