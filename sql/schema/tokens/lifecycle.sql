-- Changes of a token between issuing and revoking: rotate, update, disable and enable.

CREATE FUNCTION tollgate.lock_managed_token(token_id uuid, lock_slots boolean DEFAULT false) RETURNS tollgate.api_tokens
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    token tollgate.api_tokens := tollgate.lock_token($1, $2);
BEGIN
    IF token.id IS NULL THEN
        RAISE EXCEPTION 'there is no such token'
            USING ERRCODE = 'undefined_object', DETAIL = format('Argument: token_id, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'tollgate.list_api_tokens(user_id) shows the ids of a user''s tokens.';
    END IF;
    IF token.revoked_at IS NOT NULL THEN
        PERFORM tollgate.refuse_token($1, 'revoked', 'A revocation is permanent: issue another token.');
    END IF;
    RETURN token;
END
$$;
COMMENT ON FUNCTION tollgate.lock_managed_token(uuid, boolean) IS
    'lock_token for functions that need a token that is not revoked: else raises 42704 or 55000. Internal.';

CREATE FUNCTION tollgate.refuse_token(token_id uuid, state text, hint text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'the token is %', $2
        USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = format('Argument: token_id, of %s.', $1), HINT = $3;
END
$$;
COMMENT ON FUNCTION tollgate.refuse_token(uuid, text, text) IS 'Raises 55000: the state of the token does not allow this. Internal.';

-- ---- Rotation

CREATE FUNCTION tollgate.rotate_api_token(
    token_id        uuid,
    grace           interval    DEFAULT '0',
    expires_in      interval    DEFAULT NULL,
    expires_at      timestamptz DEFAULT NULL,
    revoke_on_reuse boolean     DEFAULT false
) RETURNS tollgate.issued_token
    LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'rotate_api_token';
COMMENT ON FUNCTION tollgate.rotate_api_token(uuid, interval, interval, timestamptz, boolean) IS
    'Replaces a live token by one with a new secret and otherwise the same fields, including the expiry unless another one is given. The old one, and those derived from it, expire after the grace, by default at once; a token is rotated once (55000). If the old one is presented after that, there is an event token.reuse_detected, and with revoke_on_reuse its successors are revoked; events token.rotated and token.created';

CREATE FUNCTION tollgate.lock_for_rotation(token_id uuid) RETURNS tollgate.api_tokens
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    token tollgate.api_tokens := tollgate.lock_managed_token($1);
BEGIN
    IF token.rotated_to IS NOT NULL THEN
        PERFORM tollgate.refuse_token($1, 'rotated already', format('Rotate its successor, %s.', token.rotated_to));
    ELSIF token.disabled_with_user THEN
        PERFORM tollgate.refuse_token($1, 'disabled with its user', 'Activate the user first.');
    ELSIF token.disabled_at IS NOT NULL THEN
        PERFORM tollgate.refuse_token($1, 'disabled', 'Enable it first, with tollgate.set_api_token_enabled().');
    ELSIF token.expires_at <= clock_timestamp() THEN
        PERFORM tollgate.refuse_token($1, 'expired', 'Issue another token, or give it a later expiry with tollgate.update_api_token() first.');
    END IF;
    RETURN token;
END
$$;
COMMENT ON FUNCTION tollgate.lock_for_rotation(uuid) IS 'Locks a token that may be rotated, or raises. Internal.';

CREATE FUNCTION tollgate.replace_token(token_id uuid, successor uuid, token_hash bytea, hint text, grace interval,
                                       expires_in interval, expires_at timestamptz, revoke_on_reuse boolean) RETURNS tollgate.api_tokens
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    old      tollgate.api_tokens;
    ended    tollgate.api_tokens;
    new      tollgate.api_tokens;
    affected bigint;
BEGIN
    SELECT t.* INTO old FROM tollgate.api_tokens t WHERE t.id = $1;
    UPDATE tollgate.api_tokens t 
        SET expires_at = least(t.expires_at, (clock_timestamp() AT TIME ZONE 'UTC' + $5) AT TIME ZONE 'UTC'), rotated_to = $2,
            revoke_on_reuse = nullif($8, false)
        WHERE t.id = $1 RETURNING t.* INTO ended;
    INSERT INTO tollgate.api_tokens (id, token_hash, hint, user_id, name, scopes, metadata, expires_at, rate_limit, rate_window,
                                     allowed_ips, quota_id, parent_id, rotated_from)
        VALUES ($2, $3, $4, old.user_id, old.name, old.scopes, old.metadata,
                coalesce($7, (clock_timestamp() AT TIME ZONE 'UTC' + $6) AT TIME ZONE 'UTC', old.expires_at), old.rate_limit, old.rate_window,
                old.allowed_ips, old.quota_id, old.parent_id, $1)
        RETURNING * INTO new;
    IF new.quota_id IS NOT NULL THEN
        UPDATE tollgate.quotas q SET token_id = $2 WHERE q.id = new.quota_id AND q.token_id = $1;
    END IF;
    IF coalesce(new.expires_at, 'infinity') > coalesce((SELECT p.expires_at FROM tollgate.api_tokens p WHERE p.id = old.parent_id), 'infinity') THEN
        RAISE EXCEPTION 'a derived token cannot outlive its parent'
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = format('Argument: %s, which is later than the end of the parent %s.',
                                  CASE WHEN $7 IS NOT NULL THEN 'expires_at' ELSE 'expires_in' END, old.parent_id),
                  HINT = 'Leave it out to keep the end of its predecessor.';
    END IF;
    INSERT INTO tollgate.audit_log (event, token_id, user_id, detail) VALUES
        ('token.rotated', $1, old.user_id,
         jsonb_build_object('rotated_to', $2, 'changes', tollgate.token_changes(old, ended))),
        ('token.created', $2, new.user_id, tollgate.issued_detail(new));
    affected := tollgate.narrow_descendants(ended, 'rotated');
    PERFORM tollgate.notify_family_event('token.rotated', $1, old.user_id, NULL, affected);
    RETURN new;
END
$$;
COMMENT ON FUNCTION tollgate.replace_token(uuid, uuid, bytea, text, interval, interval, timestamptz, boolean) IS
    'Stores the successor of a token that lock_for_rotation has locked, and ends the token after the grace. Internal.';

-- ---- Changes

CREATE FUNCTION tollgate.read_change(token tollgate.api_tokens, key text, value jsonb) RETURNS tollgate.api_tokens
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    expected text := '{"name": "string", "scopes": "array", "expires_at": "string", "metadata": "object", "allowed_ips": "array",
                       "rate_limit": "number", "rate_window": "string"}'::jsonb ->> $2;
BEGIN
    IF expected IS NULL THEN
        RAISE EXCEPTION 'this cannot be changed in a token: %', tollgate.quote_redacted($2)
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: changes.',
                  HINT = 'The keys are name, scopes, expires_at, metadata, allowed_ips, rate_limit and rate_window.';
    END IF;
    IF jsonb_typeof($3) = 'null' THEN
        $3 := CASE $2 WHEN 'scopes' THEN '[]' WHEN 'metadata' THEN '{}' WHEN 'rate_window' THEN '"1 minute"' ELSE $3 END;
    ELSIF jsonb_typeof($3) = expected THEN
        NULL;
    ELSE
        RAISE invalid_parameter_value;
    END IF;
    RETURN jsonb_populate_record($1, jsonb_build_object($2, $3));
EXCEPTION
    -- PostgreSQL's own message would repeat the value, which may be anything, including a token.
    WHEN data_exception OR program_limit_exceeded THEN
        IF expected IS NULL THEN
            RAISE;
        END IF;
        RAISE EXCEPTION 'this cannot be the % of a token', replace($2, '_', ' ')
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: changes, key %s.', $2),
                  HINT = format('Give a JSON %s%s, or null to clear it.', expected, CASE $2
                      WHEN 'scopes' THEN ' of strings' WHEN 'allowed_ips' THEN ' of networks such as "203.0.113.0/24"'
                      WHEN 'expires_at' THEN ' with a timestamp' WHEN 'rate_window' THEN ' with an interval' ELSE '' END);
END
$$;
COMMENT ON FUNCTION tollgate.read_change(tollgate.api_tokens, text, jsonb) IS 'A token''s row with one change applied. Internal.';

CREATE FUNCTION tollgate.check_within_parent(token tollgate.api_tokens, before tollgate.api_tokens) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    parent tollgate.api_tokens;
    wider  text;
BEGIN
    SELECT t.* INTO parent FROM tollgate.api_tokens t WHERE t.id = $1.parent_id;
    wider := CASE
        WHEN parent.id IS NULL THEN NULL
        WHEN $1.scopes <> $2.scopes AND EXISTS (SELECT FROM unnest($1.scopes) s WHERE NOT tollgate.scope_grants(parent.scopes, s)) THEN 'scopes'
        WHEN $1.expires_at IS DISTINCT FROM $2.expires_at
             AND coalesce($1.expires_at, 'infinity') > coalesce(parent.expires_at, 'infinity') THEN 'expires_at'
        WHEN $1.allowed_ips IS DISTINCT FROM $2.allowed_ips
             AND NOT tollgate.networks_contain(parent.allowed_ips, $1.allowed_ips) THEN 'allowed_ips'
        WHEN ($1.rate_limit, $1.rate_window) IS DISTINCT FROM ($2.rate_limit, $2.rate_window)
             AND NOT tollgate.limit_within(parent.rate_limit, parent.rate_window, $1.rate_limit, $1.rate_window) THEN 'rate_limit'
    END;
    IF wider IS NOT NULL THEN
        RAISE EXCEPTION 'a derived token cannot be wider than its parent'
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = format('Argument: changes, key %s, which is more than the parent %s has.', wider, parent.id),
                  HINT = 'Widen the parent first, or issue an independent token.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_within_parent(tollgate.api_tokens, tollgate.api_tokens) IS
    'Raises 22023 if a change makes a token wider than its parent. Internal.';

CREATE FUNCTION tollgate.update_api_token(token_id uuid, changes jsonb) RETURNS tollgate.tokens
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    before   tollgate.api_tokens;
    after    tollgate.api_tokens;
    keys     text[];
    revived  boolean;
    changed  jsonb;
    affected bigint := 0;
    result   tollgate.tokens;
BEGIN
    IF jsonb_typeof($2) IS DISTINCT FROM 'object' THEN
        RAISE EXCEPTION 'changes are a JSON object'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: changes.',
                  HINT = 'Such as {"name": "laptop", "expires_at": null}; keys that are left out stay unchanged.';
    END IF;
    -- All keys together are smaller than this.
    PERFORM tollgate.check_json('changes', $2, 600000, 64);
    before := tollgate.lock_managed_token($1, $2 ? 'expires_at');
    keys := ARRAY(SELECT jsonb_object_keys($2));
    after := before;
    FOR i IN 1 .. cardinality(keys) LOOP
        after := tollgate.read_change(after, keys[i], $2 -> keys[i]);
    END LOOP;
    IF after.rate_limit IS NULL THEN
        after.rate_window := NULL;
    END IF;

    revived := before.expires_at <= clock_timestamp() AND 'expires_at' = ANY (keys);
    -- While it was expired, its scopes may have been dropped from the catalogue.
    after.scopes := tollgate.check_token_fields(CASE WHEN revived THEN keys || '{scopes}' ELSE keys END, after.name, after.scopes,
        after.expires_at, after.metadata, after.allowed_ips, after.rate_limit, after.rate_window);
    PERFORM tollgate.check_within_parent(after, before);
    IF starts_with(before.user_id, 'service:') AND cardinality(after.scopes) > 0 THEN
        RAISE EXCEPTION 'the secret of a service account grants nothing by itself'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: changes, key scopes.',
                  HINT = 'Give the scopes to the account, with tollgate.update_service_account().';
    END IF;
    IF before.rotated_to IS NOT NULL AND coalesce(after.expires_at, 'infinity') > coalesce(before.expires_at, 'infinity') THEN
        PERFORM tollgate.refuse_token($1, 'rotated and cannot be given a later expiry', format('Change its successor, %s.', before.rotated_to));
    END IF;
    IF revived THEN
        PERFORM tollgate.claim_token_slot(before.user_id);
    END IF;

    changed := tollgate.token_changes(before, after);
    IF changed <> '{}' THEN
        UPDATE tollgate.api_tokens t
            SET name = after.name, scopes = after.scopes, metadata = after.metadata, allowed_ips = after.allowed_ips,
                rate_limit = after.rate_limit, rate_window = after.rate_window, expires_at = after.expires_at,
                -- A new expiry is in the future, and is recorded when it passes.
                expired_at = CASE WHEN changed ? 'expires_at' THEN NULL ELSE t.expired_at END
            WHERE t.id = $1;
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
            VALUES ('token.updated', $1, before.user_id, jsonb_build_object('changes', changed));
        IF NOT tollgate.token_is_within(before, after) THEN
            affected := tollgate.narrow_descendants(after, NULL);
            PERFORM tollgate.notify_family_event('token.updated', $1, before.user_id, NULL, affected);
        END IF;
    END IF;
    SELECT t.* INTO result FROM tollgate.tokens t WHERE t.id = $1;
    RETURN result;
END
$$;
COMMENT ON FUNCTION tollgate.update_api_token(uuid, jsonb) IS
    'Changes a token that is not revoked: keys name, scopes, expires_at, metadata, allowed_ips, rate_limit, rate_window; null clears; any other key is 22023. Narrowing it narrows its descendants as well; a derived one stays within its parent; event token.updated';

-- ---- Disabling

CREATE FUNCTION tollgate.set_api_token_enabled(token_id uuid, enabled boolean, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    token    tollgate.api_tokens;
    inactive boolean;
    already  boolean;
    blocker  uuid;
    affected bigint;
BEGIN
    $3 := tollgate.stored_reason($3);
    IF $2 IS NULL THEN
        RAISE EXCEPTION 'a token is enabled or not'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: enabled, which is NULL.', HINT = 'Pass true or false.';
    END IF;
    -- The user's row is locked before the token's, as where a user is changed.
    inactive := $2 AND tollgate.user_is_inactive($1);
    token := tollgate.lock_token($1);
    -- A token that was disabled through an ancestor, or with its user, can still be disabled by itself.
    already := CASE WHEN $2 THEN token.disabled_at IS NULL
                    ELSE token.disabled_at IS NOT NULL AND token.disabled_via IS NULL AND NOT token.disabled_with_user END;
    IF token.id IS NULL OR token.revoked_at IS NOT NULL OR already THEN
        RETURN false;
    END IF;
    IF inactive THEN
        PERFORM tollgate.refuse_token($1, 'disabled while its user is not active', 'Activate the user first.');
    END IF;
    IF $2 THEN
        SELECT a.id INTO blocker FROM tollgate.ancestors($1) WITH ORDINALITY a (id, n) JOIN tollgate.api_tokens t ON t.id = a.id
            WHERE t.disabled_at IS NOT NULL ORDER BY a.n DESC LIMIT 1;
        IF blocker IS NOT NULL THEN
            PERFORM tollgate.refuse_token($1, 'disabled with an ancestor of it', format('Enable %s first.', blocker));
        END IF;
    END IF;

    WITH RECURSIVE family AS (
        SELECT $1 AS id
        UNION ALL
        -- Not below a token that was disabled by itself: its descendants are disabled through it.
        SELECT t.id FROM family f JOIN tollgate.api_tokens t ON t.parent_id = f.id
        WHERE t.disabled_at IS NULL OR t.disabled_via IS NOT NULL OR t.disabled_with_user
    ), switched AS (
        UPDATE tollgate.api_tokens t
            SET disabled_at = CASE WHEN NOT $2 THEN coalesce(t.disabled_at, clock_timestamp()) END,
                disabled_via = CASE WHEN NOT $2 AND t.id <> $1 THEN $1 END,
                disabled_with_user = false
            FROM tollgate.api_tokens before
            WHERE t.id = ANY (ARRAY(SELECT f.id FROM family f)) AND before.id = t.id AND t.revoked_at IS NULL
            RETURNING t.id, t.user_id, (before.disabled_at IS NULL) <> $2 OR t.id = $1 AS is_logged
    ), logged AS (
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
            SELECT CASE WHEN $2 THEN 'token.enabled' ELSE 'token.disabled' END, s.id, s.user_id,
                   jsonb_strip_nulls(jsonb_build_object('reason', $3, 'ancestor', CASE WHEN s.id <> $1 THEN $1 END))
            FROM switched s WHERE s.is_logged ORDER BY s.id <> $1, s.id
    )
    SELECT count(*) FILTER (WHERE s.is_logged AND s.id <> $1) INTO affected FROM switched s;
    IF NOT $2 THEN
        PERFORM tollgate.notify_family_event('token.disabled', $1, token.user_id, $3, affected);
    END IF;
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.set_api_token_enabled(uuid, boolean, text) IS
    'Disables a token and all tokens derived from it, or enables it again, and those that were not disabled by themselves; false when it is unknown, revoked, or already in that state; 55000 below a disabled ancestor, or while its user is not active; events token.disabled and token.enabled';
