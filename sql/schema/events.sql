-- Reading the audit log as an outbox: every event once, whatever commits late, and whatever becomes of the cluster.
--
-- A serial id is not commit order. So a cursor is a horizon, below which every transaction has ended and every event was
-- told, and the ids that were told at or above it. It holds for the lineage of the epoch that it names (epochs.sql);
-- what is of a later epoch was never told, whatever its ids.

CREATE TYPE tollgate.event_cursor AS (epoch uuid, horizon bigint, delivered bigint[]);
COMMENT ON TYPE tollgate.event_cursor IS 'A place in the audit log; to be kept and handed back, not to be read';

CREATE TYPE tollgate.event_batch AS (events jsonb, epoch uuid, horizon bigint, delivered bigint[], caught_up boolean);
COMMENT ON TYPE tollgate.event_batch IS 'Events as a JSON array, the cursor after them, and whether they were all there are';

CREATE FUNCTION tollgate.epoch_identity(epoch integer) RETURNS uuid
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce((SELECT e.identity FROM tollgate.audit_epochs e WHERE e.epoch = $1 LIMIT 1),
                    '00000000-0000-0000-0000-000000000000');
END;
COMMENT ON FUNCTION tollgate.epoch_identity(integer) IS 'What a cursor names an epoch by; all zeroes before the first one. Internal.';

CREATE FUNCTION tollgate.epoch_of_cursor(epoch uuid, horizon bigint, delivered bigint[]) RETURNS integer
    LANGUAGE plpgsql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    number integer;
BEGIN
    -- Taken for "nothing delivered yet" or "nothing new", a broken cursor would skip events for ever.
    IF $1 IS NULL OR $2 IS NULL OR $2 < 0 OR $3 IS NULL OR array_position($3, NULL) IS NOT NULL THEN
        RAISE EXCEPTION 'this is not a cursor of the audit log'
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = 'Arguments: epoch, horizon and delivered, which are NULL, negative or have a NULL in them.',
                  HINT = 'Pass on what the last read_events returned, or begin with event_position().';
    END IF;
    IF $1 = '00000000-0000-0000-0000-000000000000' THEN
        RETURN 0;
    END IF;
    SELECT e.epoch INTO number FROM tollgate.audit_epochs e WHERE e.identity = $1 LIMIT 1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'this cursor is of another history of the audit log than this database has'
            USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = format('Argument: epoch, of %s, which is not known here.', $1),
                  HINT = 'A standby that lags will know it soon. If this database was restored from an older state, or promoted from one, begin anew with event_position().';
    END IF;
    RETURN number;
END
$$;
COMMENT ON FUNCTION tollgate.epoch_of_cursor(uuid, bigint, bigint[]) IS
    'The number of the epoch that a cursor names; raises 22023 for what is no cursor, 55000 for one that this database cannot follow. Internal.';

CREATE FUNCTION tollgate.event_position(since bigint DEFAULT NULL) RETURNS tollgate.event_cursor
    LANGUAGE plpgsql STABLE PARALLEL SAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    newest  integer := coalesce((SELECT max(e.epoch) FROM tollgate.audit_epochs e), 0);
    final   tollgate.audit_place := tollgate.final_place();
    next    record;
    reached integer;
    place   xid8;
BEGIN
    -- Rows after the given one may have been written, or are still being written, by older transactions.
    SELECT a.epoch, a.xid INTO next FROM tollgate.audit_log a WHERE a.id > $1 ORDER BY a.epoch, a.xid LIMIT 1;
    reached := coalesce(next.epoch, newest);
    IF final.epoch > newest THEN
        -- Written in another cluster: all there will ever be.
        place := coalesce(next.xid, (
            SELECT a.xid::text::bigint + 1 FROM tollgate.audit_log a WHERE a.epoch = newest ORDER BY a.xid DESC LIMIT 1)::text::xid8);
    ELSIF reached >= tollgate.epoch_lineage(newest) THEN
        place := least(next.xid, final.xid);
    ELSE
        place := next.xid;
    END IF;
    RETURN (tollgate.epoch_identity(reached), coalesce(place, '0')::text::bigint,
            ARRAY(SELECT a.id FROM tollgate.audit_log a
                  WHERE a.epoch BETWEEN tollgate.epoch_lineage(reached) AND reached AND a.xid >= place AND ($1 IS NULL OR a.id <= $1)
                  ORDER BY a.id))::tollgate.event_cursor;
END
$$;
COMMENT ON FUNCTION tollgate.event_position(bigint) IS
    'A cursor for read_events: from now on (NULL), from the beginning (0), or after the event with that id';

CREATE FUNCTION tollgate.read_events(epoch uuid, horizon bigint, delivered bigint[], max_events integer DEFAULT 1000) RETURNS tollgate.event_batch
    LANGUAGE plpgsql STABLE PARALLEL SAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- STABLE: all that follows is read with one snapshot, that of the calling statement.
    known    integer := tollgate.epoch_of_cursor($1, $2, $3);
    first    integer := tollgate.epoch_lineage(known);
    newest   integer := coalesce((SELECT max(e.epoch) FROM tollgate.audit_epochs e), 0);
    final    tollgate.audit_place := tollgate.final_place();
    batch    tollgate.event_batch;
    page     record;
    reached  integer;
    place    xid8;
BEGIN
    IF $4 IS NULL OR $4 < 1 THEN
        RAISE EXCEPTION 'a batch has at least one event'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: max_events, of %s.', coalesce($4::text, 'NULL')),
                  HINT = 'Give how many events you can take at a time, such as 1000.';
    END IF;

    WITH page AS MATERIALIZED (
        SELECT a.* FROM generate_series(first, newest) AS s (epoch)
        CROSS JOIN LATERAL (
            SELECT l.* FROM tollgate.audit_log l
            WHERE l.epoch = s.epoch
              AND l.xid >= CASE WHEN s.epoch <= known THEN $2::text ELSE '0' END::xid8
              AND (s.epoch > known OR l.id NOT IN (SELECT unnest($3)))
            ORDER BY l.xid, l.id
            LIMIT $4) a
        ORDER BY a.epoch, a.xid, a.id
        LIMIT $4
    )
    -- By id, because what a transaction did after it saw another's commit has the higher id, if not the higher xid.
    SELECT coalesce(jsonb_agg(jsonb_build_object(
               'id', p.id, 'epoch', p.epoch, 'at', p.at, 'event', p.event, 'token_id', p.token_id, 'user_id', p.user_id,
               'actor', p.actor, 'client_addr', host(p.client_addr), 'reason', p.detail -> 'reason', 'detail', p.detail - 'reason')
               ORDER BY p.epoch, p.id), '[]') AS events,
           count(*) < $4 AS caught_up, coalesce(array_agg(p.id), '{}') AS ids, max(p.epoch) AS epoch,
           (SELECT e.xid FROM page e ORDER BY e.epoch DESC, e.xid DESC LIMIT 1) AS xid
        INTO page FROM page p;
    batch.events := page.events;
    batch.caught_up := page.caught_up;

    -- The horizon moves up to where all transactions have ended. A page that was cut short goes no further than its own
    -- last row. In an epoch that was reached before, a reader with an older snapshot than the last one does not go back.
    reached := CASE WHEN batch.caught_up THEN newest ELSE greatest(known, page.epoch) END;
    IF reached >= tollgate.epoch_lineage(newest) AND final.epoch <= newest THEN
        place := CASE WHEN batch.caught_up THEN final.xid ELSE least(final.xid, page.xid) END;
    ELSIF batch.caught_up THEN
        -- Written in another cluster: all there will ever be.
        place := (SELECT a.xid::text::bigint + 1 FROM tollgate.audit_log a WHERE a.epoch = reached ORDER BY a.xid DESC LIMIT 1)::text::xid8;
    ELSE
        place := page.xid;
    END IF;
    IF reached = known THEN
        place := greatest(place, $2::text::xid8);
    END IF;
    place := coalesce(place, '0');

    first := tollgate.epoch_lineage(reached);
    batch.epoch := tollgate.epoch_identity(reached);
    batch.horizon := place::text::bigint;
    batch.delivered := ARRAY(
        SELECT a.id FROM tollgate.audit_log a WHERE a.id = ANY (page.ids) AND a.epoch >= first AND a.xid >= place
        UNION
        SELECT a.id FROM tollgate.audit_log a WHERE a.id = ANY ($3) AND a.epoch BETWEEN first AND known AND a.xid >= place
        UNION
        -- A new epoch may have its horizon below the old one's: what was told in between is told.
        SELECT a.id FROM tollgate.audit_log a
            WHERE reached > known AND a.epoch BETWEEN first AND known AND a.xid >= place AND a.xid < $2::text::xid8
        UNION
        -- A reader with an older snapshot does not see it all, and must not forget it. What a new epoch does not have
        -- is lost for ever.
        SELECT d.id FROM unnest($3) AS d (id)
            WHERE reached = known AND NOT EXISTS (SELECT FROM tollgate.audit_log a WHERE a.id = d.id AND a.epoch <= known)
        ORDER BY 1);
    RETURN batch;
END
$$;
COMMENT ON FUNCTION tollgate.read_events(uuid, bigint, bigint[], integer) IS
    'The events after a cursor, in order of their ids, and the cursor after them; nothing that commits late is missed, nothing is told twice. An id is unique within its epoch';

CREATE TABLE tollgate.subscriptions (
    name        text        PRIMARY KEY CHECK (name <> '' AND length(name) <= 100),
    horizon     bigint      NOT NULL,
    delivered   bigint[]    NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    advanced_at timestamptz NOT NULL DEFAULT now(),
    epoch       uuid        NOT NULL
) WITH (fillfactor = 50);
COMMENT ON TABLE tollgate.subscriptions IS 'How far each named subscriber has been told of the audit log';
SELECT pg_extension_config_dump('tollgate.subscriptions', '');

CREATE FUNCTION tollgate.open_subscription(name text) RETURNS SETOF tollgate.event_cursor
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF $1 IS NULL OR length($1) NOT BETWEEN 1 AND 100 THEN
        RAISE EXCEPTION 'the name of a subscription has 1 to 100 characters'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: name.',
                  HINT = 'Name it after who is told, such as "log".';
    END IF;
    PERFORM tollgate.without_token('name', $1);
    IF NOT EXISTS (SELECT FROM tollgate.subscriptions s WHERE s.name = $1) THEN
        INSERT INTO tollgate.subscriptions (name, epoch, horizon, delivered)
            SELECT $1, p.epoch, p.horizon, p.delivered FROM tollgate.event_position() p
            ON CONFLICT DO NOTHING;
    END IF;
    RETURN QUERY SELECT s.epoch, s.horizon, s.delivered FROM tollgate.subscriptions s WHERE s.name = $1 FOR UPDATE SKIP LOCKED;
END
$$;
COMMENT ON FUNCTION tollgate.open_subscription(text) IS
    'The cursor of a named subscriber, locked until the transaction ends; no row while another session holds it. A new one begins now, and is kept only if the transaction commits';

CREATE FUNCTION tollgate.advance_subscription(name text, epoch uuid, horizon bigint, delivered bigint[]) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.without_token('name', $1);
    PERFORM tollgate.epoch_of_cursor($2, $3, $4);
    UPDATE tollgate.subscriptions s SET epoch = $2, horizon = $3, delivered = $4, advanced_at = now() WHERE s.name = $1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no subscription %', tollgate.quote_redacted($1)
            USING ERRCODE = 'undefined_object', DETAIL = 'Argument: name.',
                  HINT = 'tollgate.open_subscription(name) begins one.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.advance_subscription(text, uuid, bigint, bigint[]) IS
    'Moves a subscriber''s cursor; in the same transaction as open_subscription';

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
    'Forgets a subscriber that is gone for good, so that it does not hold up purge_audit_log any longer; false when there is none of that name; event subscription.dropped';

CREATE FUNCTION tollgate.subscription_backlogs(max_events integer DEFAULT 10000)
    RETURNS TABLE (name text, pending bigint, oldest_at timestamptz, advanced_at timestamptz)
    LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER ROWS 10
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT s.name, CASE WHEN s.known IS NOT NULL THEN w.pending END, w.oldest_at, s.advanced_at
    FROM (SELECT u.*, CASE WHEN u.epoch = '00000000-0000-0000-0000-000000000000' THEN 0 ELSE e.epoch END AS known
          FROM tollgate.subscriptions u LEFT JOIN tollgate.audit_epochs e ON e.identity = u.epoch) s
    CROSS JOIN LATERAL (
        SELECT count(*), min(p.at) FROM (
            SELECT a.at FROM tollgate.audit_log a
            WHERE a.epoch > s.known
               OR a.epoch BETWEEN tollgate.epoch_lineage(s.known) AND s.known AND a.xid >= s.horizon::text::xid8 AND a.id <> ALL (s.delivered)
            ORDER BY a.epoch, a.xid, a.id LIMIT $1) p) w (pending, oldest_at)
    ORDER BY s.name;
END;
COMMENT ON FUNCTION tollgate.subscription_backlogs(integer) IS
    'How many events each subscriber has not been told of yet, counted up to a number, and of when the first of them is; NULL for a cursor that this database cannot follow';
