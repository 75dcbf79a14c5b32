-- From 0.1.0 to 0.2.0: the life of a token (rotation, changes, derivation, import, tables of users), capabilities, epochs and
-- seals of the audit log. Objects stand in the order of sql/schema, where their new definitions are explained.

CREATE OR REPLACE FUNCTION tollgate.quote_redacted(argument text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce(quote_literal(left(regexp_replace($1, '[0-9A-Fa-f]{16,}', '…', 'g'), 140)), 'NULL');
END;

CREATE TABLE tollgate.audit_epochs (
    epoch             integer     NOT NULL,
    xid               xid8        NOT NULL DEFAULT pg_current_xact_id(),
    identity          uuid        NOT NULL,
    system_identifier bigint      NOT NULL,
    timeline          integer     NOT NULL,
    begun_at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (epoch, xid)
);
COMMENT ON TABLE tollgate.audit_epochs IS
    'Which cluster and timeline the events of an epoch were written on. Each transaction that finds its epoch unregistered registers it, with the same values, so that none waits for another''s';
COMMENT ON COLUMN tollgate.audit_epochs.identity IS
    'Tells apart the epochs of one number that two copies of a database opened; part of every cursor';
SELECT pg_extension_config_dump('tollgate.audit_epochs', '');

CREATE FUNCTION tollgate.system_identifier() RETURNS bigint
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'system_identifier';
COMMENT ON FUNCTION tollgate.system_identifier() IS 'What a cluster shares with its standbys and with no other cluster. Internal.';

CREATE FUNCTION tollgate.wal_timeline() RETURNS integer
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'wal_timeline';
COMMENT ON FUNCTION tollgate.wal_timeline() IS 'The timeline that this server writes; NULL on a standby. Internal.';

CREATE FUNCTION tollgate.current_epoch() RETURNS integer
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    cluster bigint  := tollgate.system_identifier();
    line    integer := tollgate.wal_timeline();
    newest  record;
BEGIN
    SELECT e.epoch, e.system_identifier, e.timeline INTO newest
        FROM tollgate.audit_epochs e ORDER BY e.epoch DESC, e.xid DESC LIMIT 1;
    IF newest.system_identifier = cluster AND newest.timeline = line THEN
        RETURN newest.epoch;
    END IF;
    newest.epoch := coalesce(newest.epoch, 0) + 1;
    -- All who come here before the first of them commits write down the same: what they know of the server's last start
    -- stands in for a random number, which only one of them could choose.
    INSERT INTO tollgate.audit_epochs (epoch, identity, system_identifier, timeline)
        VALUES (newest.epoch,
                encode(substr(sha256(int4send(newest.epoch) || int8send(cluster) || int4send(line)
                                     || timestamptz_send(pg_postmaster_start_time())), 1, 16), 'hex')::uuid,
                cluster, line);
    RETURN newest.epoch;
END
$$;
COMMENT ON FUNCTION tollgate.current_epoch() IS
    'The epoch that an event written now is of; registers it if it is a new one. Internal.';

CREATE FUNCTION tollgate.epoch_lineage(epoch integer) RETURNS integer
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce(max(o.epoch), 0) + 1
    FROM tollgate.audit_epochs o
    WHERE o.epoch < $1
      AND o.system_identifier <> (SELECT e.system_identifier FROM tollgate.audit_epochs e WHERE e.epoch = $1 LIMIT 1);
END;
COMMENT ON FUNCTION tollgate.epoch_lineage(integer) IS
    'The first of the epochs up to this one that were written in the same cluster without another''s in between. Internal.';

CREATE TYPE tollgate.audit_place AS (epoch integer, xid xid8);
COMMENT ON TYPE tollgate.audit_place IS 'A place in the audit log: before the events of this transaction id in this epoch. Internal.';

CREATE FUNCTION tollgate.place_of_horizon(epoch integer, horizon xid8) RETURNS tollgate.audit_place
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- A prepared transaction may hold a horizon in an epoch before the one that was reached.
    SELECT coalesce(max(e.epoch), tollgate.epoch_lineage($1)), $2
    FROM tollgate.audit_epochs e
    WHERE e.epoch BETWEEN tollgate.epoch_lineage($1) AND $1 AND e.xid <= $2;
END;
COMMENT ON FUNCTION tollgate.place_of_horizon(integer, xid8) IS
    'The place below which lies all that is below a horizon in the lineage of an epoch. Internal.';

CREATE FUNCTION tollgate.final_place() RETURNS tollgate.audit_place
    LANGUAGE plpgsql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    newest integer := (SELECT max(e.epoch) FROM tollgate.audit_epochs e);
BEGIN
    IF newest IS NULL THEN
        RETURN (0, '0'::xid8)::tollgate.audit_place;
    END IF;
    -- What another cluster wrote came here as a whole.
    IF NOT EXISTS (SELECT FROM tollgate.audit_epochs e WHERE e.epoch = newest AND e.system_identifier = tollgate.system_identifier()) THEN
        RETURN (newest + 1, '0'::xid8)::tollgate.audit_place;
    END IF;
    RETURN tollgate.place_of_horizon(newest, pg_snapshot_xmin(pg_current_snapshot()));
END
$$;
COMMENT ON FUNCTION tollgate.final_place() IS
    'The place below which every transaction has ended, so that nothing is added to the audit log there any more. Internal.';

-- What there is so far may have come here in a dump. Of an unknown cluster, it counts as complete, which it is: this
-- transaction keeps everyone from the log.
LOCK TABLE tollgate.audit_log;
INSERT INTO tollgate.audit_epochs (epoch, identity, system_identifier, timeline)
    SELECT 1, gen_random_uuid(), 0, 0 WHERE EXISTS (SELECT FROM tollgate.audit_log);
ALTER TABLE tollgate.audit_log ADD COLUMN epoch integer NOT NULL DEFAULT 1;
ALTER TABLE tollgate.audit_log ALTER COLUMN epoch SET DEFAULT tollgate.current_epoch();
COMMENT ON TABLE tollgate.audit_log IS 'One row per event, append-only, in the order of (epoch, xid, id)';

DROP INDEX tollgate.audit_log_position;
CREATE INDEX audit_log_position ON tollgate.audit_log (epoch, xid, id);

CREATE FUNCTION tollgate.is_purging_audit_log() RETURNS boolean
    LANGUAGE c STABLE PARALLEL RESTRICTED
    AS 'MODULE_PATHNAME', 'is_purging_audit_log';
COMMENT ON FUNCTION tollgate.is_purging_audit_log() IS
    'Whether purge_audit_log is what runs in this session now: a flag of the library that nothing else can set. Internal.';

CREATE OR REPLACE FUNCTION tollgate.refuse_audit_change() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF TG_OP = 'DELETE' AND TG_TABLE_NAME = 'audit_log' AND tollgate.is_purging_audit_log() THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION 'the audit log is append-only: % of tollgate.% is refused', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'insufficient_privilege',
              HINT = 'Events are never changed. Old ones are removed with tollgate.purge_audit_log(before).';
END
$$;
COMMENT ON FUNCTION tollgate.refuse_audit_change() IS
    'Trigger that refuses UPDATE, DELETE and TRUNCATE of the audit log, its epochs and its seals, to their owner too. Internal.';

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON tollgate.audit_epochs
    FOR EACH STATEMENT EXECUTE FUNCTION tollgate.refuse_audit_change();
ALTER TABLE tollgate.audit_epochs ENABLE ALWAYS TRIGGER append_only;

DROP FUNCTION tollgate.event_position(bigint);
DROP FUNCTION tollgate.read_events(bigint, bigint[], integer);
DROP FUNCTION tollgate.open_subscription(text);
DROP FUNCTION tollgate.advance_subscription(text, bigint, bigint[]);
DROP TYPE tollgate.event_cursor;
DROP TYPE tollgate.event_batch;

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
ALTER TABLE tollgate.subscriptions ADD COLUMN epoch uuid;
UPDATE tollgate.subscriptions SET epoch = tollgate.epoch_identity((SELECT coalesce(max(e.epoch), 0) FROM tollgate.audit_epochs e));
ALTER TABLE tollgate.subscriptions ALTER COLUMN epoch SET NOT NULL;
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
    IF $1 ~ '[0-9A-Fa-f]{80}' THEN
        RAISE EXCEPTION 'this name of a subscription has a token in it'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: name.',
                  HINT = 'Name it after who is told, such as "log". If it was a token, revoke it.';
    END IF;
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

CREATE TABLE tollgate.audit_seals (
    seal      bigint      PRIMARY KEY,
    epoch     integer     NOT NULL,
    xid       xid8        NOT NULL,
    events    bigint      NOT NULL,
    first_at  timestamptz NOT NULL,
    last_at   timestamptz NOT NULL,
    sealed_at timestamptz NOT NULL,
    in_order  bytea       NOT NULL,
    any_order bytea       NOT NULL,
    hash      bytea       NOT NULL
);
COMMENT ON TABLE tollgate.audit_seals IS
    'One row per sealed stretch of the audit log, append-only: from where the seal before it ends to before (epoch, xid)';
COMMENT ON COLUMN tollgate.audit_seals.in_order IS 'sha256 of the digests of the events with their places, in order';
COMMENT ON COLUMN tollgate.audit_seals.any_order IS 'sha256 of the digests of the events without their places, sorted: tells reordered from changed';
COMMENT ON COLUMN tollgate.audit_seals.hash IS 'sha256 of the other columns and of the hash of the seal before';
SELECT pg_extension_config_dump('tollgate.audit_seals', '');

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON tollgate.audit_seals
    FOR EACH STATEMENT EXECUTE FUNCTION tollgate.refuse_audit_change();
ALTER TABLE tollgate.audit_seals ENABLE ALWAYS TRIGGER append_only;
CREATE INDEX audit_log_purges ON tollgate.audit_log (id) WHERE event = 'audit.purged';

CREATE FUNCTION tollgate.digest_of(fields bytea[]) RETURNS bytea
    LANGUAGE c IMMUTABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'digest_of';
COMMENT ON FUNCTION tollgate.digest_of(bytea[]) IS 'sha256 of values, each with its length before it; NULL has the length -1. Internal.';

CREATE FUNCTION tollgate.hash_of_seal(seal tollgate.audit_seals, previous bytea) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT tollgate.digest_of(ARRAY[
        convert_to('tollgate seal 1', 'UTF8'), int8send(($1).seal), int4send(($1).epoch), xid8send(($1).xid),
        int8send(($1).events), timestamptz_send(($1).first_at), timestamptz_send(($1).last_at),
        timestamptz_send(($1).sealed_at), ($1).in_order, ($1).any_order, $2]);
END;
COMMENT ON FUNCTION tollgate.hash_of_seal(tollgate.audit_seals, bytea) IS
    'The hash that a seal must have after the one before it (NULL for the first). Internal.';

CREATE FUNCTION tollgate.measure_stretch(since tollgate.audit_place, until tollgate.audit_place) RETURNS tollgate.audit_seals
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- Set aside, on disk if it is much, so that each event is digested once.
    WITH stretch AS MATERIALIZED (
        SELECT a.epoch, a.xid, a.id, a.at,
               -- Not textsend and its kin, which write in the encoding of the client.
               tollgate.digest_of(ARRAY[
                   timestamptz_send(a.at), convert_to(a.event, 'UTF8'), uuid_send(a.token_id), convert_to(a.user_id, 'UTF8'),
                   convert_to(a.actor, 'UTF8'), convert_to(text(a.client_addr), 'UTF8'), convert_to(a.detail::text, 'UTF8')]) AS digest
        FROM tollgate.audit_log a
        WHERE (a.epoch, a.xid) >= (($1).epoch, ($1).xid) AND (a.epoch, a.xid) < (($2).epoch, ($2).xid)
    )
    SELECT NULL::bigint, ($2).epoch, ($2).xid, count(*), min(s.at), max(s.at), NULL::timestamptz,
           sha256(coalesce(string_agg(tollgate.digest_of(ARRAY[int4send(s.epoch), xid8send(s.xid), int8send(s.id), s.digest]), ''
                                      ORDER BY s.epoch, s.xid, s.id), '')),
           sha256(coalesce(string_agg(s.digest, '' ORDER BY s.digest), '')),
           NULL::bytea
    FROM stretch s;
END;
COMMENT ON FUNCTION tollgate.measure_stretch(tollgate.audit_place, tollgate.audit_place) IS
    'The stretch of the log between two places as a seal describes it, without number, time and hash. Internal.';

CREATE FUNCTION tollgate.fault_of_stretch(sealed tollgate.audit_seals, since tollgate.audit_place, purged boolean) RETURNS text
    LANGUAGE plpgsql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    found tollgate.audit_seals := tollgate.measure_stretch($2, ($1.epoch, $1.xid)::tollgate.audit_place);
BEGIN
    RETURN CASE
        WHEN $3 AND found.events = 0 THEN NULL
        WHEN $3 OR found.events > $1.events THEN 'events added'
        WHEN found.events < $1.events THEN 'events removed'
        WHEN found.in_order = $1.in_order THEN NULL
        WHEN found.any_order = $1.any_order THEN 'events reordered'
        ELSE 'events changed'
    END;
END
$$;
COMMENT ON FUNCTION tollgate.fault_of_stretch(tollgate.audit_seals, tollgate.audit_place, boolean) IS
    'What is wrong with the events of a sealed stretch, of which none is left if it was purged; NULL if nothing. Internal.';

CREATE FUNCTION tollgate.last_purged_seal() RETURNS bigint
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce(max(CASE WHEN a.detail ->> 'last_seal' ~ '^[0-9]{1,18}$' THEN (a.detail ->> 'last_seal')::bigint END), 0)
    FROM tollgate.audit_log a WHERE a.event = 'audit.purged';
END;
COMMENT ON FUNCTION tollgate.last_purged_seal() IS 'Up to which seal the log was purged, as the log itself says; 0 if it never was. Internal.';

CREATE FUNCTION tollgate.place_after_seal(seal bigint) RETURNS tollgate.audit_place
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce((SELECT (s.epoch, s.xid)::tollgate.audit_place FROM tollgate.audit_seals s WHERE s.seal = $1),
                    (0, '0'::xid8)::tollgate.audit_place);
END;
COMMENT ON FUNCTION tollgate.place_after_seal(bigint) IS 'Where a sealed stretch ends and the next one begins. Internal.';

CREATE FUNCTION tollgate.lock_seals(caller text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- With an older snapshot than the lock below, the last seals would stay unseen.
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION '% cannot run in a % transaction', $1, current_setting('transaction_isolation')
            USING ERRCODE = 'invalid_transaction_state',
                  HINT = 'Call it in a transaction with isolation level READ COMMITTED.';
    END IF;
    LOCK TABLE tollgate.audit_seals IN SHARE ROW EXCLUSIVE MODE;
END
$$;
COMMENT ON FUNCTION tollgate.lock_seals(text) IS 'Lets one session at a time extend or purge the chain of seals. Internal.';

CREATE FUNCTION tollgate.check_event_count(max_events integer) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF $1 IS NULL OR $1 NOT BETWEEN 1 AND 1000000 THEN
        RAISE EXCEPTION 'a call handles 1 to 1000000 events'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: max_events, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'Call again for the rest.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_event_count(integer) IS 'Raises 22023 unless a number of events is sensible. Internal.';

CREATE FUNCTION tollgate.seal_audit_log(max_events integer DEFAULT 10000, OUT events bigint, OUT seal bigint, OUT hash bytea)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous tollgate.audit_seals;
    since    tollgate.audit_place;
    until    tollgate.audit_place;
    cut      record;
    new      tollgate.audit_seals;
BEGIN
    PERFORM tollgate.check_event_count($1);
    PERFORM tollgate.lock_seals('seal_audit_log');
    SELECT s.* INTO previous FROM tollgate.audit_seals s ORDER BY s.seal DESC LIMIT 1;
    since := tollgate.place_after_seal(previous.seal);
    until := tollgate.final_place();
    -- A stretch holds whole transactions, so the last one may take it over the number.
    SELECT a.epoch, a.xid INTO cut FROM tollgate.audit_log a
        WHERE (a.epoch, a.xid) >= (since.epoch, since.xid) AND (a.epoch, a.xid) < (until.epoch, until.xid)
        ORDER BY a.epoch, a.xid, a.id OFFSET $1 - 1 LIMIT 1;
    IF FOUND THEN
        until := (cut.epoch, (cut.xid::text::bigint + 1)::text::xid8)::tollgate.audit_place;
    END IF;

    new := tollgate.measure_stretch(since, until);
    events := new.events;
    IF events = 0 THEN
        RETURN;
    END IF;
    new.seal := coalesce(previous.seal, 0) + 1;
    new.sealed_at := clock_timestamp();
    new.hash := tollgate.hash_of_seal(new, previous.hash);
    INSERT INTO tollgate.audit_seals SELECT new.*;
    seal := new.seal;
    hash := new.hash;
END
$$;
COMMENT ON FUNCTION tollgate.seal_audit_log(integer) IS
    'Seals the next stretch of the audit log in which every transaction has ended, of about so many events at most: how many it has, and the number and hash of the seal; 0 when there is nothing to seal';

CREATE TYPE tollgate.audit_verification AS (
    whole     boolean,
    fault     text,
    seal      bigint,
    first_at  timestamptz,
    last_at   timestamptz,
    seals     bigint,
    events    bigint,
    purged    bigint,
    last_seal bigint,
    last_hash bytea
);
COMMENT ON TYPE tollgate.audit_verification IS
    'Whether the sealed part of the audit log is whole; if not, the first seal that does not hold, what is wrong and when those events were; how many seals and events were found good, how many seals are of purged events; and the last seal, to be kept elsewhere';

CREATE FUNCTION tollgate.verify_audit_log(known_seal bigint DEFAULT NULL, known_hash bytea DEFAULT NULL) RETURNS tollgate.audit_verification
    LANGUAGE plpgsql STABLE PARALLEL SAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    answer   tollgate.audit_verification;
    sealed   tollgate.audit_seals;
    since    tollgate.audit_place := (0, '0'::xid8)::tollgate.audit_place;
    previous bytea;
    seen     boolean := false;
BEGIN
    IF ($1 IS NULL) <> ($2 IS NULL) THEN
        RAISE EXCEPTION 'a seal that is known is given by its number and its hash'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Arguments: known_seal and known_hash, of which one is NULL.',
                  HINT = 'Give both as seal_audit_log or an earlier verify_audit_log returned them, or neither.';
    END IF;
    answer.seals := 0;
    answer.events := 0;
    answer.purged := tollgate.last_purged_seal();
    FOR sealed IN SELECT s.* FROM tollgate.audit_seals s ORDER BY s.seal LOOP
        answer.fault := CASE
            WHEN sealed.seal <> answer.seals + 1 THEN 'seal removed'
            WHEN sealed.hash <> tollgate.hash_of_seal(sealed, previous) THEN 'seal changed'
            WHEN sealed.seal = $1 AND sealed.hash <> $2 THEN 'seal changed'
            ELSE tollgate.fault_of_stretch(sealed, since, sealed.seal <= answer.purged)
        END;
        IF answer.fault IS NOT NULL THEN
            answer.seal := answer.seals + 1;
            answer.first_at := sealed.first_at;
            answer.last_at := sealed.last_at;
            EXIT;
        END IF;
        answer.seals := sealed.seal;
        IF sealed.seal > answer.purged THEN
            answer.events := answer.events + sealed.events;
        END IF;
        since := (sealed.epoch, sealed.xid)::tollgate.audit_place;
        previous := sealed.hash;
    END LOOP;
    IF answer.fault IS NULL AND greatest($1, answer.purged) > answer.seals THEN
        answer.fault := 'seal removed';
        answer.seal := answer.seals + 1;
    END IF;
    answer.whole := answer.fault IS NULL;
    answer.last_seal := nullif(answer.seals, 0);
    answer.last_hash := previous;
    RETURN answer;
END
$$;
COMMENT ON FUNCTION tollgate.verify_audit_log(bigint, bytea) IS
    'Checks all seals and the events under them, and names the first that does not hold. Given a seal that was kept elsewhere, it also finds a log that was sealed anew or has lost its last seals';

CREATE FUNCTION tollgate.purge_sealed_events(before timestamptz, max_events integer) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    done    bigint;
    target  bigint;
    reader  record;
    sealed  tollgate.audit_seals;
    since   tollgate.audit_place;
    fault   text;
    oldest  timestamptz;
    removed bigint;
BEGIN
    PERFORM tollgate.check_event_count($2);
    IF $1 IS NULL OR NOT isfinite($1) OR $1 > now() THEN
        RAISE EXCEPTION 'the audit log is purged of what was before a moment in the past'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: before, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'Give how far back events are kept, such as now() - interval ''1 year''.';
    END IF;
    PERFORM tollgate.lock_seals('purge_audit_log');
    done := tollgate.last_purged_seal();
    target := coalesce(
        (SELECT min(s.seal) - 1 FROM tollgate.audit_seals s WHERE s.seal > done AND s.last_at >= $1),
        (SELECT max(s.seal) FROM tollgate.audit_seals s));

    -- Nobody must miss an event because it was too old.
    SELECT s.name, tollgate.place_of_horizon(tollgate.epoch_of_cursor(s.epoch, s.horizon, s.delivered), s.horizon::text::xid8) AS place
        INTO reader FROM tollgate.subscriptions s ORDER BY 2 LIMIT 1;
    IF FOUND THEN
        removed := coalesce(
            (SELECT max(s.seal) FROM tollgate.audit_seals s
             WHERE (s.epoch, s.xid) <= ((reader.place).epoch, (reader.place).xid)), 0);
        IF removed < target THEN
            RAISE WARNING 'the subscription % holds up the purge of % sealed stretch(es) of the audit log',
                    tollgate.quote_redacted(reader.name), target - greatest(removed, done)
                USING HINT = 'If its subscriber is gone for good: SELECT tollgate.drop_subscription(name).';
            target := removed;
        END IF;
    END IF;

    -- At least one stretch, and no more than the number of events allows.
    target := (SELECT max(s.seal)
               FROM (SELECT a.seal, sum(a.events) OVER (ORDER BY a.seal) - a.events AS before_it
                     FROM tollgate.audit_seals a WHERE a.seal > done AND a.seal <= target) s
               WHERE s.before_it < $2);
    IF target IS NULL THEN
        RETURN 0;
    END IF;

    -- Else a purge would wipe away the traces.
    since := tollgate.place_after_seal(done);
    FOR sealed IN SELECT s.* FROM tollgate.audit_seals s WHERE s.seal > done AND s.seal <= target ORDER BY s.seal LOOP
        fault := tollgate.fault_of_stretch(sealed, since, false);
        IF fault IS NOT NULL THEN
            RAISE EXCEPTION 'the audit log is not as it was sealed, and so is not purged'
                USING ERRCODE = 'data_corrupted', DETAIL = format('Seal %s: %s.', sealed.seal, fault),
                      HINT = 'SELECT * FROM tollgate.verify_audit_log() says more.';
        END IF;
        since := (sealed.epoch, sealed.xid)::tollgate.audit_place;
        oldest := least(oldest, sealed.first_at);
    END LOOP;

    DELETE FROM tollgate.audit_log a WHERE (a.epoch, a.xid) < (since.epoch, since.xid);
    GET DIAGNOSTICS removed = ROW_COUNT;
    INSERT INTO tollgate.audit_log (event, detail) VALUES ('audit.purged', jsonb_build_object(
        'before', $1, 'events', removed, 'first_at', oldest, 'last_at', sealed.last_at, 'first_seal', done + 1, 'last_seal', target));
    RETURN removed;
END
$$;
COMMENT ON FUNCTION tollgate.purge_sealed_events(timestamptz, integer) IS
    'Does what purge_audit_log is asked for; called otherwise, the trigger on the log refuses its DELETE. Internal.';

CREATE FUNCTION tollgate.purge_audit_log(before timestamptz, max_events integer DEFAULT 100000) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'purge_audit_log';
COMMENT ON FUNCTION tollgate.purge_audit_log(timestamptz, integer) IS
    'Removes sealed events that are older, whole stretches from the oldest on, of about so many events at most, none that a subscription has yet to be told; their seals stay, and the log stays verifiable. Says how many; call again until 0; event audit.purged';
ALTER TABLE tollgate.api_tokens
    ADD COLUMN rotated_to uuid,
    ADD COLUMN disabled_via uuid;
COMMENT ON COLUMN tollgate.api_tokens.parent_id IS 'The token that this one was derived from; never changes, and is there for as long as this one';
COMMENT ON COLUMN tollgate.api_tokens.rotated_from IS 'The token that this one replaced, which may be purged';
COMMENT ON COLUMN tollgate.api_tokens.rotated_to IS 'The token that replaced this one; a token is rotated once';
COMMENT ON COLUMN tollgate.api_tokens.disabled_via IS 'The ancestor whose disabling disabled this token; NULL in a disabled token that somebody disabled by itself';
CREATE INDEX api_tokens_parent ON tollgate.api_tokens (parent_id) WHERE parent_id IS NOT NULL;

CREATE OR REPLACE FUNCTION tollgate.define_scope(name text, description text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    before text;
BEGIN
    IF $1 IS NULL OR NOT tollgate.scope_is_valid($1) THEN
        RAISE EXCEPTION 'this is not a scope: %', tollgate.quote_redacted($1)
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = 'Argument: name.',
                  HINT = 'A scope is one or more segments joined by ":", each of a-z, 0-9, "_", "." and "-" and beginning with a letter or digit, at most 128 characters in all; wildcards are granted, not defined.';
    END IF;
    IF $1 ~ '[0-9a-f]{16}' THEN
        RAISE EXCEPTION 'this scope looks like a token'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: name, which has 16 hexadecimal digits in a row.',
                  HINT = 'Scopes are written to the audit log, where nothing is ever erased: name it otherwise. If it was a token, revoke it.';
    END IF;
    IF $1 = 'admin' THEN
        RAISE EXCEPTION 'the scope admin is built in and cannot be defined'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: name.',
                  HINT = 'Tokens may be issued with it as it is; it grants every scope.';
    END IF;
    IF $2 IS NULL OR length($2) > 1000 OR $2 ~ '[0-9A-Fa-f]{80}' THEN
        RAISE EXCEPTION 'a scope needs a description of at most 1000 characters, without a token in it'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: description.',
                  HINT = 'Say in a sentence what a token with this scope may do.';
    END IF;

    -- Again if it was there a moment ago, and is gone now.
    LOOP
        INSERT INTO tollgate.scopes (name, description) VALUES ($1, $2) ON CONFLICT ON CONSTRAINT scopes_pkey DO NOTHING;
        IF FOUND THEN
            INSERT INTO tollgate.audit_log (event, detail)
                VALUES ('scope.defined', jsonb_build_object('scope', $1, 'description', $2));
            RETURN;
        END IF;
        SELECT s.description INTO before FROM tollgate.scopes s WHERE s.name = $1 FOR UPDATE;
        EXIT WHEN FOUND;
    END LOOP;
    UPDATE tollgate.scopes s SET description = $2 WHERE s.name = $1 AND s.description <> $2;
    IF FOUND THEN
        INSERT INTO tollgate.audit_log (event, detail)
            VALUES ('scope.defined', jsonb_build_object('scope', $1, 'description', $2, 'changes', jsonb_build_object(
                'description', jsonb_build_object('from', before, 'to', $2))));
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION tollgate.drop_scope(name text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    dropped  text;
    carriers bigint;
    example  text;
BEGIN
    -- With an older snapshot than the lock below, a token issued a moment ago would stay unseen.
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'drop_scope cannot run in a % transaction', current_setting('transaction_isolation')
            USING ERRCODE = 'invalid_transaction_state',
                  HINT = 'Call it in a transaction with isolation level READ COMMITTED.';
    END IF;
    -- Whoever issues a token holds ROW SHARE on the catalogue until commit, so after this no token is on its way.
    LOCK TABLE tollgate.scopes IN EXCLUSIVE MODE;

    DELETE FROM tollgate.scopes s WHERE s.name = $1 RETURNING s.description INTO dropped;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no scope %', tollgate.quote_redacted($1)
            USING ERRCODE = 'undefined_object', DETAIL = 'Argument: name.',
                  HINT = 'Scopes are defined with tollgate.define_scope(name, description).';
    END IF;

    SELECT count(*), min(t.id::text) INTO carriers, example
        FROM tollgate.api_tokens t
        WHERE $1 = ANY (t.scopes) AND t.revoked_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > now());
    IF carriers > 0 THEN
        RAISE EXCEPTION 'scope % cannot be dropped because % live token(s) carry it', tollgate.quote_redacted($1), carriers
            USING ERRCODE = 'dependent_objects_still_exist',
                  DETAIL = format('One of them has the id %s.', example),
                  HINT = 'Revoke those tokens, or let them expire, then drop the scope.';
    END IF;

    INSERT INTO tollgate.audit_log (event, detail) VALUES ('scope.dropped', jsonb_build_object('scope', $1, 'description', dropped));
END
$$;

CREATE FUNCTION tollgate.list_scopes() RETURNS TABLE (name text, description text, defined_at timestamptz, defined_by text)
    LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER ROWS 20
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT s.name, s.description, s.defined_at, s.defined_by FROM tollgate.scopes s ORDER BY s.name;
END;
COMMENT ON FUNCTION tollgate.list_scopes() IS 'The catalogue of scopes, by name';

ALTER TABLE tollgate.token_usage
    ADD COLUMN hour        timestamptz,
    ADD COLUMN hour_used   bigint NOT NULL DEFAULT 0,
    ADD COLUMN hour_denied bigint NOT NULL DEFAULT 0;
ALTER TABLE tollgate.token_usage SET (fillfactor = 50);
COMMENT ON TABLE tollgate.token_usage IS
    'Uses and denials per token as of the last flush. No foreign key: its check would lock, and so write, the row of the token. Half of each page is free, so that a flush of every token finds room beside the old rows';
COMMENT ON COLUMN tollgate.token_usage.hour IS 'The latest hour with a use or denial; when a later one begins, its counts move to usage_hourly';
COMMENT ON COLUMN tollgate.token_usage.hour_used IS 'The part of use_count that fell into that hour';
COMMENT ON COLUMN tollgate.token_usage.hour_denied IS 'The part of denied_count that fell into that hour';

CREATE TABLE tollgate.usage_hourly (
    token_id uuid        NOT NULL,
    hour     timestamptz NOT NULL,
    used     bigint      NOT NULL CHECK (used >= 0),
    denied   bigint      NOT NULL CHECK (denied >= 0),
    PRIMARY KEY (token_id, hour)
);
COMMENT ON TABLE tollgate.usage_hourly IS
    'Uses and denials per token and hour, all but the latest hour of each token, which is in token_usage: so a flush writes one row a token, and a second one once an hour';
CREATE INDEX usage_hourly_hour ON tollgate.usage_hourly (hour);
SELECT pg_extension_config_dump('tollgate.usage_hourly', '');

CREATE OR REPLACE FUNCTION tollgate.apply_usage(node text, boot uuid, generation bigint, rows tollgate.usage_row[]) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET enable_hashjoin = off
    SET enable_mergejoin = off
    SET work_mem = '64MB'
AS $$
DECLARE
    is_whole boolean;
BEGIN
    IF $1 IS NULL OR $2 IS NULL OR $3 IS NULL OR $4 IS NULL THEN
        RAISE EXCEPTION 'apply_usage takes no NULL'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Arguments: node, boot, generation, rows.',
                  HINT = 'Pass on what drain_usage() returned.';
    END IF;
    -- One flush at a time, whichever server it is from: what is read below is still so when it is written, and nobody
    -- deadlocks.
    LOCK TABLE tollgate.usage_flushes IN SHARE ROW EXCLUSIVE MODE;
    INSERT INTO tollgate.usage_flushes AS f (node, boot, generation) VALUES ($1, $2, $3)
        ON CONFLICT ON CONSTRAINT usage_flushes_pkey
        DO UPDATE SET generation = excluded.generation, flushes = f.flushes + 1, applied_at = now()
        WHERE f.generation < excluded.generation;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    WITH counted AS MATERIALIZED (
        -- Counters know no hours: all of a generation belongs to that of the last use, or of the flush if there was none. A
        -- clock of another server that is ahead must not open an hour before its time.
        SELECT r.token_id, r.uses, r.denials, r.last_used_at, r.last_used_ip,
               date_bin('1 hour', least(r.last_used_at, now()), timestamptz 'epoch') AS hour,
               u.ctid AS place, u.use_count, u.denied_count, u.last_used_at AS known_at, u.last_used_ip AS known_ip,
               u.hour AS known_hour, u.hour_used, u.hour_denied
        FROM (SELECT * FROM unnest($4) r ORDER BY r.token_id) r LEFT JOIN tollgate.token_usage u ON u.token_id = r.token_id
    ), added AS (
        INSERT INTO tollgate.token_usage
                (token_id, use_count, denied_count, last_used_at, last_used_ip, hour, hour_used, hour_denied)
            SELECT c.token_id, c.uses, c.denials, c.last_used_at, c.last_used_ip, c.hour, c.uses, c.denials
            FROM counted c
            WHERE c.place IS NULL AND EXISTS (SELECT FROM tollgate.api_tokens t WHERE t.id = c.token_id)
    ), finished AS (
        -- The earlier of two hours. That is the new one if the use came by way of a server that is flushed less often.
        INSERT INTO tollgate.usage_hourly AS h (token_id, hour, used, denied)
            SELECT c.token_id, least(c.hour, c.known_hour),
                   CASE WHEN c.hour < c.known_hour THEN c.uses ELSE c.hour_used END,
                   CASE WHEN c.hour < c.known_hour THEN c.denials ELSE c.hour_denied END
            FROM counted c
            WHERE c.hour <> c.known_hour
            ON CONFLICT ON CONSTRAINT usage_hourly_pkey
            DO UPDATE SET used = h.used + excluded.used, denied = h.denied + excluded.denied
    ), added_to AS (
        UPDATE tollgate.token_usage u SET
                use_count = c.use_count + c.uses,
                denied_count = c.denied_count + c.denials,
                last_used_at = greatest(c.known_at, c.last_used_at),
                last_used_ip = CASE WHEN c.last_used_at >= coalesce(c.known_at, '-infinity') THEN c.last_used_ip ELSE c.known_ip END,
                hour = greatest(c.known_hour, c.hour),
                hour_used = CASE WHEN c.hour = c.known_hour THEN c.hour_used + c.uses
                                 WHEN c.hour < c.known_hour THEN c.hour_used ELSE c.uses END,
                hour_denied = CASE WHEN c.hour = c.known_hour THEN c.hour_denied + c.denials
                                   WHEN c.hour < c.known_hour THEN c.hour_denied ELSE c.denials END
            FROM counted c WHERE u.ctid = c.place
            RETURNING 1
    )
    SELECT (SELECT count(*) FROM added_to) = (SELECT count(c.place) FROM counted c) INTO is_whole;
    IF NOT is_whole THEN
        RAISE EXCEPTION 'apply_usage takes each token once'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: rows, in which a token occurs twice.',
                  HINT = 'Pass on what drain_usage() returned.';
    END IF;
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.apply_usage(text, uuid, bigint, tollgate.usage_row[]) IS
    'Adds drained counters to token_usage and usage_hourly, once: true when done now, false when this generation had been applied before';

CREATE FUNCTION tollgate.usage_applied(node text, boot uuid, generation bigint) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT EXISTS (SELECT FROM tollgate.usage_flushes f WHERE f.node = $1 AND f.boot = $2 AND f.generation >= $3);
END;
COMMENT ON FUNCTION tollgate.usage_applied(text, uuid, bigint) IS
    'Whether this server''s copy of the database has these counters. To be asked of a standby before ack_usage there: promoted before it has them, it would lack them for good';

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
    'Uses and denials of a token for each hour (of UTC) since a time or its creation, as of the last flush; also the hours without any, so that a chart needs no filling in. No rows for an unknown token';

CREATE FUNCTION tollgate.usage_pressure() RETURNS TABLE (pressure double precision, overflowed bigint)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'usage_pressure_wrapper';
COMMENT ON FUNCTION tollgate.usage_pressure() IS
    'How much of the server''s room for counters is taken by what is not flushed, from 0 to 1, and how many uses found no room since it started: cheap, to be asked many times a second';

CREATE FUNCTION tollgate.import_api_token(
    user_id     text,
    name        text,
    token_hash  bytea,
    scopes      text[]   DEFAULT '{}',
    expires_in  interval DEFAULT NULL,
    metadata    jsonb    DEFAULT '{}',
    allowed_ips cidr[]   DEFAULT NULL,
    rate_limit  integer  DEFAULT NULL,
    rate_window interval DEFAULT '1 minute'
) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'import_api_token';
COMMENT ON FUNCTION tollgate.import_api_token(text, text, bytea, text[], interval, jsonb, cidr[], integer, interval) IS
    'Takes over a token of another system by the SHA-256 digest of its plaintext, and returns its id; 23505 when there is one with that digest; event token.imported. Unless it has Tollgate''s format it is accepted only while tollgate.accept_foreign_tokens is on';

CREATE FUNCTION tollgate.check_token_fields(
    fields      text[],
    name        text,
    scopes      text[],
    expires_at  timestamptz,
    metadata    jsonb,
    allowed_ips cidr[],
    rate_limit  integer,
    rate_window interval
) RETURNS text[]
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'check_token_fields';
COMMENT ON FUNCTION tollgate.check_token_fields(text[], text, text[], timestamptz, jsonb, cidr[], integer, interval) IS
    'Raises 22023 unless the named fields are such as a token may be issued with; returns the scopes, each once. Internal.';

CREATE OR REPLACE VIEW tollgate.tokens WITH (security_barrier) AS
    SELECT t.id, t.user_id, t.name, t.hint,
           CASE WHEN t.revoked_at IS NOT NULL THEN 'revoked'
                WHEN t.disabled_at IS NOT NULL THEN 'disabled'
                WHEN t.expires_at <= now() THEN 'expired'
                ELSE 'active' END AS status,
           t.scopes, t.metadata, t.allowed_ips, t.rate_limit, t.rate_window, t.created_at, t.created_by, t.expires_at,
           t.disabled_at, t.revoked_at, t.revoked_reason, t.parent_id, t.rotated_from,
           coalesce(u.use_count, 0) AS use_count, coalesce(u.denied_count, 0) AS denied_count,
           u.last_used_at, u.last_used_ip, t.rotated_to, t.disabled_via
    FROM tollgate.api_tokens t LEFT JOIN tollgate.token_usage u ON u.token_id = t.id;

CREATE OR REPLACE FUNCTION tollgate.list_api_tokens(user_id text) RETURNS SETOF tollgate.tokens
    LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT t.* FROM tollgate.tokens t WHERE t.user_id = $1 ORDER BY t.created_at, t.id;
END;

CREATE FUNCTION tollgate.derive_api_token(parent text, name text, scopes text[], expires_in interval, allowed_ips cidr[] DEFAULT NULL)
    RETURNS tollgate.issued_token
    LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'derive_api_token';
COMMENT ON FUNCTION tollgate.derive_api_token(text, text, text[], interval, cidr[]) IS
    'Makes a lesser token of a presented one (28000 unless that is valid): never wider in scope, time or networks (22023), where NULL takes over the parent''s, with its metadata; ends, is disabled and is narrowed with it; at most 8 generations; event token.derived';

CREATE FUNCTION tollgate.presented_token_id(token text) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'presented_token_id';
COMMENT ON FUNCTION tollgate.presented_token_id(text) IS
    'The id of a presented token, also of one that this transaction''s snapshot does not show; NULL if it is malformed or unknown. Internal.';

CREATE FUNCTION tollgate.check_snapshot(token_id uuid, user_ids text[]) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'check_snapshot';
COMMENT ON FUNCTION tollgate.check_snapshot(uuid, text[]) IS
    'Raises 40001 under REPEATABLE READ when a token, or those of some users, are not as the snapshot of the transaction shows them. Internal.';

CREATE FUNCTION tollgate.lock_token_slots(user_id text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'lock_token_slots';
COMMENT ON FUNCTION tollgate.lock_token_slots(text) IS
    'Waits for whoever else adds a live token to a user''s, where tollgate.max_tokens_per_user sets a limit. Internal.';

CREATE FUNCTION tollgate.claim_token_slot(user_id text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'claim_token_slot';
COMMENT ON FUNCTION tollgate.claim_token_slot(text) IS
    'Raises 53400 unless tollgate.max_tokens_per_user allows a user one more live token. Internal.';

CREATE FUNCTION tollgate.network_contains(outer_network cidr, inner_network cidr) RETURNS boolean
    LANGUAGE c IMMUTABLE PARALLEL SAFE STRICT
    AS 'MODULE_PATHNAME', 'network_contains';
COMMENT ON FUNCTION tollgate.network_contains(cidr, cidr) IS
    'Whether a network lies within another, as verification sees it: an IPv4 address written as IPv6 is the IPv4 address. Internal.';

CREATE FUNCTION tollgate.ancestors(token_id uuid) RETURNS SETOF uuid
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH RECURSIVE line AS (
        SELECT t.parent_id AS id, 1 AS distance FROM tollgate.api_tokens t WHERE t.id = $1
        UNION ALL
        SELECT t.parent_id, l.distance + 1 FROM line l JOIN tollgate.api_tokens t ON t.id = l.id
    )
    SELECT l.id FROM line l WHERE l.id IS NOT NULL ORDER BY l.distance;
END;
COMMENT ON FUNCTION tollgate.ancestors(uuid) IS 'The tokens that a token was derived from, the parent first, the root last. Internal.';

CREATE FUNCTION tollgate.descendants(token_id uuid) RETURNS SETOF uuid
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH RECURSIVE family AS (
        SELECT t.id FROM tollgate.api_tokens t WHERE t.parent_id = $1
        UNION ALL
        SELECT t.id FROM family f JOIN tollgate.api_tokens t ON t.parent_id = f.id
    )
    SELECT f.id FROM family f;
END;
COMMENT ON FUNCTION tollgate.descendants(uuid) IS 'The tokens that were derived from a token, at any depth. Internal.';

CREATE FUNCTION tollgate.lock_token(token_id uuid, lock_slots boolean DEFAULT false) RETURNS tollgate.api_tokens
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    root  uuid;
    token tollgate.api_tokens;
BEGIN
    IF $2 THEN
        PERFORM tollgate.lock_token_slots(t.user_id) FROM tollgate.api_tokens t WHERE t.id = $1;
    END IF;
    -- Who is whose parent never changes, so it may be read before anything is locked.
    SELECT coalesce((SELECT a.id FROM tollgate.ancestors($1) WITH ORDINALITY a (id, n) ORDER BY a.n DESC LIMIT 1), $1) INTO root;
    PERFORM FROM tollgate.api_tokens t WHERE t.id = root FOR UPDATE;
    SELECT t.* INTO token FROM tollgate.api_tokens t WHERE t.id = $1 FOR UPDATE;
    PERFORM tollgate.check_snapshot($1, ARRAY[token.user_id]);
    RETURN token;
END
$$;
COMMENT ON FUNCTION tollgate.lock_token(uuid, boolean) IS
    'Locks the family of a token until the transaction ends, and returns its row as it is then; NULLs if there is none. Internal.';

CREATE FUNCTION tollgate.intersect_scopes(a text[], b text[]) RETURNS text[]
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT ARRAY(SELECT s FROM unnest($1) s WHERE tollgate.scope_grants($2, s)
                 UNION
                 SELECT s FROM unnest($2) s WHERE tollgate.scope_grants($1, s)
                 ORDER BY 1);
END;
COMMENT ON FUNCTION tollgate.intersect_scopes(text[], text[]) IS 'Scopes that grant what both lists grant. Internal.';

CREATE FUNCTION tollgate.networks_contain(outer_networks cidr[], inner_networks cidr[]) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT $1 IS NULL OR ($2 IS NOT NULL AND NOT EXISTS (
        SELECT FROM unnest($2) i
        WHERE NOT EXISTS (SELECT FROM unnest($1) o WHERE tollgate.network_contains(o, i))));
END;
COMMENT ON FUNCTION tollgate.networks_contain(cidr[], cidr[]) IS
    'Whether each of the inner networks lies within one of the outer; NULL is anywhere. Internal.';

CREATE FUNCTION tollgate.intersect_networks(a cidr[], b cidr[]) RETURNS cidr[]
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT CASE WHEN $1 IS NULL THEN $2 WHEN $2 IS NULL THEN $1 ELSE
        ARRAY(SELECT n FROM unnest($1) n WHERE EXISTS (SELECT FROM unnest($2) o WHERE tollgate.network_contains(o, n))
              UNION
              SELECT n FROM unnest($2) n WHERE EXISTS (SELECT FROM unnest($1) o WHERE tollgate.network_contains(o, n))
              ORDER BY 1) END;
END;
COMMENT ON FUNCTION tollgate.intersect_networks(cidr[], cidr[]) IS
    'Networks that hold what both lists hold, possibly none, from which a token is good from nowhere; NULL is anywhere. Internal.';

CREATE FUNCTION tollgate.limit_within(outer_limit integer, outer_window interval, inner_limit integer, inner_window interval) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT $1 IS NULL OR ($3 IS NOT NULL AND $3 <= $1 AND $3 / extract(epoch FROM $4) <= $1 / extract(epoch FROM $2));
END;
COMMENT ON FUNCTION tollgate.limit_within(integer, interval, integer, interval) IS
    'Whether a rate limit allows neither more at once nor more in the long run than another; NULL is no limit. Internal.';

CREATE FUNCTION tollgate.token_is_within(token tollgate.api_tokens, bound tollgate.api_tokens) RETURNS boolean
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT NOT EXISTS (SELECT FROM unnest($1.scopes) s WHERE NOT tollgate.scope_grants($2.scopes, s))
       AND coalesce($1.expires_at, 'infinity') <= coalesce($2.expires_at, 'infinity')
       AND tollgate.networks_contain($2.allowed_ips, $1.allowed_ips)
       AND tollgate.limit_within($2.rate_limit, $2.rate_window, $1.rate_limit, $1.rate_window);
END;
COMMENT ON FUNCTION tollgate.token_is_within(tollgate.api_tokens, tollgate.api_tokens) IS
    'Whether a token gives no more than another in scope, time, networks and limits. Internal.';

CREATE FUNCTION tollgate.token_changes(before tollgate.api_tokens, after tollgate.api_tokens) RETURNS jsonb
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce(jsonb_object_agg(b.key, jsonb_build_object('from', b.value, 'to', a.value)), '{}')
    FROM jsonb_each(to_jsonb($1)) b JOIN jsonb_each(to_jsonb($2)) a ON a.key = b.key
    WHERE a.value <> b.value
      AND b.key = ANY ('{name,scopes,expires_at,metadata,allowed_ips,rate_limit,rate_window}');
END;
COMMENT ON FUNCTION tollgate.token_changes(tollgate.api_tokens, tollgate.api_tokens) IS
    'What an event says of a change of a token: {"key": {"from": …, "to": …}}. Internal.';

CREATE FUNCTION tollgate.narrow_descendants(token tollgate.api_tokens, reason text) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    affected bigint;
BEGIN
    -- Each held no more than its parent. What both it and the ancestor have is then no more than what both its parent and
    -- the ancestor have, so all can be cut at once.
    WITH narrowed AS (
        UPDATE tollgate.api_tokens d
            SET scopes = tollgate.intersect_scopes(d.scopes, $1.scopes),
                expires_at = least(d.expires_at, $1.expires_at),
                allowed_ips = tollgate.intersect_networks(d.allowed_ips, $1.allowed_ips),
                (rate_limit, rate_window) = (
                    SELECT l.rate_limit, l.rate_window
                    FROM (VALUES (d.rate_limit, d.rate_window, 1), ($1.rate_limit, $1.rate_window, 2)) l (rate_limit, rate_window, n)
                    WHERE tollgate.limit_within($1.rate_limit, $1.rate_window, l.rate_limit, l.rate_window)
                    ORDER BY l.n LIMIT 1)
            FROM tollgate.api_tokens before
            WHERE d.id = ANY (ARRAY(SELECT tollgate.descendants($1.id))) AND before.id = d.id AND d.revoked_at IS NULL
              AND NOT tollgate.token_is_within(d, $1)
            RETURNING d.id, d.user_id, tollgate.token_changes(before, d) AS changes
    ), logged AS (
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
            SELECT 'token.updated', n.id, n.user_id,
                   jsonb_strip_nulls(jsonb_build_object('reason', $2, 'ancestor', $1.id)) || jsonb_build_object('changes', n.changes)
            FROM narrowed n ORDER BY n.id
    )
    SELECT count(*) INTO affected FROM narrowed;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.narrow_descendants(tollgate.api_tokens, text) IS
    'Cuts the descendants of a token down to what it has, with an event token.updated each, and says how many. Internal.';

CREATE FUNCTION tollgate.notify_family_event(event text, token_id uuid, user_id text, reason text, descendants bigint) RETURNS void
    LANGUAGE sql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT tollgate.notify_token_event($1, $2, $3, $4, CASE WHEN $5 > 0 THEN $5 + 1 END);
END;
COMMENT ON FUNCTION tollgate.notify_family_event(text, uuid, text, text, bigint) IS
    'Notifies of a token from which access was taken away, or of so many at once if it has descendants. Internal.';

CREATE FUNCTION tollgate.lock_managed_token(token_id uuid, lock_slots boolean DEFAULT false) RETURNS tollgate.api_tokens
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    token tollgate.api_tokens := tollgate.lock_token($1, $2);
BEGIN
    IF token.id IS NULL THEN
        RAISE EXCEPTION 'there is no such token'
            USING ERRCODE = 'undefined_object', DETAIL = format('Argument: token_id, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'tollgate.list_api_tokens(user_id) shows the ids of a user''s tokens.';
    END IF;
    IF token.revoked_at IS NOT NULL THEN
        PERFORM tollgate.refuse_token($1, 'revoked', 'A revocation is for good: issue another token.');
    END IF;
    RETURN token;
END
$$;
COMMENT ON FUNCTION tollgate.lock_managed_token(uuid, boolean) IS
    'lock_token for what needs a token that is not revoked: else raises 42704 or 55000. Internal.';

CREATE FUNCTION tollgate.refuse_token(token_id uuid, state text, hint text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'the token is %', $2
        USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = format('Argument: token_id, of %s.', $1), HINT = $3;
END
$$;
COMMENT ON FUNCTION tollgate.refuse_token(uuid, text, text) IS 'Raises 55000: a token is in a state in which this cannot be done. Internal.';

CREATE FUNCTION tollgate.rotate_api_token(token_id uuid, grace interval DEFAULT '0') RETURNS tollgate.issued_token
    LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'rotate_api_token';
COMMENT ON FUNCTION tollgate.rotate_api_token(uuid, interval) IS
    'Replaces a live token by one with a new secret that is the same in all else, expiry too. The old one, and what was derived from it, expires after the grace, by default at once; a token is rotated once (55000); events token.rotated and token.created';

CREATE FUNCTION tollgate.lock_for_rotation(token_id uuid) RETURNS tollgate.api_tokens
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    token tollgate.api_tokens := tollgate.lock_managed_token($1);
BEGIN
    IF token.rotated_to IS NOT NULL THEN
        PERFORM tollgate.refuse_token($1, 'rotated already', format('Rotate its successor, %s.', token.rotated_to));
    ELSIF token.disabled_at IS NOT NULL THEN
        PERFORM tollgate.refuse_token($1, 'disabled', 'Enable it first, with tollgate.set_api_token_enabled().');
    ELSIF token.expires_at <= clock_timestamp() THEN
        PERFORM tollgate.refuse_token($1, 'expired', 'Issue another token, or give it a later expiry with tollgate.update_api_token() first.');
    END IF;
    RETURN token;
END
$$;
COMMENT ON FUNCTION tollgate.lock_for_rotation(uuid) IS 'Locks a token that may be rotated, or raises. Internal.';

CREATE FUNCTION tollgate.replace_token(token_id uuid, successor uuid, token_hash bytea, hint text, grace interval) RETURNS tollgate.api_tokens
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    old      tollgate.api_tokens;
    ended    tollgate.api_tokens;
    new      tollgate.api_tokens;
    affected bigint;
BEGIN
    SELECT t.* INTO old FROM tollgate.api_tokens t WHERE t.id = $1;
    UPDATE tollgate.api_tokens t SET expires_at = least(t.expires_at, clock_timestamp() + $5), rotated_to = $2
        WHERE t.id = $1 RETURNING t.* INTO ended;
    INSERT INTO tollgate.api_tokens (id, token_hash, hint, user_id, name, scopes, metadata, expires_at, rate_limit, rate_window,
                                     allowed_ips, parent_id, rotated_from)
        VALUES ($2, $3, $4, old.user_id, old.name, old.scopes, old.metadata, old.expires_at, old.rate_limit, old.rate_window,
                old.allowed_ips, old.parent_id, $1)
        RETURNING * INTO new;
    INSERT INTO tollgate.audit_log (event, token_id, user_id, detail) VALUES
        ('token.rotated', $1, old.user_id,
         jsonb_build_object('rotated_to', $2, 'changes', tollgate.token_changes(old, ended))),
        ('token.created', $2, new.user_id,
         jsonb_strip_nulls(jsonb_build_object(
             'name', new.name, 'hint', new.hint, 'scopes', new.scopes, 'expires_at', new.expires_at,
             'allowed_ips', new.allowed_ips, 'rate_limit', new.rate_limit, 'rate_window', new.rate_window,
             'parent_id', new.parent_id, 'rotated_from', $1)));
    affected := tollgate.narrow_descendants(ended, 'rotated');
    PERFORM tollgate.notify_family_event('token.rotated', $1, old.user_id, NULL, affected);
    RETURN new;
END
$$;
COMMENT ON FUNCTION tollgate.replace_token(uuid, uuid, bytea, text, interval) IS
    'Stores the successor of a token that lock_for_rotation has locked, and ends that one after the grace. Internal.';

CREATE FUNCTION tollgate.read_change(token tollgate.api_tokens, key text, value jsonb) RETURNS tollgate.api_tokens
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    expected text := '{"name": "string", "scopes": "array", "expires_at": "string", "metadata": "object", "allowed_ips": "array",
                       "rate_limit": "number", "rate_window": "string"}'::jsonb ->> $2;
BEGIN
    IF expected IS NULL THEN
        RAISE EXCEPTION 'this is not something that can be changed in a token: %', tollgate.quote_redacted($2)
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: changes.',
                  HINT = 'The keys are name, scopes, expires_at, metadata, allowed_ips, rate_limit and rate_window.';
    END IF;
    IF jsonb_typeof($3) = 'null' THEN
        $3 := CASE $2 WHEN 'scopes' THEN '[]' WHEN 'metadata' THEN '{}' WHEN 'rate_window' THEN '"1 minute"' ELSE $3 END;
    ELSIF jsonb_typeof($3) = expected THEN
        NULL;
    ELSE
        RAISE invalid_parameter_value;
    END IF;
    RETURN jsonb_populate_record($1, jsonb_build_object($2, $3));
EXCEPTION
    -- PostgreSQL's own message would repeat the value, which may be anything, a token too.
    WHEN data_exception THEN
        IF expected IS NULL THEN
            RAISE;
        END IF;
        RAISE EXCEPTION 'this cannot be the % of a token', replace($2, '_', ' ')
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: changes, key %s.', $2),
                  HINT = format('Pass a JSON %s%s, or null to clear it.', expected, CASE $2
                      WHEN 'scopes' THEN ' of strings' WHEN 'allowed_ips' THEN ' of networks such as "203.0.113.0/24"'
                      WHEN 'expires_at' THEN ' with a timestamp' WHEN 'rate_window' THEN ' with an interval' ELSE '' END);
END
$$;
COMMENT ON FUNCTION tollgate.read_change(tollgate.api_tokens, text, jsonb) IS 'A token''s row with one change made to it. Internal.';

CREATE FUNCTION tollgate.check_within_parent(token tollgate.api_tokens, before tollgate.api_tokens) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    parent tollgate.api_tokens;
    wider  text;
BEGIN
    SELECT t.* INTO parent FROM tollgate.api_tokens t WHERE t.id = $1.parent_id;
    wider := CASE
        WHEN parent.id IS NULL THEN NULL
        WHEN $1.scopes <> $2.scopes AND EXISTS (SELECT FROM unnest($1.scopes) s WHERE NOT tollgate.scope_grants(parent.scopes, s)) THEN 'scopes'
        WHEN $1.expires_at IS DISTINCT FROM $2.expires_at
             AND coalesce($1.expires_at, 'infinity') > coalesce(parent.expires_at, 'infinity') THEN 'expires_at'
        WHEN $1.allowed_ips IS DISTINCT FROM $2.allowed_ips
             AND NOT tollgate.networks_contain(parent.allowed_ips, $1.allowed_ips) THEN 'allowed_ips'
        WHEN ($1.rate_limit, $1.rate_window) IS DISTINCT FROM ($2.rate_limit, $2.rate_window)
             AND NOT tollgate.limit_within(parent.rate_limit, parent.rate_window, $1.rate_limit, $1.rate_window) THEN 'rate_limit'
    END;
    IF wider IS NOT NULL THEN
        RAISE EXCEPTION 'a derived token cannot be wider than its parent'
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = format('Argument: changes, key %s, which is more than the parent %s has.', wider, parent.id),
                  HINT = 'Widen the parent first, or issue a token of its own.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_within_parent(tollgate.api_tokens, tollgate.api_tokens) IS
    'Raises 22023 if a change makes a token wider than its parent. Internal.';

CREATE FUNCTION tollgate.update_api_token(token_id uuid, changes jsonb) RETURNS tollgate.tokens
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    before   tollgate.api_tokens;
    after    tollgate.api_tokens;
    keys     text[];
    revived  boolean;
    changed  jsonb;
    affected bigint := 0;
    result   tollgate.tokens;
BEGIN
    IF jsonb_typeof($2) IS DISTINCT FROM 'object' THEN
        RAISE EXCEPTION 'changes are a JSON object'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: changes.',
                  HINT = 'Such as {"name": "laptop", "expires_at": null}; keys that are left out stay as they are.';
    END IF;
    before := tollgate.lock_managed_token($1, $2 ? 'expires_at');
    keys := ARRAY(SELECT jsonb_object_keys($2));
    after := before;
    FOR i IN 1 .. cardinality(keys) LOOP
        after := tollgate.read_change(after, keys[i], $2 -> keys[i]);
    END LOOP;
    IF after.rate_limit IS NULL THEN
        after.rate_window := NULL;
    END IF;

    revived := before.expires_at <= clock_timestamp() AND 'expires_at' = ANY (keys);
    -- While it was expired, its scopes may have been dropped from the catalogue.
    after.scopes := tollgate.check_token_fields(CASE WHEN revived THEN keys || '{scopes}' ELSE keys END, after.name, after.scopes,
        after.expires_at, after.metadata, after.allowed_ips, after.rate_limit, after.rate_window);
    PERFORM tollgate.check_within_parent(after, before);
    IF before.rotated_to IS NOT NULL AND coalesce(after.expires_at, 'infinity') > coalesce(before.expires_at, 'infinity') THEN
        PERFORM tollgate.refuse_token($1, 'rotated and cannot be given a later expiry', format('Change its successor, %s.', before.rotated_to));
    END IF;
    IF revived THEN
        PERFORM tollgate.claim_token_slot(before.user_id);
    END IF;

    changed := tollgate.token_changes(before, after);
    IF changed <> '{}' THEN
        UPDATE tollgate.api_tokens t
            SET name = after.name, scopes = after.scopes, metadata = after.metadata, allowed_ips = after.allowed_ips,
                rate_limit = after.rate_limit, rate_window = after.rate_window, expires_at = after.expires_at,
                -- A new expiry lies in the future, and is to be recorded when it comes.
                expired_at = CASE WHEN changed ? 'expires_at' THEN NULL ELSE t.expired_at END
            WHERE t.id = $1;
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
            VALUES ('token.updated', $1, before.user_id, jsonb_build_object('changes', changed));
        IF NOT tollgate.token_is_within(before, after) THEN
            affected := tollgate.narrow_descendants(after, NULL);
            PERFORM tollgate.notify_family_event('token.updated', $1, before.user_id, NULL, affected);
        END IF;
    END IF;
    SELECT t.* INTO result FROM tollgate.tokens t WHERE t.id = $1;
    RETURN result;
END
$$;
COMMENT ON FUNCTION tollgate.update_api_token(uuid, jsonb) IS
    'Changes a token that is not revoked: keys name, scopes, expires_at, metadata, allowed_ips, rate_limit, rate_window; null clears; any other key is 22023. What narrows it narrows its descendants as well; a derived one stays within its parent; event token.updated';

CREATE FUNCTION tollgate.set_api_token_enabled(token_id uuid, enabled boolean, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    token    tollgate.api_tokens;
    already  boolean;
    blocker  uuid;
    affected bigint;
BEGIN
    $3 := tollgate.stored_reason($3);
    IF $2 IS NULL THEN
        RAISE EXCEPTION 'a token is enabled or not'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: enabled, which is NULL.', HINT = 'Pass true or false.';
    END IF;
    token := tollgate.lock_token($1);
    -- One that was disabled through an ancestor can still be disabled by itself.
    already := CASE WHEN $2 THEN token.disabled_at IS NULL ELSE token.disabled_at IS NOT NULL AND token.disabled_via IS NULL END;
    IF token.id IS NULL OR token.revoked_at IS NOT NULL OR already THEN
        RETURN false;
    END IF;
    IF $2 THEN
        SELECT a.id INTO blocker FROM tollgate.ancestors($1) WITH ORDINALITY a (id, n) JOIN tollgate.api_tokens t ON t.id = a.id
            WHERE t.disabled_at IS NOT NULL ORDER BY a.n DESC LIMIT 1;
        IF blocker IS NOT NULL THEN
            PERFORM tollgate.refuse_token($1, 'disabled with an ancestor of it', format('Enable %s first.', blocker));
        END IF;
    END IF;

    WITH RECURSIVE family AS (
        SELECT $1 AS id
        UNION ALL
        -- Not below one that somebody disabled by itself: what is there is disabled through that one.
        SELECT t.id FROM family f JOIN tollgate.api_tokens t ON t.parent_id = f.id
        WHERE t.disabled_at IS NULL OR t.disabled_via IS NOT NULL
    ), switched AS (
        UPDATE tollgate.api_tokens t
            SET disabled_at = CASE WHEN NOT $2 THEN coalesce(t.disabled_at, clock_timestamp()) END,
                disabled_via = CASE WHEN NOT $2 AND t.id <> $1 THEN $1 END
            FROM tollgate.api_tokens before
            WHERE t.id = ANY (ARRAY(SELECT f.id FROM family f)) AND before.id = t.id AND t.revoked_at IS NULL
            RETURNING t.id, t.user_id, (before.disabled_at IS NULL) <> $2 OR t.id = $1 AS told
    ), logged AS (
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
            SELECT CASE WHEN $2 THEN 'token.enabled' ELSE 'token.disabled' END, s.id, s.user_id,
                   jsonb_strip_nulls(jsonb_build_object('reason', $3, 'ancestor', CASE WHEN s.id <> $1 THEN $1 END))
            FROM switched s WHERE s.told ORDER BY s.id <> $1, s.id
    )
    SELECT count(*) FILTER (WHERE s.told AND s.id <> $1) INTO affected FROM switched s;
    IF NOT $2 THEN
        PERFORM tollgate.notify_family_event('token.disabled', $1, token.user_id, $3, affected);
    END IF;
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.set_api_token_enabled(uuid, boolean, text) IS
    'Disables a token with all that were derived from it, or enables it again, with those that were not disabled by themselves; false when it is unknown, revoked, or so already; 55000 below a disabled ancestor; events token.disabled and token.enabled';

CREATE FUNCTION tollgate.stored_reason(reason text) RETURNS text
    LANGUAGE plpgsql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF length($1) > 1000 THEN
        RAISE EXCEPTION 'a reason has at most 1000 characters'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: reason, of %s characters.', length($1)),
                  HINT = 'Say it shorter, or put a link to the ticket there.';
    END IF;
    -- Somebody will paste the token that leaked. That must not keep it from being revoked, nor be told to all who read the log.
    RETURN regexp_replace($1, '[0-9A-Fa-f]{64,}', '…', 'g');
END
$$;
COMMENT ON FUNCTION tollgate.stored_reason(text) IS
    'A reason as it is stored: without what may be a token or its digest; raises 22023 if it is longer than the log takes. Internal.';

CREATE OR REPLACE FUNCTION tollgate.revoke_api_token(token_id uuid, user_id text DEFAULT NULL, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    token    tollgate.api_tokens;
    affected bigint;
BEGIN
    $3 := tollgate.stored_reason($3);
    token := tollgate.lock_token($1);
    IF token.id IS NULL OR token.user_id <> $2 OR token.revoked_at IS NOT NULL THEN
        RETURN false;
    END IF;
    WITH revoked AS (
        UPDATE tollgate.api_tokens t SET revoked_at = clock_timestamp(), revoked_reason = $3
            WHERE t.id = ANY (ARRAY(SELECT tollgate.descendants($1)) || $1) AND t.revoked_at IS NULL
            RETURNING t.id, t.user_id
    ), logged AS (
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
            SELECT 'token.revoked', r.id, r.user_id,
                   jsonb_strip_nulls(jsonb_build_object('reason', $3, 'ancestor', CASE WHEN r.id <> $1 THEN $1 END))
            FROM revoked r ORDER BY r.id <> $1, r.id
    )
    SELECT count(*) - 1 INTO affected FROM revoked;
    PERFORM tollgate.notify_family_event('token.revoked', $1, token.user_id, $3, affected);
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.revoke_api_token(uuid, text, text) IS
    'Revokes a token for good, with all that were derived from it; false when it is unknown, is not that user''s, or was revoked already; event token.revoked each. A NULL user_id stands for any user: for the authenticated one there is revoke_own_api_token';

CREATE FUNCTION tollgate.revoke_own_api_token(token_id uuid, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF tollgate.current_user_id() IS NULL THEN
        RAISE EXCEPTION 'nobody is authenticated'
            USING ERRCODE = 'invalid_authorization_specification', DETAIL = 'This transaction has no identity.',
                  HINT = 'Call tollgate.authenticate() first, in the same transaction.';
    END IF;
    RETURN tollgate.revoke_api_token($1, tollgate.current_user_id(), $2);
END
$$;
COMMENT ON FUNCTION tollgate.revoke_own_api_token(uuid, text) IS
    'Revokes a token of the user who is authenticated in this transaction, else raises 28000; false when it is unknown, somebody else''s, or revoked already';

CREATE FUNCTION tollgate.revoke_tokens_of_users(user_ids text[], reason text, source jsonb) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    roots    uuid[];
    ended    bigint;
    affected bigint := 0;
BEGIN
    -- Whole families, each under the lock of its root, or a child that is being derived would live on. What is rotated or
    -- issued while a lock is waited for has a root of its own, which the next turn finds.
    LOOP
        SELECT array_agg(r.id) INTO roots
            FROM (SELECT t.id FROM tollgate.api_tokens t
                  WHERE t.user_id = ANY ($1) AND t.parent_id IS NULL AND t.revoked_at IS NULL ORDER BY t.id FOR UPDATE) r;
        PERFORM tollgate.check_snapshot(NULL, $1);
        EXIT WHEN roots IS NULL;
        WITH revoked AS (
            UPDATE tollgate.api_tokens t SET revoked_at = clock_timestamp(), revoked_reason = $2
                WHERE t.id = ANY (roots || ARRAY(SELECT d.id FROM unnest(roots) r, tollgate.descendants(r) d (id))) AND t.revoked_at IS NULL
                RETURNING t.id, t.user_id
        ), logged AS (
            INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
                SELECT 'token.revoked', r.id, r.user_id, jsonb_strip_nulls(jsonb_build_object('reason', $2)) || $3 FROM revoked r ORDER BY r.id
        )
        SELECT count(*) INTO ended FROM revoked;
        affected := affected + ended;
    END LOOP;
    IF affected > 0 THEN
        PERFORM tollgate.notify_token_event('token.revoked', NULL, CASE WHEN cardinality($1) = 1 THEN $1[1] END, NULL, affected);
    END IF;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.revoke_tokens_of_users(text[], text, jsonb) IS
    'Revokes every token of some users, and says how many; one event each, with the source in its detail, and one notification. Internal.';

CREATE OR REPLACE FUNCTION tollgate.revoke_all_api_tokens(user_id text, reason text DEFAULT NULL) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN tollgate.revoke_tokens_of_users(ARRAY[$1], tollgate.stored_reason($2), '{}');
END
$$;

CREATE OR REPLACE FUNCTION tollgate.revoke_presented_token(token text, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE sql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT tollgate.revoke_api_token(tollgate.presented_token_id($1), NULL, $2);
END;

CREATE FUNCTION tollgate.attach_users_table("table" regclass, key_column name) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    kind      "char";
    owner     oid;
    is_branch boolean;
    key_type  oid;
    attached  text;
    branch    regclass;
BEGIN
    SELECT c.relkind, c.relowner, c.relispartition INTO kind, owner, is_branch FROM pg_class c WHERE c.oid = $1;
    IF kind IS NULL OR kind NOT IN ('r', 'p') OR is_branch THEN
        RAISE EXCEPTION 'users are kept in an ordinary or a partitioned table'
            USING ERRCODE = 'wrong_object_type', DETAIL = format('Argument: table, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'Attach the table that views show, or the whole of a partitioned table.';
    END IF;
    IF NOT pg_has_role(tollgate.acting_role(), owner, 'USAGE') THEN
        RAISE EXCEPTION 'must be owner of table %', $1
            USING ERRCODE = 'insufficient_privilege', DETAIL = 'Argument: table.',
                  HINT = 'Attaching a table puts triggers on it: let its owner do that.';
    END IF;
    SELECT a.atttypid INTO key_type FROM pg_attribute a WHERE a.attrelid = $1 AND a.attname = $2 AND a.attnum > 0 AND NOT a.attisdropped;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'table % has no such column', $1
            USING ERRCODE = 'undefined_column', DETAIL = format('Argument: key_column, of %s.', tollgate.quote_redacted($2)),
                  HINT = 'Name the column whose text is the user_id of tokens.';
    END IF;
    PERFORM tollgate.check_key_type(key_type);

    -- Ends the transaction's wait for those who change users now, and keeps other attachments out.
    EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', $1);
    SELECT convert_from(substring(t.tgargs FROM 1 FOR length(t.tgargs) - 1), 'UTF8') INTO attached FROM pg_trigger t
        WHERE t.tgrelid = $1 AND t.tgname = 'tollgate_user_deleted';
    IF attached <> $2 THEN
        RAISE EXCEPTION 'table % is attached by another column', $1
            USING ERRCODE = 'duplicate_object', DETAIL = format('Argument: key_column, of %I; it is attached by %I.', $2, attached),
                  HINT = 'Drop the triggers tollgate_user_deleted, tollgate_user_changed and tollgate_users_truncated of the table first.';
    END IF;

    -- A partition may be written to directly, which the partitioned table's triggers for each statement do not see.
    IF kind = 'p' THEN
        PERFORM tollgate.attach_trigger($1, 'tollgate_user_deleted', 'AFTER DELETE', 'FOR EACH ROW', $2);
    ELSE
        PERFORM tollgate.attach_trigger($1, 'tollgate_user_deleted', 'AFTER DELETE',
                                        'REFERENCING OLD TABLE AS departed FOR EACH STATEMENT', $2);
    END IF;
    -- For each row, so that statements that change something else cost nothing.
    PERFORM tollgate.attach_trigger($1, 'tollgate_user_changed', 'AFTER UPDATE',
                                    format('FOR EACH ROW WHEN (OLD.%1$I IS DISTINCT FROM NEW.%1$I)', $2), $2);
    FOR branch IN SELECT $1 UNION SELECT p.relid FROM pg_partition_tree($1) p LOOP
        PERFORM tollgate.attach_trigger(branch, 'tollgate_users_truncated', 'BEFORE TRUNCATE', 'FOR EACH STATEMENT', $2);
    END LOOP;
END
$$;
COMMENT ON FUNCTION tollgate.attach_users_table(regclass, name) IS
    'Revokes the tokens of users who are deleted from a table, truncated away or given another key. Its owner alone may; the key is a uuid, an integer or a text, whose text is the user_id. Once more does what is missing, such as for new partitions, which TRUNCATE of one alone would else not reach';

CREATE FUNCTION tollgate.check_key_type(key_type oid) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Keys are read and compared with our rights. The operators and casts of these types are nobody's to define.
    IF $1 IS NULL OR $1::regtype <> ALL (ARRAY['uuid', 'smallint', 'integer', 'bigint', 'text', 'character varying']::regtype[]) THEN
        RAISE EXCEPTION 'the key of a users table is a uuid, an integer or a text'
            USING ERRCODE = 'datatype_mismatch', DETAIL = format('Argument: key_column, of type %s.', coalesce($1::regtype::text, 'unknown')),
                  HINT = 'Name the column whose text is the user_id of tokens.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_key_type(oid) IS 'Raises 42804 unless a type can be the key of a users table. Internal.';

CREATE FUNCTION tollgate.attach_trigger(users regclass, trigger_name name, event text, firing text, key_column name) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = $1 AND t.tgname = $2) THEN
        EXECUTE format('CREATE TRIGGER %I %s ON %s %s EXECUTE FUNCTION tollgate.revoke_departed_users(%L)', $2, $3, $1, $4, $5);
        -- DROP EXTENSION takes it along, and leaves the table alone.
        EXECUTE format('ALTER TRIGGER %I ON %s DEPENDS ON EXTENSION tollgate', $2, $1);
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.attach_trigger(regclass, name, text, text, name) IS
    'Puts a trigger of attach_users_table on a table, unless it is there. Internal.';

CREATE FUNCTION tollgate.query_as(role oid, query text, keys text[]) RETURNS text[]
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'query_as';
COMMENT ON FUNCTION tollgate.query_as(oid, text, text[]) IS
    'What a query of the keys ($1) answers when it runs with the rights of a role. Internal.';

CREATE FUNCTION tollgate.revoke_departed_users() RETURNS trigger
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    key_column name := TG_ARGV[0];
    -- Of a partition the whole table, where the user may be still, or again.
    users      regclass := coalesce(pg_partition_root(TG_RELID), TG_RELID);
    key_type   oid := (SELECT a.atttypid FROM pg_attribute a WHERE a.attrelid = TG_RELID AND a.attname = key_column AND NOT a.attisdropped);
    departed   text[];
BEGIN
    PERFORM tollgate.check_key_type(key_type);
    IF TG_OP = 'TRUNCATE' THEN
        -- TRUNCATE removes rows that an old snapshot does not show.
        IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
            RAISE EXCEPTION 'a users table cannot be truncated in a % transaction', current_setting('transaction_isolation')
                USING ERRCODE = 'invalid_transaction_state', DETAIL = format('The tokens of the users of %s are to be revoked.', users),
                      HINT = 'Truncate it in a transaction with isolation level READ COMMITTED.';
        END IF;
        -- Each table that is truncated has a trigger of its own, but for partitions that came after the attachment.
        SELECT tollgate.query_as(c.relowner, format('SELECT array_agg(DISTINCT u.%I::text) FROM %s %s u', key_column,
                                                    CASE c.relkind WHEN 'p' THEN '' ELSE 'ONLY' END, TG_RELID::regclass), NULL)
            INTO departed FROM pg_class c WHERE c.oid = TG_RELID;
    ELSE
        IF TG_LEVEL = 'STATEMENT' THEN
            EXECUTE format('SELECT array_agg(DISTINCT d.%I::text) FROM departed d', key_column) INTO departed;
        ELSE
            EXECUTE format('SELECT ARRAY[($1).%I::text]', key_column) INTO departed USING OLD;
        END IF;
        SELECT tollgate.query_as(c.relowner, format('SELECT array_agg(d) FROM unnest($1) d WHERE NOT EXISTS (SELECT FROM %s u WHERE u.%I = d::%s)',
                                                    users, key_column, key_type::regtype), departed)
            INTO departed FROM pg_class c WHERE c.oid = users;
    END IF;
    IF departed IS NOT NULL THEN
        PERFORM tollgate.revoke_tokens_of_users(departed,
            CASE TG_OP WHEN 'UPDATE' THEN 'the user has another key' ELSE 'the user was deleted' END,
            jsonb_build_object('users_table', users));
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION tollgate.revoke_departed_users() IS
    'Trigger of the tables that attach_users_table was told of: revokes the tokens of users who are not in them any more. Internal: whoever may create a trigger with it may revoke anybody''s tokens.';

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

CREATE OR REPLACE FUNCTION tollgate.expire_tokens(batch_size integer DEFAULT 1000) RETURNS bigint
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

-- Called for a few tokens at a time, of which the planning would take most: so there is one plan, and whatever it takes the
-- batch's size for, it goes by the indexes.
CREATE OR REPLACE FUNCTION tollgate.purge_tokens(retention interval DEFAULT '30 days', batch_size integer DEFAULT 1000) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET plan_cache_mode = force_generic_plan
    SET enable_seqscan = off
    SET enable_bitmapscan = off
    SET enable_sort = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
AS $$
DECLARE
    affected bigint;
BEGIN
    PERFORM tollgate.check_batch_size($2);
    PERFORM tollgate.check_retention($1);
    -- Waits for flushes under way, which would else bring usage of a token that is gone; those to come wait for this batch.
    LOCK TABLE tollgate.usage_flushes IN SHARE MODE;
    -- A token whose expiry is not recorded yet stays, or its event would be lost; and so do its ancestors, without which
    -- nothing would say what it may be at most.
    WITH purged AS (
        DELETE FROM tollgate.api_tokens t
            WHERE t.ctid = ANY (ARRAY(
                SELECT d.ctid FROM tollgate.api_tokens d
                WHERE (d.revoked_at IS NOT NULL OR d.expired_at IS NOT NULL) AND least(d.revoked_at, d.expires_at) <= now() - $1
                  AND NOT EXISTS (SELECT FROM tollgate.api_tokens c WHERE c.parent_id = d.id)
                ORDER BY least(d.revoked_at, d.expires_at) LIMIT $2 FOR UPDATE SKIP LOCKED))
            RETURNING t.id, t.user_id, least(t.revoked_at, t.expires_at) AS ended_at
    ), forgotten AS (
        DELETE FROM tollgate.token_usage u USING purged p WHERE u.token_id = p.id
    ), forgotten_hours AS (
        DELETE FROM tollgate.usage_hourly h USING purged p WHERE h.token_id = p.id
    ), forgotten_notices AS (
        DELETE FROM tollgate.expiry_notices n USING purged p WHERE n.token_id = p.id
    ), logged AS (
        -- The epoch is asked for once, not for each row.
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail, epoch)
            SELECT 'token.purged', p.id, p.user_id, jsonb_build_object('ended_at', p.ended_at), (SELECT tollgate.current_epoch()) FROM purged p ORDER BY p.ended_at
    )
    SELECT count(*) INTO affected FROM purged;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.purge_tokens(interval, integer) IS
    'Deletes tokens that were revoked or expired longer ago than the retention, with their usage (event token.purged each), and says how many; derived tokens before those they were derived from';

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

COMMENT ON TYPE tollgate.memory_stats IS 'What the shared memory of this server start holds. Internal: see stats()';

CREATE OR REPLACE FUNCTION tollgate.report_daemon(instance uuid, hostname text, pid integer, version text, started_at timestamptz, tasks jsonb)
    RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- PostgreSQL's own message would show the whole row.
    IF num_nulls($1, $2, $3, $4, $5, $6) > 0 THEN
        RAISE EXCEPTION 'report_daemon takes no NULL'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Arguments: instance, hostname, pid, version, started_at, tasks.',
                  HINT = 'Say all of them; tasks may be an empty array.';
    END IF;
    DELETE FROM tollgate.daemon_reports d WHERE d.last_seen_at < now() - interval '1 day' AND d.instance <> $1;
    INSERT INTO tollgate.daemon_reports (instance, hostname, pid, version, started_at, last_seen_at, tasks)
        VALUES ($1, $2, $3, $4, $5, now(), $6)
        ON CONFLICT ON CONSTRAINT daemon_reports_pkey DO UPDATE SET last_seen_at = excluded.last_seen_at, tasks = excluded.tasks;
END
$$;

CREATE FUNCTION tollgate.session_label(role name, database name, application text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT format('role %s in database %s, application %s', quote_ident($1), quote_ident($2), tollgate.quote_redacted($3));
END;
COMMENT ON FUNCTION tollgate.session_label(name, name, text) IS 'How a finding names a session. Internal.';

CREATE FUNCTION tollgate.deployment_health(patience interval DEFAULT '5 minutes')
    RETURNS TABLE (aspect text, severity text, detail text, mend text)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER ROWS 10
    SET search_path = pg_catalog, pg_temp
    -- Times are for people here, however the caller's session writes them.
    SET intervalstyle = postgres
AS $$
DECLARE
    -- Where the clock stood when the others' transactions are measured, whenever this one began.
    checked_at timestamptz := clock_timestamp();
    -- A queue that somebody empties is nearly empty at all times.
    queue      float8 := pg_notification_queue_usage();
    here       pg_lsn := CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END;
    counters   record;
    subscriber record;
    oldest     timestamptz;
BEGIN
    IF $1 IS NULL OR $1 < interval '0' THEN
        RAISE EXCEPTION 'patience is a time that is not negative'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: patience, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'Give how long a transaction or a delay may last before it is told of, such as interval ''5 minutes''.';
    END IF;

    aspect := 'visibility';
    RETURN QUERY SELECT aspect, 'warn',
            format('%s, who owns the extension, sees no sessions but its own, nor what the standbys do', quote_ident(current_user)),
            format('GRANT pg_read_all_stats TO %I;', current_user)
        WHERE NOT pg_has_role(current_user, 'pg_read_all_stats', 'USAGE');

    -- What is notified and not yet read by all who LISTEN, in any database. When the queue is full, every transaction that
    -- notifies fails at its commit: no token can be revoked any more. PostgreSQL does not show who LISTENs; of those who
    -- do, it is one who does not end its transaction, most likely the one that has been in it for longest.
    aspect := 'notifications';
    RETURN QUERY SELECT aspect, CASE WHEN queue >= 0.5 THEN 'fail' ELSE 'warn' END,
            format('the notification queue is %s %% full; once it is full, revocations fail. A session that LISTENs keeps it by not ending its transaction%s',
                   round(queue::numeric * 100, 1),
                   coalesce('; in one for longest: ' || string_agg(format('process %s (%s, %s for %s)', h.pid, h.label, h.state, h.age), '; ' ORDER BY h.place), '')),
            coalesce((array_agg(format('SELECT pg_terminate_backend(%s);', h.pid) ORDER BY h.place))[1],
                     'look for the process that the server''s log names in the warnings of the NOTIFY queue')
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
                   CASE WHEN a.backend_xid IS NOT NULL THEN 'holds the cursors of the event log, the seals and VACUUM where they were then'
                        ELSE 'keeps VACUUM from removing what was deleted since' END),
            format('SELECT pg_terminate_backend(%s);', a.pid)
        FROM pg_stat_activity a
        WHERE a.xact_start < checked_at - $1 AND a.backend_type = 'client backend' AND a.pid <> pg_backend_pid()
          AND (a.backend_xid IS NOT NULL OR a.backend_xmin IS NOT NULL)
        UNION ALL
        SELECT aspect, 'warn',
            format('a prepared transaction of role %s in database %s waits for %s, and holds the cursors of the event log, the seals, VACUUM and its locks meanwhile',
                   quote_ident(p.owner), quote_ident(p.database), date_trunc('second', checked_at - p.prepared)),
            format('COMMIT PREPARED %s; or ROLLBACK PREPARED, as its coordinator decided (in database %I)',
                   quote_literal(regexp_replace(p.gid, '[0-9A-Fa-f]{80,}', '…', 'g')), p.database)
        FROM pg_prepared_xacts p WHERE p.prepared < checked_at - $1;
    IF NOT FOUND THEN
        RETURN QUERY SELECT aspect, 'ok', format('none lasts longer than %s', $1), NULL;
    END IF;

    -- What a standby has not replayed yet it does not know: a token that was revoked is valid there until then.
    aspect := 'standbys';
    RETURN QUERY SELECT aspect, 'warn',
            format('standby %s is %s%s behind%s: it learns of revocations as late', quote_ident(r.application_name),
                   pg_size_pretty(pg_wal_lsn_diff(here, r.replay_lsn)), coalesce(' and ' || date_trunc('milliseconds', r.replay_lag), ''),
                   CASE WHEN r.state = 'streaming' THEN '' ELSE ', in state ' || r.state END),
            'look at the standby''s log and load; SELECT pg_is_wal_replay_paused(); and pg_wal_replay_resume() there if it is paused'
        FROM pg_stat_replication r
        WHERE pg_wal_lsn_diff(here, r.replay_lsn) > 64 * 1024 * 1024 OR r.replay_lag > least($1, interval '10 seconds')
        UNION ALL
        SELECT aspect, 'warn',
            format('nobody reads the replication slot %s, which keeps %s of WAL', quote_ident(s.slot_name), pg_size_pretty(pg_wal_lsn_diff(here, s.restart_lsn))),
            format('start its standby; if that is gone for good: SELECT pg_drop_replication_slot(%L);', s.slot_name)
        FROM pg_replication_slots s WHERE NOT s.active AND pg_wal_lsn_diff(here, s.restart_lsn) > 64 * 1024 * 1024;
    IF NOT FOUND THEN
        RETURN QUERY SELECT aspect, 'ok', format('%s connected, none lags', count(*)), NULL FROM pg_stat_replication r;
    END IF;

    aspect := 'tables';
    RETURN QUERY SELECT aspect, 'warn',
            format('%s has %s dead rows beside %s live ones', s.relid::regclass, s.n_dead_tup, s.n_live_tup),
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
            format('the sequence %I.%I has given out %s %% of its numbers', s.schemaname, s.sequencename, round(100.0 * s.last_value / s.max_value)),
            format('ALTER SEQUENCE %I.%I AS bigint NO MAXVALUE;', s.schemaname, s.sequencename)
        FROM pg_sequences s WHERE s.schemaname = 'tollgate' AND s.last_value > s.max_value / 2;
    IF NOT FOUND THEN
        RETURN QUERY SELECT aspect, 'ok', 'they are vacuumed, and no sequence runs out', NULL;
    END IF;

    -- Some 100 bytes a row are usual.
    aspect := 'indexes';
    RETURN QUERY SELECT aspect, 'fail', format('%s is not valid: it is kept up but not used, or does not find every row', i.indexrelid::regclass),
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

    aspect := 'usage';
    SELECT s.metering, s.overflowed, s.tracked_keys, s.max_tracked_keys INTO counters FROM tollgate.stats() s;
    IF counters.overflowed > 0 THEN
        RETURN QUERY SELECT aspect, 'warn',
            format('%s uses were not counted since the server started, because there was no room beside %s keys',
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
            SELECT (r.events -> 0 ->> 'at')::timestamptz INTO oldest
                FROM tollgate.read_events(subscriber.epoch, subscriber.horizon, subscriber.delivered, 1) r;
            CONTINUE WHEN oldest IS NULL OR oldest >= checked_at - $1;
            severity := 'warn';
            detail := format('the subscriber %s was not told of what happened %s ago and since, and keeps purge_audit_log from deleting it',
                             quote_literal(subscriber.name), date_trunc('second', checked_at - oldest));
        EXCEPTION WHEN object_not_in_prerequisite_state THEN
            severity := 'fail';
            detail := format('the subscriber %s cannot go on: its cursor is of another history of this database', quote_literal(subscriber.name));
        END;
        mend := format('start what reads it (tollgated run, for "log"); if it is gone for good: SELECT tollgate.drop_subscription(%L);', subscriber.name);
        subscriber := NULL;
        oldest := NULL;
        RETURN NEXT;
    END LOOP;
    IF severity IS NULL THEN
        RETURN QUERY SELECT aspect, 'ok', format('%s, none behind', count(*)), NULL FROM tollgate.subscriptions s;
    END IF;

    aspect := 'settings';
    RETURN QUERY SELECT aspect, 'warn', s.name || ' is ' || s.reset_val || ': ' || w.consequence,
            format('ALTER SYSTEM SET %s = %s; SELECT pg_reload_conf();', s.name, w.wanted)
        FROM (VALUES
            ('autovacuum',         'off', 'on', 'tables grow without end'),
            ('track_counts',       'off', 'on', 'autovacuum does not work without it'),
            ('fsync',              'off', 'on', 'a crash of the machine may ruin the cluster'),
            ('full_page_writes',   'off', 'on', 'a crash of the machine may ruin the cluster'),
            ('synchronous_commit', 'off', 'on', 'a crash may undo a revocation that was acknowledged'),
            ('pgaudit.log_parameter', 'on', 'off', 'the server''s log may hold tokens, as bind values'),
            ('auto_explain.log_parameter_max_length', '-1', '0', 'the server''s log may hold tokens, as bind values of slow statements')
        ) AS w (name, bad, wanted, consequence)
        -- Not what this session was set to since, as a daemon's is.
        JOIN pg_settings s ON s.name = w.name AND s.reset_val = w.bad
        WHERE NOT starts_with(w.name, 'auto_explain.')
           OR EXISTS (SELECT FROM pg_settings e WHERE e.name = 'auto_explain.log_min_duration' AND e.reset_val <> '-1');
    IF NOT FOUND THEN
        RETURN QUERY SELECT aspect, 'ok', 'none endangers tokens or what is recorded of them', NULL;
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.deployment_health(interval) IS
    'What is amiss in this database and on its server, each finding with a severity (ok, warn, fail) and the command that mends it; transactions and delays count once they last longer than patience';

CREATE VIEW tollgate.privilege_decisions AS
    SELECT d.object_type, 'tollgate.' || d.object AS object, d.given_to
    FROM (VALUES
        -- Everyone: what discloses nothing but the caller's own context.
        ('FUNCTION', 'current_scopes()',                                      'public'),
        ('FUNCTION', 'current_token_id()',                                    'public'),
        ('FUNCTION', 'current_user_id()',                                     'public'),
        ('FUNCTION', 'require_scope(text)',                                   'public'),
        ('FUNCTION', 'scope_grants(text[], text)',                            'public'),
        ('FUNCTION', 'token_has_all_scopes(text[])',                          'public'),
        ('FUNCTION', 'token_has_any_scope(text[])',                           'public'),
        ('FUNCTION', 'token_has_scope(text)',                                 'public'),

        -- Verifies, and acts for a token.
        ('FUNCTION', 'authenticate(text, text[], inet)',                      'verifier'),
        ('FUNCTION', 'token_has_scope(text, text)',                           'verifier'),
        ('FUNCTION', 'verify_api_token(text, text[], inet)',                  'verifier'),
        ('FUNCTION', 'verify_api_token_hash(bytea, text[], inet)',            'verifier'),
        ('TYPE',     'verification',                                          'verifier'),

        -- Has tokens come and go.
        ('FUNCTION', 'create_api_token(text, text, text[], interval, jsonb, cidr[], integer, interval, text)', 'issuer'),
        ('FUNCTION', 'derive_api_token(text, text, text[], interval, cidr[])', 'issuer'),
        ('FUNCTION', 'import_api_token(text, text, bytea, text[], interval, jsonb, cidr[], integer, interval)', 'issuer'),
        ('FUNCTION', 'list_api_tokens(text)',                                 'issuer'),
        ('FUNCTION', 'list_scopes()',                                         'issuer'),
        ('FUNCTION', 'revoke_all_api_tokens(text, text)',                     'issuer'),
        ('FUNCTION', 'revoke_api_token(uuid, text, text)',                    'issuer'),
        ('FUNCTION', 'revoke_own_api_token(uuid, text)',                      'issuer'),
        ('FUNCTION', 'revoke_presented_token(text, text)',                    'issuer'),
        ('FUNCTION', 'rotate_api_token(uuid, interval)',                      'issuer'),
        ('FUNCTION', 'set_api_token_enabled(uuid, boolean, text)',            'issuer'),
        ('FUNCTION', 'token_activity(uuid, timestamptz)',                     'issuer'),
        ('TYPE',     'issued_token',                                          'issuer'),

        -- Manages what the others work with, and sees how it fares.
        ('FUNCTION', 'attach_users_table(regclass, name)',                    'admin'),
        ('FUNCTION', 'define_scope(text, text)',                              'admin'),
        ('FUNCTION', 'define_webhook(text, text, text[])',                    'admin'),
        ('FUNCTION', 'deployment_health(interval)',                           'admin'),
        ('FUNCTION', 'drop_scope(text)',                                      'admin'),
        ('FUNCTION', 'drop_subscription(text)',                               'admin'),
        ('FUNCTION', 'drop_webhook(text)',                                    'admin'),
        ('FUNCTION', 'grant_capability(regrole, text)',                       'admin'),
        ('FUNCTION', 'list_capability_grants()',                              'admin'),
        ('FUNCTION', 'purge_audit_log(timestamptz, integer)',                 'admin'),
        ('FUNCTION', 'replay_webhook(text, bigint)',                          'admin'),
        ('FUNCTION', 'revoke_capability(regrole, text)',                      'admin'),
        ('FUNCTION', 'rotate_webhook_secret(text, interval)',                 'admin'),
        ('FUNCTION', 'set_webhook_enabled(text, boolean)',                    'admin'),
        ('FUNCTION', 'stats()',                                               'admin'),
        ('FUNCTION', 'subscription_backlogs(integer)',                        'admin'),
        ('FUNCTION', 'update_api_token(uuid, jsonb)',                         'admin'),
        ('FUNCTION', 'verify_audit_log(bigint, bytea)',                       'admin'),
        ('TYPE',     'audit_verification',                                    'admin'),
        ('VIEW',     'capability_grants',                                     'admin'),
        ('VIEW',     'capability_privileges',                                 'admin'),
        ('VIEW',     'daemons',                                               'admin'),
        ('VIEW',     'tokens',                                                'admin'),
        ('VIEW',     'webhook_deliveries',                                    'admin'),
        ('VIEW',     'webhooks',                                              'admin'),

        -- What the daemon needs, and nothing else.
        ('FUNCTION', 'ack_usage(bigint)',                                     'operator'),
        ('FUNCTION', 'admit_event_reader(bytea, inet)',                       'operator'),
        ('FUNCTION', 'advance_subscription(text, uuid, bigint, bigint[])',    'operator'),
        ('FUNCTION', 'announce_expiries(interval, integer)',                  'operator'),
        ('FUNCTION', 'apply_usage(text, uuid, bigint, tollgate.usage_row[])', 'operator'),
        ('FUNCTION', 'claim_webhook_deliveries(integer, interval)',           'operator'),
        ('FUNCTION', 'deployment_health(interval)',                           'operator'),
        ('FUNCTION', 'drain_usage()',                                         'operator'),
        ('FUNCTION', 'event_position(bigint)',                                'operator'),
        ('FUNCTION', 'expire_tokens(integer)',                                'operator'),
        ('FUNCTION', 'finish_webhook_delivery(bigint, uuid, integer, text, interval)', 'operator'),
        ('FUNCTION', 'open_subscription(text)',                               'operator'),
        ('FUNCTION', 'purge_audit_log(timestamptz, integer)',                 'operator'),
        ('FUNCTION', 'purge_tokens(interval, integer)',                       'operator'),
        ('FUNCTION', 'purge_webhook_deliveries(interval, integer)',           'operator'),
        ('FUNCTION', 'queue_webhook_deliveries(integer)',                     'operator'),
        ('FUNCTION', 'purge_usage(interval, integer)',                        'operator'),
        ('FUNCTION', 'read_events(uuid, bigint, bigint[], integer)',          'operator'),
        ('FUNCTION', 'report_daemon(uuid, text, integer, text, timestamptz, jsonb)', 'operator'),
        ('FUNCTION', 'seal_audit_log(integer)',                               'operator'),
        ('FUNCTION', 'stats()',                                               'operator'),
        ('FUNCTION', 'subscription_backlogs(integer)',                        'operator'),
        ('FUNCTION', 'usage_applied(text, uuid, bigint)',                     'operator'),
        ('FUNCTION', 'usage_pressure()',                                      'operator'),
        ('TYPE',     'event_batch',                                           'operator'),
        ('TYPE',     'event_cursor',                                          'operator'),
        ('TYPE',     'usage_row',                                             'operator'),
        ('TYPE',     'webhook_message',                                       'operator'),
        ('VIEW',     'daemons',                                               'operator'),
        ('VIEW',     'webhooks',                                              'operator'),

        -- Nobody: what the others are made of. Tables and sequences are nobody's without being named here.
        ('FUNCTION', 'acting_role()',                                         'nobody'),
        ('FUNCTION', 'ancestors(uuid)',                                       'nobody'),
        ('FUNCTION', 'attach_trigger(regclass, name, text, text, name)',      'nobody'),
        ('FUNCTION', 'capability_objects(text)',                              'nobody'),
        ('FUNCTION', 'check_batch_size(integer)',                             'nobody'),
        ('FUNCTION', 'check_capability(regrole, text)',                       'nobody'),
        ('FUNCTION', 'check_event_count(integer)',                            'nobody'),
        ('FUNCTION', 'check_key_type(oid)',                                   'nobody'),
        ('FUNCTION', 'check_retention(interval)',                             'nobody'),
        ('FUNCTION', 'check_snapshot(uuid, text[])',                          'nobody'),
        ('FUNCTION', 'check_token_fields(text[], text, text[], timestamptz, jsonb, cidr[], integer, interval)', 'nobody'),
        ('FUNCTION', 'check_within_parent(tollgate.api_tokens, tollgate.api_tokens)', 'nobody'),
        ('FUNCTION', 'claim_token_slot(text)',                                'nobody'),
        ('FUNCTION', 'current_epoch()',                                       'nobody'),
        ('FUNCTION', 'descendants(uuid)',                                     'nobody'),
        ('FUNCTION', 'digest_of(bytea[])',                                    'nobody'),
        ('FUNCTION', 'disable_webhook(text, text)',                           'nobody'),
        ('FUNCTION', 'epoch_identity(integer)',                               'nobody'),
        ('FUNCTION', 'epoch_lineage(integer)',                                'nobody'),
        ('FUNCTION', 'epoch_of_cursor(uuid, bigint, bigint[])',               'nobody'),
        ('FUNCTION', 'fault_of_stretch(tollgate.audit_seals, tollgate.audit_place, boolean)', 'nobody'),
        ('FUNCTION', 'final_place()',                                         'nobody'),
        ('FUNCTION', 'forget_dropped_roles()',                                'nobody'),
        ('FUNCTION', 'give_capability(oid, text)',                            'nobody'),
        ('FUNCTION', 'hash_of_seal(tollgate.audit_seals, bytea)',             'nobody'),
        ('FUNCTION', 'hide_bind_values(oid)',                                 'nobody'),
        ('FUNCTION', 'intersect_networks(cidr[], cidr[])',                    'nobody'),
        ('FUNCTION', 'intersect_scopes(text[], text[])',                      'nobody'),
        ('FUNCTION', 'is_purging_audit_log()',                                'nobody'),
        ('FUNCTION', 'last_purged_seal()',                                    'nobody'),
        ('FUNCTION', 'limit_within(integer, interval, integer, interval)',    'nobody'),
        ('FUNCTION', 'lock_for_rotation(uuid)',                               'nobody'),
        ('FUNCTION', 'lock_managed_token(uuid, boolean)',                     'nobody'),
        ('FUNCTION', 'lock_seals(text)',                                      'nobody'),
        ('FUNCTION', 'lock_token(uuid, boolean)',                             'nobody'),
        ('FUNCTION', 'lock_token_slots(text)',                                'nobody'),
        ('FUNCTION', 'measure_stretch(tollgate.audit_place, tollgate.audit_place)', 'nobody'),
        ('FUNCTION', 'memory_stats()',                                        'nobody'),
        ('FUNCTION', 'narrow_descendants(tollgate.api_tokens, text)',         'nobody'),
        ('FUNCTION', 'network_contains(cidr, cidr)',                          'nobody'),
        ('FUNCTION', 'networks_contain(cidr[], cidr[])',                      'nobody'),
        ('FUNCTION', 'new_webhook_secret()',                                  'nobody'),
        ('FUNCTION', 'no_such_webhook(text)',                                 'nobody'),
        ('FUNCTION', 'notify_family_event(text, uuid, text, text, bigint)',   'nobody'),
        ('FUNCTION', 'notify_token_event(text, uuid, text, text, bigint)',    'nobody'),
        ('FUNCTION', 'place_after_seal(bigint)',                              'nobody'),
        ('FUNCTION', 'place_of_horizon(integer, xid8)',                       'nobody'),
        ('FUNCTION', 'presented_token_id(text)',                              'nobody'),
        ('FUNCTION', 'purge_sealed_events(timestamptz, integer)',             'nobody'),
        ('FUNCTION', 'query_as(oid, text, text[])',                           'nobody'),
        ('FUNCTION', 'quote_redacted(text)',                                  'nobody'),
        ('FUNCTION', 'read_change(tollgate.api_tokens, text, jsonb)',         'nobody'),
        ('FUNCTION', 'refuse_audit_change()',                                 'nobody'),
        ('FUNCTION', 'refuse_token(uuid, text, text)',                        'nobody'),
        ('FUNCTION', 'renew_capability()',                                    'nobody'),
        ('FUNCTION', 'replace_token(uuid, uuid, bytea, text, interval)',      'nobody'),
        ('FUNCTION', 'resolve_capability_role()',                             'nobody'),
        ('FUNCTION', 'revoke_departed_users()',                               'nobody'),
        ('FUNCTION', 'revoke_tokens_of_users(text[], text, jsonb)',           'nobody'),
        ('FUNCTION', 'scope_is_valid(text)',                                  'nobody'),
        ('FUNCTION', 'session_label(name, name, text)',                       'nobody'),
        ('FUNCTION', 'settle_privileges()',                                   'nobody'),
        ('FUNCTION', 'stored_reason(text)',                                   'nobody'),
        ('FUNCTION', 'system_identifier()',                                   'nobody'),
        ('FUNCTION', 'token_changes(tollgate.api_tokens, tollgate.api_tokens)', 'nobody'),
        ('FUNCTION', 'token_is_within(tollgate.api_tokens, tollgate.api_tokens)', 'nobody'),
        ('FUNCTION', 'wal_timeline()',                                        'nobody'),
        ('TYPE',     'audit_place',                                           'nobody'),
        ('TYPE',     'memory_stats',                                          'nobody'),
        ('VIEW',     'object_privileges',                                     'nobody'),
        ('VIEW',     'privilege_decisions',                                   'nobody')
    ) d (object_type, object, given_to);
COMMENT ON VIEW tollgate.privilege_decisions IS
    'The decision about each function, view and type of ours: given to everyone (public), to a capability, or to nobody. Internal: see capability_privileges';

CREATE VIEW tollgate.capability_privileges AS
    SELECT i.capability, d.object_type, d.object,
           CASE d.object_type WHEN 'FUNCTION' THEN 'EXECUTE' WHEN 'VIEW' THEN 'SELECT' WHEN 'TYPE' THEN 'USAGE' END AS privilege
    FROM tollgate.privilege_decisions d
    JOIN (VALUES ('verifier', 'verifier'),
                 ('issuer',   'issuer'), ('issuer', 'verifier'),
                 ('admin',    'admin'),  ('admin',  'issuer'), ('admin', 'verifier'),
                 ('operator', 'operator')) i (capability, includes) ON i.includes = d.given_to;
COMMENT ON VIEW tollgate.capability_privileges IS
    'What each capability gives: verifier verifies and authenticates; issuer also creates, derives, imports, lists, rotates, disables and revokes tokens; admin also changes tokens, manages scopes, capabilities and tables of users, checks and purges the audit log, and sees all tokens, counters and daemons; operator is what the daemon needs';

CREATE FUNCTION tollgate.capability_objects(capability text) RETURNS TABLE (object_id oid, object_type text, object text, privilege text)
    LANGUAGE sql STABLE ROWS 30
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT p.object::regprocedure::oid, p.object_type, p.object::regprocedure::text, p.privilege
        FROM tollgate.capability_privileges p WHERE p.capability = $1 AND p.object_type = 'FUNCTION'
    UNION ALL
    SELECT p.object::regclass::oid, p.object_type, p.object::regclass::text, p.privilege
        FROM tollgate.capability_privileges p WHERE p.capability = $1 AND p.object_type = 'VIEW'
    UNION ALL
    SELECT p.object::regtype::oid, p.object_type, p.object::regtype::text, p.privilege
        FROM tollgate.capability_privileges p WHERE p.capability = $1 AND p.object_type = 'TYPE';
END;
COMMENT ON FUNCTION tollgate.capability_objects(text) IS 'The objects that a capability gives something on; raises if one of them does not exist. Internal.';

CREATE VIEW tollgate.object_privileges AS
    SELECT o.object_type, o.object_id, o.object, o.owner, a.grantee, a.privilege_type AS privilege,
           -- By default privileges, which the role that made the object had set up.
           EXISTS (SELECT FROM pg_default_acl d, LATERAL aclexplode(d.defaclacl) g
                   WHERE d.defaclrole = o.owner AND d.defaclnamespace IN (0, 'tollgate'::regnamespace) AND d.defaclobjtype = o.default_type
                     AND g.grantee = a.grantee)
           -- Privileges that a script of the extension has touched are kept as the object's first ones.
           AND NOT EXISTS (SELECT FROM pg_init_privs i WHERE i.classoid = o.class_id AND i.objoid = o.object_id AND i.objsubid = 0) AS unasked
    FROM (
        SELECT 'FUNCTION', 'pg_proc'::regclass, p.oid, p.oid::regprocedure::text, p.proowner, coalesce(p.proacl, acldefault('f', p.proowner)), 'f'
            FROM pg_proc p WHERE p.pronamespace = 'tollgate'::regnamespace
        UNION ALL
        SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END, 'pg_class'::regclass, c.oid, c.oid::regclass::text,
               c.relowner, c.relacl, CASE c.relkind WHEN 'S' THEN 'S' ELSE 'r' END
            FROM pg_class c WHERE c.relnamespace = 'tollgate'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'S')
        UNION ALL
        -- Of the types only those that are not the rows of a table or view.
        SELECT 'TYPE', 'pg_type'::regclass, t.oid, t.oid::regtype::text, t.typowner, coalesce(t.typacl, acldefault('T', t.typowner)), 'T'
            FROM pg_type t LEFT JOIN pg_class c ON c.oid = t.typrelid
            WHERE t.typnamespace = 'tollgate'::regnamespace AND t.typcategory <> 'A' AND coalesce(c.relkind, 'c') = 'c'
        UNION ALL
        SELECT 'SCHEMA', 'pg_namespace'::regclass, n.oid, quote_ident(n.nspname), n.nspowner, n.nspacl, 'n'
            FROM pg_namespace n WHERE n.nspname = 'tollgate'
    ) o (object_type, class_id, object_id, object, owner, acl, default_type), LATERAL aclexplode(o.acl) a;
COMMENT ON VIEW tollgate.object_privileges IS
    'The privileges on our objects as the catalogue has them, one row each; grantee 0 is PUBLIC. Internal: see capability_grants';

CREATE TABLE tollgate.capabilities (
    role       text        NOT NULL,
    -- Names can be changed, and given to another role. NULL in what was restored to a cluster without such a role.
    role_oid   oid,
    capability text        NOT NULL CHECK (capability IN ('verifier', 'issuer', 'admin', 'operator')),
    granted_at timestamptz NOT NULL DEFAULT now(),
    granted_by text        NOT NULL DEFAULT tollgate.acting_role(),
    CONSTRAINT capabilities_key UNIQUE (role_oid, capability)
);
COMMENT ON TABLE tollgate.capabilities IS 'The capabilities that were granted with grant_capability, and by whom';
COMMENT ON COLUMN tollgate.capabilities.role_oid IS 'The role in this cluster, whatever its name is by now';
SELECT pg_extension_config_dump('tollgate.capabilities',
    'WHERE EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = role_oid AND r.rolname = role)');

CREATE FUNCTION tollgate.resolve_capability_role() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.role_oid := (SELECT r.oid FROM pg_roles r WHERE r.rolname = NEW.role);
    RETURN NEW;
END
$$;
COMMENT ON FUNCTION tollgate.resolve_capability_role() IS 'Trigger that finds the role of a capability in this cluster, in a restored one too. Internal.';

CREATE TRIGGER resolve_role BEFORE INSERT ON tollgate.capabilities
    FOR EACH ROW EXECUTE FUNCTION tollgate.resolve_capability_role();
ALTER TABLE tollgate.capabilities ENABLE ALWAYS TRIGGER resolve_role;

CREATE FUNCTION tollgate.renew_capability() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM tollgate.capabilities c JOIN pg_roles r ON r.oid = c.role_oid
               WHERE c.role_oid = NEW.role_oid AND c.capability = NEW.capability) THEN
        PERFORM tollgate.give_capability(NEW.role_oid, NEW.capability);
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION tollgate.renew_capability() IS 'Trigger that grants what a remembered capability gives by now. Internal.';

CREATE CONSTRAINT TRIGGER renew AFTER INSERT OR UPDATE ON tollgate.capabilities
    DEFERRABLE INITIALLY DEFERRED
    -- What this very transaction granted it has granted.
    FOR EACH ROW WHEN (NEW.granted_at < now()) EXECUTE FUNCTION tollgate.renew_capability();

CREATE FUNCTION tollgate.check_capability(role regrole, capability text) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF $2 IS NULL OR $2 NOT IN ('verifier', 'issuer', 'admin', 'operator') THEN
        RAISE EXCEPTION 'there is no capability %', tollgate.quote_redacted($2)
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: capability.',
                  HINT = 'It is one of verifier, issuer, admin and operator.';
    END IF;
    IF $1 IS NULL OR $1 = 0 THEN
        RAISE EXCEPTION 'a capability belongs to a role'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: role, which is NULL or PUBLIC.',
                  HINT = 'Name the role that your application logs in as. What everyone may do, everyone may do without.';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles r WHERE r.oid = $1) THEN
        RAISE EXCEPTION 'there is no such role'
            USING ERRCODE = 'undefined_object', DETAIL = format('Argument: role, of %s.', $1::oid), HINT = 'CREATE ROLE makes one.';
    END IF;
    -- We run as the owner, whose own privileges everything else rests on.
    IF pg_get_userbyid($1) = current_user THEN
        RAISE EXCEPTION 'role % owns the extension, and may do everything', $1
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: role.',
                  HINT = 'Name the role that your application logs in as, which should own nothing of Tollgate''s.';
    END IF;
    -- A snapshot from before the lock would show the capabilities of before it.
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'capabilities cannot be changed in a % transaction', current_setting('transaction_isolation')
            USING ERRCODE = 'invalid_transaction_state', DETAIL = 'It may not see those that were granted a moment ago.',
                  HINT = 'Change them in a transaction with isolation level READ COMMITTED.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_capability(regrole, text) IS 'Raises unless there is such a capability, and a role that may have it. Internal.';

CREATE FUNCTION tollgate.hide_bind_values(role oid) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    setting text;
BEGIN
    -- In this database alone: nowhere else does the role handle tokens for what it was granted here, and nothing that was set
    -- for it at large can stand against it.
    FOREACH setting IN ARRAY '{log_parameter_max_length, log_parameter_max_length_on_error}'::text[] LOOP
        BEGIN
            EXECUTE format('ALTER ROLE %I IN DATABASE %I SET %I = 0', pg_get_userbyid($1), current_database(), setting);
        EXCEPTION WHEN insufficient_privilege THEN
            RAISE NOTICE 'the bind values of role %, which may be tokens, are not kept out of the server''s log', quote_ident(pg_get_userbyid($1))
                USING DETAIL = format('The owner of the extension, %I, may not set %s for it.', current_user, setting),
                      HINT = format('As somebody who may: ALTER ROLE %I SET %I = 0;', pg_get_userbyid($1), setting);
        END;
    END LOOP;
END
$$;
COMMENT ON FUNCTION tollgate.hide_bind_values(oid) IS
    'Keeps the bind values of a role''s statements in this database, which may be tokens, out of the server''s log, from its next session on. Internal.';

CREATE FUNCTION tollgate.give_capability(role oid, capability text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    given record;
BEGIN
    FOR given IN SELECT o.* FROM tollgate.capability_objects($2) o LOOP
        EXECUTE format('GRANT %s ON %s %s TO %I', given.privilege,
            CASE given.object_type WHEN 'VIEW' THEN 'TABLE' ELSE given.object_type END, given.object, pg_get_userbyid($1));
    END LOOP;
    -- What PostgreSQL logs of a superuser is the superuser's to say; it was none when it was granted this.
    IF NOT (SELECT r.rolsuper FROM pg_roles r WHERE r.oid = $1) THEN
        PERFORM tollgate.hide_bind_values($1);
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.give_capability(oid, text) IS 'Grants a role what a capability gives. Internal.';

CREATE FUNCTION tollgate.forget_dropped_roles() RETURNS void
    LANGUAGE sql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH forgotten AS (
        DELETE FROM tollgate.capabilities c WHERE NOT EXISTS (SELECT FROM pg_roles r WHERE r.oid = c.role_oid)
            RETURNING c.role, c.capability
    )
    INSERT INTO tollgate.audit_log (event, detail)
        SELECT 'capability.revoked', jsonb_build_object('role', f.role, 'capability', f.capability, 'reason', 'there is no such role any more')
        FROM forgotten f;
    UPDATE tollgate.capabilities c SET role = r.rolname FROM pg_roles r WHERE r.oid = c.role_oid AND r.rolname <> c.role;
END;
COMMENT ON FUNCTION tollgate.forget_dropped_roles() IS
    'Forgets the capabilities of roles that were dropped, and follows those that were renamed. Internal.';

CREATE FUNCTION tollgate.grant_capability(role regrole, capability text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    target pg_roles;
    anew   boolean;
BEGIN
    PERFORM tollgate.check_capability($1, $2);
    SELECT r.* INTO target FROM pg_roles r WHERE r.oid = $1;
    IF target.rolsuper OR starts_with(target.rolname, 'pg_') THEN
        RAISE EXCEPTION 'role % is %', $1, CASE WHEN target.rolsuper THEN 'a superuser, who may do everything' ELSE 'one of PostgreSQL''s own' END
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: role.',
                  HINT = 'Name an ordinary role, such as the one that your application logs in as.';
    END IF;
    -- One at a time: PostgreSQL does not queue those who change the privileges of one object.
    LOCK TABLE tollgate.capabilities IN SHARE ROW EXCLUSIVE MODE;
    PERFORM tollgate.forget_dropped_roles();

    anew := EXISTS (
        SELECT FROM tollgate.capability_objects($2) o
        WHERE NOT EXISTS (SELECT FROM tollgate.object_privileges p
                          WHERE p.object_id = o.object_id AND p.grantee = $1 AND p.privilege = o.privilege));
    PERFORM tollgate.give_capability($1, $2);
    INSERT INTO tollgate.capabilities (role, capability) VALUES (target.rolname, $2) ON CONFLICT ON CONSTRAINT capabilities_key DO NOTHING;
    IF FOUND OR anew THEN
        INSERT INTO tollgate.audit_log (event, detail)
            VALUES ('capability.granted', jsonb_build_object('role', target.rolname, 'capability', $2));
    END IF;
    IF NOT target.rolcanlogin THEN
        RAISE NOTICE 'roles that inherit this capability from % may have bind values, which may be tokens, in the server''s log', $1
            USING DETAIL = 'PostgreSQL takes settings from the role that logs in alone.',
                  HINT = 'Grant the capability to each role that logs in, or set log_parameter_max_length and log_parameter_max_length_on_error to 0 for them.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.grant_capability(regrole, text) IS
    'Lets a role do what belongs to a capability (verifier, issuer, admin or operator), and keeps its bind values in this database out of the server''s log, from its next session on; event capability.granted, unless it was so already';

CREATE FUNCTION tollgate.revoke_capability(role regrole, capability text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    taken   record;
    changed boolean;
    left_by text;
BEGIN
    PERFORM tollgate.check_capability($1, $2);
    LOCK TABLE tollgate.capabilities IN SHARE ROW EXCLUSIVE MODE;
    PERFORM tollgate.forget_dropped_roles();

    DELETE FROM tollgate.capabilities c WHERE c.role_oid = $1 AND c.capability = $2;
    changed := FOUND;
    -- What was granted by hand goes as well; what another capability of the role gives stays.
    FOR taken IN
        SELECT o.* FROM tollgate.capability_objects($2) o
        WHERE EXISTS (SELECT FROM tollgate.object_privileges p WHERE p.object_id = o.object_id AND p.grantee = $1)
          AND NOT EXISTS (SELECT FROM tollgate.capabilities c, tollgate.capability_objects(c.capability) k
                          WHERE c.role_oid = $1 AND k.object_id = o.object_id)
    LOOP
        EXECUTE format('REVOKE ALL ON %s %s FROM %I CASCADE',
            CASE taken.object_type WHEN 'VIEW' THEN 'TABLE' ELSE taken.object_type END, taken.object, pg_get_userbyid($1));
        changed := true;
    END LOOP;
    IF changed THEN
        INSERT INTO tollgate.audit_log (event, detail)
            VALUES ('capability.revoked', jsonb_build_object('role', pg_get_userbyid($1), 'capability', $2));
    END IF;

    -- Whoever takes something away must not believe it gone while it is not.
    SELECT string_agg(DISTINCT CASE p.grantee WHEN 0 THEN 'PUBLIC' ELSE p.grantee::regrole::text END, ', ') INTO left_by
        FROM tollgate.capability_objects($2) o JOIN tollgate.object_privileges p ON p.object_id = o.object_id
        WHERE p.grantee <> p.owner AND (p.grantee = 0 OR pg_has_role($1, p.grantee, 'MEMBER'));
    IF left_by IS NOT NULL THEN
        RAISE NOTICE 'role % still may do what belongs to %, or some of it', $1, $2
            USING DETAIL = format('It is given by what was granted to: %s.', left_by),
                  HINT = 'SELECT * FROM tollgate.capability_grants shows what was granted to whom, and the members of each role.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.revoke_capability(regrole, text) IS
    'Takes from a role what belongs to a capability, but for what another of its capabilities gives; event capability.revoked, unless it had nothing of it. The role''s bind values stay out of the log';

CREATE FUNCTION tollgate.list_capability_grants() RETURNS TABLE (
        role text, capability text, granted_at timestamptz, granted_by text, state text, objects text[], members text[])
    LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER ROWS 10
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH held AS MATERIALIZED (
        SELECT p.object_id, p.object, p.owner, p.grantee, p.privilege FROM tollgate.object_privileges p
    ), due AS MATERIALIZED (
        SELECT c.role_oid, c.capability, o.object_id, o.object, o.privilege
        FROM tollgate.capabilities c, tollgate.capability_objects(c.capability) o
    ), lacking AS (
        SELECT d.role_oid, d.capability, array_agg(d.object ORDER BY d.object) AS objects
        FROM due d LEFT JOIN held p ON p.object_id = d.object_id AND p.grantee = d.role_oid AND p.privilege = d.privilege
        WHERE p.object_id IS NULL
        GROUP BY d.role_oid, d.capability
    ), by_hand AS (
        SELECT p.grantee, array_agg(DISTINCT p.object ORDER BY p.object) AS objects
        FROM held p LEFT JOIN due d ON d.role_oid = p.grantee AND d.object_id = p.object_id AND d.privilege = p.privilege
        WHERE p.grantee NOT IN (0, p.owner) AND d.object_id IS NULL
        GROUP BY p.grantee
    ), listed AS (
        SELECT c.role_oid, coalesce(r.rolname, c.role) AS role, c.capability, c.granted_at, c.granted_by,
               CASE WHEN r.oid IS NULL THEN 'no such role' WHEN l.objects IS NULL THEN 'granted' ELSE 'incomplete' END AS state,
               CASE WHEN r.oid IS NULL THEN '{}' ELSE coalesce(l.objects, '{}') END AS objects
        FROM tollgate.capabilities c
            LEFT JOIN pg_roles r ON r.oid = c.role_oid
            LEFT JOIN lacking l ON l.role_oid = c.role_oid AND l.capability = c.capability
        UNION ALL
        SELECT h.grantee, pg_get_userbyid(h.grantee), NULL, NULL, NULL, 'by hand', h.objects FROM by_hand h
    )
    SELECT l.role, l.capability, l.granted_at, l.granted_by, l.state, l.objects,
           ARRAY(SELECT r.rolname::text FROM pg_roles r
                 WHERE r.oid <> l.role_oid AND NOT r.rolsuper AND pg_has_role(r.oid, (SELECT g.oid FROM pg_roles g WHERE g.oid = l.role_oid), 'MEMBER')
                 ORDER BY r.rolname)
    FROM listed l ORDER BY l.role, l.capability;
END;
COMMENT ON FUNCTION tollgate.list_capability_grants() IS 'The rows of the view capability_grants';

CREATE VIEW tollgate.capability_grants AS
    SELECT g.role, g.capability, g.granted_at, g.granted_by, g.state, g.objects, g.members FROM tollgate.list_capability_grants() g;
COMMENT ON VIEW tollgate.capability_grants IS
    'Who may do what. By state: granted; incomplete, when some privileges of the capability (objects) are missing; by hand, for privileges (objects) that no capability of the role accounts for; no such role. Members of a role may do the same';

CREATE FUNCTION tollgate.settle_privileges() RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    statement text;
BEGIN
    -- Nobody but the owner keeps anything that was not granted on purpose: PUBLIC nothing but what is decided below, others
    -- nothing that default privileges gave them.
    FOR statement IN
        SELECT DISTINCT format('REVOKE ALL ON %s %s FROM %s CASCADE',
                   CASE p.object_type WHEN 'VIEW' THEN 'TABLE' ELSE p.object_type END, p.object,
                   CASE p.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(p.grantee)) END)
        FROM tollgate.object_privileges p
        WHERE p.grantee <> p.owner
          AND CASE WHEN p.grantee <> 0 THEN p.unasked
                   ELSE (p.object_type, p.privilege) <> ('SCHEMA', 'USAGE')
                        AND NOT EXISTS (SELECT FROM tollgate.privilege_decisions d
                                        WHERE d.given_to = 'public' AND p.object_type = 'FUNCTION' AND d.object::regprocedure = p.object_id)
              END
    LOOP
        EXECUTE statement;
    END LOOP;

    FOR statement IN
        SELECT format('GRANT EXECUTE ON FUNCTION %s TO PUBLIC', d.object) FROM tollgate.privilege_decisions d
            WHERE d.given_to = 'public'
              AND NOT EXISTS (SELECT FROM tollgate.object_privileges p WHERE p.object_id = d.object::regprocedure AND p.grantee = 0)
        UNION ALL
        SELECT 'GRANT USAGE ON SCHEMA tollgate TO PUBLIC'
            WHERE NOT EXISTS (SELECT FROM tollgate.object_privileges p WHERE p.object_type = 'SCHEMA' AND p.grantee = 0)
    LOOP
        EXECUTE statement;
    END LOOP;

    -- At the commit: see renew_capability().
    UPDATE tollgate.capabilities SET granted_at = granted_at;
END
$$;
COMMENT ON FUNCTION tollgate.settle_privileges() IS
    'Makes the decisions hold for what an installation or an upgrade brought, and has remembered capabilities granted anew. Internal.';

CREATE TABLE tollgate.expiry_notices (
    token_id   uuid        PRIMARY KEY,
    expires_at timestamptz NOT NULL
);
COMMENT ON TABLE tollgate.expiry_notices IS 'The expiry of each token that token.expiring told of. No foreign key, whose check would lock, and so write, the row of the token';
SELECT pg_extension_config_dump('tollgate.expiry_notices', '');

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
    -- Not of a token that has a successor, nor of one that was derived to be brief: nobody need do anything about their end.
    WITH due AS (
        SELECT t.id, t.user_id, t.name, t.expires_at FROM tollgate.api_tokens t
            WHERE t.expires_at > start AND t.expires_at <= until AND t.expired_at IS NULL AND t.revoked_at IS NULL AND t.rotated_to IS NULL
              AND NOT (t.parent_id IS NOT NULL AND t.expires_at <= t.created_at + $1)
              AND NOT EXISTS (SELECT FROM tollgate.expiry_notices n WHERE n.token_id = t.id AND n.expires_at = t.expires_at)
            ORDER BY t.expires_at LIMIT $2 FOR SHARE SKIP LOCKED
    ), noted AS (
        INSERT INTO tollgate.expiry_notices AS n (token_id, expires_at) SELECT d.id, d.expires_at FROM due d
            -- Not if another daemon was faster.
            ON CONFLICT ON CONSTRAINT expiry_notices_pkey DO UPDATE SET expires_at = excluded.expires_at WHERE n.expires_at <> excluded.expires_at
            RETURNING n.token_id
    ), logged AS (
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
            SELECT 'token.expiring', d.id, d.user_id, jsonb_build_object('name', d.name, 'expires_at', d.expires_at)
            FROM due d JOIN noted n ON n.token_id = d.id ORDER BY d.expires_at
    )
    SELECT count(*) INTO affected FROM noted n;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.announce_expiries(interval, integer) IS
    'Tells of tokens that expire within the notice, once for each expiry (event token.expiring), and says of how many';

CREATE TABLE tollgate.webhook_endpoints (
    name            text        PRIMARY KEY,
    url             text        NOT NULL,
    events          text[],
    secret          bytea       NOT NULL,
    previous_secret bytea,
    previous_until  timestamptz,
    enabled         boolean     NOT NULL DEFAULT true,
    disabled_reason text,
    created_at      timestamptz NOT NULL DEFAULT now(),
    created_by      text        NOT NULL DEFAULT tollgate.acting_role(),
    last_success_at timestamptz,
    last_failure_at timestamptz,
    last_error      text
) WITH (fillfactor = 50);
COMMENT ON TABLE tollgate.webhook_endpoints IS 'Receivers of webhooks, with the secrets that their messages are signed with: the one thing here that must be kept as it is';
SELECT pg_extension_config_dump('tollgate.webhook_endpoints', '');

CREATE TABLE tollgate.webhook_queue (
    id              bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    webhook         text        NOT NULL REFERENCES tollgate.webhook_endpoints ON DELETE CASCADE,
    event_epoch     integer     NOT NULL,
    event_id        bigint      NOT NULL,
    event           text        NOT NULL,
    body            text        NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    attempts        integer     NOT NULL DEFAULT 0,
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    lease           uuid,
    last_attempt_at timestamptz,
    last_status     integer,
    last_error      text,
    dead_at         timestamptz
);
COMMENT ON TABLE tollgate.webhook_queue IS 'Messages that were not delivered yet, and those that were given up (dead_at)';
COMMENT ON COLUMN tollgate.webhook_queue.lease IS 'Of the daemon that is sending it; void from next_attempt_at on';
CREATE INDEX webhook_queue_waiting ON tollgate.webhook_queue (webhook, next_attempt_at, id) WHERE dead_at IS NULL;
CREATE INDEX webhook_queue_age ON tollgate.webhook_queue (created_at);
SELECT pg_extension_config_dump('tollgate.webhook_queue', '');
SELECT pg_extension_config_dump('tollgate.webhook_queue_id_seq', '');

CREATE FUNCTION tollgate.new_webhook_secret() RETURNS bytea
    LANGUAGE sql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- 244 bits of the operating system's.
    SELECT sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()));
END;
COMMENT ON FUNCTION tollgate.new_webhook_secret() IS 'A random secret of 32 bytes. Internal.';

CREATE FUNCTION tollgate.no_such_webhook(name text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'there is no webhook %', tollgate.quote_redacted($1)
        USING ERRCODE = 'undefined_object', DETAIL = 'Argument: name.',
              HINT = 'SELECT name FROM tollgate.webhooks lists them; tollgate.define_webhook(name, url) makes one.';
END
$$;
COMMENT ON FUNCTION tollgate.no_such_webhook(text) IS 'Raises 42704. Internal.';

CREATE FUNCTION tollgate.define_webhook(name text, url text, events text[] DEFAULT NULL) RETURNS text
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    new_secret bytea := tollgate.new_webhook_secret();
BEGIN
    IF $1 IS NULL OR $1 !~ '^[a-z0-9][a-z0-9_.-]{0,62}$' OR $1 ~ '[0-9a-f]{16}' THEN
        RAISE EXCEPTION 'this is not a name for a webhook: %', tollgate.quote_redacted($1)
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: name.',
                  HINT = 'A name is 1 to 63 of a-z, 0-9, "_", "." and "-", begins with a letter or digit, and is no secret: metrics and logs show it.';
    END IF;
    -- No user and password: those would be sent to wherever the name leads.
    IF $2 IS NULL OR length($2) > 2000 OR $2 !~ '^https?://[][A-Za-z0-9._:-]+([/?][!-~]*)?$' OR $2 ~ '[0-9A-Fa-f]{80}' THEN
        RAISE EXCEPTION 'this is not an address that a webhook can be sent to'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: url.',
                  HINT = 'Give https://host/path, at most 2000 characters, without user, password and fragment, special characters as %XX.';
    END IF;
    IF $3 IS NOT NULL AND (cardinality($3) NOT BETWEEN 1 AND 100 OR array_position($3, NULL) IS NOT NULL
                           OR EXISTS (SELECT FROM unnest($3) AS e (event) WHERE e.event !~ '^[a-z]{1,40}[.]([a-z]{1,40}|[*])$')) THEN
        RAISE EXCEPTION 'these are not names of events'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: events.',
                  HINT = 'Give NULL for all of them, or an array of names such as token.revoked, and of token.* for all that begins so.';
    END IF;
    -- One at a time, for the count.
    LOCK TABLE tollgate.webhook_endpoints IN SHARE ROW EXCLUSIVE MODE;
    IF EXISTS (SELECT FROM tollgate.webhook_endpoints e WHERE e.name = $1) THEN
        RAISE EXCEPTION 'there is a webhook % already', tollgate.quote_redacted($1)
            USING ERRCODE = 'duplicate_object', DETAIL = 'Argument: name.',
                  HINT = 'Drop it with tollgate.drop_webhook(name), or choose another name.';
    END IF;
    IF (SELECT count(*) FROM tollgate.webhook_endpoints) >= 64 THEN
        RAISE EXCEPTION 'there are 64 webhooks, which is as many as there may be'
            USING ERRCODE = 'program_limit_exceeded',
                  HINT = 'Drop one with tollgate.drop_webhook(name), or send to one receiver that passes on.';
    END IF;
    INSERT INTO tollgate.webhook_endpoints (name, url, events, secret) VALUES ($1, $2, $3, new_secret);
    -- From now on, not from when a daemon looks first.
    PERFORM tollgate.open_subscription('tollgate:webhooks');
    -- The path of an address is often a secret.
    INSERT INTO tollgate.audit_log (event, detail)
        VALUES ('webhook.defined', jsonb_build_object('webhook', $1, 'host', substring($2 FROM '^https?://([^/?]+)'), 'events', $3));
    RETURN 'whsec_' || encode(new_secret, 'base64');
END
$$;
COMMENT ON FUNCTION tollgate.define_webhook(text, text, text[]) IS
    'Has events sent to an address from now on, all of them or those named, and returns the secret that they are signed with: the only time it is shown; event webhook.defined';

CREATE FUNCTION tollgate.rotate_webhook_secret(name text, grace interval DEFAULT '1 day') RETURNS text
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    new_secret bytea := tollgate.new_webhook_secret();
BEGIN
    IF $2 IS NULL OR $2 < interval '0' OR $2 > interval '30 days' THEN
        RAISE EXCEPTION 'a grace is from nothing to 30 days'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: grace, of %s.', coalesce($2::text, 'NULL')),
                  HINT = 'Give how long messages are signed with the old secret as well, such as interval ''1 day''.';
    END IF;
    UPDATE tollgate.webhook_endpoints e
        SET secret = new_secret, previous_secret = CASE WHEN $2 > interval '0' THEN e.secret END,
            previous_until = CASE WHEN $2 > interval '0' THEN now() + $2 END
        WHERE e.name = $1;
    IF NOT FOUND THEN
        PERFORM tollgate.no_such_webhook($1);
    END IF;
    INSERT INTO tollgate.audit_log (event, detail) VALUES ('webhook.rotated', jsonb_build_object('webhook', $1, 'grace', $2));
    RETURN 'whsec_' || encode(new_secret, 'base64');
END
$$;
COMMENT ON FUNCTION tollgate.rotate_webhook_secret(text, interval) IS
    'Gives a webhook a new secret and returns it: the only time it is shown. During the grace messages are signed with the old one too; event webhook.rotated';

CREATE FUNCTION tollgate.set_webhook_enabled(name text, enabled boolean) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF $2 IS NULL THEN
        RAISE EXCEPTION 'a webhook is enabled or not'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: enabled, which is NULL.', HINT = 'Give true or false.';
    END IF;
    UPDATE tollgate.webhook_endpoints e SET enabled = $2, disabled_reason = CASE WHEN NOT $2 THEN 'by an administrator' END
        WHERE e.name = $1 AND e.enabled <> $2;
    IF NOT FOUND THEN
        IF NOT EXISTS (SELECT FROM tollgate.webhook_endpoints e WHERE e.name = $1) THEN
            PERFORM tollgate.no_such_webhook($1);
        END IF;
        RETURN false;
    END IF;
    INSERT INTO tollgate.audit_log (event, detail)
        VALUES (CASE WHEN $2 THEN 'webhook.enabled' ELSE 'webhook.disabled' END, jsonb_build_object('webhook', $1));
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.set_webhook_enabled(text, boolean) IS
    'Stops or resumes sending to a webhook; false if it was so already. Events that come while it is disabled are not kept for it; event webhook.enabled or webhook.disabled';

CREATE FUNCTION tollgate.drop_webhook(name text) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    LOCK TABLE tollgate.webhook_endpoints IN SHARE ROW EXCLUSIVE MODE;
    DELETE FROM tollgate.webhook_endpoints e WHERE e.name = $1;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF NOT EXISTS (SELECT FROM tollgate.webhook_endpoints) THEN
        -- It would hold up purge_audit_log.
        DELETE FROM tollgate.subscriptions s WHERE s.name = 'tollgate:webhooks';
    END IF;
    INSERT INTO tollgate.audit_log (event, detail) VALUES ('webhook.dropped', jsonb_build_object('webhook', $1));
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.drop_webhook(text) IS
    'Forgets a webhook, its secret, and what was to be sent to it; false when there is none of that name; event webhook.dropped';

CREATE VIEW tollgate.webhooks AS
    SELECT e.name, e.url, e.events, e.enabled, e.disabled_reason, e.created_at, e.created_by,
           CASE WHEN e.previous_until > now() THEN e.previous_until END AS old_secret_until,
           (SELECT count(*) FROM tollgate.webhook_queue q WHERE q.webhook = e.name AND q.dead_at IS NULL) AS pending,
           (SELECT count(*) FROM tollgate.webhook_queue q WHERE q.webhook = e.name AND q.dead_at IS NOT NULL) AS dead,
           e.last_success_at, e.last_failure_at, e.last_error
    FROM tollgate.webhook_endpoints e;
COMMENT ON VIEW tollgate.webhooks IS 'The webhooks, without their secrets, and how they fare';

CREATE VIEW tollgate.webhook_deliveries AS
    SELECT q.id, q.webhook, 'evt_' || q.event_epoch || '_' || q.event_id AS message_id, q.event,
           CASE WHEN q.dead_at IS NOT NULL THEN 'dead' WHEN q.lease IS NOT NULL AND q.next_attempt_at > now() THEN 'sending'
                ELSE 'waiting' END AS state,
           q.attempts, q.created_at, CASE WHEN q.dead_at IS NULL THEN q.next_attempt_at END AS next_attempt_at,
           q.last_attempt_at, q.last_status, q.last_error
    FROM tollgate.webhook_queue q;
COMMENT ON VIEW tollgate.webhook_deliveries IS
    'The messages that are not delivered: waiting, sending, or dead, which is given up until they are replayed or purged';

CREATE FUNCTION tollgate.replay_webhook(name text, delivery bigint DEFAULT NULL) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    affected bigint;
BEGIN
    IF NOT EXISTS (SELECT FROM tollgate.webhook_endpoints e WHERE e.name = $1) THEN
        PERFORM tollgate.no_such_webhook($1);
    END IF;
    UPDATE tollgate.webhook_queue q SET dead_at = NULL, attempts = 0, next_attempt_at = now(), lease = NULL
        WHERE q.webhook = $1 AND q.dead_at IS NOT NULL AND ($2 IS NULL OR q.id = $2);
    GET DIAGNOSTICS affected = ROW_COUNT;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.replay_webhook(text, bigint) IS
    'Has dead messages of a webhook sent again, all or the one with that id, with the ids that they had, and says how many';

CREATE FUNCTION tollgate.disable_webhook(name text, reason text) RETURNS void
    LANGUAGE sql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH disabled AS (
        UPDATE tollgate.webhook_endpoints e SET enabled = false, disabled_reason = $2 WHERE e.name = $1 AND e.enabled RETURNING e.name
    )
    INSERT INTO tollgate.audit_log (event, detail)
        SELECT 'webhook.disabled', jsonb_build_object('webhook', d.name, 'reason', $2) FROM disabled d;
END;
COMMENT ON FUNCTION tollgate.disable_webhook(text, text) IS 'Stops sending to a webhook whose receiver asks for that, or has been gone for too long. Internal.';

CREATE FUNCTION tollgate.queue_webhook_deliveries(max_events integer DEFAULT 1000, OUT events bigint, OUT caught_up boolean)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    place  record;
    batch  tollgate.event_batch;
    full_one text;
BEGIN
    PERFORM tollgate.check_event_count($1);
    events := 0;
    caught_up := true;
    IF NOT EXISTS (SELECT FROM tollgate.webhook_endpoints) THEN
        RETURN;
    END IF;
    -- A look first, which locks and writes nothing.
    SELECT s.epoch, s.horizon, s.delivered, s.advanced_at INTO place FROM tollgate.subscriptions s WHERE s.name = 'tollgate:webhooks';
    IF FOUND AND place.advanced_at > now() - interval '1 minute' THEN
        batch := tollgate.read_events(place.epoch, place.horizon, place.delivered, 1);
        IF batch.events = '[]' THEN
            RETURN;
        END IF;
    END IF;
    SELECT o.* INTO place FROM tollgate.open_subscription('tollgate:webhooks') o;
    IF NOT FOUND THEN
        -- Another daemon does the same at this moment.
        RETURN;
    END IF;
    batch := tollgate.read_events(place.epoch, place.horizon, place.delivered, $1);
    events := jsonb_array_length(batch.events);
    caught_up := batch.caught_up;
    IF events > 0 THEN
        FOR full_one IN
            SELECT e.name FROM tollgate.webhook_endpoints e
            WHERE e.enabled AND (SELECT count(*) FROM (SELECT FROM tollgate.webhook_queue q WHERE q.webhook = e.name LIMIT 100000) w) >= 100000
        LOOP
            PERFORM tollgate.disable_webhook(full_one, '100000 messages wait for it');
        END LOOP;
        INSERT INTO tollgate.webhook_queue (webhook, event_epoch, event_id, event, body)
            SELECT e.name, (v.told ->> 'epoch')::integer, (v.told ->> 'id')::bigint, v.told ->> 'event',
                   jsonb_build_object('type', v.told -> 'event', 'timestamp', v.told -> 'at', 'data', v.told)::text
            FROM jsonb_array_elements(batch.events) WITH ORDINALITY AS v (told, place)
            JOIN tollgate.webhook_endpoints e ON e.enabled
                AND (e.events IS NULL OR EXISTS (
                    SELECT FROM unnest(e.events) AS w (wanted)
                    WHERE w.wanted = v.told ->> 'event'
                       OR right(w.wanted, 2) = '.*' AND starts_with(v.told ->> 'event', left(w.wanted, -1))))
            ORDER BY v.place;
    END IF;
    PERFORM tollgate.advance_subscription('tollgate:webhooks', batch.epoch, batch.horizon, batch.delivered);
END
$$;
COMMENT ON FUNCTION tollgate.queue_webhook_deliveries(integer) IS
    'Takes new events, and queues a message of each for every webhook that wants it, once; says of how many events, and whether there are no more';

CREATE TYPE tollgate.webhook_message AS (
    id         bigint,
    lease      uuid,
    webhook    text,
    url        text,
    message_id text,
    body       text,
    attempt    integer,
    secrets    bytea[]
);
COMMENT ON TYPE tollgate.webhook_message IS 'A message that is to be sent now, and the secrets that sign it';

CREATE FUNCTION tollgate.claim_webhook_deliveries(per_webhook integer DEFAULT 8, lease interval DEFAULT '2 minutes')
    RETURNS SETOF tollgate.webhook_message
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    endpoint tollgate.webhook_endpoints;
BEGIN
    IF $1 IS NULL OR $1 NOT BETWEEN 1 AND 1000 OR $2 IS NULL OR $2 < interval '1 second' OR $2 > interval '1 hour' THEN
        RAISE EXCEPTION 'at most 1000 messages of each webhook can be claimed, for a second to an hour'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Arguments: per_webhook, lease.', HINT = 'Claim few, and come again.';
    END IF;
    FOR endpoint IN SELECT e.* FROM tollgate.webhook_endpoints e WHERE e.enabled ORDER BY e.name FOR NO KEY UPDATE SKIP LOCKED LOOP
        -- One daemon at a time for each webhook, so that messages go out in order.
        CONTINUE WHEN EXISTS (
            SELECT FROM tollgate.webhook_queue q
            WHERE q.webhook = endpoint.name AND q.dead_at IS NULL AND q.lease IS NOT NULL AND q.next_attempt_at > clock_timestamp());
        RETURN QUERY
            WITH due AS (
                SELECT q.id AS due_id FROM tollgate.webhook_queue q
                WHERE q.webhook = endpoint.name AND q.dead_at IS NULL AND q.next_attempt_at <= clock_timestamp()
                ORDER BY q.next_attempt_at, q.id LIMIT $1 FOR UPDATE SKIP LOCKED
            ), claimed AS (
                UPDATE tollgate.webhook_queue q
                    SET lease = gen_random_uuid(), attempts = q.attempts + 1, last_attempt_at = clock_timestamp(),
                        next_attempt_at = clock_timestamp() + $2
                    FROM due d WHERE q.id = d.due_id
                    RETURNING q.*
            )
            SELECT c.id, c.lease, c.webhook, endpoint.url, 'evt_' || c.event_epoch || '_' || c.event_id, c.body, c.attempts,
                   CASE WHEN endpoint.previous_until > now() THEN ARRAY[endpoint.secret, endpoint.previous_secret]
                        ELSE ARRAY[endpoint.secret] END
            FROM claimed c ORDER BY c.id;
    END LOOP;
END
$$;
COMMENT ON FUNCTION tollgate.claim_webhook_deliveries(integer, interval) IS
    'Messages that are due, some of each webhook, for the caller to send while the lease lasts; after that they are due again';

CREATE FUNCTION tollgate.finish_webhook_delivery(
    id bigint, lease uuid, status integer, error text DEFAULT NULL, retry_after interval DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    delays constant interval[] := '{5 s, 5 min, 30 min, 2 h, 5 h, 10 h, 14 h, 20 h, 24 h}';
    why    constant text := left(regexp_replace($4, '[0-9A-Fa-f]{16,}', '…', 'g'), 500);
    sent   tollgate.webhook_queue;
BEGIN
    IF $3 BETWEEN 200 AND 299 THEN
        DELETE FROM tollgate.webhook_queue q WHERE q.id = $1 AND q.lease = $2 RETURNING q.* INTO sent;
        UPDATE tollgate.webhook_endpoints e SET last_success_at = clock_timestamp() WHERE e.name = sent.webhook;
        RETURN sent.id IS NOT NULL;
    END IF;
    IF $3 IS NULL AND $4 IS NULL THEN
        -- It was not sent at all.
        UPDATE tollgate.webhook_queue q SET lease = NULL, attempts = q.attempts - 1, next_attempt_at = q.last_attempt_at
            WHERE q.id = $1 AND q.lease = $2;
        RETURN FOUND;
    END IF;
    UPDATE tollgate.webhook_queue q
        SET lease = NULL, last_status = $3, last_error = why,
            dead_at = CASE WHEN q.attempts > cardinality(delays) THEN clock_timestamp() END,
            next_attempt_at = clock_timestamp() + least(greatest(
                -- Up to a fifth more, so that what failed together is not tried together.
                delays[least(q.attempts, cardinality(delays))] * (1 + random() / 5), $5), interval '1 day')
        WHERE q.id = $1 AND q.lease = $2
        RETURNING q.* INTO sent;
    UPDATE tollgate.webhook_endpoints e SET last_failure_at = clock_timestamp(), last_error = why WHERE e.name = sent.webhook;
    IF $3 = 410 AND sent.id IS NOT NULL THEN
        PERFORM tollgate.disable_webhook(sent.webhook, 'the receiver answered 410 Gone');
    END IF;
    RETURN sent.id IS NOT NULL;
END
$$;
COMMENT ON FUNCTION tollgate.finish_webhook_delivery(bigint, uuid, integer, text, interval) IS
    'Says what came of a claimed message: the HTTP status, or NULL with an error; neither if it was not sent. It is done with, tried again after 5 seconds to a day, dead after 10 attempts; status 410 disables the webhook, event webhook.disabled. False if the lease had ended';

CREATE FUNCTION tollgate.purge_webhook_deliveries(retention interval DEFAULT '30 days', batch_size integer DEFAULT 1000) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    affected bigint;
BEGIN
    PERFORM tollgate.check_batch_size($2);
    IF $1 IS NULL OR $1 < interval '0' OR $1 > interval '1000 years' THEN
        RAISE EXCEPTION 'a retention is from nothing to 1000 years'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: retention, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'Give how long messages that were given up are kept, such as interval ''30 days''.';
    END IF;
    -- Those of a webhook that is disabled would else stay for ever.
    DELETE FROM tollgate.webhook_queue q
        WHERE q.id = ANY (ARRAY(
            SELECT d.id FROM tollgate.webhook_queue d JOIN tollgate.webhook_endpoints e ON e.name = d.webhook
            WHERE d.created_at < now() - $1 AND (d.dead_at < now() - $1 OR NOT e.enabled)
            ORDER BY d.created_at LIMIT $2));
    GET DIAGNOSTICS affected = ROW_COUNT;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.purge_webhook_deliveries(interval, integer) IS
    'Deletes messages that were given up longer ago than the retention, and those of that age that wait for a disabled webhook, and says how many';

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

CREATE FUNCTION tollgate.admit_event_reader(token_hash bytea, client_ip inet DEFAULT NULL, OUT code text, OUT token_id uuid)
    LANGUAGE sql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT v.code, v.token_id FROM tollgate.verify_api_token_hash($1, '{tollgate:events}', $2) v;
END;
COMMENT ON FUNCTION tollgate.admit_event_reader(bytea, inet) IS
    'Verifies that a token, by its sha256 digest, may read events over HTTP: it needs the scope tollgate:events; the code, and the token''s id';

DROP FUNCTION tollgate.token_digest(text);
DROP FUNCTION tollgate.check_reason(text);

-- Before there were capabilities, the daemon's role was granted its functions one by one. Some of them are others now.
INSERT INTO tollgate.capabilities (role, capability, granted_at)
    SELECT r.rolname, 'operator', now() - interval '1 microsecond'
    FROM pg_catalog.pg_roles r
    WHERE NOT r.rolsuper AND EXISTS (
        SELECT FROM pg_catalog.pg_proc p, pg_catalog.aclexplode(p.proacl) a
        WHERE p.oid = 'tollgate.drain_usage()'::regprocedure AND a.grantee = r.oid AND a.privilege_type = 'EXECUTE');

SELECT tollgate.settle_privileges();
