-- Usage: counted in shared memory, and moved to these tables by drain, apply and acknowledge.
--
-- Drained counters are signed with a secret that the carrier cannot read: the daemon's login can neither invent counts,
-- nor make a generation that a server hands out count as applied.

CREATE TABLE tollgate.carrying_secret (
    one    boolean PRIMARY KEY DEFAULT true CHECK (one),
    secret bytea   NOT NULL DEFAULT sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()))
);
COMMENT ON TABLE tollgate.carrying_secret IS
    'The secret by which the primary recognises data that its servers drained. One row, created at installation and never read outside; a restored dump has another';
INSERT INTO tollgate.carrying_secret DEFAULT VALUES;

-- A subscriber has standbys of its own.
CREATE TRIGGER leave_out BEFORE INSERT OR UPDATE OR DELETE ON tollgate.carrying_secret
    FOR EACH ROW WHEN (tollgate.is_logical_worker()) EXECUTE FUNCTION tollgate.leave_out();
ALTER TABLE tollgate.carrying_secret ENABLE REPLICA TRIGGER leave_out;

CREATE FUNCTION tollgate.carrying_signature(what text, fields bytea[]) RETURNS bytea
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- The secret is used twice, as in HMAC: a signature cannot be extended to a longer message.
    SELECT tollgate.digest_of(ARRAY[s.secret, tollgate.digest_of(ARRAY[s.secret, oidsend(d.oid), convert_to($1, 'UTF8')] || $2)])
        -- A database created from this one as its template has the same secret.
        FROM tollgate.carrying_secret s, pg_database d WHERE d.datname = current_database();
END;
COMMENT ON FUNCTION tollgate.carrying_signature(text, bytea[]) IS 'The signature that proves that one of our servers drained something, in this database. Internal.';

CREATE TABLE tollgate.token_usage (
    token_id     uuid   PRIMARY KEY,
    use_count    bigint NOT NULL CHECK (use_count >= 0),
    denied_count bigint NOT NULL CHECK (denied_count >= 0),
    last_used_at timestamptz,
    last_used_ip inet,
    hour         timestamptz,
    hour_used    bigint NOT NULL DEFAULT 0,
    hour_denied  bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);
COMMENT ON TABLE tollgate.token_usage IS
    'Uses and denials per token, and of all access tokens of a user together, as of the last flush. No foreign key: its check would lock, and so write, the row of the token. Half of each page is free, so that a flush of every token finds room next to the old rows';
COMMENT ON COLUMN tollgate.token_usage.hour IS 'The latest hour with a use or denial; when a later one begins, its counts move to usage_hourly';
COMMENT ON COLUMN tollgate.token_usage.hour_used IS 'The part of use_count that fell into that hour';
COMMENT ON COLUMN tollgate.token_usage.hour_denied IS 'The part of denied_count that fell into that hour';
-- Users, on whom access tokens are counted (usage_id_of_user), for purge_user_usage_after. Of a column that a flush does not
-- change, so that flushes stay HOT.
CREATE INDEX token_usage_users ON tollgate.token_usage (token_id) WHERE substr(token_id::text, 15, 1) = '8';
SELECT pg_extension_config_dump('tollgate.token_usage', '');

CREATE TABLE tollgate.usage_hourly (
    token_id uuid        NOT NULL,
    hour     timestamptz NOT NULL,
    used     bigint      NOT NULL CHECK (used >= 0),
    denied   bigint      NOT NULL CHECK (denied >= 0),
    PRIMARY KEY (token_id, hour)
);
COMMENT ON TABLE tollgate.usage_hourly IS
    'Uses and denials per token and hour, except the latest hour of each token, which is in token_usage: so a flush writes one row per token, and a second one once an hour';
CREATE INDEX usage_hourly_hour ON tollgate.usage_hourly (hour, token_id);
SELECT pg_extension_config_dump('tollgate.usage_hourly', '');

CREATE TABLE tollgate.usage_flushes (
    node       text        NOT NULL,
    boot       uuid        NOT NULL,
    generation bigint      NOT NULL,
    flushes    bigint      NOT NULL DEFAULT 1,
    applied_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (node, boot)
) WITH (fillfactor = 50);
COMMENT ON TABLE tollgate.usage_flushes IS
    'The last generation of counters applied, per server start: makes a repeated apply_usage do nothing';

CREATE TYPE tollgate.usage_row AS (
    token_id     uuid,
    uses         bigint,
    denials      bigint,
    last_used_at timestamptz,
    last_used_ip inet
);
COMMENT ON TYPE tollgate.usage_row IS 'The usage of one token in one generation of counters';

CREATE FUNCTION tollgate.close_usage() RETURNS TABLE (
        node text, boot uuid, generation bigint,
        token_id uuid, uses bigint, denials bigint, last_used_at timestamptz, last_used_ip inet)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'close_usage_wrapper';
COMMENT ON FUNCTION tollgate.close_usage() IS 'The result of drain_usage, without the signature. Internal.';

CREATE FUNCTION tollgate.signature_of_usage(node text, boot uuid, generation bigint, rows tollgate.usage_row[]) RETURNS bytea
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT tollgate.carrying_signature('usage', ARRAY[
        convert_to($1, 'UTF8'), uuid_send($2), int8send($3), array_send(ARRAY(SELECT r FROM unnest($4) r ORDER BY r.token_id))]);
END;
COMMENT ON FUNCTION tollgate.signature_of_usage(text, uuid, bigint, tollgate.usage_row[]) IS
    'The signature that proves that one of our servers drained these counters, in any order. Internal.';

CREATE FUNCTION tollgate.drain_usage() RETURNS TABLE (
        node text, boot uuid, generation bigint,
        token_id uuid, uses bigint, denials bigint, last_used_at timestamptz, last_used_ip inet, signature bytea)
    LANGUAGE sql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH closed AS MATERIALIZED (
        SELECT c.* FROM tollgate.close_usage() c
    ), signed AS MATERIALIZED (
        SELECT tollgate.signature_of_usage(c.node, c.boot, c.generation, array_agg(
                   ROW(c.token_id, c.uses, c.denials, c.last_used_at, c.last_used_ip)::tollgate.usage_row)) AS signature
        FROM closed c GROUP BY c.node, c.boot, c.generation
    )
    SELECT c.*, s.signature FROM closed c CROSS JOIN signed s;
END;
COMMENT ON FUNCTION tollgate.drain_usage() IS
    'Closes this database''s counters and returns them: the same uses and denials again until ack_usage; no rows when there is nothing. With the signature that apply_usage requires, the same in each row. Writes nothing, so it works on a standby';

CREATE FUNCTION tollgate.handed_out_usage(OUT this_node text, OUT this_boot uuid, OUT node text, OUT boot uuid, OUT generation bigint) RETURNS SETOF record
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 1
    AS 'MODULE_PATHNAME', 'handed_out_usage_wrapper';
COMMENT ON FUNCTION tollgate.handed_out_usage() IS
    'The server start, and the generation of this database that drain_usage has returned and ack_usage has not freed; no row without shared memory. Internal.';

-- An impossible row is skipped, so that it does not block the others, and sums saturate instead of failing.
--
-- The joins are pinned, so that the time a flush takes depends on its own size and not on that of the tables, whatever the
-- statistics say. Rows go in the order of their ids, neighbours to the same pages.
CREATE FUNCTION tollgate.apply_usage(node text, boot uuid, generation bigint, rows tollgate.usage_row[], signature bytea) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET jit = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
    SET work_mem = '64MB'
AS $$
DECLARE
    own    record;
    is_own boolean;
    known  bigint;
    taken  bigint;
BEGIN
    IF $1 IS NULL OR $2 IS NULL OR $3 IS NULL OR $4 IS NULL OR length($1) > 200 OR $1 ~ '[0-9A-Fa-f]{80}'
       -- Generations start at the server's start time, in microseconds since 2000.
       OR $3 NOT BETWEEN 1 AND extract(epoch FROM now() + interval '1 day' - timestamptz '2000-01-01 00:00+00') * 1000000 THEN
        RAISE EXCEPTION 'these are not counters of a server'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Arguments: node, boot, generation, rows, of which one is NULL or out of range.',
                  HINT = 'Pass what drain_usage() returned.';
    END IF;
    PERFORM tollgate.without_token('node', $1);
    IF $5 IS DISTINCT FROM tollgate.signature_of_usage($1, $2, $3, $4) THEN
        RAISE EXCEPTION 'no server of this database has handed out these counters'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: signature, which is not that of the others.',
                  HINT = 'Pass on what drain_usage() returned, all of its rows.';
    END IF;
    -- One flush at a time, whichever server it is from: the rows read below do not change until they are written, and
    -- there are no deadlocks.
    LOCK TABLE tollgate.usage_flushes IN SHARE ROW EXCLUSIVE MODE;
    SELECT h.* INTO own FROM tollgate.handed_out_usage() h;
    is_own := (own.node, own.boot, own.generation) IS NOT DISTINCT FROM ($1, $2, $3);
    known := (SELECT f.generation FROM tollgate.usage_flushes f WHERE f.node = $1 AND f.boot = $2);
    -- A generation later than the one that this server still hands out does not exist yet: a caller that claimed it
    -- must not make it count as applied.
    IF known >= $3 AND NOT (is_own AND known > $3) THEN
        RETURN false;
    END IF;
    -- Otherwise the generations that this server hands out later would count as applied. One of an earlier start may
    -- have survived a restart.
    IF NOT is_own AND $1 = own.this_node AND $2 = own.this_boot THEN
        RAISE EXCEPTION 'this server has not handed out generation %', $3
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Arguments: node, boot and generation.',
                  HINT = 'Pass what drain_usage() returned, before it is acknowledged.';
    END IF;
    INSERT INTO tollgate.usage_flushes AS f (node, boot, generation) VALUES ($1, $2, $3)
        ON CONFLICT ON CONSTRAINT usage_flushes_pkey
        DO UPDATE SET generation = excluded.generation, flushes = f.flushes + 1, applied_at = now();
    WITH counted AS MATERIALIZED (
        -- Counters have no hours: a whole generation counts for the hour of the last use, or of the flush if there was
        -- none. The clock of another server may be ahead, which must not open an hour early, and a token has no hour
        -- before it was created.
        SELECT r.token_id, r.uses, r.denials, r.last_used_at, r.last_used_ip,
               date_bin('1 hour', coalesce(r.last_used_at, now()), timestamptz 'epoch') AS hour,
               u.ctid AS place, u.use_count, u.denied_count, u.last_used_at AS known_at, u.last_used_ip AS known_ip,
               u.hour AS known_hour, u.hour_used, u.hour_denied
        FROM (SELECT o.token_id, o.uses, o.denials, o.last_used_ip,
                     CASE WHEN o.last_used_at > now() THEN now()
                          -- Looked up only for those that may be wrong by more than clocks differ.
                          WHEN o.last_used_at < now() - interval '1 hour'
                          THEN greatest(o.last_used_at, coalesce((SELECT t.created_at FROM tollgate.api_tokens t WHERE t.id = o.token_id), now()))
                          ELSE o.last_used_at END AS last_used_at
              FROM (SELECT g.*, lag(g.token_id) OVER (ORDER BY g.token_id) AS before_it FROM unnest($4) g
                    WHERE g.token_id IS NOT NULL AND g.uses BETWEEN 0 AND 1000000000000 AND g.denials BETWEEN 0 AND 1000000000000) o
              WHERE o.token_id IS DISTINCT FROM o.before_it
              ORDER BY o.token_id) r LEFT JOIN tollgate.token_usage u ON u.token_id = r.token_id
    ), added AS (
        INSERT INTO tollgate.token_usage
                (token_id, use_count, denied_count, last_used_at, last_used_ip, hour, hour_used, hour_denied)
            SELECT c.token_id, c.uses, c.denials, c.last_used_at, c.last_used_ip, c.hour, c.uses, c.denials
            FROM counted c
            WHERE c.place IS NULL AND EXISTS (SELECT FROM tollgate.api_tokens t WHERE t.id = c.token_id)
            UNION ALL
            -- Access tokens are counted on their user, under a uuid of version 8 (usage_id_of_user). Not as an OR above, which
            -- no join can answer.
            SELECT c.token_id, c.uses, c.denials, c.last_used_at, c.last_used_ip, c.hour, c.uses, c.denials
            FROM counted c
            WHERE c.place IS NULL AND substr(c.token_id::text, 15, 1) = '8'
              AND NOT EXISTS (SELECT FROM tollgate.api_tokens t WHERE t.id = c.token_id)
    ), finished AS (
        -- The earlier of two hours. It is the new one if the use came through a server that is flushed less often.
        INSERT INTO tollgate.usage_hourly AS h (token_id, hour, used, denied)
            SELECT c.token_id, least(c.hour, c.known_hour),
                   CASE WHEN c.hour < c.known_hour THEN c.uses ELSE c.hour_used END,
                   CASE WHEN c.hour < c.known_hour THEN c.denials ELSE c.hour_denied END
            FROM counted c
            WHERE c.hour <> c.known_hour
            ON CONFLICT ON CONSTRAINT usage_hourly_pkey
            DO UPDATE SET used = h.used + least(excluded.used, 9223372036854775807 - h.used),
                          denied = h.denied + least(excluded.denied, 9223372036854775807 - h.denied)
    ), added_to AS (
        UPDATE tollgate.token_usage u SET
                use_count = c.use_count + least(c.uses, 9223372036854775807 - c.use_count),
                denied_count = c.denied_count + least(c.denials, 9223372036854775807 - c.denied_count),
                last_used_at = greatest(c.known_at, c.last_used_at),
                last_used_ip = CASE WHEN c.last_used_at >= coalesce(c.known_at, '-infinity') THEN c.last_used_ip ELSE c.known_ip END,
                hour = greatest(c.known_hour, c.hour),
                hour_used = CASE WHEN c.hour = c.known_hour THEN c.hour_used + least(c.uses, 9223372036854775807 - c.hour_used)
                                 WHEN c.hour < c.known_hour THEN c.hour_used ELSE c.uses END,
                hour_denied = CASE WHEN c.hour = c.known_hour THEN c.hour_denied + least(c.denials, 9223372036854775807 - c.hour_denied)
                                   WHEN c.hour < c.known_hour THEN c.hour_denied ELSE c.denials END
            FROM counted c WHERE u.ctid = c.place
    )
    SELECT count(*) INTO taken FROM counted c;
    IF taken < cardinality($4) THEN
        RAISE WARNING 'apply_usage skipped % of % counters', cardinality($4) - taken, cardinality($4)
            USING DETAIL = 'Each row has a token that is in no other row, with 0 to 1000000000000 uses and at most as many denials.',
                  HINT = 'Pass what drain_usage() returned.';
    END IF;
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.apply_usage(text, uuid, bigint, tollgate.usage_row[], bytea) IS
    'Adds drained counters to token_usage and usage_hourly, once: true when done now, false when this generation was already applied; 22023 for counters that no server drained. Impossible rows are skipped with a WARNING';

CREATE FUNCTION tollgate.usage_applied(node text, boot uuid, generation bigint) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT EXISTS (SELECT FROM tollgate.usage_flushes f WHERE f.node = tollgate.without_token('node', $1) AND f.boot = $2 AND f.generation >= $3);
END;
COMMENT ON FUNCTION tollgate.usage_applied(text, uuid, bigint) IS
    'Whether this server''s copy of the database has these counters. Call it on a standby before ack_usage there: if the standby were promoted before it has them, they would be lost';

CREATE FUNCTION tollgate.free_usage(generation bigint) RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'free_usage';
COMMENT ON FUNCTION tollgate.free_usage(bigint) IS 'Subtracts a drained generation from the counters; false when it is not the drained one. Internal.';

CREATE FUNCTION tollgate.ack_usage(generation bigint) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Exactly this generation, not a later one: a later one being applied does not mean that this one was. On a standby
    -- this checks its copy, which may lag.
    IF EXISTS (SELECT FROM tollgate.handed_out_usage() h
               WHERE h.generation = $1
                 AND NOT EXISTS (SELECT FROM tollgate.usage_flushes f
                                 WHERE f.node = h.node AND f.boot = h.boot AND f.generation = h.generation)) THEN
        RAISE EXCEPTION 'generation % was not applied, as far as this server knows', $1
            USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = 'Freeing it now would lose its uses.',
                  HINT = 'Call apply_usage() first, and on a standby wait until usage_applied() is true.';
    END IF;
    RETURN tollgate.free_usage($1);
END
$$;
COMMENT ON FUNCTION tollgate.ack_usage(bigint) IS
    'Frees a drained generation. Only after the transaction of apply_usage has committed; false when it is not the drained one, an error when it was not applied';

CREATE FUNCTION tollgate.token_activity(token_id uuid, since timestamptz DEFAULT NULL)
    RETURNS TABLE (hour timestamptz, used bigint, denied bigint)
    LANGUAGE sql STABLE SECURITY DEFINER ROWS 200
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH counted AS (
        SELECT h.hour, h.used, h.denied FROM tollgate.usage_hourly h WHERE h.token_id = $1
        UNION ALL
        SELECT u.hour, u.hour_used, u.hour_denied FROM tollgate.token_usage u WHERE u.token_id = $1 AND u.hour IS NOT NULL
    ), span AS (
        SELECT date_bin('1 hour', greatest($2, least(t.created_at, (SELECT min(c.hour) FROM counted c))), timestamptz 'epoch') AS first_hour,
               greatest(date_bin('1 hour', now(), timestamptz 'epoch'), (SELECT max(c.hour) FROM counted c)) AS last_hour
        FROM tollgate.api_tokens t WHERE t.id = $1
    )
    SELECT s.hour, coalesce(c.used, 0), coalesce(c.denied, 0)
        FROM span, LATERAL generate_series(span.first_hour, span.last_hour, interval '1 hour') s (hour)
        LEFT JOIN counted c ON c.hour = s.hour
        ORDER BY s.hour;
END;
COMMENT ON FUNCTION tollgate.token_activity(uuid, timestamptz) IS
    'Uses and denials of a token for each hour (of UTC) since a time or its creation, as of the last flush; includes hours without any, so that a chart has no gaps. No rows for an unknown token';

CREATE FUNCTION tollgate.usage_pressure() RETURNS TABLE (pressure double precision, overflowed bigint)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'usage_pressure_wrapper';
COMMENT ON FUNCTION tollgate.usage_pressure() IS
    'The fraction of the server''s room for counters that is taken by unflushed ones, from 0 to 1, and how many uses found no room since it started: cheap enough to call many times a second';
