-- What time does to tokens: expiries are announced and recorded, ended tokens are deleted. Called by the daemon, in bounded batches.

CREATE FUNCTION tollgate.check_batch_size(batch_size integer) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF $1 IS NULL OR $1 NOT BETWEEN 1 AND 100000 THEN
        RAISE EXCEPTION 'a batch has 1 to 100000 tokens'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: batch_size, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'A small batch holds its locks for a short time; call again until less than a batch is returned.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_batch_size(integer) IS 'Raises 22023 unless a batch size is sensible. Internal.';

CREATE FUNCTION tollgate.check_retention(retention interval) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF $1 IS NULL OR $1 < interval '0' OR $1 > interval '1000 years' THEN
        RAISE EXCEPTION 'a retention is from nothing to 1000 years'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: retention, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'Give how long what is over is kept, such as interval ''30 days''.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_retention(interval) IS 'Raises 22023 unless a retention is sensible. Internal.';

CREATE FUNCTION tollgate.expire_tokens(batch_size integer DEFAULT 1000) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- A variable, because the planner uses no index for a comparison with a volatile function.
    due      timestamptz := clock_timestamp();
    affected bigint;
    one_id   uuid;
    one_user text;
BEGIN
    PERFORM tollgate.check_batch_size($1);
    WITH expired AS (
        UPDATE tollgate.api_tokens t SET expired_at = due
            WHERE t.ctid = ANY (ARRAY(
                SELECT d.ctid FROM tollgate.api_tokens d
                WHERE d.expires_at <= due AND d.expired_at IS NULL AND d.revoked_at IS NULL
                ORDER BY d.expires_at LIMIT $1 FOR UPDATE SKIP LOCKED))
            RETURNING t.id, t.user_id, t.expires_at
    ), logged AS (
        -- The epoch is asked for once, not for each row.
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail, epoch)
            SELECT 'token.expired', e.id, e.user_id, jsonb_build_object('expires_at', e.expires_at), (SELECT tollgate.current_epoch()) FROM expired e ORDER BY e.expires_at
    )
    SELECT count(*), (array_agg(e.id))[1], (array_agg(e.user_id))[1] INTO affected, one_id, one_user FROM expired e;
    IF affected = 1 THEN
        PERFORM tollgate.notify_token_event('token.expired', one_id, one_user, NULL, NULL);
    ELSIF affected > 1 THEN
        PERFORM tollgate.notify_token_event('token.expired', NULL, NULL, NULL, affected);
    END IF;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.expire_tokens(integer) IS
    'Records the expiry of tokens past their time, once each (event token.expired), and says how many; they were refused from that time on without it';

CREATE FUNCTION tollgate.announce_expiries(notice interval DEFAULT '7 days', batch_size integer DEFAULT 1000) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- Variables, because the planner uses no index for a comparison with a volatile function.
    start    timestamptz := clock_timestamp();
    until    timestamptz;
    affected bigint;
BEGIN
    PERFORM tollgate.check_batch_size($2);
    IF $1 IS NULL OR $1 < interval '0' OR $1 > interval '10 years' THEN
        RAISE EXCEPTION 'a notice is from nothing to 10 years'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: notice, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'Give how long before its end a token is told of, such as interval ''7 days''.';
    END IF;
    until := start + $1;
    -- Each token is looked at once for each expiry that it has: what is dealt with leaves the index.
    WITH noted AS (
        UPDATE tollgate.api_tokens t SET announced_expiry = t.expires_at
            WHERE t.ctid = ANY (ARRAY(
                SELECT d.ctid FROM tollgate.api_tokens d
                WHERE d.expires_at > start AND d.expires_at <= until AND d.expired_at IS NULL AND d.revoked_at IS NULL
                  -- Nobody need do anything about the end of a token that has a successor.
                  AND d.rotated_to IS NULL AND d.announced_expiry IS DISTINCT FROM d.expires_at
                ORDER BY d.expires_at LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED))
            RETURNING t.id, t.user_id, t.name, t.expires_at, t.parent_id, t.created_at
    ), logged AS (
        -- The epoch is asked for once, not for each row.
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail, epoch)
            SELECT 'token.expiring', n.id, n.user_id, jsonb_build_object('name', n.name, 'expires_at', n.expires_at), (SELECT tollgate.current_epoch())
            FROM noted n
            -- Nor about one that was derived to be brief.
            WHERE NOT (n.parent_id IS NOT NULL AND n.expires_at <= n.created_at + $1)
            ORDER BY n.expires_at
    )
    SELECT count(*) INTO affected FROM noted n;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.announce_expiries(interval, integer) IS
    'Tells of tokens that expire within the notice, once for each expiry (event token.expiring), and says how many it has dealt with: also those that were derived to live for less than the notice, of which it does not tell';

-- Called for a few tokens at a time, of which the planning would take most: so there is one plan, and whatever it takes the
-- batch's size for, it goes by the indexes. What is switched off for that adds so much to a plan's estimated cost that it would be
-- compiled (JIT), which takes a second.
--
-- It goes on from a place in the order in which tokens ended. From the first one on, each call would go again over all that has
-- to stay, and over the dead entries of all that earlier calls deleted, for as long as some snapshot needs those.
CREATE FUNCTION tollgate.purge_tokens_after(
    retention      interval,
    batch_size     integer,
    INOUT ended_at timestamptz DEFAULT NULL,
    INOUT token_id uuid DEFAULT NULL,
    OUT looked_at  bigint,
    OUT purged     bigint
)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
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
    PERFORM tollgate.check_batch_size($2);
    PERFORM tollgate.check_retention($1);
    ended_at := coalesce(ended_at, '-infinity');
    token_id := coalesce(token_id, '00000000-0000-0000-0000-000000000000');
    -- Waits for flushes under way, which would else bring usage of a token that is gone; those to come wait for this batch.
    LOCK TABLE tollgate.usage_flushes IN SHARE MODE;
    -- A token whose expiry is not recorded yet stays, or its event would be lost; and so do its ancestors, without which
    -- nothing would say what it may be at most. A token that was rotated names its successor for as long as it is there.
    WITH ended AS MATERIALIZED (
        SELECT e.ctid AS place, e.id, least(e.revoked_at, e.expires_at) AS ended_at FROM tollgate.api_tokens e
            WHERE (e.revoked_at IS NOT NULL OR e.expired_at IS NOT NULL) AND least(e.revoked_at, e.expires_at) <= now() - $1
              AND (least(e.revoked_at, e.expires_at), e.id) > (purge_tokens_after.ended_at, purge_tokens_after.token_id)
            ORDER BY least(e.revoked_at, e.expires_at), e.id LIMIT $2
    ), deleted AS (
        DELETE FROM tollgate.api_tokens t
            WHERE t.ctid = ANY (ARRAY(
                SELECT d.ctid FROM ended e JOIN tollgate.api_tokens d ON d.ctid = e.place
                -- It may have been given a later expiry meanwhile.
                WHERE (d.revoked_at IS NOT NULL OR d.expired_at IS NOT NULL) AND least(d.revoked_at, d.expires_at) <= now() - $1
                  AND NOT EXISTS (SELECT FROM tollgate.api_tokens c WHERE c.parent_id = d.id)
                  AND NOT EXISTS (SELECT FROM tollgate.api_tokens o WHERE o.id = d.rotated_from)
                FOR UPDATE OF d SKIP LOCKED))
            RETURNING t.id, t.user_id, least(t.revoked_at, t.expires_at) AS ended_at
    ), forgotten AS (
        DELETE FROM tollgate.token_usage u USING deleted p WHERE u.token_id = p.id
    ), forgotten_hours AS (
        DELETE FROM tollgate.usage_hourly h USING deleted p WHERE h.token_id = p.id
    ), logged AS (
        -- The epoch is asked for once, not for each row.
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail, epoch)
            SELECT 'token.purged', p.id, p.user_id, jsonb_build_object('ended_at', p.ended_at), (SELECT tollgate.current_epoch()) FROM deleted p ORDER BY p.ended_at
    ), furthest AS (
        SELECT e.ended_at, e.id FROM ended e ORDER BY e.ended_at DESC, e.id DESC LIMIT 1
    )
    SELECT coalesce(f.ended_at, purge_tokens_after.ended_at), coalesce(f.id, purge_tokens_after.token_id),
           (SELECT count(*) FROM ended), (SELECT count(*) FROM deleted)
        INTO purge_tokens_after.ended_at, purge_tokens_after.token_id, looked_at, purged
        FROM (SELECT) one LEFT JOIN furthest f ON true;
END
$$;
COMMENT ON FUNCTION tollgate.purge_tokens_after(interval, integer, timestamptz, uuid) IS
    'purge_tokens for who calls it many times: goes on after the place that the call before returned (NULL: from the beginning), and looks at no more than a batch. looked_at is less than that once there are no more; what had to stay for its descendants is found by another round';

CREATE FUNCTION tollgate.purge_tokens(retention interval DEFAULT '30 days', batch_size integer DEFAULT 1000) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    affected bigint := 0;
    ended    timestamptz;
    last     uuid;
    looked   bigint;
    gone     bigint;
    wanted   integer;
BEGIN
    PERFORM tollgate.check_batch_size($2);
    LOOP
        wanted := $2 - affected;
        SELECT p.ended_at, p.token_id, p.looked_at, p.purged INTO ended, last, looked, gone
            FROM tollgate.purge_tokens_after($1, wanted, ended, last) p;
        affected := affected + gone;
        EXIT WHEN affected >= $2 OR looked < wanted;
    END LOOP;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.purge_tokens(interval, integer) IS
    'Deletes tokens that were revoked or expired longer ago than the retention, with their usage (event token.purged each), and says how many; derived tokens before those they were derived from, and a successor only once the token that it replaced is gone';

CREATE FUNCTION tollgate.purge_usage(retention interval DEFAULT '90 days', batch_size integer DEFAULT 1000) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    affected bigint;
BEGIN
    PERFORM tollgate.check_batch_size($2);
    PERFORM tollgate.check_retention($1);
    DELETE FROM tollgate.usage_hourly h
        WHERE h.ctid = ANY (ARRAY(
            SELECT o.ctid FROM tollgate.usage_hourly o
            WHERE o.hour < date_bin('1 hour', now() - $1, timestamptz 'epoch')
            ORDER BY o.hour LIMIT $2 FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS affected = ROW_COUNT;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.purge_usage(interval, integer) IS
    'Deletes hours of usage_hourly that ended longer ago than the retention, and says how many rows; the totals of the tokens stay';
