-- Housekeeping: expiries are announced and recorded, ended tokens are deleted. Called by the daemon, in bounded
-- batches.
--
-- Each of these walks along an index that handled tokens leave. While an older snapshot exists (of pg_dump, of a
-- report, of a replication slot), the entries of handled tokens stay, and a batch that started at the front would pass
-- over all that earlier batches handled. So a batch starts where the previous one ended: the functions named ..._after
-- take that place as an argument and return the next one, the others store it in a row. A walk that reaches the end
-- starts again at the front, and finds tokens there that were locked, committed late or given another end meanwhile.

CREATE TABLE tollgate.housekeeping_cursors (
    task     text        PRIMARY KEY,
    at       timestamptz,
    id       text,
    begun_at timestamptz
) WITH (fillfactor = 50);
COMMENT ON TABLE tollgate.housekeeping_cursors IS
    'Where the last batch of each task ended, and when it was last at the front; NULL at the front. A hint: a wrong or missing place only costs time. Not dumped';
INSERT INTO tollgate.housekeeping_cursors (task)
    VALUES ('announce_expiries'), ('announce_session_expiries'), ('expire_tokens'), ('invalidate_sessions'), ('purge_assertions'),
           ('purge_denied'), ('purge_disabled'), ('purge_given_up'), ('purge_revoked_users'), ('purge_sessions'), ('purge_tokens'), ('purge_usage'),
           ('purge_used_urls'), ('purge_user_usage');

-- Each cluster does its own housekeeping.
CREATE TRIGGER leave_out BEFORE INSERT OR UPDATE OR DELETE ON tollgate.housekeeping_cursors
    FOR EACH ROW WHEN (tollgate.is_logical_worker()) EXECUTE FUNCTION tollgate.leave_out();
ALTER TABLE tollgate.housekeeping_cursors ENABLE REPLICA TRIGGER leave_out;

CREATE FUNCTION tollgate.check_batch_size(batch_size integer, most integer DEFAULT 100000) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF $1 IS NULL OR $1 NOT BETWEEN 1 AND $2 THEN
        RAISE EXCEPTION 'a batch has 1 to % tokens', $2
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: batch_size, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'A small batch holds its locks for a short time; call again until less than a batch is returned.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_batch_size(integer, integer) IS 'Raises 22023 unless a batch size is sensible. Internal.';

CREATE FUNCTION tollgate.check_retention(retention interval) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    floor interval;
BEGIN
    IF $1 IS NULL OR $1 < interval '0' OR $1 > interval '1000 years' THEN
        RAISE EXCEPTION 'a retention is from nothing to 1000 years'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: retention, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'Give how long ended data is kept, such as 30 days.';
    END IF;
    -- The role that may purge does not decide how long data is kept. The call loads the library, which defines the setting.
    PERFORM tollgate.system_identifier();
    floor := current_setting('tollgate.min_retention');
    IF now() - $1 > now() - floor THEN
        RAISE EXCEPTION 'ended data is kept for at least %', floor
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: retention, of %s.', $1),
                  HINT = 'Give a longer one; a superuser may set tollgate.min_retention.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_retention(interval) IS 'Raises 22023 unless a retention is sensible, and not less than tollgate.min_retention. Internal.';

CREATE FUNCTION tollgate.continue_walk(task text, step text, argument interval, batch_size integer, patience interval DEFAULT '0') RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    place_at timestamptz;
    last     text;
    begun    timestamptz;
    looked   bigint;
    done     bigint;
    wanted   integer;
    whole    boolean;
    affected bigint := 0;
BEGIN
    PERFORM tollgate.check_batch_size($4);
    SELECT p.at, p.id, p.begun_at INTO place_at, last, begun FROM tollgate.housekeeping_cursors p WHERE p.task = $1;
    IF place_at IS NULL THEN
        begun := clock_timestamp();
    END IF;
    whole := place_at IS NULL OR begun > clock_timestamp() - $5;
    LOOP
        wanted := least($4 - affected, 1000);
        EXECUTE 'SELECT s.* FROM ' || $2 || ' s' INTO place_at, last, looked, done USING $3, wanted, place_at, last;
        affected := affected + done;
        EXIT WHEN affected >= $4;
        IF looked < wanted THEN
            place_at := NULL;
            last := NULL;
            EXIT WHEN whole;
            whole := true;
            begun := clock_timestamp();
        END IF;
    END LOOP;
    -- Does not wait for another session that does the same: either place is good.
    UPDATE tollgate.housekeeping_cursors p SET at = place_at, id = last, begun_at = begun
        WHERE p.task = (SELECT o.task FROM tollgate.housekeeping_cursors o
                        WHERE o.task = $1 AND (o.at, o.id) IS DISTINCT FROM (place_at, last) FOR UPDATE SKIP LOCKED);
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.continue_walk(text, text, interval, integer, interval) IS
    'Has a batch handled from where the last one ended, by a call ($2) that is given $1 an interval, $2 a number and $3 and $4 a place; returns less than a batch only when there are no more, also not at the front, which is checked again if that was longer ago than the patience. Internal.';

-- Called for a few tokens at a time, so planning would take most of the time: one plan is kept, and it uses the indexes
-- whatever batch size it was made for. Switching off the other scans adds so much to a plan's estimated cost that it
-- would be compiled (JIT), which takes a second.

CREATE FUNCTION tollgate.expire_tokens_after(
    batch_size       integer,
    INOUT expires_at timestamptz DEFAULT NULL,
    INOUT token_id   uuid DEFAULT NULL,
    OUT looked_at    bigint,
    OUT expired      bigint
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
DECLARE
    -- A variable, because the planner uses no index for a comparison with a volatile function.
    due      timestamptz := clock_timestamp();
    one_id   uuid;
    one_user text;
BEGIN
    PERFORM tollgate.check_batch_size($1, 1000);
    expires_at := coalesce(expires_at, '-infinity');
    token_id := coalesce(token_id, '00000000-0000-0000-0000-000000000000');
    WITH recorded AS (
        UPDATE tollgate.api_tokens t SET expired_at = due
            WHERE t.ctid = ANY (ARRAY(
                SELECT d.ctid FROM tollgate.api_tokens d
                WHERE d.expires_at <= due AND d.expired_at IS NULL AND d.revoked_at IS NULL
                  AND (d.expires_at, d.id) > (expire_tokens_after.expires_at, expire_tokens_after.token_id)
                ORDER BY d.expires_at, d.id LIMIT $1 FOR UPDATE SKIP LOCKED))
            RETURNING t.id, t.user_id, t.expires_at
    ), logged AS (
        -- A subquery, so that the epoch is looked up once and not for each row.
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail, epoch)
            SELECT 'token.expired', r.id, r.user_id, jsonb_build_object('expires_at', r.expires_at), (SELECT tollgate.current_epoch())
            FROM recorded r ORDER BY r.expires_at, r.id
    ), furthest AS (
        SELECT r.expires_at, r.id FROM recorded r ORDER BY r.expires_at DESC, r.id DESC LIMIT 1
    )
    SELECT coalesce(f.expires_at, expire_tokens_after.expires_at), coalesce(f.id, expire_tokens_after.token_id), a.number, a.number, a.id, a.user_id
        INTO expire_tokens_after.expires_at, expire_tokens_after.token_id, looked_at, expired, one_id, one_user
        FROM (SELECT count(*) AS number, (array_agg(r.id))[1] AS id, (array_agg(r.user_id))[1] AS user_id FROM recorded r) a
        LEFT JOIN furthest f ON true;
    IF expired = 1 THEN
        PERFORM tollgate.notify_token_event('token.expired', one_id, one_user, NULL, NULL);
    ELSIF expired > 1 THEN
        PERFORM tollgate.notify_token_event('token.expired', NULL, NULL, NULL, expired);
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.expire_tokens_after(integer, timestamptz, uuid) IS
    'expire_tokens for callers that call it many times: continues after the place that the previous call returned (NULL: from the front). looked_at is less than the batch once there are no more';

CREATE FUNCTION tollgate.expire_tokens(batch_size integer DEFAULT 1000) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN tollgate.continue_walk('expire_tokens', 'tollgate.expire_tokens_after($2, $3, $4::uuid)', NULL, $1);
END
$$;
COMMENT ON FUNCTION tollgate.expire_tokens(integer) IS
    'Records the expiry of expired tokens, once each (event token.expired), and returns how many; they are refused from their expiry on in any case';

CREATE FUNCTION tollgate.announce_expiries_after(
    notice           interval,
    batch_size       integer,
    INOUT expires_at timestamptz DEFAULT NULL,
    INOUT token_id   uuid DEFAULT NULL,
    OUT looked_at    bigint,
    OUT announced    bigint
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
DECLARE
    -- Variables, because the planner uses no index for a comparison with a volatile function.
    start timestamptz := clock_timestamp();
    until timestamptz;
BEGIN
    PERFORM tollgate.check_batch_size($2, 1000);
    IF $1 IS NULL OR $1 < interval '0' OR $1 > interval '10 years' THEN
        RAISE EXCEPTION 'a notice is from nothing to 10 years'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: notice, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'Give how long before its expiry a token is announced, such as 7 days.';
    END IF;
    until := start + $1;
    -- One lower bound only: with two, the index may be read from the lower one on. Expired tokens are not announced any
    -- more.
    IF expires_at IS NULL OR expires_at <= start THEN
        expires_at := start;
        token_id := 'ffffffff-ffff-ffff-ffff-ffffffffffff';
    END IF;
    token_id := coalesce(token_id, '00000000-0000-0000-0000-000000000000');
    -- Each token is read once for each of its expiries: handled tokens leave the index.
    WITH noted AS (
        UPDATE tollgate.api_tokens t SET announced_expiry = t.expires_at
            WHERE t.ctid = ANY (ARRAY(
                SELECT d.ctid FROM tollgate.api_tokens d
                WHERE d.expires_at <= until AND d.expired_at IS NULL AND d.revoked_at IS NULL
                  AND (d.expires_at, d.id) > (announce_expiries_after.expires_at, announce_expiries_after.token_id)
                  -- The expiry of a token with a successor needs no attention.
                  AND d.rotated_to IS NULL AND d.announced_expiry IS DISTINCT FROM d.expires_at
                ORDER BY d.expires_at, d.id LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED))
            RETURNING t.id, t.user_id, t.name, t.expires_at, t.parent_id, t.created_at
    ), logged AS (
        -- A subquery, so that the epoch is looked up once and not for each row.
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail, epoch)
            SELECT 'token.expiring', n.id, n.user_id, jsonb_build_object('name', n.name, 'expires_at', n.expires_at), (SELECT tollgate.current_epoch())
            FROM noted n
            -- Neither does that of a token that was derived for a short time.
            WHERE NOT (n.parent_id IS NOT NULL AND n.expires_at <= n.created_at + $1)
            ORDER BY n.expires_at, n.id
    ), furthest AS (
        SELECT n.expires_at, n.id FROM noted n ORDER BY n.expires_at DESC, n.id DESC LIMIT 1
    )
    SELECT coalesce(f.expires_at, announce_expiries_after.expires_at), coalesce(f.id, announce_expiries_after.token_id), a.number, a.number
        INTO announce_expiries_after.expires_at, announce_expiries_after.token_id, looked_at, announced
        FROM (SELECT count(*) AS number FROM noted n) a LEFT JOIN furthest f ON true;
END
$$;
COMMENT ON FUNCTION tollgate.announce_expiries_after(interval, integer, timestamptz, uuid) IS
    'announce_expiries for callers that call it many times: continues after the place that the previous call returned (NULL: from the front). looked_at is less than the batch once there are no more';

CREATE FUNCTION tollgate.announce_expiries(notice interval DEFAULT '7 days', batch_size integer DEFAULT 1000) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN tollgate.continue_walk('announce_expiries', 'tollgate.announce_expiries_after($1, $2, $3, $4::uuid)', $1, $2, '1 minute');
END
$$;
COMMENT ON FUNCTION tollgate.announce_expiries(interval, integer) IS
    'Announces tokens that expire within the notice, once for each expiry (event token.expiring), and returns how many were handled, including those that were derived for less than the notice, which have no event';

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
    PERFORM tollgate.check_batch_size($2, 1000);
    PERFORM tollgate.check_retention($1);
    ended_at := coalesce(ended_at, '-infinity');
    token_id := coalesce(token_id, '00000000-0000-0000-0000-000000000000');
    -- Waits for running flushes, which would otherwise add usage of a deleted token; later ones wait for this batch.
    LOCK TABLE tollgate.usage_flushes IN SHARE MODE;
    -- A token whose expiry is not recorded yet stays, or its event would be lost; and so do its ancestors, which define
    -- its limits. A rotated token names its successor as long as it exists.
    WITH RECURSIVE ended AS MATERIALIZED (
        SELECT e.ctid AS place, e.id, least(e.revoked_at, e.expires_at) AS ended_at FROM tollgate.api_tokens e
            WHERE (e.revoked_at IS NOT NULL OR e.expired_at IS NOT NULL) AND least(e.revoked_at, e.expires_at) <= now() - $1
              AND (least(e.revoked_at, e.expires_at), e.id) > (purge_tokens_after.ended_at, purge_tokens_after.token_id)
            ORDER BY least(e.revoked_at, e.expires_at), e.id LIMIT $2
    ), locked AS MATERIALIZED (
        SELECT d.ctid AS place, d.id, d.rotated_from FROM ended e JOIN tollgate.api_tokens d ON d.ctid = e.place
            -- It may have been given a later expiry meanwhile.
            WHERE (d.revoked_at IS NOT NULL OR d.expired_at IS NOT NULL) AND least(d.revoked_at, d.expires_at) <= now() - $1
              AND NOT EXISTS (SELECT FROM tollgate.api_tokens c WHERE c.parent_id = d.id)
            FOR UPDATE OF d SKIP LOCKED
    ), going AS (
        -- Otherwise a chain of rotated tokens would lose its successors one by one.
        SELECT l.place, l.id FROM locked l WHERE NOT EXISTS (SELECT FROM tollgate.api_tokens o WHERE o.id = l.rotated_from)
        UNION ALL
        SELECT l.place, l.id FROM going g JOIN locked l ON l.rotated_from = g.id
    ), deleted AS (
        DELETE FROM tollgate.api_tokens t
            WHERE t.ctid = ANY (ARRAY(SELECT g.place FROM going g))
            RETURNING t.id, t.user_id, least(t.revoked_at, t.expires_at) AS ended_at
    ), forgotten AS (
        DELETE FROM tollgate.token_usage u USING deleted p WHERE u.token_id = p.id
    ), forgotten_hours AS (
        DELETE FROM tollgate.usage_hourly h USING deleted p WHERE h.token_id = p.id
    ), forgotten_quotas AS (
        DELETE FROM tollgate.quotas q USING deleted p WHERE q.token_id = p.id
    ), logged AS (
        -- A subquery, so that the epoch is looked up once and not for each row.
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
    'purge_tokens for callers that call it many times: continues after the place that the previous call returned (NULL: from the beginning), and reads no more than a batch. looked_at is less than that once there are no more; tokens that had to stay for their descendants are found by another round';

CREATE FUNCTION tollgate.purge_tokens(retention interval DEFAULT '30 days', batch_size integer DEFAULT 1000) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN tollgate.continue_walk('purge_tokens', 'tollgate.purge_tokens_after($1, $2, $3, $4::uuid)', $1, $2);
END
$$;
COMMENT ON FUNCTION tollgate.purge_tokens(interval, integer) IS
    'Deletes tokens that were revoked or expired longer ago than the retention, with their usage (event token.purged each), and returns how many; derived tokens before those they were derived from, and a successor only after the token that it replaced';

CREATE FUNCTION tollgate.purge_usage_after(
    retention      interval,
    batch_size     integer,
    INOUT hour     timestamptz DEFAULT NULL,
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
    PERFORM tollgate.check_batch_size($2, 1000);
    PERFORM tollgate.check_retention($1);
    hour := coalesce(hour, '-infinity');
    token_id := coalesce(token_id, '00000000-0000-0000-0000-000000000000');
    WITH deleted AS (
        DELETE FROM tollgate.usage_hourly h
            WHERE h.ctid = ANY (ARRAY(
                SELECT o.ctid FROM tollgate.usage_hourly o
                WHERE o.hour < date_bin('1 hour', now() - $1, timestamptz 'epoch')
                  AND (o.hour, o.token_id) > (purge_usage_after.hour, purge_usage_after.token_id)
                ORDER BY o.hour, o.token_id LIMIT $2 FOR UPDATE SKIP LOCKED))
            RETURNING h.hour, h.token_id
    ), furthest AS (
        SELECT d.hour, d.token_id FROM deleted d ORDER BY d.hour DESC, d.token_id DESC LIMIT 1
    )
    SELECT coalesce(f.hour, purge_usage_after.hour), coalesce(f.token_id, purge_usage_after.token_id), a.number, a.number
        INTO purge_usage_after.hour, purge_usage_after.token_id, looked_at, purged
        FROM (SELECT count(*) AS number FROM deleted d) a LEFT JOIN furthest f ON true;
END
$$;
COMMENT ON FUNCTION tollgate.purge_usage_after(interval, integer, timestamptz, uuid) IS
    'purge_usage for callers that call it many times: continues after the place that the previous call returned (NULL: from the front). looked_at is less than the batch once there are no more';

CREATE FUNCTION tollgate.purge_user_usage_after(
    retention      interval,
    batch_size     integer,
    INOUT usage_id uuid DEFAULT NULL,
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
AS $$
DECLARE
    page uuid[];
BEGIN
    PERFORM tollgate.check_batch_size($2, 1000);
    PERFORM tollgate.check_retention($1);
    usage_id := coalesce(usage_id, '00000000-0000-0000-0000-000000000000');
    -- Waits for running flushes, which would otherwise add to a row that is gone.
    LOCK TABLE tollgate.usage_flushes IN SHARE MODE;
    page := ARRAY(SELECT u.token_id FROM tollgate.token_usage u
                  WHERE u.token_id > usage_id AND substr(u.token_id::text, 15, 1) = '8' ORDER BY u.token_id LIMIT $2);
    looked_at := cardinality(page);
    -- An imported API token may have an id of that version too.
    DELETE FROM tollgate.token_usage u
        WHERE u.token_id = ANY (page) AND u.hour < now() - $1
          AND NOT EXISTS (SELECT FROM tollgate.api_tokens t WHERE t.id = u.token_id);
    GET DIAGNOSTICS purged = ROW_COUNT;
    usage_id := coalesce(page[looked_at], usage_id);
END
$$;
COMMENT ON FUNCTION tollgate.purge_user_usage_after(interval, integer, uuid) IS
    'Deletes the totals of users whose access tokens were last used or refused longer ago than the retention: looks at a batch of users after the one that the previous call returned (NULL: from the front). looked_at is less than the batch once there are no more';

CREATE FUNCTION tollgate.purge_usage(retention interval DEFAULT '90 days', batch_size integer DEFAULT 1000) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    affected bigint;
    step     record;
    place    uuid;
    seen     bigint := 0;
BEGIN
    affected := tollgate.continue_walk('purge_usage', 'tollgate.purge_usage_after($1, $2, $3, $4::uuid)', $1, $2);
    SELECT p.id::uuid INTO place FROM tollgate.housekeeping_cursors p WHERE p.task = 'purge_user_usage';
    -- A hundred thousand in a call, of which perhaps all are in use.
    WHILE affected < $2 AND seen < 100000 LOOP
        SELECT s.* INTO step FROM tollgate.purge_user_usage_after($1, least($2 - affected, 1000)::integer, place) s;
        seen := seen + step.looked_at;
        place := CASE WHEN step.looked_at >= least($2 - affected, 1000) THEN step.usage_id END;
        affected := affected + step.purged;
        EXIT WHEN place IS NULL;
    END LOOP;
    UPDATE tollgate.housekeeping_cursors p SET id = place::text
        WHERE p.task = (SELECT o.task FROM tollgate.housekeeping_cursors o WHERE o.task = 'purge_user_usage' FOR UPDATE SKIP LOCKED);
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.purge_usage(interval, integer) IS
    'Deletes hours of usage_hourly that ended longer ago than the retention, and the totals of users whose access tokens were not used since, and returns how many rows; the totals of API tokens stay';
