-- Issuing, importing and listing tokens.

CREATE FUNCTION tollgate.create_api_token(
    user_id     text,
    name        text,
    scopes      text[]   DEFAULT '{}',
    expires_in  interval DEFAULT NULL,
    metadata    jsonb    DEFAULT '{}',
    allowed_ips cidr[]   DEFAULT NULL,
    rate_limit  integer  DEFAULT NULL,
    rate_window interval DEFAULT '1 minute',
    prefix      text     DEFAULT NULL,
    expires_at  timestamptz DEFAULT NULL
) RETURNS tollgate.issued_token
    LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'create_api_token';
COMMENT ON FUNCTION tollgate.create_api_token(text, text, text[], interval, jsonb, cidr[], integer, interval, text, timestamptz) IS
    'Issues a token for a user. The returned row is the only place where its plaintext appears. It ends after expires_in, days counted in UTC, or at expires_at, not both; event token.created';

CREATE FUNCTION tollgate.import_api_token(
    user_id     text,
    name        text,
    token_hash  bytea,
    scopes      text[]   DEFAULT '{}',
    expires_in  interval DEFAULT NULL,
    metadata    jsonb    DEFAULT '{}',
    allowed_ips cidr[]   DEFAULT NULL,
    rate_limit  integer  DEFAULT NULL,
    rate_window interval DEFAULT '1 minute',
    format      text     DEFAULT 'sha256',
    expires_at   timestamptz DEFAULT NULL,
    created_at   timestamptz DEFAULT NULL,
    last_used_at timestamptz DEFAULT NULL,
    disabled_at  timestamptz DEFAULT NULL,
    revoked_at   timestamptz DEFAULT NULL
) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'import_api_token';
COMMENT ON FUNCTION tollgate.import_api_token(text, text, bytea, text[], interval, jsonb, cidr[], integer, interval, text, timestamptz, timestamptz, timestamptz, timestamptz, timestamptz) IS
    'Imports a token of another system by a digest of its plaintext, with that system''s data, and returns its id; 23505 when one with that digest exists; event token.imported. The format says which digest: sha256, sha512, sha512-of-hex or sanctum; at its first use the token gets Tollgate''s own digest. Unless it has Tollgate''s format it is accepted only while tollgate.accept_foreign_tokens is on';

CREATE FUNCTION tollgate.check_token_fields(
    fields      text[],
    name        text,
    scopes      text[],
    expires_at  timestamptz,
    metadata    jsonb,
    allowed_ips cidr[],
    rate_limit  integer,
    rate_window interval
) RETURNS text[]
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'check_token_fields';
COMMENT ON FUNCTION tollgate.check_token_fields(text[], text, text[], timestamptz, jsonb, cidr[], integer, interval) IS
    'Raises 22023 unless a token may be issued with the named fields; returns the scopes without duplicates. Internal.';

CREATE FUNCTION tollgate.issued_detail(token tollgate.api_tokens) RETURNS jsonb
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
    SELECT jsonb_strip_nulls(jsonb_build_object(
        'name', ($1).name, 'hint', ($1).hint, 'scopes', ($1).scopes, 'expires_at', ($1).expires_at, 'allowed_ips', ($1).allowed_ips,
        'rate_limit', ($1).rate_limit, 'rate_window', ($1).rate_window, 'parent_id', ($1).parent_id, 'rotated_from', ($1).rotated_from))
$$;
COMMENT ON FUNCTION tollgate.issued_detail(tollgate.api_tokens) IS
    'The detail of the event for an issued token, however it was issued. Internal.';

CREATE VIEW tollgate.tokens AS
    SELECT t.id, t.user_id, t.name, t.hint,
           CASE WHEN t.revoked_at IS NOT NULL THEN 'revoked'
                WHEN t.disabled_at IS NOT NULL THEN 'disabled'
                WHEN t.expires_at <= now() THEN 'expired'
                ELSE 'active' END AS status,
           t.scopes, t.metadata, t.allowed_ips, t.rate_limit, t.rate_window, t.created_at, t.created_by, t.expires_at,
           t.disabled_at, t.revoked_at, t.revoked_reason, t.parent_id, t.rotated_from,
           coalesce(u.use_count, 0) AS use_count, coalesce(u.denied_count, 0) AS denied_count,
           u.last_used_at, u.last_used_ip, t.rotated_to, t.disabled_via, t.disabled_with_user,
           CASE WHEN t.quota_id IS NOT NULL THEN tollgate.quota_remaining(t.quota_id) END AS quota_remaining
    FROM tollgate.api_tokens t LEFT JOIN tollgate.token_usage u ON u.token_id = t.id;
COMMENT ON VIEW tollgate.tokens IS 'Tokens in readable form: hint, status, usage as of the last flush, and what remains of its own quota; never the digest';

CREATE FUNCTION tollgate.check_user_named(user_id text) RETURNS void
    LANGUAGE plpgsql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Blank too: no token has such a user.
    IF $1 IS NULL OR $1 !~ '[^[:space:]]' THEN
        RAISE EXCEPTION 'a user must be named'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: user_id, which is %s.', CASE WHEN $1 IS NULL THEN 'NULL' ELSE 'empty or blank' END),
                  HINT = 'Pass the key of the user in your application, as text.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_user_named(text) IS
    'Raises 22023 for a NULL or blank user, who can have no tokens: the mistake would go unnoticed. Internal.';

CREATE FUNCTION tollgate.check_page_size(max_tokens integer) RETURNS void
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF $1 < 1 THEN
        RAISE EXCEPTION 'a page has at least one token'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: max_tokens, of %s.', $1),
                  HINT = 'Give how many you want at a time, such as 100.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_page_size(integer) IS 'Raises 22023 unless a page can have that many tokens. Internal.';

-- Ids are in the order in which they were created, which an index has: so the cost of a page depends on its size.
CREATE FUNCTION tollgate.list_api_tokens(user_id text, max_tokens integer DEFAULT NULL, after uuid DEFAULT NULL) RETURNS SETOF tollgate.tokens
    LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET jit = off
    SET enable_seqscan = off
    SET enable_bitmapscan = off
    SET enable_sort = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
BEGIN ATOMIC
    SELECT tollgate.check_user_named($1);
    SELECT tollgate.check_page_size($2);
    SELECT t.* FROM tollgate.tokens t
        WHERE t.user_id = tollgate.without_token('user_id', $1) AND t.id > coalesce($3, '00000000-0000-0000-0000-000000000000')
        ORDER BY t.id LIMIT $2;
END;
COMMENT ON FUNCTION tollgate.list_api_tokens(text, integer, uuid) IS
    'The tokens of a user, oldest first, all or a page of at most max_tokens after the one with an id: hint, status and usage, never the digest; 22023 without a user';

-- By the index of what narrows the search most: the user, the hint, or else the id; everything else is looked at row by row. A page
-- looks at so many rows at most, whatever it finds, so that a search for what is rare takes many short statements instead of a
-- long one. Dynamic, since a condition that may be absent uses no index.
CREATE FUNCTION tollgate.find_api_tokens(
    user_id            text    DEFAULT NULL,
    hint               text    DEFAULT NULL,
    name               text    DEFAULT NULL,
    status             text    DEFAULT NULL,
    max_tokens         integer DEFAULT 100,
    after              uuid    DEFAULT NULL,
    OUT tokens         tollgate.tokens[],
    OUT continue_after uuid
)
    LANGUAGE plpgsql STABLE PARALLEL SAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET jit = off
    SET enable_seqscan = off
    SET enable_bitmapscan = off
    SET enable_sort = off
    SET enable_incremental_sort = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
AS $$
DECLARE
    most  CONSTANT integer := 10000;
    range CONSTANT text := CASE
        WHEN $1 IS NOT NULL THEN 't.user_id = $1 COLLATE "default" AND t.id > $2'
        WHEN $2 IS NOT NULL THEN 't.hint = $1 COLLATE "default" AND t.id > $2'
        ELSE 't.id > $2' END;
    ids   uuid[];
BEGIN
    PERFORM tollgate.without_token('user_id', $1), tollgate.without_token('hint', $2), tollgate.without_token('name', $3);
    $6 := coalesce($6, '00000000-0000-0000-0000-000000000000');
    IF $5 IS NULL OR $5 NOT BETWEEN 1 AND most THEN
        RAISE EXCEPTION 'a page has 1 to % tokens', most
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: max_tokens, of %s.', coalesce($5::text, 'NULL')),
                  HINT = 'Ask for the next page with continue_after of this one.';
    END IF;
    IF $4 NOT IN ('active', 'disabled', 'expired', 'revoked') THEN
        RAISE EXCEPTION 'a token has no such status: %', tollgate.quote_redacted($4)
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: status.',
                  HINT = 'It is one of active, disabled, expired and revoked.';
    END IF;
    EXECUTE 'SELECT array_agg(f.id) FROM (
                 SELECT l.id FROM (
                     SELECT t.id, t.hint, t.name, t.status FROM tollgate.tokens t WHERE ' || range || ' ORDER BY t.id LIMIT $3) l
                 WHERE l.hint = coalesce($4, l.hint) AND l.name = coalesce($5, l.name) AND l.status = coalesce($6, l.status)
                 ORDER BY l.id LIMIT $7) f'
        INTO ids USING coalesce($1, $2), $6, most, $2, $3, $4, $5;
    tokens := ARRAY(
        SELECT t FROM unnest(ids) WITH ORDINALITY i (id, number) JOIN tollgate.tokens t ON t.id = i.id ORDER BY i.number);
    continue_after := ids[$5];
    IF continue_after IS NULL THEN
        EXECUTE 'SELECT t.id FROM tollgate.api_tokens t WHERE ' || range || ' ORDER BY t.id OFFSET $3 - 1 LIMIT 1'
            INTO continue_after USING coalesce($1, $2), $6, most;
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.find_api_tokens(text, text, text, text, integer, uuid) IS
    'Tokens of all users, or of one, with a hint, a name or a status, oldest first: a page of at most max_tokens, found among the next 10000 after the one with an id, and after which token the next page continues, NULL if there are no more. Hint, status and usage, never the digest; 22023 for an unknown status';
