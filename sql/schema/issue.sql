-- Issuing tokens, listing them, taking them away.

CREATE FUNCTION tollgate.create_api_token(
    user_id     text,
    name        text,
    scopes      text[]   DEFAULT '{}',
    expires_in  interval DEFAULT NULL,
    metadata    jsonb    DEFAULT '{}',
    allowed_ips cidr[]   DEFAULT NULL,
    rate_limit  integer  DEFAULT NULL,
    rate_window interval DEFAULT '1 minute',
    prefix      text     DEFAULT NULL
) RETURNS tollgate.issued_token
    LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'create_api_token';
COMMENT ON FUNCTION tollgate.create_api_token(text, text, text[], interval, jsonb, cidr[], integer, interval, text) IS
    'Issues a token for a user. The returned row is the only place where its plaintext ever is; event token.created';

CREATE FUNCTION tollgate.token_digest(token text) RETURNS bytea
    LANGUAGE c IMMUTABLE PARALLEL SAFE STRICT
    AS 'MODULE_PATHNAME', 'token_digest';
COMMENT ON FUNCTION tollgate.token_digest(text) IS
    'The digest under which a presented token is stored; NULL if it is malformed. Internal.';

CREATE VIEW tollgate.tokens WITH (security_barrier) AS
    SELECT t.id, t.user_id, t.name, t.hint,
           CASE WHEN t.revoked_at IS NOT NULL THEN 'revoked'
                WHEN t.disabled_at IS NOT NULL THEN 'disabled'
                WHEN t.expires_at <= now() THEN 'expired'
                ELSE 'active' END AS status,
           t.scopes, t.metadata, t.allowed_ips, t.rate_limit, t.rate_window, t.created_at, t.created_by, t.expires_at,
           t.disabled_at, t.revoked_at, t.revoked_reason, t.parent_id, t.rotated_from,
           coalesce(u.use_count, 0) AS use_count, coalesce(u.denied_count, 0) AS denied_count,
           u.last_used_at, u.last_used_ip
    FROM tollgate.api_tokens t LEFT JOIN tollgate.token_usage u ON u.token_id = t.id;
COMMENT ON VIEW tollgate.tokens IS 'Tokens for people: hint, status and usage as of the last flush; never the digest';

CREATE FUNCTION tollgate.list_api_tokens(user_id text) RETURNS SETOF tollgate.tokens
    LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT t.* FROM tollgate.tokens t WHERE t.user_id = $1 ORDER BY t.created_at, t.id;
END;
COMMENT ON FUNCTION tollgate.list_api_tokens(text) IS 'The tokens of a user, oldest first: hint, status and usage, never the digest';

CREATE FUNCTION tollgate.check_reason(reason text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF length($1) > 1000 THEN
        RAISE EXCEPTION 'a reason has at most 1000 characters'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: reason, of %s characters.', length($1)),
                  HINT = 'Say it shorter, or put a link to the ticket there.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_reason(text) IS 'Raises 22023 if a reason is longer than the log takes. Internal.';

CREATE FUNCTION tollgate.revoke_api_token(token_id uuid, user_id text DEFAULT NULL, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    owner text;
BEGIN
    PERFORM tollgate.check_reason($3);
    UPDATE tollgate.api_tokens t SET revoked_at = clock_timestamp(), revoked_reason = $3
        WHERE t.id = $1 AND ($2 IS NULL OR t.user_id = $2) AND t.revoked_at IS NULL
        RETURNING t.user_id INTO owner;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
        VALUES ('token.revoked', $1, owner, jsonb_strip_nulls(jsonb_build_object('reason', $3)));
    PERFORM tollgate.notify_token_event('token.revoked', $1, owner, $3, NULL);
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.revoke_api_token(uuid, text, text) IS
    'Revokes a token for good; false when it is unknown, is not that user''s, or was revoked already; event token.revoked. A NULL user_id stands for any user: on behalf of a user, make sure that it is not NULL';

CREATE FUNCTION tollgate.revoke_all_api_tokens(user_id text, reason text DEFAULT NULL) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    affected bigint;
BEGIN
    PERFORM tollgate.check_reason($2);
    WITH revoked AS (
        UPDATE tollgate.api_tokens t SET revoked_at = clock_timestamp(), revoked_reason = $2
            WHERE t.user_id = $1 AND t.revoked_at IS NULL
            RETURNING t.id, t.user_id
    ), logged AS (
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
            SELECT 'token.revoked', r.id, r.user_id, jsonb_strip_nulls(jsonb_build_object('reason', $2)) FROM revoked r
    )
    SELECT count(*) INTO affected FROM revoked;
    IF affected > 0 THEN
        PERFORM tollgate.notify_token_event('token.revoked', NULL, $1, NULL, affected);
    END IF;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.revoke_all_api_tokens(text, text) IS
    'Revokes every token of a user that is not revoked yet, and says how many; one event token.revoked each, one notification';

CREATE FUNCTION tollgate.revoke_presented_token(token text, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE sql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce((
        SELECT tollgate.revoke_api_token(t.id, NULL, $2)
        FROM tollgate.api_tokens t WHERE t.token_hash = tollgate.token_digest($1)), false);
END;
COMMENT ON FUNCTION tollgate.revoke_presented_token(text, text) IS
    'Revokes a token by its plaintext, so that whoever finds a leaked one can kill it; false when it is malformed, unknown or revoked already';
