-- Reading the audit log as an outbox: every event once, however late it commits, also after a failover or restore.
--
-- A serial id is not commit order, so a cursor is not a number. It is a snapshot whose events were all read; and, while
-- a batch is being read, a newer snapshot and an id. The batch is what the newer one shows and the older one does not,
-- in the order of ids; once it is read, the newer snapshot becomes the older one. So the size of a cursor depends on
-- the number of running transactions, not on how much one of them writes.
--
-- In terms of transaction ids a batch is a few ranges: the ids of transactions that were running in the older snapshot
-- and have ended in the newer one, and the ids between those that are running in the newer one. The index on (epoch,
-- xid, id) serves these ranges. Ids below dense_id belong only to transactions that were running before: each has its
-- events in order in that index. From dense_id on the batch is read along the primary key, where it is stored as
-- densely as it was written.
--
-- Rows that Tollgate would not write, because a superuser wrote them by hand, must not stop readers: an event that is
-- too large or too deep to be delivered is replaced by one that says so.
--
-- A snapshot applies to the lineage of the epoch that it was taken in (epochs.sql). Of a later epoch it shows nothing,
-- of an earlier lineage everything.

CREATE TYPE tollgate.event_cursor AS (
    older_epoch uuid, older pg_snapshot, newer_epoch uuid, newer pg_snapshot, dense_id bigint, last_id bigint, next_id bigint);
COMMENT ON TYPE tollgate.event_cursor IS 'A position in the audit log, of at most 8 kB; opaque, to be stored and passed back';

CREATE TYPE tollgate.event_batch AS (
    events jsonb, cursor tollgate.event_cursor, next tollgate.event_cursor, caught_up boolean, proof bytea);
COMMENT ON TYPE tollgate.event_batch IS
    'Events as a JSON array, the cursor before them (after one of them, it is the same with next_id set to one above its id), the cursor after all of them, whether there are no more, and the proof that they were read, for advance_subscription';

CREATE FUNCTION tollgate.epoch_identity(epoch integer) RETURNS uuid
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce((SELECT e.identity FROM tollgate.audit_epochs e WHERE e.epoch = $1 LIMIT 1),
                    '00000000-0000-0000-0000-000000000000');
END;
COMMENT ON FUNCTION tollgate.epoch_identity(integer) IS 'The name of an epoch in cursors; all zeroes before the first one. Internal.';

CREATE FUNCTION tollgate.epoch_of_cursor(epoch uuid) RETURNS integer
    LANGUAGE plpgsql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    number integer;
BEGIN
    IF $1 = '00000000-0000-0000-0000-000000000000' THEN
        RETURN 0;
    END IF;
    SELECT e.epoch INTO number FROM tollgate.audit_epochs e WHERE e.identity = $1 LIMIT 1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'this cursor belongs to another history of the audit log'
            USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = format('Argument: cursor, with the epoch %s, which is unknown here.', $1),
                  HINT = 'On a standby that lags, retry later. If this database was restored from an older state, or promoted from one, start again with event_position().';
    END IF;
    RETURN number;
END
$$;
COMMENT ON FUNCTION tollgate.epoch_of_cursor(uuid) IS
    'The number of the epoch that a cursor names; raises 55000 for one that this database cannot follow. Internal.';

CREATE FUNCTION tollgate.check_cursor(cursor tollgate.event_cursor) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- A broken cursor that was taken for "nothing read yet" or "nothing new" would skip events for ever.
    IF ($1).older_epoch IS NULL OR ($1).older IS NULL
       OR num_nulls(($1).newer_epoch, ($1).newer, ($1).dense_id, ($1).last_id, ($1).next_id) NOT IN (0, 5)
       OR octet_length($1::text) > 8000 THEN
        RAISE EXCEPTION 'this is not a cursor of the audit log'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: cursor, which is NULL or incomplete.',
                  HINT = 'Pass the cursor that the last read_events returned, or start with event_position().';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_cursor(tollgate.event_cursor) IS 'Raises 22023 for an invalid cursor. Internal.';

CREATE FUNCTION tollgate.make_snapshot(running xid8[], xmax xid8) RETURNS pg_snapshot
    LANGUAGE sql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT format('%s:%s:%s', coalesce($1[1], $2), $2, array_to_string($1, ','))::pg_snapshot;
END;
COMMENT ON FUNCTION tollgate.make_snapshot(xid8[], xid8) IS
    'The snapshot that shows all transactions below the given id except the listed ones, which are sorted. Internal.';

CREATE FUNCTION tollgate.unite_snapshots(one pg_snapshot, other pg_snapshot) RETURNS pg_snapshot
    LANGUAGE sql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT tollgate.make_snapshot(
        ARRAY(SELECT r.xid FROM pg_snapshot_xip(s.high) AS r (xid) WHERE NOT pg_visible_in_snapshot(r.xid, s.low) ORDER BY r.xid),
        pg_snapshot_xmax(s.high))
    FROM (SELECT CASE WHEN pg_snapshot_xmax($1) >= pg_snapshot_xmax($2) THEN $1 ELSE $2 END,
                 CASE WHEN pg_snapshot_xmax($1) >= pg_snapshot_xmax($2) THEN $2 ELSE $1 END) AS s (high, low);
END;
COMMENT ON FUNCTION tollgate.unite_snapshots(pg_snapshot, pg_snapshot) IS 'The snapshot that shows what either of two shows. Internal.';

CREATE FUNCTION tollgate.snapshot_contains(one pg_snapshot, other pg_snapshot) RETURNS boolean
    LANGUAGE sql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT pg_snapshot_xmax($1) >= pg_snapshot_xmax($2)
           AND NOT EXISTS (SELECT FROM pg_snapshot_xip($1) AS r (xid) WHERE pg_visible_in_snapshot(r.xid, $2));
END;
COMMENT ON FUNCTION tollgate.snapshot_contains(pg_snapshot, pg_snapshot) IS 'Whether the first snapshot shows all that the second shows. Internal.';

CREATE FUNCTION tollgate.readable_snapshot(max_bytes integer DEFAULT 3800) RETURNS pg_snapshot
    LANGUAGE plpgsql STABLE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    now     pg_snapshot := pg_current_snapshot();
    own     xid8        := pg_current_xact_id_if_assigned();
    xmax    xid8        := pg_snapshot_xmax(now);
    fitting integer     := $1 / (length(xmax::text) + 1);
    newest  integer     := (SELECT max(e.epoch) FROM tollgate.audit_epochs e);
    running xid8[];
BEGIN
    -- The newest epoch was written by another cluster, so all of it is visible here.
    IF (tollgate.final_place()).epoch > newest THEN
        RETURN tollgate.make_snapshot('{}', coalesce(
            (SELECT (a.xid::text::bigint + 1)::text::xid8 FROM tollgate.audit_log a WHERE a.epoch = newest ORDER BY a.xid DESC LIMIT 1), '1'));
    END IF;
    running := ARRAY(SELECT r.xid FROM pg_snapshot_xip(now) AS r (xid) ORDER BY r.xid);
    IF own IS NULL AND cardinality(running) = 0 THEN
        -- A snapshot taken on a standby does not list the transactions running on the primary.
        RETURN tollgate.make_snapshot('{}', pg_snapshot_xmin(now));
    END IF;
    -- It lists other transactions only, and our own may still write.
    IF own < xmax THEN
        running := ARRAY(SELECT DISTINCT r.xid FROM unnest(running || own) AS r (xid) ORDER BY r.xid);
    END IF;
    -- Transactions beyond the size of a cursor wait: nothing is lost, and most transactions are short.
    IF cardinality(running) > fitting THEN
        xmax := running[fitting + 1];
        running := running[1:fitting];
    END IF;
    RETURN tollgate.make_snapshot(running, xmax);
END
$$;
COMMENT ON FUNCTION tollgate.readable_snapshot(integer) IS
    'A snapshot of what is known to be committed for the calling statement, within a number of bytes. Internal.';

CREATE FUNCTION tollgate.event_position(since bigint DEFAULT NULL) RETURNS tollgate.event_cursor
    LANGUAGE plpgsql STABLE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    newest uuid        := tollgate.epoch_identity((SELECT max(e.epoch) FROM tollgate.audit_epochs e));
    now    pg_snapshot := tollgate.readable_snapshot();
    from_id bigint     := least(greatest($1, 0), 9223372036854775806) + 1;
BEGIN
    IF $1 < -10000 THEN
        RAISE EXCEPTION 'reading begins at most 10000 events before the end of the log'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: since, of %s.', $1),
                  HINT = 'Give the id of the event to begin after, or 0 for the first one that the log has.';
    END IF;
    IF $1 < 0 THEN
        from_id := coalesce((SELECT l.id FROM (SELECT a.id FROM tollgate.audit_log a ORDER BY a.id DESC LIMIT - $1) l
                             ORDER BY l.id LIMIT 1), 1);
    END IF;
    IF $1 IS NULL THEN
        RETURN (newest, now, NULL, NULL, NULL, NULL, NULL)::tollgate.event_cursor;
    END IF;
    -- The batch of everything committed now, from its middle on. Later commits are delivered whatever their ids.
    RETURN ('00000000-0000-0000-0000-000000000000', '1:1:', newest, now, from_id,
            greatest((SELECT max(a.id) FROM tollgate.audit_log a), from_id - 1), from_id)::tollgate.event_cursor;
END
$$;
COMMENT ON FUNCTION tollgate.event_position(bigint) IS
    'A cursor for read_events: from now on (NULL), from the first event that the log has (0), after the event with that id, or at the last events of so many (-10)';

CREATE FUNCTION tollgate.ranges_of_batch(cursor tollgate.event_cursor)
    RETURNS TABLE (epoch integer, low xid8, high xid8, was_running boolean)
    LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 4
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    older_epoch constant integer := tollgate.epoch_of_cursor(($1).older_epoch);
    newer_epoch constant integer := tollgate.epoch_of_cursor(($1).newer_epoch);
    lineage     constant integer := tollgate.epoch_lineage(newer_epoch);
    begin_at    xid8;
BEGIN
    FOR epoch IN SELECT generate_series(tollgate.epoch_lineage(older_epoch), newer_epoch) LOOP
        begin_at := CASE WHEN epoch <= older_epoch THEN pg_snapshot_xmax(($1).older) ELSE '0'::xid8 END;
        was_running := true;
        IF epoch <= older_epoch THEN
            RETURN QUERY SELECT ranges_of_batch.epoch, r.xid, (r.xid::text::numeric + 1)::text::xid8, true
                FROM pg_snapshot_xip(($1).older) AS r (xid)
                WHERE ranges_of_batch.epoch < lineage OR pg_visible_in_snapshot(r.xid, ($1).newer);
        END IF;
        was_running := false;
        IF epoch < lineage THEN
            low := begin_at;
            high := '18446744073709551615'::xid8;
            RETURN NEXT;
            CONTINUE;
        END IF;
        -- Between the running ones.
        low := begin_at;
        FOR high IN SELECT r.xid FROM pg_snapshot_xip(($1).newer) AS r (xid) WHERE r.xid >= begin_at ORDER BY r.xid LOOP
            IF low < high THEN
                RETURN NEXT;
            END IF;
            low := (high::text::numeric + 1)::text::xid8;
        END LOOP;
        high := pg_snapshot_xmax(($1).newer);
        IF low < high THEN
            RETURN NEXT;
        END IF;
    END LOOP;
END
$$;
COMMENT ON FUNCTION tollgate.ranges_of_batch(tollgate.event_cursor) IS
    'The transaction ids whose events the newer snapshot of a cursor shows and the older one does not. Internal.';

CREATE FUNCTION tollgate.begin_batch(cursor tollgate.event_cursor) RETURNS tollgate.event_cursor
    LANGUAGE plpgsql STABLE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
    SET jit = off
    SET enable_seqscan = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
    SET enable_bitmapscan = off
AS $$
DECLARE
    least_id bigint;
BEGIN
    cursor.newer_epoch := tollgate.epoch_identity((SELECT max(e.epoch) FROM tollgate.audit_epochs e));
    cursor.newer := tollgate.readable_snapshot();
    SELECT min(a.id), max(a.id) INTO cursor.dense_id, cursor.last_id
        FROM tollgate.ranges_of_batch($1) r
        JOIN tollgate.audit_log a ON (a.epoch, a.xid) >= (r.epoch, r.low) AND (a.epoch, a.xid) < (r.epoch, r.high)
        WHERE NOT r.was_running;
    SELECT min(f.id), greatest(max(l.id), cursor.last_id) INTO least_id, cursor.last_id
        FROM tollgate.ranges_of_batch($1) r
        CROSS JOIN LATERAL (SELECT a.id FROM tollgate.audit_log a
            WHERE (a.epoch, a.xid) >= (r.epoch, r.low) AND (a.epoch, a.xid) < (r.epoch, r.high)
            ORDER BY a.epoch, a.xid, a.id LIMIT 1) f
        CROSS JOIN LATERAL (SELECT a.id FROM tollgate.audit_log a
            WHERE (a.epoch, a.xid) >= (r.epoch, r.low) AND (a.epoch, a.xid) < (r.epoch, r.high)
            ORDER BY a.epoch DESC, a.xid DESC, a.id DESC LIMIT 1) l
        WHERE r.was_running;
    cursor.dense_id := coalesce(cursor.dense_id, least(cursor.last_id, 9223372036854775806) + 1, 0);
    cursor.last_id := coalesce(cursor.last_id, -1);
    cursor.next_id := least(least_id, cursor.dense_id);
    RETURN $1;
END
$$;
COMMENT ON FUNCTION tollgate.begin_batch(tollgate.event_cursor) IS 'A cursor with a batch of everything that it has not read yet. Internal.';

CREATE FUNCTION tollgate.end_batch(cursor tollgate.event_cursor) RETURNS tollgate.event_cursor
    LANGUAGE sql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- A reader whose snapshot is older than the last one, or was cut short, does not go back.
    SELECT (($1).newer_epoch,
            CASE WHEN ($1).newer_epoch = ($1).older_epoch THEN tollgate.unite_snapshots(($1).older, ($1).newer) ELSE ($1).newer END,
            NULL, NULL, NULL, NULL, NULL)::tollgate.event_cursor;
END;
COMMENT ON FUNCTION tollgate.end_batch(tollgate.event_cursor) IS 'The cursor after its current batch. Internal.';

-- Signed like drained counters (usage.sql): a login that may read and advance cannot skip what it did not read. A standby
-- has the secret of its primary, also once it is promoted. A restored dump has another; there a subscriber opens its
-- subscription and reads on.
CREATE FUNCTION tollgate.signature_of_page(cursor tollgate.event_cursor, next tollgate.event_cursor) RETURNS bytea
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN tollgate.carrying_signature('events', ARRAY[record_send($1), record_send($2)]);
END
$$;
COMMENT ON FUNCTION tollgate.signature_of_page(tollgate.event_cursor, tollgate.event_cursor) IS
    'The signature that proves that reading from the first cursor ended at the second. Internal.';

CREATE FUNCTION tollgate.read_events(cursor tollgate.event_cursor, max_events integer DEFAULT 1000) RETURNS tollgate.event_batch
    LANGUAGE plpgsql STABLE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    -- Use the index whatever the statistics say, also if there are none yet.
    SET jit = off
    SET enable_seqscan = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
    SET enable_bitmapscan = off
AS $$
DECLARE
    -- STABLE: everything below is read with one snapshot, that of the calling statement.
    older_epoch integer;
    newer_epoch integer;
    older_lineage integer;
    newer_lineage integer;
    given       constant tollgate.event_cursor := $1;
    fresh       boolean;
    -- A page is limited in events and in their bytes as text; one event always fits.
    most        constant integer := least($2, 2000);
    most_bytes  constant integer := 4000000;
    one         record;
    page        jsonb[] := '{}';
    page_bytes  integer := 0;
    is_full     boolean := false;
    last_read   bigint;
    until       bigint;
    batch       tollgate.event_batch;
BEGIN
    PERFORM tollgate.check_cursor($1);
    IF $2 IS NULL OR $2 < 1 THEN
        RAISE EXCEPTION 'a batch has at least one event'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: max_events, of %s.', coalesce($2::text, 'NULL')),
                  HINT = 'Give how many events you can take at a time, such as 1000.';
    END IF;
    older_epoch := tollgate.epoch_of_cursor(($1).older_epoch);
    fresh := ($1).newer IS NULL;
    IF fresh THEN
        cursor := tollgate.begin_batch($1);
    END IF;
    newer_epoch := tollgate.epoch_of_cursor(($1).newer_epoch);
    batch.events := '[]';
    batch.cursor := $1;
    batch.next := $1;
    IF NOT fresh AND newer_epoch = (SELECT max(e.epoch) FROM tollgate.audit_epochs e)
       AND NOT tollgate.snapshot_contains(tollgate.readable_snapshot(1000000000), ($1).newer) THEN
        -- A standby that lags, or a transaction with an older snapshot: the rest of the batch is not visible yet.
        batch.caught_up := true;
        batch.proof := tollgate.signature_of_page(given, batch.next);
        RETURN batch;
    END IF;

    older_lineage := tollgate.epoch_lineage(older_epoch);
    newer_lineage := tollgate.epoch_lineage(newer_epoch);
    until := CASE WHEN ($1).next_id < ($1).dense_id THEN ($1).dense_id - 1 ELSE ($1).last_id END;
    FOR one IN
        SELECT e.id, e.bytes,
               jsonb_build_object(
                   'id', e.id, 'epoch', e.epoch, 'at', e.at, 'token_id', e.token_id, 'client_addr', host(e.client_addr),
                   'event', CASE WHEN octet_length(e.event) <= 200 THEN e.event ELSE 'unreadable' END,
                   'user_id', CASE WHEN octet_length(e.user_id) <= 1020 THEN e.user_id END,
                   'actor', CASE WHEN octet_length(e.actor) <= 200 THEN e.actor END,
                   'reason', CASE WHEN e.is_readable AND jsonb_typeof(e.detail) = 'object' THEN e.detail -> 'reason' END,
                   'detail', CASE WHEN NOT e.is_readable THEN
                                      '{"unreadable": "the event has more than 1000000 bytes, or is nested deeper than 64 levels"}'
                                  WHEN jsonb_typeof(e.detail) = 'object' THEN e.detail - 'reason'
                                  ELSE e.detail END) AS event
        FROM (
            SELECT s.*, coalesce(s.detail_bytes, 0) + 2000 AS bytes,
                   s.detail_bytes IS NOT NULL AND octet_length(s.event) <= 200 AND octet_length(s.actor) <= 200
                       AND coalesce(octet_length(s.user_id) <= 1020, true) AS is_readable
            FROM (
                SELECT a.*, tollgate.json_text_size(a.detail, 1000000, 64) AS detail_bytes
                FROM (
                    (SELECT l.* FROM tollgate.ranges_of_batch($1) r
                         CROSS JOIN LATERAL (
                             SELECT o.* FROM tollgate.audit_log o
                             WHERE (o.epoch, o.xid, o.id) >= (r.epoch, r.low, ($1).next_id) AND (o.epoch, o.xid, o.id) < (r.epoch, r.low, ($1).dense_id)
                             ORDER BY o.epoch, o.xid, o.id LIMIT most) l
                         WHERE r.was_running AND ($1).next_id < ($1).dense_id
                         ORDER BY l.id LIMIT most)
                    UNION ALL
                    -- The subquery reads no more rows than this.
                    (SELECT l.* FROM (
                         SELECT o.* FROM tollgate.audit_log o
                         WHERE o.id BETWEEN ($1).next_id AND ($1).last_id AND ($1).next_id >= ($1).dense_id
                         ORDER BY o.id LIMIT 10000 + most) l
                         WHERE l.epoch BETWEEN older_lineage AND newer_epoch
                           AND (l.epoch > older_epoch OR NOT pg_visible_in_snapshot(l.xid, ($1).older))
                           AND (l.epoch < newer_lineage OR pg_visible_in_snapshot(l.xid, ($1).newer))
                         ORDER BY l.id LIMIT most)
                ) a
                ORDER BY a.id LIMIT most
            ) s
        ) e
        ORDER BY e.id
    LOOP
        is_full := cardinality(page) > 0 AND page_bytes + one.bytes > most_bytes;
        EXIT WHEN is_full;
        page := array_append(page, one.event);
        page_bytes := page_bytes + one.bytes;
        last_read := one.id;
        is_full := cardinality(page) = most;
    END LOOP;
    batch.events := to_jsonb(page);
    IF is_full THEN
        until := least(last_read, until);
    ELSIF ($1).next_id >= ($1).dense_id THEN
        until := coalesce((SELECT l.id FROM tollgate.audit_log l WHERE l.id BETWEEN ($1).next_id AND ($1).last_id
                           ORDER BY l.id OFFSET 10000 + most - 1 LIMIT 1), until);
    END IF;
    batch.next.next_id := least(until, 9223372036854775806) + 1;
    batch.caught_up := false;
    IF until >= ($1).last_id THEN
        batch.next := tollgate.end_batch($1);
        -- Events that were committed while the batch was read are in the next one.
        batch.caught_up := fresh;
    END IF;
    batch.proof := tollgate.signature_of_page(given, batch.next);
    RETURN batch;
END
$$;
COMMENT ON FUNCTION tollgate.read_events(tollgate.event_cursor, integer) IS
    'The events after a cursor, in order of their ids, and the cursor after them, 2000 or 4 MB of them at most; events that commit late are not missed, and none is delivered twice. An id is unique within its epoch. An event that is too large or too deep to be delivered, which no function here writes, has a detail that says so';

CREATE FUNCTION tollgate.first_pending(cursor tollgate.event_cursor, max_events integer DEFAULT 1, OUT events bigint, OUT at timestamptz, OUT id bigint)
    LANGUAGE plpgsql STABLE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
    SET jit = off
    SET enable_seqscan = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
    SET enable_bitmapscan = off
AS $$
BEGIN
    PERFORM tollgate.check_cursor($1), tollgate.epoch_of_cursor(($1).older_epoch);
    IF ($1).newer IS NOT NULL THEN
        SELECT a.at, a.id INTO at, id FROM tollgate.audit_log a WHERE a.id >= ($1).next_id ORDER BY a.id LIMIT 1;
        events := CASE WHEN ($1).next_id <= ($1).last_id AND id IS NOT NULL THEN ($1).last_id - ($1).next_id + 1 ELSE 0 END;
        IF events > 0 THEN
            RETURN;
        END IF;
        cursor := tollgate.end_batch($1);
    END IF;
    cursor.newer_epoch := tollgate.epoch_identity((SELECT max(e.epoch) FROM tollgate.audit_epochs e));
    cursor.newer := tollgate.readable_snapshot();
    SELECT count(*), min(p.at), min(p.id) FILTER (WHERE NOT p.was_running) INTO events, at, id FROM (
        SELECT a.id, a.at, r.was_running
        FROM tollgate.ranges_of_batch($1) r
        CROSS JOIN LATERAL (
            SELECT l.id, l.at FROM tollgate.audit_log l
            WHERE (l.epoch, l.xid) >= (r.epoch, r.low) AND (l.epoch, l.xid) < (r.epoch, r.high)
            ORDER BY l.epoch, l.xid, l.id LIMIT $2) a
        LIMIT $2) p;
    IF events = $2 AND $2 > 1 THEN
        events := greatest(events, (SELECT s.last_value FROM tollgate.audit_log_id_seq s) - id + 1);
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.first_pending(tollgate.event_cursor, integer) IS
    'The approximate number of events after a cursor, exact below a number of them, and the time of one of the first. Internal.';

CREATE FUNCTION tollgate.has_events(cursor tollgate.event_cursor) RETURNS boolean
    LANGUAGE sql STABLE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT f.events > 0 FROM tollgate.first_pending($1) f;
END;
COMMENT ON FUNCTION tollgate.has_events(tollgate.event_cursor) IS
    'Whether read_events may return something after a cursor, at a cost that does not depend on how much';

CREATE TABLE tollgate.subscriptions (
    name        text                  PRIMARY KEY CHECK (name <> '' AND length(name) <= 100),
    place       tollgate.event_cursor NOT NULL,
    created_at  timestamptz           NOT NULL DEFAULT now(),
    advanced_at timestamptz           NOT NULL DEFAULT now()
) WITH (fillfactor = 50);
COMMENT ON TABLE tollgate.subscriptions IS 'The position in the audit log of each named subscriber';
SELECT pg_extension_config_dump('tollgate.subscriptions', '');

-- A cursor belongs to the history of one cluster.
CREATE TRIGGER leave_out BEFORE INSERT OR UPDATE OR DELETE ON tollgate.subscriptions
    FOR EACH ROW WHEN (tollgate.is_logical_worker()) EXECUTE FUNCTION tollgate.leave_out();
ALTER TABLE tollgate.subscriptions ENABLE REPLICA TRIGGER leave_out;

CREATE FUNCTION tollgate.place_of_cursor(cursor tollgate.event_cursor) RETURNS tollgate.audit_place
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT tollgate.place_of_horizon(tollgate.epoch_of_cursor(($1).older_epoch), pg_snapshot_xmin(($1).older));
END;
COMMENT ON FUNCTION tollgate.place_of_cursor(tollgate.event_cursor) IS 'The place below which everything was read. Internal.';

CREATE FUNCTION tollgate.open_subscription(name text) RETURNS SETOF tollgate.event_cursor
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF $1 IS NULL OR length($1) NOT BETWEEN 1 AND 100 THEN
        RAISE EXCEPTION 'the name of a subscription has 1 to 100 characters'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: name.',
                  HINT = 'Name it after the subscriber, such as "log".';
    END IF;
    PERFORM tollgate.without_token('name', $1);
    IF NOT EXISTS (SELECT FROM tollgate.subscriptions s WHERE s.name = $1) THEN
        -- Each holds up purge_audit_log.
        IF (SELECT count(*) FROM tollgate.subscriptions) >= 100 THEN
            RAISE EXCEPTION 'there are 100 subscriptions, which is as many as there may be'
                USING ERRCODE = 'program_limit_exceeded',
                      HINT = 'SELECT * FROM tollgate.subscription_backlogs() shows them; tollgate.drop_subscription(name) drops one.';
        END IF;
        INSERT INTO tollgate.subscriptions (name, place) VALUES ($1, tollgate.event_position()) ON CONFLICT DO NOTHING;
    END IF;
    RETURN QUERY SELECT (s.place).* FROM tollgate.subscriptions s WHERE s.name = $1 FOR UPDATE SKIP LOCKED;
END
$$;
COMMENT ON FUNCTION tollgate.open_subscription(text) IS
    'The cursor of a named subscriber, locked until the transaction ends; no row while another session holds it. A new one starts now, and is kept only if the transaction commits';

CREATE FUNCTION tollgate.advance_subscription(name text, cursor tollgate.event_cursor, proof bytea) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    newest  integer := (SELECT max(e.epoch) FROM tollgate.audit_epochs e);
    reached pg_snapshot := tollgate.readable_snapshot(1000000000);
    before  tollgate.event_cursor;
BEGIN
    PERFORM tollgate.without_token('name', $1);
    PERFORM tollgate.check_cursor($2);
    -- What they are behind by is queued by queue_webhook_deliveries() alone, which moves them as it does.
    IF starts_with($1, 'tollgate:') THEN
        RAISE EXCEPTION 'the subscription of the webhooks is moved by queue_webhook_deliveries() alone'
            USING ERRCODE = 'insufficient_privilege', DETAIL = 'Argument: name.', HINT = 'Open a subscription of your own.';
    END IF;
    SELECT (s.place).* INTO before FROM tollgate.subscriptions s WHERE s.name = $1 FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no subscription %', tollgate.quote_redacted($1)
            USING ERRCODE = 'undefined_object', DETAIL = 'Argument: name.',
                  HINT = 'tollgate.open_subscription(name) creates one.';
    END IF;
    IF (tollgate.signature_of_page(before, $2) = $3) IS NOT TRUE THEN
        RAISE EXCEPTION 'a subscription cannot be moved past events that were not read from it'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Arguments: cursor and proof, which are not of a page that was read from where the subscription is.',
                  HINT = 'Read from the cursor that open_subscription returns, and advance by next and proof of each page, in order.';
    END IF;
    -- A database that was restored from an older state does not have all that was read.
    IF before.older_epoch = ($2).older_epoch THEN
        reached := tollgate.unite_snapshots(reached, before.older);
    END IF;
    IF before.newer_epoch = ($2).older_epoch THEN
        reached := tollgate.unite_snapshots(reached, before.newer);
    END IF;
    IF tollgate.epoch_of_cursor(($2).older_epoch) = newest AND NOT tollgate.snapshot_contains(reached, ($2).older)
       OR tollgate.epoch_of_cursor(coalesce(($2).newer_epoch, ($2).older_epoch)) = newest
          AND NOT tollgate.snapshot_contains(reached, coalesce(($2).newer, ($2).older)) THEN
        RAISE EXCEPTION 'a subscription cannot be moved beyond events that were read'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: cursor, which includes transactions that this database does not have.',
                  HINT = 'Read from the cursor that open_subscription returns.';
    END IF;
    UPDATE tollgate.subscriptions s SET place = $2, advanced_at = now() WHERE s.name = $1;
END
$$;
COMMENT ON FUNCTION tollgate.advance_subscription(text, tollgate.event_cursor, bytea) IS
    'Moves a subscriber''s cursor to the end of a page that was read from where it is; in the same transaction as open_subscription';

CREATE FUNCTION tollgate.drop_subscription(name text) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.without_token('name', $1);
    DELETE FROM tollgate.subscriptions s WHERE s.name = $1;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO tollgate.audit_log (event, detail) VALUES ('subscription.dropped', jsonb_build_object('subscription', $1));
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.drop_subscription(text) IS
    'Drops a subscriber that is gone for good, so that it no longer blocks purge_audit_log; false if there is none of that name; event subscription.dropped';

CREATE FUNCTION tollgate.subscription_backlogs(max_events integer DEFAULT 1000)
    RETURNS TABLE (name text, pending bigint, oldest_at timestamptz, advanced_at timestamptz)
    LANGUAGE plpgsql STABLE PARALLEL UNSAFE SECURITY DEFINER ROWS 10
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    subscriber record;
BEGIN
    FOR subscriber IN SELECT s.* FROM tollgate.subscriptions s ORDER BY s.name LOOP
        name := subscriber.name;
        advanced_at := subscriber.advanced_at;
        BEGIN
            SELECT f.events, f.at INTO pending, oldest_at FROM tollgate.first_pending(subscriber.place, least(greatest($1, 1), 10000)) f;
        EXCEPTION WHEN object_not_in_prerequisite_state THEN
            pending := NULL;
            oldest_at := NULL;
        END;
        RETURN NEXT;
    END LOOP;
END
$$;
COMMENT ON FUNCTION tollgate.subscription_backlogs(integer) IS
    'How many events each subscriber has still to receive, exact up to a number and estimated above, and the time of one of the first; NULL for a cursor that this database cannot follow';
