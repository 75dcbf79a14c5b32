-- Problems of this database and its server, as far as they are visible from inside: for an operator on call, through
-- `tollgated check` or in psql. Each finding says what to run.
--
-- Runs as the owner of the extension, which sees the sessions, standbys and sequences that the caller does not; it
-- shows no statements, which may contain tokens.

CREATE FUNCTION tollgate.session_label(role name, database name, application text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT format('role %s in database %s, application %s', quote_ident($1), quote_ident($2), tollgate.quote_redacted($3));
END;
COMMENT ON FUNCTION tollgate.session_label(name, name, text) IS 'The description of a session in a finding. Internal.';

CREATE FUNCTION tollgate.deployment_health(patience interval DEFAULT '5 minutes')
    RETURNS TABLE (aspect text, severity text, detail text, remedy text)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER ROWS 10
    SET search_path = pg_catalog, pg_temp
    -- Intervals are formatted for people, whatever the caller's setting.
    SET intervalstyle = postgres
AS $$
DECLARE
    -- The clock at the time when other transactions are measured, not the start of this one.
    checked_at timestamptz := clock_timestamp();
    -- A queue whose listeners all read is nearly empty at all times.
    queue      float8 := pg_notification_queue_usage();
    here       pg_lsn := CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END;
    counters   record;
    subscriber record;
    oldest     timestamptz;
BEGIN
    IF $1 IS NULL OR $1 < interval '0' OR $1 > interval '10 years' THEN
        RAISE EXCEPTION 'patience is a time from nothing to 10 years'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: patience, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'Give how long a transaction or a delay may last before it is reported, such as 5 minutes.';
    END IF;

    aspect := 'visibility';
    RETURN QUERY SELECT aspect, 'warn',
            format('%s, the owner of the extension, sees only its own sessions, and no standbys', quote_ident(current_user)),
            format('GRANT pg_read_all_stats TO %I;', current_user)
        WHERE NOT pg_has_role(current_user, 'pg_read_all_stats', 'USAGE');

    -- Notifications that not all listeners, in any database, have read yet. When the queue is full, every transaction
    -- that notifies fails at its commit; ours stop notifying when it is half full. PostgreSQL does not show which
    -- sessions LISTEN; the one that fills the queue does not end its transaction, so it is most likely the one with the
    -- longest transaction.
    aspect := 'notifications';
    RETURN QUERY SELECT aspect, CASE WHEN queue >= 0.5 THEN 'fail' ELSE 'warn' END,
            format('the notification queue is %s %% full; from 50 %% on revocations are not notified, and once it is full every NOTIFY fails. A session that LISTENs fills it by not ending its transaction%s',
                   round(queue::numeric * 100, 1),
                   coalesce('; longest transactions: ' || string_agg(format('process %s (%s, %s for %s)', h.pid, h.label, h.state, h.age), '; ' ORDER BY h.place), '')),
            coalesce((array_agg(format('SELECT pg_terminate_backend(%s);', h.pid) ORDER BY h.place))[1],
                     'terminate the process that the server''s log names in its warnings about the NOTIFY queue')
        FROM (SELECT a.pid, tollgate.session_label(a.usename, a.datname, a.application_name) AS label, a.state,
                     date_trunc('second', checked_at - a.xact_start) AS age,
                     row_number() OVER (ORDER BY a.query ~* '^[[:space:]]*listen[[:>:]]' DESC, a.xact_start) AS place
              FROM pg_stat_activity a
              WHERE a.backend_type = 'client backend' AND a.xact_start IS NOT NULL AND a.pid <> pg_backend_pid()) h
        WHERE queue >= 0.05 AND h.place <= 3
        HAVING queue >= 0.05;
    IF NOT FOUND THEN
        RETURN QUERY SELECT aspect, 'ok', format('the notification queue is %s %% full', round(queue::numeric * 100, 1)), NULL;
    END IF;

    aspect := 'transactions';
    RETURN QUERY SELECT aspect, 'warn',
            format('process %s (%s) has been in a transaction for %s, and %s', a.pid,
                   tollgate.session_label(a.usename, a.datname, a.application_name), date_trunc('second', checked_at - a.xact_start),
                   CASE WHEN a.backend_xid IS NOT NULL THEN 'keeps the cursors of the event log, the seals and VACUUM from advancing'
                        ELSE 'keeps VACUUM from removing what was deleted since' END),
            format('SELECT pg_terminate_backend(%s);', a.pid)
        FROM pg_stat_activity a
        WHERE a.xact_start < checked_at - $1 AND a.backend_type = 'client backend' AND a.pid <> pg_backend_pid()
          AND (a.backend_xid IS NOT NULL OR a.backend_xmin IS NOT NULL)
        UNION ALL
        SELECT aspect, 'warn',
            format('a prepared transaction of role %s in database %s waits for %s, and keeps the cursors of the event log, the seals and VACUUM from advancing, and its locks held',
                   quote_ident(p.owner), quote_ident(p.database), date_trunc('second', checked_at - p.prepared)),
            format('COMMIT PREPARED %s; or ROLLBACK PREPARED, as its coordinator decided (in database %I)',
                   quote_literal(regexp_replace(p.gid, '[0-9A-Fa-f]{80,}', '…', 'g')), p.database)
        FROM pg_prepared_xacts p WHERE p.prepared < checked_at - $1;
    IF NOT FOUND THEN
        RETURN QUERY SELECT aspect, 'ok', format('none is older than %s', $1), NULL;
    END IF;

    -- A standby does not know what it has not replayed yet: a revoked token stays valid there until then.
    aspect := 'standbys';
    RETURN QUERY SELECT aspect, 'warn',
            format('standby %s is %s%s behind%s: revocations take effect there with the same delay', quote_ident(r.application_name),
                   pg_size_pretty(pg_wal_lsn_diff(here, r.replay_lsn)), coalesce(' and ' || date_trunc('milliseconds', r.replay_lag), ''),
                   CASE WHEN r.state = 'streaming' THEN '' ELSE ', in state ' || r.state END),
            'look at the standby''s log and load; SELECT pg_is_wal_replay_paused(); and pg_wal_replay_resume() there if it is paused'
        FROM pg_stat_replication r
        WHERE pg_wal_lsn_diff(here, r.replay_lsn) > 64 * 1024 * 1024 OR r.replay_lag > least($1, interval '10 seconds')
        UNION ALL
        SELECT aspect, 'warn',
            format('the replication slot %s is inactive, and retains %s of WAL', quote_ident(s.slot_name), pg_size_pretty(pg_wal_lsn_diff(here, s.restart_lsn))),
            format('start its standby; if that is gone for good: SELECT pg_drop_replication_slot(%L);', s.slot_name)
        FROM pg_replication_slots s WHERE NOT s.active AND pg_wal_lsn_diff(here, s.restart_lsn) > 64 * 1024 * 1024;
    IF NOT FOUND THEN
        RETURN QUERY SELECT aspect, 'ok', format('%s connected, none lags', count(*)), NULL FROM pg_stat_replication r;
    END IF;

    aspect := 'tables';
    RETURN QUERY SELECT aspect, 'warn',
            format('%s has %s dead rows and %s live ones', s.relid::regclass, s.n_dead_tup, s.n_live_tup),
            format('VACUUM (ANALYZE) %s;', s.relid::regclass)
        FROM pg_stat_all_tables s
        WHERE s.schemaname = 'tollgate' AND s.n_dead_tup > 10000 AND s.n_dead_tup > s.n_live_tup / 2
        UNION ALL
        SELECT aspect, 'warn', format('autovacuum is switched off for %s', c.oid::regclass),
            format('ALTER TABLE %s RESET (autovacuum_enabled);', c.oid::regclass)
        FROM pg_class c
        WHERE c.relnamespace = 'tollgate'::regnamespace AND c.relkind = 'r'
          AND EXISTS (SELECT FROM pg_options_to_table(c.reloptions) o WHERE o.option_name = 'autovacuum_enabled' AND NOT o.option_value::boolean)
        UNION ALL
        SELECT aspect, 'warn',
            format('%s was last frozen %s transactions ago, far beyond autovacuum_freeze_max_age', c.oid::regclass, age(c.relfrozenxid)),
            format('VACUUM (FREEZE) %s; and see whether a transaction or a replication slot is as old', c.oid::regclass)
        FROM pg_class c
        WHERE c.relnamespace = 'tollgate'::regnamespace AND c.relkind = 'r'
          AND age(c.relfrozenxid) > 2 * current_setting('autovacuum_freeze_max_age')::bigint
        UNION ALL
        SELECT aspect, 'warn',
            format('the sequence %I.%I has used %s %% of its numbers', s.schemaname, s.sequencename, round(100.0 * s.last_value / s.max_value)),
            format('ALTER SEQUENCE %I.%I AS bigint NO MAXVALUE;', s.schemaname, s.sequencename)
        FROM pg_sequences s WHERE s.schemaname = 'tollgate' AND s.last_value > s.max_value / 2
        UNION ALL
        SELECT aspect, 'fail',
            format('the sequence %s is at %s, but %s has %s: the next insert may fail', b.sequence, b.last_value, b.owner, b.greatest_id),
            format('SELECT setval(%L, (SELECT max(%I) FROM %s));', b.sequence, b.owned_column, b.owner)
        FROM tollgate.sequences_behind() b;
    IF NOT FOUND THEN
        RETURN QUERY SELECT aspect, 'ok', 'all are vacuumed, and no sequence is nearly used up or behind', NULL;
    END IF;

    -- About 100 bytes per row are usual.
    aspect := 'indexes';
    RETURN QUERY SELECT aspect, 'fail', format('%s is not valid: it is maintained but not used, or does not find every row', i.indexrelid::regclass),
            format('REINDEX INDEX CONCURRENTLY %s;', i.indexrelid::regclass)
        FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
        WHERE c.relnamespace = 'tollgate'::regnamespace AND NOT (i.indisvalid AND i.indisready AND i.indislive)
        UNION ALL
        SELECT aspect, 'warn',
            format('%s takes %s for %s rows: most of it is empty', c.oid::regclass, pg_size_pretty(pg_relation_size(c.oid)), c.reltuples),
            format('REINDEX INDEX CONCURRENTLY %s;', c.oid::regclass)
        FROM pg_class c
        WHERE c.relnamespace = 'tollgate'::regnamespace AND c.relkind = 'i' AND c.reltuples >= 0
          AND pg_relation_size(c.oid) > greatest(8 * 1024 * 1024, 512 * c.reltuples::float8);
    IF NOT FOUND THEN
        RETURN QUERY SELECT aspect, 'ok', 'all are valid, none is bloated', NULL;
    END IF;

    -- A table whose triggers were all dropped cannot be recognised as attached any more.
    aspect := 'users tables';
    RETURN QUERY SELECT aspect, f.severity, f.detail, f.remedy FROM tollgate.users_table_faults() f;
    IF NOT FOUND THEN
        RETURN QUERY SELECT aspect, 'ok', format('%s attached, tokens end with their users', count(*)), NULL FROM tollgate.attached_users_tables();
    END IF;

    aspect := 'usage';
    SELECT s.metering, s.overflowed, s.tracked_keys, s.max_tracked_keys INTO counters FROM tollgate.stats() s;
    IF counters.overflowed > 0 THEN
        RETURN QUERY SELECT aspect, 'warn',
            format('%s uses were not counted since the server started, because the table of %s keys was full',
                   counters.overflowed, counters.max_tracked_keys),
            format('let tollgated run flush more often (--flush-interval), or: ALTER SYSTEM SET tollgate.max_tracked_keys = %s; and restart the server',
                   least(2 * counters.max_tracked_keys, (SELECT s.max_val::bigint FROM pg_settings s WHERE s.name = 'tollgate.max_tracked_keys')));
    ELSIF counters.metering THEN
        RETURN QUERY SELECT aspect, 'ok', format('%s of %s keys are in use', counters.tracked_keys, counters.max_tracked_keys), NULL;
    ELSE
        RETURN QUERY SELECT aspect, 'warn', 'usage is not counted on this server', 'add tollgate to shared_preload_libraries in postgresql.conf and restart the server';
    END IF;

    aspect := 'subscriptions';
    FOR subscriber IN SELECT s.* FROM tollgate.subscriptions s ORDER BY s.name LOOP
        BEGIN
            SELECT f.at INTO oldest FROM tollgate.first_pending(subscriber.place) f WHERE f.events > 0;
            CONTINUE WHEN oldest IS NULL OR oldest >= checked_at - $1;
            severity := 'warn';
            detail := format('the subscriber %s has not received the events of the last %s, and keeps purge_audit_log from deleting them',
                             quote_literal(subscriber.name), date_trunc('second', checked_at - oldest));
        EXCEPTION WHEN object_not_in_prerequisite_state THEN
            severity := 'fail';
            detail := format('the subscriber %s cannot continue: its cursor belongs to another history of this database', quote_literal(subscriber.name));
        END;
        remedy := format('start its reader (tollgated run, for "log"); if it is gone for good: SELECT tollgate.drop_subscription(%L);', subscriber.name);
        subscriber := NULL;
        oldest := NULL;
        RETURN NEXT;
    END LOOP;
    IF severity IS NULL THEN
        RETURN QUERY SELECT aspect, 'ok', format('%s, none behind', count(*)), NULL FROM tollgate.subscriptions s;
    END IF;

    aspect := 'keys';
    RETURN QUERY SELECT aspect, f.severity, f.detail, f.remedy FROM tollgate.key_faults() f;
    IF NOT FOUND THEN
        RETURN QUERY SELECT aspect, 'ok', format('%s signing keys, %s master keys loaded', count(*), cardinality(tollgate.master_key_ids())), NULL
            FROM tollgate.sealed_keys k WHERE k.sealed IS NOT NULL AND k.purpose = 'access_token';
    END IF;

    aspect := 'issuers';
    RETURN QUERY SELECT aspect, f.severity, f.detail, f.remedy FROM tollgate.issuer_faults() f;
    IF NOT FOUND THEN
        RETURN QUERY SELECT aspect, 'ok', format('%s trusted, with keys', count(*)), NULL FROM tollgate.list_trusted_issuers();
    END IF;

    aspect := 'settings';
    RETURN QUERY SELECT aspect, 'warn', s.name || ' is ' || s.reset_val || ': ' || w.consequence,
            format('ALTER SYSTEM SET %s = %s; SELECT pg_reload_conf();', s.name, w.wanted)
        FROM (VALUES
            ('autovacuum',         'off', 'on', 'tables grow without limit'),
            ('track_counts',       'off', 'on', 'autovacuum does not work without it'),
            ('fsync',              'off', 'on', 'a crash of the machine may ruin the cluster'),
            ('full_page_writes',   'off', 'on', 'a crash of the machine may ruin the cluster'),
            ('synchronous_commit', 'off', 'on', 'a crash may undo a revocation that was acknowledged'),
            ('pgaudit.log_parameter', 'on', 'off', 'the server''s log may contain tokens, as bind values'),
            ('auto_explain.log_parameter_max_length', '-1', '0', 'the server''s log may contain tokens, as bind values of slow statements')
        ) AS w (name, bad, wanted, consequence)
        -- Not the value that this session was set to since, such as a daemon's.
        JOIN pg_settings s ON s.name = w.name AND s.reset_val = w.bad
        WHERE NOT starts_with(w.name, 'auto_explain.')
           OR EXISTS (SELECT FROM pg_settings e WHERE e.name = 'auto_explain.log_min_duration' AND e.reset_val <> '-1');
    IF NOT FOUND THEN
        RETURN QUERY SELECT aspect, 'ok', 'none endangers tokens or their records', NULL;
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.deployment_health(interval) IS
    'Problems of this database and its server, each finding with a severity (ok, warn, fail) and the command that fixes it; transactions and delays count once they last longer than patience';
