-- Revoking tokens, permanently.

CREATE FUNCTION tollgate.stored_reason(reason text) RETURNS text
    LANGUAGE plpgsql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF length($1) > 1000 THEN
        RAISE EXCEPTION 'a reason has at most 1000 characters'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: reason, of %s characters.', length($1)),
                  HINT = 'Shorten it, or put a link to the ticket there.';
    END IF;
    -- Anything that may be a digest is left out; a token is refused, as everywhere.
    RETURN regexp_replace(tollgate.without_token('reason', $1), '[0-9A-Fa-f]{64,}', '…', 'g');
END
$$;
COMMENT ON FUNCTION tollgate.stored_reason(text) IS
    'A reason as it is stored: without anything that may be a digest; raises 22023 if it contains a token, or is too long. Internal.';

CREATE FUNCTION tollgate.revoke_api_token(token_id uuid, user_id text DEFAULT NULL, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    token    tollgate.api_tokens;
    affected bigint;
BEGIN
    $3 := tollgate.stored_reason($3);
    PERFORM tollgate.without_token('user_id', $2);
    token := tollgate.lock_token($1);
    IF token.id IS NULL OR token.user_id <> $2 OR token.revoked_at IS NOT NULL THEN
        RETURN false;
    END IF;
    WITH revoked AS (
        UPDATE tollgate.api_tokens t SET revoked_at = clock_timestamp(), revoked_reason = $3
            WHERE t.id = ANY (ARRAY(SELECT tollgate.descendants($1)) || $1) AND t.revoked_at IS NULL
            RETURNING t.id, t.user_id
    ), logged AS (
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
            SELECT 'token.revoked', r.id, r.user_id,
                   jsonb_strip_nulls(jsonb_build_object('reason', $3, 'ancestor', CASE WHEN r.id <> $1 THEN $1 END))
            FROM revoked r ORDER BY r.id <> $1, r.id
    )
    SELECT count(*) - 1 INTO affected FROM revoked;
    PERFORM tollgate.notify_family_event('token.revoked', $1, token.user_id, $3, affected);
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.revoke_api_token(uuid, text, text) IS
    'Revokes a token permanently, with all that were derived from it; false when it is unknown, does not belong to that user, or is already revoked; event token.revoked each. A NULL user_id stands for any user: for the authenticated one there is revoke_own_api_token';

CREATE FUNCTION tollgate.revoke_own_api_token(token_id uuid, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.stored_reason($2);
    IF tollgate.current_user_id() IS NULL THEN
        RAISE EXCEPTION 'this transaction is not authenticated'
            USING ERRCODE = 'invalid_authorization_specification', DETAIL = 'This transaction has no identity.',
                  HINT = 'Call tollgate.authenticate() first, in the same transaction.';
    END IF;
    RETURN tollgate.revoke_api_token($1, tollgate.current_user_id(), $2);
END
$$;
COMMENT ON FUNCTION tollgate.revoke_own_api_token(uuid, text) IS
    'Revokes a token of the user who is authenticated in this transaction, else raises 28000; false when it is unknown, another user''s, or already revoked';

CREATE FUNCTION tollgate.revoke_families(roots uuid[], reason text, source jsonb) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    affected bigint;
BEGIN
    WITH RECURSIVE family AS (
        SELECT r.id FROM unnest($1) r (id)
        UNION ALL
        SELECT t.id FROM family f JOIN tollgate.api_tokens t ON t.parent_id = f.id
    ), revoked AS (
        UPDATE tollgate.api_tokens t SET revoked_at = clock_timestamp(), revoked_reason = $2
            WHERE t.id = ANY (ARRAY(SELECT f.id FROM family f)) AND t.revoked_at IS NULL
            RETURNING t.id, t.user_id
    ), logged AS (
        -- A subquery, so that the epoch is looked up once and not for each row.
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail, epoch)
            SELECT 'token.revoked', r.id, r.user_id, jsonb_strip_nulls(jsonb_build_object('reason', $2)) || $3, (SELECT tollgate.current_epoch())
            FROM revoked r ORDER BY r.id
    )
    SELECT count(*) INTO affected FROM revoked;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.revoke_families(uuid[], text, jsonb) IS
    'Revokes tokens whose rows are locked, with all that were derived from them, and returns how many; one event each. Internal.';

-- Uses the indexes, also in the functions it calls: a sequential scan for a thousand rows is cheap once, but not a
-- thousand times.
CREATE FUNCTION tollgate.revoke_without_notification(user_ids text[], reason text, source jsonb) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
    SET plan_cache_mode = force_generic_plan
    SET jit = off
    SET enable_seqscan = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
AS $$
DECLARE
    root     uuid;
    roots    uuid[];
    affected bigint := 0;
BEGIN
    -- Whole families, each under the lock of its root, or a child that is being derived would survive. A token that is
    -- rotated or issued while a lock is waited for has its own root, which the next round finds.
    LOOP
        roots := NULL;
        -- A thousand families at a time, as a user may have any number of tokens. PL/pgSQL gives its arguments the
        -- collation of the call, which may be that of a name and not that of the index.
        FOR root IN
            SELECT t.id FROM unnest($1) u (id) JOIN tollgate.api_tokens t ON t.user_id = u.id COLLATE "default"
                WHERE t.parent_id IS NULL AND t.revoked_at IS NULL ORDER BY t.user_id COLLATE "C", t.id FOR UPDATE OF t
        LOOP
            roots := roots || root;
            IF cardinality(roots) >= 1000 THEN
                affected := affected + tollgate.revoke_families(roots, $2, $3);
                roots := '{}';
            END IF;
        END LOOP;
        PERFORM tollgate.check_snapshot(NULL, $1);
        EXIT WHEN roots IS NULL;
        affected := affected + tollgate.revoke_families(roots, $2, $3);
    END LOOP;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.revoke_without_notification(text[], text, jsonb) IS
    'revoke_tokens_of_users for callers that notify themselves. Internal.';

CREATE FUNCTION tollgate.revoke_tokens_of_users(user_ids text[], reason text, source jsonb) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    affected bigint := tollgate.revoke_without_notification($1, $2, $3);
BEGIN
    IF affected > 0 THEN
        PERFORM tollgate.notify_token_event('token.revoked', NULL, CASE WHEN cardinality($1) = 1 THEN $1[1] END, NULL, affected);
    END IF;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.revoke_tokens_of_users(text[], text, jsonb) IS
    'Revokes every token of some users, and returns how many; one event each, with the source in its detail, and one notification. Internal.';

CREATE FUNCTION tollgate.revoke_all_api_tokens(user_id text, reason text DEFAULT NULL) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.check_user_named($1);
    RETURN tollgate.revoke_tokens_of_users(ARRAY[tollgate.without_token('user_id', $1)], tollgate.stored_reason($2), '{}');
END
$$;
COMMENT ON FUNCTION tollgate.revoke_all_api_tokens(text, text) IS
    'Revokes every token of a user that is not revoked yet, and returns how many; one event token.revoked each, one notification; 22023 without a user';

CREATE FUNCTION tollgate.revoke_presented_token(token text, reason text DEFAULT NULL, client_ip inet DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- auto_explain logs no plan of a simple PL/pgSQL expression, but would log that of a SELECT here, with the token in
    -- it.
    IF tollgate.is_refresh_token($1) THEN
        RETURN tollgate.revoke_session(tollgate.presented_session_id($1, $3), NULL, $2);
    END IF;
    RETURN tollgate.revoke_api_token(tollgate.presented_token_id($1, $3), NULL, $2);
END
$$;
COMMENT ON FUNCTION tollgate.revoke_presented_token(text, text, inet) IS
    'Revokes a token by its plaintext, so that anyone who finds a leaked one can end it, or ends the session of a refresh token, in whatever format it was issued and whatever formats the session accepts; false when it is malformed, unknown or already revoked. Failed attempts count and are logged as for verify_api_token; 53400 at an address with too many failed attempts';
