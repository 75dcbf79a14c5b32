-- Signed URLs: made and verified without a row, by a secret key that is sealed with the others (sql/schema/keys/keys.sql);
-- only the use of a URL that is for one use is stored. The form of a URL, which others verify too, is in
-- docs/signed-urls.md and extension/core/src/url.rs.
--
-- A key has a name, under which it is rotated: its purpose is `signed_url:` and the name. A URL names the key that signed
-- it by its id, and lives for a year at most, so a key that was replaced verifies for that long (chain_keys).

CREATE TYPE tollgate.url_verification AS (
    valid            boolean,
    code             text,
    reason           text,
    subject          text,
    key_name         text,
    key_id           text,
    expires_at       timestamptz,
    single_use       boolean,
    response_headers jsonb
);
COMMENT ON TYPE tollgate.url_verification IS
    'The outcome of a verification of a signed URL: all but valid, code and reason are NULL unless a key of ours has signed it; response_headers unless it is valid';

-- The library reads this table by column numbers (extension/src/store/used_urls.rs).
CREATE TABLE tollgate.used_urls (
    id         uuid        NOT NULL CONSTRAINT used_urls_pkey PRIMARY KEY,
    expires_at timestamptz NOT NULL,
    used_at    timestamptz NOT NULL DEFAULT clock_timestamp()
) USING heap;
COMMENT ON TABLE tollgate.used_urls IS 'Signed URLs for one use that were used';
COMMENT ON COLUMN tollgate.used_urls.id IS 'A digest of the signature';
COMMENT ON COLUMN tollgate.used_urls.expires_at IS 'When the URL ends by itself; purged a day later';
CREATE INDEX used_urls_expires ON tollgate.used_urls (expires_at, id);
SELECT pg_extension_config_dump('tollgate.used_urls', '');

CREATE FUNCTION tollgate.sign_url(
    url              text,
    expires_in       interval    DEFAULT NULL,
    expires_at       timestamptz DEFAULT NULL,
    methods          text[]      DEFAULT '{GET,HEAD}',
    path_prefix      text        DEFAULT NULL,
    network          cidr        DEFAULT NULL,
    single_use       boolean     DEFAULT false,
    subject          text        DEFAULT NULL,
    not_before       timestamptz DEFAULT NULL,
    response_headers jsonb       DEFAULT NULL,
    key              text        DEFAULT 'default'
) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'sign_url';
COMMENT ON FUNCTION tollgate.sign_url(text, interval, timestamptz, text[], text, cidr, boolean, text, timestamptz, jsonb, text) IS
    'Signs a URL with the key of a name, for an hour or until another end, at most 366 days away: parameters that begin with tgu_ are appended. Stores nothing; 55000 without the key or its master key';

CREATE FUNCTION tollgate.verify_signed_url(url text, method text DEFAULT 'GET', client_ip inet DEFAULT NULL)
    RETURNS tollgate.url_verification
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'verify_signed_url';
COMMENT ON FUNCTION tollgate.verify_signed_url(text, text, inet) IS
    'Verifies a signed URL as the client requested it: always one row, with valid and code; never raises for a bad one. Writes nothing, but for the use of one that is for one use, which a standby refuses (25006)';

CREATE FUNCTION tollgate.check_url_key_name(name text) RETURNS void
    LANGUAGE sql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT tollgate.check_key_name($1, 'a key for URLs', 'Say what its URLs are for, such as downloads; leave it out if there is one key alone.');
END;
COMMENT ON FUNCTION tollgate.check_url_key_name(text) IS 'Raises 22023 unless a key for URLs may have this name. Internal.';

CREATE FUNCTION tollgate.url_key_signs(name text) RETURNS boolean
    LANGUAGE sql VOLATILE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT EXISTS (SELECT FROM tollgate.sealed_keys k
                   WHERE k.purpose = ('signed_url:' || $1) COLLATE "C"
                     AND tollgate.key_state(k.signs_from, k.retires_at, k.verifies_until, k.withdrawn_at) IN ('published', 'signing'));
END;
COMMENT ON FUNCTION tollgate.url_key_signs(text) IS 'Whether a key of that name signs URLs, or is about to. Internal.';

CREATE FUNCTION tollgate.add_url_key(name text, signs_in interval) RETURNS text
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF (SELECT count(*) FROM tollgate.sealed_keys k
        WHERE starts_with(k.purpose, 'signed_url:') AND k.withdrawn_at IS NULL
          AND (k.verifies_until IS NULL OR k.verifies_until > clock_timestamp())) >= 500 THEN
        RAISE EXCEPTION 'there are 500 keys for URLs'
            USING ERRCODE = 'program_limit_exceeded', DETAIL = 'Those that retire count for a year.',
                  HINT = 'Withdraw keys that are not needed. A name is for a kind of URLs, not for a user.';
    END IF;
    RETURN tollgate.add_key(tollgate.make_key('HS256', 'signed_url:' || $1), 'signed_url:' || $1, $2, 'key.created');
END
$$;
COMMENT ON FUNCTION tollgate.add_url_key(text, interval) IS 'Stores a new key for URLs, which replaces the latest one of its name. Internal.';

CREATE FUNCTION tollgate.create_url_key(name text DEFAULT 'default') RETURNS text
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.check_url_key_name($1);
    PERFORM tollgate.lock_keys();
    IF tollgate.url_key_signs($1) THEN
        RAISE EXCEPTION 'there is a key named % already', $1
            USING ERRCODE = 'duplicate_object', DETAIL = 'Argument: name.',
                  HINT = 'Replace it with tollgate.rotate_url_key(), or choose another name.';
    END IF;
    RETURN tollgate.add_url_key($1, interval '0');
END
$$;
COMMENT ON FUNCTION tollgate.create_url_key(text) IS
    'Creates a key for signed URLs, which signs at once, and returns its id; event key.created; 42710 if the name has one that signs';

CREATE FUNCTION tollgate.rotate_url_key(name text DEFAULT 'default', signs_in interval DEFAULT NULL) RETURNS text
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.check_url_key_name($1), tollgate.check_signs_in($2);
    PERFORM tollgate.lock_keys();
    IF NOT tollgate.url_key_signs($1) THEN
        RAISE EXCEPTION 'there is no key named % that signs URLs', $1
            USING ERRCODE = 'undefined_object', DETAIL = 'Argument: name.', HINT = 'Create one with tollgate.create_url_key().';
    END IF;
    RETURN tollgate.add_url_key($1, $2);
END
$$;
COMMENT ON FUNCTION tollgate.rotate_url_key(text, interval) IS
    'Creates the next key of a name, and returns its id; event key.created. It signs after signs_in, or after 24 hours, and the one before it verifies for a year more, as long as a URL may live';

CREATE FUNCTION tollgate.withdraw_url_key(key_id text, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.without_token('key_id', $1), tollgate.stored_reason($2);
    RETURN EXISTS (SELECT FROM tollgate.sealed_keys k WHERE k.kid = $1 COLLATE "C" AND starts_with(k.purpose, 'signed_url:'))
           AND tollgate.withdraw_signing_key($1, $2);
END
$$;
COMMENT ON FUNCTION tollgate.withdraw_url_key(text, text) IS
    'Ends a key for URLs at once, and all that it signed; event key.withdrawn. If it signed, the next published one of its name does from now on. False if there is no such key, or it was withdrawn before. Needs no master key';

CREATE FUNCTION tollgate.url_key_text(key_id text) RETURNS text
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'url_key_text';
COMMENT ON FUNCTION tollgate.url_key_text(text) IS 'A key for URLs in base64url; NULL if there is none. Internal.';

CREATE FUNCTION tollgate.export_url_key(key_id text) RETURNS text
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    exported text;
BEGIN
    PERFORM tollgate.without_token('key_id', $1);
    exported := tollgate.url_key_text($1);
    IF exported IS NULL THEN
        RAISE EXCEPTION 'there is no such key for URLs'
            USING ERRCODE = 'undefined_object', DETAIL = 'Argument: key_id, of no key that verifies.',
                  HINT = 'tollgate.url_keys lists them.';
    END IF;
    INSERT INTO tollgate.audit_log (event, detail)
        SELECT 'key.exported', jsonb_build_object('kid', k.kid, 'purpose', k.purpose) FROM tollgate.sealed_keys k WHERE k.kid = $1 COLLATE "C";
    -- The event is gone if this is rolled back, and what was returned is not.
    RAISE LOG 'tollgate: the key % for URLs is exported, by %', $1, session_user;
    RETURN exported;
END
$$;
COMMENT ON FUNCTION tollgate.export_url_key(text) IS
    'A key for URLs in base64url, for a server at the edge that verifies without the database; who has it can sign too. Event key.exported; 42704 if there is none, or it is withdrawn or gone';

CREATE FUNCTION tollgate.list_url_keys() RETURNS TABLE (
        name text, key_id text, state text, signs_from timestamptz, retires_at timestamptz, verifies_until timestamptz,
        withdrawn_at timestamptz, withdrawn_reason text, created_at timestamptz, created_by text, can_sign boolean)
    LANGUAGE sql VOLATILE PARALLEL SAFE SECURITY DEFINER ROWS 5
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT substr(k.purpose, length('signed_url:') + 1), k.kid, k.state, k.signs_from, k.retires_at, k.verifies_until, k.withdrawn_at,
           k.withdrawn_reason, k.created_at, k.created_by, k.can_sign
        FROM tollgate.list_signing_keys() k WHERE starts_with(k.purpose, 'signed_url:')
        ORDER BY k.purpose, k.signs_from DESC, k.kid;
END;
COMMENT ON FUNCTION tollgate.list_url_keys() IS 'The rows of the view url_keys';

CREATE VIEW tollgate.url_keys AS
    SELECT k.name, k.key_id, k.state, k.signs_from, k.retires_at, k.verifies_until, k.withdrawn_at, k.withdrawn_reason, k.created_at,
           k.created_by, k.can_sign
    FROM tollgate.list_url_keys() k;
COMMENT ON VIEW tollgate.url_keys IS
    'The keys for signed URLs and their states: published, signing, retiring, gone, withdrawn; can_sign says whether this server can open it';

-- Kept for a day longer than the URL is accepted, so that a clock that is set back by a day lets none be used again.

CREATE FUNCTION tollgate.purge_used_urls_after(batch_size integer, INOUT expires_at timestamptz, INOUT id uuid, OUT looked_at bigint, OUT purged bigint)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
    SET plan_cache_mode = force_generic_plan
    SET jit = off
    SET enable_seqscan = off
    SET enable_bitmapscan = off
    SET enable_sort = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
AS $$
BEGIN
    expires_at := coalesce(expires_at, '-infinity');
    id := coalesce(id, '00000000-0000-0000-0000-000000000000');
    WITH deleted AS (
        DELETE FROM tollgate.used_urls u
            WHERE u.ctid = ANY (ARRAY(
                SELECT o.ctid FROM tollgate.used_urls o
                WHERE o.expires_at < now() - interval '1 day'
                  AND (o.expires_at, o.id) > (purge_used_urls_after.expires_at, purge_used_urls_after.id)
                ORDER BY o.expires_at, o.id LIMIT $1 FOR UPDATE SKIP LOCKED))
            RETURNING u.expires_at, u.id
    ), furthest AS (
        SELECT d.expires_at, d.id FROM deleted d ORDER BY d.expires_at DESC, d.id DESC LIMIT 1
    )
    SELECT coalesce(f.expires_at, purge_used_urls_after.expires_at), coalesce(f.id, purge_used_urls_after.id), a.number, a.number
        INTO purge_used_urls_after.expires_at, purge_used_urls_after.id, looked_at, purged
        FROM (SELECT count(*) AS number FROM deleted) a LEFT JOIN furthest f ON true;
END
$$;
COMMENT ON FUNCTION tollgate.purge_used_urls_after(integer, timestamptz, uuid) IS
    'A batch of purge_used_urls after a place (NULL: from the front). Internal.';

CREATE FUNCTION tollgate.purge_used_urls(batch_size integer DEFAULT 1000) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN tollgate.continue_walk('purge_used_urls', 'tollgate.purge_used_urls_after($2, $3, $4::uuid)', NULL, $1);
END
$$;
COMMENT ON FUNCTION tollgate.purge_used_urls(integer) IS
    'Deletes what is stored of signed URLs that were used once they are over, and returns how many';
