-- Leadership: which session performs a task that only one may perform.
--
-- It is a PostgreSQL session lock, of the class of advisory locks, that pg_advisory_lock() cannot take: those functions
-- mark their locks as kind 1 or 2, and ours has another kind. So no role can block the daemons by locking first, unless
-- it was granted acquire_leadership(). The lock ends with its session, however that ends.
--
-- Each time leadership changes hands its fence grows. A session that writes for a task passes the fence that it has: a
-- former leader that lost the lock without noticing, for example after a freeze, is refused.

CREATE TABLE tollgate.leaderships (
    task          text        PRIMARY KEY,
    fence         bigint      NOT NULL DEFAULT 0,
    pid           integer,
    backend_start timestamptz,
    acquired_at   timestamptz
) WITH (fillfactor = 50);
COMMENT ON TABLE tollgate.leaderships IS 'The tasks that one daemon performs for all, and which session became the leader of each last. Not dumped: in another cluster there is no leader';
INSERT INTO tollgate.leaderships (task)
    VALUES ('announce_expiries'), ('expire_tokens'), ('fetch_keys'), ('flush_usage'), ('lease_quotas'), ('purge'), ('purge_audit'), ('rotate_keys'), ('seal_audit');

-- A session of one cluster means nothing in another.
CREATE TRIGGER leave_out BEFORE INSERT OR UPDATE OR DELETE ON tollgate.leaderships
    FOR EACH ROW WHEN (tollgate.is_logical_worker()) EXECUTE FUNCTION tollgate.leave_out();
ALTER TABLE tollgate.leaderships ENABLE REPLICA TRIGGER leave_out;

CREATE FUNCTION tollgate.lock_leadership(task text) RETURNS timestamptz
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'lock_leadership';
COMMENT ON FUNCTION tollgate.lock_leadership(text) IS
    'When this session began, if it now holds or already held the lock of the task; NULL while another session holds it. Internal.';

CREATE FUNCTION tollgate.leadership_of(task text) RETURNS tollgate.leaderships
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    known tollgate.leaderships;
BEGIN
    SELECT l.* INTO known FROM tollgate.leaderships l WHERE l.task = $1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no task %', tollgate.quote_redacted($1)
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: task.',
                  HINT = format('It is one of %s.', (SELECT string_agg(l.task, ', ' ORDER BY l.task) FROM tollgate.leaderships l));
    END IF;
    RETURN known;
END
$$;
COMMENT ON FUNCTION tollgate.leadership_of(text) IS 'The row of a task; 22023 if there is none of that name. Internal.';

CREATE FUNCTION tollgate.acquire_leadership(task text) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    began timestamptz;
    known tollgate.leaderships := tollgate.leadership_of($1);
BEGIN
    began := tollgate.lock_leadership($1);
    IF began IS NULL THEN
        RETURN NULL;
    END IF;
    IF (known.pid, known.backend_start) IS DISTINCT FROM (pg_backend_pid(), began) THEN
        -- By the clock, so that it exceeds any value that a restored or promoted server does not know.
        UPDATE tollgate.leaderships l
            SET fence = greatest(l.fence + 1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint),
                pid = pg_backend_pid(), backend_start = began, acquired_at = clock_timestamp()
            WHERE l.task = $1
            RETURNING l.fence INTO known.fence;
    END IF;
    RETURN known.fence;
END
$$;
COMMENT ON FUNCTION tollgate.acquire_leadership(text) IS
    'Makes this session the leader of a task until it ends, if no other is: returns the fence for check_leadership, or NULL while another session leads. May be called repeatedly';

CREATE FUNCTION tollgate.check_leadership(task text, fence bigint) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF (tollgate.leadership_of($1)).fence IS DISTINCT FROM $2 THEN
        RAISE EXCEPTION 'another session leads the task %', tollgate.quote_redacted($1)
            USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = 'Arguments: task and fence, which is not the latest.',
                  HINT = 'Call acquire_leadership() again.';
    END IF;
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.check_leadership(text, bigint) IS
    'True if no other session has led the task since this fence was returned, else an error: call it in the statement that does the work';
