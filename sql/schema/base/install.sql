-- The schema, and the requirements on a database for Tollgate.

DO $$
BEGIN
    IF current_setting('server_encoding') <> 'UTF8' THEN
        RAISE EXCEPTION 'Tollgate needs a database whose encoding is UTF8'
            USING ERRCODE = 'feature_not_supported',
                  DETAIL = format('This database is encoded in %s.', current_setting('server_encoding')),
                  HINT = 'CREATE DATABASE … ENCODING ''UTF8'' TEMPLATE template0, then CREATE EXTENSION tollgate there.';
    END IF;
END
$$;

-- Plain CREATE: a schema of this name that another role prepared is never adopted.
CREATE SCHEMA tollgate;
COMMENT ON SCHEMA tollgate IS 'Tollgate: API tokens issued, verified, scoped, metered, revoked and audited inside PostgreSQL';

CREATE FUNCTION tollgate.acting_role() RETURNS text
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'acting_role';
COMMENT ON FUNCTION tollgate.acting_role() IS
    'The acting role: the one of SET ROLE, else the one that logged in; not the owner of the running SECURITY DEFINER function. Internal.';

CREATE FUNCTION tollgate.without_token(argument text, value text) RETURNS text
    LANGUAGE c IMMUTABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'without_token';
COMMENT ON FUNCTION tollgate.without_token(text, text) IS
    'The value of an argument; raises 22023 if it contains a token. Every text that is stored, logged or searched for is checked by this. Internal.';

CREATE FUNCTION tollgate.json_text_size(value jsonb, max_bytes integer, max_depth integer) RETURNS integer
    LANGUAGE c IMMUTABLE PARALLEL SAFE STRICT
    AS 'MODULE_PATHNAME', 'json_text_size';
COMMENT ON FUNCTION tollgate.json_text_size(jsonb, integer, integer) IS
    'The number of bytes of a value as text, computed without printing it; NULL if it has more, or is nested deeper, than allowed. Internal.';

CREATE FUNCTION tollgate.check_json(argument text, value jsonb, max_bytes integer, max_depth integer) RETURNS void
    LANGUAGE c IMMUTABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'check_json';
COMMENT ON FUNCTION tollgate.check_json(text, jsonb, integer, integer) IS
    'Raises 22023 for JSON that contains a token, or exceeds the allowed bytes as text or levels. Internal.';

CREATE FUNCTION tollgate.quote_redacted(argument text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce(quote_literal(left(regexp_replace($1, '[0-9A-Fa-f]{16,}|eyJ[A-Za-z0-9_.-]{16,}', '…', 'g'), 140)), 'NULL');
END;
COMMENT ON FUNCTION tollgate.quote_redacted(text) IS
    'An argument as error messages show it: without anything that may be a part of a token. Internal.';

-- For what locks and then relies on seeing everything that was committed before.
CREATE FUNCTION tollgate.check_read_committed(what text, why text, how text) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION '% in a % transaction', $1, current_setting('transaction_isolation')
            USING ERRCODE = 'invalid_transaction_state', DETAIL = $2,
                  HINT = $3 || ' in a transaction with isolation level READ COMMITTED.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_read_committed(text, text, text) IS
    'Raises 25000 in a transaction that keeps its snapshot: what cannot be done in it, why not, and the beginning of how to do it. Internal.';
