-- Sessions: logins that last, by refresh tokens (RFC 6749 section 6, RFC 9700 section 4.14).
--
-- A session is one row, which each refresh updates in place: no index has a column that refreshing changes. Refresh tokens are
-- not stored. One names its session and its generation, and proves both by a MAC with a sealed key, over the row's secret too
-- (extension/core/src/refresh.rs). So every earlier token of a session is recognised, however old, and its use after the grace
-- ends the session, while a guess ends nothing.
--
-- A session is over when its row says so (revoked_at), at its end, when it was idle, when its user's access was revoked since it
-- was opened (revoked_users), and when its key was withdrawn. The last two need no change of a row, so they take effect at once
-- for any number of sessions.

CREATE TYPE tollgate.issued_session AS (
    session_id        uuid,
    access_token      text,
    access_expires_at timestamptz,
    refresh_token     text,
    expires_at        timestamptz,
    scopes            text[],
    audience          text[]
);
COMMENT ON TYPE tollgate.issued_session IS 'A newly opened session, with its first tokens, which are not stored';

CREATE TYPE tollgate.refreshed_session AS (
    code              text,
    session_id        uuid,
    access_token      text,
    access_expires_at timestamptz,
    refresh_token     text,
    expires_at        timestamptz,
    scopes            text[],
    audience          text[]
);
COMMENT ON TYPE tollgate.refreshed_session IS
    'The outcome of a refresh: with code VALID the next tokens of the session, else why there are none';

-- The library reads this table by column numbers (extension/src/store/sessions.rs). Half of each page is left free for the next
-- versions of its rows. It has no CHECK constraints: PostgreSQL parses each from its text at every UPDATE (ExecRelCheck), which
-- took a sixth of the time of a refresh. Rows are made by open_session, which checks its arguments (tokens/fields.rs,
-- sessions/open.rs in extension/src).
CREATE TABLE tollgate.sessions (
    id             uuid        NOT NULL CONSTRAINT sessions_pkey PRIMARY KEY,
    user_id        text        COLLATE "C" NOT NULL,
    user_mark      bigint,
    kid            text        COLLATE "C" NOT NULL,
    secret         bytea       NOT NULL,
    generation     bigint      NOT NULL,
    refreshed_at   timestamptz NOT NULL,
    idle           interval    NOT NULL,
    expires_at     timestamptz NOT NULL,
    revoked_at     timestamptz,
    last_address   inet,
    client_id      text        COLLATE "C",
    scopes         text[]      NOT NULL,
    audience       text[]      NOT NULL,
    claims         jsonb       NOT NULL,
    label          text,
    created_at     timestamptz NOT NULL,
    opened_from    inet,
    revoked_reason text,
    announced_at   timestamptz,
    mismatch_at    timestamptz,
    elsewhere_at   timestamptz
) USING heap WITH (fillfactor = 50);
COMMENT ON TABLE tollgate.sessions IS 'One row per session, which each refresh updates';
COMMENT ON COLUMN tollgate.sessions.user_mark IS 'The mark that the user had when the session was opened: with another one it is over';
COMMENT ON COLUMN tollgate.sessions.kid IS 'The key of its refresh tokens, the same for its whole life';
COMMENT ON COLUMN tollgate.sessions.secret IS 'Random bytes that the MAC of its refresh tokens is over; of no use without the key';
COMMENT ON COLUMN tollgate.sessions.generation IS 'That of the latest refresh token; the first one has 1';
COMMENT ON COLUMN tollgate.sessions.idle IS 'For how long it may go without a refresh; no months and days, so it is as long in every time zone';
COMMENT ON COLUMN tollgate.sessions.last_address IS 'The address of the client, at the last refresh or at the opening';
COMMENT ON COLUMN tollgate.sessions.mismatch_at IS 'When an event last said that another client has presented a token of it';
COMMENT ON COLUMN tollgate.sessions.elsewhere_at IS 'When an event last said that a refresh was repeated from another address';
CREATE INDEX sessions_user ON tollgate.sessions (user_id, id) WHERE revoked_at IS NULL;
CREATE INDEX sessions_expiring ON tollgate.sessions (expires_at, id) WHERE revoked_at IS NULL AND announced_at IS NULL;
SELECT pg_extension_config_dump('tollgate.sessions', '');

CREATE FUNCTION tollgate.open_session(
    user_id   text,
    scopes    text[],
    audience  text[]   DEFAULT NULL,
    client_id text     DEFAULT NULL,
    lifetime  interval DEFAULT '30 days',
    idle      interval DEFAULT '7 days',
    label     text     DEFAULT NULL,
    client_ip inet     DEFAULT NULL,
    claims    jsonb    DEFAULT '{}'
) RETURNS tollgate.issued_session
    LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'open_session';
COMMENT ON FUNCTION tollgate.open_session(text, text[], text[], text, interval, interval, text, inet, jsonb) IS
    'Opens a session for a user whom the application has logged in, and returns an access token and a refresh token. It ends after lifetime (at most 366 days), or when it was not refreshed for idle; with a client_id only that client refreshes it. Its access tokens are as those of issue_access_token, name it (sid), and end with it. Event session.opened; 55000 without tollgate.issuer, a signing key or its master key';

CREATE FUNCTION tollgate.refresh_session(
    refresh_token text,
    client_id     text   DEFAULT NULL,
    scopes        text[] DEFAULT NULL,
    client_ip     inet   DEFAULT NULL
) RETURNS tollgate.refreshed_session
    LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'refresh_session';
COMMENT ON FUNCTION tollgate.refresh_session(text, text, text[], inet) IS
    'Takes a refresh token, and returns the next one with an access token, for all scopes of the session or some of them. Never raises for a bad token: its code is VALID, MALFORMED, NOT_FOUND, REVOKED, EXPIRED, REUSED, INSUFFICIENT_SCOPE or RATE_LIMITED, and what it found must be committed. The same token again within tollgate.refresh_grace gets the same next one; later the session ends (REUSED). Events session.reuse_detected, session.revoked, session.retried_elsewhere, session.client_mismatch, session.address_changed, session.recovered';

CREATE FUNCTION tollgate.current_session_id() RETURNS uuid
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'current_session_id';
COMMENT ON FUNCTION tollgate.current_session_id() IS 'Session of the authenticated access token; NULL without one, or for a token of no session';

-- The first session needs a key for refresh tokens, and so does the first one after it was withdrawn.
CREATE FUNCTION tollgate.create_refresh_key() RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.lock_keys();
    -- Another transaction may have created it while this one waited.
    IF NOT EXISTS (SELECT FROM tollgate.sealed_keys k
                   WHERE k.purpose = 'refresh_token' AND tollgate.key_state(k.signs_from, k.retires_at, k.verifies_until, k.withdrawn_at) = 'signing') THEN
        PERFORM tollgate.add_key(tollgate.make_key('HS256', 'refresh_token'), 'refresh_token', interval '0', 'key.created');
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.create_refresh_key() IS 'Creates the key of refresh tokens, unless there is one. Internal.';

CREATE FUNCTION tollgate.timeline_began() RETURNS timestamptz
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- As far as the audit log knows: no event was written on it before. Of one that is not known, only now.
    SELECT coalesce((SELECT min(o.begun_at) FROM tollgate.audit_epochs o
                     WHERE o.epoch = e.epoch AND e.system_identifier = tollgate.system_identifier() AND e.timeline = tollgate.wal_timeline()),
                    clock_timestamp())
        FROM (SELECT) one LEFT JOIN (SELECT n.epoch, n.system_identifier, n.timeline
                                     FROM tollgate.audit_epochs n ORDER BY n.epoch DESC, n.xid DESC LIMIT 1) e ON true;
END;
COMMENT ON FUNCTION tollgate.timeline_began() IS
    'When this server began to write its timeline, that is, was promoted or restored; no later than the first event on it. Internal.';

CREATE FUNCTION tollgate.timeline_is_known() RETURNS boolean
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- Not what this transaction has registered itself, and may roll back.
    SELECT coalesce((SELECT e.system_identifier = tollgate.system_identifier() AND e.timeline = tollgate.wal_timeline()
                            AND e.xid IS DISTINCT FROM pg_current_xact_id_if_assigned()
                     FROM tollgate.audit_epochs e ORDER BY e.epoch DESC, e.xid DESC LIMIT 1), false);
END;
COMMENT ON FUNCTION tollgate.timeline_is_known() IS
    'Whether another transaction has registered the timeline that this server writes. Internal.';

-- ---- What a refresh finds, beside the next token. Each is given the generation that the row had when it was decided, and does
-- ---- nothing (false) if that has changed since.

CREATE FUNCTION tollgate.end_reused_session(session_id uuid, generation bigint, presented bigint, client_ip inet) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    ended tollgate.sessions;
BEGIN
    UPDATE tollgate.sessions s SET revoked_at = clock_timestamp(), revoked_reason = 'reuse detected'
        WHERE s.id = $1 AND s.generation = $2 AND s.revoked_at IS NULL RETURNING s.* INTO ended;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
        VALUES ('session.reuse_detected', $1, ended.user_id, jsonb_strip_nulls(jsonb_build_object(
                    'client_ip', $4, 'last_address', ended.last_address, 'last_refreshed_at', ended.refreshed_at,
                    'generation', $3, 'latest', $2))),
               ('session.revoked', $1, ended.user_id, jsonb_build_object('reason', 'reuse detected'));
    PERFORM tollgate.notify_token_event('session.reuse_detected', $1, ended.user_id, 'reuse detected', NULL);
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.end_reused_session(uuid, bigint, bigint, inet) IS
    'Ends a session of which a refresh token was presented that had been replaced, or was never issued. Internal.';

CREATE FUNCTION tollgate.note_client_mismatch(session_id uuid, client_id text, client_ip inet) RETURNS void
    LANGUAGE sql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH noted AS (
        UPDATE tollgate.sessions s SET mismatch_at = clock_timestamp()
            WHERE s.id = $1 AND s.revoked_at IS NULL
              AND (s.mismatch_at IS NULL OR s.mismatch_at NOT BETWEEN clock_timestamp() - interval '1 minute' AND clock_timestamp())
            RETURNING s.id, s.user_id, s.client_id
    )
    INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
        SELECT 'session.client_mismatch', n.id, n.user_id,
               jsonb_strip_nulls(jsonb_build_object('client_id', n.client_id, 'presented_by', $2, 'client_ip', $3))
        FROM noted n;
END;
COMMENT ON FUNCTION tollgate.note_client_mismatch(uuid, text, inet) IS
    'Records that another client has presented a token of a session, at most once a minute. Internal.';

CREATE FUNCTION tollgate.note_retry_elsewhere(session_id uuid, generation bigint, client_ip inet) RETURNS void
    LANGUAGE sql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH noted AS (
        UPDATE tollgate.sessions s SET elsewhere_at = greatest(clock_timestamp(), s.refreshed_at)
            WHERE s.id = $1 AND s.generation = $2 AND s.revoked_at IS NULL AND (s.elsewhere_at IS NULL OR s.elsewhere_at < s.refreshed_at)
            RETURNING s.id, s.user_id, s.last_address, s.refreshed_at
    )
    INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
        SELECT 'session.retried_elsewhere', n.id, n.user_id, jsonb_strip_nulls(jsonb_build_object(
                   'client_ip', $3, 'last_address', n.last_address, 'last_refreshed_at', n.refreshed_at))
        FROM noted n;
END;
COMMENT ON FUNCTION tollgate.note_retry_elsewhere(uuid, bigint, inet) IS
    'Records that a refresh was repeated from another address, once for each refresh. Internal.';

CREATE FUNCTION tollgate.note_session(event text, session_id uuid, user_id text, detail jsonb) RETURNS void
    LANGUAGE sql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    INSERT INTO tollgate.audit_log (event, token_id, user_id, detail) VALUES ($1, $2, $3, jsonb_strip_nulls($4));
END;
COMMENT ON FUNCTION tollgate.note_session(text, uuid, text, jsonb) IS 'Records an event of a session. Internal.';

-- ---- Listing and ending

CREATE FUNCTION tollgate.list_sessions(user_id text) RETURNS TABLE (
        id uuid, client_id text, label text, scopes text[], audience text[], created_at timestamptz, refreshed_at timestamptz,
        expires_at timestamptz, idle_until timestamptz, opened_from inet, last_address inet, refreshes bigint)
    LANGUAGE sql VOLATILE PARALLEL SAFE SECURITY DEFINER ROWS 5
    SET search_path = pg_catalog, pg_temp
    SET jit = off
    SET enable_seqscan = off
    SET enable_bitmapscan = off
    SET enable_sort = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
BEGIN ATOMIC
    SELECT tollgate.check_user_named($1);
    SELECT s.id, s.client_id, s.label, s.scopes, s.audience, s.created_at, s.refreshed_at, s.expires_at, s.refreshed_at + s.idle,
           s.opened_from, s.last_address, s.generation - 1
        FROM tollgate.sessions s
        WHERE s.user_id = tollgate.without_token('user_id', $1) COLLATE "C" AND s.revoked_at IS NULL
          AND s.expires_at > clock_timestamp() AND s.refreshed_at + s.idle > clock_timestamp()
          AND NOT EXISTS (SELECT FROM tollgate.revoked_users r WHERE r.user_id = s.user_id AND r.mark IS DISTINCT FROM s.user_mark)
          AND EXISTS (SELECT FROM tollgate.sealed_keys k WHERE k.kid = s.kid AND k.withdrawn_at IS NULL)
        ORDER BY s.id;
END;
COMMENT ON FUNCTION tollgate.list_sessions(text) IS
    'The sessions of a user that are not over, oldest first, with when and from where each was opened and last refreshed; 22023 without a user';

-- In the locked order: by user and id.
CREATE FUNCTION tollgate.end_sessions(ids uuid[], reason text, source jsonb) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
    SET plan_cache_mode = force_generic_plan
    SET jit = off
    SET enable_seqscan = off
AS $$
DECLARE
    affected bigint;
BEGIN
    WITH ended AS (
        UPDATE tollgate.sessions s SET revoked_at = clock_timestamp(), revoked_reason = $2
            WHERE s.id = ANY ($1) AND s.revoked_at IS NULL RETURNING s.id, s.user_id
    ), logged AS (
        -- A subquery, so that the epoch is looked up once and not for each row.
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail, epoch)
            SELECT 'session.revoked', e.id, e.user_id, jsonb_strip_nulls(jsonb_build_object('reason', $2)) || $3, (SELECT tollgate.current_epoch())
            FROM ended e ORDER BY e.id
    )
    SELECT count(*) INTO affected FROM ended;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.end_sessions(uuid[], text, jsonb) IS
    'Ends sessions, and returns how many; one event each, with the source in its detail. Internal.';

CREATE FUNCTION tollgate.check_sessions_ended(session_id uuid, user_ids text[]) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'check_sessions_ended';
COMMENT ON FUNCTION tollgate.check_sessions_ended(uuid, text[]) IS
    'Raises 40001 if a session, or one of some users, is not revoked, because the transaction''s snapshot does not show it. Internal.';

-- Uses the index: see revoke_without_notification.
CREATE FUNCTION tollgate.end_sessions_of_users(user_ids text[], reason text, source jsonb) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
    SET plan_cache_mode = force_generic_plan
    SET jit = off
    SET enable_seqscan = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
AS $$
DECLARE
    one      uuid;
    ids      uuid[] := '{}';
    affected bigint := 0;
BEGIN
    -- A thousand at a time, as a user may have any number.
    FOR one IN
        SELECT s.id FROM unnest($1) u (id) JOIN tollgate.sessions s ON s.user_id = u.id COLLATE "C"
            WHERE s.revoked_at IS NULL ORDER BY s.user_id, s.id FOR UPDATE OF s
    LOOP
        ids := ids || one;
        IF cardinality(ids) >= 1000 THEN
            affected := affected + tollgate.end_sessions(ids, $2, $3);
            ids := '{}';
        END IF;
    END LOOP;
    IF cardinality(ids) > 0 THEN
        affected := affected + tollgate.end_sessions(ids, $2, $3);
    END IF;
    PERFORM tollgate.check_sessions_ended(NULL, $1);
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.end_sessions_of_users(text[], text, jsonb) IS
    'Ends every session of some users, and returns how many; one event each. Internal.';

CREATE FUNCTION tollgate.revoke_session(id uuid, user_id text DEFAULT NULL, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    its_user text;
BEGIN
    $3 := tollgate.stored_reason($3);
    PERFORM tollgate.without_token('user_id', $2);
    SELECT s.user_id INTO its_user FROM tollgate.sessions s
        WHERE s.id = $1 AND s.user_id = coalesce($2, s.user_id) COLLATE "C" AND s.revoked_at IS NULL FOR UPDATE;
    IF NOT FOUND THEN
        PERFORM tollgate.check_sessions_ended($1, NULL) WHERE $2 IS NULL;
        RETURN false;
    END IF;
    PERFORM tollgate.end_sessions(ARRAY[$1], $3, '{}');
    PERFORM tollgate.notify_token_event('session.revoked', $1, its_user, $3, NULL);
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.revoke_session(uuid, text, text) IS
    'Ends a session at once, with its access tokens; false when it is unknown, does not belong to that user, or was ended before; event session.revoked. A NULL user_id stands for any user';

CREATE FUNCTION tollgate.revoke_all_sessions(user_id text, reason text DEFAULT NULL) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    affected bigint;
BEGIN
    PERFORM tollgate.check_user_named($1), tollgate.without_token('user_id', $1);
    affected := tollgate.end_sessions_of_users(ARRAY[$1], tollgate.stored_reason($2), '{}');
    IF affected > 0 THEN
        PERFORM tollgate.notify_token_event('session.revoked', NULL, $1, NULL, affected);
    END IF;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.revoke_all_sessions(text, text) IS
    'Ends every session of a user, with their access tokens, and returns how many; API tokens stay. One event session.revoked each, one notification; 22023 without a user';

CREATE FUNCTION tollgate.is_refresh_token(token text) RETURNS boolean
    LANGUAGE c IMMUTABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'is_refresh_token';
COMMENT ON FUNCTION tollgate.is_refresh_token(text) IS 'Whether a text has the form of a refresh token. Internal.';

CREATE FUNCTION tollgate.presented_session_id(token text, client_ip inet) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'presented_session_id';
COMMENT ON FUNCTION tollgate.presented_session_id(text, inet) IS
    'The session of a refresh token, of whatever generation; NULL if none of ours. Failed attempts count; 53400 at an address with too many of them. Internal.';

-- ---- For the daemon

-- Walks the primary key, since no index has when a session was last refreshed. A call goes on where the last one for the same
-- moment ended.
CREATE FUNCTION tollgate.invalidate_sessions(before timestamptz) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET plan_cache_mode = force_generic_plan
    SET jit = off
    SET enable_seqscan = off
    SET enable_bitmapscan = off
AS $$
DECLARE
    place    uuid;
    page     uuid[];
    due      uuid[];
    affected bigint := 0;
BEGIN
    IF $1 IS NULL OR NOT isfinite($1) OR $1 > clock_timestamp() + interval '1 day' THEN
        RAISE EXCEPTION 'sessions are invalidated up to a moment'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: before, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'Give the moment at which this database was restored, or the present one.';
    END IF;
    -- Another session may be at it: then this one starts at the front, which only costs time.
    SELECT p.id::uuid INTO place FROM tollgate.housekeeping_cursors p WHERE p.task = 'invalidate_sessions' AND p.at = $1;
    place := coalesce(place, '00000000-0000-0000-0000-000000000000');
    LOOP
        page := ARRAY(SELECT s.id FROM tollgate.sessions s WHERE s.id > place ORDER BY s.id LIMIT 1000);
        EXIT WHEN cardinality(page) = 0;
        due := ARRAY(SELECT s.id FROM tollgate.sessions s
                     WHERE s.id > place AND s.id <= page[cardinality(page)] AND s.revoked_at IS NULL AND s.refreshed_at < $1
                     ORDER BY s.id FOR UPDATE);
        affected := affected + tollgate.end_sessions(due, 'invalidated', jsonb_build_object('before', $1));
        place := page[cardinality(page)];
        EXIT WHEN affected >= 10000;
    END LOOP;
    UPDATE tollgate.housekeeping_cursors p
        SET at = CASE WHEN affected >= 10000 THEN $1 END, id = CASE WHEN affected >= 10000 THEN place::text END
        WHERE p.task = (SELECT o.task FROM tollgate.housekeeping_cursors o WHERE o.task = 'invalidate_sessions' FOR UPDATE SKIP LOCKED);
    IF affected > 0 THEN
        PERFORM tollgate.notify_token_event('session.revoked', NULL, NULL, NULL, affected);
    END IF;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.invalidate_sessions(timestamptz) IS
    'Ends the sessions that were last refreshed, or opened, before a moment, such as that of a restore, about 10000 at a time, and returns how many: call it again, with the same moment, until it returns less; event session.revoked each, one notification';

CREATE FUNCTION tollgate.announce_session_expiries_after(
    notice           interval,
    batch_size       integer,
    INOUT expires_at timestamptz DEFAULT NULL,
    INOUT session_id uuid DEFAULT NULL,
    OUT looked_at    bigint,
    OUT announced    bigint
)
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
DECLARE
    -- Variables, because the planner uses no index for a comparison with a volatile function.
    start timestamptz := clock_timestamp();
    until timestamptz;
BEGIN
    IF $1 IS NULL OR $1 < interval '0' OR $1 > interval '10 years' THEN
        RAISE EXCEPTION 'a notice is from nothing to 10 years'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: notice, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'Give how long before its end a session is announced, such as 7 days.';
    END IF;
    until := start + $1;
    -- One lower bound only, as in announce_expiries_after. Sessions that have ended are not announced any more.
    IF expires_at IS NULL OR expires_at <= start THEN
        expires_at := start;
        session_id := 'ffffffff-ffff-ffff-ffff-ffffffffffff';
    END IF;
    session_id := coalesce(session_id, '00000000-0000-0000-0000-000000000000');
    WITH noted AS (
        UPDATE tollgate.sessions s SET announced_at = start
            WHERE s.id = ANY (ARRAY(
                SELECT d.id FROM tollgate.sessions d
                WHERE d.expires_at <= until AND d.revoked_at IS NULL AND d.announced_at IS NULL
                  AND (d.expires_at, d.id) > (announce_session_expiries_after.expires_at, announce_session_expiries_after.session_id)
                ORDER BY d.expires_at, d.id LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED))
            RETURNING s.id, s.user_id, s.client_id, s.label, s.expires_at, s.created_at, s.refreshed_at + s.idle AS idle_until
    ), logged AS (
        -- A subquery, so that the epoch is looked up once and not for each row.
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail, epoch)
            SELECT 'session.expires_soon', n.id, n.user_id,
                   jsonb_strip_nulls(jsonb_build_object('client_id', n.client_id, 'label', n.label, 'expires_at', n.expires_at)),
                   (SELECT tollgate.current_epoch())
            FROM noted n
            -- Not one that was opened for a short time, nor one that is over by now.
            WHERE n.expires_at > n.created_at + $1 AND n.idle_until > start
            ORDER BY n.expires_at, n.id
    ), furthest AS (
        SELECT n.expires_at, n.id FROM noted n ORDER BY n.expires_at DESC, n.id DESC LIMIT 1
    )
    SELECT coalesce(f.expires_at, announce_session_expiries_after.expires_at), coalesce(f.id, announce_session_expiries_after.session_id), a.number, a.number
        INTO announce_session_expiries_after.expires_at, announce_session_expiries_after.session_id, looked_at, announced
        FROM (SELECT count(*) AS number FROM noted) a LEFT JOIN furthest f ON true;
END
$$;
COMMENT ON FUNCTION tollgate.announce_session_expiries_after(interval, integer, timestamptz, uuid) IS
    'A batch of announce_session_expiries after a place (NULL: from the front). Internal.';

CREATE FUNCTION tollgate.announce_session_expiries(notice interval DEFAULT '7 days', batch_size integer DEFAULT 1000) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN tollgate.continue_walk('announce_session_expiries', 'tollgate.announce_session_expiries_after($1, $2, $3, $4::uuid)', $1, $2, '1 minute');
END
$$;
COMMENT ON FUNCTION tollgate.announce_session_expiries(interval, integer) IS
    'Announces sessions whose end, however often they are refreshed, comes within the notice, once each (event session.expires_soon), and returns how many were handled, including those that were opened for less than the notice or are idle, which have no event';

-- No index has when a session was last refreshed, so all are looked at.
CREATE FUNCTION tollgate.purge_sessions_after(
    retention        interval,
    batch_size       integer,
    INOUT session_id uuid DEFAULT NULL,
    OUT looked_at    bigint,
    OUT purged       bigint
)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET plan_cache_mode = force_generic_plan
    SET jit = off
    SET enable_seqscan = off
    SET enable_bitmapscan = off
AS $$
DECLARE
    page uuid[];
BEGIN
    PERFORM tollgate.check_batch_size($2, 1000);
    PERFORM tollgate.check_retention($1);
    session_id := coalesce(session_id, '00000000-0000-0000-0000-000000000000');
    page := ARRAY(SELECT s.id FROM tollgate.sessions s WHERE s.id > session_id ORDER BY s.id LIMIT $2);
    looked_at := cardinality(page);
    DELETE FROM tollgate.sessions d
        WHERE d.id = ANY (ARRAY(
            SELECT s.id FROM tollgate.sessions s
            WHERE s.id > session_id AND s.id <= page[looked_at] AND least(s.revoked_at, s.expires_at, s.refreshed_at + s.idle) <= now() - $1
            ORDER BY s.id FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS purged = ROW_COUNT;
    session_id := coalesce(page[looked_at], session_id);
END
$$;
COMMENT ON FUNCTION tollgate.purge_sessions_after(interval, integer, uuid) IS
    'purge_sessions for callers that call it many times: continues after the session that the previous call returned (NULL: from the front), and looks at no more than a batch. looked_at is less than that once there are no more';

CREATE FUNCTION tollgate.purge_sessions(retention interval DEFAULT '30 days', batch_size integer DEFAULT 1000) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    step     record;
    place    uuid;
    wanted   integer;
    seen     bigint := 0;
    affected bigint := 0;
BEGIN
    PERFORM tollgate.check_batch_size($2);
    SELECT p.id::uuid INTO place FROM tollgate.housekeeping_cursors p WHERE p.task = 'purge_sessions';
    -- A hundred thousand in a call, of which perhaps none has ended.
    WHILE affected < $2 AND seen < 100000 LOOP
        wanted := least($2 - affected, 1000);
        SELECT s.session_id, s.looked_at, s.purged INTO step FROM tollgate.purge_sessions_after($1, wanted, place) s;
        place := step.session_id;
        seen := seen + step.looked_at;
        affected := affected + step.purged;
        IF step.looked_at < wanted THEN
            place := NULL;
            EXIT;
        END IF;
    END LOOP;
    UPDATE tollgate.housekeeping_cursors p SET id = place::text
        WHERE p.task = (SELECT o.task FROM tollgate.housekeeping_cursors o WHERE o.task = 'purge_sessions' FOR UPDATE SKIP LOCKED);
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.purge_sessions(interval, integer) IS
    'Deletes sessions that were revoked, expired or idle longer ago than the retention, and returns how many. Looks at 100000 sessions at most, from where the last call ended';
