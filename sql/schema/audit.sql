-- The audit log, which is also the outbox: what happened, in an order that readers can follow without losing anything.

CREATE TABLE tollgate.audit_log (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    xid         xid8        NOT NULL DEFAULT pg_current_xact_id(),
    at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    event       text        NOT NULL,
    token_id    uuid,
    user_id     text,
    actor       text        NOT NULL DEFAULT tollgate.acting_role(),
    client_addr inet        DEFAULT inet_client_addr(),
    detail      jsonb       NOT NULL DEFAULT '{}'
);
COMMENT ON TABLE tollgate.audit_log IS
    'One row per event, append-only. Readers follow it by (xid, id) from a cursor: a horizon below which every transaction has ended, and the ids already delivered at or above it';
CREATE INDEX audit_log_position ON tollgate.audit_log (xid, id);
CREATE INDEX audit_log_token ON tollgate.audit_log (token_id) WHERE token_id IS NOT NULL;
SELECT pg_extension_config_dump('tollgate.audit_log', '');
SELECT pg_extension_config_dump('tollgate.audit_log_id_seq', '');

CREATE FUNCTION tollgate.refuse_audit_change() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'the audit log is append-only: % is refused', TG_OP
        USING ERRCODE = 'insufficient_privilege',
              HINT = 'Rows of tollgate.audit_log are never changed or removed by hand.';
END
$$;
COMMENT ON FUNCTION tollgate.refuse_audit_change() IS 'Trigger that refuses UPDATE, DELETE and TRUNCATE of the audit log, to its owner too. Internal.';

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON tollgate.audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION tollgate.refuse_audit_change();
ALTER TABLE tollgate.audit_log ENABLE ALWAYS TRIGGER append_only;

-- Channel and payload stand here alone. A payload is at most 8000 bytes, so the reason is cut to what a
-- listener needs at a glance; the log has all of it.
CREATE FUNCTION tollgate.notify_token_event(event text, token_id uuid, user_id text, reason text, affected bigint) RETURNS void
    LANGUAGE sql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT pg_notify('tollgate_events',
        CASE WHEN $5 IS NULL
            THEN json_build_object('event', $1, 'token_id', $2, 'user_id', $3, 'reason', left($4, 200))
            ELSE json_build_object('event', $1, 'user_id', $3, 'count', $5)
        END::text);
END;
COMMENT ON FUNCTION tollgate.notify_token_event(text, uuid, text, text, bigint) IS
    'Tells listeners of tollgate_events that access was taken away: of one token, or of so many at once. Internal.';

CREATE TYPE tollgate.event_cursor AS (horizon bigint, delivered bigint[]);
COMMENT ON TYPE tollgate.event_cursor IS 'A place in the audit log; to be kept and handed back, not to be read';

CREATE TYPE tollgate.event_batch AS (events jsonb, horizon bigint, delivered bigint[], caught_up boolean);
COMMENT ON TYPE tollgate.event_batch IS 'Events as a JSON array, the cursor after them, and whether they were all there are';

CREATE FUNCTION tollgate.event_position(since bigint DEFAULT NULL) RETURNS tollgate.event_cursor
    LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH start AS (
        SELECT CASE
            WHEN $1 IS NULL THEN pg_snapshot_xmin(pg_current_snapshot())
            -- Rows after the given one may have been written, or are still being written, by older transactions.
            ELSE least((SELECT a.xid FROM tollgate.audit_log a WHERE a.id > $1 ORDER BY a.xid LIMIT 1),
                       pg_snapshot_xmin(pg_current_snapshot()))
        END AS horizon
    )
    SELECT s.horizon::text::bigint,
           ARRAY(SELECT a.id FROM tollgate.audit_log a
                 WHERE a.xid >= s.horizon AND ($1 IS NULL OR a.id <= $1)
                 ORDER BY a.id)
    FROM start s;
END;
COMMENT ON FUNCTION tollgate.event_position(bigint) IS
    'A cursor for read_events: from now on (NULL), from the beginning (0), or after the event with that id';

CREATE FUNCTION tollgate.read_events(horizon bigint, delivered bigint[], max_events integer DEFAULT 1000) RETURNS tollgate.event_batch
    LANGUAGE plpgsql STABLE PARALLEL SAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    batch tollgate.event_batch;
BEGIN
    -- Taken for "nothing delivered yet" or "nothing new", a broken cursor would skip events for ever.
    IF $1 IS NULL OR $1 < 0 OR $2 IS NULL OR array_position($2, NULL) IS NOT NULL OR $3 IS NULL OR $3 < 1 THEN
        RAISE EXCEPTION 'this is not a cursor of the audit log'
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = 'Arguments: horizon and delivered, which are NULL, negative or have a NULL in them, or max_events, which is less than 1.',
                  HINT = 'Pass on what the last read_events returned, or begin with event_position().';
    END IF;
    -- One statement, so that the rows and the horizon are those of one snapshot.
    WITH page AS MATERIALIZED (
        SELECT a.* FROM tollgate.audit_log a
        WHERE a.xid >= $1::text::xid8 AND a.id NOT IN (SELECT unnest($2))
        ORDER BY a.xid, a.id
        LIMIT $3
    ), told AS (
        -- By id, because what a transaction did after it saw another's commit has the higher id, if not the higher xid.
        SELECT count(*) < $3 AS caught_up,
               coalesce(jsonb_agg(jsonb_build_object(
                   'id', p.id, 'at', p.at, 'event', p.event, 'token_id', p.token_id, 'user_id', p.user_id,
                   'actor', p.actor, 'client_addr', host(p.client_addr), 'reason', p.detail -> 'reason', 'detail', p.detail - 'reason')
                   ORDER BY p.id), '[]') AS events
        FROM page p
    ), next AS (
        -- All below the snapshot's xmin have ended. A page that was cut short goes no further than its own last row, and
        -- a reader with an older snapshot than the last one does not go back.
        SELECT greatest($1::text::xid8,
                   CASE WHEN t.caught_up THEN pg_snapshot_xmin(pg_current_snapshot())
                        ELSE least(pg_snapshot_xmin(pg_current_snapshot()),
                                   (SELECT p.xid FROM page p ORDER BY p.xid DESC LIMIT 1))
                   END) AS horizon
        FROM told t
    )
    SELECT t.events, n.horizon::text::bigint,
           -- Forgotten is only what is seen to lie below the horizon: a reader with an older snapshot does not see it all.
           ARRAY(SELECT told_of.id
                 FROM (SELECT unnest($2) AS id UNION SELECT p.id FROM page p) told_of
                 WHERE NOT EXISTS (SELECT FROM tollgate.audit_log a WHERE a.id = told_of.id AND a.xid < n.horizon)
                 ORDER BY told_of.id),
           t.caught_up
    INTO batch
    FROM told t, next n;
    RETURN batch;
END
$$;
COMMENT ON FUNCTION tollgate.read_events(bigint, bigint[], integer) IS
    'The events after a cursor, in order of their ids, and the cursor after them; nothing that commits late is missed, nothing is told twice';

CREATE TABLE tollgate.subscriptions (
    name        text        PRIMARY KEY CHECK (name <> '' AND length(name) <= 100),
    horizon     bigint      NOT NULL,
    delivered   bigint[]    NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    advanced_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);
COMMENT ON TABLE tollgate.subscriptions IS 'How far each named subscriber has been told of the audit log';

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
    IF NOT EXISTS (SELECT FROM tollgate.subscriptions s WHERE s.name = $1) THEN
        INSERT INTO tollgate.subscriptions (name, horizon, delivered)
            SELECT $1, p.horizon, p.delivered FROM tollgate.event_position() p
            ON CONFLICT DO NOTHING;
    END IF;
    RETURN QUERY SELECT s.horizon, s.delivered FROM tollgate.subscriptions s WHERE s.name = $1 FOR UPDATE SKIP LOCKED;
END
$$;
COMMENT ON FUNCTION tollgate.open_subscription(text) IS
    'The cursor of a named subscriber, locked until the transaction ends; no row while another session holds it. A new one begins now, and is kept only if the transaction commits';

CREATE FUNCTION tollgate.advance_subscription(name text, horizon bigint, delivered bigint[]) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- PostgreSQL's own message would show the whole row.
    IF $2 IS NULL OR $3 IS NULL THEN
        RAISE EXCEPTION 'this is not a cursor of the audit log'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Arguments: horizon and delivered, which are NULL.',
                  HINT = 'Pass on what the last read_events returned.';
    END IF;
    UPDATE tollgate.subscriptions s SET horizon = $2, delivered = $3, advanced_at = now() WHERE s.name = $1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no subscription %', tollgate.quote_redacted($1)
            USING ERRCODE = 'undefined_object', HINT = 'tollgate.open_subscription(name) begins one.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.advance_subscription(text, bigint, bigint[]) IS
    'Moves a subscriber''s cursor; in the same transaction as open_subscription';
