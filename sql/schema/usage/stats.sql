-- Figures for operators.

CREATE TABLE tollgate.daemon_reports (
    instance     uuid        PRIMARY KEY,
    hostname     text        NOT NULL,
    pid          integer     NOT NULL,
    version      text        NOT NULL,
    started_at   timestamptz NOT NULL,
    last_seen_at timestamptz NOT NULL,
    tasks        jsonb       NOT NULL
) WITH (fillfactor = 50);
COMMENT ON TABLE tollgate.daemon_reports IS 'The last report of each daemon';

-- A daemon serves one cluster.
CREATE TRIGGER leave_out BEFORE INSERT OR UPDATE OR DELETE ON tollgate.daemon_reports
    FOR EACH ROW WHEN (tollgate.is_logical_worker()) EXECUTE FUNCTION tollgate.leave_out();
ALTER TABLE tollgate.daemon_reports ENABLE REPLICA TRIGGER leave_out;

CREATE VIEW tollgate.daemons AS
    SELECT d.instance, d.hostname, d.pid, d.version, d.started_at, d.last_seen_at, d.tasks
    FROM tollgate.daemon_reports d WHERE d.last_seen_at >= now() - interval '1 day';
COMMENT ON VIEW tollgate.daemons IS 'The daemons that served this database within the last day, and the status of their tasks';

CREATE FUNCTION tollgate.report_daemon(instance uuid, hostname text, pid integer, version text, started_at timestamptz, tasks jsonb)
    RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- PostgreSQL's own message would show the whole row.
    IF num_nulls($1, $2, $3, $4, $5, $6) > 0 OR length($2) > 255 OR $3 < 1 OR length($4) > 100
       OR $5 NOT BETWEEN timestamptz '2000-01-01 00:00+00' AND now() + interval '1 day' THEN
        RAISE EXCEPTION 'this is not the report of a daemon'
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = 'Arguments: instance, hostname, pid, version, started_at, tasks, of which one is NULL, too long or out of range.',
                  HINT = 'Give all of them; tasks may be an empty array.';
    END IF;
    PERFORM tollgate.without_token('hostname', $2), tollgate.without_token('version', $4), tollgate.check_json('tasks', $6, 262144, 32);
    -- Whatever number is reported, only the latest are kept; a live daemon reports again soon.
    DELETE FROM tollgate.daemon_reports d
        WHERE d.instance <> $1
          AND (d.last_seen_at < now() - interval '1 day'
               OR d.instance IN (SELECT o.instance FROM tollgate.daemon_reports o ORDER BY o.last_seen_at DESC OFFSET 100));
    INSERT INTO tollgate.daemon_reports (instance, hostname, pid, version, started_at, last_seen_at, tasks)
        VALUES ($1, $2, $3, $4, $5, now(), $6)
        ON CONFLICT ON CONSTRAINT daemon_reports_pkey DO UPDATE SET last_seen_at = excluded.last_seen_at, tasks = excluded.tasks;
END
$$;
COMMENT ON FUNCTION tollgate.report_daemon(uuid, text, integer, text, timestamptz, jsonb) IS
    'Stores a daemon''s report of itself; removes daemons without a report for a day, and all but about 100 of the others';

CREATE TYPE tollgate.memory_stats AS (
    library_version      text,
    metering             boolean,
    metering_detail      text,
    started_at           timestamptz,
    boot                 uuid,
    verifications        jsonb,
    verification_latency jsonb,
    tracked_keys         bigint,
    busy_keys            bigint,
    max_tracked_keys     bigint,
    overflowed           bigint,
    generation           bigint,
    closed_generation    bigint,
    sessions             jsonb
);
COMMENT ON TYPE tollgate.memory_stats IS 'The content of shared memory since this server start. Internal: see stats()';

CREATE FUNCTION tollgate.memory_stats() RETURNS tollgate.memory_stats
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'memory_stats';
COMMENT ON FUNCTION tollgate.memory_stats() IS 'The counters in shared memory, or why there are none. Internal: see stats()';

-- Estimated like the planner does, from the rows per page at the last ANALYZE or VACUUM. A small table is counted:
-- autovacuum may never process it.
CREATE FUNCTION tollgate.tokens_estimate() RETURNS bigint
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT CASE WHEN s.bytes <= 1048576 THEN (SELECT count(*) FROM tollgate.api_tokens)
                WHEN c.reltuples >= 0 AND c.relpages > 0
                    THEN (c.reltuples::float8 / c.relpages * (s.bytes / current_setting('block_size')::integer))::bigint
           END
    FROM pg_class c, LATERAL pg_relation_size(c.oid) s (bytes) WHERE c.oid = 'tollgate.api_tokens'::regclass;
END;
COMMENT ON FUNCTION tollgate.tokens_estimate() IS 'The number of stored tokens, approximate if they are many; NULL if it is unknown before the first ANALYZE. Internal.';

CREATE FUNCTION tollgate.stats(
        OUT library_version text, OUT extension_version text, OUT metering boolean, OUT metering_detail text,
        OUT started_at timestamptz, OUT boot uuid, OUT verifications jsonb, OUT verification_latency jsonb,
        OUT tracked_keys bigint, OUT busy_keys bigint, OUT max_tracked_keys bigint, OUT overflowed bigint,
        OUT generation bigint, OUT closed_generation bigint, OUT flushes bigint, OUT last_flush_at timestamptz,
        OUT tokens_estimate bigint, OUT api_tokens_bytes bigint, OUT token_usage_bytes bigint, OUT audit_log_bytes bigint,
        OUT sessions jsonb)
    LANGUAGE sql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT m.library_version, (SELECT e.extversion FROM pg_extension e WHERE e.extname = 'tollgate'),
           m.metering, m.metering_detail, m.started_at, m.boot, m.verifications, m.verification_latency,
           m.tracked_keys, m.busy_keys, m.max_tracked_keys, m.overflowed, m.generation, m.closed_generation,
           (SELECT coalesce(sum(f.flushes), 0)::bigint FROM tollgate.usage_flushes f),
           (SELECT max(f.applied_at) FROM tollgate.usage_flushes f),
           tollgate.tokens_estimate(),
           pg_total_relation_size('tollgate.api_tokens'::regclass),
           pg_total_relation_size('tollgate.token_usage'::regclass),
           pg_total_relation_size('tollgate.audit_log'::regclass),
           m.sessions
    FROM tollgate.memory_stats() m;
END;
COMMENT ON FUNCTION tollgate.stats() IS
    'One row of counters: verifications by code since the server started, in all its databases, the latency of those in this database, what happened to sessions, shared-memory fill, flushes, table sizes; metering_detail says why usage is absent, if it is';
